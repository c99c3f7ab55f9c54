"The robustness card: its rows are the sweeps' own, its numbers come out by hand, and it resumes after an interrupt."
from dataclasses import dataclass
from typing import ClassVar

import pandas as pd
import pytest
import torch
from torch import nn

from noisyseg.measure.evaluation import Batches, draw_seed, scores
from noisyseg.data.corruptions import Corruption
from noisyseg.measure.card import card_summary, card_table, robustness_card, standard_disturbances
from noisyseg.measure.corruption_errors import mean_corruption_error
from noisyseg.measure.store import load_sweep
from noisyseg.measure.sweeps import sweep
from noisyseg.perturb.laws import AbsoluteGaussian, MaxGaussian
from noisyseg.perturb.clone import perturbed
from noisyseg.measure.summary import summarise
from noisyseg.perturb.disturbance import Disturbance, Law
from noisyseg.perturb.quantization import Quantize
from noisyseg.show.card import plot_card
from noisyseg.show.pictures import plain_text
from noisyseg.perturb.selectors import conv_and_norm

NAMES = ['a', 'b', 'c']
TWO = [Corruption(c, table='cifar') for c in ('fog', 'contrast')]
USUAL = standard_disturbances((32, 32), ('fog', 'contrast'))


def net(seed, classify):
    torch.manual_seed(seed)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)] if classify else [nn.Conv2d(4, 3, 1)]
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), *head).eval()


def data(classify):
    g = torch.Generator().manual_seed(0)
    shape = (12,) if classify else (12, 32, 32)
    return [(torch.rand(12, 3, 32, 32, generator=g), torch.randint(0, 3, shape, generator=g))]


def card(classify=True, **kw):
    models = {('a', 0): net(0, classify), ('a', 1): net(1, classify), ('b', 0): net(2, classify),
              ('b', 1): net(3, classify)}
    args = dict(models=models, dl=data(classify), disturbances=USUAL, levels={'corrupted inputs': (1, 3)}, draws=3,
                class_names=NAMES, progress=False)
    return robustness_card(**{**args, **kw})


@pytest.mark.parametrize('classify', [True, False])
def test_the_rows_are_the_sweeps_own(classify):
    df, metric = card(classify), 'accuracy' if classify else 'mIoU'
    model, batches = net(2, classify), Batches(data(classify))
    with perturbed(model, MaxGaussian(0.1), conv_and_norm, draw_seed(0, 2)):
        by_hand = {s[0]: s[2] for s in scores(model, batches, NAMES)}
    row = df.query("model == 'b' and train_seed == 0 and disturbance == 'weight noise' and level == 0.1 and draw == 2 "
                   "and metric == @metric")
    assert row['value'].item() == pytest.approx(by_hand[metric], abs=2 / 12 if classify else 1e-3)
    theirs = sweep(model, batches, Quantize(), levels=(2, 3, 4, 6), class_names=NAMES, progress=False)
    theirs = theirs.query("metric == @metric").set_index('level')['value']
    ours = df.query("model == 'b' and train_seed == 0 and disturbance == 'fewer bits' and metric == @metric").set_index(
            'level')['value']
    assert ours.index.is_monotonic_decreasing and ours.to_dict() == theirs[ours.index].to_dict()
    theirs = sweep(model, batches, TWO, levels=(1, 3), class_names=NAMES, progress=False)
    ours = df.query("model == 'b' and train_seed == 0 and disturbance == 'corrupted inputs'")
    assert ours['value'].tolist() == pytest.approx(theirs['value'].tolist(), nan_ok=True)


def test_a_list_is_measured_whole():
    "What shares a label is averaged, as in a dict; at levels that all of them name"
    wide = MaxGaussian(per='tensor')
    df = card(disturbances=[*TWO, MaxGaussian(), wide], draws=1)
    assert df.equals(card(disturbances={'corrupted inputs': TWO, 'weight noise': [MaxGaussian(), wide]}, draws=1))
    assert df['law'].nunique() == 5
    with pytest.raises(ValueError, match='is there twice'): card(disturbances=[wide, wide], levels=None)
    with pytest.raises(ValueError, match="whose levels differ; give each a label of its own: `{'first'"):
        card(disturbances={'noise': [MaxGaussian(), AbsoluteGaussian()]}, levels=None)
    card(disturbances={'noise': [MaxGaussian(), AbsoluteGaussian()]}, levels={'noise': 0.1}, draws=1)


def test_mce_and_cost_are_by_the_baseline():
    df = card(cost={'a': 30, 'b': 45}, baseline='b')
    table = card_table(df)
    assert table['training cost', 'b = 1'].tolist() == ['0.67×', '1.00×']
    models = {('a', 0): net(0, True), ('a', 1): net(1, True), ('b', 0): net(2, True), ('b', 1): net(3, True)}
    rows = sweep(models, data(True), TWO, levels=(0, 1, 3), progress=False)
    expected = mean_corruption_error(rows, 'b').groupby('model')['mCE'].mean()
    assert table['mCE'].iloc[:, 0].tolist() == [f'{expected[m]:.3f}' for m in 'ab']
    assert card_table(card(cost={'a': 30}, baseline='b'))['training cost', 'b = 1'].tolist() == ['unknown', 'unknown']


def test_intervals_over_draws_and_seeds():
    df = card()
    draws, seeds = card_summary(df), card_summary(df, 'seed')
    noisy = lambda s: s[s['disturbance'].isin([*USUAL][:3])]
    assert (noisy(draws)['n'] == 3).all() and (seeds['n'] == 2).all()
    assert draws['mean'].tolist() == pytest.approx(seeds['mean'].tolist())
    values = df.query("model == 'a' and disturbance == 'clean' and metric == 'accuracy'")['value']
    clean = seeds.query("model == 'a' and disturbance == 'clean'").iloc[0]
    assert clean['half'] == pytest.approx(12.7062 * values.std() / 2**0.5, rel=1e-4) and clean['lost'] == 0


def test_a_card_resumes_and_grows(tmp_path):
    class Stops(nn.Module):
        def __init__(self): super().__init__(); self.body, self.left = net(0, True), 25
        def forward(self, x):
            self.left -= 1
            if self.left < 0: raise KeyboardInterrupt
            return self.body(x)
    model, whole = Stops(), card(models={'a': net(0, True)})
    with pytest.raises(KeyboardInterrupt): card(models={'a': model}, store=tmp_path/'card.csv')
    model.left = 10**9
    card(models={'a': model}, store=tmp_path/'card.csv')
    model.left = 1                                           # the one batch that a sweep begins with
    resumed = card(models={'a': model}, store=tmp_path/'card.csv')
    pd.testing.assert_frame_equal(resumed, whole)
    model.left = 10**9
    grown = card(models={'a': model, 'b': net(2, True)}, store=tmp_path/'card.csv', draws=4)
    pd.testing.assert_frame_equal(grown.query("model == 'a' and draw < 3").reset_index(drop=True), whole)


def test_a_frame_from_disk_draws_the_same(tmp_path):
    df = card()
    df.to_csv(tmp_path/'card.csv', index=False)
    back = pd.read_csv(tmp_path/'card.csv', keep_default_na=False, na_values={'value': '', 'cost': ''})
    assert card_table(back).equals(card_table(df))
    fig = plot_card(back)
    assert len(fig.data) == 6 + 2 and '?: unknown' in fig.layout.title.subtitle.text
    assert 'unknown' not in plot_card(card(cost={'a': 1, 'b': 2})).layout.title.subtitle.text


def test_a_stranger_s_disturbance_is_on_the_card_without_an_edit(tmp_path):
    "A kind that is defined here: its label, order, texts and unit are the card's, also from a store."
    @dataclass(frozen=True)
    class Stuck(Law):
        "A share of the weights is stuck at zero."
        alive: float = 0.9  # share of weights that work
        label: ClassVar[str] = 'stuck at zero'
        levels: ClassVar[tuple] = (0.99, 0.9, 0.5)
        nothing: ClassVar[float] = 1.
        @classmethod
        def amount(cls, level): return f'{100 * (1 - level):.0f} % stuck'
        def __call__(self, weight, z): return weight * (torch.special.ndtr(z) < self.alive)
    try:
        df = card(disturbances=Stuck(), levels=None, store=tmp_path/'card.csv')
        assert [*card_table(df)['stuck at zero'].columns] == ['1 % stuck', '10 % stuck', '50 % stuck']
        assert len(plot_card(df).data) == 2 + 1
        kept = load_sweep(tmp_path/'card.csv')
        assert kept[kept['disturbance'] == 'stuck at zero']['level'].unique().tolist() == [0.99, 0.9, 0.5]
        alone = sweep(net(0, True), data(True), Stuck(), draws=2, progress=False)
        assert alone['level'].unique().tolist() == [1., 0.99, 0.9, 0.5]
        assert summarise(alone)['half'].iloc[0] == 0
    finally: del Disturbance.registry['Stuck']


def test_names_are_shown_as_they_are_and_levels_in_full():
    @dataclass(frozen=True)
    class Heat(MaxGaussian):
        label: ClassVar[str] = '<b>heat</b>'
        share: ClassVar[bool] = False
        levels: ClassVar[tuple] = (0.5, 10.5, 20.05)
    torch.manual_seed(0)
    net, x = nn.Conv2d(3, 3, 1), torch.rand(4, 3, 8, 8)
    name = '<a href="https://elsewhere.example">net</a>'
    df = robustness_card({name: net}, [(x, net(x).argmax(1))], {'<b>heat</b>': Heat()}, draws=2, progress=False)
    fig = plot_card(df, title='')
    assert fig.data[1].x == ('.5', '10.5', '20.05')
    assert all(plain_text(name) == t.y[0] and plain_text(name) in t.hovertext[0][0] for t in fig.data)
    assert '<a' not in fig.to_json() and any(plain_text('<b>heat</b>') == a.text for a in fig.layout.annotations)
