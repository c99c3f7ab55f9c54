"""Properties that hold for any layer, shape, dtype, memory format, tying, parametrization and law, on made-up examples.

The examples are the same on every run (`derandomize`); `HYPOTHESIS_PROFILE=long` tries twenty times as many new."""
import math
import os
import warnings

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from noisyseg.perturb.disturbance import Law
from noisyseg.perturb.laws import (GRAINS, AbsoluteGaussian, MaxGaussian, MultiplicativeGaussian, RelativeGaussian,
                                   clip_normal, max_abs)
from noisyseg.perturb.clone import WeightClone, clone_weights, perturbed
from noisyseg.perturb.quantization import Quantize, weight_grid
from noisyseg.perturb.selectors import by_name, conv_and_linear, conv_and_norm, kernels_and_scales, select

def examples(n):
    "So many examples: a fixed set of them, or many others"
    if os.environ.get('HYPOTHESIS_PROFILE') == 'long': return settings(max_examples=20*n, deadline=None)
    # shrinking takes minutes
    return settings(max_examples=n, deadline=None, derandomize=True, database=None, phases=[hypothesis.Phase.generate],
                    suppress_health_check=[hypothesis.HealthCheck.too_slow])


# --- what is drawn
# -----------------------------------------------------------------------------------------------------------------

small = st.integers(1, 5)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
CONVS = [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]
NORMS = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm]

@st.composite
def layers(draw):
    "Any layer that has weights"
    kind = draw(st.sampled_from(['conv', 'linear', 'bilinear', 'batch norm', 'group norm', 'layer norm',
                                 'instance norm', 'embedding', 'rnn', 'attention',
                                 'block']))
    i, o = draw(small), draw(small)
    if kind == 'conv':
        groups = draw(st.integers(1, 3))
        return draw(st.sampled_from(CONVS))(i*groups, o*groups, draw(st.integers(1, 3)), groups=groups,
                                            bias=draw(st.booleans()))
    if kind == 'linear': return nn.Linear(i, o, bias=draw(st.booleans()))
    if kind == 'bilinear': return nn.Bilinear(i, o, draw(small))
    if kind == 'batch norm': return draw(st.sampled_from(NORMS))(i)
    if kind == 'group norm': return nn.GroupNorm(i, i*o)
    if kind == 'layer norm': return nn.LayerNorm([i, o] if draw(st.booleans()) else o)
    if kind == 'instance norm': return nn.InstanceNorm2d(i, affine=True)
    if kind == 'embedding': return draw(st.sampled_from([nn.Embedding, nn.EmbeddingBag]))(i, o)
    if kind == 'rnn':
        return draw(st.sampled_from([nn.RNN, nn.LSTM, nn.GRU]))(i, o, draw(st.integers(1, 2)),
                                                                bidirectional=draw(st.booleans()))
    if kind == 'attention': return nn.MultiheadAttention(2*i, 2, kdim=draw(st.sampled_from([None, 3])))
    return nn.Sequential(nn.Conv2d(i, o, 3), nn.BatchNorm2d(o), nn.ReLU(), nn.Conv2d(o, i, 1))

PARAMETRIZATIONS = {'weight norm': parametrizations.weight_norm, 'spectral norm': parametrizations.spectral_norm,
                    'orthogonal': parametrizations.orthogonal}

@st.composite
def models(draw):
    "One to three layers in some dtype and memory format, maybe tied, parametrized, frozen, in training mode"
    torch.manual_seed(draw(st.integers(0, 2**31)))
    net = nn.Sequential(*(draw(layers()) for _ in range(draw(st.integers(1, 3)))))
    if draw(st.booleans()):
        net.append(nn.Linear(3, 3))
        net.append(PARAMETRIZATIONS[draw(st.sampled_from(list(PARAMETRIZATIONS)))](nn.Linear(4, 3)))
    if draw(st.booleans()):
        a, b = nn.Linear(4, 3), nn.Linear(4, 3)
        b.weight = a.weight if draw(st.booleans()) else nn.Parameter(a.weight.data)
        net.extend([a, b])
    # orthogonal and spectral norm have no half precision on every device: what is parametrized stays as it is
    dtype = draw(st.sampled_from(DTYPES))
    for m in net:
        if not nn.utils.parametrize.is_parametrized(m): m.to(dtype)
    ndims = {p.ndim for p in net.parameters()} & {4, 5}
    if len(ndims) == 1 and draw(st.booleans()):
        net.to(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[ndims.pop()])
    net.requires_grad_(draw(st.booleans()))
    with torch.no_grad():
        for p in net.parameters(): p.mul_(draw(st.sampled_from([1, 1, 1, 0, 1e-3, 1e3])))
    return net.train(draw(st.booleans()))

level = st.one_of(st.just(0.), st.floats(0, 2), st.sampled_from([1e-30, 1e-8, 1e6, 1e38]))
LAWS = st.one_of(
    st.builds(MaxGaussian, level, st.floats(0.01, 6) | st.just(math.inf), st.sampled_from(GRAINS),
              st.sampled_from(['clamp', 'truncate'])),
    st.builds(AbsoluteGaussian, level), st.builds(MultiplicativeGaussian, level), st.builds(RelativeGaussian, level),
    st.builds(Quantize, st.integers(0, 16) | st.floats(0, 16), st.sampled_from(['channel', 'tensor']),
              st.sampled_from(['symmetric', 'minmax'])))
WHERES = st.sampled_from(['*', '*weight*', conv_and_norm, conv_and_linear, kernels_and_scales, ~conv_and_norm,
                          kernels_and_scales | by_name('*bias*')])
SEEDS = st.integers(0, 2**63 - 1)

def snapshot(model):
    return {k: (v.data_ptr(), v.stride(), v.dtype, v.detach().clone()) for k,
            v in [*model.named_parameters(), *model.named_buffers()]}

def same(a, b):
    "Same names, memory, layout and bits"
    raw = lambda t: t.contiguous().reshape(-1).view(torch.uint8)
    return a.keys() == b.keys() and all(a[k][:3] == b[k][:3] and torch.equal(raw(a[k][3]), raw(b[k][3])) for k in a)


# --- recovery -------------------------------------------------------------------------------------------------------
# -----------------

@examples(150)
@given(models(), LAWS, WHERES, SEEDS, st.sampled_from(['noisy', 'recovered']), st.sampled_from(['normal', 'table']))
def test_recovery(net, law, where, seed, gradient, rng):
    ("Bit for bit in the same memory, and parameters stay themselves; what can't be perturbed is refused before "
     "anything moves")
    before, params = snapshot(net), list(net.parameters())
    try: sites = select(net, where)
    except ValueError as e:
        assert 'selects no weights' in str(e)
        return
    with torch.no_grad(): clean = [s.value().clone() for s in sites]
    with perturbed(net, law, where, seed, gradient, rng) as clone:
        assert len(clone.names) == len(sites) and clone.n_weights == sum(c.numel() for c in clean)
        with torch.no_grad(): noisy = [s.value().clone() for s in sites]
        assert all(v.dtype == c.dtype and v.stride() == c.stride() for v, c in zip(noisy, clean) if v.is_contiguous())
        if law.level == 0: assert all(torch.equal(v, c) for v, c in zip(noisy, clean))
    assert same(before, snapshot(net)) and all(map(lambda p, q: p is q, params, net.parameters()))
    with perturbed(net, law, where, seed, gradient, rng), torch.no_grad():     # one seed, one noise
        assert all(torch.equal(s.value().nan_to_num(7), v.nan_to_num(7)) for s, v in zip(sites, noisy))
    assert same(before, snapshot(net))

@examples(60)
@given(models(), LAWS, st.lists(st.floats(0, 2), min_size=1, max_size=4), SEEDS)
def test_rescaled_is_drawn_anew(net, law, levels, seed):
    "A slider agrees with a fresh injection of the same seed at that level, and comes back clean"
    before = snapshot(net)
    # weight norm of nothing is NaN
    with torch.no_grad(): assume(all(s.value().isfinite().all() for s in select(net, '*')))
    clone = clone_weights(net, '*').inject(law, seed)
    try:
        for v in levels:
            clone.rescale(v)
            with torch.no_grad(): slid = [s.value().clone() for s in select(net, '*')]
            clone.inject(law.at(v), seed)
            for a, s in zip(slid, select(net, '*')):
                with torch.no_grad(): b = s.value()
                eps = torch.finfo(b.dtype).eps
                if isinstance(law, Quantize): assert torch.equal(a, b)
                else:
                    torch.testing.assert_close(a.double(), b.double(), rtol=4*eps, atol=4*eps*float(b.abs().max())
                                               + torch.finfo(b.dtype).tiny)
    finally: clone.recover()
    assert same(before, snapshot(net))


# --- laws -----------------------------------------------------------------------------------------------------------
# -------------------

@st.composite
def weights(draw):
    "A weight of 1 to 5 dimensions"
    shape = draw(st.sampled_from([(40_000,), (200, 200), (50, 40, 20), (40, 30, 5, 7), (20, 10, 5, 8, 5)]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.randn(shape, generator=g, dtype=torch.float64)*draw(st.sampled_from([1e-3, 1., 50.])) + draw(
            st.sampled_from([0., 0.1]))

# not w's own seed
def draws(w, seed, n):
    return torch.randn(n, *w.shape, generator=torch.Generator().manual_seed(~seed % 2**32), dtype=torch.float64)

@examples(40)
@given(weights(), SEEDS, st.floats(0.001, 2), st.one_of(st.floats(0.2, 6), st.just(math.inf)), st.sampled_from(GRAINS),
       st.sampled_from(['clamp', 'truncate']), st.sampled_from([MaxGaussian, AbsoluteGaussian, MultiplicativeGaussian,
                                                                RelativeGaussian]))
def test_statistics(w, seed, level, alpha, per, clip, law):
    ("Mean 0 and the standard deviation that the law names, within 5 standard errors of 160,000 draws; no number "
     "beyond the bound")
    law = law(level, alpha, per, clip) if law is MaxGaussian else law(level)
    sigma = {MaxGaussian: lambda: level*max_abs(w, per), AbsoluteGaussian: lambda: torch.tensor(level, dtype=w.dtype),
             MultiplicativeGaussian: lambda: level*w.abs(), RelativeGaussian: lambda: level
             *w.std(correction=0)}[type(law)]()
    z = torch.stack([law.noise(w, d)/sigma for d in draws(w, seed, 4)])
    share = 1.
    if isinstance(law, MaxGaussian) and alpha < math.inf:
        assert z.abs().max() <= alpha*(1 + 1e-12)
        inside, density = math.erf(alpha/math.sqrt(2)), math.exp(-alpha**2/2)/math.sqrt(2*math.pi)
        moment = inside - 2*alpha*density                         # of z² within the bound
        share = moment + alpha**2*(1 - inside) if clip == 'clamp' else moment/inside
    n = z.numel()
    assert abs(z.mean()) < 5*math.sqrt(share/n)
    fourth = z.pow(4).mean().item()
    assert abs(z.square().mean().item() - share) < 5*math.sqrt(max(fourth - share**2, 0)/n) + 1e-9

@examples(100)
@given(st.floats(1e-3, 8), st.sampled_from(['clamp', 'truncate']), st.sampled_from([torch.float32, torch.float64]),
       SEEDS)
def test_the_bound_is_exact(alpha, clip, dtype, seed):
    "No draw lies beyond alpha, however far out, and its sign and order stay"
    odd = torch.tensor([0., 5, -5, 40, -40, math.inf, -math.inf, 1e-30], dtype=dtype)
    z = torch.cat([torch.randn(1000, generator=torch.Generator().manual_seed(seed), dtype=dtype), odd])
    c = clip_normal(z, alpha, clip)
    assert c.dtype == dtype and (c.abs() <= torch.tensor(alpha, dtype=dtype)).all() and c.isfinite().all()
    assert ((c >= 0) | (z < 0)).all() and ((c <= 0) | (z > 0)).all()
    assert (c[z.argsort()].diff() >= -torch.finfo(dtype).eps*alpha).all()

@examples(60)
@given(weights(), st.floats(0.5, 16), st.sampled_from(['channel', 'tensor']), st.sampled_from(['symmetric', 'minmax']))
def test_quantized_weights_lie_on_a_grid(w, bits, per, scheme):
    "No more values than bits allow, none farther away than half a step, and rounding twice is rounding once"
    law = Quantize(bits, per, scheme)
    q, grid = law(w), weight_grid(w, bits, per, scheme)
    groups = q.reshape(len(q) if per == 'channel' else 1, -1)
    assert max(len(g.unique()) for g in groups[:3]) <= law.values
    assert ((q - w).abs() <= grid.step*(0.5 + 1e-9) + (grid.step if scheme == 'minmax' else 0)).all()
    torch.testing.assert_close(law(q), q, rtol=1e-9, atol=1e-12)

@examples(100)
@given(LAWS)
def test_a_law_is_what_its_dictionary_says(law):
    assert Law.from_dict(law.to_dict()) == law and law.at(law.level) == law and type(law).__name__ in law.describe()
    assert law == type(law)(**{k: v for k, v in law.to_dict().items() if k
                               != 'disturbance'}) and hash(law) == hash(law.at(law.level))


# --- nonsense -------------------------------------------------------------------------------------------------------
# -------------------

anything = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.binary(max_size=3),
                     st.lists(st.integers(), max_size=3),
                     st.tuples(), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
                     st.sampled_from([np.float32(1), np.nan, 1j, object, len, torch.ones(2), 10**400, nn.Linear]))

@examples(300)
@given(st.sampled_from([MaxGaussian, AbsoluteGaussian, MultiplicativeGaussian, RelativeGaussian, Quantize]),
       st.lists(anything, min_size=1, max_size=4))
def test_laws_take_nonsense_as_an_error(law, args):
    "A law, or a ValueError or TypeError; and what was accepted works"
    try: made = law(*args)
    except (ValueError, TypeError): return
    w = torch.randn(3, 2, 2, 2)
    assert made(w, torch.randn(w.shape)).shape == w.shape and Law.from_dict(made.to_dict()) == made

@examples(300)
@given(st.sampled_from(['model', 'law', 'where', 'generator', 'gradient', 'rng', 'level', 'dict']), anything)
def test_nonsense_is_a_documented_error(which, value):
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    before = snapshot(net)
    args = dict(model=net, law=MaxGaussian(0.1), where='*', generator=0, gradient='noisy', rng='normal')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            if which == 'dict': assert isinstance(Law.from_dict(value), Law)
            elif which == 'level':
                with perturbed(net, MaxGaussian(0.1)) as clone: clone.rescale(value)
            else:
                with perturbed(**{**args, which: value}) as clone: assert isinstance(clone, WeightClone)
    except (ValueError, TypeError) as e: assert str(e)
    assert same(before, snapshot(net))

@examples(80)
@given(models(), st.sampled_from([torch.float16, torch.float32, torch.float64]), st.integers(0, 2**31))
def test_a_law_that_returns_nonsense(net, dtype, seed):
    "Another shape, another type, nothing: an error; another dtype: cast. Weights come back either way"
    before, pick = snapshot(net), np.random.default_rng(seed)
    odd = [lambda w, z: None, lambda w, z: w[:0], lambda w, z: w.sum()[None, None], lambda w, z: w[None], lambda w,
           z: 3., lambda w, z: w.numpy(),
           lambda w, z: [w]]
    law = odd[pick.integers(len(odd))]
    with pytest.raises(ValueError, match="returns a tensor of the weight's shape"), perturbed(net, law, '*', 0): pass
    assert same(before, snapshot(net))
    with perturbed(net, lambda w, z: (w + z).to(dtype), '*', 0): pass
    assert same(before, snapshot(net))
