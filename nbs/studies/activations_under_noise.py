"""The study of activation functions under noise in weights: which stands it best, and is it the scale of the weights?

    python nbs/studies/activations_under_noise.py measure --threads 1    # a file for each network; resumes
    python nbs/studies/activations_under_noise.py table                  # activations_under_noise.csv
    python nbs/studies/activations_under_noise.py measure table --size full    # longer, ten seeds, for a GPU

Protocol, written before any run of it. Looked at before: ReLU and tanh after six steps, on other scenes, to see that
the script works.

*Networks*: `unet3plus_tiny` without deep supervision, with ReLU, GELU, SiLU, Hardswish, tanh, and a ReLU bounded to
[0, 1]. *Training*, alike for all: 64 procedural scenes of 64 pixels (discs and rings on a cluttered ground), STEPS
steps of four, cross-entropy, fastai's Adam, one-cycle up to 1e-2, no noise. A training seed draws the scenes, the
first weights and the order; the six networks of a seed share them, and see the same batches. The learning rate was
not tuned, for none of the six. *Test*: 16 scenes of a seed that no training has.

*Score*: the mean IoU of discs and rings. The ground is left out: a network that has lost everything and says "ground"
would still get a third of a mean over three classes, here it gets 0.

*Noise*, on the kernels of convolutions alone (batch norm keeps its numbers), two draws, the same for all networks:
- `max`: MaxGaussian, sigma = n times the largest weight of each 3x3 kernel, clipped at 2 sigma;
- `std`: RelativeGaussian, sigma = n times the standard deviation of each layer's kernels, which is their root mean
  square but for their mean (how far the two are apart is reported);
- `absolute`: AbsoluteGaussian, one sigma for all weights;
- `absolute, rescaled`: the same after each layer's kernels were multiplied so that they have the root mean square of
  the ReLU network of the same seed. Batch norm's statistics go with them, so the network's answers stay the same
  (checked). Whatever differs now is not the scale of the weights.
Levels double from the mildest (START) until the mean score of the draws is below a quarter of the clean one.

*Main result*: the level at which half of the clean score is lost, for each network and noise, interpolated between
levels in their logarithm, on the mean of the draws. *Tested*: its base-2 logarithm against that of ReLU, paired by
training seed, Student's t; for each of the four noises Holm over the five comparisons with ReLU. *Described*: clean
scores; the root mean square of the kernels and the ratio of their maxima to it.

*How the two explanations are told apart.* If a difference is one of scale, it is there under `absolute` and gone under
`absolute, rescaled` and under `std`. If it stays there, it is the activation (or what else training made of it). What
is there under `max` and not under `std` is the shape of the kernels: how far their maximum stands out.

*Seeds*: 0, 1, 2 and, if the clock allows, 3 and 4, in this order; a seed counts when all of its networks are there.
The clock decides, never a score. CIFAR-10 was meant to be a second data set; there was no machine time for it. For the
same reason the first version of this protocol (96 steps of eight, three draws) was made smaller before its first
network was done.
"""
import copy
import json
import time

import numpy as np
import pandas as pd
import torch
from fastai.data.core import DataLoaders
from fastai.torch_core import set_seed
from study import command_line, keep, out
from torch import nn

from noisyseg.data.datasets import scenes
from noisyseg.measure.evaluation import draw_seed, scores
from noisyseg.measure.summary import corrected, paired_difference
from noisyseg.nets.activations import with_activation
from noisyseg.nets.encoders import ConvBlock
from noisyseg.nets.unet3plus import unet3plus_tiny
from noisyseg.perturb.clone import perturbed
from noisyseg.perturb.laws import AbsoluteGaussian, MaxGaussian, RelativeGaussian, max_abs
from noisyseg.perturb.selectors import conv_and_linear
from noisyseg.train.learner import segmentation_learner
from noisyseg.train.losses import FocalLoss

SIZES = {'small': dict(steps=90, seeds=(0, 1, 2, 3, 4)), 'full': dict(steps=1500, seeds=tuple(range(10)))}
CLASSES = ('disc', 'ring')
ACTIVATIONS = {'ReLU': (nn.ReLU, {}), 'GELU': (nn.GELU, {}), 'SiLU': (nn.SiLU, {}), 'Hardswish': (nn.Hardswish, {}),
               'tanh': (nn.Tanh, {}), 'bounded ReLU': (nn.Hardtanh, dict(min_val=0., max_val=1.))}
START = {'max': MaxGaussian(0.02), 'std': RelativeGaussian(0.05), 'absolute': AbsoluteGaussian(0.005),
         'absolute, rescaled': AbsoluteGaussian(0.005)}
DRAWS, DOUBLINGS, TEST_SEED = 2, 10, 777

def kernels(model):
    "The weights that get noise, by name."
    return {s.name: s.value().detach() for s in conv_and_linear(model)}

def rms(w): return float(w.square().mean().sqrt())

@torch.no_grad()
def rescaled(model, scale):
    "The same answers from kernels of another root mean square: that of `scale`, by name of the weight."
    twin = copy.deepcopy(model)
    inside = {m.conv: m.bn for m in twin.modules() if isinstance(m, ConvBlock)}
    for name, m in twin.named_modules():
        if not isinstance(m, nn.Conv2d): continue
        factor = scale[f'{name}.weight'] / rms(m.weight)
        m.weight.mul_(factor)
        if m.bias is not None: m.bias.mul_(factor)
        if m in inside:   # else it is the head, whose scale changes no answer
            norm = inside[m]
            norm.running_mean.mul_(factor)
            norm.running_var.add_(norm.eps).mul_(factor**2).sub_(norm.eps)
    return twin

def facts(model):
    "How large the kernels are, and how far their maxima stand out."
    found = kernels(model)
    size = {name: rms(w) for name, w in found.items()}
    return dict(scale=float(np.exp(np.mean(np.log(list(size.values()))))),
                max_over_rms=float(np.mean([rms(max_abs(w)) / size[name] for name, w in found.items()])),
                std_over_rms=float(min(w.std(correction=0) / size[name] for name, w in found.items())))

def batches_of(a, seed):
    "The training batches of a seed, as many as there are steps, and what their loaders know."
    dls = scenes(64, 1, 64, bs=4, seed=seed, classes=CLASSES)
    found = []
    while len(found) < a.steps: found += list(dls.train)
    return found[:a.steps], dls

def trained(name, seed, batches, dls):
    set_seed(seed)
    make, settings = ACTIVATIONS[name]
    model = with_activation(unet3plus_tiny(dls.n_classes, deep_supervision=False), make, **settings)
    learn = segmentation_learner(DataLoaders(batches, []), model, loss_func=FocalLoss(gamma=0), metrics=[],
                                 n_classes=dls.n_classes)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 1e-2)
    return learn.model.eval()

def score(model, test, names):
    "Mean IoU of the objects."
    return float(np.mean([v for metric, c, v, _ in scores(model, test, names) if metric == 'IoU' and c in CLASSES]))

def ladder(model, law, clean, test, names):
    "Scores at levels that double, until three quarters are lost: level, draw, score."
    for i in range(DOUBLINGS):
        now, found = law.at(law.level * 2**i), []
        for k in range(DRAWS):
            with perturbed(model, now, conv_and_linear, generator=draw_seed(0, k)):
                found.append(score(model, test, names))
            yield now.level, k, found[-1]
        if np.mean(found) < clean / 4: return

def file(a, name, seed): return a.models/f'{a.size}-{seed}-{name.replace(" ", "-")}.json'

def measured(a, name, seed, batches, dls, test, names):
    "All that is reported of one network."
    begin = time.process_time()
    model = trained(name, seed, batches, dls)
    known = dict(model=name, train_seed=seed, seconds=time.process_time() - begin, **facts(model))
    scale = {n: rms(w) for n, w in kernels(model).items()}
    if name != 'ReLU': scale = json.loads(file(a, 'ReLU', seed).read_text())['scale']
    twin = rescaled(model, scale)
    x = test[0][0]
    with torch.no_grad(): moved = (model(x).argmax(1) != twin(x).argmax(1)).float().mean().item()
    assert moved < 1e-3, f'rescaling changed {moved:.2%} of the answers'
    clean = score(model, test, names)
    rows = [dict(known, noise='none', level=0, draw=0, score=clean)]
    for noise, law in START.items():
        net = twin if noise.endswith('rescaled') else model
        rows += [dict(known, noise=noise, level=level, draw=k, score=v)
                 for level, k, v in ladder(net, law, clean, test, names)]
    return dict(rows=rows, scale=scale)

def measure(a):
    dl = scenes(1, 16, 64, bs=16, seed=TEST_SEED, classes=CLASSES).valid
    test, names = list(dl), dl.vocab
    a.models.mkdir(parents=True, exist_ok=True)
    for seed in a.seeds:
        missing = [name for name in ACTIVATIONS if not file(a, name, seed).exists()]
        batches, dls = batches_of(a, seed) if missing else (None, None)
        for name in missing:
            begin = time.process_time()
            file(a, name, seed).write_text(json.dumps(measured(a, name, seed, batches, dls, test, names), indent=1))
            print(f'{name}, seed {seed}: done in {time.process_time() - begin:.0f} s', flush=True)

def half_lost(d, clean):
    "The level at which half of the clean score is lost, between levels in their logarithm; nan where none takes it."
    means = d.groupby('level')['score'].mean()
    level, before = means.index[0] / 2, clean
    for now, value in means.items():
        if value < clean / 2: return float(level * (now / level) ** ((before - clean / 2) / (before - value)))
        level, before = now, value
    return np.nan

def halves(df):
    "A row for each network and noise: clean score, the level at which half is lost, what is known of the kernels."
    rows = []
    for (model, seed), d in df.groupby(['model', 'train_seed'], sort=False):
        clean = d.loc[d['noise'] == 'none', 'score'].item()
        known = d.iloc[0][['scale', 'max_over_rms', 'std_over_rms', 'seconds']].to_dict()
        rows += [dict(model=model, train_seed=seed, noise=noise, clean=clean, half_lost=half_lost(g, clean), **known)
                 for noise, g in d[d['noise'] != 'none'].groupby('noise', sort=False)]
    return pd.DataFrame(rows)

def differences(df):
    "Each activation against ReLU: doublings of the level at which half is lost; Holm within each noise."
    rows = halves(df).assign(value=lambda d: np.log2(d['half_lost']), metric='log2 level', seed=0, draw=0)
    looks = pd.concat([paired_difference(rows, name, 'ReLU', 'log2 level', 'seed', by='noise')
                       for name in ACTIVATIONS if name != 'ReLU'])
    return pd.concat([corrected(d) for _, d in looks.groupby('noise', sort=False)], ignore_index=True)

def table(a):
    "The rows of all seeds that have every network."
    rows = []
    for seed in a.seeds:
        files = [file(a, name, seed) for name in ACTIVATIONS]
        if all(f.exists() for f in files): rows += [r for f in files for r in json.loads(f.read_text())['rows']]
    df = pd.DataFrame(rows)
    keep(out(a, 'activations_under_noise.csv'), df, a, train_seeds=sorted(df['train_seed'].unique().tolist()))
    wide = halves(df).pivot_table(index='model', columns='noise', values='half_lost')
    print(wide.reindex(ACTIVATIONS).round(4).to_string())
    print(differences(df)[['noise', 'a', 'mean', 'half', 'p', 'clear', 'n']].round(3).to_string())

if __name__ == '__main__':
    command_line(dict(measure=measure, table=table), __doc__, SIZES, models='noisyseg-activations')
