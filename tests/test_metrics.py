"""Properties of scores and losses that must hold for any masks and logits, not only for those in the notebooks."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from sklearn.metrics import confusion_matrix, jaccard_score
from torchmetrics.functional.classification import multiclass_jaccard_index

from noisyseg.train.losses import (DeepSupervisionLoss, FocalLoss, HybridLoss, IoULoss, MSSSIMLoss, class_presence,
                                   ms_ssim,
    presence_loss)
from noisyseg.measure.metrics import ConfusionMeter, miou_from_matrix
from noisyseg.nets.adapter import to_classes

settings.register_profile('noisyseg', max_examples=40, deadline=None)
settings.load_profile('noisyseg')
LOSSES = (FocalLoss, IoULoss, MSSSIMLoss, HybridLoss)


@st.composite
def cases(draw, max_batch=5, max_side=24, binary=False, ignore=(None, 255, -100, 'inner')):
    "Logits, masks and an ignore index: any sizes, some classes missing, void nowhere, in places or everywhere."
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    b, h, w = draw(st.integers(1, max_batch)), draw(st.integers(1, max_side)), draw(st.integers(1, max_side))
    c = 1 if binary else draw(st.integers(2, 7))
    n = max(c, 2)
    some = torch.randperm(n, generator=g)[:draw(st.integers(1, n))]
    y = some[torch.randint(0, len(some), (b, h, w), generator=g)]
    v = draw(st.sampled_from(ignore))
    v = draw(st.integers(0, n-1)) if v == 'inner' else v
    if v is not None: y = y.masked_fill(torch.rand(y.shape, generator=g) < draw(st.sampled_from([0., .1, .5, 1.])), v)
    return torch.randn(b, c, h, w, generator=g)*draw(st.sampled_from([.1, 1., 20.])), y, v


def valid(y, v): return torch.ones_like(y, dtype=torch.bool) if v is None else y != v


@given(cases(), st.lists(st.integers(0, 5), max_size=3))
def test_batches_concatenation_and_sklearn_agree(case, cuts):
    x, y, v = case
    c, whole, parts = x.shape[1], ConfusionMeter(x.shape[1], case[2]), ConfusionMeter(x.shape[1], case[2])
    whole.update(x, y)
    edges = [0, *sorted(min(k, len(y)) for k in cuts), len(y)]
    for i, j in zip(edges, edges[1:]): parts.update(x[i:j], y[i:j])   # empty batches among them
    assert torch.equal(whole.matrix, parts.matrix) and whole.matrix.dtype == torch.int64
    ok = valid(y, v)
    assert whole.matrix.sum() == ok.sum()
    if not ok.any():
        assert whole.iou().isnan().all() and np.isnan(whole.miou()) and np.isnan(whole.pixel_accuracy())
        return
    t, p = y[ok].numpy(), x.argmax(1)[ok].numpy()
    assert np.array_equal(whole.matrix.numpy(), confusion_matrix(t, p, labels=range(c)))
    assert whole.pixel_accuracy() == pytest.approx((t == p).mean(), abs=1e-12)
    seen = [k for k in range(c) if (k in t or k in p) and k != v]
    if not seen:
        assert np.isnan(whole.miou())
        return
    theirs = jaccard_score(t, p, labels=seen, average=None, zero_division=0)
    assert np.allclose(whole.iou()[seen].numpy(), theirs, atol=1e-12)
    assert whole.iou().isnan().sum() == c - len(seen)
    assert whole.miou() == pytest.approx(theirs.mean(), abs=1e-12)
    assert whole.miou() == pytest.approx(multiclass_jaccard_index(x, y, c, ignore_index=v).item(), abs=1e-5)


@given(cases(), st.randoms(use_true_random=False))
def test_renaming_the_classes_renames_the_scores(case, rnd):
    x, y, v = case
    c = x.shape[1]
    perm = list(range(c)); rnd.shuffle(perm)   # new number of old class k is perm[k]
    back = torch.tensor(perm).argsort()
    renamed = y.where(~valid(y, v), torch.tensor(perm)[y.clamp(0, c-1)])
    if v is not None and 0 <= v < c: renamed, w = renamed.where(valid(y, v), perm[v]), perm[v]
    else: w = v
    a, b = ConfusionMeter(c, v).update(x, y), ConfusionMeter(c, w).update(x[:, back], renamed)
    assert torch.equal(a.matrix, b.matrix[perm][:, perm])
    assert torch.equal(a.iou().nan_to_num(-1), b.iou()[perm].nan_to_num(-1))
    assert np.isclose(a.miou(), b.miou(), equal_nan=True)
    for cls in LOSSES:
        assert torch.allclose(cls(ignore_index=v)(x, y), cls(ignore_index=w)(x[:, back], renamed), atol=1e-5)
    alpha = torch.arange(1., c+1)
    weighed = FocalLoss(alpha=alpha[back], ignore_index=w)(x[:, back], renamed)
    assert torch.allclose(FocalLoss(alpha=alpha, ignore_index=v)(x, y), weighed, atol=1e-4)


@pytest.mark.parametrize('binary', [False, True])
@given(data=st.data())
def test_void_pixels_never_matter(binary, data):
    x, y, v = data.draw(cases(binary=binary, ignore=(255, -100, 'inner')))
    n = max(x.shape[1], 2)
    void = ~valid(y, v)
    wild = torch.where(void[:, None], data.draw(st.sampled_from([-1e30, 0., 7., torch.inf, -torch.inf])), x)
    a, b = ConfusionMeter(n, v).update(x, y), ConfusionMeter(n, v).update(torch.where(void[:, None], 5., x), y)
    assert torch.equal(a.matrix, b.matrix)
    garbage = torch.where(void, 10**6, to_classes(x))
    assert torch.equal(a.matrix, ConfusionMeter(n, v).update(garbage, y).matrix)
    for cls in LOSSES:
        loss, x1, x2 = cls(ignore_index=v), x.clone().requires_grad_(), wild.clone().requires_grad_()
        l1, l2 = loss(x1, y), loss(x2, y)
        l1.backward(); l2.backward()
        assert torch.equal(l1, l2) and torch.equal(x1.grad, x2.grad) and l1.isfinite() and x1.grad.isfinite().all()
        assert (x1.grad[void[:, None].expand_as(x)] == 0).all()
        assert torch.equal(cls(ignore_index=77)(x, y.masked_fill(void, 77)), l1.detach())
    assert torch.equal(class_presence(y, x.shape[1], v), class_presence(y.masked_fill(void, 77), x.shape[1], 77))


@pytest.mark.parametrize('binary', [False, True])
@given(data=st.data())
def test_losses_stay_in_their_range_and_images_are_independent(binary, data):
    x, y, v = data.draw(cases(binary=binary))
    for cls in LOSSES:
        each = cls(ignore_index=v, reduction='none')(x, y)
        assert each.shape == (len(y),) and (each >= -1e-6).all()
        if cls in (IoULoss, MSSSIMLoss):
            assert (each <= 1 + 1e-6).all() and torch.allclose(each.mean(), cls(ignore_index=v)(x, y), atol=1e-6)
        alone = torch.cat([cls(ignore_index=v, reduction='none')(x[i:i+1], y[i:i+1]) for i in range(len(y))])
        assert torch.allclose(each, alone, atol=1e-5)
    t = y.masked_fill(~valid(y, v), 0)
    right = (t[:, None]*2. - 1)*60 if binary else F.one_hot(t, x.shape[1]).permute(0, 3, 1, 2)*120. - 60
    for cls in LOSSES: assert cls(ignore_index=v)(right, y).item() == pytest.approx(0, abs=1e-5)


@given(cases(ignore=(None, 255, -100)))
def test_focal_with_gamma_0_is_cross_entropy(case):
    x, y, v = case
    if not valid(y, v).any(): return
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    a, b = FocalLoss(gamma=0, ignore_index=v)(x1, y), F.cross_entropy(x2, y, ignore_index=-100 if v is None else v)
    a.backward(); b.backward()
    assert torch.allclose(a, b, atol=1e-6) and torch.allclose(x1.grad, x2.grad, atol=1e-7)


@given(cases(binary=True))
def test_one_channel_is_two_channels_of_which_one_is_zero(case):
    x, y, v = case
    two = torch.cat([torch.zeros_like(x), x], 1)
    assert torch.allclose(FocalLoss(ignore_index=v)(x, y), FocalLoss(ignore_index=v)(two, y), atol=1e-5)
    assert torch.equal(ConfusionMeter(2, v).update(x, y).matrix, ConfusionMeter(2, v).update(two, y).matrix)
    foreground = ms_ssim(x.sigmoid(), (y[:, None] == 1).float()) if v is None else None
    if foreground is not None: assert torch.allclose(MSSSIMLoss()(x, y), 1 - foreground.mean(), atol=1e-6)


@given(cases(), st.integers(1, 5), st.booleans())
def test_deep_supervision_is_the_sum_of_its_parts(case, k, normalize):
    x, y, v = case
    weights = [1/(i+1) for i in range(k)]
    outs, presence, base = [x*(i+1) for i in range(k)], x.mean((2, 3)), HybridLoss(ignore_index=v)
    expected = sum(w*base(o, y) for w, o in zip(weights, outs)) / (sum(weights) if normalize and k > 1 else 1)
    deep = DeepSupervisionLoss(base, weights, presence_weight=.3, normalize=normalize)
    assert torch.allclose(deep(outs, y), expected, atol=1e-5)
    assert torch.allclose(deep((outs, presence), y), expected + .3*presence_loss(presence, y, v), atol=1e-5)
    deep.reduction = 'none'
    assert deep((outs, presence), y).shape == (len(y),)


def test_counts_are_exact_where_floats_are_not():
    big, one = torch.zeros(4096, 4096, dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.uint8)
    meter = ConfusionMeter(2).update(big, big).update(one, one)     # 2**24 + 1: float32 cannot say that
    assert meter.matrix.tolist() == [[2**24 + 1, 0], [0, 0]]


@pytest.mark.parametrize('absent, expected', [('skip', 1.), ('zero', 2/3), ('one', 1.)])
def test_absent_classes(absent, expected):
    assert miou_from_matrix(torch.diag(torch.tensor([3, 4, 0])), absent) == pytest.approx(expected)


WORKER = '''
import os, sys, torch
from noisyseg.measure.metrics import ConfusionMeter
torch.distributed.init_process_group('gloo')
rank = int(os.environ['RANK'])
g = torch.Generator().manual_seed(0)
x, y = torch.randn(5, 3, 8, 8, generator=g), torch.randint(0, 3, (5, 8, 8), generator=g)
share = slice(0, 4) if rank == 0 else slice(4, 5)     # each counts some of the images, and reads the matrix of all
meter = ConfusionMeter(3, sync=True).update(x[share], y[share])
assert torch.equal(meter.matrix, ConfusionMeter(3).update(x, y).matrix)
print('fine', flush=True)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
os._exit(0)   # gloo's threads may outlive it, and abort an orderly exit
'''


@pytest.mark.skipif(not torch.distributed.is_available(), reason='torch was built without torch.distributed')
def test_two_processes_add_up(server, tmp_path):
    codes, said = server.pair(WORKER, tmp_path)
    assert codes == [0, 0] and all('fine' in text.splitlines() for text in said), (codes, said)
