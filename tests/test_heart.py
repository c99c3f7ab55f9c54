"The promise of the heart, as properties: whatever happens, the weights come back bit for bit, or a sentence says why"
import copy
import os
import random
import signal
import time
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from noisyseg.nets.unet3plus import unet3plus_tiny
from noisyseg.perturb.clone import clone_weights, holding, perturbed
from noisyseg.perturb.disturbance import Disturbance, Law, compose
from noisyseg.perturb.laws import AbsoluteGaussian, MaxGaussian, MultiplicativeGaussian, RelativeGaussian
from noisyseg.perturb.quantization import Quantize
from noisyseg.perturb.selectors import conv_and_linear, conv_and_norm, kernels_and_scales, select, weight_sites


class Net(nn.Module):
    "Tied weights, two Parameters on one storage, a view of a part of a weight, weight norm, batch norm."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.tied, self.part = nn.Linear(6, 6), nn.Linear(6, 2)
        self.tied.weight = self.a.weight
        self.b.weight = nn.Parameter(self.c.weight.data)                 # one storage
        self.part.weight = nn.Parameter(self.c.weight.data[1:3])         # a part of it
        self.normed = parametrizations.weight_norm(nn.Linear(6, 6))
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x):
        x = self.norm(self.normed(self.tied(self.a(x))))
        return self.part(self.c(self.b(x)))


def state(net): return {k: v.detach().clone() for k, v in net.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def in_place(w, z): return w.mul_(1 + z.mul_(0.1))
def fails(w, z):
    w.add_(z)
    if w.ndim == 1: raise ArithmeticError
    return w

LAWS = [MaxGaussian(0.1), AbsoluteGaussian(0.1), MultiplicativeGaussian(0.3), RelativeGaussian(0.2), Quantize(3),
        compose(Quantize(3), MaxGaussian(0.1)), compose(AbsoluteGaussian(0.1), MultiplicativeGaussian(0.1)), in_place,
        fails, lambda w, z: w, lambda w, z: w * float('nan')]
CHANGES = {'nothing': lambda m: None, 'half': lambda m: m.half(), 'double': lambda m: m.double(),
           'an exception': lambda m: 1 / 0, 'a step': lambda m: [p.data.add_(1) for c in holding(m) for p in c.weights]}

LONG = os.environ.get('HYPOTHESIS_PROFILE') == 'long'

@settings(max_examples=1200 if LONG else 60, deadline=None, derandomize=not LONG, database=None,
          suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.sampled_from(LAWS), st.sampled_from(['*', 'c.*', 'part.*', 'b.*', kernels_and_scales]),
                          st.sampled_from(['noisy', 'recovered']), st.sampled_from(['normal', 'table'])),
                min_size=1, max_size=3),
       st.sampled_from(list(CHANGES)), st.permutations([0, 1, 2]),
       st.sampled_from([torch.float32, torch.float64, torch.float16]))
def test_whatever_happens_in_blocks_the_weights_come_back(blocks, change, order, dtype):
    "Laws x selections x gradients x dtypes x tied, shared, viewed, parametrized weights x changes x any order of ends"
    net = Net().to(dtype)
    net.b.weight.data = net.c.weight.data          # .to gave each a storage of its own
    net.part.weight.data = net.c.weight.data[1:3]
    before, expected, twin = state(net), state(net), copy.deepcopy(net)
    if change in ('half', 'double'): expected = state(CHANGES[change](twin))
    opened = []
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            for i, (law, where, gradient, rng) in enumerate(blocks):
                block = perturbed(net, law, where, i, gradient, rng)
                block.__enter__()
                opened.append(block)
            CHANGES[change](net)
        except (ArithmeticError, ValueError): expected = before   # the law fails, or a number is none
        finally:
            for i in order:
                if i < len(opened): opened[i].__exit__(None, None, None)
    assert same(expected, state(net)) and not holding()


def test_a_law_may_write_into_its_arguments():
    "Neither the clone nor the draw changes by it, in any dtype, with numbers from the table too"
    for dtype in (torch.float32, torch.float64, torch.float16):
        for rng in ('normal', 'blocks', 'table'):
            net = nn.Conv2d(3, 4, 3).to(dtype)
            before, clone = net.weight.detach().clone(), clone_weights(net, rng=rng)
            clone.inject(in_place, 0)
            first = net.weight.detach().clone()
            clone.inject(in_place, redraw=False)
            assert torch.equal(net.weight, first) and not torch.equal(first, before)
            clone.recover()
            assert torch.equal(net.weight, before)

def test_two_parameters_on_one_storage_are_converted_clean():
    "Also those that the selector did not pick"
    for where in ('*', 'c.*', 'b.*', 'part.*', 'a.*'):
        net, twin = Net(), Net()
        with perturbed(net, MaxGaussian(0.3), where, 0): net.half()
        assert same(state(net), state(twin.half())), where

def test_blocks_over_views_may_end_in_any_order():
    for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)):
        net = Net()
        before = state(net)
        blocks = [perturbed(net, AbsoluteGaussian(0.1), where, i) for i, where in enumerate(('c.*', 'part.*', 'b.*'))]
        for b in blocks: b.__enter__()
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            for i in order: blocks[i].__exit__(None, None, None)
        assert same(before, state(net)), order


class Late(Exception): pass

def test_an_exception_from_any_signal_at_any_moment():
    "An alarm while a block is entered, used or left: weights and handlers are what they were"
    def alarm(*a): raise Late
    net = nn.Sequential(*[nn.Conv2d(8, 8, 3) for _ in range(30)]).eval()
    before, pick = state(net), random.Random(0)
    mine, old, hits = signal.getsignal(signal.SIGINT), signal.signal(signal.SIGALRM, alarm), 0
    try:
        begun = time.perf_counter()
        with perturbed(net, MaxGaussian(.1), generator=0): pass
        took = time.perf_counter() - begun
        for _ in range(400):
            try:
                try:
                    signal.setitimer(signal.ITIMER_REAL, pick.uniform(1e-6, 1.2 * took))
                    with perturbed(net, MaxGaussian(.1), generator=0): pass
                finally: signal.setitimer(signal.ITIMER_REAL, 0)
            except Late: hits += 1
            assert same(before, state(net)) and not holding(net)
            assert signal.getsignal(signal.SIGINT) is mine and signal.getsignal(signal.SIGALRM) is alarm
    finally: signal.signal(signal.SIGALRM, old)
    assert hits > 40

def test_a_signal_that_raises_nothing_does_not_end_the_block():
    "It waits until the noise is in, happens, and the block goes on with its noise"
    seen, net = [], nn.Conv2d(2, 2, 3)
    before = net.weight.detach().clone()
    old = signal.signal(signal.SIGUSR1, lambda *a: seen.append(torch.equal(net.weight, before)))
    try:
        def law(w, z):
            signal.raise_signal(signal.SIGUSR1)
            return w + z
        with perturbed(net, law, generator=0):
            assert seen == [False] and not torch.equal(net.weight, before)
            signal.raise_signal(signal.SIGUSR1)
            assert seen == [False, False]
    finally: signal.signal(signal.SIGUSR1, old)
    assert torch.equal(net.weight, before)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
        self.head = nn.Conv2d(4, 2, 1)
        self.reentrant = reentrant
    def forward(self, x): return self.head(checkpoint(self.body, x, use_reentrant=self.reentrant))

@pytest.mark.parametrize('make', [lambda: Checkpointed(False), lambda: Checkpointed(True),
                                  lambda: unet3plus_tiny(3, in_channels=1, checkpoint=True)])
def test_recovered_gradients_and_activation_checkpointing_are_refused(make):
    "The backward pass would compute with other weights than the forward pass; 'noisy' is right"
    net, x = make().train(), torch.randn(2, 1, 32, 32, requires_grad=True)
    before = state(net)
    with pytest.raises(ValueError, match="gradient='noisy'"):
        with perturbed(net, MaxGaussian(0.1), generator=0, gradient='recovered'): net(x)
    assert all(torch.equal(p, before[k]) for k, p in net.named_parameters())
    assert not any(m._forward_pre_hooks for m in net.modules())
    with perturbed(net, MaxGaussian(0.1), generator=0):
        out = net(x)
        sum(o.square().mean() for o in (out if isinstance(out, (list, tuple)) else [out])).backward()
    plain = nn.Conv2d(1, 2, 3)
    with perturbed(plain, MaxGaussian(0.1), generator=0, gradient='recovered'):
        loss = plain(x).mean()
        twin = copy.deepcopy(plain)
    loss.backward()
    checkpoint(twin, x, use_reentrant=False).mean().backward()    # a copy made in a block is not watched for ever

def test_a_backward_that_is_still_to_come_is_announced():
    "Where it was called in the block, or nobody waits for one, nothing is said"
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3)).train()
    x = torch.randn(2, 1, 8, 8)
    with pytest.warns(UserWarning, match=r'call backward\(\) inside the block'):
        with perturbed(net, MaxGaussian(0.1)): loss = net(x).square().mean()
    with pytest.raises(RuntimeError): loss.backward()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for _ in range(2):
            with perturbed(net, MaxGaussian(0.1)):
                loss = net(x).square().mean()
                loss.backward()
        with perturbed(net, MaxGaussian(0.1), gradient='recovered'): loss = net(x).square().mean()
        loss.backward()
        with torch.no_grad(), perturbed(net, MaxGaussian(0.1)): out = net(x)
        with perturbed(net, MaxGaussian(0.1)): net(x)                                   # thrown away
        with perturbed(net.eval(), MaxGaussian(0.1)): out = net(x)                      # evaluation
    assert out.shape == (2, 2, 4, 4)


def test_layers_that_noise_cannot_reach_are_named():
    "Quantized layers, weights kept as buffers, layers in TorchScript: a warning, and noise in the others"
    def net(): return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 4), nn.Linear(4, 2))
    quantized = torch.ao.quantization.quantize_dynamic(net(), {nn.Linear}, dtype=torch.qint8)
    frozen = net()
    w = frozen[2].weight.detach()
    del frozen[2].weight
    frozen[2].register_buffer('weight', w)
    scripted = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Flatten(), torch.jit.script(nn.Linear(36, 4)))
    for m, names in ((quantized, '2.weight, 3.weight'), (frozen, '2.weight'), (scripted, '2.weight')):
        with pytest.warns(UserWarning, match=f'means {names} too'), perturbed(m, MaxGaussian(0.1), conv_and_linear):
            m(torch.randn(2, 1, 8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        select(quantized, conv_and_norm)           # its words do not include them
        select(frozen, '0.*')
        select(nn.Sequential(parametrizations.weight_norm(nn.Linear(2, 2)), nn.LayerNorm(2)), kernels_and_scales)

def test_wrapped_networks_have_the_names_of_the_network_inside():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    inner = nn.Sequential(net, nn.Conv2d(2, 2, 1))
    names = [s.name for s in weight_sites(inner)]
    averaged = torch.optim.swa_utils.AveragedModel(inner)
    partly = nn.Sequential(torch.compile(net), inner[1])
    for wrapped in (torch.compile(inner), nn.DataParallel(inner), averaged, partly):
        assert [s.name for s in weight_sites(wrapped)] == names
        assert conv_and_norm.names(wrapped) == conv_and_norm.names(inner)
        before = state(wrapped)
        with perturbed(wrapped, MaxGaussian(0.1), '0.0.weight', 0):
            changed, = [k for k in before if not torch.equal(state(wrapped)[k], before[k])]
            assert changed.endswith('0.weight')
        assert same(before, state(wrapped))

def test_sharded_weights_are_refused_with_a_sentence(monkeypatch):
    class Sharded(torch.Tensor):
        device_mesh = None
    net = nn.Linear(2, 2)
    net.weight = nn.Parameter(net.weight.detach().as_subclass(Sharded))
    with pytest.raises(ValueError, match='DistributedDataParallel'), perturbed(net, MaxGaussian(0.1), 'weight'): pass


def test_what_torch_does_not_promise():
    "Private names of torch that the heart leans on, and what it expects of them: a change shows here first"
    from torch.nn.utils import parametrize
    assert isinstance(parametrize._cache, dict)
    p = nn.Parameter(torch.ones(2))
    from torch.autograd.graph import get_gradient_edge
    get_gradient_edge(p).node.metadata['x'] = 1
    assert 'x' not in get_gradient_edge(p).node.metadata        # a node that nobody keeps is forgotten
    out = p * 2
    get_gradient_edge(p).node.metadata['x'] = 1
    assert 'x' in get_gradient_edge(p).node.metadata and out is not None
    frames = []
    class Spy(nn.Module):
        def forward(self, x):
            import sys
            f = sys._getframe()
            while f: frames.append(f.f_globals.get('__name__')); f = f.f_back
            return x * 2
    for reentrant in (True, False):
        frames.clear()
        checkpoint(Spy(), torch.ones(1, requires_grad=True), use_reentrant=reentrant)
        assert 'torch.utils.checkpoint' in frames
    q = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(2, 2)), {nn.Linear}, dtype=torch.qint8)[0]
    assert nn.Linear in type(q)._FLOAT_MODULE and isinstance(q.weight(), torch.Tensor)
    assert torch.jit.script(nn.Linear(2, 2)).original_name == 'Linear'


# --- disturbances ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('law', [MaxGaussian(0.05), AbsoluteGaussian(0.01), MultiplicativeGaussian(0.1),
                                 RelativeGaussian(0.1), Quantize(4)], ids=lambda l: type(l).__name__)
def test_a_law_states_its_facts(law):
    "Levels from mild to strong do more and more harm; nothing is nothing; names, texts and dictionaries lead back"
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    before, errors = net[0].weight.detach().clone(), []
    assert law.ordered(reversed(law.levels)) == list(law.levels)
    assert law.ordered([law.levels[0], law.nothing])[0] == law.nothing
    with law.drawn(net, generator=0) as to:
        for level in (law.nothing, *law.levels):
            to(level)
            errors.append((net[0].weight - before).square().mean().item())
    assert errors == sorted(errors) and errors[0] == 0 and torch.equal(net[0].weight, before)
    assert Disturbance.from_dict(law.to_dict()) == law == Law.from_dict({**law.to_dict()})
    assert law.at(law.levels[0]).name == law.name and str(law.level) not in law.name.split(',')[0]
    assert law.level_text(law.nothing) == law.off and law.level_text(law.levels[0]) != law.off and law.axis_title()
    old = {'law' if k == 'disturbance' else k: v for k, v in law.to_dict().items()}
    assert Law.from_dict(old) == law

def test_few_bits_then_noise():
    "The same in a block, by nested blocks, and as a draw at many levels; the noise is that of the noise alone"
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(3, 3))
    before, both = state(net), compose(Quantize(4), AbsoluteGaussian(0.01))
    with perturbed(net, Quantize(4), conv_and_linear, 0), perturbed(net, AbsoluteGaussian(0.01), conv_and_linear, 5):
        nested = state(net)
    with both.acting(net, generator=5): assert same(state(net), nested)
    with perturbed(net, both, conv_and_linear, 5): assert same(state(net), nested)
    with both.drawn(net, generator=5) as to:
        to(0.5)
        to(0.01)
        assert same(state(net), nested)
    assert same(before, state(net)) and both.level == 0.01 and not both.level_text(0) == both.off
    assert both.label == 'fewer bits + absolute attack' and Disturbance.from_dict(both.to_dict()) == both
    two = compose(AbsoluteGaussian(0.1), AbsoluteGaussian(0.1))
    w, z = torch.zeros(4000), torch.randn(4000)
    assert abs(two(w, z).std() / 0.1 - 2**0.5) < 0.05        # draws of their own add up as such

def test_a_share_above_one_says_that_it_is_hundreds_of_percent():
    for make in (lambda: MaxGaussian(5), lambda: RelativeGaussian().at(5), lambda: MultiplicativeGaussian(5.)):
        with pytest.warns(UserWarning, match='500 %.*=0.05'): make()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        MaxGaussian(1.), AbsoluteGaussian(5.), Quantize(5)
