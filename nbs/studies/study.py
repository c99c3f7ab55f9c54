"What the scripts of the studies share: their command line, what is told while a network trains, and what is kept."
import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch
from fastai.callback.core import Callback, CancelValidException
from fastai.data.external import fastai_path
from PIL import Image

from noisyseg import __version__
from noisyseg.basics import write_atomic

HERE = Path(__file__).parent


class Clock(Callback):
    ("Seconds of each training epoch, without validation: of processor time on a CPU, since the machine may do other "
     "things too; on a GPU of wall time.")
    order = 99
    def now(self):
        if not torch.cuda.is_available(): return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()
    def before_fit(self): self.seconds = []
    def before_train(self): self.start = self.now()
    def after_train(self): self.seconds.append(self.now() - self.start)

class NoPeeking(Callback):
    "Skip validation: the held-out images are for the sweep."
    def before_validate(self): raise CancelValidException

class EpochLog(Callback):
    "A line for each epoch, for a log file."
    order = 90
    def after_train(self):
        print(f'  epoch {self.epoch + 1}/{self.n_epoch}: training loss {self.learn.smooth_loss:.4f}', flush=True)

def command_line(
    steps,  # {name: function of the arguments}: the steps of the study, taken in the order that is asked for
    doc,  # of the script; its first line is what --help says
    sizes=None,  # {size: {argument: value}}: what `--size` sets, unless an option has set it already
    seeds=None,  # those of `--seeds`, if nothing is asked for
    models=None,  # name of a folder for checkpoints, under fastai's, unless `--models` says another
    **options,  # further options: {name: the arguments of `add_argument`}
):
    "Runs the steps that the command line asks for."
    p = argparse.ArgumentParser(description=doc.split('\n')[0])
    p.add_argument('what', nargs='+', choices=steps)
    if sizes: p.add_argument('--size', choices=sizes, default='small')
    if seeds: p.add_argument('--seeds', type=int, nargs='+', default=list(seeds))
    if models: p.add_argument('--models', type=Path, default=fastai_path('model')/models, help='folder of checkpoints')
    p.add_argument('--threads', type=int, default=os.cpu_count())
    for name, of in options.items(): p.add_argument(f'--{name.replace("_", "-")}', **of)
    a = p.parse_args()
    for k, v in sizes[a.size].items() if sizes else ():
        if getattr(a, k, None) is None: setattr(a, k, v)
    torch.set_num_threads(a.threads)
    for w in a.what: steps[w](a)

def machine():
    return f'{platform.machine()}, ' + (torch.cuda.get_device_name() if torch.cuda.is_available()
                                        else f'{torch.get_num_threads()} CPU thread(s)')

def made(a, **info):
    "Command, hardware, date, versions and settings; where the checkpoints lay is nobody's business."
    argv = [w for before, w in zip(sys.argv, sys.argv[1:]) if '--models' not in (before, w)]
    versions = {'noisyseg': __version__, 'torch': torch.__version__, 'python': platform.python_version()}
    return dict(command=' '.join(['python', f'nbs/studies/{Path(sys.argv[0]).name}', *argv]), hardware=machine(),
                date=time.strftime('%Y-%m-%d'),
                versions=versions, settings={k: v for k, v in vars(a).items() if k not in ('what', 'models')}, **info)

def companion(path, a, **info):
    "What made a results file, beside it."
    write_atomic(path.with_name(path.name + '.json'), json.dumps(made(a, **info), indent=1, ensure_ascii=False) + '\n')

def keep(path, df, a, **info):
    write_atomic(path, df.to_csv(index=False))
    companion(path, a, **info)

def out(a, name): return HERE/(name if a.size == 'small' else name.replace('.csv', f'_{a.size}.csv'))

def keep_masks(path, labels, palette):
    "Labels (height, width) as a PNG with a palette, [(red, green, blue), …]."
    picture = Image.fromarray(labels.cpu().numpy().astype(np.uint8), 'P')
    picture.putpalette([v for rgb in palette for v in rgb])
    picture.save(path)
