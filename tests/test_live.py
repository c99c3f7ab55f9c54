"""The page that runs networks in a browser, as people use it: in a real Chromium.

See test_lab.py for when that is skipped. Its engine, onnxruntime-web, comes by npm: where that is missing the tests are
skipped, too, except where NOISYSEG_REQUIRE_ENGINE=1 is set. NOISYSEG_ORT names a folder with its files."""
import json
import logging
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import root
from PIL import Image
from test_lab import browser_page, browser_path, nameless, served, unreachable
from torch import nn

from noisyseg.nets.adapter import logits_of, to_classes
from noisyseg.nets.unet3plus import unet3plus_tiny
from noisyseg.perturb.clone import perturbed
from noisyseg.perturb.counter import CounterGenerator, counter_normals, normal_quantile, stream_of
from noisyseg.perturb.laws import AbsoluteGaussian, MaxGaussian, MultiplicativeGaussian, RelativeGaussian
from noisyseg.perturb.quantization import Quantize
from noisyseg.perturb.selectors import conv_and_norm, kernels_and_scales
from noisyseg.show import live_page
from noisyseg.show.explorer import demo_models
from noisyseg.show.live_page import _place_engine, demo_page, export_explorer, fetch_engine, halved, picture_input

pytestmark = pytest.mark.browser
SHOTS = Path(os.environ.get('NOISYSEG_SCREENSHOTS', root/'test-screenshots'))


@pytest.fixture(autouse=True, scope='module')
def no_traces():
    "What torch notes of each operator that it exports, which pytest would keep"
    log = logging.getLogger('torch.__trace')
    before = log.level
    log.setLevel(logging.WARNING)
    yield
    log.setLevel(before)


@pytest.fixture(scope='module')
def engine(tmp_path_factory):
    "A folder with onnxruntime-web"
    browser_path()
    if given := os.environ.get('NOISYSEG_ORT'): return given
    try: return fetch_engine(tmp_path_factory.mktemp('ort'), webgpu=False)
    except RuntimeError as e:
        if os.environ.get('NOISYSEG_REQUIRE_ENGINE') == '1': pytest.fail(str(e), pytrace=False)
        pytest.skip(f'no engine, so no network was run in a browser: {e}')


@pytest.fixture(scope='module')
def site(engine, tmp_path_factory):
    "The page of the site, in a folder"
    patched = pytest.MonkeyPatch()
    patched.setattr(live_page, 'export_explorer', lambda *a, **k: export_explorer(*a, **k, webgpu=False))
    folder = tmp_path_factory.mktemp('live')
    demo_page(folder, engine)
    patched.undo()
    return folder


class Live:
    "What a person does with a live page, and sees there"
    def __init__(self, page, address):
        self.page = page
        self.asked = []
        # a blob is something that the page itself made
        page.on('request', lambda r: r.url.startswith('blob:') or self.asked.append(r.url))
        page.goto(address)
        self.wait("document.body.dataset.engine && document.querySelector('.nse')?.dataset.level")

    def js(self, code, arg=None): return self.page.evaluate(code, arg)

    # wait_for_function would be `eval`, which the page forbids
    def wait(self, condition, seconds=60):
        for _ in range(seconds * 50):
            if self.js(condition): return
            self.page.wait_for_timeout(20)
        raise AssertionError(f'waited {seconds} s in vain for {condition}; {self.js("document.body.innerText")[:600]}')

    def logits(self, **state):
        "What the networks say, number by number"
        found = self.js('async s => (await live.networks.ask("logits", {...live.host.state, ...s})).logits.map(v => '
                        '[...v])', state)
        return [torch.tensor(v) for v in found]

    def frame(self, **state):
        "Class of each pixel, for each network"
        found = self.js('async s => (await live.host.frame({...live.host.state, ...s})).preds.map(p => [...p.classes])',
                        state)
        return [torch.tensor(v) for v in found]

    def shown(self, **state):
        "Change the state as the controls do, and wait for the pictures"
        self.js('s => live.host.set(s)', state)
        self.settle()

    def settle(self):
        self.wait('!live.explorer.busy && !live.explorer.waiting && JSON.stringify(live.explorer.frame.state) === '
                  'JSON.stringify(live.host.state)')

    def pixels(self):
        return self.js('''() => [...document.querySelectorAll('.nse canvas')].map(c => {
            const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data
            let h = 0; for (let i = 0; i < d.length; i += 4) h = (h * 31 + d[i] + 2 * d[i + 1] + 3 * d[i + 2]) | 0
            return h })''')


@contextmanager
def opened(folder, tmp_path, hash='', prepare=None, page='index.html', headers=()):
    address = page
    with served(folder, headers) as url, browser_page(tmp_path/'profile') as page:
        if prepare: page.add_init_script(prepare)
        try:
            live = Live(page, f'{url}/{address}{hash}')
            live.url = url
            yield live
        except BaseException:
            SHOTS.mkdir(exist_ok=True)
            page.screenshot(path=SHOTS/'live.png', full_page=True)
            raise


# ---------------------------------------------------------------- the noise

LAWS = [MaxGaussian(.15), MaxGaussian(.3, 1., 'channel'), MaxGaussian(.1, float('inf'), 'tensor'),
        AbsoluteGaussian(.07), RelativeGaussian(.2), MultiplicativeGaussian(.3), Quantize(4), Quantize(3, 'tensor'),
        Quantize(2.5, 'channel', 'minmax'), Quantize(5, 'tensor', 'minmax'), Quantize(1), Quantize(0)]
VECTORS = {'00000000 00000000 00000000 00000000 00000000 00000000': '6627e8d5 e169c58d bc57ac4c 9b00dbd8',
           'ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff': '408f276d 41c83b0e a20bc7c6 6d5451fd',
           '243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0': 'd16cfe09 94fdcceb 5001e420 24126ea1'}


def plain(law):
    "A law as the page keeps it"
    fields = law.to_dict()
    name = fields.pop('disturbance')
    return dict(law=name, level=law.level, params={k: 'inf' if v == float('inf') else v for k, v in fields.items()})


def test_the_noise_is_the_same_in_javascript(tmp_path):
    "Published vectors of Philox, quantiles, draws and laws: equal to the last bit"
    browser_path()
    torch.manual_seed(0)
    cases = []
    for shape in (8, 5, 3, 3), (4, 6, 3), (6, 7), (9,):
        w = torch.randn(shape) * torch.rand(shape[0]).view(-1, *[1] * (len(shape) - 1))
        for law in LAWS:
            facts = dict(shape=list(shape), std=w.std(correction=0).item(), stream=stream_of(law.name))
            cases.append((w, law, dict(plain(law), w=w.flatten().tolist(), **facts)))
    k = np.r_[0:500, 2**32 - 500:2**32, np.random.default_rng(1).integers(0, 2**32, 20000)]
    seed = 2**40 + 7
    with served(root/'noisyseg'/'show') as url, browser_page(tmp_path/'profile') as page:
        page.goto(f'{url}/models/scenes_clean.json')
        got = page.evaluate('''async ({cases, vectors, k, seed}) => {
            const m = await import('/noise.js'), word = s => parseInt(s, 16)
            const vector = v => { const out = new Uint32Array(4); m.philox(...v.split(' ').map(word), out)
                return [...out].map(o => o.toString(16).padStart(8, '0')).join(' ') }
            const noisy = c => { const w = Float32Array.from(c.w), out = new Float32Array(w.length)
                m.LAWS[c.law](w, m.counterNormals(7, c.stream, w.length), out, c, c.level, c.params)
                return [...out] }
            return {vectors: vectors.map(vector), quantiles: k.map(m.normalQuantile), noisy: cases.map(noisy),
                draw: [...m.counterNormals(seed, [1, 2 ** 32 - 1], 30001, 3)]} }''',
            dict(cases=[c for *_, c in cases], vectors=list(VECTORS), k=k.tolist(), seed=seed))
    assert got['vectors'] == list(VECTORS.values())
    assert (normal_quantile(k) == np.array(got['quantiles'])).all()
    assert (counter_normals(seed, (1, 2**32 - 1), 30001, 3) == np.array(got['draw'], np.float32)).all()
    for (w, law, c), out in zip(cases, got['noisy']):
        z = torch.from_numpy(counter_normals(7, c['stream'], w.numel())).view(w.shape)
        assert torch.equal(law(w, z).flatten(), torch.tensor(out)), (law, w.shape)


# ---------------------------------------------------------------- networks

class Transformer(nn.Module):
    "Patches, two layers of attention, a logit for each class and patch: coarser than the picture by eight"
    def __init__(self, classes, size, d=32):
        super().__init__()
        self.stem = nn.Conv2d(3, d, 8, 8)
        self.place = nn.Parameter(torch.randn(1, (size // 8)**2, d) * .02)
        self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(d, 4, 64, batch_first=True, norm_first=True), 2,
                                          enable_nested_tensor=False)
        self.head = nn.Linear(d, classes)

    def forward(self, x):
        m = self.stem(x)
        out = self.head(self.body(m.flatten(2).transpose(1, 2) + self.place))
        return out.transpose(1, 2).unflatten(2, m.shape[2:])


def lraspp():
    "torchvision's, on its smaller MobileNetV3"
    from torchvision.models import mobilenet_v3_small
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.segmentation import LRASPP
    layers = {'1': 'low', '12': 'high'}
    return LRASPP(IntermediateLayerGetter(mobilenet_v3_small(weights=None).features, layers), 16, 576, 4)


def warmed(net, x):
    "With statistics of its own, so that batch norm does not drown what comes in"
    net.train()
    with torch.no_grad():
        for _ in range(3): net(torch.cat([x, x.flip(3)]))
    return net


def test_logits_are_those_of_pytorch(engine, tmp_path):
    "Three kinds of networks side by side: a UNet3+, one of torchvision's, a transformer; weights in float32"
    torch.manual_seed(0)
    x = torch.rand(2, 3, 64, 64)
    nets = {'UNet3+': unet3plus_tiny(4, filters=(16, 24)), 'LRASPP': lraspp(), 'transformer': Transformer(4, 64)}
    nets = {k: warmed(m, x).eval() for k, m in nets.items()}
    where = {'all': kernels_and_scales, 'convolutions': conv_and_norm}
    laws = [MaxGaussian(.05), MultiplicativeGaussian(.1), Quantize(5)]
    export_explorer(nets, x, tmp_path/'page', laws, where, precision='float', ort=engine, webgpu=False, gallery=0)
    with opened(tmp_path/'page', tmp_path) as live:
        assert live.js('document.body.dataset.engine') == 'wasm'
        for law, label, seed, sample in (laws[0], 'all', 0, 0), (laws[1], 'convolutions', 5, 1), (laws[2], 'all', 0, 1):
            given = plain(law)
            state = dict(level=given['level'], disturbance=given['law'], params=given['params'], where=label, seed=seed,
                         sample=sample)
            for (name, net), got in zip(nets.items(), live.logits(**state)):
                one = x[sample:sample + 1]
                with torch.no_grad(), perturbed(net, law, where[label], CounterGenerator(seed)):
                    expected = logits_of(net, one, (64, 64)).flatten()
                    classes = to_classes(logits_of(net, one, (64, 64))).flatten()
                far = ((got - expected).abs().max() / expected.abs().max()).item()
                print(f'{name}, {law}: logits within {far:.0e} of the largest')
                assert far < 1e-5
                assert (to_classes(got.view(1, 4, 64, 64)).flatten() == classes).float().mean() > .999
        assert not live.page.complaints


# ---------------------------------------------------------------- the page

drag = '''async moves => {
    // one event after another without waiting, as a dragging hand makes them; then how long until the last is shown
    const root = document.querySelector('.nse'), s = root.querySelector('.level input[type=range]')
    let longest = 0, before = performance.now()
    for (let i = 1; i <= moves; i++) {
        s.value = (.2 + .7 * i / moves) * s.max; s.dispatchEvent(new Event('input'))
        await new Promise(r => setTimeout(r, 16))
        longest = Math.max(longest, performance.now() - before); before = performance.now()
    }
    while (Math.abs(root.dataset.level - s.value) > 1e-6) await new Promise(r => setTimeout(r, 2))
    return {last: performance.now() - before, longest} }'''


@pytest.mark.timeout(240)
def test_the_page(site, tmp_path):
    "Sliders, pictures, the address, and the cell of Python that shows the same; nothing is asked of anybody"
    names = {p.relative_to(site).as_posix(): p.stat().st_size for p in site.rglob('*') if p.is_file()}
    first = sum(names.values())
    assert first < 8e6
    assert not any(str(root) in p.read_text(errors='ignore') for p in site.rglob('*') if p.stat().st_size < 1e6
                   and p.is_file())
    with opened(site, tmp_path) as live:
        page = live.page
        live.settle()
        live.wait("document.querySelectorAll('.thumb').length === 8")
        loaded = len(live.asked)
        assert live.asked and all(o.startswith((live.url, 'data:')) for o in live.asked)
        assert 'Nothing leaves your browser' in page.inner_text('main')

        # the slider: the page never stands still
        before = live.pixels()
        took = live.js(drag, 40)
        print(f"from the last move to the masks of both networks: {took['last']:.0f} ms; the page stood still for at "
              f"most {took['longest']:.0f} ms")
        after = live.pixels()
        assert after[0] == before[0] and after[1] != before[1] and after[2] != before[2]

        # each law has an effect, its text, and a level of its own
        seen = {}
        for law in 'RelativeGaussian', 'AbsoluteGaussian', 'MultiplicativeGaussian', 'Quantize', 'MaxGaussian':
            live.js('id => live.explorer.setKind(id)', law)
            live.settle()
            seen[law] = page.inner_text('.level .unit'), tuple(live.pixels())
        assert [t for t, _ in seen.values()] == ['strength = 10 %', 'strength = 0.02', 'sigma = 10 %', '4 bits',
                                                 'n = 15 %']
        assert len({p for _, p in seen.values()}) == 5

        # the copied cell, run in Python, gives the masks of the page
        live.shown(level=.2, seed=3, sample=4, disturbance='MaxGaussian', params=dict(alpha=1.5, per='channel'))
        cell = live.js('live.host.python()')
        held = {}
        exec(compile(cell, 'the copied cell', 'exec'), held)
        for name, classes in zip(demo_models(), live.frame()):
            assert (held['masks'][name].flatten() == classes).float().mean() > .9995, cell

        # the address says it all
        page.wait_for_timeout(250)
        link, shown = page.url, live.pixels()
        assert 'level=0.2' in link and 'draw=3' in link and 'alpha=1.5' in link and 'per=channel' in link
        live.shown(sample=0, seed=0)
        assert live.pixels() != shown
        page.wait_for_timeout(250)   # until the address says so, or it would be written over the one that comes now
        page.evaluate('link => { location.hash = new URL(link).hash }', link)
        # the page hears of its new address only after this; then it draws
        page.wait_for_function('() => document.querySelector(".nse").dataset.sample === "4"')
        live.settle()
        assert live.pixels() == shown

        # keys
        page.focus('.nse')
        page.keyboard.press('r')
        live.settle()
        assert live.js('live.host.state.seed') == 4
        page.keyboard.press(']')
        live.settle()
        assert page.get_attribute('.thumb[aria-pressed=true]', 'aria-label') == 'sample 6'

        own_pictures(live, tmp_path)
        page.get_by_role('button', name='more').click()
        assert not nameless(page)
        assert not unreachable(page)
        live.wait("document.querySelector('.said').textContent.includes('mIoU')")
        for width in 1400, 700, 375:
            page.set_viewport_size(dict(width=width, height=900))
            assert page.evaluate('document.documentElement.scrollWidth <= innerWidth')
        assert live.asked[loaded:] == [] and not page.complaints     # once loaded it asks for nothing


def test_an_isolated_page_uses_threads(site, tmp_path):
    "Where a server isolates the page, each network's worker has several threads, and says the same"
    headers = (('Cross-Origin-Opener-Policy', 'same-origin'), ('Cross-Origin-Embedder-Policy', 'require-corp'))
    cores = "Object.defineProperty(navigator, 'hardwareConcurrency', {get: () => 6})"
    said = []
    for given, threads in ((), 1), (headers, 3):
        with opened(site, tmp_path/str(threads), prepare=cores, headers=given) as live:
            assert live.js('[live.networks.workers.length, live.networks.threads]') == [2, threads]
            said.append(live.logits(level=.2, seed=5))
    for one, three in zip(*said): torch.testing.assert_close(one, three, rtol=0, atol=1e-5 * one.abs().max().item())


def test_what_the_page_says_of_itself(site):
    "Without JavaScript a picture; where it is shared, only with an address, a card"
    text = (site/'index.html').read_text()
    assert '<noscript>' in text and 'og:title' in text and 'lang="en"' in text and '{{' not in text
    assert 'og:image' not in text and 'canonical' not in text and not (site/'card.png').exists()
    with Image.open(site/'still.png') as still: assert still.width > 700


@pytest.mark.timeout(240)
def test_photographs(engine, tmp_path, monkeypatch):
    "The site's second page, on the engine of the first: a cat is a cat, and it dissolves as PyTorch says it does"
    monkeypatch.syspath_prepend(root/'.ci')
    monkeypatch.chdir(root)   # the copied cell is for a copy of the repository
    from live import NETWORKS, photo_page
    folder = tmp_path/'site'
    _place_engine(engine, folder, webgpu=False)
    args = dict(engine='../ort', beside={'Scenes': '../index.html'}, webgpu=False, gallery=0)
    home = 'https://you.example/live/photos/'
    assert photo_page(folder/'photos', address=home, **args) < 9e6
    text = (folder/'photos'/'index.html').read_text()
    assert f'href="{home}"' in text and f'content="{home}card.png"' in text and (folder/'photos'/'card.png').is_file()
    assert max(p.stat().st_size for p in (folder/'photos').glob('network*')) < 4e6
    with opened(folder, tmp_path, page='photos/index.html') as live:
        live.settle()
        assert live.page.inner_text('nav') == 'Scenes' and len(live.js('live.host.manifest.networks')) == len(NETWORKS)
        changed = []
        for level in 0., 0.02:
            live.shown(level=level, seed=1)
            held = {}
            exec(compile(live.js('live.host.python()'), 'the copied cell', 'exec'), held)
            for name, classes in zip(NETWORKS, live.frame()):
                assert (held['masks'][name].flatten() == classes).float().mean() > .9995, (name, level)
            changed.append(torch.stack(live.frame()))
        assert (changed[0] == 1).float().mean() > .5   # class 1 is the cat, and the picture is full of it
        assert (changed[0] != changed[1]).float().mean() > .02
        assert not live.page.complaints


def own_pictures(live, tmp_path):
    "A photograph that is chosen, one that is dropped, one that is pasted, and a file that is none"
    page = live.page
    rng = np.random.default_rng(0)
    photo = np.kron(rng.integers(0, 256, (6, 9, 3)), np.ones((40, 40, 1))).astype(np.uint8)
    Image.fromarray(photo).save(tmp_path/'photo.png')
    page.set_input_files('input[type=file]', tmp_path/'photo.png')
    live.wait('live.host.state.sample === 8')
    live.settle()
    assert page.inner_text('.nse figure:nth-of-type(4) .name') == 'clean prediction'    # there is no truth
    assert 'changed' in page.inner_text('.nse .legend')
    with page.expect_download() as saved: page.get_by_role('button', name='save the picture').click()
    saved.value.save_as(tmp_path/'picture.png')
    cell = live.js('live.host.python()')
    assert "picture_input('picture.png'" in cell
    held = {}
    exec(compile(cell.replace("'picture.png'", repr(str(tmp_path/'picture.png'))), 'the copied cell', 'exec'), held)
    stats = [held['x'].shape, torch.equal(held['x'], picture_input(tmp_path/'picture.png', live.js(
        '[live.manifest.stats.mean, live.manifest.stats.std]')))]
    assert stats == [(1, 3, 128, 128), True]
    for name, classes in zip(demo_models(), live.frame()):
        assert (held['masks'][name].flatten() == classes).float().mean() > .9995, cell

    hand_over = '''async ([kind, type]) => {
        const c = new OffscreenCanvas(60, 90), x = c.getContext('2d')
        x.fillStyle = '#c33'; x.fillRect(0, 0, 60, 90); x.fillStyle = '#39c'; x.fillRect(10, 30, 40, 30)
        const blob = type === 'image/png' ? await c.convertToBlob() : new Blob(['no picture'], {type})
        const d = new DataTransfer()
        d.items.add(new File([blob], 'cat.png', {type}))
        const e = kind === 'drop' ? new DragEvent('drop', {dataTransfer: d, bubbles: true, cancelable: true})
            : new ClipboardEvent('paste', {clipboardData: d, bubbles: true, cancelable: true})
        document.body.dispatchEvent(e) }'''
    for number, kind in (9, 'drop'), (10, 'paste'):
        before = live.pixels()
        live.js(hand_over, [kind, 'image/png'])
        live.wait(f'live.host.state.sample === {number}')
        live.settle()
        assert live.pixels()[0] != before[0] or kind == 'paste'                         # the same picture twice
    live.js(hand_over, ['drop', 'text/plain'])
    live.wait("document.getElementById('status').textContent.includes('cat.png could not be read as a picture')")
    assert live.js("document.querySelectorAll('.thumb').length") == 11


def renderer_bytes(profile):
    "What the largest process of a browser with this profile holds in memory: that of the page"
    import psutil
    sizes = [0]
    for p in psutil.process_iter():
        try:
            if f'--user-data-dir={profile}' in p.cmdline() or any(f'--user-data-dir={profile}' in o.cmdline()
                                                                  for o in p.parents()):
                if '--type=renderer' in p.cmdline(): sizes.append(p.memory_info().rss)
        except psutil.Error: pass
    return max(sizes)


def test_memory_stays_flat(site, tmp_path):
    "Of the page with its engine, over twenty-four moves of the slider and four draws"
    with opened(site, tmp_path) as live:
        move = '''async ([n, draw]) => { for (let i = 0; i < n; i++) await live.networks.ask('frame',
            {...live.host.state, level: .01 * (i % 30), seed: draw ? i : 0}) }'''
        live.settle()
        live.js(move, [12, False])
        live.js(move, [3, True])
        before = renderer_bytes(tmp_path/'profile')
        live.js(move, [24, False])
        live.js(move, [4, True])
        grown = renderer_bytes(tmp_path/'profile') - before
        print(f'{before / 1e6:.0f} MB, and {grown / 1e6:+.0f} MB after 28 frames')
        assert before > 50e6 and grown < 60e6        # 3.4 MB go into and out of the engine for each frame


def test_where_networks_cannot_run(site, tmp_path):
    "Without WebAssembly the stored gallery stays, and the page says why"
    with opened(site, tmp_path, prepare='delete globalThis.WebAssembly') as live:
        assert live.js('document.body.dataset.engine') == 'none'
        assert 'no WebAssembly' in live.page.inner_text('#status')
        before = live.pixels()
        live.page.locator('.level input[type=number]').fill('0.3')
        live.page.locator('.level input[type=number]').press('Enter')
        live.wait("document.querySelector('.nse').dataset.level === '0.3'")
        assert live.pixels()[1] != before[1]


def test_the_gallery_shows_the_same_noise(site):
    "What is shown while the networks load are masks of the very noise that they show then"
    import gzip
    manifest = json.loads((site/'gallery'/'manifest.json').read_text())
    raw = gzip.decompress((site/'gallery'/'sample1.bin').read_bytes())
    size, levels = 128 * 128, manifest['fixed']['levels']
    frames = [np.frombuffer(raw, np.uint8)[(4 + 2 * i) * size:(4 + 2 * i) * size + size] for i in range(len(levels))]
    packed = np.bitwise_xor.reduce(frames[:5])                                          # as stored: what changed
    net, picture = halved(demo_models()['clean-trained']), (site/'picture0.bin').read_bytes()[:3 * size]
    stats = json.loads((site/'manifest.json').read_text())['stats']
    x = picture_input(np.frombuffer(picture, np.uint8).reshape(128, 128, 3), (stats['mean'], stats['std']))
    with torch.no_grad(), perturbed(net, MaxGaussian(levels[4]), conv_and_norm, CounterGenerator(0)):
        classes = to_classes(logits_of(net, x))[0].numpy().ravel()
    assert (classes == packed & 31).mean() > .999


def test_other_numbers_are_refused(site, tmp_path):
    "A page whose weights are not those that PyTorch computed with shows nothing of them"
    shutil.copytree(site, tmp_path/'page')
    damaged = tmp_path/'page'/'network1.bin'
    damaged.write_bytes(np.frombuffer(damaged.read_bytes(), '<f2')[::-1].tobytes())
    with opened(tmp_path/'page', tmp_path) as live:
        assert live.js('document.body.dataset.engine') == 'none'
        assert re.search(r"noise-trained: the logits differ from PyTorch's", live.page.inner_text('#status'))


def test_an_engine_that_is_another_is_refused(tmp_path, monkeypatch):
    "npm may bring what it likes; only the file that was tested with is unpacked"
    npm = tmp_path/'npm'
    npm.write_text('#!/bin/sh\necho not an engine > onnxruntime-web-1.tgz\n')
    npm.chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}{os.pathsep}{os.environ["PATH"]}')
    with pytest.raises(RuntimeError, match='SHA-512'): fetch_engine(tmp_path/'ort')
    assert not list((tmp_path/'ort').iterdir())
    npm.write_text('#!/bin/sh\necho no network >&2\nexit 1\n')
    with pytest.raises(RuntimeError, match='no network.*ort='): fetch_engine(tmp_path/'ort')
    monkeypatch.setenv('PATH', str(tmp_path/'empty'))
    with pytest.raises(RuntimeError, match='install Node.js.*ort='): fetch_engine(tmp_path/'ort')
