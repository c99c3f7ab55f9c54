"""UNet3+ with its fast decoder (taps, Winograd, batch norm with channels last) beside the plain one.

Time, rounding errors, memory; and its parts.

Both decoders run the same weights on the same images; first their outputs, or gradients, are compared.
"""
import copy
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_timing import agreement, close, row, skipped
from torch import nn

from noisyseg.nets.fast.bnrelu import batch_norm_relu
from noisyseg.nets.unet3plus import unet3plus_paper, unet3plus_resnet34, unet3plus_small, unet3plus_tiny
from noisyseg.nets.fast.upconv import conv_of_concatenated, conv_of_upsampled, taps_win
from noisyseg.nets.fast.winograd import winograd_conv, winograd_wins

NETS = {'ResNet34': lambda: unet3plus_resnet34(21, pretrained=False), "paper's encoder": lambda: unet3plus_paper(21),
        'tiny, width 32': lambda: unet3plus_tiny(7, width=32, deep_supervision=False),
        'small': lambda: unet3plus_small(7),
        "small, 'after'": lambda: unet3plus_small(7, upsample='after', deep_supervision=False)}
# network, pixels, batch, training, in quick mode too, the most that the ratio should be (or, of the tiny one, the
# milliseconds)
CASES = [
    ("small, 'after'", 96, 16, False, True, 1/1.5), ("small, 'after'", 96, 16, True, True, 1/1.5),
    ('ResNet34', 256, 1, False, True, 1/2.3), ('ResNet34', 256, 1, True, True, 1/2.3),
    ('ResNet34', 256, 4, False, False, 1/2.3), ('ResNet34', 256, 4, True, False, 1/2.3),
    ('ResNet34', 128, 4, True, False, None),
    ("paper's encoder", 256, 1, False, False, 1/3), ("paper's encoder", 256, 1, True, False, 1/2.5),
    ("paper's encoder", 128, 1, True, False, None),
    ('tiny, width 32', 128, 1, False, False, 45), ('small', 128, 4, True, False, None)]


def step(model, x, cast=None):
    "A forward pass, in training with backward."
    with torch.autocast(x.device.type, cast) if cast else nullcontext():
        if not model.training:
            with torch.no_grad(): return model(x)
        out = model(x)
    sum(o.float().square().mean() for o in (out if isinstance(out, list) else [out])).backward()
    grads = [p.grad for p in model.parameters()]
    for p in model.parameters(): p.grad = None
    return grads

def pair(net, train, plan):
    torch.manual_seed(0)
    plain = NETS[net]().to(plan.device).train(train).set_decoder('plain')
    return {'plain': plain, 'fast': copy.deepcopy(plain).set_decoder('fast')}

def length(tensors): return torch.cat([t.double().flatten() for t in tensors]).norm()

def same(models, x):
    "The same logits to within rounding, or (in training) gradients: there batch norm makes more of rounding."
    plain, fast = (step(models[k], x) for k in ('plain', 'fast'))
    # a GPU multiplies with ten bits (TF32)
    if not models['fast'].training: return close(fast, plain, 1e-2 if x.is_cuda else 1e-4, 'logits')
    error = length([a - b for a, b in zip(fast, plain)]) / length(plain)
    assert error < (1e-1 if x.is_cuda else 1e-2), f'gradients differ by {error:.1e}'
    return float(error)

def rounding(models, x, where):
    "Errors of both decoders, root of the mean square, against float64."
    exact = step(copy.deepcopy(models['plain']).double(), x.double())
    plain, fast = ((length([step(models[k], x) - exact]) / length([exact])).item() for k in ('plain', 'fast'))
    return row('rounding error in evaluation', where, fast, 'plain decoder', plain, unit='of the logits',
               note='root mean square, against float64')

def status(what):
    ("This process's memory in kB, now (VmRSS) or at its peak (VmHWM). Not ru_maxrss: that begins with the peak of the "
     "process that started this one.")
    return next(int(line.split()[1]) for line in Path('/proc/self/status').read_text().splitlines()
                if line.startswith(what))

def memory(net, size, batch, way, device):
    "The most memory that one training step adds, in MB. On a CPU, for a process that does nothing else."
    model = NETS[net]().to(device).train().set_decoder('plain' if way == 'plain' else 'fast')
    model.checkpoint = way == 'checkpoint'
    x = torch.randn(batch, 3, size, size, device=device)
    if device == 'cpu':
        before = status('VmRSS')
        step(model, x)
        return (status('VmHWM') - before) / 1024
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(model, x)
    return (torch.cuda.max_memory_allocated() - before) / 2**20

def in_own_process(*args):
    out = subprocess.run([sys.executable, __file__, *map(str, args)], stdout=subprocess.PIPE, text=True,
                         check=True).stdout
    return float(out.split()[-1])

def decoder(plan):
    for net, size, batch, train, quick, target in CASES:
        if not (plan.full or quick): continue
        x, models = torch.randn(batch, 3, size, size, device=plan.device), pair(net, train, plan)
        where, mode = f'{net}, {size}², batch {batch}', 'a training step' if train else 'evaluation'
        error = same(models, x)
        times = plan.in_turns({k: lambda m=m: step(m, x) for k, m in models.items()}, warm_up=0)
        of, note = 'ours' if target and target > 1 else 'ratio', agreement(error, 'gradients' if train else 'logits')
        yield row(mode, where, times['fast'], 'plain decoder', times['plain'], target=target, of=of, note=note)
        if plan.full and not train: yield rounding(models, x, where)
        if net == 'ResNet34' and (size == 256 and not train and batch == 1 or plan.full and train):
            yield from low_precision(models, x, mode, where, plan)
    if plan.full:
        yield from memories(plan)
        yield from compiled(plan)

def memories(plan):
    if not plan.cuda and not Path('/proc/self/status').exists():
        yield skipped('memory of a training step', 'needs Linux')
        return
    for net, size, batch in (('ResNet34', 128, 4), ('ResNet34', 256, 1)):
        mb = {way: in_own_process(net, size, batch, way, plan.device) for way in ('plain', 'fast', 'checkpoint')}
        where = f'{net}, {size}², batch {batch}'
        yield row('memory of a training step', where, mb['fast'], 'plain decoder', mb['plain'], unit='MB')
        yield row('memory, with checkpoint=True', where, mb['checkpoint'], 'plain decoder', mb['plain'], unit='MB')

def low_precision(models, x, mode, where, plan):
    if not plan.cuda and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        yield skipped(f'{mode}, autocast bfloat16', 'this processor convolves bfloat16 in a plain loop')
        return
    casts = [torch.float16, torch.bfloat16] if plan.cuda else [torch.bfloat16]
    for cast in casts:
        name = str(cast).removeprefix('torch.')
        ways = {'fast': lambda: step(models['fast'], x), **{k + name: lambda m=m: step(m, x, cast) for k,
                                                            m in models.items()}}
        times = plan.in_turns(ways)
        yield row(f'{mode}, autocast {name}', where, times['fast' + name], f'plain decoder, autocast {name}',
                  times['plain' + name])
        yield row(f'{mode} in float32', where, times['fast'], f'plain decoder, autocast {name}', times['plain' + name])
    if plan.cuda:
        last, y = {k: copy.deepcopy(m).to(memory_format=torch.channels_last) for k,
                   m in models.items()}, x.to(memory_format=torch.channels_last)
        times = plan.in_turns({k: lambda m=m: step(m, y) for k, m in last.items()})
        yield row(f'{mode}, channels last', where, times['fast'], 'plain decoder, channels last', times['plain'])

def compiled(plan):
    if not plan.cuda and not shutil.which('g++') and not shutil.which('clang++'):
        yield skipped('torch.compile', 'no C++ compiler found')
        return
    models, x, where = pair('ResNet34', False, plan), torch.randn(1, 3, 256, 256,
                                                                  device=plan.device), 'ResNet34, 256², batch 1'
    ways = models | {'compiled ' + k: torch.compile(m) for k, m in models.items()}
    for k in models:
        close(step(ways['compiled ' + k], x), step(models['plain'], x), 1e-2 if x.is_cuda else 1e-4, f'compiled {k}')
    times = plan.in_turns({k: lambda m=m: step(m, x) for k, m in ways.items()})
    yield row('evaluation, not compiled', where, times['fast'], 'plain decoder, torch.compile', times['compiled plain'])
    yield row('evaluation, torch.compile', where, times['compiled fast'], 'plain decoder, torch.compile',
              times['compiled plain'],
              note='compiled, the fast decoder keeps its taps only')

def with_backward(f, *inputs):
    out = f()
    return torch.autograd.grad(out, inputs, torch.ones_like(out))   # dense, as in training: that of a sum is one number

def branches(plan):
    ("The parts by themselves, as UNet3+ takes them: where the faster way would not pay, it is not taken, and times "
     "are even.")
    torch.manual_seed(0)
    size = (128, 128)
    for scale, channels in ((2, 320), (4, 320), (8, 320), (16, 1024)) if plan.full else ((4, 320),):
        x, w = (torch.randn(*s, device=plan.device, requires_grad=True)
                for s in ((1, channels, 128 // scale, 128 // scale), (64, channels, 3, 3)))
        conv = lambda plain: conv_of_upsampled(x, w, size, plain=plain)
        error = close(conv(None), conv(True), 1e-2 if plan.cuda else 1e-4, 'conv_of_upsampled')
        note = agreement(error) if taps_win(x.shape, w.shape, size) else 'the plain way is taken'
        where, plain_name = f'{channels} → 64 channels, {128 // scale}² → 128²', 'interpolate, conv2d'
        with torch.no_grad():
            times = plan.in_turns({k: lambda p=p: conv(p) for k, p in (('plain', True), ('ours', None))})
        yield row(f'conv_of_upsampled, ×{scale}', where, times['ours'], plain_name, times['plain'], note=note)
        times = plan.in_turns({k: lambda p=p: with_backward(lambda: conv(p), x, w) for k,
                               p in (('plain', True), ('ours', None))})
        yield row(f'conv_of_upsampled, ×{scale}, with backward', where, times['ours'], plain_name, times['plain'],
                  note=note)
    for side in (32, 64, 128) if plan.full else (128,):
        x, w = torch.randn(1, 320, side, side, device=plan.device), torch.randn(320, 320, 3, 3, device=plan.device,
                requires_grad=True) / 50
        x, last = (t.contiguous(memory_format=f).requires_grad_() for t,
                   f in ((x, torch.contiguous_format), (x, torch.channels_last)))
        conv = lambda x: F.conv2d(x, w, padding=1)
        ways = {'plain': (lambda x=x: conv(x), x), 'last': (lambda x=last: conv(x), last),
                'ours': (lambda x=last: winograd_conv(x, w), last)}
        error = close(ways['ours'][0](), ways['plain'][0](), 1e-2 if plan.cuda else 1e-4, 'winograd_conv')
        note = agreement(error) if winograd_wins(x.shape, w.shape) and not plan.cuda else 'the plain way is taken'
        for backward in (False, True) if plan.full else (False,):
            timed = {k: (lambda f=f, x=x: with_backward(f, x, w)) if backward else f for k, (f, x) in ways.items()}
            with torch.set_grad_enabled(backward): times = plan.in_turns(timed)
            for other, name in (('plain', 'conv2d'), ('last', 'conv2d, channels last')):
                yield row('winograd_conv' + ', with backward' * backward, f'320 → 320 channels, {side}²',
                          times['ours'], name, times[other], note=note)
    yield from fusions(plan)
    yield from norms(plan)

def fusions(plan):
    "Of a finest level with five sources, upsample='after': where the plain way is taken, times are even."
    shapes = [(width, side, batch) for side in (32, 64, 128) for batch in (1, 16) for width in (16, 32)]
    for width, side, batch in shapes if plan.full else shapes[2:3]:
        torch.manual_seed(0)
        maps = [torch.randn(batch, width, side >> k, side >> k, device=plan.device) for k in range(5)]
        w = torch.randn(5 * width, 5 * width, 3, 3, device=plan.device, requires_grad=True) / 50
        first, last = ([m.contiguous(memory_format=f).requires_grad_() for m in maps]
                       for f in (torch.contiguous_format, torch.channels_last))
        def plain(maps):
            enlarged = [F.interpolate(m, (side, side), mode='bilinear', align_corners=True) for m in maps[1:]]
            return F.conv2d(torch.cat([maps[0], *enlarged], 1), w, padding=1)
        ours = lambda: conv_of_concatenated(last[0], last[1:], w)
        ways = {'plain': (lambda: plain(first), first), 'last': (lambda: plain(last), last), 'ours': (ours, last)}
        note = agreement(close(ours(), plain(first), 1e-2 if plan.cuda else 1e-4, 'conv_of_concatenated'))
        for backward in (False, True):
            timed = {k: (lambda f=f, x=x: with_backward(f, *x, w)) if backward else f for k, (f, x) in ways.items()}
            with torch.set_grad_enabled(backward): times = plan.in_turns(timed)
            for other, name in (('plain', 'concatenate, conv2d'), ('last', 'concatenate, conv2d, channels last')):
                yield row('conv_of_concatenated' + ', with backward' * backward, f'5 × {width} channels, {side}², '
                          f'batch {batch}', times['ours'], name, times[other], note=note)

def norms(plan):
    for channels, side in ((320, 64), (64, 128)):
        bn, x = nn.BatchNorm2d(channels).to(plan.device).train(), torch.randn(1, channels, side, side,
                device=plan.device)
        x, last = (t.contiguous(memory_format=f).requires_grad_() for t,
                   f in ((x, torch.contiguous_format), (x, torch.channels_last)))
        ways = {'first': (lambda x=x: bn(x).relu_(), x), 'last': (lambda x=last: bn(x).relu_(), last),
                'ours': (lambda x=last: batch_norm_relu(x, [bn]), last)}
        error = close(ways['ours'][0](), ways['first'][0](), 1e-4, 'batch_norm_relu')
        times = plan.in_turns({k: lambda f=f, x=x: with_backward(f, x, bn.weight) for k, (f, x) in ways.items()})
        for other, name in (('first', 'BatchNorm2d, ReLU'), ('last', 'BatchNorm2d, ReLU, channels last')):
            yield row('batch_norm_relu, with backward', f'{channels} channels, {side}²', times['ours'], name,
                      times[other], note=agreement(error))

if __name__ == '__main__':   # a process of its own for each measurement of memory
    net, size, batch, way, device = sys.argv[1:]
    print(memory(net, int(size), int(batch), way, device))
