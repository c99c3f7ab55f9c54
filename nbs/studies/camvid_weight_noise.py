"""The CamVid study: train UNet3+ clean and under weight noise, then measure all of them under noise.

    python nbs/studies/camvid_weight_noise.py train --seeds 0 1
        # a checkpoint for each n and seed; those that exist are kept
    python nbs/studies/camvid_weight_noise.py sweep
        # rows of camvid_weight_noise.csv; resumes where it was stopped
    python nbs/studies/camvid_weight_noise.py absolute              # rows of camvid_absolute_noise.csv; likewise
    python nbs/studies/camvid_weight_noise.py layers                # camvid_layer_sensitivity.csv, measured anew
    python nbs/studies/camvid_weight_noise.py frames
        # camvid_frames.csv: which frame of which drive is in which set

The validation images are not looked at before `sweep`: training runs a fixed number of epochs, and nothing is chosen
by them. All of them are one clip of a drive that is trained on, too: see `frames`, and the notebook.
"""
import json
import platform
import sys
import time
from pathlib import Path

import pandas as pd
import torch
from fastai.torch_core import set_seed
from study import EpochLog, NoPeeking, command_line

from noisyseg import __version__
from noisyseg.measure.evaluation import Batches, digest
from noisyseg.data.datasets import camvid
from noisyseg.perturb.laws import AbsoluteGaussian, MaxGaussian
from noisyseg.train.losses import DeepSupervisionLoss, HybridLoss
from noisyseg.show.plots import sweep_table
from noisyseg.measure.sensitivity import layer_sensitivity, stages
from noisyseg.measure.sweeps import sweep as run_sweep
from noisyseg.perturb.selectors import conv_and_norm
from noisyseg.basics import write_atomic
from noisyseg.train.checkpoints import load_model, save_model
from noisyseg.train.learner import segmentation_learner
from noisyseg.nets.unet3plus import unet3plus_small

HERE = Path(__file__).parent
MODELS, RESULTS = HERE/'camvid_models', HERE/'camvid_weight_noise.csv'
SIZE, BS, EPOCHS, LR = (120, 160), 4, 18, 4e-3
TRAIN_AT = (0., 0.05, 0.10)                                  # n of the training noise; 0 is clean
LEVELS, DRAWS = (0., 0.01, 0.02, 0.03, 0.05, 0.075, 0.10, 0.15), 10
ALPHA = 2.                                                   # published default
ABSOLUTE = HERE/'camvid_absolute_noise.csv'
# 7 to 42 % of the convolutions' root mean square, 0.072 in all six networks
STRENGTHS = (0., 0.005, 0.01, 0.015, 0.02, 0.03)
LAYERS = HERE/'camvid_layer_sensitivity.csv'
# n of the training, n of the noise; stages of at most a fifth of the weight tensors
LAYERS_OF, LAYERS_AT, SHARE = (0., 0.10), 0.10, 0.2
FRAMES = HERE/'camvid_frames.csv'

def name(n, seed): return f'{"clean" if n == 0 else f"n={n:g}"} seed {seed}'
def file(n, seed): return MODELS/f'n{round(100 * n):02d}_seed{seed}.safetensors'

def train(n, seed, epochs):
    if file(n, seed).exists(): return print(f'{name(n, seed)}: there already')
    print(f'{name(n, seed)}: training', flush=True)
    set_seed(seed)
    start, dls = time.time(), camvid(size=SIZE, bs=BS, seed=seed)
    law = MaxGaussian(n, alpha=ALPHA) if n else None
    loss = DeepSupervisionLoss(HybridLoss(msssim=0, ignore_index=dls.ignore_index))
    learn = segmentation_learner(dls, unet3plus_small, law, loss,
                                 arch_args=dict(upsample='after', deep_supervision=False),
                                 noise_args=dict(seed=seed) if law else None, metrics=[], cbs=[NoPeeking(), EpochLog()])
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, LR)
    save_model(learn, file(n, seed), half=True, dataset='CamVid, 11 classes, train (367 images)', size=SIZE,
               batch_size=BS, epochs=epochs, lr_max=LR, seed=seed,
               train_level=n, loss='focal + IoU',
               hardware=f'{platform.machine()}, {torch.get_num_threads()} CPU thread(s)',
               seconds=round(time.time() - start))

def label(n): return f'n = {n:.0%}'.replace('%', ' %') if n else 'clean'

def trained():
    "All the networks, by the noise they were trained under and their training seed."
    return {(label(n), seed): load_model(f) for n in TRAIN_AT for seed in range(100) if (f := file(n, seed)).exists()}

def validation(): return camvid(size=SIZE, bs=8, seed=0, augment=False).valid

def sweep():
    df = run_sweep(trained(), validation(), MaxGaussian(alpha=ALPHA), levels=LEVELS, draws=DRAWS, store=RESULTS)
    print(sweep_table(df).to_string())

def companion(results): return results.with_name(results.name + '.grid.json')

def made_by(): return {'command': ' '.join(['python', f'nbs/studies/{Path(sys.argv[0]).name}', *sys.argv[1:]]),
                       'hardware': f'{platform.machine()}, {torch.get_num_threads()} CPU thread(s)'}

def absolute():
    made = json.loads(companion(ABSOLUTE).read_text()).get('made by') if companion(ABSOLUTE).exists() else None
    df = run_sweep(trained(), validation(), AbsoluteGaussian(), levels=STRENGTHS, draws=DRAWS, where=conv_and_norm,
                   store=ABSOLUTE)
    grid = json.loads(companion(ABSOLUTE).read_text())
    write_atomic(companion(ABSOLUTE), json.dumps({**grid, 'made by': made or made_by()}, indent=1, ensure_ascii=False)
                 + '\n')
    print(sweep_table(df).to_string())

def layers():
    "Of each network's rows, those of mIoU and pixel accuracy."
    law, valid, nets = MaxGaussian(LAYERS_AT, alpha=ALPHA), validation(), {k: m for k, m in trained().items()
            if k[0] in map(label, LAYERS_OF)}
    grid = dict(law=law.name, level=LAYERS_AT, where='conv_and_norm', seed=0, draws=DRAWS,
                classes=list(valid.vocab), ignore_index=valid.ignore_index,
                data=Batches(valid).fingerprint(),
                models={f'{name} (training seed {seed})': {'weights': digest(*m.state_dict().values())}
                        for (name, seed), m in nets.items()},
                versions={'noisyseg': __version__, 'torch': torch.__version__, 'python': platform.python_version()})
    found = []
    for (name, seed), m in sorted(nets.items(), key=lambda item: item[0][1]):
        df = layer_sensitivity(m, valid, law, groups=stages(m, share=SHARE), draws=DRAWS, name=name)
        found.append(df[df['metric'] != 'IoU'].assign(train_seed=seed))
        write_atomic(LAYERS, pd.concat(found).to_csv(index=False))
        write_atomic(companion(LAYERS), json.dumps({**grid, 'made by': made_by()}, indent=1, ensure_ascii=False) + '\n')

def drive_and_frame(stem):
    "('0006R0', 1020) of '0006R0_f01020': the drive, and the number of the frame in its film."
    drive, number = stem.split('_')
    return drive, int(number.lstrip('f'))

def frames():
    "A line for each image of both sets."
    dls = camvid(size=SIZE, bs=BS, augment=False, cache=False)
    rows = [dict(zip(('set', 'image', 'drive', 'frame'), (part, image.stem, *drive_and_frame(image.stem))))
            for part, ds in (('train', dls.train_ds), ('val', dls.valid_ds)) for image, _ in ds.items]
    write_atomic(FRAMES, pd.DataFrame(rows).to_csv(index=False))

def train_all(a):
    MODELS.mkdir(exist_ok=True)
    for seed in a.seeds:
        for n in TRAIN_AT: train(n, seed, a.epochs)

if __name__ == '__main__':
    steps = {f.__name__: lambda a, f=f: f() for f in (sweep, absolute, layers, frames)}
    command_line(dict(train=train_all) | steps, __doc__, seeds=(0, 1), epochs=dict(type=int, default=EPOCHS))
