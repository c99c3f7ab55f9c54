"Labelled and unlabelled images together: views, CutMix, loaders, splits, folders."
import math
import pickle
import random
import unicodedata
from functools import partial
from pathlib import Path
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from fastai.callback.progress import ProgressCallback # noqa: F401, gives Learner its no_bar
from fastai.distributed import DistributedDL
from fastai.learner import Learner
from noisyseg.data.datasets import scenes
from noisyseg.data.doctor import check_dataset
from noisyseg.data.loaders import MaskDataset, augmenter
from noisyseg.data.files import colorize, data_root
from noisyseg.data.own import custom_masks
from noisyseg.data.procedural import scene, scene_classes, scene_palette
from noisyseg.data.splits import (check_apart, choose_balanced, pair_some, read_list, read_split,
                                  split_labelled)
from noisyseg.data.semi_supervised import (SemiDL, SemiDataset, ViewDataset, cutmix, cutmix_boxes, partners,
                                           semi, semi_dataloaders, semi_folder, semi_scenes,
    strong_view)

def identity(o): return o

def write(file, pixels, **kwargs):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file, **kwargs)
    return file

def views(images, size=(40,56), **kwargs):
    return ViewDataset(images, identity, size, augmenter(size, (0.5,1.5), 0.5, 0, 0), **dict(largest=1.5, seed=1)
                       | kwargs)

def prints(b): return [t.as_subclass(Tensor).double().sum().item() for t in b]
def passes(dl, n=1): return [[prints(b) for b in dl] for _ in range(n)]
make = partial(semi_scenes, 10, 30, 4, size=32, bs=2, bs_unlabelled=4, device='cpu')

# --- views

@pytest.mark.parametrize('hw', [(40,56), (96,96), (20,200), (200,20), (9,13), (1,1)])
def test_inside_is_where_the_image_is(hw):
    ds = views([np.full((*hw,3), 255, np.uint8)], strong=identity)
    margins = []
    for epoch in range(20):
        weak, s1, s2, inside = ds.item(0, epoch)
        assert weak.shape==(3,40,56) and torch.equal(weak, s1) and torch.equal(weak, s2)
        assert (weak[:,inside]==255).all() and inside.any()
        margins.append((weak[0][~inside]==255).float().mean() if (~inside).any() else torch.tensor(0.))
    assert max(margins)<0.1    # and outside it is not, but for a row that the two share

def test_views_share_geometry():
    "The coordinates of every pixel are painted into the image: all views must show the same ones"
    y, x = np.mgrid[:96,:96]
    paint = np.stack([x*2, y*2, x*0+128], -1).astype(np.uint8)
    for i in range(10):
        weak, s1, s2, inside = views([paint], strong=strong_view(p_jitter=0, p_grey=0, p_blur=1)).item(0, i)
        core = -torch.nn.functional.max_pool2d(-inside[None].float(), 13, 1, 6)[0] > 0
        for s in (s1, s2): assert (s.int()-weak.int())[:,core].abs().max()<=12   # blurred, not moved

def test_strong_views_are_independent_and_as_frequent_as_published():
    ds = views([scene(0)[0]], size=(24,24))
    grey = same = 0
    for e in range(200):
        weak, s1, s2, _ = ds.item(0, e)
        grey += (s1[0]==s1[1]).all().item() and (s1[1]==s1[2]).all().item()
        same += torch.equal(s1, weak)
    assert 0.12<grey/200<0.29 and 0.03<same/200<0.14        # 0.2, and 0.2*0.8*0.5

def test_an_item_depends_on_seed_pass_and_index_alone():
    images = [scene(i, 40)[0] for i in range(4)]
    want = views(images).item(2, 5)
    for noise in (0, 7):
        torch.manual_seed(noise); np.random.seed(noise); random.seed(noise)
        states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        got = pickle.loads(pickle.dumps(views(images, cache=bool(noise)))).item(2, 5)
        assert all(torch.equal(a, b) for a,b in zip(want, got))
        assert torch.equal(states[0], torch.get_rng_state()) and states[1:]==(np.random.get_state()[1].tolist(),
                random.getstate())
    for other in (views(images, seed=2).item(2, 5), views(images).item(2, 6), views(images).item(1, 5)):
        assert not torch.equal(want[0], other[0])

# --- CutMix

def reference_boxes(n, size, seed):
    "UniMatch's distribution in plain numpy: one area, then shapes and places until one fits"
    rng, boxes = np.random.default_rng(seed), []
    while len(boxes)<n:
        pixels = rng.uniform(0.02, 0.4)*size*size
        while True:
            ratio = rng.uniform(0.3, 1/0.3)
            w, h = int(math.sqrt(pixels/ratio)), int(math.sqrt(pixels*ratio))
            x, y = rng.integers(0, size, 2)
            if x+w<=size and y+h<=size: break
        boxes.append((h, w, y, x))
    return np.array(boxes)

def test_boxes_are_distributed_as_in_unimatch():
    n = 2000
    boxes = cutmix_boxes(n, 64, torch.Generator().manual_seed(0), p=1)
    got = []
    for b in boxes.numpy():
        rows, cols = np.flatnonzero(b.any(1)), np.flatnonzero(b.any(0))
        assert b.sum()==len(rows)*len(cols)                  # one whole rectangle
        got.append((len(rows), len(cols), rows[0], cols[0]))
    got, want = np.array(got), reference_boxes(n, 64, 1)
    error = np.sqrt(got.var(0)/n + want.var(0)/n)
    assert (np.abs(got.mean(0)-want.mean(0))<4*error).all(), (got.mean(0), want.mean(0))
    for q in (0.1, 0.5, 0.9): assert np.abs(np.quantile(got, q, 0)-np.quantile(want, q, 0)).max()<=4

def test_half_of_the_images_have_a_box():
    share = cutmix_boxes(2000, 16, torch.Generator().manual_seed(0)).any(2).any(1).float().mean()
    assert abs(share-0.5)<0.05
    assert cutmix_boxes(50, 16, p=1).any(2).any(1).all() and not cutmix_boxes(50, 16, p=0).any()
    assert cutmix_boxes(0, 16).shape==(0,16,16)

@pytest.mark.parametrize('size', [(8,8), (8,1000), (1000,8), (33,17)])
def test_boxes_of_odd_images(size):
    share = cutmix_boxes(60, size, torch.Generator().manual_seed(0), p=1).float().mean((1,2))
    assert (share>0).all() and (share<=0.4).all()

@pytest.mark.parametrize('bad', [dict(p=1.5), dict(area=(0.4,0.2)), dict(area=(0,2)), dict(aspect=(0,1)),
                                 dict(aspect=(2,1))])
def test_boxes_that_make_no_sense(bad):
    with pytest.raises(ValueError, match=next(iter(bad))): cutmix_boxes(2, 16, **bad)

def test_a_partner_is_another_image():
    g, shifts = torch.Generator().manual_seed(0), set()
    for n in (2, 3, 7):
        for _ in range(50):
            p = partners(n, g)
            assert sorted(p.tolist())==list(range(n)) and (p!=torch.arange(n)).all()
            shifts.add((n, p[0].item()))
    assert len(shifts)==1+2+6                                 # every one of the others, sooner or later
    with pytest.raises(ValueError, match='a batch of one has no other'): partners(1)

def test_all_that_belongs_to_a_pixel_goes_along():
    n, g = 4, torch.Generator().manual_seed(0)
    x, labels, sure, inside = torch.rand(n,3,20,30), torch.randint(5, (n,20,30)), torch.rand(n,20,30), torch.rand(n,20,
            30)>0.3
    boxes, p = cutmix_boxes(n, (20,30), g, p=1), partners(n, g)
    for t in (x, labels, sure, inside):
        got, want = cutmix(t, t[p], boxes), t.clone()
        for i in range(n):
            for y,c in boxes[i].nonzero().tolist(): want[i,...,y,c] = t[p[i],...,y,c]
        assert torch.equal(got, want) and got.dtype==t.dtype
    for a,b,o in ((x, x[:2], boxes), (x, x, boxes[:,:5]), (x[0,0], x[0,0], boxes), (x, labels, boxes)):
        with pytest.raises(ValueError, match='expected a and b alike'): cutmix(a, b, o)

# --- loaders

@pytest.mark.parametrize('workers', [1, 3])
def test_same_batches_whoever_loads(workers):
    assert passes(make(num_workers=workers, seed=4).train, 2)==passes(make(seed=4).train, 2)

def test_cache_changes_nothing(): assert passes(make(cache=True).train, 2)==passes(make().train, 2)

@pytest.mark.parametrize('workers', [0, 2])
def test_resume_in_mid_epoch(workers):
    whole_run = passes(make().train, 3)
    dl = make(num_workers=workers).train
    dl.epoch, dl.start = 1, 5
    assert passes(dl, 1)==[whole_run[2][5:]] and (dl.epoch, dl.start)==(2, 0)
    mask = scenes(12, 4, size=32, bs=4, seed=0, num_workers=workers, device='cpu').train
    want = passes(mask, 2)
    mask.epoch, mask.start = 0, 2
    assert passes(mask, 1)==[want[1][2:]]

def test_skipped_batches_are_not_loaded():
    read = []
    def loud(o): read.append(1); return o
    dls = make()
    dls.train_ds.unlabelled.read = lambda o: (loud(o)[0], np.ones(o[0].shape[:2], np.uint8))
    dls.train.start = 6
    assert len(passes(dls.train)[0])==1 and len(read)==4      # one batch of four images

class Shards:
    "fastai's sharding over `n` processes, in one: what each would load"
    def __init__(self, make, n, monkeypatch):
        monkeypatch.setenv('WORLD_SIZE', str(n))
        monkeypatch.setattr(DistributedDL, '_broadcast', lambda self, t, rank: list(t))
        self.dls = [DistributedDL(make(), rank=r, world_size=n, device='cpu') for r in range(n)]

@pytest.mark.parametrize('n', [2, 3])
@pytest.mark.parametrize('kind', ['semi', 'mask'])
def test_distributed(n, kind, monkeypatch):
    loader = (lambda: make().train) if kind=='semi' else (lambda: scenes(18, 4, size=32, bs=2, seed=0,
            device='cpu').train)
    alone = passes(loader(), 2)
    shards = [passes(dl, 2) for dl in Shards(loader, n, monkeypatch).dls]
    assert len({len(s[1]) for s in shards})==1
    if kind=='semi':                                          # all batches, each once but for padding
        together = [b for s in shards for b in s[1]]
        assert {tuple(b) for b in together}=={tuple(b) for b in alone[1]} and len(together)-len(alone[1])<n
    for r,dl in enumerate(Shards(loader, n, monkeypatch).dls):
        dl.dl.epoch, dl.dl.start = 0, 2
        assert passes(dl)==[shards[r][1][2:]]

def dataset(n_labelled, n_unlabelled, bs, bs_unlabelled):
    pairs = [scene(i, 16) for i in range(max(n_labelled, n_unlabelled))]
    labelled = MaskDataset(pairs[:n_labelled], identity, scene_classes, scene_palette, 255, (16,16), seed=1)
    return SemiDataset(labelled, ViewDataset([x for x,_ in pairs[:n_unlabelled]], identity, (16,16), seed=2), bs,
                       bs_unlabelled)

@pytest.mark.parametrize('n_l, n_u, bs, bs_u, steps', [(5,40,2,4,10), (40,9,4,4,10), (3,20,8,4,5), (1,2,1,2,1),
                                                       (1,7,4,7,1), (21,21,4,4,5), (3,3,4,3,1)])
def test_rounds(n_l, n_u, bs, bs_u, steps):
    ds = dataset(n_l, n_u, bs, bs_u)
    assert len(ds)==steps
    batches = [ds.indices(k, e) for e in range(12) for k in range(steps)]
    labelled = [i for l,_ in batches for _,i in l]
    for start in range(0, len(labelled)-n_l+1, n_l): assert sorted(labelled[start:start+n_l])==list(range(n_l))
    for l,u in batches: assert len(l)==bs and len(u)==bs_u==len({i for _,i in u})
    per = n_u//bs_u
    rounds = [[i for _,u in batches[s:s+per] for _,i in u] for s in range(0, len(batches)-per+1, per)]
    for r in rounds: assert len(set(r))==len(r)==per*bs_u     # no image twice in a round
    if n_u>=7 and len(rounds)>1: assert rounds[0]!=rounds[1]
    if n_u%bs_u and len(rounds)>8: assert set(sum(rounds, []))==set(range(n_u))   # what is left out changes
    b = ds.batch(steps-1, 3)
    assert [len(t) for t in b]==[bs]*2+[bs_u]*4
    with pytest.raises(IndexError): ds.batch(steps)

def test_too_few_unlabelled():
    with pytest.raises(ValueError, match='3 unlabelled images for batches of bs_unlabelled=4'):
        semi_scenes(4, 3, 4, size=32)

@pytest.mark.parametrize('bad', [dict(bs=0), dict(bs_unlabelled=0), dict(size=3), dict(zoom=(2,1)),
                                 dict(num_workers=-1), dict(seed=-1), dict(stats=3),
    dict(n_valid=0)])
def test_nonsense_is_named(bad):
    with pytest.raises((ValueError, TypeError), match=next(iter(bad))):
        semi_scenes(4, 8, **dict(n_valid=4, size=32, device='cpu') | bad)

def test_batches_are_normalised_and_typed():
    dls = make(num_workers=0)
    for b in dls.train:
        x, y, weak, s1, s2, inside = b
        assert y.dtype==torch.int64 and inside.dtype==torch.bool and set(y.unique().tolist())<={*range(7), 255}
        assert all(t.dtype==torch.float32 and -3<t.min() and t.max()<3 for t in (x, weak, s1, s2))
    assert dls.n_inp==1 and dls.n_classes==7 and dls.vocab==scene_classes and dls.ignore_index==255 and len(
            dls.stats)==2
    assert [t.shape for t in dls.valid.one_batch()]==[(2,3,32,32), (2,32,32)]
    assert len(check_dataset(dls, progress=False))==14

def test_fastai_trains_exports_and_renews(tmp_path):
    dls, seen = make(), []
    def loss(out, y, *unlabelled):
        if unlabelled: seen.append([t.shape for t in unlabelled])
        return nn.functional.cross_entropy(out, y.as_subclass(Tensor), ignore_index=255)
    learn = Learner(dls, nn.Conv2d(3, 7, 1), loss, path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    assert len(seen)==2*len(dls.train) and seen[0]==[(4,3,32,32)]*3+[(4,32,32)]
    empty = pickle.loads(pickle.dumps(dls.new_empty()))
    assert len(empty.train_ds)==0 and empty.vocab==dls.vocab
    again = dls.train.new()
    assert isinstance(again, SemiDL) and passes(again)==passes(make().train)
    with pytest.raises(ValueError, match='the dataset makes the batches'): dls.train.new(bs=8)

def test_labelled_images_have_no_colour_jitter_unless_asked():
    plain = [np.full((32,32,3), 100, np.uint8)]*4
    pairs = [(x, np.zeros((32,32), np.uint8)) for x in plain]
    build = partial(semi_dataloaders, pairs, plain, pairs, identity, ['a'], [(0,0,0)], size=32, bs=2,
                    read_unlabelled=identity, zoom=(1,1), device='cpu')
    assert build().train.one_batch()[0].std((0,2,3)).max()<1e-6
    assert build(jitter=0.5).train.one_batch()[0].std((0,2,3)).max()>1e-3
    assert build().train.one_batch()[-1].all()

# --- splits

def test_split_is_balanced_and_repeatable():
    rng = np.random.default_rng(0)
    masks = [np.where(rng.random((8,8))<0.5, rng.choice(6, p=[.5,.3,.1,.05,.03,.02]), 0).astype(np.uint8)
             for _ in range(300)]
    items = [(None, m) for m in masks]
    split = partial(split_labelled, items, read=identity, vocab=list('abcdef'), verbose=False)
    for seed in range(5):
        few, rest = split(12, seed)
        assert [id(o) for o in few]==[id(o) for o in split(12, seed)[0]] and len(few)==12 and len(rest)==288
        shown = np.stack([np.bincount(m.ravel(), minlength=6)>0 for _,m in few]).sum(0)
        assert shown.min()>=2, shown
    assert {id(o) for o in split(12, 0)[0]}!={id(o) for o in split(12, 1)[0]}

def test_split_where_classes_run_out():
    shown = np.zeros((6,3), bool)
    # one image of class 1, none of class 2, the rest show nothing at all
    shown[0,1] = True
    assert choose_balanced(shown, 3, np.random.default_rng(0)).tolist()[0] is True
    assert choose_balanced(shown, 5, np.random.default_rng(0)).sum()==5

def test_split_says_what_it_chose(capsys):
    dls = scenes(20, 4, size=32, bs=2, device='cpu')
    few, rest = split_labelled(dls, 5)
    out = capsys.readouterr().out
    assert '5 of 20 images are labelled (seed 0)' in out and all(c in out
                                                                 for c in scene_classes) and len(out.splitlines())==9
    with pytest.raises(TypeError, match='expected DataLoaders'): split_labelled('folder', 5)
    with pytest.raises(ValueError, match='n=20 of 20 images'): split_labelled(dls.train_ds, 20)
    with pytest.raises(TypeError, match='n: expected a whole number'): split_labelled(dls, 2.5)

def write_split(folder, labelled, unlabelled, valid=()):
    folder.mkdir(parents=True, exist_ok=True)
    for file,ids in ((folder/'labeled.txt', labelled), (folder/'unlabeled.txt', unlabelled),
                     (folder.parent/'val.txt', valid)):
        if ids: file.write_text('\n'.join(f'i/{i}.jpg m/{i}.png' for i in ids) + '\n\n')
    return folder

@pytest.mark.parametrize('name, n, total, fine', [('92',92,200,True), ('92',91,200,False), ('1_8',13,100,True),
                                                  ('1_8',12,100,False), ('mine',7,30,True)])
def test_split_keeps_its_name(tmp_path, name, n, total, fine):
    folder = write_split(tmp_path/name, range(n), range(n, total))
    if fine: assert [len(o) for o in read_split(folder)]==[n, total-n]
    else:
        with pytest.raises(ValueError, match='its name promises'): read_split(folder)

def test_split_faults(tmp_path):
    cases = {'labelled and unlabelled at once: i/1.jpg; keep': ([0,1], [1,2,3]),
             'line 2: i/0.jpg is there a second time': ([0,0], [1,2]),
        'labelled and for validation': ([0,1], [2,3], [1,9]), 'unlabelled and for validation': ([0,1], [2,3], [3,9])}
    for k,(message,lists) in enumerate(cases.items()):
        with pytest.raises(ValueError, match=message): read_split(write_split(tmp_path/str(k)/'x', *lists))
    with pytest.raises(FileNotFoundError, match='not there'): read_split(tmp_path/'none')
    with pytest.raises(FileNotFoundError, match='4 of 4 files'):
        read_split(write_split(tmp_path/'z'/'y', [0,1], [2]), root=tmp_path)
    (tmp_path/'odd.txt').write_text('a.jpg a.png extra')
    with pytest.raises(ValueError, match='odd.txt, line 1'): read_list(tmp_path/'odd.txt')
    for i in range(3): write(tmp_path/'i'/f'{i}.jpg', scene(i,16)[0]); write(tmp_path/'m'/f'{i}.png', scene(i,16)[1])
    labelled, unlabelled = read_split(write_split(tmp_path/'w'/'v', [0], [1,2]), root=tmp_path)
    assert labelled[0][1].is_file() and unlabelled[1]==tmp_path/'i'/'2.jpg'

def test_lists_are_compared_as_they_look(tmp_path):
    "Letters composed in two ways are one name; a mark between two lists that were put together is none of it"
    name = {form: unicodedata.normalize(form, 'Zürich.jpg') for form in ('NFC', 'NFD')}
    (tmp_path/'labeled.txt').write_text(f"{name['NFD']} a.png\n", encoding='utf-8')
    (tmp_path/'unlabeled.txt').write_text(f"{name['NFC']}\n", encoding='utf-8')
    with pytest.raises(ValueError, match='labelled and unlabelled at once: Zürich.jpg; keep'): read_split(tmp_path)
    (tmp_path/'twice.txt').write_text(f"{name['NFD']} a.png\n{name['NFC']} b.png\n", encoding='utf-8')
    with pytest.raises(ValueError, match='line 2: Zürich.jpg is there a second time'): read_list(tmp_path/'twice.txt')
    (tmp_path/'joined.txt').write_text('\ufeffa.jpg a.png\n\ufeffb.jpg b.png\n', encoding='utf-8')
    assert read_list(tmp_path/'joined.txt')==[(Path('a.jpg'), Path('a.png')), (Path('b.jpg'), Path('b.png'))]

def test_nothing_that_is_validated_on_is_labelled_or_seen(mine):
    "And the line that is offered works"
    pairs, rest = pair_some(mine/'images', mine/'masks')
    dls = custom_masks(pairs, None, scene_classes, 32, 2, valid=['01', '02'], check=False, device='cpu')
    with pytest.raises(ValueError, match=r'for validation and labelled at once: .*01.jpg \(and 1 more\)') as e:
        semi(dls, (pairs, rest), bs=2)
    with pytest.raises(ValueError, match='for validation and unlabelled at once: .*01.jpg;'):
        semi(dls, 3, unlabelled=[mine/'images'/'01.jpg'], bs=2)
    *lines, call = str(e.value).split('leave it out: ')[1].split('; ')
    names = dict(dls=dls, labelled=pairs, unlabelled=rest, semi=partial(semi, bs=2))
    exec('\n'.join(lines), names)
    task = eval(call, names)
    assert [len(task.train_ds.labelled), len(task.train_ds.unlabelled)] == [6, 12]

def test_labelled_images_are_named_below_folders(tmp_path):
    pairs = [tuple(write(tmp_path/kind/drive/f'{i}.png', scene(i, 32)[k]) for k,kind in enumerate(('i', 'm')))
             for drive in 'abc' for i in range(2)]
    dls = custom_masks(pairs, None, scene_classes, 32, 2, valid=['c/0', 'c/1'], check=False, device='cpu')
    task = semi(dls, ['a/1.png', 'b/0', 0], bs=1)
    assert task.train_ds.labelled.items == [pairs[0], pairs[1], pairs[2]]
    with pytest.raises(ValueError, match="n: '1.png' names 2 images: write 'a/1'"): semi(dls, ['1.png'], bs=1)

def test_published_splits():
    root = data_root()
    if root is None or not (root/'splits').is_dir(): pytest.skip('the published lists are not on this machine')
    assert [[len(o) for o in read_split(root/'splits'/'pascal'/n)] for n in ('92', '1_16')]==[[92, 10490], [662, 9920]]
    assert len(read_list(root/'splits'/'pascal'/'val.txt'))==1449

# --- folders

@pytest.fixture
def mine(tmp_path):
    "20 images in one folder, of several sizes and formats, 8 of them with masks"
    for i in range(20):
        image, mask = scene(i, 40 + 8*(i%3))
        image, mask = image[:40-i%5], mask[:40-i%5]
        write(tmp_path/'images'/(f'{i:02}.jpg' if i%2 else f'{i:02}.png'), image)
        if i<8: write(tmp_path/'masks'/f'{i:02}.png', mask)
    return tmp_path

def load(root, **kwargs):
    return semi_folder(root/'images', root/'masks', **dict(classes=scene_classes, size=32, bs=2, seed=0, device='cpu')
                       | kwargs)

def test_one_folder_some_masks(mine):
    dls = load(mine, valid=['01','02.png'])
    assert [len(dls.train_ds.labelled), len(dls.train_ds.unlabelled), len(dls.valid_ds)]==[6, 12, 2]
    assert {p.stem for p in dls.train_ds.unlabelled.items}=={f'{i:02}' for i in range(8, 20)}
    for _ in range(2):
        for b in dls.train: assert b[2].shape==(2,3,32,32)
    assert not any(b[-1].all() for b in [dls.train.one_batch() for _ in range(8)])   # these images leave margins
    for b in dls.valid: assert 255 in b[1]                     # so do those of the validation set

def test_three_folders(mine):
    for f in sorted((mine/'images').iterdir())[8:]:
        (mine/'pile'/'deep').mkdir(parents=True, exist_ok=True)
        f.rename(mine/'pile'/'deep'/f.name)
    Image.fromarray(scene(50, 40)[0]).convert('L').save(mine/'pile'/'grey.png')
    Image.fromarray(scene(51, 40)[0]).convert('RGBA').save(mine/'pile'/'alpha.png')
    for i in (60, 61):
        write(mine/'test'/'i'/f'{i}.png', scene(i,40)[0])
        write(mine/'test'/'m'/f'{i}.png', scene(i,40)[1])
    dls = load(mine, unlabelled=mine/'pile', valid=(mine/'test'/'i', mine/'test'/'m'))
    assert [len(dls.train_ds.labelled), len(dls.train_ds.unlabelled), len(dls.valid_ds)]==[8, 14, 2]
    passes(dls.train)

def test_colours_suffix_and_void(mine):
    for f in sorted((mine/'masks').iterdir()):
        m = np.array(Image.open(f)); m[0] = 255
        f.unlink(); write(mine/'masks'/f'{f.stem}_mask.png', colorize(m, scene_palette, (9,9,9)))
    dls = load(mine, suffix='_mask', colours={**dict(zip(scene_palette, scene_classes)), (9,9,9): 255}, valid=['01'])
    assert 255 in dls.valid.one_batch()[1] and len(dls.train_ds.labelled)==7

def spoil(root, how):
    "Break something; returns what the message must hold"
    file = root/'masks'/'03.png'
    if how=='label': m = np.array(Image.open(file)); m[3,3] = 42; write(file, m); return '03.png: label 42'
    if how=='size': write(file, np.array(Image.open(file))[5:]); return '03.png: this mask is'
    if how=='lost image': (root/'images'/'03.jpg').unlink(); return '03.png: this mask has no image'
    if how=='web page': (root/'images'/'12.png').write_text('<html>'); return '12.png cannot be read as an image'
    if how=='half a mask': file.write_bytes(file.read_bytes()[:60]); return '03.png cannot be read'
    if how=='half an image': f = root/'images'/'03.jpg'; f.write_bytes(f.read_bytes()[:-400]); return '03.jpg'
    if how=='copy':
        write(root/'images'/'99.png', np.array(Image.open(root/'images'/'02.png')))
        return '99.png, which has the content of .*02.png'
    if how=='no masks': [f.unlink() for f in (root/'masks').iterdir()]; return 'no masks here'
    if how=='other names':
        [f.rename(f.with_name('x'+f.name)) for f in (root/'masks').iterdir()]
        return 'this mask has no image'
    if how=='twins': write(root/'images'/'03.png', scene(3,40)[0]); return 'have one name'

@pytest.mark.parametrize('how', ['label', 'size', 'lost image', 'web page', 'half a mask', 'half an image', 'copy',
                                 'no masks', 'other names', 'twins'])
def test_faults_name_the_file(mine, how):
    with pytest.raises(ValueError, match=spoil(mine, how)): load(mine, valid=['01'])

def test_unlabelled_may_not_be_labelled(mine):
    few = sorted((mine/'images').iterdir())[:8]
    with pytest.raises(ValueError, match=r'labelled and unlabelled at once: .*00.png \(and 6 more\)'):
        semi_folder(few, mine/'masks', scene_classes, mine/'images', 32, 2, valid=['01'])
    with pytest.raises(ValueError, match='for validation and unlabelled at once: .*01.jpg; keep'):
        semi_folder(few, mine/'masks', scene_classes, [few[1], *sorted((mine/'images').iterdir())[8:]], 32, 2,
                    valid=['01'])
    with pytest.raises(ValueError, match='08.png: this image has no mask'): load(mine, unlabelled=mine/'images')

def test_all_have_masks(mine):
    few = sorted((mine/'images').iterdir())[:8]
    with pytest.raises(ValueError, match='all 8 images have masks: pass unlabelled='): pair_some(few, mine/'masks')

@pytest.mark.parametrize('bad', [dict(valid=0), dict(valid=['77']), dict(classes='abc'), dict(classes=['a','a']),
                                 dict(ignore_index=3), dict(bs=0)])
def test_folder_nonsense(mine, bad):
    with pytest.raises((ValueError, TypeError), match=next(iter(bad))): load(mine, **bad)

def test_an_image_that_breaks_later_is_named(mine):
    f = mine/'images'/'13.jpg'
    f.write_bytes(f.read_bytes()[:-300])                      # its header is whole
    dls = load(mine, valid=['01'])
    with pytest.raises(ValueError, match='13.jpg cannot be read as an image'): passes(dls.train, 2)

def test_same_size_is_not_same_content(tmp_path):
    a, b = tmp_path/'a.bin', tmp_path/'b.bin'
    a.write_bytes(b'1234'); b.write_bytes(b'1235')
    check_apart(dict(one=[a], two=[b]))
    b.write_bytes(b'1234')
    with pytest.raises(ValueError, match='one and two at once: .*b.bin, which has the content of .*a.bin'):
        check_apart(dict(one=[a], two=[b]))
