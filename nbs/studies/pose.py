"""The study of pose: keypoints of animals, from networks trained clean and under weight noise.

    python nbs/studies/pose.py train            # a checkpoint for each way and seed; those that exist are kept
    python nbs/studies/pose.py sweep            # pose.csv; resumes where it stopped

Protocol, written before any run of it, and without a look at any picture that scores.

*Size*: cut to fit a few minutes of a shared CPU; it says only what so small a study can.

*Animals*: Animal Pose (Cao et al., ICCV 2019), those of `voc_animals` with at least five known keypoints, cut out by
their boxes at 64 pixels. Training: 480 of those in pictures that are not in `val.txt`, evenly spread over the file.
Test: every third of those in pictures of `val.txt`, which choose nothing.

*Network*: `pose_lite0`: EfficientNet-Lite0 with ImageNet weights down to 1/16, two transposed convolutions, 20 maps of
heat at 1/4.

*Training*: three seeds (0, 1, 2: all weights that are not from ImageNet, order, augmentation, noise) of two ways, clean
and under MaxGaussian(N) in all convolution and norm weights, a draw each step; 5 epochs in batches of 16 with Adam, one
cycle up to LR. N = 2 % is the middle level that the headline study of segmentation chose for the same encoder, on
training pictures of its own. Nothing is chosen by a score.

*Measured*: PCK at alpha = 0.1 under MaxGaussian in the same weights at LEVELS, four draws, the same for all; and, as a
floor, that of the training animals' mean places.

*Claim*: noise-trained against clean, paired by training seed, at each of LEVELS: five differences, corrected by Holm.
Three seeds show large differences only.
"""
import time

import torch
from fastai.torch_core import set_seed
from study import Clock, HERE, command_line, keep, machine

from noisyseg.data.files import data_root
from noisyseg.data.keypoints import animal_pose
from noisyseg.measure.keypoints import KeypointTask, NearEnough
from noisyseg.measure.sweeps import sweep as run_sweep
from noisyseg.nets.pose import pose_lite0
from noisyseg.perturb.laws import MaxGaussian
from noisyseg.perturb.selectors import kernels_and_scales
from noisyseg.train.checkpoints import load_model, read_card, save_model
from noisyseg.train.keypoints import keypoint_learner

SIZE, BS, FEW, EPOCHS, LR, N = 64, 16, 480, 5, 0.005, 0.02
LEVELS, DRAWS = (0, 0.01, 0.02, 0.03, 0.05), 4
WAYS = {'clean': None, 'under noise': MaxGaussian(N)}

def data(seed):
    root = data_root()/'voc_animals'
    return animal_pose(root/'keypoints.json', root/'images', (root/'val.txt').read_text().split(), few=FEW, size=SIZE,
                       bs=BS, seed=seed, cache=True)

def file(a, way, seed): return a.models/f'{way.replace(" ", "-")}-{seed}.safetensors'

def train(a):
    for seed in a.seeds:
        dls = None
        for way, law in WAYS.items():
            if (path := file(a, way, seed)).exists(): continue
            dls = dls or data(seed)
            dls.train.epoch = -1   # the same batches, augmented alike, for both
            dls.valid = []         # nothing is validated
            set_seed(seed)
            noise = law and dict(where=kernels_and_scales, seed=seed)
            learn = keypoint_learner(dls, pose_lite0, law, noise_args=noise, metrics=[], cbs=[Clock()])
            with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(EPOCHS, LR)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_model(learn, path, dataset='Animal Pose, 480 animals', way=way, seed=seed, hardware=machine(),
                       seconds=learn.clock.seconds, date=time.strftime('%Y-%m-%d'))
            print(way, seed, f'{sum(learn.clock.seconds):.0f} s', flush=True)

def floor(dls, test):
    "PCK of saying the same place each time: the mean over training animals."
    y = torch.stack([dls.train_ds[i][1] for i in range(len(dls.train_ds))])
    known = (y[..., 2] > 0)[..., None]
    mean = (y[..., :2] * known).sum(0) / known.sum(0)
    meter = NearEnough(dls.vocab, 0.1)
    for _, truth in test: meter.update(mean.expand(len(truth), -1, -1), truth)
    return meter.rows()[-1][2]

def sweep(a):
    dls = data(0)
    dls.valid_ds.items = dls.valid_ds.items[::3]
    test = [tuple(t.as_subclass(torch.Tensor) for t in b) for b in dls.valid.new(bs=64)]
    models = {(way, s): load_model(f) for way in WAYS for s in a.seeds if (f := file(a, way, s)).exists()}
    df = run_sweep(models, test, MaxGaussian(), levels=LEVELS, draws=DRAWS, where=kernels_and_scales,
                   task=KeypointTask(), class_names=list(dls.vocab), store=a.models/'pose.csv', progress=False)
    seconds = {w: [round(sum(read_card(file(a, w, s))['seconds'])) for s in a.seeds] for w in WAYS}
    keep(HERE/'pose.csv', df, a, data='Animal Pose, every third animal of val.txt', seconds=seconds,
         test_animals=sum(len(y) for _, y in test), mean_places=round(floor(dls, test), 4))

if __name__ == '__main__':
    command_line(dict(train=train, sweep=sweep), __doc__, seeds=(0, 1, 2), models='noisyseg-pose')
