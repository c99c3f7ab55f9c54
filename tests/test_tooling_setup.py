("Set-up (.ci/set-up) finds out what is wrong before it spends minutes, trusts nothing half-made, and does nothing "
 "twice.")
import os
import re
import subprocess
import sys
from pathlib import Path

import install
import pytest
from conftest import root


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
    assert '.ci/install.py' in asked and 'pip check' in asked and 'hooks.py' in asked
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


# --- .ci/install.py: by uv or by pip, and which PyTorch

@pytest.fixture
def installed(monkeypatch):
    "What `install.main` runs: a function that gives its status, the commands and their environment, and what was said"
    def run(uv=True, listed='', offered=(), gpu=False, there=(), fails='', dry=False):
        ran, said = [], []
        def command(cmd, env=None, **kwargs):
            text = ' '.join(map(str, cmd))
            ran.append((text, env, constraints_of(cmd)))
            out = listed if 'config list' in text else ''
            name = text.rpartition(' ')[2]
            if 'index versions' in text: out = f'{name} (1)\nAvailable versions: {", ".join(offered)}\n'
            return subprocess.CompletedProcess(cmd, int(bool(fails) and fails in text), out, '')
        monkeypatch.setattr(install.subprocess, 'run', command)
        monkeypatch.setattr(install.shutil, 'which', lambda o: f'/usr/bin/{o}' if o == 'uv' and uv is True else None)
        monkeypatch.setattr(install.importlib.util, 'find_spec', lambda o: o if o in there else None)
        monkeypatch.setattr(install, 'has_gpu', lambda: gpu)
        monkeypatch.setattr(install, 'say', said.append)
        return install.main(dry), ran, ' '.join(said)
    return run


def constraints_of(cmd):
    "The lines on PyTorch in the constraints that a command names"
    file = Path(cmd[cmd.index('-c') + 1]) if '-c' in cmd else None
    if file is None or not (root/file).exists(): return []
    return [o for o in (root/file).read_text().splitlines() if o.startswith(('torch==', 'torchvision=='))]


pins = dict(re.findall(r'^(torch|torchvision)==(.*)$', (root/'constraints.txt').read_text(), re.M))


def test_uv_installs_where_it_is(installed):
    status, ran, said = installed()
    assert status == 0 and ran[-1][0].startswith('/usr/bin/uv pip install --python') and not said
    assert ran[-1][0].endswith('-e .[dev]')
    assert not any('-m pip install' in o[0] or '-m pip --disable-pip-version-check install' in o[0] for o in ran)


def test_uv_is_brought_where_it_can_be_had(installed):
    _, ran, _ = installed(uv=False)
    assert 'install --quiet --retries 1' in ran[-2][0] and ran[-2][0].endswith(' uv')
    assert '-m uv pip install' in ran[-1][0]
    _, ran, _ = installed(uv=False, dry=True)
    assert not any(o[0].endswith(' uv') for o in ran) and '--dry-run' in ran[-1][0]   # a trial brings nothing


@pytest.mark.parametrize('how, told', [(dict(uv=False, fails='install --quiet'), 'neither is here nor could be had'),
                                       (dict(fails='/usr/bin/uv'), 'uv could not install it; trying pip'),
                                       (dict(listed="global.no-binary='numpy'\n"), 'no word for: no-binary')])
def test_pip_installs_where_uv_cannot(installed, how, told):
    "And a word says so"
    status, ran, said = installed(**how)
    assert status == 0 and told in said and ran[-1][0].endswith('-e .[dev]') and '-m pip ' in ran[-1][0]


def test_the_users_indexes_are_passed_on():
    "What pip is configured with, in the order in which pip takes it; a mirror, folders of wheels, no index at all"
    listed = ("global.index-url='https://one/simple'\nglobal.extra-index-url='https://a/simple\\nfile:///b'\n"
              "install.index-url='https://two/simple'\n:env:.find-links='/wheels'\n:env:.cert='/ca.crt'\n"
              "global.no-index='false'\nglobal.disable-pip-version-check='1'\n")
    args, env = install.for_uv(install.pip_settings(listed))
    assert ' '.join(args) == ('--default-index https://two/simple --index https://a/simple --index file:///b '
                              '--find-links /wheels --index-strategy unsafe-best-match')
    assert env == dict(SSL_CERT_FILE='/ca.crt')
    offline = install.for_uv(install.pip_settings(":env:.no-index='1'\n:env:.find-links='/wheels'\n"))[0]
    assert offline[:3] == ['--no-index', '--find-links', '/wheels']


def test_the_build_for_cpus_is_chosen_where_it_is_offered(installed):
    "Both of the pair, in the pinned versions"
    both = [f'{v}+cpu' for v in pins.values()]
    _, ran, said = installed(offered=both)
    assert ran[-1][2] == [f'{name}=={v}+cpu' for name, v in pins.items()] and 'build for CPUs' in said


@pytest.mark.parametrize('how', [dict(gpu=True), dict(there=['torch']), dict(only=1), dict(only=0)],
                         ids=['a GPU', 'a PyTorch of yours', 'one of the two', 'none'])
def test_otherwise_pytorch_is_as_it_is_pinned(installed, how):
    offered = [f'{v}+cpu' for v in pins.values()][:how.pop('only', 2)]
    _, ran, said = installed(offered=offered, **how)
    assert ran[-1][2] == [f'{name}=={v}' for name, v in pins.items()] and not said


def test_pip_itself_is_understood(tmp_path):
    "The real `pip config list`"
    listed = subprocess.run([sys.executable, '-m', 'pip', 'config', 'list'], capture_output=True, text=True,
                            env={**os.environ, 'PIP_INDEX_URL': 'https://mirror/simple',
                                 'PIP_FIND_LINKS': f'{tmp_path} /other'}).stdout
    found = install.pip_settings(listed)
    assert found['index-url'] == 'https://mirror/simple' and install.for_uv(found)[0].count('--find-links') == 2
