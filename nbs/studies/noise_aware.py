"""The study of noise-aware training.

ResNet-20 on CIFAR-10, trained in eight ways, then attacked and rounded to few bits.

    python nbs/studies/noise_aware.py train --size small --seeds 0 1
        # a checkpoint for each way and seed; those that exist are kept
    python nbs/studies/noise_aware.py cost
        # noise_aware_cost.csv: the ways of training in turn, a few batches each
    python nbs/studies/noise_aware.py sweep --seeds 0 1
        # noise_aware_{training,attacks,bits}.csv; attacks resume where they stopped
    python nbs/studies/noise_aware.py train sweep --size full
        # the published length: 200 epochs on all of CIFAR-10, for a GPU

Test images are not looked at before `sweep`; validation images (held out of training) are for the loss curves, and
choose nothing.
"""
import sys
import time
from functools import partial

import pandas as pd
import torch
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import SGD
from fastai.torch_core import default_device, set_seed
from study import Clock, command_line, keep, machine, out

from noisyseg.measure.sensitivity import weight_std
from noisyseg.measure.summary import score_table
from noisyseg.measure.sweeps import sweep as run_sweep
from noisyseg.data.cifar import cifar10
from noisyseg.nets.classifiers import resnet20
from noisyseg.train.methods.damp import DAMP
from noisyseg.perturb.laws import AbsoluteGaussian, MaxGaussian, RelativeGaussian
from noisyseg.perturb.quantization import Quantize
from noisyseg.train.methods.ascent import multi_step_rho
from noisyseg.train.methods.sam_callback import SAMCallback
from noisyseg.perturb.selectors import conv_and_linear
from noisyseg.train.checkpoints import load_model, read_card, save_model
from noisyseg.train.noise import AccumulatingNoise, WeightNoise

SIZES = {  # n_test images for attacks and bits, n_card for the card of damp_corruptions.py; None: all
    'small': dict(epochs=6, subset=5000, width=8, bs=64, n_valid=500, n_test=500, n_card=250),
    'full': dict(epochs=200, subset=None, width=16, bs=128, n_valid=5000, n_test=None, n_card=None)}
LR, MOMENTUM, WD = 0.1, 0.9, 5e-4         # of a batch of 128; a smaller batch has a smaller learning rate
# of both naive ways; about a quarter of the convolutions' standard deviation before training, see the notebook
NOISE = 0.03
N_MAX, SIGMA, PER_DRAW = 0.1, 0.1, 16   # MaxGaussian; DAMP and its images in a sub-batch (128 in 8 parts, as published)
RELATIVE, ABSOLUTE, BITS = (0, 0.1, 0.2, 0.3, 0.5), (0, 0.01, 0.02, 0.05, 0.1), (2, 3, 4, 6, 8)

def multi_step(epochs):
    ("The published stairs, 0 by 0.02 every 10 of 200 epochs, in the same course over fewer: as many stairs as there "
     "are epochs, at most 20.")
    stairs = min(20, epochs)
    return multi_step_rho(step=0.4 / stairs, every=epochs // stairs)

def ways(a, seed):
    "What a network is trained with, by the way's name."
    return {
        'standard': [],
        'noise, recovered': [WeightNoise(AbsoluteGaussian(NOISE), where=conv_and_linear, seed=seed)],
        'noise, never removed': [AccumulatingNoise(AbsoluteGaussian(NOISE), seed=seed)],
        'SAM': [SAMCallback(0.05)],
        'multi-step SAM': [SAMCallback(multi_step(a.epochs))],
        'DAMP': [DAMP(SIGMA, a.bs // PER_DRAW, seed=seed)],
        'ASAM': [SAMCallback(0.5, adaptive=True)],
        'MaxGaussian noise': [WeightNoise(MaxGaussian(N_MAX), seed=seed)],
    }

def learner(a, dls, way, seed):
    set_seed(seed)
    dls.train.epoch = -1                                # the same batches, augmented alike, for all ways
    opt = partial(SGD, mom=MOMENTUM, wd=WD, decouple_wd=False)
    return Learner(dls, resnet20(width=a.width), CrossEntropyLossFlat(), opt_func=opt, metrics=accuracy,
                   cbs=[*ways(a, seed)[way], Clock()])

def fit(learn, a):
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(a.epochs, LR * a.bs / 128, moms=(MOMENTUM,) * 3)

def file(a, way, seed): return a.models/a.size/f'{way.replace(", ", "-").replace(" ", "-")}-{seed}.safetensors'
def data(a, seed=0, **kw): return cifar10(subset=a.subset, n_valid=a.n_valid, bs=a.bs, seed=seed, **kw)

def train(a):
    for seed in a.seeds:
        dls = None
        for way in ways(a, seed):
            if (path := file(a, way, seed)).exists(): continue
            print(f'{way}, seed {seed}', flush=True)
            dls = dls or data(a, seed)
            fit(learn := learner(a, dls, way, seed), a)
            names = learn.recorder.metric_names[1:-1]
            epochs = [dict(zip(names, map(float, v))) | {'seconds': s} for v,
                      s in zip(learn.recorder.values, learn.clock.seconds)]
            path.parent.mkdir(parents=True, exist_ok=True)
            save_model(learn, path, dataset=dls.about, way=way, seed=seed, history=epochs, hardware=machine(),
                       date=time.strftime('%Y-%m-%d'),
                       settings={k: getattr(a, k) for k in ('size', 'epochs', 'subset', 'width', 'bs')}
                       | dict(lr=LR * a.bs / 128, momentum=MOMENTUM, wd=WD))

def trained(a):
    "The networks that there are of these seeds, by way and training seed."
    return {(way, seed): load_model(f, device=default_device()) for way in ways(a, 0) for seed in a.seeds
            if (f := file(a, way, seed)).exists()}

def test_batches(a, n):
    "`n` of the test images, or all: every k-th, and since they are sorted by class, each class is there equally often."
    test = data(a).test
    x, y = (torch.cat([b[i].as_subclass(torch.Tensor) for b in test]) for i in (0, 1))
    some = slice(None, None, 1 if n is None else len(y) // n)
    return list(zip(x[some].split(250), y[some].split(250))), test

def training_table(a):
    rows = []
    for way, seed in trained(a):
        card, model = read_card(file(a, way, seed)), load_model(file(a, way, seed))
        std = weight_std(model).drop('fc.weight').mean()
        rows += [dict(model=way, train_seed=seed, epoch=i, conv_std=std, **h) for i, h in enumerate(card['history'], 1)]
    return pd.DataFrame(rows)

def sweep(a):
    models, (batches, test) = trained(a), test_batches(a, a.n_test)
    info = dict(data=test.dataset.about, test_images=sum(len(y) for _, y in batches),
                train_seeds=sorted({s for _, s in models}))
    keep(out(a, 'noise_aware_training.csv'), training_table(a), a, **info)
    common = dict(class_names=test.vocab, progress=sys.stdout.isatty())
    bits = run_sweep(models, batches, Quantize(), levels=(0, *BITS), **common)
    keep(out(a, 'noise_aware_bits.csv'), bits[bits['metric'] == 'accuracy'], a, **info)
    store = a.models/a.size/'attacks.csv'
    attacks = run_sweep(models, batches, {'relative': RelativeGaussian(), 'absolute': AbsoluteGaussian()},
                        levels={'relative': RELATIVE, 'absolute': ABSOLUTE}, draws=10, store=store, **common)
    attacks = attacks[attacks['metric'] == 'accuracy']
    keep(out(a, 'noise_aware_attacks.csv'), attacks, a, **info)
    print(score_table(attacks, 'accuracy').to_string())

def cost(a):
    "A few batches of each way in turn, five times over: so that all ways meet the same machine."
    dls, rows = cifar10(subset=10 * a.bs, n_valid=10, bs=a.bs, seed=0), []
    for k in range(6):                                  # the first round warms up, and does not count
        for way in ways(a, 0):
            learn = learner(a, dls, way, 0)
            # in the first epochs its rho is 0, and there it costs what standard training does
            if way == 'multi-step SAM': learn.sam.rho = 0.2
            with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
            if k: rows.append(dict(model=way, round=k, seconds=learn.clock.seconds[0], batches=10, batch_size=a.bs))
    keep(out(a, 'noise_aware_cost.csv'), df := pd.DataFrame(rows), a)
    wide = df.pivot(index='round', columns='model', values='seconds')
    print(wide.div(wide['standard'], axis=0).describe().T.round(3).to_string())

SETTINGS = {k: dict(type=int, help='instead of what the size says') for k in SIZES['small']}

if __name__ == '__main__':
    command_line(dict(train=train, cost=cost, sweep=sweep), __doc__, SIZES, (0, 1), 'noisyseg-cifar', **SETTINGS)
