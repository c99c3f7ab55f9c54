"Each figure that a notebook has saved holds a picture of itself, for GitHub and for pages without a network."
import base64
import copy
import io
import json

import figures
import pytest
from conftest import nb_id, notebooks, root
from PIL import Image
from test_lab import browser_path

each = pytest.mark.parametrize('path', notebooks(), ids=nb_id)


def load(path): return json.loads(path.read_text(encoding='utf-8'))


@each
def test_figures_have_pictures(path):
    "Of what they are today; and nothing in the outputs fetches plotly.js, or holds a figure twice"
    nb = load(path)
    assert not figures.outdated(nb), 'run `make export`: it draws them (with Chromium)'
    kept = copy.deepcopy(nb)
    figures.tidy(kept)
    assert kept == nb, 'run `make export`'
    assert not figures.pictureless(nb), 'a widget without a picture: GitHub shows nothing of it'
    for o in figures.figures(nb):
        assert len(o[figures.PNG]) < 150_000
        picture = Image.open(io.BytesIO(base64.b64decode(o[figures.PNG])))
        # transparent corners: a figure is no white box on a dark page
        assert picture.convert('RGBA').getpixel((0, 0))[3] == 0


def test_there_are_figures(): assert sum(len(list(figures.figures(load(p)))) for p in notebooks()) > 30


@each
def test_no_foreign_host_in_outputs(path):
    "What a cell has shown is there without a network: links may lead elsewhere, scripts and pictures not"
    for cell in load(path)['cells']:
        for o in cell.get('outputs', []):
            html = ''.join(o.get('data', {}).get('text/html', ''))
            assert 'src="http' not in html and '@import' not in html and '<link' not in html


@pytest.fixture
def plot():
    import plotly.graph_objects as go
    return json.loads(go.Figure(go.Scatter(x=[0, 1, 2], y=[1, 3, 2]), layout=dict(template='plotly_white')).to_json())


def notebook(plot, **data):
    output = dict(output_type='display_data', metadata={}, data={figures.PLOTLY: plot, **data})
    loader = dict(output_type='display_data', metadata={}, data={'text/html': '<script>window.PlotlyConfig</script>'})
    table = dict(output_type='execute_result', metadata={}, data={'text/html': '<table></table>'}, execution_count=1)
    return dict(cells=[dict(cell_type='code', id='a', metadata={}, source='', execution_count=None,
                            outputs=[loader, output, table])], metadata={}, nbformat=4, nbformat_minor=5)


def test_a_figure_is_drawn_once(plot, tmp_path):
    "The same figure keeps its picture, bit for bit; one that changes gets another; nbdev-clean leaves it in place"
    from nbdev.clean import clean_nb
    browser_path()                                                       # a skip or a failure where there is none
    path = tmp_path/'a.ipynb'
    path.write_text(json.dumps(notebook(plot, **{'text/html': '<div></div>'})))
    with figures.painter() as paint:
        assert figures.fill(path, paint)
        shown, table = load(path)['cells'][0]['outputs']
        assert set(shown['data']) == {figures.PLOTLY, figures.PNG} and 'text/html' in table['data']
        first = shown['data'][figures.PNG]
        picture = Image.open(io.BytesIO(base64.b64decode(first))).convert('RGBA')
        assert picture.size == (int(figures.WIDTH * figures.SCALE), int(figures.HEIGHT * figures.SCALE))
        assert picture.width <= 940                                        # what JupyterLab has room for on a laptop
        assert len(picture.getcolors(maxcolors=10_000)) > 10               # a curve and axes, not an empty sheet
    assert not figures.fill(path, figures.no_paint)                       # nothing to draw
    nb = load(path)
    clean_nb(nb)
    assert next(figures.figures(nb))[figures.PNG] == first and not figures.outdated(nb)
    next(figures.figures(nb))[figures.PLOTLY]['data'][0]['y'] = [3, 2, 1]
    path.write_text(json.dumps(nb))
    with pytest.raises(SystemExit, match='Chromium'): figures.fill(path, figures.no_paint)


def test_a_widget_leaves_its_picture(plot):
    "A widget with a picture is saved as the picture; one without is seen by the test above"
    nb = notebook(plot)
    view = {figures.WIDGET: dict(model_id='1')}
    for data in {**view, figures.PNG: 'iVBO', 'text/plain': 'NoiseExplorer()'}, {**view, 'text/plain': 'Button()'}:
        nb['cells'][0]['outputs'].append(dict(output_type='display_data', metadata={}, data=data))
    figures.tidy(nb)
    shown, alone = nb['cells'][0]['outputs'][-2:]
    assert set(shown['data']) == {figures.PNG, 'text/plain'} and figures.pictureless(nb) == [alone]


def test_missing_pictures_are_seen(plot):
    "A figure without one, and a picture that was drawn from another figure"
    from io import BytesIO
    blank = BytesIO()
    Image.new('RGBA', (4, 4)).save(blank, 'png')
    of_another = base64.b64encode(figures.compact(blank.getvalue(), '0' * 16)).decode()
    assert len(figures.outdated(notebook(plot))) == len(figures.outdated(notebook(plot, **{
        figures.PNG: of_another}))) == 1
    its_own = base64.b64encode(figures.compact(blank.getvalue(), figures.digest(figures.themed(plot)))).decode()
    assert not figures.outdated(notebook(plot, **{figures.PNG: its_own}))


def test_theme(plot):
    "Plotly's own ground gives way to none; a figure that chose its ground keeps it; the saved one is not touched"
    before = copy.deepcopy(plot)
    assert figures.themed(plot)['layout']['template']['layout']['paper_bgcolor'] == figures.CLEAR
    assert plot == before
    plot['layout']['template']['layout']['plot_bgcolor'] = '#123456'
    assert figures.themed(plot) == plot
    from noisyseg.show import pictures
    assert (figures.INK, figures.LINE) == (pictures.INK, pictures.LINE)


def test_make_export_draws():
    text = (root/'Makefile').read_text()
    assert '.ci/figures.py' in text and 'notebook_connected' not in text
