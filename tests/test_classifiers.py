"Classifiers and their data: counts, checkpoints, CIFAR's archives, and labels in sweeps."
import io
import json
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from pandas.testing import assert_frame_equal
from PIL import Image
from torch import nn
from torch.nn import functional as F

from noisyseg.data.cifar import ClassFolders, ImageSet, cifar10, crop_and_flip, gratings
from noisyseg.nets.classifiers import SmallResNet, resnet18_small, resnet20
from noisyseg.measure.evaluation import Batches, scores
from noisyseg.perturb.laws import MaxGaussian
from noisyseg.data.files import MissingData, data_root
from noisyseg.perturb.selectors import conv_and_linear
from noisyseg.measure.summary import summarise
from noisyseg.measure.sensitivity import layer_sensitivity
from noisyseg.measure.store import load_sweep
from noisyseg.measure.sweeps import sweep
from noisyseg.train.checkpoints import load_model, read_card, save_model

names = 'airplane automobile bird cat deer dog frog horse ship truck'.split()


def archive(path, seed=0, classes=names, kind='png', **per_class):
    rng = np.random.default_rng(seed)
    with zipfile.ZipFile(path, 'w') as z:
        for split, n in per_class.items():
            for c in classes:
                for i in range(n):
                    out = io.BytesIO()
                    Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(out, kind)
                    z.writestr(f'{split}/{c}/{i:03}.{kind}', out.getvalue())
    return path


@pytest.fixture
def folder(tmp_path):
    archive(tmp_path/'cifar10.zip', train=8, test=4)
    return tmp_path


# --- networks -------------------------------------------------------------------------------------------------------
# --------------

def test_published_sizes():
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert count(resnet20()) == 269_722 and count(resnet18_small()) == 11_173_962 and len(
            conv_and_linear.names(resnet20())) == 20


def test_option_a_against_a_plain_reference():
    "The whole ResNet-20 once more, functionally, from its state dict."
    torch.manual_seed(0)
    net = resnet20().eval()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1), m.running_var.uniform_(0.5, 2), m.weight.data.normal_(1,
                    0.1), m.bias.data.normal_(0, 0.1)
    s = net.state_dict()
    bn = lambda x, k: F.batch_norm(x, *(s[f'{k}.{n}'] for n in ('running_mean', 'running_var', 'weight', 'bias')))
    x = images = torch.randn(2, 3, 32, 32)
    x = bn(F.conv2d(x, s['conv1.weight'], padding=1), 'bn1').relu()
    for stage in (1, 2, 3):
        for block in range(3):
            k, stride = f'layer{stage}.{block}', 2 if stage > 1 and block == 0 else 1
            out = bn(F.conv2d(x, s[f'{k}.conv1.weight'], stride=stride, padding=1), f'{k}.bn1').relu()
            out = bn(F.conv2d(out, s[f'{k}.conv2.weight'], padding=1), f'{k}.bn2')
            if stride == 2:
                new = torch.zeros_like(out)
                new[:, x.shape[1] // 2:x.shape[1] // 2 + x.shape[1]] = x[:, :, ::2, ::2]
                x = new
            x = (out + x).relu()
    expected = x.mean((2, 3)) @ s['fc.weight'].T + s['fc.bias']
    with torch.no_grad(): torch.testing.assert_close(net(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('make', [lambda: resnet20(7, 1, 'B', width=4), lambda: resnet18_small(5, width=4), resnet20])
def test_checkpoints_rebuild_them(tmp_path, make):
    net = make().eval()
    save_model(net, tmp_path/'net', half=False)
    again = load_model(tmp_path/'net')
    x = torch.randn(2, net.in_channels, 16, 16)
    with torch.no_grad(): assert torch.equal(again(x), net(x))
    assert again.recipe == net.recipe == json.loads((tmp_path/'net.json').read_text())['architecture']


def test_own_sizes_have_no_factory(tmp_path):
    path = save_model(SmallResNet(3, blocks=(1,), width=2), tmp_path/'own')
    with pytest.raises(ValueError, match='pass it as model='): load_model(path)


# --- CIFAR ----------------------------------------------------------------------------------------------------------
# --------------

def reference_crop(x, shift, flip, pad):
    "One image: pad, cut, mirror"
    x = F.pad(x, (pad,) * 4)[:, shift[0]:shift[0] + x.shape[1], shift[1]:shift[1] + x.shape[2]]
    return x.flip(-1) if flip else x


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(0, 4),
       st.integers(0, 99))
def test_crops_are_those_of_single_images(b, c, h, w, pad, seed):
    g = torch.Generator().manual_seed(seed)
    x, shift = torch.randint(0, 256, (b, c, h, w), generator=g, dtype=torch.uint8), torch.randint(0, 2 * pad + 1,
            (b, 2), generator=g)
    flip = torch.rand(b, generator=g) < 0.5
    assert torch.equal(crop_and_flip(x, shift, flip, pad), torch.stack([reference_crop(*o, pad)
            for o in zip(x, shift, flip)]))


def test_archives_and_folders(folder):
    file = folder/'cifar10.zip'
    zipped = ClassFolders(file, 'train', cache=folder/'cache')
    assert len(zipped) == 80 and zipped.labels.tolist() == sorted(zipped.labels.tolist())
    with zipfile.ZipFile(file) as z:
        by_name = {n: np.asarray(Image.open(io.BytesIO(z.read(n)))) for n in z.namelist() if n.startswith('train/')}
        z.extractall(folder/'inner')
    expected = np.stack([by_name[n] for n in sorted(by_name)])
    assert np.array_equal(zipped[range(80)], expected)
    assert np.array_equal(ClassFolders(folder/'inner', 'train', cache=folder/'cache')[range(80)], expected)
    zipped.few = 10
    assert np.array_equal(zipped[[7, 79, 7]], expected[[7, 79, 7]]) and not (folder/'cache').exists()
    assert np.array_equal(zipped[range(80)], expected) and len(list((folder/'cache').iterdir())) == 1
    # another archive of the same name and size meets no old pixels
    archive(file, 9, train=8, test=4)
    again = ClassFolders(file, 'train', few=0, cache=folder/'cache')
    assert not np.array_equal(again[range(80)], expected) and not list((folder/'cache').glob('.*'))


def test_an_archive_may_hold_the_set_in_a_folder_of_its_own(folder):
    with zipfile.ZipFile(folder/'cifar10.zip') as a, zipfile.ZipFile(folder/'b.zip', 'w') as b:
        for n in a.namelist(): b.writestr(f'cifar10/{n}', a.read(n))
    a, b = (cifar10(folder/n, n_valid=20, seed=0).train_ds.x for n in ('cifar10.zip', 'b.zip'))
    assert torch.equal(a, b)


def test_a_cache_that_cannot_be_written_costs_nothing_else(folder):
    (folder/'cache').write_text('a file where the folder should be')
    images = ClassFolders(folder/'cifar10.zip', 'test', few=0, cache=folder/'cache')
    assert images[[0]].shape == (1, 32, 32, 3)


def test_test_images_choose_nothing(folder):
    dls = cifar10(folder, n_valid=20, bs=8, seed=0)
    train, valid, test = ({t.numpy().tobytes() for t in dl.dataset.x} for dl in dls.loaders)
    assert (len(train), len(valid), len(test)) == (60, 20, 40)
    assert not train & valid and not train & test and not valid & test
    assert dls.test is dls[2] and not dls.valid.dataset.augment and not dls.test.dataset.augment


def test_learner_and_card(folder, tmp_path):
    from fastai.learner import Learner
    dls = cifar10(folder, n_valid=20, bs=8, seed=0, device='cpu')
    learn = Learner(dls, resnet20(dls.n_classes, width=2), nn.CrossEntropyLoss())
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    card = read_card(save_model(learn, tmp_path/'net', dataset=dls.about))
    assert card['classes'] == names and card['dataset'] == 'CIFAR-10' and card['normalisation'][
            'mean'] == list(dls.stats[0])
    df = sweep(learn.model, dls.test, MaxGaussian(), levels=[0, 0.1], draws=2, progress=False)
    assert list(df['class'].unique()) == [*names, '']


def test_jpegs_are_not_the_original(folder):
    archive(folder/'cifar10.zip', kind='jpeg', train=8, test=4)
    assert 'harder than the original' in cifar10(folder, n_valid=20).about


def test_missing(tmp_path, monkeypatch):
    monkeypatch.setenv('NOISYSEG_DATA', str(tmp_path))
    monkeypatch.setenv('FASTAI_HOME', str(tmp_path/'fastai'))
    with pytest.raises(MissingData, match='cifar10 is not on this machine'): cifar10(download=False)


def test_real_archives():
    root = data_root()
    if root is None or not (root/'cifar10').is_dir(): pytest.skip('CIFAR-10 is not on this machine')
    dls = cifar10(subset=200, n_valid=100, bs=20, seed=0)
    assert [len(d.dataset) for d in dls.loaders] == [200, 100, 10_000] and dls.vocab == names
    x, y = dls.one_batch()
    # not decoded before it is asked for
    assert x.shape == (20, 3, 32, 32) and 0.3 < x.std() < 2 and dls.test.dataset._x is None
    assert np.bincount(cifar10(n_valid=5000).train_ds.labels).tolist() == [4500] * 10


def test_gratings_can_be_learnt_from():
    dls = gratings(100, 20, 20, size=16, bs=10, device='cpu')
    x, y = next(iter(dls.valid))
    assert x.shape == (10, 3, 16, 16) and y.tolist() == list(range(10))
    again = ImageSet(dls.train_ds.images, dls.train_ds.labels, range(100), dls.vocab, dls.stats)
    assert torch.equal(again.x, dls.train_ds.x)


# --- labels in sweeps
# -------------------------------------------------------------------------------------------------------------

def labelled(n=3):
    g = torch.Generator().manual_seed(1)
    return [(torch.rand(5, 3, 8, 8, generator=g), torch.randint(0, 4, (5,), generator=g)) for _ in range(n)]


def net(seed=0):
    torch.manual_seed(seed)
    return SmallResNet(4, blocks=(1, 1), width=4)


def test_sweep_of_labels(tmp_path):
    dl, models = labelled(), {'a': net(0), 'b': net(1)}
    args = dict(dl=dl, disturbances=MaxGaussian(per='tensor'), levels=[0, 0.2, 0.5], draws=3, where=conv_and_linear,
                progress=False)
    df = sweep(models, **args)
    assert list(df['metric'].unique()) == ['recall', 'balanced accuracy', 'accuracy'] and df['n_pixels'].max() == 15
    x, y = (torch.cat(t) for t in zip(*dl))
    with torch.no_grad(): right = (models['a'].eval()(x).argmax(1) == y).float()
    clean = df.query("model == 'a' and level == 0").set_index(['metric', 'class'])['value']
    assert clean['accuracy', ''] == pytest.approx(right.mean().item())
    for c in range(4): assert clean['recall', str(c)] == pytest.approx(right[y == c].mean().item())
    assert clean['balanced accuracy', ''] == pytest.approx(np.mean([right[y == c].mean() for c in range(4)]))
    stored = sweep({'a': models['a']}, store=tmp_path/'s.csv', **args)
    # extended, not measured again
    assert_frame_equal(sweep(models, store=tmp_path/'s.csv', **args), df, check_exact=True)
    assert len(load_sweep(tmp_path/'s.csv')) == len(df) == 2 * len(stored)
    assert summarise(df, metric='accuracy')['n'].tolist() == [1, 3, 3, 1, 3, 3]
    sens = layer_sensitivity(models['a'], dl, MaxGaussian(0.3), draws=2, progress=False)
    assert {'none', 'conv1', 'layer1'} <= set(sens['group']) | {g.split('.')[0] for g in sens['group']}


def test_what_a_label_may_be():
    x, y = labelled(1)[0]
    for bad in (y[:3], y[:, None], y[:, None, None]):
        with pytest.raises(ValueError, match='labels'): Batches([(x, bad)])
    with pytest.raises(TypeError, match=r'labels \(batch,\) of class numbers'): Batches([(x, y.float())])
    with pytest.raises(ValueError, match=r'\(batch, classes\) for labels'): scores(nn.Conv2d(3, 4, 1), [(x, y)], 'abcd')
    binary = nn.Sequential(net(), nn.Linear(4, 1)).eval()
    assert [r[0] for r in scores(binary, [(x, y.clamp(max=1))], 'ab')] == ['recall', 'recall', 'balanced accuracy',
            'accuracy']
