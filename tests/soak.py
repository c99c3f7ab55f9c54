"""Train, sweep and explore in turns, for a long time: does memory stay flat, and is anything left open?

    python tests/soak.py --minutes 30

After each turn it prints the resident memory, open file handles, child processes, threads and widgets. It fails if,
leaving out the first third of the turns (caches fill), memory grows: the Theil-Sen slope (the median over all pairs of
turns) is above --mb a turn, and the last third's median is more than 3 % above the middle third's. And it fails if
handles, children, threads, widgets or temporary files are left that were not there after the first turns.
"""
import argparse
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from itertools import combinations
from pathlib import Path

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument('--minutes', type=float, default=30, help='how long')
p.add_argument('--mb', type=float, default=0.5,
               help='slope of the resident memory, in MB a turn, that counts as growth')
p.add_argument('--seed', type=int, default=0)
opts = p.parse_args()

import ipywidgets  # noqa: E402  the arguments are read before anything slow
from fastai.callback.core import Callback  # noqa: E402
from fastai.data.all import set_seed  # noqa: E402

from noisyseg.data.datasets import scenes  # noqa: E402
from noisyseg.show.explorer import NoiseExplorer  # noqa: E402
from noisyseg.perturb.laws import MaxGaussian  # noqa: E402
from noisyseg.show.monitor import TrainingMonitor  # noqa: E402
from noisyseg.perturb.clone import holding  # noqa: E402
from noisyseg.train.resume import Resumable  # noqa: E402
from noisyseg.train.methods.sam_callback import SAMCallback  # noqa: E402
from noisyseg.measure.sweeps import sweep  # noqa: E402
from noisyseg.train.checkpoints import load_model, save_model  # noqa: E402
from noisyseg.train.learner import segmentation_learner  # noqa: E402
from noisyseg.nets.unet3plus import unet3plus_tiny  # noqa: E402

warnings.simplefilter('ignore')


def train(folder, turn):
    "A fit that is cut short, saved and resumed, and a checkpoint of it."
    dls = scenes(n_train=32, n_valid=16, size=48, bs=8, seed=turn, num_workers=2 * (turn % 4 == 3))
    path = folder/f'run {turn}'
    for cut in (True, False):
        set_seed(opts.seed + turn)
        method = SAMCallback() if turn % 2 else TrainingMonitor(show=False)
        learn = segmentation_learner(dls, unet3plus_tiny, MaxGaussian(0.05),
                                     arch_args=dict(width=4, filters=(4, 6, 8)), cbs=[method])
        with learn.no_bar(), learn.no_logging():
            try: learn.fit_one_cycle(2, 1e-2, cbs=[Resumable(path, every=3, verbose=False), *([Cut()] if cut else [])])
            except ZeroDivisionError: pass
    saved = save_model(learn, folder/'model')
    path.with_suffix('.safetensors').unlink()
    return load_model(saved), dls


def sweep_twice(folder, turn, model, dls):
    "A sweep into a store, and the same call again, which finds all its rows there."
    store = folder/f'sweep {turn}.csv'
    first, again = (sweep(model, dls.valid, MaxGaussian(), levels=(0, 0.05, 0.1), draws=3, seed=turn, store=store,
                          progress=False) for _ in range(2))
    assert len(first) == len(again)
    for f in folder.glob(f'sweep {turn}*'): f.unlink()


def explore(model, dls):
    "What a browser would ask for: sliders, another law, one channel, another image."
    explorer = NoiseExplorer({'net': model}, dls, samples=4)
    for change in ({'level': 0.02}, {'level': 0.1}, {'sample': 2}, {'law': 'AbsoluteGaussian', 'params': {}},
                   {'seed': 3}, {'corruption': 'fog'}):
        for k, v in change.items(): setattr(explorer, k, v)
        explorer._answer(None, {'id': 0, 'kind': 'frame', 'state': {}}, [])
        assert len(explorer.frame()['preds']['net']) == 2 and len(explorer.picture()) == 2
    explorer.close()


class Cut(Callback):
    watches = True
    def after_backward(self):
        if self.learn.train_iter == 5: raise ZeroDivisionError('cut')


def children():
    "Processes that this one has started, and theirs."
    found = subprocess.run(['ps', '-e', '-o', 'pid=,ppid=,comm='], capture_output=True, text=True).stdout.split('\n')
    rows = [r.split(None, 2) for r in found if r.strip()]
    mine = {os.getpid()}
    for _ in rows: mine |= {int(r[0]) for r in rows if int(r[1]) in mine}
    return sorted(r[2] for r in rows if int(r[0]) in mine - {os.getpid()} and r[2] != 'ps')


def resident():
    with open('/proc/self/statm') as f: return int(f.read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 1e6


def look(folder):
    "What is there now, after a collection."
    gc.collect()
    with open('/proc/self/status') as f: threads = int(next(v for v in f if v.startswith('Threads:')).split()[1])
    widgets = len(getattr(ipywidgets.Widget, '_active_widgets', None) or ipywidgets.widgets.widget._instances)
    return {'MB': resident(), 'handles': len(os.listdir('/proc/self/fd')), 'children': len(children()),
            'threads': threads, 'widgets': widgets,
            'clones': len(holding()), 'files': len(list(folder.iterdir())),
            'temporary': len(os.listdir(tempfile.gettempdir()))}


def main():
    seen, start = [], time.time()
    with tempfile.TemporaryDirectory() as d:
        folder, private = Path(d), Path(d)/'tmp'
        private.mkdir()
        tempfile.tempdir = str(private)   # so that what others leave in the common folder does not count
        while time.time() - start < 60 * opts.minutes or len(seen) < 6:
            turn, begun = len(seen), time.time()
            model, dls = train(folder, turn)
            sweep_twice(folder, turn, model, dls)
            explore(model, dls)
            del model, dls
            seen.append(look(folder))
            print(f'turn {turn:3}: ' + ', '.join(f'{v:.1f} {k}' if k == 'MB' else f'{v} {k}' for k,
                                                 v in seen[-1].items())
                  + f' ({time.time() - begun:.1f} s)', flush=True)
        tempfile.tempdir = None
    return judge(seen)


def judge(seen):
    "The trend of the memory, and what is left."
    mb, third = [s['MB'] for s in seen], len(seen) // 3
    late = mb[third:]
    slope = statistics.median((late[j] - late[i]) / (j - i) for i, j in combinations(range(len(late)), 2))
    middle, last = statistics.median(mb[third:2 * third]), statistics.median(mb[2 * third:])
    grows = slope > opts.mb and last > 1.03 * middle
    print(f'{len(seen)} turns; memory: median {middle:.1f} MB in the middle third, {last:.1f} MB in the last; slope '
          f'{slope:+.3f} MB a turn '
          f'(above {opts.mb} and 3 % counts as growth): {"GROWS" if grows else "flat"}')
    left = {k: (seen[1][k], seen[-1][k]) for k in seen[0] if k != 'MB' and seen[-1][k] > seen[1][k]}
    if seen[-1]['children'] or seen[-1]['clones']:
        left['children or clones'] = (0, seen[-1]['children'] + seen[-1]['clones'])
    print('nothing is left open' if not left else f'LEFT, after the second turn and at the end: {left}')
    return 1 if grows or left else 0


if __name__ == '__main__': sys.exit(main())
