"""The study of networks that others trained: which of them stands what, and what tells beforehand?

    python nbs/studies/networks_of_others.py sweep --size full
        # an entry for each network that has none: networks_of_others/full/NAME.json. Hours on a CPU; what was measured
        # of a network is kept in --models, and goes on from there
    python nbs/studies/networks_of_others.py table --size full
        # from the entries a table, also one that sorts: networks_of_others/full/table.html
    python nbs/studies/networks_of_others.py sweep table --size medium   # hours on one core
    python nbs/studies/networks_of_others.py sweep table --only s_0.5_pascal_256 resnet20     # a look
    python nbs/studies/networks_of_others.py add table --size medium --network my_networks.py:build --pictures 'voc 256'
        # yours: a function without parameters in a file of yours returns it, with its weights

Entries keep to networks_of_others/schema.json. A network that is added has the classes of its pictures as its channels
(`voc`: these seven or VOC's 21; `camvid`: eleven, or Cityscapes' 19 or 20; CIFAR-10's ten), or says the groups of its
classes in a function `groups` of the same file.

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

*Where it stops*: levels are taken from mild to strong, and none beyond the first at which every draw has lost half of
the clean score: the main result needs no more. (All levels were to be measured; changed for the hours that it takes,
before any network was measured whole at `medium` or `full`. An earlier run had been stopped after 109 evaluations of
three ESPNetv2, one draw each, which were seen and discarded.)

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
import importlib.util
import json
import re
import sys
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image
from study import command_line, made
from torch import nn
from torchvision.transforms.functional import normalize, to_tensor

from noisyseg.data.cifar import ClassFolders
from noisyseg.data.corruptions import Corruption
from noisyseg.data.datasets import camvid_classes, voc_classes
from noisyseg.data.files import data_root
from noisyseg.measure.store import load_sweep
from noisyseg.measure.sweeps import sweep as run_sweep
from noisyseg.nets.adapter import as_logits
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
ENTRIES = Path(__file__).parent/'networks_of_others'  # a folder for each size, a file for each network
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
        if f.name.startswith(getattr(a, 'without', ())): continue
        net = next(read for start, read in READERS.items() if f.name.startswith(start))(f)
        net = Regrouped(net, s.groups) if s.groups else net
        found[f.stem] = net.to(DEVICE, memory_format=torch.channels_last)  # up to twice as fast on a CPU, same function
    return found

def entry_file(a, network): return ENTRIES/a.size/f'{network}.json'

def has_lost_half(df, s, clean, level):
    "Has every draw at this level lost half of the clean score?"
    scores = df[(df['metric'] == score_of(s)) & (df['level'] == level)]['value']
    return (scores <= clean / 2).all()

def measure(a, s, network, net, file):
    "All disturbances on a network, each until every draw has lost half of the clean score, into a store that resumes."
    x, y = (t.to(DEVICE).split(s.bs) for t in s.read(a, s.size, s.stats))
    kinds = (MaxGaussian(), RelativeGaussian(), AbsoluteGaussian(), MultiplicativeGaussian(), Quantize(),
             Corruption('gaussian_noise', table='cifar' if s.size == (32, 32) else 'imagenet', stats=s.stats))
    file.parent.mkdir(parents=True, exist_ok=True)
    clean = None
    for (kind, levels), disturbance in zip(LEVELS.items(), kinds):
        for level in levels:
            df = run_sweep({network: net}, list(zip(x, y)), {kind: disturbance}, levels=[level], draws=a.draws, seed=0,
                           ignore_index=255 if s.groups else None, class_names=s.names, store=file, progress=False,
                           on='here')
            if level == 0: clean = clean_score(df, s)
            if level and has_lost_half(df[df['disturbance'] == kind], s, clean, level): break

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

def score_of(s): return 'mIoU' if s.groups else 'accuracy'

def clean_score(df, s):
    return float(df.loc[(df['metric'] == score_of(s)) & (df['level'] == 0), 'value'].iloc[0])

def entry(a, name, s, df, model, net, **more):
    "What is known of a network in one set of pictures, as networks_of_others/schema.json has it."
    metric = score_of(s)
    clean = clean_score(df, s)
    found = {}
    for kind, d in df[(df['metric'] == metric) & (df['level'] > 0)].groupby('disturbance', sort=False):
        levels = [level for level in LEVELS[kind] if level in set(d['level'])]
        wide = d.pivot(index='draw', columns='level', values='value').reindex(columns=levels).dropna()
        halves = sorted(half_lost(levels, scores, clean) for scores in wide.to_numpy())
        second = int(len(halves) >= 10)
        half = dict(half_lost=float(np.median(halves)), low=halves[second], high=halves[-1 - second])
        half = {k: None if np.isinf(v) else round(float(v), 6) for k, v in half.items()}   # JSON knows no infinity
        found[kind] = dict(levels=levels, scores=wide.T.round(5).to_numpy().tolist(), **half)
    return dict(network=model, pictures=name, metric=metric, classes=s.names, **facts(net), clean=round(clean, 5),
                draws=a.draws, disturbances=found, **more, made=made(a))

def write(a, found):
    file = entry_file(a, found['network'])
    file.parent.mkdir(parents=True, exist_ok=True)
    on_one_line = lambda m: '[' + ' '.join(m[1].split()) + ']'
    text = re.sub(r'\[\s+([^][{}"]+?)\s+\]', on_one_line, json.dumps(found, indent=1, ensure_ascii=False))
    file.write_text(text + '\n')

def sweep(a):
    "Every network that has no entry: measured, and an entry for it."
    for name, s in SETS.items():
        for network, net in networks(a, s).items():
            if entry_file(a, network).exists(): continue
            print(f'{name}: {network}', flush=True)
            file = a.models/f'{a.size}-{network}.csv'
            measure(a, s, network, net, file)
            source = f'pretrained/{s.files.split("/")[0]}'
            write(a, entry(a, name, s, load_sweep(file), network, net, study=True, source=source))

class Logits(nn.Module):
    "A network that returns logits alone, whatever form it has for them."
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x): return as_logits(self.module(x))

def own(a, s):
    "The network of `--network file.py:function`, in the classes of its pictures."
    file, _, function = a.network.partition(':')
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    net = Logits(getattr(module, function or 'build')()).eval()
    with torch.no_grad(): channels = net(torch.zeros(1, 3, *s.size)).shape[1]
    known = {len(s.names): None}
    if s.groups: known[1 + max(max(g) for g in s.groups)] = s.groups
    if s.read is camvid: known[20] = s.groups
    groups = module.groups() if hasattr(module, 'groups') else known.get(channels, channels)
    if groups == channels:
        sys.exit(f"{a.network}: {channels} channels, but '{a.pictures}' has the classes {', '.join(s.names)}. Say in "
                 f"{file} which of yours make up each of them:\ndef groups(): return [[0], [3, 4], ...]")
    return (Regrouped(net, groups) if groups else net).to(DEVICE)

def add(a):
    "A network of yours: measured like the others, and an entry for it."
    if not a.network or a.pictures not in SETS:
        sys.exit(f"add needs --network file.py:function and --pictures, one of {', '.join(map(repr, SETS))}")
    s = SETS[a.pictures]
    name = a.name or a.network.split(':')[-1]
    net = own(a, s)
    file = a.models/f'{a.size}-{a.pictures.replace(" ", "-")}-{name}.csv'
    measure(a, s, name, net, file)
    write(a, entry(a, a.pictures, s, load_sweep(file), name, net, study=False, source=a.source))

def read_entries(size):
    "All entries of a size."
    return [json.loads(f.read_text()) for f in sorted((ENTRIES/size).glob('*.json'))]

def halves(found):
    "A row for each entry and disturbance: the level at which half is lost."
    rows = []
    for e in found:
        same = {k: e[k] for k in ('pictures', 'network', 'weights', 'depthwise', 'clean', 'study', 'draws')}
        for kind, d in e['disturbances'].items():
            some = {k: np.inf if d[k] is None else d[k] for k in ('half_lost', 'low', 'high')}
            rows.append(same | dict(disturbance=kind) | some)
    return pd.DataFrame(rows)

def permutation(x, y, times=10_000):
    "Spearman's rank correlation, and how often chance alone gives one as far from 0."
    x, y = (pd.Series(v).rank().to_numpy() for v in (x, y))
    rng = np.random.default_rng(0)
    found = np.corrcoef(x, y)[0, 1]
    chance = np.array([np.corrcoef(x, rng.permutation(y))[0, 1] for _ in range(times)])
    return found, (1 + (abs(chance) >= abs(found) - 1e-9).sum()) / (1 + times)

def falls(kind):
    "Is a low level the strong one, as of bits?"
    return LEVELS[kind][0] > LEVELS[kind][-1]

def stands(kind, half_lost):
    "The more, the more a network stands, also where low levels are strong; infinity is the best everywhere."
    return -half_lost if falls(kind) and half_lost < np.inf else half_lost

def foretold(df):
    "What goes with standing much, among VOC's files; p after Holm."
    voc_files = df[df['pictures'].str.startswith('voc') & df['study']]
    rows = []
    for kind, d in voc_files.groupby('disturbance', sort=False):
        if kind == 'gaussian_noise' or len(d) < 5: continue
        for what in ('weights', 'clean', 'depthwise'):
            rho, p = permutation(d[what], [stands(kind, v) for v in d['half_lost']])
            rows.append(dict(disturbance=kind, what=what, rho=rho, p=p, files=len(d)))
    found = pd.DataFrame(rows).sort_values('p', ignore_index=True) if rows else pd.DataFrame()
    if rows: found['p_holm'] = np.minimum(1, np.maximum.accumulate(found['p'] * range(len(found), 0, -1)))
    return found

KINDS = {k.__name__: k for k in (MaxGaussian, RelativeGaussian, AbsoluteGaussian, MultiplicativeGaussian, Quantize)}
KINDS['gaussian_noise'] = Corruption

def cell(row):
    "A level with its interval, and the number that it is sorted by."
    factor, percent = (100, ' %') if KINDS[row.disturbance].share else (1, '')
    beyond = f'{"<" if falls(row.disturbance) else ">"} {factor * LEVELS[row.disturbance][-1]:g}'
    text = lambda v: beyond if np.isinf(v) else f'{factor * v:.3g}'
    unlike = {text(row.low), text(row.high)} != {text(row.half_lost)}
    between = f' <small>{text(row.low)} to {text(row.high)}</small>' if unlike else ''
    return f'{text(row.half_lost)}{percent}{between}', min(stands(row.disturbance, row.half_lost), 1e9)

SORT = """<style>
table.sortable { font-family: sans-serif; border-spacing: .8em .2em }
table.sortable button { all: unset; cursor: pointer; font-weight: bold }
table.sortable button:focus-visible { outline: 2px solid }
table.sortable [aria-sort=descending] button::after { content: " \\2193" }
table.sortable [aria-sort=ascending] button::after { content: " \\2191" }
table.sortable small { display: block; opacity: .7; white-space: nowrap }
</style>
<script>
for (const b of document.querySelectorAll('table.sortable th button')) b.onclick = () => {
  const th = b.parentElement, body = th.closest('table').tBodies[0], i = th.cellIndex
  const down = th.ariaSort !== 'descending'
  const value = row => { const v = row.cells[i].dataset.by; return v === undefined ? row.cells[i].textContent : +v }
  const order = (a, b) => { const x = value(a), y = value(b); return x < y ? -1 : x > y ? 1 : 0 }
  for (const o of th.parentElement.cells) o.ariaSort = null
  th.ariaSort = down ? 'descending' : 'ascending'
  body.append(...[...body.rows].sort((a, b) => down ? order(b, a) : order(a, b)))
}
</script>"""

def sortable(df):
    "An HTML table of the rows of `halves`, a line for each network; a click on a column's name sorts by it."
    names = ['network', 'pictures', 'million weights', 'clean, %', *(f'{k}, {v.unit}' for k, v in KINDS.items())]
    head = ''.join(f'<th scope="col"><button type="button">{n}</button></th>' for n in names)
    lines = []
    df = df.sort_values(['pictures', 'weights'], kind='stable')
    for (pictures, network), d in df.groupby(['pictures', 'network'], sort=False):
        row = d.iloc[0]
        known = {r.disturbance: cell(r) for r in d.itertuples()}
        cells = [(f'{row.weights / 1e6:.2f}', row.weights), (f'{100 * row.clean:.1f}', row.clean),
                 *(known.get(kind, ('', -1e9)) for kind in LEVELS)]
        tds = ''.join(f'<td data-by="{by:g}">{text}</td>' for text, by in cells)
        lines.append(f'<tr><th scope="row">{escape(network)}</th><td>{pictures}</td>{tds}</tr>')
    # Quarto would make a table of its own of it
    start = (f'<div style="overflow-x: auto"><table class="sortable" data-quarto-disable-processing="true"><thead>'
             f'<tr>{head}</tr></thead><tbody>')
    return '\n'.join([start, *lines, '</tbody></table></div>', SORT])

def table(a):
    df = halves(read_entries(a.size))
    if df.empty: sys.exit(f'There is no entry in {ENTRIES/a.size}: sweep --size {a.size} writes some')
    head = '<!doctype html><meta charset="utf-8"><title>What networks of others withstand</title>\n'
    (ENTRIES/a.size/'table.html').write_text(head + sortable(df))
    wide = df.pivot(index=['pictures', 'network', 'weights', 'clean'], columns='disturbance', values='half_lost')
    print(wide.reindex(columns=list(LEVELS)).round(4).to_string())
    if len(found := foretold(df)): print(found.round(3).to_string())

if __name__ == '__main__':
    command_line(dict(sweep=sweep, add=add, table=table), __doc__, SIZES, models='noisyseg-others',
                 only=dict(nargs='+', help='files whose names contain one of these'),
                 network=dict(help='file.py:function'), pictures=dict(help=f'one of {", ".join(SETS)}'),
                 name=dict(help='of its entry'), source=dict(help='where it can be had'))
