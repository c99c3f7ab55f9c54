"""Write what nbdev does not: README.md from nbs/index.ipynb (nbdev-readme needs Quarto), and noisyseg/all.py.

`python .ci/derive.py` writes both; tests call `readme()` and `all_py()` and hold the files to them."""
import posixpath
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parents[1]
note = '<!-- Made from nbs/index.ipynb by `make export`: edit that. -->\n\n'


def _from_root(m):
    "`[text](tutorials/tour.ipynb)` stands in nbs/, so seen from the top level it is nbs/tutorials/tour.ipynb"
    before, target, after = m.groups()
    if re.match(r'[a-z]+:|#|/', target): return m[0]
    return before + posixpath.normpath(posixpath.join('nbs', target)) + after


def readme(nb_path=root/'nbs'/'index.ipynb'):
    "The text of README.md"
    nb = nbformat.read(nb_path, as_version=4)
    cells = []
    for c in nb.cells:
        directives = re.findall(r'^#\|\s*(\w+)', c.source, re.M)
        if 'hide' in directives: continue
        if c.cell_type == 'code':
            c.source = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M)
            # GitHub shows no widgets and no plotly: text and pictures only
            shown = {'text/plain', 'text/markdown', 'image/png'}
            c.outputs = [o for o in c.outputs if o.output_type == 'stream' or shown & set(o.get('data', {}))]
            for o in c.outputs: o.get('data', {}).pop('text/html', None)
        else: c.source = re.sub(r'(\]\(|\bsrc=")([^)"\s]+)([)"\s])', _from_root, c.source)
        cells.append(c)
    nb.cells, nb.metadata['language_info'] = cells, dict(name='python')
    body, resources = MarkdownExporter().from_notebook_node(nb)
    if resources.get('outputs'): raise ValueError('an output of index.ipynb is a picture: save it under nbs/images and link to it instead')
    return note + re.sub(r'\n{3,}', '\n\n', body).strip() + '\n'


def numbered():
    "Numbered notebooks in reading order: [('01', 'perturb'), ...]"
    names = sorted(p.stem for p in (root/'nbs').glob('[0-9]*_*.ipynb'))
    return [tuple(o.split('_', 1)) for o in names]


def all_py():
    "The text of noisyseg/all.py"
    stars = [f'from noisyseg.{name} import *' for _, name in numbered() if (root/'noisyseg'/f'{name}.py').exists()]
    return '"Everything public, for people at a prompt. Modules and notebooks name what they import instead."\n' + '\n'.join(stars) + '\n'


if __name__ == '__main__':
    (root/'README.md').write_text(readme(), encoding='utf-8')
    (root/'noisyseg'/'all.py').write_text(all_py(), encoding='utf-8')
