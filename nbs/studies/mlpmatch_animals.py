"""The study of MLPMatch, anew: pictures of animals, the published lists of labelled pictures, an encoder that has seen
ImageNet, and a validation set of other scenes.

    python nbs/studies/mlpmatch_animals.py run --seeds 0 1 2   # a file for each network; goes on where it stopped
    python nbs/studies/mlpmatch_animals.py cost                # mlpmatch_animals_cost.csv: a step of each way, in turns
    python nbs/studies/mlpmatch_animals.py table               # mlpmatch_animals.csv, and what can be said

Protocol, the second one, written before any run of it. The first let every way begin with a decoder of random weights,
for 160 steps; its first network, supervised, scored 18.2 % on val (background 79, cats 26, others 13 or less): what
such a network says of a picture is no label. It was given up there, before any of the other ways had been scored, and
that network is in no table. Else only a few steps of each way had been run, for their speed, on pictures of train_aug.

*Data*: the pictures of `voc_animals`, seven classes, as in voc_weight_noise.py: train_aug (3,131 are here) and val
(445). Pictures with masks: those of the published lists of 92, 183 and 366 that are here, which are 31, 65 and 104. The
other pictures of train_aug are shown without masks. A subset: no number here stands beside a published one of VOC.

*Network*: UNet3+ on EfficientNet-Lite0 with ImageNet weights. Switched off are its inverted bottlenecks with a skip:
six in the four maps that `small` uses, nine in the whole encoder (the published network has 33 blocks).

*Ways*: for each seed there is one *start*: supervised training on the labelled pictures, one cycle up to 4e-3, 400
steps. From its weights all ways go on for 120 steps, one cycle up to 2e-3: supervised, FixMatch, UniMatch, UniMatch +
network perturbation, UniMatch + volatile learning, MLPMatch (both), and MLPMatch with three blocks off at once.
`supervised, long` goes on for six times as many steps, about the time of MLPMatch (6.0 by a timing before the study).
Batches of 4 pictures with and 4 without masks, Adam; pseudo-labels count from a confidence of 0.8 (published: 0.95),
the choice of the CamVid study, as is 4e-3; 2e-3 is half of it. Nothing was tuned.

*Sizes*: small: 64 pixels, width 16, the encoder up to a sixteenth. 120 steps see 480 of 3,066 pictures without masks.
This is short, and says what so short a training gives. full: 256 pixels, 2,000 steps and 20,000 more, of 8 + 8, width
32, the whole encoder, for a GPU.

*Seeds*: three; a seed fixes the start, and the order of the pictures, views and draws, for all ways alike. The list of
labelled pictures is published, and the same for all seeds.

*Order*: with 65 masks the start, supervised, UniMatch and MLPMatch; then the other ways in the order of ARMS; then 31
and 104 masks with supervised, UniMatch, MLPMatch and supervised, long. If time runs out, the table ends there, with
those ways that have all three seeds, and the page says so.

*Measured on val*, once for each network, at the size of training: IoU of each class and their mean. Beside it, on 200
pictures whose masks were held back, how many pixels are above the threshold, and how many of these are right; this
describes, and decides nothing.

*Claims*, over training seeds (paired: the same seed), 95 % intervals by Student's t, Holm over all comparisons of the
table, on each list: each way that uses pictures without masks against supervised and against supervised, long; each
addition against UniMatch; three blocks off against one; supervised, long against supervised. `clear` means a corrected
p below 0.05; with three seeds and so many comparisons only a very regular difference can be that.
"""
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fastai.data.core import DataLoaders
from fastai.torch_core import default_device, set_seed
from fastcore.basics import noop
from mlpmatch import ARMS as KNOWN
from PIL import Image
from safetensors.torch import load_file, save
from study import NoPeeking, command_line, keep, out
from voc_weight_noise import SEVEN, animals, names

from noisyseg.basics import write_atomic
from noisyseg.data.files import data_root
from noisyseg.data.semi_supervised import SemiDataset, semi
from noisyseg.data.splits import read_split
from noisyseg.measure.evaluation import scores
from noisyseg.measure.summary import corrected, paired_difference
from noisyseg.nets.unet3plus import unet3plus_lite0
from noisyseg.train.methods.mlpmatch import MatchStep, semi_learner, step_cost

ROWS = Path(__file__).parent/'mlpmatch_animals'  # a file for each network
SIZES = {'small': dict(px=64, start=400, steps=120, bs=4, width=16, maps=(0, 1, 2, 3)),
         'full': dict(px=256, start=2000, steps=20_000, bs=8, width=32, maps=(0, 1, 2, 3, 4))}
LISTS = {65: '183', 31: '92', 104: '366'}  # labelled pictures that are here: the published list's folder
LONG = 6               # steps of `supervised, long` for each step of the others
ARMS = {  # in the order in which they are run; what each of the known ones is stands in the first study
    'start': dict(level='supervised'),
    **{arm: KNOWN[arm] for arm in ('supervised', 'UniMatch', 'MLPMatch', 'supervised, long',
                                   'UniMatch + network perturbation', 'UniMatch + volatile learning', 'FixMatch')},
    'MLPMatch, three blocks off': dict(level='mlpmatch', n_off=3),
}
MAIN = ('start', 'supervised', 'UniMatch', 'MLPMatch')
START_LR, LR, THRESHOLD = 4e-3, 2e-3, 0.8
UNSEEN = 200           # pictures without masks whose pseudo-labels are compared with the masks that were held back

def labelled_names(folder):
    "The pictures of a published list that are here."
    here = set(names('train_aug'))
    return [image.stem for image, _ in read_split(data_root()/'splits'/'pascal'/folder)[0] if image.stem in here]

class Steps(SemiDataset):
    "As many batches in its one epoch as training has steps."
    def __len__(self): return self.n_steps

def loaders(a, n, seed, arm):
    "The batches of one training, and the pictures that score it."
    steps = a.start if arm == 'start' else a.steps * (LONG if arm.endswith('long') else 1)
    # supervised training looks at no views, so it need not wait for them
    views = dict(strong=noop, bs_unlabelled=1) if ARMS[arm]['level'] == 'supervised' else {}
    # what follows the start is not to see the same batches again
    draws = seed if arm == 'start' else 1000 + seed
    dls = semi(animals(a.px, draws, names('val')), labelled_names(LISTS[n]), bs=a.bs, seed=draws, cache=True, **views)
    of = dls.train.dataset
    cut = Steps(of.labelled, of.unlabelled, of.bs, of.bs_unlabelled)
    cut.n_steps = steps
    return DataLoaders(dls.train.new(cut), dls.valid, device=default_device())

def network(a, seed):
    set_seed(seed)
    net = unet3plus_lite0(len(SEVEN), width=a.width, upsample='after', deep_supervision=False,
                          encoder_args=dict(out_indices=a.maps))
    return net.to(memory_format=torch.channels_last)  # a fifth faster on a CPU, same function

def trained(a, dls, n, arm, seed):
    "The learner, which begins where its seed's start ended, and the seconds of processor time that training took."
    file = a.models/f'{a.size}-{n}-{seed}.safetensors'
    net = network(a, seed)
    if arm != 'start':
        # its scores may be there without its weights, which are not kept with them
        if not file.exists(): trained(a, loaders(a, n, seed, 'start'), n, 'start', seed)
        net.load_state_dict(load_file(file))
    learn = semi_learner(dls, net, metrics=[], columns=False, seed=seed, threshold=THRESHOLD, cbs=[NoPeeking()],
                         **ARMS[arm])
    begin = time.process_time()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, START_LR if arm == 'start' else LR)
    seconds = time.process_time() - begin
    if arm == 'start': write_atomic(file, save({k: v.cpu().contiguous() for k, v in net.state_dict().items()}))
    return learn, seconds

def scored(model, batches):
    return pd.DataFrame(scores(model.eval(), batches, SEVEN, 255), columns=['metric', 'class', 'value', 'n_pixels'])

def order(a):
    "(pictures with masks, arm, seed) of all networks: the main comparison first."
    main = [(65, arm, seed) for seed in a.seeds for arm in MAIN]
    others = [(65, arm, seed) for arm in ARMS if arm not in MAIN for seed in a.seeds]
    lists = [(n, arm, seed) for n in (31, 104) for arm in (*MAIN, 'supervised, long') for seed in a.seeds]
    return main + others + lists

def unseen(dls):
    "Batches of pictures that are shown without masks, with these masks."
    some = [Path(o) for o in dls.train.dataset.unlabelled.items[:UNSEEN]]
    pairs = [(o, o.parent.parent/'masks'/f'{o.stem}.png') for o in some]
    return list(dls.valid.new(dls.valid_ds.of(pairs)))

@torch.no_grad()
def pseudo_labels_of(model, batches):
    "The share of confident pixels in pictures without masks, and how many of them are right by the masks held back."
    n = sure = right = 0
    for x, y in ((x.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor)) for x, y in batches):
        probability, label = model(x).softmax(1).max(1)
        counts = (y != 255) & (probability >= THRESHOLD)
        n, sure, right = n + int((y != 255).sum()), sure + int(counts.sum()), right + int((label == y)[counts].sum())
    return pd.DataFrame([('confident', '', sure / n, n), ('right', '', right / max(sure, 1), sure)],
                        columns=['metric', 'class', 'value', 'n_pixels'])

def shown(batches):
    "For each animal and for people, where among the validation pictures the first one that shows much of it is."
    y = torch.cat([y.as_subclass(torch.Tensor).cpu() for _, y in batches])
    return [int(((y == c).float().mean((1, 2)) > 0.1).float().argmax()) for c in range(1, len(SEVEN))]

@torch.no_grad()
def save_masks(file, model, batches):
    "The masks of six pictures side by side, as a picture of class numbers; the truth beside them once."
    at = shown(batches)
    x, y = (torch.cat([b[i].as_subclass(torch.Tensor) for b in batches])[at] for i in (0, 1))
    for path, masks in ((file, model(x).argmax(1)), (file.with_name('truth.png'), y)):
        Image.fromarray(np.concatenate(list(masks.cpu().numpy().astype('uint8')), 1)).save(path)

def run(a):
    ROWS.mkdir(exist_ok=True)
    a.models.mkdir(parents=True, exist_ok=True)
    valid, others = None, {}
    for n, arm, seed in order(a):
        stem = f'{a.size}-{n}-{arm.replace(", ", "-").replace(" + ", "-").replace(" ", "-")}-{seed}'
        if (file := ROWS/f'{stem}.csv').exists() or n not in (a.lists or LISTS): continue
        print(f'{n} pictures, {arm}, seed {seed}', flush=True)
        dls = loaders(a, n, seed, arm)
        learn, seconds = trained(a, dls, n, arm, seed)
        valid = valid or list(dls.valid)  # the same for all networks, so read once
        others[n] = others.get(n) or unseen(dls)
        df = pd.concat([scored(learn.model, valid), pseudo_labels_of(learn.model, others[n])], ignore_index=True)
        if (n, seed) == (65, 0): save_masks(ROWS/f'{stem}.png', learn.model, valid)
        log = learn.mlp_match.frame()
        df = df.assign(model=arm, labelled=n, train_seed=seed, steps=len(log), seconds=round(seconds, 1))
        last = log.drop(columns=['off', 'epoch', 'step']).tail(50).mean().round(4).to_dict()
        keep(file, df.round({'value': 5}), a, unlabelled=len(dls.train.dataset.unlabelled), last_50_steps=last)
        print(df[df['class'] == ''].set_index('metric')['value'].round(4).to_dict(), round(seconds), flush=True)

def comparisons(arms):
    "(a, b) of the protocol, among the arms that there are."
    unlabelled = [arm for arm in arms if ARMS[arm]['level'] != 'supervised']
    pairs = [(arm, control) for control in ('supervised', 'supervised, long') for arm in unlabelled]
    pairs += [(arm, 'UniMatch') for arm in unlabelled if arm not in ('FixMatch', 'UniMatch')]
    pairs += [('MLPMatch, three blocks off', 'MLPMatch'), ('supervised, long', 'supervised')]
    return [pair for pair in pairs if set(pair) <= set(arms)]

def claims(df):
    "All comparisons of the table over training seeds, corrected by Holm."
    main = df[df['metric'] == 'mIoU'].assign(seed=0, draw=0, level=0)  # nothing is drawn at random but the training
    found = [paired_difference(d, *pair, 'mIoU', 'seed').assign(labelled=n) for n, d in main.groupby('labelled')
             for pair in comparisons([arm for arm in ARMS if arm in set(d['model'])])]
    return corrected(pd.concat(found, ignore_index=True))

def table(a):
    df = pd.concat([pd.read_csv(f, keep_default_na=False, na_values={'value': ''})
                    for f in sorted(ROWS.glob(f'{a.size}-*.csv'))], ignore_index=True)
    whole = df.groupby(['labelled', 'model'])['train_seed'].transform('nunique') >= len(a.seeds)
    df = df[whole]  # a way enters the table with all of its seeds
    keep(out(a, 'mlpmatch_animals.csv'), df, a, validation=len(names('val')),
         networks=len(df.drop_duplicates(['model', 'labelled', 'train_seed'])))
    main = df[df['metric'] == 'mIoU']
    print(main.pivot_table(index=['labelled', 'model'], columns='train_seed', values='value').round(3).to_string())
    print(main.groupby('model')['seconds'].mean().round(1).to_string())
    print(claims(df).round(4).to_string())

def cost(a):
    dls = loaders(a, 65, 0, 'MLPMatch')
    methods = {arm: MatchStep(**settings, threshold=THRESHOLD, ignore_index=255, seed=0)
               for arm, settings in ARMS.items() if arm not in ('start', 'supervised, long')}
    df = step_cost(network(a, 0).to(default_device()), next(iter(dls.train)), methods, n=9)
    keep(out(a, 'mlpmatch_animals_cost.csv'), df, a, batch=f'{a.bs} pictures with masks, {a.bs} without')
    print(df.round(3).to_string())

if __name__ == '__main__':
    command_line(dict(run=run, cost=cost, table=table), __doc__, SIZES, (0, 1, 2), 'noisyseg-mlpmatch-animals',
                 lists=dict(type=int, nargs='+', choices=LISTS, help='numbers of pictures with masks; None: all'))
