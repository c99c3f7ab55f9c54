"""Hooks of nbdev's, for this checkout only: notebooks are cleaned when JupyterLab saves them, and merged cell by cell.

Does what `nbdev-install-hooks` does, but writes nothing outside this folder (that command edits `~/.jupyter`), names
the programs by their full path (so git works while the environment is not activated), and leaves `git diff` alone.
Where there is nothing to hook into, as in CI or an unpacked archive, it does nothing; it never makes set-up fail."""
import os
import subprocess
import sys
from pathlib import Path

root, bin = Path(__file__).resolve().parents[1], Path(sys.prefix)/'bin'


def git(*args):
    return subprocess.run(['git', '-C', str(root), *args], capture_output=True, text=True, check=True).stdout.strip()


def save_hook():
    "JupyterLab of this environment cleans what it saves (`jupyter_hooks` in pyproject.toml)"
    cfg = Path(sys.prefix)/'etc'/'jupyter'/'jupyter_server_config.py'
    cfg.parent.mkdir(parents=True, exist_ok=True)
    cfg.write_text('from nbdev.clean import clean_jupyter\n\nc = get_config()\nc.ContentsManager.pre_save_hook = '
                   'clean_jupyter\n')


def git_hooks():
    "Notebooks merge with nbdev-merge (.gitattributes says which files) and are trusted after a pull"
    if os.environ.get('CI') or Path(git('rev-parse', '--show-toplevel')).resolve() != root: return
    git('config', '--local', 'merge.jupyternotebook.name', 'merge notebooks cell by cell with nbdev')
    git('config', '--local', 'merge.jupyternotebook.driver', f'"{bin}/nbdev-merge" %O %A %B %P')
    hook = root/git('rev-parse', '--git-path', 'hooks')/'post-merge'
    if hook.exists(): return
    hook.parent.mkdir(parents=True, exist_ok=True)
    hook.write_text(f'#!/bin/sh\n[ ! -x "{bin}/nbdev-trust" ] || "{bin}/nbdev-trust"\n')
    hook.chmod(0o755)


for f in save_hook, git_hooks:
    try: f()
    except (OSError, subprocess.CalledProcessError) as e:
        print(f'No {f.__name__.replace("_", " ")}: {e}', file=sys.stderr)
