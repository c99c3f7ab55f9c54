"The package's facts are the same everywhere, and what is built from it works where nothing of ours is installed."
import ast
import dataclasses
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
import venv
from configparser import ConfigParser
from importlib.metadata import distribution, packages_distributions, requires
from pathlib import Path

import pytest
import release
import yaml
from conftest import copy_project, notebooks, project_files, root
from fastcore.docments import docments
from packaging.requirements import Requirement
from test_tooling_notebooks import code

cfg = ConfigParser(delimiters=['='])
cfg.read(root/'settings.ini')
cfg = cfg['DEFAULT']
toml = tomllib.loads((root/'pyproject.toml').read_text())
package = root/'noisyseg'
own = sorted('.'.join(p.relative_to(package).with_suffix('').parts) for p in package.rglob('*.py')
             if not p.stem.startswith('_'))


def canon(name): return re.sub(r'[-_.]+', '-', name).lower()


def lines(key): return [Requirement(o) for o in cfg[key].split('\n') if o.strip()]


def test_facts_are_the_same_everywhere():
    "settings.ini is the one place; what nbdev, pip and people read elsewhere agrees with it"
    import noisyseg
    version = cfg['version']
    assert noisyseg.__version__ == version
    assert f'__version__ = "{version}"' in (root/'noisyseg'/'__init__.py').read_text()
    assert re.search(rf'^## {re.escape(version)}\b', (root/'CHANGELOG.md').read_text(), re.M)
    project = toml['project']
    assert project['name'] == cfg['lib_name'] and project['description'] == cfg['description']
    assert project['requires-python'] == f'>={cfg["min_python"]}'
    assert project['authors'] == [{'name': cfg['author']}]
    assert project['urls'] == dict(Repository=cfg['git_url'], Documentation=cfg['doc_url'])
    quarto = (root/'_quarto.yml').read_text()
    for key in 'description', 'git_url', 'doc_url', 'branch': assert cfg[key] in quarto, key
    citation = yaml.safe_load((root/'CITATION.cff').read_text())
    assert [citation[k] for k in ('title', 'version', 'abstract', 'license', 'repository-code', 'url')] == [
        cfg[k] for k in ('lib_name', 'version', 'description', 'license', 'git_url', 'doc_url')]
    assert citation['cff-version'] == '1.2.0' and citation['authors'] == [{'name': cfg['author']}]


def test_release_workflow():
    "What is published is what was built and checked; a person agrees, and there is no password"
    jobs = yaml.safe_load((root/'.github'/'workflows'/'release.yml').read_text())['jobs']
    runs = [o.get('run', '') for o in jobs['build']['steps']]
    order = [next(i for i, o in enumerate(runs) if said in o) for said in (
        '.ci/release.py', 'python -m build', 'twine check --strict', 'dist/*.whl')]
    assert order == sorted(order)
    publish = jobs['publish']
    assert publish['needs'] == 'build' and publish['environment'] and publish['permissions']['id-token'] == 'write'
    uses = [o['uses'].split('@')[0] for o in publish['steps'] if 'uses' in o]
    assert 'pypa/gh-action-pypi-publish' in uses and not any('python -m build' in o.get('run', '')
                                                             for o in publish['steps'])
    assert 'secrets.' not in (root/'.github'/'workflows'/'release.yml').read_text()


def test_a_tag_that_differs_is_no_release(project):
    "Each place with another version is named; unreleased changes stand in the way; the notes are those of the version"
    version = cfg['version']
    log = project/'CHANGELOG.md'
    log.write_text(re.sub('^## Unreleased$', f'## {version}', log.read_text(), count=1, flags=re.M))
    assert release.differences(f'v{version}', project) == []
    found = release.differences('v9.9.9', project)
    assert len(found) == 4 and any('CITATION.cff' in o for o in found)
    log.write_text(f'# Changes\n\n## Unreleased\n\nNew.\n\n## {version}\n\nFirst.\n')
    assert release.differences(f'v{version}', project) == [f'CHANGELOG.md says Unreleased, the tag v{version}']
    assert release.notes(version, project) == 'First.'


def test_dependabot_and_binder():
    "Actions and pins are kept fresh; Binder has PyTorch in the versions that settings.ini promises"
    updates = yaml.safe_load((root/'.github'/'dependabot.yml').read_text())['updates']
    assert {o['package-ecosystem'] for o in updates} == {'github-actions', 'pip'}
    binder = yaml.safe_load((root/'.binder'/'environment.yml').read_text())['dependencies']
    lowest = {o.name: min(s.version for s in o.specifier) for o in lines('requirements')}
    assert {f'pytorch-cpu>={lowest["torch"]}', f'torchvision>={lowest["torchvision"]}'} <= set(binder)
    assert os.access(root/'.binder'/'postBuild', os.X_OK)


def test_notice_speaks_of_all_that_is_shipped():
    "Weights and constants in the package, weights in the repository; each is there"
    text = (root/'NOTICE').read_text()
    folders = {p.parent.relative_to(root).as_posix() for p in project_files()
               if p.suffix in ('.safetensors', '.pth', '.onnx') or 'profiles' in p.parent.parts}
    for folder in folders: assert f'{folder}/' in text, folder
    for o in re.findall(r'^  ([\w/]+/)   ', text, re.M): assert (root/o).is_dir(), o


def test_no_py_typed():
    "Types here are for readers (`sizes: list = None`), and no checker has seen them: py.typed would promise more"
    assert not list(package.rglob('py.typed'))


def test_pyproject_is_thin():
    "Only what nbdev has to read there; every other field is dynamic"
    assert set(toml['project']) == {'name', 'description', 'requires-python', 'authors', 'urls', 'dynamic'}
    assert toml['tool']['nbdev']['tst_flags'] == 'notest slow' and toml['tool']['nbdev']['update_pyproject'] is False


def imports(source):
    "Third-party top-level names that Python source imports, wherever in it"
    names = set()
    for o in ast.walk(ast.parse(source)):
        if isinstance(o, ast.Import): names |= {a.name.split('.')[0] for a in o.names}
        elif isinstance(o, ast.ImportFrom) and not o.level: names.add(o.module.split('.')[0])
    return names - set(sys.stdlib_module_names) - {'noisyseg'}


def dists(names):
    "The distributions that hold these top-level names; what is optional need not be installed here"
    table = {o.name: [o.name] for k in cfg if k.endswith('_requirements') for o in lines(k)} | packages_distributions()
    missing = {o for o in names if o not in table}
    assert not missing, f'not installed here, so not looked up: {missing}'
    return {canon(table[o][0]) for o in names}


def test_requirements_fit_the_imports():
    "requirements = what noisyseg/*.py imports: nothing missing, nothing more"
    used = dists(set().union(*(imports((root/'noisyseg'/f'{m.replace(".", "/")}.py').read_text()) for m in own)))
    optional = {canon(o.name) for k in cfg if k.endswith('_requirements') and k != 'dev_requirements' for o in lines(k)}
    assert {canon(o.name) for o in lines('requirements')} == used - optional
    assert 'nbdev' not in used


# other people's packages that ours is tried with where they are installed: by importorskip, or in a try
WHERE_INSTALLED = {'tensorboard', 'pytorch_lightning'}

def test_dev_requirements_fit_the_imports():
    "dev_requirements name what notebooks and tests import on top"
    # the imports of these two are optional
    scripts = [p for folder in ('tests', '.ci') for p in (root/folder).glob('*.py')
               if p.name not in ('bench_peers.py', 'foreign.py')]
    used = set().union(*(imports(s) for p in notebooks() for s in code(p)), *(imports(p.read_text()) for p in scripts))
    used -= {p.stem for folder in ('tests', '.ci', 'nbs/studies') for p in (root/folder).glob('*.py')} | WHERE_INSTALLED
    named = {canon(o.name) for k in ('requirements', 'dev_requirements') for o in lines(k)}
    optional = {canon(o.name) for k in cfg if k.endswith('_requirements') for o in lines(k)} - named
    assert dists(used) - closure(named) - optional == set()


def test_every_dependency_has_a_lower_bound():
    "And torch comes with the torchvision that was made for it: a mixed pair fails on import"
    bare = [str(o) for o in lines('requirements') + lines('dev_requirements')
            if not any(s.operator in ('>=', '==') for s in o.specifier)]
    assert not bare
    lowest = {o.name: min(s.version for s in o.specifier) for o in lines('requirements')}
    assert (lowest['torch'], lowest['torchvision']) == ('2.8', '0.23')


def closure(names):
    "These distributions and all that they require, installed here"
    todo, done = [Requirement(o) if isinstance(o, str) else o for o in names], {}
    while todo:
        o = todo.pop()
        have = done.setdefault(canon(o.name), set())
        extras = {''} | o.extras
        if extras <= have: continue
        have |= extras
        for line in requires(o.name) or []:
            r = Requirement(line)
            if not r.marker or any(r.marker.evaluate(dict(extra=e)) for e in extras): todo.append(r)
    return set(done)


def test_constraints():
    "Names and versions only, one per line; every requirement is pinned, to a version that it allows"
    pins = dict(re.fullmatch(r'([A-Za-z0-9._-]+)==([0-9][A-Za-z0-9.]*)', o).groups()
                for o in (root/'constraints.txt').read_text().splitlines() if o and not o.startswith('#'))
    pins = {canon(k): v for k, v in pins.items()}
    assert 'noisyseg' not in pins
    for o in lines('requirements') + lines('dev_requirements'): assert o.specifier.contains(pins[canon(o.name)]), o
    assert not (d := closure(lines('requirements') + lines('dev_requirements'))
                - pins.keys()), f'not pinned: {sorted(d)}'


def test_dependencies_are_coherent(sh): sh(sys.executable, '-m', 'pip', 'check')


def test_no_registry_is_named():
    "Where packages come from is pip's own configuration, not this project's business"
    hosts = ['py' + 'pi.org', 'python' + 'hosted', 'download.' + 'pytorch', 'conda.' + 'anaconda', 'npm' + 'js',
             'index-' + 'url http']
    named = {(str(p.relative_to(root)), h) for p in project_files() for h in hosts if h.encode() in p.read_bytes()}
    assert not named


@pytest.fixture(scope='session')
def built(tmp_path_factory):
    "Source archive, and the wheel built from that archive (not from the checkout): dict(sdist=..., wheel=...)"
    out, copy = tmp_path_factory.mktemp('dist'), copy_project(tmp_path_factory.mktemp('source')/'project')
    r = subprocess.run([sys.executable, '-m', 'build', '--no-isolation', '--outdir', out, copy], text=True,
                       capture_output=True)
    said = r.stdout + r.stderr
    assert r.returncode == 0, said
    assert not re.search('overwritten in `pyproject.toml`|defined outside of `pyproject.toml`|DeprecationWarning',
                         said), said
    return dict(wheel=next(out.glob('*.whl')), sdist=next(out.glob('*.tar.gz')))


@pytest.fixture(scope='session')
def empty(tmp_path_factory, built):
    "A fresh virtual environment with the wheel and nothing else; gives its python and site-packages"
    home = tmp_path_factory.mktemp('empty')
    venv.create(home, with_pip=False)
    python = home/'bin'/'python'
    pip = [sys.executable, '-m', 'pip', '--quiet', '--python', python]
    subprocess.run([*pip, 'install', '--no-deps', '--no-index', built['wheel']], check=True)
    return python, next(home.glob('lib/python*/site-packages'))


def bare(python, code):
    "Runs code with an environment's Python, away from this folder"
    env = {k: v for k, v in os.environ.items() if not k.startswith('PYTHON')}
    return subprocess.run([python, '-c', code], cwd='/', env=env, text=True, capture_output=True)


def test_wheel_in_an_empty_environment(empty):
    "`import noisyseg` needs nothing at all, and the metadata is that of settings.ini"
    r = bare(empty[0], 'import noisyseg, json; from importlib.metadata import metadata\n'
                       'print(noisyseg.__file__); print(json.dumps(metadata("noisyseg").json))')
    assert r.returncode == 0, r.stderr
    where, meta = r.stdout.splitlines()
    meta = json.loads(meta)
    assert Path(where).parent.parent == empty[1]
    assert (meta['name'], meta['version'], meta['summary']) == (cfg['lib_name'], cfg['version'], cfg['description'])
    assert meta['license_expression'] == cfg['license'] == 'Apache-2.0' and meta[
            'requires_python'] == f'>={cfg["min_python"]}'
    assert ','.join(meta['keywords']).split(',') == cfg['keywords'].split()
    assert meta['description'].strip() == (root/'README.md').read_text().strip()
    assert {f'Programming Language :: Python :: {o}' for o in cfg['tested_pythons'].split()} <= set(meta['classifier'])
    needs = [Requirement(o) for o in meta['requires_dist']]
    assert {(o.name, o.specifier) for o in needs if not o.marker} == {(o.name, o.specifier)
            for o in lines('requirements')}
    assert {o.name for o in needs if o.marker and o.marker.evaluate(dict(extra='dev'))} - {o.name
            for o in lines('requirements')} \
        == {o.name for o in lines('dev_requirements')}


def test_wheel_with_its_requirements_only(empty):
    """Every module imports where there is the wheel, its requirements and what these require, and no nbdev.
    The requirements are not installed again: they are linked from here, one by one, so that nothing else is there."""
    python, site = empty
    linked = closure(lines('requirements'))
    for name in linked:
        d = distribution(name)
        for top in {f.parts[0] for f in d.files if f.parts[0] not in ('..', '__pycache__')}:
            if not (site/top).exists(): (site/top).symlink_to(d.locate_file(top))
    assert 'nbdev' not in linked and 'torch' in linked
    r = bare(python,
             f'import importlib, noisyseg, sys\nfor o in {own!r}: importlib.import_module("noisyseg." + o)\n'
             'from importlib.util import find_spec\n'
             'print(noisyseg.__file__, sys.modules["torch"].__file__, find_spec("nbdev"), sep="\\n")')
    assert r.returncode == 0, r.stderr
    where, torch, nbdev = r.stdout.splitlines()[-3:]
    assert Path(where).parent.parent == Path(torch).parent.parent == site
    assert nbdev == 'None', 'the linking is wrong'


def test_wheel_holds_the_package(built):
    "The modules, the licence, the explorer's front end, two small networks, three chips; no notebooks, tests or data"
    from zipfile import ZipFile
    names = ZipFile(built['wheel']).namelist()
    assert {f'noisyseg/{m.replace(".", "/")}.py' for m in own} <= set(names)
    assert {o.split('/')[0] for o in names} == {'noisyseg', f'noisyseg-{cfg["version"]}.dist-info'}
    assert all(any(o.endswith(f'licenses/{name}') for o in names) for name in ('LICENSE', 'NOTICE'))
    assert {f'noisyseg/show/{o}' for o in ('explorer.js', 'live.js', 'live_worker.js', 'live_files.js', 'noise.js',
                                           'live.html',
                                           'models/scenes_clean.safetensors',
                                           'models/scenes_noise_trained.json')} <= set(names)
    assert {f'noisyseg/perturb/profiles/{o}.json' for o in ('pcm', 'rram', 'low_voltage_sram')} <= set(names)
    assert Path(built['wheel']).stat().st_size < 2_000_000


def public():
    "(module, name, object) for each public function and class"
    for m in own:
        try: mod = importlib.import_module(f'noisyseg.{m}')
        except Exception as e:               # a test that fails, not a file of tests that cannot be collected
            yield pytest.param(e, id=m)
            continue
        for name in mod.__all__:
            o = getattr(mod, name)
            if inspect.isclass(o) or (inspect.isfunction(o) and o.__code__.co_filename == mod.__file__):
                yield pytest.param(o, id=f'{m}.{name}')


def written(o):
    "The parameters written in the definition of a function, of a class's own `__init__`, or the fields of a dataclass"
    if '__dataclass_fields__' in vars(o): return [f.name for f in dataclasses.fields(o) if f.init]
    code = (o if inspect.isfunction(o) else vars(o)['__init__']).__code__
    return [k for k in code.co_varnames[:code.co_argcount + code.co_kwonlyargcount] if k != 'self']


@pytest.mark.parametrize('o', list(public()))
def test_public_names_are_documented(o):
    "A docstring for each, and a comment beside each parameter (docments)"
    if isinstance(o, Exception): raise o
    assert (inspect.getdoc(o) or '').strip(), 'no docstring'
    if inspect.isfunction(o):
        assert 'self' not in inspect.signature(o).parameters, 'a method in __all__: put `@patch` above it'
    if inspect.isclass(o) and not {'__dataclass_fields__', '__init__'} & set(vars(o)): return
    own_init = inspect.isclass(o) and '__dataclass_fields__' not in vars(o)
    described = docments(vars(o)['__init__'] if own_init else o, full=True)
    assert not (bare := [k for k in written(o) if not described[k].docment]), f'no comment beside {bare}'


def test_lint(sh): sh(sys.executable, '-m', 'ruff', 'check')
