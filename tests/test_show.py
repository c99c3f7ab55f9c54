"What people see: names are text in every figure, a class has one colour, strangers' networks need no wrapper."
import html
import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lab import browser_page, browser_path
from torch import nn

from noisyseg.data.files import distinct_palette
from noisyseg.perturb.disturbance import Disturbance, Law, compose
from noisyseg.perturb.laws import MaxGaussian
from noisyseg.perturb.quantization import Quantize
from noisyseg.perturb.selectors import conv_and_norm
from noisyseg.show.explorer import NoiseExplorer
from noisyseg.show.pictures import class_colors, html_legend, html_picture, plain_text, plot_prediction
from noisyseg.show.plots import plot_classes, plot_sweep
from noisyseg.show.predictor import NoisyPredictor
from noisyseg.show.report import report_html

NASTY = ['<a href="https://other.example/login">road</a>', 'a<br>b', '<b>x</b> &lt;y', '$x^2$', '%{y} %{fullData.name}',
         '<sub>low</sub>&amp;', "<span style='font-size:80px'>big</span>", 'T<5']
fragments = st.sampled_from(['<', '>', '&', '$', '%{', '%', '<br>', '</b>', '&lt;', '&#36;', '"', "'", '\n', 'é',
                             'road'])


@given(st.lists(fragments | st.text(max_size=4), max_size=8).map(''.join))
@settings(max_examples=300, deadline=None)
def test_a_name_is_shown_as_it_is(name):
    "No markup, formula or template is left for plotly to obey, and what it draws is the name"
    shown = plain_text(name)
    assert not re.search(r'[<>$]|%\{', shown)
    controls = r'[\x00-\x1f\x7f-\x9f]'
    entity = lambda m: chr(int(m[1]))
    assert re.sub(r'&#(\d+);', entity, shown) == re.sub(controls, ' ', name)


def sweep_rows(models, classes):
    "Rows as a sweep of a law returns them"
    rows = []
    for i, m in enumerate(models):
        for level in (0., 0.1):
            for draw in range(1 if level == 0 else 3):
                base = dict(model=m, train_seed=0, law='MaxGaussian(n, alpha=2, per=kernel, clip=clamp)', where='all',
                            level=level, draw=draw, seed=0, n_pixels=9)
                value = 0.9 - level - 0.01 * draw - 0.1 * i
                rows.append(dict(base, metric='mIoU', **{'class': ''}, value=value))
                rows += [dict(base, metric='IoU', **{'class': c}, value=value - 0.02 * j) for j,
                         c in enumerate(classes)]
    df = pd.DataFrame(rows)
    df.attrs['models'] = list(models)
    return df


def figures():
    df = sweep_rows(NASTY[:2], NASTY)
    mask = np.arange(64).reshape(8, 8) % len(NASTY)
    yield plot_sweep(df)
    yield plot_classes(df)
    yield plot_prediction(np.zeros((8, 8, 3), np.uint8), mask, {n: mask for n in NASTY[:3]}, vocab=NASTY)


def strings(o):
    if isinstance(o, str): yield o
    elif isinstance(o, dict): yield from (s for v in o.values() for s in strings(v))
    elif isinstance(o, (list, tuple)): yield from (s for v in o for s in strings(v))


@pytest.mark.parametrize('fig', list(figures()))
def test_no_figure_holds_a_raw_name(fig):
    found = list(strings(json.loads(fig.to_json())))
    for name in NASTY: assert not any(name in s for s in found), name
    assert any(plain_text(NASTY[1]) in s for s in found)


def test_names_are_text_in_a_report(tmp_path):
    "In a real browser: no link, no tag, and the names letter by letter"
    browser_path()
    report_html({n: f for n, f in zip(NASTY, figures())}, tmp_path/'names.html')
    with browser_page(tmp_path/'profile') as page:
        page.goto((tmp_path/'names.html').as_uri())
        page.wait_for_timeout(2000)
        assert not page.evaluate("document.querySelectorAll('svg a, main a').length")
        seen = page.evaluate("[...document.querySelectorAll('svg text')].map(t => t.textContent)")
        for name in NASTY: assert any(name in s for s in seen), name
        assert page.evaluate("Math.max(...[...document.querySelectorAll('svg text, svg tspan')].map(t => "
                             "parseFloat(getComputedStyle(t).fontSize)))") < 40


def test_names_are_text_in_html():
    page = html_picture(np.zeros((4, 4, 3), np.uint8), NASTY[0], NASTY[1], NASTY[2]) + html_legend(
        range(len(NASTY)), distinct_palette(len(NASTY)), NASTY)
    assert not re.search(r'<(a|br>b|sub)\b', page) and html.escape(NASTY[0]) in page


@pytest.mark.parametrize('n', [2, 8, 11, 21, 40, 100])
def test_classes_differ_and_keep_their_colour(n):
    "In a figure of a few of them, too"
    names = [f'class {i}' for i in range(n)]
    colours = class_colors(names)
    assert len(set(colours.values())) == n
    few = pd.DataFrame({'class': names[n // 2:]})
    few.attrs['classes'] = names
    assert all(colours[k] == class_colors(few)[k] for k in names[n // 2:])
    df = sweep_rows(['a'], names)
    lines = {t.name: t.line.color for t in plot_classes(df).data if t.mode == 'lines+markers'}
    assert {k: lines[k] for k in names} == colours


@pytest.mark.parametrize('channels', [1, 2, 3, 5])
def test_pictures_of_any_number_of_channels(channels):
    "Are shown by their first three channels, or in grey"
    image = torch.rand(channels, 32, 32)
    net = nn.Conv2d(channels, 3, 1)
    e = NoiseExplorer(net, (image[None], torch.zeros(1, 32, 32, dtype=torch.long)))
    shown = e.picture()[0]
    assert shown.shape == (32, 32, 3) and e.info['channels'] == channels
    want = image[:3] if channels >= 3 else image[:1].expand(3, -1, -1)
    assert np.array_equal(shown, (want.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())
    assert plot_prediction(image, None, np.zeros((32, 32), int)).data
    e.close()


@pytest.mark.parametrize('arch', ['fcn_resnet50', 'deeplabv3_resnet50', 'deeplabv3_mobilenet_v3_large',
                                  'lraspp_mobilenet_v3_large'])
def test_a_torchvision_network_in_five_lines(arch):
    from torchvision.models import segmentation
    net = getattr(segmentation, arch)(weights=None, weights_backbone=None, num_classes=4).eval()
    e = NoiseExplorer(net, torch.rand(1, 3, 32, 32))
    with torch.no_grad(): want = net(e.lens.images)['out'].argmax(1)[0]
    assert np.array_equal(e.frame(dict(level=0.))['preds']['model'][0], want.numpy())
    e.frame(dict(level=0.05))
    with torch.no_grad(): assert torch.equal(net(e.lens.images)['out'].argmax(1)[0], want)   # recovered
    e.close()


def test_one_sigmoid_channel():
    "Foreground where the logit is positive, and never less sure than one half"
    net = nn.Conv2d(3, 1, 1)
    nn.init.constant_(net.weight, 4.)
    nn.init.constant_(net.bias, -6.)
    x = torch.zeros(1, 3, 8, 8)
    x[..., 4:] = 1
    e = NoiseExplorer(net, x)
    classes, confidence = e.frame()['preds']['model']
    assert (classes == (net(x) > 0).long()[0, 0].numpy()).all() and confidence.min() >= 127
    assert len(e.info['classes']) == 2
    e.close()


def test_every_disturbance_is_in_the_menu():
    "Those of noisyseg, of a notebook's cell, and compositions: each can be shown, and the network comes back"
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Halved(Law):
        label = 'halved weights'
        share_: float = 0.5
        def __call__(self, weight, z): return weight * (1 - self.share_)

    @dataclass(frozen=True)
    class Dark(Disturbance):
        label = 'a dark room'
        levels = (0.2, 0.5)
        random = False
        by: float = 0.5
        def batches(self, batches, seed=0): return [(x * (1 - self.by), *y) for x, *y in batches]

    try:
        net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 1)).eval()
        before = {k: v.clone() for k, v in net.state_dict().items()}
        e = NoiseExplorer(net, torch.rand(2, 3, 32, 32), compose(Quantize(4), MaxGaussian(0.2)))
        kinds = {d['id']: d for d in e.info['disturbances']}
        assert {'MaxGaussian', 'Quantize', 'Halved', 'Dark', e.disturbance} <= set(kinds)
        bright = e.picture()[0]
        for k in ('MaxGaussian', 'Quantize', 'Halved', 'Dark', e.disturbance):
            d = kinds[k]
            e.disturbance, e.level = k, d['top']
            assert e.frame()['text'] and e.state()['disturbance'] == k
            assert all(torch.equal(v, before[n]) for n, v in net.state_dict().items())
            assert (e.picture()[0] == bright).all() == (k != 'Dark')
        again = NoiseExplorer.from_state(e.state(), net, torch.rand(2, 3, 32, 32),
                                         disturbance=compose(Quantize(4), MaxGaussian(0.2)))
        assert again.state() == e.state()
        e.close(); again.close()
    finally:
        for name in ('Halved', 'Dark'): Disturbance.registry.pop(name, None)


def test_an_interrupted_sweep_says_so():
    df = sweep_rows(['a'], ['x', 'y'])
    assert 'interrupted' not in plot_sweep(df).layout.title.subtitle.text
    df['interrupted'] = '5 of 7 cells'
    assert 'interrupted' in plot_sweep(df).layout.title.subtitle.text
    assert 'interrupted' in plot_classes(df).layout.title.subtitle.text


def test_more_classes_than_a_byte_holds_are_refused():
    net = nn.Conv2d(3, 300, 1).eval()
    x = torch.rand(1, 3, 16, 16)
    with pytest.raises(ValueError, match='up to 256 classes, got 300'):
        NoisyPredictor({'a': net}, x, {'all': conv_and_norm})('a', 0)
    with pytest.raises(ValueError, match='up to 256 classes, got 300'): NoiseExplorer(net, x, corruptions=False)
