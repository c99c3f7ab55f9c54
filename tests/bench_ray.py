"""What a sweep costs on Ray beside the same sweep in this process, and how far it scales.

python tests/bench_ray.py          5,000 cells of 20 ms on 2 workers; up to 16 workers with sleeping cells; a simulation up to 2,000 workers
python tests/bench_ray.py --save   the same, and the numbers go to nbs/benchmarks/ray.json, for the page nbs/tutorials/big.ipynb

Cells have a set duration: a network sleeps, and sleeping costs no processor, so that more workers than cores can be measured as they would be on as many
machines. What the driver does is real: it hands out parcels, takes results, and writes them to a Parquet store. With --work the cells compute instead.
"""
import argparse
import datetime
import heapq
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import torch
from bench import commit, hardware
from bench_timing import row
from pandas.testing import assert_frame_equal
from torch import nn

from noisyseg.measure import jobs
from noisyseg.measure.jobs import OnRay, connected
from noisyseg.perturb.laws import MaxGaussian
from noisyseg.measure.sweeps import noise_sweep

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
    return dict(models=Paced(seconds, work), dl=dl, law=MaxGaussian(), levels=at, draws=-(-cells // levels),
                progress=False)


@contextmanager
def counted():
    "A list that grows by one for each parcel that is handed out."
    take, parcels = jobs._Queue.take, []
    def counting(*args):
        parcels.append(out := take(*args))
        return out
    jobs._Queue.take = counting
    try: yield parcels
    finally: jobs._Queue.take = take


def measured(cells, seconds, workers, work=False, parcel=1.):
    ("The frame and the times of one sweep on so many workers, in a Ray that is there. What each cell took is in the "
     "store.")
    with tempfile.TemporaryDirectory() as folder, counted() as parcels:
        store, begun, cpu = Path(folder)/'sweep.parquet', time.time(), time.process_time()
        df = noise_sweep(**grid(cells, seconds, work), on=OnRay(workers=workers, threads=1, parcel=parcel), store=store)
        total, cpu = time.time() - begun, time.process_time() - cpu
        rows = pd.read_parquet(store)
    ended = [datetime.datetime.fromisoformat(t).timestamp() - begun for t in rows['finished']]
    return df, {'workers': workers, 'cells': len(rows), 'cell_s': rows['seconds'].mean(), 'parcels': len(parcels),
                'seconds': total, 'driver_cpu_s': cpu,
                'ready_s': min(e - len(parcels[0][0][1]) * s for e, s in zip(ended, rows['seconds'])),
                'end_s': max(ended)}


def here(cells, seconds, work=False):
    "The same in this process."
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        df = noise_sweep(**grid(cells, seconds, work), store=Path(folder)/'sweep.parquet')
        return df, time.perf_counter() - begun


def simulate(cells, cell_s, workers, parcel_s, task_s, per_cell_s, start_s, spread=0.05, latency_s=0.001, seed=0):
    """Seconds for a sweep, from the first worker that is ready: a driver that serves one parcel after another, workers that work through theirs.

    The driver takes `task_s` for a parcel and `per_cell_s` for each result in it; `start_s` is what it takes to send a worker its models and data."""
    rng, left = random.Random(seed), cells
    # (when a worker asks, who, how many cells it brings)
    driver, done, queue = 0., 0., [(0., w, 0) for w in range(workers)]
    while queue:
        asks, w, brings = heapq.heappop(queue)
        driver = max(driver, asks) + (task_s + per_cell_s * brings if brings else start_s)
        done = max(done, driver)
        if left:
            n = min(left, max(1, int(min(parcel_s / cell_s, left / (2 * workers)))))
            left -= n
            works = sum(max(0.2, rng.gauss(1, spread)) for _ in range(n)) * cell_s
            heapq.heappush(queue, (driver + latency_s + works, w, n))
    return done


def cost(small, large):
    "What the driver takes for a parcel and for a cell in it: processor time in runs of small and of large parcels."
    (n1, p1, c1), (n2, p2, c2) = [(p['cells'], p['parcels'], p['driver_cpu_s']) for p in (small, large)]
    task_s = max(1e-5, (c1 / n1 - c2 / n2) / (p1 / n1 - p2 / n2))
    return task_s, max(1e-6, c2 / n2 - task_s * p2 / n2)


def whole(a):
    "The sweep of `a.cells` cells in this process and on 2 workers."
    local, seconds = here(a.cells, a.cell, a.work)
    there, two = measured(a.cells, a.cell, 2, a.work)
    assert_frame_equal(local, there, check_exact=True)
    overhead = {k: 2 * t / two['cells'] - two['cell_s'] for k, t in (('all', two['end_s']),
            ('under way', two['end_s'] - two['ready_s']))}
    print(f"{two['cells']:,} cells of {1e3 * a.cell:g} ms: {seconds:.1f} s in this process, {two['seconds']:.1f} s on "
          f"2 workers; identical frames, bit for bit")
    for k, o in overhead.items(): print(f"overhead of a cell, {k}: {1e3 * o:.2f} ms, {o / 0.2:.2%} of a cell of 200 ms")
    return {**two, 'local_s': seconds, 'overhead_s': overhead, 'identical': True}


def scaling(a, task_s, per_cell_s):
    "More workers, with sleeping cells, beside the simulation."
    for n in a.workers:
        _, p = measured(a.each * n, a.sleep, n)
        p['simulated_end_s'] = p['ready_s'] + simulate(p['cells'], p['cell_s'], n, 1., task_s, per_cell_s, 0.)
        print(f"{n:3} workers, {p['cells']:4} cells: {p['end_s'] - p['ready_s']:6.2f} s measured, "
              f"{p['simulated_end_s'] - p['ready_s']:6.2f} s simulated")
        yield p


def ray_sweep(plan):
    "For `make bench`: a cell on one Ray worker beside the same cell in this process."
    sizes = dict(cells=200, seconds=0.02)
    with connected(OnRay(workers=1, threads=1)):
        measured(20, 0.001, 1)
        ways = {'ours': lambda: measured(**sizes, workers=1), 'other': lambda: here(**sizes)}
        assert_frame_equal(ways['ours']()[0], ways['other']()[0], check_exact=True)
        times = {k: [t / sizes['cells'] for t in v] for k, v in plan.in_turns(ways, warm_up=0).items()}
    more = statistics.median(times['ours']) - statistics.median(times['other'])
    yield row('a cell on a Ray worker', '200 cells of 20 ms', times['ours'], 'in this process', times['other'],
              note=f'{more:.2f} ms more, with sending the models: {more / 200:.2%} of a cell of 200 ms; the same rows '
                   f'bit for bit')


def main(a):
    load = os.getloadavg()[0]
    out = {'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'), **commit(),
           'command': ' '.join(['python', *sys.argv]), **hardware('cpu'),
           'load': load, 'versions': {'python': platform.python_version(),
                                      **{n: version(n) for n in ('torch', 'ray', 'pyarrow', 'noisyseg')}}}
    with connected(OnRay(workers=max(a.workers), threads=1)):
        measured(40, 0.001, max(a.workers))   # processes start and import
        out['sweep'] = whole(a)
        small, large = (measured(1000, 0.002, 2, parcel=p)[1] for p in (0, 0.2))
        task_s, per_cell_s = cost(small, large)
        print(f'the driver takes {1e3 * task_s:.2f} ms for a parcel and {1e3 * per_cell_s:.2f} ms for each cell in it')
        out |= {'driver': {'parcel_s': task_s, 'cell_s': per_cell_s, 'from': [small, large]},
                'measured': list(scaling(a, task_s, per_cell_s)), 'simulated': []}
    for cell_s in (0.02, 0.2, 2.):
        for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000):
            t = simulate(a.grid, cell_s, n, 1., task_s, per_cell_s, a.send)
            speed_up = a.grid * cell_s / t
            out['simulated'].append({'cell_s': cell_s, 'workers': n, 'cells': a.grid, 'seconds': t,
                                     'speed_up': speed_up, 'at_work': speed_up / n})
        line = [f"{s['workers']}: {s['at_work']:.0%}" for s in out['simulated'] if s['cell_s'] == cell_s]
        print(f'{a.grid:,} cells of {cell_s:g} s; workers and the share of their time at work: {", ".join(line)}')
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
    p.add_argument('--grid', type=int, default=50_000, help='cells of the sweep that is simulated')
    p.add_argument('--send', type=float, default=0.02,
                   help='seconds in which the driver hands models and data to one worker, in the simulation')
    p.add_argument('--save', action='store_true', help='write nbs/benchmarks/ray.json')
    main(p.parse_args())
