"""Faults of datasets: whatever is broken, the message names the file. The lessons are in nbs/data."""
import gc
import hashlib
import json
import pickle
import random
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.io import savemat
from torch import nn
from fastai.callback.progress import ProgressCallback # noqa: F401, gives Learner its no_bar
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from noisyseg.data import datasets as data_module
from noisyseg.data.datasets import camvid, camvid_classes, coco, sbd, scenes, voc, voc_palette
from noisyseg.data.doctor import check_dataset, class_weights
from noisyseg.data.own import custom_masks
from noisyseg.data.files import (MissingData, as_image, check_sizes, colorize, data_root, denormalize, label_table,
                                 named, pair_files, read_colour_mask, read_image, read_mask, short_names,
                                 stored_values)
from noisyseg.data.loaders import mask_dataloaders
from noisyseg.data.procedural import scene, scene_classes
from noisyseg.train.learner import segmentation_learner
from noisyseg.train.losses import HybridLoss

def write(file, pixels, **kwargs):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file, **kwargs)
    return file

@pytest.fixture
def set8(tmp_path):
    "Eight images and masks, 48x48, whole and right"
    for i in range(8):
        image, mask = scene(i, 48)
        write(tmp_path/'images'/f'{i}.jpg', image)
        write(tmp_path/'masks'/f'{i}.png', mask)
    return tmp_path

def load(root, **kwargs):
    kwargs = dict(classes=scene_classes, size=48, bs=2, device='cpu', augment=False) | kwargs
    return custom_masks(root/'images', root/'masks', **kwargs)

def read_all(dls):
    for dl in dls.loaders:
        for _ in dl: pass

def spoil(root, how):
    "Break file 3; returns the name that the message must hold"
    image, mask = root/'images'/'3.jpg', root/'masks'/'3.png'
    pixels = np.array(Image.open(mask))
    if how=='no mask': mask.unlink(); return '3.jpg'
    if how=='no image': image.unlink(); return '3.png'
    if how=='empty file': image.write_bytes(b''); return '3.jpg'
    if how=='web page': mask.write_text('<html>404 Not Found</html>'); return '3.png'
    if how=='half an image': image.write_bytes(image.read_bytes()[:-300]); return '3.jpg'
    if how=='half a mask': mask.write_bytes(mask.read_bytes()[:len(mask.read_bytes())//2]); return '3.png'
    if how=='flipped bits':
        raw = bytearray(mask.read_bytes())
        for k in range(60, len(raw), 7): raw[k] ^= 255
        mask.write_bytes(raw)
        return '3.png'
    if how=='other size': write(mask, pixels[:40]); return '3.png'
    if how=='label 7': write(mask, np.where(pixels==0, 7, pixels).astype(np.uint8)); return '3.png: label 7'
    if how=='interpolated':
        Image.fromarray(pixels*40).resize((48,48), Image.BILINEAR, box=(1.5,1.5,47,47)).save(mask)
        return '3.png: label'
    if how=='colours': write(mask, colorize(pixels, voc_palette)); return '3.png'
    if how=='16-bit mask': write(mask, pixels.astype(np.uint16)*1000); return '3.png: label'
    if how=='JPEG mask': mask.unlink(); write(root/'masks'/'3.jpg', pixels, quality=90); return '3.jpg'
    if how=='16-bit image': image.unlink(); write(root/'images'/'3.png', pixels.astype(np.uint16)); return '3.png'
    if how=='twice': write(root/'images'/'3.png', np.array(Image.open(image))); return '3.png'
    if how=='no images': [f.unlink() for f in (root/'images').iterdir()]; return 'images'
    if how=='no folder': (root/'masks').rename(root/'labels'); return 'masks'

faults = ['no mask', 'no image', 'empty file', 'web page', 'half an image', 'half a mask', 'flipped bits',
    'other size', 'label 7',
          'interpolated', 'colours', '16-bit mask', 'JPEG mask', '16-bit image', 'twice', 'no images', 'no folder']

@pytest.mark.parametrize('how', faults)
def test_fault_names_the_file(set8, how):
    read_all(load(set8))                    # fine before
    named = spoil(set8, how)
    with pytest.raises(ValueError) as e: read_all(load(set8))
    assert named in str(e.value)

def test_fault_in_a_worker_process_names_the_file(set8):
    spoil(set8, 'label 7')
    with pytest.raises(ValueError, match='3.png: label 7'): read_all(load(set8, num_workers=1))

def test_check_dataset_names_all(set8):
    spoil(set8, 'half an image')
    write(set8/'masks'/'5.png', np.full((48,48), 200, np.uint8))
    with pytest.raises(ValueError) as e: check_dataset(load(set8, check=False), progress=False)
    assert all(part in str(e.value) for part in ('2 faulty of 8', '3.jpg', '5.png: label 200'))
    pairs = pair_files(set8/'images', set8/'masks')
    with pytest.raises(ValueError, match='2 faulty of 8'): check_dataset(pairs, scene_classes, progress=False)
    with pytest.raises(TypeError, match='classes='): check_dataset(pairs)

def test_hidden_and_foreign_files_are_not_images(set8):
    (set8/'images'/'.DS_Store').write_text('x')
    (set8/'images'/'readme.txt').write_text('x')
    assert len(load(set8).train_ds)==6

def test_colour_masks(set8):
    for f in (set8/'masks').iterdir(): write(f, colorize(np.array(Image.open(f)), voc_palette))
    colours = dict(zip(voc_palette, scene_classes))
    read_all(load(set8, colours=colours))
    del colours[voc_palette[1]]
    with pytest.raises(ValueError, match=r'png: colour \(128, 0, 0\)'): read_all(load(set8, colours=colours))
    with pytest.raises(ValueError, match='colours has'): load(set8, colours={(0,0,0): 'house'})

nonsense = [dict(bs=0), dict(bs='4'), dict(bs=True), dict(size=0), dict(size=(48,)), dict(size=4.5),
    dict(num_workers=-1), dict(seed=-1),
    dict(seed='x'), dict(zoom=(2,1)), dict(zoom=1), dict(augment=3), dict(stats=([0],[1])), dict(valid=0),
        dict(valid=2),
    dict(valid=['nobody']), dict(valid=[str(i) for i in range(8)]), dict(classes='abc'), dict(classes=[]),
        dict(classes=['a','a']),
    dict(ignore_index=3), dict(ignore_index=300), dict(ignore_index=None), dict(valid_seed=-1), dict(nonsense=1)]

@pytest.mark.parametrize('kwargs', nonsense)
def test_nonsense_for_custom_masks(set8, kwargs):
    with pytest.raises((ValueError, TypeError)) as e: load(set8, **kwargs)
    assert next(iter(kwargs)) in str(e.value)

@pytest.mark.parametrize('kwargs', [dict(n_train=0), dict(n_valid=-1), dict(n_train=2.5), dict(size=0),
    dict(size='96'), dict(bs=0),
    dict(seed=-1), dict(classes=[]), dict(classes=['cube']), dict(classes='disc'), dict(augment='yes')])
def test_nonsense_for_scenes(kwargs):
    with pytest.raises((ValueError, TypeError)) as e: scenes(**dict(n_train=2, n_valid=2) | kwargs)
    assert next(iter(kwargs)) in str(e.value)

zeros, bytes_ = np.zeros((2,2)), np.zeros((2,2), int)
calls = dict(voc_split=lambda: voc(split='nope'), voc_year=lambda: voc(year=1999),
    voc_valid=lambda: voc(valid_split=None),
    sbd_split=lambda: sbd(split='trainaug'), camvid_path=lambda: camvid(path=3), no_classes=lambda: label_table(0),
    many_classes=lambda: label_table(300), ignored_class=lambda: label_table(5, 2), codes=lambda: label_table(3,
        codes={0: 9}),
    no_file=lambda: read_image(None), number_as_file=lambda: read_mask(3, label_table(2)),
        pairs=lambda: pair_files(3, 4),
    array=lambda: denormalize(np.zeros((3,4,4)), ([0],[1])), flat=lambda: denormalize(torch.zeros(2,2), ([0],[1])),
    logits=lambda: colorize(zeros, voc_palette), negative=lambda: colorize(bytes_ - 1, voc_palette),
    palette=lambda: colorize(bytes_, [1,2,3]), check=lambda: check_dataset(3))

@pytest.mark.parametrize('call', calls.values(), ids=calls.keys())
def test_nonsense_elsewhere(call):
    with pytest.raises((ValueError, TypeError)): call()

def test_wrong_folders(tmp_path, monkeypatch):
    for f in (camvid, voc, sbd):
        with pytest.raises(MissingData, match=str(tmp_path)): f(tmp_path)
    monkeypatch.setenv('NOISYSEG_DATA', str(tmp_path/'nowhere'))
    with pytest.raises(MissingData, match='NOISYSEG_DATA'): data_root()
    monkeypatch.setenv('NOISYSEG_DATA', str(tmp_path))
    assert data_root()==tmp_path
    (tmp_path/'camvid'/'train'/'images').mkdir(parents=True)
    with pytest.raises(MissingData, match='images'): camvid()

def test_no_folder_is_searched_but_the_one_that_is_named(tmp_path, monkeypatch):
    (tmp_path/'shared'/'data').mkdir(parents=True)
    monkeypatch.delenv('NOISYSEG_DATA', raising=False)
    monkeypatch.chdir(tmp_path)
    assert data_root() is None

def test_without_a_network(tmp_path, monkeypatch):
    "Says that it failed, why, and what to do; asks nothing of the network where download=False"
    monkeypatch.setenv('NOISYSEG_DATA', str(tmp_path))
    monkeypatch.setattr(data_module, 'fastai_path', lambda _: tmp_path/'fastai')
    asked = []
    def refuse(*args, **kwargs):
        asked.append(args)
        raise OSError('Network is unreachable')
    monkeypatch.setattr('noisyseg.data.archives.build_opener', refuse)
    for f in (camvid, voc, sbd):
        with pytest.raises(MissingData, match=r'(?s)Network is unreachable.*NOISYSEG_DATA.*scenes\(\)'): f()
    assert len(asked)==3
    for f in (camvid, voc, sbd):
        with pytest.raises(MissingData, match='download=False'): f(download=False)
    assert len(asked)==3

def make_sbd(root, mask, names=('a','b','c')):
    for n in names:
        write(root/'img'/f'{n}.jpg', scene(0, 48)[0])
        struct = np.zeros((1,1), [('Segmentation', object)])
        struct[0,0] = (mask,)
        (root/'cls').mkdir(exist_ok=True)
        savemat(root/'cls'/f'{n}.mat', dict(GTcls=struct))
    (root/'train.txt').write_text('a\nb\n')
    (root/'val.txt').write_text('c\n')
    return root

def test_sbd_faults(tmp_path):
    mask = scene(0, 48)[1]
    root = make_sbd(tmp_path/'sbd', mask)
    dls = sbd(root, size=48, bs=1, augment=False, device='cpu')
    read_all(dls)
    (root/'train_noval.txt').write_text('a\nc\nb\n')
    with pytest.raises(ValueError, match='nothing is left'): sbd(root, split='train_noval')
    (root/'val.txt').write_text('b\nc\n')
    with pytest.warns(UserWarning, match='1 images'): assert len(sbd(root, size=48, bs=1, device='cpu').valid_ds)==1
    file = root/'cls'/'a.mat'
    whole = file.read_bytes()
    file.write_bytes(whole[:200])
    with pytest.raises(ValueError, match='a.mat'): read_all(dls)
    savemat(file, dict(other=1))
    with pytest.raises(ValueError, match='a.mat'): read_all(dls)
    make_sbd(root, mask[:40], 'a')
    with pytest.raises(ValueError, match='a.mat: this mask is 48x40'): read_all(dls)
    make_sbd(root, mask+20, 'a')
    with pytest.raises(ValueError, match='a.mat: label'): read_all(dls)
    file.unlink()
    with pytest.raises(MissingData, match='a.mat'): sbd(root, valid_split='val')

def test_camvid_of_other_classes(tmp_path):
    for s in ('train','val'):
        write(tmp_path/s/'images'/'a.png', scene(0, 48)[0])
        write(tmp_path/s/'labels'/'a.png', np.full((48,48), 12, np.uint8))
    with pytest.raises(ValueError, match=r'a.png: label 12 .* allowed are 0-11'): camvid(tmp_path, size=48).one_batch()
    assert len(camvid_classes)==11

def test_scenes_are_the_same_bytes_in_another_process():
    code = ("import hashlib; from noisyseg.data.procedural import scene; "
            "print(hashlib.sha1(b''.join(a.tobytes() for i in range(5) for a in scene(i))).hexdigest())")
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip()
    assert out==hashlib.sha1(b''.join(a.tobytes() for i in range(5) for a in scene(i))).hexdigest()

def test_train_and_valid_share_no_scene():
    dls = scenes(30, 30)
    key = lambda ds: {image.tobytes() for image,_ in ds.items}
    assert len(key(dls.train_ds))==len(key(dls.valid_ds))==30 and not key(dls.train_ds) & key(dls.valid_ds)

def test_seed_none_follows_torch(set8):
    def first():
        torch.manual_seed(5)
        return load(set8, augment=True).train.one_batch()[0]
    a, b = first(), first()
    assert torch.equal(a, b) and not torch.equal(a, load(set8, augment=True).train.one_batch()[0])

def test_cache_changes_nothing(set8):
    batches = lambda **kw: [x for _ in range(2) for x,_ in load(set8, augment=True, seed=1, **kw).train]
    plain = batches()
    for kw in (dict(cache=True), dict(cache=True, num_workers=2), dict(num_workers=1)):
        assert all(torch.equal(a, b) for a,b in zip(plain, batches(**kw), strict=True))

def test_pickle_new_and_device(set8):
    dls = load(set8, augment=True, seed=1)
    assert torch.equal(pickle.loads(pickle.dumps(dls.train_ds)).item(0, 4)[0], dls.train_ds.item(0, 4)[0])
    assert isinstance(dls.train.new(shuffle=False), DataLoader) and dls.new_empty().vocab==scene_classes
    assert dls.to('cpu').train.device==torch.device('cpu') and dls.one_batch()[0].device.type=='cpu'

class Toy(nn.Sequential):
    def __init__(self, n): super().__init__(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8,
        n, 1))

def fit_one(dls):
    loss = lambda p,y: F.cross_entropy(p, y, ignore_index=-100 if dls.ignore_index is None else dls.ignore_index)
    learn = Learner(dls, Toy(dls.n_classes), loss_func=loss)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    assert np.isfinite(learn.recorder.values[-1]).all()
    return learn

def test_learner_on_scenes_and_pictures_of_results():
    import matplotlib
    matplotlib.use('agg')
    learn = fit_one(scenes(32, 16, size=48))
    learn.show_results(max_n=3)
    learn.dls.show_batch(max_n=2)
    assert len(learn.get_preds()[0])==16
    gc.collect()

def test_learner_on_camvid():
    if not (data_root() and (data_root()/'camvid').is_dir()): pytest.skip('CamVid is not on this machine')
    dls = camvid(size=(45,60), seed=0)
    dls = DataLoaders(dls.train.new(n=16), dls.valid.new(n=8))
    fit_one(dls)
    x, y = dls.valid.one_batch()
    assert x.shape==(8,3,45,60) and y.dtype==torch.int64 and set(y.unique().tolist())<=set(range(12))

def test_sizes_in_headers(set8):
    check_sizes(pair_files(set8/'images', set8/'masks'))
    assert read_colour_mask(write(set8/'c.png', np.zeros((4,4,3), np.uint8)), {(0,0,0): 2}).tolist()==[[2]*4]*4


# --- files as the world writes them

def set_of(root, save_image=None, save_mask=None, n=8, classes=('ground', 'thing'), **kwargs):
    "A set of two classes whose files are written by these functions of (path without ending, pixels)"
    for i in range(n):
        image, mask = scene(i, 48)
        for kind, save, pixels in (('images', save_image, image), ('masks', save_mask, (mask > 0).astype(np.uint8))):
            (root/kind).mkdir(parents=True, exist_ok=True)
            (save or (lambda p, x: Image.fromarray(x).save(f'{p}.png')))(root/kind/f'{i}', pixels)
    kwargs = dict(size=48, bs=2, device='cpu', augment=False, seed=0) | kwargs
    return custom_masks(root/'images', root/'masks', list(classes), **kwargs)

def truth(dls): return torch.cat([y for _, y in dls.valid]).as_subclass(torch.Tensor)

masks = dict(
    one_bit=lambda p, m: Image.fromarray(m > 0).save(f'{p}.png'),
    palette=lambda p, m: _palette(p, m),
    sixteen_bits=lambda p, m: Image.fromarray(m.astype(np.uint16)).save(f'{p}.png'),
    grey_rgb=lambda p, m: Image.fromarray(np.stack([m]*3, -1)).save(f'{p}.png'),
    grey_rgba=lambda p, m: Image.fromarray(np.stack([m]*3 + [m*0 + 255], -1)).save(f'{p}.png'),
    tiff=lambda p, m: Image.fromarray(m).save(f'{p}.tif'),
    bmp=lambda p, m: Image.fromarray(m).save(f'{p}.bmp'),
    array=lambda p, m: np.save(f'{p}.npy', m))

def _palette(p, m):
    im = Image.fromarray(m)
    im.putpalette([0, 0, 0, 200, 30, 30])
    im.save(f'{p}.png', bits=1)

@pytest.mark.parametrize('form', masks)
def test_masks_of_all_forms_are_the_same_labels(tmp_path, form):
    plain = set_of(tmp_path/'plain')
    assert torch.equal(truth(set_of(tmp_path/form, save_mask=masks[form])), truth(plain))

@pytest.mark.parametrize('form', [dict(kind='jpg', quality=95), dict(kind='webp', quality=80), dict(kind='avif'),
                                  dict(kind='jp2', quality_mode='rates', quality_layers=[20])],
                         ids=lambda f: f['kind'])
def test_masks_through_lossy_files_are_refused(tmp_path, form):
    def save(p, m): Image.fromarray(m).save(f'{p}.{form["kind"]}', **{k: v for k, v in form.items() if k != 'kind'})
    with pytest.raises(ValueError, match=r"(?s)8 faulty of 8.*save\('mask.png'\).*and 7 more"):
        set_of(tmp_path, save_mask=save)

def test_a_mask_of_floats_is_told_how_it_becomes_one(tmp_path):
    file = tmp_path/'mask.tif'
    labels = np.arange(4, dtype=np.uint8).reshape(2, 2)
    Image.fromarray(labels.astype(np.float32)).save(file)
    with pytest.raises(ValueError, match='a mask of floating-point numbers') as e: stored_values(file)
    line = str(e.value).split('class numbers: ')[1].replace("'mask.png'", 'done')
    exec(line, dict(Image=Image, np=np, file=file, done=tmp_path/'mask.png'))
    assert np.array_equal(stored_values(tmp_path/'mask.png'), labels)

@pytest.mark.parametrize('white,dtype', [(1, np.float32), (255, np.float32), (255, np.int64), (65535, np.uint16),
                                         (65535, np.int32)])
def test_the_line_that_makes_bytes_keeps_the_picture(white, dtype):
    image = (np.linspace(0, 1, 48).reshape(4, 4, 3)*white).astype(dtype)
    with pytest.raises(ValueError, match=f'If white is {white}, return ') as e: as_image(image)
    x = eval(str(e.value).split(', return ')[1], dict(image=image, np=np))
    assert np.abs(x/255 - np.linspace(0, 1, 48).reshape(4, 4, 3)).max() < 0.01

def test_the_line_that_reads_floats_keeps_the_picture(tmp_path):
    Image.fromarray(np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)).save(tmp_path/'x.tif')
    with pytest.raises(ValueError, match='read_image=lambda') as e: read_image(tmp_path/'x.tif')
    read = eval(str(e.value).split('pass read_image=')[1], dict(Image=Image, np=np))
    assert np.array_equal(read(tmp_path/'x.tif'), np.linspace(0, 255, 16).round().reshape(4, 4))

images = dict(
    grey=lambda p, x: Image.fromarray(x).convert('L').save(f'{p}.png'),
    rgba=lambda p, x: Image.fromarray(x).convert('RGBA').save(f'{p}.png'),
    palette=lambda p, x: Image.fromarray(x).quantize(16).save(f'{p}.png', bits=4),
    array=lambda p, x: np.save(f'{p}.npy', x), tiff=lambda p, x: Image.fromarray(x).save(f'{p}.tif'))

@pytest.mark.parametrize('form', images)
def test_images_of_all_forms_have_three_channels(tmp_path, form):
    x = set_of(tmp_path, save_image=images[form]).valid.one_batch()[0]
    assert x.shape == (2, 3, 48, 48)

def test_images_of_other_channels(tmp_path):
    dls = set_of(tmp_path, save_image=lambda p, x: np.save(f'{p}.npy', np.concatenate([x, x[..., :2]], -1)),
        augment=True)
    x = dls.one_batch()[0]
    assert x.shape == (2, 5, 48, 48) and len(dls.stats[0]) == 5
    dls.show_batch()

def test_sixteen_bit_images_say_what_to_do(tmp_path):
    def save(p, x): Image.fromarray(x.mean(-1).astype(np.uint16)*257).save(f'{p}.png')
    with pytest.raises(ValueError, match=r'/257\)'): set_of(tmp_path, save).one_batch()
    read = lambda f: (np.array(Image.open(f))/257).astype(np.uint8)
    assert set_of(tmp_path, save, read_image=read).one_batch()[0].shape == (2, 1, 48, 48)

@pytest.mark.parametrize('turn', [Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270])
def test_photos_are_upright(tmp_path, turn):
    "A phone stores what the sensor saw and how to turn it; the mask was drawn on what one sees"
    orientation = {Image.Transpose.ROTATE_90: 6, Image.Transpose.ROTATE_180: 3, Image.Transpose.ROTATE_270: 8}[turn]
    def save(p, x):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(x[:40]).transpose(turn).save(f'{p}.png', exif=exif)
    drawn = lambda p, m: Image.fromarray(m[:40]).save(f'{p}.png')
    dls = set_of(tmp_path/'a', save, drawn)
    plain = set_of(tmp_path/'b', lambda p, x: Image.fromarray(x[:40]).save(f'{p}.png'), drawn)
    for a, b in zip(dls.valid, plain.valid): assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    assert any('EXIF' in f for f in check_dataset(dls, progress=False, verbose=False).attrs['findings'])

def test_a_mask_that_lies_on_its_side_says_how_to_turn_it(tmp_path):
    with pytest.raises(ValueError, match='transpose'):
        set_of(tmp_path, lambda p, x: Image.fromarray(x[:40]).save(f'{p}.png'),
               lambda p, m: Image.fromarray(np.rot90(m[:40])).save(f'{p}.png'))

def test_codes_and_masks_of_a_paint_tool(tmp_path):
    paint = lambda p, m: Image.fromarray(m*255).save(f'{p}.png')
    with pytest.raises(ValueError, match='codes={0: 0, 255: 1}'): set_of(tmp_path, save_mask=paint)
    for codes in ({0: 0, 255: 1}, {0: 'ground', 255: 'thing'}):
        assert torch.equal(truth(set_of(tmp_path, save_mask=paint, codes=codes)), truth(set_of(tmp_path/'plain')))
    with pytest.raises(ValueError, match='codes has 255'): set_of(tmp_path, save_mask=paint, codes={255: 'roof'})
    with pytest.raises(ValueError, match='pass one of them'): set_of(tmp_path, codes={0: 0}, colours={(0, 0, 0): 0})

@pytest.mark.parametrize('rename, mend', [
    (lambda n: f'{n}_mask', "suffix='_mask'"), (lambda n: f'{n}.jpg', "suffix='.jpg'"),
    (lambda n: f'label_{n}', r"such as 'label_0'.*\[\(image, mask\), ...\], None, classes")])
def test_masks_of_other_names_say_how_to_pair_them(set8, rename, mend):
    for f in (set8/'masks').iterdir(): f.rename(f.with_name(rename(f.stem) + '.png'))
    with pytest.raises(MissingData, match=f'0.jpg: this image has no mask.*{mend}'): load(set8)
    if 'suffix' not in mend: return
    assert len(load(set8, suffix=mend.split("'")[1]).train_ds) == 6

def test_a_few_classes_of_many(set8):
    "All values are told at once, and the line that is offered works"
    with pytest.raises(ValueError, match=r'(?s)8 faulty of 8.*hold the values 0 \(in 8\).* 6 \(in') as e:
        load(set8, classes=['ground', 'box'])
    line = re.search(r'codes=(.*)$', str(e.value))[1].replace('...', "2: 'box'")
    y = next(iter(load(set8, classes=['ground', 'box'], codes=eval(line), augment=False).valid))[1]
    assert set(y.unique().tolist()) == {0, 1, 255}

def test_a_single_class_is_no_task(set8):
    "With 255 for what does not count, all foreground would be lost, and every score perfect"
    for f in (set8/'masks').iterdir(): write(f, 255*(np.array(Image.open(f)) > 0).astype(np.uint8))
    with pytest.raises(ValueError, match=r"classes=\['background', 'thing'\].*codes={0: 0, 255: 1}"):
        load(set8, classes=['thing'])

def test_names_are_compared_as_they_look(tmp_path):
    from unicodedata import normalize
    def named(form, save): return lambda p, x: Image.fromarray(x).save(p.with_name(normalize(form,
        f'Zürich_{p.name}.png')))
    dls = set_of(tmp_path, named('NFC', 0), named('NFD', 0), valid=[normalize('NFD', 'Zürich_3')])
    assert len(dls.train_ds) == 7

@pytest.mark.parametrize('valid', [lambda name: True, '3', Path('3')], ids=['function', 'text', 'path'])
def test_what_is_held_out_is_a_share_or_a_list(tmp_path, valid):
    with pytest.raises(TypeError, match=r'valid: expected a share, or a list of names.*`valid=0.2`'):
        set_of(tmp_path, valid=valid)

@pytest.mark.parametrize('turn', [lambda x: x[..., ::-1], np.fliplr, np.rot90, lambda x: x[::2, ::2],
    np.asfortranarray],
                         ids=['bgr', 'fliplr', 'rot90', 'every other', 'fortran'])
def test_read_functions_may_return_views(turn):
    from noisyseg.data.loaders import mask_dataloaders
    flat = lambda y: turn(np.stack([y]*3, -1))[..., 0]
    read = lambda i: (lambda x, y: (turn(x), flat(y)))(*scene(i, 48))
    x, y = mask_dataloaders(range(8), range(8, 12), read, scene_classes, voc_palette[:7], 255, size=32, bs=2,
                            device='cpu').one_batch()
    assert x.shape == (2, 3, 32, 32) and y.shape == (2, 32, 32)

def test_a_postscript_file_starts_no_program(tmp_path, monkeypatch):
    gs = tmp_path/'gs'
    gs.write_text(f'#!/bin/sh\ntouch {tmp_path}/ran\n')
    gs.chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}:/usr/bin:/bin')
    for name in ('photo.png', 'photo.eps'):
        (tmp_path/name).write_text('%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n')
        with pytest.raises(ValueError, match=name): read_image(tmp_path/name)
    assert not (tmp_path/'ran').exists()

@pytest.mark.parametrize('ending', ['png', 'tif', 'gif', 'bmp'])
def test_numbers_whose_colours_differ_from_file_to_file(tmp_path, ending):
    "'Indexed colour', as programs save it: the numbers are no labels"
    colours = np.array([(0, 0, 0), (255, 0, 0)], np.uint8)
    def save(p, m, turn=lambda i: i%2):
        flip = turn(int(p.name))
        im = Image.fromarray((m ^ flip).astype(np.uint8)).convert('P')
        im.putpalette(colours[[flip, 1-flip]].tobytes())
        im.save(f'{p}.{ending}')
    with pytest.raises(ValueError, match=r'is the colour \(.*colours={\(.*codes={') as e:
        set_of(tmp_path, save_mask=save)
    line = re.search(r'colours=({.*?}).', str(e.value))[1].replace(', ...', '')
    line = line.replace('(0, 0, 0): class', "(0, 0, 0): 'ground'").replace('(255, 0, 0): class', "(255, 0, 0): 'thing'")
    right = truth(set_of(tmp_path/'plain'))
    assert torch.equal(truth(set_of(tmp_path, save_mask=save, colours=eval(line))), right)
    as_labels = eval(re.search(r'codes=({.*})$', str(e.value))[1])
    assert len(set_of(tmp_path, save_mask=save, codes=as_labels).train_ds) == 6
    same = set_of(tmp_path/'same', save_mask=lambda p, m: save(p, m, lambda i: 0))
    assert torch.equal(truth(same), right)

def test_numbers_of_differing_colours_beyond_the_classes(tmp_path):
    "Then the numbers are not out of range: they are no labels"
    def save(p, m):
        im = Image.fromarray(m*2).convert('P')
        im.putpalette([0]*6 + [*[(255, 0, 0), (0, 255, 0)][int(p.name)%2]])
        im.save(f'{p}.png')
    with pytest.raises(ValueError, match=r'is the colour .*colours='): set_of(tmp_path, save_mask=save)

@pytest.mark.parametrize('dtype, void, save', [
    (np.uint16, 65535, lambda f, y: Image.fromarray(y).save(f'{f}.png')),
    (np.int32, -1, lambda f, y: Image.fromarray(y).save(f'{f}.tif'))])
def test_numbers_that_are_no_bytes(tmp_path, dtype, void, save):
    "The line that is offered mends the file"
    def marked(m): y = m.astype(dtype); y[:5] = void; return y
    with pytest.raises(ValueError, match=f'label {void} on .*Stored values are bytes') as e:
        set_of(tmp_path, save_mask=lambda p, m: save(p, marked(m)))
    assert 'All masks together' not in str(e.value)
    for mask in (tmp_path/'masks').iterdir():
        exec(re.search(r'as they are: (.*?) \(and', str(e.value))[1], dict(mask=mask, np=np, Image=Image))
    y = np.stack([read_mask(f, label_table(2, 255)) for f in (tmp_path/'masks').iterdir()])
    assert (y[:, :5] == 255).all() and set(np.unique(y[:, 5:])) == {0, 1}

@pytest.mark.parametrize('codes', [None, {0: 0, 1: 1}, {0: 1, 1: 0}])
def test_what_does_not_count_is_offered_as_it_works(tmp_path, codes):
    def save(p, m): m[:5] = 7; Image.fromarray(m).save(f'{p}.png')
    with pytest.raises(ValueError, match='label 7 .* where it does not count') as e:
        set_of(tmp_path, save_mask=save, codes=codes, ignore_index=2)
    lines = re.findall(r'codes={\.\.\., 7: ignore_index}|ignore_index=7', str(e.value))
    assert lines[-1] == 'codes={..., 7: ignore_index}' and (codes is not None or lines[0] == 'ignore_index=7')
    dls = set_of(tmp_path, save_mask=save, codes=(codes or {0: 0, 1: 1}) | {7: 2}, ignore_index=2)
    assert 2 in truth(dls)
    if codes is None: assert 7 in truth(set_of(tmp_path, save_mask=save, ignore_index=7))

# --- which images are meant, and no image on two sides

@pytest.fixture
def drives(tmp_path):
    "Two frames of the same names in each of three folders"
    for drive in 'abc':
        for n in ('001', '002'):
            write(tmp_path/'images'/drive/f'{n}.png', scene(ord(drive), 32)[0])
            write(tmp_path/'masks'/drive/f'{n}.png', scene(ord(drive), 32)[1])
    return tmp_path

def sides(root, images='images', masks='masks', **kwargs):
    "Names of the images that are trained on, and of those that are validated on"
    dls = custom_masks(root/images, root/masks, scene_classes, size=32, bs=1, check=False, device='cpu', **kwargs)
    return [[i.relative_to(root/'images').with_suffix('').as_posix() for i,_ in dl.dataset.items] for dl in dls.loaders]

def test_names_below_folders(drives):
    for valid in (['a/001.png', 'a/002'], [f'images/a/00{i}.png' for i in (1, 2)], [*(drives/'images'/'a').iterdir()]):
        assert sides(drives, valid=valid)[1] == ['a/001', 'a/002']
    by_drive = sides(drives, groups=lambda name: name.split('/')[0], valid=0.34)[1]
    assert by_drive in [[f'{d}/001', f'{d}/002'] for d in 'abc']
    with pytest.raises(ValueError, match=r"valid: '001.png' names 3 images: write 'a/001'"):
        sides(drives, valid=['001.png'])
    with pytest.raises(ValueError, match="valid names 'd/001', which is none of the 6.* as 'a/001'"):
        sides(drives, valid=['d/001'])

def test_a_longer_name_always_helps(tmp_path):
    "Even where the folder itself has an image of that name: then it is the whole path"
    files = [tmp_path/'1.png', tmp_path/'sub'/'1.png', tmp_path/'2.v.png']
    with pytest.raises(ValueError, match=f"write '{tmp_path.as_posix()}/1.png'"): named(files, ['1'])
    assert named(files, [tmp_path/'1.png', '2.v']) == {0, 2} and named(files, ['sub/1.jpg']) == {1}
    assert short_names(files) == ['1', 'sub/1', '2.v'] and short_names([]) == []

def test_folders_of_validation_inside_of_the_others(drives):
    with pytest.raises(ValueError, match=r'to train on and for validation at once: .*a/001.png \(and 1 more\)') as e:
        sides(drives, valid=(drives/'images'/'a', drives/'masks'/'a'))
    line = re.search(r'hold them out, valid=(.*), or pass', str(e.value))[1]
    assert sides(drives, valid=eval(line))[1] == ['a/001', 'a/002']
    with pytest.raises(ValueError, match='leave groups= out'):
        sides(drives, valid=(drives/'images'/'a', drives/'masks'/'a'), groups=lambda name: name)

def test_names_do_not_tear_groups(drives):
    with pytest.raises(ValueError, match='1 of the same are left to train on') as e:
        sides(drives, valid=['a/001'], groups=lambda name: name.split('/')[0])
    line = re.search(r'valid=(.*), or leave', str(e.value))[1]
    assert sides(drives, valid=eval(line, dict(valid=['a/001'])), groups=lambda name: name.split('/')[0])[1] == [
        'a/001', 'a/002']

def test_masks_of_two_people_stay_on_one_side(set8):
    pairs = [(set8/'images'/f'{i}.jpg', set8/'masks'/f'{m}.png') for i in range(4) for m in (i, i+4)]
    for kwargs in (*(dict(valid=0.3, valid_seed=s) for s in range(4)), dict(valid=['2'])):
        dls = custom_masks(pairs, None, scene_classes, size=32, bs=2, check=False, device='cpu', **kwargs)
        train, valid = ([i for i,_ in dl.dataset.items] for dl in dls.loaders)
        assert len(train)+len(valid) == 8 and not {*train} & {*valid}

# --- COCO's polygons

def polygons(root, name, ids, categories):
    "A file of images with a square of each of the first two categories"
    square = lambda x: [[x, 4, x+10, 4, x+10, 14, x, 14]]
    found = [dict(id=2*i+k+1, image_id=i, category_id=c['id'], iscrowd=0, area=100, segmentation=square(4+12*k))
             for i in ids for k,c in enumerate(categories[:2])]
    for i in ids: write(root/f'{i}.png', scene(i, 32)[0])
    images = [dict(id=i, file_name=f'{i}.png', width=32, height=32) for i in ids]
    (root/name).write_text(json.dumps(dict(images=images, categories=categories, annotations=found)))
    return root/name

@pytest.mark.parametrize('names, vocab, labels', [
    (('_background_', 'road', 'car'), ['background', 'road', 'car'], {0, 1}),
    (('road', 'Background'), ['background', 'road'], {0, 1}),
    (('gap', 'cell', 'cell'), ['background', 'gap', 'cell'], {0, 1, 2}),
    (('cell', 'cell'), ['background', 'cell'], {0, 1})])
def test_polygons_of_the_background_and_of_one_name(tmp_path, names, vocab, labels):
    pytest.importorskip('pycocotools')
    categories = [dict(id=i, name=name) for i,name in enumerate(names)]
    a, v = (polygons(tmp_path, f, ids, categories) for f,ids in (('a.json', (0, 1)), ('v.json', (2, 3))))
    dls = coco(a, tmp_path, v, size=32, bs=2, device='cpu')
    assert dls.vocab == vocab
    for ds in (dls.train_ds, dls.valid_ds): assert {*np.unique(ds.read(ds.items[0])[1]).tolist()} == labels

def test_polygons_on_both_sides(tmp_path, monkeypatch):
    "The line that is offered makes two files of one"
    pytest.importorskip('pycocotools')
    monkeypatch.chdir(tmp_path)
    file = polygons(tmp_path, 'a.json', range(6), [dict(id=3, name='road'), dict(id=5, name='car')])
    with pytest.raises(ValueError, match=r'to train on and for validation at once: .*0.png \(and 5 more\)') as e:
        coco(file, tmp_path, file)
    exec(str(e.value).split('make two files of one: ')[1], dict(json=json, Path=Path))
    dls = coco('train.json', tmp_path, 'valid.json', size=32, bs=2, device='cpu')
    assert [[i[1].stem for i in dl.dataset.items] for dl in dls.loaders] == [['2', '3', '4', '5'], ['0', '1']]

# --- randomness

@pytest.mark.parametrize('draw', [torch.rand, np.random.rand, lambda n: [random.random() for _ in range(n)],
                                  np.random.randn], ids=['torch', 'numpy', 'random', 'normal'])
def test_an_augmentation_of_yours_may_draw_from_any_generator(draw):
    "An item depends on (seed, epoch, i) alone, and nothing has been drawn outside"
    def augment(x, y): return (x + int(100*abs(float(draw(1)[0])))).to(torch.uint8), y
    items = [(np.full((32, 32, 3), 10*i, np.uint8), np.zeros((32, 32), np.uint8)) for i in range(4)]
    make = partial(mask_dataloaders, items, items, lambda o: o, ['a'], [(0, 0, 0)], 255, 32, 2, augment)
    first = lambda dls, *at: dls.train_ds.item(*at)[0].flatten()[0].item()
    one, other = make(seed=0), make(seed=1)
    for g in (torch.manual_seed, np.random.seed, random.seed): g(3)
    untouched = [float(draw(1)[0]) for _ in range(4)]
    for g in (torch.manual_seed, np.random.seed, random.seed): g(3)
    values, seen = [], []
    for _ in range(4):
        values.append(float(draw(1)[0]))
        seen.append(first(one, 1, 0))
    assert values == untouched and len({*seen}) == 1
    assert len({first(d, 1, e) for d in (one, other) for e in range(3)}) > 1

def test_strong_views_of_yours_may_draw_from_any_generator():
    from noisyseg.data.semi_supervised import ViewDataset
    strong = lambda x: (x*0 + np.random.randint(200) + random.randint(0, 50)).to(torch.uint8)
    ds = ViewDataset([np.zeros((32, 32, 3), np.uint8)], lambda o: o, (32, 32), strong=strong, seed=1)
    assert len({int(ds.item(0, 0)[1].flatten()[0]) for _ in range(4)}) == 1
    assert len({int(ds.item(0, e)[k].flatten()[0]) for e in range(4) for k in (1, 2)}) > 2

# --- the doctor

def test_groups_stay_on_one_side(tmp_path):
    dls = set_of(tmp_path, groups=lambda name: int(name)//4, valid=0.5)
    sides = [{int(i.stem)//4 for i, _ in dl.dataset.items} for dl in dls.loaders]
    assert not sides[0] & sides[1]
    with pytest.raises(ValueError, match='one group'): set_of(tmp_path, groups=lambda name: 0)

def test_a_class_without_a_pixel_is_an_error_at_the_door(tmp_path):
    with pytest.raises(ValueError, match="no pixel of 'roof' in the 6 training masks"):
        set_of(tmp_path, classes=('ground', 'thing', 'roof'))
    set_of(tmp_path, classes=('ground', 'thing', 'roof'), check=False)

def test_frames_of_one_film_on_both_sides_are_a_finding(tmp_path):
    "A random split of a film is flagged, a split by film is not, and neither are unrelated pictures with numbers"
    from noisyseg.data.loaders import mask_dataloaders
    def write_films(films, step):
        for film in range(films):
            canvas, labels = scene(100 + film, 160)
            for k in range(12):
                at = k*step
                write(tmp_path/'i'/f'{film}_{k:03}.png', canvas[at:at+64, at:at+64])
                write(tmp_path/'m'/f'{film}_{k:03}.png', labels[at:at+64, at:at+64])
    write_films(4, 2)
    load = partial(custom_masks, tmp_path/'i', tmp_path/'m', scene_classes, size=64, bs=2, check=False)
    from noisyseg.data.doctor import relatives, survey
    def found(**kw):
        dls = load(**kw)
        return relatives(*(survey(dl.dataset.items, dl.dataset.read) for dl in dls.loaders))
    assert any('sequences' in f or 'near-duplicates' in f for f in found())
    assert not found(groups=lambda name: name[0])
    items = [scene(i, 48) for i in range(30)]
    other = mask_dataloaders(items[:24], items[24:], lambda o: o, scene_classes, voc_palette[:7], 255, size=48, bs=2)
    assert not relatives(*(survey(dl.dataset.items, dl.dataset.read) for dl in other.loaders))

def test_without_progress_nothing_is_printed(set8, capsys):
    check_dataset(load(set8), progress=False, verbose=False)
    assert not capsys.readouterr().out

def test_weights_favour_rare_classes(set8):
    w = class_weights(check_dataset(load(set8), progress=False, verbose=False))
    assert len(w) == 7 and w[0] == min(w) and abs(np.mean(w) - 1) < 1e-9

def test_the_line_of_the_finding_weighs_a_rare_class(capsys):
    "The line of code that check_dataset offers, as it stands; a class without a pixel takes nothing from the others"
    rare = np.zeros((32, 32), np.uint8)
    rare[:2, :3] = 1
    dls = mask_dataloaders([(scene(i, 32)[0], rare) for i in range(4)], [(scene(9, 32)[0], rare)], lambda o: o,
                           ['ground', 'mole', 'never'], voc_palette[:3], 255, size=32, bs=2)
    with pytest.raises(ValueError, match='never'): check_dataset(dls, progress=False)
    dls = mask_dataloaders(dls.train_ds.items, dls.valid_ds.items, lambda o: o, ['ground', 'mole'], voc_palette[:2],
                           255, size=32, bs=2)
    table = check_dataset(dls, progress=False)
    line = re.search("'mole' has 0.59 %.*`(.*)`", capsys.readouterr().out)[1]
    learn = eval(line, dict(segmentation_learner=segmentation_learner, HybridLoss=HybridLoss, dls=dls, table=table,
                            class_weights=class_weights))
    assert learn.loss_func.normalize
    assert learn.loss_func.base.focal.alpha.tolist() == pytest.approx(class_weights(table))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    more = pd.concat([table, pd.DataFrame([dict(set='train', label=2, name='never', pixels=0, share=0., images=0)])])
    assert class_weights(more) == [*class_weights(table), 0]
