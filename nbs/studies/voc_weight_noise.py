"""The headline study: UNet3+ on EfficientNet-Lite0 with ImageNet weights, on pictures of animals and people from VOC,
trained clean and under weight noise, then measured under noise.

    python nbs/studies/voc_weight_noise.py choose                      # voc_weight_noise_levels.csv: the trained levels
    python nbs/studies/voc_weight_noise.py run --seeds 0 1 2           # trains and measures; a file for each network
    python nbs/studies/voc_weight_noise.py table                       # voc_weight_noise.csv, and what can be said
    python nbs/studies/voc_weight_noise.py layers                      # voc_weight_noise_layers.csv: noise in one part
    python nbs/studies/voc_weight_noise.py masks                       # voc_weight_noise_masks.png: some masks

Protocol, written before any run on the validation pictures. One trial by others, one seed, was known: it saw the
validation pictures after each of four epochs, and under MaxGaussian at n = 0.5, 1, 2 and 5 %.

*Data*: `voc_animals` where NOISYSEG_DATA points: the pictures of the published lists train_aug (3,131 are there) and
val (445) that show animals, with SBD's and VOC's masks. Seven classes: background, cat, cow, dog, horse, person and
sheep; other labels count as background, 255 does not count. The pictures are scaled to fit a square, with margins
that do not count. This is a subset: no number here stands beside a published one of VOC.

*Choosing*: every tenth picture of train_aug is held out, one clean network (seed 100, two epochs) is trained on the
rest, and the held-out pictures say at which of 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3 and 5 % of noise (two draws)
it keeps the share of its mIoU that lies nearest to 95, 75 and 50 %: `low`, `middle` and `high`. Nothing else was
chosen; the learning rate, 4e-3, is that of the CamVid study.

*Ways of training*: clean; under MaxGaussian (sigma = n max|W| of each kernel, clipped at 2 sigma, a draw for each
batch) at `low`, `middle` and `high`, with gradients at the noisy weights; at `middle` with gradients at the recovered
weights ("recovered", the published order). The same pictures in the same order for one training seed.

*Sizes*: small: 96 pixels, batches of 16, 4 epochs, width 16, seeds 0, 1, 2, and the encoder up to a sixteenth of the
resolution (its last two stages would see 3x3 pixels: after one epoch, on 300 pictures of train_aug that were held out,
28.4 mIoU without them, 26.7 with them); full: 256 pixels, 30 epochs, width 32, the whole encoder, five seeds. Four
epochs are short; without ImageNet weights they would be far too short.

*Measured on val*, once for each network: under MaxGaussian at LEVELS, and under AbsoluteGaussian (sigma is a number,
the same for all kernels) at STRENGTHS, two draws each (`full`: ten), the same draws for all networks.

*Claims*, over training seeds (paired: the same seed, the mean over draws), 95 % intervals by Student's t, Holm over all
comparisons of one table: (1) each way against clean without noise (the published protocol "training only"); (2) each
way against clean at the three trained levels ("training and inference": a network at its own level, and the comparison
that the published curve lacks: a clean-trained network at that level); (3) the same under absolute noise at the
strength where clean-trained networks keep nearest to half. `clear` means that Holm's corrected p is below 0.05.

*Layers*, added when all of the above had been measured, before any run of it. Which part of the network loses the
score: is it the first level, as in the CamVid study, and is it batch norm? The committed networks, `clean` and then
`high`, each seed, under MaxGaussian at `high`, the level at which clean-trained networks keep half, in one part at a
time, two draws, on val. Parts, in two divisions that overlap: by kind (batch norm's scales; depthwise convolutions;
all other convolutions), and by `stages` of the network. One comparison is a claim, over the seeds of `clean`: the loss
through depthwise convolutions less that through batch norm. The rest describes, and its signs are told seed by seed.
"""
import json
import time
from pathlib import Path

import pandas as pd
import torch
from fastai.torch_core import set_seed
from study import EpochLog, NoPeeking, command_line, keep, keep_masks, machine, out

from noisyseg.data.files import data_root, distinct_palette
from noisyseg.data.own import custom_masks
from noisyseg.measure.sensitivity import layer_sensitivity
from noisyseg.measure.summary import corrected, paired_difference
from noisyseg.measure.sweeps import sweep
from noisyseg.nets.encoders import lite0_stats
from noisyseg.nets.unet3plus import unet3plus_lite0
from noisyseg.perturb.clone import perturbed
from noisyseg.perturb.laws import AbsoluteGaussian, MaxGaussian
from noisyseg.perturb.selectors import by_name, conv_and_norm, norms, stages
from noisyseg.train.checkpoints import load_model, save_model
from noisyseg.train.learner import segmentation_learner
from noisyseg.train.losses import HybridLoss

HERE = Path(__file__).parent
NETWORKS = HERE/'voc_weight_noise'  # a file for each network that was measured, beside the network
SEVEN = ['background', 'cat', 'cow', 'dog', 'horse', 'person', 'sheep']
VOC = dict(cat=8, cow=10, dog=12, horse=13, person=15, sheep=17)  # their labels in VOC's masks
CODES = {v: 0 for v in range(21)} | {v: SEVEN.index(c) for c, v in VOC.items()} | {255: 255}
SIZES = {'small': dict(px=96, epochs=4, width=16, draws=2, maps=(0, 1, 2, 3)),
         'full': dict(px=256, epochs=30, width=32, draws=10, maps=(0, 1, 2, 3, 4))}
BS, LR, ALPHA = 16, 4e-3, 2.0
CANDIDATES = (0.001, 0.0015, 0.002, 0.003, 0.005, 0.007, 0.01, 0.015, 0.02, 0.03, 0.05)
KEPT = dict(low=0.95, middle=0.75, high=0.5)  # share of the clean score at the trained levels
LEVELS = (0, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.12)  # up to the published 12 %, finer where Lite0 loses
STRENGTHS = (0.005, 0.01, 0.02, 0.04)

def names(part): return (data_root()/'voc_animals'/f'{part}.txt').read_text().split()

def animals(px, seed, valid, without=(), bs=BS):
    "DataLoaders of the pictures in train_aug, less those of `without`, validated on those named in `valid`."
    root = data_root()/'voc_animals'
    used = [n for n in names('train_aug') if n not in set(without)] + list(valid)
    pairs = [(root/'images'/f'{n}.jpg', root/'masks'/f'{n}.png') for n in used]
    return custom_masks(pairs, None, SEVEN, px, bs, valid=list(valid), codes=CODES, check=False, seed=seed, cache=True,
                        stats=lite0_stats)

def train(dls, a, seed, epochs, noise=0., gradient='noisy', methods=()):
    "A learner, trained; without noise, or under it, and with other methods of training."
    set_seed(seed)
    law = MaxGaussian(noise, alpha=ALPHA) if noise else None
    loss = HybridLoss(msssim=0, ignore_index=dls.ignore_index)
    learn = segmentation_learner(dls, unet3plus_lite0, law, loss, metrics=[],
                                 arch_args=dict(width=a.width, upsample='after', deep_supervision=False,
                                                encoder_args=dict(out_indices=a.maps)),
                                 noise_args=dict(seed=seed, gradient=gradient) if law else None,
                                 cbs=[*methods, NoPeeking(), EpochLog()])
    learn.model.to(memory_format=torch.channels_last)  # a fifth faster on a CPU, same function
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, LR)
    return learn

def kept(df):
    "The mean mIoU at each level as a share of that at level 0."
    scores = df[df['metric'] == 'mIoU'].groupby('level')['value'].mean()
    return scores / scores[0]

def choose(a):
    held = names('train_aug')[::10]
    dls = animals(a.px, 100, held, without=held)
    model = train(dls, a, 100, 2).model
    df = sweep(model, dls.valid, MaxGaussian(alpha=ALPHA), levels=(0, *CANDIDATES), draws=2, progress=False)
    share = kept(df)
    found = {name: (share.drop(0) - target).abs().idxmin() for name, target in KEPT.items()}
    print(share.round(3).to_string(), found, sep='\n')
    keep(out(a, 'voc_weight_noise_levels.csv'), df, a, pictures=f'{len(held)} of train_aug, held out', chosen=found)

def trained_levels(a):
    "What `choose` found: {'low': level, 'middle': level, 'high': level}"
    file = out(a, 'voc_weight_noise_levels.csv')
    return json.loads(file.with_name(file.name + '.json').read_text())['chosen']

def ways(a):
    "{way of training: arguments of `train`}"
    level = trained_levels(a)
    return {'clean': {}, 'middle': dict(noise=level['middle']), 'high': dict(noise=level['high']),
            'low': dict(noise=level['low']), 'recovered': dict(noise=level['middle'], gradient='recovered')}

def trained(a, way, seed, args, dls):
    "The network, from its checkpoint or trained now."
    file = NETWORKS/f'{a.size}-{way}-{seed}.safetensors'
    if not file.exists():
        start = time.time()
        learn = train(dls, a, seed, a.epochs, **args)
        save_model(learn, file, half=True, dataset='voc_animals', way=way, seed=seed, epochs=a.epochs, size=a.px,
                   seconds=round(time.time() - start), hardware=machine())
    return load_model(file)

def measured(models, valid, a):
    "Rows of the sweep over both laws, the trained levels among its own."
    laws = {'relative': MaxGaussian(alpha=ALPHA), 'absolute': AbsoluteGaussian()}
    levels = {'relative': sorted({*LEVELS, *trained_levels(a).values()}), 'absolute': STRENGTHS}
    df = sweep(models, valid, laws, levels=levels, draws=a.draws, progress=False)
    return df.round({'value': 5})

def run(a):
    NETWORKS.mkdir(exist_ok=True)
    for seed in a.seeds:
        for way, args in ways(a).items():
            file = NETWORKS/f'{a.size}-{way}-{seed}.csv'
            if file.exists() or way not in (a.only or ways(a)): continue
            print(f'{way}, seed {seed}', flush=True)
            dls = animals(a.px, seed, names('val'))
            df = measured({(way, seed): trained(a, way, seed, args, dls)}, dls.valid, a)
            keep(file, df, a, training=args)
            print(kept(df[df['disturbance'] == 'relative']).round(3).to_dict(), flush=True)

def scores(a):
    "All rows that were measured so far."
    return pd.concat([pd.read_csv(f) for f in sorted(NETWORKS.glob(f'{a.size}-*.csv'))], ignore_index=True)

def claims(df, levels):
    "The protocol's comparisons with clean-trained networks over training seeds, Holm over all of them."
    clean = df[(df['model'] == 'clean') & (df['metric'] == 'mIoU')]
    scores = clean.groupby(['disturbance', 'level'])['value'].mean()
    half = (scores['absolute'] - scores['relative'][0] / 2).abs().idxmin()
    at = {('relative', level) for level in (0, *levels.values())} | {('absolute', half)}
    found = [paired_difference(df[df['disturbance'] == kind], way, 'clean', 'mIoU', 'seed').assign(way=way, law=kind)
             for way in df['model'].unique() if way != 'clean' for kind in ('relative', 'absolute')]
    found = pd.concat(found).reset_index()
    some = [(law, level) in at for law, level in zip(found['law'], found['level'])]
    return corrected(found[some])

def table(a):
    df = scores(a)
    keep(out(a, 'voc_weight_noise.csv'), df, a, networks=len(df.drop_duplicates(['model', 'train_seed'])))
    main = df[df['metric'] == 'mIoU']
    print(main.pivot_table(index=['disturbance', 'model'], columns='level', values='value').round(3).to_string())
    print(claims(df, trained_levels(a)).round(4).to_string())

def parts(model):
    "{label: selector}: the weights by kind, and by stage."
    depthwise = by_name('*.conv_dw.weight') & conv_and_norm
    kinds = {'batch norm': conv_and_norm & norms, 'depthwise': depthwise, 'other': conv_and_norm & ~norms & ~depthwise}
    return kinds | stages(model)

def layers(a):
    level, rows = trained_levels(a)['high'], []
    valid = animals(a.px, 0, names('val')).valid
    for way in 'clean', 'high':
        for seed in a.seeds:
            model = load_model(NETWORKS/f'{a.size}-{way}-{seed}.safetensors')
            df = layer_sensitivity(model, valid, MaxGaussian(level, alpha=ALPHA), groups=parts(model), draws=a.draws,
                                   name=way, progress=False)
            rows.append(df[df['metric'] == 'mIoU'].assign(train_seed=seed))
            print(rows[-1].groupby(['group', 'n_weights'])['value'].mean().round(3).to_string(), flush=True)
            keep(out(a, 'voc_weight_noise_layers.csv'), pd.concat(rows, ignore_index=True).round({'value': 5}), a)

@torch.no_grad()
def masks(a, seed=0):
    """Every 75th picture of val, chosen before it was seen, a row each, as masks of three networks: `clean` without
    noise, `clean` under one draw of `high`, and `high` under the same draw. What the networks say: no photograph."""
    valid = animals(a.px, seed, names('val')[::75]).valid
    x = torch.cat([x for x, _ in valid]).as_subclass(torch.Tensor)
    columns = []
    for way, level in ('clean', 0.), ('clean', trained_levels(a)['high']), ('high', trained_levels(a)['high']):
        model = load_model(NETWORKS/f'{a.size}-{way}-{seed}.safetensors', device=x.device)
        with perturbed(model, MaxGaussian(level, alpha=ALPHA), generator=0): columns.append(model(x).argmax(1))
    rows = torch.cat(columns, 2).flatten(0, 1)
    keep_masks(out(a, 'voc_weight_noise_masks.csv').with_suffix('.png'), rows, distinct_palette(len(SEVEN)))

if __name__ == '__main__':
    command_line(dict(choose=choose, run=run, table=table, layers=layers, masks=masks), __doc__, SIZES, (0, 1, 2),
                 only=dict(nargs='+', help='ways of training'))
