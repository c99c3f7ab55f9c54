"Shared by the tests: where the project is, its notebooks in reading order, and a copy of it to break things in."
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

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


def read_nb(path): return nbformat.read(path, as_version=4)


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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    "Fixtures can see in `request.node.failed` whether their test failed"
    report = yield
    if call.when == 'call': item.failed = report.failed
    return report


def pytest_collection_modifyitems(items):
    ("Where tests run in several processes, those of one file share one, and with it their browser and their trained "
     "networks; notebooks go to whoever is free.")
    for item in items:
        if item.path.name != 'test_tooling_notebooks.py': item.add_marker(pytest.mark.xdist_group(item.path.stem))
