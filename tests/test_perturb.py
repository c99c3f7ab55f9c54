"""Perturbing models and interrupting it in ways that do not belong in a lesson: every claim, on other networks."""
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from dataclasses import dataclass

import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from noisyseg.perturb.laws import AbsoluteGaussian, MaxGaussian, MultiplicativeGaussian
from noisyseg.perturb.clone import BLOCK, WeightClone, as_generator, clone_weights, fill_blocks, perturbed
from noisyseg.perturb.selectors import by_name, conv_and_linear, conv_and_norm, kernels_and_scales, select


def snapshot(model): return {k: (v.data_ptr(), v.stride(), v.clone()) for k, v in model.state_dict().items()}

def same(a, b):
    "Same names, same memory, same bits."
    return list(a) == list(b) and all(p == q and s == r and torch.equal(x.contiguous().view(-1).view(torch.uint8),
            y.contiguous().view(-1).view(torch.uint8))
                                      for (p, s, x), (q, r, y) in zip(a.values(), b.values()))

class Tied(nn.Module):
    "Embedding and output share a weight; a weight-normed and a spectral-normed layer between them."
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight
        self.mid = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)), nn.LayerNorm(8),
                                 parametrizations.spectral_norm(nn.Linear(8, 8)))
    def forward(self, x): return self.out(self.mid(self.embed(x.flatten(1)[:, :5].abs().long() % 11)))

ZOO = {
    'resnet18': lambda: torchvision.models.resnet18(), 'mobilenet_v3': lambda: torchvision.models.mobilenet_v3_small(),
    'deeplab': lambda: torchvision.models.segmentation.deeplabv3_mobilenet_v3_large(weights=None,
        weights_backbone=None),
    'vit (timm)': lambda: timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=8),
    'convnext (timm)': lambda: timm.create_model('convnext_atto'),
    'efficientnet (timm)': lambda: timm.create_model('efficientnet_b0'),
    'transformer': lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2),
    'tied': Tied,
    'lstm': lambda: nn.LSTM(4, 8, 2),
}

@pytest.mark.parametrize('name', ZOO)
def test_other_peoples_networks(name):
    torch.manual_seed(0)
    model = ZOO[name]().train()
    before = snapshot(model)
    sites = select(model, kernels_and_scales)
    assert sites
    for law in (MaxGaussian(0.1, per='tensor'), AbsoluteGaussian(0.05), MultiplicativeGaussian(0.2)):
        with torch.no_grad(): clean = [s.value().clone() for s in sites]
        with perturbed(model, law, kernels_and_scales, generator=1), torch.no_grad():
            noisy = [s.value().clone() for s in sites]
        for s, w, v in zip(sites, clean, noisy):
            z_like = (v - w).double()
            says = {MaxGaussian: 0.1 * w.abs().max(), AbsoluteGaussian: torch.tensor(0.05),
                    MultiplicativeGaussian: 0.2 * w.double().square().mean().sqrt()}
            sigma = says[type(law)]
            if w.numel() > 2000:
                assert abs(z_like.std() / sigma - (0.96 if isinstance(law, MaxGaussian) else 1)) < 0.12, (s.name, law)
            if sigma > 0: assert not torch.equal(w, v), s.name
        assert same(before, snapshot(model))

def test_the_noise_reaches_the_output_and_leaves_with_it():
    torch.manual_seed(0)
    for name in ('resnet18', 'vit (timm)', 'tied'):
        model, x = ZOO[name]().eval(), torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            clean = model(x)
            with perturbed(model, MaxGaussian(0.1), kernels_and_scales, generator=0): noisy = model(x)
            assert not torch.equal(clean, noisy) and torch.equal(clean, model(x)), name

LAWS = [MaxGaussian(), MaxGaussian(per='channel'), MaxGaussian(per='tensor', clip='truncate'), AbsoluteGaussian(),
        MultiplicativeGaussian()]

@settings(max_examples=60, deadline=None)
@given(out=st.integers(1, 6), ins=st.integers(1, 6), k=st.integers(1, 4),
       kind=st.sampled_from(['conv1d', 'conv2d', 'conv3d', 'linear', 'transposed']),
       dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
       last=st.booleans(), seed=st.integers(0, 2**31 - 1), level=st.floats(0, 10), law=st.sampled_from(LAWS))
def test_any_layer_any_law_recovers_and_repeats(out, ins, k, kind, dtype, last, seed, level, law):
    make = {'conv1d': lambda: nn.Conv1d(ins, out, k), 'conv2d': lambda: nn.Conv2d(ins, out, k),
            'conv3d': lambda: nn.Conv3d(ins, out, k),
            'linear': lambda: nn.Linear(ins, out), 'transposed': lambda: nn.ConvTranspose2d(ins, out, k)}[kind]
    m = make().to(dtype)
    if last and kind in ('conv2d', 'transposed'): m = m.to(memory_format=torch.channels_last)
    before, law = snapshot(m), law.at(level)
    clone = clone_weights(m, conv_and_linear).inject(law, seed)
    first = m.weight.detach().clone()
    clone.inject(law, seed)
    assert torch.equal(first, m.weight) or not first.isfinite().all()
    if isinstance(law, MaxGaussian) and dtype in (torch.float32, torch.float64):
        clean = before['weight'][2]
        assert ((first - clean).abs() <= law.alpha * level * clean.abs().max() * (1 + 1e-5) + 1e-6).all()
    clone.rescale(level / 2).recover()
    assert same(before, snapshot(m))
    clone.recover()
    assert same(before, snapshot(m))

@pytest.mark.parametrize('law', [*LAWS, MaxGaussian(per='channel', clip='truncate')], ids=str)
@pytest.mark.parametrize('last', [False, True], ids=['contiguous', 'channels_last'])
def test_a_large_weight_in_blocks_gets_the_noise_of_the_whole(law, last):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(130, 70, 3), nn.Linear(300, 301), nn.Conv2d(70, 600, 1), nn.BatchNorm1d(40_000))
    if last: net[0].to(memory_format=torch.channels_last)
    clone, z = clone_weights(net, '*.weight'), []
    clone.inject(lambda w, draw: (z.append(draw.clone()), w)[1], generator=3).recover()
    with torch.no_grad(): whole = [law(m.weight, d) for m, d in zip(net, z)]
    clone.inject(law, generator=3)
    assert all(torch.equal(m.weight, w) for m, w in zip(net, whole))
    clone.recover()

def test_a_law_that_changes_what_its_parent_computes_does_not_inherit_its_promise():
    class Centred(MultiplicativeGaussian):
        def noise(self, weight, z): return super().noise(weight, z - z.mean())
    class Louder(MultiplicativeGaussian): pass
    w = torch.ones(3, 2)
    assert MultiplicativeGaussian().rowwise(w) and Louder().rowwise(w) and not Centred().rowwise(w)
    assert MultiplicativeGaussian().write and Louder().write and Centred().write is None
    net = nn.Conv2d(300, 200, 1)
    with perturbed(net, Centred(0.1), 'weight', 0) as clone:
        assert torch.equal(net.weight, Centred(0.1)(clone.clean[0], clone.draw[0]))

def test_a_call_of_ones_own_holds_at_each_level():
    "A law that clamps what an additive one gives is asked again when the level changes, and so in sweeps and sliders."
    class Clamped:
        def __call__(self, weight, z): return super().__call__(weight, z).clamp(-0.1, 0.1)
    @dataclass(frozen=True)
    class Bounded(Clamped, MaxGaussian): pass
    net = nn.Conv2d(3, 3, 3)
    with Bounded(0.1).drawn(net, generator=0) as to:
        to(0.5)
        assert net.weight.abs().max() == torch.tensor(0.1)
    assert MaxGaussian().additive and not Bounded().additive

def forms(*kinds):
    "A network of many small weights and a few large ones, of each of these kinds."
    torch.manual_seed(0)
    one = lambda: nn.Sequential(*[nn.Conv2d(3, 5, 3) for _ in range(40)], nn.BatchNorm2d(7), nn.Linear(500, 600),
                                nn.Conv2d(64, 300, 3).to(memory_format=torch.channels_last), nn.Linear(3, 0))
    return nn.ModuleList(one().to(kind) for kind in kinds)

@pytest.mark.parametrize('law', [*LAWS, MaxGaussian(per='tensor'), MaxGaussian(clip='truncate')], ids=str)
@pytest.mark.parametrize('kinds', [[torch.float32], [torch.float32, torch.bfloat16, torch.float64]], ids=['one', 'all'])
def test_weights_written_in_groups_hold_what_the_law_says_of_each(law, kinds):
    net = forms(*kinds)
    clone = clone_weights(net, '*.weight').inject(law, 3)
    for p, c, z in zip(clone.weights, clone.clean, clone.draw, strict=True):
        exact = torch.promote_types(c.dtype, torch.float32)
        assert torch.equal(p, law(c.to(exact), z.to(exact)).to(p.dtype))
    calls = []
    plain = lambda w, z: (calls.append(0), law(w, z))[1]
    noisy = [p.detach().clone() for p in clone.weights]
    clone.inject(plain, redraw=False)
    assert all(map(torch.equal, noisy, clone.weights)) and len(calls) == len(noisy)
    clone.recover()

def test_blocks_of_a_small_network_are_drawn_as_those_of_a_large_one():
    sizes = [(16,), (3, 5, 3, 3), (), (0,), (70_000,), (2**16,), (2**16 + 1,)]
    few = fill_blocks([torch.empty(s) for s in sizes], as_generator(1))
    seeds = torch.randint(2**62, (9,), generator=as_generator(1)).tolist()
    blocks = [b for s in sizes for b in torch.empty(s).view(-1).split(BLOCK)]
    for b, seed in zip(blocks, seeds, strict=True): b.normal_(generator=as_generator(seed))
    assert torch.equal(torch.cat([z.view(-1) for z in few]), torch.cat(blocks))

def test_a_large_model_draws_ahead_in_a_thread_and_gets_the_same_noise():
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Conv2d(200, 200, 3) for _ in range(4)])   # above the size at which a thread draws
    g = torch.Generator().manual_seed(5)
    expected = [m.weight + 0.3 * torch.empty(m.weight.shape).normal_(generator=g) for m in net]
    with perturbed(net, AbsoluteGaussian(0.3), generator=5):
        for m, e in zip(net, expected): assert torch.equal(m.weight, e)
    def fails(w, z): raise ZeroDivisionError
    before = snapshot(net)
    with pytest.raises(ZeroDivisionError): clone_weights(net).inject(fails)
    assert same(before, snapshot(net))

def test_compiled_and_scripted_models_see_the_noise():
    model, x = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).eval(), torch.randn(1, 1, 8, 8)
    traced = torch.jit.trace(model, x)
    with torch.no_grad():
        clean = traced(x)
        with perturbed(traced, AbsoluteGaussian(0.5), lambda name, module, weight: weight.ndim == 4, generator=0):
            noisy = traced(x)
        assert not torch.equal(clean, noisy) and torch.equal(clean, traced(x))

def test_a_cached_parametrization_does_not_hide_the_noise():
    m, x = parametrizations.weight_norm(nn.Conv2d(1, 2, 3)), torch.randn(1, 1, 8, 8)
    with torch.no_grad(), nn.utils.parametrize.cached():
        clean = m(x)
        with perturbed(m, AbsoluteGaussian(0.5), generator=0): assert not torch.equal(m(x), clean)
        assert torch.equal(m(x), clean)

def test_gradients_of_a_parametrized_layer_are_those_at_the_noisy_weight():
    torch.manual_seed(0)
    m, x = parametrizations.weight_norm(nn.Linear(5, 3)), torch.randn(7, 5)
    with perturbed(m, AbsoluteGaussian(0.3), conv_and_linear, generator=2):
        w = m.weight
        w.retain_grad()
        nn.functional.linear(x, w, m.bias).square().sum().backward()
        noisy = w.detach().clone()
    expected = 2 * (x @ noisy.T + m.bias.detach()).T @ x
    torch.testing.assert_close(w.grad, expected)
    assert m.parametrizations.weight.original1.grad.abs().sum() > 0

@pytest.mark.parametrize('nonsense, error', [
    (lambda m: clone_weights(3), TypeError), (lambda m: clone_weights(m, where=3), TypeError),
    (lambda m: clone_weights(m, where='no.such.*'), ValueError),
    (lambda m: clone_weights(m, gradient='half'), ValueError), (lambda m: clone_weights(m).inject(None), TypeError),
    (lambda m: clone_weights(m).inject(MaxGaussian(), 'x'), TypeError),
    (lambda m: clone_weights(m).inject(lambda w, z: w[:1]), ValueError),
    (lambda m: clone_weights(m).rescale(1), RuntimeError),
    (lambda m: perturbed(m, 0.5).__enter__(), TypeError), (lambda m: perturbed(m, MaxGaussian(),
        conv_and_norm.first(-1)).__enter__(), ValueError),
])
def test_nonsense_is_refused_and_the_model_untouched(nonsense, error):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    before = snapshot(model)
    with pytest.raises(error) as e: nonsense(model)
    assert len(str(e.value)) > 20
    assert same(before, snapshot(model))

@pytest.mark.parametrize('level', [-1, float('nan'), 'loud', None])
def test_a_level_that_is_none_leaves_the_noise_as_it_was(level):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    before = snapshot(model)
    clone = clone_weights(model).inject(MaxGaussian(0.1), 0)
    noisy = snapshot(model)
    with pytest.raises(ValueError): clone.rescale(level)
    assert same(noisy, snapshot(model))
    clone.recover()
    assert same(before, snapshot(model))

CTRL_C = '''
import os, sys, torch
from torch import nn
from noisyseg.perturb.laws import MaxGaussian
from noisyseg.perturb.clone import perturbed
torch.manual_seed(0)
net = nn.Sequential(*[nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32)) for _ in range(6)])
clean, x, caught = [p.detach().clone() for p in net.parameters()], torch.randn(1, 32, 8, 8), 0
net.eval()
print('ready', flush=True)
while caught < 40:
    try:
        while True:
            with perturbed(net, MaxGaussian(0.1)): net(x).sum().backward()
    except KeyboardInterrupt:
        caught += 1
        bad = sum(not torch.equal(p, c) for p, c in zip(net.parameters(), clean))
        print('left', bad, flush=True)
'''

def test_ctrl_c_at_random_moments_leaves_clean_weights():
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    p = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', textwrap.dedent(CTRL_C)], stdout=subprocess.PIPE,
                         text=True, env=env)
    try:
        assert p.stdout.readline() == 'ready\n'
        left = []
        for i in range(40):
            time.sleep(0.003 + (i * 37 % 101) / 5000)   # anywhere in a step of a few milliseconds
            p.send_signal(signal.SIGINT)
            left.append(p.stdout.readline())
        assert left == ['left 0\n'] * 40, left
    finally: p.kill()


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(),
                    reason='only the main thread hears Ctrl-C')
def test_ctrl_c_in_an_inner_block_does_not_wait_for_the_outer_one(monkeypatch):
    "It waits until the inner block's weights are back, and no longer"
    net, reached = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), []
    clean = [p.detach().clone() for p in net.parameters()]
    inject = WeightClone.inject
    def pressed(self, *args, **kw):
        signal.raise_signal(signal.SIGINT)
        return inject(self, *args, **kw)
    with pytest.raises(KeyboardInterrupt), perturbed(net, MaxGaussian(0.1), by_name('0.*'), generator=0):
        monkeypatch.setattr(WeightClone, 'inject', pressed)
        with perturbed(net, MaxGaussian(0.1), by_name('1.*'), generator=0): reached.append('inner')
        reached.append('outer')
    assert not reached and all(torch.equal(p, c) for p, c in zip(net.parameters(), clean))


def test_the_fast_path_of_attention_carries_the_noise():
    "PyTorch's fused transformer reads weights past the layers; each that is selected changes its output"
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    packs = nn.TransformerEncoder(layer, 2).eval()
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    calls = {'attention': (nn.MultiheadAttention(8, 2, batch_first=True), lambda m: m(x, x, x, need_weights=False)[0]),
             'layer': (layer, lambda m: m(x)), 'packed': (packs, lambda m: m(x, src_key_padding_mask=padding))}
    for name, (net, call) in calls.items():
        net.eval()
        picked = kernels_and_scales.names(net)
        assert any(n.endswith('in_proj_weight') for n in picked) and any(n.endswith('out_proj.weight') for n in picked)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter('ignore')     # torch: nested tensors are a prototype
            clean = call(net)
            for one in picked:
                with perturbed(net, MaxGaussian(0.3, per='tensor'), one, generator=0):
                    assert (call(net) - clean).abs().max() > 1e-3, one
            with perturbed(net, MaxGaussian(0.3), kernels_and_scales, generator=0):
                fast = call(net)
                torch.backends.mha.set_fastpath_enabled(False)
                try: slow = call(net)
                finally: torch.backends.mha.set_fastpath_enabled(True)
            keep = ~padding if name == 'packed' else ...
            torch.testing.assert_close(fast[keep], slow[keep], rtol=1e-4, atol=1e-5)
            assert torch.equal(call(net), clean)


@pytest.mark.parametrize('name, left_out', [
    ('vit_b_16', '99 %'), ('convnext_tiny', '93 %'), ('resnet18', None), ('efficientnet_b0', None)])
def test_the_default_says_what_it_leaves_out(name, left_out):
    "Of a transformer, conv_and_norm is the first convolution: a sweep would be flat, and nobody would know why"
    net = torchvision.models.get_model(name)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        with perturbed(net, MaxGaussian(0.1)): pass
        with perturbed(net, MaxGaussian(0.1), where=kernels_and_scales): pass
    assert [f'{left_out} of the kernels' in str(o.message) for o in said] == [True] * bool(left_out)
    assert all('where=kernels_and_scales' in str(o.message) for o in said)
