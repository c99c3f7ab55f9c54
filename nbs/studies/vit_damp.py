"""The study of a small vision transformer trained with DAMP, beside AdamW, SAM and ASAM.

    python nbs/studies/vit_damp.py choose                   # vit_damp_chosen.csv: sigma and the two rho
    python nbs/studies/vit_damp.py run --seeds 0 1 2        # a file for each network that was measured; resumes
    python nbs/studies/vit_damp.py table                    # vit_damp.csv, and what can be said

Protocol, written before any run but a trial of the script's own lines, on networks that had seen 300 pictures.

*Question*: the headline of DAMP (arXiv 2406.16540) is that a ViT-S/16 trained on ImageNet with multiplicative noise in
its weights stands corrupted pictures better than one trained with SAM, at the cost of plain training. Does that hold
for a small transformer, where it can be afterwards repeated on two cores?

*What was scaled*: `small`: torchvision's VisionTransformer on 32 x 32 pixels, patches of 8 (16 tokens and the class
token), four layers of width 96, three heads: 0.32 million weights instead of 22; 10,000 training pictures of CIFAR-10
(JPEGs of quality 75), ten epochs. `full`: patches of 4, six layers of width 192, all pictures but 5,000, 100 epochs.
Crops and mirrors, no other augmentation; the published recipe has far more of it. Such a network is far from trained:
the study compares ways of training it, and says nothing about a ViT-S/16.

*Ways*: AdamW (learning rate 1e-3, one cycle, weight decay 0.05, batches of 128); DAMP (eight sub-batches, each with its
own draw, on top of the same AdamW); SAM; ASAM (eta 0.01); and AdamW for twice as many epochs, which takes the time of
SAM. Layer norm knows no batch, so sub-batches without noise are AdamW itself, and need no control of their own.

*Choosing*: 1,000 training pictures, held out. For DAMP sigma = 0.1, 0.2, 0.4, for SAM rho = 0.02, 0.05, 0.1, for ASAM
rho = 0.2, 0.5, 1: a network each (seed 100, three epochs; `full`: 20), and the best mean accuracy over clean pictures
and four corruptions that the result does not count (speckle noise, Gaussian blur, spatter, saturation, severity 3).

*Measured*, once for each network, on test pictures (`small`: 500, `full`: all): without any disturbance; under the
fifteen standard corruptions of CIFAR-10-C at severities 1, 3 and 5; under multiplicative Gaussian noise in the weights
of all layers and norms at 0.1, 0.2 and 0.4, three draws. The same draws for all networks. (Two networks had been
measured when it was seen that their noise was in convolutions and batch norm only, of which a transformer has nearly
none. They were discarded, and the noise is now where DAMP's is.)

*Claims*, over training seeds (paired: the same seed, so the same order of pictures and the same first weights), 95 %
intervals by Student's t, Holm over all twelve comparisons: DAMP, SAM, ASAM and AdamW for twice as long, each against
AdamW, by accuracy on clean pictures, by the mean over corruptions and severities, and by the mean over levels of noise
in the weights. `clear` means a corrected p below 0.05. Seconds are of processor time, as a ratio to AdamW's.
"""
import json
import time
from functools import partial
from pathlib import Path

import fastai.callback.schedule  # noqa: F401  gives a Learner its fit_one_cycle
import pandas as pd
import torch
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import Adam
from fastai.torch_core import set_seed
from study import command_line, keep, out
from torchvision.models.vision_transformer import VisionTransformer

from noisyseg.data.cifar import cifar10
from noisyseg.data.corruptions import ALL_19, STANDARD_15, Corruption
from noisyseg.measure.summary import corrected, paired_difference
from noisyseg.measure.sweeps import sweep
from noisyseg.perturb.laws import MultiplicativeGaussian
from noisyseg.perturb.selectors import kernels_and_scales
from noisyseg.train.methods.damp import DAMP
from noisyseg.train.methods.sam_callback import SAMCallback

ROWS = Path(__file__).parent/'vit_damp'  # a file for each network that was measured
SIZES = {'small': dict(epochs=10, short=3, subset=10_000, n_valid=1000, n_test=500,
                       net=dict(patch_size=8, num_layers=4, num_heads=3, hidden_dim=96, mlp_dim=192)),
         'full': dict(epochs=100, short=20, subset=None, n_valid=5000, n_test=None,
                      net=dict(patch_size=4, num_layers=6, num_heads=3, hidden_dim=192, mlp_dim=384))}
BS, LR, WD = 128, 1e-3, 0.05
CANDIDATES = {'DAMP': (0.1, 0.2, 0.4), 'SAM': (0.02, 0.05, 0.1), 'ASAM': (0.2, 0.5, 1.)}
SEVERITIES, NOISE = (1, 3, 5), (0.1, 0.2, 0.4)
OTHERS = sorted({*ALL_19} - {*STANDARD_15})  # the corruptions that choose

def data(a, seed=0): return cifar10(subset=a.subset, n_valid=a.n_valid, bs=BS, seed=seed)

def method(way, strength, seed):
    "The callbacks of a way of training."
    return {'DAMP': lambda: [DAMP(strength, m=8, seed=seed)], 'SAM': lambda: [SAMCallback(strength)],
            'ASAM': lambda: [SAMCallback(strength, adaptive=True)]}.get(way, list)()

def trained(a, way, strength, seed, epochs):
    "The network, and the seconds of processor time that its training took."
    set_seed(seed)
    net = VisionTransformer(image_size=32, num_classes=10, **a.net)
    learn = Learner(data(a, seed), net, CrossEntropyLossFlat(), opt_func=partial(Adam, wd=WD),
                    cbs=method(way, strength, seed))
    start = time.process_time()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, LR)
    return learn.model.eval(), time.process_time() - start

def accuracies(model, batches, dls, corruptions, severities, noise=(), draws=1):
    "Rows of a network, clean and disturbed."
    kinds = {c: Corruption(c, table='cifar', stats=dls.stats) for c in corruptions}
    levels = {c: severities for c in corruptions}
    df = [sweep(model, batches, MultiplicativeGaussian(), levels=(0, *noise), draws=draws, where=kernels_and_scales,
                class_names=dls.vocab, progress=False),
          sweep(model, batches, kinds, levels=levels, draws=1, class_names=dls.vocab, progress=False)]
    df = pd.concat(df, ignore_index=True)
    return df[df['metric'] == 'accuracy']

def pictures(dl, n=None):
    "Batches of every k-th picture; they are sorted by class, so each class is there equally often."
    x, y = (torch.cat([b[i].as_subclass(torch.Tensor) for b in dl]) for i in (0, 1))
    step = 1 if n is None else len(y) // n
    return list(zip(x[::step].split(250), y[::step].split(250)))

def choose(a):
    dls, rows = data(a), []
    held = pictures(dls.valid)
    for way, strengths in CANDIDATES.items():
        for strength in strengths:
            model, _ = trained(a, way, strength, 100, a.short)
            score = accuracies(model, held, dls, OTHERS, (3,))['value'].mean()
            rows.append(dict(way=way, strength=strength, score=round(score, 4)))
            print(way, strength, round(score, 4), flush=True)
    df = pd.DataFrame(rows)
    best = df.loc[df.groupby('way')['score'].idxmax()].set_index('way')['strength'].to_dict()
    keep(out(a, 'vit_damp_chosen.csv'), df, a, pictures=f'{a.n_valid} training pictures, held out', chosen=best)

def ways(a):
    "{way of training: (strength, epochs)}"
    file = out(a, 'vit_damp_chosen.csv')
    best = json.loads(file.with_name(file.name + '.json').read_text())['chosen']
    return {'AdamW': (None, a.epochs), **{way: (best[way], a.epochs) for way in CANDIDATES},
            'AdamW, twice as long': (None, 2 * a.epochs)}

def run(a):
    ROWS.mkdir(exist_ok=True)
    for seed in a.seeds:
        for way, (strength, epochs) in ways(a).items():
            file = ROWS/f'{a.size}-{way.replace(", ", "-").replace(" ", "-")}-{seed}.csv'
            if file.exists(): continue
            model, seconds = trained(a, way, strength, seed, epochs)
            dls = data(a, seed)
            df = accuracies(model, pictures(dls.test, a.n_test), dls, STANDARD_15, SEVERITIES, NOISE, draws=3)
            df = df.assign(model=way, train_seed=seed, seconds=round(seconds, 1))
            keep(file, df.round({'value': 5}), a, strength=strength, data=dls.test.dataset.about)
            print(f'{way}, seed {seed}', summary(df).round(3).to_dict('records'), flush=True)

def summary(df):
    "A line for each network and what is asked of it: the mean accuracy on clean pictures, corrupted ones, under noise."
    asked = df['disturbance'].where(~df['disturbance'].isin(STANDARD_15), 'corrupted pictures')
    asked = asked.where(asked == 'corrupted pictures', 'noise in weights').where(df['level'] > 0, 'clean')
    return df.assign(asked=asked).groupby(['model', 'train_seed', 'asked'], as_index=False)['value'].mean()

def claims(df):
    "The protocol's twelve comparisons, corrected by Holm."
    means = summary(df).assign(metric='accuracy', draw=0, seed=0, level=0., **{'class': ''})
    found = [paired_difference(d, way, 'AdamW', 'accuracy', 'seed').assign(asked=asked)
             for way in (*CANDIDATES, 'AdamW, twice as long') for asked, d in means.groupby('asked')]
    return corrected(pd.concat(found, ignore_index=True))

def table(a):
    df = pd.concat([pd.read_csv(f) for f in sorted(ROWS.glob(f'{a.size}-*.csv'))], ignore_index=True)
    keep(out(a, 'vit_damp.csv'), df, a)
    print(summary(df).pivot_table(index='model', columns='asked', values='value').round(3).to_string())
    print(claims(df).round(4).to_string())

if __name__ == '__main__':
    command_line(dict(choose=choose, run=run, table=table), __doc__, SIZES, (0, 1, 2))
