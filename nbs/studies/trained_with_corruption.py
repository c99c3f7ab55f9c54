"""The study of training with one corruption, beside DAMP, which knows none.

    python nbs/studies/trained_with_corruption.py choose                # trained_with_corruption_chosen.csv: sigma
    python nbs/studies/trained_with_corruption.py run --seeds 0 1 2     # a file for each network; resumes
    python nbs/studies/trained_with_corruption.py table                 # trained_with_corruption.csv, and claims

Protocol, written before any run but two trials: of the script's own lines (a few batches, tested on 20 pictures), and
of plain SGD on pictures held out of training (six settings of learning rate, batch size and width).

*Question*: figure 3 of DAMP (arXiv 2406.16540; figures 5 and 6 for CIFAR-10 and TinyImageNet) has a row for each way of
training and a column for each corruption in the test. Its rows: SGD, DAMP, and SGD with half of each batch under one
corruption, for the five corruptions with the best mean. It says: a corruption in training helps against that
corruption, and may cost elsewhere; DAMP, which knows none, helps against all. Does that hold in a short training that
can be repeated on one core?

*What was scaled*, `small`: a ResNet of seven convolutions (one block in each stage) of width 8, where the paper has a
ResNet-18 of width 64. CIFAR-10 in JPEGs of quality 75: 10,000 training pictures, six epochs (the paper: all, 300).
TinyImageNet, 32 x 32 pixels, JPEGs: 20 of 200 classes (every tenth), 2,000 training pictures, 14 epochs (the paper: 64
x 64 pixels, all, 150). Batches of 64, SGD with momentum 0.9, one cycle up to a learning rate of 0.4, weight decay 5e-4,
crops and mirrors, no AugMix or other augmentation. `full`: ResNet-20, all pictures, 150 epochs.

*Ways*: SGD; DAMP in four sub-batches of sixteen pictures, each with its own draw (as many pictures to a draw as
published), batch norm over the whole batch as in the authors' code; SGD with half of each batch under one corruption
at severity 3, drawn afresh for each picture and epoch, after crop and mirror: Gaussian noise, zoom blur, fog, pixelate,
one from each family (the paper shows the five that did best in its test; three of these four are among them on both
sets). The text of the paper does not say with which severity it trained.

*Controls of DAMP*: without noise its sub-batches under a common batch norm have SGD's gradient, so SGD is its control;
and, since noise takes time, `SGD, longer`: a third more epochs. Seconds of processor time are kept.

*Choosing*: sigma of 0.05, 0.1, 0.2 (published: 0.2 for both sets), a network each (seed 100, full length), by the mean
accuracy on training pictures that were held out (CIFAR-10: 1,000; TinyImageNet: 500), clean and under four corruptions
that the result does not count (speckle noise, Gaussian blur, spatter, saturation, severity 3). Nothing else is chosen.

*Measured*, once for each network, on 500 test pictures (`full`: all), evenly over the classes: without any disturbance,
and under the fifteen standard corruptions with CIFAR-10-C's settings at severities 1, 3 and 5 (`full`: 1 to 5), the
same corrupted pictures for all networks. TinyImageNet's test pictures are its validation set, whose labels are public.

*Claims*: five comparisons a set, over three training seeds (paired: the same order of pictures and first weights), in
accuracy, mean over severities; 95 % intervals by Student's t, Holm over the five. CIFAR-10 is the primary set,
TinyImageNet repeats it, with a Holm of its own. (1) Trained with a corruption, tested on it, against SGD: mean over the
four. (2) The same networks on the fourteen other corruptions, against SGD. (3) DAMP against SGD, on all fifteen. (4)
DAMP against SGD for longer, on all fifteen. (5) DAMP against the mean of the four trained with a corruption, on all
fifteen. `clear` means a corrected p below 0.05. All else, single rows and columns included, is description.

Added after sigma had been chosen and before any network was tested, since the machine turned out to be slow: CIFAR-10
is measured first, then TinyImageNet seed by seed, and its third seed is left out if the time is up by then.
"""
import json
import os
import time
import zipfile
from functools import partial
from pathlib import Path

import fastai.callback.schedule  # noqa: F401  gives a Learner its fit_one_cycle
import pandas as pd
import torch
from fastai.data.external import fastai_path
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from study import command_line, keep, out

from noisyseg.data.cifar import cifar10, class_folders
from noisyseg.data.corruptions import ALL_19, STANDARD_15, CorruptBatch, Corruption
from noisyseg.data.datasets import find_set
from noisyseg.measure.summary import corrected, paired_difference
from noisyseg.nets.classifiers import SmallResNet
from noisyseg.train.methods.damp import DAMP

ROWS = Path(__file__).parent/'trained_with_corruption'  # a file for each network that was measured
SIZES = {'small': dict(blocks=(1, 1, 1), width=8, severities=(1, 3, 5), sets={
             'CIFAR-10': dict(subset=10_000, n_valid=1000, n_test=500, epochs=6, longer=8),
             'TinyImageNet': dict(classes=20, n_valid=500, n_test=500, epochs=14, longer=19)}),
         'full': dict(blocks=(3, 3, 3), width=16, severities=(1, 2, 3, 4, 5), sets={
             'CIFAR-10': dict(subset=None, n_valid=5000, n_test=None, epochs=150, longer=200),
             'TinyImageNet': dict(classes=200, n_valid=5000, n_test=None, epochs=150, longer=200)})}
BS, LR, MOMENTUM, WD = 64, 0.4, 0.9, 5e-4
TRAINED = ('gaussian_noise', 'zoom_blur', 'fog', 'pixelate')  # one of each family of the fifteen
SEVERITY = 3  # of the corruption in training
SIGMAS = (0.05, 0.1, 0.2)
OTHERS = sorted({*ALL_19} - {*STANDARD_15})  # the corruptions that choose
# mean and standard deviation of the pixels of TinyImageNet
TINY_STATS = (0.4802, 0.4481, 0.3975), (0.2764, 0.2689, 0.2816)

class HalfCorrupted(CorruptBatch):
    "The first half of each batch, corrupted afresh; batches are shuffled, so any picture may be in it."
    def encodes(self, b):
        x, *targets = b
        half = len(x) // 2
        self.seen += half
        return torch.cat([self.corruption(x[:half], index=self.seen - half), x[half:]]), *targets

def tiny_archive(classes):
    "One archive `split/class/picture` of as many classes, evenly over the sorted 200, from the two that there are."
    folder = find_set(None, ['tinyimagenet32'], ['val.zip'], None, False)
    file = fastai_path('data')/f'tinyimagenet32-{classes}-classes.zip'
    if file.exists(): return file
    names = sorted((folder/'wnids.txt').read_text().split())[::200 // classes]
    part = file.with_suffix('.part')
    part.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(part, 'w') as to:
        for split, source in (('train', 'train-1.zip'), ('test', 'val.zip')):
            with zipfile.ZipFile(folder/source) as z:
                for name in z.namelist():
                    wanted = name.split('/')[0] in names and not name.endswith('/')
                    if wanted: to.writestr(f'{split}/{name}', z.read(name))
    os.replace(part, file)
    return file

def data(a, name, seed):
    "Batches of a set; the same pictures for all seeds, in another order."
    s = a.sets[name]
    if name == 'CIFAR-10': return cifar10(subset=s['subset'], n_valid=s['n_valid'], bs=BS, seed=seed)
    return class_folders(tiny_archive(s['classes']), n_valid=s['n_valid'], bs=BS, seed=seed, stats=TINY_STATS,
                         name=f"TinyImageNet, 32x32 pixels, {s['classes']} classes")

def trained(a, dls, seed, epochs, sigma=None, corruption=None):
    "The network, and the seconds of processor time that its training took."
    set_seed(seed)
    net = SmallResNet(len(dls.vocab), blocks=a.blocks, width=a.width).to(memory_format=torch.channels_last)
    if corruption:
        dls.train.after_batch.add(HalfCorrupted(Corruption(corruption, SEVERITY, seed, 'cifar', dls.stats)))
    learn = Learner(dls, net, CrossEntropyLossFlat(), opt_func=partial(SGD, mom=MOMENTUM, wd=WD, decouple_wd=False),
                    cbs=[] if sigma is None else [DAMP(sigma, m=4, batchnorm='sync', seed=seed)])
    start = time.process_time()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, LR, moms=(MOMENTUM,) * 3)
    return learn.model.eval(), time.process_time() - start

def pictures(s, n, corruptions, severities):
    "({(corruption, severity): pictures as bytes}, labels), of every k-th picture; they are sorted by class."
    some = slice(None, None, 1 if n is None else len(s) // n)
    x = s.x[some]
    found = {('none', 0): x}
    for c in corruptions:
        for severity in severities: found[c, severity] = Corruption(c, severity, table='cifar')(x)
    return found, s.labels[some]

@torch.no_grad()
def accuracies(model, tests, y, stats):
    "Rows of a network: the share of pictures that it knows, for each corruption and severity."
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in stats)
    rows = []
    for (corruption, severity), x in tests.items():
        answers = torch.cat([model((b / 255 - mean) / std).argmax(1) for b in x.split(250)])
        rows.append(dict(corruption=corruption, severity=severity, accuracy=(answers == y).float().mean().item()))
    return pd.DataFrame(rows)

def choose(a):
    rows = []
    for name, s in a.sets.items():
        held = data(a, name, 100).valid.dataset
        tests, y = pictures(held, None, OTHERS, (SEVERITY,))
        for sigma in SIGMAS:
            dls = data(a, name, 100)
            model, _ = trained(a, dls, 100, s['epochs'], sigma)
            score = accuracies(model, tests, y, dls.stats)['accuracy'].mean()
            rows.append(dict(set=name, sigma=sigma, score=round(score, 4)))
            print(name, sigma, round(score, 4), flush=True)
    df = pd.DataFrame(rows)
    best = df.loc[df.groupby('set')['score'].idxmax()].set_index('set')['sigma'].to_dict()
    keep(out(a, 'trained_with_corruption_chosen.csv'), df, a, pictures='training pictures, held out', chosen=best)

def ways(a, name):
    "{way of training: what `trained` is told of it}"
    s = a.sets[name]
    file = out(a, 'trained_with_corruption_chosen.csv')
    sigma = json.loads(file.with_name(file.name + '.json').read_text())['chosen'][name]
    return {'SGD': dict(epochs=s['epochs']), 'DAMP': dict(epochs=s['epochs'], sigma=sigma),
            **{c: dict(epochs=s['epochs'], corruption=c) for c in TRAINED}, 'SGD, longer': dict(epochs=s['longer'])}

def run(a):
    ROWS.mkdir(exist_ok=True)
    for name, s in a.sets.items():
        tests = None
        for seed in a.seeds:
            for way, told in ways(a, name).items():
                file = ROWS/f'{a.size}-{name}-{way.replace(", ", "-")}-{seed}.csv'
                if file.exists(): continue
                dls = data(a, name, seed)
                model, seconds = trained(a, dls, seed, **told)
                tests = tests or pictures(dls.test.dataset, s['n_test'], STANDARD_15, a.severities)
                df = accuracies(model, *tests, dls.stats)
                df = df.assign(set=name, way=way, train_seed=seed, seconds=round(seconds, 1))
                keep(file, df.round({'accuracy': 5}), a, told=told, data=dls.test.dataset.about,
                     test_images=len(tests[1]))
                mean = df.groupby(df['corruption'] == 'none')['accuracy'].mean()
                print(f'{name}, {way}, seed {seed}: clean {mean[True]:.3f}, corrupted {mean[False]:.3f}, '
                      f'{seconds:.0f} s', flush=True)

def by_corruption(df, name):
    "Accuracy on one set, mean over severities: a line for each training seed and way, a column for each corruption."
    return df[df['set'] == name].pivot_table(index=['train_seed', 'way'], columns='corruption', values='accuracy')

def asked(wide):
    "{comparison of the protocol: (accuracies, those they are compared with)}, by training seed."
    of = {way: wide.xs(way, level='way') for way in ('SGD', 'DAMP', 'SGD, longer', *TRAINED)}
    rest = {c: [t for t in STANDARD_15 if t != c] for c in TRAINED}
    all15 = {way: d[[*STANDARD_15]].mean(axis=1) for way, d in of.items()}
    over = lambda values: sum(values) / len(TRAINED)
    return {'trained with it - SGD, on that corruption': (over([of[c][c] for c in TRAINED]),
                                                          over([of['SGD'][c] for c in TRAINED])),
            'trained with another - SGD, on the fourteen others': (
                over([of[c][rest[c]].mean(axis=1) for c in TRAINED]),
                over([of['SGD'][rest[c]].mean(axis=1) for c in TRAINED])),
            'DAMP - SGD, on all fifteen': (all15['DAMP'], all15['SGD']),
            'DAMP - SGD for its time, on all fifteen': (all15['DAMP'], all15['SGD, longer']),
            'DAMP - trained with one, on all fifteen': (all15['DAMP'], over([all15[c] for c in TRAINED]))}

def claims(df, name):
    "The protocol's five comparisons on one set, corrected by Holm."
    found = []
    for what, pair in asked(by_corruption(df, name)).items():
        d = pd.concat(dict(zip('ab', pair)), names=['model']).rename('value').reset_index()
        d = d.assign(metric='accuracy', draw=0, seed=0, level=0.)
        found.append(paired_difference(d, 'a', 'b', 'accuracy', 'seed').assign(asked=what, set=name))
    return corrected(pd.concat(found, ignore_index=True))

def table(a):
    df = pd.concat([pd.read_csv(f) for f in sorted(ROWS.glob(f'{a.size}-*.csv'))], ignore_index=True)
    keep(out(a, 'trained_with_corruption.csv'), df, a)
    for name in df['set'].unique():
        print(by_corruption(df, name).groupby('way').mean().mul(100).round(1).T.to_string())
        print(claims(df, name)[['asked', 'mean', 'low', 'high', 'n', 'p', 'clear']].round(4).to_string())

if __name__ == '__main__':
    command_line(dict(choose=choose, run=run, table=table), __doc__, SIZES, (0, 1, 2))
