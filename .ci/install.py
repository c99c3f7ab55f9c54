"""Install noisyseg and what working on it needs into the environment of the Python that runs this.

By uv where it is there or can be had, otherwise by pip: the same versions, those of constraints.txt. uv doesn't read
pip's configuration, so what that says of indexes, folders of wheels, certificates and proxies is passed on; where it
says something that uv has no word for, pip installs. A failure of uv's is no failure: pip tries then.

`--dry-run` installs nothing, and fails where the requirements can't be met. Needs nothing but Python and pip."""
import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

root = Path(__file__).resolve().parents[1]
WHAT = ['-e', '.[dev]']
# options of pip's configuration, as uv calls them
AS_ARGUMENT = {'index-url': '--default-index', 'extra-index-url': '--index', 'find-links': '--find-links',
               'constraint': '--constraints', 'trusted-host': '--allow-insecure-host', 'no-index': '--no-index'}
AS_VARIABLE = {'cert': 'SSL_CERT_FILE', 'client-cert': 'SSL_CLIENT_CERT', 'proxy': 'ALL_PROXY',
               'timeout': 'UV_HTTP_TIMEOUT', 'default-timeout': 'UV_HTTP_TIMEOUT'}
# what changes neither what is installed nor where it comes from
NO_MATTER = {'disable-pip-version-check', 'cache-dir', 'no-cache-dir', 'quiet', 'verbose', 'no-color', 'progress-bar',
             'no-input', 'retries', 'require-virtualenv', 'break-system-packages', 'root-user-action', 'compile',
             'no-compile', 'no-warn-script-location', 'prefer-binary', 'log'}


def say(text): print(text, file=sys.stderr, flush=True)


def pip(*args, **kwargs):
    return subprocess.run([sys.executable, '-m', 'pip', '--disable-pip-version-check', *args], cwd=root, text=True,
                          **kwargs)


def pip_settings(listed):
    "{option: value} of `pip config list`: the environment counts before what is said of `install`, and that before all"
    found = {}
    for section in 'global', 'install', ':env:':
        for line in listed.splitlines():
            where, _, value = line.partition('=')
            if where.startswith(f'{section}.'): found[where.removeprefix(f'{section}.')] = ast.literal_eval(value)
    return found


def for_uv(settings):
    "Settings of pip's as (arguments, environment variables) for uv; ValueError for what uv has no word for"
    args, env = [], {}
    for name, value in settings.items():
        if name in NO_MATTER: continue
        if name == 'no-index': args += [AS_ARGUMENT[name]] if value.lower() in ('1', 'true', 'yes', 'on') else []
        elif name in AS_ARGUMENT: args += [o for v in value.split() for o in (AS_ARGUMENT[name], v)]
        elif name in AS_VARIABLE: env[AS_VARIABLE[name]] = value
        else: raise ValueError(f'{name} = {value}')
    # like pip, and unlike uv of itself: the best version on all indexes, and not the first index that has the package
    if 'extra-index-url' in settings or 'find-links' in settings: args += ['--index-strategy', 'unsafe-best-match']
    return args, env


def get_uv(bring):
    "The command that starts uv: the user's, or this environment's, into which pip may `bring` it; None: there is none"
    if found := shutil.which('uv'): return [found]
    if importlib.util.find_spec('uv') is None:
        if not bring: return None
        # one attempt: where the index doesn't answer, pip will say so better than we could
        asked = pip('install', '--quiet', '--retries', '1', '-c', 'constraints.txt', 'uv', capture_output=True)
        if asked.returncode: return None
    return [sys.executable, '-m', 'uv']


def has_gpu():
    "Is there a GPU that PyTorch's usual builds would use?"
    return bool(shutil.which('nvidia-smi')) or any(Path(o).exists() for o in ('/dev/nvidia0', '/dev/dxg', '/dev/kfd'))


def offered(package):
    "The versions of a package on the indexes and in the folders that pip is configured for"
    listed = pip('index', 'versions', package, capture_output=True).stdout
    found = re.search(r'^Available versions: (.*)$', listed, re.M)
    return found[1].split(', ') if found else []


def for_cpus(constraints):
    """The constraints with PyTorch's builds for CPUs, where the user's own indexes offer them: a tenth of the download.

    Unchanged where there is a GPU, where a PyTorch is installed already, and where only one of the pair is offered."""
    if has_gpu() or sys.platform == 'darwin' or importlib.util.find_spec('torch'): return constraints
    small = constraints
    for name in 'torch', 'torchvision':
        pin = re.search(rf'^{name}==([\w.]+)$', constraints, re.M)
        if not pin or f'{pin[1]}+cpu' not in offered(name): return constraints
        small = small.replace(pin[0], f'{pin[0]}+cpu')
    say("PyTorch: your index offers the build for CPUs, and no GPU was found here, so that one is installed.")
    return small


def by_uv(args, dry):
    "Did uv install it?"
    try: passed, env = for_uv(pip_settings(pip('config', 'list', capture_output=True).stdout))
    except ValueError as e:
        say(f"Installing by pip, since it is configured in a way that uv has no word for: {e}.")
        return False
    uv = get_uv(bring=not dry)
    if uv is None:
        if not dry: say("Installing by pip; it would take half the time by uv, which neither is here nor could be had.")
        return False
    cmd = [*uv, 'pip', 'install', '--python', sys.executable, *passed, *args]
    if not subprocess.run(cmd, cwd=root, env={**env, **os.environ}).returncode: return True
    say("uv could not install it; trying pip.")
    return False


def main(dry):
    constraints = for_cpus((root/'constraints.txt').read_text())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder)/'constraints.txt'
        file.write_text(constraints)
        args = [*(['--dry-run', '--quiet'] if dry else []), '-c', str(file), *WHAT]
        return 0 if by_uv(args, dry) else pip('install', *args).returncode


if __name__ == '__main__': sys.exit(main('--dry-run' in sys.argv[1:]))
