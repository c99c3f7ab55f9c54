"""Real accidents: processes killed while they train and while they write, a full disk, a folder that is read-only,
a signal from a queue.

NOISYSEG_KILLS=100 kills each method's training that often, and checkpoints five times as often (default 2);
NOISYSEG_SEED=1 at other moments.
"""
import json
import os
import subprocess
import sys
import textwrap

import pytest

KILLS = int(os.environ.get('NOISYSEG_KILLS', 2))
pytestmark = [pytest.mark.skipif(os.name != 'posix', reason='needs fork and signals'),
              pytest.mark.timeout(max(900, 300 * KILLS))]
METHODS = ('weight noise', 'a noise for each epoch', 'damp', 'damp, sync', 'sam', 'asam, accumulation',
           'accumulating noise', 'bfloat16, AdamW', 'monitor',
           'mlpmatch', 'worker processes', "PyTorch's loader")
POINTS = ('opened', 'half written', 'written', 'synced', 'replaced')
OTHERS = ('checkpoint', 'disk full', 'file too large', 'read-only', 'sigterm', 'other run', 'finished')

DRIVER = '''
import gc, json, os, random, resource, shutil, signal, sys, tempfile, time, traceback, warnings
from functools import partial
from pathlib import Path
import numpy as np, torch
from fastai.callback.all import *
from fastai.data.all import DataLoaders, set_seed
from fastai.learner import Learner
from fastai.optimizer import Adam, OptimWrapper
from fastcore.basics import noop
from torch import nn
from noisyseg import basics
from noisyseg.train.methods.damp import DAMP
from noisyseg.data.datasets import scenes
from noisyseg.perturb.laws import AbsoluteGaussian, MaxGaussian
from noisyseg.train.losses import DeepSupervisionLoss, HybridLoss
from noisyseg.train.methods.mlpmatch import semi_learner
from noisyseg.show.monitor import TrainingMonitor
from noisyseg.train.resume import Resumable
from noisyseg.train.methods.sam_callback import SAMCallback
from noisyseg.train.serialization import digest_state, load_state
from noisyseg.basics import write_atomic
from noisyseg.train.checkpoints import load_model, save_model
from noisyseg.train.noise import AccumulatingNoise, WeightNoise
from noisyseg.nets.unet3plus import unet3plus_tiny
from noisyseg.data.semi_supervised import semi_scenes
import noisyseg.train.resume as resume

torch.set_num_threads(1)
warnings.simplefilter('ignore')
methods, points, others, kills, folder = json.loads(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3]), int(
        sys.argv[4]), Path(sys.argv[5])
dice = random.Random(int(sys.argv[6]))

class CpuBF16(Callback):
    order = 10
    def before_batch(self): self.cast = torch.autocast('cpu', torch.bfloat16); self.cast.__enter__()
    def after_loss(self): self.cast.__exit__(None, None, None)

class Jitter(Callback):
    "Draws from all global generators."
    def before_batch(self):
        self.learn.xb = (self.xb[0] + 0.01 * (torch.rand(1) + np.random.rand() + random.random()), *self.xb[1:])

class At(Callback):
    "Do something before some batch."
    watches = True
    def __init__(self, batch, do): self.batch, self.do = batch, do
    def before_batch(self):
        if self.training and self.learn.train_iter == self.batch: self.do()

noise = lambda **kw: WeightNoise(MaxGaussian(0.1), **kw)
callbacks = {
    'weight noise': lambda: [noise(when='both'), Jitter()],
    'a noise for each epoch': lambda: [noise(when='both', draw='epoch'), GradientAccumulation(12)],
    'damp': lambda: [DAMP(0.1, 2)],
    'damp, sync': lambda: [DAMP(0.1, 2, batchnorm='sync')],
    'sam': lambda: [SAMCallback(0.05, every=2)],
    'asam, accumulation': lambda: [SAMCallback(adaptive=True), noise(), GradientAccumulation(8)],
    'accumulating noise': lambda: [AccumulatingNoise(AbsoluteGaussian(0.01))],
    'bfloat16, AdamW': lambda: [CpuBF16(), noise()],
    'monitor': lambda: [TrainingMonitor(MaxGaussian(0.1), show=False), noise()]}

def make(method):
    "What a script does before it trains."
    set_seed(0)
    if method == 'mlpmatch':
        return semi_learner(semi_scenes(4, 10, 4, size=32, seed=0, bs=2),
                            arch_args=dict(width=2, encoder_width=4, layers=(1, 1, 1, 1)), metrics=[], seed=0)
    if method == "PyTorch's loader":
        data = torch.utils.data.TensorDataset(torch.randn(20, 3, 8, 8), torch.arange(20) % 2)
        dl = torch.utils.data.DataLoader(data, 4, shuffle=True, generator=torch.Generator())
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(144, 2))
        return Learner(DataLoaders(dl, dl), net, nn.CrossEntropyLoss())
    dls = scenes(n_train=20, n_valid=4, size=32, bs=4, seed=0, num_workers=2 * (method == 'worker processes'))
    opt = partial(OptimWrapper, opt=torch.optim.AdamW) if 'AdamW' in method else Adam
    return Learner(dls, unet3plus_tiny(dls.n_classes, width=2, filters=(4, 6)),
                   DeepSupervisionLoss(HybridLoss(msssim=0)), opt_func=opt,
                   cbs=callbacks.get(method, lambda: [noise()])())

def train(method, path, *cbs, every=1, epochs=2, lr=1e-2, end=None):
    learn = make(method)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(epochs, lr, cbs=[Resumable(path, every, verbose=False), *cbs])
    r = learn.recorder
    numbers = {'model': dict(learn.model.state_dict()), 'losses': r.losses, 'rows': r.values, 'lrs': r.lrs,
               'hps': r.hps,
               'next': torch.rand(3), 'python': random.random(), 'numpy': np.random.rand()}
    write_atomic(end or path.with_suffix('.end'), digest_state(numbers))

def bits(state):
    "All that does not depend on the clock."
    kept = {name: {k: v for k, v in s.items() if k not in ('elapsed', 'seconds')} for name,
            s in state['callbacks'].items()}
    for s in kept.values():
        # the monitor's, without their seconds
        if isinstance(s.get('rows'), torch.Tensor): s['rows'] = s['rows'][:, [0, 1, 2, 4, 5]]
    return digest_state({k: v for k, v in state.items() if k != 'rows'} | {'callbacks': kept})

def live(f, *args, after=None, sig=signal.SIGKILL, when=None, **kw):
    "Do something in a process of its own; end it after some time. Returns None if it was killed, else its exit status."
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        try:
            os.setpgid(0, 0)
            f(*args, **kw)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    try: os.setpgid(pid, pid)
    except OSError: pass
    if when:
        while not when.exists() and os.waitpid(pid, os.WNOHANG) == (0, 0): time.sleep(0.01)
    if after is not None:
        time.sleep(after)
        try: os.killpg(pid, sig)   # worker processes, too
        except ProcessLookupError: pass
    _, status = os.waitpid(pid, 0)
    return None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)

def spied(method, path):
    "An undisturbed run, with a digest of each state it passes through."
    passed, save = {}, resume.save_state
    def noted(p, s): save(p, s); passed[f"{s['epoch']} {s['batch']}"] = bits(s)
    resume.save_state = noted
    train(method, path)
    write_atomic(path.with_suffix('.passed'), json.dumps(passed))

def check(path, passed):
    "The file is not there yet, or is a state that the undisturbed run passed through."
    if not path.exists(): return None
    s = load_state(path)
    where = f"{s['epoch']} {s['batch']}"
    assert bits(s) == passed[where], f'the state at {where} is not that of the undisturbed run'
    return where

def reference(method):
    path = folder/f'{method} undisturbed.safetensors'
    if not path.with_suffix('.end').exists():
        start = time.time()
        assert live(spied, method, path) == 0
        path.with_suffix('.time').write_text(str(time.time() - start))
    return json.loads(path.with_suffix('.passed').read_text()), path.with_suffix('.end').read_text(), float(
            path.with_suffix('.time').read_text())

def finish(method, path, end, *cbs):
    assert live(train, method, path, *cbs) == 0
    assert path.with_suffix('.end').read_text() == end, 'the numbers at the end differ'
    assert not list(folder.glob(f'.{path.name}*')), 'a partial file was left behind'

def killed(method):
    passed, end, seconds = reference(method)
    n, seen = 0, set()
    while n < kills:
        path = folder/f'{method} killed.safetensors'
        for old in (path, path.with_suffix('.end')): old.unlink(missing_ok=True)
        for _ in range(3):
            if live(train, method, path, after=dice.uniform(0, seconds)) is not None: break
            n += 1
            seen.add(check(path, passed))
        finish(method, path, end)
    return f'{n} kills, {len(seen)} different states found'

def faulty(point, nth=1, full=False):
    "From now on, the `nth` write of a file ends at `point`: with the process, or with a full disk."
    count, fsync, replace = [0], os.fsync, os.replace
    def hit(here):
        if here == point and count[0] == nth: os.kill(os.getpid(), signal.SIGKILL)
    class File:
        def __init__(self, *args): self.f = open(*args)
        def __enter__(self): count[0] += 1; hit('opened'); return self
        def __exit__(self, *e): self.f.close()
        def write(self, data):
            self.f.write(data[:len(data) // 2]); self.f.flush()
            hit('half written')
            if full: raise OSError(28, 'No space left on device')
            self.f.write(data[len(data) // 2:]); self.f.flush()
        def flush(self): hit('written')
        def fileno(self): return self.f.fileno()
    def synced(fd): fsync(fd); hit('synced')
    def replaced(*a): replace(*a); hit('replaced')
    basics.open, os.fsync, os.replace = File, synced, replaced

def at_point(point):
    passed, end, _ = reference('weight noise')
    for nth in (1, 7) if point in ('half written', 'replaced') else (4,):
        path = folder/f'{point} {nth}.safetensors'
        def child(): faulty(point, nth); train('weight noise', path)
        assert live(child) is None, 'it was to be killed'
        found = check(path, passed)
        order = [None, *passed]
        assert found == order[nth if point == 'replaced' else nth - 1], (found, order)
        finish('weight noise', path, end)
    return 'killed there'

def checkpoint():
    "save_model, over and over: the file is one of two models, and its card is that model's."
    a, b = (nn.Sequential(nn.Conv2d(3, 200, 3), nn.Linear(9, 9)) for _ in 'ab')
    with torch.no_grad(): b[1].bias.fill_(5)
    sums = {m[1].bias.sum().item(): name for m, name in ((a, 'a'), (b, 'b'))}
    path, n, seen = folder/'checkpoint.safetensors', 0, []
    def save(point=None, nth=None):
        if point: faulty(point, nth)
        while True:
            for m, name in ((a, 'a'), (b, 'b')): save_model(m, path, who=name)
    def look():
        if not path.exists(): return
        m = load_model(path, nn.Sequential(nn.Conv2d(3, 200, 3), nn.Linear(9, 9)))
        assert sums[m[1].bias.sum().item()] == m.card['who'], 'a card of another model'
        seen.append(m.card['who'])
    for _ in range(5 * kills): assert live(save, after=dice.uniform(0, 0.1)) is None; look()
    for point in points:
        for nth in (3, 4): assert live(save, point, nth) is None; look()
    save_model(a, path, who='a')
    left = list(folder.glob('.checkpoint*'))
    assert not left, left
    return f'{len(seen)} times a whole checkpoint ({seen.count("a")} of one model, {seen.count("b")} of the other)'

def survives(name, trouble):
    ("Trouble with writing from batch 3 on: training goes on, the file is whole, and a second call ends with the same "
     "numbers.")
    passed, end, _ = reference('weight noise')
    path = folder/f'{name}.safetensors'
    assert live(train, 'weight noise', path, At(3, trouble)) == 0
    assert path.with_suffix('.end').read_text() == end, 'the training itself was disturbed'
    assert check(path, passed) == '0 3'
    path.with_suffix('.end').unlink()
    finish('weight noise', path, end)
    return 'went on training; the file stayed as it was before'

def too_large():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

def disk_full():
    "A real full disk where a small one can be mounted; else a write that says so."
    path = folder/'small'
    path.mkdir()
    if os.geteuid() or os.system(f"mount -t tmpfs -o size=400k none '{path}' 2>/dev/null"):
        return 'simulated: ' + survives('disk full', partial(faulty, None, full=True))
    try:
        passed, end, _ = reference('weight noise')
        run = path/'run.safetensors'
        def fill():
            with open(path/'filler', 'wb', 0) as f:
                try:
                    while True: f.write(bytes(4096))
                except OSError: pass
        for found, do in (('0 3', fill), ('2 0', noop)):
            assert live(train, 'weight noise', run, At(3, do), end=folder/'small.end') == 0
            assert check(run, passed) == found and not list(path.glob('.run*'))
            assert (folder/'small.end').read_text() == end
            (path/'filler').unlink(missing_ok=True)
    finally: os.system(f"umount -l '{path}'")
    return 'a real disk, full: the file stayed as it was before'

def read_only():
    place = Path(tempfile.mkdtemp(dir='/tmp'))
    try:
        os.chmod(place, 0o555)
        def child():
            os.environ['HOME'] = '/tmp'
            learn = make('weight noise')
            if os.geteuid() == 0: os.setuid(65534)
            class Trains(Callback):
                def before_batch(self): os._exit(7)
            try:
                with learn.no_bar(), learn.no_logging():
                    learn.fit(1, cbs=[Resumable(place/'run', verbose=False), Trains()])
            except PermissionError as e:
                os._exit(0 if 'cannot be saved there' in str(e) and str(place) in str(e) else 8)
            os._exit(9)
        assert live(child) == 0, 'expected a PermissionError that names the file, before any training'
        assert not list(place.iterdir())
    finally:
        os.chmod(place, 0o755)
        shutil.rmtree(place)
    return 'refused before the first batch'

def sigterm():
    passed, end, _ = reference('weight noise')
    path, mark = folder/'term.safetensors', folder/'term.mark'
    def slow(): mark.write_text(''); time.sleep(1)
    assert live(train, 'weight noise', path, At(4, slow), every='1 h', when=mark, after=0.2, sig=signal.SIGTERM) is None
    assert check(path, passed) == '0 5', 'the batch that ran was to be finished and saved'
    finish('weight noise', path, end)
    return 'saved after the batch, ended by the signal'

def other_run():
    path = folder/'other.safetensors'
    assert live(train, 'weight noise', path, after=None) == 0
    before = path.read_bytes()
    def refused(expected, method='weight noise', **kw):
        try: train(method, path, **kw)
        except ValueError as e:
            if expected in str(e): return
            raise
        raise AssertionError('accepted')
    others = ('epochs: was 2, is 3', dict(epochs=3)), ('schedule', dict(lr=1e-3)), ('methods',
            dict(method='damp')), ('tensors', dict(method='mlpmatch'))
    for words, kw in others:
        assert live(refused, words, **kw) == 0, words
    assert path.read_bytes() == before
    return 'refused in words, the file untouched'

def finished():
    passed, end, _ = reference('damp')
    path = folder/'damp undisturbed.safetensors'
    def stop(): os._exit(5)
    finish('damp', path, end, *[At(i, stop) for i in range(10)])
    return 'returned without training'

# what the first training of a process has to make (PyTorch's kernels for these shapes, late imports), children inherit
for method in ('weight noise', 'mlpmatch'): train(method, folder/f'{method} first.safetensors', epochs=1)
gc.freeze()   # what was imported is nothing that a child need look through
report = {}
sections = {m: partial(killed, m) for m in methods} | {p: partial(at_point, p) for p in points} | {
    'checkpoint': checkpoint, 'disk full': disk_full, 'file too large': partial(survives, 'file too large', too_large),
    'read-only': read_only,
    'sigterm': sigterm, 'other run': other_run, 'finished': finished}
cpu = lambda: sum(os.times()[:4])
for name in [*methods, *points, *others]:
    start, begun = cpu(), time.time()
    try: report[name] = ['ok', sections[name]()]
    except BaseException: report[name] = ['failed', traceback.format_exc()]
    print(f'{name}: {report[name][0]}, {report[name][1]} ({time.time() - begun:.1f} s, {cpu() - start:.1f} s of a '
          f'processor)', file=sys.stderr, flush=True)
write_atomic(folder/'report.json', json.dumps(report))
'''


@pytest.fixture(scope='module')
def report(tmp_path_factory):
    "One process imports everything and forks the ones that get killed; this is what it found."
    folder = tmp_path_factory.mktemp('resume')
    args = [*map(json.dumps, (METHODS, POINTS, OTHERS)), str(KILLS), str(folder), os.environ.get('NOISYSEG_SEED', '0')]
    p = subprocess.run([sys.executable, '-W', 'ignore', '-c', textwrap.dedent(DRIVER), *args], stderr=subprocess.PIPE,
                       text=True,
                       env={**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''})
    print(p.stderr)
    assert p.returncode == 0, p.stderr[-5000:]
    return json.loads((folder/'report.json').read_text()) | {'log': p.stderr}


def expect(report, name):
    outcome, words = report[name]
    assert outcome == 'ok', f'{words}\n{report["log"][-3000:]}'


@pytest.mark.parametrize('method', METHODS)
def test_killed_while_training(report, method): expect(report, method)


@pytest.mark.parametrize('point', POINTS)
def test_killed_while_writing(report, point): expect(report, point)


@pytest.mark.parametrize('what', OTHERS)
def test_other_accidents(report, what): expect(report, what)


# --- another run is another loss, network, augmentation or data, too ------------------------------------------------

def small_fit(path, loss=None, act=None, stop=False, **data):
    import torch
    from fastai.callback.core import Callback
    from torch import nn

    from noisyseg.data.datasets import scenes
    from noisyseg.train.learner import segmentation_learner
    from noisyseg.train.losses import HybridLoss
    from noisyseg.train.resume import Resumable
    class Killed(Callback):
        def before_epoch(self):
            if stop and self.epoch == 1: raise KeyboardInterrupt
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), act or nn.ReLU(), nn.Conv2d(4, 7, 1))
    learn = segmentation_learner(scenes(4, 2, 16, 2, **data), net, loss_func=loss or HybridLoss(msssim=0),
                                 cbs=[Resumable(path, verbose=False), Killed()])
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2)
    return learn

@pytest.fixture(scope='module')
def half_a_fit(tmp_path_factory):
    path = tmp_path_factory.mktemp('half')/'run.safetensors'
    with pytest.raises(KeyboardInterrupt): small_fit(path, stop=True)
    return path.read_bytes()

def other_losses():
    import torch
    from torch import nn

    from noisyseg.train.losses import HybridLoss
    return {'weights': HybridLoss(focal=0, msssim=0), 'another': nn.CrossEntropyLoss(),
            'alpha': HybridLoss(msssim=0, alpha=torch.arange(7.)), 'void': HybridLoss(msssim=0, ignore_index=3),
            'a function': lambda out, y: nn.functional.cross_entropy(out, y)}

@pytest.mark.parametrize('what', ['weights', 'another', 'alpha', 'void', 'a function', 'act', 'augment', 'classes'])
def test_another_run_is_refused(half_a_fit, tmp_path, what):
    from torch import nn
    (path := tmp_path/'run.safetensors').write_bytes(half_a_fit)
    kw = {'act': dict(act=nn.Tanh()), 'augment': dict(augment=False), 'classes': dict(classes=('disc',))}.get(what)
    told = {'act': r'layers: 2 was ReLU\(\), is Tanh\(\)', 'augment': 'data: augment was', 'classes': 'data: '}
    with pytest.raises(ValueError, match=told.get(what, 'loss: ')):
        small_fit(path, **(kw or dict(loss=other_losses()[what])))
    assert path.read_bytes() == half_a_fit

def test_a_file_of_an_earlier_version_goes_on(half_a_fit, tmp_path):
    from noisyseg.train.serialization import load_state, save_state
    (path := tmp_path/'run.safetensors').write_bytes(half_a_fit)
    state = load_state(path)
    for k in ('settings of the loss', 'layers', 'data'): del state['run'][k]
    save_state(path, state)
    assert small_fit(path).recorder.values and load_state(path)['finished']

def test_class_weights_of_a_loss_are_settings(tmp_path):
    import torch
    from torch import nn

    from noisyseg.train.resume import _settings
    a, b = (_settings(nn.CrossEntropyLoss(torch.tensor(w))) for w in ([1., 2.], [2., 1.]))
    assert a != b and a['weight'] == [1., 2.]
