("DAMP against independent references: finite differences, copies of the network in lockstep, two real processes, real "
 "interrupts.")
import copy
import os
import signal

import fastai.callback.progress  # noqa: F401  gives Learner its no_bar
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.fp16 import MixedPrecision
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from torch import nn

from noisyseg.train.methods.damp import DAMP, damp_backward, damp_loss
from noisyseg.perturb.clone import clone_weights, perturbed
from noisyseg.perturb.laws import MaxGaussian
from noisyseg.perturb.selectors import kernels_and_scales, select
from noisyseg.nets.unet3plus import unet3plus_tiny

HOW = ('sub-batch', 'sync')


def small(dtype=torch.float32, norm=True):
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6) if norm else nn.GroupNorm(2, 6), nn.SiLU(),
              nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(64, 3)]
    net = nn.Sequential(*layers).to(dtype)
    nn.init.uniform_(net[1].weight, 0.5, 1.5)
    return net


def batch(n=12, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 2, 6, 6, generator=g, dtype=dtype), torch.randint(0, 3, (n,), generator=g)


def grads_of(net): return [None if p.grad is None else p.grad.clone() for p in net.parameters()]


def damp_grads(net, *args, **kw):
    net = copy.deepcopy(net)
    damp_backward(net, F.cross_entropy, *args, **kw)
    return grads_of(net)


@pytest.mark.parametrize('how', HOW)
@pytest.mark.parametrize('m', [1, 3, 5])
def test_exact_is_the_derivative_of_the_loss_under_fixed_draws(how, m):
    net, (x, y) = small(torch.float64), batch(dtype=torch.float64)
    def value(shift):
        moved = copy.deepcopy(net)
        with torch.no_grad():
            for p, v in zip(moved.parameters(), shift): p.add_(v)
        return damp_loss(moved, F.cross_entropy, x, y, sigma=0.3, m=m, batchnorm=how, generator=5).item()
    along = [torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(i)) for i,
             p in enumerate(net.parameters())]
    eps = 1e-5
    numeric = (value([eps * v for v in along]) - value([-eps * v for v in along])) / (2 * eps)
    slope = lambda gradient: sum((g * v).sum() for g, v in
                                 zip(damp_grads(net, x, y, sigma=0.3, m=m, batchnorm=how, generator=5,
                                                gradient=gradient), along)).item()
    assert slope('exact') == pytest.approx(numeric, rel=1e-6)
    assert slope('algorithm') != pytest.approx(numeric, rel=1e-3)


@pytest.mark.parametrize('gradient', ['algorithm', 'exact'])
@pytest.mark.parametrize('sizes', [[4, 4, 4], [4, 3, 3]])
def test_sync_equals_copies_of_the_network_with_a_common_batch_norm(gradient, sizes):
    net, (x, y) = small(torch.float64), batch(sum(sizes), torch.float64)
    g, copies, xis = torch.Generator().manual_seed(3), [], []
    for _ in sizes:
        copies.append(copy.deepcopy(net))
        xis.append({s.name: 1 + 0.2 * torch.randn(s.value().shape, generator=g).double()
                    for s in select(net, kernels_and_scales)})
        with torch.no_grad():
            for s in select(copies[-1], kernels_and_scales): s.value().mul_(xis[-1][s.name])
    maps = torch.cat([c[0](part) for c, part in zip(copies, x.split(sizes))])
    mean, var = maps.mean((0, 2, 3), keepdim=True), maps.var((0, 2, 3), unbiased=False, keepdim=True)
    maps = ((maps - mean) / (var + 1e-5).sqrt()).split(sizes)
    outs = [c[2:](part * c[1].weight.view(-1, 1, 1) + c[1].bias.view(-1, 1, 1)) for c, part in zip(copies, maps)]
    loss = F.cross_entropy(torch.cat(outs), y)
    loss.backward()
    expected = [sum(dict(c.named_parameters())[k].grad * (xi.get(k, 1.) if gradient == 'exact' else 1) for c,
                    xi in zip(copies, xis))
                for k, _ in net.named_parameters()]
    ours = damp_backward(net, F.cross_entropy, x, y, sigma=0.2, m=3, batchnorm='sync', gradient=gradient, generator=3)
    torch.testing.assert_close(ours, loss.detach())
    torch.testing.assert_close(grads_of(net), expected)
    torch.testing.assert_close(net[1].running_mean, 0.1 * mean.flatten().detach())


@pytest.mark.parametrize('n, m', [(7, 3), (12, 12), (5, 1), (9, 8)])
def test_any_sizes_weigh_by_samples(n, m):
    net, (x, y) = small(norm=False), batch(n)
    one = damp_grads(net, x, y, sigma=0.2, m=m, generator=2)
    torch.testing.assert_close(one, damp_grads(net, x, y, sigma=0.2, m=m, generator=2, batchnorm='sync'), rtol=1e-4,
                               atol=1e-6)
    whole = copy.deepcopy(net)
    F.cross_entropy(whole(x), y).backward()
    torch.testing.assert_close(damp_grads(net, x, y, sigma=0., m=m), grads_of(whole), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('how', HOW)
def test_kinds_of_weights(how):
    x, y = batch()
    base = damp_grads(small(), x, y, sigma=0.2, m=3, batchnorm=how, generator=4)
    last = small().to(memory_format=torch.channels_last)
    torch.testing.assert_close(damp_grads(last, x, y, sigma=0.2, m=3, batchnorm=how, generator=4), base, rtol=1e-4,
                               atol=1e-5)
    frozen = small()
    frozen[0].requires_grad_(False)
    got = damp_grads(frozen, x, y, sigma=0.2, m=3, batchnorm=how, generator=4)
    assert got[0] is got[1] is None
    torch.testing.assert_close(got[2:], base[2:], rtol=1e-4, atol=1e-6)
    low = small().bfloat16()
    assert all(g.dtype == torch.bfloat16 and g.isfinite().all()
               for g in damp_grads(low, x.bfloat16(), y, sigma=0.2, m=3, batchnorm=how))
    tied = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    clean = tied[0].weight.detach().clone()
    z = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    damp_backward(tied, F.mse_loss, z, z, sigma=0.2, m=3, batchnorm=how, gradient='exact', generator=0)
    assert torch.equal(tied[0].weight, clean)
    w, expected = clean.clone().requires_grad_(), 0
    g = torch.Generator().manual_seed(0)
    for part in z.split(2):
        v = w * (1 + 0.2 * torch.randn(4, 4, generator=g))
        expected += F.mse_loss(F.linear(F.linear(part, v, tied[0].bias.detach()).tanh(), v, tied[2].bias.detach()),
                               part) / 3
    torch.testing.assert_close(tied[0].weight.grad, torch.autograd.grad(expected, w)[0], rtol=1e-4, atol=1e-6)


def test_a_layer_that_is_not_always_used():
    class Sometimes(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b, self.calls = nn.Linear(4, 4), nn.Linear(4, 4), 0
        def forward(self, x):
            self.calls += 1
            return self.a(x) if self.calls % 2 else self.b(self.a(x))
    net, z = Sometimes(), torch.randn(6, 4)
    damp_backward(net, F.mse_loss, z, z, m=2)
    assert net.a.weight.grad is not None and net.b.weight.grad is not None
    never = Sometimes()
    damp_backward(never, F.mse_loss, z, z, m=1)
    assert never.b.weight.grad is None


def test_one_gradient_for_two_parameters_is_not_scaled_twice():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        def forward(self, x): return (self.a + self.b).expand(len(x), 3)
    net = Sum()
    (damp_loss(net, lambda p, y: p.sum(1).mean(), torch.zeros(4, 1), torch.zeros(4), sigma=0., m=2, where='*')
     / 4).backward()
    assert torch.equal(net.a.grad, torch.full((3,), 0.25)) and torch.equal(net.b.grad, net.a.grad)


@pytest.mark.parametrize('how', HOW)
def test_under_weights_that_are_perturbed_already(how):
    "As in SAM's ascent, and within a noise that another callback holds."
    net, (x, y) = small(), batch()
    clean = [p.detach().clone() for p in net.parameters()]
    clone = clone_weights(net, kernels_and_scales)
    with torch.no_grad():
        for p in net.parameters(): p.mul_(1.1)
    expected = damp_grads(net, x, y, sigma=0.2, m=3, batchnorm=how, generator=1)
    with torch.no_grad():
        for p, c in zip(net.parameters(), clean): p.copy_(c).mul_(1.1)
    # a clone made before the ascent
    damp_backward(net, F.cross_entropy, x, y, sigma=0.2, m=3, batchnorm=how, generator=1, clone=clone)
    torch.testing.assert_close(grads_of(net), expected)
    with perturbed(net, MaxGaussian(0.1), generator=0):
        inside = [p.detach().clone() for p in net.parameters()]
        damp_backward(net, F.cross_entropy, x, y, sigma=0.2, m=3, batchnorm=how)
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), inside))


@pytest.mark.parametrize('rng', ['normal', 'blocks', 'table'])
def test_other_numbers_are_noise_too(rng):
    "One seed, one gradient; without noise that of the sub-batches; a parametrized weight gets it anew each time"
    net, (x, y) = small(), batch()
    one, two = (damp_grads(net, x, y, sigma=0.2, m=3, generator=4, rng=rng) for _ in range(2))
    assert all(map(torch.equal, one, two))
    assert any(not torch.allclose(a, b) for a, b in zip(one, damp_grads(net, x, y, sigma=0.2, m=3, generator=5,
                                                                         rng=rng)))
    torch.testing.assert_close(damp_grads(net, x, y, sigma=0., m=3, rng=rng), damp_grads(net, x, y, sigma=0., m=3))
    normed = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 2)).train()
    z = torch.randn(6, 4)
    before = {k: v.clone() for k, v in normed.named_parameters()}
    damp_backward(normed, F.mse_loss, z, z[:, :2], sigma=0.2, m=3, rng=rng)
    assert all(torch.equal(v, before[k]) for k, v in normed.named_parameters())


@pytest.mark.parametrize('rng', ['normal', 'blocks', 'table'])
def test_a_draw_that_is_left_out(rng):
    "Other processes' draws: the generator is where it would be after them"
    law, g, h = MaxGaussian(0.1), torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    a, b = (clone_weights(small(), kernels_and_scales, rng=rng) for _ in range(2))
    for _ in range(3): a.inject(law, g)
    for _ in range(2): b.pass_over(h)
    b.inject(law, h)
    assert all(map(torch.equal, a.weights, b.weights))


def test_sync_draws_in_one_way_only():
    with pytest.raises(ValueError, match="rng: expected 'normal'"): DAMP(batchnorm='sync', rng='table')


def test_unet3plus_both_ways():
    torch.manual_seed(0)
    net, x, y = unet3plus_tiny(3, width=4, filters=(4, 6, 8)).train(), torch.randn(6, 3, 32, 32), torch.randint(0, 3,
            (6, 32, 32))
    loss = lambda maps, y: F.cross_entropy(F.interpolate(maps[0] if isinstance(maps, (list, tuple)) else maps,
                                                         y.shape[-2:]), y)
    for how in HOW:
        clean = {k: v.clone() for k, v in net.named_parameters()}
        value = damp_backward(net, loss, x, y, sigma=0.2, m=3, batchnorm=how, generator=0)
        assert value.isfinite() and all(torch.equal(clean[k], v) for k, v in net.named_parameters())
    assert not any(m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize('call', [1, 3])
def test_ctrl_c_leaves_no_trace(call):
    net, (x, y) = small(), batch()
    before, calls = [v.clone() for v in net.state_dict().values()], [0]
    def loss_func(pred, target):
        calls[0] += 1
        if calls[0] == call: os.kill(os.getpid(), signal.SIGINT)
        return F.cross_entropy(pred, target)
    with pytest.raises(KeyboardInterrupt): damp_backward(net, loss_func, x, y, sigma=0.2, m=4)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), before)) and all(p.grad is None
            for p in net.parameters())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class CpuFp16(MixedPrecision):
    "fastai's mixed precision with its scaler at work, on the CPU."
    def before_fit(self):
        super().before_fit()
        self.autocast, self.learn.scaler = torch.autocast('cpu', torch.bfloat16), torch.amp.GradScaler('cpu',
                init_scale=2.**12)


def fit(net, cbs, batches, lr=0.1):
    opt_func = lambda params, **kw: OptimWrapper(params, torch.optim.SGD, **kw)
    learn = Learner(DataLoaders(batches, []), copy.deepcopy(net), F.cross_entropy, opt_func=opt_func, lr=lr, wd=0.,
                    train_bn=True, cbs=cbs)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return torch.cat([(a - b).detach().flatten() for a, b in zip(learn.model.parameters(), net.parameters())])


@pytest.mark.parametrize('how', HOW)
def test_learner_with_a_scaler_at_work(how):
    net, data = small(), [batch()]
    full = fit(net, DAMP(0.2, 3, batchnorm=how, seed=0), data)
    low = fit(net, [DAMP(0.2, 3, batchnorm=how, seed=0), CpuFp16()], data)
    assert F.cosine_similarity(full, low, 0) > 0.98 and low.norm() / full.norm() == pytest.approx(1, abs=0.1)


def test_learner_seeds():
    net, data = small(), [batch(), batch()]
    a, b, c = (fit(net, DAMP(0.2, 3, seed=s), data) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    torch.manual_seed(7)
    damp = DAMP(0.2, 3)
    first = fit(net, damp, data)
    assert torch.equal(first, fit(net, DAMP(0.2, 3, seed=damp.seed), data))


def test_small_last_batch_says_what_to_do():
    with pytest.raises(ValueError, match='smaller batch'): fit(small(), DAMP(0.2, 8), [batch(), batch(5)])


WORKER = '''
import copy, os, sys, fastai.callback.progress, torch, torch.distributed as dist, torch.nn.functional as F
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from torch import nn
from noisyseg.train.methods.damp import DAMP, damp_backward

dist.init_process_group('gloo')
rank = dist.get_rank()
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
g = torch.Generator().manual_seed(100 + rank)
x, y = torch.randn(4, 1, 8, 8, generator=g), torch.randint(0, 2, (4, 8, 8), generator=g)

def mean(tensors):
    for t in tensors: dist.all_reduce(t)
    return [t / 2 for t in tensors]

for how in ('sub-batch', 'sync'):
    for m in (1, 2):
        for gradient in ('algorithm', 'exact'):
            kw = dict(sigma=0.2, m=m, batchnorm=how, gradient=gradient, generator=10 + rank)
            alone, ddp = copy.deepcopy(net), nn.parallel.DistributedDataParallel(copy.deepcopy(net))
            damp_backward(alone, F.cross_entropy, x, y, **kw)
            for step in range(2):                                   # twice: the wrapper must be ready again
                ddp.zero_grad()
                damp_backward(ddp, F.cross_entropy, x, y, **kw)
                torch.testing.assert_close([p.grad for p in ddp.parameters()],
                                           mean([p.grad.clone() for p in alone.parameters()]))
    seed = None if how == 'sync' else 7
    damp, ddp = DAMP(0.2, 2, batchnorm=how, seed=seed), nn.parallel.DistributedDataParallel(copy.deepcopy(net))
    learn = Learner(DataLoaders([(x, y)] * 3, []), ddp, nn.CrossEntropyLoss(), lr=0.1, cbs=damp)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    both = [None, None]
    dist.all_gather_object(both, (damp.seed, [p.detach() for p in ddp.parameters()], damp._generator.get_state(),
                                  damp._clone._z[0] if damp._clone else None))
    assert both[0][0] == both[1][0] and torch.equal(both[0][2],
                                                    both[1][2]), 'one seed is recorded, and the generators go together'
    assert how == 'sync' or not torch.equal(both[0][3], both[1][3]), 'each process has draws of its own'
    assert all(torch.equal(a, b) for a, b in zip(both[0][1], both[1][1])), 'the processes ended with different weights'
print('fine', flush=True)
dist.barrier()
dist.destroy_process_group()
os._exit(0)   # gloo's threads may outlive it, and abort an orderly exit
'''


def test_two_processes(server, tmp_path):
    codes, said = server.pair(WORKER, tmp_path)
    assert codes == [0, 0] and all('fine' in text.splitlines() for text in said), (codes, said)
