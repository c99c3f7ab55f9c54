"""Train the two networks that the explorer shows when it is given none; they are packaged in noisyseg/show/models.

    python nbs/studies/explorer_models.py clean        # and: noise-trained
    python nbs/studies/explorer_models.py gallery      # what they predict, for the explorer on the site: nbs/explorer
"""
import argparse
import os
import platform
import time
from pathlib import Path

import torch
from fastai.torch_core import set_seed

import noisyseg
from noisyseg.data.datasets import scenes
from noisyseg.show.explorer import NoiseExplorer
from noisyseg.perturb.laws import MaxGaussian
from noisyseg.train.losses import DeepSupervisionLoss, HybridLoss
from noisyseg.train.checkpoints import save_model
from noisyseg.train.learner import segmentation_learner
from noisyseg.nets.unet3plus import unet3plus_tiny

FOLDER = Path(noisyseg.__file__).parent/'show'/'models'
SIZE, N_TRAIN, EPOCHS, LR, SEED = 128, 800, 40, 8e-3, 0
LAWS = {'clean': None, 'noise-trained': MaxGaussian(0.15)}

def train(name):
    start, law = time.time(), LAWS[name]
    set_seed(SEED)
    dls = scenes(n_train=N_TRAIN, n_valid=48, size=SIZE, bs=16, seed=SEED)
    arch = dict(upsample='after', deep_supervision=False, width=16, filters=(16, 32, 48, 64))
    learn = segmentation_learner(dls, unet3plus_tiny, law, DeepSupervisionLoss(HybridLoss(msssim=0)), arch_args=arch,
                                 noise_args=dict(seed=SEED) if law else None)
    with learn.no_bar(): learn.fit_one_cycle(EPOCHS, LR)
    FOLDER.mkdir(exist_ok=True)
    hardware = f'{platform.machine()}, {torch.get_num_threads()} CPU thread(s)'
    save_model(learn, FOLDER/f'scenes_{name.replace("-", "_")}.safetensors', half=True,
               dataset=f'{N_TRAIN} procedural scenes', size=SIZE, batch_size=16,
               epochs=EPOCHS, lr_max=LR, seed=SEED, loss='focal + IoU', hardware=hardware,
               seconds=round(time.time() - start))

def gallery():
    "The first held-out scenes, as they come, under three draws."
    explorer = NoiseExplorer(disturbance=MaxGaussian(0.15))
    layers = [name for name in explorer.info['layers'] if name.endswith('conv.weight')]
    print(explorer.to_site(FOLDER.parents[2]/'nbs'/'explorer', samples=range(6), seeds=(0, 1, 2),
                           layers=[layers[0], layers[-1]], address='https://noisyseg.github.io/noisyseg/explorer/'),
          'bytes')

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('name', choices=[*LAWS, 'gallery'])
    p.add_argument('--threads', type=int, default=os.cpu_count())
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    gallery() if a.name == 'gallery' else train(a.name)
