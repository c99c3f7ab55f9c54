"""Evaluations per second in sweeps.

With what the unchanged parts computed kept (noisyseg.measure.prefix); draws one by one or batched; in one process or
in several (noisyseg.measure.processes)."""
import copy
import statistics
from contextlib import nullcontext
from functools import partial

import pandas as pd
import torch
from bench_timing import agreement, close, row
from torch.func import functional_call, vmap

import noisyseg.measure.sweeps
from noisyseg.perturb.laws import MaxGaussian
from noisyseg.perturb.clone import clone_weights, perturbed
from noisyseg.data.procedural import scene, scene_classes
from noisyseg.measure.evaluation import draw_seed, scores, untouched
from noisyseg.measure.sensitivity import layer_sensitivity, stages
from noisyseg.measure.sweeps import sweep
from noisyseg.nets.unet3plus import unet3plus_resnet34, unet3plus_small, unet3plus_tiny


class NoReuse(nullcontext):
    "Stands in for PrefixCache, and keeps nothing."
    def __init__(self, *args): super().__init__()
    def start(self): pass

def pictures(n, size, device):
    images, masks = (torch.stack([torch.as_tensor(a) for a in arrays])
                     for arrays in zip(*(scene(i, size) for i in range(n))))
    return (images.permute(0, 3, 1, 2) / 255).to(device), masks.long().to(device)

def swapped(reuse, f):
    def run():
        kept, noisyseg.measure.sweeps.PrefixCache = noisyseg.measure.sweeps.PrefixCache, reuse
        try: return f()
        finally: noisyseg.measure.sweeps.PrefixCache = kept
    return run

def sweeps(plan):
    if plan.full: yield from kept_parts(plan)
    yield from batched_draws(plan)
    yield from by_size(plan)

def kept_parts(plan):
    "What it is worth that the undisturbed parts of a network are not computed again."
    torch.manual_seed(0)
    n = len(scene_classes)
    nets = {'small': (unet3plus_small(n), 4), 'ResNet34': (unet3plus_resnet34(n, pretrained=False), 2)}
    for name, (model, batch) in nets.items():
        model.to(plan.device).eval()
        x, y = pictures(2 * batch, 128, plan.device)
        dl, draws, levels = [(x[:batch], y[:batch]), (x[batch:], y[batch:])], 2, [0.02, 0.05, 0.1]
        sensitivity = lambda: layer_sensitivity(model, dl, MaxGaussian(0.05), draws=draws, progress=False)
        decoder = lambda: sweep(model, dl, MaxGaussian(), levels=levels, draws=draws, where='decoder*', progress=False)
        jobs = {'layer_sensitivity': (sensitivity, 1 + draws * len(stages(model))),
                "sweep(where='decoder*')": (decoder, draws * len(levels))}
        for what, (job, evaluations) in jobs.items():
            ways = {'ours': job, 'other': swapped(NoReuse, job)}
            pd.testing.assert_frame_equal(*(f() for f in ways.values()))
            times = plan.in_turns(ways, warm_up=0)
            rate = {k: evaluations / statistics.median(t) * 1e3 for k, t in times.items()}
            yield row(what, f'{name}, 2 batches of {batch}, 128²', times['ours'], 'the same without PrefixCache',
                      times['other'], per_second=rate['ours'],
                      note=f'{rate["ours"]:.1f} evaluations a second, without {rate["other"]:.1f}')

# network, pixels, batch, draws (such that the plain loop takes some seconds), and how many in quick mode (0: none)
SIZES = [('tiny', 64, 4, 60, 16), ('tiny', 128, 8, 12, 0), ('small', 64, 4, 24, 8), ('small', 128, 4, 8, 0),
         ('small', 256, 2, 4, 0), ('ResNet34', 64, 4, 8, 0), ('ResNet34', 128, 2, 4, 0)]
NETS = {'tiny': unet3plus_tiny, 'small': unet3plus_small, 'ResNet34': partial(unet3plus_resnet34, pretrained=False)}

def plain_loop(model, dl, law, levels, draws):
    "What one would write: every draw at every level, in this process, by all its threads. The rows of all of them."
    classes, rows = [str(i) for i in range(len(scene_classes))], []
    for level in levels:
        for k in range(draws if level else 1):
            with untouched([model]), perturbed(model, law.at(level), generator=draw_seed(0, k)):
                rows += [(level, k, *row) for row in scores(model, dl, classes)]
    return rows

def by_size(plan):
    "Whole sweeps as `sweep` runs them by itself, beside the plain loop: never a loss, whatever the size."
    law, levels, gains = MaxGaussian(0.05), [0., 0.02, 0.05, 0.1], []
    for net, size, batch, draws, quick in SIZES:
        if not plan.full: draws = quick
        if plan.cuda or not draws: continue
        torch.manual_seed(0)
        model, (x, y) = NETS[net](len(scene_classes)).eval(), pictures(2 * batch, size, plan.device)
        dl = [(x[:batch], y[:batch]), (x[batch:], y[batch:])]
        ours = lambda: sweep(model, dl, law, levels=levels, draws=draws, progress=False)
        plain = lambda: plain_loop(model, dl, law, levels, draws)
        # a sweep draws once for all levels and scales that (`rescale`), which rounds elsewhere than the loop does: now
        # and then a pixel on the edge between two classes falls to the other
        key = ['level', 'draw', 'metric', 'class']
        found, expected = (df.set_index(key)['value'].sort_index() for df in (
            ours(), pd.DataFrame([r[:5] for r in plain()], columns=[*key, 'value'])))
        assert found.index.equals(expected.index) and found.isna().equals(expected.isna())
        error = (found - expected).abs().max()
        assert error < 1e-3, f'other numbers than the plain loop: {error}'
        times = plan.in_turns({'ours': ours, 'other': plain}, warm_up=0)
        evaluations = 1 + draws * (len(levels) - 1)
        rate = {k: evaluations / statistics.median(t) * 1e3 for k, t in times.items()}
        gains.append(rate['ours'] / rate['other'])
        yield row('a whole sweep', f'{net}, 2 batches of {batch}, {size}², {draws} draws', times['ours'],
                  'the plain loop, all threads', times['other'], per_second=rate['ours'],
                  note=f'{rate["ours"]:.1f} evaluations a second, the plain loop {rate["other"]:.1f}; '
                  f'{agreement(error, "scores")}')
    if plan.full and gains:
        yield row('median over sizes', f'{len(gains)} sizes', 1 / statistics.median(gains), unit='of the time',
                  target=1/1.3, of='ours')

def batched_draws(plan, draws=4):
    model = unet3plus_small(7).to(plan.device).eval()
    x, law, clone = torch.randn(4, 3, 128, 128, device=plan.device), MaxGaussian(0.05), clone_weights(model)
    def one_by_one():
        out = []
        for k in range(draws):
            clone.inject(law, k)
            with torch.no_grad(): out.append(model(x))
        clone.recover()
        return torch.stack(out)
    noisy = [clone.inject(law, k) and {n: v.detach().clone() for n, v in model.state_dict().items()}
             for k in range(draws)]
    clone.recover()
    plain = copy.deepcopy(model).set_decoder('plain')   # the fast one is not for batched weights
    stacked = {n: torch.stack([s[n] for s in noisy]) for n in noisy[0]}
    def together():
        with torch.no_grad(): return vmap(lambda state: functional_call(plain, state, (x,)))(stacked)
    error = close(one_by_one(), together(), 1e-2 if plan.cuda else 1e-3, 'draws batched by vmap')
    times = plan.in_turns({'ours': one_by_one, 'other': together}, warm_up=0)
    yield row(f'{draws} draws, one by one', 'small, 128², batch 4', times['ours'],
              f'{draws} draws at once by torch.func.vmap', times['other'],
              note=f'{agreement(error)}; vmap has its noisy weights beforehand, and takes the plain decoder')
