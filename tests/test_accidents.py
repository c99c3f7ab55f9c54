"""When something goes wrong: a clear error or a defined result, weights intact bit for bit, no partial file.

`ELSEWHERE` says which accidents are tried in other files. Kills are in test_resume.py and test_sweeps.py."""
import contextlib
import copy
import json
import os
import random
import re
import resource
import subprocess
import threading
import warnings

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from conftest import root
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune

from noisyseg.nets.classifiers import resnet20
from noisyseg.data.corruptions import CORRUPTIONS, Corruption
from noisyseg.show.explorer import NoiseExplorer
from noisyseg.perturb.laws import AbsoluteGaussian, MaxGaussian, MultiplicativeGaussian, RelativeGaussian
from noisyseg.train.losses import FocalLoss, HybridLoss, IoULoss, MSSSIMLoss
from noisyseg.measure.metrics import ConfusionMeter
from noisyseg.perturb.clone import clone_weights, holding, perturbed
from noisyseg.perturb.quantization import Quantize
from noisyseg.show.report import report_html
from noisyseg.perturb.selectors import kernels_and_scales, select
from noisyseg.measure.sweeps import sweep
from noisyseg.train.checkpoints import load_model, read_card, save_model
from noisyseg.nets.unet3plus import unet3plus_tiny

ELSEWHERE = {   # accident -> the tests that cause it
    'an image that is none, labels out of range, mask and image of different sizes, half a dataset': [
        'test_data.py::test_fault_names_the_file',
        'test_data.py::test_fault_in_a_worker_process_names_the_file', 'test_data.py::test_sbd_faults',
        'test_data.py::test_camvid_of_other_classes',
        'test_data.py::test_wrong_folders'],
    'a download that breaks off or is another file, an archive that is half extracted': [
        'test_data.py::test_without_a_network',
        'test_security.py::test_extraction_is_whole_or_not_at_all',
        'test_security.py::test_a_download_that_is_another_file'],
    'one class missing': ['test_metrics.py::test_absent_classes', 'test_sweeps.py::test_pixels_that_do_not_count'],
    'Ctrl-C': ['test_perturb.py::test_ctrl_c_at_random_moments_leaves_clean_weights',
               'test_damp.py::test_ctrl_c_leaves_no_trace',
        'test_sam.py::test_control_c_at_any_moment', 'test_sweeps.py::test_ctrl_c_keeps_and_resumes'],
    'NaN weights in a sweep': ['test_sweeps.py::test_nan_weights_are_told_and_recovered'],
    'a damaged store of a sweep': ['test_sweeps.py::test_damaged_store_is_measured_again'],
    'nonsense for arguments': ['test_perturb.py::test_nonsense_is_refused_and_the_model_untouched',
                               'test_data.py::test_nonsense_for_custom_masks'],
    'a fit that is stopped anywhere': ['test_sam.py::test_stopping_a_fit_anywhere_leaves_the_weights_as_they_were'],
}

@pytest.mark.parametrize('where', [w for ws in ELSEWHERE.values() for w in ws])
def test_elsewhere(where):
    "What is said to be tried elsewhere is tried there"
    file, name = where.split('::')
    assert re.search(rf'^def {name}\(', (root/'tests'/file).read_text(), re.M)


# --- files ----------------------------------------------------------------------------------------------------------
# --------------

class Net(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.norm, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1)
    def forward(self, x): return self.b(self.norm(self.a(x)).relu())

def bits(model): return {k: v.detach().clone().reshape(-1).view(torch.uint8) for k, v in model.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def files(folder): return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}
def batch(n=2): return torch.rand(n, 3, 32, 32), torch.randint(0, 3, (n, 32, 32))

WRITERS = {'checkpoint': lambda folder, seed: save_model(unet3plus_tiny(3 + seed), folder/'net', dataset=f'{seed}'),
           'sweep': lambda folder, seed: sweep({'a': Net()}, [batch()], MaxGaussian(0.1), levels=[0, 0.1], draws=40,
                                                     store=folder/'sweep.csv', progress=False),
           'report': lambda folder, seed: report_html([('one', 'text ' * 20_000), f'{seed}'], folder/'report.html'),
           'explorer page': lambda folder, seed: explorer().to_html(folder/'page.html'),
           'explorer site': lambda folder, seed: explorer().to_site(folder/'site', samples=[0], seeds=[0])}

def explorer(): return NoiseExplorer({'net': Net().eval()}, batch(1), samples=1)

def mounted(folder, *options):
    return os.getuid() == 0 and subprocess.run(['mount', *options, str(folder)], capture_output=True).returncode == 0

@pytest.fixture(params=['limit', 'disk'])
def full_disk(request, tmp_path):
    "A folder, and a context in which nothing more than a kilobyte fits into it"
    if request.param == 'disk':
        if not mounted(tmp_path, '-t', 'tmpfs', '-o', 'size=4m', 'tmpfs'):
            pytest.skip('only root can mount a small disk')
    @contextlib.contextmanager
    def full():
        if request.param == 'limit':   # of a file's size: writing beyond it fails as on a full disk
            old = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))
            try: yield
            finally: resource.setrlimit(resource.RLIMIT_FSIZE, old)
        else:
            ballast = tmp_path/'.ballast'
            with contextlib.suppress(OSError), open(ballast, 'wb', buffering=0) as f:
                while f.write(bytes(4096)): pass
            try: yield
            finally: ballast.unlink()
    yield tmp_path, full
    if request.param == 'disk': subprocess.run(['umount', '-l', str(tmp_path)], check=True)

@pytest.mark.parametrize('what', WRITERS)
def test_full_disk(full_disk, what):
    "An error that says so; what was there is still there, and nothing else"
    (folder, full), write = full_disk, WRITERS[what]
    for _ in ('nothing there', 'an earlier one there'):
        was = files(folder)
        with full(), pytest.raises(OSError) as e: write(folder, 1)
        assert 'large' in str(e.value) or 'space' in str(e.value)
        now = files(folder)
        assert not [n for n in now if n.endswith('.part')]
        assert {n: now.get(n) for n in was} == was or what == 'sweep', [n for n in was if now.get(n) != was[n]]
        if what == 'checkpoint': assert now.keys() == was.keys()
        write(folder, 0)

@pytest.mark.parametrize('what', WRITERS)
def test_read_only_folder(tmp_path, what):
    WRITERS[what](tmp_path, 0)
    kept, root_user = files(tmp_path), os.getuid() == 0
    if root_user:
        if not (mounted(tmp_path, '--bind', str(tmp_path)) and mounted(tmp_path, '-o', 'remount,ro,bind')):
            pytest.skip('root may write anywhere')
    else: [p.chmod(0o555) for p in [tmp_path, *tmp_path.rglob('*')] if p.is_dir()]
    try:
        with pytest.raises(OSError, match='(?i)read-only|permission'): WRITERS[what](tmp_path, 1)
        assert files(tmp_path) == kept
    finally:
        if root_user: subprocess.run(['umount', '-l', str(tmp_path)], check=True)
        else: [p.chmod(0o755) for p in [tmp_path, *tmp_path.rglob('*')] if p.is_dir()]


# --- checkpoints that something happened to
# ---------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    "(its bytes, the length of its header, its weights, a path for a damaged one without a card beside it)"
    folder, model = tmp_path_factory.mktemp('checkpoint'), unet3plus_tiny(3, width=2, filters=(4, 6))
    whole = save_model(model, folder/'whole').read_bytes()
    return whole, 8 + int.from_bytes(whole[:8], 'little'), bits(model), folder/'damaged.safetensors'

def refused_or_right(path, weights):
    try: found = load_model(path)
    except ValueError as e:
        assert path.stem in str(e)
        return 'refused'
    assert same(bits(found), weights)
    return 'right'

def test_flipped_bits(checkpoint):
    "Any bit: a ValueError that names the file, or the very weights (what only describes them may change)"
    whole, header, weights, path = checkpoint
    rng = random.Random(0)
    places = [*range(64), *(64 + rng.randrange(8*header - 64) for _ in range(900)),
              *(8*header + rng.randrange(8*(len(whole) - header)) for _ in range(100))]
    # every bit of the words that say how to read the rest
    for word in (b'__metadata__', b'architecture', b'factory', b'args', b'n_classes', b'sha256', b'weights', b'dtype',
                 b'data_offsets', b'"F32"'):
        at = whole[:header].find(word)
        places += range(8*at, 8*(at + len(word))) if at > 0 else []
    outcomes = []
    for b in places:
        damaged = bytearray(whole)
        damaged[b//8] ^= 1 << b % 8
        path.write_bytes(damaged)
        outcomes.append(refused_or_right(path, weights))
    assert outcomes.count('refused') > 0.9*len(places)

def test_truncated(checkpoint):
    whole, header, weights, path = checkpoint
    rng = random.Random(0)
    for n in [0, 1, 7, 8, 9, header//2, header, header + 1, len(whole) - 1,
              *(rng.randrange(len(whole)) for _ in range(40))]:
        path.write_bytes(whole[:n])
        assert refused_or_right(path, weights) == 'refused'
        with contextlib.suppress(ValueError): read_card(path)   # and nothing else
    path.write_bytes(whole + b'more')
    assert refused_or_right(path, weights) == 'refused'

def with_card(path, whole, change):
    "The checkpoint with another card in it"
    path.write_bytes(whole)
    with safetensors.safe_open(path, 'pt') as f:
        card, tensors = json.loads(f.metadata()['card']), {k: f.get_tensor(k) for k in f.keys()}
    card = change(card)
    path.write_bytes(safetensors.torch.save(tensors, metadata={'card': json.dumps(card)}))

def wrong(*keys, **values):
    "A function that changes a card: below `keys` there are `values`; what is None is left out"
    def change(card):
        at = card
        for k in keys: at = at[k]
        at.update(values)
        for k in [k for k, v in values.items() if v is None]: del at[k]
        return card
    return change

LIES = {
    'another factory': wrong('architecture', factory='unet3plus_resnet34'),
    'no factory': wrong('architecture', factory='os.system'),
    'factory is a list': wrong('architecture', factory=[]), 'more classes': wrong('architecture', 'args', n_classes=4),
    'many classes': wrong('architecture', 'args', n_classes=10**12),
    'classes that are text': wrong('architecture', 'args', n_classes='three'),
    'minus one class': wrong('architecture', 'args', n_classes=-1),
    'an argument that is none': wrong('architecture', 'args', command='rm'),
    'arguments that are a list': wrong('architecture', args=[1]), 'no arguments': wrong('architecture', args=None),
    'architecture is text': wrong(architecture='unet'), 'no architecture': wrong(architecture=None),
    'no weights': wrong(weights=None),
    'weights are text': wrong(weights='all'), 'another digest': wrong('weights', sha256='0'*64),
    'no digest': wrong('weights', sha256=None),
    'a list': lambda card: [1, 2], 'nothing': lambda card: {}, 'null': lambda card: None,
}

@pytest.mark.parametrize('lie', LIES)
def test_a_card_that_lies(checkpoint, lie):
    whole, _, weights, path = checkpoint
    with_card(path, whole, LIES[lie])
    assert refused_or_right(path, weights) == 'refused'

def test_a_card_of_another_checkpoint(checkpoint, tmp_path):
    a, b = (save_model(unet3plus_tiny(n), tmp_path/f'{n}') for n in (3, 4))
    a.with_suffix('.json').write_bytes(b.with_suffix('.json').read_bytes())
    with pytest.raises(ValueError, match='not the card that 3.safetensors carries'): load_model(a)

def test_another_architecture(checkpoint):
    whole, _, weights, path = checkpoint
    path.write_bytes(whole)
    for other in (unet3plus_tiny(4), unet3plus_tiny(3, width=16), Net(), resnet20(10)):
        before = bits(other)
        with pytest.raises(ValueError, match='does not fit this model'): load_model(path, other)
        assert same(before, bits(other))


# --- weights that are perturbed
# -------------------------------------------------------------------------------------------------------

LAWS = [MaxGaussian(0.1), AbsoluteGaussian(0.1), MultiplicativeGaussian(0.1), RelativeGaussian(0.1), Quantize(4)]

@pytest.mark.parametrize('law', LAWS, ids=str)
@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_weights_that_are_no_numbers(law, value):
    net = Net().eval()
    with torch.no_grad(): net.a.weight[0, 0, 0, :2] = value
    net.b.weight.data.view(torch.int32)[0, 0] = 0x7fc01234   # a NaN with something in it
    before = bits(net)
    try:
        with perturbed(net, law, kernels_and_scales, 0): net(torch.rand(1, 3, 8, 8))
    except ValueError as e: assert 'nan or inf' in str(e) and isinstance(law, Quantize)
    assert same(before, bits(net))

@pytest.mark.parametrize('rng', ['normal', 'table'])
@pytest.mark.parametrize('error', [ZeroDivisionError, KeyboardInterrupt, MemoryError, SystemExit])
def test_an_exception_inside_a_law(error, rng):
    net = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
    before, sites = bits(net), len(select(net, kernels_and_scales))
    class Fails:
        def __init__(self, level, at): self.level, self.at_call, self.calls = level, at, 0
        def at(self, level): return Fails(level, self.at_call) if level < 1 else Fails(level, 1)
        def __call__(self, w, z):
            self.calls += 1
            if self.calls == self.at_call: raise error
            return w + self.level*z
    for at in range(1, sites + 1):
        clone = clone_weights(net, kernels_and_scales, rng=rng)
        with pytest.raises(error): clone.inject(Fails(0.1, at), 0)
        assert same(before, bits(net)) and not clone.injected
        clone.inject(MaxGaussian(0.1), 0)                 # over noise that is in
        with pytest.raises(error): clone.inject(Fails(0.1, at), 0)
        assert same(before, bits(net))
        clone.inject(Fails(0.1, 99), 0)
        with pytest.raises(error): clone.rescale(2.)
        assert same(before, bits(net))
    assert not holding()

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.c.weight = nn.Parameter(self.a.weight.data)     # another Parameter of the same memory
        self.d, self.norm = parametrizations.weight_norm(nn.Linear(4, 4)), nn.LayerNorm(4)

WHERES = ['*', 'a.weight', 'b.*', 'c.weight', 'd.weight', 'norm.*']

@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_blocks_that_overlap_in_any_order(data):
    "Any blocks on any of the weights, opened and closed in any order: clean at the end"
    net, opened = Tied(), []
    before = bits(net)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            for step in range(data.draw(st.integers(2, 9))):
                if opened and data.draw(st.booleans()):
                    opened.pop(data.draw(st.integers(0, len(opened) - 1))).__exit__(None, None, None)
                else:
                    opened.append(block := perturbed(net, data.draw(st.sampled_from(LAWS)),
                                                     data.draw(st.sampled_from(WHERES)), step))
                    clone = block.__enter__()
                    if data.draw(st.booleans()): clone.rescale(data.draw(st.sampled_from([0., 1., 2.])))
            opened = list(data.draw(st.permutations(opened)))
        finally:   # hypothesis gives up on some examples half way
            for block in opened: block.__exit__(None, None, None)
    assert same(before, bits(net))
    assert not holding()

def test_ctrl_c_still_works_after_blocks_that_overlap():
    import signal
    if threading.current_thread() is not threading.main_thread(): pytest.skip('only the main thread has a handler')
    net, handler = Net(), signal.getsignal(signal.SIGINT)
    a, b = (perturbed(net, MaxGaussian(0.1)) for _ in range(2))
    a.__enter__(), b.__enter__()
    with pytest.warns(UserWarning, match='ended before a later one'): a.__exit__(None, None, None)
    with pytest.raises(KeyboardInterrupt): os.kill(os.getpid(), signal.SIGINT); threading.Event().wait(5)
    b.__exit__(None, None, None)
    assert signal.getsignal(signal.SIGINT) == handler

CHANGES = {
    'a layer more': lambda m: m.add_module('new', nn.Conv2d(3, 3, 1)), 'a layer less': lambda m: delattr(m, 'b'),
    'another layer': lambda m: setattr(m, 'b', nn.Conv2d(4, 3, 1)),
    'half': lambda m: m.half(), 'bfloat16': lambda m: m.bfloat16(), 'double': lambda m: m.double(),
    'meta': lambda m: m.to('meta'), 'cuda': lambda m: m.to('cuda'),
    'channels last': lambda m: m.to(memory_format=torch.channels_last), 'frozen': lambda m: m.requires_grad_(False),
    'copied': copy.deepcopy,
    'loaded': lambda m: m.load_state_dict(Net(1).state_dict()),
    'assigned': lambda m: m.load_state_dict(Net(1).state_dict(), assign=True),
    'parametrized': lambda m: parametrizations.weight_norm(m.a),
    'pruned': lambda m: prune.l1_unstructured(m.a, 'weight', 0.5),
    'another shape': lambda m: setattr(m.a.weight, 'data', torch.ones(5, 3, 3, 3)),
    'no weight': lambda m: delattr(m.a, 'weight'),
}

@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('gradient', ['noisy', 'recovered'])
def test_a_model_that_changes_while_it_is_perturbed(change, gradient):
    "Afterwards each weight that is still there holds its clean number, in the dtype and the place where it is now"
    if change == 'cuda' and not torch.cuda.is_available(): pytest.skip('needs CUDA')
    net = Net()
    clean, a, b = {k: v.clone() for k, v in net.state_dict().items()}, net.a.weight, net.b.weight
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        with perturbed(net, MaxGaussian(0.1), '*', 0, gradient): CHANGES[change](net)
    assert not holding()
    for name, w in (('a.weight', a), ('b.weight', b)):
        if w.shape == clean[name].shape: assert torch.equal(w.cpu(), clean[name].to(w.dtype)), name
    told = ' '.join(str(w.message) for w in said)
    if change in ('assigned', 'another shape', 'no weight', 'another layer', 'meta', 'pruned'): return
    new = net.state_dict()
    for k in clean.keys() & new.keys():
        assert torch.equal(new[k].cpu(), clean[k].to(new[k].dtype)) or 'running' in k or 'tracked' in k, k
    assert ('that change is undone' in told) == (change == 'loaded' and gradient == 'noisy' or change == 'loaded'), told

@pytest.mark.parametrize('change', ['assigned', 'another shape', 'no weight', 'meta', 'pruned'])
def test_a_weight_that_can_not_come_back_is_named(change):
    net = Net()
    with pytest.warns(UserWarning, match='a.weight.*replaced while perturbed'):
        with perturbed(net, MaxGaussian(0.1), 'a.weight', 0): CHANGES[change](net)

OPTIMIZERS = {'SGD': lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), 'Adam': torch.optim.Adam,
              'foreach': lambda p: torch.optim.AdamW(p, foreach=True),
              'fused': lambda p: torch.optim.AdamW(p, fused=True)}

@pytest.mark.parametrize('name', OPTIMIZERS)
def test_an_optimizer_steps_inside(name):
    "Undone, and told; PyTorch's fused optimizers leave no trace that they were there, so with them it is only undone"
    net = Net()
    optimizer, before = OPTIMIZERS[name](net.parameters()), net.a.weight.detach().clone()
    with contextlib.nullcontext() if name == 'fused' else pytest.warns(UserWarning, match='that change is undone'):
        with perturbed(net, MaxGaussian(0.1), 'a.weight', 0):
            net(torch.rand(2, 3, 8, 8)).sum().backward()
            noisy = net.a.weight.detach().clone()
            optimizer.step()
            assert not torch.equal(net.a.weight, noisy)
    assert torch.equal(net.a.weight, before)

def in_threads(f, n=4):
    errors, barrier = [], threading.Barrier(n)
    def run(i):
        barrier.wait()
        try: f(i)
        except BaseException as e: errors.append(e)
    threads = [threading.Thread(target=run, args=(i,)) for i in range(n)]
    for t in threads: t.start()
    for t in threads: t.join()
    return errors

def test_threads_at_one_model():
    "Whoever is first perturbs; the others get an error, and the weights are as they were"
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Conv2d(16, 16, 3) for _ in range(6)])
    before, clean, done, refused = bits(net), net[0].weight.detach().clone(), [], []
    def work(i):
        for step in range(60):
            try:
                with perturbed(net, AbsoluteGaussian(0.1), '*', 1000*i + step):
                    expected = clean + 0.1*torch.empty(clean.shape).normal_(generator=torch.Generator().manual_seed(1000
                            *i + step))
                    net(torch.rand(1, 16, 16, 16))
                    assert torch.equal(net[0].weight, expected)     # nobody else's noise
                    done.append(i)
            except RuntimeError as e:
                assert 'another thread' in str(e)
                refused.append(i)
    errors = in_threads(work)
    assert not errors and done and len(done) + len(refused) == 240
    assert same(before, bits(net)) and not holding()

def test_threads_at_one_clone():
    net = Net()
    before, clone, outcomes = bits(net), clone_weights(net), []
    def work(i):
        for _ in range(50):
            try: clone.inject(MaxGaussian(0.1), i); outcomes.append('in'); clone.recover()
            except RuntimeError as e: outcomes.append('refused'); assert 'another thread' in str(e)
    assert not in_threads(work) and 'in' in outcomes
    clone.recover()
    assert same(before, bits(net))

def test_threads_at_models_of_their_own():
    "The noise of a seed does not depend on what other threads do"
    nets = [nn.Conv2d(64, 64, 3) for _ in range(4)]
    before, alone = [bits(n) for n in nets], []
    for i, n in enumerate(nets):
        with perturbed(n, AbsoluteGaussian(0.1), generator=i): alone.append(n.weight.detach().clone())
    def work(i):
        for _ in range(20):
            with perturbed(nets[i], AbsoluteGaussian(0.1), generator=i): assert torch.equal(nets[i].weight, alone[i])
    assert not in_threads(work)
    assert all(same(b, bits(n)) for b, n in zip(before, nets))


# --- batches of nothing, data without a class
# -----------------------------------------------------------------------------------------

def test_batches_of_nothing():
    empty = torch.zeros(0, 3, 64, 64)
    net = unet3plus_tiny(3).eval()
    before = [p.detach().clone() for p in net.parameters()]
    with torch.no_grad(), perturbed(net, MaxGaussian(0.1), generator=0): assert net(empty).shape == (0, 3, 64, 64)
    assert resnet20(10).eval()(empty[..., :32, :32]).shape == (0, 10)
    with pytest.raises(ValueError, match='more than one value'): net.train()(empty)
    assert all(map(torch.equal, before, net.parameters()))
    for k in CORRUPTIONS: assert Corruption(k, 3, 0)(empty).shape == empty.shape
    logits, masks = torch.zeros(0, 3, 8, 8), torch.zeros(0, 8, 8, dtype=torch.long)
    for loss in (FocalLoss(), IoULoss(), MSSSIMLoss(), HybridLoss()):
        with pytest.raises(ValueError, match='nothing in'): loss(logits, masks)
    meter = ConfusionMeter(3)
    meter.update(logits, masks)
    assert np.asarray(meter.matrix).sum() == 0

@pytest.mark.parametrize('data', [[], [tuple(t[:0] for t in batch())], [batch(), tuple(t[:0] for t in batch())]],
                         ids=['none', 'empty', 'the last is empty'])
def test_sweeps_over_nothing(data):
    net = Net().eval()
    before = bits(net)
    with pytest.raises(ValueError, match='^dl: '):
        sweep({'a': net}, data, MaxGaussian(0.1), levels=[0, 0.1], draws=2, progress=False)
    assert same(before, bits(net))

def test_a_class_that_nobody_has_seen():
    x, y = batch(4)
    df = sweep({'a': Net().eval()}, [(x, y.clamp(max=1))], MaxGaussian(0.1), levels=[0, 0.1], draws=2,
                     class_names=['a', 'b', 'c'], progress=False)
    assert (df.loc[df['class'] == 'c', 'n_pixels'] == 0).all() and df.loc[df['metric'] == 'mIoU', 'value'].notna().all()
