"""The study of the robustness family on segmentation.

UNet3+ on CamVid, trained in five ways, under everything that a robustness card knows.

    python nbs/studies/camvid_methods.py train --seeds 0 1
        # a checkpoint for each way and seed; those that exist are kept
    python nbs/studies/camvid_methods.py card --seeds 0 1           # camvid_methods.csv; resumes where it was stopped
    python nbs/studies/camvid_methods.py train card --size full     # a longer training at a larger size, for a GPU

The validation images are not looked at before `card`: training runs a fixed number of epochs, and scores choose
nothing. They are frames of one clip. The settings are nobody's tuned ones, and DAMP's sub-batches are two images with a
batch norm each: the notebook says what follows from that.
"""
import sys
import time

import torch
from fastai.torch_core import default_device, set_seed
from study import Clock, NoPeeking, command_line, keep, machine, out

from noisyseg.train.methods.damp import DAMP
from noisyseg.data.datasets import camvid
from noisyseg.measure.jobs import OnRay
from noisyseg.perturb.laws import MaxGaussian
from noisyseg.train.losses import DeepSupervisionLoss, HybridLoss
from noisyseg.measure.card import card_table, robustness_card, standard_disturbances
from noisyseg.train.methods.sam_callback import SAMCallback
from noisyseg.train.checkpoints import load_model, read_card, save_model
from noisyseg.train.learner import segmentation_learner
from noisyseg.train.noise import WeightNoise
from noisyseg.nets.unet3plus import unet3plus_small

SIZES = {'small': dict(size=(96, 128), epochs=20, bs=8, every=4),
         'full': dict(size=(240, 320), epochs=100, bs=16, every=1)}
LR = 4e-3
N, SIGMA, PARTS = 0.1, 0.1, 4          # MaxGaussian; DAMP and its sub-batches
STRENGTHS = {'weight noise': (0.05, 0.1), 'relative attack': (0.1,), 'absolute attack': (0.02,), 'fewer bits': (4,),
             'corrupted inputs': (1, 3, 5)}

def ways(seed):
    "What a network is trained with, by the way's name; the optimizer of all is Adam, as in the CamVid study."
    return {
        'standard': [],
        'weight noise': [WeightNoise(MaxGaussian(N, alpha=2.), seed=seed)],
        'DAMP': [DAMP(SIGMA, PARTS, seed=seed)],
        'SAM': [SAMCallback(0.05)],
        'ASAM': [SAMCallback(0.5, adaptive=True)],
    }

def file(a, way, seed): return a.models/a.size/f'camvid-{way.replace(" ", "-")}-{seed}.safetensors'

def train(a):
    for seed in a.seeds:
        for way in ways(seed):
            if (path := file(a, way, seed)).exists(): continue
            print(f'{way}, seed {seed}', flush=True)
            set_seed(seed)
            size = SIZES[a.size]['size']
            dls = camvid(size=size, bs=a.bs, seed=seed, cache=True)
            loss = DeepSupervisionLoss(HybridLoss(msssim=0, ignore_index=dls.ignore_index))
            clock = Clock()
            learn = segmentation_learner(dls, unet3plus_small, None, loss,
                                         arch_args=dict(upsample='after', deep_supervision=False), metrics=[],
                                         cbs=[*ways(seed)[way], NoPeeking(), clock])
            with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(a.epochs, LR)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_model(learn, path, dataset='CamVid, 11 classes, train (367 images)', way=way, seed=seed,
                       seconds=clock.seconds, hardware=machine(),
                       date=time.strftime('%Y-%m-%d'), settings=dict(size=size, epochs=a.epochs, bs=a.bs, lr_max=LR))

def card(a):
    models = {(way, seed): load_model(f, device=default_device()) for way in ways(0) for seed in a.seeds
              if (f := file(a, way, seed)).exists()}
    cost = {way: sum(read_card(file(a, way, a.seeds[0]))['seconds']) for way in dict.fromkeys(w for w, _ in models)}
    valid = camvid(size=SIZES[a.size]['size'], bs=8, seed=0, augment=False).valid
    x, y = (torch.cat([b[i].as_subclass(torch.Tensor) for b in valid]) for i in (0, 1))
    some = slice(None, None, SIZES[a.size]['every'])
    usual = standard_disturbances(x.shape[2:], stats=valid.stats)
    df = robustness_card(models, list(zip(x[some].split(8), y[some].split(8))), usual, levels=STRENGTHS, draws=10,
                         baseline='standard', cost=cost, ignore_index=valid.ignore_index, class_names=valid.vocab,
                         store=a.models/a.size/'camvid-methods-card.csv',
                         progress=sys.stdout.isatty(), on=OnRay(threads=a.threads) if a.on == 'ray' else a.on)
    df = df[df['metric'] == 'mIoU'].drop(columns='class')
    keep(out(a, 'camvid_methods.csv'), df, a, data=f'CamVid, validation, {len(y[some])} of {len(y)} images',
         train_seeds=sorted({s for _, s in models}))
    print(card_table(df.assign(**{'class': ''})).T.to_string())

if __name__ == '__main__':
    command_line(dict(train=train, card=card), __doc__, SIZES, (0, 1), 'noisyseg-camvid',
                 epochs=dict(type=int, help='instead of what the size says'),
                 on=dict(choices=['local', 'ray'], default='local', help='where the card is measured'))
