"""Device disturbances: moments against a published model, distributions, order, exact recovery, ageing, odd weights.

`pcm_moments.csv` holds means and standard deviations, in µS, of single phase-change cells. They came from aihwkit
1.1.0: its own `PCMLikeNoiseModel(g_max=25.)`, programming, drift coefficients and drift noise called in this order,
four million cells for each line."""
import copy
import csv
import json
import math
import signal
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from noisyseg import MaxGaussian, Quantize, WeightNoise, compose, perturbed, robustness_card, sweep
from noisyseg.measure.card import card_table
from noisyseg.measure.sensitivity import layer_sensitivity
from noisyseg.perturb import selectors
from noisyseg.perturb.activations import ActivationNoise, ClippedActivations, Converters, hooked, layers_of
from noisyseg.perturb.bit_flips import BITS, BitFlips, flipped_bits
from noisyseg.perturb.clone import clone_weights, holding
from noisyseg.perturb.devices import (DAY, HOUR, YEAR, DeviceRange, LogNormal, PhaseChange, StuckCells, UnequalPairs,
                                      cell_of)
from noisyseg.perturb.disturbance import Disturbance, Law, another_draw
from noisyseg.perturb.passes import EveryPass
from noisyseg.perturb.profiles import load_profile, make_profile, profile_from_json, shipped_profiles
from noisyseg.perturb.selectors import conv_and_linear
from noisyseg.show.plots import plot_sweep
from noisyseg.show.predictor import controls, disturbance_of, menu_of, values_of

LAWS = [PhaseChange(), PhaseChange(25., 'none'), PhaseChange(YEAR, 'channel', 'channel'), LogNormal(0.3),
        LogNormal(0.3, 10.), StuckCells(0.1), StuckCells(0.1, 'max'), StuckCells(0.1, 'random'), UnequalPairs(0.1),
        UnequalPairs(0.1, 'tensor'), DeviceRange(1.), BitFlips(0.01), BitFlips(0.01, 'bf16', 'clip'),
        BitFlips(0.01, 'fp32', 'zero'), BitFlips(0.01, 'fp32')]
ACTIVATIONS = [Converters(3.), Converters(4., 'inputs'), ActivationNoise(0.1), ClippedActivations(0.5)]
every = LAWS + ACTIVATIONS + [EveryPass(PhaseChange()), compose(Quantize(4), PhaseChange(), Converters(6.), level_of=1)]
by_name = dict(ids=str)


def numbers(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 1)).eval()


def bits(model): return [t.clone().view(torch.uint8) for t in model.state_dict().values() if t.ndim]
def same(a, b): return all(map(torch.equal, a, b))
def hooks(model): return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def reference():
    with open(Path(__file__).parent/'pcm_moments.csv') as f:
        return {(float(r['g_target']), float(r['seconds'])): (float(r['mean']), float(r['std']))
                for r in csv.DictReader(f)}


@pytest.mark.parametrize('seconds', [25., HOUR, DAY, 30 * DAY, YEAR])
def test_moments_of_a_cell(seconds):
    "Within 2 % of the published model: five times, six conductances, the cell at zero among them"
    n = 400_000
    draws = numbers(3, n, seed=int(seconds))
    for (target, t), (mean, std) in reference().items():
        if t != seconds: continue
        g = cell_of(PhaseChange(seconds), torch.full((n,), target), draws)[1].double()
        assert g.mean().item() == pytest.approx(mean, rel=0.02), target
        assert g.std().item() == pytest.approx(std, rel=0.02), target


def test_moments_by_quadrature():
    "The table itself, from the formulas, without drawing anything: Gauss-Hermite nodes for each of the three draws"
    x, w = (torch.tensor(a) for a in np.polynomial.hermite_e.hermegauss(60))
    w = w / w.sum()
    for (target, t), (mean, std) in reference().items():
        if target < 5: continue       # there the bound at zero cuts through the grid
        s, tt = target / 25, t + 20
        prog = (target + (0.26348 + 1.965 * s - 1.1731 * s * s) * x).clamp(min=0)[:, None]
        mu = min(max(-0.0155 * math.log(s) + 0.0244, 0.049), 0.1)
        sd = min(max(-0.0125 * math.log(s) - 0.0059, 0.008), 0.045)
        drifted = prog * (tt / 20) ** -(mu + sd * x).abs()[None]
        q = (0.0088 / (prog / 25) ** 0.65).clamp(max=0.2) * math.sqrt(math.log((tt + 250e-9) / 500e-9))
        both = w[:, None] * w[None]
        m = (both * drifted).sum().item()
        second = (both * drifted**2 * (1 + q**2)).sum().item()
        assert m == pytest.approx(mean, rel=0.005)
        assert math.sqrt(second - m * m) == pytest.approx(std, rel=0.01)


@pytest.mark.parametrize('seconds', [25., YEAR])
def test_moments_of_a_weight(seconds):
    "A weight is the difference of two cells that have nothing to do with each other"
    table, n = reference(), 300_000
    for target in (1., 10., 25.):
        w = torch.full((n + 1,), -target)
        w[-1] = 25.
        out = PhaseChange(seconds, 'none')(w, numbers(n + 1, seed=3))[:n].double()
        (mean, std), (mean0, std0) = table[target, seconds], table[0., seconds]
        assert out.mean().item() == pytest.approx(mean0 - mean, rel=0.02)
        assert out.std().item() == pytest.approx(math.hypot(std, std0), rel=0.02)


def test_compensation():
    "One factor brings back the mean reading, to within what it was right after programming"
    w, z = numbers(40, 50) * 0.05, numbers(40, 50, seed=1)
    programmed = PhaseChange(1e-9, 'none', drift=0., read=0.)(w, z)
    left, held = PhaseChange(YEAR, 'none')(w, z), PhaseChange(YEAR)(w, z)
    assert held.abs().mean().item() == pytest.approx(programmed.abs().mean().item(), rel=1e-5)
    factor = (held / left)[left != 0]
    assert factor.max().item() == pytest.approx(factor.min().item(), rel=1e-4) and factor.mean() > 1.5
    rows = PhaseChange(YEAR, 'channel')(w, z).abs().mean(1) / programmed.abs().mean(1)
    torch.testing.assert_close(rows, torch.ones(40))
    assert PhaseChange(YEAR, per='channel')(torch.zeros(3, 4), z[:3, :4]).eq(0).all()


def test_parts_can_be_switched_off():
    "Programming alone does not age; drift alone is no noise at the largest conductance of no spread; reading grows"
    w, z = numbers(60, 70), numbers(60, 70, seed=1)
    only = dict(programming=0., drift=0., read=0.)
    assert torch.allclose(PhaseChange(YEAR, 'none', **only)(w, z), w)
    written = PhaseChange(25., 'none', **{**only, 'programming': 1.})
    assert torch.equal(written(w, z), written.at(YEAR)(w, z))
    spread = [(PhaseChange(t, 'none', **{**only, 'read': 1.})(w, z) - w).std().item() for t in (25., DAY, YEAR)]
    assert spread[0] < spread[1] < spread[2]
    drift = PhaseChange(YEAR, 'none', **{**only, 'drift': 1.}, drift_mean=(0., 0.05, 0., 1.),
                        drift_spread=(0., 0., 0., 0.))
    torch.testing.assert_close(drift(w, z), w * ((YEAR + 20) / 20) ** -0.05)


def test_draws_of_a_pair_have_nothing_in_common():
    "Six draws follow from one, and in a composition no part has that of another"
    z = numbers(20_000)
    draws = torch.stack([z, *(another_draw(z, k) for k in (0, 1, 2, 100, 101, 102, 103, 104))])
    off = torch.corrcoef(draws) - torch.eye(len(draws))
    assert off.abs().max() < 0.04
    assert torch.equal(another_draw(z.double(), 3).float(), another_draw(z, 3))


def test_log_normal():
    w, z = torch.full((300, 300), 0.5), numbers(300, 300)
    assert stats.kstest((LogNormal(0.3)(w, z) / w).log().flatten().numpy(), stats.norm(0, 0.3).cdf).pvalue > 0.01
    zeros = torch.zeros(300, 301)
    zeros[0, 0] = 1.
    out = LogNormal(0.2, on_off=5.)(zeros, numbers(300, 301))[1:]
    assert abs(out.mean()) < 3e-3 and out.std() > 0.05          # two cells that are not quite off
    assert torch.allclose(LogNormal(1e-9, on_off=5.)(w, z), w, atol=1e-6)


def test_stuck_and_clipped():
    w, z = numbers(200, 500), numbers(200, 500, seed=1)
    for at in ('zero', 'max', 'random'):
        few, more = (StuckCells(s, at)(w, z) for s in (0.02, 0.1))
        broken = more != w
        assert broken.float().mean().item() == pytest.approx(0.1, abs=0.004)
        assert torch.equal(more[few != w], few[few != w])
    top = w.abs().max()
    held = StuckCells(0.5, 'random')(w, z)[StuckCells(0.5)(w, z) == 0]
    assert stats.kstest((held / top).numpy(), stats.uniform(-1, 2).cdf).pvalue > 0.01
    held = StuckCells(0.5, 'max')(w, z)[StuckCells(0.5)(w, z) == 0]
    assert held.abs().eq(top).all() and 0.45 < (held > 0).float().mean() < 0.55
    assert DeviceRange(1.5)(w).abs().max().item() == pytest.approx(1.5 * w.std(correction=0).item(), rel=1e-5)


def test_bits_flip_at_their_rate_each_by_itself():
    z = numbers(200, 300)
    for form, n in BITS.items():
        masks = flipped_bits(z, 0.01, n)
        each = torch.stack([(masks >> b & 1).sum() for b in range(n)]).double()
        assert ((each - 600).abs() < 5 * 600**0.5).all(), form
        assert masks.max() < 2**n
        low = flipped_bits(z, 0.0005, n)
        assert torch.equal(low & masks, low)
    assert flipped_bits(z[:0], 0.1, 8).shape == (0, 300)
    assert flipped_bits(z[:1, :1], 0.5, 8).item() < 256


def test_what_a_flip_does():
    "Against struct's idea of the same numbers"
    w = numbers(500) * 0.1
    z = numbers(500, seed=1)
    masks = flipped_bits(z, 0.05, 32)
    expected = [struct.unpack('<f', struct.pack('<I', struct.unpack('<I', struct.pack('<f', v))[0] ^ m))[0]
                for v, m in zip(w.tolist(), masks.tolist())]
    torch.testing.assert_close(BitFlips(0.05, 'fp32')(w, z), torch.tensor(expected), rtol=0, atol=0, equal_nan=True)
    eight = BitFlips(0.05)(w[None], z[None])[0]
    step = w.abs().max() / 127
    q = (w / step).round().int()
    masks = flipped_bits(z[None], 0.05, 8)[0].int()
    signed = [int.from_bytes(bytes([(v & 255) ^ m]), 'little', signed=True) for v, m in zip(q.tolist(), masks.tolist())]
    torch.testing.assert_close(eight, w + (torch.tensor(signed) - q) * step)


@pytest.mark.parametrize('law', LAWS, **by_name)
def test_laws_of_devices(law):
    "Level nothing is the clean weight; dtypes, empty, zero and odd weights; one draw, whatever the memory format"
    w, z = numbers(6, 4, 3, 3) * 0.1, numbers(6, 4, 3, 3, seed=1)
    before = w.clone(), z.clone()
    out = law(w, z)
    assert torch.equal(w, before[0]) and torch.equal(z, before[1]) and not torch.equal(out, w)
    assert torch.equal(law.at(law.nothing)(w, z), w)
    torch.testing.assert_close(law(w.double(), z.double()).float(), out, rtol=1e-4, atol=1e-6, equal_nan=True)
    for dtype in (torch.float16, torch.bfloat16): assert law(w.to(dtype), z).dtype == dtype
    torch.testing.assert_close(law(w.to(memory_format=torch.channels_last), z), out, equal_nan=True)
    assert law(w[:0], z[:0]).shape == (0, 4, 3, 3)
    assert law(w[0, 0, 0, :1], z[0, 0, 0, :1]).shape == (1,) and law(w[0, 0, 0, 0], z[0, 0, 0, 0]).shape == ()
    for tiny in (0., 1e-45, 1e-38):
        if getattr(law, 'form', 'int8') == 'int8': assert law(torch.full((4, 5), tiny), numbers(4, 5)).isfinite().all()
    for bad in (math.nan, math.inf):
        if getattr(law, 'form', 'int8') != 'int8': continue     # a float memory keeps them, as it keeps all
        with pytest.raises(ValueError, match='nan or inf'): law(torch.full((30, 50), bad), numbers(30, 50))
    assert Law.from_dict(json.loads(json.dumps(law.to_dict()))) == law
    assert law.describe() and law.name and law in {law}


@pytest.mark.parametrize('d', every, **by_name)
def test_recovery_is_exact(d):
    "After success, errors, Ctrl-C and a failing network, and nothing is left behind"
    net, x = network(), numbers(2, 3, 8, 8)
    start, clean = bits(net), net(x).detach()
    ids = [(id(p), p.data_ptr()) for p in net.parameters()]
    handler = signal.getsignal(signal.SIGINT)
    for what in (None, ValueError, KeyboardInterrupt):
        try:
            with d.acting(net, None, 0), torch.no_grad():
                net(x)
                if what: raise what
        except (ValueError, KeyboardInterrupt) as e: assert type(e) is what
        assert same(bits(net), start) and hooks(net) == 0 and not holding(net)
    with d.acting(net, None, 0), torch.no_grad(): a = net(x)
    with d.acting(net, None, 0), torch.no_grad(): b = net(x)
    assert torch.equal(a.nan_to_num(), b.nan_to_num()) and not torch.equal(a, clean)
    assert torch.equal(net(x).detach(), clean) and signal.getsignal(signal.SIGINT) is handler
    assert ids == [(id(p), p.data_ptr()) for p in net.parameters()]


@pytest.mark.parametrize('d', [d for d in every if d.random], **by_name)
def test_one_seed_is_one_chip(d):
    "To another level and back is the same; a fresh block at that level too; other seeds are other chips"
    net, x = network(), numbers(2, 3, 8, 8)
    seen = {}
    with torch.no_grad():
        with d.drawn(net, None, 5) as to:
            for level in (d.levels[0], d.levels[-1], d.levels[0]):
                to(level)
                now = net(x).nan_to_num()
                assert torch.equal(seen.setdefault(level, now), now)
        for level, now in seen.items():
            with d.at(level).acting(net, None, 5): assert torch.equal(net(x).nan_to_num(), now)
        with d.at(d.levels[-1]).acting(net, None, 6): other = net(x).nan_to_num()
    assert not torch.equal(seen[d.levels[0]], seen[d.levels[-1]]) or isinstance(d, BitFlips)
    assert not torch.equal(other, seen[d.levels[-1]])


def test_order_of_a_composition():
    "Few bits, then the chip: as by hand, and not the other way round"
    conv = nn.Conv2d(4, 4, 3)
    laws = [DeviceRange(2.), Quantize(3), PhaseChange(DAY)]
    with perturbed(conv, compose(*laws), conv_and_linear, generator=1) as clone:
        w, z = clone.clean[0], clone.draw[0]
        expected = w
        for law in laws: expected = law(expected, z)
        assert torch.equal(conv.weight.detach(), expected)
    many = len(compose(PhaseChange(DAY), Quantize(3))(w, z)[0].unique())
    assert many <= 7 < len(expected[0].unique())          # rounded last, a channel has seven values


def batches(): return [(numbers(4, 3, 32, 32), torch.randint(0, 3, (4, 32, 32)))]


def test_sweep_card_figure_know_them():
    torch.manual_seed(0)
    net, data = network(), batches()
    start = bits(net)
    time, six = PhaseChange(), compose(Quantize(4), PhaseChange(), Converters(6.), level_of=1)
    df = sweep(net, data, [time, BitFlips(), Converters(), ActivationNoise(), EveryPass(time), six], draws=2,
               progress=False)
    assert set(df[df['disturbance'] == time.label].level) == {0, *PhaseChange.levels}
    assert set(df[df['disturbance'] == six.label].level) == set(PhaseChange.levels)
    n = df[df.metric == 'mIoU'].groupby(['disturbance', 'level']).size()
    assert n[time.label, YEAR] == 2 and n[time.label, 0.] == 1 and n[Converters.label, 8.] == 1
    axis = plot_sweep(df[df['disturbance'] == time.label]).layout.xaxis
    assert axis.type == 'log' and list(axis.ticktext) == ['25 s', '1 h', '1 day', '30 days', '1 year']
    card = robustness_card({'a': net}, data, [load_profile(p) for p in shipped_profiles()], draws=2, progress=False)
    columns = [c for c in card_table(card) if c[0] == load_profile('pcm').name]
    assert [c[1] for c in columns] == ['25 s', '1 h', '1 day', '30 days', '1 year']
    parts = layer_sensitivity(net, data, compose(Quantize(4), time), where=conv_and_linear, draws=2, progress=False)
    clean = sweep(net, data, Converters(), levels=0, progress=False)
    value = lambda d: d[d.metric == 'mIoU']['value'].iloc[0]
    assert value(parts[parts.group == 'none']) == value(clean)
    assert same(bits(net), start) and hooks(net) == 0


def test_level_zero_of_a_composition_is_not_the_clean_network():
    net = network()
    x = numbers(4, 3, 32, 32)
    data = [(x, net(x).argmax(1))]
    df = sweep(net, data, compose(Quantize(2), MaxGaussian()), levels=[0, 0.1], draws=2, progress=False)
    at_zero = df[(df.level == 0) & (df.metric == 'mIoU')].value
    assert len(at_zero) == 2 and at_zero.nunique() == 1 and at_zero.iloc[0] < 1


def test_explorers_side():
    "A slider from as trained to a year; constants have no controls, and are not lost"
    menu = menu_of()
    form = controls(menu['PhaseChange'])
    assert [f['name'] for f in form['fields']] == ['compensation', 'per', 'programming', 'drift', 'read']
    assert form['log'] and form['apart'] and (form['mildest'], form['top']) == (25., YEAR)
    d = disturbance_of(menu, 'PhaseChange', YEAR, {'compensation': 'none', 'read': '0'})
    assert d == PhaseChange(YEAR, 'none', read=0.) and d.level_text(d.level) == '1 year'
    hot = PhaseChange(DAY, t_first=10., read=0.5)
    theirs = menu_of([hot])
    told = values_of(hot, theirs)
    assert disturbance_of(theirs, **{'name' if k == 'disturbance' else k: v for k, v in told.items()}) == hot
    for name in shipped_profiles():
        profile = load_profile(name)
        told = values_of(profile, menu_of([profile]))
        assert told['disturbance'] == profile.name and disturbance_of(menu_of([profile]), profile.name, 1e-3).parts


def test_explorer_from_now_to_a_year():
    from noisyseg.show.explorer import NoiseExplorer
    net = network()
    explorer = NoiseExplorer({'a': net}, numbers(1, 3, 32, 32), PhaseChange(compensation='none'), corruptions=False)
    frames = {}
    for level in (0., 25., DAY, YEAR, 25.):
        explorer.level = level
        f = explorer.frame()
        assert (frames.setdefault(f['text'], f['preds']['a']) == f['preds']['a']).all()
    assert list(frames) == ['as trained', '25 s', '1 day', '1 year']
    assert (frames['as trained'] != frames['1 year']).any()
    explorer.close()
    shown = NoiseExplorer({'a': net}, numbers(1, 3, 32, 32), load_profile('pcm'), corruptions=False)
    assert shown.frame({'level': YEAR})['text'] == '1 year' and hooks(net) == 0
    shown.close()


def test_training():
    "Any law goes into WeightNoise; the gradient is that of the disturbed network"
    for law in (*LAWS, load_profile('rram'), load_profile('pcm').law): assert WeightNoise(law).law is law
    net, x = network(), numbers(2, 3, 8, 8)
    with PhaseChange(DAY).acting(net, None, 0):
        twin = copy.deepcopy(net)
        net(x).square().mean().backward()
    twin(x).square().mean().backward()
    for p, q in zip(net.parameters(), twin.parameters()): assert torch.equal(p.grad, q.grad)


def test_activations_of_attention():
    "Attention is disturbed as a whole, in the fast path as in the slow one; what is never called is named"
    x = numbers(3, 5, 8)
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    for net in (layer, encoder):
        with torch.no_grad():
            clean = net(x)
            with Converters(3.).acting(net), warnings.catch_warnings():
                warnings.simplefilter('error')
                assert (net(x) - clean).abs().max() > 1e-2
            assert torch.equal(net(x), clean) and hooks(net) == 0

    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    packs = nn.TransformerEncoder(layer, 2).eval()       # by nested tensors, where it can
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')                    # torch: nested tensors are a prototype
        clean = packs(x, src_key_padding_mask=padding)
        with Converters(0.).acting(packs): plain = packs(x, None, padding)
        torch.testing.assert_close(plain[~padding], clean[~padding])
        with Converters(3.).acting(packs): assert (packs(x, src_key_padding_mask=padding) - plain).abs().max() > 1e-2
        assert torch.equal(packs(x, src_key_padding_mask=padding), clean) and hooks(packs) == 0

    class Borrows(nn.Module):
        def __init__(self): super().__init__(); self.a = nn.Linear(8, 8)
        def forward(self, x): return nn.functional.linear(x, self.a.weight)
    with pytest.warns(UserWarning, match='not called in this block'), Converters(3.).acting(net := Borrows()): net(x)


def test_packed_sequences_are_disturbed_sample_by_sample():
    torch.manual_seed(0)
    seqs = [torch.randn(n, 4) for n in (3, 5, 2)]
    for first in (True, False):
        net = nn.LSTM(4, 6, batch_first=first).eval()
        packed = nn.utils.rnn.pack_sequence(seqs, enforce_sorted=False)
        with torch.no_grad(), Converters(3.).acting(net, '*'), warnings.catch_warnings():
            warnings.simplefilter('error')
            out, _ = nn.utils.rnn.pad_packed_sequence(net(packed)[0], batch_first=True)
            for s, o in zip(seqs, out):
                alone = net(s[None] if first else s[:, None])[0].reshape(len(s), 6)
                torch.testing.assert_close(o[:len(s)], alone)
            assert len(out[1].unique()) <= 7
        with torch.no_grad(), ActivationNoise(0.5).acting(net, '*', 0):
            noisy = net(packed)[0].data
        assert (noisy - net(packed)[0].data).abs().max() > 0.01 and hooks(net) == 0


def test_both_inputs_of_a_bilinear_layer_are_converted():
    net, a, b = nn.Bilinear(4, 4, 5), numbers(2, 4), numbers(2, 4)
    with torch.no_grad(), Converters(2., 'inputs').acting(net, '*'): out = net(a, b)
    q = lambda v: (v / v.abs().amax(1, keepdim=True)).round() * v.abs().amax(1, keepdim=True)
    torch.testing.assert_close(out, net(q(a), q(b)))


def test_what_is_not_disturbed_is_named():
    class InDict(nn.Linear):
        def forward(self, x): return {'out': super().forward(x)}
    net = nn.Sequential(nn.Linear(4, 4), InDict(4, 4))
    for d in (ActivationNoise(0.5), Converters(3.)):
        with pytest.warns(UserWarning, match='^1: not called in this block'), d.acting(net): net(numbers(2, 4))
    with d.acting(net, '0.*'), warnings.catch_warnings():
        warnings.simplefilter('error')
        net(numbers(2, 4))
    mixed = nn.ModuleList([nn.Linear(4, 5), nn.Linear(4, 5, dtype=torch.cfloat)])
    with pytest.raises(ValueError, match='1: complex') as e, ActivationNoise().acting(mixed):
        mixed[1](numbers(2, 4).to(torch.cfloat))
    where = eval(str(e.value).split('`')[1].removeprefix('where='), vars(selectors))
    assert list(layers_of(mixed, where)) == ['0']


def test_ranges_are_a_samples_own_where_time_comes_first():
    torch.manual_seed(0)
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0), 2, enable_nested_tensor=False).eval()
    x = numbers(5, 2, 8)
    other = x.clone()
    other[:, 1] *= 10
    with torch.no_grad(), Converters(4.).acting(net), warnings.catch_warnings():
        warnings.simplefilter('error')
        assert torch.equal(net(x)[:, 0], net(other)[:, 0]) and torch.equal(net(x[:, :1])[:, 0], net(x)[:, 0])
    head = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16, dropout=0)).eval()
    with pytest.warns(UserWarning, match='^0: takes dimension 0 for the samples'), Converters(4.).acting(head): head(x)
    with Converters(4.).calibrated(head, [x]).acting(head), warnings.catch_warnings():
        warnings.simplefilter('error')
        head(x)


def test_hooks_survive_signals():
    "A signal that comes while hooks are set or removed waits"
    net, x = network(), numbers(1, 3, 8, 8)
    count = 0

    def alarm(*_):
        nonlocal count
        count += 1
        raise InterruptedError
    old = signal.signal(signal.SIGALRM, alarm)
    grad = torch.is_grad_enabled()
    torch.set_grad_enabled(False)   # for all of it: an interrupted exit of torch.no_grad() would leave it so for good
    try:
        for i in range(60):
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-5 * (i + 1))
                with ActivationNoise(0.1).acting(net, None, 0):
                    for _ in range(50): net(x)
            except InterruptedError: pass
            assert hooks(net) == 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
        torch.set_grad_enabled(grad)
    assert count > 30 and signal.getsignal(signal.SIGALRM) is old


def test_calibration():
    net, x = network(), numbers(6, 3, 8, 8)
    net.train()
    start = bits(net)
    d = Converters(5.).calibrated(net, [(x[:3], None), x[3:]])
    assert net.training and same(bits(net), start) and hooks(net) == 0 and [r[0] for r in d.ranges] == ['0', '3']
    assert Disturbance.from_dict(json.loads(json.dumps(d.to_dict()))) == d and len(d.name) < 100
    net.eval()
    seen = []
    look = hooked(net, layers_of(net), None, lambda y, name: seen.append(y) or y)
    with d.acting(net), look, torch.no_grad(): net(9 * x)
    for y, (_, _, top) in zip(seen, d.ranges):
        assert y.abs().max().item() == pytest.approx(top) and len(y.unique()) <= 31
    with pytest.raises(ValueError, match='no range is known'), d.acting(nn.Linear(8, 8)) as block:
        block.model(x[0, 0])


def test_profiles():
    assert shipped_profiles() == ['low_voltage_sram', 'pcm', 'rram']
    assert isinstance(load_profile('rram'), Law) and not isinstance(load_profile('pcm'), Law)
    pcm = load_profile('pcm')
    assert PhaseChange(DAY) in pcm.parts and pcm.source and pcm.level == DAY
    text = pcm.to_json()
    d = json.loads(text)
    for i, part in enumerate(d['composition']):
        for k in part:
            less = copy.deepcopy(d)
            del less['composition'][i][k]
            with pytest.raises(ValueError): profile_from_json(json.dumps(less))
            odd = copy.deepcopy(d)
            odd['composition'][i][k] = {'a': None}
            with pytest.raises(ValueError): profile_from_json(json.dumps(odd))
    for k in d:
        with pytest.raises(ValueError, match='missing'):
            profile_from_json(json.dumps({a: b for a, b in d.items() if a != k}))
    assert make_profile('a', Quantize()) == profile_from_json(make_profile('a', Quantize()).to_json())


def test_rescaling_of_a_clone():
    "The clone of a network on a chip ages in place"
    net = network()
    clone = clone_weights(net, conv_and_linear).inject(PhaseChange(25.), 3)
    clone.rescale(YEAR)
    old = [p.detach().clone() for p in clone.weights]
    clone.recover().inject(PhaseChange(YEAR), 3)
    assert same(old, [p.detach() for p in clone.weights])
    clone.recover()


def test_a_profile_with_converters_is_no_law():
    with pytest.raises(TypeError, match='its `.law`'): WeightNoise(load_profile('pcm'))
    assert len(repr(load_profile('pcm'))) < 60
