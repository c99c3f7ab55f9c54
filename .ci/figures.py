"""A static picture in each figure that a notebook has saved, for readers that run no JavaScript: GitHub, paper, a page
without a network.

`python .ci/figures.py`, a part of `make export`, draws those that have none, or one of another figure, in Chromium and
with the plotly.js that plotly's own package brings: nothing is fetched. The picture carries a digest of its figure, so
that it is drawn anew when the figure changes, and never otherwise."""
import base64
import copy
import hashlib
import io
import json
import re
import shutil
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

root = Path(__file__).resolve().parents[1]
PLOTLY, PNG = 'application/vnd.plotly.v1+json', 'image/png'
WIDGET = 'application/vnd.jupyter.widget-view+json'
EDITION = 2                            # another number draws all anew
WIDTH, HEIGHT = 760, 420               # of figures that do not say how large they are, in CSS pixels
SCALE = 1.2                            # pixels of the picture for each CSS pixel: JupyterLab shows it as large as it is
                                       # until one points at it, and on a laptop more would be cut off
COLOURS = 256                          # a chart has few; 32-bit pictures of it are three times as large
KEY = 'figure'                         # the text chunk of the PNG that names what was drawn
# as in noisyseg.show.pictures: a grey that is read on white and on black, and no ground of its own
INK, LINE, CLEAR = '#787878', 'rgba(128,128,128,0.22)', 'rgba(0,0,0,0)'
GROUNDS = ('white', '#E5ECF6')          # of plotly's own templates


def digest(figure):
    "What tells one figure from another: sixteen characters"
    return hashlib.sha256(json.dumps([EDITION, figure], sort_keys=True).encode()).hexdigest()[:16]


def themed(figure):
    "The figure without a ground of its own, for light and dark pages; one that chose its colours is left as it is"
    figure = copy.deepcopy(figure)
    template = figure.get('layout', {}).get('template', {}).get('layout', {})
    if template.get('plot_bgcolor') not in GROUNDS: return figure
    template.update(paper_bgcolor=CLEAR, plot_bgcolor=CLEAR, font={**template.get('font', {}), 'color': INK})
    for axis in 'xaxis', 'yaxis':
        template.setdefault(axis, {}).update(gridcolor=LINE, linecolor=LINE, zerolinecolor=LINE)
    return figure


def digest_drawn(png):
    "The digest of the figure that a picture, in base64, was drawn from; None where it does not say"
    from PIL import Image
    return Image.open(io.BytesIO(base64.b64decode(png))).info.get(KEY)


def compact(
    png,             # the bytes of a PNG
    name,            # the digest that it will carry
):
    "The same picture with a palette, as bytes. What is transparent stays so: figures stand on light and dark pages"
    from PIL import Image, PngImagePlugin
    picture = Image.open(io.BytesIO(png)).convert('RGBA').quantize(COLOURS, method=Image.Quantize.FASTOCTREE)
    text = PngImagePlugin.PngInfo()
    text.add_text(KEY, name)
    out = io.BytesIO()
    picture.save(out, 'png', optimize=True, pnginfo=text)
    return out.getvalue()


def size(figure):
    "Width and height of a figure, in CSS pixels"
    layout = figure.get('layout', {})
    return int(layout.get('width') or WIDTH), int(layout.get('height') or HEIGHT)


def browser():
    "Where Chromium is, or None"
    return next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)


@contextmanager
def painter():
    "Gives a function from a figure, as a dict, to the bytes of a PNG of it; one browser draws them all"
    from playwright.sync_api import sync_playwright
    plotly_js = Path(find_spec('plotly').origin).parent/'package_data'/'plotly.min.js'
    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=browser(), args=['--no-sandbox', '--disable-gpu'])
        page = chromium.new_page()
        page.add_script_tag(path=plotly_js)
        def paint(figure):
            width, height = size(figure)
            options = dict(format='png', width=width, height=height, scale=SCALE)
            url = page.evaluate('([figure, options]) => Plotly.toImage(figure, options)',
                                [dict(data=figure['data'], layout=figure.get('layout', {})), options])
            return base64.b64decode(url.partition(',')[2])
        try: yield paint
        finally: chromium.close()


def figures(nb):
    "The outputs of a notebook, as a dict, that are figures of plotly's"
    for cell in nb['cells']:
        yield from (o['data'] for o in cell.get('outputs', []) if PLOTLY in o.get('data', {}))


def outdated(nb):
    "The figures of a notebook without a picture of what they are today"
    return [o for o in figures(nb) if PNG not in o or digest_drawn(o[PNG]) != digest(themed(o[PLOTLY]))]


def is_idle(output):
    "An output that shows nothing: one without data, or the script that fetches plotly.js from a host"
    if output['output_type'] not in ('display_data', 'execute_result'): return False
    html = ''.join(output.get('data', {}).get('text/html', ''))
    return not output.get('data') or (PLOTLY not in output['data'] and 'window.PlotlyConfig' in html)


def tidy(nb):
    """Drop what shows nothing; the HTML beside figures, which holds them again and asks a foreign host for plotly.js;
    and widgets that have a picture: their kernel is gone, and JupyterLab would say so in place of the picture"""
    for cell in nb['cells']:
        if 'outputs' in cell: cell['outputs'] = [o for o in cell['outputs'] if not is_idle(o)]
        for o in cell.get('outputs', []):
            if PNG in o.get('data', {}): o['data'].pop(WIDGET, None)
    for o in figures(nb): o.pop('text/html', None)


def pictureless(nb):
    "Outputs that only a running kernel can show"
    return [o for cell in nb['cells'] for o in cell.get('outputs', []) if WIDGET in o.get('data', {})]


def fill(path, paint):
    "Bring the figures of a notebook up to date; says whether the file changed"
    before = path.read_text(encoding='utf-8')
    nb = json.loads(before)
    tidy(nb)
    for o in outdated(nb):
        figure = themed(o[PLOTLY])
        o[PNG] = base64.b64encode(compact(paint(figure), digest(figure))).decode()
    after = json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + '\n'
    if after != before: path.write_text(after, encoding='utf-8')
    return after != before


def notebooks(folder=root/'nbs'):
    found = [p for p in folder.rglob('*.ipynb')]
    return sorted(p for p in found if not any(re.match('[._]', o) for o in p.relative_to(folder).parts))


def no_paint(figure):
    raise SystemExit('A saved figure needs a new picture, and there is no Chromium to draw it (on Debian: apt-get '
                     'install chromium). Everything else was exported.')


def main(paths):
    "Fill the notebooks at these paths; the browser starts only if there is something to draw"
    todo = [p for p in paths if outdated(json.loads(p.read_text(encoding='utf-8')))]
    if todo and browser():
        with painter() as paint: changed = [p for p in paths if fill(p, paint)]
    else: changed = [p for p in paths if fill(p, no_paint)]
    for p in changed: print(f'pictures of figures: {p.relative_to(root)}')


if __name__ == '__main__': main([Path(o).resolve() for o in sys.argv[1:]] or notebooks())
