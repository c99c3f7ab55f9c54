"""Clone, inject, recover beside the plain loop.

Both sides make the same noise, on a CPU bit for bit: that is checked before anything is timed."""
import itertools
import statistics

import torch
import torchvision
from bench_timing import row
from torch import nn

from noisyseg.perturb.laws import MaxGaussian
from noisyseg.perturb.clone import clone_weights, perturbed
from noisyseg.perturb.selectors import conv_and_norm
from noisyseg.nets.unet3plus import unet3plus_resnet34


def naive_inject(modules, n, alpha, generator):
    ("The plain way: a dictionary of clones, then `torch.normal` with an expanded standard deviation, clamp and add, "
     "module by module.")
    clones = {}
    for name, m in modules.items(): clones[name] = m.weight.data.clone()
    for m in modules.values():
        w = m.weight.data
        lead = w.shape[:2] if w.ndim > 2 else ()
        largest = n * w.abs().reshape(*lead, -1).amax(-1)
        sigma = largest.reshape(*lead, *[1] * (w.ndim - len(lead))).expand(w.shape)
        noise = torch.normal(0., sigma, generator=generator)
        noise.clamp_(-alpha * sigma, alpha * sigma)
        m.weight.data += noise
    return clones

def naive_recover(modules, clones):
    for name, m in modules.items(): m.weight.data = clones[name]

def same_noise(clean, expected, got, plan):
    "Bit for bit on a CPU; a GPU may cut its stream of random numbers otherwise, so there the noise is only as large."
    if not plan.cuda: return all(map(torch.equal, expected, got))
    size = lambda noisy: torch.cat([(a - b).flatten() for a, b in zip(noisy, clean)]).std()
    return abs(size(got) / size(expected) - 1) < 0.01

def compare(model, name, plan):
    model, law, g = model.to(plan.device), MaxGaussian(0.05, alpha=2.), plan.generator
    modules = {k: m for k, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))}
    clone, blocks, table = (clone_weights(model, conv_and_norm, rng=rng) for rng in ('normal', 'blocks', 'table'))
    weights = lambda: [m.weight.detach().clone() for m in modules.values()]
    clean = weights()

    kept = naive_inject(modules, 0.05, 2., g())
    expected = weights()
    naive_recover(modules, kept)
    for c in (clone, blocks, table):
        c.inject(law, g())
        assert c is not clone or same_noise(clean, expected, weights(), plan), 'the noise differs from the plain loop'
        c.recover()
        assert all(map(torch.equal, clean, weights())), 'recovery is not exact'

    slider, level = clone_weights(model, conv_and_norm).inject(law,
                                                               g()).rescale(0.04), itertools.cycle((0.01, 0.02, 0.03,
            0.05))
    draw, generator = [torch.empty_like(w) for w in clean], g()
    def naive(): naive_recover(modules, naive_inject(modules, 0.05, 2., generator))
    def ours(c):
        c.inject(law, generator)
        c.recover()
    def context():
        with perturbed(model, law, conv_and_norm, generator): pass
    def draw_alone():
        for z in draw: z.normal_(generator=generator)
    times = plan.in_turns({'naive': naive, 'kept': lambda: ours(clone), 'table': lambda: ours(table),
                           'blocks': lambda: ours(blocks),
                           'context': context, 'draw': draw_alone,
                           'rescale': lambda: slider.rescale(next(level))}, warm_up=2)
    slider.recover()

    n, where = clone.n_weights, f'{name}, {clone.n_weights / 1e6:.1f} million weights'
    per_weight = lambda key: statistics.median(times[key]) * 1e6 / n
    floor = f'{per_weight("draw"):.1f} ns a weight go into drawing the numbers'
    for key, what, note, target in (('kept', 'a kept clone: inject, recover', floor, 7.),
                                    ('context', 'with perturbed(…)', '', None),
                                    ('blocks', "rng='blocks': inject, recover", 'drawn by all cores at once', None),
                                    ('table', "rng='table': inject, recover",
                                     'stretches of a table of normal numbers instead of new ones', 2.6),
                                    ('rescale', 'rescale of a fixed draw', "a step of the explorer's slider", 0.5)):
        yield row(what, where, times[key], 'plain loop', times['naive'], ns_per_weight=per_weight(key), note=note,
                  of='ns_per_weight', target=None if plan.cuda else target)

def unet3plus(plan): yield from compare(unet3plus_resnet34(21, pretrained=False), 'UNet3+, ResNet34', plan)
def resnet50(plan): yield from compare(torchvision.models.resnet50(), 'ResNet50', plan)
