"""The study of mending: what `rescue`, `protect` and the prediction from gradients do for networks of others.

    python nbs/studies/mending.py measure --size full      # rows as they come, a file for each network; resumes
    python nbs/studies/mending.py table --size full        # mending_full.csv
    python nbs/studies/mending.py measure table --only espnetv2_s_0.5_pascal_256 resnet20     # a look

Protocol, written before any run of it.

*Networks*: the files of `networks_of_others.py` for VOC at 256 and 384 pixels (twelve) and for CIFAR-10 (four), as
published. *Pictures*: those that choose anything (the level, the rescue's 48 unlabelled ones, what is protected) come
from `train_aug.txt`, for CIFAR-10 from the training set; every score that is reported is on the test pictures of
`networks_of_others.py`, which choose nothing.

*Level*: that at which MaxGaussian takes half of the clean score, by bisection with three draws on 48 pictures that
choose (one level for each network: to compare methods where there is something to regain).

*Reported at that level*, for each of five (`full`: ten) draws, each draw the same noise for all methods: the score
with noise; after `rescue`; after batch norm's statistics alone were estimated anew on the same 48 pictures (the
control); with the weights that `protect` chose at 1 % and at 5 % kept exact; and with 5 % kept exact and `rescue`.
`regained` is (score - noisy) / (clean - noisy), of the means over draws.

*Prediction*: Spearman's rank correlation, over weight tensors, of `predicted_costs` with `measured_costs` (three draws,
the 48 pictures that choose), at that level and at an eighth of it.

*What can be said*: a line a network; the aim was 80 % regained by `rescue` and a correlation of 0.8. The claim "regains
at least half" is tested over networks by a sign test. Draws speak about these files only.
"""
import copy
import json
from pathlib import Path

import networks_of_others as others
import numpy as np
import pandas as pd
import torch
from noise_aware import keep, out
from scipy.stats import binomtest, spearmanr
from torch import nn

from noisyseg.data.cifar import ClassFolders
from noisyseg.data.files import data_root
from noisyseg.measure.evaluation import draw_seed, scores
from noisyseg.mend.protection import measured_costs, predicted_costs, protect
from noisyseg.mend.recalibration import rescue
from noisyseg.perturb.clone import perturbed
from noisyseg.perturb.laws import MaxGaussian

SIZES = {'small': dict(every=15, draws=5), 'full': dict(every=1, draws=10)}
N = 48  # pictures that choose

def choosing(a, s):
    "Pictures of the training set, every so many, and their truth."
    if not s.groups:
        train = ClassFolders(data_root()/'cifar10'/'cifar10.zip', 'train', few=10_000)
        x = torch.from_numpy(train[range(0, len(train), len(train) // N)][:N]).permute(0, 3, 1, 2) / 255
        return others.normalize(x, *s.stats), torch.as_tensor(train.labels[::len(train) // N][:N])
    root = data_root()/'voc_animals'
    names = (root/'train_aug.txt').read_text().split()
    names = [Path(n).stem for n in names[::len(names) // N][:N]]
    x, y = others.scenes([(root/'images'/f'{n}.jpg', root/'masks'/f'{n}.png') for n in names], s.size, s.stats)
    label = torch.zeros(256, dtype=torch.long)
    label[255] = 255
    for i, c in enumerate(others.SEVEN): label[others.voc_classes.index(c)] = i
    return x, label[y]

def score(model, s, batches):
    rows = scores(model, batches, s.names, 255 if s.groups else None)
    return next(v for metric, _, v, _ in rows if metric in ('mIoU', 'accuracy'))

def half_level(model, s, batches, draws=3):
    "The level at which half of the score is lost, on pictures that choose."
    clean = score(model, s, batches)
    def lost(level):
        found = []
        for k in range(draws):
            with perturbed(model, MaxGaussian(level), generator=draw_seed(99, k)):
                found.append(score(model, s, batches))
        return np.mean(found) < clean / 2
    low, high = 0.001, 0.002
    while not lost(high) and high < 0.5: low, high = high, 2 * high
    for _ in range(3):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if lost(middle) else (middle, high)
    return float(f'{high:.2g}')

def estimated_anew(model, x, bs):
    "The control: batch norm's statistics on these pictures, under the weights as they are now."
    twin = copy.deepcopy(model).train()
    for m in twin.modules():
        if isinstance(m, nn.modules.batchnorm._NormBase):
            m.reset_running_stats()
            m.momentum = None
        elif isinstance(m, nn.modules.dropout._DropoutNd): m.eval()
    with torch.no_grad():
        for b in x.split(bs): twin(b)
    return twin.eval()

def measured(a, name, model, s):
    "All that is reported of one network."
    x, y = choosing(a, s)
    choose = list(zip(x.split(s.bs), y.split(s.bs)))
    test = list(zip(*(t.split(s.bs) for t in s.read(a, s.size, s.stats))))
    law = MaxGaussian(half_level(model, s, choose))
    args = dict(ignore_index=255 if s.groups else None, class_names=s.names)
    found = {}
    for share in (0.01, 0.05):
        found[share] = protect(model, choose, law, budget=share, compare=False, draws=3, progress=False, **args)
    weak = law.at(law.level / 8)
    rho = {}
    for label, d in (('rho', law), ('rho_weak', weak)):
        costs = found[0.01].costs if d is law else measured_costs(model, choose, d, draws=3, progress=False, **args)
        guess = predicted_costs(model, choose, d)
        rho[label] = float(spearmanr(costs, [guess[n].sum().item() for n in costs.index]).statistic)
    yield dict(method='clean', draw=0, score=score(model, s, test))
    ways = {'noisy': law.where, 'protected 1 %': found[0.01].where, 'protected 5 %': found[0.05].where}
    with_rescue = {'noisy': 'rescued', 'protected 5 %': 'protected 5 %, rescued'}
    for k in range(a.draws):
        for way, where in ways.items():
            with perturbed(model, law, where, generator=draw_seed(0, k)):
                yield dict(method=way, draw=k, score=score(model, s, test))
                if way == 'noisy':
                    yield dict(method='norms anew', draw=k, score=score(estimated_anew(model, x, s.bs), s, test))
                if way in with_rescue:
                    with rescue(model, x): yield dict(method=with_rescue[way], draw=k, score=score(model, s, test))
    yield dict(method='facts', draw=0, score=law.level, **rho)

def measure(a):
    for kind, s in others.SETS.items():
        if not kind.startswith(('voc', 'cifar')): continue
        for name, model in others.networks(a, s).items():
            file = a.models/f'{a.size}-{name}.json'
            if file.exists(): continue
            file.parent.mkdir(parents=True, exist_ok=True)
            rows = [dict(network=name, **r) for r in measured(a, name, model.eval(), s)]
            file.write_text(json.dumps(rows, indent=1))
            print(name, 'done', flush=True)

def table(a):
    df = pd.DataFrame([r for f in sorted(a.models.glob(f'{a.size}-*.json')) for r in json.loads(f.read_text())])
    keep(out(a, 'mending.csv'), df, a)
    wide = df[df['method'] != 'facts'].pivot_table(index='network', columns='method', values='score')
    gain = wide.sub(wide['noisy'], axis=0).div(wide['clean'] - wide['noisy'], axis=0).drop(columns=['clean', 'noisy'])
    facts = df[df['method'] == 'facts'].set_index('network')[['score', 'rho', 'rho_weak']]
    facts = facts.rename(columns=dict(score='level'))
    print(wide.join(facts).round(3).to_string(), gain.round(2).add_prefix('regained: ').to_string(), sep='\n\n')
    n = int((gain['rescued'] >= 0.5).sum())
    print(f'rescue regains at least half on {n} of {len(gain)} networks, sign test p = '
          f'{binomtest(n, len(gain), alternative="greater").pvalue:.3g}')

if __name__ == '__main__': others.run({'measure': measure, 'table': table}, __doc__, SIZES, 'noisyseg-mending')
