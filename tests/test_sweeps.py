("Sweeps against accidents: interrupts, kills, damaged stores, loaders and networks of other houses. Figures and the "
 "report in a browser.")
import json
import os
import random
import re
import signal
import time
import warnings
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from pandas.testing import assert_frame_equal
from scipy import stats
from test_lab import browser_path, flags
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from noisyseg.data.datasets import scenes
from noisyseg.perturb.laws import AbsoluteGaussian, MaxGaussian, MultiplicativeGaussian
from noisyseg.measure.task import MaskTask, Task
from noisyseg.perturb.disturbance import compose
from noisyseg.perturb.quantization import Quantize
from noisyseg.perturb.selectors import Selector, Spared, conv_and_norm
from noisyseg.show.plots import plot_classes, plot_prediction, plot_protocols, plot_sensitivity, plot_sweep, sweep_table
from noisyseg.show.report import report_html
from noisyseg.measure import sweeps
from noisyseg.measure.evaluation import Batches, draw_seed
from noisyseg.measure.sensitivity import layer_sensitivity
from noisyseg.measure.store import companion, load_sweep
from noisyseg.measure.summary import paired_difference, summarise
from noisyseg.mend.protection import measured_costs
from noisyseg.nets.unet3plus import unet3plus_tiny

law, levels = MaxGaussian(per='channel'), [0, 0.05, 0.2]


class Net(nn.Sequential):
    "A small network; `pause` makes it slow enough to be interrupted, `log` counts its forward passes."
    def __init__(self, seed=0, pause=0.):
        torch.manual_seed(seed)
        super().__init__(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(), nn.Conv2d(6, 3, 1))
        self.pause, self.calls = pause, 0

    def forward(self, x):
        self.calls += 1
        time.sleep(self.pause)
        return super().forward(x)


def batches(n=3):
    g = torch.Generator().manual_seed(1)
    return [(torch.rand(4, 3, 12, 12, generator=g), torch.randint(0, 3, (4, 12, 12), generator=g)) for _ in range(n)]


def models(**kw): return {'a': Net(0, **kw), ('b', 0): Net(1, **kw), ('b', 1): Net(2, **kw)}


def sweep(ms=None, draws=3, levels=levels, store=None, **kw):
    return sweeps.sweep(ms or models(), kw.pop('dl', batches()), kw.pop('law', law), levels=levels, draws=draws,
                        store=store, progress=False, **kw)


def bits(model): return [v.clone() for v in model.state_dict().values()]


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope='module')
def whole(): return sweep()


# --- what is not computed twice
# -------------------------------------------------------------------------------------------------------

class Leaving(nn.Module):
    "A network whose decoder reads what its encoder left aside: by a hook, on an attribute, in a list, in a buffer."
    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.head = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()), nn.Conv2d(16, 3, 1)
        self.way, self.encoder.aside = way, []
        self.encoder.register_buffer('kept', torch.zeros(4, 8, 12, 12))
        if way == 'hook': self.encoder[1].register_forward_hook(lambda m, x, out: setattr(self, 'skip', out))
        else: self.encoder.forward = self.encode

    def encode(self, x):
        out = self.encoder[1](self.encoder[0](x))
        if self.way == 'attribute': self.encoder.skip = out
        elif self.way == 'buffer': self.encoder.kept.copy_(out)
        elif self.way == 'list':
            self.encoder.aside.clear()
            self.encoder.aside.append(out)
        else: self.encoder.top = 9 * out.max().item()
        return out

    def forward(self, x):
        deep, e = self.encoder(x), self.encoder
        skip = {'hook': lambda: self.skip, 'attribute': lambda: e.skip, 'buffer': lambda: e.kept,
                'list': lambda: e.aside[0], 'number': lambda: torch.full_like(deep, e.top)}[self.way]()
        return self.head(torch.cat([deep, skip], 1))


@pytest.mark.parametrize('way', ['hook', 'attribute', 'buffer', 'list', 'number'])
def test_what_an_encoder_leaves_aside_is_of_the_right_picture(way):
    net = Leaving(way).eval()
    with torch.no_grad(): dl = [(x, net(x).argmax(1)) for x, _ in batches()]
    df = sweep(net, dl=dl, levels=[1e-9], draws=4, where='head.*', on='here')
    assert (df.loc[df['metric'] == 'pixel accuracy', 'value'] == 1).all()   # noise of a billionth changes no pixel


def test_selectors_of_one_name_must_pick_the_same_weights(whole):
    "Rows, stores, and what is kept from before the noise know a selector by its name."
    @dataclass(frozen=True)
    class Stem(MaxGaussian):
        where: ClassVar = Selector(lambda name, module, weight: name.startswith('0'))
    @dataclass(frozen=True)
    class Head(MaxGaussian):
        where: ClassVar = Selector(lambda name, module, weight: name.startswith('4'), Stem.where.label)
    with pytest.raises(ValueError, match=r"two selectors are called '<lambda>' .* name of its own: `Selector\("):
        sweep(law={'head': Head(), 'stem': Stem()})
    Head.where = Selector(Head.where.test, 'head')
    both, alone = (sweep(law=d, on='here') for d in ({'head': Head(), 'stem': Stem()}, {'stem': Stem()}))
    assert_frame_equal(both[both['disturbance'] == 'stem'].reset_index(drop=True), alone, check_exact=True)
    with pytest.raises(ValueError, match="'<lambda>' is there twice"):
        layer_sensitivity(Net(), batches(), law, groups=[Stem.where.test, Head.where.test])


# --- interrupted and killed
# -------------------------------------------------------------------------------------------------------

def run_in_child(store, log):
    "What the process to be disturbed does; it notes how it ended and whether its networks are as they were."
    ms = models(pause=0.01)
    before, ended = [bits(m) for m in ms.values()], 'finished'
    try: sweep(ms, store=store)
    except KeyboardInterrupt as e: ended = str(e)
    untouched = all(same(bits(m), b) and m.training for m, b in zip(ms.values(), before))
    log.write_text(f'{ended}; untouched: {untouched}')


# Each sweep in a process of its own, and how long after it has begun to measure which signal comes. Ctrl-C waits for
# the first cell: before that there is nothing to tell of
DISTURBED = '''
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_sweeps import run_in_child
for folder, number, wait in zip(*[iter(sys.argv[2:])] * 3):
    store = Path(folder)/'sweep.csv'
    pid = os.fork()
    if not pid:
        run_in_child(store, store.with_name('log'))
        os._exit(0)
    sign = store if int(number) == signal.SIGINT else Path(f'{store}.grid.json')
    until = time.monotonic() + 120
    while not sign.exists() and time.monotonic() < until: time.sleep(0.001)
    assert sign.exists()
    time.sleep(float(wait))
    os.kill(pid, int(number))
    os.waitpid(pid, 0)
'''


@pytest.fixture(scope='module')
def disturbed(server, tmp_path_factory):
    "Folders with the stores of sweeps that were interrupted (`ctrl-c`) and killed (`0` to `5`) on their way"
    top = tmp_path_factory.mktemp('disturbed')
    jobs = {'ctrl-c': (signal.SIGINT, 0.05)} | {str(i): (signal.SIGKILL, random.Random(i).uniform(0, 0.3))
                                                for i in range(6)}
    for name in jobs: (top/name).mkdir()
    args = [o for name, (number, wait) in jobs.items() for o in (top/name, int(number), wait)]
    [(status, said)] = server.script(DISTURBED, top, {}, args=[os.path.dirname(__file__), *args])
    assert status == 0, said
    return top


def resume(store, whole):
    "What is missing is measured, and only that; the rows are those of a sweep that nothing disturbed."
    kept = len(load_sweep(store).drop_duplicates(['model', 'train_seed', 'level', 'draw'])) if store.exists() else 0
    ms = models()
    assert_frame_equal(sweep(ms, store=store), whole, check_exact=True)
    total = len(whole.drop_duplicates(['model', 'train_seed', 'level', 'draw']))
    # three batches a cell; one to look at each network
    assert sum(m.calls for m in ms.values()) == 3 * (total - kept) + len(ms)
    return kept, total


def test_ctrl_c_keeps_and_resumes(disturbed, whole):
    store = disturbed/'ctrl-c'/'sweep.csv'
    out = (store.with_name('log')).read_text()
    told = re.match(r'interrupted: (\d+) of 21 cells were measured. '
                    r'Their rows are in .*sweep.csv, .*; untouched: True$', out)
    assert told, out
    kept, total = resume(store, whole)
    assert kept == int(told[1]) < total
    assert load_sweep(store).shape == whole.shape


@pytest.mark.parametrize('moment', range(6))
def test_kill_keeps_and_resumes(disturbed, whole, moment):
    store = disturbed/str(moment)/'sweep.csv'
    resume(store, whole)
    assert sorted(f.name for f in store.parent.iterdir()) == ['sweep.csv', 'sweep.csv.grid.json']


class Interrupts(Net):
    def forward(self, x):
        if self.calls == 20: raise KeyboardInterrupt
        return super().forward(x)


def test_ctrl_c_without_a_store_ends_a_script():
    with pytest.raises(KeyboardInterrupt, match="interrupted: 6 of 7 cells were measured. With store='sweep.csv'") as e:
        sweep({'a': Interrupts()})
    assert e.value.__cause__ is None and e.value._render_traceback_() == [str(e.value)]


def test_ctrl_c_without_a_store_gives_a_notebook_what_there_is(whole, monkeypatch):
    monkeypatch.setattr(sweeps, 'in_notebook', lambda: True)
    net = Interrupts()
    before = bits(net)
    with pytest.warns(UserWarning, match='interrupted: 6 of 7 cells'): part = sweep({'a': net})
    assert same(bits(net), before)
    assert part.attrs['interrupted'] == '6 of 7 cells' and set(part['interrupted']) == {'6 of 7 cells'}
    full = whole[whole['model'] == 'a']
    assert_frame_equal(part.drop(columns='interrupted'), full.merge(part[['level', 'draw']].drop_duplicates()).reindex(
        columns=full.columns), check_exact=True)


def test_a_progress_of_false_prints_nothing(capfd):
    sweep({'a': Net()})
    assert capfd.readouterr() == ('', '')


# --- stores that something happened to
# --------------------------------------------------------------------------------------------

@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_store_is_measured_again(tmp_path, whole, data):
    "Lines lost, cut or scribbled over: what is whole is kept, the rest is measured again."
    store = tmp_path/'sweep.csv'
    sweep(store=store)
    lines = store.read_text().splitlines(keepends=True)
    how = data.draw(st.sampled_from(['cut', 'lose', 'scribble', 'twice']))
    at = data.draw(st.integers(1, len(lines) - 1))
    if how == 'cut': text = ''.join(lines)[:data.draw(st.integers(len(lines[0]), len(''.join(lines))))]
    elif how == 'lose': text = ''.join(lines[:at] + lines[at + data.draw(st.integers(1, 5)):])
    elif how == 'twice': text = ''.join(lines[:at] + lines[at - 1:])
    else: text = ''.join([*lines[:at], lines[at].replace(',', ';', data.draw(st.integers(1, 5))), *lines[at + 1:]])
    store.write_text(text)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')   # that cells are not as they were written
        assert_frame_equal(sweep(store=store), whole, check_exact=True)
    in_order = lambda df: df.sort_values(list(df)).reset_index(drop=True)
    assert_frame_equal(in_order(load_sweep(store)), in_order(whole))
    for f in tmp_path.iterdir(): f.unlink()


class Weighted(MaskTask):
    "A task with settings of several kinds."
    def __init__(self, by): self.by, self.names, self.other, self._seen = by, {'a', 'b'}, object(), random.random()


@pytest.mark.parametrize('what, said', [
    ('data', 'data:'), ('build', "model 'a': built otherwise"), ('task', "task settings: 'by=.*, names="),
    ('channels', "model 'a': some spares other channels")])
def test_store_is_of_these_pictures_builds_settings_and_channels(tmp_path, what, said):
    "What is beyond the first batch, the weights, and names; in a store of an earlier version that is not known."
    def run(new=()):
        net, dl, by, rows = Net(), batches(), torch.ones(3), [0]
        if 'data' in new: dl[2] = dl[2][0], 2 - dl[2][1]
        if 'build' in new: net[1].eps = 0.1
        if 'task' in new: by = 2 * by
        if 'channels' in new: rows = [1]
        where = Spared(conv_and_norm, {'0.weight': rows}, 'some')
        return sweep({'a': net}, draws=1, levels=[0.1], store=tmp_path/'a.csv', dl=dl, task=Weighted(by), where=where)
    first, told = run(), companion(tmp_path/'a.csv')
    assert_frame_equal(run(), first)
    with pytest.raises(ValueError, match=f'holds another sweep .{said}'): run(what)
    grid = json.loads(told.read_text())
    for part, key in ((grid, 'task settings'), (grid, 'seal'), (grid['data'], 'all batches'),
                      (grid['models']['a'], 'built'), (grid['models']['a'], 'spared')): del part[key]
    told.write_text(json.dumps(grid))
    assert_frame_equal(run(what), first)


def test_store_is_one_experiment(tmp_path):
    store = tmp_path/'deep'/'folder'/'sweep.csv'
    sweep({'a': Net(0)}, store=store)
    held = store.read_bytes()
    for what, kw in {'seed': dict(seed=1), 'data': dict(dl=batches(2)),
                     'classes': dict(class_names=['x', 'y', 'z']), 'ignore_index': dict(ignore_index=9)}.items():
        with pytest.raises(ValueError, match=what): sweep({'a': Net(0)}, store=store, **kw)
    with pytest.raises(ValueError, match="model 'a': other weights"): sweep({'a': Net(5)}, store=store)
    with pytest.raises(ValueError, match='models: a there, c now'): sweep({'c': Net(0)}, store=store)
    shifted = Net(0)
    shifted[1].running_mean.add_(1)
    with pytest.raises(ValueError, match='other weights'): sweep({'a': shifted}, store=store)
    assert store.read_bytes() == held
    # another law, or other weights, have rows of their own
    for kw in (dict(law=AbsoluteGaussian()), dict(where='0.*')):
        more = sweep({'a': Net(0)}, store=store, **kw)
        assert_frame_equal(more, sweep({'a': Net(0)}, **kw), check_exact=True)
    there = load_sweep(store)
    assert len(there) == 3 * len(more) and len(there.drop_duplicates(['law', 'where'])) == 3
    assert set(json.loads((store.parent/'sweep.csv.grid.json').read_text())['versions']) >= {'noisyseg',
            'torch', 'python'}


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_number_changed_by_hand_is_noticed(tmp_path, whole, data):
    store = tmp_path/'sweep.csv'
    sweep(store=store)
    lines = store.read_text().splitlines()
    at = data.draw(st.integers(1, len(lines) - 1))
    fields = lines[at].rsplit(',', 2)   # …, value, n_pixels
    fields[1] = repr(data.draw(st.floats(0, 1).filter(lambda v: repr(v) != fields[1])))
    store.write_text('\n'.join([*lines[:at], ','.join(fields), *lines[at + 1:]]) + '\n')
    with pytest.warns(UserWarning, match='1 of 21 cells of .* are not as they were written'): load_sweep(store)
    with pytest.warns(UserWarning, match='not as they were written'): again = sweep(store=store)
    assert_frame_equal(again, whole, check_exact=True)
    for f in tmp_path.iterdir(): f.unlink()


def test_stores_are_files_of_known_endings_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    sweep({'a': Net()}, draws=1, store='~/deep/sweep.csv')
    assert (tmp_path/'deep'/'sweep.csv').is_file() and not (tmp_path/'~').exists()
    assert len(load_sweep('~/deep/sweep.csv'))
    for name in ('x.xlsx', 'x', 'x.CSV.gz'):
        with pytest.raises(ValueError, match="expected a name that ends in .csv or .parquet.*x.*csv' will do"):
            sweep({'a': Net()}, store=name)
    with pytest.raises(ValueError, match='is a folder'): sweep({'a': Net()}, store=tmp_path)
    with pytest.raises(ValueError, match="is an address.*store='x.csv' will do"):
        sweep({'a': Net()}, store='s3://bucket/x.csv')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['deep']


def test_levels_of_500_percent_are_told():
    with pytest.warns(UserWarning, match='%'): sweep({'a': Net()}, levels=[0, 5], draws=1)


@pytest.mark.parametrize('kind', [MaxGaussian(), Quantize(), compose(Quantize(3), MaxGaussian())])
def test_a_disturbance_says_itself_what_its_levels_are(kind):
    "No levels given: those that it names, nothing first, mild to strong; one draw where nothing is random."
    df = sweep({'a': Net()}, law=kind, levels=None, draws=2, dl=batches(1))
    nothing = [] if np.isnan(kind.nothing) else [kind.nothing]
    assert df['level'].unique().tolist() == [*nothing, *kind.levels]
    assert set(df['disturbance']) == {kind.label} and set(df['law']) == {kind.name}
    assert set(df[df['level'] == kind.levels[0]]['draw']) == ({0, 1} if kind.random else {0})


def test_several_at_once_are_each_as_alone(tmp_path):
    both = {'noise': MaxGaussian(), 'bits': Quantize()}
    df = sweeps.sweep(models(), batches(), both, levels={'noise': [0, .1]}, draws=2, progress=False,
                      store=tmp_path/'s.csv')
    for label, d in both.items():
        alone = sweeps.sweep(models(), batches(), {label: d}, levels=[0, .1] if label == 'noise' else None, draws=2,
                             progress=False)
        assert_frame_equal(df[df['disturbance'] == label].reset_index(drop=True), alone, check_exact=True)
    kept = load_sweep(tmp_path/'s.csv')
    assert list(kept.attrs['disturbances']) == ['noise', 'bits'] and kept.attrs['metric'] == 'mIoU'


class Fill(Task):
    "A stranger's task: how much of the pictures is class 0?"
    metric = 'fill'
    def meter(self, classes, ignore_index=None):
        seen = []
        class Meter:
            def update(self, out, y): seen.append((out.argmax(1) == 0).float().mean().item())
            def rows(self): return [('fill', '', sum(seen) / len(seen), len(seen))]
        return Meter()


def test_a_task_of_ones_own():
    x = torch.rand(4, 3, 12, 12)
    df = sweep({'a': Net()}, dl=[(x, torch.rand(4))], task=Fill(), draws=2)
    with torch.no_grad(): assert df['value'].iloc[0] == pytest.approx((Net().eval()(x).argmax(1) == 0).float().mean())
    assert set(df['metric']) == {'fill'} and summarise(df)['n'].tolist() == [1, 2, 2]
    with pytest.raises(TypeError, match=r'make one: Fill\(\)'): sweep({'a': Net()}, task=Fill)


def test_store_extends(tmp_path):
    store = tmp_path/'sweep.csv'
    first = Net(0)
    sweep({'a': first}, draws=2, levels=[0.1], store=store)
    calls = first.calls
    grown = sweep({'a': first, 'c': Net(3)}, draws=3, levels=[0, 0.1, 0.3], store=store)
    assert_frame_equal(grown, sweep({'a': Net(0), 'c': Net(3)}, draws=3, levels=[0, 0.1, 0.3]), check_exact=True)
    assert first.calls - calls == 1 + 3 * (1 + 6 - 2)
    less = dict(draws=2, levels=[0.1])
    assert_frame_equal(sweep({'a': first}, store=store, **less), sweep({'a': Net(0)}, **less), check_exact=True)
    assert len(load_sweep(store)) == len(grown)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 10, allow_nan=False), min_size=1, max_size=4), st.permutations(['a', 'b']))
def test_cells_do_not_depend_on_company(found, order):
    "A cell's value is the same alone, among other levels, and in any order of models."
    nets, dl = {'a': Net(0), 'b': Net(1)}, batches(1)
    company = sweep({k: nets[k] for k in order}, levels=found, draws=2, dl=dl)
    one = company['level'].iloc[0]
    alone = sweep({'b': nets['b']}, levels=[one], draws=2, dl=dl)
    there = company[(company['model'] == 'b') & (company['level'] == one)]
    assert_frame_equal(alone, there.reset_index(drop=True), check_exact=True)


# --- what may be handed over
# ------------------------------------------------------------------------------------------------------

def test_loaders_agree(whole):
    x, y = (torch.cat(t) for t in zip(*batches()))
    loader = DataLoader(TensorDataset(x, y), 4)
    for dl in (loader, iter(batches()), (b for b in batches()), tuple(batches()),
               DataLoader(TensorDataset(x, y), 4, num_workers=1)):
        assert_frame_equal(sweep(dl=dl), whole, check_exact=True)
    assert_frame_equal(sweep(dl=loader, cache_mb=0), whole, check_exact=True)


def test_fastai_loaders_bring_their_names():
    dls = scenes(n_train=4, n_valid=6, size=32, bs=3, seed=0)
    torch.manual_seed(0)
    net = unet3plus_tiny(dls.n_classes)
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    expected = random.random(), np.random.rand(), torch.rand(2)
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    by_dls = sweeps.sweep(net, dls, law, levels=[0, 0.1], draws=2, progress=False)
    assert (random.random(), np.random.rand()) == expected[:2] and torch.equal(torch.rand(2), expected[2])
    assert list(by_dls['class'].unique()) == [*dls.vocab, '']
    assert_frame_equal(by_dls, sweeps.sweep(net, dls.valid, law, levels=[0, 0.1], draws=2,
                                            class_names=dls.vocab, progress=False), check_exact=True)
    with pytest.raises(ValueError, match='shuffles'): sweeps.sweep(net, dls.train, law, levels=0.1, progress=False)
    sens = layer_sensitivity(net, dls, law.at(0.1), draws=2, progress=False)
    assert {'encoder.levels.0', 'decoder.0', 'heads'} <= set(sens['group'])


def test_networks_of_other_houses():
    lraspp = pytest.importorskip('torchvision').models.segmentation.lraspp_mobilenet_v3_large
    timm = pytest.importorskip('timm')
    class Timm(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = timm.create_model('resnet18', features_only=True, out_indices=(1,))
            self.head = nn.Conv2d(64, 3, 1)
        def forward(self, x): return nn.functional.interpolate(self.head(self.body(x)[0]), x.shape[-2:])
    tied = Net(0)
    tied.append(nn.Conv2d(3, 3, 1)).append(nn.Conv2d(3, 3, 1))
    tied[6].weight = tied[5].weight
    normed = Net(0)
    nn.utils.parametrizations.weight_norm(normed[0])
    found = {'lraspp': lraspp(weights=None, weights_backbone=None, num_classes=3), 'timm': Timm(), 'tied': tied,
             'normed': normed,
             'half': Net(0).to(torch.bfloat16), 'double': Net(0).double(),
             'channels last': Net(0).to(memory_format=torch.channels_last)}
    g = torch.Generator().manual_seed(0)
    dl = [(torch.rand(2, 3, 64, 64, generator=g), torch.randint(0, 3, (2, 64, 64), generator=g))]
    before, flags = {k: bits(m) for k, m in found.items()}, {k: [s.training for s in m.modules()] for k,
                                                             m in found.items()}
    df = sweeps.sweep(found, dl, law, levels=[0, 0.1], draws=2, progress=False)
    for k, m in found.items(): assert same(bits(m), before[k]) and [s.training for s in m.modules()] == flags[k], k
    assert set(df['model']) == set(found) and df[df['metric'] == 'mIoU']['value'].between(0, 1).all()


def test_pixels_that_do_not_count():
    x, y = batches(1)[0]
    void = y.clone()
    void[:, :4] = 255
    net = Net(0).eval()
    df = sweep({'a': net}, levels=[0], dl=[(x, void)], ignore_index=255)
    right = (net(x).argmax(1) == y)[:, 4:].float().mean().item()
    assert df[df['metric'] == 'pixel accuracy']['value'].item() == pytest.approx(right)
    assert df['n_pixels'].iloc[-1] == y[:, 4:].numel()
    with pytest.raises(ValueError, match='ignore_index'): sweep({'a': net}, dl=[(x, void)])


def test_laws_and_hand_made_noise():
    net, dl = Net(0).eval(), batches(1)
    for which in (MaxGaussian(alpha=1.5), AbsoluteGaussian(), MultiplicativeGaussian()):
        df = sweep({'a': net}, law=which, levels=[0.3], draws=2, dl=dl)
        with which.at(0.3).acting(net, None, draw_seed(0, 1)), torch.no_grad():
            right = (net(dl[0][0]).argmax(1) == dl[0][1]).float().mean().item()
        assert df[(df['draw'] == 1) & (df['metric'] == 'pixel accuracy')]['value'].item() == pytest.approx(right,
                abs=2 / 576)


def test_nan_weights_are_told_and_recovered():
    class Breaks(Net):
        def forward(self, x): return super().forward(x) * (float('nan') if self[0].weight.abs().max() > 1 else 1)
    net = Breaks(0)
    before = bits(net)
    with pytest.warns(UserWarning, match='nan'): sweep({'a': net}, levels=[50.], draws=1, law=AbsoluteGaussian())
    assert same(bits(net), before)


def test_memory_stays_flat():
    import resource
    net, dl = Net(0), batches(1)
    sweep({'a': net}, dl=dl, draws=30)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3): sweep({'a': net}, dl=dl, draws=60)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 64 * 1024  # kB


# --- means and intervals
# ----------------------------------------------------------------------------------------------------------

def test_intervals_against_scipy(whole):
    d = whole[(whole['model'] == 'b') & (whole['metric'] == 'mIoU') & (whole['level'] == 0.2)]
    draws, seeds = (d.groupby(c)['value'].mean().to_numpy() for c in ('draw', 'train_seed'))
    for unit, v in (('draw', draws), ('seed', seeds)):
        s = summarise(whole, unit=unit).query("model == 'b' and level == 0.2").iloc[0]
        low, high = stats.t.interval(0.95, len(v) - 1, v.mean(), stats.sem(v))
        assert (s['mean'], s['low'], s['high'], s['n']) == pytest.approx((v.mean(), low, high, len(v)))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        p = paired_difference(whole, 'a', 'b')
    assert p['level'].tolist() == levels and p['n'].tolist() == [1, 3, 3]
    # from one number, nothing is clear
    assert not p['clear'].iloc[0] and p[['low', 'high', 'half']].iloc[0].isna().all()


def test_a_draw_that_is_only_half_there_is_left_out(whole):
    cut = whole[~((whole['model'] == 'b') & (whole['train_seed'] == 1) & (whole['draw'] == 2))]
    assert summarise(cut).query("model == 'b'")['n'].tolist() == [1, 2, 2]
    assert paired_difference(cut, 'a', 'b')['n'].tolist() == [1, 2, 2]


# --- figures --------------------------------------------------------------------------------------------------------
# --------------

def figures(df):
    trained_at = {'a': 0, 'b': 0.2}
    sens = layer_sensitivity(Net(0), batches(), law.at(0.2), draws=3, progress=False)
    x, y = batches(1)[0]
    picture = plot_prediction(x[0], y[0], Net(0)(x)[0])
    return {'sweep': plot_sweep(df), 'seeds': plot_sweep(df, unit='seed'), 'classes': plot_classes(df),
            'protocols': plot_protocols(df, trained_at), 'sensitivity': plot_sensitivity(sens), 'prediction': picture}


def test_figures_hold_the_numbers(whole):
    figs = figures(whole)
    line = next(t for t in figs['sweep'].data if t.name == 'a')
    assert list(line.y) == pytest.approx(100 * summarise(whole).query("model == 'a'")['mean'])
    assert list(line.x) == pytest.approx([0, 5, 20])
    colour = {t.name: t.line.color for t in figs['sweep'].data if t.name}
    only_b = whole[whole['model'] == 'b']
    assert {t.line.color for t in plot_sweep(only_b).data if t.name == 'b'} == {colour['b']} != {colour['a']}
    assert sweep_table(whole).loc['a', 'n = 20 %'].count('±') == 1
    for name, f in figs.items():
        layout = f.to_dict()['layout']
        assert layout['template']['layout']['paper_bgcolor'] == 'rgba(0,0,0,0)', name
        assert len(f.to_json()) < 200_000, name


def test_single_draws_levels_and_many_classes():
    x, y = torch.rand(2, 3, 16, 16), torch.randint(0, 21, (2, 16, 16))
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 21, 1))
    df = sweeps.sweep(net, [(x, y)], law, levels=0.1, draws=1, progress=False)
    for f in (plot_sweep(df), plot_classes(df)): assert f.to_json()
    assert '±' not in sweep_table(df).to_string()


def test_report_offline_in_a_browser(tmp_path, whole):
    browser_path()
    sync_api = pytest.importorskip('playwright.sync_api')
    figs = figures(whole)
    items = {**figs, 'In numbers': sweep_table(whole), 'text': 'a < b'}
    path = report_html(items, tmp_path/'report.html', title='A <report>', meta={'seed': 0})
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=browser_path(), args=flags)
        page = browser.new_context(offline=True, viewport={'width': 1000, 'height': 900}).new_page()
        told, asked = [], []
        page.on('pageerror', lambda e: told.append(str(e)))
        page.on('console', lambda m: told.append(m.text) if m.type == 'error' else None)
        page.on('request', lambda r: asked.append(r.url))
        page.goto(path.as_uri())
        page.wait_for_function(f"document.querySelectorAll('.plotly-graph-div .main-svg').length >= {len(figs)}",
                               timeout=20_000)
        lines = page.evaluate("document.querySelectorAll('#figure-0 .scatterlayer .trace').length")
        box = page.locator('#figure-0 .point').last.bounding_box()
        page.mouse.move(box['x'] + 4, box['y'] + 4)
        page.wait_for_selector('#figure-0 .hoverlayer .legendtext, #figure-0 .hoverlayer .hovertext', timeout=5_000)
        wide = page.evaluate('document.documentElement.scrollWidth')
        browser.close()
    assert told == [] and lines >= 2 and wide <= 1000
    assert [u for u in asked if not u.startswith(('file:', 'data:', 'blob:'))] == []


def test_rows_that_pandas_read(tmp_path):
    "The same means and differences whether `load_sweep` reads a file or pandas, which has nan where there is no class"
    x = torch.randn(4, 3, 8, 8)
    y = torch.randint(0, 3, (4, 8, 8))
    models = {(name, seed): Net(seed + 10 * i) for i, name in enumerate('ab') for seed in (0, 1)}
    file = tmp_path/'rows.csv'
    sweeps.sweep(models, [(x, y)], MaxGaussian(), levels=[0, 0.1], draws=2, store=file, progress=False)
    ours, theirs = load_sweep(file), pd.read_csv(file)
    assert theirs['class'].isna().any()
    for unit in ('draw', 'seed'):
        assert_frame_equal(summarise(theirs, unit=unit), summarise(ours, unit=unit))
        assert_frame_equal(paired_difference(theirs, 'a', 'b', unit=unit), paired_difference(ours, 'a', 'b', unit=unit))
    assert len(sweep_table(theirs)) == 2


def test_names_that_pandas_takes_for_missing_are_asked_for(tmp_path):
    x = torch.randn(4, 3, 8, 8)
    y = torch.randint(0, 3, (4, 8, 8))
    for models, names in (({'None': Net(0), 'b': Net(1)}, 'rst'), ({'a': Net(0)}, ['NA', 's', 't'])):
        file = tmp_path/f'{len(models)}.csv'
        sweeps.sweep(models, [(x, y)], MaxGaussian(), levels=[0, 0.1], draws=2, store=file, progress=False,
                     class_names=names)
        with pytest.raises(ValueError, match='no name in the column') as e: summarise(pd.read_csv(file))
        again = eval(str(e.value).split('`')[1], dict(load_sweep=load_sweep, path=file))
        assert set(summarise(again)['model']) == {*models} and 'NA' in {*names, 'NA'}


def test_the_line_for_a_loader_that_shuffles_pastes():
    "fastai's loaders have `new`, torch's have not"
    torch.manual_seed(0)
    set_of = TensorDataset(torch.randn(6, 3, 8, 8), torch.randint(0, 3, (6, 8, 8)))
    for dl in (DataLoader(set_of, 4, shuffle=True), scenes(4, 2, 16, 2).train):
        with pytest.raises(ValueError, match='shuffles') as e: Batches(dl)
        mended = eval(str(e.value).split('`')[-2], dict(dl=dl, torch=torch))
        assert len(Batches(mended)) == len(mended)


@pytest.mark.parametrize('law', [MaxGaussian(0.), MultiplicativeGaussian(0.), Quantize(0)])
def test_the_line_for_a_level_at_which_nothing_happens_pastes(law):
    x = torch.randn(2, 3, 8, 8)
    y = torch.randint(0, 3, (2, 8, 8))
    for f in (layer_sensitivity, measured_costs):
        with pytest.raises(ValueError, match='nothing happens') as e: f(Net(0), [(x, y)], law, progress=False)
        assert eval(str(e.value).split('`')[1], globals()) == law.at(law.levels[0])
