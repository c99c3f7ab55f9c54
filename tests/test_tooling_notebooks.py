"The notebooks run, are clean and small, and what they export is what lies in noisyseg/."
import ast
import builtins
import importlib
import os
import re
import shutil

import derive
import pytest
from conftest import nb_id, notebooks, read_nb, root
from fastcore.nbio import mk_cell, new_nb, write_nb

order = {module: i for i, (_, module) in enumerate(derive.modules())}
module_of = dict(derive.modules())
each = pytest.mark.parametrize('path', notebooks(), ids=nb_id)


def in_a_browser():
    "Does tests/test_lab.py run the tour?"
    return any(shutil.which(o) for o in ('chromium', 'chromium-browser', 'google-chrome'))


@each
def test_runs(path, server, tmp_path):
    "Every cell, top to bottom, in a process of its own. NOISYSEG_FLAGS=slow runs the cells marked `#| slow` too."
    flags = os.environ.get('NOISYSEG_FLAGS', '')
    if nb_id(path) == 'tutorials/tour.ipynb' and in_a_browser() and not flags:
        pytest.skip('test_tour_in_jupyterlab runs every cell of it')
    status, said = server.notebook(path, tmp_path/'said', flags)
    if status or 'Success.' not in said:
        pytest.fail(f'{nb_id(path)} ended with status {status}:\n{said}', pytrace=False)


def test_notebooks_share_nothing(server, tmp_path):
    "A notebook sees nothing of the one before it; one that fails, or kills its process, is seen, and the next one runs"
    folder = tmp_path/'nbs'
    folder.mkdir()
    def status(name, *sources):
        write_nb(new_nb([mk_cell(o, 'code') for o in sources]), folder/f'{name}.ipynb')
        return server.notebook(folder/f'{name}.ipynb', tmp_path/name)
    import_some = 'import builtins, os, torch; builtins.left = 1; torch.manual_seed(3); os.environ["LEFT"] = "1"'
    assert status('first', import_some) == (0, 'Success.\n')
    nothing = 'import builtins, os, torch; assert not hasattr(builtins, "left") and "LEFT" not in os.environ'
    seeds = 'assert torch.initial_seed() != 3'
    assert status('second', nothing, seeds)[0] == 0
    failed, said = status('third', '1/0', 'never')
    assert failed == 1 and 'ZeroDivisionError' in said and 'third.ipynb' in said
    assert status('fourth', 'import os, signal; os.kill(os.getpid(), signal.SIGKILL)')[0] == -9
    assert status('fifth', '1+1')[0] == 0


def modules(folder):
    "The text of each Python file of the package"
    package = folder/'noisyseg'
    return {p.relative_to(package).as_posix(): p.read_text() for p in package.rglob('*.py')}


def exported(project, sh):
    "What nbdev-export writes, from notebooks alone"
    for p in (project/'noisyseg').rglob('*.py'):
        if p.name != '__init__.py': p.unlink()   # the front door is written by hand
    sh('nbdev-export', cwd=project)
    return modules(project)


def diff(have, want): return sorted(k for k in have.keys() | want.keys() if have.get(k) != want.get(k))


def test_code_equals_notebooks(project, sh):
    "`make export` would change nothing in noisyseg/"
    assert not (d := diff(modules(root),
                          exported(project, sh))), f'{d} differ from what the notebooks export: run `make export`'


def test_code_equals_notebooks_can_fail(project, sh):
    "An edit of a module, and a module that no notebook exports, are both seen"
    mod = project/'noisyseg'/'perturb'/'laws.py'
    mod.write_text(mod.read_text() + '\nedited = True\n')
    (project/'noisyseg'/'stray.py').write_text('')
    have = modules(project)
    assert diff(have, exported(project, sh)) == ['perturb/laws.py', 'stray.py']


def unclean(project, sh):
    "The notebooks that nbdev-clean changes"
    files = sorted((project/'nbs').rglob('*.ipynb'))
    before = {p: p.read_bytes() for p in files}
    sh('nbdev-clean', cwd=project)
    return [str(p.relative_to(project)) for p in files if p.read_bytes() != before[p]]


def test_notebooks_are_clean(project, sh):
    "`make export` would change no notebook: no execution counts, no editor's metadata"
    assert not (d := unclean(project, sh)), f'{d} are not clean: run `make export`'


def test_notebooks_are_clean_can_fail(project, sh):
    "One execution count is seen"
    unclean(project, sh)
    path = next(p for p in sorted((project/'nbs').rglob('*.ipynb')) if '"execution_count": null' in p.read_text())
    path.write_text(path.read_text().replace('"execution_count": null', '"execution_count": 7', 1))
    assert unclean(project, sh) == [str(path.relative_to(project))]


@each
def test_small(path):
    "Saved outputs stay small: under 1 MB a notebook"
    assert path.stat().st_size < 1_000_000


@each
def test_shape(path):
    "Title and one-line description first; its kernel; no saved error or path; a numbered one has its module's name"
    nb = read_nb(path)
    assert re.match(r'# .+\n+> .+',
                    nb.cells[0].source), 'the first cell should be "# Title" and "> what it is, in one line"'
    assert nb.metadata.get('kernelspec') == dict(name='python3', display_name='python3', language='python'), \
        'name the kernel: "kernelspec" in the metadata'
    errors = [o.ename for c in nb.cells for o in c.get('outputs', []) if o.output_type == 'error']
    assert not errors
    streams = [''.join(o.text) for c in nb.cells for o in c.get('outputs', []) if o.output_type == 'stream']
    assert not [t for t in streams if 'site-packages' in t or 'ipykernel_' in t], 'a warning with paths was saved'
    if m := re.match(r'\d+_(\w+)$', path.stem):
        folder = path.parent.relative_to(root/'nbs').as_posix().replace('/', '.')
        assert module_of[nb_id(path)] == f'{folder}.{m[1]}'


def code(path):
    "The Python of a notebook, without lines for IPython"
    for c in read_nb(path).cells:
        if c.cell_type != 'code' or c.source.startswith('%%'): continue
        try: ast.parse(c.source)
        except SyntaxError: c.source = re.sub(r'^(\s*)[%!].*$', r'\1pass', c.source, flags=re.M)
        yield c.source


def imported(source):
    "The noisyseg modules that Python source imports, with the names that it takes from them"
    for o in ast.walk(ast.parse(source)):
        if isinstance(o, ast.Import):
            yield from ((a.name.removeprefix('noisyseg.'), None) for a in o.names if a.name.startswith('noisyseg.'))
        elif isinstance(o, ast.ImportFrom) and not o.level and re.match(r'noisyseg\b', o.module):
            inside = o.module.removeprefix('noisyseg').lstrip('.')
            for a in o.names:
                whole = f'{inside}.{a.name}'.lstrip('.')
                yield (whole, None) if whole in order else (inside, a.name)


def is_exported(source): return re.search(r'^#\| *export', source, re.M) is not None


def too_early(nb, module):
    """The modules that a notebook imports before they are there, given where it stands in the order.

    What it exports may use notebooks before it, no others. Its lesson may also use its whole subpackage, and the names
    that people type (`from noisyseg import ...`): a law is best seen on a network."""
    found = set()
    for source in code(root/'nbs'/nb):
        for m, _ in imported(source):
            if order.get(m, -1) <= order[module]: continue
            subpackage = lambda o: derive.rank(o.replace('.', '/') + '.py')[0]
            if is_exported(source) or subpackage(m) > subpackage(module): found.add(m)
    return sorted(found)


@pytest.mark.parametrize('path, module', derive.modules(), ids=order)
def test_imports_point_down(path, module):
    "Subpackages build on one another in one direction, and within one, a notebook on those before it"
    wrong = too_early(path, module)
    assert not wrong, f'{path} imports {wrong}'


def test_imports_point_down_can_fail():
    "The same imports, seen from further up in the order, are too early"
    nb, _ = next(o for o in derive.modules() if o[1] == 'show.explorer')
    assert too_early(nb, 'perturb.laws')


def foreign(source):
    "The names that Python source uses and does not itself import, define or assign"
    nodes = list(ast.walk(ast.parse(source)))
    used = {o.id for o in nodes if isinstance(o, ast.Name) and isinstance(o.ctx, ast.Load)}
    known = {o.id for o in nodes if isinstance(o, ast.Name) and not isinstance(o.ctx, ast.Load)}
    known |= {o.name for o in nodes if isinstance(o, (ast.FunctionDef, ast.ClassDef))} | {o.arg for o in nodes
            if isinstance(o, ast.arg)}
    known |= {(a.asname or a.name).split('.')[0] for o in nodes if isinstance(o, (ast.Import, ast.ImportFrom))
              for a in o.names}
    return used - known - set(dir(builtins))


@pytest.mark.parametrize('path', [o for o, _ in derive.modules()])
def test_imports_stand_alone(path):
    ("Building the site runs the cells that import something and the exported ones, and no others: so the first must "
     "not need the rest")
    for source in code(root/'nbs'/path):
        if is_exported(source) or 'nbdev_export()' in source: continue
        if not any(isinstance(o, (ast.Import, ast.ImportFrom)) for o in ast.walk(ast.parse(source))): continue
        assert not foreign(source), f'move the import out of:\n{source}'


def test_foreign():
    "Names from elsewhere are found"
    assert foreign('import copy as c\nx = 1\ndef f(a): return a + x\nc.copy(f(len([y])))\n[o for o in z]') == {'y', 'z'}


def test_imported():
    "The finder of imports finds them, in all their spellings"
    source = ('import torch, noisyseg.nets.x\nfrom noisyseg.perturb.laws import Law as L\n'
              'from noisyseg.nets import deeplab\ndef f():\n  from noisyseg import __version__')
    assert list(imported(source)) == [('nets.x', None), ('perturb.laws', 'Law'), ('nets.deeplab', None),
                                      ('', '__version__')]


def test_the_face():
    "`from noisyseg import X` for the names that people type: each is public in its module"
    import noisyseg
    assert len(set(noisyseg.__all__)) == len(noisyseg.__all__) <= 50
    for name in noisyseg.__all__:
        module = importlib.import_module(f'noisyseg.{noisyseg._module_of[name]}')
        assert getattr(noisyseg, name) is getattr(module, name) and name in module.__all__
    with pytest.raises(AttributeError, match='nonsense'): noisyseg.nonsense  # noqa: B018
