"SAM beyond the lessons: formulas in double precision, faults, checkpoints, mixed precision, two processes."
import copy
import io
import math
import pickle
import signal
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback, CancelBatchException, CancelFitException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import SchedLin
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.all import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import SGD, Adam, OptimWrapper
from torch import nn
from torch.nn.utils import parametrizations

from noisyseg.train.methods.ascent import Ascent, ByEpoch, _norm, multi_step_rho, norm_layers
from noisyseg.train.methods.damp import DAMP, damp_backward
from noisyseg.perturb.laws import AbsoluteGaussian, MaxGaussian
from noisyseg.perturb.clone import clone_weights, perturbed
from noisyseg.train.methods.sam import SAM
from noisyseg.train.methods.sam_callback import SAMCallback
from noisyseg.train.noise import WeightNoise


def conv_net(seed=0, p=0.):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(),
                         nn.Dropout(p), nn.Linear(64, 5))

def smooth_net(seed=0):
    "No layer that couples the samples or draws random numbers."
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.GroupNorm(2, 6), nn.Tanh(), nn.Flatten(), nn.Linear(216, 5))

def batch(seed=0, n=16, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 8, 8, generator=g).to(dtype), torch.randint(0, 5, (n,), generator=g)

def loss_of(model, b): return F.cross_entropy(model(b[0]), b[1])
def closure_of(model, b): return lambda: loss_of(model, b).backward()
def sgd(model, lr=0.1, **kw): return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, **kw)
def weights(model): return [p.detach().clone() for p in model.parameters()]
def everything(model): return {k: v.clone() for k, v in model.state_dict().items()}
def flat(model): return torch.cat([p.detach().flatten().double() for p in model.parameters()])

def same(a, b):
    a, b = (list(x.values() if isinstance(x, dict) else x) for x in (a, b))
    return len(a) == len(b) and all(torch.equal(x.contiguous().view(-1).view(torch.uint8),
                                                y.contiguous().view(-1).view(torch.uint8)) for x, y in zip(a, b))


# ---- the formulas

def by_the_paper(model, b, settings, lr, velocity, momentum=0.9):
    ("One step of SAM or ASAM and SGD, from the papers, on a copy whose weights are replaced rather than moved. "
     "`settings`: name -> (rho, eta or None).")
    def gradient(ws):
        leaves = {n: w.clone().requires_grad_() for n, w in ws.items()}
        return dict(zip(leaves, torch.autograd.grad(F.cross_entropy(torch.func.functional_call(model, leaves, (b[0],)),
                b[1]), list(leaves.values()))))
    w = {n: p.detach().clone() for n, p in model.named_parameters()}
    g = gradient(w)
    T = {n: w[n].abs() + eta if eta is not None and n.endswith('weight') else torch.ones_like(w[n]) for n,
         (_, eta) in settings.items()}
    length = torch.sqrt(sum((T[n] * g[n]).square().sum() for n in w))
    top = gradient({n: w[n] + settings[n][0] * T[n].square() * g[n] / length for n in w})
    for n in w: velocity[n] = momentum * velocity.get(n, 0) + top[n]
    return {n: w[n] - lr * velocity[n] for n in w}

@pytest.mark.parametrize('adaptive', [False, True])
@pytest.mark.parametrize('seed', range(3))
def test_steps_follow_the_papers_in_double_precision(adaptive, seed):
    model = smooth_net(seed).double()
    head = [p for n, p in model.named_parameters() if n.startswith('4')]
    rest = [p for n, p in model.named_parameters() if not n.startswith('4')]
    # rho per group, one norm for all
    base = torch.optim.SGD([{'params': head, 'rho': 0.3, 'eta': 0.1}, {'params': rest}], lr=0.1, momentum=0.9)
    opt = SAM(base, model, rho=0.07, adaptive=adaptive, eta=0.01)
    settings = {n: ((0.3, 0.1) if n.startswith('4') else (0.07, 0.01)) for n, _ in model.named_parameters()}
    if not adaptive: settings = {n: (r, None) for n, (r, _) in settings.items()}
    velocity = {}
    for i in range(5):
        b = batch(10 * seed + i, dtype=torch.float64)
        expected = by_the_paper(model, b, settings, 0.1, velocity)
        opt.step(closure_of(model, b))
        for n, p in model.named_parameters(): torch.testing.assert_close(p.detach(), expected[n], rtol=0, atol=1e-10)

@pytest.mark.parametrize('scale', [1e-30, 1e-22, 1., 1e22, 1e30])
def test_the_norm_keeps_its_range(scale):
    t = [torch.full((7,), 3. * scale), torch.full((2, 8), 4. * scale), torch.zeros(0)]
    assert math.isclose(_norm(t), scale * math.sqrt(7 * 9 + 16 * 16), rel_tol=1e-5)

def test_the_norm_of_nothing_and_of_infinities():
    assert _norm([]) == _norm([torch.zeros(3)]) == 0
    assert _norm([torch.tensor([1., math.inf])]) == math.inf and math.isnan(
            _norm([torch.ones(3), torch.tensor([math.nan])]))
    assert math.isclose(_norm([torch.full((100,), 6e4, dtype=torch.float16).float()]), 6e5, rel_tol=1e-3)

@pytest.mark.parametrize('seed', range(3))
def test_the_step_uphill_does_not_depend_on_the_losses_scale(seed):
    tops = []
    for scale in (1e-20, 1., 2.**16):
        model = smooth_net(seed)
        (loss_of(model, batch(seed)) * scale).backward()
        Ascent(model).climb([dict(params=list(model.parameters()), rho=0.5, adaptive=True, eta=0.01)])
        tops.append(flat(model))
    for t in tops[1:]: torch.testing.assert_close(t, tops[0], rtol=1e-4, atol=1e-6)


# ---- what is put back

class Zoo(nn.Module):
    "Tied weights, weight norm, spectral norm, half precision, channels last, batch norm with momentum and without."
    def __init__(self):
        super().__init__()
        self.conv = parametrizations.spectral_norm(nn.Conv2d(1, 4, 3)).to(memory_format=torch.channels_last)
        self.bn, self.cumulative = nn.BatchNorm2d(4), nn.BatchNorm2d(4, momentum=None)
        self.a, self.b = parametrizations.weight_norm(nn.Linear(36, 36)), nn.Linear(36, 36)
        self.c, self.low = nn.Linear(36, 36), nn.Linear(36, 5).to(torch.bfloat16)
        self.c.weight = self.b.weight
    def forward(self, x):
        x = self.cumulative(self.bn(self.conv(x))).mean(1).flatten(1)
        return self.low(self.c(self.b(self.a(x))).to(torch.bfloat16)).float()

def test_weights_come_back_exactly_and_buffers_move_as_in_one_plain_pass():
    torch.manual_seed(0)
    model, b = Zoo(), batch()
    plain = copy.deepcopy(model)
    loss_of(plain, b)
    for how in ('closure', 'two calls', 'parts'):
        m = copy.deepcopy(model)
        before, places = weights(m), [(p.data_ptr(), p.stride()) for p in m.parameters()]
        opt, tops = SAM(sgd(m, lr=0.), m, rho=3., adaptive=True), []
        def closure():
            tops.append(weights(m))
            loss_of(m, b).backward()
        if how == 'closure': opt.step(closure)
        elif how == 'parts': opt.step([closure, closure])   # the same samples twice: the mean of equals
        else:
            closure()
            assert opt.first_step() and all(p.grad is None for p in m.parameters())
            closure()
            opt.second_step()
        assert all(not torch.equal(p, q) for p, q in zip(*tops[:2])), 'all weights climbed'
        assert same(before, weights(m)) and places == [(p.data_ptr(), p.stride()) for p in m.parameters()], how
        for (k, u), v in zip(m.named_buffers(), plain.buffers()):
            if how == 'parts': torch.testing.assert_close(u, v, msg=k)
            else: assert torch.equal(u, v), (how, k)

def test_batch_norm_survives_infinite_activations_at_the_top():
    model = conv_net()
    opt, calls = SAM(sgd(model, lr=0.), model), []
    def closure():
        calls.append(0)
        b = batch()
        if len(calls) == 2: b[0][0] = math.inf
        loss_of(model, b).backward()
    opt.step(closure)
    assert model[1].running_mean.isfinite().all() and model[1].num_batches_tracked == 1

def test_a_buffer_that_a_module_replaces():
    class Tracks(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(2, 2)
            self.register_buffer('seen', torch.zeros(()))
        def forward(self, x): self.seen = self.seen + 1; return self.lin(x)
    m = Tracks()
    SAM(sgd(m), m).step(lambda: m(torch.ones(1, 2)).square().sum().backward())
    assert m.seen == 1 and dict(m.named_buffers())['seen'] is m.seen

@pytest.mark.parametrize('how', ['closure', 'two calls', 'parts', 'every', 'flat', 'infinite'])
@pytest.mark.parametrize('adaptive', [False, True])
def test_a_head_with_an_optimizer_of_its_own_gets_the_second_gradient_once(how, adaptive):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(16, 4), torch.randint(3, (16,))
    opt = SAM(sgd(net[0], lr=0.), net, rho=0. if how == 'flat' else 0.5, adaptive=adaptive, every=2)
    tops, had = [], torch.ones(3, 8)
    def closure():
        loss = F.cross_entropy(net(x), y) * (math.inf if how == 'infinite' else 1)
        tops.append(torch.autograd.grad(loss, net[2].weight, retain_graph=True)[0])
        loss.backward()
        return loss
    if how == 'every': opt._n_steps = 1
    if how == 'two calls':
        closure()
        assert opt.first_step() and all(p.grad is None for p in net.parameters())
        closure()
        opt.second_step()
        had = 0
    else:
        net[2].weight.grad = had.clone()
        opt.step([closure, closure] if how == 'parts' else closure)
    torch.testing.assert_close(net[2].weight.grad, had + tops[-1], equal_nan=True)
    assert len(tops) == {'parts': 4, 'every': 1, 'flat': 1, 'infinite': 1}.get(how, 2)

def test_an_error_leaves_the_gradients_of_others():
    net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    opt = SAM(sgd(net[0]), net)
    net[1].weight.grad = g = torch.ones(3, 8)
    with pytest.raises(ZeroDivisionError): opt.step(lambda: net(torch.ones(1, 4)).sum().backward() or 1 / 0)
    assert net[1].weight.grad is g and g.eq(1).all()

@pytest.mark.parametrize('two_calls', [False, True])
def test_a_parameter_without_a_second_gradient_comes_back(two_calls):
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 1)])
    before, passes = weights(model), []
    opt = SAM(sgd(model, lr=0.), model, rho=1.)
    def closure():
        passes.append(weights(model))
        x = torch.ones(2, 3)
        model[1](model[0](x) if len(passes) == 1 else x).sum().backward()
    if two_calls: closure(), opt.first_step(), closure(), opt.second_step()
    else: opt.step(closure)
    assert not torch.equal(passes[1][0], before[0]) and model[0].weight.grad is None
    assert same(before, weights(model))

def test_a_flat_place_and_a_missing_gradient():
    model = smooth_net()
    before = weights(model)
    opt = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model)
    opt.step(lambda: (model(batch()[0]) * 0).sum().backward())
    assert same(before, weights(model))
    with pytest.raises(RuntimeError, match=r'call backward\(\)'): opt.step(lambda: None)
    with pytest.raises(RuntimeError, match=r'call backward\(\)'): SAM(sgd(model), model).first_step()
    frozen = conv_net()
    frozen[0].requires_grad_(False)
    kernel = frozen[0].weight.detach().clone()
    SAM(sgd(frozen), frozen, rho=1.).step(closure_of(frozen, batch()))
    assert torch.equal(kernel, frozen[0].weight)

def test_sparse_gradients_are_refused_before_anything_moves():
    model = nn.ModuleList([nn.Linear(3, 3), nn.Embedding(4, 3, sparse=True)])
    before = weights(model)
    def closure(): model[0](model[1](torch.tensor([1, 2]))).sum().backward()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r'1\.weight has a sparse one'): SAM(base, model).step(closure)
    assert same(before, weights(model))
    SAM(base, model, where='0.*').step(closure)   # left out of the ascent, the base optimizer may well take it
    assert not torch.equal(before[1], model[0].bias)

@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize('at', ['first', 'second', 'under noise', 'under noise left behind'])
def test_a_closure_that_raises_leaves_the_weights_as_they_were(error, at):
    model = conv_net()
    before, calls, kept = weights(model), [], []
    opt = SAM(sgd(model), model, rho=1., where=norm_layers)
    def closure():
        calls.append(0)
        if len(calls) == 1 and at != 'first': return loss_of(model, batch()).backward()
        if at == 'under noise':
            with perturbed(model, MaxGaussian(0.3)): raise error
        if at == 'under noise left behind': kept.append(clone_weights(model).inject(MaxGaussian(0.3)))
        raise error
    with pytest.raises(error): opt.step(closure)
    assert same(before, weights(model)) and not any(c.injected for c in kept)
    assert all(p.requires_grad for p in model.parameters()) and not opt.ascent.climbed and not opt.state
    calls[:] = [0, 0, 0]
    opt.step(closure_of(model, batch()))   # and it goes on working
    assert not same(before, weights(model))

def test_a_first_step_without_a_second_is_undone_by_the_next():
    model = smooth_net()
    before, opt = weights(model), SAM(sgd(model, lr=0.), model, rho=1.)
    loss_of(model, batch()).backward()
    opt.first_step()
    assert not same(before, weights(model))
    opt.step(closure_of(model, batch()))
    assert same(before, weights(model))
    with pytest.raises(RuntimeError, match='first_step'): opt.step()

def test_the_second_pass_of_an_autocast_block_sees_the_weights_at_the_top():
    model, b, seen = conv_net(), batch(), []
    opt = SAM(sgd(model, lr=0.), model, rho=2.)
    def closure():
        seen.append(model(b[0]).detach())
        loss_of(model, b).backward()
    with torch.autocast('cpu', torch.bfloat16):
        opt.step(closure)
        again = model(b[0])
    assert not torch.allclose(seen[0], seen[1], atol=1e-2) and torch.equal(again, seen[0])

INTERRUPTED = '''
import os, signal, sys, threading, time, torch
from torch import nn
from noisyseg.perturb.laws import MaxGaussian
from noisyseg.perturb.clone import perturbed
from noisyseg.train.methods.sam import SAM
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)])
opt = SAM(torch.optim.SGD(model.parameters(), lr=0.), model, rho=1., where='0.*')
before, x = [p.detach().clone() for p in model.parameters()], torch.randn(4, 8)
def closure():
    with perturbed(model, MaxGaussian(0.1), where='*.weight'): model(x).square().sum().backward()
def press(*_):
    "As Python does, but only within the step: this script's own lines are not what is tried"
    global armed
    if not armed: return
    armed = False
    raise KeyboardInterrupt
signal.signal(signal.SIGINT, press)
def bother():
    g = torch.Generator().manual_seed(1)
    while True:
        time.sleep(0.002 + 0.01 * torch.rand((), generator=g).item())
        os.kill(os.getpid(), signal.SIGINT)
hits, end, armed = 0, time.time() + 5, False
threading.Thread(target=bother, daemon=True).start()
while time.time() < end:
    try:
        armed = True
        while time.time() < end: opt.step(closure)
        armed = False
    except KeyboardInterrupt: hits += 1
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters())), f'changed after {hits} interrupts'
    assert all(p.requires_grad for p in model.parameters()), f'frozen after {hits} interrupts'
signal.signal(signal.SIGINT, signal.SIG_IGN)
assert all(torch.equal(p, q) for p, q in zip(before, model.parameters()))
print(hits, flush=True)
os._exit(0)
'''

@pytest.mark.skipif(not hasattr(signal, 'SIGINT') or sys.platform == 'win32', reason='needs POSIX signals')
def test_control_c_at_any_moment():
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', INTERRUPTED], capture_output=True, text=True, timeout=120)
    assert r.returncode == 0, r.stderr[-2000:]
    assert int(r.stdout.split()[-1]) > 20, r.stdout


# ---- as an optimizer among others

@pytest.mark.parametrize('make', [sgd, lambda m: torch.optim.AdamW(m.parameters(), lr=0.01),
                                  lambda m: torch.optim.RMSprop(m.parameters(), momentum=0.5)])
def test_rho_zero_is_the_base_optimizer_bit_for_bit(make):
    nets = [conv_net(p=0.2) for _ in range(4)]
    opts = [make(nets[0]), SAM(make(nets[1]), nets[1], rho=0.), SAM(make(nets[2]), nets[2], rho=0., adaptive=True)]
    for net, opt in zip(nets, opts):
        torch.manual_seed(3)
        for i in range(6):
            opt.zero_grad()
            if isinstance(opt, SAM): opt.step(closure_of(net, batch(i)))
            else: loss_of(net, batch(i)).backward(), opt.step()
    assert same(everything(nets[0]), everything(nets[1])) and same(everything(nets[0]), everything(nets[2]))
    m, opt = nets[3], None
    for p in (m[6],): p.p = 0.
    twin = copy.deepcopy(m)
    opt, ref = SAM(make(m), m, rho=0.), make(twin)
    for i in range(4):   # the two calls, with the second gradient taken in any case
        loss_of(m, batch(i)).backward(), opt.first_step(), loss_of(m,
                batch(i)).backward(), opt.second_step(), opt.zero_grad()
        loss_of(twin, batch(i)).backward(), ref.step(), ref.zero_grad()
    assert same(everything(m), everything(twin))

@pytest.mark.parametrize('make', [sgd, lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, amsgrad=True)])
def test_a_checkpoint_goes_on_as_if_nothing_had_been(make):
    model = conv_net(p=0.2)
    opt = SAM(make(model), model, rho=0.2, adaptive=True, every=2)
    for i in range(3): opt.step(closure_of(model, batch(i)))
    file = io.BytesIO()
    torch.save({'model': model.state_dict(), 'opt': opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = conv_net(seed=9, p=0.2)
    opt2 = SAM(make(other), other, rho=0.9, every=2)
    other.load_state_dict(saved['model']), opt2.load_state_dict(saved['opt'])
    for o, m in ((opt, model), (opt2, other)):
        torch.manual_seed(0)
        for i in range(5): o.step(closure_of(m, batch(i)))
    assert same(everything(model), everything(other))
    for a, b in zip(opt.state.values(), opt2.state.values()): assert a.keys() == b.keys() and same(a, b)
    base = make(conv_net())
    base.load_state_dict(saved['opt'])   # the base optimizer reads it, and SAM reads the base optimizer's
    opt2.load_state_dict(make(other).state_dict())
    assert opt2.param_groups is opt2.base.param_groups and opt2.param_groups[0]['rho'] == 0.9
    opt2.base.load_state_dict(make(other).state_dict())   # behind its back
    assert opt2.param_groups is opt2.base.param_groups and opt2.state is opt2.base.state

def test_schedulers_hooks_copies_and_added_groups():
    model = conv_net()
    opt, steps = SAM(torch.optim.SGD(model[0].parameters(), lr=0.1), model), []
    opt.add_param_group({'params': model[3].parameters(), 'lr': 0.5, 'rho': 0.})
    opt.register_step_post_hook(lambda *_: steps.append('sam')), opt.base.register_step_post_hook(lambda
            *_: steps.append('base'))
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda i: 0.5**i)
    opt.step(closure_of(model, batch()))
    schedule.step()
    assert [g['lr'] for g in opt.param_groups] == [g['lr'] for g in opt.base.param_groups] == [0.05,
            0.25] and steps == ['base', 'sam']
    assert [g['rho'] for g in opt.param_groups] == [0.05, 0.] and 'lr: 0.25' in repr(opt)
    m2, o2 = copy.deepcopy((model, opt))
    m3, o3 = pickle.loads(pickle.dumps((model, SAM(sgd(model), model, rho=0.3))))
    for m, o in ((m2, o2), (m3, o3)):
        assert all(p is q for p, q in zip(o.ascent.names, m.parameters()))
        before = weights(m)
        o.step(closure_of(m, batch(1)))
        assert not same(before, weights(m)) and same(weights(model), before)
    opt.set_rho([0.1, 0.2])
    assert [g['rho'] for g in opt.base.param_groups] == [0.1, 0.2]
    with pytest.raises(ValueError, match='none of the model'):
        opt.add_param_group({'params': nn.Linear(2, 2).parameters()})

def test_every_kth_step_and_rho_changes_between_steps():
    model, passes = smooth_net(), []
    opt = SAM(sgd(model), model, every=3)
    def closure():
        passes.append(0)
        loss_of(model, batch()).backward()
    counts = []
    for i in range(7):
        if i == 6: opt.set_rho(0.)
        passes.clear()
        opt.step(closure)
        counts.append(len(passes))
    assert counts == [2, 1, 1, 2, 1, 1, 1]
    loss_of(model, batch()).backward()
    opt.set_rho(0.1)
    assert not opt.first_step()           # step 7 is no climbing one: the gradient at hand stays
    assert model[0].weight.grad is not None
    opt.second_step()

def test_only_norm_layers_climb_and_only_they_get_a_first_gradient():
    model, seen = conv_net(), []
    opt = SAM(sgd(model), model, rho=1., where=norm_layers)
    before = everything(model)
    def closure():
        seen.append({k for k, v in model.named_parameters() if not torch.equal(v, before[k])})
        loss_of(model, batch()).backward()
        seen.append({k for k, p in model.named_parameters() if p.grad is not None})
    opt.step(closure)
    assert seen[0] == set() and seen[1] == seen[2] == {'1.weight',
                                                       '1.bias'} and seen[3] == set(dict(model.named_parameters()))
    ln = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.RMSNorm(3), nn.GroupNorm(1, 3))
    assert norm_layers.names(ln) == ['1.weight', '1.bias', '2.weight', '3.weight', '3.bias']

def test_an_ascent_on_a_part_of_the_batch_and_parts_that_climb_by_themselves():
    def gradients_at_tops(b, parts):
        total = 0.
        for ascent, descent, share in parts:
            m = smooth_net().double()
            g = torch.autograd.grad(F.cross_entropy(m(b[0][ascent]), b[1][ascent]), list(m.parameters()))
            length = torch.sqrt(sum(t.square().sum() for t in g))
            with torch.no_grad(): [p.add_(0.4 * t / length) for p, t in zip(m.parameters(), g)]
            g = torch.autograd.grad(F.cross_entropy(m(b[0][descent]), b[1][descent]), list(m.parameters()))
            total = total + share * torch.cat([t.flatten() for t in g])
        return total
    b, whole = batch(n=20, dtype=torch.float64), slice(None)
    def stepped(**kw):
        m = smooth_net().double()
        opt = SAM(torch.optim.SGD(m.parameters(), lr=1.), m, rho=0.4)
        start = flat(m)
        opt.step(**{k: v(m) if callable(v) else v for k, v in kw.items()})
        return start - flat(m)
    def on(s): return lambda m: (lambda: F.cross_entropy(m(b[0][s]), b[1][s]).backward())
    torch.testing.assert_close(stepped(closure=on(whole), ascent=on(slice(5))),
                               gradients_at_tops(b, [(slice(5), whole, 1.)]), rtol=0, atol=1e-10)
    cuts = [slice(0, 8), slice(8, 16), slice(16, 20)]
    got = stepped(closure=lambda m: [on(s)(m) for s in cuts], weights=[8, 8, 4])
    torch.testing.assert_close(got, gradients_at_tops(b, [(s, s, w) for s, w in zip(cuts, (0.4, 0.4, 0.2))]), rtol=0,
                               atol=1e-10)
    accumulated = stepped(closure=lambda m: (lambda: [(F.cross_entropy(m(b[0][s]), b[1][s]) * w).backward() for s,
                                                      w in zip(cuts, (0.4, 0.4, 0.2))]))
    # accumulation in the closure: one ascent
    torch.testing.assert_close(accumulated, gradients_at_tops(b, [(whole, whole, 1.)]), rtol=0, atol=1e-10)

def test_both_passes_see_the_same_dropout_and_the_stream_goes_on_as_without_sam():
    model, drawn = conv_net(p=0.5), []
    def closure():
        drawn.append(torch.rand(3))
        loss_of(model, batch()).backward()
    for same_draws in (True, False):
        drawn.clear()
        torch.manual_seed(0)
        SAM(sgd(model), model, same_draws=same_draws).step(closure)
        assert torch.equal(*drawn) == same_draws
        after = torch.rand(3)
        torch.manual_seed(0)
        torch.rand(3), loss_of(model, batch())
        assert torch.equal(after, torch.rand(3)) == same_draws

def test_damp_inside_sam_takes_the_same_draws_twice():
    model, b = smooth_net().double(), batch(dtype=torch.float64)
    opt, ref = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.3), copy.deepcopy(model)
    opt.step(lambda: damp_backward(model, F.cross_entropy, *b, sigma=0.2, m=4, generator=5))
    def damp_gradient():
        ref.zero_grad()
        damp_backward(ref, F.cross_entropy, *b, sigma=0.2, m=4, generator=5)
        return [p.grad.clone() for p in ref.parameters()]
    start, g = weights(ref), damp_gradient()
    length = torch.sqrt(sum(t.square().sum() for t in g))
    with torch.no_grad(): [p.add_(0.3 * t / length) for p, t in zip(ref.parameters(), g)]
    for p, s, t in zip(model.parameters(), start, damp_gradient()):
        torch.testing.assert_close(p.detach(), s - 0.1 * t, rtol=0, atol=1e-10)


# ---- mixed precision

def scaled_loop(model, opt, scaler, how, bad=None, steps=4):
    "`bad`: (step, pass) whose loss is infinite."
    for i in range(steps):
        passes = []
        def closure():
            passes.append(0)
            loss = loss_of(model, batch(i)) * (math.inf if (i, len(passes)) == bad else 1.)
            scaler.scale(loss).backward()
        before = weights(model)
        if how == 'closure': opt.step(closure, scaler=scaler)
        else:
            opt.zero_grad()
            closure()
            if opt.first_step(): closure()
            if how == 'unscale': scaler.unscale_(opt)
            scaler.step(opt)
        scaler.update()
        assert same(before, weights(model)) == (bad is not None and bad[0] == i), (i, how)

@pytest.mark.parametrize('how', ['closure', 'two calls', 'unscale'])
@pytest.mark.parametrize('bad', [None, (1, 1), (1, 2)])
def test_grad_scaler(how, bad):
    model, scaler = conv_net(), torch.amp.GradScaler('cpu', init_scale=2.**8)
    opt = SAM(sgd(model), model, rho=0.1)
    scaled_loop(model, opt, scaler, how, bad)
    assert scaler.get_scale() == (2.**8 if bad is None else 2.**7)
    plain = conv_net()
    ref = SAM(sgd(plain), plain, rho=0.1)
    for i in range(4):
        if bad is None or bad[0] != i: ref.step(closure_of(plain, batch(i)))
    for a, b in zip(model.parameters(), plain.parameters()): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)

def test_a_disabled_scaler_changes_nothing():
    a, b = conv_net(), conv_net()
    scaled_loop(a, SAM(sgd(a), a), torch.amp.GradScaler('cpu', enabled=False), 'closure')
    scaled_loop(b, SAM(sgd(b), b), torch.amp.GradScaler('cpu', enabled=False), 'two calls')
    assert same(everything(a), everything(b))


# ---- in a fastai Learner

class CpuHalf(MixedPrecision):
    "fastai's mixed precision, on the CPU: bfloat16 autocast and a GradScaler."
    scale = 2.**10
    def before_fit(self):
        self.autocast, self.learn.scaler, self.scales = torch.autocast('cpu',
                torch.bfloat16), torch.amp.GradScaler('cpu', init_scale=self.scale), []

def fit(model, batches, cbs, opt_func=SGD, lr=0.1, epochs=1, **kw):
    learn = Learner(DataLoaders(batches, []), model, nn.CrossEntropyLoss(), opt_func=opt_func, lr=lr, cbs=cbs, **kw)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs)
    return learn

def halves(b, n): return list(zip(b[0].split(n), b[1].split(n)))

@pytest.mark.parametrize('opt_func', [SGD, Adam, lambda params, lr: OptimWrapper(params, torch.optim.AdamW, lr=lr)])
@pytest.mark.parametrize('kw', [{}, dict(adaptive=True, rho=0.3), dict(m=4), dict(m=7), dict(batch_part=0.5),
                                dict(every=2),
                                dict(where=norm_layers, m=8, batch_part=0.5)])
def test_the_callback_does_what_the_optimizer_does(opt_func, kw):
    "With each of fastai's kinds of optimizer: gradients by hand, steps by the same optimizer."
    batches = [batch(i) for i in range(3)]
    learn = fit(conv_net(), batches, SAMCallback(**kw), opt_func)
    m = conv_net()
    opt = Learner(DataLoaders(batches, []), m, nn.CrossEntropyLoss(), opt_func=opt_func, lr=0.1)
    opt.create_opt()
    opt.opt.set_hypers(lr=0.1)
    ascent, part = Ascent(m, kw.get('where')), kw.get('batch_part', 1.)
    for i, b in enumerate(batches):
        groups = [dict(params=list(m.parameters()), rho=kw.get('rho', 0.05), adaptive=kw.get('adaptive', False),
                       eta=0.01)]
        parts = halves(b, kw.get('m', 16))
        jobs = [(closure_of(m, tuple(t[:math.ceil(part * len(t))] for t in p)), closure_of(m, p)) for p in parts]
        ascent.gradients(groups, jobs, [len(p[1]) for p in parts], up=i % kw.get('every', 1) == 0)
        opt.opt.step()
    for a, b in zip(learn.model.state_dict().values(), m.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert learn.model[1].num_batches_tracked == 3

def test_gradient_accumulation_is_one_ascent_or_one_for_each_part():
    b = batch(n=16)
    one = flat(fit(smooth_net(), [b], SAMCallback(1.)).model)
    for size in (4, 8):
        torch.testing.assert_close(flat(fit(smooth_net(), halves(b, size),
                                            [SAMCallback(1.), GradientAccumulation(16)]).model), one)
    parts = flat(fit(smooth_net(), [b], SAMCallback(1., m=4)).model)
    for size in (4, 8):
        torch.testing.assert_close(flat(fit(smooth_net(), halves(b, size),
                                            [SAMCallback(1., m=4), GradientAccumulation(16)]).model), parts)
    assert (one - parts).norm() > 1e-3
    # several steps; what is left over at the end is no step
    two = flat(fit(smooth_net(), [b, b], SAMCallback(1.)).model)
    torch.testing.assert_close(flat(fit(smooth_net(), [*halves(b, 4), *halves(b, 4), batch(9, 4)],
                                        [SAMCallback(1.), GradientAccumulation(16)]).model), two)
    # an ascent on half of each batch, with a schedule that starts at nothing
    learn = fit(smooth_net(), halves(b, 4) * 2, [SAMCallback(SchedLin(0., 1.), batch_part=0.5),
                                                 GradientAccumulation(16)])
    assert learn.sam.rhos[0] == 0 < learn.sam.rhos[1] and len(learn.sam.rhos) == 2

@pytest.mark.parametrize('kw', [{}, dict(m=8)])
def test_mixed_precision_in_a_learner(kw):
    cbs = lambda: [SAMCallback(0.3, **kw), CpuHalf(), GradientClip(1.)]
    batches = [batch(i) for i in range(4)]
    half, full = fit(conv_net(), batches, cbs()).model, fit(conv_net(), batches,
                                                            [SAMCallback(0.3, **kw), GradientClip(1.)]).model
    start = flat(conv_net())
    assert F.cosine_similarity(flat(half) - start, flat(full) - start,
                               0) > 0.97 and not torch.is_autocast_enabled('cpu')
    class Infinite(Callback):
        "An infinite loss in the n-th pass."
        def __init__(self, nth): self.left = nth
        def after_loss(self):
            self.left -= 1
            if self.left == 0: self.learn.loss_grad = self.learn.loss_grad * math.inf
    for nth in (1, 2):
        model = conv_net()
        learn = fit(model, batches[:1], [SAMCallback(0.3, **kw), CpuHalf(), Infinite(nth)])
        assert same(weights(model), weights(conv_net())) and not learn.sam._ascent.climbed

class Watch(Callback):
    "What the first kernel is in each forward pass, and what was logged."
    order = 100
    def __init__(self): self.seen, self.losses = [], []
    def after_pred(self): self.seen.append(self.learn.model[0].weight.detach().clone())
    def after_batch(self): self.losses.append((self.learn.loss.item(), len(self.learn.pred), len(self.learn.yb[0])))

@pytest.mark.parametrize('draw', ['step', 'epoch'])
@pytest.mark.parametrize('accumulate', [False, True])
@pytest.mark.parametrize('kw', [{}, dict(m=4)])
def test_weight_noise_has_the_same_draw_in_both_passes(draw, accumulate, kw):
    law, watch, clean = AbsoluteGaussian(0.1), Watch(), conv_net()[0].weight.detach()
    batches = halves(batch(n=16), 8) if accumulate else [batch(n=8)]
    cbs = [SAMCallback(0.5, **kw), WeightNoise(law, draw=draw, seed=0), watch] + ([GradientAccumulation(16)]
            if accumulate else [])
    learn = fit(conv_net(), batches, cbs, lr=0., wd=0.)
    noise = [s - clean for s in watch.seen]
    n = len(noise) // 2
    close = lambda a, b: torch.allclose(a, b, atol=1e-6)
    if kw: pairs = [(noise[i], noise[i + 1]) for i in range(0, 2 * n, 2)]
    else: pairs = list(zip(noise[:n], noise[n:]))
    tops = [b - a for a, b in pairs]   # the difference is the ascent
    assert all(t.norm() > 1e-3 for t in tops)
    if not kw: assert all(close(t, tops[0]) for t in tops)   # one top for all batches of the step
    firsts = [a for a, _ in pairs]
    assert close(firsts[0], firsts[-1]) == (draw == 'epoch' or not accumulate)
    assert torch.equal(learn.model[0].weight, clean)

def test_the_loss_that_is_logged_is_the_clean_one():
    b, clean = batch(n=16), loss_of(smooth_net(), batch(n=16)).item()
    for kw in ({}, dict(m=5), dict(m=16, every=1)):
        watch = Watch()
        fit(smooth_net(), [b], [SAMCallback(2., **kw), watch])
        assert math.isclose(watch.losses[0][0], clean, rel_tol=1e-5) and watch.losses[0][1:] == (16, 16)
    for kw in (dict(batch_part=0.25), dict(batch_part=0.25, m=8)):
        watch = Watch()
        fit(smooth_net(), [b], [SAMCallback(2., **kw), watch])
        assert watch.losses[0][1:] == (16, 16)

@pytest.mark.parametrize('batchnorm', ['sub-batch', 'sync'])
@pytest.mark.parametrize('kw', [{}, dict(m=8), dict(every=2), dict(where=norm_layers)])
def test_damp_and_sam_in_one_learner(batchnorm, kw):
    batches = [batch(i) for i in range(3)]
    plain_sgd = lambda params, lr: OptimWrapper(params, torch.optim.SGD, lr=lr)
    learn = fit(conv_net(), batches, [DAMP(0.2, 4, batchnorm=batchnorm, seed=3), SAMCallback(0.2, **kw)], plain_sgd)
    m, g = conv_net(), torch.Generator().manual_seed(3)
    opt = SAM(torch.optim.SGD(m.parameters(), lr=0.1), m, rho=0.2, where=kw.get('where'), every=kw.get('every', 1))
    def damp(b):
        "A closure that takes the same draws whenever it is called again."
        state = []
        def closure():
            if state: g.set_state(state[0])
            state.append(g.get_state())
            damp_backward(m, F.cross_entropy, *b, sigma=0.2, m=4, batchnorm=batchnorm, generator=g)
        return closure
    for b in batches: opt.step([damp(p) for p in halves(b, kw.get('m', 16))])
    for x, y in zip(learn.model.state_dict().values(), m.state_dict().values()):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
    assert '_do_one_batch' not in learn.__dict__ and '_do_grad_opt' not in learn.__dict__

class Stop(Callback):
    order = 90
    def __init__(self, event, error, nth): self.event, self.error, self.left = event, error, nth
    def __call__(self, event_name):
        super().__call__(event_name)
        if event_name == self.event:
            self.left -= 1
            if self.left == 0: raise self.error('stop')

@pytest.mark.parametrize('kw', [{}, dict(m=4), dict(where=norm_layers, batch_part=0.5)])
@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_loss', 'before_backward', 'after_backward',
                                   'before_step', 'after_step', 'after_batch'])
@pytest.mark.parametrize('error', [KeyboardInterrupt, ZeroDivisionError, CancelBatchException, CancelFitException])
def test_stopping_a_fit_anywhere_leaves_the_weights_as_they_were(kw, event, error):
    if event == 'after_batch' and error is CancelBatchException:
        pytest.skip('fastai lets a batch be cancelled only before its end')
    for nth in (1, 2):
        model = conv_net()
        learn = Learner(DataLoaders([batch(n=8)], []), model, nn.CrossEntropyLoss(), opt_func=SGD, lr=0., wd=0.,
                        cbs=[SAMCallback(1., **kw), WeightNoise(MaxGaussian(0.3), seed=0)])
        try:
            with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=Stop(event, error, nth))
        except (KeyboardInterrupt, ZeroDivisionError): pass
        assert same(weights(model), weights(conv_net())), nth
        assert all(p.requires_grad
                   for p in model.parameters())
        assert '_do_grad_opt' not in learn.__dict__ and learn.loss_func.__class__ is nn.CrossEntropyLoss
        learn.remove_cbs([SAMCallback, WeightNoise])
        learn.lr = 0.1
        with learn.no_bar(), learn.no_logging(): learn.fit(1)   # and without SAM it trains as any other
        assert not same(weights(model), weights(conv_net())) and '_do_one_batch' not in learn.__dict__

def test_schedules_groups_and_the_rest_of_fastai(tmp_path):
    stairs = multi_step_rho(0.1, 2, start=0.05, top=0.2)
    learn = fit(conv_net(), [batch(i) for i in range(2)], SAMCallback(stairs), epochs=7)
    assert learn.sam.rhos == pytest.approx([0.05] * 4 + [0.15] * 4 + [0.2] * 6)
    learn = fit(conv_net(), [batch(i) for i in range(4)], SAMCallback(lambda pct: 0.1 * pct), epochs=2)
    assert learn.sam.rhos == pytest.approx([0.1 * i / 8 for i in range(8)])
    in_two = lambda m: [list(m[:3].parameters()), list(m[3:].parameters())]
    learn = fit(conv_net(), [batch()], SAMCallback(ByEpoch(lambda e: [0., 0.1 * e])), epochs=2, splitter=in_two)
    assert learn.sam.rhos == pytest.approx([0., 0.1])
    many = [batch(i) for i in range(4)]
    learn = Learner(DataLoaders(many, many[:1]), conv_net(), nn.CrossEntropyLoss(),
                    cbs=[SAMCallback(0.1, every=2), GradientClip(1.)], path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(2)
        assert [r > 0 for r in learn.sam.rhos] == [True, False] * 4
        file = learn.save('half')
        learn.load('half')
        learn.fit(1)
        assert math.isfinite(learn.validate()[0]) and file.is_file()
        before = weights(learn.model)
        learn.lr_find(num_it=8, show_plot=False)
    assert same(before, weights(learn.model))


# ---- two processes

WORKER = '''
import math, os, sys, torch, torch.distributed as dist, torch.nn.functional as F
from fastai.callback.training import GradientAccumulation
from fastai.data.all import DataLoaders
from fastai.learner import Learner, Recorder
from fastai.optimizer import SGD
from torch import nn
from noisyseg.train.methods.ascent import norm_layers
from noisyseg.train.methods.sam import SAM
from noisyseg.train.methods.sam_callback import SAMCallback

rank = int(os.environ['RANK'])
# a file: no port that another process may take
dist.init_process_group('gloo', init_method=f'file://{sys.argv[1]}', rank=rank, world_size=2)
g = torch.Generator().manual_seed(0)
x, y = torch.randn(16, 1, 8, 8, generator=g, dtype=torch.float64), torch.randint(0, 5, (16,), generator=g)
mine = slice(8 * rank, 8 * rank + 8)

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.GroupNorm(2, 6), nn.Tanh(), nn.Flatten(), nn.Linear(216, 5)).double()
def flat(m): return torch.cat([p.detach().flatten() for p in m.parameters()])
def agree(m, what):
    both = [None, None]
    dist.all_gather_object(both, flat(m))
    assert torch.equal(*both), what
def closure(m, s, factor=1.): return lambda: (F.cross_entropy(m(x[s]), y[s]) * factor).backward()
def alone(parts, **kw):
    m = net()
    SAM(torch.optim.SGD(m.parameters(), lr=0.1), m, rho=0.5, **kw).step([closure(m, s) for s in parts])
    return flat(m)

def fit(slices, model, *cbs):
    learn = Learner(DataLoaders([(x[s], y[s]) for s in slices], []), model, nn.CrossEntropyLoss(), opt_func=SGD,
                    lr=0.1, cbs=list(cbs))
    learn.remove_cb(Recorder)   # it averages in single precision
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return learn

halves = [slice(0, 8), slice(8, 16)]
for sync, views in ((False, False), (True, False), (False, True)):
    for kw in ({}, dict(where=norm_layers)):
        m = net()
        ddp = nn.parallel.DistributedDataParallel(m, gradient_as_bucket_view=views)
        SAM(torch.optim.SGD(m.parameters(), lr=0.1), ddp, rho=0.5, sync=sync, **kw).step(closure(ddp, mine))
        agree(m, (sync, kw))
        # own ascents: m-sharpness
        torch.testing.assert_close(flat(m), alone([slice(None)] if sync else halves, **kw), rtol=0, atol=1e-10)
        if views: continue   # fastai's own optimizers can't clear such gradients, with or without SAM
        learn = fit([mine], nn.parallel.DistributedDataParallel(net()), SAMCallback(0.5, sync=sync, **kw))
        agree(learn.model, (sync, kw, 'callback'))
        torch.testing.assert_close(flat(learn.model), flat(m), rtol=0, atol=1e-10)

def in_two_batches(*cbs):
    s = [slice(mine.start, mine.start + 4), slice(mine.start + 4, mine.stop)]
    learn = fit(s, nn.parallel.DistributedDataParallel(net()), *cbs)
    agree(learn.model, cbs)
    return flat(learn.model)
torch.testing.assert_close(in_two_batches(SAMCallback(0.5), GradientAccumulation(8)), alone(halves), rtol=0, atol=1e-10)
quarters = [slice(i, i + 4) for i in range(0, 16, 4)]
torch.testing.assert_close(in_two_batches(SAMCallback(0.5, m=4), GradientAccumulation(8)), alone(quarters), rtol=0,
                           atol=1e-10)

m = net()   # an infinity in one process's first pass: all skip, and none waits for the other
ddp, scaler, calls = nn.parallel.DistributedDataParallel(m), torch.amp.GradScaler('cpu', init_scale=4.), []
opt, before = SAM(torch.optim.SGD(m.parameters(), lr=0.1), ddp), flat(m)
def scaled():
    calls.append(0)
    scaler.scale(F.cross_entropy(ddp(x[mine]), y[mine]) * (math.inf if rank == 1 and len(calls) == 1
                                                           else 1.)).backward()
opt.step(scaled, scaler=scaler)
scaler.update()
assert len(calls) == 1 and torch.equal(before, flat(m)) and scaler.get_scale() == 2., (len(calls), scaler.get_scale())
opt.step(scaled, scaler=scaler)
scaler.update()
assert len(calls) == 3 and not torch.equal(before, flat(m))
agree(m, 'after an infinity')
print('fine', flush=True)
dist.barrier()
dist.destroy_process_group()
os._exit(0)   # gloo's threads may outlive it, and abort an orderly exit
'''

def test_two_processes(server, tmp_path):
    codes, said = server.pair(WORKER, tmp_path, args=[tmp_path/'meeting'])
    assert codes == [0, 0] and all('fine' in text.splitlines() for text in said), (codes, said)
