"""`help()` says what the source says: the comments beside parameters. The lesson is nbs/docments.ipynb."""
import inspect
import pydoc
import sys

import pytest

import noisyseg
from noisyseg.docments import Finder, install


def test_help_shows_what_stands_beside_a_parameter():
    text = pydoc.plain(pydoc.render_doc(noisyseg.perturbed))
    for said in ('any module, on any device', "'recovered': after it", 'torch.Generator, a seed, or None'):
        assert said in text
    assert 'Returns' in noisyseg.load_model.__doc__ and 'a checkpoint' in noisyseg.load_model.__doc__

@pytest.mark.parametrize('name', noisyseg.__all__)
def test_every_public_name_describes_its_parameters(name):
    "Those that are functions or classes with parameters of their own"
    o = getattr(noisyseg, name)
    if not (inspect.isclass(o) or inspect.isfunction(o)): return
    f = inspect.unwrap(o.__init__ if inspect.isclass(o) else o)
    made = not inspect.isfunction(f) or not f.__code__.co_filename.endswith('.py')   # a dataclass's, or torch's
    source = '' if made or 'noisyseg' not in f.__code__.co_filename else inspect.getsource(f)
    header = source.partition('):')[0]
    if '  # ' in header: assert '    ' + header.partition('  # ')[2].partition('\n')[0].strip()[:30] in o.__doc__, name

def test_fields_of_a_law_are_its_parameters():
    law = noisyseg.MaxGaussian
    assert all(f'\n{f} : ' in law.__doc__ for f in ('n', 'alpha')), law.__doc__

def test_once_only(server, tmp_path):
    "Imported anew, or installed twice: said once"
    install('noisyseg')
    assert sum(isinstance(f, Finder) and f.inside == 'noisyseg.' for f in sys.meta_path) == 1
    # in a process of its own: classes made anew are other classes, and the tests after this one would meet them
    code = ("import importlib, noisyseg.perturb.quantization as q\n"
            "print(importlib.reload(q).quantized.__doc__.count('Parameters\\n'))")
    assert server.script(code, tmp_path, {}) == [(0, '1\n')]

def test_modules_work_without_it(server, tmp_path):
    code = 'import noisyseg; print(noisyseg.load_model.__doc__)'
    [(status, out)] = server.script(code, tmp_path, {'NOISYSEG_DOCMENTS': '0'})
    assert status == 0 and out.startswith('Build the model') and 'Parameters' not in out
