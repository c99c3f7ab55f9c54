"""Runs notebooks and scripts, each in a process of its own that need not import torch and fastai once more.

It imports them once, with what else many notebooks import of others (nothing of noisyseg), and waits at the socket that
it is called with. Each connection is served by a process of its own, as long as it lasts; the server ends after all of
them, once whoever started it has closed its stdin. Each line on a connection is a list of jobs that run at the same
time. For each job a child is forked with its output in the file `out`. A job
with a `path` does what the command `nbdev-test PATH --flags FLAGS` does; one with a `script` what `python SCRIPT ARGS`
does, with `env` in its environment (without what is null there). The answer is two lines: the children's process ids,
which are also those of their process groups, and their exit statuses."""
import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
import warnings

sys.path[:] = [p for p in sys.path if os.path.abspath(p) != os.path.dirname(os.path.abspath(__file__))]
warnings.simplefilter('ignore')
import fastai.callback.all  # noqa: E402, F401
import fastai.vision.all  # noqa: E402, F401
import fastcore.test  # noqa: E402, F401
import IPython.display  # noqa: E402, F401
import ipywidgets  # noqa: E402, F401
import matplotlib.pyplot  # noqa: E402, F401
import pandas  # noqa: E402, F401
import PIL.Image  # noqa: E402, F401
import plotly.express  # noqa: E402, F401
import plotly.io  # noqa: E402, F401
import plotly.subplots  # noqa: E402, F401
import pyarrow  # noqa: E402, F401
import safetensors.torch  # noqa: E402, F401
import scipy.io  # noqa: E402, F401
import scipy.stats  # noqa: E402, F401
import sklearn.datasets  # noqa: E402, F401
import timm  # noqa: E402, F401
import torch  # noqa: E402, F401
import torch._dynamo  # noqa: E402, F401   torch.optim imports it when first used
import torch.distributed  # noqa: E402, F401
import torchmetrics  # noqa: E402, F401
import torchvision  # noqa: E402, F401
from nbdev.test import nbdev_test  # noqa: E402

warnings.resetwarnings()
gc.collect()
gc.freeze()   # half a million objects that each child would else look through


def run_script(script, args, env):
    "In the child: a script, in an environment of its own"
    warnings.simplefilter('ignore')
    for name, value in env.items():
        if value is None: os.environ.pop(name, None)
        else: os.environ[name] = value
    sys.argv[:] = [script, *args]
    sys.path.insert(0, '')                           # what lies in the current folder first, as for `python -c`
    runpy.run_path(script, run_name='__main__')


def run(out, path=None, flags='', script=None, args=(), env=None):
    "In the child: a notebook or a script, with all that it prints in a file"
    os.setsid()
    for fd, file, mode in (0, os.devnull, os.O_RDONLY), (1, out, os.O_WRONLY | os.O_CREAT | os.O_APPEND):
        opened = os.open(file, mode)
        os.dup2(opened, fd)
        os.close(opened)
    os.dup2(1, 2)
    if path: nbdev_test(path, flags=flags, n_workers=0)
    else: run_script(script, args, env or {})


def status_of(job):
    "In the child: does the job; gives the exit status that a program would have"
    try: run(**job)
    except SystemExit as e:
        if e.code is None or isinstance(e.code, int): return e.code or 0
        print(e.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def leave(status):
    "Ends as a program does, with its threads and exit handlers, but takes nothing apart: that would be two seconds"
    for t in threading.enumerate():
        if t is not threading.current_thread() and not t.daemon: t.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def serve():
    "In the process of a connection: does what each line asks for"
    for line in sys.stdin:
        pids = []
        for job in json.loads(line):
            pid = os.fork()
            if not pid: leave(status_of(job))
            pids.append(pid)
        print(*pids, flush=True)
        print(*(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids), flush=True)
    leave(0)


def main(path):
    signal.signal(signal.SIGINT, signal.SIG_IGN)   # Ctrl-C is for those who are served; they close their connections
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen()
    connections = []
    print('ready', flush=True)
    while listening in select.select([listening, 0], [], [])[0]:
        connection, _ = listening.accept()
        connections.append(os.fork())
        if not connections[-1]:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            listening.close()
            for fd in 0, 1: os.dup2(connection.fileno(), fd)
            connection.close()
            serve()
        connection.close()
    os.unlink(path)
    for pid in connections: os.waitpid(pid, 0)
    leave(0)


if __name__ == '__main__': main(sys.argv[1])
