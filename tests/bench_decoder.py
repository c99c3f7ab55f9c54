"""How fast is UNet3+ with its convolutions of upsampled maps by taps, beside the plain decoder? Prints ratios from one run; `make bench` calls this.

Both run the same weights on the same images, in turns, and the median of each is taken; first their outputs are compared.
"""
import argparse
import copy
import statistics
import time

import torch

from noisyseg.unet3plus import unet3plus_paper, unet3plus_resnet34, unet3plus_tiny


def compare(name, model, size, batch, train, rounds):
    x = torch.randn(batch, 3, size, size)
    models = {way: copy.deepcopy(model).train(train) for way in ('plain', 'fast')}
    for level in models['plain'].decoder: level.fast = False

    def step(m):
        if not train:
            with torch.no_grad(): return m(x)
        out = m(x)
        sum(o.square().mean() for o in (out if isinstance(out, list) else [out])).backward()

    error = ''
    if not train:
        plain, fast = step(models['plain']), step(models['fast'])
        error = f'largest difference {((plain - fast).abs().max() / plain.abs().max()).item():.0e} of the largest output'
    times = {way: [] for way in models}
    for i in range(rounds + 1):
        for way, m in models.items():
            start = time.perf_counter()
            step(m)
            if i: times[way].append(1e3 * (time.perf_counter() - start))
    plain, fast = (statistics.median(times[way]) for way in ('plain', 'fast'))
    print(f'  {name:34}{"train" if train else "eval":7}{size:4}²  batch {batch}{plain:9.0f}{fast:9.0f}{plain / fast:9.2f}   {error}', flush=True)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--rounds', type=int, default=5)
    a = p.parse_args()
    torch.manual_seed(0)
    print(f'\nUNet3+, plain and fast decoder, {torch.get_num_threads()} thread(s), {torch.get_default_dtype()}')
    print(f'  {"":45}{"":11}{"plain ms":>9}{"fast ms":>9}{"ratio":>9}')
    resnet, paper, live = unet3plus_resnet34(21, pretrained=False), unet3plus_paper(21), unet3plus_tiny(7, width=32, deep_supervision=False)
    for name, model, size, batch, train in (
            ('ResNet34, 64 channels per branch', resnet, 256, 1, False), ('ResNet34, 64 channels per branch', resnet, 128, 4, True),
            ('ResNet34, 64 channels per branch', resnet, 256, 1, True), ("the paper's VGG-like encoder", paper, 256, 1, False),
            ("the paper's VGG-like encoder", paper, 128, 1, True), ('tiny, 32 channels per branch', live, 128, 1, False)):
        compare(name, model, size, batch, train, a.rounds)
