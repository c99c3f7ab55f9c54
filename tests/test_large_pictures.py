"""Pictures of 90 megapixels: opened in little memory, and the same as whole ones.

Each case runs in a process of its own, forked from one that has imported PyTorch, and notes its peak above what it
begins with. The bounds are about twice what was measured: they hold on other systems, and fail where one more copy of
all pixels (90 MB a channel) is made."""
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageOps

from noisyseg.data import files
from noisyseg.data.datasets import CocoReader
from noisyseg.data.doctor import survey
from noisyseg.data.files import PairReader, can_reduce, label_table, read_colour_mask, read_image, read_mask
from noisyseg.data.keypoints import KeypointDataset, Pose
from noisyseg.data.loaders import MaskDataset

HEIGHT, WIDTH = 9000, 10_000

MAKE = f'''
import numpy as np, sys
from PIL import Image
from pathlib import Path
Image.MAX_IMAGE_PIXELS = None
folder = Path(sys.argv[1])
ramp = np.stack([*np.meshgrid(np.arange(256), np.arange(256)), np.full((256, 256), 99)], -1).astype(np.uint8)
picture = Image.fromarray(ramp).resize(({WIDTH}, {HEIGHT}), Image.BILINEAR)
picture.save(folder/'a.jpg', quality=80)
picture.save(folder/'a.png', compress_level=1)
labels = np.random.default_rng(0).integers(0, 7, (90, 100), np.uint8)
Image.fromarray(labels).resize(({WIDTH}, {HEIGHT}), Image.NEAREST).save(folder/'mask.png', compress_level=1)
'''

MEASURE = '''
import sys, torch, warnings
warnings.simplefilter('ignore')
from pathlib import Path
from torch import nn
from noisyseg.data.files import PairReader, label_table, read_image
from noisyseg.data.loaders import MaskDataset
from noisyseg.measure.inference import predict_mask
torch.set_num_threads(1)

def memory(what):   # in MB. Not ru_maxrss, which begins with the peak of the process that started this one
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(l.split()[1]) / 1024 for l in lines if l.startswith(what))

folder = Path(sys.argv[1])
net = nn.Conv2d(3, 7, 3, padding=1)
pair = lambda kind: (folder/f'a.{kind}', folder/'mask.png')
def item(kind):
    names = [str(i) for i in range(7)]
    return MaskDataset([pair(kind)], PairReader(label_table(7)), names, [(0,0,0)]*7, 255, size=(256, 256))[0]
before = memory('VmRSS')
found = eval(sys.argv[2])
print(memory('VmHWM') - before)
'''


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('large')
    subprocess.run([sys.executable, '-c', MAKE, folder], check=True)
    return folder


def peak(server, folder, code):
    "The most memory that this took, in MB"
    [(status, said)] = server.script(MEASURE, folder, {}, args=[folder, code])
    assert status == 0, said
    return float(said.split()[-1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason="reads Linux's /proc")
@pytest.mark.parametrize('code, most', [
    ("read_image(folder/'a.jpg', within=(256, 256))", 60),      # a 64th of the pixels
    ("read_image(folder/'a.png', within=(256, 256))", 500),     # Pillow decodes a PNG whole, 4 bytes a pixel
    ("read_image(folder/'a.jpg')", 800),                        # that, and the array of 270 MB
    ("item('jpg')", 500),                                       # its mask is read whole: 90 MB, and its labels
    ("predict_mask(net, folder/'a.jpg', size=(256, 256))", 500)])   # the answer is 90 MB
def test_memory(server, folder, code, most): assert peak(server, folder, code) < most


# --- the same pictures

@pytest.fixture
def large_from_here(monkeypatch):
    "Pictures of 0.2 megapixels are large, so that the tests are quick"
    monkeypatch.setattr(files, 'LARGE', 100_000)


def photo(path, size=(400, 500), orientation=1, **how):
    "A smooth picture, as a phone stores it"
    exif = Image.Exif()
    exif[0x0112] = orientation
    rows, columns = np.mgrid[:size[0], :size[1]]
    pixels = np.stack([rows // 2, columns // 2, (rows + columns) // 4], -1).astype(np.uint8)
    Image.fromarray(pixels).save(path, exif=exif, **how)
    return path


def as_pillow_reads(path):
    "The plain way: all of it, several times over"
    with Image.open(path) as im: return np.array(ImageOps.exif_transpose(im).convert('RGB'))


@pytest.mark.parametrize('mode', ['RGB', 'L', 'LA', 'P', 'RGBA', 'CMYK', '1', 'YCbCr'])
def test_whole_pictures_have_the_same_pixels(tmp_path, mode):
    "Strip by strip as in one piece, in all modes"
    noise = np.random.default_rng(0).integers(0, 256, (1100, 1201, 3), np.uint8)   # more than one strip
    kind = {'CMYK': 'jpg', 'YCbCr': 'tif'}.get(mode, 'png')
    Image.fromarray(noise).convert(mode).save(tmp_path/f'a.{kind}')
    assert np.array_equal(read_image(tmp_path/f'a.{kind}'), as_pillow_reads(tmp_path/f'a.{kind}'))
    assert np.array_equal(read_image(tmp_path/f'a.{kind}', within=(64, 64)), as_pillow_reads(tmp_path/f'a.{kind}'))


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('kind', ['jpg', 'png', 'tif'])
def test_a_reduced_picture_is_the_picture(tmp_path, kind, orientation, large_from_here):
    "Turned as it should be, at least twice as large as is asked for, and equal up to resampling"
    path = photo(tmp_path/f'a.{kind}', orientation=orientation)
    whole, within = as_pillow_reads(path), (40, 72)
    assert np.array_equal(read_image(path), whole)
    x = read_image(path, within)
    scale = min(w / n for w, n in zip(within, whole.shape))
    needed = [round(n * scale) for n in whole.shape[:2]]
    assert all(2 * n <= have < whole_n for n, have, whole_n in zip(needed, x.shape, whole.shape))
    a, b = (np.asarray(Image.fromarray(o).resize(needed[::-1], Image.BOX)).astype(int) for o in (x, whole))
    assert abs(a - b).max() <= 6


@pytest.mark.parametrize('augment', [None, lambda *pair: pair])
def test_an_item_is_the_same(tmp_path, augment, monkeypatch):
    "The mask exactly, the image up to resampling; a mask of another size is still found out"
    labels = np.random.default_rng(0).integers(0, 7, (400, 500), np.uint8)
    Image.fromarray(labels).save(tmp_path/'mask.png')
    pair = photo(tmp_path/'a.jpg'), tmp_path/'mask.png'
    def item(largest_whole):
        monkeypatch.setattr(files, 'LARGE', largest_whole)
        data = MaskDataset([pair], PairReader(label_table(7)), list('abcdefg'), [(0, 0, 0)] * 7, 255, size=(40, 50),
                           augment=augment)
        return [np.array(o).astype(int) for o in data.resized(0)]
    reduced, whole = item(100_000), item(10**9)
    assert np.array_equal(reduced[1], whole[1]) and abs(reduced[0] - whole[0]).max() <= 6
    monkeypatch.setattr(files, 'LARGE', 100_000)
    Image.fromarray(labels[:-8]).save(tmp_path/'mask.png')
    with pytest.raises(ValueError, match='this mask is 500x392 pixels, but its image .* is 500x400'):
        PairReader(label_table(7))(pair, within=(40, 50))


def test_a_reader_of_yours_reads_everything(tmp_path, large_from_here):
    "What a function of yours returns is not reduced, and it is not asked to"
    seen = []
    def read(path):
        seen.append(path)
        return np.array(Image.open(path).convert('L'))
    reader = PairReader(label_table(7), read_image=read)
    assert reader.image(photo(tmp_path/'a.png'), within=(64, 64)).shape == (400, 500, 1) and len(seen) == 1


def test_who_can_be_asked(tmp_path):
    "`read_image`, readers of files, and their methods; not a function of yours, nor a reader that calls one"
    reader, own = PairReader(label_table(7)), PairReader(label_table(7), read_image=lambda path: None)
    assert [can_reduce(o) for o in (read_image, reader, reader.image, CocoReader(None, {}))] == [True] * 4
    assert [can_reduce(o) for o in (own, own.image, np.load)] == [False] * 3


class Square:
    "An annotation as pycocotools has it"
    imgs = {1: dict(height=400, width=500)}
    def getAnnIds(self, number): return [0]
    def loadAnns(self, ids): return [dict(category_id=5)]
    def annToMask(self, annotation): return np.pad(np.ones((100, 100), np.uint8), ((0, 300), (0, 400)))


def test_polygons_of_a_large_picture(tmp_path, large_from_here):
    "The mask whole, the image reduced; one of another size is found out"
    item, reader = (photo(tmp_path/'a.jpg'), 1), CocoReader(Square(), {5: 2})
    (x, y), (whole, same) = reader(item, within=(40, 50)), reader(item)
    assert whole.shape[:2] == y.shape == (400, 500) and x.shape[0] <= 100
    assert np.array_equal(y, same) and (y == 2).sum() == 100 * 100
    other = photo(tmp_path/'b.jpg', (401, 500)), 1
    with pytest.raises(ValueError, match='500x401'): reader(other, within=(40, 50))


def test_the_doctor_sees_the_same(tmp_path, monkeypatch):
    "Counts exactly, thumbnails up to resampling"
    Image.fromarray(np.random.default_rng(0).integers(0, 7, (400, 500), np.uint8)).save(tmp_path/'mask.png')
    pair = photo(tmp_path/'a.jpg'), tmp_path/'mask.png'
    def found(largest_whole):
        monkeypatch.setattr(files, 'LARGE', largest_whole)
        return survey([pair], PairReader(label_table(7)))
    reduced, whole = found(100_000), found(10**9)
    assert np.array_equal(reduced.pixels, whole.pixels) and not reduced.faults
    assert abs(reduced.thumbs - whole.thumbs).max() < 0.02


@pytest.mark.parametrize('augment', [False, True])
def test_animals_of_a_large_picture(tmp_path, augment, monkeypatch):
    "Points where they were, to a hundredth of a pixel and the rounding of the cut; the picture up to resampling"
    points = np.array([[200, 100, 1], [260, 300, 1], [0, 0, 0]], np.float32)
    pose = Pose(photo(tmp_path/'a.jpg'), points, (150, 50, 390, 330))
    def item(largest_whole):
        monkeypatch.setattr(files, 'LARGE', largest_whole)
        data = KeypointDataset([pose], ['nose', 'tail', 'ear'], size=32, augment=augment, seed=1)
        return data.picture(0)[0].shape, *(np.array(o, float) for o in data[0])
    (small, x, y), (large, whole_x, whole_y) = item(100_000), item(10**9)
    assert small[0] < large[0]
    assert abs(y - whole_y).max() < 0.5 and np.array_equal(y[:, 2] > 0, whole_y[:, 2] > 0)
    assert abs(x - whole_x).mean() < 4


def test_masks_are_looked_up_in_blocks(tmp_path):
    "More than one block of rows: labels, colours, and the message about what is wrong"
    labels = np.random.default_rng(0).integers(0, 3, (1500, 1024), np.uint8)
    Image.fromarray(labels).save(tmp_path/'m.png')
    assert np.array_equal(read_mask(tmp_path/'m.png', label_table(3)), labels)
    colours = {(0, 0, 0): 0, (200, 0, 0): 1, (0, 0, 200): 2}
    painted = np.array(list(colours), np.uint8)[labels]
    Image.fromarray(painted).save(tmp_path/'c.png')
    assert np.array_equal(read_colour_mask(tmp_path/'c.png', colours), labels)
    painted[[3, 1400], 5] = 77
    labels[[3, 1400], 5] = 9
    Image.fromarray(painted).save(tmp_path/'c.png')
    Image.fromarray(labels).save(tmp_path/'m.png')
    with pytest.raises(ValueError, match=r'colour \(77, 77, 77\) on 2 pixels'):
        read_colour_mask(tmp_path/'c.png', colours)
    with pytest.raises(ValueError, match='label 9 on 2 pixels'): read_mask(tmp_path/'m.png', label_table(3))
