"""Four things extend the workbook: a disturbance, a method, a data set (or a corruption of it), a task.

Each takes one file; tests/plugs has one of each. In a copy of the project, one is put beside the package, and
everything runs with it: sweep, store, figures, card, explorer, the panel of pseudo-labels, a resumed fit."""
import os
import shutil
import subprocess
import sys

import pytest
from conftest import copy_project, root

plugs = {'law': 'stuck_at', 'method': 'mean_teacher', 'dataset': 'membranes', 'corruption': 'occlusion',
         'task': 'keypoints'}
needs_cells = ('law', 'method', 'corruption')   # these need some data, and take the data set that is a plug itself


@pytest.fixture(scope='module')
def copy(tmp_path_factory): return copy_project(tmp_path_factory.mktemp('plugs')/'project')


def using(copy, plug, folder):
    "What is said when everything runs with a plug, and nothing else is added"
    folder.mkdir()
    for name in {plugs[plug], 'use', *(['membranes'] if plug in needs_cells else [])}:
        shutil.copy(copy/'tests'/'plugs'/f'{name}.py', folder)
    env = {**os.environ, 'PYTHONPATH': str(copy), 'OMP_NUM_THREADS': '1'}
    r = subprocess.run([sys.executable, 'use.py', 'made', plug], cwd=folder, env=env, text=True, capture_output=True)
    return r.stdout if not r.returncode else r.stdout + r.stderr


@pytest.mark.parametrize('plug', plugs)
def test_everything_knows_it(copy, plug, tmp_path):
    "Sweep, store, figures, card, explorer and training run with what one file adds"
    said = using(copy, plug, tmp_path/'own')
    assert said.splitlines()[-1:] == [f'done: {plug}'], said


def test_a_plug_is_one_small_file():
    "None needs more than 60 lines, and none a private name of ours"
    for name in plugs.values():
        text = (root/'tests'/'plugs'/f'{name}.py').read_text()
        assert len(text.splitlines()) <= 60, name
        assert 'import _' not in text and '._' not in text, name
