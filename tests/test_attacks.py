"Attacks with absolute and relative strength, and noise that is never removed."
import math

import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from functools import partial
from hypothesis import given, settings, strategies as st
from torch import nn

from noisyseg.measure.sensitivity import weight_std
from noisyseg.measure.summary import score_table
from noisyseg.measure.sweeps import sweep
from noisyseg.nets.classifiers import SmallResNet
from noisyseg.perturb.disturbance import Law
from noisyseg.perturb.laws import AbsoluteGaussian, RelativeGaussian
from noisyseg.perturb.clone import clone_weights, perturbed
from noisyseg.perturb.selectors import conv_and_linear
from noisyseg.show.predictor import menu_of
from noisyseg.train.checkpoints import read_card, save_model
from noisyseg.train.noise import AccumulatingNoise, WeightNoise


def net(seed=0):
    torch.manual_seed(seed)
    m = SmallResNet(4, blocks=(1, 1), width=4).eval()
    for s in m.modules():
        if isinstance(s, nn.BatchNorm2d): s.running_mean.normal_(0, 0.1), s.running_var.uniform_(0.5, 2)
    return m


def batches(n=2):
    g = torch.Generator().manual_seed(1)
    return [(torch.rand(25, 3, 8, 8, generator=g), torch.randint(0, 4, (25,), generator=g)) for _ in range(n)]


def scaled(model, c):
    "The same function with every convolution before a batch norm times `c`."
    new = SmallResNet(4, blocks=(1, 1), width=4).eval()
    new.load_state_dict(model.state_dict())
    convs, norms = ([m for m in new.modules() if isinstance(m, kind)] for kind in (nn.Conv2d, nn.BatchNorm2d))
    with torch.no_grad():
        for conv, norm in zip(convs, norms):
            conv.weight *= c
            norm.running_mean *= c
            norm.running_var *= c * c
            norm.eps *= c * c
    return new


def quick(model, batches, opt=torch.optim.SGD, **kw):
    return Learner(DataLoaders(batches, batches[:1]), model, nn.CrossEntropyLoss(), partial(OptimWrapper, opt=opt),
                   **kw)


def fit(learn, n=1):
    with learn.no_bar(), learn.no_logging(): learn.fit(n)


def attacks(models, dl, relative, absolute, **kw):
    "Both attacks, side by side"
    return sweep(models, dl, {'relative': RelativeGaussian(), 'absolute': AbsoluteGaussian()},
                 levels={'relative': relative, 'absolute': absolute}, progress=False, **kw)


@settings(max_examples=50, deadline=None)
@given(st.integers(-20, 20), st.floats(0, 3), st.integers(0, 10**6),
       st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_relative_noise_scales_with_the_weight(power, strength, seed, shape):
    g = torch.Generator().manual_seed(seed)
    w, z = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    law, c = RelativeGaussian(strength), 2.**power
    assert torch.equal(law(c * w, z), c * law(w, z))
    std = (w.double() - w.double().mean()).square().mean().sqrt()
    torch.testing.assert_close(law.noise(w, z).double(), strength * std * z.double(), rtol=1e-5, atol=1e-7)


def test_relative_noise_by_the_ground_floor():
    m = net()
    with perturbed(m, RelativeGaussian(0.5), conv_and_linear, 3): direct = [p.detach().clone() for p in m.parameters()]
    clone = clone_weights(m, conv_and_linear).inject(RelativeGaussian(0.1), 3).rescale(0.5)
    for p, q in zip(m.parameters(), direct): torch.testing.assert_close(p.detach(), q, rtol=1e-5, atol=1e-7)
    clone.recover()
    assert Law.from_dict(RelativeGaussian(0.2).to_dict()) == RelativeGaussian(0.2) and 'RelativeGaussian' in menu_of()
    one = nn.Linear(1, 1)
    # one number has no spread
    with perturbed(one, RelativeGaussian(9.), conv_and_linear): assert one.weight.isfinite().all()


@pytest.mark.parametrize('c', [0.125, 1024.])
def test_a_relative_attack_does_not_care_for_scale(c):
    model = net()
    twin, dl, convs = scaled(model, c), batches(), lambda name, module, weight: isinstance(module, nn.Conv2d)
    with torch.no_grad(): torch.testing.assert_close(twin(dl[0][0]), model(dl[0][0]), rtol=1e-4, atol=1e-5)
    df = attacks({'a': model, 'b': twin}, dl, (0, 0.3, 1), (0, 0.05, 0.3), where=convs)
    of = lambda name, attack: df.query('model == @name and disturbance == @attack and metric == "accuracy"')[
            'value'].to_numpy()
    # an image on the border may fall either way
    assert abs(of('a', 'relative') - of('b', 'relative')).max() <= 1 / 50 + 1e-9
    assert abs(of('a', 'absolute') - of('b', 'absolute')).max() > 0.05


def test_rows_and_table():
    models, dl = {'a': net(0), ('b', 0): net(1), ('b', 1): net(2)}, batches()
    df = attacks(models, dl, (0, 0.5), (0, 0.1), seed=4)
    relative = sweep(models, dl, {'relative': RelativeGaussian()}, levels=(0, 0.5), seed=4, progress=False)
    assert df[df['disturbance'] == 'relative'].reset_index(drop=True).equals(relative)
    table = score_table(df)
    assert list(table.index) == ['a', 'b'] and list(table.columns) == [
        ('relative', 'as trained'), ('relative', 'strength = 50 %'), ('absolute', 'as trained'),
        ('absolute', 'strength = 0.1')]
    assert '±' in table['relative', 'strength = 50 %']['a'] and '±' not in table['relative', 'as trained']['a']
    assert score_table(df, 'balanced accuracy').shape == (2, 4)


def test_a_generator_is_enough():
    df = attacks(net(), iter(batches()), (0, 0.5), (0, 0.1), draws=2)
    assert set(df['disturbance']) == {'relative', 'absolute'}


def test_noise_stays_exactly():
    ("After k batches without learning, the weights are the start plus the sum of k draws; biases and batch norm are "
     "untouched.")
    model, dl = net(), batches(5)
    start = {k: p.detach().clone() for k, p in model.named_parameters()}
    learn = quick(model, dl, lr=0., cbs=AccumulatingNoise(AbsoluteGaussian(0.1), seed=7))
    fit(learn, 2)
    g = torch.Generator().manual_seed(7)
    for _ in range(10):
        for k in conv_and_linear.names(model): start[k] = start[k] + 0.1 * torch.randn(start[k].shape, generator=g)
    for k, p in model.named_parameters(): torch.testing.assert_close(p.detach(), start[k], rtol=1e-5, atol=1e-6)
    grown = weight_std(model) / weight_std(net())
    assert grown['layer1.0.conv1.weight'] > 1.2


def test_recovering_noise_does_not_stay():
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    fit(quick(model, batches(5), lr=0., cbs=WeightNoise(AbsoluteGaussian(0.1), where=conv_and_linear, seed=7)))
    assert all(torch.equal(a, b.detach()) for a, b in zip(before, model.parameters()))


def test_first_steps_agree():
    ("On the first batch both kinds of training see the same noisy weights and get the same gradient; they differ in "
     "where they step from.")
    noise, found = [], []
    for make in (WeightNoise, AccumulatingNoise):
        model, start = net(), net()
        learn = quick(model, batches(1), lr=0.1, cbs=make(AbsoluteGaussian(0.1), where=conv_and_linear, seed=2))
        fit(learn)
        found.append({k: p.detach() for k, p in model.named_parameters()})
    with perturbed(start, AbsoluteGaussian(0.1), conv_and_linear, 2):
        noise = {k: p.detach().clone() for k, p in start.named_parameters()}
    for k, p in start.named_parameters():
        torch.testing.assert_close(found[1][k] - found[0][k], noise[k] - p.detach(), rtol=1e-4, atol=1e-6)


def test_ways_out_and_card(tmp_path):
    model = net()
    noise = AccumulatingNoise(AbsoluteGaussian(0.1), seed=1)
    learn = quick(model, batches(2), lr=0.01, cbs=noise)
    fit(learn)
    card = read_card(save_model(learn, tmp_path/'net'))
    assert card['noise']['gradient'] == 'noisy, never recovered' and card['noise'][
            'where'] == 'conv_and_linear' and 'never removed' in noise.describe()
    assert 'one_batch' not in learn.__dict__
    assert all(p.isfinite().all() for p in model.parameters())
    half = nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten()).to(torch.bfloat16)
    learn = quick(half, [(x.to(torch.bfloat16), y) for x, y in batches(1)], lr=0.,
                  cbs=AccumulatingNoise(AbsoluteGaussian(1.), seed=1))
    learn.loss_func = lambda out, y: nn.functional.cross_entropy(out.float(), y)
    fit(learn)
    assert half[0].weight.dtype == torch.bfloat16 and half[0].weight.float().std() > 0.5


def test_weight_std():
    m = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    m[0].weight.data = torch.tensor([[1., -1.], [3., 5.]])
    assert weight_std(m).to_dict() == {'0.weight': pytest.approx(math.sqrt(5))}
