"""Runs notebooks, each in a process of its own that need not import torch and fastai once more.

It imports them once and waits. For each line on stdin, `{"path": ..., "flags": ..., "out": ...}`, it forks; the child
does what the command `nbdev-test PATH --flags FLAGS` does, with its output in the file `out`. The answer is two lines:
the child's process id, which is also that of its process group, and its exit status."""
import json
import os
import sys
import warnings

sys.path[:] = [p for p in sys.path if os.path.abspath(p) != os.path.dirname(os.path.abspath(__file__))]
warnings.simplefilter('ignore')
import fastai.vision.all  # noqa: E402, F401
import matplotlib.pyplot  # noqa: E402, F401
import pandas  # noqa: E402, F401
import plotly.graph_objects  # noqa: E402, F401
import scipy.stats  # noqa: E402, F401
import torch  # noqa: E402, F401
import torchmetrics  # noqa: E402, F401
import torchvision  # noqa: E402, F401
from nbdev.test import nbdev_test  # noqa: E402

warnings.resetwarnings()


def run(path, flags, out):
    "In the child: the notebook, with all that it prints in a file"
    os.setsid()
    for fd, file, mode in (0, os.devnull, os.O_RDONLY), (1, out, os.O_WRONLY | os.O_CREAT | os.O_APPEND):
        opened = os.open(file, mode)
        os.dup2(opened, fd)
        os.close(opened)
    os.dup2(1, 2)
    nbdev_test(path, flags=flags, n_workers=0)


def main():
    print('ready', flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if not pid: return run(**json.loads(line))   # and leaves as a program does: with its exit handlers
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == '__main__': main()
