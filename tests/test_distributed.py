"""Two real processes on the CPU, by `learn.distrib_ctx` and Accelerate, against the same script in one process.

One script runs everything that succeeds; at the same time, in two other processes, it lets one fail."""
import filecmp
import json

import pytest
import torch
from conftest import ranks

pytest.importorskip('accelerate', reason='pip install noisyseg[distributed]')

SCRIPT = r'''
import hashlib, json, os, sys, time
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from fastai.callback.core import Callback, CancelTrainException
from fastai.optimizer import SGD
from fastai.torch_core import num_distrib, rank_distrib
from torch import nn

from noisyseg.train import checkpoints as saving
from noisyseg.train.methods.damp import DAMP
from noisyseg.data.datasets import scenes
from noisyseg.perturb.laws import MaxGaussian
from noisyseg.train.methods.mlpmatch import semi_learner, unet3plus_slim
from noisyseg.train.methods.sam_callback import SAMCallback
from noisyseg.basics import unwrapped
from noisyseg.train.checkpoints import save_model
from noisyseg.train.learner import segmentation_learner
from noisyseg.train.noise import WeightNoise
from noisyseg.nets.unet3plus import unet3plus_tiny
from noisyseg.data.semi_supervised import semi_scenes

rank, alone = rank_distrib(), not num_distrib()
PATIENCE = 30   # seconds that a process waits for another

def net():
    "No batch norm, so that images don't look at each other."
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 7, 1))

def unet():
    torch.manual_seed(0)
    return unet3plus_tiny(7, width=2, filters=(4, 6, 8))

class Diary(Callback):
    "A digest of the weights after each step, how far the farthest moved, and the first kernel in each forward pass."
    order = 100
    def __init__(self): self.digests, self.seen, self.paths = [], [], []
    def before_step(self): self.before = [p.detach().clone() for p in self.learn.model.parameters()]
    def after_step(self):
        moved = (p.detach() - q for p, q in zip(self.learn.model.parameters(), self.before))
        self.paths.append(max(float(m.abs().max()) for m in moved))
    def after_pred(self): self.seen.append(next(self.learn.model.parameters()).detach().clone())
    def after_batch(self):
        if self.training:
            self.digests.append(hashlib.sha256(b''.join(p.detach().numpy().tobytes()
                                                        for p in self.learn.model.parameters())).hexdigest())

def nudge(model, generator):
    for p in model.parameters(): p.mul_(1 + 2.**-23 * (2 * torch.randint(0, 2, p.shape, generator=generator) - 1))

class Nudge(Callback):
    "Before each step every weight moves by one unit in its last place: as if each product were rounded once more."
    order = -100
    def __init__(self): self.generator = torch.Generator().manual_seed(0)
    @torch.no_grad()
    def before_batch(self):
        if self.training: nudge(self.learn.model, self.generator)

more = []   # callbacks of every fit

def learner(*cbs, model=None, bs=4, n_train=26, n_valid=5, **kw):
    ("Two processes with batches of `bs`, or one with batches of twice as many. 26 is no multiple of 4 or 8, and 5 "
     "none of 2.")
    dls = scenes(n_train, n_valid, size=16, bs=2 * bs if alone else bs, seed=1, num_workers=kw.pop('num_workers', 0))
    kw = dict(loss_func=nn.CrossEntropyLoss(), opt_func=SGD, lr=0.1) | kw
    learn = segmentation_learner(dls, net() if model is None else model, cbs=[*cbs, *more, Diary()], **kw)
    return learn

def across(learn, **kw):
    "What a user writes: on a CPU there is no SyncBatchNorm."
    return learn.distrib_ctx(**dict(sync_bn=False, cpu=True, kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(seconds=PATIENCE))]) | kw)

def fit(*cbs, epochs=2, ctx={}, **kw):
    learn = learner(*cbs, **kw)
    with across(learn, **ctx), learn.no_bar(), learn.no_logging(): learn.fit(epochs)
    return learn

def without_batch_norm(model):
    ("And without ReLU, in whose kink rounding decides about the gradient: 2e-6 in the weights, where all else makes "
     "5e-7.")
    for name, child in model.named_children():
        if isinstance(child, nn.BatchNorm2d): setattr(model, name, nn.GroupNorm(2, child.num_features))
        elif isinstance(child, nn.ReLU): setattr(model, name, nn.SiLU())
        else: without_batch_norm(child)
    return model

def match(*cbs, batch_norm=True, **kw):
    ("MLPMatch. With GroupNorm, without boxes and dropout (each process draws its own) and margins, images don't look "
     "at each other.")
    torch.manual_seed(0)
    model = unet3plus_slim(7, width=4, encoder_width=4, layers=(1, 1, 1, 1))
    if not batch_norm: model, kw = without_batch_norm(model), kw | dict(cutmix=0., dropout=0.)
    bs = 4 if alone else 2
    dls = semi_scenes(8, 16, 3, size=32, seed=1, bs=bs, zoom=(1, 1))
    learn = semi_learner(dls, model, cbs=[*cbs, *more, Diary()], opt_func=SGD, lr=0.1, seed=3, threshold=0.2, lam=1.,
                         **kw)
    with across(learn), learn.no_bar(), learn.no_logging(): learn.fit(1)
    return learn

def record(learn):
    return {'weights': {k: v.detach().clone() for k, v in learn.model.state_dict().items()},
            'digests': learn.diary.digests, 'seen': learn.diary.seen[0], 'paths': learn.diary.paths,
            'epoch': learn.dls.train.epoch, 'values': [list(map(float, v[:3])) for v in learn.recorder.values]}

m = 2 if alone else 1            # sub-batches of a process
part = 4 if alone else None      # images that share an ascent: those of one process
noise = lambda **kw: WeightNoise(MaxGaussian(0.2), **kw)
damp = lambda m=m, **kw: DAMP(0.2, m=m, seed=5, **kw)
equal = dict(
    plain=lambda: fit(),
    noise=lambda: fit(noise(seed=7)),
    noise_epoch=lambda: fit(noise(seed=7, when='both', draw='epoch', gradient='recovered')),
    damp=lambda: fit(damp()),
    damp_4=lambda: fit(damp(2 * m, gradient='exact')),
    damp_sync=lambda: fit(damp(batchnorm='sync')),
    sam=lambda: fit(SAMCallback(0.5, m=part)),
    sam_global=lambda: fit(SAMCallback(0.5, sync=True)),
    asam=lambda: fit(SAMCallback(2., adaptive=True, m=part)),
    noise_and_sam=lambda: fit(noise(seed=7), SAMCallback(0.2, m=part)),
    damp_and_sam=lambda: fit(damp(2 * m), SAMCallback(0.2, sync=True)),
    mlpmatch=lambda: match(batch_norm=False),
    mlpmatch_parts=lambda: match(noise(seed=7), batch_norm=False, in_parts=True),
    workers=lambda: fit(epochs=1, num_workers=1))
only_two = dict(
    own_noise=lambda: fit(noise(seed=7, shared=False)),
    drawn_seed=lambda: (torch.manual_seed(rank), fit(noise()))[1],
    mlpmatch_own=lambda: match(noise(seed=7, shared=False), SAMCallback(0.1), shared=False),
    batch_norm=lambda: fit(noise(seed=7), SAMCallback(0.1), damp(2), model=unet(), loss_func=None))

class SaveEach(Callback):
    "No training; saves in the middle of the fit, where the model is wrapped."
    def __init__(self, path): self.path = path
    def before_train(self): raise CancelTrainException
    def after_epoch(self): self.path_back = save_model(self.learn, self.path, dataset='scenes')

def checkpoints(out):
    "A network with batch norm, validated and saved in the middle of a fit and after it."
    written, write = [], saving.write_atomic
    saving.write_atomic = lambda path, data, **kw: (written.append(Path(path).name), write(path, data, **kw))[1]
    save = SaveEach(out/'middle')
    learn = fit(noise(seed=7, when='valid'), save, model=unet(), loss_func=None, epochs=1, n_valid=11)
    back = save_model(learn, out/'end.safetensors', dataset='scenes')
    learn.remove_cb(save)
    drawn = learn.weight_noise.state_dict()
    with across(learn), learn.no_bar(): preds, truth = learn.get_preds()
    saving.write_atomic = write
    with torch.no_grad(): nudge(learn.model, torch.Generator().manual_seed(0))
    learn.weight_noise.load_state_dict(drawn)
    with across(learn), learn.no_bar(): nudged, _ = learn.get_preds()
    return {'nudged': nudged.as_subclass(torch.Tensor), 'written': written, 'paths': [str(save.path_back), str(back)],
            'values': list(map(float, learn.recorder.values[-1])),
            'preds': preds.as_subclass(torch.Tensor), 'truth': truth.as_subclass(torch.Tensor)}

class FailsOn1(Callback):
    order, passes = 50, 0
    def after_pred(self):
        self.passes += self.training
        if rank == 1 and self.passes == 6: raise ZeroDivisionError('stop')

def failure(out):
    ("At the top of the third step's ascent, under noise, process 1 fails but lives on: process 0 waits for its "
     "gradient in vain.")
    cb, found = [noise(seed=7), SAMCallback(0.2)], {}
    learn = learner(FailsOn1(), *cb)
    t = time.time()
    try:
        with across(learn), learn.no_bar(), learn.no_logging(): learn.fit(1)
    except BaseException as e: error, found = e, {'error': f'{type(e).__name__}: {e}', 'seconds': time.time() - t}
    model = unwrapped(learn.model)
    found |= {'injected': cb[0]._clone.injected, 'climbed': cb[1]._ascent.climbed, 'digests': learn.diary.digests,
              'digest': hashlib.sha256(b''.join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()}
    (out/f'failure-{rank}.json').write_text(json.dumps(found))
    while rank == 1 and not (out/'failure-0.json').exists(): time.sleep(0.1)
    raise error

def main(out):
    for name, run in (equal if alone else equal | only_two).items(): torch.save(record(run()), out/f'{name}-{rank}.pt')
    torch.save(checkpoints(out), out/f'checkpoints-{rank}.pt')
    if alone:
        for name, run in equal.items():
            more[:] = [Nudge()]
            torch.save(record(run()), out/f'{name}-nudged.pt')
        return
    AcceleratorState._reset_state()   # the precision is settled once for a process
    torch.save(record(fit(damp(2), SAMCallback(0.1), ctx=dict(mixed_precision='bf16'))), out/f'bf16-{rank}.pt')

if __name__ == '__main__':
    out = Path(os.environ['OUT'])
    failure(out) if os.environ.get('WHAT') == 'failure' else main(out)
    if torch.distributed.is_initialized(): torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)   # gloo's threads may outlive it, and abort an orderly exit
'''

EQUAL = ['plain', 'noise', 'noise_epoch', 'damp', 'damp_4', 'damp_sync', 'sam', 'sam_global', 'asam', 'noise_and_sam',
         'damp_and_sam', 'mlpmatch',
         'mlpmatch_parts', 'workers']
ONLY_TWO = ['own_noise', 'drawn_seed', 'mlpmatch_own', 'batch_norm', 'bf16']

@pytest.fixture(scope='module')
def runs(server, tmp_path_factory):
    """Folders `two` and `one` with what the script wrote in two processes and in one, and how its failure ended.

    The failure is two processes of its own, because one of them waits for half a minute."""
    top = tmp_path_factory.mktemp('distributed')
    for name in ('one', 'two'): (top/name).mkdir()
    alone = dict.fromkeys(('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'))
    envs = [{**alone, 'CUDA_VISIBLE_DEVICES': '', 'OUT': str(top/'one')},
            *({**env, 'OUT': str(top/'two'), 'WHAT': what} for what in ('all', 'failure') for env in ranks())]
    one, *two, waited, failed = server.script(SCRIPT, top, *envs)
    for code, said in (one, *two): assert code == 0, said[-3000:]
    assert (top/'two'/'failure-0.json').exists(), waited[1][-6000:]
    return top, [failed[0], waited[0]], failed[1] + waited[1]

def load(runs, name): return [torch.load(runs[0]/f) for f in (f'two/{name}-0.pt', f'two/{name}-1.pt')]
def alone(runs, name): return torch.load(runs[0]/f'one/{name}-0.pt')

def rounding(runs, name):
    """How far apart rounding may leave the weights of two ways to compute one training: twice as far as they go
    when every
    weight moves by a unit in its last place before each step. Measured on this processor, with this network's
    condition."""
    one, nudged = alone(runs, name)['weights'], torch.load(runs[0]/f'one/{name}-nudged.pt')['weights']
    return 2 * max(float((nudged[k].double() - v.double()).abs().max()) for k, v in one.items())

@pytest.mark.parametrize('name', EQUAL + ONLY_TWO)
def test_weights_are_equal_after_every_step(runs, name):
    a, b = load(runs, name)
    assert a['digests'] == b['digests'] and len(set(a['digests'])) == len(a['digests']) == (3 if name == 'workers'
            else 4 if 'mlpmatch' in name else 6)
    assert a['values'] == b['values'] and a['epoch'] == b['epoch']
    for k, v in a['weights'].items():
        assert torch.equal(v, b['weights'][k]) and (not v.is_floating_point() or v.isfinite().all()), k

@pytest.mark.parametrize('name', EQUAL)
def test_two_processes_train_as_one_with_the_whole_batch(runs, name):
    two, one = load(runs, name)[0], alone(runs, name)
    atol = rounding(runs, name)
    assert atol < 2e-4 * sum(one['paths'])   # far less than the way that the weights went
    for k, v in one['weights'].items(): torch.testing.assert_close(two['weights'][k], v, rtol=0, atol=atol, msg=k)
    assert two['epoch'] == one['epoch'] == len(one['values']) - 1 and len(two['digests']) == len(one['digests'])
    for v, w in zip(two['values'], one['values']):
        # the training loss, 1.9: a mean over 2,048 pixels, whose order is another one: eps * 1.9 * sqrt(2048) = 1e-5
        assert v[0] == pytest.approx(w[0], abs=1e-5)
        assert v[2] == pytest.approx(w[2], abs=2e-3)   # mIoU: a pixel on the edge may fall either way

def test_noise_is_shared_or_each_has_its_own(runs):
    for name in ('noise', 'drawn_seed'):
        a, b = load(runs, name)
        assert torch.equal(a['seen'], b['seen'])
    a, b = load(runs, 'own_noise')
    assert not torch.allclose(a['seen'], b['seen'], atol=1e-3)

def test_mixed_precision(runs):
    low, full = load(runs, 'bf16')[0], load(runs, 'damp_and_sam')[0]
    assert low['values'][-1][0] < low['values'][0][0] and low['values'][-1][0] == pytest.approx(full['values'][-1][0],
            abs=0.05)

def test_checkpoints_are_written_once(runs):
    a, b = load(runs, 'checkpoints')
    assert a['written'] == ['middle.safetensors', 'middle.json', 'end.safetensors',
                            'end.json'] and b['written'] == [] and a['paths'] == b['paths']
    folders = runs[0]/'two', runs[0]/'one'
    assert filecmp.cmp(*(f/'middle.safetensors' for f in folders), shallow=False)   # names, numbers and card
    cards = [json.loads((f/'end.json').read_text()) for f in folders]
    for c in cards: c.pop('metrics')
    assert cards[0] == cards[1] and cards[0]['architecture']['factory'] == 'unet3plus_tiny' and cards[0]['classes'][
            1] == 'disc'
    assert not [p.name for p in folders[0].iterdir() if p.name.endswith('.part')]

def test_validation_counts_each_image_once_and_predictions_come_in_order(runs):
    (a, b), one = load(runs, 'checkpoints'), alone(runs, 'checkpoints')
    assert a['values'][1] == b['values'][1] == one['values'][1]   # mIoU of 11 images, 6 and 6 of them seen
    for k in ('preds', 'truth'):
        assert len(a[k]) == 11 and torch.equal(a[k], b[k])
        atol = 2 * float((one['nudged'] - one['preds']).abs().max())   # as in `rounding`
        assert atol < 1e-4
        torch.testing.assert_close(a[k], one[k], rtol=0, atol=atol)

def test_when_one_process_fails_all_have_clean_weights(runs):
    top, codes, said = runs
    waited, failed = (json.loads((top/f'two/failure-{r}.json').read_text()) for r in range(2))
    assert failed['error'].startswith('ZeroDivisionError') and failed['seconds'] < 20
    assert waited['error'].startswith('RuntimeError') and 20 < waited['seconds'] < 90   # its patience was 30 s
    for found in (waited, failed):
        assert not found['injected'] and not found['climbed'] and len(found['digests']) == 2 and found[
                'digest'] == found['digests'][-1]
    assert waited['digest'] == failed['digest'] and all(codes) and 'ZeroDivisionError' in said
