"""The explorer as people use it: in a real JupyterLab, as a page without a kernel, in a real browser.

See test_lab.py for when that is skipped."""
import os
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import root
from test_lab import (browser_page, browser_path, nameless, ours, problems, run_notebook, served, unreachable,
                      write_notebook)

cells = ['from noisyseg.show.explorer import NoiseExplorer\nfrom noisyseg.perturb.disturbance import Law\nfrom '
         'dataclasses '
         'import dataclass',
         '@dataclass(frozen=True)\nclass Failing(Law):\n    share: float = 0.1\n    def __call__(self, weight, z): '
         'raise RuntimeError("this law fails")',
         'import pandas as pd\nfrom noisyseg.mend.tolerances import Tolerance\nfrom noisyseg.perturb.laws import '
         'MaxGaussian\nstands = Tolerance(0.05, MaxGaussian(0.05), 0.9, 0.02, 0.9, 0.95, '
         'pd.DataFrame(dict(level=[0.05])))',
         'e = NoiseExplorer(tolerances=stands)\ne']


class Seen:
    "What a person does with an explorer on a page, and sees there"
    def __init__(self, page):
        self.page, self.root = page, page.locator('.nse').last
        self.root.wait_for()
        self.wait(lambda: self.data('level') is not None)

    def more(self):
        "Open what is not there at first sight"
        button = self.root.locator('button.more')
        if button.get_attribute('aria-expanded') == 'false': button.click()
        return self

    def data(self, key): return self.root.get_attribute(f'data-{key}')
    def js(self, code, *args): return self.root.evaluate(code, *args)

    def wait(self, f, seconds=60):
        for _ in range(int(seconds * 50)):
            if f(): return
            self.page.wait_for_timeout(20)
        raise AssertionError(f'waited {seconds} s in vain; level {self.data("level")}, error '
                             f'{self.root.locator(".error").inner_text()!r}')

    def pixels(self):
        "A number for each panel that changes with its picture"
        return self.js('''el => [...el.querySelectorAll('canvas')].map(c => {
            const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data
            let h = 0; for (let i = 0; i < d.length; i += 4) h = (h * 31 + d[i] + 2 * d[i + 1] + 3 * d[i + 2]) | 0
            return h })''')

    def levelled(self, level): self.wait(lambda: abs(float(self.data('level')) - level) < 1e-3)
    def slide(self, fraction):
        "Drag the slider's thumb to a share of its way"
        self.root.locator('.level').scroll_into_view_if_needed()
        box = self.root.locator('.level input[type=range]').bounding_box()
        now = self.js('el => { const s = el.querySelector(".level input[type=range]"); return s.value / s.max }')
        y, at = box['y'] + box['height'] / 2, lambda f: box['x'] + 8 + f * (box['width'] - 16)
        self.page.mouse.move(at(now), y)
        self.page.mouse.down()
        self.page.mouse.move(at(fraction), y, steps=8)
        self.page.mouse.up()


def use(seen):
    "Everything that both kinds of explorer do"
    page = seen.page
    root = seen.root
    at_first = root.locator('.level, .bar').locator('button, input, select').filter(visible=True)
    assert at_first.count() == 6   # the slider, its number, a new draw, the sample before and after, more
    level = root.locator('.level input[type=range]').input_value()
    assert ('n = ' if float(level) else 'as trained') in root.locator('.level .unit').inner_text()
    assert 'taken for' in root.locator('.legend').inner_text()
    for name in root.locator('figcaption .name').all():
        assert name.evaluate('e => e.scrollWidth <= e.clientWidth + 1')   # no name is cut off
    before = seen.pixels()
    assert len(before) == 6 and len(set(before)) >= 5
    seen.slide(0.6)
    seen.wait(lambda: float(seen.data('level')) > 0.1)
    seen.wait(lambda: seen.pixels() != before)
    after = seen.pixels()
    assert after[0] == before[0] and after[3] == before[3]                          # image and truth stay
    assert after[1] != before[1] and after[2] != before[2] and after[4] != before[4]  # masks and errors change
    root.locator('.level input[type=number]').fill('0.15')
    root.locator('.level input[type=number]').press('Enter')
    seen.levelled(0.15)
    root.locator('svg.curve').scroll_into_view_if_needed()
    curve = root.locator('svg.curve').bounding_box()
    page.mouse.click(curve['x'] + 34 + 0.9 * (curve['width'] - 42), curve['y'] + 60)
    seen.wait(lambda: float(seen.data('level')) > 0.24)
    root.focus()
    level, shown = float(seen.data('level')), seen.pixels()
    page.keyboard.press('ArrowLeft')
    seen.wait(lambda: float(seen.data('level')) < level)
    page.keyboard.press(']')
    seen.wait(lambda: seen.data('sample') == '1' and seen.pixels()[0] != shown[0])
    seed = seen.data('seed')
    page.keyboard.press('r')
    seen.wait(lambda: seen.data('seed') != seed)
    shown = seen.pixels()
    page.keyboard.press('m')
    seen.wait(lambda: seen.pixels()[1] == seen.pixels()[0] != shown[1])             # no mask: the plain picture
    page.keyboard.press('m')
    seen.wait(lambda: seen.pixels() == shown)
    chip = root.locator('.chip').first
    chip.click()
    seen.wait(lambda: chip.get_attribute('aria-pressed') == 'false' and seen.pixels()[1] != shown[1])
    root.locator('.only').first.click()
    root.locator('.only').first.click()
    seen.wait(lambda: seen.pixels() == shown)
    seen.wait(lambda: seen.js('el => el.querySelector("svg.curve polyline").points.length') >= 13)   # fills by itself
    root.locator('canvas').nth(1).scroll_into_view_if_needed()
    page.mouse.move(*[v + 40 for v in map(root.locator('canvas').nth(1).bounding_box().get, 'xy')])
    seen.wait(lambda: '% sure' in root.locator('.hover').inner_text())
    page.mouse.wheel(0, -600)
    seen.wait(lambda: seen.pixels()[0] != shown[0])
    root.locator('canvas').nth(1).dblclick()
    page.mouse.move(0, 0)
    seen.wait(lambda: seen.pixels() == shown)
    seen.more()
    with page.expect_download() as saved: root.get_by_role('button', name='save the panels as a PNG').click()
    assert saved.value.suggested_filename == 'noisyseg.png'
    assert not nameless(page, '.nse')


drag = '''async ({root, moves}) => {
    // one event after another without waiting, as a dragging hand makes them; then how long until the last is shown
    const s = root.querySelector('.level input[type=range]')
    for (let i = 1; i <= moves; i++) {
        s.value = (.2 + .7 * i / moves) * s.max; s.dispatchEvent(new Event('input'))
        await new Promise(r => setTimeout(r, 16))
    }
    const last = performance.now()
    while (Math.abs(root.dataset.level - s.value) > 1e-6) await new Promise(r => setTimeout(r, 2))
    return performance.now() - last }'''


def corrupt(seen):
    "The picture and all that is made of it change with a corruption and its severity, and come back with none"
    page, root = seen.page, seen.more().root
    choose, severity = root.get_by_label('corruption of the picture'), root.get_by_label('severity of the corruption')
    shown = lambda text: seen.wait(lambda: seen.data('corruption') == text)
    assert choose.locator('option').count() == 20 and choose.locator('optgroup').count() == 4 and severity.is_disabled()
    clean = seen.pixels()
    choose.select_option('motion_blur')
    shown('motion blur, severity 3')
    blurred = seen.pixels()
    # the picture, both masks, the errors
    assert all(a != b for a, b in zip(clean, blurred))
    assert 'motion blur, severity 3' in root.locator('figure').first.inner_text()
    severity.fill('5')
    shown('motion blur, severity 5')
    severest = seen.pixels()
    assert all(a != b for a, b in zip(blurred, severest))
    level = float(seen.data('level'))
    root.focus()
    page.keyboard.press('ArrowLeft')
    seen.wait(lambda: float(seen.data('level')) < level)
    # noise changes masks, not the picture
    assert seen.pixels()[0] == severest[0] and seen.pixels()[1] != severest[1]
    page.keyboard.press('ArrowRight')
    seen.wait(lambda: seen.pixels() == severest)
    page.keyboard.press('c')
    shown('zoom blur, severity 5')
    page.keyboard.press('2')
    shown('zoom blur, severity 2')
    page.keyboard.press('Shift+C')
    shown('motion blur, severity 2')
    choose.select_option('')
    shown('')
    seen.wait(lambda: seen.pixels() == clean)                                       # bit for bit
    assert severity.is_disabled()


def quantize(seen):
    "Quantization has whole bits, 0 for none, and nothing to draw anew"
    page, root = seen.page, seen.more().root
    title, new = root.locator('.level b'), root.get_by_role('button', name='a new draw (R)')
    root.get_by_label('what disturbs the network').select_option('Quantize')
    seen.levelled(4)
    assert title.inner_text() == 'fewer bits' and root.locator('.level .unit').inner_text(
            ) == '4 bits' and not new.is_visible() and not root.get_by_label(
            'seed of the draw').is_visible()
    seed, fine = seen.data('seed'), seen.pixels()
    root.focus()
    page.keyboard.press('r')
    for bits in 3, 2: page.keyboard.press('ArrowLeft'); seen.levelled(bits)
    assert seen.data('seed') == seed and seen.pixels()[1:3] != fine[1:3]
    root.locator('.level input[type=number]').fill('0')
    root.locator('.level input[type=number]').press('Enter')
    seen.levelled(0)
    assert root.locator('.level .unit').inner_text() == 'not quantized'
    clean = seen.pixels()
    # 1 to 12 bits; 0 is a line of its own
    seen.wait(lambda: seen.js('el => el.querySelector("svg.curve polyline").points.length') == 12)
    root.get_by_label('corruption of the picture').select_option('snow')            # a corruption is drawn
    seen.wait(lambda: new.is_visible())
    snow = seen.pixels()[0]
    new.click()
    seen.wait(lambda: seen.data('seed') != seed and seen.pixels()[0] not in (snow, clean[0]))
    root.get_by_label('corruption of the picture').select_option('')
    root.get_by_label('what disturbs the network').select_option('MaxGaussian')
    seen.wait(lambda: title.inner_text() == 'weight noise' and seen.data('corruption') == '' and new.is_visible())


def mend(seen):
    "Layers have bars; what is protected or rescued comes back; draws that disagree are shown"
    page, root = seen.page, seen.more().root
    root.locator('.level input[type=number]').fill('0.25')
    root.locator('.level input[type=number]').press('Enter')
    seen.levelled(0.25)
    marks = root.locator('.track i')
    assert marks.count() == 1 and 'at least 90% of chips' in marks.first.get_attribute('title')
    seen.wait(lambda: root.locator('.layers.old').count() == 0)
    widths = seen.js('el => [...el.querySelectorAll(".layers .bars i")].map(e => parseFloat(e.style.width))')
    assert max(widths) == 100 and min(widths) < 30
    disturbed = seen.pixels()
    first = lambda: float(seen.data('miou').split()[0])
    noisy = first()
    root.locator('.layers input').first.check()
    seen.wait(lambda: seen.data('mended') != '' and seen.pixels()[1] != disturbed[1])
    root.locator('.layers input').first.uncheck()
    seen.wait(lambda: seen.data('mended') == '' and seen.pixels() == disturbed)
    root.get_by_role('button', name='rescued').click()
    seen.wait(lambda: seen.data('mended') == 'rescued' and first() > noisy + 0.05)
    root.get_by_role('button', name='rescued').click()
    root.focus()
    page.keyboard.press('s')
    seen.wait(lambda: seen.data('stability') == 'true' and 'eight draws' in root.locator('.legend').inner_text())
    page.keyboard.press('s')
    seen.wait(lambda: seen.pixels() == disturbed)


def age(seen):
    "A time runs on a logarithmic slider, from now to a year, and comes back"
    root, page = seen.more().root, seen.page
    unit = root.locator('.level .unit')
    root.get_by_label('what disturbs the network').select_option('PhaseChange')
    seen.wait(lambda: unit.inner_text() == '1 day')
    seen.slide(1)
    seen.wait(lambda: unit.inner_text() == '1 year')
    old = seen.pixels()
    seen.slide(0.05 + 0.95 * 0.45)
    seen.wait(lambda: unit.inner_text().endswith('h') and seen.pixels() != old)     # half of the way is hours
    root.focus()
    level = float(seen.data('level'))
    page.keyboard.press('ArrowRight')
    seen.wait(lambda: 1 < float(seen.data('level')) / level < 1.5)
    seen.slide(0)
    seen.levelled(0)


@contextmanager
def live(lab, sources):
    "A notebook with an explorer, run in JupyterLab (conftest's `in_jupyterlab`)"
    project, page, url, token = lab
    write_notebook(project/'nbs'/'live.ipynb', *sources)
    page.complaints.clear()
    page.set_viewport_size(dict(width=1300, height=1500))
    found = run_notebook(page, url, token, 'nbs/live.ipynb', 120)
    assert not list(problems(found))
    try: yield page
    except BaseException:
        page.screenshot(path=Path(os.environ.get('NOISYSEG_SCREENSHOTS', root/'test-screenshots'))/'explorer.png')
        raise


@pytest.mark.timeout(400)
def test_explorer_in_jupyterlab(in_jupyterlab):
    with live(in_jupyterlab, cells) as page:
        seen = Seen(page)
        use(seen)
        mend(seen)
        age(seen)
        root = seen.root
        root.get_by_label('what disturbs the network').select_option('MaxGaussian')
        seen.levelled(0.02)
        corrupt(seen)
        quantize(seen)
        root.get_by_label('what disturbs the network').select_option('MultiplicativeGaussian')
        seen.wait(lambda: root.locator('.level b').inner_text() == 'multiplicative noise')
        # a law that fails is told of, and the explorer lives on
        root.get_by_label('what disturbs the network').select_option('Failing')
        seen.wait(lambda: 'RuntimeError: this law fails' in root.locator('.error').inner_text())
        root.get_by_label('what disturbs the network').select_option('MaxGaussian')
        seen.wait(lambda: not root.locator('.error').is_visible())
        root.get_by_label('per of the noise').select_option('tensor')
        root.get_by_label('alpha of the noise').fill('-1')
        root.get_by_label('alpha of the noise').press('Enter')
        seen.wait(lambda: 'alpha' in root.locator('.error').inner_text())
        root.get_by_label('alpha of the noise').fill('3')
        root.get_by_label('alpha of the noise').press('Enter')
        seen.wait(lambda: not root.locator('.error').is_visible())
        root.get_by_label('which layers are disturbed').select_option('first 5 layers')
        # comes back when the last move is shown
        root.evaluate(f'(root) => ({drag})({{root, moves: 60}})')
        page.set_viewport_size(dict(width=900, height=1200))
        assert seen.js('el => el.scrollWidth <= el.clientWidth + 1')
        assert not ours(page.complaints)


@pytest.mark.timeout(300)
def test_explorer_without_a_kernel(tmp_path):
    "The gallery of the site: alive from a file server, with its state in the address"
    browser_path()
    with served(root/'nbs') as url, browser_page(tmp_path/'profile') as page:
        page.set_viewport_size(dict(width=1200, height=1300))
        page.goto(f'{url}/explorer/index.html')
        seen = Seen(page)
        use(seen)
        page.wait_for_timeout(300)
        state, shown = {k: seen.data(k) for k in ('level', 'sample', 'seed')}, seen.pixels()
        link = page.url
        page.goto('about:blank')
        page.goto(link)
        again = Seen(page)
        again.wait(lambda: again.pixels() == shown)
        assert {k: again.data(k) for k in state} == state
        assert not unreachable(page)
        # on a phone each model stands beside what is wrong in it
        page.set_viewport_size(dict(width=375, height=800))
        assert page.evaluate('document.documentElement.scrollWidth <= innerWidth')
        at = again.js("el => [...el.querySelectorAll('figure')].map(f => [f.offsetTop, f.offsetLeft])")
        rows = [{at[i][0] for i in pair} for pair in ((0, 3), (1, 4), (2, 5))]
        assert all(max(r) - min(r) < 30 for r in rows) and max(rows[0]) < min(rows[1]) < min(rows[2])
        assert not page.complaints
        asked = page.evaluate('performance.getEntriesByType("resource").map(e => e.name)')
        assert asked and all(o.startswith(url) for o in asked)                      # no content network


def test_a_saved_page_needs_nothing_else(tmp_path):
    "One HTML file, opened from disk"
    browser_path()
    import torch

    from noisyseg.show.explorer import NoiseExplorer
    from noisyseg.nets.unet3plus import unet3plus_tiny
    torch.manual_seed(0)
    data = torch.rand(2, 3, 32, 48), torch.randint(0, 3, (2, 32, 48))
    e = NoiseExplorer(unet3plus_tiny(3, upsample='after', deep_supervision=False), data, sample=1, level=0.1)
    e.to_html(tmp_path/'saved.html')
    with browser_page(tmp_path/'profile') as page:
        page.goto((tmp_path/'saved.html').as_uri())
        seen = Seen(page)
        before = seen.pixels()
        seen.levelled(0.1)
        seen.slide(0.9)
        seen.wait(lambda: seen.pixels() != before)
        assert not page.complaints


def test_a_corrupted_page(tmp_path):
    ("A page without a kernel shows the corruption that it was made under: a picture for each draw, and what changed "
     "against the clean prediction")
    browser_path()
    import torch

    from noisyseg.show.explorer import NoiseExplorer
    from noisyseg.nets.unet3plus import unet3plus_tiny
    torch.manual_seed(0)
    e = NoiseExplorer(unet3plus_tiny(3, upsample='after', deep_supervision=False), torch.rand(1, 3, 32, 48),
                      corruption='elastic_transform', severity=5)
    e.to_site(tmp_path/'site', samples=[0], levels=[0, 0.1], seeds=[0, 7])
    with served(tmp_path/'site') as url, browser_page(tmp_path/'profile') as page:
        page.goto(f'{url}/index.html')
        seen = Seen(page)
        assert seen.data('corruption') == 'elastic transform, severity 5' and not seen.root.get_by_label(
                'corruption of the picture').count()
        pictures = []
        for seed in 0, 7:
            for level in 0., 0.1:
                seen.root.locator('.level input[type=number]').fill(str(level))
                seen.root.locator('.level input[type=number]').press('Enter')
                seen.levelled(level)
                assert seen.data('seed') == str(seed)
                f = e.frame(dict(level=level, seed=seed))
                changed = (f['preds']['model'][0] != f['reference']['model']).mean()
                assert seen.root.locator('figure').nth(3).inner_text().split() == ['changed', f'{100 * changed:.1f}',
                        '%', 'of', 'pixels']
            pictures.append(seen.pixels()[0])
            seen.root.get_by_role('button', name='a new draw (R)').click()
        assert pictures[0] != pictures[1]
        seen.wait(lambda: 'corruption=elastic_transform&severity=5' in page.url)
        assert not page.complaints


def test_the_slider_does_not_corrupt_again(monkeypatch):
    "One corruption for each sample, severity and seed, whatever the noise and however many models"
    import torch

    from noisyseg.show.explorer import NoiseExplorer
    from noisyseg.show.predictor import NoisyPredictor
    from noisyseg.nets.unet3plus import unet3plus_tiny
    made, corrupt = [], NoisyPredictor._corrupt
    monkeypatch.setattr(NoisyPredictor, '_corrupt', lambda self, *args: made.append(args) or corrupt(self, *args))
    nets = {k: unet3plus_tiny(3, upsample='after', deep_supervision=False) for k in 'ab'}
    e = NoiseExplorer(nets, (torch.rand(2, 3, 32, 32), torch.randint(0, 3, (2, 32, 32))), corruption='snow')
    e.send = lambda *args: None
    for i in range(20):
        e._answer(None, dict(id=i, state={**e.state(), 'level': i / 40, 'where': e.info['wheres'][i % 2]}, have=None),
                  [])
    assert len(made) == 1
    for changes in dict(severity=4), dict(seed=9), dict(sample=1), dict(corruption='fog'): e.frame(changes)
    assert len(made) == 5
    e.close()


@contextmanager
def cell_runs(n):
    "A notebook cell that runs n times, as far as those can know who ask IPython for it"
    from noisyseg.show import explorer

    class Shell:
        run = 0
        execution_count = 0
        def get_parent(self): return dict(metadata=dict(cellId='a cell'), header=dict(msg_id=self.run))
    shell = Shell()
    before = explorer.get_ipython
    def runs():
        for shell.run in range(n): yield shell.run
    explorer.get_ipython = lambda: shell
    try: yield runs()
    finally: explorer.get_ipython = before


@pytest.mark.parametrize('shown', [True, False])
def test_a_cell_that_runs_again_frees_what_it_made(shown):
    "Networks, the clones of their weights, explorers: at most those of the last run are alive, and none after close()"
    import gc
    import weakref
    import torch
    from noisyseg.nets.unet3plus import unet3plus_tiny
    from noisyseg.show.explorer import NoiseExplorer
    made = []
    with cell_runs(5) as runs:
        for _ in runs:
            net = unet3plus_tiny(3, upsample='after', deep_supervision=False)
            e = NoiseExplorer({'a': net}, torch.rand(2, 3, 16, 16))
            e.frame(dict(level=0.1))
            if shown: assert e.model_id
            clone = next(iter(e.lens._clones.values()))[0]
            made.append([weakref.ref(o) for o in (net, e, clone, e.lens)])
            del clone
    alive = lambda: sum(r() is not None for refs in made for r in refs)
    gc.collect()
    assert alive() <= 4
    e.close()
    del e, net
    gc.collect()
    assert not alive()


def test_a_page_keeps_no_network_of_a_fit():
    ("The dashboard of a monitor stays on its page; the learner, its network and the monitor are free, and a new run "
     "frees it all")
    import gc
    import weakref
    from unittest import mock
    from fastai.learner import Learner
    from ipywidgets.widgets.widget import _instances
    from noisyseg.data.datasets import scenes
    from noisyseg.nets.unet3plus import unet3plus_tiny
    from noisyseg.show.monitor import TrainingMonitor
    import torch.nn.functional as F
    dls = scenes(n_train=2, n_valid=2, size=32, bs=2, seed=0)
    made, widgets = [], []
    with cell_runs(3) as runs, mock.patch('IPython.display.display'):
        for _ in runs:
            monitor = TrainingMonitor(show=True)
            learn = Learner(dls, unet3plus_tiny(7, deep_supervision=False), lambda p, y: F.cross_entropy(p, y.long()),
                            cbs=monitor)
            with learn.no_bar(), learn.no_logging(): learn.fit(1)
            made.append([weakref.ref(o) for o in (learn.model, monitor)])
            del learn, monitor
            gc.collect()
            widgets.append(len(_instances))
    assert not any(r() is not None for refs in made for r in refs)
    assert len(set(widgets)) == 1


SLOW_HOST = """({ms, obeys}) => {
    // the page's host, as slow as a large network; it keeps a list of what it was asked for
    const {explorer} = document.querySelector('.noisyseg-explorer'), {host} = explorer, quick = host.frame.bind(host)
    window.asked = []
    explorer.slow = 0   // on a busy machine the page's first frames may have taken long, too
    host.frame = async (state, shrink = 1) => {
        asked.push(shrink)
        await new Promise(r => setTimeout(r, ms / shrink ** 2))
        return {...await quick(state), shrink: obeys ? shrink : 1}
    } }"""

DRAG_FOR = """async ({root, ms}) => {
    const s = root.querySelector('.level input[type=range]'), until = performance.now() + ms, seen = new Set()
    for (let i = 0; performance.now() < until; i++) {
        s.value = (i * 7 % 13) / 12 * s.max; s.dispatchEvent(new Event('input'))
        await new Promise(r => setTimeout(r, 50))
        seen.add(`${root.dataset.shrink} ${root.querySelectorAll('figcaption .note')[1].textContent.split(':')[0]}`)
    }
    return [...seen] }"""


@pytest.mark.timeout(200)
def test_a_slow_network_is_previewed_while_the_slider_moves(tmp_path):
    "At half the size, said so, and in full when the hand rests; a fast one, or one that refuses, never"
    browser_path()
    with served(root/'nbs') as url, browser_page(tmp_path/'profile') as page:
        page.goto(f'{url}/explorer/index.html')
        seen = Seen(page)
        dragged = lambda **host: (page.evaluate(SLOW_HOST, host),
                                  seen.root.evaluate(f'(root) => ({DRAG_FOR})({{root, ms: 2500}})'))[1]
        shown = dragged(ms=400, obeys=True)
        assert '2 preview' in shown and any(o.startswith('1 mIoU') for o in shown)
        seen.wait(lambda: seen.data('shrink') == '1')                               # it follows by itself
        assert 'preview' not in seen.root.locator('figcaption').nth(1).inner_text()
        asked = page.evaluate('asked')
        assert asked[:2] == [1, 1] and asked.count(2) > 2 and asked[-1] == 1 and 4 not in asked   # 128 / 4 is too small
        page.reload()
        seen = Seen(page)
        assert not any('preview' in o for o in dragged(ms=400, obeys=False))
        page.reload()
        seen = Seen(page)
        dragged(ms=0, obeys=True)
        assert set(page.evaluate('asked')) == {1}


def test_one_wrong_pixel_of_an_absent_class_costs_one_pixel(tmp_path):
    "The mIoU of a single picture is over the classes in its truth, on the page as in what the page says of itself"
    browser_path()
    source = (root/'noisyseg'/'show'/'explorer.js').read_text()
    with browser_page(tmp_path/'profile') as page:
        page.goto('about:blank')
        got = page.evaluate("""async ([source]) => {
            const m = await import('data:text/javascript;base64,' + btoa(unescape(encodeURIComponent(source))))
            const truth = new Uint8Array(100).fill(1), pred = truth.slice()
            truth[0] = 0; pred[0] = 0
            const right = m.scores(truth, pred, 3, null)
            pred[50] = 2
            const wrong = m.scores(truth, pred, 3, null)
            return [right.miou, wrong.miou, wrong.iou.map(v => Number.isNaN(v) ? null : v)] }""", [source])
    assert got[0] == 1 and got[1] == pytest.approx((1 + 98 / 99) / 2) and got[2][2] is None


def test_memory_stays_flat():
    ("A cell that is run again closes the explorer that it showed; a hundred steps of the slider keep no more than "
     "the cache")
    import torch
    from ipywidgets.widgets.widget import _instances

    from noisyseg.show import explorer
    from noisyseg.nets.unet3plus import unet3plus_tiny

    net, images = unet3plus_tiny(3, upsample='after', deep_supervision=False), torch.rand(2, 3, 16, 16)
    widgets, observers = [], []
    with cell_runs(6) as runs:
        for _ in runs:
            e = explorer.NoiseExplorer(net, images, cache_mb=0.01)
            assert e.model_id                                      # it is shown
            widgets.append(len(_instances))
            observers.append(sum(len(v) for by in e._trait_notifiers.values() for v in by.values()))
    assert widgets[-1] == widgets[1] and len(set(observers)) == 1
    for i in range(100): e._answer(None, dict(id=i, state={**e.state(), 'level': i / 400}, have='0'), [])
    assert e.lens._bytes <= 0.01 * 2**20 and len(e.lens._cache) <= 21 and len(e.lens._clones) == 1
    e.close()
    e = explorer.NoiseExplorer(net, torch.rand(2, 3, 32, 32), cache_mb=0.1)
    for i in range(30):
        e._answer(None, dict(id=i, state={**e.state(), 'seed': i, 'corruption': 'elastic_transform'}, have=None), [])
    assert sum(n for _, n in e.lens._cache.values()) == e.lens._bytes <= 0.1 * 2**20
    e.close()


def test_the_gallery_is_small_and_made_of_this_code():
    folder = root/'nbs'/'explorer'
    assert sum(p.stat().st_size for p in folder.iterdir()) < 6e6
    assert sum(p.stat().st_size for p in (root/'noisyseg'/'show'/'models').iterdir()) < 3e6
    assert (folder/'explorer.js').read_text() == (root/'noisyseg'/'show'/'explorer.js').read_text()


def test_pictures_have_the_colours_of_the_dashboard():
    "Python paints the picture of an explorer, and JavaScript the explorer: a model has one colour in both"
    import re
    from noisyseg.show import explorer
    found = re.search(r'const MODEL_COLOURS = \[(.*)\]', (root/'noisyseg'/'show'/'explorer.js').read_text())[1]
    assert tuple(re.findall("'(.*?)'", found)) == explorer.MODEL_COLOURS
