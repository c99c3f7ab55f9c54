"Inference at original size: sliding windows against a reference over pixels, nothing left behind."
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassJaccardIndex

from noisyseg.data.datasets import scenes
from noisyseg.measure.inference import evaluate, image_logits, predict_mask, window_corners
from noisyseg.data.loaders import MaskDataset
from noisyseg.data.files import distinct_palette, read_image
from noisyseg.train.checkpoints import load_model, save_model
from noisyseg.train.learner import segmentation_learner
from noisyseg.nets.unet3plus import unet3plus_tiny
from noisyseg.data.semi_supervised import semi_scenes

pair = lambda low, high: st.tuples(st.integers(low, high), st.integers(low, high))


def net(n=4, receptive=1, seed=0):
    "A network that sees `receptive` pixels around"
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 6, receptive, padding=receptive // 2), nn.BatchNorm2d(6), nn.GELU(),
                         nn.Conv2d(6, n, 1))


def slowly(model, x, window, stride, p):
    ("Each pixel by itself: all windows by loops of our own, one forward pass each, and the mean of those that hold "
     "the pixel")
    h, w = x.shape[1:]
    above, left = max(window[0] - h, 0) // 2, max(window[1] - w, 0) // 2
    big = torch.zeros(3, max(h, window[0]), max(w, window[1]))
    big[:, above:above + h, left:left + w] = x
    def begins(n, size, step):
        found, at = [], 0
        while True:
            if at + size >= n: return [*found, n - size]
            found.append(at)
            at += step
    says = {(t, l): model(big[None, :, t:t + window[0], l:l + window[1]])[0]
            for t in begins(big.shape[1], window[0], stride[0])
            for l in begins(big.shape[2], window[1], stride[1])}
    out = torch.zeros(len(next(iter(says.values()))), h, w)
    for r in range(h):
        for c in range(w):
            here = [s[:, r + above - t, c + left - l] for (t, l), s in says.items() if t <= r + above < t + window[0]
                    and l <= c + left < l + window[1]]
            if p: here = [s.softmax(0) if len(s) > 1 else s.sigmoid() for s in here]
            out[:, r, c] = torch.stack(here).mean(0)
    return out


@settings(max_examples=40, deadline=None)
@given(size=pair(1, 18), window=pair(1, 12), part=st.tuples(st.floats(0, 1), st.floats(0, 1)), bs=st.integers(1, 5),
       p=st.booleans(),
       n=st.sampled_from([1, 2, 4]))
def test_slow_reference(size, window, part, bs, p, n):
    ("Any size, window and stride, also windows larger than the image, and batches of windows: what loops over pixels "
     "give")
    stride = tuple(1 + round(f * (w - 1)) for f, w in zip(part, window))
    model, x = net(n, 3).eval(), torch.randn(3, *size, generator=torch.Generator().manual_seed(1))
    got = image_logits(model, x, window, stride, average='probabilities' if p else 'logits', bs=bs)
    with torch.no_grad(): want = slowly(model, x, window, stride, p)
    if p: got = got.exp() if n > 1 else got.sigmoid()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(size=pair(1, 60), window=pair(1, 30), part=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_corners_cover(size, window, part):
    "Windows lie in the image (or start at 0 where it is smaller), none is superfluous, and every pixel is in one"
    stride = tuple(1 + round(f * (w - 1)) for f, w in zip(part, window))
    corners, count = window_corners(size, window, stride), np.zeros(size, int)
    assert len(set(corners)) == len(corners)
    for (t, l) in corners:
        assert all(0 <= o <= max(n - w, 0) for o, n, w in zip((t, l), size, window))
        count[t:t + window[0], l:l + window[1]] += 1
    assert (count > 0).all()
    for axis, (n, w, s) in enumerate(zip(size, window, stride)):
        starts = sorted({c[axis] for c in corners})
        assert all(0 < b - a <= s for a, b in zip(starts, starts[1:])) and len(starts) == max(0, -(-(n - w) // s)) + 1


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(pair(1, 40), min_size=1, max_size=4), window=st.none() | st.integers(1, 33),
       overlap=st.floats(0, 1),
       size=st.sampled_from([None, 'own', 9, (24, 17)]), n=st.sampled_from([1, 2, 5]), seed=st.integers(0, 3))
def test_each_pixel_once(sizes, window, overlap, size, n, seed):
    ("Counts are the truth's own, whatever the overlap; scores are torchmetrics' on all pixels at once, and a "
     "pixelwise network doesn't see windows")
    rng, model, m = np.random.default_rng(seed), net(n, seed=seed), max(n, 2)
    items = [(rng.integers(0, 256, (*s, 3), dtype=np.uint8), rng.choice([*range(m), 255], s).astype(np.uint8))
             for s in sizes]
    stride = None if window is None else 1 + round(overlap * (window - 1))
    table = evaluate(model, items, classes=m, ignore_index=255, window=window, stride=stride, size=size)
    truth = torch.cat([torch.from_numpy(y).flatten().long() for _, y in items])
    valid = truth != 255
    assert table.n_pixels.tolist() == [*truth[valid].bincount(minlength=m).tolist(), int(valid.sum()), int(valid.sum())]
    masks = [predict_mask(model, x, size=size, window=window, stride=stride) for x, _ in items]
    assert [y.shape for y in masks] == [tuple(s) for s in sizes] and all(y.dtype == np.uint8 for y in masks)
    pred = torch.cat([torch.from_numpy(y).flatten().long() for y in masks])
    cm = MulticlassConfusionMatrix(m, ignore_index=255)(pred, truth) if valid.any() else torch.zeros(m, m)
    union = cm.sum(0) + cm.sum(1) - cm.diagonal()
    np.testing.assert_allclose(table.value[:m], (cm.diagonal() / union).numpy(), rtol=1e-6)
    if (union > 0).all():
        assert table.value[m] == pytest.approx(float(MulticlassJaccardIndex(m, ignore_index=255)(pred, truth)),
                                               abs=1e-6)
    if size in (None, 'own'):
        assert all((a == predict_mask(model, x, size='own')).mean() > 0.98 for a, (x, _) in zip(masks, items))


@pytest.mark.parametrize('window', [None, 24])
@pytest.mark.parametrize('wrapped', [lambda o: o, lambda o: [o, o[:, :, ::2, ::2]], lambda o: ([o], o.mean((2, 3))),
                                     lambda o: {'out': o, 'aux': o * 0}])
def test_outputs(wrapped, window):
    "Logits as networks hand them out: a tensor, the list of deep supervision, with presence logits, a dictionary"
    class Wrapped(nn.Module):
        def __init__(self): super().__init__(); self.inner = net()
        def forward(self, x): return wrapped(self.inner(x))
    model, x = Wrapped(), torch.randn(3, 30, 41)
    torch.testing.assert_close(image_logits(model, x, window), image_logits(model.inner, x, window), rtol=0, atol=0)


def test_mode_and_weights_stay():
    "Modules are as they were, one by one, also after an error in the middle; no gradient, no running statistic moves"
    model = net()
    model[1].eval()
    flags, state = [m.training for m in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}
    out = image_logits(model, torch.randn(3, 20, 20), 8)
    assert not out.requires_grad and torch.is_grad_enabled()
    calls = []
    def breaks(module, args):
        calls.append(module.training)
        if len(calls) == 2: raise KeyboardInterrupt
    hook = model.register_forward_pre_hook(breaks)
    with pytest.raises(KeyboardInterrupt): image_logits(model, torch.randn(3, 20, 20), 8)
    hook.remove()
    assert calls == [False, False] and torch.is_grad_enabled()
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_memory_is_one_image():
    "Logits of earlier images are gone by the time the next one is predicted"
    model, alive, most = net(), [], []
    def watch(module, args, out):
        most.append(sum(r() is not None for r in alive))
        alive.append(weakref.ref(out))
    model.register_forward_hook(watch)
    rng = np.random.default_rng(0)
    items = ((rng.integers(0, 256, (30, 30, 3), dtype=np.uint8), rng.integers(0, 4, (30, 30), dtype=np.uint8))
             for _ in range(12))
    assert evaluate(model, items, classes=4, window=20, bs=1).attrs['images'] == 12
    assert len(alive) == 12 * 4 and max(most) <= 1


def test_files_and_modes(tmp_path):
    "Files, PIL images of all 8-bit modes and arrays are one image; masks may be files"
    rng, model = np.random.default_rng(0), net()
    pixels, labels = rng.integers(0, 256, (19, 26, 3), dtype=np.uint8), rng.integers(0, 4, (19, 26), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path/'a.png')
    Image.fromarray(labels).save(tmp_path/'m.png')
    want = predict_mask(model, pixels)
    for image in (tmp_path/'a.png', str(tmp_path/'a.png'), Image.fromarray(pixels),
                  torch.from_numpy(pixels).permute(2, 0, 1), np.asfortranarray(pixels)):
        assert (predict_mask(model, image) == want).all()
    grey = Image.fromarray(pixels[..., 0])
    assert (predict_mask(model, grey) == predict_mask(model, np.array(grey))).all()
    for mode in ('P', 'RGBA', '1', 'CMYK'):
        assert predict_mask(model, Image.fromarray(pixels).convert(mode)).shape == (19, 26)
    assert (predict_mask(model, grey.convert('LA')) == predict_mask(model, grey)).all()
    by_file = evaluate(model, [(tmp_path/'a.png', tmp_path/'m.png')], classes=4)
    assert by_file.value.equals(evaluate(model, [(pixels, labels)], classes=4).value)
    assert by_file.value.equals(evaluate(model, ['a'], read=lambda name: (read_image(tmp_path/f'{name}.png'), labels),
                                         classes=4).value)
    for void in (2, -100, 300):
        table = evaluate(model, [(tmp_path/'a.png', tmp_path/'m.png')], classes=4, ignore_index=void)
        assert table.n_pixels.iloc[-1] == (labels.astype(int) != void).sum()
    assert by_file.attrs == dict(images=1, size=None, window=None, stride=None)
    with pytest.raises(ValueError, match='8 bits'):
        predict_mask(model, Image.fromarray(pixels[..., 0].astype(np.int32)))
    with pytest.raises(FileNotFoundError, match='not there'): predict_mask(model, tmp_path/'b.png')
    with pytest.raises(TypeError, match='expected an image'): predict_mask(model, None)


def test_known_from_card_and_learner(tmp_path):
    ("A loaded checkpoint and a Learner say how they want their images; the training set is read at full size and "
     "without augmentation")
    dls = scenes(n_train=6, n_valid=5, size=32, bs=2, seed=0)
    learn = segmentation_learner(dls, lambda n: unet3plus_tiny(n, width=2, filters=(4, 6, 8)))
    model = load_model(save_model(learn, tmp_path/'m', size=[32, 32]), model=learn.model)
    table = evaluate(learn)
    assert table['class'].tolist() == [*dls.vocab, '', ''] and table.attrs['size'] == (32,
            32) and table.attrs['images'] == 5
    assert table.value.equals(evaluate(model, dls.valid.dataset.items).value)
    assert table.value.equals(evaluate(model, dls, window=32).value)
    a, b = (evaluate(learn, dls.train) for _ in range(2))
    assert a.equals(b) and a.n_pixels.iloc[-1] == 6 * 32 * 32
    assert predict_mask(learn, dls.valid.dataset.items[0][0]).shape == (32, 32)
    semi = semi_scenes(n_labelled=3, n_unlabelled=4, n_valid=2, size=32, bs=2, seed=0)
    # of the training images those with masks
    assert [evaluate(model, dl).attrs['images'] for dl in (semi, semi.train)] == [2, 3]


def test_margins_are_not_scored():
    "A working size of another shape: what is said of the margins reaches no pixel of the image"
    class Rim(nn.Module):
        "Class 1 in the outermost four rows of what it is shown, class 0 inside"
        def forward(self, x):
            out = torch.zeros(len(x), 2, *x.shape[2:])
            out[:, 0] = 1
            out[:, 1, :4] = out[:, 1, -4:] = 1.9
            return out
    image = np.full((20, 80, 3), 200, np.uint8)
    assert predict_mask(Rim(), image, size=40).sum() == 0                  # 10 rows of 40 are image, rows 15 to 24
    assert predict_mask(Rim(), image, size=(10, 40)).mean() == pytest.approx(0.8)
    assert predict_mask(Rim(), image, size=40, window=10).mean() == pytest.approx(0.8)   # windows see no margins


def test_refusals():
    "Errors say what came and what to do"
    model, image = net(), np.zeros((10, 12, 3), np.uint8)
    items = [(image, np.zeros((10, 12), np.uint8))]
    with pytest.raises(ValueError, match='larger than window'): predict_mask(model, image, window=4, stride=(4, 5))
    with pytest.raises(ValueError, match='at least 1'): predict_mask(model, image, window=4, stride=0)
    with pytest.raises(ValueError, match='height, width'): predict_mask(model, image, window=(4, 4, 4))
    with pytest.raises(TypeError, match='whole number'): predict_mask(model, image, window=4.5)
    with pytest.raises(ValueError, match='without window='): predict_mask(model, image, stride=4)
    with pytest.raises(TypeError, match='nn.Module'): predict_mask(lambda x: x, image)
    with pytest.raises(ValueError, match=r'image 0 is 10×12'):
        evaluate(model, [(image, np.zeros((12, 10), np.uint8))], classes=4)
    with pytest.raises(TypeError): evaluate(model, [(image, np.zeros((10, 12)))], classes=4)
    with pytest.raises(ValueError, match='expected 4 different names'): evaluate(model, items, classes=3)
    assert evaluate(model, items)['class'].tolist() == [*'0123', '', '']   # as many as the logits have channels
    with pytest.raises(ValueError, match='no images'): evaluate(model, iter(()), classes=4)
    with pytest.raises(TypeError, match='stides'): evaluate(model, items, classes=4, stides=3)


def test_dataset_without_void():
    ("A dataset whose images leave margins at its own size, and whose masks have no void label, can still be scored at "
     "original size")
    rng = np.random.default_rng(0)
    items = [(rng.integers(0, 256, (11, 30, 3), dtype=np.uint8), rng.integers(0, 4, (11, 30), dtype=np.uint8))
             for _ in range(3)]
    ds = MaskDataset(items, lambda item: item, list('abcd'), distinct_palette(4), size=(16, 16))
    assert evaluate(net(), ds).n_pixels.iloc[-1] == 3 * 330
