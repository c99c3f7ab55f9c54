"""How long from a move of the explorer's slider to the repainted masks of both models? Measured in a real browser on a real JupyterLab;
`make bench` calls this. Also: what a thousand moves and fifty runs of the cell leave in memory.
"""
import tempfile
from pathlib import Path

from test_explorer import Seen, cells, drag, live

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

if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as folder, live(Path(folder), [*cells, MEMORY]) as page:
        seen = Seen(page)
        page.wait_for_timeout(3000)
        move = lambda n: seen.root.evaluate(f'(root) => ({LATENCY})({{root, moves: {n}}})')
        move(10)
        times = move(96)
        print(f'slider to masks of both models, 128 x 128, {len(times)} moves: median {times[len(times) // 2]:.0f} ms, '
              f'95th percentile {times[int(.95 * len(times))]:.0f} ms')
        settled = sorted(seen.root.evaluate(f'(root) => ({drag})({{root, moves: 60}})') for _ in range(5))
        print(f'a drag of 60 moves settles {settled[2]:.0f} ms after the last (median of 5, worst {settled[-1]:.0f})')
        before = heap(page), *kernel(page)
        for _ in range(10): move(100)
        print('browser MB, kernel MB, widgets: before', *before, '· after a thousand moves', heap(page), *kernel(page))
        for _ in range(10): again(page); page.wait_for_timeout(700)
        before = heap(page), *kernel(page)
        for _ in range(50): again(page); page.wait_for_timeout(700)
        page.wait_for_timeout(2000)
        print('after ten runs of the cell', *before, '· after fifty more', heap(page), *kernel(page))
