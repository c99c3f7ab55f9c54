("Set-up (.ci/set-up) finds out what is wrong before it spends minutes, trusts nothing half-made, and does nothing "
 "twice.")
import subprocess

import pytest


@pytest.fixture
def set_up(project):
    ("Runs .ci/set-up in a copy of the project with a stand-in for Python: gives status, what was said, and what the "
     "stand-in was asked")
    def run(version='3.12', works='exit 0', venv='.venv'):
        asked, python = project/'asked', project/'python'
        asked.write_text('')
        python.write_text(f'#!/bin/sh\necho "$@" >> {asked}\ncase "$*" in\n  -V) echo Python {version};;\n'
                          f'  *version_info*) {"exit 0" if version >= "3.11" else "exit 1"};;\n  *) {works};;\nesac\n')
        python.chmod(0o755)
        # only the stand-in is to be found: no other Python of this machine
        env = dict(PATH=f'{project/"bin"}', PYTHON=str(python), VENV=str(venv))
        (project/'bin').mkdir(exist_ok=True)
        for o in 'sh', 'cat', 'cksum', 'dirname', 'head', 'ls', 'mkdir', 'rm', 'mv':
            path = subprocess.check_output(['sh', '-c', f'command -v {o}'], text=True).strip()
            if not (project/'bin'/o).exists(): (project/'bin'/o).symlink_to(path)
        r = subprocess.run([project/'.ci'/'set-up'], env=env, text=True, capture_output=True, cwd='/')
        return r.returncode, r.stderr, asked.read_text()
    return run


def test_old_python_is_named(set_up):
    status, said, _ = set_up(version='3.09')
    assert status and 'needs Python 3.11 or newer' in said and 'Python 3.09' in said


def test_missing_ensurepip_is_explained(set_up):
    status, said, _ = set_up(works='case "$*" in *ensurepip*) exit 1;; esac')
    assert status and 'python3-venv' in said


def test_a_folder_that_is_no_environment_is_left_alone(set_up, project):
    (project/'thesis').mkdir()
    (project/'thesis'/'chapter.txt').write_text('1')
    status, said, _ = set_up(venv='thesis')
    assert status and 'something else' in said and (project/'thesis'/'chapter.txt').exists()


def test_half_a_set_up_is_made_again(set_up, project):
    "A set-up that failed leaves its mark; the next one starts from nothing, and is ready only when all steps are done"
    venv = project/'.venv'
    status, _, asked = set_up(works='case "$*" in "-m venv .venv") exit 1;; esac')
    assert status and (venv/'.unfinished').exists() and not (venv/'.ready').exists()
    (venv/'half').write_text('')
    make = (f'case "$*" in "-m venv .venv") mkdir -p {venv}/bin; : > {venv}/pyvenv.cfg; cp {project}/python '
            f'{venv}/bin/python;; esac')
    (project/'bin'/'cp').symlink_to('/bin/cp')
    status, said, asked = set_up(works=make)
    assert not status, said
    assert 'cut short' in said and not (venv/'half').exists()
    assert 'pip install' in asked and 'pip check' in asked and 'hooks.py' in asked
    assert (venv/'.ready').exists() and not (venv/'.unfinished').exists()
    # a second time there is nothing to do; a changed requirement is tried out, then installed
    assert 'pip' not in set_up(works=make)[2]
    with open(project/'constraints.txt', 'a') as f: f.write('\n# newer\n')
    status, said, asked = set_up(works=make)
    assert not status, said
    assert 'up to date' in said and asked.index('--dry-run') < asked.index('pip check')
