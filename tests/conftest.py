"Shared by the tests: where the project is, its notebooks in reading order, and a copy of it to break things in."
import contextlib
import fcntl
import functools
import gc
import inspect
import json
import math
import os
import re
import shutil
import signal
import socket
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
# PyTorch's threads, where there are several, sleep while they wait: else they take the cores from the tests beside them
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')
os.environ.setdefault('RAY_worker_niceness', '0')   # at Ray's own 15, its workers starve beside other tests
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


class Server:
    """Forks a process for each notebook and script (warm_server.py): torch and fastai are imported once, not each time,
    and once for all processes that test. Whoever is the first to need it starts it; it ends after all of them."""
    def __init__(self, folder):
        self.process, self.connection = None, socket.socket(socket.AF_UNIX)
        with open(folder/'lock', 'w') as lock:   # others wait here while it starts
            fcntl.flock(lock, fcntl.LOCK_EX)
            try: self.connection.connect(str(folder/'warm'))
            except OSError:                      # there is none, or it has ended
                self.start(folder/'warm')
                self.connection.connect(str(folder/'warm'))
        self.to, self.said = self.connection.makefile('w'), self.connection.makefile('r')

    def start(self, path):
        path.unlink(missing_ok=True)
        cmd = [sys.executable, root/'tests'/'warm_server.py', path]
        self.process = subprocess.Popen(cmd, cwd=root, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout.readline() == 'ready\n'

    def run(self, *jobs):
        "For each job its exit status and what it said. However this ends, what they started ends too"
        print(json.dumps([{**job, 'out': str(job['out'])} for job in jobs]), file=self.to, flush=True)
        pids, statuses = self.said.readline().split(), None
        try: statuses = self.said.readline().split()
        finally:
            for pid in pids:
                try: os.killpg(int(pid), signal.SIGKILL)
                except ProcessLookupError: pass
            if statuses is None: self.said.readline()
        return [(int(s), Path(job['out']).read_text(errors='replace')) for s, job in zip(statuses, jobs)]

    def notebook(self, path, out, flags=''): return self.run(dict(path=str(path), flags=flags, out=out))[0]

    def script(self, source, folder, *envs, args=()):
        "A script in several processes at a time, each with some variables of the environment"
        (folder/'script.py').write_text(source)
        jobs = [dict(script=str(folder/'script.py'), args=[str(a) for a in args], env=env, out=folder/f'said-{i}')
                for i, env in enumerate(envs)]
        return self.run(*jobs)

    def pair(self, source, folder, args=()):
        "A script in two processes, as `torchrun` would set up their environment: exit statuses, and what they said"
        said = self.script(source, folder, *ranks(), args=args)
        return [s for s, _ in said], [text for _, text in said]

    def close(self):
        for o in self.to, self.said, self.connection: o.close()
        if self.process is None: return
        self.process.stdin.close()
        if 'PYTEST_XDIST_WORKER' not in os.environ: self.process.wait(60)   # else others may still need it


def ranks(n=2):
    "The environments of `n` processes that are to meet on this machine"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = str(s.getsockname()[1])
    meeting = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=port, WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n),
                   GLOO_SOCKET_IFNAME='lo', OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    return [{**meeting, 'RANK': str(i), 'LOCAL_RANK': str(i)} for i in range(n)]


@pytest.fixture(scope='session')
def server(tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    server = Server(folder.parent if 'PYTEST_XDIST_WORKER' in os.environ else folder)
    yield server
    server.close()


shared = contextlib.ExitStack()   # what the files of a group share; it is closed after the group's last test
_lab = []


@pytest.fixture
def in_jupyterlab(tmp_path_factory):
    "JupyterLab on a copy of the project, and a browser, once for a group: (project, page, url, token)"
    from test_lab import opened
    if not _lab:
        _lab.append(shared.enter_context(opened(tmp_path_factory.mktemp('lab'))))
        shared.callback(_lab.clear)
    return _lab[0]


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    "After the last test of a group, what its files shared is closed"
    if nextitem is None or nextitem.group != item.group: shared.close()


PAGES = """
import os, sys
os.chdir(sys.argv[1])
sys.path.insert(0, '.ci')
import pages
pages.process()
"""


@pytest.fixture(scope='session')
def processed(server, tmp_path_factory):
    "The sources of the site: notebooks as nbdev hands them to Quarto, made pages, pictures"
    folder = tmp_path_factory.mktemp('docs')
    project = copy_project(folder/'project')
    [(code, said)] = server.script(PAGES, folder, {}, args=[project])
    assert code == 0, said
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
SIGNS = dict(browser=r'browser_page\(|jupyterlab\(|opened\(|\btab\b', ray=r"\bray\b|on='ray'",
             kill=r'SIGKILL|\.kill\(|torch\.distributed|nproc|mp\.spawn|server\.(pair|script)',
             slow=r'copy_project\(tmp_path_factory')   # what many tests use: the site, the wheel, an environment
DURATIONS = root/'tests'/'durations.json'     # seconds of the slow tests; NOISYSEG_RECORD=1 writes it
SLOW = .5
TOGETHER = {'test_explorer': 'test_lab', 'test_monitor': 'test_lab',   # one JupyterLab, one browser
            'test_tooling_site': 'test_tooling_docs'}                   # one set of the site's sources


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


def group_of(nodeid):
    "What runs in one process: the tests of a file, or of files that share a JupyterLab; each notebook by itself"
    file = Path(nodeid.partition('::')[0]).stem
    return local_id(nodeid) if file == 'test_tooling_notebooks' else TOGETHER.get(file, file)


def pytest_collection_modifyitems(items):
    """Longest first, so that no process is left alone with a long test at the end.

    Where tests run in several processes, those of one file share one, and with it their browser and their trained
    networks; notebooks go to whoever is free."""
    durations, total = known_durations(), {}
    for item in items:
        for name in marks_of(item, durations): item.add_marker(name)
        item.group = group_of(item.nodeid)
        total[item.group] = total.get(item.group, 0) + durations.get(local_id(item.nodeid), .1)
    for item in items: item.group_seconds = total[item.group]   # also of those that -k will leave out
    items.sort(key=lambda item: -item.group_seconds)   # stable: the order within a file stays


def pytest_collection_finish():
    "All is imported: half a million objects that need not be looked through again and again"
    gc.collect()
    gc.freeze()


def pytest_unconfigure(): gc.unfreeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "Hands out whole groups. (xdist 3.8 looks for its own marks of groups in vain with pytest 9.2.)"
    if config.getvalue('dist') != 'loadgroup': return None
    from xdist.scheduler import LoadScopeScheduling
    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid): return group_of(nodeid)
    return Groups(config, log)


def pytest_terminal_summary(terminalreporter):
    "NOISYSEG_RECORD=1 make test: what each test took, for the order and for `make check`"
    if not os.environ.get('NOISYSEG_RECORD'): return
    seconds = {}
    for report in (r for found in terminalreporter.stats.values() for r in found if hasattr(r, 'duration')):
        seconds[local_id(report.nodeid)] = seconds.get(local_id(report.nodeid), 0) + report.duration
    lasting = {k: round(v, 1) for k, v in sorted(seconds.items()) if v > SLOW}
    DURATIONS.write_text(json.dumps(lasting, indent=0, ensure_ascii=False) + '\n')
