"""From a move of the live page's slider to the repainted masks, in Chromium, and what it leaves in memory.

    python tests/bench_live.py                     # latency: 60 moves on each page
    python tests/bench_live.py --drags 500         # memory: so many drags on the first page
    python tests/bench_live.py --isolated          # from a server that isolates the page, so that it may use threads

Four pages: one small network on scenes, the two of the site, the two for photographs, and one of these. Each move
is one event of the slider, and its time ends when the browser has painted the masks. Beside it stands what the workers
say: milliseconds for the noise, for running the network, and for the rest. NOISYSEG_ORT names a folder with
onnxruntime-web, else npm brings it."""
import argparse
import os
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
from bench_timing import quantile, row, skipped
from test_lab import browser_page, browser_path, served

root = Path(__file__).resolve().parents[1]
SETTLED = ("document.body.dataset.engine && document.querySelector('.nse')?.dataset.level && !live.explorer.busy && "
           "!live.explorer.waiting")
MOVES = '''async moves => {
    // until nothing is computed: the curve fills by itself while nobody drags
    const {explorer, networks} = live, root = document.querySelector('.nse'), out = []
    const s = root.querySelector('.level input[type=range]'), rest = ms => new Promise(r => setTimeout(r, ms))
    const ask = networks.ask.bind(networks)
    let took
    networks.ask = async (...a) => { const m = await ask(...a); took = m.took; return m }
    for (let i = 0; i < moves; i++) {
        while (explorer.busy) await rest(1)
        const before = performance.now()
        s.value = ((i * 37) % 97 + 1) / 100 * s.max; s.dispatchEvent(new Event('input'))
        while (Math.abs(root.dataset.level - s.value) > 1e-6) await rest(1)
        await new Promise(requestAnimationFrame)
        out.push({whole: performance.now() - before, took})
        await rest(20)
    }
    networks.ask = ask
    return out }'''
DRAWS = '''async draws => {
    const {explorer} = live, root = document.querySelector('.nse'), out = []
    const rest = ms => new Promise(r => setTimeout(r, ms))
    for (let i = 0; i < draws; i++) {
        while (explorer.busy) await rest(1)
        const before = performance.now(), seed = live.host.state.seed + 1
        explorer.reroll()
        while (+root.dataset.seed !== seed) await rest(1)
        await new Promise(requestAnimationFrame)
        out.push(performance.now() - before)
    }
    return out }'''
DRAG = '''async drags => {
    // there and back, an event every 16 ms; now and then a new draw, and another picture
    const {explorer} = live, root = document.querySelector('.nse'), rest = ms => new Promise(r => setTimeout(r, ms))
    const s = root.querySelector('.level input[type=range]')
    for (let d = 0; d < drags; d++) {
        for (let i = 0; i <= 8; i++) {
            s.value = (d % 2 ? 8 - i : i) / 8 * s.max; s.dispatchEvent(new Event('input'))
            await rest(16)
        }
        while (Math.abs(root.dataset.level - s.value) > 1e-6) await rest(2)
        if (d % 10 === 9) { explorer.reroll(); while (explorer.busy) await rest(2) }
        if (d % 50 === 49) { explorer.step(1); while (explorer.busy) await rest(2) }
    } }'''


PAGES = {'scenes, one network': 'one/index.html', 'scenes, two networks': 'index.html',
         'photographs, one network': 'photo/index.html', 'photographs, two networks': 'photos/index.html'}


def make_pages(folder, ort):
    "Write what is measured, unless it is there"
    if (folder/'photo'/'index.html').is_file(): return
    sys.path.insert(0, str(root/'.ci'))
    os.chdir(root)
    import live
    from noisyseg.data.datasets import scenes
    from noisyseg.show.explorer import demo_models
    from noisyseg.show.live_page import demo_page, export_explorer
    demo_page(folder, ort)
    few = dict(engine='../ort', gallery=0)
    live.photo_page(folder/'photos', **few)
    data = scenes(n_train=1, n_valid=2, size=128, bs=2, augment=False)
    export_explorer({'clean-trained': demo_models()['clean-trained']}, data, folder/'one', **few)
    live.photo_page(folder/'photo', {'clean-trained': live.NETWORKS['clean-trained']}, **few)


# with these a page may use several threads
ISOLATED = (('Cross-Origin-Opener-Policy', 'same-origin'), ('Cross-Origin-Embedder-Policy', 'require-corp'))


@contextmanager
def opened(folder, address, isolated=False):
    "A page that has loaded its networks and computes nothing, in a browser of its own"
    with tempfile.TemporaryDirectory() as profile, served(folder, ISOLATED * isolated) as url, \
            browser_page(profile) as page:
        page.goto(f'{url}/{address}')
        for _ in range(6000):
            if page.evaluate(SETTLED): break
            page.wait_for_timeout(20)
        engine = page.evaluate('document.body.dataset.engine')
        if engine != 'wasm': raise RuntimeError(page.inner_text('#status'))
        page.wait_for_timeout(3000)
        yield page, Path(profile)


def load(): return os.getloadavg()[0]


def split(moves):
    "Medians of what the workers say of a move, the slowest worker's"
    def median(k): return quantile([max(t[k] for t in m['took']) for m in moves], .5)
    return {k: median(k) for k in ('noise', 'run', 'rest')}


def measure(name, folder, address, moves, isolated=False):
    "A row: the times of moves, with the 90th percentile and what they are made of in its note"
    with opened(folder, address, isolated) as (page, profile):
        page.evaluate(MOVES, 10)
        before, start = load(), cpu_seconds(profile)
        seen = page.evaluate(MOVES, moves)
        cpu = 1e3 * (cpu_seconds(profile) - start) / moves
        draws = page.evaluate(DRAWS, 12)
        workers, threads = page.evaluate('[live.networks.workers.length, live.networks.threads]')
    times = [m['whole'] for m in seen]
    parts = ', '.join(f'{k} {v:.0f}' for k, v in split(seen).items())
    note = (f'90th percentile {quantile(times, .9):.0f} ms of {len(times)} moves; of the median: {parts} ms; '
            f'{cpu:.0f} ms of processor time a move, whatever else runs; a new draw {quantile(draws, .5):.0f} ms; '
            f'{workers} workers of {threads} threads; load {before:.1f} to {load():.1f}')
    return row('a move of the slider to masks', f'128², live page, {name}', times, target=150., of='ours', note=note)


def slider(plan):
    "Rows for `make bench`"
    from noisyseg.show.live_page import fetch_engine
    try:
        browser_path()
        ort = os.environ.get('NOISYSEG_ORT') or fetch_engine(tempfile.mkdtemp())
    except BaseException as e: yield skipped('the slider of the live page', str(e).splitlines()[0]); return
    with tempfile.TemporaryDirectory() as folder:
        make_pages(Path(folder), ort)
        for name, address in PAGES.items():
            yield measure(name, folder, address, 60 if plan.full else 30)


def of_renderers(profile, of):
    "Sum over the processes that render: the page, with its workers and their WebAssembly"
    mine = f'--user-data-dir={profile}'
    def ours(p): return any(mine in o.cmdline() for o in [p, *p.parents()])
    total = 0
    for p in psutil.process_iter():
        try:
            if '--type=renderer' in p.cmdline() and ours(p): total += of(p)
        except psutil.Error: continue
    return total


def bytes_of(profile): return of_renderers(profile, lambda p: p.memory_info().rss)


def cpu_seconds(profile): return of_renderers(profile, lambda p: p.cpu_times().user + p.cpu_times().system)


def heap(page):
    "JavaScript of the page, after a collection"
    session = page.context.new_cdp_session(page)
    session.send('HeapProfiler.collectGarbage')
    return session.send('Runtime.getHeapUsage')['usedSize']


def soak(folder, address, drags, step=25):
    "Memory every so many drags; whether it is flat: the last third's median within 3 % and 5 MB of the middle third's"
    seen = []
    with opened(folder, address) as (page, profile):
        for n in range(0, drags, step):
            start = time.time()
            page.evaluate(DRAG, step)
            seen.append((heap(page), bytes_of(profile)))
            told = [f'{v / 1e6:6.1f} MB {k}' for k, v in zip(('of JavaScript', 'resident'), seen[-1])]
            print(f'{n + step:4} drags: {", ".join(told)} ({time.time() - start:.0f} s, load {load():.1f})', flush=True)
    third, flat = len(seen) // 3, True
    for what, values in zip(('JavaScript', 'resident'), zip(*seen)):
        middle, last = (quantile(v, .5) for v in (values[third:-third], values[-third:]))
        grown = last - middle
        print(f'{what}: {middle / 1e6:.1f} MB in the middle third, {grown / 1e6:+.1f} MB in the last')
        flat &= grown < max(5e6, .03 * middle)
    print('flat' if flat else 'GROWS')
    return flat


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--moves', type=int, default=60)
    p.add_argument('--drags', type=int, help='measure memory instead')
    p.add_argument('--isolated', action='store_true', help='let the engine use threads')
    p.add_argument('--pages', help='a folder for the pages, which are used again if they are there')
    a = p.parse_args()
    ort = os.environ.get('NOISYSEG_ORT')
    with tempfile.TemporaryDirectory() as d:
        folder = Path(a.pages or d)
        make_pages(folder, ort)
        if a.drags: return not soak(folder, PAGES['scenes, two networks'], a.drags)
        for name, address in PAGES.items():
            r = measure(name, folder, address, a.moves, a.isolated)
            print(f"{name}: {r['ours']:.0f} ms (target {r['target']:.0f}: {r['verdict']})\n    {r['note']}", flush=True)


if __name__ == '__main__': sys.exit(main())
