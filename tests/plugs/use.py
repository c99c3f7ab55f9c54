"""Runs everything with the plugs beside it: `python use.py FOLDER PLUG`.

An assertion that fails shows what did not know the newcomer."""
import sys
import warnings
from pathlib import Path

import torch
from fastai.callback.core import Callback
from torch import nn

from noisyseg import (Corruption, MaxGaussian, NoiseExplorer, Quantize, Resumable, TrainingMonitor, WeightNoise,
                      compose, perturbed, plot_card, plot_sweep, robustness_card, segmentation_learner, sweep,
                      unet3plus_tiny)
from noisyseg.data.semi_supervised import semi

warnings.simplefilter('ignore')
torch.manual_seed(0)
small = dict(width=4, filters=(4, 6, 8))


def data(folder):
    import membranes
    if not (folder/'cells').exists(): membranes.write_some(folder/'cells')
    return membranes.membranes(folder/'cells', seed=0)


def network(dls): return segmentation_learner(dls, unet3plus_tiny, arch_args=small).model.eval()


def measured(folder, disturbance, dls):
    "Sweep, figure, card, and a store that is found again"
    model, where = network(dls), folder/f'{disturbance.label}.csv'
    args = dict(draws=2, store=where, progress=False)
    rows = sweep({'a': model}, dls.valid, disturbance, **args)
    levels = sorted(set(rows.level))
    assert set(rows.disturbance) == {disturbance.label} and levels == sorted({0, *disturbance.levels}), levels
    text = where.read_text()
    assert sweep({'a': model}, dls.valid, disturbance, **args).value.equals(rows.value) and where.read_text() == text
    axis = plot_sweep(rows).layout.xaxis.title.text
    assert disturbance.axis_title().split(',')[0] in axis or disturbance.unit in axis, axis
    card = robustness_card({'a': model}, dls.valid, {disturbance.label: disturbance, 'noise': MaxGaussian()}, draws=2,
                           progress=False)
    titles = [a.text.replace('<br>', ' ') for a in plot_card(card).layout.annotations]
    assert disturbance.label in set(card.disturbance) and disturbance.label in titles
    return model


class Stop(Callback):
    "What a power cut does, after so many steps"
    watches = True
    def __init__(self, at): self.at = at
    def after_batch(self):
        if self.learn.train_iter == self.at: raise ZeroDivisionError('cut')


def fitted(dls, *cbs, run=None, stop=None):
    "Two epochs; with `run`, kept there after each step, and resumed from there"
    torch.manual_seed(1)
    learn = segmentation_learner(dls, unet3plus_tiny, arch_args=small, cbs=list(cbs))
    more = [Resumable(run, every=1, verbose=False)] if run else []
    if stop: more.append(Stop(stop))
    with learn.no_bar(), learn.no_logging():
        try: learn.fit(2, 1e-2, cbs=more)
        except ZeroDivisionError: pass
    return learn


def law(folder):
    from stuck_at import StuckAt
    dls = data(folder)
    model = measured(folder, StuckAt(), dls)
    clean = {k: v.clone() for k, v in model.state_dict().items()}
    with perturbed(model, StuckAt(0.5), generator=0) as clone: assert clone is not None
    assert all(torch.equal(v, clean[k]) for k, v in model.state_dict().items())
    both = sweep(model, dls.valid, compose(Quantize(4), StuckAt()), draws=1, progress=False)
    assert len(both)
    explorer = NoiseExplorer({'a': model}, dls, StuckAt(0.2))
    assert 'StuckAt' in [o['id'] for o in explorer.info['disturbances']] and len(explorer.frame()['preds']['a'])
    explorer.close()
    fitted(dls, WeightNoise(StuckAt(0.1), seed=0))


def method(folder):
    from mean_teacher import MeanTeacher

    from noisyseg.show.pseudo_label_panel import PseudoLabelPanel
    few = lambda: semi(data(folder), 4, bs=2)         # anew: loaders count their epochs
    both = lambda: (MeanTeacher(), WeightNoise(MaxGaussian(0.05), seed=3))
    whole = fitted(few(), *both())
    n = len(whole.dls.train)
    assert whole.mean_teacher.n_steps == 2 * n
    cut = fitted(few(), *both(), run=folder/'run', stop=n + 1)
    again = fitted(few(), *both(), run=folder/'run')
    assert cut.mean_teacher.n_steps < again.mean_teacher.n_steps == whole.mean_teacher.n_steps
    for a, b in (whole.model, again.model), (whole.mean_teacher.teacher, again.mean_teacher.teacher):
        for k, v in a.state_dict().items(): assert torch.equal(v, b.state_dict()[k]), k
    monitor = TrainingMonitor(show=False, panels=[PseudoLabelPanel(2)])
    learn = fitted(few(), MeanTeacher(), monitor)
    numbers, html = PseudoLabelPanel(2).look(learn)
    assert 0 <= numbers['pseudo-labels, confident'] <= 1 and 'unlabelled image' in html


def dataset(folder):
    dls = data(folder)
    learn = fitted(dls)
    measured(folder, MaxGaussian(), dls)
    explorer = NoiseExplorer({'a': learn.model}, dls)
    assert explorer.info['classes'] == ['cell', 'membrane'] and explorer.info['truth']
    explorer.close()
    few = semi(dls, 4, bs=2)
    assert list(few.vocab) == list(dls.vocab) and len(few.train.one_batch()) == 6


def corruption(folder):
    import occlusion  # noqa: F401
    dls = data(folder)
    model = measured(folder, Corruption('square'), dls)
    explorer = NoiseExplorer({'a': model}, dls)
    explorer.corruption = 'square'
    assert len(explorer.frame()['preds']['a'])
    explorer.close()


def task(folder):
    from keypoints import Keypoints
    net = nn.Conv2d(3, 2, 1, bias=False)
    nn.init.zeros_(net.weight)
    net.weight.data[0, 0] = net.weight.data[1, 1] = 1.
    images, points = torch.zeros(6, 3, 16, 16), torch.randint(16, (6, 2, 2))
    for image, (a, b) in zip(images, points.tolist()):
        image[0, a[0], a[1]] = image[1, b[0], b[1]] = 1.
    batches = [(images[:3], points[:3]), (images[3:], points[3:])]
    rows = sweep({'a': net}, batches, MaxGaussian(), levels=[0, .5], draws=2, task=Keypoints(), progress=False,
                 class_names=['left', 'right'])
    clean = rows[rows.level == 0]
    assert clean[clean.metric == 'PCK'].value.eq(1).all() and set(clean['class'].dropna()) >= {'left', 'right'}
    assert plot_sweep(rows, metric='PCK').data
    disturbances = {'noise': MaxGaussian(), 'few bits': Quantize()}
    card = robustness_card({'a': net}, batches, disturbances, draws=2, task=Keypoints(), progress=False)
    assert 'PCK' in set(card.metric) and plot_card(card).data


if __name__ == '__main__':
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[2:]:
        globals()[name](folder)
        print(f'done: {name}', flush=True)
