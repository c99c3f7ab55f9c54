"Shared by the tests: where the project is, its notebooks in reading order, and a copy of it to break things in."
import functools
import inspect
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fastcore.nbio import read_nb  # noqa: F401  not nbformat's: to import that takes seconds

from real_data import prepare

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:   # as in a shell's background job; some tests press Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root/'.ci'))
if data := os.environ.get('NOISYSEG_DATA') or prepare(): os.environ['NOISYSEG_DATA'] = str(data)
os.environ['PATH'] = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'


def notebooks():
    "All notebooks, in reading order"
    found = [p for p in (root/'nbs').rglob('*.ipynb') if not any(o.startswith(('.', '_'))
                                                                 for o in p.relative_to(root).parts)]
    return sorted(found, key=lambda p: (p.parent != root/'nbs', str(p)))


def nb_id(path): return str(path.relative_to(root/'nbs'))


def project_files():
    "What belongs to the project: the files git tracks or would track; without git, all but what set-up and builds make"
    try:
        cmd = ['git', 'ls-files', '-co', '--exclude-standard', '-z']
        out = subprocess.run(cmd, cwd=root, capture_output=True, text=True, check=True).stdout
        files = [root/o for o in out.split('\0') if o]
    except (OSError, subprocess.CalledProcessError):
        made = r'(\.venv|\.git|_proc|_docs|build|dist|__pycache__|\.\w+_(cache|checkpoints)|\.hypothesis|.*\.egg-info)$'
        files = [p for p in root.rglob('*') if not any(re.match(made, o) for o in p.relative_to(root).parts)]
    return sorted(p for p in files if p.is_file())


def copy_project(to):
    "A copy of the project in a new folder"
    for p in project_files():
        q = to/p.relative_to(root)
        q.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(p, q, follow_symlinks=False)
    return to


@pytest.fixture
def project(tmp_path):
    "A copy of the project, to break things in"
    return copy_project(tmp_path/'project')


@pytest.fixture
def sh():
    "Runs a command; a failure shows all that it printed"
    def run(*cmd, cwd=root, ok=True, timeout=900, **env):
        r = subprocess.run([str(o) for o in cmd], cwd=cwd, env={**os.environ, **env}, timeout=timeout, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if ok and r.returncode:
            pytest.fail(f'`{" ".join(map(str, cmd))}` ended with status {r.returncode}:\n{r.stdout}', pytrace=False)
        return r.stdout
    return run


@pytest.fixture(scope='module')
def in_jupyterlab(tmp_path_factory):
    "For the tests of one file, JupyterLab on a copy of the project, and a browser: (project, page, url, token)"
    from test_lab import browser_page, browser_path, jupyterlab
    browser_path()
    home = tmp_path_factory.mktemp('lab')
    project = copy_project(home/'project')
    with jupyterlab(project, home) as (url, token), browser_page(home/'profile') as page:
        yield project, page, url, token


PAGES = """
import sys
sys.path.insert(0, '.ci')
import pages
pages.process()
"""


@pytest.fixture(scope='session')
def processed(tmp_path_factory):
    "The sources of the site: notebooks as nbdev hands them to Quarto, made pages, pictures"
    project = copy_project(tmp_path_factory.mktemp('docs')/'project')
    subprocess.run([sys.executable, '-c', PAGES], cwd=project, check=True)
    return project/'_proc'


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    "Fixtures can see in `request.node.failed` whether their test failed"
    report = yield
    if call.when == 'call': item.failed = report.failed
    return report


_interrupted = [-math.inf]                   # when the last KeyboardInterrupt came out of a test


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item):
    """A test that lets a KeyboardInterrupt out has failed, and the others go on.

    Where tests run in several processes, Ctrl-C ends the one that hands them out, and with it all. In a single process
    it cannot be told from one that a test raised: there, press it twice within five seconds."""
    try: return (yield)
    except KeyboardInterrupt as e:
        last, _interrupted[0] = _interrupted[0], time.monotonic()
        if _interrupted[0] - last < 5 and 'PYTEST_XDIST_WORKER' not in os.environ: raise
        raise AssertionError('a KeyboardInterrupt came out of this test (was it you? Then press Ctrl-C again)') from e


# what `make check` leaves out, by what a test or a fixture that it uses speaks of
SIGNS = dict(browser=r'browser_page\(|jupyterlab\(|\btab\b', ray=r"\bray\b|on='ray'",
             kill=r'SIGKILL|\.kill\(|torch\.distributed|nproc|mp\.spawn',
             slow=r'copy_project\(tmp_path_factory')   # what many tests use: the site, the wheel, an environment
DURATIONS = root/'tests'/'durations.json'     # seconds of tests that took over one; NOISYSEG_RECORD=1 writes it
SLOW = 1.


def known_durations(): return json.loads(DURATIONS.read_text()) if DURATIONS.exists() else {}


def local_id(nodeid): return nodeid.removeprefix('tests/')


@functools.cache
def signs_of(function):
    "The names of `SIGNS` that a function of the tests speaks of"
    if not (inspect.getsourcefile(function) or '').startswith(str(root/'tests')): return frozenset()
    source = inspect.getsource(function)
    return frozenset(name for name, sign in SIGNS.items() if re.search(sign, source))


def marks_of(item, durations):
    "The names of `SIGNS` that fit a test and the fixtures that it uses; and `slow`, by what it took"
    functions = [item.function, *(d.func for name in item.fixturenames
                                  for d in item._fixtureinfo.name2fixturedefs.get(name, ()))]
    found = set().union(*map(signs_of, functions)) | SIGNS.keys() & set(item.path.stem.split('_'))
    slow = durations.get(local_id(item.nodeid), 0) > SLOW or item.originalname == 'test_runs'
    return found | ({'slow'} if slow else set())


def pytest_collection_modifyitems(items):
    """Longest first, so that no process is left alone with a long test at the end.

    Where tests run in several processes, those of one file share one, and with it their browser and their trained
    networks; notebooks go to whoever is free."""
    durations, total = known_durations(), {}
    for item in items:
        for name in marks_of(item, durations): item.add_marker(name)
        alone = item.path.name == 'test_tooling_notebooks.py'
        group = item.nodeid if alone else item.path.stem
        if not alone: item.add_marker(pytest.mark.xdist_group(group))
        item.group = group
        total[group] = total.get(group, 0) + durations.get(local_id(item.nodeid), .1)
    for item in items: item.group_seconds = total[item.group]   # also of those that -k will leave out
    items.sort(key=lambda item: -item.group_seconds)   # stable: the order within a file stays


def pytest_terminal_summary(terminalreporter):
    "NOISYSEG_RECORD=1 make test: what each test took, for the order and for `make check`"
    if not os.environ.get('NOISYSEG_RECORD'): return
    seconds = {}
    for report in (r for found in terminalreporter.stats.values() for r in found if hasattr(r, 'duration')):
        seconds[local_id(report.nodeid)] = seconds.get(local_id(report.nodeid), 0) + report.duration
    lasting = {k: round(v, 1) for k, v in sorted(seconds.items()) if v > 1}
    DURATIONS.write_text(json.dumps(lasting, indent=0, ensure_ascii=False) + '\n')
