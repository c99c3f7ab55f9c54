"The rules of the house, held by counting: width of lines, length of cells, private names, the direction of imports."
import ast
import json
import re
import statistics
import subprocess
import sys

import derive
import pytest
from conftest import nb_id, notebooks, project_files, read_nb, root

package = root/'noisyseg'
WIDTH = 120
modules = sorted(p for p in package.rglob('*.py') if p.stem not in ('__init__', '_modidx'))
in_package = pytest.mark.parametrize('path', modules, ids=lambda p: str(p.relative_to(package)))


def lines(path):
    "The lines of a script, or of the code cells of a notebook"
    if path.suffix != '.ipynb': return path.read_text(encoding='utf-8').split('\n')
    return [line for c in read_nb(path).cells if c.cell_type == 'code' for line in c.source.split('\n')]


def test_width():
    "Code has at most 120 columns: notebooks, modules, tests, scripts"
    files = [p for p in project_files() if p.suffix == '.py' and p.name != '_modidx.py'] + notebooks()
    wide = [f'{p.relative_to(root)}: {line.strip()[:80]}' for p in files for line in lines(p)
            if len(line) > WIDTH and not line.startswith(('# %%', '__all__ = ', '           \''))]
    assert not wide, f'{len(wide)} lines: ' + '\n'.join(wide[:20])


def exported_lengths():
    "(what it defines, number of lines) for each exported cell, without its directives and empty lines"
    for path in notebooks():
        for c in read_nb(path).cells:
            if c.cell_type != 'code' or not re.match(r'#\|\s*export', c.source): continue
            defined = re.search(r'^(?:class|def) (\w+)', c.source, re.M)
            yield defined[1] if defined else nb_id(path), len([o for o in c.source.split('\n')
                                                               if o.strip() and not o.startswith('#|')])


def test_exported_cells_are_short():
    "At most 40 lines each, 12 in the median: split by idea, an exported definition and its use at a time"
    found = list(exported_lengths())
    assert not [f'{what}: {n} lines' for what, n in found if n > 40]
    assert statistics.median(n for _, n in found) <= 12


def module_name(path): return '.'.join(path.relative_to(root).with_suffix('').parts)


def arrows(path):
    "(module of noisyseg, name taken from it) for each import in a module, wherever it stands"
    here = module_name(path).split('.')
    for o in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(o, ast.Import):
            yield from ((a.name, None) for a in o.names if a.name.startswith('noisyseg.'))
        if not isinstance(o, ast.ImportFrom): continue
        if not o.level and not re.match(r'noisyseg\b', o.module): continue
        start = '.'.join([*here[:-o.level], *filter(None, [o.module])]) if o.level else o.module
        for a in o.names:
            whole = root/f'{start}.{a.name}'.replace('.', '/')
            is_module = whole.with_suffix('.py').exists() or (whole/'__init__.py').exists()
            yield (f'{start}.{a.name}', None) if is_module else (start, a.name)


def layer(name):
    "The subpackage of a module, as its place in the order; noisyseg itself and its docments are before all"
    parts = name.split('.')
    return derive.LAYERS.index(parts[1]) if len(parts) > 1 and parts[1] != 'docments' else -1


@in_package
def test_subpackages_import_one_way(path):
    "basics, perturb, data, nets, measure, train, mend, show: each only from itself and from those before it"
    wrong = [name for name, _ in arrows(path) if layer(name) > layer(module_name(path))]
    assert not wrong, f'{path.relative_to(package)} imports {wrong}'


@in_package
def test_no_private_name_across_subpackages(path):
    "What another subpackage needs has a public name, and a docstring"
    private = [f'{name}.{what}' for name, what in arrows(path)
               if what and re.match(r'_(?!_)', what) and layer(name) != layer(module_name(path))]
    assert not private


def test_arrows(tmp_path):
    "Imports are found in all their spellings"
    path = package/'show'/'plots.py'
    source = 'from ..measure import store\nfrom ..perturb.laws import _x as y\nimport noisyseg.data.files, os\n'
    class Text(type(path)):
        def read_text(self, **kwargs): return source
    found = list(arrows(Text(path)))
    assert sorted(found, key=str) == [('noisyseg.data.files', None), ('noisyseg.measure.store', None),
                                      ('noisyseg.perturb.laws', '_x')]


@in_package
def test_no_module_is_called_like_what_is_in_it(path):
    "`from noisyseg.x import x` and `noisyseg.x` would be two things of one name"
    defined = [o for o in ast.parse(path.read_text()).body if isinstance(o, (ast.FunctionDef, ast.ClassDef))]
    names = {o.name for o in defined if not any('patch' in ast.unparse(d) for d in o.decorator_list)}
    assert not set(path.relative_to(package).with_suffix('').parts) & names


def clean_process(code):
    "Runs code in a process of its own, and gives what it prints last as JSON"
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, cwd=root)
    assert r.returncode == 0, r.stderr
    return json.loads(r.stdout.splitlines()[-1])


# the classes of these packages, and what is in them; a class that appears later was not patched but made
watch = '''
import gc, importlib, json, sys, warnings
gc.unfreeze()   # what the server has imported is to be seen, too
import anywidget, fastai.vision.all, ipywidgets, matplotlib.pyplot, pandas, plotly.graph_objects, torch, torchvision
import fastai.callback.all, fastai.distributed, safetensors.torch, torchmetrics, torch.optim.swa_utils
import torch.distributed.fsdp, torch.ao.quantization, torch.nn.utils.parametrize

def foreign():
    classes = [o for o in gc.get_objects() if isinstance(o, type)]
    return {o: dict(vars(o)) for o in classes if str(getattr(o, '__module__', '')).split('.')[0] in packages}

packages = {'fastai', 'fastcore', 'torch', 'torchvision', 'pandas', 'plotly', 'ipywidgets', 'anywidget', 'torchmetrics',
            'matplotlib', 'safetensors', 'builtins'}
'''


@pytest.fixture(scope='module')
def patched(server, tmp_path_factory):
    "The attributes of foreign classes that are others after some code than before, by what the code does"
    imports = '\n'.join(f'import {module_name(p)}' for p in modules)
    patches = """
def mine(self): pass
mine.__module__ = 'noisyseg.train.learner'
fastai.learner.Learner.fit = mine
torch.nn.Module.noisy = mine"""
    [(status, said)] = server.script(watch + f'''
own = lambda f: 'noisyseg' in str(getattr(f, '__module__', '')) or 'noisyseg' in str(getattr(f, '__qualname__', ''))
def changes(before, after):
    for o, was in before.items():
        for k, v in after.get(o, {{}}).items():
            if (k in was and v is not was[k] and callable(v)) or (k not in was and own(v)):
                yield f'{{o.__module__}}.{{o.__qualname__}}.{{k}}'

seen = [foreign()]
{imports}
seen.append(foreign())
{patches}
seen.append(foreign())
found = [sorted(changes(*o)) for o in zip(seen, seen[1:])]
print(json.dumps(dict(zip(('our imports', 'a patch'), found))))''', tmp_path_factory.mktemp('patched'), {})
    assert status == 0, said
    return json.loads(said.splitlines()[-1])


def test_nothing_is_patched_at_import(patched):
    "Importing every module leaves the classes of torch, fastai and others as they were"
    assert patched['our imports'] == []


def test_nothing_is_patched_can_fail(patched):
    "A method put into a class of fastai, and one of ours added to a class of torch, are seen"
    assert patched['a patch'] == ['fastai.learner.Learner.fit', 'torch.nn.modules.module.Module.noisy']


@pytest.fixture(scope='module')
def loaded():
    "Which of the slow packages are there after some imports, one after the other in one process"
    code = f"""
import json, sys
slow = ['torch', 'fastai', 'pandas', 'matplotlib', 'plotly', 'ipywidgets', 'torchvision', 'ray']
there = dict()
for line in {['import noisyseg', *HEART, EXPLORER]!r}:
    exec(line)
    there[line] = [o for o in slow if o in sys.modules]
print(json.dumps(there))"""
    return clean_process(code)


HEART = ['from noisyseg import perturbed, MaxGaussian',
         'from noisyseg import perturbed, clone_weights, select, compose, conv_and_norm',
         'from noisyseg import MaxGaussian, AbsoluteGaussian, MultiplicativeGaussian, RelativeGaussian, Quantize',
         'from noisyseg import perturbed, MaxGaussian, SAM']

EXPLORER = 'from noisyseg.show.explorer import NoiseExplorer'


def test_importing_noisyseg_costs_next_to_nothing(loaded):
    "It loads neither torch nor fastai, nor anything else that is slow"
    assert loaded['import noisyseg'] == []


@pytest.mark.parametrize('line', HEART)
def test_the_heart_needs_torch_only(loaded, line):
    "In a training loop of your own, weight noise and SAM bring torch, and neither fastai nor what draws figures"
    assert loaded[line] == ['torch']


def test_the_explorer_needs_no_fastai(loaded):
    "Whoever explores a network waits for the widget, not for what trains, loads data sets, makes tables and figures"
    assert not {'fastai', 'torchvision', 'matplotlib', 'pandas', 'plotly', 'ray'} & set(loaded[EXPLORER])


def test_readme_is_short():
    "A picture, how to install it, ten lines, one table of results, where to go"
    assert len((root/'README.md').read_text().splitlines()) <= 150
