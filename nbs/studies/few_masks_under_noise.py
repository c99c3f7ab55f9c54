"""The study of few masks under noise: do switched-off blocks, or noise in training, help against noise in weights?

    python nbs/studies/few_masks_under_noise.py measure --threads 1    # a file for each arm and seed; resumes
    python nbs/studies/few_masks_under_noise.py table                  # few_masks_under_noise.csv
    python nbs/studies/few_masks_under_noise.py measure table --size full    # longer, ten seeds, for a GPU

Protocol, written before any run of it. Looks that were taken before, all with clean networks on scenes of seeds 0 and
100 (seed 100 is not in the study): the time of a step at some sizes, and that 160 supervised steps at a learning rate
of 1e-2 reach an mIoU of about 0.5. No network was looked at under noise or corruption.

*Task*: procedural scenes of 48 pixels with discs and rings on a cluttered ground (three classes), 16 with masks and
96 without. A training seed draws the scenes, the first weights, the order and all that is random; the arms of a seed
share them, and see the same batches. *Test*: 32 scenes of a seed that no training has, looked at by `measure` alone.

*Network*: `unet3plus_slim` with one residual block a stage, without deep supervision, from random weights.
*Training*: STEPS steps of four labelled and four unlabelled scenes, fastai's Adam, one-cycle up to 1e-2, tau = 0.8.
Equal steps, so not equal time: a step of MLPMatch costs about four times a supervised one.

*Arms*: `supervised`; `supervised + noise`, with MaxGaussian(0.05) in the weights of each step; `UniMatch`; `MLPMatch`,
which is UniMatch with a residual block switched off in a further pass, over unlabelled images (network perturbation)
and over labelled ones (volatile learning); `MLPMatch + noise`.

*Conditions*: clean; MaxGaussian at its own levels, 2, 5 and 10 %, three draws each, the same for all networks;
gaussian_noise, defocus_blur and fog at severity 3 with CIFAR-10-C's settings, which are for small pictures.

*Reported*: mIoU. Three outcomes for each network: clean, the mean over the three levels of noise, and the mean over
the three corruptions. Four differences, paired by training seed: noise in supervised training; UniMatch over
supervised; MLPMatch over UniMatch; noise in MLPMatch. Student's t over seeds, Holm over all twelve. The share that is
kept under noise (its mIoU over the clean one) is shown beside it, as a description.

*Seeds*: 0, 1, 2 and, if the clock allows, 3 and 4, in this order; a seed counts when all of its arms are there. The
clock decides, never a score. With three seeds the interval of a mean is 2.5 standard deviations to either side, so
only large and steady differences can be clear; otherwise "not clear at this size" is the finding.
"""
import json
import time

import pandas as pd
from fastai.data.core import DataLoaders
from fastai.torch_core import set_seed
from study import command_line, keep, out

from noisyseg.data.corruptions import Corruption, CorruptedBatches
from noisyseg.data.datasets import scenes
from noisyseg.data.semi_supervised import semi_scenes
from noisyseg.measure.evaluation import draw_seed, scores
from noisyseg.measure.summary import corrected, paired_difference
from noisyseg.nets.unet3plus import unet3plus_slim
from noisyseg.perturb.clone import perturbed
from noisyseg.perturb.laws import MaxGaussian
from noisyseg.train.methods.mlpmatch import semi_learner

SIZES = {'small': dict(steps=100, seeds=(0, 1, 2, 3, 4)), 'full': dict(steps=2000, seeds=tuple(range(10)))}
CLASSES = ('disc', 'ring')
NOISE = MaxGaussian(0.05)
ARMS = {'supervised': dict(level='supervised'),
        'supervised + noise': dict(level='supervised', law=NOISE),
        'UniMatch': dict(level='unimatch'),
        'MLPMatch': dict(level='mlpmatch'),
        'MLPMatch + noise': dict(level='mlpmatch', law=NOISE)}
LEVELS, DRAWS = MaxGaussian.levels, 3
CORRUPTIONS, SEVERITY = ('gaussian_noise', 'defocus_blur', 'fog'), 3
TEST_SEED = 777
PAIRS = {'noise in supervised training': ('supervised + noise', 'supervised'),
         'unlabelled scenes': ('UniMatch', 'supervised'),
         'blocks switched off': ('MLPMatch', 'UniMatch'),
         'noise in MLPMatch': ('MLPMatch + noise', 'MLPMatch')}

def batches_of(a, seed):
    "The training batches of a seed, as many as there are steps, and what their loaders know."
    dls = semi_scenes(16, 96, 1, size=48, bs=4, seed=seed, classes=CLASSES, cache=True)
    found = []
    while len(found) < a.steps: found += list(dls.train)
    return found[:a.steps], dls

def trained(arm, seed, batches, dls):
    "The network of an arm, and what its training said."
    set_seed(seed)
    settings = ARMS[arm] | (dict(noise_args=dict(seed=seed)) if 'law' in ARMS[arm] else {})
    learn = semi_learner(DataLoaders(batches, []), unet3plus_slim, threshold=0.8, seed=seed, n_classes=dls.n_classes,
                         ignore_index=dls.ignore_index, metrics=[], columns=False,
                         arch_args=dict(layers=(1, 1, 1, 1), deep_supervision=False), **settings)
    begin = time.process_time()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 1e-2)
    return learn.model.eval(), dict(steps=len(batches), seconds=time.process_time() - begin)

def miou(model, batches, names):
    return next(value for metric, _, value, _ in scores(model, batches, names) if metric == 'mIoU')

def conditions(model, test, names):
    "The scores of a network: condition, level, draw, mIoU."
    yield 'clean', 0, 0, miou(model, test['clean'], names)
    for level in LEVELS:
        for k in range(DRAWS):
            with perturbed(model, MaxGaussian(level), generator=draw_seed(0, k)):
                yield 'weight noise', level, k, miou(model, test['clean'], names)
    for name in CORRUPTIONS: yield name, SEVERITY, 0, miou(model, test[name], names)

def tests():
    "The test scenes, clean and corrupted."
    dl = scenes(1, 32, 48, bs=32, seed=TEST_SEED, classes=CLASSES).valid
    found = {'clean': list(dl)}
    for name in CORRUPTIONS: found[name] = list(CorruptedBatches(dl, Corruption(name, SEVERITY, table='cifar')))
    return found, dl.vocab

def file(a, arm, seed): return a.models/f'{a.size}-{seed}-{arm.replace(" ", "-")}.json'

def measure(a):
    test, names = tests()
    a.models.mkdir(parents=True, exist_ok=True)
    for seed in a.seeds:
        missing = [arm for arm in ARMS if not file(a, arm, seed).exists()]
        batches, dls = batches_of(a, seed) if missing else (None, None)
        for arm in missing:
            model, facts = trained(arm, seed, batches, dls)
            rows = [dict(model=arm, train_seed=seed, condition=c, level=level, draw=k, mIoU=v, **facts)
                    for c, level, k, v in conditions(model, test, names)]
            file(a, arm, seed).write_text(json.dumps(rows, indent=1))
            print(f'{arm}, seed {seed}: done in {facts["seconds"]:.0f} s', flush=True)

def outcomes(df):
    "Clean, under noise, corrupted: a row for each network and outcome."
    kind = df['condition'].where(df['condition'].isin(['clean', 'weight noise']), 'corrupted')
    return df.assign(outcome=kind).groupby(['model', 'train_seed', 'outcome'], sort=False)['mIoU'].mean().reset_index()

def differences(df):
    "The four differences of the three outcomes, corrected for being twelve."
    rows = outcomes(df).rename(columns={'mIoU': 'value'}).assign(metric='mIoU', seed=0, draw=0)
    looks = {what: paired_difference(rows, x, y, unit='seed', by='outcome') for what, (x, y) in PAIRS.items()}
    return corrected(pd.concat(looks, names=['what']).reset_index(level=0))

def table(a):
    "The rows of all seeds that have every arm."
    rows = []
    for seed in a.seeds:
        files = [file(a, arm, seed) for arm in ARMS]
        if all(f.exists() for f in files): rows += [r for f in files for r in json.loads(f.read_text())]
    df = pd.DataFrame(rows)
    keep(out(a, 'few_masks_under_noise.csv'), df, a, train_seeds=sorted(df['train_seed'].unique().tolist()))
    print(outcomes(df).pivot_table(index='model', columns='outcome', values='mIoU').reindex(ARMS).round(3).to_string())
    print(differences(df)[['what', 'outcome', 'mean', 'half', 'p', 'clear', 'n']].round(3).to_string())

if __name__ == '__main__':
    command_line(dict(measure=measure, table=table), __doc__, SIZES, models='noisyseg-few-masks-noise')
