"Sweeps on Ray: the numbers of a local run, bit for bit, whatever happens to workers, drivers and stores on the way."
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import torch
from pandas.testing import assert_frame_equal
from torch import nn
from ray_networks import (Net, Threads, batches, dies_once, dies_when_loud, lines, objects_strangely, objects_when_loud,
                          train)
from torch.utils.data import DataLoader, TensorDataset

from noisyseg.data.corruptions import Corruption
from noisyseg.measure.card import robustness_card, standard_disturbances
from noisyseg.measure.jobs import OnRay, connected
from noisyseg.perturb.laws import MaxGaussian
from noisyseg.perturb.disturbance import compose
from noisyseg.perturb.quantization import Quantize
from noisyseg.measure import sweeps
from noisyseg.measure.evaluation import draw_seed
from noisyseg.measure.sensitivity import layer_sensitivity
from noisyseg.measure.store import Store, load_sweep
from noisyseg.train.grid import train_grid
from noisyseg.train.checkpoints import load_model
from noisyseg.nets.unet3plus import unet3plus_tiny

if not find_spec('ray'): pytest.skip('pip install noisyseg[ray]', allow_module_level=True)
law, levels, two = MaxGaussian(per='channel'), [0, 0.05, 0.1, 0.2], OnRay(workers=2, threads=1)


def sweep(net=None, on=two, draws=4, **kw):
    return sweeps.sweep(net or Net(), kw.pop('dl', batches()), kw.pop('law', law), levels=levels, draws=draws,
                        progress=False, on=on, **kw)


def same(a, b):
    assert_frame_equal(a, b, check_exact=True)
    assert a['value'].to_numpy().tobytes() == b['value'].to_numpy().tobytes()


@pytest.fixture(scope='module')
def cluster():
    ("One Ray for the module, as `on='ray'` would start it; it is named by the path where its driver's test module is "
     "found")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PYTHONPATH', os.path.dirname(__file__), prepend=os.pathsep)   # workers find this module
        with connected(OnRay(workers=3, threads=1), keep=True):
            yield sys.modules['ray'].get_runtime_context().gcs_address
    torch.set_num_threads(threads)


@pytest.fixture(scope='module')
def whole(): return sweep(on='local')


def start(store, log, on, tmp_path):
    "A driver in a process of its own, that has measured a few cells and is kept from measuring them all"
    code = (f'import torch; torch.set_num_threads(1)\nfrom test_ray import *\nsweep(Net(log={str(log)!r}, last=20), '
            f'on={on!r}, store={str(store)!r})')
    env = {'PYTHONPATH': os.pathsep.join([os.path.dirname(__file__), *sys.path]), 'RAY_ADDRESS': ''}
    # a Ray that listens to this machine only is met at 127.0.0.1
    if on.address: env['RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER'] = '0'
    with open(tmp_path/'out', 'w') as out:
        p = subprocess.Popen([sys.executable, '-c', code], env={**os.environ, **env}, stdout=out,
                             stderr=subprocess.STDOUT)
    # patience: on a busy machine that has never run it, a Ray took minutes to start
    begun = time.monotonic()
    while len(lines(log, 'evaluated')) < 14 and p.poll() is None and time.monotonic() < begun + 600: time.sleep(0.05)
    if len(lines(log, 'evaluated')) < 14 or p.poll() is not None:
        ended = p.poll()
        p.kill()
        pytest.fail(f'the driver noted {len(lines(log, "evaluated"))} evaluations within '
                    f'{time.monotonic() - begun:.0f} s, exit status {ended}:\n{(tmp_path/"out").read_text()}')
    return p


def kill_driver(folder, on):
    "Starts a driver and kills it in the middle of its sweep: its workers, and all processes of its own"
    log = folder/'log'
    p = start(folder/'s.parquet', log, on, folder)
    workers = {int(line.split()[1]) for line in lines(log, 'evaluated')} - {p.pid}
    found = [psutil.Process(i) for i in workers], psutil.Process(p.pid).children(recursive=True)
    p.kill()
    p.wait()
    return found


def goes_on(folder, whole):
    "The store of a driver that was killed is whole, and the next sweep measures only what is missing"
    store, again = folder/'s.parquet', folder/'again'
    kept = len(load_sweep(store).drop_duplicates(['level', 'draw']))
    assert 0 < kept < 13
    same(sweep(Net(log=again), store=store), whole)
    assert len(lines(again, 'evaluated')) == 1 + 2 * (13 - kept)
    assert sorted(f.name for f in folder.iterdir() if f.name[0] != '.') == ['again', 'log', 'out', 's.parquet',
            's.parquet.grid.json']
    same(load_sweep(store).sort_values(['level', 'draw'], kind='stable', ignore_index=True), whole)


@pytest.fixture(scope='module')
def killed(cluster, tmp_path_factory):
    """A driver with a Ray of its own that was killed: its folder, when that was, its workers, its other processes.
    The cluster comes first, for it may take its time: a Ray that starts finds Ray's files in memory"""
    folder = tmp_path_factory.mktemp('killed')
    workers, family = kill_driver(folder, two)
    return folder, time.monotonic(), workers, family


# --- the same numbers
# -------------------------------------------------------------------------------------------------------------

def test_listens_to_this_machine_only(killed, cluster):
    found = [c.laddr.ip for p in psutil.Process().children(recursive=True) for c in p.net_connections('inet')
             if c.status == psutil.CONN_LISTEN]
    assert found and set(found) <= {'127.0.0.1', '::ffff:127.0.0.1', '::1'}


def test_sweep(cluster, tmp_path):
    normed = Net(2)
    nn.utils.parametrizations.weight_norm(normed[0])
    nets = {'a': Net(0), ('b', 1): Net(1).to(memory_format=torch.channels_last), 'normed': normed,
            'UNet3+': unet3plus_tiny(3), 'half': Net(3).bfloat16()}
    x, y = (torch.cat(t) for t in zip(*batches(size=32)))
    held = sweep(nets, dl=[(x, y)], on='local')
    same(held, sweep(nets, dl=[(x, y)]))
    same(sweep(nets, dl=DataLoader(TensorDataset(x, y), 3), on='local'),
         sweep(nets, dl=DataLoader(TensorDataset(x, y), 3), cache_mb=0, store=tmp_path/'s.csv'))
    same(held[held['model'] == 'a'].reset_index(drop=True), sweep(nets['a'], dl=[(x, y)],
                                                                  on=OnRay(workers=1, threads=1)).assign(model='a'))


def test_all_the_others(cluster, tmp_path):
    args = dict(dl=batches(size=32), progress=False)
    cases = {'layers': lambda **kw: layer_sensitivity(Net(), disturbance=law.at(0.2), draws=3,
                                                      store=tmp_path/f'layers-{kw["on"] == two}.parquet', **args, **kw),
             'bits and noise': lambda **kw: sweeps.sweep(Net(), disturbances=[Quantize(), compose(Quantize(3), law)],
                                                         **args, **kw),
             'corruptions': lambda **kw: sweeps.sweep({'a': Net(0), 'b': Net(1)},
                                                      disturbances=[Corruption(c) for c in ('fog', 'gaussian_noise')],
                                                      levels=(0, 1, 3), **args, **kw),
             'card': lambda **kw: robustness_card({'a': Net(0), 'b': Net(1)},
                                                  disturbances=standard_disturbances((32, 32), ['fog']), draws=2,
                                                  levels={'weight noise': .1, 'absolute attack': (),
                                                          'corrupted inputs': 2},
                                                  store=tmp_path/f'card-{kw["on"] == two}.parquet', **args, **kw)}
    for f in cases.values(): same(f(on='local'), f(on=two))
    assert len(load_sweep(tmp_path/'card-True.parquet')) == len(load_sweep(tmp_path/'card-False.parquet')) > 0


def test_settings_travel(cluster):
    with torch.autocast('cpu', torch.bfloat16): same(sweep(on='local'), sweep())


def test_models_travel_once_to_each_worker(cluster, tmp_path, whole):
    log = tmp_path/'log'
    same(sweep(Net(log=log, pause=0.1), on=OnRay(workers=2, threads=1)), whole)
    assert len(lines(log, 'travelled')) == 2
    assert len({line.split()[1] for line in lines(log, 'evaluated')} - {str(os.getpid())}) == 2


def test_workers_wait_for_the_next_sweep(cluster, tmp_path, whole):
    "`connected(keep=True)`: the same workers, also after a sweep that ended with an error"
    def workers(name, **kw):
        same(sweep(Net(log=tmp_path/name, pause=0.1)), whole)
        return {line.split()[1] for line in lines(tmp_path/name, 'evaluated')} - {str(os.getpid())}
    first = workers('first')
    with pytest.raises(ZeroDivisionError): sweep(Net(accident=objects_when_loud))
    assert workers('second') == first and len(first) == 2


def test_warnings_travel(cluster):
    class Breaks(Net):
        def forward(self, x): return super().forward(x) * (float('nan') if self.noise() > 0 else 1)
    with pytest.warns(UserWarning, match='nan'): sweep(Breaks())


# --- accidents
# --------------------------------------------------------------------------------------------------------------------

def test_a_worker_that_is_killed_costs_its_task(cluster, tmp_path, whole):
    log = tmp_path/'log'
    same(sweep(Net(log=log, accident=dies_once), on=OnRay(workers=2, threads=1)), whole)
    assert (tmp_path/'log.died').exists()
    first_look, cells = 1, 1 + 4 * 3
    assert first_look + 2 * cells < len(lines(log, 'evaluated')) <= first_look + 2 * cells + 2   # two batches a cell
    assert len(lines(log, 'travelled')) <= 3


def loud(whole):
    "The cells at which `dies_when_loud` dies or `objects_when_loud` raises"
    from noisyseg.perturb.clone import perturbed
    net, found = Net(), set()
    for draw in range(4):
        for level in levels[1:]:
            with perturbed(net, law.at(level), generator=draw_seed(0, draw)):
                if net.noise() > 0.05: found.add((level, draw))
    return found


def test_an_error_arrives_as_itself(cluster, tmp_path, whole):
    store = tmp_path/'s.csv'
    with pytest.raises(ZeroDivisionError, match='too loud') as e: sweep(Net(accident=objects_when_loud), store=store)
    notes = '\n'.join(e.value.__notes__)
    assert ("in model 'model', MaxGaussian" in notes and 'level 0.2, draw' in notes and 'on worker ' in notes
            and 'objects_when_loud' in notes)
    kept = load_sweep(store)
    assert len(kept) and not set(zip(kept['level'], kept['draw'])) & loud(whole)
    with pytest.raises(RuntimeError, match='Objection: too loud'): sweep(Net(accident=objects_strangely), store=store)
    same(sweep(Net(), 'local', store=store), whole)   # on Ray: `goes_on`


def test_what_cannot_travel_is_told(cluster):
    net = Net()
    net.lock = threading.Lock()
    with pytest.raises(TypeError, match='lock') as e: sweep(net)
    assert "on='local' has no such need" in e.value.__notes__[0]


def test_ctrl_c_keeps_what_was_measured(cluster, tmp_path, whole):
    store, log = tmp_path/'s.parquet', tmp_path/'log'
    def press():
        while len(lines(log, 'evaluated')) < 20: time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=press, daemon=True).start()
    with pytest.raises(KeyboardInterrupt) as e:
        sweep(Net(log=log, pause=0.05), on=OnRay(workers=2, threads=1), store=store)
    assert 'of 13 cells were measured. Their rows are in' in str(e.value)
    n = len(load_sweep(store).drop_duplicates(['level', 'draw']))
    assert f'interrupted: {n} of 13' in str(e.value) and 0 < n < 13
    time.sleep(0.3)
    before = len(lines(log, 'evaluated'))
    time.sleep(0.3)
    assert len(lines(log, 'evaluated')) == before   # nobody goes on
    same(sweep(Net(), 'local', store=store), whole)   # on Ray: `goes_on`


def test_two_drivers_on_one_store(tmp_path, whole):
    for name in 's.csv', 's.parquet':
        sweep(on='local', store=tmp_path/name)
        grid = json.loads((tmp_path/f'{name}.grid.json').read_text())
        grid.pop('seal')   # of the file, and not of the grid
        with Store(tmp_path/name, grid), pytest.raises(RuntimeError,
                                                       match=f'is being written by process {os.getpid()}'):
            sweep(on='local', store=tmp_path/name)
        same(sweep(on='local', store=tmp_path/name), whole)


# --- training grids
# ---------------------------------------------------------------------------------------------------------------

def test_train_grid(cluster, tmp_path):
    methods = {'clean': 0., 'noisy': 0.5}
    frames = {on: train_grid(train, methods, 2, tmp_path/on, on if on == 'local' else two, progress=False)
              for on in ('local', 'ray')}
    same_but = dict(columns=['seconds', 'path'])
    assert_frame_equal(frames['local'].drop(**same_but), frames['ray'].drop(**same_but), check_exact=True)
    for a, b in zip(frames['local']['path'], frames['ray']['path']):
        a, b = (load_model(p, Net()).state_dict() for p in (a, b))
        assert all(torch.equal(a[k], b[k]) for k in a)
    Path(frames['ray']['path'][1]).write_bytes(b'')
    with pytest.raises(ValueError, match='no readable safetensors'):
        train_grid(train, methods, 2, tmp_path/'ray', two, progress=False)
    Path(frames['ray']['path'][1]).unlink()
    more = train_grid(train, methods, 3, tmp_path/'ray', two, progress=False)
    assert len(more) == 6 and more['loss'].tolist()[:2] == frames['local']['loss'].tolist()[:2]


# --- drivers that are killed
# -------------------------------------------------------------------------------------------------------------------

def test_a_driver_that_is_killed_with_its_own_ray(killed, cluster, whole):
    folder, _, workers, _ = killed
    assert workers
    goes_on(folder, whole)


def test_a_driver_that_is_killed_in_a_running_cluster(cluster, tmp_path, whole):
    "Its workers end, the cluster goes on"
    # the cluster has three CPUs, two of which belong to workers that wait
    workers, _ = kill_driver(tmp_path, OnRay(cluster, workers=1, threads=1))
    _, alive = psutil.wait_procs(workers, timeout=120)
    assert workers and not alive
    goes_on(tmp_path, whole)


# --- workers of another kind
# -------------------------------------------------------------------------------------------------------------------

def test_workers_have_the_threads_of_the_driver(cluster, monkeypatch):
    score = lambda df: df[(df['model'] == 'threads') & (df['class'] == '1')]['value'].tolist()
    kw = dict(draws=1, dl=[(torch.rand(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64)))])
    nets = {'threads': Threads(), 'UNet3+': unet3plus_tiny(3)}
    one = sweep(nets, on=OnRay(workers=2), **kw)
    try:
        torch.set_num_threads(2)
        same(one, sweep(nets, **kw))   # threads=1 in `two`
        here, there = sweep(nets, on='local', **kw), sweep(nets, on='ray', **kw)
        same(here, there)
        assert score(there) != score(one)
    finally: torch.set_num_threads(1)
    same(one, sweep(nets, on='local', **kw))


def test_a_cell_that_kills_its_workers_is_named(cluster, tmp_path, whole):
    store = tmp_path/'s.parquet'
    with pytest.raises(RuntimeError,
                       match=r"model 'model', MaxGaussian.*, level 0\.2, draw \d, conv_and_norm.*: its worker died 2 "
                             r"times"):
        sweep(Net(accident=dies_when_loud), on=OnRay(workers=1, threads=1, retries=1), store=store)
    kept = load_sweep(store)
    assert 0 < len(kept) < len(whole) and not set(zip(kept['level'], kept['draw'])) & loud(whole)
    same(sweep(Net(), 'local', store=store), whole)   # on Ray: `goes_on`


# --- and at last
# -------------------------------------------------------------------------------------------------------------------

def test_nothing_is_left_of_a_killed_driver(killed):
    "The last to end are Ray's agents, which have a minute of patience: that is why the driver was killed so early"
    _, at, workers, family = killed
    _, alive = psutil.wait_procs([*workers, *family], timeout=max(1, at + 120 - time.monotonic()))
    assert len(family) > 3 and not alive


# --- without Ray
# ------------------------------------------------------------------------------------------------------------------

def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'ray', None)
    with pytest.raises(ImportError, match=r'pip install noisyseg\[ray\]'): sweep()


def test_where_is_not_known():
    for on in ('rya', 3, None):
        with warnings.catch_warnings(), pytest.raises(ValueError, match="on: expected 'local', 'ray'"): sweep(on=on)
