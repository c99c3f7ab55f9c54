"Quantization: the grid against PyTorch's, odd weights, training through the callback, and the explorer."
import math

import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from functools import partial
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.ao.quantization.observer import MinMaxObserver, PerChannelMinMaxObserver
from torch.nn.functional import cross_entropy

from noisyseg.perturb.disturbance import Law
from noisyseg.perturb.clone import clone_weights, perturbed
from noisyseg.perturb.selectors import conv_and_linear
from noisyseg.show.predictor import NoisyPredictor, controls, disturbance_of, menu_of, values_of
from noisyseg.perturb.quantization import Quantize, inner_layers, quantized, weight_grid
from noisyseg.measure.evaluation import scores
from noisyseg.measure.sweeps import sweep
from noisyseg.train.checkpoints import read_card, save_model
from noisyseg.train.noise import WeightNoise
from noisyseg.nets.unet3plus import unet3plus_tiny

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)
laws = st.builds(Quantize, st.sampled_from([2, 3, 4, 5, 6, 7, 8]), st.sampled_from(['channel', 'tensor']),
                 st.sampled_from(['symmetric', 'minmax']))
exact = dict(rtol=0, atol=0)


def weight(shape, seed, scale, shift):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g) * torch.rand((shape[0], *[1] * (len(shape) - 1)),
                                                        generator=g) * scale + shift


@settings(max_examples=300, deadline=None)
@given(shapes, laws, st.integers(0, 10**6), st.sampled_from([1e-6, 1., 1e6]), st.sampled_from([0., -1.5, 0.3]))
def test_the_grid_is_pytorchs(shape, law, seed, scale, shift):
    w = weight(shape, seed, scale, shift * scale)
    step, zero, low, high = weight_grid(w, law.bits, law.per, law.scheme)
    if law.per == 'tensor': theirs = torch.fake_quantize_per_tensor_affine(w, step.item(), int(zero.item()), low, high)
    else: theirs = torch.fake_quantize_per_channel_affine(w, step.flatten(), zero.flatten().int(), 0, low, high)
    torch.testing.assert_close(law(w), theirs, **exact)
    assert (law(w) - w).abs().max() <= step.max() * 1.01 and torch.equal(law(w), law(w, torch.randn(shape)))
    for row in law(w).reshape(shape[0], -1): assert law.per == 'tensor' or len(row.unique()) <= law.values
    assert len(law(w).unique()) <= law.values * (1 if law.per == 'tensor' else shape[0])


@settings(max_examples=100, deadline=None)
@given(shapes.filter(lambda s: len(s) > 1), st.sampled_from([2, 4, 8]), st.integers(0, 10**6),
       st.sampled_from([0., -1.5, 0.3]))
def test_ranges_are_the_observers(shape, bits, seed, shift):
    w = weight(shape, seed, 1., shift)
    args = dict(dtype=torch.quint8, quant_min=0, quant_max=2**bits - 1, eps=0.)
    for per, observer in (('tensor', MinMaxObserver(qscheme=torch.per_tensor_affine, **args)),
                          ('channel', PerChannelMinMaxObserver(qscheme=torch.per_channel_affine, **args))):
        observer(w)
        step, zero = observer.calculate_qparams()
        ours = weight_grid(w, bits, per, 'minmax')
        torch.testing.assert_close(ours.step.flatten(), step.flatten(), **exact)
        torch.testing.assert_close(ours.zero.flatten(), zero.flatten().float(), **exact)


def test_halves_go_to_the_even_neighbour():
    "With a step of one, every half between the ends, on both sides."
    for bits, edge in ((4, 7.), (8, 127.)):
        halves = torch.cat([torch.arange(-edge + 0.5, edge), torch.tensor([-edge, edge])])
        torch.testing.assert_close(Quantize(bits, 'tensor')(halves), halves.round(), **exact)
        up = torch.cat([torch.arange(0.5, 2**bits - 1), torch.tensor([2.**bits - 1])])
        torch.testing.assert_close(Quantize(bits, 'tensor', 'minmax')(up), up.round(), **exact)


@settings(max_examples=100, deadline=None)
@given(laws, st.floats(-2.**99, 2.**99, width=32), shapes)
def test_constants_stay(law, value, shape):
    w = torch.full(shape, value)
    out = law(w)
    if abs(value) < 1e-36: assert (out - w).abs().max() <= 1e-36
    else: torch.testing.assert_close(out, w, rtol=2e-6, atol=0)


@settings(max_examples=60, deadline=None)
@given(laws, shapes, st.integers(0, 10**6), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_no_number_is_an_error(law, shape, seed, bad):
    w = weight(shape, seed, 1., 0.)
    w.view(-1)[seed % w.numel()] = bad
    with pytest.raises(ValueError, match='nan or inf'): law(w)


def test_more_bits_are_closer():
    w = weight((16, 8, 3, 3), 0, 1., 0.05)
    for per in ('channel', 'tensor'):
        for scheme in ('symmetric', 'minmax'):
            off = [(Quantize(b, per, scheme)(w) - w).square().mean().item() for b in (16, 12, 8, 6, 4, 3, 2)]
            assert off == sorted(off) and off[0] < 1e-8
    ternary = Quantize(math.log2(3), 'tensor')
    assert ternary.values == 3 and len(ternary(w).unique()) == 3 and Quantize(0).values == math.inf


def test_exact_recovery_and_sliders():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 300, 3), nn.BatchNorm2d(300), nn.Conv2d(300, 40, 3),
                        nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)))
    start = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(RuntimeError), perturbed(net, Quantize(3), conv_and_linear): raise RuntimeError
    # rows in pieces: the second kernel is large
    clone = clone_weights(net, conv_and_linear).inject(Quantize(4.), 0)
    assert torch.equal(net[2].weight.detach(), Quantize(4.)(start[4]))
    for bits in (2., 0., 7.3):
        clone.rescale(bits)
        assert torch.equal(net[2].weight.detach(), Quantize(bits)(start[4]))
    clone.recover()
    assert all(torch.equal(a, b.detach()) for a, b in zip(start, net.parameters()))


def test_straight_through_in_the_callback(tmp_path):
    "A step of WeightNoise(Quantize) is: gradient at the rounded weights, applied to the clean ones."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    start = {k: v.detach().clone() for k, v in net.named_parameters()}
    x, y = torch.randn(6, 1, 8, 8), torch.randint(0, 3, (6,))
    sgd = partial(OptimWrapper, opt=torch.optim.SGD)
    learn = Learner(DataLoaders([(x, y)], [(x, y)]), net, nn.CrossEntropyLoss(), sgd, lr=0.1,
                    cbs=WeightNoise(Quantize(3), where=conv_and_linear, seed=0))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    leaves = {k: v.clone().requires_grad_() for k, v in start.items()}
    through = {k: v + (Quantize(3)(v.detach()) - v).detach() if v.ndim > 1 else v for k, v in leaves.items()}
    cross_entropy(torch.func.functional_call(net, through, (x,)), y).backward()
    for k, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), start[k] - 0.1 * leaves[k].grad, rtol=1e-5, atol=1e-6)
    assert Law.from_dict(read_card(save_model(learn, tmp_path/'net'))['law']) == Quantize(3)


def test_first_and_last_layer_stay():
    net = unet3plus_tiny(3)
    names = conv_and_linear.names(net)
    assert inner_layers(first=2, last=1).names(net) == names[2:-1]
    new = quantized(net, Quantize(2), inner_layers())
    changed = [k for (k, p), q in zip(net.named_parameters(), new.parameters()) if not torch.equal(p, q)]
    assert changed and set(changed) <= set(names[1:-1]) and names[0] not in changed


def test_the_explorers_side():
    "It is in the menu, with choices for its settings, and any position of the slider predicts."
    menu = menu_of()
    assert isinstance(menu['Quantize'], Quantize)
    form = controls(menu['Quantize'])
    assert form['apart'] and not form['random']   # no bits are not beside the mildest level
    assert (form['field'], form['level'], form['top']) == ('bits', 4., 12.)
    assert {f['name']: f['choices'] for f in form['fields']} == {'per': ['channel', 'tensor'],
                                                                 'scheme': ['symmetric', 'minmax']}
    settings = {'per': 'tensor', 'scheme': 'minmax'}
    assert disturbance_of(menu, 'Quantize', 3, settings) == Quantize(3., 'tensor', 'minmax')
    assert values_of(Quantize(3.), menu)['level'] == 3.
    torch.manual_seed(0)
    lens = NoisyPredictor({'net': unet3plus_tiny(3).eval()}, torch.randn(1, 3, 32, 32), {'all': conv_and_linear})
    clean = lens('net', 0, Quantize(0.), 'all', 0)[0]
    off = {bits: (lens('net', 0, Quantize(bits), 'all', 0)[0][0] != clean[0]).mean()
           for bits in (0.04, 0.5, 1., 1.6, 2.3, 4., 8., 12.)}
    assert off[12.] < 0.02 and off[2.3] >= off[8.]
    with pytest.raises(ValueError, match='0 .not quantized. to 16'): disturbance_of(menu, 'Quantize', 20)


def test_sweeps_of_masks():
    "Segmentation goes the same way, and a cell is what one gets by hand; bits have no draws."
    torch.manual_seed(0)
    net = unet3plus_tiny(3, width=2, filters=(4, 6, 8))
    dl = [(torch.rand(2, 3, 16, 16), torch.randint(0, 3, (2, 16, 16)))]
    df = sweep(net, dl, Quantize(), levels=[0, 2, 4], progress=False)
    assert df['level'].unique().tolist() == [0, 4, 2] and set(df['draw']) == {0}      # from mild to strong, drawn once
    with perturbed(net.eval(), Quantize(2), conv_and_linear): by_hand = [v for *_, v, _ in scores(net, dl, list('012'))]
    assert df.query('level == 2')['value'].tolist() == pytest.approx(by_hand, nan_ok=True, abs=0)
    several = [Quantize(per=p, scheme=s) for p in ('channel', 'tensor') for s in ('symmetric', 'minmax')]
    assert len(sweep(net, dl, several, levels=[0, 2], progress=False)) == 4 * 2 * 5
