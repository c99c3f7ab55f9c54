"""Networks of others, with no wrapper: `python tests/foreign.py [word]` tries each family and prints a table.

Each is trained for a step, swept, carded, asked for a mask, and shown in the explorer. Those of
segmentation_models_pytorch are tried where it is installed."""
import sys
import time
import traceback
import warnings
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import timm
import torch
from torch import nn
from torchvision.models import segmentation as tv

from noisyseg.data.datasets import scenes
from noisyseg.measure.card import robustness_card
from noisyseg.measure.inference import predict_mask
from noisyseg.measure.sweeps import sweep
from noisyseg.nets.unet3plus import UNet3Plus
from noisyseg.perturb.laws import MaxGaussian
from noisyseg.show.explorer import NoiseExplorer
from noisyseg.train.learner import segmentation_learner

N = 7
SIZE = 64
law = MaxGaussian(0.05)


class Transformers(nn.Module):
    "As transformers' SegFormer answers: an object with .logits at a quarter of the size"
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 7, 4, 3), nn.Conv2d(8, N, 1)

    def forward(self, pixel_values): return SimpleNamespace(loss=None, logits=self.head(self.stem(pixel_values).relu()))


def torchvisions(name): return getattr(tv, name)(weights=None, weights_backbone=None, num_classes=N)

def under_unet3plus(name, **kw):
    encoder = timm.create_model(name, features_only=True, **kw)
    return UNet3Plus(encoder, N, width=8, deep_supervision=False)

def smps(name, encoder='resnet18', **kw):
    import segmentation_models_pytorch as smp
    return getattr(smp, name)(encoder, encoder_weights=None, classes=N, **kw)

def smp_encoder(name):
    import segmentation_models_pytorch as smp
    return UNet3Plus(smp.encoders.get_encoder(name, weights=None), N, width=8)


TORCHVISION = ('fcn_resnet50', 'fcn_resnet101', 'deeplabv3_resnet50', 'deeplabv3_resnet101',
               'deeplabv3_mobilenet_v3_large', 'lraspp_mobilenet_v3_large')
TIMM = {'resnet18': {}, 'efficientnet_b0': {}, 'convnext_atto': {}, 'pvt_v2_b0': {},
        'swin_tiny_patch4_window7_224': dict(img_size=SIZE)}
SMP = ('Unet', 'UnetPlusPlus', 'DeepLabV3Plus', 'FPN', 'MAnet')

FOREIGN = {'transformers-like': Transformers}
FOREIGN |= {f'torchvision {n}': partial(torchvisions, n) for n in TORCHVISION}
FOREIGN |= {f'UNet3+ on timm {n}': partial(under_unet3plus, n, **kw) for n, kw in TIMM.items()}
OF_SMP = {f'smp {n}': partial(smps, n) for n in SMP} | {'smp Segformer': partial(smps, 'Segformer', 'mit_b0')}
OF_SMP |= {f'UNet3+ on smp {n}': partial(smp_encoder, n) for n in ('resnet18', 'mit_b0')}


def attempt(net, dls):
    "All that is done with a network; an AssertionError or any other where something is wrong"
    learn = segmentation_learner(dls, net, law)
    before = [p.detach().clone() for p in net.parameters()]
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert any(not torch.equal(a, b) for a, b in zip(before, net.parameters())), 'nothing was learnt'
    net.eval()
    rows = sweep(net, dls.valid, law, levels=[0, 0.1], draws=1, progress=False)
    assert rows.value.between(0, 1).any() and len(rows.level.unique()) == 2
    card = robustness_card(net, dls.valid, {'noise': law}, levels={'noise': [0.1]}, draws=1, progress=False)
    assert 'clean' in set(card.disturbance)
    mask = predict_mask(learn, dls.valid_ds.items[0][0])
    with learn.no_bar(): labels = learn.predict(dls.valid_ds.items[0][0])[1]
    assert (mask == labels.numpy()).all() and mask.shape == (SIZE, SIZE)
    look = NoiseExplorer(net, dls, corruptions=False)
    shown = look.frame(dict(level=0.))['preds']['model']
    assert (np.asarray(shown).reshape(2, SIZE, SIZE)[0] == mask).all(), 'the explorer shows another mask'
    look.frame(dict(level=0.1))
    look.close()


def data(): return scenes(n_train=2, n_valid=2, size=SIZE, bs=2, seed=0)


if __name__ == '__main__':
    warnings.simplefilter('ignore')
    families = FOREIGN | (OF_SMP if find_spec('segmentation_models_pytorch') else {})
    failed = 0
    for name, make in families.items():
        if len(sys.argv) > 1 and sys.argv[1] not in name: continue
        torch.manual_seed(0)
        start = time.perf_counter()
        try: attempt(make(), data())
        except Exception:
            failed += 1
            print(f'{name:50} FAILED\n{traceback.format_exc(limit=-3)}', flush=True)
        else: print(f'{name:50} ok {time.perf_counter() - start:6.1f} s', flush=True)
    sys.exit(failed)
