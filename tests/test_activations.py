"""Another activation in the place of ReLU: what nbs/nets/11_activations.ipynb does not check."""
import copy
from functools import partial

import pytest
import torch
from torch import nn

from noisyseg.measure.evaluation import draw_seed
from noisyseg.nets.activations import activated, with_activation
from noisyseg.nets.blocks import deactivated, residual_blocks
from noisyseg.nets.classifiers import resnet20
from noisyseg.nets.unet3plus import unet3plus_slim, unet3plus_tiny
from noisyseg.perturb.clone import perturbed
from noisyseg.perturb.laws import MaxGaussian
from noisyseg.train.checkpoints import load_model, save_model

x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('make', [unet3plus_tiny, partial(unet3plus_slim, deep_supervision=False), resnet20])
def test_gradients_are_those_of_the_function(make, training):
    "By the shortcuts, by the layers one by one, and with a function that is ReLU by another name."
    torch.manual_seed(0)
    net = make(5).train(training)
    twin = with_activation(copy.deepcopy(net), nn.Hardtanh, min_val=0., max_val=1e9)
    for model in (net, twin):
        out = model(x)
        sum(o.square().mean() for o in (out if isinstance(out, list) else [out])).backward()
    pairs = [(name, p, q) for (name, p), q in zip(net.named_parameters(), twin.parameters()) if p.grad is not None]
    for name, p, q in pairs:
        close = 1e-4 * (1 + p.grad.abs().max().item())
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-2, atol=close, msg=name)

def test_noise_is_the_same_and_leaves_nothing():
    "The weights keep their names and order, so one seed is one noise, whatever the activation."
    torch.manual_seed(0)
    net = unet3plus_tiny(3).eval()
    twin = with_activation(copy.deepcopy(net), nn.SiLU)
    with torch.no_grad(): clean = twin(x)
    with perturbed(net, MaxGaussian(0.1), generator=draw_seed(0, 0)):
        with perturbed(twin, MaxGaussian(0.1), generator=draw_seed(0, 0)):
            assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twin.parameters()))
    with torch.no_grad(): assert torch.equal(twin(x), clean)

def test_blocks_are_switched_off_all_the_same():
    for make in (resnet20, unet3plus_slim):
        net = with_activation(make(5), nn.GELU).eval()
        before = len(residual_blocks(make(5)))
        assert len(residual_blocks(net)) == before
        with torch.no_grad():
            clean = net(x)
            with deactivated(net, 0): assert not torch.equal(net(x), clean)
            assert torch.equal(net(x), clean)

@pytest.mark.parametrize('make, settings', [(nn.SiLU, {}), (nn.GELU, {'approximate': 'tanh'}),
                                            (nn.LeakyReLU, {'negative_slope': 0.2}), (nn.PReLU, {})])
def test_a_checkpoint_builds_it_again(make, settings, tmp_path):
    net = with_activation(resnet20(4, width=4), make, **settings).eval()
    again = load_model(save_model(net, tmp_path/'net', half=False))
    with torch.no_grad(): assert torch.equal(again(x), net(x))
    assert again.recipe == net.recipe and again.recipe['args']['recipe']['factory'] == 'resnet20'

def test_a_card_asks_for_no_server_and_no_other_class():
    recipe = {'factory': 'unet3plus_resnet', 'args': {'n_classes': 2, 'width': 4, 'encoder': 'resnet18',
                                                      'pretrained': True}}
    assert activated(recipe, 'SiLU').recipe['args']['activation'] == 'SiLU'
    for name in ('Linear', 'Module', '__class__', 'modules', 'relu'):
        with pytest.raises(ValueError, match='no activation'): activated(recipe, name)
