"""From a move of the explorer's slider to the repainted masks of both models, in a real browser on a real JupyterLab.
With --full also what a thousand moves and fifty runs of the cell leave in memory.
"""
import importlib.util
import shutil
import tempfile
from pathlib import Path

from bench_timing import quantile, row, skipped

LATENCY = '''async ({root, moves}) => {
    // from a slider's event to the repainted masks of both models
    const s = root.querySelector('.level input[type=range]'), out = []
    for (let i = 0; i < moves; i++) {
        const v = ((i * 37) % 97 + 1) / 100 * s.max, before = performance.now()
        s.value = v; s.dispatchEvent(new Event('input'))
        while (Math.abs(root.dataset.level - s.value) > 1e-6) await new Promise(r => setTimeout(r, 1))
        await new Promise(requestAnimationFrame)
        out.push(performance.now() - before)
        await new Promise(r => setTimeout(r, 20))
    }
    return out.sort((a, b) => a - b) }'''

MEMORY = ('import gc, psutil\nfrom ipywidgets.widgets.widget import _instances\ngc.collect()\n'
          'print(psutil.Process().memory_info().rss // 2**20, len(_instances))')

LARGE = ['import torch\nfrom noisyseg.show.explorer import NoiseExplorer\nfrom noisyseg.nets.unet3plus import '
         'unet3plus_resnet34', 'torch.manual_seed(0)\nnet = unet3plus_resnet34(7, pretrained=False, '
         'deep_supervision=False)', 'e = NoiseExplorer(net, torch.rand(2, 3, 256, 256))\ne']

def heap(page):
    session = page.context.new_cdp_session(page)
    session.send('HeapProfiler.collectGarbage')
    return round(session.send('Runtime.getHeapUsage')['usedSize'] / 2**20)

def kernel(page):
    "Run the last cell, and read the kernel's memory in MB and its number of widgets"
    page.evaluate("""async () => { const nb = jupyterapp.shell.currentWidget.content
        nb.activeCellIndex = 3; await jupyterapp.commands.execute('notebook:run-cell') }""")
    page.wait_for_timeout(300)
    cell = page.evaluate("() => jupyterapp.shell.currentWidget.content.model.cells.get(3).toJSON()")
    return ''.join(cell['outputs'][0]['text']).split()

def again(page):
    page.evaluate("""async () => { const nb = jupyterapp.shell.currentWidget.content
        nb.activeCellIndex = 2; await jupyterapp.commands.execute('notebook:run-cell') }""")

def explorer(plan):
    if not any(map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))):
        yield skipped('the slider', 'no Chromium on the PATH')
        return
    for name in ('playwright', 'jupyterlab', 'pytest'):
        if importlib.util.find_spec(name) is None: yield skipped('the slider', f'{name} is not installed'); return
    from test_explorer import Seen, cells, drag, live
    from test_lab import opened
    with tempfile.TemporaryDirectory() as folder, opened(Path(folder)) as lab, live(lab, [*cells, MEMORY]) as page:
        seen, where = Seen(page), '128², in JupyterLab'
        page.wait_for_timeout(3000)
        move = lambda n: seen.root.evaluate(f'(root) => ({LATENCY})({{root, moves: {n}}})')
        move(10)
        times = move(96 if plan.full else 24)
        yield row('a move of the slider to masks of both models', where, times,
                  note=f'95th percentile {quantile(times, .95):.0f} ms, of {len(times)} moves')
        settled = [seen.root.evaluate(f'(root) => ({drag})({{root, moves: 60}})') for _ in range(5 if plan.full else 3)]
        yield row('a drag of 60 moves settles after the last', where, settled,
                  note=f'the slowest of {len(settled)}: {max(settled):.0f} ms')
        if plan.full: yield from growth(page, move, where)
        with live(lab, LARGE) as page: yield from large(Seen(page), 24 if plan.full else 10)

def large(seen, moves):
    "A large network: previews while the slider moves, and only the layers behind the first disturbed one."
    where = '256², UNet3+ on ResNet34'
    move = lambda n: seen.root.evaluate(f'(root) => ({LATENCY})({{root, moves: {n}}})')
    for layers in ('conv and norm', 'last 5 layers'):
        seen.more().root.get_by_label('which layers are disturbed').select_option(layers)
        move(3)
        times = move(moves)
        note = f'shown at 1/{seen.data("shrink")} of the size, 95th percentile {quantile(times, .95):.0f} ms'
        yield row(f'a move of the slider, {layers}', where, times, note=note)
        seen.wait(lambda: seen.data('shrink') == '1')

def growth(page, move, where):
    "What is left in memory; the widgets must not grow in number."
    def many_moves():
        for _ in range(10): move(100)
    def rerun(n):
        for _ in range(n): again(page); page.wait_for_timeout(700)
        page.wait_for_timeout(2000)
    for what, warm_up, f in (('a thousand moves', lambda: None, many_moves),
                             ('fifty runs of the cell', lambda: rerun(10), lambda: rerun(50))):
        warm_up()
        before = heap(page), *map(int, kernel(page))
        f()
        after = heap(page), *map(int, kernel(page))
        for i, of in enumerate(('browser', 'kernel')):
            note = f'widgets: before {before[2]}, after {after[2]}'
            yield row(f'memory of the {of} after {what}', where, after[i], 'before', before[i], unit='MB', note=note)
