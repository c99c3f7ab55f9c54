"Any network's output: one adapter for learner, loss, metric, sweep, card, predict, explorer and pseudo-labels"
import functools
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import segmentation as tv

from noisyseg.data.datasets import scenes
from noisyseg.measure.inference import evaluate, predict_mask
from noisyseg.measure.sweeps import sweep
from noisyseg.nets.adapter import as_logits, confidence, logits_of, to_classes
from noisyseg.perturb.laws import MaxGaussian
from noisyseg.show.explorer import NoiseExplorer
from noisyseg.train.learner import segmentation_learner
from noisyseg.train.methods.match_loss import consistency, pseudo_labels

N = 7   # classes of the scenes


@pytest.fixture(scope='module')
def dls(): return scenes(n_train=4, n_valid=2, size=64, bs=2, seed=0)


class Wrapped(nn.Module):
    "A small network whose logits come in the form that `wrap` gives them"
    def __init__(self, n=N, wrap=lambda o: o, step=1):
        super().__init__()
        self.conv, self.wrap = nn.Conv2d(3, n, 3, step, 1), wrap

    def forward(self, x): return self.wrap(self.conv(x))


FORMS = {'tensor': lambda o: o, 'list': lambda o: [o, o[..., ::2, ::2]],
         'with presence': lambda o: ([o], o.mean((2, 3))), 'torchvision': lambda o: {'out': o, 'aux': 0*o},
         'mapping': lambda o: {'loss': None, 'logits': o},
         'object': lambda o: SimpleNamespace(logits=o), 'masks': lambda o: {'masks': o}}


def case(n, step, wrap):
    "Pictures, masks and a small network: the same numbers for every form"
    torch.manual_seed(0)
    return torch.rand(2, 3, 32, 32), torch.randint(max(n, 2), (2, 32, 32)), Wrapped(n, wrap, step).eval()


def made_of(x, y, net):
    "What everything that reads a network's output makes of it"
    explorer = NoiseExplorer(net, (x, y), corruptions=False)
    frame, classes = explorer.frame(dict(level=.1))['preds']['model'], explorer.info['classes']
    explorer.close()
    return dict(logits=logits_of(net, x, (32, 32)).detach(), frame=frame, classes=classes,
                sweep=sweep(net, [(x, y)], MaxGaussian(), levels=[0, .1], draws=1, progress=False).value,
                scores=evaluate(net, [(x, y)]).value, mask=predict_mask(net, x[0]),
                pseudo=pseudo_labels(net(x), torch.ones(2, 32, 32, dtype=torch.bool)))


@functools.cache
def plain(n, step):
    "A network that enlarges its logits itself, and what is made of it"
    x, y, net = case(n, step, lambda o: F.interpolate(o, (32, 32), mode='bilinear') if step > 1 else o)
    return net, made_of(x, y, net)


# a quarter of the size, and half of it for one form: each scale is enlarged by the same code
@pytest.mark.parametrize('n', [1, N])
@pytest.mark.parametrize('form, step', [*((form, step) for form in FORMS for step in (1, 4)), ('mapping', 2)])
def test_every_form_means_the_same(form, step, n):
    "In whatever form, at whatever scale: the same logits, scores and pictures as a plain network's that enlarges"
    x, y, net = case(n, step, FORMS[form])
    other, theirs = plain(n, step)
    assert all(map(torch.equal, net.state_dict().values(), other.state_dict().values()))
    mine = made_of(x, y, net)
    assert torch.equal(mine['logits'], theirs['logits'])
    for k in ('sweep', 'scores'): assert mine[k].equals(theirs[k]), k
    for k in ('mask', 'frame'): assert (mine[k] == theirs[k]).all(), k
    assert mine['classes'] == theirs['classes'] == [str(i) for i in range(max(n, 2))]
    assert all(map(torch.equal, mine['pseudo'], theirs['pseudo']))
    if form != 'list': assert torch.equal(*(consistency(m(x), mine['pseudo'], 0.) for m in (net, other)))


@pytest.mark.parametrize('loss', [None, nn.CrossEntropyLoss(), lambda out, y: F.cross_entropy(out['out'], y)])
def test_a_dict_trains(dls, loss):
    "torchvision's dict under the default loss, one of PyTorch's, and one that takes the dict itself; and what follows"
    net = tv.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=N)
    learn = segmentation_learner(dls, net, loss_func=loss)
    before = net.classifier.low_classifier.weight.clone()
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        preds, y = learn.get_preds()
    assert not torch.equal(before, net.classifier.low_classifier.weight)
    assert preds.shape == (2, N, 64, 64) and y.shape == (2, 64, 64)
    assert 0 <= learn.recorder.values[-1][-1] <= 1


def test_coarse_logits_train(dls):
    "Logits at a quarter of the size, in an object, and one channel: the loss falls"
    for n in (1, N):
        net = Wrapped(n, lambda o: SimpleNamespace(logits=o), 4)
        task = [(x, (y > 0).long() if n == 1 else y) for x, y in dls.valid]
        x, y = task[0]
        learn = segmentation_learner(dls, net, n_classes=n)
        loss = lambda: learn.loss_func(net(x), y)
        opt, first = torch.optim.Adam(net.parameters(), .05), loss().item()
        for _ in range(5):
            opt.zero_grad()
            loss().backward()
            opt.step()
        assert loss().item() < first


def test_one_channel_is_a_sigmoid():
    "Its class and its confidence, and a warning where the sigmoid has been taken already"
    one = torch.tensor([[[[3., -1.]]]])
    two = torch.cat([-one/2, one/2], 1)
    assert torch.equal(to_classes(one), to_classes(two)) and to_classes(one).tolist() == [[[1, 0]]]
    torch.testing.assert_close(confidence(one), confidence(two))
    x = torch.rand(1, 3, 8, 8)
    with pytest.warns(UserWarning, match='sigmoid'): logits_of(Wrapped(1, torch.sigmoid), x)


def test_labels_outside_are_an_error():
    "The logits say how many classes there are, and a label beyond them is refused by sweep, scores and explorer alike"
    x, y = torch.rand(1, 3, 16, 16), torch.zeros(1, 16, 16, dtype=torch.long)
    y[0, 0, 0] = 5
    net = Wrapped(3).eval()
    for call in (lambda: sweep(net, [(x, y)], MaxGaussian(), levels=0, draws=1), lambda: evaluate(net, [(x, y)]),
                 lambda: NoiseExplorer(net, (x, y))):
        with pytest.raises(ValueError, match=r'holds \[5\], but 3 classes'): call()
    with pytest.raises(ValueError, match='expected 3 different names'): NoiseExplorer(net, (x, y*0), classes=['a', 'b'])


@pytest.mark.parametrize('out, error', [
    ([], 'empty'), ({}, 'got dict'), (None, 'got NoneType'), ([{'boxes': 0}], 'detectors'), ('x', 'got str'),
    ({'queries': torch.zeros(1)}, 'queries'), (torch.zeros(2, 3, 5, 8), r'\(2, 3, 5, 8\)'),
    (torch.zeros(2, 8, 8), 'unsqueeze'), (torch.zeros(2, 3), 'height, width'),
    (torch.zeros(2, 3, 8, 8).long(), 'argmax'),
    (torch.zeros(2, 3, 16, 16), r'\(2, 3, 16, 16\)'), (torch.zeros(2, 3, 7, 7), r'\(2, 3, 7, 7\)')])
def test_what_cannot_be_read(out, error):
    "An error that says what came"
    with pytest.raises((TypeError, ValueError), match=f'(?s)net: .*{error}'): as_logits(out, (8, 8), 'net')


def test_a_binary_classifier_with_a_sigmoid_is_named():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 1))
    x = torch.randn(6, 3, 2, 2)
    ended = nn.Sequential(net, nn.Sigmoid())
    with pytest.warns(UserWarning, match='Does it end with a sigmoid'): logits_of(ended, x, ())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        logits_of(net, x, ())
