"""Switched-off blocks beside networks that were built without the branch, and beside the blocks' own code with a
branch of zeros;
what must hold when things go wrong; dropped features; DeepLabV3+ beside its formula."""
import copy
import pickle
import signal
import threading

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import noisyseg.nets.blocks as module
from noisyseg.nets.classifiers import resnet20, resnet18_small
from noisyseg.nets.blocks import BlocksOff, deactivated, draw_blocks, feature_dropout, residual_blocks
from noisyseg.nets.deeplab import deeplabv3plus, dilate
from noisyseg.nets.encoders import PlainEncoder, resnet_encoder
from noisyseg.train.checkpoints import load_model, save_model
from noisyseg.nets.unet3plus import FACTORIES, UNet3Plus, unet3plus_resnet, unet3plus_timm, unet3plus_tiny
from noisyseg.perturb.disturbance import Disturbance


def tv(name, **kw): return lambda: torchvision.models.get_model(name, weights=None, **kw)
def tm(name, **kw): return lambda: timm.create_model(name, **kw)


def short(block, layers, **kw): return lambda: torchvision.models.ResNet(block, layers, num_classes=5, **kw)


Basic, Bottle = torchvision.models.resnet.BasicBlock, torchvision.models.resnet.Bottleneck
NETS = {'resnet18': tv('resnet18'), 'bottlenecks': short(Bottle, [1, 2, 1, 1]),
        'resnext': short(Bottle, [1, 2, 1, 1], groups=32, width_per_group=4),
        'wide': short(Bottle, [1, 2, 1, 1], width_per_group=80),
        'dilated': short(Bottle, [1, 1, 2, 1], replace_stride_with_dilation=[False, True, True]),
        'group norm': short(Basic, [2, 1, 1, 1], norm_layer=lambda c: nn.GroupNorm(8, c)),
        'timm resnet18': tm('resnet18'), 'timm resnet26': tm('resnet26'),
        'resnet18d': tm('resnet18d'), 'resnet26d': tm('resnet26d'), 'timm dilated': tm('resnet18d', output_stride=8),
        'drop path': tm('resnet18', drop_path_rate=0.5), 'squeeze': tm('seresnet18'), 'selective': tm('skresnet18'),
        'resnest': tm('resnest14d'),
        'resnet20': resnet20, 'resnet18_small': lambda: resnet18_small(width=8)}


def lively(net):
    "No norm is to be the identity, and no output all zeros"
    torch.manual_seed(0)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias)
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    return net


def kinds(net):
    "One block of each kind: with and without a convolution in the shortcut"
    return {type(b.downsample): name for name, (b,) in residual_blocks(net).items()}.values()


def built_without(net, name):
    twin = copy.deepcopy(net)
    parent, _, last = name.rpartition('.')
    block = twin.get_submodule(name)
    twin.get_submodule(parent)[int(last)] = nn.Sequential(block.downsample or nn.Identity(), nn.ReLU())
    return twin


@pytest.mark.parametrize('make', NETS.values(), ids=NETS)
def test_off_is_a_network_built_without_the_branch(make):
    net, x = lively(make()), torch.randn(2, 3, 32, 48)
    before = copy.deepcopy(net.state_dict())
    for training, name in ((t, n) for n in kinds(net) for t in (True, False)):
        twin = built_without(net.train(training), name)
        torch.manual_seed(1)   # dropped paths elsewhere
        with deactivated(net, name, batch_norm='update'): out = net(x)
        torch.manual_seed(1)
        want = twin(x)
        assert torch.equal(out, want)
        net.zero_grad()
        out.square().mean().backward()
        want.square().mean().backward()
        theirs = dict(twin.named_parameters())
        for k, p in net.named_parameters():
            k = k.replace(f'{name}.downsample', f'{name}.0')
            if k in theirs: assert torch.equal(p.grad, theirs[k].grad), k
            else: assert p.grad is None and k.startswith(f'{name}.'), k
        theirs = twin.state_dict()   # running statistics move as in that network, and the branch's own stay
        for k, v in net.state_dict().items():
            assert torch.equal(v, theirs.get(k.replace(f'{name}.downsample', f'{name}.0'), before[k])), k
        net.load_state_dict(before)


@pytest.mark.parametrize('make', NETS.values(), ids=NETS)
def test_off_is_the_block_with_a_branch_of_zeros(make):
    "The block's own code, its last layer with weights answering zero"
    net, x, seen = lively(make()).eval(), torch.randn(2, 3, 32, 48), []
    for name in kinds(net):
        block = net.get_submodule(name)
        last = next(m for m in (getattr(block, n, None) for n in ('bn3', 'bn2', 'conv3', 'conv2')) if m is not None
                    and not isinstance(m, nn.Identity))
        hooks = [block.register_forward_hook(lambda m, i, o: seen.append(o.clone())),
                 last.register_forward_hook(lambda m, i, o: torch.zeros_like(o))]
        with torch.no_grad():
            net(x)
            with deactivated(net, name): net(x)   # hooks of the block still see it
        for h in hooks: h.remove()
        assert len(seen) == 2 and torch.equal(*seen) and seen.pop() is not seen.pop()


ADDING = {'efficientnet lite': (tm('tf_efficientnet_lite0'), 'bn3'), 'convnext': (tm('convnext_atto'), 'drop_path'),
          'pvt': (tm('pvt_v2_b0'), 'drop_path1', 'drop_path2'),
          'swin': (tm('swin_tiny_patch4_window7_224', img_size=64), 'drop_path1', 'drop_path2'),
          'mobilenet': (tv('mobilenet_v3_small'), 'block'), 'efficientnet': (tv('efficientnet_b0'), 'stochastic_depth'),
          'torchvision convnext': (tv('convnext_tiny'), 'stochastic_depth')}


@pytest.mark.parametrize('make, last', [(m, last) for m, *last in ADDING.values()], ids=ADDING)
def test_off_lets_the_input_through(make, last):
    "Inverted bottlenecks, ConvNeXt's and transformers' blocks, whose sum gets no activation: as with a branch of zeros"
    net, x, seen = make().eval(), torch.randn(1, 3, 64, 64), []
    blocks = residual_blocks(net)
    for name in (list(blocks)[0], list(blocks)[-1]):
        block = blocks[name][0]
        hooks = [block.register_forward_hook(lambda m, i, o: seen.append((i[0].clone(), o.clone())))]
        hooks += [getattr(block, n).register_forward_hook(lambda m, i, o: torch.zeros_like(o)) for n in last]
        with torch.no_grad():
            want = net(x)
            with deactivated(net, name): got = net(x)
        for h in hooks: h.remove()
        assert torch.equal(got, want) and all(torch.equal(a, b) for a, b in seen)
    assert not torch.equal(net(x), want)


@pytest.mark.parametrize('name, n', [('tf_efficientnet_lite0', 9), ('resnet18', 8), ('convnext_atto', 12)])
def test_blocks_of_a_timm_encoder_under_unet3plus(name, n):
    "Found, switched off as a disturbance, dropped features beside clean ones"
    net = lively(unet3plus_timm(5, width=4, encoder=name, deep_supervision=False)).eval()
    assert len(residual_blocks(net)) == n and net.recipe['args']['encoder'] == name
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        whole = net(x)
        with BlocksOff(2).acting(net, generator=0) as off: assert len(off) == 2 and not torch.equal(net(x), whole)
        with feature_dropout(net, generator=0): assert net(x).shape == (4, 5, 64, 64)
        assert torch.equal(net(x), whole)


def test_channels_that_come_last_are_dropped_as_channels():
    "Swin's maps: whole channels, also where they stand at the end"
    encoder = timm.create_model('swin_tiny_patch4_window7_224', img_size=64, features_only=True).eval()
    with torch.no_grad(), feature_dropout(encoder, generator=0, beside=False): maps = encoder(torch.randn(2, 3, 64, 64))
    for m in maps:
        gone = (m == 0).all((1, 2))
        assert gone.shape == (2, m.shape[-1]) and 0.3 < gone.float().mean() < 0.7
        assert ((m == 0).float().mean((1, 2)) == gone.float()).float().mean() > 0.99


def test_blocks_off_is_a_disturbance():
    "One draw is one order of the blocks; nothing at level 0; as plain data and back; no more than there are"
    net = resnet20()
    def off(n, seed): return BlocksOff(n).acting(net, generator=seed).names
    assert off(3, 0) == off(5, 0)[:3] and off(9, 0) != off(9, 1) and set(off(9, 0)) == set(residual_blocks(net))
    assert off(0, 0) == [] and Disturbance.from_dict(BlocksOff(2).to_dict()) == BlocksOff(2)
    with pytest.raises(ValueError, match='9 residual blocks'): BlocksOff(10).acting(net)


def small(encoder='resnet18', **kw): return lambda: unet3plus_resnet(5, width=4, encoder=encoder, **kw)
def deep(encoder='resnet18', **kw): return lambda: deeplabv3plus(5, encoder=encoder, **kw)


@pytest.mark.parametrize('make', [small(), small('resnet50', decoder='plain'), deep(),
                                  deep('resnet50', output_stride=8)])
def test_no_fast_way_around(make):
    "Without autograd our encoders run in another memory layout"
    net, x = lively(make()).eval(), torch.randn(1, 3, 33, 47)
    for name in kinds(net):
        twin = built_without(net.encoder, name)
        with torch.no_grad(), deactivated(net, name): out, maps = net(x), net.encoder(x)
        with torch.inference_mode(), deactivated(net, name): assert torch.equal(net(x), out)
        with torch.no_grad(): whole, theirs = net.encoder(x), twin._maps(x)
        for m, w in zip(maps, theirs): torch.testing.assert_close(m, w, rtol=1e-4, atol=1e-5 * w.abs().max().item())
        assert not torch.allclose(maps[-1], whole[-1])
        with deactivated(net, name):
            torch.testing.assert_close(net(x), out, rtol=1e-3, atol=1e-4 * out.abs().max().item())


@pytest.fixture
def net():
    yield lively(unet3plus_resnet(5, width=4, encoder='resnet18', deep_supervision=False))
    assert not module._changed


def state(net):
    return [(n, type(m), m.training, dict(m._forward_hooks), sorted(vars(m))) for n,
            m in net.named_modules()], list(net.state_dict())


X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_nothing_stays_after_an_exception(net, error):
    before, weights, ids = state(net.eval()), copy.deepcopy(net.state_dict()), [(id(p), p.data_ptr())
            for p in net.parameters()]
    for make in (lambda: deactivated(net, generator=0), lambda: feature_dropout(net)):
        with pytest.raises(error), make():
            net(X)
            raise error
        assert state(net) == before and [(id(p), p.data_ptr()) for p in net.parameters()] == ids
        assert all(torch.equal(v, weights[k]) for k, v in net.state_dict().items())
    pickle.loads(pickle.dumps(net))
    copy.deepcopy(net)


@pytest.mark.parametrize('when', ['entering', 'leaving'])
def test_ctrl_c_waits_while_it_is_half_done(net, monkeypatch, when):
    wear, calls, before = module._wear, [], state(net)
    def pressed(m):
        calls.append(m)
        if len(calls) == (2 if when == 'entering' else 4): signal.raise_signal(signal.SIGINT)
        wear(m)
    monkeypatch.setattr(module, '_wear', pressed)
    inside = False
    with pytest.raises(KeyboardInterrupt), deactivated(net, ['layer1.0', 'layer2.0', 'layer3.0']): inside = True
    assert inside == (when == 'leaving') and state(net) == before and len(calls) == 6
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_another_signals_exception_while_leaving(net, monkeypatch):
    wear, before, late = module._wear, state(net), [TimeoutError('now')]
    def slow(m):
        if type(m).forward is module._shortcut_only and late: raise late.pop()
        wear(m)
    with pytest.raises(TimeoutError, match='now'), deactivated(net, [0, 1]): monkeypatch.setattr(module, '_wear', slow)
    assert state(net) == before


def test_nested_in_any_order(net):
    net.eval()
    def alone(*names):
        with deactivated(net, names): return net(X)
    both, first, clean = alone('layer2.0', 'layer3.1'), alone('layer2.0'), net(X)
    a, b, c = deactivated(net, 'layer2.0'), deactivated(net, ['layer2.0', 'layer3.1']), deactivated(net, 'layer2',
            unit='stage')
    a.__enter__(), b.__enter__()
    assert torch.equal(net(X), both)
    a.__exit__(), c.__enter__(), b.__exit__(), c.__exit__()
    assert torch.equal(net(X), clean)
    with deactivated(net, 'layer2.0'), deactivated(net, 'layer2.0'): assert torch.equal(net(X), first)
    assert torch.equal(net(X), clean)
    with a: assert torch.equal(net(X), first)   # a context can be used again
    def elsewhere():
        with deactivated(net, 'layer3.1'): done.append(net(X))
    done = []
    with deactivated(net, 'layer2.0'):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert torch.equal(done[0], both) and torch.equal(net(X), first)


def test_autocast_and_copies(net):
    net.eval()
    twin = copy.deepcopy(net)
    twin.encoder = built_without(net.encoder, 'layer3.0')
    with torch.autocast('cpu', dtype=torch.bfloat16):
        first = net(X)
        with deactivated(net, 'layer3.0'):
            assert torch.equal(net(X), twin(X))
            inside = copy.deepcopy(net)
        assert torch.equal(net(X), first)
    assert torch.equal(inside(X), twin(X)) and list(inside.state_dict()) == list(net.state_dict())


def test_wrapped_and_compiled(net, tmp_path):
    net.eval()
    with deactivated(net, 'layer2.0'): off = net(X)
    with feature_dropout(net, generator=0): dropped = net(X)
    compiled = torch.compile(net.encoder, backend='eager')
    clean, whole = compiled(X)[-1], net.encoder(X)[-1]
    with deactivated(compiled, 'layer2.0'): torch.testing.assert_close(compiled(X), net.encoder(X))
    assert torch.equal(compiled(X)[-1], clean)
    torch.testing.assert_close(clean, whole)
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/meet', rank=0, world_size=1)
    try:
        ddp = DistributedDataParallel(net, find_unused_parameters=True)
        with deactivated(ddp, 'layer2.0'): assert torch.equal(ddp(X), off)
        with feature_dropout(ddp, generator=0): assert torch.equal(ddp(X), dropped)
        assert list(residual_blocks(ddp)) == list(residual_blocks(net))
        net.train()
        with deactivated(ddp, 'layer2.0'): ddp(X).square().mean().backward()
        # nor has a bias before a batch norm, and the decoder's branches do not even round it
        still = {n for n, p in ddp.named_parameters() if p.grad is None or not p.grad.any()}
        assert still == {n for n, _ in ddp.named_parameters() if ('layer2.0' in n and 'downsample' not in n)
                         or ('branches' in n and n.endswith('conv.bias'))}
    finally: torch.distributed.destroy_process_group()


@pytest.mark.parametrize('make', [small(), deep()], ids=['unet3plus', 'deeplab'])
def test_batch_norm(make):
    net = lively(make()).train()
    before = copy.deepcopy(net.state_dict())
    def loss(): return sum(o.square().mean() for o in ([out] if torch.is_tensor(out) else out))
    with deactivated(net, 'layer2.0', batch_norm='update'): out = net(X)
    moved = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert {f'encoder.layer3.0.bn1.{k}' for k in ('running_mean', 'running_var', 'num_batches_tracked')} <= moved
    assert all('running' in k or 'tracked' in k for k in moved) and not any('layer2.0.bn' in k for k in moved)
    assert any(not k.startswith('encoder') for k in moved)
    loss().backward()
    grads = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    net.load_state_dict(before)
    net.zero_grad()
    with deactivated(net, 'layer2.0'): out = net(X)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    loss().backward()   # after the statistics were put back
    for p, g in zip(net.parameters(), grads): assert (p.grad is None and g is None) or torch.equal(p.grad, g)
    net.eval()
    with deactivated(net, 'layer2.0'): out = net(X)
    loss().backward()
    assert all(m.training is False for m in net.modules())


def test_counts():
    for name, n in (('resnet18', 8), ('resnet34', 16), ('resnet50', 16), ('resnet101', 33)):
        with torch.device('meta'):
            nets = [torchvision.models.get_model(name), timm.create_model(name), resnet_encoder(name)]
        for net in nets:
            assert len(residual_blocks(net)) == n and list(residual_blocks(net, 'stage')) == ['layer1', 'layer2',
                    'layer3', 'layer4']


def test_draws(net):
    for unit, p in (('block', 0.25), ('stage', 0.5), ('stage', 0.), ('stage', 1.)):
        g, again = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
        drawn = [draw_blocks(net, unit, p, g) for _ in range(200)]
        for names in drawn[:5]:
            with deactivated(net, unit=unit, p=p, generator=again) as off: assert off == names
        assert {len(d) for d in drawn} == ({1} if unit == 'block' else {0} if p == 0 else {4} if p == 1
                                           else {0, 1, 2, 3, 4})
        assert {n for d in drawn for n in d} == (set() if p == 0 else set(residual_blocks(net, unit)))
    torch.manual_seed(4)
    one = draw_blocks(net)
    torch.manual_seed(4)
    assert draw_blocks(net) == one
    g = torch.Generator().manual_seed(0)
    for n in (2, 5, 8):
        several = [draw_blocks(net, generator=g, n=n) for _ in range(100)]
        assert all(len(set(names)) == n for names in several)
        assert {name for names in several for name in names} == set(residual_blocks(net))
    assert draw_blocks(net, generator=3, n=4)[:2] == draw_blocks(net, generator=3, n=2)
    with pytest.raises(ValueError, match='at most the 8 blocks that there are, got 9'): draw_blocks(net, n=9)
    with deactivated(net, []) as off: assert off == []


def test_what_has_no_residual_blocks_says_so(net):
    for other in (unet3plus_tiny(3), PlainEncoder(), timm.create_model('resnetv2_18'), nn.Conv2d(3, 3, 3),
                  torchvision.models.feature_extraction.create_feature_extractor(torchvision.models.resnet18(),
            ['layer4'])):
        with pytest.raises(ValueError, match='has no residual blocks to switch off. ResNets have'): deactivated(other)
    with pytest.raises(TypeError, match='expected a torch.nn.Module, got str'): residual_blocks('resnet18')
    for block in ('layer5.0', 'layer1', 8, -1, True, 1., None.__class__):
        with pytest.raises(ValueError, match='there is no block .*: give a name or an index from 0 to 7, of layer1.0'):
            deactivated(net, [block])
    for p in (-0.1, 1.1, '0.25', True):
        with pytest.raises((ValueError, TypeError), match='p: expected a number from 0 to 1'): draw_blocks(net, p=p)
    with pytest.raises(TypeError, match='generator='): draw_blocks(net, generator='seven')
    with pytest.raises(ValueError, match="'block' or 'stage'"): deactivated(net, unit='layer')


class Given(nn.Module):
    "An encoder whose maps are given"
    def __init__(self, maps): super().__init__(); self.maps = maps
    def forward(self, x): return self.maps


@pytest.mark.parametrize('training', [True, False], ids=['training', 'evaluation'])
@pytest.mark.parametrize('make', [small(), small(decoder='plain'), lambda: unet3plus_tiny(5),
                                  lambda: unet3plus_tiny(5, upsample='after', checkpoint=True), deep()],
                         ids=['fast', 'plain', 'tiny', 'checkpointed', 'deeplab'])
def test_dropped_features_are_decoded_beside_clean_ones(make, training):
    net = lively(make()).train(training)
    before = state(net)
    by_hand = copy.deepcopy(net)
    maps = by_hand.encoder(X)
    torch.manual_seed(3)
    by_hand.encoder = Given([torch.cat([m, F.dropout2d(m, 0.5)]) for m in maps])
    with feature_dropout(net, generator=torch.Generator().manual_seed(3)): out = net(X)
    outs, wants = ([o] if torch.is_tensor(o) else o for o in (out, by_hand(X)))
    for o, w in zip(outs, wants):
        assert o.shape == (4, 5, 32, 32)
        torch.testing.assert_close(o, w, rtol=1e-4, atol=1e-5 * w.abs().max().item())
    def gradients(n, outs):
        decoder = n.decoder if hasattr(n, 'decoder') else n.fuse
        return torch.autograd.grad(sum(o[2:].square().mean() for o in outs), list(decoder.parameters()))
    for a, b in zip(gradients(net, outs), gradients(by_hand, wants)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())
    if not training: torch.testing.assert_close(outs[0][:2], net(X), rtol=1e-4, atol=1e-5 * outs[0].abs().max().item())
    assert state(net) == before and not module._changed


def test_dropping_from_other_encoders():
    from torchvision.models._utils import IntermediateLayerGetter
    layers = {f'layer{i}': str(i) for i in range(1, 5)}
    for encoder in (timm.create_model('resnet18', features_only=True),
                    IntermediateLayerGetter(torchvision.models.resnet18(), layers)):
        net = lively(UNet3Plus(encoder, 5, width=4, cgm=True)).eval()
        with feature_dropout(net, generator=0), feature_dropout(net, p=0., generator=1):
            assert net(X).shape == (8, 5, 32, 32)
        with feature_dropout(net, generator=0, beside=False): assert net(X).shape == (2, 5, 32, 32)
        with deactivated(net, 3) as names: assert names == ['layer2.1'] and net(X).shape == (2, 5, 32, 32)
    maps = (torch.ones(64, 50, 3, 3), torch.ones(64, 7, 1, 1))
    with feature_dropout(given := Given(maps), p=0.2, generator=0, beside=False): dropped = given(None)
    assert isinstance(dropped, tuple)
    for d in dropped:
        assert set(d.unique().tolist()) == {0., 1.25} and (d == d[..., :1, :1]).all()   # whole channels
        assert abs((d > 0).float().mean() - 0.8) < 0.05
    for p in (1, -0.1, True, '0.5'):
        with pytest.raises((ValueError, TypeError), match='p: expected a number from 0 to 0.999'):
            feature_dropout(given, p=p)
    with pytest.raises(ValueError, match=r'tensor of shape \(2, 10\): pass the encoder'), feature_dropout(
            net := resnet20()):
        net(X)


def deeplab_formula(w, x, maps, rates):
    "The decoder of DeepLabV3+ in evaluation mode, from its paper: w holds its weights by name, maps are the encoder's"
    def conv(x, name, rate=1):
        k = w[f'{name}.0.weight']
        x, n = F.conv2d(x, k, padding=rate * (k.shape[-1] // 2), dilation=rate), f'{name}.1.'
        x = (x - w[n + 'running_mean'][:, None, None]) / (w[n + 'running_var'] + 1e-5).sqrt()[:, None, None]
        return (x * w[n + 'weight'][:, None, None] + w[n + 'bias'][:, None, None]).relu()
    def resized(x, size): return F.interpolate(x, size=size, mode='bilinear', align_corners=False)
    deep, fine = maps[-1], maps[1]
    # its first layer is the mean
    w |= {k.replace('convs.4.1.', 'convs.4.0.').replace('convs.4.2.', 'convs.4.1.'): v for k, v in w.items()
          if 'convs.4' in k}
    pyramid = [conv(deep, 'pyramid.convs.0')] + [conv(deep, f'pyramid.convs.{i + 1}', r) for i, r in enumerate(rates)]
    pyramid += [conv(deep.mean((2, 3), keepdim=True), 'pyramid.convs.4').expand_as(pyramid[0])]
    deep = resized(conv(torch.cat(pyramid, 1), 'pyramid.project'), fine.shape[-2:])
    y = conv(conv(torch.cat([conv(fine, 'reduce'), deep], 1), 'fuse.0'), 'fuse.1')
    return resized(F.conv2d(y, w['head.weight'], w['head.bias']), x.shape[-2:])


@pytest.mark.parametrize('stride', [8, 16, 32])
@pytest.mark.parametrize('encoder', ['resnet18', 'resnet50'])
@torch.no_grad()
def test_deeplab_beside_its_formula(encoder, stride):
    net = lively(deeplabv3plus(3, encoder=encoder, output_stride=stride)).eval()
    for size in ((97, 131), (64, 64), (33, 20)):
        x = torch.randn(1, 3, *size)
        maps = net.encoder(x)
        for s, m in zip((2, 4, 8, 16, 32), maps):
            assert m.shape[2:] == tuple(-(-side // min(s, stride)) for side in size)
        want = deeplab_formula(net.state_dict(), x, maps, {8: (12, 24, 36), 16: (6, 12, 18), 32: (3, 6, 9)}[stride])
        out = net(x)
        assert out.shape == (1, 3, *size)
        torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize('name, stride', [('resnet34', 16), ('resnet18', 8), ('resnext50_32x4d', 8)])
@torch.no_grad()
def test_dilation_keeps_what_the_weights_meant(name, stride):
    "Where the coarse map has a pixel, the fine one has the same"
    coarse, x = lively(resnet_encoder(name)).eval(), torch.randn(1, 3, 97, 64)
    fine = dilate(copy.deepcopy(coarse), stride)
    for a, b in zip(coarse(x), fine(x)):
        step = -(-b.shape[2] // a.shape[2])
        torch.testing.assert_close(b[:, :, ::step, ::step], a, rtol=1e-4, atol=1e-5 * a.abs().max().item())


@pytest.mark.parametrize('name, millions', [('resnet18', 11.18), ('resnet34', 21.28), ('resnet50', 23.51),
                                            ('resnet101', 42.50)])
def test_deeplab_keeps_its_encoders_weights(name, millions, tmp_path):
    net, plain = deeplabv3plus(4, in_channels=1, encoder=name), resnet_encoder(name, 1)
    assert {k: v.shape for k, v in net.encoder.state_dict().items()} == {k: v.shape for k,
            v in plain.state_dict().items()}
    assert abs(sum(p.numel() for p in resnet_encoder(name).parameters()) / 1e6 - millions) < 0.01
    assert FACTORIES['deeplabv3plus'] is deeplabv3plus
    x = torch.randn(2, 1, 40, 56)
    if name == 'resnet18':
        again = load_model(save_model(net, tmp_path / 'net'))
        with torch.no_grad(): assert torch.equal(again(x), net.eval()(x))
    with pytest.raises(ValueError, match='dilated already'): dilate(net.encoder)
    with pytest.raises(ValueError, match='8, 16 or 32'): dilate(plain, 4)
    with pytest.raises(ValueError, match=r'images \(batch, 1, height, width\), got torch.float32 of shape \(2, 3'):
        net(torch.zeros(2, 3, 40, 56))
    with pytest.raises(ValueError, match='at least 2 images'): net.train()(x[:1])
