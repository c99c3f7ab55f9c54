"""What a training step costs under each method, beside the plain step of the same network."""
import copy

import torch
import torch.nn.functional as F
from bench_timing import close, row

from noisyseg.nets.classifiers import resnet18_small, resnet20
from noisyseg.train.methods.damp import damp_backward
from noisyseg.perturb.laws import MaxGaussian
from noisyseg.perturb.clone import clone_weights, perturbed
from noisyseg.perturb.selectors import kernels_and_scales
from noisyseg.train.methods.ascent import norm_layers
from noisyseg.train.methods.match_step import MatchStep
from noisyseg.train.methods.sam import SAM
from noisyseg.nets.unet3plus import unet3plus_lite0, unet3plus_resnet34


def loss_of(out, y):
    return sum(F.cross_entropy(o, y) for o in out) if isinstance(out, list) else F.cross_entropy(out, y)

class Net:
    "A network with its optimizer; all have the same weights."
    def __init__(self, model, sam=None):
        self.model = copy.deepcopy(model).train()
        self.opt = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        if sam is not None: self.opt = SAM(self.opt, self.model, **sam)

    def backward(self, x, y):
        loss = loss_of(self.model(x), y)
        loss.backward()
        return loss

    def plain(self, x, y):
        self.opt.zero_grad()
        self.backward(x, y)
        self.opt.step()

    def in_sub_batches(self, x, y, m=8):
        "What DAMP would be without noise."
        self.opt.zero_grad()
        for xs, ys in zip(x.chunk(m), y.chunk(m)): (loss_of(self.model(xs), ys) / m).backward()
        self.opt.step()

    @property
    def weights(self): return list(self.model.parameters())

def noise_step(net, clone, law, generator, x, y):
    "What the callback WeightNoise does in a step."
    net.opt.zero_grad()
    clone.inject(law, generator)
    net.backward(x, y)
    clone.recover()
    net.opt.step()

def step(plan):
    torch.manual_seed(0)
    model, law = unet3plus_resnet34(21, pretrained=False).to(plan.device), MaxGaussian(0.05)
    x, y = torch.randn(4, 3, 128, 128, device=plan.device), torch.randint(21, (4, 128, 128), device=plan.device)
    nets = {k: Net(model) for k in ('clean', 'normal', 'blocks', 'table')}
    clones = {rng: clone_weights(nets[rng].model, rng=rng) for rng in ('normal', 'blocks', 'table')}
    nets['clean'].plain(x[:1], y[:1])
    for rng, c in clones.items():
        noise_step(nets[rng], c, law.at(0.), plan.generator(), x[:1], y[:1])
        close(nets[rng].weights, nets['clean'].weights, 1e-4, 'a step under noise of level 0')
    g = plan.generator()
    ways = {'clean': lambda: nets['clean'].plain(x, y), **{k: lambda k=k: noise_step(nets[k], clones[k], law, g, x, y)
                                                           for k in clones}}
    times = plan.in_turns(ways, warm_up=0)
    for rng in clones:
        yield row(f"a training step under noise, rng='{rng}'", 'ResNet34, 128², batch 4', times[rng], 'clean step',
                  times['clean'],
                  target=1.02 if plan.cuda else 1.08)

def methods(plan):
    "On a small network, which has few weights for the work that it does with them, and on one that has many."
    yield from matching(plan)
    yield from damp_and_sam(plan, resnet20(), 64, 'ResNet-20')
    if plan.full or plan.cuda: yield from damp_and_sam(plan, resnet18_small(), 128, 'ResNet-18')

def damp_and_sam(plan, model, n, name):
    torch.manual_seed(0)
    model, where = model.to(plan.device), f'{name}, 32², batch {n}'
    x, y = torch.randn(n, 3, 32, 32, device=plan.device), torch.randint(10, (n,), device=plan.device)
    plain, damp, bare, noise, sam, norms, part = (Net(model, s) for s in (None, None, None, None, {},
                                                                          {'where': norm_layers}, {}))
    g, law = plan.generator(), MaxGaussian(0.05)
    clones = {rng: clone_weights(damp.model, kernels_and_scales, rng=rng) for rng in ('normal', 'blocks', 'table')}

    def damp_step(sigma=0.1, m=8, rng='normal'):
        damp.opt.zero_grad()
        damp_backward(damp.model, loss_of, x, y, sigma=sigma, m=m, generator=g, clone=clones[rng])
        damp.opt.step()
    def noise_aware(level=0.05):
        noise.opt.zero_grad()
        with perturbed(noise.model, law.at(level), generator=g): noise.backward(x, y)
        noise.opt.step()
    def closure(net, n):
        def f():
            net.opt.zero_grad()
            return net.backward(x[:n], y[:n])
        return f
    whole = {s: closure(s, n) for s in (sam, norms, part)}
    half = closure(part, n // 2)

    plain.plain(x, y), damp_step(0., 1), noise_aware(0.)
    for net in (damp, noise): close(net.weights, plain.weights, 1e-4, 'a step under noise of level 0')
    sam.opt.set_rho(0.), sam.opt.step(whole[sam])
    close(sam.weights, plain.weights, 1e-4, 'a SAM step of rho 0')
    sam.opt.set_rho(0.05)
    norms.opt.step(whole[norms]), part.opt.step(whole[part], ascent=half)

    damps = {rng: lambda rng=rng: damp_step(rng=rng) for rng in clones}
    times = plan.in_turns({'plain': lambda: plain.plain(x, y), 'bare': lambda: bare.in_sub_batches(x, y), **damps,
                           'noise': noise_aware, 'sam': lambda: sam.opt.step(whole[sam]),
                           'norms': lambda: norms.opt.step(whole[norms]),
                           'half': lambda: part.opt.step(whole[part], ascent=half)}, warm_up=0)
    yield row('noise-aware: perturbed, MaxGaussian', where, times['noise'], 'plain SGD step', times['plain'],
              target=1.1)
    yield row('8 sub-batches without noise', where, times['bare'], 'plain SGD step', times['plain'],
              note=f'of {n // 8} images, what DAMP would be at sigma = 0')
    for rng in clones:
        yield row(f"DAMP, m = 8, rng='{rng}'", where, times[rng], 'the same sub-batches without noise', times['bare'],
                  target=1.05)
    yield row('DAMP, m = 8', where, times['normal'], 'plain SGD step', times['plain'])
    yield row('SAM', where, times['sam'], 'plain SGD step', times['plain'], target=2.03)
    yield row('SAM, only norm layers climb', where, times['norms'], 'SAM', times['sam'])
    yield row('SAM, half of the batch ascends', where, times['half'], 'SAM', times['sam'])
    fifth = [(s + 4 * p) / 5 for s, p in zip(times['sam'], times['plain'])]
    yield row('SAM, in every 5th step', where, fifth, 'SAM', times['sam'],
              note='the mean of 5 steps, from those of SAM and of SGD')

def matching(plan):
    "MLPMatch beside supervised training, of which it makes several passes."
    torch.manual_seed(0)
    model = unet3plus_lite0(7, width=16, upsample='after', deep_supervision=False, pretrained=False,
                            encoder_args=dict(out_indices=(0, 1, 2, 3)))
    model = model.to(plan.device, memory_format=torch.channels_last)
    x, weak, *strong = torch.randn(4, 4, 3, 64, 64, device=plan.device)
    y = torch.randint(7, (4, 64, 64), device=plan.device)
    inside = torch.ones(4, 64, 64, dtype=torch.bool, device=plan.device)
    nets = {level: Net(model) for level in ('supervised', 'unimatch', 'mlpmatch')}
    steps = {level: MatchStep(level, threshold=0.2, seed=0) for level in nets}
    def train(level):
        nets[level].opt.zero_grad()
        steps[level].step(nets[level].model, x, y, weak, *strong, inside, progress=0.5).total.backward()
        nets[level].opt.step()
    times = plan.in_turns({level: lambda level=level: train(level) for level in nets})
    for level, target in (('unimatch', None), ('mlpmatch', 4.5)):
        yield row(f'a step of {level}', 'UNet3+ on EfficientNet-Lite0, 64², 4 pictures with masks and 4 without',
                  times[level], 'a supervised step', times['supervised'], target=target)
