"""What mends a network: is it what it says it is? The lessons are nbs/mend."""
import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import nn

import noisyseg
from noisyseg import MaxGaussian, NoiseExplorer, Quantize, compose, perturbed, sweep
from noisyseg.data.corruptions import Corruption
from noisyseg.mend import protection, tolerances
from noisyseg.mend.protection import measured_costs, predicted_costs, protect, sensitivity
from noisyseg.mend.recalibration import norm_layers, rescue, rescued
from noisyseg.measure.summary import holm
from noisyseg.mend.smoothing import certified_mask
from noisyseg.mend.tolerances import misses_allowed, tolerance
from noisyseg.perturb.bit_flips import BitFlips
from noisyseg.perturb.devices import LogNormal, PhaseChange, StuckCells, UnequalPairs
from noisyseg.perturb.disturbance import Disturbance
from noisyseg.perturb.laws import AbsoluteGaussian
from noisyseg.perturb.selectors import Spared, conv_and_norm, kernels_and_scales

SHOWN = Path(noisyseg.__file__).parent/'show'/'models'/'scenes_clean'


@pytest.fixture(scope='module')
def net(): return noisyseg.load_model(SHOWN)

@pytest.fixture(scope='module')
def scenes():
    dls = noisyseg.scenes(4, 12, size=128, bs=4, device='cpu')
    return [tuple(t.as_subclass(torch.Tensor) for t in b) for b in dls.valid]

def bits(model): return {k: v.clone() for k, v in model.state_dict().items()}
def same(a, b): return all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize('share, confidence, chips', [(0.9, 0.95, 29), (0.9, 0.95, 61), (0.8, 0.9, 40)])
def test_tolerance_holds_its_confidence(monkeypatch, share, confidence, chips):
    """Of 100 searches, each with a pilot of its own, at most what the confidence allows claim too much, and they
    find most of the truth: chips lose all when a normal number times the level leaves 0.2"""
    def simulated(model, dl, disturbance, *, levels=(0,), draws=1, seed=0, **kwargs):
        z = np.random.default_rng(seed).standard_normal(draws)        # one draw at all levels, as in a sweep
        rows = [dict(level=l, draw=k, metric='mIoU', value=float(abs(l * z[k]) < 0.2))
                for l in levels for k in range(draws)]
        return pd.DataFrame(rows)
    monkeypatch.setattr(tolerances, 'sweep', simulated)
    truth = 0.2 / stats.norm.ppf((1 + share) / 2)
    data = [(torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64))]
    found = np.array([tolerance(None, data, AbsoluteGaussian(), share=share, confidence=confidence, chips=chips,
                                seed=s).level for s in range(100)])
    assert (found > truth).sum() <= stats.binom.ppf(0.999, 100, 1 - confidence)
    assert np.nanmedian(found) > 0.5 * truth and np.isnan(found).mean() < 0.05

def test_what_is_drawn_once_is_tried_once():
    "Each corrupted picture has one draw in a sweep, so there are no chips of which some may miss"
    torch.manual_seed(0)
    net, x = nn.Conv2d(3, 3, 1), torch.rand(2, 3, 32, 32)
    data = [(x, net(x).argmax(1))]
    found = tolerance(net, data, Corruption('gaussian_noise'), drop=0.01, progress=False)
    assert np.isnan(found.level) and found.trials['chips'].tolist() == [1]
    assert str(found) == 'no level holds: at severity 1 already, it loses more than 1 points of 100.0'
    mild = tolerance(net, data, Corruption('gaussian_noise'), drop=0.9, levels=[1], progress=False)
    assert str(mild) == 'at severity 1, it loses at most 90 points of 100.0 on these pictures'
    assert 'chips' not in str(tolerances.plot_tolerance(mild))
    by_hand = replace(mild, trials=mild.trials[['level']])   # of levels alone, as for marks in the explorer
    assert 'chips' in str(by_hand)

def test_what_has_no_level_of_nothing_is_compared_with_the_clean_network(net, scenes):
    "A composition does something at every level: its quantization stays"
    both = compose(Quantize(3), MaxGaussian(0.05))
    found = tolerance(net, scenes[:1], both, drop=0.3, chips=29, levels=[0.01, 0.02], progress=False)
    clean = sweep(net, scenes[:1], MaxGaussian(), levels=0, progress=False)
    assert found.clean == clean.loc[clean['metric'] == 'mIoU', 'value'].item() and found.level == 0.02
    one = [tuple(t[:1] for t in scenes[0])]
    kept = protect(net, one, both, by='layer', budget=0.05, draws=1, compare=False, progress=False)
    assert kept.curve['clean'].iloc[0] > kept.curve['noisy'].iloc[0]

def test_spared_channels_are_spared_in_costs_too(net, scenes):
    "Groups of channels cost less than their layer, and what is protected already costs nothing"
    name, law = 'encoder.levels.0.0.conv.weight', MaxGaussian(0.2)
    n = len(net.get_parameter(name))
    args = dict(draws=2, progress=False)
    parts = noisyseg.sensitivity(net, scenes[:1], law, channels=4, where=name, **args)
    whole = noisyseg.sensitivity(net, scenes[:1], law, where=name, **args)
    assert parts['measured'].nunique() == 4 and parts['measured'].max() < whole['measured'].item()
    assert parts['predicted'].sum() == pytest.approx(whole['predicted'].item(), rel=1e-5)
    all_but_one = Spared(name, {name: range(n - 1)})
    little = noisyseg.sensitivity(net, scenes[:1], law, where=all_but_one, **args)
    assert (little[['predicted', 'measured']] < whole[['predicted', 'measured']] / 2).all().all()
    none = noisyseg.sensitivity(net, scenes[:1], law, where=Spared(all_but_one, {name: [n - 1]}), **args)
    assert none[['predicted', 'measured']].to_numpy().tolist() == [[0, 0]]

def test_misses_allowed_are_exact():
    "One more miss than allowed would leave the claim open: Clopper and Pearson's lower bound is at the share"
    for n in (29, 46, 61, 100, 333):
        k = misses_allowed(n)
        low = lambda k, n=n: stats.beta.ppf(0.05, n - k, k + 1)   # of the share of good chips
        assert low(k) >= 0.9 > low(k + 1)

def test_rescue_brings_most_of_it_back_and_leaves_nothing(net, scenes):
    before, law = bits(net), MaxGaussian(0.2)
    df = sweep(net, scenes[1:], [law, rescued(law, scenes[0][0])], levels=[0, 0.2], draws=3, progress=False)
    miou = df[df['metric'] == 'mIoU'].groupby(['disturbance', 'level'])['value'].mean()
    clean, lost, back = miou['weight noise', 0], miou['weight noise', 0.2], miou['weight noise, rescued', 0.2]
    assert (back - lost) / (clean - lost) > 0.6 and miou['weight noise, rescued', 0] == clean
    assert same(before, net.state_dict()) and not any(m._forward_hooks for m in net.modules())

@pytest.mark.parametrize('arch', ['batch', 'group', 'layer'])
def test_rescue_of_other_norms(arch):
    "What a gain and a shift in a layer did, it undoes, whichever norm follows"
    torch.manual_seed(0)
    norm = {'batch': lambda: nn.BatchNorm2d(8), 'group': lambda: nn.GroupNorm(2, 8),
            'layer': lambda: nn.Sequential(nn.Flatten(2), nn.LayerNorm(256), nn.Unflatten(2, (16, 16)))}[arch]
    clean = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), norm(), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)).eval()
    with torch.no_grad():
        for m in norm_layers(clean).values(): m.weight.uniform_(0.5, 2)
    chip = copy.deepcopy(clean)
    with torch.no_grad():
        for m in norm_layers(chip).values(): m.weight.mul_(3).add_(0.1)
    x = torch.randn(8, 3, 16, 16)
    r = rescue(chip, x, clean)
    assert r.helped and r.after > 0.97 > r.before

def test_rescue_is_never_worse_on_its_pictures():
    "By its own measure; where it can't help it says so and leaves no hook"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    x = torch.rand(4, 3, 8, 8)
    for seed in range(30):
        with perturbed(net, MaxGaussian(0.02 + 0.02 * seed), generator=seed), rescue(net, x) as r:
            assert (r.after > r.before) == r.helped
            assert r.helped or not any(m._forward_hooks for m in net.modules())

@pytest.mark.parametrize('at', range(3))
def test_a_rescue_that_breaks_off_leaves_no_correction(at):
    "In the pass that looks what is to be mended, in the one that matches, or in the one that looks what it helped"
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    chip, passes = copy.deepcopy(net), iter(range(9))
    def interrupted(*_):
        if next(passes) == at: raise KeyboardInterrupt
    chip[3].register_forward_pre_hook(interrupted)
    with pytest.raises(KeyboardInterrupt): rescue(chip, torch.rand(4, 3, 8, 8), net)
    assert not any(m._forward_hooks for m in chip.modules()) and not chip._forward_pre_hooks

def test_rescued_is_a_disturbance_like_others():
    law = rescued(compose(Quantize(4), MaxGaussian(0.1)), torch.rand(4, 3, 16, 16))
    assert law.level == 0.1 and law.at(0.2).level == 0.2 and law.at(0.2).images is law.images
    read = Disturbance.from_dict(law.to_dict())
    assert read.label == law.label and read.level_text(0.1) == law.level_text(0.1)
    with pytest.raises(ValueError, match='without pictures'), read.acting(nn.Conv2d(3, 3, 1)): pass

def test_protect_finds_the_layer_that_breaks_it(net, scenes):
    "Noise that is 20 times as strong in one layer: that layer is what is protected"
    weak = 'encoder.levels.2.0.conv.weight'
    class Lopsided(MaxGaussian):
        def noise(self, weight, z): return super().noise(weight, z) * (20 if weight.shape == shape else 0.2)
    shape = dict(net.named_parameters())[weak].shape
    same_shape = [n for n, p in net.named_parameters() if p.shape == shape]
    found = protect(net, scenes[:1], Lopsided(0.05), by='layer', target=0.9, draws=1, compare=False, progress=False)
    assert found.costs.idxmax() in same_shape and found.regained > 0.9
    assert set(found.rows) & set(same_shape)

def test_predicted_costs_are_the_hessian_of_a_linear_network():
    "For logits linear in the weights Fisher information is the Hessian of the cross-entropy: worked out by autograd"
    torch.manual_seed(0)
    net, x = nn.Conv2d(2, 3, 1, bias=False).double(), torch.randn(4, 2, 8, 8).double()
    y = torch.randint(0, 3, (4, 8, 8))
    law = AbsoluteGaussian(0.1)
    found = predicted_costs(net, [(x, y)], law, passes=300, where=kernels_and_scales)['weight']
    def loss(w): return nn.functional.cross_entropy(nn.functional.conv2d(x, w.view(3, 2, 1, 1)), y)
    hessian = torch.autograd.functional.hessian(loss, net.weight.detach().flatten()).diagonal().view(3, 2).sum(1)
    torch.testing.assert_close(found, 0.5 * 0.1**2 * hessian, rtol=0.1, atol=0)

def test_numbers_that_move_together_are_measured_not_predicted(net, scenes):
    "A factor for a whole channel: each number by itself says nothing; unlike drift that is compensated for all of them"
    one, shaky = [tuple(t[:1] for t in scenes[0])], UnequalPairs(0.2)
    with pytest.raises(ValueError, match=r"measured_costs\(model, dl, UnequalPairs\(mismatch=0.2"):
        predicted_costs(net, one, shaky, where=conv_and_norm)
    with pytest.raises(ValueError, match="by='layer', costs='measured'"): protect(net, one, shaky, progress=False)
    found = sensitivity(net, one, shaky, draws=1, where='heads.*', progress=False)
    assert list(found) == ['n', 'measured']
    kept = protect(net, one, shaky, by='layer', budget=0.05, draws=1, where='heads.*', compare=False, progress=False)
    assert kept.costs.name == 'measured'
    torch.manual_seed(1)
    weights = [torch.randn(s) for s in ((8, 3, 1, 1), (4, 16, 3, 3), (8, 9), (8,), ())]
    laws = [MaxGaussian(), LogNormal(0.2, 10.), StuckCells(0.05, 'max'), PhaseChange(), BitFlips(1e-3),
            compose(Quantize(4), StuckCells(0.05), MaxGaussian())]
    assert all(protection._apart(law, w) for law in laws for w in weights)
    assert not any(protection._apart(law, w) for law in (shaky, compose(MaxGaussian(1e-3), shaky)) for w in weights[:3])

def test_costs_are_of_the_weights_that_are_asked_for(net, scenes):
    costs = measured_costs(net, scenes[:1], MaxGaussian(0.1), draws=1, where='heads.*', progress=False)
    assert all(n.startswith('heads.') for n in costs.index)

def test_spared_channels_in_sweeps_and_training(net, scenes):
    "All spared is no noise at all, bit for bit; and the label tells one choice from another"
    every = Spared(conv_and_norm, {n: range(len(p)) for n, p in net.named_parameters()
                                   if n in conv_and_norm.names(net)})
    df = sweep(net, scenes[:1], MaxGaussian(), levels=[0, 0.3], draws=1, where=every, progress=False)
    quiet, loud = (df.loc[df['level'] == level, 'value'].tolist() for level in (0, 0.3))
    assert quiet == loud
    assert str(every) != str(Spared(conv_and_norm, {'encoder.levels.0.0.conv.weight': [0]}))

def test_holm_is_holm():
    "Against the definition, written down slowly"
    rng = np.random.default_rng(0)
    for _ in range(50):
        p = rng.uniform(0, 0.05, 20)
        slow = np.zeros(20, bool)
        for i, j in enumerate(np.argsort(p)):
            if p[j] > 0.05 / (20 - i): break
            slow[j] = True
        assert (holm(p, 0.05) == slow).all()

def test_certified_mask_withstands_a_thousand_attacks():
    "A linear network with three classes, whose smoothed answer is counted with the same draws: none within the radius"
    torch.manual_seed(0)
    net, x, sigma = nn.Conv2d(4, 2, 1, bias=False), torch.randn(1, 4, 6, 6), 0.3
    c = certified_mask(net, x, sigma, draws=1000, alpha=0.01, where=kernels_and_scales)
    sure = c.classes >= 0
    assert 0.2 < sure.float().mean() < 1
    w, pixels = net.weight.detach().flatten(1), x[0].flatten(1)
    smoothed = lambda w: ((w[1] - w[0]) @ pixels > 0).long().view(1, 6, 6)   # exact: the difference is Gaussian
    attacks = torch.randn(1000, 2, 4)
    worst = (torch.sign((w[1] - w[0]) @ pixels) * pixels).T                  # straight against one pixel each
    attacks[:36] = torch.stack([worst, -worst], 1)
    attacks *= 0.999 * c.radius / attacks.flatten(1).norm(dim=1)[:, None, None]
    assert not any((smoothed(w + a)[sure] != c.classes[sure]).any() for a in attacks)
    assert any((smoothed(w + 4 * a)[sure] != c.classes[sure]).any() for a in attacks)

def test_certified_masks_are_the_same_for_one_seed(net, scenes):
    before, x = bits(net), scenes[0][0][:1]
    a, b = (certified_mask(net, x, 0.05, draws=60, relative=True, seed=3) for _ in range(2))
    assert torch.equal(a.classes, b.classes) and same(before, net.state_dict())

def test_in_the_explorer(net, scenes):
    "A rescue is in the menu of disturbances, a protection in that of layers; each brings the mask back"
    law, (x, y) = MaxGaussian(0.2), scenes[0]
    first = [n for n in conv_and_norm.names(net) if n.startswith(('encoder.levels.0.', 'decoder.0.branches.0.'))]
    kept = Spared(conv_and_norm, {n: range(len(dict(net.named_parameters())[n])) for n in first})
    explorer = NoiseExplorer({'clean': net}, (x, y), disturbance=[law, rescued(law, scenes[1][0])],
                             wheres={'everywhere': conv_and_norm, 'first level protected': kept}, corruptions=False)
    assert 'weight noise, rescued' in [d['label'] for d in explorer.info['disturbances']]
    clean = explorer.lens('clean', 0)[0][0]
    agrees = lambda *args: np.mean([(explorer.lens('clean', 0, *args, seed)[0][0] == clean).mean() for seed in (1, 2)])
    noisy = agrees(law, 'everywhere')
    assert agrees(rescued(law, scenes[1][0]), 'everywhere') > noisy + 0.05
    assert agrees(law, 'first level protected') > noisy + 0.05


def test_figures_show_names_as_they_are():
    from noisyseg.mend.protection import plot_sensitivity
    name = '<a href="https://elsewhere.example">net</a>'
    trials = pd.DataFrame(dict(level=[0.1], chips=[29], misses=[0], allowed=[0], proven=[True], worst=[0.]))
    found = tolerances.Tolerance(0.1, MaxGaussian(0.1), 0.9, 0.02, 0.9, 0.95, trials)
    costs = pd.DataFrame(dict(predicted=[1., 2.], measured=[1., 3.], n=[4, 5]), index=[name, 'b'])
    costs.index.name = 'weight'
    for fig in (tolerances.plot_tolerance(found, names=[name]), plot_sensitivity(costs)):
        assert '<a' not in fig.to_json() and '&lt;a href' in fig.to_json()
