"""The methods of robust training side by side: UNet3+ on EfficientNet-Lite0, on pictures of animals and people.

    python nbs/studies/voc_methods.py choose                  # voc_methods_chosen.csv: sigma and the two rho
    python nbs/studies/voc_methods.py run --seeds 0 1 2       # a file for each network that was measured; resumes
    python nbs/studies/voc_methods.py table                   # voc_methods.csv, and what can be said

Protocol, written before any run of it but a trial of the script's lines, on networks that had seen 64 pictures.

*Question*: of what makes training robust, which is worth its time on a real task with an encoder that has seen
ImageNet: noise in the weights, DAMP (arXiv 2406.16540), SAM (arXiv 2010.01412), ASAM (arXiv 2102.11600), SAM with
noise, or simply training for longer?

*Data and network*: those of voc_weight_noise.py: `voc_animals`, seven classes, 3,131 pictures of train_aug, 445 of val;
UNet3+ on EfficientNet-Lite0 with ImageNet weights, Adam, one cycle up to 4e-3. A subset: no number here stands beside a
published one of VOC.

*Sizes*: small: 64 pixels, 3 epochs (4 at first; changed for want of time while the strengths were being chosen, before
any network of `run` had begun), batches of 32, width 16, the encoder up to a sixteenth. full: 256 pixels, 30
epochs, width 32, the whole encoder, for a GPU.

*Ways*: Adam; Adam for twice as many epochs, which takes the time of SAM; weight noise (MaxGaussian at 2 %, the `middle`
of the headline study, a draw for each batch); eight sub-batches without noise, batch norm over all of them: the control
of DAMP; DAMP with the same sub-batches; SAM; ASAM (eta 0); SAM with weight noise. DAMP, SAM and ASAM at the strength
that the authors of DAMP publish for CIFAR-10 (sigma 0.2, rho 0.045, rho 1) and at a chosen one; SAM with noise at the
chosen one. If the chosen strength is the published one, the network is trained once and stands in both rows.

*Choosing*: every tenth picture of train_aug is held out, one network for each candidate (seed 100, two epochs) learns
from the rest. The highest mean of three numbers decides: mIoU without disturbance, the mean over four corruptions that
the result does not count (speckle noise, Gaussian blur, spatter, saturation, severity 3), and the mean over two draws
of MaxGaussian at 1 %. Candidates: sigma 0.02, 0.05, 0.1, 0.2; rho of SAM 0.01, 0.045, 0.1; rho of ASAM 0.2, 0.5, 1.

*Measured on val*, once for each network: mIoU without disturbance; under the fifteen standard corruptions at severity 3
(`full`: 1, 3, 5; at 64 pixels with the settings of CIFAR-10-C, whose radii are for 32 pixels); MaxGaussian at 0.5, 1, 2
and 3 %, AbsoluteGaussian at 0.01 and 0.02 and multiplicative noise at 0.1 and 0.2, two draws each, the same for all
networks; weights of 6, 5 and 4 bits.

*Claims*, over training seeds (paired: the same seed has the same pictures in the same order and the same first
weights), 95 % intervals by Student's t, Holm over exactly these seven comparisons: by the mean over corruptions, DAMP,
SAM and ASAM at the chosen strength and Adam for twice as long against Adam, and DAMP against its sub-batches without
noise; by the mean over the four levels of MaxGaussian, weight noise and SAM with noise against Adam. `clear` means a
corrected p below 0.05. Everything else in the tables describes, and decides nothing.

*Time*: seconds of processor time, as a ratio to Adam's of the same seed.
"""
import json
import time
from pathlib import Path

import pandas as pd
from study import command_line, keep, out
from voc_weight_noise import ALPHA, animals, names, train

from noisyseg.data.corruptions import ALL_19, STANDARD_15, Corruption
from noisyseg.measure.summary import corrected, paired_difference
from noisyseg.measure.sweeps import sweep
from noisyseg.perturb.laws import AbsoluteGaussian, MaxGaussian, MultiplicativeGaussian
from noisyseg.perturb.quantization import Quantize
from noisyseg.perturb.selectors import kernels_and_scales
from noisyseg.train.checkpoints import load_model, save_model
from noisyseg.train.methods.damp import DAMP
from noisyseg.train.methods.sam_callback import SAMCallback

NETWORKS = Path(__file__).parent/'voc_methods'  # a file for each network that was measured, beside the network
SIZES = {'small': dict(px=64, epochs=3, short=2, width=16, maps=(0, 1, 2, 3), severities=(3,)),
         'full': dict(px=256, epochs=30, short=10, width=32, maps=(0, 1, 2, 3, 4), severities=(1, 3, 5))}
BS, PARTS, NOISE = 32, 8, 0.02
CANDIDATES = {'DAMP': (0.02, 0.05, 0.1, 0.2), 'SAM': (0.01, 0.045, 0.1), 'ASAM': (0.2, 0.5, 1.)}
PUBLISHED = {'DAMP': 0.2, 'SAM': 0.045, 'ASAM': 1.}  # for CIFAR-10, by the authors of DAMP
OTHERS = sorted({*ALL_19} - {*STANDARD_15})  # the corruptions that choose
UNDER = {'MaxGaussian': (0.005, 0.01, 0.02, 0.03), 'AbsoluteGaussian': (0.01, 0.02),
         'MultiplicativeGaussian': (0.1, 0.2), 'bits': (6, 5, 4)}

def method(kind, strength, seed):
    "The callbacks of a method of training."
    if kind == 'DAMP': return [DAMP(strength, PARTS, batchnorm='sync', seed=seed)]
    if kind == 'SAM': return [SAMCallback(strength)]
    return [SAMCallback(strength, adaptive=True, eta=0)] if kind == 'ASAM' else []

def ways(a):
    "{way of training: (method, strength, noise, epochs)}"
    file = out(a, 'voc_methods_chosen.csv')
    best = json.loads(file.with_name(file.name + '.json').read_text())['chosen']
    plain = {'Adam': (None, None, 0., a.epochs), 'weight noise': (None, None, NOISE, a.epochs),
             'sub-batches': ('DAMP', 0., 0., a.epochs)}
    chosen = {kind: (kind, best[kind], 0., a.epochs) for kind in CANDIDATES}
    published = {f'{kind}, published': (kind, v, 0., a.epochs) for kind, v in PUBLISHED.items() if v != best[kind]}
    return {**plain, **chosen, 'SAM with noise': ('SAM', best['SAM'], NOISE, a.epochs),
            'Adam, twice as long': (None, None, 0., 2 * a.epochs), **published}

def fitted(a, dls, way, seed):
    "A learner, trained in a way, and the seconds of processor time that it took."
    kind, strength, noise, epochs = way
    start = time.process_time()
    learn = train(dls, a, seed, epochs, noise, methods=method(kind, strength, seed))
    return learn, round(time.process_time() - start, 1)

def miou(model, dl, disturbances, levels, where=None):
    "Rows of a sweep: mIoU."
    df = sweep(model, dl, disturbances, levels=levels, draws=2, progress=False, **({'where': where} if where else {}))
    return df[df['metric'] == 'mIoU']

def corruptions(dls, kinds): return {c: Corruption(c, table='cifar', stats=dls.stats) for c in kinds}

def choose(a):
    held = names('train_aug')[::10]
    rows = []
    for kind, strengths in CANDIDATES.items():
        for strength in strengths:
            dls = animals(a.px, 100, held, without=held, bs=BS)
            model = fitted(a, dls, (kind, strength, 0., a.short), 100)[0].model
            noisy = miou(model, dls.valid, MaxGaussian(alpha=ALPHA), (0, 0.01))
            spoilt = miou(model, dls.valid, corruptions(dls, OTHERS), {c: (3,) for c in OTHERS})
            three = [*noisy.groupby('level')['value'].mean(), spoilt['value'].mean()]
            rows.append(dict(way=kind, strength=strength, clean=three[0], noise=three[1], corrupted=three[2],
                             score=sum(three) / 3))
            print(rows[-1], flush=True)
    df = pd.DataFrame(rows).round(4)
    best = df.loc[df.groupby('way')['score'].idxmax()].set_index('way')['strength'].to_dict()
    keep(out(a, 'voc_methods_chosen.csv'), df, a, pictures=f'{len(held)} of train_aug, held out', chosen=best)

def measured(model, dls, a):
    "All rows of a network on val."
    laws = {'MaxGaussian': MaxGaussian(alpha=ALPHA), 'AbsoluteGaussian': AbsoluteGaussian(), 'bits': Quantize()}
    table = 'cifar' if a.px <= 64 else 'imagenet'
    kinds = {c: Corruption(c, table=table, stats=dls.stats) for c in STANDARD_15}
    df = [miou(model, dls.valid, laws, {k: (0, *UNDER[k]) if k == 'MaxGaussian' else UNDER[k] for k in laws}),
          miou(model, dls.valid, {'MultiplicativeGaussian': MultiplicativeGaussian()},
               UNDER['MultiplicativeGaussian'], where=kernels_and_scales),
          miou(model, dls.valid, kinds, {c: a.severities for c in kinds})]
    return pd.concat(df, ignore_index=True)

def run(a):
    NETWORKS.mkdir(exist_ok=True)
    for seed in a.seeds:
        for name, way in ways(a).items():
            file = NETWORKS/f'{a.size}-{name.replace(", ", "-").replace(" ", "-")}-{seed}.csv'
            if file.exists() or name not in (a.only or ways(a)): continue
            dls = animals(a.px, seed, names('val'), bs=BS)
            learn, seconds = fitted(a, dls, way, seed)
            network = save_model(learn, file.with_suffix('.safetensors'), half=True, dataset='voc_animals', way=name,
                                 seed=seed, size=a.px)
            df = measured(load_model(network), dls, a).assign(model=name, train_seed=seed, seconds=seconds)
            keep(file, df.round({'value': 5}), a, way=dict(zip(('method', 'strength', 'noise', 'epochs'), way)))
            print(f'{name}, seed {seed}', summary(df).round(3).to_dict('records'), flush=True)

def summary(df):
    "mIoU of each network by what is asked of it: clean, under corruptions, under noise, with few bits."
    asked = df['disturbance'].where(~df['disturbance'].isin(STANDARD_15), 'corrupted pictures')
    asked = asked.where((df['disturbance'] != 'MaxGaussian') | (df['level'] > 0), 'clean')
    return df.assign(asked=asked).groupby(['model', 'train_seed', 'asked'], as_index=False)['value'].mean()

def claims(df):
    "The protocol's seven comparisons, corrected by Holm."
    means = summary(df).assign(metric='mIoU', draw=0, seed=0, level=0., **{'class': ''})
    pairs = [('corrupted pictures', way, 'Adam') for way in (*CANDIDATES, 'Adam, twice as long')]
    pairs += [('corrupted pictures', 'DAMP', 'sub-batches')]
    pairs += [('MaxGaussian', way, 'Adam') for way in ('weight noise', 'SAM with noise')]
    found = [paired_difference(means[means['asked'] == asked], way, other, 'mIoU', 'seed').assign(asked=asked)
             for asked, way, other in pairs]
    return corrected(pd.concat(found, ignore_index=True))

def rows(a):
    "All rows that were measured so far."
    return pd.concat([pd.read_csv(f) for f in sorted(NETWORKS.glob(f'{a.size}-*.csv'))], ignore_index=True)

def table(a):
    df = rows(a)
    keep(out(a, 'voc_methods.csv'), df, a, networks=len(df.drop_duplicates(['model', 'train_seed'])))
    print(summary(df).pivot_table(index='model', columns='asked', values='value').round(3).to_string())
    print(claims(df).round(4).to_string())

if __name__ == '__main__':
    command_line(dict(choose=choose, run=run, table=table), __doc__, SIZES, (0, 1, 2),
                 only=dict(nargs='+', help='ways of training'))
