"""The study of networks that others trained: which of them stands what, and what tells beforehand?

    python nbs/studies/networks_of_others.py sweep --size full
        # a store for each set of pictures, in --models; resumes where it was stopped. Hours on a CPU
    python nbs/studies/networks_of_others.py table --size full
        # from the stores: networks_of_others_full.csv, and what goes with it, networks_of_others_foretold_full.csv
    python nbs/studies/networks_of_others.py sweep table --size medium     # about an hour and a half on one core
    python nbs/studies/networks_of_others.py sweep table --only s_0.5_pascal_256 resnet20     # a look, in minutes

Protocol, written before any full run.

*Networks*: all 22 files of `pretrained/` in the folder that NOISYSEG_DATA names, as published: nothing is trained,
tuned or left out. ESPNetv2 (8) and DiCENet (4) for VOC, ESPNetv2 (3) and ESPNet (3) for Cityscapes, ResNet-20 to -56
(4).

*Pictures*, scaled to the size that the file was trained at, proportions or not, and normalised as there:
- VOC: the 445 of `voc_animals/val.txt`; mIoU over background, cat, cow, dog, horse, person and sheep; all other
  classes are background, in the masks and in what a network says.
- Cityscapes' networks on `camvid/val`: 101 frames, mIoU over CamVid's eleven classes. This is a transfer to another
  camera and city, and one clip of one drive: it compares networks on these frames, and says nothing about other
  streets.
- CIFAR-10's test set as JPEGs of quality 75, accuracy: ten points below what was published. No number is a paper's.

*Disturbances*, each on the weights that it names itself, at LEVELS: MaxGaussian, RelativeGaussian, AbsoluteGaussian,
MultiplicativeGaussian, Quantize, and the corruption gaussian_noise (for CIFAR-10 at the severities of CIFAR-10-C).
`full`: all pictures, ten draws. `medium`, for a machine without an accelerator: every eighth picture (56 of VOC, 13
of CamVid, 1,250 of CIFAR-10) and five draws, ESPNet's three files left out (half a megapixel each picture). `small`:
every fifteenth picture and two draws, to see that it works; nothing is concluded from it. Levels were set knowing
what MaxGaussian at 0.5, 1 and 2 % does to one file, the ESPNetv2 of s = 0.5 at 256 pixels, on every eighth of VOC's
pictures, and the clean scores of VOC's files there; the strongest of MaxGaussian, AbsoluteGaussian and Quantize were
added after a `small` run of that file and ResNet-20.

*Main result*: for each file and disturbance, the level at which half of its clean score is lost, interpolated
linearly between levels for each draw (infinite where the strongest level costs less); the median over draws, between
the second and the ninth of the ten, an interval of 97.9 % for a median (`medium`: between the first and the last of
the five, 93.8 %).

*What can be said*: draws speak about these very files. Each was trained once, so a difference between two
architectures is one between two files. What tells beforehand (number of weights, clean score, share of weights in
depthwise convolutions) is looked at by Spearman's rank correlation with the main result within VOC's twelve files,
for the five disturbances of weights, with a permutation test over files: three quantities by five disturbances,
fifteen looks, corrected by Holm. Files are few and kin (one family in four widths), so even a corrected one is a
description of these files. No list of pictures chooses anything.
"""
import argparse
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from fastai.data.external import fastai_path
from noise_aware import keep, out
from PIL import Image
from torch import nn
from torchvision.transforms.functional import normalize, to_tensor

from noisyseg.data.cifar import ClassFolders
from noisyseg.data.corruptions import Corruption
from noisyseg.data.datasets import camvid_classes, voc_classes
from noisyseg.data.files import data_root
from noisyseg.measure.store import load_sweep
from noisyseg.measure.sweeps import sweep as run_sweep
from noisyseg.nets.classifiers import read_resnet_cifar
from noisyseg.nets.edgenets import read_dicenet, read_espnetv2
from noisyseg.nets.espnets import Regrouped, camvid_in_cityscapes, espnet_stats, read_espnet
from noisyseg.perturb.laws import AbsoluteGaussian, MaxGaussian, MultiplicativeGaussian, RelativeGaussian
from noisyseg.perturb.quantization import Quantize

SIZES = {'small': dict(every=15, draws=2), 'medium': dict(every=8, draws=5, without=('espnet_',)),
         'full': dict(every=1, draws=10)}
LEVELS = {'MaxGaussian': (0, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1), 'RelativeGaussian': (0.02, 0.05, 0.1, 0.2, 0.5),
          'AbsoluteGaussian': (0.002, 0.005, 0.01, 0.02, 0.05, 0.1),
          'MultiplicativeGaussian': (0.02, 0.05, 0.1, 0.2, 0.5),
          'Quantize': (8, 7, 6, 5, 4, 3, 2), 'gaussian_noise': (1, 2, 3, 4, 5)}
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SEVEN = 'background cat cow dog horse person sheep'.split()
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'

class Pictures(NamedTuple):
    "A set of pictures, and the networks that are asked about it."
    files: str  # pattern of the networks' files
    read: callable  # (arguments, size, stats) -> (images, truth)
    size: tuple  # (height, width) that the networks were trained at
    stats: tuple  # (mean, std) per channel
    names: list  # of the classes that count
    groups: list  # of a network's classes, for each of those; None: they are the network's
    bs: int = 8  # images at a time

def scenes(pairs, size, stats):
    "Images and masks, scaled to a size."
    fit = lambda file, how: Image.open(file).resize(size[::-1], how)
    x = [normalize(to_tensor(fit(i, Image.BILINEAR).convert('RGB')), *stats) for i, _ in pairs]
    y = [torch.from_numpy(np.array(fit(m, Image.NEAREST))).long() for _, m in pairs]
    return torch.stack(x), torch.stack(y)

def voc(a, size, stats):
    root = data_root()/'voc_animals'
    names = (root/'val.txt').read_text().split()[::a.every]
    x, y = scenes([(root/'images'/f'{n}.jpg', root/'masks'/f'{n}.png') for n in names], size, stats)
    label = torch.zeros(256, dtype=torch.long)
    label[255] = 255
    for i, c in enumerate(SEVEN): label[voc_classes.index(c)] = i
    return x, label[y]

def camvid(a, size, stats):
    root = data_root()/'camvid'/'val'
    images = sorted(root.glob('images/*'))[::a.every]
    x, y = scenes([(f, root/'labels'/f'{f.stem}.png') for f in images], size, stats)
    return x, torch.where(y == len(camvid_classes), 255, y)

def cifar(a, size, stats):
    test = ClassFolders(data_root()/'cifar10'/'cifar10.zip', 'test', few=10_000)
    x = torch.from_numpy(test[range(0, len(test), a.every)]).permute(0, 3, 1, 2) / 255
    return normalize(x, *stats), torch.as_tensor(test.labels[::a.every])

def seven_of_voc():
    "VOC's 21 classes as the seven: whatever has no class of its own is background."
    own = [voc_classes.index(c) for c in SEVEN[1:]]
    return [[i for i in range(len(voc_classes)) if i not in own], *([i] for i in own)]

CIFAR = 'airplane automobile bird cat deer dog frog horse ship truck'.split()
SETS = {
    'voc 256': Pictures('edgenets/*pascal_256x256.pth', voc, (256, 256), IMAGENET, SEVEN, seven_of_voc()),
    'voc 384': Pictures('edgenets/*pascal_384x384.pth', voc, (384, 384), IMAGENET, SEVEN, seven_of_voc()),
    'camvid 256': Pictures('edgenets/*city_512x256.pth', camvid, (256, 512), IMAGENET, camvid_classes,
                           camvid_in_cityscapes),
    'camvid 512': Pictures('espnet/*.pth', camvid, (512, 1024), espnet_stats, camvid_classes, camvid_in_cityscapes, 2),
    'cifar10': Pictures('resnet_cifar10/*.th', cifar, (32, 32), IMAGENET, CIFAR, None, 250)}
READERS = {'espnet_': read_espnet, 'espnetv2': read_espnetv2, 'dicenet': read_dicenet, 'resnet': read_resnet_cifar}

def networks(a, s):
    "The networks of a set of pictures, by the names of their files."
    found = {}
    for f in sorted((data_root()/'pretrained').glob(s.files)):
        if a.only and not any(o in f.stem for o in a.only): continue
        if f.name.startswith(a.without): continue
        net = next(read for start, read in READERS.items() if f.name.startswith(start))(f)
        found[f.stem] = (Regrouped(net, s.groups) if s.groups else net).to(DEVICE)
    return found

def store(a, name): return a.models/f'{a.size}-{name.replace(" ", "-")}.csv'

def sweep(a):
    for name, s in SETS.items():
        if not (models := networks(a, s)): continue
        print(f'{name}: {", ".join(models)}', flush=True)
        x, y = (t.to(DEVICE).split(s.bs) for t in s.read(a, s.size, s.stats))
        kinds = (MaxGaussian(), RelativeGaussian(), AbsoluteGaussian(), MultiplicativeGaussian(), Quantize(),
                 Corruption('gaussian_noise', table='cifar' if s.size == (32, 32) else 'imagenet', stats=s.stats))
        store(a, name).parent.mkdir(parents=True, exist_ok=True)
        run_sweep(models, list(zip(x, y)), dict(zip(LEVELS, kinds)), levels=LEVELS, draws=a.draws, seed=0,
                  ignore_index=255 if s.groups else None, class_names=s.names, store=store(a, name),
                  progress=sys.stdout.isatty())

def half_lost(levels, scores, clean):
    "The level at which half of the clean score is lost, levels from mild to strong; infinity where none takes so much."
    level, score = 0, clean
    if levels[0] > levels[-1]: level = levels[0]   # of bits many are mild
    for next_level, next_score in zip(levels, scores):
        if next_score <= clean / 2:
            return level + (next_level - level) * (score - clean / 2) / max(score - next_score, 1e-9)
        level, score = next_level, next_score
    return np.inf

def facts(model):
    "What is known of a network before it is disturbed."
    count = lambda ms: sum(p.numel() for m in ms for p in m.parameters())
    depthwise = [m for m in model.modules() if isinstance(m, nn.Conv2d) and 1 < m.groups == m.in_channels]
    return {'weights': count([model]), 'depthwise': count(depthwise) / count([model])}

def halves(a):
    "A row for each file and disturbance: the level at which half is lost."
    for name, s in SETS.items():
        models = networks(a, s)
        if not models or not store(a, name).exists(): continue
        df = load_sweep(store(a, name))
        df = df[(df['metric'] == ('mIoU' if s.groups else 'accuracy')) & df['model'].isin(models)]
        clean = df[df['level'] == 0].set_index('model')['value']
        for (model, kind), d in df[df['level'] > 0].groupby(['model', 'disturbance'], sort=False):
            levels = [level for level in LEVELS[kind] if level]
            wide = d.pivot(index='draw', columns='level', values='value').reindex(columns=levels).dropna()
            found = sorted(half_lost(levels, scores, clean[model]) for scores in wide.to_numpy())
            second = int(len(found) >= 10)
            if found: yield dict(pictures=name, model=model, **facts(models[model]), clean=clean[model],
                                 disturbance=kind, half_lost=np.median(found), low=found[second],
                                 high=found[-1 - second], draws=len(found))

def permutation(x, y, times=10_000):
    "Spearman's rank correlation, and how often chance alone gives one as far from 0."
    x, y = (pd.Series(v).rank().to_numpy() for v in (x, y))
    rng = np.random.default_rng(0)
    found = np.corrcoef(x, y)[0, 1]
    chance = np.array([np.corrcoef(x, rng.permutation(y))[0, 1] for _ in range(times)])
    return found, (1 + (abs(chance) >= abs(found) - 1e-9).sum()) / (1 + times)

def foretold(df):
    "What goes with standing much, among VOC's files; p after Holm."
    voc_files = df[df['pictures'].str.startswith('voc')]
    rows = []
    for kind, d in voc_files.groupby('disturbance', sort=False):
        if kind == 'gaussian_noise' or len(d) < 5: continue
        for what in ('weights', 'clean', 'depthwise'):
            # few bits are strong: there the lower level is the better one
            rho, p = permutation(d[what], d['half_lost'] * (-1 if kind == 'Quantize' else 1))
            rows.append(dict(disturbance=kind, what=what, rho=rho, p=p, files=len(d)))
    found = pd.DataFrame(rows).sort_values('p', ignore_index=True) if rows else pd.DataFrame()
    if rows: found['p_holm'] = np.minimum(1, np.maximum.accumulate(found['p'] * range(len(found), 0, -1)))
    return found

def table(a):
    df = pd.DataFrame(halves(a))
    keep(out(a, 'networks_of_others.csv'), df, a)
    wide = df.pivot(index=['pictures', 'model', 'weights', 'clean'], columns='disturbance', values='half_lost')
    print(wide.reindex(columns=list(LEVELS)).round(4).to_string())
    if len(found := foretold(df)):
        keep(out(a, 'networks_of_others_foretold.csv'), found, a)
        print(found.round(3).to_string())

def run(steps, doc, sizes, folder):
    "The command line of a study: its steps by name, and what `--size` sets."
    p = argparse.ArgumentParser(description=doc.split('\n')[0])
    p.add_argument('what', nargs='+', choices=steps)
    p.add_argument('--size', choices=sizes, default='small')
    p.add_argument('--only', nargs='+', help='files whose names contain one of these')
    p.add_argument('--models', type=Path, default=fastai_path('model')/folder, help='folder of what was measured')
    p.add_argument('--threads', type=int, default=os.cpu_count())
    p.set_defaults(without=())  # starts of the names of files that a size leaves out
    a = p.parse_args()
    for k, v in sizes[a.size].items(): setattr(a, k, v)
    torch.set_num_threads(a.threads)
    for w in a.what: steps[w](a)

if __name__ == '__main__': run({'sweep': sweep, 'table': table}, __doc__, SIZES, 'noisyseg-others')
