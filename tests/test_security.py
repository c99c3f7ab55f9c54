"""What SECURITY.md promises. The lessons are in nbs/data/04_archives.ipynb and nbs/train/06_checkpoints.ipynb."""
import ast
import functools
import hashlib
import http.server
import io
import json
import os
import pickle
import re
import secrets
import shlex
import socket
import stat
import subprocess
import sys
import tarfile
import threading
import time
import urllib.error
import urllib.request
import zipfile

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
import yaml
from conftest import notebooks, read_nb, root
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lab import browser_page, browser_path, served
from torch import nn
from fastai.data.external import URLs
from torchvision.datasets import SBDataset
from torchvision.datasets.voc import DATASET_YEAR_DICT

import noisyseg.data.archives
from noisyseg.data import datasets as data
from noisyseg.data.archives import BadArchive, extract, fetch, fetch_and_extract
from noisyseg.data.cifar import ClassFolders, cifar10
from noisyseg.show.explorer import NoiseExplorer
from noisyseg.perturb.laws import MaxGaussian
from noisyseg.data.files import MissingData, label_table, read_image, read_mask
from noisyseg.show.monitor import _sample_html
from noisyseg.show.report import report_html
from noisyseg.measure.store import load_sweep
from noisyseg.measure.sweeps import sweep
from noisyseg.train.checkpoints import load_model, read_card

# --- the page itself
# -----------------------------------------------------------------------------------------------------------------

def test_promises_have_tests():
    "Each row of SECURITY.md names tests, and they are there"
    text = (root/'SECURITY.md').read_text()
    rows = re.findall(r'^\| \*\*.*\|$', text, re.M)
    defined = {n for p in (root/'tests').glob('test_*.py') for n in re.findall(r'^def (test_\w+)\(', p.read_text(),
            re.M)}
    assert len(rows) == 7
    for row in rows:
        named = re.findall(r'`(test_\w+)`', row)
        assert named and not set(named) - defined, row
    assert set(re.findall(r'`(test_\w+)`', text)) >= {'test_flipped_bits', 'test_bombs'}

def test_the_audit_is_in_the_workflow():
    workflow = yaml.safe_load((root/'.github'/'workflows'/'test.yml').read_text())
    steps = [s for job in workflow['jobs'].values() for s in job['steps']]
    assert any('pip-audit' in s.get('run', '') and 'constraints.txt' in s['run'] for s in steps)
    assert all(job.get('permissions', workflow.get('permissions')) == {'contents': 'read'}
               for job in workflow['jobs'].values())


# --- files are data -------------------------------------------------------------------------------------------------
# ---------------------

UNSAFE = {'eval', 'exec', 'pickle.load', 'pickle.loads', 'pickle.Unpickler', 'cPickle.load', 'cloudpickle.load',
          'cloudpickle.loads', 'dill.load', 'dill.loads',
          'joblib.load', 'marshal.load', 'marshal.loads', 'shelve.open', 'pd.read_pickle', 'pandas.read_pickle',
          'yaml.load', 'yaml.unsafe_load',
          'load_learner', 'torch.load', 'torch.hub.load', 'load_state_dict_from_url', 'os.system', 'os.popen',
          'np.load', 'numpy.load', 'shutil.unpack_archive'}
# what is pickled there goes from one of the user's own processes to another, through Ray or a pipe
BETWEEN_OWN_PROCESSES = {'jobs.py': {'cloudpickle.loads', 'torch.load'}, 'processes.py': {'pickle.load'}}

def unsafe_calls(source):
    "Calls that may execute what is in a file, unless an argument forbids it"
    for o in ast.walk(ast.parse(source)):
        if not isinstance(o, ast.Call): continue
        name, kw = ast.unparse(o.func), {k.arg: ast.unparse(k.value) for k in o.keywords}
        if name.endswith(('.extractall', '.extract')) or name in UNSAFE or kw.get('shell') == 'True' or kw.get(
                'allow_pickle') == 'True':
            # the default since torch 2.6
            if name == 'torch.load' and kw.get('weights_only', 'True') == 'True' and 'pickle_module' not in kw: continue
            if name == 'pickle.loads' and 'pickle.dumps(' in ast.unparse(o): continue
            if name in ('np.load', 'numpy.load') and kw.get('allow_pickle', 'False') == 'False': continue
            yield name

def test_no_code_that_unpickles():
    "Neither package nor notebooks nor tools call what executes a file's content"
    found = {}
    for p in [*(root/'noisyseg').rglob('*.py'), *(root/'.ci').glob('*.py')]:
        found[p.name] = set(unsafe_calls(p.read_text()))
    for p in notebooks():
        cells = [c.source for c in read_nb(p).cells if c.cell_type == 'code' and not c.source.startswith('%%')]
        found[p.name] = {n for c in cells for n in unsafe_calls(re.sub(r'^\s*[%!](?=\w).*$', 'pass', c, flags=re.M))}
    allowed = lambda name: BETWEEN_OWN_PROCESSES.get(re.sub(r'^\w+?_(\w+)\.ipynb$', r'\1.py', name), set())
    assert not {k: v - allowed(k) for k, v in found.items() if v - allowed(k)}

@pytest.mark.parametrize('bad', ['torch.load(f, weights_only=False)', 'np.load(f, allow_pickle=True)',
                                 'pickle.loads(b)', 'eval(text)',
                                 'subprocess.run(c, shell=True)', 'tar.extractall(d)', 'pd.read_pickle(f)'])
def test_no_code_that_unpickles_can_fail(bad): assert list(unsafe_calls(bad))

def test_code_that_is_fine_is_left_alone():
    assert not list(unsafe_calls('torch.load(f, weights_only=True); np.load(f); model.eval(); re.compile("x"); '
                                 'extract(a, b); df.eval'))

class Bomb:
    "Unpickling it writes a file"
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return open, (self.path, 'w')

def bombs(went_off):
    "The same in the forms that a model or an array may have"
    zipped, legacy, array = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({'weight': Bomb(went_off)}, zipped)
    torch.save({'weight': Bomb(went_off)}, legacy, _use_new_zipfile_serialization=False)
    np.save(array, np.array([Bomb(went_off)], object), allow_pickle=True)
    return {'pickle': pickle.dumps(Bomb(went_off)), 'torch': zipped.getvalue(), 'old torch': legacy.getvalue(),
            'array': array.getvalue()}

def readers(folder, content):
    "Functions that read a file with this content as what it is not"
    def as_file(name, read):
        (folder/name).write_bytes(content)
        return lambda: read(folder/name)
    net = nn.Sequential(nn.Conv2d(3, 2, 1)).eval()
    batch = [(torch.rand(1, 3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.long))]
    yield as_file('a.safetensors', load_model)
    yield as_file('b.safetensors', lambda p: load_model(p, net))
    yield as_file('c.safetensors', read_card)
    yield as_file('image.png', read_image)
    yield as_file('mask.png', lambda p: read_mask(p, label_table(2)))
    yield as_file('mask.mat', lambda p: read_mask(p, label_table(2)))
    yield as_file('cifar10.zip', lambda p: ClassFolders(p, 'train'))
    yield as_file('sweep.csv', load_sweep)
    yield as_file('store.csv', lambda p: sweep({'a': net}, batch, MaxGaussian(), levels=[0, 0.1], draws=2, store=p,
                                                     progress=False))
    try: from noisyseg.train.serialization import load_state
    except ImportError: return
    yield as_file('d.safetensors', load_state)

@pytest.mark.parametrize('form', ['pickle', 'torch', 'old torch', 'array'])
def test_a_pickle_is_refused_and_not_executed(tmp_path, form):
    went_off = tmp_path/'went-off'
    content = bombs(went_off)[form]
    n = 0
    for read in readers(tmp_path, content):
        # of a table, lines that are none are left out
        try: assert isinstance(found := read(), pd.DataFrame) and not len(found)
        except ValueError as e: assert str(tmp_path) in str(e) or 'store' in str(e)
        n += 1
    assert n >= 10 and not went_off.exists()
    if form == 'pickle':
        # it does go off when it is unpickled
        with pytest.raises(Exception): pickle.loads(content).no_such_thing()   # noqa: B017
        assert went_off.exists()

def test_cached_weights_are_tensors_only(tmp_path, monkeypatch):
    "ImageNet weights: a file with something else in it in the cache of downloads is not executed"
    from noisyseg.nets.encoders import resnet_encoder
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setattr(torch.hub, '_hub_dir', None)
    from torchvision.models import ResNet18_Weights
    file = tmp_path/'hub'/'checkpoints'/ResNet18_Weights.DEFAULT.url.rpartition('/')[2]
    file.parent.mkdir(parents=True)
    for content in bombs(tmp_path/'went-off').values():
        file.write_bytes(content)
        with pytest.warns(UserWarning, match="ImageNet weights for resnet18 can't be had"):
            resnet_encoder('resnet18', pretrained=True)
    assert not (tmp_path/'went-off').exists()

def test_a_decoded_set_in_the_cache_is_an_array_only(tmp_path):
    "The file of decoded images beside the archives: objects in it are not unpickled, and it is made anew"
    from PIL import Image
    jpg = io.BytesIO()
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(jpg, 'jpeg')
    with zipfile.ZipFile(tmp_path/'a.zip', 'w') as z: z.writestr('train/cat/1.jpg', jpg.getvalue())
    images = ClassFolders(tmp_path/'a.zip', 'train', few=0, cache=tmp_path)
    images.file.write_bytes(bombs(tmp_path/'went-off')['array'])
    assert images[[0]].shape == (1, 32, 32, 3) and not (tmp_path/'went-off').exists()

def test_pictures_that_would_fill_the_memory(tmp_path):
    "A file of some bytes that says it is 60,000 pixels wide; an image of an archive that unpacks to a gigabyte"
    import struct
    import zlib
    def chunk(kind, body):
        return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))
    header = struct.pack('>IIBBBBB', 60_000, 60_000, 8, 2, 0, 0, 0)
    (tmp_path/'large.png').write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header)
                                       + chunk(b'IDAT', zlib.compress(bytes(1000))) + chunk(b'IEND', b''))
    for within in None, (64, 64):
        with pytest.raises(ValueError, match=r'large\.png.*(bomb|pixels)'): read_image(tmp_path/'large.png', within)
    with zipfile.ZipFile(tmp_path/'a.zip', 'w', zipfile.ZIP_DEFLATED) as z:
        z.writestr('train/cat/1.jpg', bytes(3*2**20))
    with pytest.raises(ValueError, match='over a megabyte'): ClassFolders(tmp_path/'a.zip', 'train')


# --- archives and downloads
# ----------------------------------------------------------------------------------------------------------

def tar(path, *members, mode='w:gz'):
    with tarfile.open(path, mode) as t:
        for name, content, kind, to in members:
            m = tarfile.TarInfo(name)
            m.type, m.linkname, m.size = kind, to, len(content)
            t.addfile(m, io.BytesIO(content))
    return path

names = st.lists(st.sampled_from(['..', '.', 'a', 'b', '', '~', 'C:', 'con', '\\..\\x', 'é', 'a b', '-rf', '\u202e',
                                  '*']), min_size=1, max_size=5)
names = names.map('/'.join)
kinds = st.sampled_from([tarfile.REGTYPE]*3 + [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE,
                                               tarfile.FIFOTYPE])

@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(names, st.binary(max_size=5), kinds, names), min_size=1, max_size=6),
       st.sampled_from(['w', 'w:gz', 'w:bz2', 'w:xz', 'zip']))
def test_archives_stay_in_their_folder(members, kind):
    "Whatever the names, links and devices: files come out below the folder, or nothing anywhere"
    import tempfile
    with tempfile.TemporaryDirectory() as home:
        home = noisyseg.data.archives.Path(home)
        (home/'sub').mkdir()
        (home/'secret').write_text('secret')
        if kind == 'zip':
            with zipfile.ZipFile(home/'sub'/'archive', 'w') as z:
                for name, content, k, _ in members:
                    info = zipfile.ZipInfo(name or '/')
                    info.external_attr = {tarfile.SYMTYPE: stat.S_IFLNK, tarfile.CHRTYPE: stat.S_IFCHR,
                                          tarfile.FIFOTYPE: stat.S_IFIFO}.get(k, 0) << 16
                    z.writestr(info, content)
        else:
            tar(home/'sub'/'archive', *((n, c if k == tarfile.REGTYPE else b'', k, to) for n, c, k, to in members),
                mode=kind)
        try: extract(home/'sub'/'archive', home/'sub'/'out')
        except BadArchive: assert not (home/'sub'/'out').exists()
        outside = sorted(p.relative_to(home).as_posix() for p in home.rglob('*')
                         if (home/'sub'/'out') not in (p, *p.parents))
        assert outside == ['secret', 'sub', 'sub/archive'] and (home/'secret').read_text() == 'secret'
        assert all((p.is_file() or p.is_dir()) and not p.is_symlink() for p in home.rglob('*'))
        assert all(stat.S_IMODE(p.stat().st_mode) & 0o7022 == 0 for p in (home/'sub'/'out').rglob('*') if p.is_file())

def test_bombs(tmp_path):
    "Limits on bytes, files and ratio, counted by what comes out and not by what the archive says"
    with zipfile.ZipFile(tmp_path/'ratio.zip', 'w', zipfile.ZIP_DEFLATED) as z: z.writestr('zeros', bytes(50*2**20))
    with zipfile.ZipFile(tmp_path/'many.zip', 'w') as z:
        for i in range(2000): z.writestr(f'{i}', b'')
    tar(tmp_path/'ratio.tgz', ('zeros', bytes(50*2**20), tarfile.REGTYPE, ''))
    with tarfile.open(tmp_path/'name.tgz', 'w:gz') as t: t.addfile(tarfile.TarInfo('x'*20*2**20))
    raw = bytearray((tmp_path/'ratio.zip').read_bytes())
    # it says 10 bytes
    for at in (raw.find(b'PK\x03\x04') + 22, raw.find(b'PK\x01\x02') + 24): raw[at:at + 4] = (10).to_bytes(4, 'little')
    (tmp_path/'lies.zip').write_bytes(raw)
    for name, kw, told in (('ratio.zip', {}, '200 times'), ('ratio.tgz', {}, '200 times'),
                           ('name.tgz', {}, 'headers say 20,971,'),
                           ('lies.zip', {}, 'cannot be extracted'), ('many.zip', dict(max_files=1000), '1,000 files'),
                           ('ratio.zip', dict(max_ratio=1e9, max_gb=0.01), '0.01 GB')):
        with pytest.raises(BadArchive, match=told): extract(tmp_path/name, tmp_path/'out', **kw)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['lies.zip', 'many.zip', 'name.tgz', 'ratio.tgz', 'ratio.zip']
    assert len(list(extract(tmp_path/'many.zip', tmp_path/'out').iterdir())) == 2000

def sparse_tar(path, name, size, form):
    "A tar file that says: `size` bytes, all zero but the last. GNU's old form, or one of the three of POSIX."
    m = tarfile.TarInfo(name)
    if form == 'gnu':
        m.type, m.size = tarfile.GNUTYPE_SPARSE, 1
        b = bytearray(m.tobuf(tarfile.GNU_FORMAT))
        b[386:410] = b'%011o\0%011o\0' % (size - 1, 1)
        b[483:495] = b'%011o\0' % size
        b[148:156] = b' '*8
        b[148:156] = b'%06o\0 ' % sum(b)
        return path.write_bytes(bytes(b) + b'x'.ljust(512, b'\0') + bytes(1024))
    data = b'x'
    m.pax_headers = {'0.0': {'GNU.sparse.size': f'{size}', 'GNU.sparse.numblocks': '1',
                             'GNU.sparse.offset': f'{size - 1}', 'GNU.sparse.numbytes': '1'},
                     '0.1': {'GNU.sparse.size': f'{size}', 'GNU.sparse.map': f'{size - 1},1'},
                     '1.0': {'GNU.sparse.major': '1', 'GNU.sparse.minor': '0', 'GNU.sparse.name': name,
                             'GNU.sparse.realsize': f'{size}'}}[form]
    if form == '1.0': data = f'1\n{size - 1}\n1\n'.encode().ljust(512, b'\0') + data
    m.size = len(data)
    with tarfile.open(path, 'w', format=tarfile.PAX_FORMAT) as t: t.addfile(m, io.BytesIO(data))

@pytest.mark.parametrize('form', ['gnu', '0.0', '0.1', '1.0'])
def test_sparse_tars_count_as_they_are_written(tmp_path, form):
    "Ten kilobytes that stand for gigabytes of zeros: nothing of them is written. Within the limit they come out right."
    written = []
    sparse_tar(tmp_path/'big.tar', 'zeros', 2**33 - 1, form)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(noisyseg.data.archives, 'open', lambda p, mode: written.append(p) if 'x' in mode else open(p, mode),
                  raising=False)
        with pytest.raises(BadArchive, match='raise `max_gb=`'): extract(tmp_path/'big.tar', tmp_path/'out')
    assert not written and [p.name for p in tmp_path.iterdir()] == ['big.tar']
    sparse_tar(tmp_path/'small.tar', 'zeros', 100_000, form)
    out = extract(tmp_path/'small.tar', tmp_path/'out')
    data = (out/'zeros').read_bytes()
    assert len(data) == 100_000 and not any(data[:-1])

def test_long_headers_are_not_read_into_memory(tmp_path):
    "A name or a note of a gigabyte is refused when its header says so; so are sizes below zero."
    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE):
        m = tarfile.TarInfo('x')
        m.type, m.size = kind, 2**30
        (tmp_path/'a.tar').write_bytes(m.tobuf(tarfile.GNU_FORMAT) + bytes(2**16))
        with pytest.raises(BadArchive, match='1,073,741,824 bytes'): extract(tmp_path/'a.tar', tmp_path/'out')
    m = tarfile.TarInfo('x')
    m.size = -1
    (tmp_path/'a.tar').write_bytes(m.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(BadArchive): extract(tmp_path/'a.tar', tmp_path/'out')

def test_a_zip_that_says_it_is_too_large_is_refused_before_it_is_written(tmp_path):
    with zipfile.ZipFile(tmp_path/'a.zip', 'w', zipfile.ZIP_DEFLATED) as z: z.writestr('zeros', bytes(5*2**20))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(noisyseg.data.archives, 'open', lambda *a: pytest.fail('it was written'), raising=False)
        with pytest.raises(BadArchive, match='200 times'): extract(tmp_path/'a.zip', tmp_path/'out')

# in processes that are killed later and later, until one has come to its end
EXTRACT = '''
import os, signal, sys, time
from noisyseg.data.archives import extract
for i in range(4):
    pid = os.fork()
    if not pid:
        extract(*sys.argv[1:])
        os._exit(0)
    time.sleep(0.02 + 0.07*i)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    if os.path.exists(sys.argv[2]):
        assert len(os.listdir(f'{sys.argv[2]}/set')) == 3000
        break
    print('cut')
'''

def test_extraction_is_whole_or_not_at_all(server, tmp_path):
    "Killed anywhere: the folder is not there, and another time all of it is"
    tar(tmp_path/'a.tar', *((f'set/{i:04}', bytes(1000), tarfile.REGTYPE, '') for i in range(3000)), mode='w')
    [(status, said)] = server.script(EXTRACT, tmp_path, {}, args=[tmp_path/'a.tar', tmp_path/'out'])
    assert status == 0 and 'cut' in said.splitlines(), said
    if not (tmp_path/'out').exists(): extract(tmp_path/'a.tar', tmp_path/'out', max_ratio=10)
    assert len(list((tmp_path/'out'/'set').iterdir())) == 3000

def test_a_download_that_is_another_file(tmp_path):
    "Refused, and nothing of it kept; the right one is kept, and not fetched again"
    (tmp_path/'www').mkdir()
    archive = tar(tmp_path/'www'/'a.tgz', ('set/file', b'content', tarfile.REGTYPE, ''))
    right, home = hashlib.md5(archive.read_bytes()).hexdigest(), tmp_path/'home'
    with served(tmp_path/'www') as url:
        assert (fetch_and_extract(f'{url}/a.tgz', home/'set', inside='set', md5=right)
                /'file').read_bytes() == b'content'
        assert [p.name for p in home.iterdir()] == ['set']
        whole = archive.read_bytes()
        for other in (whole[:-1], whole + b'x', b'', b'<html>'):
            archive.write_bytes(other)
            with pytest.raises(BadArchive, match='another file than the one that is meant'):
                fetch_and_extract(f'{url}/a.tgz', home/'other', md5=right)
        assert [p.name for p in home.iterdir()] == ['set']
        with pytest.raises(urllib.error.HTTPError): fetch(f'{url}/nothing', home/'file', md5=right)
        archive.write_bytes(whole)
        kept = fetch(f'{url}/a.tgz', home/'a.tgz', md5=right)
    assert fetch(f'{url}/a.tgz', kept, md5=right) == kept       # the server is gone
    for address in ('file:///etc/passwd', 'ftp://host/a', 'a.tgz'):
        with pytest.raises(ValueError, match='https://'): fetch(address, home/'x', md5=right)
    with pytest.raises(ValueError, match='give the digest'): fetch('https://host/a', home/'x')

@pytest.mark.parametrize('to', ['ftp://127.0.0.1/a', 'file:///etc/passwd', 'data:,x', '//127.0.0.1:9/a', 'gopher://x/'])
def test_redirections(tmp_path, to):
    "A server may send us elsewhere, but only by http or https, and not from https to http."
    class Sends(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(302)
            self.send_header('Location', '/there' if self.path == '/here' else to)
            self.end_headers()
        def log_message(self, *args): pass
    with http.server.HTTPServer(('127.0.0.1', 0), Sends) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f'http://127.0.0.1:{server.server_port}/here'
        with pytest.raises((ValueError, urllib.error.URLError)) as e: fetch(address, tmp_path/'a', md5='0'*32)
        server.shutdown()
    if not to.startswith('//'): assert to in str(e.value) or 'https://' in str(e.value)
    assert not list(tmp_path.iterdir())
    secure = urllib.request.Request('https://example.org/a')
    with pytest.raises(ValueError, match='not encrypted'):
        noisyseg.data.archives._Redirects().redirect_request(secure, None, 302, 'Found', {}, 'http://example.org/a')

def test_every_download_has_a_digest(tmp_path, monkeypatch):
    "Each set of images that can be downloaded is asked for with a digest, over https where its publisher offers it"
    asked = []
    def refuse(url, folder, inside='', **digest):
        asked.append((url, digest))
        raise OSError('not today')
    monkeypatch.setenv('NOISYSEG_DATA', str(tmp_path))
    monkeypatch.setenv('FASTAI_HOME', str(tmp_path/'fastai'))
    monkeypatch.setattr(data, 'fastai_path', lambda _: tmp_path/'fastai')
    monkeypatch.setattr(data, 'fetch_and_extract', refuse)
    monkeypatch.setattr('noisyseg.data.cifar.fetch_and_extract', refuse)
    for f in (data.camvid, data.sbd, cifar10, *(functools.partial(data.voc, year=y) for y in range(2007, 2013))):
        with pytest.raises(MissingData, match='not today'): f()
    assert len(asked) == 9 and {URLs.CIFAR, SBDataset.url, DATASET_YEAR_DICT['2012']['url']} <= {u for u, _ in asked}
    for url, digest in asked:
        (kind, value), = digest.items()
        assert re.fullmatch({'md5': '[0-9a-f]{32}', 'sha256': '[0-9a-f]{64}'}[kind], value), url


# --- nothing listens
# -------------------------------------------------------------------------------------------------------------------

def test_nothing_listens():
    "No code of the package opens a port"
    for p in (root/'noisyseg').rglob('*.py'):
        text = p.read_text()
        assert ('0.0.0.0' not in text
                and not re.search(r'\.listen\(|HTTPServer|socketserver|create_server|serve_forever', text)), p.name
        assert not re.search(r'socket\.(socket(?!\.connect\b)|create_server|create_connection)', text), p.name
    makefile = (root/'Makefile').read_text()
    assert '--ServerApp.ip=127.0.0.1' in makefile and not re.search(
            r'token|password|allow_origin|disable_check_xsrf|ip=(0\.0|\*)', makefile, re.I)

def test_make_lab_is_for_this_machine_alone(tmp_path):
    "The very command of `make lab`: it listens on 127.0.0.1 only, and says nothing to who has no token"
    import psutil
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    line = next(o for o in subprocess.run(['make', '-n', 'lab'], cwd=root, capture_output=True,
                                          text=True).stdout.splitlines() if 'jupyterlab' in o)
    words = shlex.split(line)                # it begins with the folder of the data, where there is one
    cmd = [sys.executable, *words[words.index('-m'):], '--no-browser', f'--ServerApp.port={port}',
           '--ServerApp.port_retries=0', '--allow-root']
    folders = {f'JUPYTER_{o}_DIR': str(tmp_path/o) for o in ('CONFIG', 'DATA', 'RUNTIME')}
    env = {k: v for k, v in os.environ.items() if k != 'JUPYTER_TOKEN'} | folders | {
            'JUPYTERLAB_SETTINGS_DIR': str(tmp_path), 'JUPYTER_PREFER_ENV_PATH': '1'}
    with open(tmp_path/'log', 'w') as log: p = subprocess.Popen(cmd, cwd=root, env=env, stdout=log, stderr=log)
    try:
        for _ in range(900):
            assert p.poll() is None, (tmp_path/'log').read_text()
            try: socket.create_connection(('127.0.0.1', port), 1).close()
            except OSError: time.sleep(0.1)
            else: break
        listening = {c.laddr for q in [psutil.Process(p.pid), *psutil.Process(p.pid).children(True)]
                     for c in q.net_connections() if c.status == 'LISTEN'}
        assert listening and {a.ip for a in listening} == {'127.0.0.1'}, listening
        for path in ('api/contents', 'api/kernels', 'api/terminals'):
            for token in ('', f'?token={secrets.token_hex(8)}'):
                with pytest.raises(urllib.error.HTTPError) as e:
                    urllib.request.urlopen(f'http://127.0.0.1:{port}/{path}{token}')
                assert e.value.code == 403
        token = re.search(r'token=([0-9a-f]{32,})', (tmp_path/'log').read_text())[1]
        assert json.load(urllib.request.urlopen(f'http://127.0.0.1:{port}/api/kernels?token={token}')) == []
    finally:
        p.terminate()
        p.wait(180)   # on a busy machine


# --- names are text
# --------------------------------------------------------------------------------------------------------------------

EVIL = ['<script>window.pwned=1</script>', '"><img src=x onerror="window.pwned=2">',
        '</script><script>window.pwned=3</script>', "'-(window.pwned=4)-'",
        '<!--<script>', '<svg onload=window.pwned=5>', '{{window.pwned=6}}',
        '<a href="javascript:window.pwned=7">click</a>']

@pytest.fixture(scope='module')
def page(tmp_path_factory):
    browser_path()
    with browser_page(tmp_path_factory.mktemp('profile')) as page: yield page

def opened(page, file):
    page.complaints.clear()
    page.goto(file.as_uri() if not isinstance(file, str) else file)
    page.wait_for_timeout(700)

def harmless(page, selector='body'):
    "Nothing was executed, also not when every link is pressed; the text that is seen"
    page.evaluate("document.querySelectorAll('a').forEach(a => { if (a.getAttribute('href')?.startsWith('javascript')) "
                  "a.click() })")
    assert page.evaluate('window.pwned') is None
    assert not page.complaints
    assert not page.evaluate("document.querySelectorAll('img[src=x], svg[onload]').length")
    return page.evaluate("""s => document.querySelector(s).innerText
        + ' ' + [...document.querySelectorAll('text')].map(t => t.textContent).join(' ')
        + ' ' + [...document.querySelectorAll('option')].map(o => o.textContent).join(' ')""", selector)

class Net(nn.Module):
    def __init__(self): super().__init__(); self.c = nn.Conv2d(3, len(EVIL), 1)
    def forward(self, x): return self.c(x)

def test_names_are_text_in_the_explorer(tmp_path, page):
    "Models, classes, layers and sets of weights, in a saved page and in a site"
    batch = torch.rand(2, 3, 16, 16), torch.randint(0, len(EVIL), (2, 16, 16))
    nets = {}
    for n in EVIL[:2]: nets[n] = Net().eval()
    e = NoiseExplorer(nets, batch, classes=EVIL, wheres={n: lambda name, module, weight: True for n in EVIL}, samples=2)
    e.to_html(tmp_path/'page.html')
    e.to_site(tmp_path/'site', samples=[0], seeds=[0])
    opened(page, tmp_path/'page.html')
    seen = [harmless(page)]
    with served(tmp_path/'site') as url:
        opened(page, f'{url}/index.html')
        seen.append(harmless(page))
    for text in seen: assert all(n in text for n in EVIL), [n for n in EVIL if n not in text]
    source = (root/'noisyseg'/'show'/'explorer.js').read_text()
    assert not re.search(r'innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function', source)

def test_names_are_text_in_reports(tmp_path, page):
    "Title, headings, texts, tables, facts and figures"
    df = pd.DataFrame({n: [n] for n in EVIL}, index=pd.Index([EVIL[0]], name=EVIL[1]))
    fig = go.Figure([go.Scatter(x=[0, 1], y=[i, 1], name=n, text=[n, n], mode='lines+text') for i,
                     n in enumerate(EVIL)])
    fig.update_layout(height=900, title=EVIL[0], xaxis_title=EVIL[1])
    items = [(EVIL[2], ' '.join(EVIL)), df, df[EVIL[0]], fig, ('picture', np.zeros((8, 8, 3), np.uint8))]
    file = report_html(items, tmp_path/'<img src=x onerror=alert(1)>.html', EVIL[0], {n: n for n in EVIL})
    page.set_viewport_size(dict(width=1300, height=2000))
    opened(page, file)
    text = harmless(page)
    assert all(text.count(n) >= 3 for n in EVIL if n in ' '.join(EVIL))
    assert page.title() == EVIL[0]

def test_names_are_text_in_the_monitor(tmp_path, page):
    x, y = torch.rand(1, 3, 8, 8), torch.arange(64).reshape(1, 8, 8) % len(EVIL)
    masks = {n: y[0].numpy() for n in EVIL}
    body = _sample_html(x, y, masks, {n: n for n in EVIL}, [(i, i, i) for i in range(len(EVIL))], EVIL, None, None)
    (tmp_path/'page.html').write_text(f'<!doctype html><meta charset="utf-8"><body>{body}</body>')
    opened(page, tmp_path/'page.html')
    text = harmless(page)
    assert all(text.count(n) >= 3 for n in EVIL)
