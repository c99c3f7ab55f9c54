"""The study of corrupted inputs.

The networks of noise_aware.py under 19 corruptions, and under everything else that a robustness card knows.

    python nbs/studies/damp_corruptions.py train --size small --seeds 0 1
        # the same networks as noise_aware.py's; those that exist are kept
    python nbs/studies/damp_corruptions.py card --seeds 0 1
        # damp_corruptions.csv; resumes where it was stopped
    python nbs/studies/damp_corruptions.py segmentation
        # camvid_robustness_card.csv, from the CamVid study's checkpoints
    python nbs/studies/damp_corruptions.py train card --size full         # the published length, for a GPU
"""
import argparse
import sys

import camvid_weight_noise
import pandas as pd
import torch
from noise_aware import SETTINGS, SIZES, test_batches, train, trained
from study import HERE, command_line, keep, out

from noisyseg.data.corruptions import ALL_19, STANDARD_15, Corruption
from noisyseg.measure.card import card_table, robustness_card, standard_disturbances

STRENGTHS = {'weight noise': (0.05, 0.1, 0.2), 'relative attack': (0.1, 0.2, 0.5),
             'absolute attack': (0.01, 0.02, 0.05), 'fewer bits': (4, 3, 2)}

def costs(a):
    "Training cost from the interleaved measurement, as multiples of standard training's; none without it."
    if not (path := out(a, 'noise_aware_cost.csv')).exists(): return None
    wide = pd.read_csv(path).pivot(index='round', columns='model', values='seconds')
    return wide.div(wide['standard'], axis=0).median().to_dict()

def card(a):
    models, (batches, test) = trained(a), test_batches(a, a.n_card)
    usual = standard_disturbances((32, 32), ALL_19, test.stats)
    df = robustness_card(models, batches, usual, levels=STRENGTHS, draws=10, baseline='standard', cost=costs(a),
                         class_names=test.vocab, store=a.models/a.size/'card.csv', progress=sys.stdout.isatty())
    df = df[df['metric'] == 'accuracy'].drop(columns='class')
    info = dict(data=test.dataset.about, test_images=sum(len(y) for _, y in batches),
                train_seeds=sorted({s for _, s in models}))
    keep(out(a, 'damp_corruptions.csv'), df, a, **info)
    print(card_table(df.assign(**{'class': ''})).T.to_string())

def segmentation(a):
    ("The networks of the CamVid study (UNet3+, clean and noise-trained) under corruptions; their weight noise was "
     "measured there.")
    valid = camvid_weight_noise.validation()
    x, y = (torch.cat([b[i].as_subclass(torch.Tensor) for b in valid]) for i in (0, 1))
    batches = list(zip(x[::2].split(8), y[::2].split(8)))
    corrupted = [Corruption(name, stats=valid.stats) for name in STANDARD_15]
    df = robustness_card(camvid_weight_noise.trained(), batches, {Corruption.label: corrupted},
                         levels={Corruption.label: (1, 3, 5)}, baseline='clean',
                         ignore_index=valid.ignore_index, class_names=valid.vocab, store=a.models/'camvid-card.csv',
                         progress=sys.stdout.isatty())
    df = df[df['metric'] == 'mIoU'].drop(columns='class')
    keep(HERE/'camvid_robustness_card.csv', df, argparse.Namespace(threads=a.threads),
         data='CamVid, validation, every other image, 120×160',
         test_images=sum(len(y) for _, y in batches))
    print(card_table(df.assign(**{'class': ''})).T.to_string())

if __name__ == '__main__':
    command_line(dict(train=train, card=card, segmentation=segmentation), __doc__, SIZES, (0, 1), 'noisyseg-cifar',
                 **SETTINGS)
