"""Checkpoints: what is saved comes back, whatever the network is wrapped in, or an error says how to mend it.
The lesson is nbs/train/06_checkpoints.ipynb."""
import copy
import io
import json
import os
import random
import socket
import threading
import urllib.request
import warnings

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from conftest import ranks
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from noisyseg.basics import offline, plain_name, remove_parts, state_digest, unwrapped, whole_file, write_atomic
from noisyseg.nets.activations import with_activation
from noisyseg.nets.unet3plus import FACTORIES, unet3plus_tiny
from noisyseg.perturb.clone import perturbed
from noisyseg.perturb.laws import MaxGaussian
from noisyseg.perturb.selectors import select
from noisyseg.train.checkpoints import load_model, read_card, save_model


def same(a, b):
    a, b = unwrapped(a).state_dict(), unwrapped(b).state_dict()
    return a.keys() == b.keys() and state_digest(a) == state_digest(b)


def written(path, card, tensors):
    "A file with this card; digest and seal fit."
    card = {**card, 'weights': {'sha256': state_digest(tensors)} | card.get('weights', {})}
    safetensors.torch.save_file(tensors, path, metadata={'card': json.dumps(card)})
    return path


# --- wrappers -------------------------------------------------------------------------------------------------------

def eager(m): return torch.compile(m, backend='eager')

WRAPPERS = {'compiled': eager, 'data parallel': nn.DataParallel, 'SWA': AveragedModel,
            'EMA': lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
            'compiled in data parallel': lambda m: nn.DataParallel(eager(m)),
            'EMA of compiled': lambda m: AveragedModel(eager(m)), 'activation checkpointing': checkpoint_wrapper}

@pytest.mark.parametrize('wrapper', WRAPPERS)
def test_a_wrapper_changes_no_name(tmp_path, wrapper):
    "Selected, perturbed, saved and loaded as the network inside; loaded into a wrapped one, too"
    net = unet3plus_tiny(3)
    wrapped = WRAPPERS[wrapper](net)
    assert [s.name for s in select(wrapped)] == [s.name for s in select(net)]
    assert select(wrapped, 'decoder.*.weight')
    path = save_model(wrapped, tmp_path/'net')
    assert read_card(path)['architecture']['factory'] == 'unet3plus_tiny'
    assert same(load_model(path), wrapped)
    other = WRAPPERS[wrapper](unet3plus_tiny(3))
    assert load_model(path, other) is other and same(other, net)
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        clean = wrapped.eval()(x)
        with perturbed(wrapped, MaxGaussian(0.2), generator=0):
            noisy = wrapped(x)
        assert not torch.equal(noisy, clean) and torch.equal(wrapped(x), clean)

def test_a_wrapped_part_changes_no_name(tmp_path):
    net = nn.Sequential(eager(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))), nn.Conv2d(4, 2, 1))
    plain = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.Conv2d(4, 2, 1))
    assert [s.name for s in select(net)] == [s.name for s in select(plain)]
    load_model(save_model(net, tmp_path/'net'), plain)
    assert torch.equal(plain[0][0].weight, net[0]._orig_mod[0].weight) and torch.equal(plain[1].weight, net[1].weight)
    load_model(tmp_path/'net', net)
    assert plain_name(net, '0._orig_mod.0.weight') == '0.0.weight'

def test_a_checkpointed_part_is_found_by_its_name():
    net = nn.Sequential(checkpoint_wrapper(nn.Conv2d(3, 4, 3)), nn.Conv2d(4, 2, 1))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert [s.name for s in select(net, '0.weight')] == ['0.weight']

FSDP = '''
import os, sys, torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from noisyseg.perturb.clone import perturbed
from noisyseg.perturb.laws import MaxGaussian
from noisyseg.train.checkpoints import load_model, save_model
dist.init_process_group('gloo')
make = lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3))
path = save_model(make(), sys.argv[1])
model = make()
fully_shard(model, mesh=init_device_mesh('cpu', (1,)))
def perturb():
    with perturbed(model, MaxGaussian(0.1), generator=0): pass
for f in (perturb, lambda: save_model(model, sys.argv[1]), lambda: load_model(path, model)):
    try: f()
    except ValueError as e: assert '0.weight is a shard' in str(e), e
    else: raise SystemExit('a shard was taken for a weight')
ddp = nn.parallel.DistributedDataParallel(make())
with perturbed(ddp, MaxGaussian(0.1), generator=0): pass
load_model(save_model(ddp, sys.argv[1]), make())
dist.destroy_process_group()
'''

def test_shards_are_refused_and_ddp_is_unwrapped(server, tmp_path):
    [(code, said)] = server.script(FSDP, tmp_path, *ranks(1), args=[tmp_path/'net'])
    assert code == 0, said


# --- extra state, dtypes, ties --------------------------------------------------------------------------------------

class Extra(nn.Conv2d):
    "A layer that keeps something of its own."
    def __init__(self, *args, extra=None):
        super().__init__(*args)
        self.extra = extra
    def get_extra_state(self): return self.extra
    def set_extra_state(self, state): self.extra = state

EXTRAS = [None, 3, 'text', {'is': 'tensor', 'of': 'x'}, {1: [2., (3, None)], 'a': {'b': []}}, [0.5] * 20,
          float('inf'), True, {'_extra_state': {'0': 1}}]

@pytest.mark.parametrize('extra', EXTRAS, ids=str)
def test_extra_state_comes_back(tmp_path, extra):
    path = save_model(nn.Sequential(Extra(3, 4, 1, extra=extra)), tmp_path/'net', half=True)
    net = load_model(path, nn.Sequential(Extra(3, 4, 1, extra='other')))
    assert net[0].extra == extra and type(net[0].extra) is type(extra)

def test_extra_state_of_tensors_keeps_their_dtype(tmp_path):
    extra = {'scale': torch.tensor([1e30, torch.inf]), 'n': torch.tensor(3), 'a': np.arange(3)}
    path = save_model(nn.Sequential(Extra(3, 4, 1, extra=extra)), tmp_path/'net', half=True)
    back = load_model(path, nn.Sequential(Extra(3, 4, 1)))[0].extra
    assert torch.equal(back['scale'], extra['scale'])
    assert back['n'].dtype == torch.int64 and list(back['a']) == [0, 1, 2]

@pytest.mark.parametrize('extra', [io.BytesIO(b'x'), object(), {1, 2}, torch.float32, len],
                         ids=lambda o: type(o).__name__)
def test_extra_state_that_would_need_pickle_is_refused(tmp_path, extra):
    with pytest.raises(TypeError, match=r'0\._extra_state cannot be saved without pickle.*get_extra_state\(\) return'):
        save_model(nn.Sequential(Extra(3, 4, 1, extra=extra)), tmp_path/'net')
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_a_network_of_another_precision_comes_back_in_it(tmp_path, dtype):
    net = unet3plus_tiny(3).to(dtype)
    path = save_model(net, tmp_path/'net')
    assert same(load_model(path), net)
    with pytest.raises(ValueError, match=rf'does not fit.*load_model\(path, model.to\({dtype}\)\)'):
        load_model(path, unet3plus_tiny(3))
    assert same(load_model(path, unet3plus_tiny(3).to(dtype)), net)

@pytest.mark.parametrize('dtype', [torch.int8, torch.int64, torch.complex64, torch.bool])
def test_weights_that_are_no_floating_point_numbers_are_refused(tmp_path, dtype):
    net = unet3plus_tiny(3)
    tensors = {k: v.clone().to(dtype) if k == 'heads.0.weight' else v.clone() for k, v in net.state_dict().items()}
    path = written(tmp_path/'a.safetensors', {'architecture': net.recipe}, tensors)
    for model in (None, net):
        with pytest.raises(ValueError, match=r'does not fit.*heads.0.weight .*`save_model\(model, path\)`'):
            load_model(path, model)

def test_counts_in_buffers_are_kept(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    net(torch.rand(2, 3, 4, 4))
    back = load_model(save_model(net, tmp_path/'net', half=True), nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    assert back[1].num_batches_tracked == 1

def test_half_precision_does_not_make_infinities(tmp_path):
    net = nn.Linear(2, 2)
    with torch.no_grad(): net.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r'weight has numbers over 65504.*half=False'):
        save_model(net, tmp_path/'net', half=True)
    with torch.no_grad(): net.weight[0, 0] = torch.inf
    assert load_model(save_model(net, tmp_path/'net', half=True), nn.Linear(2, 2)).weight[0, 0] == torch.inf

def test_tied_weights(tmp_path):
    def tied():
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        net[1].weight = net[0].weight
        return net
    a, loose = tied(), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad(): a[0].weight[0, 0] = torch.nan
    back = load_model(save_model(a, tmp_path/'net'), tied())
    assert back[0].weight is back[1].weight and torch.equal(back[0].weight, a[0].weight) is False   # nan
    assert state_digest(back.state_dict()) == state_digest(a.state_dict())
    path = save_model(loose, tmp_path/'loose')
    with pytest.raises(ValueError, match='0.weight and 1.weight are one weight here') as e: load_model(path, tied())
    model = tied()
    exec(str(e.value).split('`')[1], {'model': model})
    assert same(load_model(path, model), loose)

def test_a_network_that_computes_something_else_is_not_filled(tmp_path):
    net = with_activation(unet3plus_tiny(3), nn.SiLU).eval()
    path = save_model(net, tmp_path/'net')
    with pytest.raises(ValueError, match=r'factory differ|activation') as e: load_model(path, unet3plus_tiny(3))
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(eval(str(e.value).split('`')[1], {'load_model': load_model})(x), net(x))
    assert same(load_model(path, with_activation(unet3plus_tiny(3, dropout=0.1, decoder='plain'), nn.SiLU)), net)
    with pytest.raises(ValueError, match='args.settings.negative_slope differ'):
        load_model(save_model(with_activation(unet3plus_tiny(3), nn.LeakyReLU, negative_slope=0.1), path),
                   with_activation(unet3plus_tiny(3), nn.LeakyReLU, negative_slope=0.2))

def test_the_line_for_a_network_of_ones_own_names_the_whole_path(tmp_path):
    path = save_model(nn.Linear(2, 2), tmp_path/'net')
    with pytest.raises(ValueError, match='names no architecture') as e: load_model(path)
    assert eval(str(e.value).split('`')[1], {'load_model': load_model, 'model': nn.Linear(2, 2)})

def test_views_of_one_storage_are_saved_as_they_are(tmp_path):
    base = torch.arange(24.)
    net = nn.Module()
    net.a, net.b = nn.Parameter(base[:12].view(3, 4).T), nn.Parameter(base[6:])
    other = nn.Module()
    other.a, other.b = nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(18))
    assert same(load_model(save_model(net, tmp_path/'net'), other), net)

class WithLazy(nn.Module):
    def __init__(self): super().__init__(); self.l = nn.LazyLinear(3)

NO_NUMBERS = {'meta': (lambda: nn.Linear(2, 2, device='meta'), 'weight is on the meta device.*`'),
              'lazy': (WithLazy, r'l.weight has no shape yet.*`model\(x\)`')}

@pytest.mark.parametrize('kind', NO_NUMBERS)
def test_weights_without_numbers_are_neither_saved_nor_filled(tmp_path, kind):
    make, told = NO_NUMBERS[kind]
    with pytest.raises(ValueError, match=told): save_model(make(), tmp_path/'net')
    assert not list(tmp_path.iterdir())
    path = save_model(nn.Linear(2, 2), tmp_path/'full')
    with pytest.raises(ValueError, match=told): load_model(path, make())

def test_sparse_and_quantized_weights_are_refused(tmp_path):
    net = nn.Linear(2, 2)
    net.weight = nn.Parameter(net.weight.detach().to_sparse())
    with pytest.raises(ValueError, match=r'weight is torch.sparse_coo.*to_dense\(\)'): save_model(net, tmp_path/'net')
    net = nn.Module()
    net.register_buffer('q', torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8))
    with pytest.raises(ValueError, match=r'q is torch.qint8.*dequantize\(\)'): save_model(net, tmp_path/'net')


# --- the card -------------------------------------------------------------------------------------------------------

def test_no_card_reaches_the_network(tmp_path, monkeypatch):
    "Every factory, with every argument that a card may name or leave out; and one that connects by itself"
    asked = []
    def spy(*args, **kwargs):
        asked.append(args)
        raise OSError('no network in this test')
    monkeypatch.setattr(socket, 'getaddrinfo', spy)
    monkeypatch.setattr(socket.socket, 'connect', spy)
    monkeypatch.setattr(urllib.request, 'urlopen', spy)
    monkeypatch.setattr(torch.hub, 'urlopen', spy)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setattr(torch.hub, '_hub_dir', None)
    def card_of(factory, args):
        card = {'architecture': {'factory': factory, 'args': args}}
        return written(tmp_path/'m.safetensors', card, {'a': torch.zeros(1)})
    for factory in FACTORIES:
        for args in ({}, {'pretrained': True}, {'pretrained': 'https://x.y/z'}, {'encoder': 'resnet18'},
                     {'encoder': 'hf-hub:some/model'}):
            with pytest.raises(ValueError):
                load_model(card_of(factory, {'n_classes': 2} | args))
    def phoning(n_classes): return spy if urllib.request.build_opener().open('http://127.0.0.1:9/') else None
    monkeypatch.setitem(FACTORIES, 'phoning', phoning)
    with pytest.raises(ValueError, match='offline'):
        load_model(card_of('phoning', {'n_classes': 1}))
    assert not asked

def test_offline_is_for_one_thread_and_ends():
    was = socket.getaddrinfo, socket.socket.connect
    with socket.create_server(('127.0.0.1', 0)) as server:
        address, seen = server.getsockname(), []
        def other():
            with socket.create_connection(address): seen.append(True)
        with offline():
            with pytest.raises(ConnectionError, match='offline'): socket.create_connection(address)
            with offline(): pass
            with pytest.raises(ConnectionError, match='offline'): socket.create_connection(address)
            t = threading.Thread(target=other)
            t.start()
            t.join()
        assert seen and (socket.getaddrinfo, socket.socket.connect) == was
        other()

def test_a_metric_that_is_no_number_does_not_lock_the_file(tmp_path):
    "nan is not equal to itself: card and file must still be known as one another's"
    info = dict(score=float('nan'), n=np.int64(3), where=tmp_path, t=torch.tensor(2.))
    path = save_model(nn.Linear(2, 2), tmp_path/'net', **info)
    card = read_card(path)
    assert (card['score'], card['n'], card['where'], card['t']) == (None, 3, str(tmp_path), 2.)
    load_model(path, nn.Linear(2, 2))
    tensors = {k: v.clone() for k, v in nn.Linear(2, 2).state_dict().items()}
    old = written(tmp_path/'old.safetensors', {'architecture': {}, 'metrics': {'miou': float('nan')}}, tensors)
    old.with_suffix('.json').write_text(json.dumps({'architecture': {}, 'metrics': {'miou': float('nan')},
                                                    'weights': {'sha256': state_digest(tensors)}}))
    load_model(old, nn.Linear(2, 2))

CARDS = [{'architecture': {}}, {'architecture': None}, {'architecture': []}, {'architecture': {'factory': ['a']}},
         {'architecture': {'factory': 'unet3plus_tiny'}}, {'architecture': {'factory': 'unet3plus_tiny', 'args': []}},
         {'architecture': {'factory': 'unet3plus_tiny', 'args': {'n_classes': -1}}},
         {'architecture': {'factory': 'unet3plus_tiny', 'args': {'n_classes': 'x'}}},
         {'architecture': {'factory': 'unet3plus_tiny', 'args': {'n_classes': 10**12}}},
         {'architecture': {'factory': '__class__', 'args': {}}},
         {'architecture': {'factory': 'unet3plus_tiny', 'args': {'n_classes': 3, 'width': None}}},
         {'weights': {'extra_state': {'a': {'is': 'tensor', 'of': 'nowhere'}}}},
         {'weights': {'extra_state': {'a': {'is': 'array', 'of': 'heads.0.bias', 'dtype': 'O', 'shape': [3]}}}},
         {'weights': {'extra_state': [1]}}, {'weights': {'extra_state': {'a': {'is': 'exec', 'of': 'x'}}}},
         {'weights': {'extra_state': {'a': {'is': 'number', 'of': [1], 'dtype': 'O'}}}}]

@pytest.mark.parametrize('card', CARDS, ids=str)
def test_a_card_that_says_nonsense_is_a_ValueError(tmp_path, card):
    net = unet3plus_tiny(3)
    tensors = {k: v.clone() for k, v in net.state_dict().items()}
    card = {'architecture': net.recipe} | card
    path = written(tmp_path/'a.safetensors', card, tensors)
    with pytest.raises(ValueError, match='a.safetensors'): load_model(path)

def test_a_deeply_nested_card_is_a_ValueError(tmp_path):
    tensors = {'weight': torch.zeros(1)}
    safetensors.torch.save_file(tensors, tmp_path/'a.safetensors', metadata={'card': '['*100_000})
    with pytest.raises(ValueError): read_card(tmp_path/'a.safetensors')

@pytest.mark.parametrize('beside', [True, False])
def test_any_change_of_a_file_is_noticed(tmp_path, beside):
    "Bits flipped and ends cut anywhere, header and card included: an error, never another model"
    net = nn.Sequential(Extra(3, 4, 3, extra={'range': torch.ones(3), 'n': 7}), nn.BatchNorm2d(4))
    whole = save_model(net, tmp_path/'net', dataset='scenes')
    card = whole.with_suffix('.json').read_text()
    data = whole.read_bytes()
    dice = random.Random(0)
    path = tmp_path/'broken.safetensors'
    if beside: path.with_suffix('.json').write_text(card)
    make = lambda: nn.Sequential(Extra(3, 4, 3), nn.BatchNorm2d(4))
    numbers = lambda m: state_digest({k: v for k, v in m.state_dict().items() if isinstance(v, torch.Tensor)})
    for i in [*range(0, len(data), 37), *(dice.randrange(len(data)) for _ in range(300))]:
        broken = bytearray(data)
        broken[i] ^= 1 << dice.randrange(8)
        for content in (broken, data[:i]):
            path.write_bytes(content)
            try: found = load_model(path, make())
            except ValueError: continue
            # padding between header and numbers means nothing
            assert numbers(found) == numbers(net) and found.card == json.loads(card), i


# --- files ----------------------------------------------------------------------------------------------------------

def test_a_home_directory_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    assert save_model(nn.Linear(2, 2), '~/net') == tmp_path/'net.safetensors'
    assert read_card('~/net')

def test_threads_that_write_one_file_leave_one_of_theirs(tmp_path):
    texts = [f'{i}' * 200_000 for i in range(4)]
    def write(text):
        for _ in range(20): write_atomic(tmp_path/'a', text)
    threads = [threading.Thread(target=write, args=(t,)) for t in texts]
    for t in threads: t.start()
    for t in threads: t.join()
    assert (tmp_path/'a').read_text() in texts and [p.name for p in tmp_path.iterdir()] == ['a']

@pytest.mark.parametrize('name', ['a', '[x]', 'a*b', 'ä.safetensors'])
def test_parts_of_killed_writers_are_removed_whatever_the_name(tmp_path, name):
    (tmp_path/f'.{name}.1.999999999.part').write_text('')
    (tmp_path/f'.{name}.1.{os.getpid()}.part').write_text('')
    (tmp_path/'.xb.1.999999999.part').write_text('')
    remove_parts(tmp_path/name)
    assert {p.name for p in tmp_path.iterdir()} == {f'.{name}.1.{os.getpid()}.part', '.xb.1.999999999.part'}

def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    write_atomic(tmp_path/'a', 'old')
    with pytest.raises(ZeroDivisionError):
        with whole_file(tmp_path/'a') as f: f.write(b'new') and 1 / 0
    assert (tmp_path/'a').read_text() == 'old' and len(list(tmp_path.iterdir())) == 1

def test_a_copy_of_a_loaded_model_keeps_its_card(tmp_path):
    net = load_model(save_model(unet3plus_tiny(3), tmp_path/'net', who='me'))
    assert copy.deepcopy(net).card['who'] == 'me'
