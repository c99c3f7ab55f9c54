"""The headline study's counterpart: UNet3+ on a ResNet, as in the report that this workbook began with.

    python nbs/studies/voc_resnet_noise.py pretrain             # the encoder, on CIFAR-10
    python nbs/studies/voc_resnet_noise.py run --seeds 0 1 2    # a file for each network that was measured; resumes
    python nbs/studies/voc_resnet_noise.py table                # voc_resnet_noise.csv, and what can be said

Protocol, written before any run of it.

*Question*: the report trains UNet3+ on a ResNet34 under noise of n = 0 to 12 % and gives two curves, noise in training
only, and in training and inference. Where does the third one lie, noise in inference only? On the mobile encoder of
voc_weight_noise.py that question could not be put at the report's levels, since half of its score is gone at 3 %.

*Data*: those of voc_weight_noise.py: `voc_animals`, seven classes, 3,131 pictures of train_aug, 445 of val. A subset:
no number here stands beside a published one of VOC.

*Network*: UNet3+, width 16, enlarging after the convolution as the report does, on a ResNet of ResNet-18's shape with
half of its channels (`full`: all of them). The report's encoder has seen ImageNet; this one has seen CIFAR-10, JPEGs of
quality 75, enlarged to 64 pixels: five epochs of 20,000 pictures (`full`: 60 of all but 1,000) of Adam, one cycle up to
2e-3, seed 0, the same encoder for all networks. That is a poor teacher beside ImageNet, and scores will be low.

*Ways*: clean; under MaxGaussian in convolutions and batch norm, clipped at 2 sigma, a draw for each batch, at n = 5 and
at n = 10 %, not chosen by any score. Sizes: small: 64 pixels, eight epochs, batches of 16; full: 256 pixels, 30 epochs,
five seeds. Adam, one cycle up to 4e-3, the same pictures in the same order for one training seed.

*Measured on val*, once for each network: MaxGaussian at the report's thirteen levels, 0 to 12 %, and AbsoluteGaussian
at 0.005, 0.01, 0.02 and 0.04, two draws each (`full`: ten), the same for all networks.

*Claims*, over training seeds (paired), 95 % intervals by Student's t, Holm over exactly these six comparisons with
clean-trained networks: both ways without noise, at 5 and at 10 %. `clear` means a corrected p below 0.05. The tables
under absolute noise describe, and decide nothing.
"""
import time
from pathlib import Path

import fastai.callback.schedule  # noqa: F401  gives a Learner its fit_one_cycle
import pandas as pd
import torch
import torch.nn.functional as F
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from study import EpochLog, NoPeeking, command_line, keep, out
from torch import nn
from voc_weight_noise import ALPHA, LR, SEVEN, STRENGTHS, animals, kept, names

from noisyseg.data.cifar import cifar10
from noisyseg.measure.summary import corrected, paired_difference
from noisyseg.measure.sweeps import sweep
from noisyseg.nets.unet3plus import unet3plus_slim
from noisyseg.perturb.laws import AbsoluteGaussian, MaxGaussian
from noisyseg.train.checkpoints import load_model, save_model
from noisyseg.train.learner import segmentation_learner
from noisyseg.train.losses import HybridLoss

NETWORKS = Path(__file__).parent/'voc_resnet_noise'  # a file for each network that was measured, beside the network
SIZES = {'small': dict(px=64, epochs=8, before=5, subset=20_000, encoder_width=32, draws=2),
         'full': dict(px=256, epochs=30, before=60, subset=None, encoder_width=64, draws=10)}
WAYS = {'clean': 0., 'n = 5 %': 0.05, 'n = 10 %': 0.1}
LEVELS = tuple(n / 100 for n in range(13))  # the report's

def network(a):
    "UNet3+ on a ResNet, with random weights."
    return unet3plus_slim(len(SEVEN), width=16, encoder_width=a.encoder_width, upsample='after', deep_supervision=False)

class Classifier(nn.Module):
    "An encoder's last map, averaged, and a linear layer; pictures are enlarged to twice their size first."
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.channels[-1], 10)

    def forward(self, x):
        x = F.interpolate(x, scale_factor=2, mode='bilinear')
        return self.head(self.encoder(x)[-1].mean((2, 3)))

def encoder_file(a): return NETWORKS/f'{a.size}-encoder.safetensors'

def pretrain(a):
    if encoder_file(a).exists(): return
    NETWORKS.mkdir(exist_ok=True)
    set_seed(0)
    whole = network(a)
    dls = cifar10(subset=a.subset, n_valid=1000, bs=128, seed=0)
    learn = Learner(dls, Classifier(whole.encoder), CrossEntropyLossFlat(), metrics=accuracy, cbs=NoPeeking())
    learn.model.to(memory_format=torch.channels_last)
    start = time.time()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(a.before, 2e-3)
    learn.remove_cb(NoPeeking)
    with learn.no_bar(): right = learn.validate()[1]
    print(f'{right:.3f} of 1,000 training pictures that were held out', flush=True)
    save_model(whole, encoder_file(a), half=True, dataset=dls.train.dataset.about, accuracy=right, epochs=a.before,
               seconds=round(time.time() - start))

def trained(a, way, seed):
    "The network, from its checkpoint or trained now."
    file = NETWORKS/f'{a.size}-{name_of(way)}-{seed}.safetensors'
    if not file.exists():
        set_seed(seed)
        dls = animals(a.px, seed, names('val'))
        law = MaxGaussian(WAYS[way], alpha=ALPHA) if WAYS[way] else None
        loss = HybridLoss(msssim=0, ignore_index=dls.ignore_index)
        learn = segmentation_learner(dls, network(a), law, loss, metrics=[], cbs=[NoPeeking(), EpochLog()],
                                     noise_args=dict(seed=seed) if law else None)
        learn.model.encoder.load_state_dict(load_model(encoder_file(a)).encoder.state_dict())
        learn.model.to(memory_format=torch.channels_last)
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(a.epochs, LR)
        save_model(learn, file, half=True, dataset='voc_animals', way=way, seed=seed, epochs=a.epochs, size=a.px)
    return load_model(file)

def name_of(way): return way.replace(' ', '').replace('%', '').replace('=', '')

def run(a):
    pretrain(a)
    for seed in a.seeds:
        for way in WAYS:
            file = NETWORKS/f'{a.size}-{name_of(way)}-{seed}.csv'
            if file.exists(): continue
            print(f'{way}, seed {seed}', flush=True)
            model = trained(a, way, seed)
            laws = {'relative': MaxGaussian(alpha=ALPHA), 'absolute': AbsoluteGaussian()}
            df = sweep({(way, seed): model}, animals(a.px, seed, names('val')).valid, laws,
                       levels=dict(relative=LEVELS, absolute=STRENGTHS), draws=a.draws, progress=False)
            keep(file, df.round({'value': 5}), a, noise=WAYS[way])
            print(kept(df[df['disturbance'] == 'relative']).round(3).to_dict(), flush=True)

def claims(df):
    "The protocol's six comparisons, corrected by Holm."
    relative = df[(df['disturbance'] == 'relative') & df['level'].isin((0, 0.05, 0.1))]
    found = [paired_difference(relative, way, 'clean', 'mIoU', 'seed') for way in WAYS if way != 'clean']
    return corrected(pd.concat(found).reset_index())

def table(a):
    df = pd.concat([pd.read_csv(f) for f in sorted(NETWORKS.glob(f'{a.size}-*.csv'))], ignore_index=True)
    keep(out(a, 'voc_resnet_noise.csv'), df, a, networks=len(df.drop_duplicates(['model', 'train_seed'])))
    main = df[df['metric'] == 'mIoU']
    print(main.pivot_table(index=['disturbance', 'model'], columns='level', values='value').round(3).to_string())
    print(claims(df).round(4).to_string())

if __name__ == '__main__':
    command_line(dict(pretrain=pretrain, run=run, table=table), __doc__, SIZES, (0, 1, 2))
