("Set-up (.ci/set-up) finds out what is wrong before it spends minutes, trusts nothing half-made, and does nothing "
 "twice.")
import subprocess

import pytest


@pytest.fixture
def set_up(project):
    ("Runs .ci/set-up in a copy of the project with a stand-in for Python: gives status, what was said, and what the "
     "stand-in was asked")
    def run(version='3.12', works='exit 0', venv='.venv'):  # `works`: shell code, what the stand-in does
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


def user_made(project):
    "An environment that the user made, with a package of the user's in it"
    venv = project/'.venv'
    (venv/'bin').mkdir(parents=True)
    (venv/'pyvenv.cfg').touch()
    (venv/'my_cpu_torch').mkdir()
    return venv


def test_an_environment_of_yours_is_kept(set_up, project):
    "A set-up that is cut short in an environment that you made goes on there the next time, and deletes nothing"
    venv = user_made(project)
    (venv/'bin'/'python').write_text('#!/bin/sh\ncase "$*" in *"pip check"*) exit 1;; esac\n')
    (venv/'bin'/'python').chmod(0o755)
    for _ in range(2):
        status, said, _ = set_up()
        assert status and (venv/'.unfinished').exists() and (venv/'my_cpu_torch').is_dir()
    assert 'cut short' in said and 'keeping what is there' in said
    (venv/'bin'/'python').write_text('#!/bin/sh\nexit 0\n')
    status, said, _ = set_up()
    assert not status, said
    assert (venv/'.ready').exists() and (venv/'my_cpu_torch').is_dir()


@pytest.mark.parametrize('fault', ['broken', 'moved', 'cut short and broken'])
def test_an_environment_of_yours_is_left_to_you(set_up, project, fault):
    "Whatever is wrong with an environment that you made, set-up deletes nothing, and says what would"
    venv = user_made(project)
    (venv/'bin'/'python').write_text('#!/bin/sh\nexit ' + ('0' if fault == 'moved' else '1') + '\n')
    (venv/'bin'/'python').chmod(0o755)
    if fault == 'moved': (venv/'.ready').write_text('/elsewhere/.venv\n1 2\n')
    if fault == 'cut short and broken': (venv/'.unfinished').touch()
    status, said, _ = set_up()
    assert status and 'rm -rf .venv' in said and (venv/'my_cpu_torch').is_dir()
