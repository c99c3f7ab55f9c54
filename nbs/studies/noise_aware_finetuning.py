"""The study of noise-aware fine-tuning: a ResNet-20 that others trained, a little more of training in eight ways, and
what each then withstands.

    python nbs/studies/noise_aware_finetuning.py choose                    # noise_aware_finetuning_levels.csv
    python nbs/studies/noise_aware_finetuning.py run --seeds 0 1 2 3 4     # a file for each way and seed; resumes
    python nbs/studies/noise_aware_finetuning.py table                     # noise_aware_finetuning.csv, and the claims

Protocol, written before any run, but for a trial of the script's own lines, which scored the untouched network on 50
test images. `noise_aware.py` trains small networks from nothing, for six epochs: they are far from trained. Here the
network is a public one, which was trained for 200 epochs (resnet20-12fca82f, published with 91.8 %, 81.0 % on this JPEG
copy), and what is compared is how it goes on.

*Data*: CIFAR-10 as JPEGs of quality 75, so no accuracy is a paper's. `small`: 4,000 training images (equally many of
each class), two epochs of them, 500 test images, five training seeds. `full`: all training images but 5,000, twenty
epochs, the whole test set. Order and augmentation of images are the same for all ways of one seed.

*Ways*: `standard` (goes on without noise: the control); `noise` (RelativeGaussian at the chosen level on convolutions
and the linear layer, recovered after each batch); `noise, first stages` (the same, only in conv1, layer1 and layer2)
and `noise, last stage` (only in layer3 and fc); `SAM` (rho = 0.05); `SAM with noise` (both passes of a step under the
same draw); `SAM, quarter batch` (the ascent looks at a quarter of the samples) and `SAM, every 4th step`. Beside them
`untouched`, the network as published. SGD, momentum 0.9, weight decay 1e-4 (as it was trained), batches of 64, one
cycle up to a learning rate of 0.01 for all; nothing was tuned.

*Choosing*: 1,000 training images that were held out say at which of RELATIVE and of ABSOLUTE strengths the untouched
network keeps the share of its accuracy that lies nearest to 75 % (two draws). The first is the training level.

*Measured* on test images, once for each network: without noise, and under the relative and the absolute attack at half,
once and one and a half times their chosen strengths, five draws each, the same for all networks.

*Claims*, over training seeds (paired: the same seed, the mean over draws), 95 % intervals by Student's t: (1) each way
against `standard` without noise and at the chosen strength of each attack, 21 comparisons, corrected by Holm; (2) the
two cheap ways of SAM against `SAM`, at the same three, six comparisons, corrected by Holm. `clear` means a corrected
p below 0.05. Costs are seconds of processor time of a training, as a ratio to `standard` of the same seed.
"""
import json
import time
from functools import partial
from pathlib import Path

import fastai.callback.schedule  # noqa: F401  gives a Learner its fit_one_cycle
import pandas as pd
import torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from study import command_line, keep, out

from noisyseg.data.cifar import cifar10
from noisyseg.data.files import data_root
from noisyseg.measure.summary import corrected, paired_difference
from noisyseg.measure.sweeps import sweep
from noisyseg.nets.classifiers import read_resnet_cifar
from noisyseg.perturb.laws import AbsoluteGaussian, RelativeGaussian
from noisyseg.perturb.selectors import by_name, conv_and_linear
from noisyseg.train.methods.sam_callback import SAMCallback
from noisyseg.train.noise import WeightNoise

ROWS = Path(__file__).parent/'noise_aware_finetuning'  # a file for each network that was measured
SIZES = {'small': dict(epochs=2, subset=4000, n_valid=1000, n_test=500),
         'full': dict(epochs=20, subset=None, n_valid=5000, n_test=None)}
BS, LR, MOMENTUM, WD, KEPT = 64, 0.01, 0.9, 1e-4, 0.75
RELATIVE = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
ABSOLUTE = (0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05)
LAWS = {'relative': RelativeGaussian(), 'absolute': AbsoluteGaussian()}
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FIRST = by_name('conv1.*', 'layer1.*', 'layer2.*')

def untouched(): return read_resnet_cifar(data_root()/'pretrained'/'resnet_cifar10'/'resnet20-12fca82f.th')

def data(a, seed=0):
    return cifar10(subset=a.subset, n_valid=a.n_valid, bs=BS, seed=seed, stats=IMAGENET)

def choose(a):
    batches = [tuple(t.as_subclass(torch.Tensor) for t in b) for b in data(a).valid]
    df = sweep(untouched(), batches, LAWS, levels={'relative': (0, *RELATIVE), 'absolute': (0, *ABSOLUTE)}, draws=2,
               progress=False)
    df = df[df['metric'] == 'accuracy']
    share = df.groupby(['disturbance', 'level'])['value'].mean() / df.loc[df['level'] == 0, 'value'].mean()
    found = {kind: float((share[kind].drop(0, errors='ignore') - KEPT).abs().idxmin()) for kind in LAWS}
    print(share.round(3).to_string(), found, sep='\n')
    keep(out(a, 'noise_aware_finetuning_levels.csv'), df, a, pictures=f'{a.n_valid} training images, held out',
         chosen=found)

def chosen(a):
    "{attack: strength}, from `choose`"
    file = out(a, 'noise_aware_finetuning_levels.csv')
    return json.loads(file.with_name(file.name + '.json').read_text())['chosen']

def ways(a, seed):
    "What a network is trained with, by the way's name."
    noise = partial(WeightNoise, RelativeGaussian(chosen(a)['relative']), seed=seed)
    return {'standard': [],
            'noise': [noise(where=conv_and_linear)],
            'noise, first stages': [noise(where=conv_and_linear & FIRST)],
            'noise, last stage': [noise(where=conv_and_linear & ~FIRST)],
            'SAM': [SAMCallback(0.05)],
            'SAM with noise': [noise(where=conv_and_linear), SAMCallback(0.05)],
            'SAM, quarter batch': [SAMCallback(0.05, batch_part=0.25)],
            'SAM, every 4th step': [SAMCallback(0.05, every=4)]}

class ShowLosses(Callback):
    def after_epoch(self):
        print('  epoch', self.epoch + 1, *(f'{v:.3f}' for v in self.learn.recorder.log[1:3]), flush=True)

def trained(a, way, seed):
    "The network, and the seconds of processor time that its training took."
    set_seed(seed)
    opt = partial(SGD, mom=MOMENTUM, wd=WD, decouple_wd=False)
    learn = Learner(data(a, seed), untouched().to(memory_format=torch.channels_last), CrossEntropyLossFlat(),
                    opt_func=opt, cbs=[*ways(a, seed)[way], ShowLosses()])
    start = time.process_time()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(a.epochs, LR, moms=(MOMENTUM,) * 3)
    return learn.model.eval(), time.process_time() - start

def measured(a, model, name, seed):
    "Rows of both attacks on test images."
    test = data(a).test
    x, y = (torch.cat([b[i].as_subclass(torch.Tensor) for b in test]) for i in (0, 1))
    step = 1 if a.n_test is None else len(y) // a.n_test   # images are sorted by class: each is there equally often
    batches = list(zip(x[::step].split(250), y[::step].split(250)))
    levels = {kind: (0, *(round(share * level, 6) for share in (0.5, 1, 1.5))) for kind, level in chosen(a).items()}
    df = sweep({(name, seed): model}, batches, LAWS, levels=levels, draws=5, class_names=test.vocab, progress=False)
    return df[df['metric'] == 'accuracy']

def run(a):
    ROWS.mkdir(exist_ok=True)
    for seed in a.seeds:
        for way in ('untouched', *ways(a, seed)):
            file = ROWS/f'{a.size}-{way.replace(", ", "-").replace(" ", "-")}-{seed}.csv'
            if file.exists() or (way == 'untouched' and seed): continue
            print(f'{way}, seed {seed}', flush=True)
            model, seconds = (untouched(), 0.) if way == 'untouched' else trained(a, way, seed)
            df = measured(a, model, way, seed)
            keep(file, df.assign(seconds=round(seconds, 1)), a)
            print(df.groupby(['disturbance', 'level'])['value'].mean().round(3).to_dict(), flush=True)

def claims(df, levels):
    "The protocol's two families of comparisons, each corrected by Holm."
    some = {('relative', 0), *levels.items()}
    at = df[[pair in some for pair in zip(df['disturbance'], df['level'])]]
    def against(control, others):
        found = [paired_difference(d, way, control, 'accuracy', 'seed').assign(attack=kind)
                 for way in others for kind, d in at.groupby('disturbance')]
        return corrected(pd.concat(found, ignore_index=True)).assign(family=f'against {control}')
    others = [way for way in df['model'].unique() if way not in ('standard', 'untouched')]
    return pd.concat([against('standard', others), against('SAM', [w for w in others if w.startswith('SAM, ')])])

def table(a):
    df = pd.concat([pd.read_csv(f) for f in sorted(ROWS.glob(f'{a.size}-*.csv'))], ignore_index=True)
    keep(out(a, 'noise_aware_finetuning.csv'), df, a)
    print(df.pivot_table(index='model', columns=['disturbance', 'level'], values='value').round(3).to_string())
    print(claims(df, chosen(a)).round(4).to_string())

if __name__ == '__main__':
    command_line(dict(choose=choose, run=run, table=table), __doc__, SIZES, (0, 1, 2, 3, 4))
