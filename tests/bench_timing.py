"What the benchmarks share: timing of ways in turns, and rows of one form. All numbers are costs: smaller is better."
import statistics
import time
from dataclasses import dataclass, field
from itertools import count

import torch


@dataclass
class Plan:
    "How long to measure, and on what."
    full: bool = False
    rounds: int = None   # None: as many as `seconds` allow, between `least` and `most`
    device: str = 'cpu'
    seconds: float = field(init=False)
    least: int = field(init=False)
    most: int = field(init=False)

    def __post_init__(self): self.seconds, self.least, self.most = (20., 7, 41) if self.full else (1., 2, 15)

    @property
    def cuda(self): return torch.device(self.device).type == 'cuda'

    def sync(self):
        if self.cuda: torch.cuda.synchronize()

    def generator(self, seed=0): return torch.Generator(self.device).manual_seed(seed)

    def in_turns(self, ways, warm_up=1):
        """Milliseconds of each of `ways` (name -> function), measured in turns, forwards and backwards: so what slows
        the machine meets them all. warm_up: turns that don't count; 0 where the check of the results was one."""
        times, begun = {name: [] for name in ways}, None
        for i in count(-warm_up):
            if i == 0: begun = time.perf_counter()
            for name in list(ways)[::1 if i % 2 else -1]:
                self.sync()
                start = time.perf_counter()
                ways[name]()
                self.sync()
                if i >= 0: times[name].append(1e3 * (time.perf_counter() - start))
            n = i + 1
            if n > 0 and (n >= self.rounds if self.rounds else n >= self.most or n >= self.least
                          and time.perf_counter() - begun > self.seconds):
                return times


def quantile(values, q):
    values = sorted(values)
    i = q * (len(values) - 1)
    low = values[int(i)]
    return low + (i - int(i)) * (values[min(int(i) + 1, len(values) - 1)] - low)

def row(what, where, ours, against='', other=None, unit='ms', target=None, of='ratio', note='', **more):
    """One line of the table: `ours` and `other` are numbers measured in turns, or one number each.
    ratio = ours / other, the median over turns. A target is the most that `of` (the ratio, or one of the further
    numbers) may be."""
    ours, other = ([float(v) for v in (o if isinstance(o, list) else [o])] if o is not None else []
                   for o in (ours, other))
    ratios = [a / b for a, b in zip(ours, other)]
    median = lambda values: statistics.median(values) if values else None
    r = dict(what=what, where=where, ours=median(ours), against=against, other=median(other), unit=unit, ratio=None,
             low=None, high=None, rounds=len(ours),
             target=target, target_of=of if target else None, note=note, **more)
    if ratios: r |= dict(ratio=statistics.median(ratios), low=quantile(ratios, .1), high=quantile(ratios, .9))
    if target: r['verdict'] = 'target met' if r[of] <= target else 'target missed'
    elif ratios:
        r['verdict'] = 'even' if r['low'] <= 1 <= r['high'] or abs(r['ratio']
                - 1) < 0.03 else 'better' if r['ratio'] < 1 else 'worse'
    else: r['verdict'] = ''
    return {k: float(f'{v:.5g}') if isinstance(v, float) else v for k, v in r.items()}

def skipped(what, why): return row(what, '', None, note=f'not measured: {why}')

def agreement(error, what='results'):
    return f'{what} differ by {error:.0e}' if error else f'the same {what} bit for bit'

def close(got, want, most, what):
    "Are these the same to within `most` of the largest? If not, nothing is timed."
    got, want = ([t.detach().double() for t in (o if isinstance(o, (list, tuple)) else [o])] for o in (got, want))
    error = max((a - b).abs().max() for a, b in zip(got, want, strict=True)) / max(b.abs().max() for b in want)
    if not error <= most:
        raise AssertionError(f'{what}: results differ by {error:.1e} of the largest, more than {most:.0e}')
    return float(error)
