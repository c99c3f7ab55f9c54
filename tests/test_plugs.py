"""Four things extend the workbook: a disturbance, a method, a data set (or a corruption of it), a task.

Each takes one file; tests/plugs has one of each. Beside a copy of the project lies one of them at a time, and
everything runs with it: sweep, store, figures, card, explorer, the panel of pseudo-labels, a resumed fit."""
import shutil

import pytest
from conftest import copy_project, root

plugs = {'law': 'stuck_at', 'method': 'mean_teacher', 'dataset': 'membranes', 'corruption': 'occlusion',
         'task': 'keypoints'}
needs_cells = ('law', 'method', 'corruption')   # these need some data, and take the data set that is a plug itself


# imports once, and forks for each plug: `fork PROJECT FOLDER PLUG FOLDER PLUG …`
fork = """
import gc, os, runpy, sys
sys.path.insert(0, project := sys.argv.pop(1))
from noisyseg import *
import noisyseg
assert noisyseg.__file__.startswith(project)   # the copy's, that is
import noisyseg.show.pseudo_label_panel
gc.freeze()
for folder, plug in zip(sys.argv[1::2], sys.argv[2::2]):
    sys.stdout.flush()
    if not os.fork():
        os.chdir(folder)
        out = os.open('said', os.O_WRONLY | os.O_CREAT)
        os.dup2(out, 1), os.dup2(out, 2)
        sys.path.insert(0, folder)
        sys.argv = ['use.py', 'made', plug]
        runpy.run_path('use.py', run_name='__main__')
        sys.stdout.flush()
        os._exit(0)   # without taking apart what was imported, which takes two seconds
    os.wait()
"""


@pytest.fixture(scope='module')
def said(server, tmp_path_factory):
    "What is said when everything runs with a plug, and nothing else is added"
    top = tmp_path_factory.mktemp('plugs')
    copy = copy_project(top/'project')
    for plug, name in plugs.items():
        (top/plug).mkdir()
        for file in {name, 'use', *(['membranes'] if plug in needs_cells else [])}:
            shutil.copy(copy/'tests'/'plugs'/f'{file}.py', top/plug)
    args = [o for plug in plugs for o in (top/plug, plug)]
    [(status, text)] = server.script(fork, top, {}, args=[copy, *args])
    assert status == 0, text
    return {plug: (top/plug/'said').read_text() for plug in plugs}


@pytest.mark.parametrize('plug', plugs)
def test_everything_knows_it(said, plug):
    "Sweep, store, figures, card, explorer and training run with what one file adds"
    assert said[plug].splitlines()[-1:] == [f'done: {plug}'], said[plug]


def test_a_plug_is_one_small_file():
    "None needs more than 60 lines, and none a private name of ours"
    for name in plugs.values():
        text = (root/'tests'/'plugs'/f'{name}.py').read_text()
        assert len(text.splitlines()) <= 60, name
        assert 'import _' not in text and '._' not in text, name
