"""What a sweep costs on Ray beside the same sweep in this process, and how far it scales.

python tests/bench_ray.py          5,000 cells of 20 ms on 2 workers; up to 16 workers with sleeping cells
python tests/bench_ray.py --save   the same, and the numbers go to nbs/benchmarks/ray.json, for the page
nbs/tutorials/big.ipynb

Cells have a set duration: a network sleeps, and sleeping costs no processor, so that more workers than cores can be
measured as they would be on as many
machines. What the driver does is real: it hands out tasks, takes results, and writes them to a Parquet store. With
--work the cells compute instead.
"""
import argparse
import datetime
import json
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
from bench import commit, hardware
from pandas.testing import assert_frame_equal
from torch import nn

from noisyseg.measure.jobs import OnRay, connected, tasks_of
from noisyseg.perturb.laws import MaxGaussian
from noisyseg.measure.sweeps import sweep

root = Path(__file__).resolve().parents[1]
RESULTS = root/'nbs'/'benchmarks'/'ray.json'


class Paced(nn.Sequential):
    "A small network whose evaluation takes so many seconds: asleep, or at work"
    def __init__(self, seconds, work=False):
        super().__init__(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1))
        self.seconds, self.work = seconds, work
    def forward(self, x):
        until = time.perf_counter() + self.seconds
        if self.work:
            while time.perf_counter() < until: super().forward(x)
        else: time.sleep(self.seconds)
        return super().forward(x)


def grid(cells, seconds, work=False, levels=10):
    "Arguments of a sweep of so many cells."
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)
    dl = [(torch.rand(2, 3, 16, 16, generator=g), torch.randint(0, 3, (2, 16, 16), generator=g))]
    at = [0.01 * (i + 1) for i in range(levels)]
    return dict(models=Paced(seconds, work), dl=dl, disturbances=MaxGaussian(), levels=at, draws=-(-cells // levels),
                progress=False)


def measured(cells, seconds, workers, work=False):
    "The frame and the times of one sweep on so many workers, in a Ray that is there."
    with tempfile.TemporaryDirectory() as folder:
        store, begun, cpu = Path(folder)/'sweep.parquet', time.perf_counter(), time.process_time()
        df = sweep(**grid(cells, seconds, work), on=OnRay(workers=workers, threads=1), store=store)
        total, cpu = time.perf_counter() - begun, time.process_time() - cpu
        took = pd.read_parquet(store).drop_duplicates(['level', 'draw'])['seconds']
    groups = [(k, list(range(10))) for k in range(len(took) // 10)]
    return df, {'workers': workers, 'cells': len(took), 'cell_s': took.mean(), 'tasks': len(tasks_of(groups, workers)),
                'seconds': total, 'driver_cpu_s': cpu, 'empty_s': empty(workers)}


def empty(workers):
    "What workers cost before they measure: a sweep of one cell each, which takes no time."
    begun = time.perf_counter()
    sweep(**grid(workers, 0., levels=1), on=OnRay(workers=workers, threads=1))
    return time.perf_counter() - begun


def here(cells, seconds, work=False):
    "The same in this process."
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        df = sweep(**grid(cells, seconds, work), store=Path(folder)/'sweep.parquet')
        return df, time.perf_counter() - begun


def whole(a):
    "The sweep of `a.cells` cells in this process and on 2 workers."
    local, seconds = here(a.cells, a.cell, a.work)
    there, two = measured(a.cells, a.cell, 2, a.work)
    assert_frame_equal(local, there, check_exact=True)
    overhead = {'all': 2 * two['seconds'] / two['cells'] - two['cell_s'],
                'under way': 2 * (two['seconds'] - two['empty_s']) / two['cells'] - two['cell_s']}
    print(f"{two['cells']:,} cells of {1e3 * a.cell:g} ms: {seconds:.1f} s in this process, {two['seconds']:.1f} s on "
          f"2 workers; identical frames, bit for bit")
    for k, o in overhead.items(): print(f"overhead of a cell, {k}: {1e3 * o:.2f} ms, {o / 0.2:.2%} of a cell of 200 ms")
    return {**two, 'local_s': seconds, 'overhead_s': overhead, 'identical': True}


def scaling(a):
    "More workers, with sleeping cells."
    for n in a.workers:
        _, p = measured(a.each * n, a.sleep, n)
        p['ideal_s'] = p['cells'] * p['cell_s'] / n
        print(f"{n:3} workers, {p['cells']:4} cells: {p['seconds'] - p['empty_s']:6.2f} s, at best {p['ideal_s']:6.2f} "
              f"s")
        yield p


def main(a):
    load = os.getloadavg()[0]
    out = {'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'), **commit(),
           'command': ' '.join(['python', *sys.argv]), **hardware('cpu'),
           'load': load, 'versions': {'python': platform.python_version(),
                                      **{n: version(n) for n in ('torch', 'ray', 'pyarrow', 'noisyseg')}}}
    with connected(OnRay(workers=max(a.workers), threads=1)):
        measured(40, 0.001, max(a.workers))   # processes start and import
        out['sweep'] = whole(a)
        out['measured'] = list(scaling(a))
    if load > 0.5: print(f'Something else was at work here when it began (load {load:.1f}): repeat on a quiet machine.')
    if a.save:
        RESULTS.write_text(json.dumps(out, indent=1, ensure_ascii=False) + '\n')
        print(f'written to {RESULTS.relative_to(root)}')


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--cells', type=int, default=5000, help='of the sweep that is compared with a local one')
    p.add_argument('--cell', type=float, default=0.02, help='seconds that one of its cells takes')
    p.add_argument('--work', action='store_true', help='cells compute all the time, on cores, instead of sleeping')
    p.add_argument('--workers', type=lambda s: [int(n) for n in s.split(',')], default=[1, 2, 4, 8, 16],
                   help='numbers of workers to measure')
    p.add_argument('--each', type=int, default=60, help='cells for each of these workers')
    p.add_argument('--sleep', type=float, default=0.2, help='seconds that one of these takes')
    p.add_argument('--save', action='store_true', help='write nbs/benchmarks/ray.json')
    main(p.parse_args())
