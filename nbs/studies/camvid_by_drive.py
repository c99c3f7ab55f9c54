"""CamVid anew, by drive: UNet3+ on EfficientNet-Lite0 with ImageNet weights is trained on two drives, clean and under
weight noise, and scored on the third.

    python nbs/studies/camvid_by_drive.py choose               # camvid_by_drive_levels.csv: the trained levels
    python nbs/studies/camvid_by_drive.py run --seeds 0 1      # trains and measures; a file for each network; resumes
    python nbs/studies/camvid_by_drive.py table                # camvid_by_drive.csv, and what can be said
    python nbs/studies/camvid_by_drive.py masks                # camvid_by_drive_masks.png: four masks of one frame

Protocol, written before any network was scored (fourteen steps were timed). What was known: how often each class occurs
in each drive, the older study of CamVid (`camvid_weight_noise.py`: another network, validated on one clip between
training frames of the same drive), and the study of VOC's animals (`voc_weight_noise.py`: the same network), whose
learning rate and noise this one takes over.

*Data*: the frames of SegNet's training and validation lists, in 11 classes, by drive (the first part of their names):
0006R0, 0016E5 and 0001TP. 0016E5 has one clip of 101 frames in 6.7 seconds, in effect a single scene; of it every 15th
frame is used, so that all drives come with one frame a second: 101, 211 and 62. Every class occurs in every drive, and
the script refuses to score frames among which one is missing; bicyclists in 0006R0 (14 frames) and fences in 0001TP
(13 frames) are so rare that their IoU there says little, and both are part of mIoU.

*Three splits*: each drive is held out once, and the networks are trained on the other two. Nothing of the held-out
drive is used before the one measurement: no frame, no statistics (the normalisation is that of the encoder), no choice.

*Ways of training*: `clean`; `noise`, under MaxGaussian (sigma = n max|W| of each kernel, clipped at 2 sigma, a draw
for each batch) with gradients at the noisy weights. The same frames in the same order for one drive and seed. And
`neighbours`, clean, validated the old way: every other frame of the drive is trained on, and as many frames of the
other two drives are left out, evenly, so that the number of training frames is the same as for `clean`; it is scored
on the frames between, each of them one second from a training frame. `clean` is scored on these frames, too.

*Choosing*: for each held-out drive the noise of training is chosen on the other two drives. A clean network (seed 100,
half of the steps) is trained without the last fifth of each drive and the five frames (seconds) before that fifth; on
the last fifths (two draws) the level of CANDIDATES counts at which it keeps the share of its mIoU that lies nearest to
75 %. Nothing else was chosen.

*Budget*: as many whole epochs as come nearest to the steps named below, the same for every way. Steps, not epochs, are
kept equal from drive to drive: two drives have 163, 273 or 312 frames together, so equal epochs would train the network
for 0016E5 half as long as the others, and the difference between drives would be one of training, too.

*Sizes*: small: 96x128 pixels, batches of 8, 200 steps (195 to 204 in whole epochs), width 16, the encoder up to a
sixteenth of the resolution, seeds 0 and 1; full: 240x320 pixels, 6,000 steps, width 32, the whole encoder, five seeds.
200 steps are short; without ImageNet weights they would be far too short.

*Measured on the held-out drive*, once for each network: under MaxGaussian at LEVELS, at the trained level and at twice
that, and under AbsoluteGaussian at STRENGTHS, two draws each (`full`: ten), the same draws for all networks; mIoU,
pixel accuracy, and IoU of each class. `neighbours`, and `clean` once more: on every other frame, without noise, at the
trained level and at twice that.

*Claims*. The unit is the drive: differences are taken between networks of the same drive and seed, averaged over draws
and seeds, and the 95 % interval is Student's t over the three drives, with two degrees of freedom. (1) `noise` against
`clean` without noise, at the trained level, at twice that, and under absolute noise of 0.04: four comparisons,
corrected by Holm. (2) `neighbours` against `clean` on the same frames, without noise: what the old way of validating
adds. `clear` means that the corrected p is below 0.05. Three drives prove little, so each drive's numbers are shown.
"""
import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from camvid_weight_noise import drive_and_frame
from fastai.torch_core import default_device
from study import command_line, keep, keep_masks, machine, out
from voc_weight_noise import ALPHA, CANDIDATES, kept, train

from noisyseg.data.datasets import camvid, camvid_classes, camvid_palette
from noisyseg.data.loaders import mask_dataloaders
from noisyseg.measure.summary import corrected, paired_difference
from noisyseg.measure.sweeps import sweep
from noisyseg.nets.encoders import lite0_stats
from noisyseg.perturb.clone import perturbed
from noisyseg.perturb.laws import AbsoluteGaussian, MaxGaussian
from noisyseg.train.checkpoints import load_model, save_model

HERE = Path(__file__).parent
NETWORKS = HERE/'camvid_by_drive'  # a file for each network that was measured, beside the network
DRIVES = ('0006R0', '0016E5', '0001TP')
WAYS = ('clean', 'noise', 'neighbours')
SIZES = {'small': dict(px=(96, 128), steps=200, width=16, draws=2, maps=(0, 1, 2, 3)),
         'full': dict(px=(240, 320), steps=6000, width=32, draws=10, maps=(0, 1, 2, 3, 4))}
BS, KEPT, GAP = 8, 0.75, 5
LEVELS = (0, 0.01, 0.02, 0.03, 0.04, 0.06)
STRENGTHS = (0.01, 0.02, 0.04)
STRENGTH = 0.04  # of absolute noise, in the claims

def thinned(frames, step=29):
    "Frame numbers in order, without those that follow the last one by less than `step`; 30 are a second."
    some = []
    for frame in sorted(frames):
        if not some or frame - some[-1] >= step: some.append(frame)
    return some

def films(a):
    "({drive: its (image, mask) files, one a second, in order}, how they are read)"
    dls = camvid(size=a.px, bs=BS, augment=False, cache=False)
    pairs = {drive_and_frame(image.stem): (image, mask) for image, mask in [*dls.train_ds.items, *dls.valid_ds.items]}
    frames = {d: thinned(f for drive, f in pairs if drive == d) for d in DRIVES}
    return {d: [pairs[d, f] for f in some] for d, some in frames.items()}, dls.train_ds.read

def by_drive(film, drive):
    "(training pairs, held-out pairs): the other drives, and this one"
    return [p for d in DRIVES if d != drive for p in film[d]], film[drive]

def neighbours(film, drive):
    "The same numbers of training frames, half of the drive among them, and its other half to score"
    others, own = by_drive(film, drive)
    wanted = len(others) - len(own[::2])
    spread = np.linspace(0, len(others) - 1, wanted).round().astype(int)
    return [others[i] for i in spread] + own[::2], own[1::2]

def last_fifths(film, drive):
    "(training pairs, held-out pairs) of the other two drives, to choose by"
    rest, last = [], []
    for d in DRIVES:
        if d == drive: continue
        cut = len(film[d]) * 4 // 5
        rest += film[d][:cut - GAP]
        last += film[d][cut:]
    return rest, last

def loaders(a, parts, read, seed):
    "DataLoaders of training and held-out pairs, where every class is among the held-out ones."
    train, held = parts
    assert not {i.stem for i, _ in train} & {i.stem for i, _ in held}
    dls = mask_dataloaders(train, held, read, camvid_classes, camvid_palette, 11, a.px, BS, seed=seed, cache=True,
                           stats=lite0_stats)
    there = {int(v) for _, mask in dls.valid for v in mask.unique()}
    assert there >= set(range(11)), f'no {[camvid_classes[k] for k in range(11) if k not in there]} to score'
    return dls

def epochs(dls, steps): return max(1, round(steps / len(dls.train)))

def choose(a):
    film, read = films(a)
    rows, found = [], {}
    for drive in DRIVES:
        dls = loaders(a, last_fifths(film, drive), read, 100)
        model = train(dls, a, 100, epochs(dls, a.steps / 2)).model
        df = sweep(model, dls.valid, MaxGaussian(alpha=ALPHA), levels=(0, *CANDIDATES), draws=2, progress=False,
                   on='here')
        share = kept(df)
        found[drive] = float((share.drop(0) - KEPT).abs().idxmin())
        print(drive, share.round(3).to_dict(), found[drive], flush=True)
        rows.append(df.assign(held_out=drive))
    keep(out(a, 'camvid_by_drive_levels.csv'), pd.concat(rows), a, chosen=found)

def trained_levels(a):
    "{held-out drive: the level that its networks are trained at}, from `choose`"
    file = out(a, 'camvid_by_drive_levels.csv')
    return json.loads(file.with_name(file.name + '.json').read_text())['chosen']

def stem(a, way, drive, seed): return f'{a.size}-{way}-{drive}-{seed}'

def trained(a, way, drive, seed, dls):
    "The network, from its checkpoint or trained now."
    file = NETWORKS/f'{stem(a, way, drive, seed)}.safetensors'
    if not file.exists():
        level = trained_levels(a)[drive] if way == 'noise' else 0.
        start, n = time.time(), epochs(dls, a.steps)
        learn = train(dls, a, seed, n, level)
        save_model(learn, file, half=True, dataset=f'CamVid without the drive {drive}' if way != 'neighbours' else
                   f'CamVid, every other frame of {drive} among them', way=way, seed=seed, train_level=level, epochs=n,
                   steps=n * len(dls.train), frames=len(dls.train_ds), size=a.px,
                   seconds=round(time.time() - start), hardware=machine())
    return load_model(file, device=default_device())

def measured(a, model, valid, level, frames):
    "Rows of the sweeps over all frames of the drive, or over every other one."
    own = (level, round(2 * level, 6))
    laws = {'relative': MaxGaussian(alpha=ALPHA), 'absolute': AbsoluteGaussian()}
    levels = {'relative': sorted({*LEVELS, *own}), 'absolute': STRENGTHS}
    if frames != 'all':
        del laws['absolute'], levels['absolute']
        levels['relative'] = (0, *own)
    df = sweep(model, valid, laws, levels=levels, draws=a.draws, progress=False, on='here')
    return df.round({'value': 5}).assign(frames=frames)

def network(a, way, drive, seed, film, read):
    "Trained, and measured on what its way holds out: its rows."
    split = neighbours if way == 'neighbours' else by_drive
    dls = loaders(a, split(film, drive), read, seed)
    model, level = {(way, seed): trained(a, way, drive, seed, dls)}, trained_levels(a)[drive]
    found = [measured(a, model, dls.valid, level, 'every other' if way == 'neighbours' else 'all')]
    if way == 'clean':
        half = loaders(a, neighbours(film, drive), read, seed).valid
        found.append(measured(a, model, half, level, 'every other'))
    return pd.concat(found, ignore_index=True).assign(drive=drive, trained=level)

def run(a):
    NETWORKS.mkdir(exist_ok=True)
    film, read = films(a)
    for seed in a.seeds:
        for way in a.only or WAYS:
            for drive in DRIVES:
                file = NETWORKS/f'{stem(a, way, drive, seed)}.csv'
                if file.exists(): continue
                print(f'{way}, {drive} held out, seed {seed}', time.strftime('%H:%M'), flush=True)
                df = network(a, way, drive, seed, film, read)
                keep(file, df, a)
                shown = df[(df['metric'] == 'mIoU') & (df['disturbance'] == 'relative')]
                print(shown.groupby(['frames', 'level'])['value'].mean().round(3).to_dict(), flush=True)

def differences(df, way, frames):
    "mIoU of `way` less that of `clean`: a row for each law, multiple of the trained level, drive and seed."
    d = df[(df['metric'] == 'mIoU') & (df['frames'] == frames)]
    relative = d['disturbance'] == 'relative'
    d = d.assign(times=(d['level'] / d['trained']).where(relative, d['level']).round(6))
    d = d[(relative & d['times'].isin([0, 1, 2])) | (~relative & (d['level'] == STRENGTH))]
    means = d.groupby(['disturbance', 'times', 'drive', 'train_seed', 'model'])['value'].mean().unstack('model')
    return means[['clean', way]].dropna().reset_index()

def over_drives(wide, way):
    "The interval over drives, of means over seeds."
    d = wide.melt(['disturbance', 'times', 'drive', 'train_seed'], ['clean', way], 'model')
    d = d.groupby(['disturbance', 'times', 'drive', 'model'])['value'].mean().reset_index()
    d = d.rename(columns={'drive': 'train_seed'}).assign(metric='mIoU', seed=0, draw=0)
    return paired_difference(d, way, 'clean', 'mIoU', unit='seed', by=('disturbance', 'times')).assign(unit='drive')

def claims(df):
    "The protocol's two families of comparisons, each corrected by Holm."
    found = [corrected(over_drives(differences(df, 'noise', 'all'), 'noise'))]
    if 'neighbours' in set(df['model']):
        old = differences(df, 'neighbours', 'every other')
        found.append(corrected(over_drives(old[old['times'] == 0], 'neighbours')))
    return pd.concat(found, ignore_index=True)

def rows(file):
    "The rows of a file; a drive stays a name (0016E5 would be a number)."
    return pd.read_csv(file, dtype={'drive': str}, keep_default_na=False)

def table(a):
    df = pd.concat([rows(f) for f in sorted(NETWORKS.glob(f'{a.size}-*.csv'))], ignore_index=True)
    keep(out(a, 'camvid_by_drive.csv'), df, a, networks=len(df.drop_duplicates(['model', 'drive', 'train_seed'])))
    main = df[df['metric'] == 'mIoU']
    wide = main.pivot_table(index=['frames', 'disturbance', 'drive', 'model'], columns='level', values='value')
    print(wide.round(3).to_string())
    print(claims(df).round(4).to_string())

@torch.no_grad()
def masks(a, drive='0006R0', seed=0):
    """The middle frame of a drive that was held out, as four masks side by side: the truth, `clean` without noise,
    `clean` and `noise` under one draw of twice the trained level. Labels only: the photographs are not passed on."""
    film, read = films(a)
    dls = loaders(a, by_drive(film, drive), read, seed)
    x, y = (torch.cat(t)[[len(film[drive]) // 2]].as_subclass(torch.Tensor) for t in zip(*dls.valid))
    found = [y[0]]
    for way, times in (('clean', 0), ('clean', 2), ('noise', 2)):
        model = load_model(NETWORKS/f'{stem(a, way, drive, seed)}.safetensors', device=x.device)
        with perturbed(model, MaxGaussian(times * trained_levels(a)[drive], alpha=ALPHA), generator=0):
            found.append(model(x)[0].argmax(0))
    file = out(a, 'camvid_by_drive_masks.csv').with_suffix('.png')
    keep_masks(file, torch.cat(found, 1), [*camvid_palette, (255, 255, 255)])

if __name__ == '__main__':
    command_line(dict(choose=choose, run=run, table=table, masks=masks), __doc__, SIZES, (0, 1),
                 only=dict(nargs='+', choices=WAYS, help='ways of training'))
