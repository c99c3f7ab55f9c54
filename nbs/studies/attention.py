"""The study of attention: a hybrid that attends and its convolutional twin, trained alike, under noise part by part.

    python nbs/studies/attention.py train            # a checkpoint for each network and seed; those that exist are kept
    python nbs/studies/attention.py sweep            # attention.csv and attention_parts.csv; resumes where it stopped

Protocol, written before any run of it. It follows a first study of the same networks on a sixth of the pictures, with
the stem as it was (version control has it): both kinds reached 22 mIoU, and noise of 15 % in any part of the stages
cost at most a third of a point, so it could not tell the parts apart. Here the networks are trained whole, on all
pictures, and the noise is stronger. That first study had scored every fourth picture of `val.txt`, which are among
those that score here; no setting below was chosen by their scores, but for noise that is strong enough to be seen.

*Pictures*: `voc_animals` at 64 pixels, seven classes. Training: all 3,131 of `train_aug.txt`, each mirrored or not at
random. Test: every second picture of `val.txt`, 223, which choose nothing.

*Networks*: `segformer_lite0` and `convnet_lite0`: the same first stages of EfficientNet-Lite0 with ImageNet weights,
the same head, maps of the same sizes; two stages of attention and MLPs, or of residual blocks.

*Training*: three seeds of each (0, 1, 2: all weights that are not from ImageNet, the order, the mirror). All weights
are trained: EPOCHS in batches of 32 with AdamW, one cycle up to LR, cross-entropy, clean. Nothing is chosen by a score.

*Measured*: mIoU, three draws of noise at each level, the same for all. For both networks with MaxGaussian (relative to
the largest weight of each kernel) in all convolution, linear and norm weights at LEVELS, and in those of the two stages
alone at PART_LEVELS. For the hybrid, in one part at a time, at PART_LEVELS of MaxGaussian and PART_RELATIVE of
RelativeGaussian (relative to the spread of each weight tensor). "Equal level" is equal in this sense only: parts differ
in how many weights they have, which the table gives.

*Claims*, over training seeds: (1) what is lost of the clean mIoU, hybrid against twin, with noise in the stages, at
both levels; (2) attention against MLPs, q and k against v and the projection, layer norms against attention, at the
three settings of the parts: nine differences. Each family is corrected by Holm. Three seeds show large differences
only.
"""
import time
from pathlib import Path

import pandas as pd
from study import HERE, command_line, keep, machine
import torch
import torch.nn.functional as F

from noisyseg.data.files import data_root
from noisyseg.data.own import custom_masks
from noisyseg.measure.sweeps import sweep as run_sweep
from noisyseg.nets.encoders import lite0_stats
from noisyseg.nets.segformer import convnet_lite0, segformer_lite0
from noisyseg.perturb.laws import MaxGaussian, RelativeGaussian
from noisyseg.perturb.selectors import attention, by_name, embeddings, kernels_and_scales, norms
from noisyseg.train.checkpoints import load_model, read_card, save_model

SEVEN = {'background': 0, 'cat': 8, 'cow': 10, 'dog': 12, 'horse': 13, 'person': 15, 'sheep': 17}
NETWORKS = {'hybrid': segformer_lite0, 'twin': convnet_lite0}
SIZE, BS, EPOCHS, LR = 64, 32, 6, 0.001
LEVELS = (0.01, 0.02, 0.05)
PART_LEVELS, PART_RELATIVE, DRAWS = (0.15, 0.3), (0.5,), 3
STAGES = by_name('stages.*')
PARTS = {  # of the hybrid; attention is its next two parts together, and the convolutions that make maps coarser
    'attention': attention, 'q and k': by_name('*.attn.q.weight', '*.attn.k.weight'),
    'v and projection': by_name('*.attn.v.weight', '*.attn.proj.weight'), 'MLPs': by_name('*.mlp.*.weight'),
    'patch embeddings': embeddings, 'layer norms': norms & STAGES, 'head': by_name('head.*') & kernels_and_scales,
    'stem': by_name('stem.*') & kernels_and_scales}

def names(file): return (data_root()/'voc_animals'/file).read_text().split()

def pictures(files):
    "Images and masks of some pictures, as two tensors."
    root = data_root()/'voc_animals'
    stems = [Path(f).stem for f in files]
    pairs = [(root/'images'/f'{k}.jpg', root/'masks'/f'{k}.png') for k in stems]
    codes = {v: 0 for v in range(21)} | {v: i for i, v in enumerate(SEVEN.values())} | {255: 255}
    # of another one nothing is used: loaders want something to train on
    other = next(k for k in names('train_aug.txt') + names('val.txt') if k not in {*stems})
    pairs.append((root/'images'/f'{other}.jpg', root/'masks'/f'{other}.png'))
    dls = custom_masks(pairs, None, list(SEVEN), size=SIZE, bs=BS, valid=stems, codes=codes, check=False, seed=0,
                       stats=lite0_stats)
    return [torch.cat([b[i].as_subclass(torch.Tensor) for b in dls.valid]) for i in (0, 1)]

def fitted(network, seed, x, y):
    "One network after its training."
    torch.manual_seed(seed)
    model = NETWORKS[network](len(SEVEN)).train()
    opt, n = torch.optim.AdamW(model.parameters(), weight_decay=0.01), len(x) // BS
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, LR, EPOCHS * n)
    start = time.process_time()
    for epoch in range(EPOCHS):
        for b in torch.randperm(len(x))[:n * BS].split(BS):
            mirror = torch.rand(BS, 1, 1) < 0.5
            xb, yb = torch.where(mirror[..., None], x[b].flip(3), x[b]), torch.where(mirror, y[b].flip(2), y[b])
            loss = F.cross_entropy(model(xb), yb, ignore_index=255)
            loss.backward()
            opt.step()
            opt.zero_grad()
            sched.step()
        print(f'{network} {seed}: epoch {epoch + 1}, loss of the last batch {loss:.3f}', flush=True)
    return model.eval(), time.process_time() - start

def file(a, network, seed): return a.models/f'{network}-{seed}.safetensors'

def train(a):
    wanted = [(k, s) for s in a.seeds for k in NETWORKS if not file(a, k, s).exists()]
    if not wanted: return
    x, y = pictures(names('train_aug.txt'))
    for network, seed in wanted:
        model, seconds = fitted(network, seed, x, y)
        (path := file(a, network, seed)).parent.mkdir(parents=True, exist_ok=True)
        save_model(model, path, dataset='voc_animals, train_aug.txt', seed=seed,
                   seconds=seconds, hardware=machine())
        print(network, seed, f'{seconds:.0f} s', flush=True)

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
    dl = list(zip(*(t.split(BS) for t in pictures(names('val.txt')[::2]))))
    seconds = {k: [round(read_card(file(a, k, s))['seconds']) for s in a.seeds] for k in NETWORKS}
    info = dict(data='voc_animals, every second of val.txt', test_images=sum(len(y) for _, y in dl), seconds=seconds)
    whole = measured(models, dl, MaxGaussian(), (0, *LEVELS), where=kernels_and_scales, store=a.models/'whole.csv')
    stages = measured(models, dl, MaxGaussian(), PART_LEVELS, where=STAGES & kernels_and_scales,
                      store=a.models/'stages.csv')
    whole = pd.concat([whole.assign(part='all'), stages.assign(part='stages')])
    keep(HERE/'attention.csv', whole[whole['metric'] == 'mIoU'].drop(columns='class'), a, **info)
    df = pd.concat(parts(models, dl, a.models))
    keep(HERE/'attention_parts.csv', df[df['metric'] == 'mIoU'].drop(columns='class'), a, **info)

if __name__ == '__main__':
    command_line(dict(train=train, sweep=sweep), __doc__, seeds=(0, 1, 2), models='noisyseg-attention')
