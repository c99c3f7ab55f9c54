"Networks of test_ray.py, which meet with accidents. A module of their own, so that workers have little to import."
import os
import signal
import time
from pathlib import Path

import torch
from torch import nn


def lines(log, what):
    return [line for line in Path(log).read_text().splitlines() if line.startswith(what)] if Path(log).exists() else []


class Net(nn.Sequential):
    """A small network that notes each of its evaluations and each of its journeys in `log`, and meets with accidents;
    after `last` evaluations it waits for ever"""
    def __init__(self, seed=0, log=None, pause=0., accident=None, last=None):
        torch.manual_seed(seed)
        super().__init__(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 1))
        self.log, self.pause, self.accident, self.last, self.home = log, pause, accident, last, os.getpid()
        self.clean = self[0].weight.detach().clone()

    def note(self, what):
        if self.log:
            with open(self.log, 'a') as f: f.write(f'{what} {os.getpid()}\n')

    def __setstate__(self, state):
        super().__setstate__(state)
        self.note('travelled')

    def forward(self, x):
        self.note('evaluated')
        time.sleep(self.pause)
        while self.last and len(lines(self.log, 'evaluated')) >= self.last: time.sleep(1)
        if self.accident and os.getpid() != self.home: self.accident(self)
        return super().forward(x)

    def noise(self): return (self[0].weight - self.clean).abs().max().item()


class Threads(Net):
    "Says how many threads there are, by the class that it sees"
    def forward(self, x):
        out = super().forward(x) * 0
        out[:, torch.get_num_threads() - 1] += 1
        return out


def batches(n=2, size=12):
    g = torch.Generator().manual_seed(1)
    return [(torch.rand(4, 3, size, size, generator=g), torch.randint(0, 3, (4, size, size), generator=g))
            for _ in range(n)]


class Objection(Exception):
    "An error that cannot be unpickled by its arguments alone"
    def __init__(self, a, b): super().__init__(f'{a} {b}')


def dies_once(net):
    if net.noise() == 0 or len(lines(net.log, 'evaluated')) <= 10: return
    try: Path(f'{net.log}.died').touch(exist_ok=False)   # one process makes it, however many look at the same moment
    except FileExistsError: return
    os.kill(os.getpid(), signal.SIGKILL)


def dies_when_loud(net):
    if net.noise() > 0.05: os.kill(os.getpid(), signal.SIGKILL)


def objects_when_loud(net):
    if net.noise() > 0.05: raise ZeroDivisionError('too loud')


def objects_strangely(net):
    if net.noise() > 0.05: raise Objection('too', 'loud')


def train(noise, seed):
    net, (x, y) = Net(seed), batches(1)[0]
    opt = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(3):
        loss = nn.functional.cross_entropy(net(x + noise * torch.randn_like(x)), y)
        loss.backward()
        opt.step(), opt.zero_grad()
    return net, {'loss': loss.item()}
