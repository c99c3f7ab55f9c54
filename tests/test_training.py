"Weight noise in two real processes: the same noise for all, or each its own, and the same clean weights."
import pytest

WORKER = '''
import os, sys, torch, torch.distributed as dist
from fastai.callback.core import Callback
from fastai.data.all import DataLoaders
from fastai.learner import Learner
from torch import nn
from noisyseg.perturb.laws import MaxGaussian
from noisyseg.train.noise import WeightNoise

dist.init_process_group('gloo')
rank = dist.get_rank()

class Spy(Callback):
    order = 100
    def __init__(self, net): self.net = net
    def after_pred(self): self.noisy = self.net[0].weight.detach().clone()
    def after_batch(self): self.clean = self.net[0].weight.detach().clone()

def run(shared, seed):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    # the processes see different images, and would draw different seeds
    torch.manual_seed(100 + rank)
    batches = [(torch.randn(4, 1, 8, 8), torch.randint(0, 2, (4, 8, 8))) for _ in range(3)]
    # the pattern is on the model's own names, not on DDP's
    spy, noise = Spy(net), WeightNoise(MaxGaussian(0.2), seed=seed, shared=shared, where='0.*')
    learn = Learner(DataLoaders(batches, []), nn.parallel.DistributedDataParallel(net), nn.CrossEntropyLoss(), lr=0.1,
                    cbs=[noise, spy])
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    mine = {'noisy': spy.noisy, 'clean': net[0].weight.detach(), 'injected': noise._clone.injected}
    both = [None, None]
    dist.all_gather_object(both, mine)
    assert torch.equal(both[0]['clean'], both[1]['clean']), 'the processes ended with different weights'
    assert not torch.equal(spy.noisy, spy.clean) and not mine['injected']
    return 'same' if torch.equal(both[0]['noisy'], both[1]['noisy']) else 'different'

for case in sys.argv[1:]:
    how, seed = case.split()
    print(case, run(how == 'shared', None if seed == 'None' else int(seed)), sep=': ', flush=True)
dist.destroy_process_group()
'''

CASES = {'shared 7': 'same', 'shared None': 'same', 'own 7': 'different'}

@pytest.fixture(scope='module')
def said(server, tmp_path_factory):
    "What each process says of all cases: they are started once"
    codes, texts = server.pair(WORKER, tmp_path_factory.mktemp('training'), args=CASES)
    return [text.splitlines() for text in texts], codes

@pytest.mark.parametrize('case', CASES)
def test_two_processes(said, case):
    lines, codes = said
    for found in lines: assert f'{case}: {CASES[case]}' in found, lines
    assert codes == [0, 0], lines
