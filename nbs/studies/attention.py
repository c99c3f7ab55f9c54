"""The study of attention: a hybrid that attends and its convolutional twin, trained alike, under noise part by part.

    python nbs/studies/attention.py train            # a checkpoint for each network and seed; those that exist are kept
    python nbs/studies/attention.py sweep            # attention.csv and attention_parts.csv; resumes where it stopped

Protocol, written before any run of it, and without a look at any picture that scores.

*Size*: it was cut to fit some minutes of a shared CPU, and says only what so small a study can.

*Pictures*: `voc_animals` at 64 pixels, seven classes. Training: every sixth picture of `train_aug.txt`, 522. Test: every
fourth picture of `val.txt`, 112, which choose nothing.

*Networks*: `segformer_lite0` and `convnet_lite0`: the same first stages of EfficientNet-Lite0 with ImageNet weights, the
same head, maps of the same sizes; two stages of attention and MLPs, or of residual blocks.

*Training*: three seeds of each (0, 1, 2: the weights that are not from ImageNet, order and augmentation), clean; 4
epochs in batches of 16 with Adam, one cycle up to LR, cross-entropy. Nothing is chosen by a score.

*Measured*: mIoU, three draws of noise at each level, the same for all. For both networks with MaxGaussian (relative to
the largest weight of each kernel) in all convolution, linear and norm weights at LEVELS, and in those of the two stages
alone at PART_LEVELS. For the hybrid, in one part at a time, at PART_LEVELS of MaxGaussian and PART_RELATIVE of
RelativeGaussian (relative to the spread of each weight tensor). "Equal level" is equal in this sense only: parts differ
in how many weights they have, which the table gives. LEVELS are below PART_LEVELS since EfficientNet-Lite0's narrow
depthwise kernels are known to stand little.

*Claims*, over training seeds: (1) what is lost of the clean mIoU, hybrid against twin, with noise in the stages, at both
levels; (2) attention against MLPs, q and k against v and the projection, layer norms against attention, at the three
settings of the parts: nine differences. Each family is corrected by Holm. Three seeds show large differences only.
"""
import argparse
import os
from pathlib import Path

import pandas as pd
import torch
from fastai.data.external import fastai_path
from fastai.torch_core import set_seed
from noise_aware import HERE, Clock, keep, machine

from noisyseg.data.files import data_root
from noisyseg.data.own import custom_masks
from noisyseg.measure.sweeps import sweep as run_sweep
from noisyseg.nets.encoders import lite0_stats
from noisyseg.nets.segformer import convnet_lite0, segformer_lite0
from noisyseg.perturb.laws import MaxGaussian, RelativeGaussian
from noisyseg.perturb.selectors import attention, by_name, embeddings, kernels_and_scales, norms
from noisyseg.train.checkpoints import load_model, read_card, save_model
from noisyseg.train.learner import segmentation_learner

SEVEN = {'background': 0, 'cat': 8, 'cow': 10, 'dog': 12, 'horse': 13, 'person': 15, 'sheep': 17}
NETWORKS = {'hybrid': segformer_lite0, 'twin': convnet_lite0}
SIZE, BS, EPOCHS, LR = 64, 16, 4, 0.003
LEVELS = (0.01, 0.02, 0.05)
PART_LEVELS, PART_RELATIVE, DRAWS = (0.05, 0.15), (0.3,), 3
STAGES = by_name('stages.*')
PARTS = {  # of the hybrid; attention is its next two parts together, and the convolutions that make maps coarser
    'attention': attention, 'q and k': by_name('*.attn.q.weight', '*.attn.k.weight'),
    'v and projection': by_name('*.attn.v.weight', '*.attn.proj.weight'), 'MLPs': by_name('*.mlp.*.weight'),
    'patch embeddings': embeddings, 'layer norms': norms & STAGES, 'head': by_name('head.*') & kernels_and_scales,
    'stem': by_name('stem.*') & kernels_and_scales}

def names(file): return (data_root()/'voc_animals'/file).read_text().split()

def data(valid, seed):
    "Loaders of the training pictures and of `valid`, names of others."
    root = data_root()/'voc_animals'
    stem = lambda files: [Path(f).stem for f in files]
    valid, train = stem(valid), stem(names('train_aug.txt')[::6])
    pairs = [(root/'images'/f'{k}.jpg', root/'masks'/f'{k}.png') for k in [*train, *valid]]
    codes = {v: 0 for v in range(21)} | {v: i for i, v in enumerate(SEVEN.values())} | {255: 255}
    return custom_masks(pairs, None, list(SEVEN), size=SIZE, bs=BS, valid=valid, codes=codes, check=False, cache=True,
                        seed=seed, stats=lite0_stats)

def fitted(dls, network, seed):
    "One network after its training."
    set_seed(seed)
    dls.train.epoch = -1   # the same batches, augmented alike, for both
    loss = torch.nn.CrossEntropyLoss(ignore_index=255)
    learn = segmentation_learner(dls, NETWORKS[network], loss_func=loss, metrics=[], cbs=[Clock()])
    dls.valid, valid = [], dls.valid   # nothing is validated
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(EPOCHS, LR)
    dls.valid = valid
    return learn

def file(a, network, seed): return a.models/f'{network}-{seed}.safetensors'

def test_pictures(): return names('val.txt')[::4]

def train(a):
    for seed in a.seeds:
        dls = None
        for network in NETWORKS:
            if (path := file(a, network, seed)).exists(): continue
            dls = dls or data(test_pictures(), seed)
            learn = fitted(dls, network, seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_model(learn, path, dataset='voc_animals, every sixth of train_aug.txt', seed=seed,
                       seconds=learn.clock.seconds, hardware=machine())
            print(network, seed, learn.clock.seconds, flush=True)

def batches(dls): return [tuple(t.as_subclass(torch.Tensor) for t in b) for b in dls.valid]

def measured(models, dl, law, levels, **args):
    return run_sweep(models, dl, law, levels=levels, draws=DRAWS, ignore_index=255, class_names=list(SEVEN),
                     progress=False, **args)

def parts(models, dl, store=None):
    "Noise in one part of the hybrid at a time."
    hybrids = {k: m for k, m in models.items() if k[0] == 'hybrid'}
    weights = dict(next(iter(hybrids.values())).named_parameters())
    for name, where in PARTS.items():
        n = sum(weights[k].numel() for k in where.names(next(iter(hybrids.values()))))
        for law, levels in ((MaxGaussian(), PART_LEVELS), (RelativeGaussian(), PART_RELATIVE)):
            at = None if store is None else store/f'{type(law).__name__}-{name.replace(" ", "-")}.csv'
            yield measured(hybrids, dl, law, levels, where=where, store=at).assign(part=name, weights=n)

def sweep(a):
    models = {(k, s): load_model(f) for k in NETWORKS for s in a.seeds if (f := file(a, k, s)).exists()}
    dl = batches(data(test_pictures(), 0))
    seconds = {k: [sum(read_card(file(a, k, s))['seconds']) for s in a.seeds] for k in NETWORKS}
    info = dict(data='voc_animals, every fourth of val.txt', test_images=sum(len(y) for _, y in dl), seconds=seconds)
    whole = measured(models, dl, MaxGaussian(), (0, *LEVELS), where=kernels_and_scales, store=a.models/'whole.csv')
    stages = measured(models, dl, MaxGaussian(), PART_LEVELS, where=STAGES & kernels_and_scales,
                      store=a.models/'stages.csv')
    whole = pd.concat([whole.assign(part='all'), stages.assign(part='stages')])
    keep(HERE/'attention.csv', whole[whole['metric'] == 'mIoU'].drop(columns='class'), a, **info)
    df = pd.concat(parts(models, dl, a.models))
    keep(HERE/'attention_parts.csv', df[df['metric'] == 'mIoU'].drop(columns='class'), a, **info)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('what', nargs='+', choices=(steps := {'train': train, 'sweep': sweep}))
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--models', type=Path, default=fastai_path('model')/'noisyseg-attention', help='of checkpoints')
    p.add_argument('--threads', type=int, default=os.cpu_count())
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    for w in a.what: steps[w](a)
