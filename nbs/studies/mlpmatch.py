"""The study of MLPMatch.

What do network perturbation and volatile learning add, on CamVid with masks for 20 of 367 images?

    python nbs/studies/mlpmatch.py pretrain                  # an encoder that has seen CIFAR-10; all arms start from it
    python nbs/studies/mlpmatch.py pilot
        # mlpmatch_pilot.csv: τ and burn-in, scored on training images used for nothing else
    python nbs/studies/mlpmatch.py train --seeds 0 1 2
        # a checkpoint for each arm and seed; those that exist are kept
    python nbs/studies/mlpmatch.py score
        # mlpmatch.csv: the validation images, looked at here for the first time
    python nbs/studies/mlpmatch.py cost
        # mlpmatch_cost.csv: time and memory of a step at each level, in turns
    python nbs/studies/mlpmatch.py labelled
        # mlpmatch_labelled.csv: which 20 images have masks in each seed
    python nbs/studies/mlpmatch.py train score --size full   # a longer training at a larger size, for a GPU

A seed fixes which 20 images have masks, the network's first weights, and every draw; all arms of a seed share them.
"""
import time

import pandas as pd
import torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.torch_core import default_device, set_seed
from safetensors.torch import load_file, save
from study import NoPeeking, command_line, keep, machine, out
from torch import nn
from torchvision.transforms.v2.functional import resize

from noisyseg.data.cifar import cifar10
from noisyseg.measure.evaluation import scores
from noisyseg.data.datasets import camvid
from noisyseg.nets.deeplab import deeplabv3plus
from noisyseg.nets.encoders import slim_resnet_encoder
from noisyseg.train.methods.mlpmatch import MatchStep, semi_learner, step_cost
from noisyseg.data.splits import split_labelled
from noisyseg.basics import write_atomic
from noisyseg.train.checkpoints import load_model, read_card, save_model
from noisyseg.nets.unet3plus import unet3plus_slim
from noisyseg.data.semi_supervised import semi, semi_dataloaders

SIZES = {'small': dict(size=(96, 128), epochs=5, bs=4), 'full': dict(size=(240, 320), epochs=100, bs=8)}
# images with masks; one-cycle's highest learning rate; epochs of 'supervised, long' per epoch of the others
LABELLED, LR, LONG = 20, 4e-3, 5
THRESHOLD, BURN_IN = 0.8, 0.             # chosen by `pilot`
PILOT_SEED, PILOT_IMAGES = 100, 60       # a split that no seed of the study uses; training images that score the pilot
ARMS = {                                 # what each adds to the one before it, or to UniMatch
    'supervised': dict(level='supervised'),
    'supervised, long': dict(level='supervised'),
    'FixMatch': dict(level='fixmatch'),
    'UniMatch': dict(level='unimatch'),
    'UniMatch + network perturbation': dict(level='unimatch', network_perturbation=True),
    'UniMatch + volatile learning': dict(level='unimatch', volatile=True),
    'MLPMatch': dict(level='mlpmatch'),
    'MLPMatch, stages': dict(level='mlpmatch', unit='stage'),
}

def encoder_file(a): return a.models/'encoder-cifar10.safetensors'
def file(a, arm, seed):
    return a.models/a.size/f'mlpmatch-{arm.replace(", ", "-").replace(" + ", "-").replace(" ", "-")}-{seed}.safetensors'

class Classifier(nn.Module):
    "The encoder under a linear layer; CIFAR's images at twice their size, so that its last map is not a single pixel."
    def __init__(self):
        super().__init__()
        self.encoder = slim_resnet_encoder()
        self.fc = nn.Linear(self.encoder.channels[-1], 10)
    def forward(self, x): return self.fc(self.encoder(resize(x.as_subclass(torch.Tensor), [64, 64]))[-1].mean((2, 3)))

class EpochLines(Callback):
    order = 99
    def after_epoch(self):
        print('  epoch', self.epoch + 1, *(f'{v:.3f}' for v in self.learn.recorder.log[1:] if isinstance(v, float)),
              flush=True)

def pretrain(a):
    if encoder_file(a).exists(): return
    set_seed(0)
    dls = cifar10(n_valid=1000, bs=128, seed=0)
    learn = Learner(dls, Classifier(), nn.CrossEntropyLoss(), metrics=accuracy, cbs=EpochLines())
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(a.pretrain_epochs, 5e-3)
    a.models.mkdir(parents=True, exist_ok=True)
    held_out = f'{learn.recorder.values[-1][-1]:.3f}'
    about = dict(data=dls.about, epochs=str(a.pretrain_epochs), accuracy_on_1000_held_out_training_images=held_out,
                 hardware=machine())
    write_atomic(encoder_file(a), save({k: v.cpu().contiguous() for k, v in learn.model.encoder.state_dict().items()},
                                       metadata=about))

def network(a):
    "UNet3+ (small), or DeepLabV3+ with a ResNet-50 (full); UNet3+'s encoder has seen CIFAR-10."
    if a.size == 'full': return deeplabv3plus(11, encoder='resnet50', pretrained=True)
    net = unet3plus_slim(11, upsample='after', deep_supervision=False)
    net.encoder.load_state_dict(load_file(encoder_file(a)))
    return net

def learner(a, dls, arm, seed, **changes):
    set_seed(seed)
    settings = dict(threshold=THRESHOLD, burn_in=BURN_IN) | ARMS[arm] | changes
    return semi_learner(dls, network(a), metrics=[], columns=False, seed=seed, cbs=[NoPeeking(), EpochLines()],
                        **settings)

def loaders(a, seed):
    dls = camvid(size=SIZES[a.size]['size'], augment=False, cache=False)
    return semi(dls, LABELLED, bs=a.bs, split_seed=seed, seed=seed, cache=True)

def fit(learn, epochs):
    start = time.process_time()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, LR)
    return time.process_time() - start

def pilot(a):
    ("τ and burn-in by UniMatch, whose terms all arms share; masks are those of other training images, never of the "
     "validation set.")
    plain = camvid(size=SIZES[a.size]['size'], augment=False, seed=0)
    labelled, rest = split_labelled(plain, LABELLED, PILOT_SEED, verbose=False)
    judged = rest[::len(rest)//PILOT_IMAGES][:PILOT_IMAGES]
    others = [image for image, mask in rest if (image, mask) not in judged]
    rows = []
    for threshold, burn_in in ((0.6, 0.), (0.8, 0.), (0.95, 0.), (0.8, 0.3)):
        dls = semi_dataloaders(labelled, others, judged, plain.train_ds.read, plain.vocab, plain.palette,
                               plain.ignore_index, size=SIZES[a.size]['size'],
                               bs=a.bs, seed=PILOT_SEED, cache=True)
        learn = learner(a, dls, 'UniMatch', PILOT_SEED, threshold=threshold, burn_in=burn_in)
        seconds = fit(learn, a.epochs)
        frame = learn.mlp_match.frame()
        found = scores(learn.model.eval(), list(dls.valid), dls.vocab, dls.ignore_index, 'the network')
        miou = next(s[2] for s in found if s[0] == 'mIoU')
        rows.append(dict(threshold=threshold, burn_in=burn_in, mIoU=miou, confident=frame.confident.tail(50).mean(),
                         seconds=seconds))
        print(rows[-1], flush=True)
    keep(out(a, 'mlpmatch_pilot.csv'), pd.DataFrame(rows), a,
         data=f'CamVid, {PILOT_IMAGES} training images without a part in the training', seed=PILOT_SEED)

def train(a):
    for seed in a.seeds:
        dls = None
        for arm in a.arms or ARMS:
            if (path := file(a, arm, seed)).exists(): continue
            print(f'{arm}, seed {seed}', flush=True)
            dls = loaders(a, seed)
            learn = learner(a, dls, arm, seed)
            seconds = fit(learn, a.epochs * (LONG if arm.endswith('long') else 1))
            frame = learn.mlp_match.frame()
            by_epoch = frame.drop(columns='off').groupby('epoch').mean().round(5).reset_index().to_dict('records')
            path.parent.mkdir(parents=True, exist_ok=True)
            save_model(learn, path, half=True, dataset=f'CamVid, {LABELLED} labelled of 367', arm=arm, seed=seed,
                       steps=len(frame), seconds=seconds,
                       log=by_epoch, hardware=machine(), date=time.strftime('%Y-%m-%d'),
                       settings=dict(size=SIZES[a.size]['size'], epochs=a.epochs, bs=a.bs, lr_max=LR))

def score(a):
    valid = camvid(size=SIZES[a.size]['size'], bs=8, augment=False, seed=0).valid
    batches, rows = list(valid), []
    for arm in ARMS:
        for seed in a.seeds:
            if not (path := file(a, arm, seed)).exists(): continue
            card, model = read_card(path), load_model(path, network(a), device=default_device())
            found = scores(model, batches, valid.vocab, valid.ignore_index, arm)
            of = dict(model=arm, train_seed=seed, steps=card['steps'], seconds=card['seconds'])
            rows += [of | dict(zip(('metric', 'class', 'value', 'n_pixels'), found_)) for found_ in found]
    df = pd.DataFrame(rows)
    keep(out(a, 'mlpmatch.csv'), df, a,
         data=f'CamVid, validation, {len(valid.dataset)} images at {SIZES[a.size]["size"]}', labelled=LABELLED,
         threshold=THRESHOLD, burn_in=BURN_IN)
    print(df[df.metric == 'mIoU'].pivot(index='model', columns='train_seed',
                                        values='value').reindex(ARMS).mul(100).round(1).to_string())

def labelled(a):
    "The split of each seed, made by the function that `train` calls."
    dls = camvid(size=SIZES[a.size]['size'], augment=False, cache=False)
    rows = [dict(train_seed=seed, image=image.stem) for seed in a.seeds
            for image, _ in split_labelled(dls, LABELLED, seed, verbose=False)[0]]
    keep(out(a, 'mlpmatch_labelled.csv'), pd.DataFrame(rows), a,
         data=f'CamVid, {len(dls.train_ds)} training images', labelled=LABELLED)

def cost(a):
    dls = loaders(a, 0)
    methods = {arm: MatchStep(**settings, threshold=THRESHOLD, ignore_index=dls.ignore_index, seed=0) for arm,
               settings in ARMS.items() if 'long' not in arm}
    df = step_cost(network(a), next(iter(dls.train)), methods, n=9)
    keep(out(a, 'mlpmatch_cost.csv'), df, a, batch=f'{a.bs} labelled and {a.bs} unlabelled images')
    print(df.round(3).to_string())

if __name__ == '__main__':
    command_line(dict(pretrain=pretrain, pilot=pilot, train=train, score=score, cost=cost, labelled=labelled), __doc__,
                 SIZES, (0, 1, 2), 'noisyseg-mlpmatch',
                 arms=dict(nargs='+', choices=ARMS, help='None: all'),
                 epochs=dict(type=int, help='passes over the unlabelled images, instead of what the size says'),
                 pretrain_epochs=dict(type=int, default=4))
