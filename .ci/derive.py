"""Write what nbdev does not: README.md from nbs/index.ipynb (nbdev-readme needs Quarto), nbs/llms.txt and
the sidebars in _quarto.yml.

`python .ci/derive.py` writes them; tests hold the files to `readme()`, `llms_txt()` and `quarto_yml()`."""
import json
import posixpath
import re
from configparser import ConfigParser
from pathlib import Path

from nbdev.config import nbpath2html

root = Path(__file__).resolve().parents[1]
settings = ConfigParser()
settings.read(root/'settings.ini')
settings = settings['DEFAULT']
# subpackages import in this direction only: from those before them
LAYERS = ['basics', 'perturb', 'data', 'nets', 'measure', 'train', 'mend', 'show']
SECTIONS = [*LAYERS[1:], 'tutorials', 'studies']           # each has a sidebar of its own on the site
# the sidebar of notebooks in no folder
AT_THE_TOP = {'basics.ipynb': 'perturb', 'docments.ipynb': 'perturb', 'benchmarks.ipynb': 'studies'}
FIRST = dict(tutorials=[f'tutorials/{o}.ipynb' for o in ('drag_it', 'tour', 'plain_pytorch', 'own_data', 'few_masks')],
             studies=['studies/camvid.ipynb'])               # what a reader should meet first
note = '<!-- Made from nbs/index.ipynb by `make export`: edit that. -->\n\n'


def rank(path):
    """The place of a notebook in the order of imports: that of its subpackage, then that of its folder.

    Folders within a subpackage come after its own notebooks; `fast` comes before them."""
    top, *inner = Path(path).with_suffix('').parts
    folder = inner[:-1]
    return LAYERS.index(top) if top in LAYERS else len(LAYERS), 0 if folder == ['fast'] else 1 if not folder else 2


def _absolute(m):
    """A link of nbs/index.ipynb as it works everywhere, also where a package index shows README.md.

    Notebooks lead to the site; other files, and pictures, to where the code is."""
    before, target, after = m.groups()
    if re.match(r'[a-z]+:|#|/', target): return m[0]
    path, _, anchor = target.partition('#')
    path = posixpath.normpath(posixpath.join('nbs', path))
    if path.endswith('.ipynb'):
        url = f'{settings["doc_url"]}/{nbpath2html(path.removeprefix("nbs/")).as_posix()}'
    elif re.search(r'[.](png|svg|jpg|gif)$', path):
        url = f'{settings["git_url"]}/raw/{settings["branch"]}/{path}'
    else:
        url = f'{settings["git_url"]}/blob/{settings["branch"]}/{path}'
    return before + url + (f'#{anchor}' if anchor else '') + after


def _site_only(cell):
    "Scripts run on the site; GitHub would show them as text"
    return cell.cell_type == 'raw' or (cell.cell_type == 'markdown'
                                       and '<script' in re.sub(r'^```.*?^```', '', cell.source, flags=re.M | re.S))


def readme(nb_path=root/'nbs'/'index.ipynb'):
    "The text of README.md"
    import nbformat  # here, since it takes seconds to import, and most of the tests only want to know the order
    from nbconvert import MarkdownExporter
    nb = nbformat.read(nb_path, as_version=4)
    cells = []
    for c in nb.cells:
        directives = re.findall(r'^#\|\s*(\w+)', c.source, re.M)
        if 'hide' in directives or _site_only(c): continue
        if c.cell_type == 'code':
            c.source = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M)
            # GitHub shows no widgets and no plotly: text and pictures only
            shown = {'text/plain', 'text/markdown', 'image/png'}
            c.outputs = [o for o in c.outputs if o.output_type == 'stream' or shown & set(o.get('data', {}))]
            for o in c.outputs: o.get('data', {}).pop('text/html', None)
        else:
            c.source = re.sub(r'^``` *\{=html\}.*?^```\n?', '', c.source, flags=re.M | re.S)
            c.source = re.sub(r'(\]\(|\bsrc=")([^)"\s]+)([)"\s])', _absolute, c.source)
        cells.append(c)
    nb.cells, nb.metadata['language_info'] = cells, dict(name='python')
    body, resources = MarkdownExporter().from_notebook_node(nb)
    if resources.get('outputs'):
        raise ValueError('an output of index.ipynb is a picture: save it under nbs/images and link to it instead')
    return note + re.sub(r'\n{3,}', '\n\n', body).strip() + '\n'


def notebooks():
    "Every notebook below nbs, as a path below it"
    found = [p.relative_to(root/'nbs') for p in (root/'nbs').rglob('*.ipynb')]
    return sorted(p.as_posix() for p in found if not any(o.startswith(('.', '_')) for o in p.parts))


def module(nb_id):
    "The module that a notebook exports, as a name below noisyseg; None where it exports none"
    cells = json.loads((root/'nbs'/nb_id).read_text(encoding='utf-8'))['cells']
    found = re.search(r'^#\|\s*default_exp (\S+)', '\n'.join(''.join(c['source']) for c in cells), re.M)
    return found[1] if found else None


def modules():
    "Notebooks that export a module, in the order of imports: [(path below nbs, module below noisyseg), ...]"
    found = [(o, module(o)) for o in notebooks()]
    return sorted([o for o in found if o[1]], key=lambda o: (*rank(o[0]), o[0]))


def sections():
    """What the sidebars list: `{section: {folder: [(path below nbs, what it is called), ...]}}`.

    A section is a subpackage, the tutorials or the studies. Its own notebooks come first, under an empty name; those of
    its inner folders follow. index.ipynb is the front page, and in none."""
    found = {name: {'': []} for name in SECTIONS}
    for nb in sorted(notebooks(), key=lambda o: '/' not in o):
        if nb == 'index.ipynb': continue
        *folders, _ = Path(nb).parts
        section, *inner = folders or [AT_THE_TOP[nb]]
        name = module(nb)
        text = name.rsplit('.')[-1] if name else title(root/'nbs'/nb)[0]
        found[section].setdefault('.'.join(inner), []).append((nb, text))
    for name in 'tutorials', 'studies':
        first = FIRST[name]
        found[name][''].sort(key=lambda o: first.index(o[0]) if o[0] in first else len(first))
    # its story, if it has one
    for name, own in found.items(): own[''].sort(key=lambda o: o[0] != f'{name}/index.ipynb')
    return found


def _entry(nb, text, indent):
    return f'{indent}- text: {json.dumps(text, ensure_ascii=False)}\n{indent}  href: {nb}\n'


BEFORE = dict(studies=('results.md', 'Results in a minute'))       # made by .ci/pages.py when the site is built


def sidebars():
    "The sidebars of the site as lines of _quarto.yml: one a section, with the names of modules"
    lines = ''
    for name, folders in sections().items():
        heading = name.capitalize() if name in ('tutorials', 'studies') else f'{settings["lib_name"]}.{name}'
        lines += f'    - id: {name}\n      title: {heading}\n      style: floating\n      contents:\n'
        if name in BEFORE: lines += _entry(*BEFORE[name], ' ' * 8)
        for folder, found in folders.items():
            indent = ' ' * 8
            if folder:
                lines += f'{indent}- section: {name}.{folder}\n{indent}  contents:\n'
                indent += ' ' * 4
            lines += ''.join(_entry(nb, text, indent) for nb, text in found)
    return lines


def quarto_yml():
    "The text of _quarto.yml, with the sidebars and the links to stories that the notebooks ask for"
    text = (root/'_quarto.yml').read_text(encoding='utf-8')
    for section, folders in sections().items():
        story, _ = folders[''][0]
        text = re.sub(rf'(- text: {section}\n +href: ).*', rf'\g<1>{story}', text)
    return re.sub(r'(?<=  sidebar:  # made by [.]ci/derive[.]py\n).*', lambda m: sidebars(), text, flags=re.S)


def title(nb_path):
    "A notebook's title and its one-line description"
    first = ''.join(json.loads(Path(nb_path).read_text(encoding='utf-8'))['cells'][0]['source'])
    m = re.fullmatch(r'# (.+)\n+> (.+)', first.strip())
    if not m:
        raise ValueError(f'{nb_path} should begin with "# Title" and "> one line of description", and begins with '
                         f'{first[:200]!r}')
    return m.groups()


def page_url(nb_id):
    ("Where the site has a notebook as markdown: `perturb/04_laws.ipynb` is the page laws.html, and beside it "
     "laws.html.md")
    return f'{settings["doc_url"]}/{nbpath2html(nb_id).as_posix()}.md'


def llms_txt():
    "The text of nbs/llms.txt: what each page of the site is about, and where its markdown is"
    name, description = title(root/'nbs'/'index.ipynb')
    parts = [f'# {name}', f'> {description}',
             f'[The front page]({page_url("index.ipynb")}) has ten lines of use, the results and how to install it. '
             f'Each page is a notebook of {settings["git_url"]}; `laws` under `perturb` is the module '
             f'`noisyseg.perturb.laws`, and so on.']
    for section, folders in sections().items():
        lines = [f'- [{text}]({page_url(nb)}): {title(root/"nbs"/nb)[1]}'
                 for found in folders.values() for nb, text in found]
        parts.append('\n'.join([f'## {section}', '', *lines]))
    return '\n\n'.join(parts) + '\n'


if __name__ == '__main__':
    (root/'README.md').write_text(readme(), encoding='utf-8')
    (root/'nbs'/'llms.txt').write_text(llms_txt(), encoding='utf-8')
    (root/'_quarto.yml').write_text(quarto_yml(), encoding='utf-8')
