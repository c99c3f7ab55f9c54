"""README and site, as far as they can be held without Quarto: what it is given is processed by nbdev, well formed and complete.
That Quarto then renders it is seen only where the site is built (.github/workflows/docs.yml)."""
import json
import re
import subprocess
import sys
from urllib.parse import unquote

import derive
import nbformat
import pytest
import yaml
from conftest import copy_project, nb_id, notebooks, project_files, read_nb, root
from nbconvert import HTMLExporter

pages = notebooks() + sorted(p for p in project_files() if p.suffix == '.md')


def test_readme():
    "README.md is made from nbs/index.ipynb, and starts with the two commands"
    assert (root/'README.md').read_text() == derive.readme(), 'run `make export`'
    text = (root/'README.md').read_text()
    assert 0 < text.index('make lab') < text.index('make test') < 2000
    assert '#|' not in text


def test_readme_can_fail(project):
    "A word changed in the notebook changes what README.md should be"
    nb = project/'nbs'/'index.ipynb'
    nb.write_text(nb.read_text().replace('make lab', 'make dinner', 1))
    assert (root/'README.md').read_text() != derive.readme(nb)


def listed(o):
    "All notebooks named in a piece of _quarto.yml"
    if isinstance(o, dict): return [p for v in o.values() for p in listed(v)]
    if isinstance(o, list): return [p for v in o for p in listed(v)]
    return [o] if isinstance(o, str) and o.endswith('.ipynb') else []


def test_quarto_yml():
    "It parses, and its sidebar lists every notebook once, the numbered ones in order; nbdev finds it in nbs/"
    cfg = yaml.safe_load((root/'_quarto.yml').read_text())
    assert (root/'nbs'/'_quarto.yml').is_symlink() and (root/'nbs'/'_quarto.yml').resolve() == root/'_quarto.yml'
    assert cfg['project']['output-dir'] == '_docs'
    side = listed(cfg['website']['sidebar'])
    assert sorted(side) == sorted(map(nb_id, notebooks()))
    numbered = [o for o in side if re.match(r'\d', o)]
    assert numbered == sorted(numbered)
    assert set(listed(cfg['website']['navbar'])) <= set(side)


def test_workflows():
    "They parse, and do what people do on the command line"
    read = lambda name: yaml.safe_load((root/'.github'/'workflows'/name).read_text())['jobs']
    steps = {name: [o.get('run') for job in read(name).values() for o in job['steps']] for name in ('test.yml', 'docs.yml')}
    assert '.ci/run' in steps['test.yml'] and 'make docs' in steps['docs.yml']
    assert re.search(r'^make test\b', (root/'.ci'/'run').read_text(), re.M)


def test_index_names_every_notebook():
    "The map on the front page is complete"
    text = '\n'.join(c.source for c in read_nb(root/'nbs'/'index.ipynb').cells if c.cell_type == 'markdown')
    missing = [nb_id(p) for p in notebooks() if p.stem != 'index' and f']({nb_id(p)})' not in text]
    assert not missing


def markdown(path):
    "The markdown of a page, without code"
    text = path.read_text() if path.suffix == '.md' else '\n\n'.join(c.source for c in read_nb(path).cells if c.cell_type == 'markdown')
    return re.sub(r'`[^`\n]+`', '', re.sub(r'^(```|~~~).*?^\1', '', text, flags=re.M | re.S))


def anchors(path):
    "The anchors of a page: its headings as GitHub and Quarto spell them"
    slug = lambda h: re.sub(r'\s+', '-', re.sub(r'[^\w\s.-]', '', re.sub(r'\]\([^)]*\)', '', h)).strip().lower())
    return {slug(h) for h in re.findall(r'^#+ (.+)$', markdown(path), re.M)}


def links(path): return re.findall(r'\]\(<?([^)>\s]+)>?(?:\s+"[^"]*")?\)|\b(?:src|href)="([^"]+)"', markdown(path))


@pytest.mark.parametrize('path', pages, ids=lambda p: str(p.relative_to(root)))
def test_links(path):
    "Each link and picture that stays inside the project points at something that is there, and is tracked"
    files, bad = set(project_files()), []
    for link in filter(None, (o for pair in links(path) for o in pair)):
        if re.match(r'[a-z]+:', link): continue
        target, _, anchor = unquote(link).partition('#')
        to = (path.parent/target).resolve() if target else path
        if not (to in files or (to.is_dir() and root in (to, *to.parents))): bad.append(link)
        elif anchor and to.suffix in ('.ipynb', '.md') and anchor not in anchors(to): bad.append(link)
    assert not bad


def test_links_can_fail(tmp_path):
    "Links are found in their spellings, and not in code"
    page = tmp_path/'a.md'
    page.write_text('# A b\n[x](one.ipynb) ![y](two.png "title") <img src="three.png"> `[no](z)`\n```\n[no](z)\n```\n')
    assert [a or b for a, b in links(page)] == ['one.ipynb', 'two.png', 'three.png'] and anchors(page) == {'a-b'}


proc = """
import traceback
import nbdev.serve_drv
from nbdev.serve import proc_nbs

process = nbdev.serve_drv.main

def main(task):  # one notebook that fails must not hide the others
    try: process(task)
    except Exception: task[1].with_suffix('.error').write_text(traceback.format_exc())

nbdev.serve_drv.main = main
proc_nbs(n_workers=0)
"""


@pytest.fixture(scope='module')
def processed(tmp_path_factory):
    "The notebooks as nbdev hands them to Quarto: what `nbdev-proc-nbs` does, less its search for quarto"
    project = copy_project(tmp_path_factory.mktemp('docs')/'project')
    subprocess.run([sys.executable, '-c', proc], cwd=project, check=True)
    return project/'_proc'


@pytest.mark.parametrize('path', notebooks(), ids=nb_id)
def test_page_converts(path, processed):
    "Each processed notebook is there, and is a notebook that nbconvert can show, with no directive left in it"
    page = processed/nb_id(path)
    error = page.with_suffix('.error')
    if error.exists(): pytest.fail(error.read_text(), pytrace=False)
    nb = json.loads(page.read_text())
    nb['metadata'].pop('execution', None)                # nbdev's own marks, which nbformat's schema does not know
    for c in nb['cells']: c.pop('has_sd', None), c['metadata'].pop('execution', None)
    nb = nbformat.reads(json.dumps(nb), as_version=4)
    nbformat.validate(nb)
    body, _ = HTMLExporter().from_notebook_node(nb)
    assert len(body) > 1000
    exported = [c.source for c in nb.cells if re.search(r'^#\| *export', c.source, re.M)]
    assert not exported


def test_site_is_complete(processed):
    "_quarto.yml went along as a file, and so did the pictures"
    assert (processed/'_quarto.yml').read_text() == (root/'_quarto.yml').read_text()
    pictures = [p.relative_to(root/'nbs') for p in (root/'nbs').rglob('*.png') if '.ipynb_checkpoints' not in p.parts]
    assert all((processed/p).exists() for p in pictures)
