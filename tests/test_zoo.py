"""Networks of others: published files load strictly, say what their authors' own code says, and score on real data.

The files are no part of the project; where they are not on this machine, these tests are skipped. What needs no file is
tested in nbs/nets/05_classifiers.ipynb, 07_espnets.ipynb and 08_edgenets.ipynb."""
import argparse
import json
import math
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import root
from PIL import Image
from torchvision.transforms.functional import normalize, to_tensor

from noisyseg.data.cifar import ClassFolders
from noisyseg.data.datasets import camvid_classes, voc_classes
from noisyseg.data.files import data_root
from noisyseg.measure.metrics import ConfusionMeter, iou_from_matrix
from noisyseg.nets.classifiers import read_resnet_cifar
from noisyseg.nets.edgenets import read_dicenet, read_espnetv2
from noisyseg.nets.espnets import Regrouped, camvid_in_cityscapes, espnet_stats, read_espnet
from noisyseg.perturb.clone import perturbed
from noisyseg.perturb.laws import MaxGaussian

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
READERS = {'espnet_': read_espnet, 'espnetv2': read_espnetv2, 'dicenet': read_dicenet, 'resnet': read_resnet_cifar}

# of logits for `waves()`: their standard deviation, and three of one pixel, from the code that the authors published
SAID = {
    'edgenets/dicenet_s_0.2_pascal_384x384.pth': (1.9154, [5.3378, 1.3385, -0.1457]),
    'edgenets/dicenet_s_0.5_pascal_384x384.pth': (3.8875, [8.0392, 0.5422, -4.0624]),
    'edgenets/dicenet_s_1.0_pascal_384x384.pth': (3.5357, [5.9923, -5.3949, 0.4924]),
    'edgenets/dicenet_s_1.75_pascal_384x384.pth': (2.6370, [6.9232, -0.5091, -2.0719]),
    'edgenets/espnetv2_s_0.5_city_512x256.pth': (5.7364, [-0.9226, -1.2037, 4.058]),
    'edgenets/espnetv2_s_0.5_pascal_256x256.pth': (2.5264, [5.1605, -1.8736, -0.0282]),
    'edgenets/espnetv2_s_0.5_pascal_384x384.pth': (2.6383, [5.5627, 0.1649, -1.7229]),
    'edgenets/espnetv2_s_1.0_city_512x256.pth': (8.7888, [-23.1024, -12.298, 16.5034]),
    'edgenets/espnetv2_s_1.0_pascal_256x256.pth': (4.0926, [9.6646, -3.6212, -5.8874]),
    'edgenets/espnetv2_s_1.0_pascal_384x384.pth': (4.9166, [9.95, -5.1118, -2.0835]),
    'edgenets/espnetv2_s_1.5_pascal_256x256.pth': (4.4015, [8.827, -0.1438, -3.955]),
    'edgenets/espnetv2_s_1.5_pascal_384x384.pth': (4.8041, [10.341, -2.8012, -0.9324]),
    'edgenets/espnetv2_s_2.0_city_512x256.pth': (4.3297, [-1.1819, -2.8575, -0.4792]),
    'edgenets/espnetv2_s_2.0_pascal_256x256.pth': (3.2132, [6.6917, 0.2422, -1.2894]),
    'edgenets/espnetv2_s_2.0_pascal_384x384.pth': (4.4687, [7.4857, -4.0398, -2.6926]),
    'espnet/espnet_p_2_q_3.pth': (31.3967, [-6.8676, 31.2019, -17.6016]),
    'espnet/espnet_p_2_q_5.pth': (19.8806, [51.7377, -10.8889, -39.1162]),
    'espnet/espnet_p_2_q_8.pth': (31.4737, [-44.3793, -28.612, 20.8381]),
}


def there(*parts):
    "A file or folder of the local data, or the test is skipped"
    path = (data_root() or Path('nowhere')).joinpath(*parts)
    if not path.exists(): pytest.skip(f'{"/".join(parts)} is not in the folder that NOISYSEG_DATA names')
    return path


def read(name):
    "The network in a published file"
    file = there('pretrained', *name.split('/'))
    return next(f for start, f in READERS.items() if file.name.startswith(start))(file)


def waves():
    "An image without chance: the same numbers wherever it is made"
    c, y, x = torch.meshgrid(torch.arange(3.), torch.arange(128.), torch.arange(192.), indexing='ij')
    return (torch.sin(y / (5 + 3 * c) + c) + torch.cos(x / (9 - 2 * c)))[None]


@pytest.mark.parametrize('name', SAID)
def test_says_what_the_published_code_says(name):
    "Every tensor of the file is in its place: the logits are those of the authors' own code"
    net = read(name)
    assert not net.training
    with torch.no_grad(): out = net(waves() / 40 if name.startswith('espnet/') else waves())
    spread, few = SAID[name]
    assert out.shape == (1, 20 if 'city' in name or name.startswith('espnet/') else 21, 128, 192)
    assert out.std().item() == pytest.approx(spread, rel=1e-3)
    assert out[0, :3, 50, 70].tolist() == pytest.approx(few, abs=2e-3 * spread)


def test_no_file_is_forgotten():
    folder = there('pretrained')
    assert {f.relative_to(folder).as_posix() for f in folder.glob('e*/*.pth')} == set(SAID)


def test_a_missing_or_foreign_tensor_is_an_error(tmp_path):
    file = there('pretrained', 'edgenets', 'dicenet_s_0.2_pascal_384x384.pth')
    state = torch.load(file, map_location='cpu', weights_only=True)
    lost = 'base_net.level4.2.layer_right.1.conv_width.weight'
    torch.save({k: v for k, v in state.items() if k != lost}, tmp_path/'less.pth')
    with pytest.raises(RuntimeError, match='encoder.level4.2.branch.1.columnwise'): read_dicenet(tmp_path/'less.pth')
    torch.save(state | {'extra.weight': torch.ones(1)}, tmp_path/'more.pth')
    with pytest.raises(RuntimeError, match='extra.weight'): read_dicenet(tmp_path/'more.pth')
    with pytest.raises(ValueError, match="weights of sacmehta's ESPNetv2"): read_espnetv2(tmp_path/'more.pth')


def test_checkpoints_know_them(server, tmp_path):
    "A process that imports nothing else of noisyseg can build every one of them from a checkpoint's card"
    code = 'from noisyseg.train.checkpoints import FACTORIES; print(*FACTORIES)'
    [(status, said)] = server.script(code, tmp_path, {})
    assert status == 0, said
    known = said.split()
    assert {'espnet', 'espnetv2', 'dicenet', 'resnet_cifar'} <= set(known)


# --- scores ---------------------------------------------------------------------------------------------------------

def scene(image, mask, size, stats):
    "Image and mask, scaled to (height, width) as in the networks' training: proportions may change"
    x = Image.open(image).convert('RGB').resize(size[::-1], Image.BILINEAR)
    y = np.array(Image.open(mask).resize(size[::-1], Image.NEAREST))
    return normalize(to_tensor(x), *stats)[None], torch.from_numpy(y).long()[None]


@torch.no_grad()
def ious(net, pairs, n, void):
    meter = ConfusionMeter(n, ignore_index=void)
    for x, y in pairs: meter.update(net(x).argmax(1), y)
    return iou_from_matrix(meter.matrix)


def voc(names, size):
    "Some of VOC's pictures"
    folder = there('voc_animals')
    return [scene(folder/'images'/f'{o}.jpg', folder/'masks'/f'{o}.png', (size, size), IMAGENET) for o in names]


SEVEN = [voc_classes.index(c) for c in 'background cat cow dog horse person sheep'.split()]


def animals(name, size, nth):
    "A network, and what scores it: the mean IoU over seven classes on every nth picture"
    net, pairs = read(name), voc(there('voc_animals', 'val.txt').read_text().split()[1::nth], size)
    return net, lambda: ious(net, pairs, 21, 255)[SEVEN].nanmean().item()


def test_espnetv2_on_animals():
    "Clean it is far above the 0.1 of an all-background answer; two percent of weight noise takes half of it"
    net, score = animals('edgenets/espnetv2_s_0.5_pascal_256x256.pth', 256, 40)
    clean = score()
    with perturbed(net, MaxGaussian(0.02), generator=0): noisy = score()
    assert 0.3 < clean < 0.6 and noisy < 0.6 * clean, (clean, noisy)


def test_dicenet_on_animals():
    net, score = animals('edgenets/dicenet_s_0.5_pascal_384x384.pth', 384, 75)
    assert 0.3 < (found := score()) < 0.9, found


@pytest.mark.parametrize('name, size, low', [('edgenets/espnetv2_s_1.0_city_512x256.pth', (256, 512), 0.4),
                                             ('espnet/espnet_p_2_q_8.pth', (512, 1024), 0.3)])
def test_streets(name, size, low):
    "Networks for Cityscapes on streets of CamVid: mIoU over its eleven classes, on two frames"
    net, folder = Regrouped(read(name), camvid_in_cityscapes), there('camvid', 'val')
    stats = espnet_stats if name.startswith('espnet/') else IMAGENET
    pairs = [scene(f, folder/'labels'/f'{f.stem}.png', size, stats) for f in sorted(folder.glob('images/*'))[::60]]
    found = ious(net, pairs, 12, 11)
    iou = dict(zip(camvid_classes, found.tolist()))
    assert found[:11].nanmean() > low and iou['sky'] > 0.8 and iou['road'] > 0.6, iou


def test_small_pictures():
    "Published accuracies are 91.8 to 93.6 %; JPEGs of quality 75 cost ten points"
    images = ClassFolders(there('cifar10', 'cifar10.zip'), 'test')
    numbers = range(3, 10_000, 50)
    x = normalize(torch.from_numpy(images.decode(numbers)).permute(0, 3, 1, 2) / 255, *IMAGENET)
    y = torch.as_tensor(images.labels[list(numbers)])
    for name in ('resnet20-12fca82f', 'resnet32-d509ac18', 'resnet44-014dd654', 'resnet56-4bfd9763'):
        net = read(f'resnet_cifar10/{name}.th')
        with torch.no_grad(): accuracy = (net(x).argmax(1) == y).float().mean()
        assert net.recipe['args']['depth'] == int(name[6:8]) and 0.77 < accuracy < 0.9, (name, accuracy)


# --- the study ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def study():
    sys.path.insert(0, str(root/'nbs'/'studies'))
    try: import networks_of_others
    finally: sys.path.pop(0)
    return networks_of_others


def test_where_half_is_lost(study):
    "By hand: between the levels that it lies between; from nothing; with bits, which are mild when many; never"
    assert study.half_lost([1, 2, 4], [0.8, 0.5, 0.1], 0.8) == pytest.approx(2.5)
    assert study.half_lost([1, 2], [0.2, 0.1], 0.8) == pytest.approx(2 / 3)
    assert study.half_lost([8, 6, 4], [0.8, 0.6, 0.2], 0.8) == pytest.approx(5)
    assert study.half_lost([1, 2], [0.8, 0.7], 0.8) == math.inf


def test_what_goes_with_it(study):
    "Six files in the same order: 2 of 720 permutations are as far from chance"
    rho, p = study.permutation([1, 2, 3, 4, 5, 6], [10, 11, 15, 20, 21, 99])
    assert rho == pytest.approx(1) and 0.001 < p < 0.006


def test_few_bits_are_strong(study):
    "Whoever stands all bits stands more than who needs three, as with noise whoever is never halved"
    assert study.stands('Quantize', math.inf) > study.stands('Quantize', 3) > study.stands('Quantize', 5)
    assert study.stands('MaxGaussian', math.inf) > study.stands('MaxGaussian', 0.1)


NETWORK = """
import torch
def build():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
                               torch.nn.Linear(8, CHANNELS))
"""


def fits_the_schema(entry):
    from jsonschema import validate   # not when tests are collected: half a second
    validate(entry, json.loads((root/'nbs'/'studies'/'networks_of_others'/'schema.json').read_text()))


def follows_from_its_scores(study, entry):
    "What is said of each disturbance is what its draws say"
    for d in entry['disturbances'].values():
        halves = sorted(study.half_lost(d['levels'], scores, entry['clean']) for scores in zip(*d['scores']))
        assert len(halves) in (1, entry['draws'])
        said = [math.inf if d[k] is None else d[k] for k in ('low', 'half_lost', 'high')]
        assert said == pytest.approx([halves[0], statistics.median(halves), halves[-1]], rel=1e-2)


def test_a_network_of_yours_gets_an_entry(study, tmp_path, monkeypatch):
    "By one command; the entry keeps to the schema, and its levels follow from its scores"
    there('cifar10', 'cifar10.zip')
    monkeypatch.setattr(study, 'ENTRIES', tmp_path/'entries')
    (tmp_path/'mine.py').write_text(NETWORK.replace('CHANNELS', '10'))
    a = argparse.Namespace(what=['add'], size='small', every=400, draws=2, models=tmp_path/'stores', pictures='cifar10',
                           network=f'{tmp_path}/mine.py:build', name='mine', source=None)
    study.add(a)
    found, = study.read_entries('small')
    assert found['network'] == 'mine' and set(found['disturbances']) == set(study.LEVELS) and not found['study']
    assert found['weights'] == 8 * 27 + 8 + 8 * 10 + 10
    fits_the_schema(found)
    follows_from_its_scores(study, found)
    found['disturbances']['MaxGaussian']['half_lost'] = 7.
    with pytest.raises(AssertionError): follows_from_its_scores(study, found)
    study.table(a)
    page = (tmp_path/'entries'/'small'/'table.html').read_text()
    assert page.count('<button') == 4 + len(study.LEVELS) and '>mine<' in page
    (tmp_path/'mine.py').write_text(NETWORK.replace('CHANNELS', '7'))
    with pytest.raises(SystemExit, match='def groups'): study.add(a)


def test_committed_entries(study):
    "Each keeps to the schema, says what its scores say, and goes on until every draw has lost half, or to the end"
    found = [e for size in ('medium', 'full') for e in study.read_entries(size)]
    assert found
    for e in found:
        fits_the_schema(e)
        follows_from_its_scores(study, e)
        for kind, d in e['disturbances'].items():
            levels = [level for level in study.LEVELS[kind] if level]
            lost = [max(scores) <= e['clean'] / 2 for scores in d['scores']]
            assert d['levels'] == levels[:len(lost)] and not any(lost[:-1]), (e['network'], kind)
            assert lost[-1] or len(lost) == len(levels), (e['network'], kind)


def test_every_file_is_asked(study):
    folder = there('pretrained')
    found = [f for s in study.SETS.values() for f in folder.glob(s.files)]
    assert len(found) == len(set(found)) == 22
    assert sorted(sum(study.seven_of_voc(), [])) == list(range(21))
