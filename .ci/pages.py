"""The pages of the site: the notebooks as nbdev hands them to Quarto, and three pages made from them.

`python .ci/pages.py` (`make docs`) builds the site with nbdev and Quarto. What is ours here: each public name gets a
heading, its signature and a table of its parameters as they are written in the source; figures are pictures that come
alive on a click; nothing that a cell has shown asks a foreign host; and from the notebooks come an index of all names,
a gallery and the results of the studies in a minute."""
import ast
import base64
import dataclasses
import functools
import hashlib
import html
import importlib
import inspect
import io
import json
import os
import posixpath
import re
import shutil
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import derive
import figures
from fastcore.docments import docments
from fastcore.xtras import dict2obj
from nbdev.config import nbpath2html
from nbdev.doclinks import NbdevLookup
from nbdev.process import Processor
from nbdev.processors import FilterDefaults, exec_show_docs
from PIL import Image

root = Path(__file__).resolve().parents[1]
proc = root/'_proc'
BARE = 'figures'                        # the folder of pictures and figures, in _proc and on the site
MADE = ('symbols', 'gallery', 'results')   # pages that are made here


# Names

def real(
    name,    # 'perturbed', or 'UNet3Plus.forward'
    module,  # 'perturb.clone'
):
    "The object of that name in the package"
    there = importlib.import_module(f'{derive.settings["lib_name"]}.{module}')
    return functools.reduce(getattr, name.split('.'), there)


@functools.cache
def definition(o):
    "The syntax tree of a function or a class"
    return ast.parse(textwrap.dedent(inspect.getsource(o))).body[0]


def fields(cls):
    "(name, annotation, default) of the fields that one gives to a dataclass, as they are written, inherited ones too"
    written = {}
    for c in reversed(cls.__mro__):
        if '__dataclass_fields__' not in vars(c): continue
        own = [o for o in definition(c).body if isinstance(o, ast.AnnAssign)]
        written |= {o.target.id: (ast.unparse(o.annotation), ast.unparse(o.value) if o.value else None) for o in own}
    return [(f.name, *written[f.name]) for f in dataclasses.fields(cls) if f.init]


def arguments(f):
    "(name, annotation, default) of a function's parameters, as they are written; None where there is none"
    a = definition(f).args
    plain = [*a.posonlyargs, *a.args]
    given = dict(zip(reversed(plain), reversed(a.defaults))) | dict(zip(a.kwonlyargs, a.kw_defaults))
    text = lambda o: ast.unparse(o) if o is not None else None
    row = lambda o, star='': (star + o.arg, text(o.annotation), text(given.get(o)))
    rows = [row(o) for o in plain] + ([row(a.vararg, '*')] if a.vararg else [])
    rows += [('*', None, None)] if a.kwonlyargs and not a.vararg else []
    rows += [row(o) for o in a.kwonlyargs] + ([row(a.kwarg, '**')] if a.kwarg else [])
    return [o for i, o in enumerate(rows) if i or o[0] not in ('self', 'cls')]


def parts(o):
    "What a name is called with: (rows of parameters, comments beside them, what comes back)"
    if inspect.isclass(o) and '__dataclass_fields__' in vars(o): return fields(o), docments(o, full=True), None
    if inspect.isclass(o):
        if '__init__' not in vars(o): return [], {}, None
        return arguments(vars(o)['__init__']), docments(vars(o)['__init__'], full=True), None
    returns = definition(o).returns
    return arguments(o), docments(o, full=True), returns and ast.unparse(returns)


def signature(
    name,  # what stands before the bracket
    rows,  # as `arguments` gives them
    width: int = 88,
):
    "A call as one would write it, broken where a line is full"
    text = [o if default is None else f'{o}={default}' for o, _, default in rows]
    whole = f'{name}({", ".join(text)})'
    if len(whole) <= width: return whole
    return textwrap.fill(', '.join(text), width - 4, initial_indent=f'{name}(', subsequent_indent='    ',
                         break_long_words=False, break_on_hyphens=False) + ')'


def kind(annotation, lookup):
    "A type as HTML, with links for the names of this package"
    def linked(name):
        url = lookup.doc(name) if name in lookup.syms and not name.startswith('_') else None
        return f'<a href="{url}">{literal(name)}</a>' if url else literal(name)
    found = re.split(r'([A-Za-z_][A-Za-z_.0-9]*)', annotation)
    return f'<code>{"".join(linked(o) if i % 2 else literal(o) for i, o in enumerate(found))}</code>'


def literal(text):
    "As HTML in which markdown finds nothing to do: no curly quotes, no emphasis, no column of a table"
    return re.sub(r'[^\w\s]|_', lambda m: f'&#{ord(m[0])};', re.sub(r'\s+', ' ', text))


def cell(text):
    "A comment as a cell of a table in markdown, with straight quotes"
    parts = re.split('(`[^`]*`)', re.sub(r'\s+', ' ', text or '').strip())
    return ''.join(o if i % 2 else o.replace("'", "\\'") for i, o in enumerate(parts)).replace('|', '\\|')


def table(rows, comments, returns, lookup):
    "The table of parameters, in markdown; columns that would be empty are left out"
    said = lambda name: (comments.get(name.lstrip('*')) or {}).get('docment')
    described = [o for o in rows if o[0] != '*' and (said(o[0]) or o[1])]
    result = (comments.get('return') or {}).get('docment')
    if not described and not (returns and result): return ''
    # as HTML: what is in backticks becomes a link where a public name is the same
    code = lambda text: f'<code>{literal(text)}</code>'
    lines = [(code(o), kind(t, lookup) if t else '', code(d) if d is not None else '', cell(said(o)))
             for o, t, d in described]
    if returns and returns != 'None' or result:
        lines.append(('*returns*', kind(returns, lookup) if returns else '', '', cell(result)))
    names = 'parameter', 'type', 'default', 'what it is'
    shown = [i for i in range(4) if any(o[i] for o in lines)]
    row = lambda o: '| ' + ' | '.join(o[i] for i in shown) + ' |'
    widths = ['-' * o for o in (18, 20, 14, 48)]               # pandoc takes them as shares of the page
    return '\n'.join([row(names), row(widths), *map(row, lines)])


def prose(o):
    "A docstring as markdown: the first line in italics; it is linked later, with the rest of the page"
    first, _, rest = (inspect.getdoc(o) or '').partition('\n')
    rest = re.split(r'^(?:Parameters|Returns)\n-{3,}$', rest, flags=re.M)[0].strip()
    return '\n\n'.join(filter(None, [f'*{first}*' if first else '', rest]))


def reference(name, module):
    "What a page says about a name: heading, source, call, docstring, parameters"
    o, lookup = real(name, module), NbdevLookup()
    o = o.fget if isinstance(o, property) else o
    source = lookup.code(name)
    link = f'[source]({source}){{style="float:right; font-size:smaller"}}' if source else ''
    head = ['---', link, '### ' + name.replace('__', r'\_\_')]
    if not callable(o): return '\n\n'.join(filter(None, [*head, prose(o)]))
    rows, comments, returns = parts(o)
    body = [f'```python\n{signature(name, rows)}\n```', prose(o), table(rows, comments, returns, lookup)]
    return '\n\n'.join(filter(None, head + body))


def below_nbs(nb): return Path(nb.path_).resolve().relative_to(root/'nbs')


class Named(Processor):
    "In place of nbdev's running of the notebook: what is said of each name comes from the package itself"
    def begin(self): self.module = derive.module(below_nbs(self.nb).as_posix())

    def cell(self, cell):
        m = re.search(r'^show_doc\(([\w.]+)\)', cell.source, re.M)
        if cell.cell_type != 'code' or not m: return
        # a callback's event, say, which needs no explaining
        if '.' in m[1] and not real(m[1], self.module).__doc__:
            del cell['source']
            return
        text = reference(m[1], self.module)
        cell.outputs = [dict2obj(dict(output_type='display_data', metadata={}, data={'text/markdown': text}))]


# What cells have shown

def raw_html(text):
    "A piece of HTML inside markdown, for pandoc"
    fence = '`' * max([3, *(len(o) + 1 for o in re.findall('`{3,}', text))])
    return f'{fence}{{=html}}\n{text.strip()}\n{fence}\n'


def alt(figure):
    "A figure in words: its title, its axes, its curves"
    layout = figure.get('layout', {})
    title = lambda o: ((o or {}).get('title') or {}).get('text') or ''
    names = [o['name'] for o in figure['data'] if o.get('name') and o.get('showlegend') is not False]
    axes = ' over '.join(filter(None, map(title, (layout.get('yaxis'), layout.get('xaxis')))))
    said = [title(layout), axes, ', '.join(dict.fromkeys(names))]
    return html.escape(re.sub('<[^>]+>', ' ', '; '.join(filter(None, said))) or 'a figure')


def store(folder, name, content):
    "Write a file of a page, if it is not there"
    path = folder/BARE/name
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists(): path.write_bytes(content)
    return f'{BARE}/{name}'


def live_figure(data, up, folder):
    "A figure of plotly's as HTML: its picture, and where to find what makes it move"
    figure = figures.themed(data[figures.PLOTLY])
    name, (width, height) = figures.digest(figure), figures.size(figure)
    picture = store(folder, f'{name}.png', base64.b64decode(data[figures.PNG]))
    script = f'(window.noisysegFigures ??= {{}})["{name}"] = {json.dumps(figure)}'
    live = store(folder, f'{name}.js', script.encode())
    return (f'<figure class="noisyseg-figure" data-figure="{up}{live}"><img src="{up}{picture}" width="{width}" '
            f'height="{height}" loading="lazy" alt="{alt(figure)}"></figure>')


def is_chart(png):
    "Is a picture mostly white paper? Then it may be turned dark; a picture of something may not"
    import io

    from PIL import Image
    grey = Image.open(io.BytesIO(png)).convert('RGBA')
    paper = Image.new('RGBA', grey.size, 'white')
    paper.alpha_composite(grey)
    counts = paper.convert('L').histogram()
    return sum(counts[250:]) > 0.5 * sum(counts)


def still(data, up, folder):
    "A picture of matplotlib's as HTML"
    png = base64.b64decode(data[figures.PNG])
    picture = store(folder, f'{hashlib.sha256(png).hexdigest()[:16]}.png', png)
    return (f'<img class="{ground(picture, folder)}" src="{up}{picture}" loading="lazy" '
            f'alt="the picture that this cell draws">')


class Shown(Processor):
    """Outputs as the site needs them.

    Quarto adds scripts from a foreign host to each page with an output of HTML; as HTML in markdown it comes without
    them. Links to pages of the site become relative, so that a copy of it leads nowhere else; those that leave nbs/
    (the licence, the pinned versions) lead to where the code is, for the site has no such page."""
    folder = proc

    def begin(self): self.up = '../' * (len(below_nbs(self.nb).parts) - 1)

    def local(self, text): return text.replace(f'{derive.settings["doc_url"]}/', self.up or './')

    def outside(self, text):
        def absolute(m):
            path = posixpath.normpath(posixpath.join('nbs', below_nbs(self.nb).parent.as_posix(), m[2]))
            if path.startswith('nbs/'): return m[0]
            return f'{m[1]}{derive.settings["git_url"]}/blob/{derive.settings["branch"]}/{path}'
        return re.sub(r'(\]\()([.][.]/[^)\s]+)', absolute, text)

    def output(self, data):
        plain = ''.join(data.get('text/plain', ''))
        if figures.PLOTLY in data and figures.PNG in data: shown = live_figure(data, self.up, self.folder)
        elif 'text/html' in data: shown = ''.join(data['text/html'])
        elif figures.PNG in data and plain.startswith('<Figure'): shown = still(data, self.up, self.folder)
        else: return data
        return {'text/markdown': raw_html(shown)}

    def cell(self, cell):
        if cell.cell_type == 'markdown': cell.source = self.outside(self.local(cell.source))
        for o in cell.get('outputs', []):
            if 'data' not in o: continue
            o['data'] = dict2obj(self.output(o['data']))
            if 'text/markdown' in o['data']:
                o['data']['text/markdown'] = self.local(''.join(o['data']['text/markdown']))


class Pages(FilterDefaults):
    "nbdev's processors, with ours in place of the one that runs cells, and after all"
    def base_procs(self): return [Named if o is exec_show_docs else o for o in super().base_procs()] + [Shown]


# Pages made from the others

def page(nb): return nbpath2html(nb).as_posix()


def read(nb, folder): return json.loads((folder/nb).read_text(encoding='utf-8'))


def symbols(folder=None):
    "[(name, notebook, one line about it), ...]: all that has a heading of its own on a page"
    found = []
    for nb, module in derive.modules():
        for c in read(nb, folder or proc)['cells']:
            m = c['cell_type'] == 'code' and re.search(r'^show_doc\(([\w.]+)\)', ''.join(c['source']), re.M)
            if not m: continue
            o = real(m[1], module)
            line = (inspect.getdoc(o) or '').split('\n')[0]
            found.append((m[1], nb, line))
    return sorted(found, key=lambda o: (o[0].lower(), o[1]))


def anchor(name):
    "As pandoc makes it of a heading"
    return name.lower()


# no "View source": these have none
FRONT = '---\ntitle: "{title}"\ndescription: "{about}"\nformat: html\nrepo-actions: false\n{more}---\n\n'


def symbols_page(folder=None):
    "The index: each public name, in which module, and what it is"
    found, text = symbols(folder), ''
    modules = dict(derive.modules())
    for letter in sorted({o[0][0].upper() for o in found}):
        text += f'## {letter}\n\n| name | module | what it is |\n|{"-" * 26}|{"-" * 18}|{"-" * 56}|\n'
        text += ''.join(f'| [`{name}`]({page(nb)}#{anchor(name)}) | {modules[nb]} | {cell(line)} |\n'
                        for name, nb, line in found if name[0].upper() == letter) + '\n'
    about = f'All {len(found)} public names of noisyseg, each with one line and a link to its page.'
    # where cells hold links, Quarto would leave out the widths
    return FRONT.format(title='All names', about=about,
                        more='search: false\ntoc-depth: 2\ntbl-colwidths: true\n') + text


def pictures(nb):
    "The pictures that a notebook has saved, in order, as bytes of a PNG"
    for c in read(nb, root/'nbs')['cells']:
        if re.search(r'^#\|\s*(hide|include: false)', ''.join(c['source']), re.M): continue
        for o in c.get('outputs', []):
            data = o.get('data', {})
            if figures.PNG in data: yield base64.b64decode(''.join(data[figures.PNG]))
        if c['cell_type'] != 'markdown': continue
        for o in re.findall(r'!\[[^]]*\]\(([^)]+[.]png)\)', ''.join(c['source'])):
            yield ((root/'nbs'/nb).parent/o).resolve().read_bytes()


def first_picture(nb, folder):
    "Where a notebook's first picture lies, as a link; None where it has none"
    png = next(pictures(nb), None)
    if png is None: return None
    drawn = figures.digest_drawn(base64.b64encode(png))
    return store(folder, f'{drawn or hashlib.sha256(png).hexdigest()[:16]}.png', png)


def ground(picture, folder):
    "The class of a stored picture, for style sheets: has it no ground, is it a chart on white paper, or a picture"
    png = (folder/picture).read_bytes()
    if figures.digest_drawn(base64.b64encode(png)): return 'noisyseg-clear'
    return 'noisyseg-chart' if is_chart(png) else 'noisyseg-paper'


def tile(nb, picture, folder):
    name, about = derive.title(root/'nbs'/nb)
    small = thumbnail(picture, folder)
    return (f'<a class="tile" href="{page(nb)}"><img class="{ground(picture, folder)}" src="{small}" loading="lazy" '
            f'alt=""><strong>{html.escape(name)}</strong><span>{html.escape(plain(about))}</span></a>')


def plain(markdown):
    "Markdown without its marks"
    return re.sub(r'[*`]', '', re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', markdown))


def thumbnail(picture, folder):
    "A stored picture made smaller, for the gallery, which holds dozens of them"
    with Image.open(folder/picture) as im:
        small = im.convert('RGBA' if 'A' in im.getbands() or 'transparency' in im.info else 'RGB')
        small.thumbnail((360, 360))
        held = io.BytesIO()
        small.quantize(64, method=Image.Quantize.FASTOCTREE).save(held, 'PNG', optimize=True)
    return store(folder, f'{Path(picture).stem}-small.png', held.getvalue())


def gallery_page(folder):
    "One picture a notebook, by section"
    text = ''
    for name, groups in derive.sections().items():
        found = [(nb, first_picture(nb, folder)) for group in groups.values() for nb, _ in group]
        tiles = ''.join(tile(nb, picture, folder) for nb, picture in found if picture)
        if tiles: text += f'## {name.capitalize()}\n\n' + raw_html(f'<div class="gallery">{tiles}</div>') + '\n'
    about = 'A picture from each notebook that has one: what you will see there.'
    return FRONT.format(title='Gallery', about=about, more='search: false\n') + text


def answer(nb):
    "A study's answer: the first sentence of its paragraph \"In short\", and the last, which says how far it goes"
    texts = [''.join(c['source']) for c in read(nb, root/'nbs')['cells'] if c['cell_type'] == 'markdown']
    short = next((m[1] for t in texts if (m := re.match(r'\*\*[\w ]*[Ii]n short[.]\*\*\s+(.+)', t, re.S))), None)
    if short is None: raise ValueError(f'{nb} has no paragraph that begins with **In short.**')
    sentences = re.split(r'(?<=[a-z)%*\d][.]) (?=\*{0,2}[A-Z])', short.split('\n\n')[0].replace('\n', ' '))
    return sentences[0], sentences[-1]


def studies(): return [nb for nb, _ in derive.sections()['studies'][''] if nb.startswith('studies/')]


def results_page(folder):
    "Each study in two sentences and a picture"
    text = ''
    for nb in studies():
        name, about = derive.title(root/'nbs'/nb)
        (found, limit), picture = answer(nb), first_picture(nb, folder)
        text += f'## [{name}]({nb})\n\n{found}\n\n'
        if picture:
            image = f'<img class="result {ground(picture, folder)}" src="{picture}" alt="{html.escape(plain(about))}">'
            text += raw_html(f'<a href="{page(nb)}">{image}</a>') + '\n'
        text += f'*How far it goes.* {limit}\n\n'
    about = 'What each study found, and how far that goes: two sentences and a picture of each.'
    lead = 'Each heading leads to the study, with its protocol, all numbers and what the papers report.\n\n'
    return FRONT.format(title='Results in a minute', about=about, more='') + lead + text


def make(folder=proc):
    "Write the pages that are made from others, and what figures need to come alive"
    (folder/BARE).mkdir(exist_ok=True)
    plotly_js = Path(find_spec('plotly').origin).parent/'package_data'/'plotly.min.js'
    shutil.copy2(plotly_js, folder/BARE/'plotly.min.js')
    for name, text in zip(MADE, (symbols_page(folder), gallery_page(folder), results_page(folder))):
        (folder/f'{name}.md').write_text(text, encoding='utf-8')


# Building

def process(n_workers=0):
    "What nbdev's `proc_nbs` does, with our processors; then the pages made from others"
    import nbdev.config
    import nbdev.serve
    os.environ['NOISYSEG_DOCMENTS'] = '0'        # comments stand in the tables: not again in docstrings
    # read twice for each cell, and parsed each time
    if not hasattr(nbdev.config._load_toml, 'cache_info'):
        nbdev.config._load_toml = functools.lru_cache(nbdev.config._load_toml)
    nbdev.serve.FilterDefaults = Pages
    nbdev.serve.proc_nbs(n_workers=n_workers, force=True)
    make()


def with_symbols(entries, found):
    "Quarto's index for its search, which knows no headings below the second level, with an entry for each name"
    modules = dict(derive.modules())
    mine = []
    for name, nb, line in found:
        href = f'{page(nb)}#{anchor(name)}'
        where = f'{derive.settings["lib_name"]}.{modules[nb]}'     # stands above all that is found on its page
        mine.append(dict(objectID=href, href=href, title=where, section=name, text=plain(line), crumbs=[where]))
    return mine + [o for o in entries if o['objectID'] not in {m['objectID'] for m in mine}]


def to_markdown(text):
    "The text of a page as markdown, which leads to others of its kind: Quarto leaves there the names of notebooks"
    return re.sub(r'(\]\(|\bhref=")(?![a-z]+:)([^)"#\s]+[.]ipynb)', lambda m: f'{m[1]}{page(m[2])}.md', text)


def with_card(text):
    "A page with the card of the site, where Quarto took a picture without an address: one inside the page"
    tag = r'<meta (?:property|name)="(?:og|twitter):image{}" content="[^"]*"[^>]*>\n?'
    if not re.search(tag.format('').replace('[^"]*"[', '[^"]*data:[^"]*"[', 1), text): return text
    text = re.sub(tag.format('[:-](?:alt|height|width)'), '', text)
    card = f'{derive.settings["doc_url"]}/images/card.png'
    return re.sub(r'((?:og|twitter):image" content=")[^"]*', rf'\g<1>{card}', text)


def build():
    "The site, in _docs"
    import nbdev.quarto
    processed = nbdev.quarto.proc_nbs
    def proc_nbs(path='', n_workers=0, **kwargs):
        process(n_workers)
        return proc
    nbdev.quarto.proc_nbs = proc_nbs
    try: nbdev.quarto.nbdev_docs.__wrapped__()
    finally: nbdev.quarto.proc_nbs = processed
    for p in (root/'_docs').rglob('*.html.md'):
        p.write_text(to_markdown(p.read_text(encoding='utf-8')), encoding='utf-8')
    for p in (root/'_docs').rglob('*.html'):
        p.write_text(with_card(p.read_text(encoding='utf-8')), encoding='utf-8')
    index = root/'_docs'/'search.json'
    entries = with_symbols(json.loads(index.read_text(encoding='utf-8')), symbols())
    index.write_text(json.dumps(entries), encoding='utf-8')


if __name__ == '__main__':
    import pages                       # not as __main__: other processes have to find the classes
    pages.process() if sys.argv[1:] == ['--sources'] else pages.build()
