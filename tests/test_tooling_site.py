"""The site as its sources make it, and the script that checks it before it is deployed.

Quarto makes the pages where it is; here pandoc does, if it is there, which spells anchors in the same way."""
import json
import re
import shutil
import subprocess

import check_site
import derive
import pages
import pytest
import yaml
from conftest import nb_id, notebooks, read_nb, root

def outputs(page, mime='text/markdown'):
    "What the cells of a processed page have shown, as text"
    return [''.join(o['data'][mime]) for c in json.loads(page.read_text())['cells'] for o in c.get('outputs', [])
            if mime in o.get('data', {})]


def test_parameters_have_real_types(processed):
    "No type that Python made up, and a table for each function: its parameters, types, defaults, comments"
    for p in notebooks():
        text = (processed/nb_id(p)).read_text()
        assert 'NoneType' not in text and '__main__' not in text, p
    said = '\n'.join(outputs(processed/'perturb'/'02_clone.ipynb'))
    assert '### perturbed\n' in said
    assert "<code>gradient</code> | <code>str</code> | <code>&#39;noisy&#39;</code> | \\'noisy\\': backward" in said
    linked = '\n'.join(outputs(processed/'measure'/'09_sweeps.ipynb'))
    assert '<code><a href="../measure/task.html#task">Task</a></code>' in linked


def test_reference_of_many_kinds():
    "A dataclass with what it inherits, a class with an `__init__`, one without, a method that was added later"
    law = pages.reference('MaxGaussian', 'perturb.laws')
    assert "MaxGaussian(n=0.02, alpha=2.0, per='kernel', clip='clamp')" in law and '<code>alpha</code>' in law
    assert 'Literal&#91;&#39;kernel&#39;&#44; ' in law
    assert '| parameter |' in pages.reference('UNet3Plus', 'nets.unet3plus')
    with pytest.raises(AttributeError): pages.reference('no_such_name', 'perturb.laws')


def f(a, /, b: 'int | None' = None, *args, key=('x', 1), **kwargs) -> dict: "Many kinds."


def test_arguments_of_all_kinds():
    "Each kind of parameter, as it is written"
    rows = pages.arguments(f)
    assert pages.signature('f', rows) == "f(a, b=None, *args, key=('x', 1), **kwargs)"
    told = dict(a=dict(docment='first'), b=dict(docment='one | two'))
    table = pages.table(rows, {**told, 'return': dict(docment='all')}, 'dict', pages.NbdevLookup())
    assert '| <code>b</code> | <code>&#39;int &#124; None&#39;</code> | <code>None</code> | one \\| two |' in table
    assert table.endswith('| *returns* | <code>dict</code> |  | all |')
    assert pages.literal("'a_b'*") == '&#39;a&#95;b&#39;&#42;' and pages.cell("it's `it's`") == "it\\'s `it's`"


def test_every_public_name_is_in_the_index(processed):
    "With a link to its heading; the names that people type among them"
    import noisyseg
    text = (processed/'symbols.md').read_text()
    for name in noisyseg.__all__:
        where = noisyseg._module_of[name]
        url = next(pages.page(nb) for nb, module in derive.modules() if module == where)
        o = getattr(noisyseg, name)
        if callable(o) and hasattr(o, '__qualname__'): assert f'[`{name}`]({url}#{name.lower()})' in text, name
    found = pages.symbols(processed)
    assert len(found) > 500 and len(set(found)) == len(found)
    assert not [name for name, _, line in found if not line], 'a docstring is missing'


def test_names_in_prose_are_linked(processed):
    "A name in backticks leads to its page, by a link that stays on this copy of the site"
    laws = '\n'.join(c.source for c in read_nb(processed/'perturb'/'04_laws.ipynb').cells if c.cell_type == 'markdown')
    assert '[`MaxGaussian`](../perturb/laws.html#maxgaussian)' in laws
    for p in notebooks(): assert f'{derive.settings["doc_url"]}/' not in (processed/nb_id(p)).read_text(), p


def test_links_out_of_the_notebooks(processed):
    "The licence and the like are no pages: links to them lead to where the code is, with and without JavaScript"
    text = '\n'.join(c.source for c in read_nb(processed/'index.ipynb').cells)
    assert f'({derive.settings["git_url"]}/blob/{derive.settings["branch"]}/LICENSE)' in text and '](../' not in text


def test_no_output_is_html(processed):
    "Quarto adds scripts from a foreign host where one is; all are HTML in markdown"
    for p in notebooks():
        page = processed/nb_id(p)
        assert not outputs(page, 'text/html') and not outputs(page, 'application/javascript'), p
        assert not outputs(page, 'application/vnd.jupyter.widget-view+json'), p


def test_figures_come_with_what_moves_them(processed):
    "Each has a picture, words for those who do not see it, and a script beside it; plotly.js is there once"
    shown = [m for p in notebooks() for o in outputs(processed/nb_id(p)) for m in re.findall(
        r'<figure class="noisyseg-figure" data-figure="([./]*)(figures/\w+[.]js)"><img src="[./]*(figures/\w+[.]png)" '
        r'[^>]*loading="lazy" alt="([^"]+)">', o)]
    assert len(shown) > 30
    for _, live, picture, alt in shown:
        assert (processed/live).read_text().startswith('(window.noisysegFigures ??= {})')
        assert (processed/picture).stat().st_size > 1000 and alt
    assert sum(alt != 'a figure' for *_, alt in shown) > 0.9 * len(shown)
    assert (processed/'figures'/'plotly.min.js').stat().st_size > 1_000_000


def test_gallery(processed):
    "A tile for each notebook with a picture, which leads to it and is there"
    text = (processed/'gallery.md').read_text()
    tiles = re.findall(r'href="([^"]+)"><img class="[\w-]+" src="([^"]+)"', text)
    assert len(tiles) > 30 and len({o for o, _ in tiles}) == len(tiles)
    assert all((processed/picture).is_file() for _, picture in tiles)
    assert {pages.page(nb) for nb, _ in derive.sections()['studies'][''] if nb.startswith('studies')} <= {
        o for o, _ in tiles}


def test_results(processed):
    "Every study, in its own words: what it found and how far that goes; short enough for a minute or two"
    text = (processed/'results.md').read_text()
    assert len(re.findall('^## ', text, re.M)) == len(pages.studies()) == len(re.findall(r'How far it goes', text))
    for nb in pages.studies():
        found, limit = pages.answer(nb)
        assert found in text and limit in text and len(found.split()) > 8
        written = '\n'.join(c.source for c in read_nb(root/'nbs'/nb).cells if c.cell_type == 'markdown')
        assert found in written.replace('\n', ' ')
    words = re.sub(r'<[^>]+>|!?\[[^]]*\]\([^)]*\)|^---.*?^---', '', text, flags=re.M | re.S).split()
    assert len(words) < 80 * len(pages.studies())


@pytest.fixture(scope='module')
def site(processed, tmp_path_factory):
    "The pages as pandoc makes them: their links, anchors and pictures are those of the site, their looks are not"
    if not shutil.which('pandoc'): pytest.skip('no pandoc')
    to = tmp_path_factory.mktemp('site')
    for p in processed.rglob('*'):
        if p.is_file() and p.suffix not in ('.ipynb', '.md', '.yml'):
            (to/p.relative_to(processed)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(p, to/p.relative_to(processed))
    for p in [*processed.rglob('*.ipynb'), *(processed/f'{o}.md' for o in pages.MADE)]: convert(p, processed, to)
    return to


def markdown(path):
    "A page as one text"
    if path.suffix == '.md': return path.read_text()
    parts = []
    for c in json.loads(path.read_text())['cells']:
        text = ''.join(c['source'])
        if c['cell_type'] == 'raw': parts.append(text)
        if c['cell_type'] == 'markdown': parts.append(text)
        if c['cell_type'] == 'code' and 'echo: false' not in text: parts.append(f'````python\n{text}\n````')
        for o in c.get('outputs', []):
            data = o.get('data', {})
            if 'text/markdown' in data: parts.append(''.join(data['text/markdown']))
            elif 'image/png' in data: parts.append('*a picture*')            # Quarto makes a file of it
            else: parts.append('````\n' + ''.join(data.get('text/plain', o.get('text', ''))) + '\n````')
    return '\n\n'.join(parts)


def convert(path, processed, to):
    "Make one page with pandoc; as Quarto does, links to notebooks and markdown become links to pages"
    where = path.relative_to(processed).as_posix()
    page = to/(pages.page(where) if path.suffix == '.ipynb' else f'{path.stem}.html')
    # to colour code takes most of the time, and is not looked at
    r = subprocess.run(['pandoc', '-f', 'markdown', '-t', 'html', '--mathml', '--standalone', '--section-divs',
                        '--no-highlight'], input=markdown(path), capture_output=True, text=True, check=True)
    def to_page(m): return f'href="{re.sub("(^|/)[0-9]+_", chr(92) + "1", m[1])}.html'
    text = re.sub(r'href="(?!https?:)([^"#]+)[.](?:ipynb|md)(?=["#])', to_page, r.stdout)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text)


def test_links_and_anchors_of_the_site(site):
    "Over all pages: each link into the site and each anchor is there, nothing is fetched elsewhere, none is too heavy"
    only_quarto = 'canonical|icon|og:|twitter:|search.json|llms.txt|/live/'
    assert not [o for o in check_site.findings(site) if not re.search(only_quarto, o)]


# The checker, on a small site made up here

head = '''<!doctype html><html><head><title>x</title>
<link rel="canonical" href="{home}{at}"><link rel="icon" href="i.svg">
<meta property="og:title" content="x"><meta property="og:description" content="x">
<meta property="og:image" content="{home}i.svg"><meta name="twitter:card" content="summary">
<meta name="twitter:image" content="{home}i.svg">{more}</head><body>{body}</body></html>'''


@pytest.fixture
def small(tmp_path):
    "Two pages without a fault; gives a function that writes one of them anew and says what is found then"
    tmp_path = tmp_path/'site'   # what lies beside it is this test's own, too
    tmp_path.mkdir()
    def write(at='index.html', body='<a href="two.html#here">two</a>', more='', cut=None):
        text = head.format(home=check_site.HOME, at=at, body=body, more=more)
        (tmp_path/at).write_text(text.replace(cut, '') if cut else text)
        return check_site.findings(tmp_path, ['sweep'])
    (tmp_path/'i.svg').write_text('<svg/>')
    entry = dict(href='two.html#here', section='sweep')
    (tmp_path/'search.json').write_text(json.dumps([entry]))
    write('two.html', '<h3 id="here">sweep</h3><a href="./">home</a><a href="https://elsewhere.org">far</a>')
    write.folder = tmp_path
    return write


def test_a_small_site_is_in_order(small): assert small() == []


@pytest.mark.parametrize('fault, said', [
    (dict(body='<a href="three.html">x</a>'), 'leads nowhere: three.html'),
    (dict(body='<a href="../settings.ini">x</a>'), 'leads nowhere: ../settings.ini'),
    (dict(body='<a href="two.html#there">x</a>'), 'no such place: two.html#there'),
    (dict(body='<a href="#nowhere">x</a>'), 'no such place: #nowhere'),
    (dict(body=f'<a href="{check_site.HOME}gone.html">x</a>'), 'leads nowhere'),
    (dict(body='<script src="https://cdn.example.org/a.js"></script>'), 'fetched from another host'),
    (dict(body='<script type="module">import x from "https://cdn.example.org/a.js"</script>'), 'another host'),
    (dict(body='<img src="//example.org/a.png">'), 'another host'),
    (dict(more='<style>@import url("https://fonts.example.org/css");</style>'), 'another host'),
    (dict(more='<link rel="stylesheet" href="a.css">'), 'fetched from another host: https://fonts.example.org/x'),
    (dict(body='<img src="gone.png">'), 'fetched and not there: gone.png'),
    (dict(body='x' * 1_600_000), 'weighs 1.60 MB'),
    (dict(body='<img src="large.bin">'), 'weighs 2.00 MB'),
    (dict(cut='<meta name="twitter:card" content="summary">'), 'no twitter:card'),
    (dict(more='<meta property="og:image" content="x/data:image/png;base64,">'), 'card has no address'),
    (dict(cut='rel="canonical"'), 'no canonical address'),
    (dict(cut='rel="icon"'), 'no icon')], ids=lambda o: o if isinstance(o, str) else '')
def test_faults_of_a_site_are_found(small, fault, said):
    (small.folder/'a.css').write_text('@import url(https://fonts.example.org/x);')
    (small.folder/'large.bin').write_bytes(bytes(2_000_000))
    (small.folder.parent/'settings.ini').write_text('')       # beside the site, not in it
    found = small(**fault)
    assert len(found) == 1 and said in found[0], found


def test_search_without_a_name_is_found(small):
    (small.folder/'search.json').write_text(json.dumps([dict(href='gone.html', section='x')]))
    assert small() == ['search.json has no entry for sweep', 'search.json leads nowhere: gone.html']


def test_page_that_is_not_there_as_markdown_is_found(small):
    url = f'{check_site.HOME}two.html.md'
    (small.folder/'llms.txt').write_text(f'- [two]({url}): a page')
    assert small() == ['llms.txt leads nowhere: two.html.md']
    (small.folder/'two.html.md').write_text('# two')
    assert small() == []


def test_pages_come_as_markdown_too():
    "Without keep-md, Quarto deletes index.html.md as a file of its own, and then does not find it"
    cfg = yaml.safe_load((root/'_quarto.yml').read_text())['format']
    assert 'commonmark' in cfg and cfg['html']['keep-md'] is True
    assert cfg['html']['format-links'][0] == 'html', 'or the link to it is there twice'
    text = 'A [law](../perturb/03_disturbance.ipynb#law), [here](https://example.org/x.ipynb)'
    assert pages.to_markdown(text) == text.replace('03_disturbance.ipynb', 'disturbance.html.md')


def test_card_of_a_page_with_a_picture_inside():
    "A picture without an address is no picture of a card; the site has one for all pages"
    image = '<meta property="og:image" content="{}">'
    there, card = image.format('https://example.org/x.png'), f'{derive.settings["doc_url"]}/images/card.png'
    assert pages.with_card(there) == there
    inside = image.format('https://example.org/show/data:image/png;base64,abc')
    assert pages.with_card(inside + '<meta property="og:image:width" content="64">') == image.format(card)
    assert yaml.safe_load((root/'_quarto.yml').read_text())['website']['image'].startswith('/')


def test_search_finds_a_name_first():
    "Each name has an entry of its own, before those that Quarto made, and none is there twice"
    page = 'measure/sweeps.html'
    theirs = [dict(objectID=page, href=page, title='Sweeps', section='', text='sweep')]
    found = [('sweep', 'measure/09_sweeps.ipynb', 'Score every model.')]
    entries = pages.with_symbols(theirs, found)
    assert [(o['title'], o['section']) for o in entries] == [('noisyseg.measure.sweeps', 'sweep'), ('Sweeps', '')]
    assert entries[0]['href'] == 'measure/sweeps.html#sweep' and pages.with_symbols(entries, found) == entries


def test_looks_on_a_dark_page():
    "Fonts come from the reader's own system, figures have no ground, and what is white is turned or dimmed"
    cfg = yaml.safe_load((root/'_quarto.yml').read_text())['format']['html']
    assert all('fonts.scss' in o for o in cfg['theme'].values()) and cfg['html-math-method'] == 'mathml'
    assert '$web-font-path: false' in (root/'nbs'/'fonts.scss').read_text()
    style = (root/'nbs'/'styles.css').read_text()
    assert 'body.quarto-dark .noisyseg-chart' in style and 'background: white' not in style and '#fff' not in style
