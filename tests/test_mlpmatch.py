("The loss and the step of MLPMatch against independent computations: numpy, steps by hand, autocast, two real "
 "processes, failures.")
import copy
import os

import fastai.callback.all  # noqa: F401  gives Learner its fit_one_cycle, no_bar, …
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.optimizer import OptimWrapper
from functools import partial
from types import SimpleNamespace
from unittest import mock
from torch import nn
from timm.models._efficientnet_blocks import InvertedResidual
from torchvision.models.resnet import BasicBlock

from noisyseg.train.methods.match_loss import UNLABELLED, MatchLoss, PseudoLabels, consistency, pseudo_labels
from noisyseg.train.methods.mlpmatch import MATCH_LEVELS, MatchStep, MLPMatch, semi_learner, step_cost, unet3plus_slim
from noisyseg.basics import evaluating
from noisyseg.data.semi_supervised import cutmix, cutmix_boxes, partners
from noisyseg.nets.blocks import deactivated, draw_blocks, feature_dropout, residual_blocks
from noisyseg.nets.deeplab import deeplabv3plus
from noisyseg.nets.unet3plus import unet3plus_lite0, unet3plus_tiny
from noisyseg.perturb.clone import perturbed
from noisyseg.perturb.laws import MaxGaussian
from noisyseg.train.methods.sam_callback import SAMCallback
from noisyseg.train.checkpoints import load_model, read_card, save_model

same = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-6)


def batch(seed=0, b=2, u=3, size=32, classes=5):
    g = torch.Generator().manual_seed(seed)
    images = [torch.randn(n, 3, size, size, generator=g) for n in (b, u, u, u)]
    y, inside = torch.randint(0, classes, (b, size, size), generator=g), torch.ones(u, size, size, dtype=torch.bool)
    y[0, :3], inside[-1, :, -5:] = 255, False
    return images[0], y, *images[1:], inside


def net(seed=0, **kw):
    torch.manual_seed(seed)
    return unet3plus_slim(5, width=4, encoder_width=8, layers=(1, 1, 1, 1), **kw).train()


def lite0(seed=0):
    "On an EfficientNet whose first map and last stage nobody asks for."
    torch.manual_seed(seed)
    return unet3plus_lite0(5, width=4, pretrained=False, encoder_args=dict(out_indices=(1, 2, 3))).train()


def method(level='mlpmatch', **kw): return MatchStep(level, **(dict(ignore_index=255, threshold=0.3, seed=5) | kw))


def gradients(model, step):
    model.zero_grad()
    step.total.backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


# ---- the loss

def reference(logits, weak, inside, tau, keep=None):
    "One unlabelled term in numpy, float64, pixel by pixel; `keep` = (boxes, partner) of CutMix."
    p = np.exp(weak - weak.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    label, conf, inside = p.argmax(1), p.max(1), inside.copy()
    if keep is not None:
        boxes, partner = keep
        old = label.copy(), conf.copy(), inside.copy()
        for k, i, j in zip(*np.nonzero(boxes)):
            label[k, i, j], conf[k, i, j], inside[k, i, j] = (o[partner[k], i, j] for o in old)
    total = 0.
    for k, i, j in zip(*np.nonzero(inside & (conf >= tau))):
        z = logits[k, :, i, j]
        total += np.log(np.exp(z - z.max()).sum()) + z.max() - z[label[k, i, j]]
    return total / max(inside.sum(), 1)


@pytest.mark.parametrize('seed', range(8))
def test_terms_are_numpys(seed):
    r = np.random.default_rng(seed)
    b, u, classes, size = (int(r.integers(1, 4)), int(r.integers(2, 5)), int(r.integers(2, 7)),
                           tuple(r.integers(1, 9, 2)))
    draw = lambda n: r.normal(size=(n, classes, *size)) * 3
    x, x_np, weak, s1, s2, fp, np_ = (draw(n) for n in (b, b, u, u, u, u, u))
    y, inside = r.integers(0, classes, (b, *size)), r.random((u, *size)) < 0.8
    y[r.random(y.shape) < 0.2] = 255
    boxes, partner = r.random((2, u, *size)) < 0.4, (np.arange(u) + int(r.integers(1, u))) % u
    tau, progress, lam = r.random(3).tolist()
    t, loss = torch.as_tensor, MatchLoss(ignore_index=255, threshold=tau, lam=lam)
    terms = loss(*(t(v) for v in (x, y, x_np, weak, s1, s2, fp, np_, inside)), tuple(t(boxes)), t(partner), progress)

    def labelled(z):
        logp = z - np.log(np.exp(z).sum(1, keepdims=True))
        v = [-logp[k, y[k, i, j], i, j] for k, i, j in zip(*np.nonzero(y != 255))]
        return sum(v) / max(len(v), 1)
    weak = weak.astype(np.float32).astype(np.float64)   # a confidence is compared in float32
    e = {'L_x': labelled(x), 'L_x_np': labelled(x_np), 'L_u_fp': reference(fp, weak, inside, tau),
         'L_u_np': reference(np_, weak, inside, tau),
         'L_u_s1': reference(s1, weak, inside, tau, (boxes[0], partner)),
         'L_u_s2': reference(s2, weak, inside, tau, (boxes[1], partner))}
    l = lam * progress
    e['total'] = ((1 - l) * e['L_x'] + l * e['L_x_np'] + 0.25 * sum(e[n] for n in UNLABELLED)) / 2
    for n, v in e.items(): assert terms[n].item() == pytest.approx(v, rel=1e-4, abs=1e-6), n


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('edge', ['nobody sure', 'all margin', 'all void', 'no box', 'all box', 'tau 0', 'tau 1',
                                  'huge logits'])
def test_edges(dtype, edge):
    g = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randn(n, 3, 4, 5, generator=g).to(dtype).requires_grad_()
    x, x_np, weak, s1, s2, fp, np_ = (draw(n) for n in (2, 2, 3, 3, 3, 3, 3))
    y, inside, boxes = torch.randint(0, 3, (2, 4, 5), generator=g), torch.ones(3, 4, 5,
            dtype=torch.bool), torch.zeros(3, 4, 5, dtype=torch.bool)
    tau, scale = {'nobody sure': 0.9999, 'tau 0': 0., 'tau 1': 1.}.get(edge, 0.4), 1e4 if edge == 'huge logits' else 1.
    if edge == 'all margin': inside[:] = False
    if edge == 'all void': y[:] = 255
    if edge == 'all box': boxes[:] = True
    loss = MatchLoss(ignore_index=255, threshold=tau)
    with torch.autocast('cpu', torch.bfloat16):
        t = loss(x, y, x_np, weak * scale, s1, s2, fp, np_, inside, (boxes, boxes), torch.tensor([1, 2, 0]), 0.5)
    t.total.backward()
    assert t.total.dtype == torch.float32 and torch.isfinite(t.total)
    assert all(torch.isfinite(v.grad).all() for v in (x, x_np, s1, s2, fp, np_)) and weak.grad is None
    if edge in ('nobody sure', 'all margin', 'tau 1'):
        assert all(t[n].item() == 0. for n in UNLABELLED) and all(v.grad.abs().sum() == 0 for v in (s1, s2, fp, np_))
    if edge == 'all void': assert t.L_x.item() == t.L_x_np.item() == 0. and x.grad.abs().sum() == 0
    if edge in ('tau 0', 'huge logits'): assert t.confident == 1
    if edge == 'no box': assert t.L_u_s1 == consistency(s1, pseudo_labels(weak, inside), tau)


def test_labels_in_a_box_belong_to_the_partner():
    pseudo = PseudoLabels(torch.arange(3)[:, None, None].expand(3, 4, 4), torch.rand(3, 4, 4), torch.rand(3, 4, 4)
                          < 0.5)
    boxes = torch.rand(3, 4, 4) < 0.5
    mixed = pseudo.mix(boxes, torch.tensor([2, 0, 1]))
    for a, b in zip(mixed, pseudo):
        for k, other in enumerate((2, 0, 1)):
            assert torch.equal(a[k][boxes[k]], b[other][boxes[k]]) and torch.equal(a[k][~boxes[k]], b[k][~boxes[k]])


# ---- the step

@pytest.mark.parametrize('level', MATCH_LEVELS)
@pytest.mark.parametrize('pseudo', ['train', 'eval'])
def test_every_parameter_learns_and_autocast_loses_none(level, pseudo):
    ("A pass without gradients inside autocast leaves copies of the weights that have none; a later pass must not take "
     "them.")
    model, b = net(), batch()
    full = gradients(model, method(level, pseudo=pseudo).step(model, *b))
    model = net()
    with torch.autocast('cpu', torch.bfloat16): terms = method(level, pseudo=pseudo).step(model, *b)
    low = gradients(model, terms)
    assert not any(g is None for g in full + low) and all(torch.isfinite(g).all() for g in low)
    assert all((g.abs().sum() > 0) <= (h.abs().sum() > 0) for g, h in zip(full, low))


@pytest.mark.parametrize('kw', [{}, dict(pseudo='eval'), dict(unit='stage', p=0.6), dict(strong_views=0),
                                dict(volatile=False), dict(batch_norm='update'),
                                dict(level='fixmatch')])
def test_parts_add_up(kw):
    b = batch()
    kw = dict(kw)
    level = kw.pop('level', 'mlpmatch')
    results = []
    for in_parts in (False, True):
        model = net()
        terms = method(level, in_parts=in_parts, **kw).step(model, *b, progress=0.7, at=11)
        results.append((gradients(model, terms), terms.numbers(), model.state_dict()))
    (g, t, s), (g2, t2, s2) = results
    for p, q in zip(g, g2): same(p, q)
    assert t == pytest.approx(t2, rel=1e-5, nan_ok=True)
    for k in s: same(s[k], s2[k])


def test_draws_depend_on_seed_and_step_alone():
    b = batch()
    one, other = method(), method()
    for _ in range(3): one.step(net(), *b)
    torch.manual_seed(99)
    a, c = one.step(net(), *b), other.step(net(), *b, at=3)
    assert a.numbers() == c.numbers() and a.off == c.off and one.n_steps == 4 and other.n_steps == 0
    totals = {method(seed=s).step(net(), *b, at=k).total.item() for s in (5, 6) for k in (0, 1, 2)}
    assert len(totals) == 6
    model, state = net(), torch.get_rng_state()
    one.step(model, *b)
    assert torch.equal(state, torch.get_rng_state())   # the global generator is left alone


def test_modes_and_weights_are_restored():
    b, model = batch(), net()
    frozen = model.encoder.layer2
    frozen.eval()
    method(pseudo='eval').step(model, *b)
    assert not frozen.training and model.training and model.encoder.layer1.training

    class Breaks(nn.Module):
        "A labelled loss that fails at its n-th call."
        def __init__(self, n): super().__init__(); self.n = n
        def forward(self, out, y):
            self.n -= 1
            if self.n < 0: raise ZeroDivisionError
            return out.mean()
    for n, pseudo in ((0, 'eval'), (1, 'train'), (1, 'eval')):   # in the clean pass; with a block off
        model = net()
        classes = [type(m) for m in model.modules()]
        with pytest.raises(ZeroDivisionError):
            method(pseudo=pseudo, supervised=Breaks(n * 5 if n else 0)).step(model, *b)
        assert [type(m) for m in model.modules()] == classes and all(m.training for m in model.modules())


def test_other_networks():
    b = batch(size=64)
    model = deeplabv3plus(5, encoder='resnet18', pretrained=False).train()
    m = method()
    m.check(model)
    terms = m.step(model, *b)
    assert all(g is not None for g in gradients(model, terms)) and terms.off[0].startswith('layer')
    # logits of every level, and presence logits
    cgm = unet3plus_slim(5, width=4, encoder_width=8, layers=(1, 1, 1, 1), cgm=True).train()
    assert torch.isfinite(method().step(cgm, *b).total)
    shallow = unet3plus_slim(5, width=4, encoder_width=8, layers=(1, 1, 1, 1), deep_supervision=False).train()
    assert torch.isfinite(method(in_parts=True).step(shallow, *b).total)
    binary = unet3plus_slim(1, width=4, encoder_width=8, layers=(1, 1, 1, 1)).train()
    x, y, *rest = b
    assert torch.isfinite(method(threshold=0.5).step(binary, x, y.clamp(max=1), *rest).total)


def test_step_cost_leaves_the_model_alone():
    model = net()
    before = copy.deepcopy(model.state_dict())
    table = step_cost(model, batch(), n=1, ignore_index=255)
    assert list(table.method) == list(MATCH_LEVELS) and (table.seconds > 0).all() and (table.megabytes.diff()[1:]
            > 0).all()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and all(p.grad is None
            for p in model.parameters())


# ---- the step against a simple one

def split(out, sizes):
    "Any output, as one for each part of the batch."
    if isinstance(out, torch.Tensor): return out.split(sizes)
    return [type(out)(parts) for parts in zip(*(split(o, sizes) for o in out))]


def simply(m, model, x, y, weak, s1, s2, inside, progress, at):
    "A step without any economy: each pass is one of the whole network and gives all outputs; one backward in the end."
    draw = lambda what: m._generator(SimpleNamespace(at=at), what)
    n, u, given = len(x), len(weak), {}

    def passed(images, *names):
        sizes = [n if k[0] == 'x' else u for k in names]
        given.update(zip(names, split(model(images), sizes)))
    if m.pseudo == 'eval':
        with torch.no_grad(), evaluating(model): labels = model(weak)
    both = torch.cat([x, weak])
    if m.feature_perturbation:
        with feature_dropout(model, m.dropout, draw(0)): passed(both, 'x', 'weak', 'xf', 'u_fp')
    elif m.pseudo == 'train': passed(both, 'x', 'weak')
    else: passed(x, 'x')
    if m.pseudo == 'eval': given['weak'] = labels
    names = ['x_np'] * m.volatile + ['u_np'] * m.network_perturbation
    if names:
        images = torch.cat([x] * m.volatile + [weak] * m.network_perturbation)
        off = draw_blocks(model, m.unit, m.p, draw(1), m.n_off)
        with deactivated(model, off, m.unit, batch_norm=m.batch_norm): passed(images, *names)
    g, boxes, other = draw(2), (None, None), None
    if m.strong_views:
        views = (s1, s2)[:m.strong_views]
        other = partners(u, g)
        boxes = [cutmix_boxes(u, tuple(x.shape[-2:]), g, m.cutmix) for _ in views]
        mixed = [cutmix(v, v[other], b) for v, b in zip(views, boxes)]
        passed(torch.cat(mixed), *('u_s1', 'u_s2')[:m.strong_views])
        boxes = (*boxes, None)[:2]
    keys = 'x_np', 'weak', 'u_s1', 'u_s2', 'u_fp', 'u_np'
    return m.loss(given['x'], y, *(given.get(k) for k in keys), inside, boxes, other, progress)


NETS = {'unet': net, 'flat': lambda: net(deep_supervision=False), 'presence': lambda: net(cgm=True),
        'vgg': lambda: unet3plus_tiny(5).train(),
        'frozen': net, 'lite0': lite0,
        'deeplab': lambda: deeplabv3plus(5, encoder='resnet18', pretrained=False, dropout=0.).train()}
SETTINGS = [{}, dict(in_parts=False), dict(in_parts=True), dict(pseudo='eval'), dict(feature_perturbation=False),
            dict(feature_perturbation=False, pseudo='eval'), dict(network_perturbation=False), dict(volatile=False),
            dict(network_perturbation=False, volatile=False), dict(strong_views=0), dict(strong_views=1),
            dict(unit='stage', p=0.4), dict(unit='stage', p=0.), dict(batch_norm='update'),
            dict(level='fixmatch'), dict(level='unimatch')]


@pytest.mark.parametrize('kw', SETTINGS, ids=lambda kw: ' '.join(f'{k}={v}' for k, v in kw.items()) or 'default')
def test_is_the_simple_step(kw): check_simple('unet', kw)


@pytest.mark.parametrize('name, kw', [
    ('flat', {}), ('flat', dict(level='fixmatch')),
    ('presence', {}), ('presence', dict(in_parts=False)), ('deeplab', {}),
    ('vgg', dict(level='unimatch')), ('frozen', {}), ('frozen', dict(in_parts=False)),
    ('lite0', {}), ('lite0', dict(in_parts=False)), ('lite0', dict(batch_norm='update')), ('lite0', dict(n_off=2))])
def test_is_the_simple_step_of_other_networks(name, kw): check_simple(name, kw)


def check_simple(name, kw):
    "Losses, gradients and buffers of steps that follow one another, with the weights moving in between."
    steps = 1 if name == 'deeplab' else 3
    torch.manual_seed(0)
    ours = NETS[name]().double()
    if name == 'frozen':
        for p in [*ours.encoder.conv1.parameters(), *ours.encoder.layer1.parameters()]: p.requires_grad_(False)
        ours.encoder.layer2.eval()
    theirs = copy.deepcopy(ours)
    opts = [torch.optim.SGD(m.parameters(), 0.05) for m in (ours, theirs)]
    a, b = method(**kw), method(**kw)
    offs = set()
    for at in range(steps):
        images = [t.double() if t.is_floating_point() else t for t in batch(at, size=64 if name == 'deeplab' else 32)]
        torch.manual_seed(at)   # of the presence head's dropout
        terms = a.step(ours, *images, progress=at / steps)
        torch.manual_seed(at)
        expected = simply(b, theirs, *images, at / steps, at)
        offs.update(terms.off)
        for k, v in expected.numbers().items(): assert terms.numbers()[k] == pytest.approx(v, rel=1e-5, nan_ok=True), k
        for opt, total in zip(opts, (terms.total, expected.total)):
            opt.zero_grad()
            total.backward()
        for (k, p), q in zip(ours.named_parameters(), theirs.parameters()):
            assert (p.grad is None) == (q.grad is None), k
            if p.grad is not None: torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-8, msg=k)
        for (k, v), w in zip(ours.named_buffers(), theirs.buffers()):
            torch.testing.assert_close(v, w, rtol=1e-5, atol=1e-8, msg=k)
        for opt in opts: opt.step()
    one_alone = steps == 1 or a.p == 0. or not (a.volatile or a.network_perturbation)
    assert a.n_steps == steps and (len(offs) > 1 or one_alone)


def count_blocks(model, block=BasicBlock, **kw):
    "How many images each residual block of the encoder computes in a step, without hooks: those would be noticed."
    seen, own = {}, block.forward
    names = {m: n for n, m in model.encoder.named_modules()}

    def forward(self, x):
        seen[names[self]] = seen.get(names[self], 0) + len(x)
        return own(self, x)
    with mock.patch.object(block, 'forward', forward):
        terms = method(**kw).step(model, *batch(), at=3)
    return seen, terms


@pytest.mark.parametrize('in_parts', [False, True])
@pytest.mark.parametrize('make, block', [(net, BasicBlock), (lite0, InvertedResidual)])
def test_common_blocks_run_once(make, block, in_parts):
    seen, terms = count_blocks(make(), block, in_parts=in_parts)
    b, u = 2, 3
    before = True
    for name, n in seen.items():
        before &= name != terms.off[0]
        # clean and strong; again with a block off, after that block, which itself is not among them
        assert n == b + u + 2 * u + (0 if before or name == terms.off[0] else b + u), name
    assert terms.off[0] != next(iter(seen))
    seen, terms = count_blocks(make(), block, in_parts=in_parts, batch_norm='update')   # statistics count each pass
    assert all(n == (2 - (name == terms.off[0])) * (b + u) + 2 * u for name, n in seen.items())


def test_an_encoder_with_anything_unknown_in_it_shares_nothing():
    def changed(change):
        model = lite0()
        change(model.encoder)
        return sum(n for n in count_blocks(model, InvertedResidual)[0].values())
    class Mine(nn.ReLU6): pass
    shared = changed(lambda e: None)
    def drops(e): e.blocks[2][1].drop_path = nn.Dropout(0.)
    def own(e): e.blocks[1][0].bn1.act = Mine()
    def namesake(e): e.blocks[1][0].bn1.act = type('ReLU6', (nn.ReLU6,), {'__module__': 'torch.elsewhere'})()
    def checkpoints(e): e.set_grad_checkpointing()
    def watches(e): e.blocks[0].register_forward_hook(lambda *a: None)
    def normed(e): nn.utils.parametrizations.weight_norm(e.blocks[1][0].conv_pw)
    for change in (drops, own, namesake, checkpoints, watches, normed): assert changed(change) > shared, change.__name__


def test_who_watches_sees_every_pass():
    model, passes = net(), []
    plain = net()
    expected = gradients(plain, method().step(plain, *batch(), at=3))
    handle = model.encoder.layer1.register_forward_hook(lambda m, i, o: passes.append(len(o)))
    watched = gradients(model, method().step(model, *batch(), at=3))
    handle.remove()
    assert passes == [5, 5, 6]
    for g, h in zip(watched, expected): same(g, h)


def test_in_parts_unless_something_is_against_it():
    b, model = batch(), net()
    known = lambda terms: not terms.L_x.requires_grad
    assert known(method().step(model, *b)) and not known(method(in_parts=False).step(model, *b))
    assert not known(method('supervised').step(model, *b))   # one pass
    assert not known(method(burn_in=1).step(model, *b))
    leaf = b[2].clone().requires_grad_()
    method().step(model, *b[:2], leaf, *b[3:]).total.backward()
    assert leaf.grad.abs().sum() > 0
    with torch.no_grad(): assert method().step(model, *b).total > 0
    with torch.autocast('cpu', torch.float16): terms = method().step(model, *b)
    assert not known(terms)   # nobody has said by what to scale
    with torch.autocast('cpu', torch.bfloat16): assert known(method().step(model, *b))
    late = learner([b], law=MaxGaussian(0.02), noise_args=dict(seed=3, gradient='recovered'))
    soon = learner([b], law=MaxGaussian(0.02), noise_args=dict(seed=3))
    for l in (late, soon): fit(l)
    assert late.mlp_match.method.whole and not soon.mlp_match.method.whole
    with pytest.raises(ValueError, match='in_parts: expected'): method(in_parts='yes')


# ---- the callback

def learner(batches, model=None, cbs=(), valid=(), **kw):
    kw = dict(ignore_index=255, threshold=0.3, seed=5, wd=0., train_bn=True,
              opt_func=partial(OptimWrapper, opt=torch.optim.SGD), lr=0.1) | kw
    learn = semi_learner(DataLoaders(list(batches), list(valid)), model or net(), n_classes=5, cbs=cbs, **kw)
    return learn


def fit(learn, n=1):
    with learn.no_bar(), learn.no_logging(): learn.fit(n)
    return torch.cat([p.detach().flatten() for p in learn.model.parameters()])


def test_noise_and_sam_with_accumulation():
    bs = [batch(s) for s in (1, 2)]
    start = torch.cat([p.detach().flatten() for p in net().parameters()])

    def by_hand(model):
        for i, b in enumerate(bs): (method().step(model, *b, progress=i / 2, at=i).total / 2).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])
    model = net()
    g = by_hand(model)
    with torch.no_grad():
        for p in model.parameters(): p.add_(p.grad, alpha=0.01 / g.norm().item())
    model.zero_grad()
    moved = fit(learner(bs, cbs=[SAMCallback(0.01), GradientAccumulation(4)])) - start
    torch.testing.assert_close(moved, -0.1 * by_hand(model), rtol=5e-3, atol=1e-4)

    noisy = net()
    with perturbed(noisy, MaxGaussian(0.02), generator=3):
        expected = torch.cat([g.flatten() for g in gradients(noisy, method().step(noisy, *bs[0], at=0))])
    same(fit(learner(bs[:1], law=MaxGaussian(0.02), noise_args=dict(seed=3))) - start, -0.1 * expected, rtol=1e-3,
         atol=1e-5)


class Stop(Callback):
    order = 60
    def __init__(self, at, error=KeyboardInterrupt): self.at, self.error = at, error
    def after_pred(self):
        if self.training and self.train_iter == self.at: raise self.error


def test_interrupted_by_hand_and_broken():
    bs = [batch(s) for s in range(4)]
    whole = learner(bs)
    end = fit(whole)
    half = learner(bs)
    half.add_cb(Stop(2))
    with pytest.raises(KeyboardInterrupt): fit(half)
    assert '_do_one_batch' not in half.__dict__
    state = half.mlp_match.state_dict()
    assert state['n_steps'] == 3 and state['seed'] == 5   # the third was begun, but moved no weight
    rest = learner(bs[2:], half.model)
    rest.mlp_match.load_state_dict(state | {'n_steps': 2})

    class Later(Callback):   # progress as it would have been
        order = -20
        def before_batch(self):
            if self.training: self.learn.pct_train = (2 + self.iter) / 4
    rest.add_cb(Later())
    assert torch.equal(fit(rest), end)
    log = rest.mlp_match.frame()
    assert list(log.step) == [0, 1, 2, 2, 3]
    half.remove_cb(Stop)
    fit(half)   # a learner that was stopped trains on


def test_seed_columns_card(tmp_path):
    bs, valid = [batch(s) for s in range(2)], [batch(9)[:2]]
    a, b = (learner(bs, valid=valid) for _ in range(2))
    fit(a, 2), fit(b, 2)
    assert a.recorder.losses == b.recorder.losses and a.recorder.values == b.recorder.values
    assert not torch.equal(fit(learner(bs, seed=6)), fit(learner(bs)))
    names = a.recorder.metric_names
    assert a.recorder.values[1][names.index('L_u_np') - 1] == pytest.approx(
            a.mlp_match.frame().query('epoch == 1').L_u_np.mean())
    save_model(a, tmp_path / 'm')
    card = read_card(tmp_path / 'm')
    assert 'mlpmatch' in card['methods'][0] and 'seed 5' in card['methods'][0] and card['metrics']['L_x'] > 0
    with a.no_bar(): assert len(a.validate()) == 2   # loss and mIoU: the columns are gone with the fit
    loaded = load_model(tmp_path / 'm')
    x = batch()[0]
    assert torch.equal(loaded(x), a.model.eval()(x))
    quiet = learner(bs, valid=valid, seed=None, columns=False)
    fit(quiet)
    assert (quiet.mlp_match.seed is not None and 'L_x' not in quiet.recorder.metric_names
            and 'seed' not in quiet.mlp_match.describe())


def test_frame_and_levels():
    bs = [batch(s) for s in range(2)]
    for level, columns in {'supervised': {'L_x'}, 'fixmatch': {'L_x', 'L_u_s', 'L_u_s1'},
                           'unimatch': {'L_u_s2', 'L_u_fp', 'agree_fp'},
                           'mlpmatch': {'L_x_np', 'L_u_np', 'lam'}}.items():
        l = learner(bs, level=level)
        fit(l)
        assert columns <= set(l.mlp_match.frame()) and len(l.mlp_match.frame()) == 2
    l = learner(bs * 2, burn_in=2)
    fit(l)
    log = l.mlp_match.frame()
    assert log.L_u_np.isna().tolist() == [True, True, False, False] and (log.total[:2] == log.L_x[:2]).all()
    assert MLPMatch().frame().empty and np.isnan(MLPMatch().epoch_mean('L_x'))


# ---- two processes

WORKER = '''
import copy, os, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from test_mlpmatch import batch, method, net
dist.init_process_group('gloo')
rank = dist.get_rank()
everyone = [batch(10 + r) for r in range(2)]
differ = {}
for name, kw in {'paper': {}, 'own': dict(shared=False), 'code': dict(unit='stage', p=0.6, batch_norm='update'),
                 'parts': dict(in_parts=True),
                 'eval': dict(pseudo='eval')}.items():
    m, model, offs = method(**kw), DDP(net()), []
    steps = 2 if name in ('own', 'eval') else 1
    for step in range(steps):
        model.zero_grad()
        terms = m.step(model, *everyone[rank], progress=0.5)
        terms.total.backward()
        offs.append([None, None])
        dist.all_gather_object(offs[-1], terms.off)
    differ[name] = any(a != b for a, b in offs)
    assert model.broadcast_buffers
    # the mean of what each process alone would have got, with the running statistics of process 0
    solo, grads = net(), None
    for step in range(steps):
        start = copy.deepcopy(solo.state_dict())
        for r in (1, 0):
            os.environ['RANK'] = str(r)
            solo.load_state_dict(start)
            if r: solo.zero_grad()
            m.step(solo, *everyone[r], progress=0.5, at=step).total.backward()
    os.environ['RANK'] = str(rank)
    for p, q in zip(model.parameters(), solo.parameters()):
        torch.testing.assert_close(p.grad, q.grad / 2, rtol=1e-3, atol=1e-5)
assert differ == {'paper': False, 'own': True, 'code': False, 'parts': False, 'eval': False}, differ
dist.barrier()
print('fine', flush=True)
os._exit(0)   # gloo's threads may outlive it, and abort an orderly exit
'''


def test_two_processes(server, tmp_path):
    codes, said = server.pair(f'import sys\nsys.path[:0] = [{os.path.dirname(__file__)!r}]\n{WORKER}', tmp_path)
    assert codes == [0, 0] and all('fine' in text.splitlines() for text in said), (codes, said)


# ---- a GPU, where there is one

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
@pytest.mark.parametrize('in_parts', [False, True])
def test_cuda_mixed_precision(in_parts):
    from fastai.callback.fp16 import MixedPrecision
    b = [t.cuda() for t in batch()]
    learn = learner([b] * 4, net().cuda(), cbs=[MixedPrecision()], in_parts=in_parts)
    fit(learn)
    assert learn.mlp_match.frame().total.notna().all()
    table = step_cost(net().cuda(), b, n=1, ignore_index=255)
    assert (table.megabytes.diff()[1:] > 0).all()


@pytest.mark.parametrize('n_off', [1, 3, 6])
def test_inverted_bottlenecks_of_lite0_are_off(n_off):
    "Those with a skip, as many as asked for: as if they were not there; the first is the one that is off alone"
    torch.manual_seed(0)
    model = unet3plus_lite0(5, width=4, pretrained=False, deep_supervision=False,
                            encoder_args=dict(out_indices=(0, 1, 2, 3))).train()
    with_skip = [name for name, m in model.encoder.named_modules() if getattr(m, 'has_skip', False)]
    assert list(residual_blocks(model)) == with_skip and len(with_skip) == 6
    one, several = method(), method(n_off=n_off)
    x, y, weak, *_ = views = batch()
    twin = copy.deepcopy(model)
    terms = several.step(model, *views, at=3)
    assert len(set(terms.off)) == n_off and terms.off[:1] == one.step(copy.deepcopy(twin), *views, at=3).off
    for name in terms.off: twin.encoder.set_submodule(name, nn.Identity())
    with torch.no_grad(): out = twin(torch.cat([x, weak]))
    same(terms.L_x_np.detach(), MatchLoss(ignore_index=255).labelled(out[:len(x)], y))
    terms.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_no_more_blocks_off_than_there_are():
    with pytest.raises(ValueError, match='n_off: expected at most the 4 blocks of this encoder, got 5'):
        method(n_off=5).check(net())
    with pytest.raises(ValueError, match='n_off: expected'): method(n_off=0)
    method(n_off=5, unit='stage').check(net())
    assert 'by 3 blocks' in method(n_off=3).describe() and 'by block' in method().describe()
