"Sweeps in several processes of this machine: the numbers of this process bit for bit, and no accident that hangs."
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import root
from pandas.testing import assert_frame_equal
from ray_networks import Net, Objection, Threads, batches, lines

from noisyseg.measure import processes, sweeps
from noisyseg.measure.processes import CannotTravel, Local, Processes
from noisyseg.measure.store import load_sweep
from noisyseg.perturb.disturbance import compose
from noisyseg.perturb.laws import MaxGaussian
from noisyseg.perturb.quantization import Quantize

law, levels = MaxGaussian(per='channel'), [0, 0.05, 0.1, 0.2]
kinds = [pytest.param(Processes(2), id='fork', marks=pytest.mark.skipif(sys.platform != 'linux', reason='forks')),
         pytest.param(Processes(2, start='spawn'), id='spawn')]
each_kind = pytest.mark.parametrize('on', kinds)
forked = pytest.mark.parametrize('on', kinds[:1])   # where it makes no difference: a new Python takes seconds to begin


def pictures():
    "Sixteen in a batch: on fewer, PyTorch computes a 1x1 convolution in another way by one thread than by several"
    return [tuple(torch.cat(parts) for parts in zip(*batches(4)))]


def sweep(net=None, on='here', draws=4, law=law, **kw):
    return sweeps.sweep(Net() if net is None else net, pictures(), law, levels=kw.pop('levels', levels),
                        draws=draws, progress=False, on=on, **kw)


def same(a, b):
    assert_frame_equal(a, b, check_exact=True)
    assert a['value'].to_numpy().tobytes() == b['value'].to_numpy().tobytes()


def children():
    """Processes that this one started since the test began, and that stay. Others are the suite's, and so is whatever
    they start: the warm server is a child of one test process, and runs the notebooks of all"""
    started = [q for p in psutil.Process().children() if p not in earlier for q in (p, *descendants(p))]
    return [p for p in psutil.wait_procs(started, timeout=5)[1]   # on a busy machine, a killed one takes its time
            if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def descendants(process):
    with suppress(psutil.NoSuchProcess): return process.children(recursive=True)
    return []


earlier = []


@pytest.fixture(autouse=True)
def earlier_children():
    earlier[:] = psutil.Process().children()


@pytest.fixture(autouse=True)
def test_modules_are_found(monkeypatch): monkeypatch.syspath_prepend(str(root/'tests'))


@pytest.fixture
def two_threads():
    "Two threads of PyTorch's, whatever the tests run with"
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='module')
def whole():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = sweep()
    torch.set_num_threads(before)
    return rows


@pytest.fixture
def left_for(monkeypatch):
    "Which places jobs were handed to by `Local`"
    seen, results = [], Processes.results
    def noted(self, *args):
        seen.append(self)
        yield from results(self, *args)
    monkeypatch.setattr(Processes, 'results', noted)
    return seen


@each_kind
def test_the_same_numbers(on, whole):
    same(sweep(on=on), whole)
    models = {'a': Net(1), ('b', 1): Net(2)}
    both = dict(net=models, law=[law, compose(Quantize(4), law)], levels=[0.05], draws=2)
    if on.start is None: same(sweep(**both, on=on), sweep(**both))
    assert not children()


@forked
def test_a_store_is_gone_on_with(on, whole, tmp_path):
    sweep(store=tmp_path/'s.csv', draws=2)
    same(sweep(on=on, store=tmp_path/'s.csv'), whole)


def test_it_leaves_by_itself_where_that_pays(two_threads, left_for, whole, monkeypatch):
    "Work enough, and one thread as fast as two: several processes, with the same rows"
    monkeypatch.setattr(sweeps, 'Local', lambda: Local(least=0, gain=0))
    rows = sweep(Net(), on='local', draws=20)
    assert left_for == [Processes()] and not children()
    same(rows, sweep(on='here', draws=20))


class LastChannelFirst(Net):
    "The same, its output in another order of memory, as networks with channels last give it"
    def forward(self, x): return super().forward(x).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def test_outputs_may_lie_in_memory_as_they_like(two_threads, left_for, monkeypatch):
    monkeypatch.setattr(sweeps, 'Local', lambda: Local(least=0, gain=0))
    same(sweep(LastChannelFirst(), on='local', draws=20), sweep(LastChannelFirst(), on='here', draws=20))
    assert left_for == [Processes()]


def test_it_stays_where_threads_show_in_the_numbers(two_threads, left_for, monkeypatch):
    "A network whose output depends on the number of threads is measured here, by all of them"
    monkeypatch.setattr(sweeps, 'Local', lambda: Local(least=0, gain=0))
    rows = sweep(Threads(), on='local', draws=20)
    assert not left_for
    same(rows, sweep(Threads(), on='here', draws=20))


@pytest.mark.parametrize('why', ['one thread', 'little to do', 'no gain'])
def test_it_stays_where_nothing_is_gained(two_threads, left_for, monkeypatch, why):
    if why == 'one thread': torch.set_num_threads(1)
    how = {'one thread': Local(0, 0), 'little to do': Local(least=1e9, gain=0), 'no gain': Local(0, 100)}[why]
    monkeypatch.setattr(sweeps, 'Local', lambda: how)
    same(sweep(on='local', draws=20), sweep(on='here', draws=20))
    assert not left_for


def test_the_trial_leaves_no_trace(two_threads, monkeypatch):
    "Weights, modes and the number of threads are what they were, and the trial compares the network under noise"
    net = Net()
    before, tried = {k: v.clone() for k, v in net.state_dict().items()}, []
    ask = processes.one_thread_or_all
    monkeypatch.setattr(processes, 'one_thread_or_all', lambda *a: tried.append(ask(*a)) or tried[-1])
    monkeypatch.setattr(sweeps, 'Local', lambda: Local(0, 0))
    sweep(net, on='local', draws=20)
    assert len(tried) == 1 and tried[0] > 0 and torch.get_num_threads() == 2
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and net.training


# what happens to a network in a worker, and only there

def is_killed(net): os.kill(os.getpid(), signal.SIGKILL)


def objects(net): raise ZeroDivisionError('too loud')


def objects_strangely(net): raise Objection('too', 'loud')


@each_kind
def test_a_worker_that_dies_is_an_error(on, tmp_path):
    "It says at which cell, and what to do; what was measured is kept; nobody is left"
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match=r"signal 9 at model 'model'.*out of memory.*on='here'"):
        sweep(Net(accident=is_killed), on=on, store=tmp_path/'s.csv')
    assert time.monotonic() - begun < 300 and not children()   # a new Python takes its time on a busy machine
    same(sweep(on='here', store=tmp_path/'s.csv'), sweep())


@forked
def test_an_error_arrives_as_itself(on):
    with pytest.raises(ZeroDivisionError, match='too loud') as e: sweep(Net(accident=objects), on=on)
    assert "in model 'model', MaxGaussian" in '\n'.join(e.value.__notes__)
    with pytest.raises(RuntimeError, match='Objection: too loud'): sweep(Net(accident=objects_strangely), on=on)
    assert not children()


def warns(net): __import__('warnings').warn('a word of warning')


@forked
def test_warnings_arrive_once(on):
    with pytest.warns(UserWarning, match='a word of warning') as told: sweep(Net(accident=warns), on=on)
    assert sum('a word' in str(w.message) for w in told) == 1


@forked
def test_ctrl_c_keeps_what_was_measured(on, tmp_path):
    store, log = tmp_path/'s.csv', tmp_path/'log'
    def press():
        while len(lines(log, 'evaluated')) < 12: time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=press, daemon=True).start()
    with pytest.raises(KeyboardInterrupt, match='cells were measured. Their rows are in'):
        sweep(Net(log=log, pause=0.1), on=on, store=store)
    assert not children()
    kept = len(load_sweep(store).drop_duplicates(['level', 'draw']))
    assert kept >= 3
    same(sweep(on='here', store=store), sweep())


SCRIPT = '''
import sys
import torch
from torch import nn
from noisyseg import MaxGaussian, sweep
from noisyseg.measure.processes import Processes
print('begun', flush=True)

class Mine(nn.Sequential):
    def forward(self, x):
        {pause}
        return super().forward(x)

torch.set_num_threads(1)
torch.manual_seed(0)
net, dl = Mine(nn.Conv2d(3, 3, 3, padding=1)), [(torch.rand(2, 3, 8, 8), torch.randint(0, 3, (2, 8, 8)))]
how = dict(levels=[0, 0.1], draws=3, progress=False)
there = sweep(net, dl, MaxGaussian(), on=Processes(2, start={start!r}), **how)
assert there.equals(sweep(net, dl, MaxGaussian(), on='here', **how))
print('the same')
'''


def script(path, start, pause='pass'):
    path.write_text(f'import sys\nsys.path.insert(0, {str(root)!r})\n'
                    + SCRIPT.format(start=start, pause=pause))
    return [sys.executable, '-W', 'ignore', str(path)]


@pytest.mark.parametrize('start', ['fork', 'spawn'])
def test_a_script_needs_no_guard(tmp_path, start):
    "What a script defines goes along, and the script does not run a second time"
    done = subprocess.run(script(tmp_path/'s.py', start), capture_output=True, text=True, timeout=300)
    assert done.stdout.split('\n')[:2] == ['begun', 'the same'], done.stderr


@pytest.mark.parametrize('start', ['fork', 'spawn'])
def test_workers_end_with_their_process(tmp_path, start):
    "However that ends: here it is killed"
    p = subprocess.Popen(script(tmp_path/'s.py', start, '__import__("time").sleep(0.2)'), stdout=subprocess.DEVNULL,
                         stderr=subprocess.DEVNULL)
    workers, until = [], time.monotonic() + 400   # both import PyTorch first, on a busy machine one after the other
    while len(workers) < 2 and p.poll() is None and time.monotonic() < until:
        workers = psutil.Process(p.pid).children()
        time.sleep(0.05)
    assert len(workers) == 2
    p.kill()
    p.wait()
    gone, alive = psutil.wait_procs(workers, timeout=200)
    for o in alive: o.kill()
    assert not alive


def test_what_cannot_travel_is_measured_here(two_threads, monkeypatch):
    "Where new Pythons are started, a lock can't go along: a word of it, and the same rows"
    net = Net()
    net.lock = threading.Lock()
    with pytest.raises(CannotTravel, match="lock.*on='here'"): sweep(net, on=Processes(2, start='spawn'))
    monkeypatch.setattr(sweeps, 'Local', lambda: Local(0, 0))
    monkeypatch.setattr(Processes, 'kind', lambda self: processes.Spawned)
    with pytest.warns(UserWarning, match='measured in this process'): rows = sweep(net, on='local', draws=20)
    same(rows, sweep(on='here', draws=20))


def test_no_processes_of_a_process_that_may_have_none(two_threads, left_for, monkeypatch):
    "In a worker of somebody else's a sweep stays where it is"
    monkeypatch.setattr(sweeps, 'Local', lambda: Local(0, 0))
    monkeypatch.setattr(processes.multiprocessing, 'current_process', lambda: SimpleNamespace(daemon=True))
    sweep(on='local', draws=20)
    assert not left_for


@pytest.mark.parametrize('wrong, told', [(dict(workers=0), 'workers: expected'), (dict(threads=0), 'threads: expected'),
                                         (dict(start='clone'), "start: expected 'fork' or 'spawn'"),
                                         (dict(start='fork', threads=2), 'a forked process has one thread')])
def test_wrong_arguments(wrong, told):
    with pytest.raises(ValueError, match=told): Processes(**wrong)
