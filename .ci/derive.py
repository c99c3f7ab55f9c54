"""Write what nbdev does not: README.md from nbs/index.ipynb (nbdev-readme needs Quarto), and nbs/llms.txt.

`python .ci/derive.py` writes them; tests call `readme()` and `llms_txt()` and hold the files to them."""
import posixpath
import re
from configparser import ConfigParser
from pathlib import Path

import nbformat
import yaml
from nbconvert import MarkdownExporter
from nbdev.config import nbpath2html

root = Path(__file__).resolve().parents[1]
settings = ConfigParser()
settings.read(root/'settings.ini')
settings = settings['DEFAULT']
# subpackages import in this direction only: from those before them
LAYERS = ['basics', 'perturb', 'data', 'nets', 'measure', 'train', 'show']
note = '<!-- Made from nbs/index.ipynb by `make export`: edit that. -->\n\n'


def rank(path):
    ("The place of a notebook in the order of imports: that of its subpackage; within one, inner folders come after "
     "its own notebooks, `fast` before")
    top, *inner = Path(path).with_suffix('').parts
    folder = inner[:-1]
    return LAYERS.index(top) if top in LAYERS else len(LAYERS), 0 if folder == ['fast'] else 1 if not folder else 2


def _from_root(m):
    "`[text](tutorials/tour.ipynb)` stands in nbs/, so seen from the top level it is nbs/tutorials/tour.ipynb"
    before, target, after = m.groups()
    if re.match(r'[a-z]+:|#|/', target): return m[0]
    return before + posixpath.normpath(posixpath.join('nbs', target)) + after


def _site_only(cell):
    "Scripts run on the site; GitHub would show them as text"
    return cell.cell_type == 'raw' or (cell.cell_type == 'markdown'
                                       and '<script' in re.sub(r'^```.*?^```', '', cell.source, flags=re.M | re.S))


def readme(nb_path=root/'nbs'/'index.ipynb'):
    "The text of README.md"
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
            c.source = re.sub(r'(\]\(|\bsrc=")([^)"\s]+)([)"\s])', _from_root, c.source)
        cells.append(c)
    nb.cells, nb.metadata['language_info'] = cells, dict(name='python')
    body, resources = MarkdownExporter().from_notebook_node(nb)
    if resources.get('outputs'):
        raise ValueError('an output of index.ipynb is a picture: save it under nbs/images and link to it instead')
    return note + re.sub(r'\n{3,}', '\n\n', body).strip() + '\n'


def modules():
    "Notebooks that export a module, in reading order: [(path below nbs, module below noisyseg), ...]"
    found = []
    for p in sorted((root/'nbs').rglob('*.ipynb')):
        if any(o.startswith(('.', '_')) for o in p.relative_to(root).parts): continue
        source = '\n'.join(c.source for c in nbformat.read(p, as_version=4).cells if c.cell_type == 'code')
        if m := re.search(r'^#\|\s*default_exp (\S+)', source, re.M):
            found.append((p.relative_to(root/'nbs').as_posix(), m[1]))
    return sorted(found, key=lambda o: (*rank(o[0]), o[0]))


def title(nb_path):
    "A notebook's title and its one-line description"
    first = nbformat.read(nb_path, as_version=4).cells[0].source
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
             f'[The front page]({page_url("index.ipynb")}) has the map, ten lines of use and how to install it. Each '
             f'page '
             f'is a notebook of {settings["git_url"]}; under API, `laws` is the module `noisyseg.perturb.laws`, and so '
             f'on.']
    for section in yaml.safe_load((root/'_quarto.yml').read_text())['website']['sidebar']['contents']:
        if isinstance(section, str): continue
        pages = [(page_url(o), *title(root/'nbs'/o)) for o in section['contents']]
        parts.append('\n'.join([f'## {section["section"]}', '',
                                *(f'- [{name}]({url}): {description}' for url, name, description in pages)]))
    return '\n\n'.join(parts) + '\n'


if __name__ == '__main__':
    (root/'README.md').write_text(readme(), encoding='utf-8')
    (root/'nbs'/'llms.txt').write_text(llms_txt(), encoding='utf-8')
