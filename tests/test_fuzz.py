"Files that something happened to, at random: an error that names the file and says what to do, or the right numbers"
import json
import math
import re
import warnings

import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal
from torch import nn

from noisyseg.measure import sweeps
from noisyseg.measure.store import companion, load_sweep
from noisyseg.perturb.laws import MaxGaussian
from noisyseg.train.resume import Resumable
from noisyseg.train.serialization import load_state, save_state

often = settings(max_examples=40, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
                 suppress_health_check=list(HealthCheck))
JSON = st.recursive(st.none() | st.booleans() | st.integers(-2, 2**60) | st.just(math.nan) | st.text(max_size=3),
                    lambda o: st.lists(o, max_size=2) | st.dictionaries(st.text(max_size=3), o, max_size=2),
                    max_leaves=4)
MEND = re.compile(r'`[^`]+`|[Dd]elete|another path|measure|Copy|again')


def named(error, *files):
    "Is this an error of ours, which names one of the files and says what to do?"
    assert type(error) in (ValueError, TypeError), repr(error)
    assert any(f.name in str(error) for f in files) and MEND.search(str(error)), str(error)


def harmed(data, raw):
    "The bytes of a file, cut, flipped, doubled, or something else"
    how = data.draw(st.sampled_from(['cut', 'flip', 'twice', 'insert', 'other']))
    at = data.draw(st.integers(0, len(raw) - 1))
    if how == 'cut': return raw[:at]
    if how == 'flip': return raw[:at] + bytes([raw[at] ^ 1 << data.draw(st.integers(0, 7))]) + raw[at + 1:]
    if how == 'twice': return raw + raw[at:]
    if how == 'insert': return raw[:at] + data.draw(st.binary(min_size=1, max_size=4)) + raw[at:]
    return data.draw(st.binary(max_size=20))


def places(o, path=()):
    "Every place in nested lists and dicts"
    yield path
    for k in o if isinstance(o, dict) else range(len(o)) if isinstance(o, (list, tuple)) else (): yield from places(
        o[k], (*path, k))


def edited(data, o):
    "Plain data with something else at one place, or without it"
    at = data.draw(st.sampled_from(list(places(o))))
    new = data.draw(JSON)
    if not at: return new
    o = json.loads(json.dumps(o))
    inner = o
    for k in at[:-1]: inner = inner[k]
    if isinstance(inner, dict) and data.draw(st.booleans()): del inner[at[-1]]
    else: inner[at[-1]] = new
    return o


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        torch.manual_seed(0)
        for p in self.parameters(): nn.init.normal_(p)


g = torch.Generator().manual_seed(0)
BATCHES = [(torch.rand(2, 3, 8, 8, generator=g), torch.randint(3, (2, 8, 8), generator=g))]


def sweep(**kw):
    return sweeps.sweep({'a': Net().eval()}, BATCHES, MaxGaussian(), levels=[0, .2], draws=2, progress=False, **kw)


@pytest.fixture(scope='module')
def stored(tmp_path_factory):
    "What a sweep gives, and the bytes of its two files"
    store = tmp_path_factory.mktemp('store')/'sweep.csv'
    return sweep(store=store), store, store.read_bytes(), companion(store).read_bytes()


def same_or_named(stored):
    "Sweep again, and read: the same numbers, or an error"
    whole, store, *_ = stored
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        try: read = load_sweep(store)
        except Exception as e: named(e, store, companion(store))
        else:
            kept = read.merge(whole.drop_duplicates(), how='inner')
            assert len(kept) >= len(read) or any('not as they were written' in str(w.message) for w in told)
        try: again = sweep(store=store)
        except Exception as e: named(e, store, companion(store))
        else: assert_frame_equal(again, whole, check_exact=True)


@often
@given(data=st.data())
def test_a_store_that_was_harmed(stored, data):
    _, store, rows, grid = stored
    file, raw = data.draw(st.sampled_from([(store, rows), (companion(store), grid)]))
    store.write_bytes(rows)
    companion(store).write_bytes(grid)
    file.write_bytes(harmed(data, raw))
    same_or_named(stored)


@often
@given(data=st.data())
def test_a_grid_that_says_something_else(stored, data):
    _, store, rows, grid = stored
    store.write_bytes(rows)
    companion(store).write_text(json.dumps(edited(data, json.loads(grid))))
    same_or_named(stored)


def fit(path, epochs=2, net=None):
    "A fit that can be resumed; the weights it ends with"
    net = net or Net()
    learn = Learner(DataLoaders(BATCHES*2, []), net, nn.CrossEntropyLoss(), lr=0.01,
                    cbs=Resumable(path, 1, verbose=False))
    learn.remove_cbs([c for c in learn.cbs if type(c).__name__ == 'ProgressCallback'])
    with learn.no_logging(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(epochs)
    return [p.detach() for p in net.parameters()]


@pytest.fixture(scope='module')
def half(tmp_path_factory):
    "A file of a fit that stands in mid-run, and what the whole fit ends with"
    path = tmp_path_factory.mktemp('fit')/'run.safetensors'
    class Stop(Exception): pass
    class Stopping(Net):
        calls = 0
        def forward(self, x):
            self.calls += 1
            if self.calls == 4: raise Stop
            return super().forward(x)
    with pytest.raises(Stop): fit(path, net=Stopping())
    return path, path.read_bytes(), fit(path.with_name('other.safetensors'))


def goes_on_or_named(path, end):
    try: again = fit(path)
    except Exception as e: named(e, path)
    else: assert all(torch.equal(a, b) for a, b in zip(again, end))


@often
@given(data=st.data())
def test_a_state_that_was_harmed(half, data):
    path, raw, end = half
    path.write_bytes(harmed(data, raw))
    goes_on_or_named(path, end)


@often
@given(data=st.data())
def test_a_state_that_says_something_else(half, data):
    "With a seal that fits: what is missing or of another type is an error, before anything is trained"
    path, raw, end = half
    path.write_bytes(raw)
    state = load_state(path)
    at = data.draw(st.sampled_from([p for p in places(state) if 0 < len(p) < 4]))
    inner = state
    for k in at[:-1]: inner = inner[k]
    if not isinstance(inner, (dict, list)): return
    if data.draw(st.booleans()): del inner[at[-1]]
    else: inner[at[-1]] = data.draw(st.none() | st.just('x') | st.just([]) | st.just({}))
    save_state(path, state)
    try: fit(path)
    except Exception as e: named(e, path)
