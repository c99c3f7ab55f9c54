"""How fast is clone, inject, recover beside the plain loop? Prints ratios from one run; `make bench` calls this.

Both sides make the same noise, bit for bit: that is checked before anything is timed. Timings are interleaved, and the
median of each is taken, because a shared machine is noisy.
"""
import argparse
import statistics
import subprocess
import sys
import time

import torch
import torchvision
from torch import nn

from noisyseg.laws import MaxGaussian
from noisyseg.perturb import clone_weights, conv_and_norm, perturbed
from noisyseg.unet3plus import unet3plus_resnet34


def naive_inject(modules, n, alpha, generator):
    "The plain way: a dictionary of clones, then `torch.normal` with an expanded standard deviation, clamp and add, module by module."
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

def compare(name, model, rounds):
    modules = {k: m for k, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))}
    law, clone = MaxGaussian(0.05, alpha=2.), clone_weights(model, conv_and_norm)
    weights = lambda: [m.weight.detach().clone() for m in modules.values()]
    clean, g = weights(), lambda: torch.Generator().manual_seed(0)

    kept = naive_inject(modules, 0.05, 2., g())
    expected = weights()
    naive_recover(modules, kept)
    clone.inject(law, g())
    assert all(map(torch.equal, expected, weights())), 'the noise differs from the plain loop'
    clone.recover()
    assert all(map(torch.equal, clean, weights())), 'recovery is not exact'

    def naive(): naive_recover(modules, naive_inject(modules, 0.05, 2., g()))
    def ours():
        clone.inject(law, g())
        clone.recover()
    def context():
        with perturbed(model, law, conv_and_norm, g()): pass
    slider = clone_weights(model, conv_and_norm).inject(law, g()).rescale(0.04)
    level = iter(0.01 + 0.0001 * i for i in range(10**6))
    def rescale(): slider.rescale(next(level))
    draw = [torch.empty(w.shape) for w in clean]
    def draw_alone():
        generator = g()
        for z in draw: z.normal_(generator=generator)

    times = {f: [] for f in (naive, ours, context, draw_alone, rescale)}
    for i in range(rounds + 2):
        for f, ts in times.items():
            start = time.perf_counter()
            f()
            if i >= 2: ts.append(time.perf_counter() - start)
    slider.recover()
    base = statistics.median(times[naive])
    print(f'\n{name}: {clone.n_weights:,} weights in {len(modules)} tensors, {torch.get_num_threads()} thread(s), {torch.get_default_dtype()}')
    print(f'  {"":46}{"ms":>9}{"ns/weight":>11}{"times as fast":>15}')
    for f, label in ((naive, 'plain loop: clone, inject, recover'), (ours, 'a kept WeightClone: inject, recover'),
                     (context, 'with perturbed(…)'), (draw_alone, 'drawing the numbers alone: the floor of these'),
                     (rescale, 'rescale of a fixed draw (a slider step)')):
        t = statistics.median(times[f])
        print(f'  {label:46}{t * 1e3:9.2f}{t / clone.n_weights * 1e9:11.2f}{base / t:15.1f}')

MODELS = {'UNet3+ with ResNet34': lambda: unet3plus_resnet34(21, pretrained=False), 'ResNet50': torchvision.models.resnet50}

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--rounds', type=int, default=15)
    p.add_argument('--model', choices=MODELS, help='only this one; without it each in a process of its own')
    a = p.parse_args()
    if a.model:
        torch.manual_seed(0)
        compare(a.model, MODELS[a.model](), a.rounds)
    else:   # a process each: what one model leaves in the memory allocator would change the other's times
        for name in MODELS: subprocess.run([sys.executable, __file__, '--rounds', str(a.rounds), '--model', name], check=True)
