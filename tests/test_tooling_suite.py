"The suite itself: what stops it, what is run first, and what `make check` leaves out."
import itertools
import json
import os
import subprocess
import sys

import pytest
from conftest import local_id, root

own = """
import signal, os
import pytest
@pytest.fixture(autouse=True)
def worker():
    with open('workers', 'a') as f: f.write(os.environ.get('PYTEST_XDIST_WORKER', 'alone') + ' ')
def test_first(): raise KeyboardInterrupt
def test_second():
    os.kill(os.getpid(), signal.SIGINT)
    while True: pass
def test_third(): pass
def test_killed(): assert signal.SIGKILL
@pytest.mark.parametrize('i', range(6))
def test_more(i): pass
"""


@pytest.fixture
def pytest_in(tmp_path):
    "Runs pytest with our conftest.py on a file of tests, in a process of its own; gives what it says"
    def run(source, *args, **env):
        (tmp_path/'test_own.py').write_text(source)
        cmd = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-p', 'conftest', *args, 'test_own.py']
        path = os.pathsep.join([str(root/'tests'), str(root)])
        env = {k: v for k, v in os.environ.items() if not k.startswith('PYTEST')} | {'PYTHONPATH': path, **env}
        return subprocess.run(cmd, cwd=tmp_path, env=env, text=True, capture_output=True, timeout=120).stdout
    return run


def test_a_keyboard_interrupt_is_a_failure(pytest_in):
    "A test that lets one out has failed, whether it was raised or came as a signal; the next ones run"
    for which in 'first', 'second':
        said = pytest_in(own, '-p', 'no:xdist', '-k', f'{which} or third')
        assert '1 failed, 1 passed' in said and 'a KeyboardInterrupt came out of this test' in said


def test_those_of_a_file_share_a_process(pytest_in, tmp_path):
    "And with it what they set up: a browser, Ray, trained networks. There, too, an interrupt is a failure"
    said = pytest_in(own, '-n', '2', '--dist', 'loadgroup', '--no-loadscope-reorder')
    assert '2 failed, 8 passed' in said and 'a KeyboardInterrupt came out of this test' in said
    workers = (tmp_path/'workers').read_text().split()
    assert len(workers) == 10 and len(set(workers)) == 1


def test_two_of_them_stop_it(pytest_in):
    "Somebody who presses Ctrl-C twice wants it to stop"
    said = pytest_in(own, '-p', 'no:xdist')
    assert '1 failed' in said and 'KeyboardInterrupt' in said and 'passed' not in said


def test_longest_first(request):
    "Files and notebooks that take long come first, and the tests of one file stay together"
    runs = [(group, next(items).group_seconds) for group, items in
            itertools.groupby(request.session.items, lambda item: item.group)]
    assert len(dict(runs)) == len(runs)
    assert [seconds for _, seconds in runs] == sorted((seconds for _, seconds in runs), reverse=True)


def test_what_make_check_leaves_out(request):
    "Tests with a browser, with Ray, with killed processes and whole notebooks are marked, and no others of the tooling"
    items = {local_id(item.nodeid): item for item in request.session.items}
    marked = lambda name, mark: any(o.name == mark for o in items[name].iter_markers())
    for name, mark in {'test_lab.py::test_tour_in_jupyterlab': 'browser', 'test_tooling_notebooks.py::'
                       'test_runs[basics.ipynb]': 'slow'}.items():
        if name in items: assert marked(name, mark)
    quick = 'test_tooling_package.py::test_facts_are_the_same_everywhere'
    if quick in items: assert not [o for o in ('browser', 'ray', 'kill', 'slow') if marked(quick, o)]


def test_durations_are_of_today():
    "The record names tests that are there; `NOISYSEG_RECORD=1 make test` writes it anew"
    from conftest import DURATIONS
    if not DURATIONS.exists(): pytest.skip('no record yet')
    files = {o.split('::')[0] for o in json.loads(DURATIONS.read_text())}
    assert not [o for o in files if not (root/'tests'/o).exists()]
