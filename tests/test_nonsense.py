"""Nonsense at the public functions: an error each, which says what came, what was expected, and what mends it.

A line of a table is a call that somebody makes by mistake. Add yours: the name, and the call."""
import re
from functools import cache

import pandas as pd
import pytest
import torch
from torch import nn

import noisyseg as ns
from noisyseg.data.semi_supervised import semi_folder, semi_scenes
from noisyseg.measure.sensitivity import layer_sensitivity
from noisyseg.measure.store import load_sweep
from noisyseg.measure.sweeps import sweep
from noisyseg.mend.protection import measured_costs, predicted_costs
from noisyseg.mend.smoothing import certified_mask
from noisyseg.mend.tolerances import misses_allowed
from noisyseg.nets.unet3plus import unet3plus_slim
from noisyseg.perturb.quantization import quantized
from noisyseg.perturb.selectors import select
from noisyseg.train.methods.mlpmatch import semi_learner
from noisyseg.train.noise import AccumulatingNoise

# what mends it: code in backticks, a call, or an argument by its name
MEND = re.compile(r'`[^`]+`|\b[\w.]+\([^)]*\)|\b\w+=')


@cache
def net(): return ns.unet3plus_tiny(3).eval()

@cache
def dls(): return ns.scenes(n_train=4, n_valid=4, size=32, bs=2)

@cache
def learn(): return ns.segmentation_learner(dls())

@cache
def frame():
    return sweep({'a': net7()}, dls().valid, ns.MaxGaussian(), levels=[0, 0.1], draws=2, progress=False)

@cache
def net7(): return ns.unet3plus_tiny(7).eval()

law = ns.MaxGaussian(0.1)
x = torch.rand(1, 3, 32, 32)
nan = float('nan')

MODULES = {
    'a class': lambda f: f(nn.Conv2d), 'a Learner': lambda f: f(learn()), 'None': lambda f: f(None),
    'a path': lambda f: f('net.safetensors'), 'a factory': lambda f: f(ns.unet3plus_tiny), 'a number': lambda f: f(3),
    'a state dict': lambda f: f(net().state_dict()), 'no weights': lambda f: f(nn.ReLU())}
TAKE_MODULES = {
    'perturbed': lambda m: ns.perturbed(m, law).__enter__(), 'clone_weights': lambda m: ns.clone_weights(m),
    'select': lambda m: select(m), 'quantized': lambda m: quantized(m),
    'layer_sensitivity': lambda m: layer_sensitivity(m, dls().valid, law),
    'SAM': lambda m: ns.SAM(torch.optim.SGD(net().parameters(), 0.1), m)}

NONSENSE = {
    'perturbed: a number for a law': lambda: ns.perturbed(net(), 0.1).__enter__(),
    'perturbed: a law as a class': lambda: ns.perturbed(net(), ns.MaxGaussian).__enter__(),
    'perturbed: a word for a law': lambda: ns.perturbed(net(), 'gaussian').__enter__(),
    'perturbed: where is a number': lambda: ns.perturbed(net(), law, where=3).__enter__(),
    'perturbed: where finds nothing': lambda: ns.perturbed(net(), law, where='nothing.*').__enter__(),
    'perturbed: another gradient': lambda: ns.perturbed(net(), law, gradient='clean').__enter__(),
    'perturbed: a word for a seed': lambda: ns.perturbed(net(), law, generator='seed').__enter__(),
    'perturbed: another rng': lambda: ns.perturbed(net(), law, rng='fast').__enter__(),
    'select: a list': lambda: select(net(), ['a']),
    'select: an empty pattern': lambda: select(net(), ''),
    'MaxGaussian: negative': lambda: ns.MaxGaussian(-0.1),
    'MaxGaussian: nan': lambda: ns.MaxGaussian(nan),
    'MaxGaussian: a word': lambda: ns.MaxGaussian('5 %'),
    'MaxGaussian: None': lambda: ns.MaxGaussian(None),
    'MaxGaussian: another grain': lambda: ns.MaxGaussian(0.1, per='layer'),
    'MaxGaussian: alpha below zero': lambda: ns.MaxGaussian(0.1, alpha=-1),
    'AbsoluteGaussian: a list': lambda: ns.AbsoluteGaussian([0.1]),
    'RelativeGaussian: negative': lambda: ns.RelativeGaussian(-1),
    'MultiplicativeGaussian: nan': lambda: ns.MultiplicativeGaussian(nan),
    'Quantize: 64 bits': lambda: ns.Quantize(64),
    'Quantize: negative': lambda: ns.Quantize(-4),
    'Quantize: a word': lambda: ns.Quantize('int8'),
    'quantized: another law': lambda: quantized(net(), law),
    'compose: nothing': lambda: ns.compose(),
    'compose: a number': lambda: ns.compose(law, 3),
    'Corruption: unknown': lambda: ns.Corruption('rain'),
    'Corruption: severity 9': lambda: ns.Corruption('fog', 9),
    'Corruption: a share': lambda: ns.Corruption('fog', 0.5),
    'scenes: a negative number': lambda: ns.scenes(n_train=-1),
    'scenes: size 0': lambda: ns.scenes(size=0),
    'scenes: a batch of none': lambda: ns.scenes(bs=0),
    'scenes: an unknown class': lambda: ns.scenes(classes=('disc', 'cat')),
    'custom_masks: no such folder': lambda: ns.custom_masks('nowhere', 'nowhere', ['a', 'b']),
    'custom_masks: None': lambda: ns.custom_masks(None, None, ['a', 'b']),
    'semi: more than there are': lambda: ns.semi(dls(), n=1000),
    'semi: no loaders': lambda: ns.semi(net(), n=2),
    'semi_scenes: negative': lambda: semi_scenes(n_labelled=-1),
    'semi_folder: no such folder': lambda: semi_folder('nowhere', 'nowhere', ['a', 'b']),
    'UNet3Plus: a word for an encoder': lambda: ns.UNet3Plus('resnet34', 3),
    'unet3plus_tiny: no classes': lambda: ns.unet3plus_tiny(0),
    'unet3plus_tiny: names for a number': lambda: ns.unet3plus_tiny(['cat', 'dog']),
    'unet3plus_tiny: a grey image': lambda: net()(torch.rand(1, 1, 32, 32)),
    'unet3plus_tiny: one image without a batch': lambda: net()(torch.rand(3, 32, 32)),
    'unet3plus_slim: negative': lambda: unet3plus_slim(-2),
    'deeplabv3plus: an unknown encoder': lambda: ns.deeplabv3plus(3, encoder='resnet19'),
    'deeplabv3plus: stride 7': lambda: ns.deeplabv3plus(3, encoder='resnet18', output_stride=7),
    'resnet20: another shortcut': lambda: ns.resnet20(shortcut='C'),
    'sweep: a word for a model': lambda: ns.sweep('net', dls().valid, law, levels=[0, 0.1]),
    'sweep: no models': lambda: ns.sweep({}, dls().valid, law, levels=[0, 0.1]),
    'sweep: no draws': lambda: ns.sweep({'a': net7()}, dls().valid, law, levels=[0, 0.1], draws=0),
    'sweep: a number for a law': lambda: ns.sweep({'a': net7()}, dls().valid, 0.1, levels=[0, 0.1]),
    'sweep: no levels': lambda: ns.sweep({'a': net7()}, dls().valid, law, levels=[]),
    'sweep: data shuffled': lambda: ns.sweep({'a': net7()}, dls().train, law, levels=[0, 0.1], draws=1),
    'robustness_card: a path for a model': lambda: ns.robustness_card('net.safetensors', dls().valid),
    'robustness_card: a word for a disturbance': lambda: ns.robustness_card({'a': net7()}, dls().valid, ['rain']),
    'robustness_card: levels of what is not asked': lambda: ns.robustness_card(
        {'a': net7()}, dls().valid, law, levels={'rain': 3}),
    'tolerance: too few chips': lambda: ns.tolerance(net7(), dls().valid, law, chips=10),
    'tolerance: a loss of 2': lambda: ns.tolerance(net7(), dls().valid, law, drop=2),
    'tolerance: data shuffled': lambda: ns.tolerance(net7(), dls().train, law),
    'misses_allowed: 95 %': lambda: misses_allowed(29, confidence=95),
    'sensitivity: a number for a law': lambda: ns.sensitivity(net7(), dls().valid, 0.1),
    'sensitivity: at level nothing': lambda: ns.sensitivity(net7(), dls().valid, law.at(0.)),
    'sensitivity: measured in points': lambda: ns.sensitivity(net7(), dls().valid, law, of='points'),
    'sensitivity: one group of channels': lambda: ns.sensitivity(net7(), dls().valid, law, channels=1),
    'until: five points of a hundred': lambda: ns.until(half=5),
    'until: two draws': lambda: ns.until(half=0.01, least=2),
    'protect: costs that are guessed': lambda: ns.protect(net7(), dls().valid, law, costs='guessed'),
    'protect: by weight': lambda: ns.protect(net7(), dls().valid, law, by='weight'),
    'protect: a budget of 5': lambda: ns.protect(net7(), dls().valid, law, budget=5),
    'protect: at level nothing': lambda: ns.protect(net7(), dls().valid, law.at(0.), progress=False),
    'measured_costs: a number for a law': lambda: measured_costs(net7(), dls().valid, 0.1),
    'predicted_costs: a corruption': lambda: predicted_costs(net7(), dls().valid, ns.Corruption('fog')),
    'rescue: no noise': lambda: ns.rescue(net7(), torch.rand(4, 3, 32, 32)),
    'rescue: one picture': lambda: ns.rescue(net7(), torch.rand(3, 32, 32)),
    'rescue: no norms': lambda: ns.rescue(nn.Conv2d(3, 3, 1), torch.rand(4, 3, 32, 32)),
    'rescued: a list': lambda: ns.rescued(law, [torch.rand(3, 32, 32)]),
    'rescued: a number for a disturbance': lambda: ns.rescued(0.1, torch.rand(4, 3, 32, 32)),
    'harden: at level nothing': lambda: ns.harden(net7(), dls(), law.at(0.)),
    'harden: no minutes': lambda: ns.harden(net7(), dls(), law, minutes=0),
    'harden: a corruption': lambda: ns.harden(net7(), dls(), ns.Corruption('fog')),
    'certified_mask: few draws': lambda: certified_mask(net7(), torch.rand(1, 3, 32, 32), draws=3),
    'certified_mask: half': lambda: certified_mask(net7(), torch.rand(1, 3, 32, 32), tau=0.5),
    'load_sweep: no such file': lambda: load_sweep('nowhere.csv'),
    'load_sweep: None': lambda: load_sweep(None),
    'summarise: a dict': lambda: ns.summarise({'a': 1}),
    'summarise: another metric': lambda: ns.summarise(frame(), metric='dice'),
    'summarise: 95 %': lambda: ns.summarise(frame(), confidence=95),
    'summarise: no rows': lambda: ns.summarise(pd.DataFrame()),
    'paired_difference: a model that is not there': lambda: ns.paired_difference(frame(), 'a', 'b'),
    'segmentation_learner: a network for data': lambda: ns.segmentation_learner(net()),
    'segmentation_learner: None': lambda: ns.segmentation_learner(None),
    'segmentation_learner: a word for a network': lambda: ns.segmentation_learner(dls(), arch='unet'),
    'segmentation_learner: a number for a law': lambda: ns.segmentation_learner(dls(), law=0.1),
    'segmentation_learner: the class of a network': lambda: ns.segmentation_learner(dls(), arch=nn.Conv2d),
    'WeightNoise: a number': lambda: ns.WeightNoise(0.1),
    'AccumulatingNoise: a number': lambda: AccumulatingNoise(0.1),
    'check_dataset: a folder': lambda: ns.check_dataset('nowhere'),
    'check_dataset: None': lambda: ns.check_dataset(None),
    'WeightNoise: when is a number': lambda: ns.WeightNoise(law, when=1),
    'WeightNoise: a word for a seed': lambda: ns.WeightNoise(law, seed='x'),
    'save_model: None': lambda: ns.save_model(None, 'net'),
    'save_model: a class': lambda: ns.save_model(nn.Conv2d, 'net'),
    'save_model: the wrong way round': lambda: ns.save_model('net', net()),
    'save_model: no path': lambda: ns.save_model(net(), None),
    'save_model: another ending': lambda: ns.save_model(net(), 'net.pth'),
    'save_model: no such folder': lambda: ns.save_model(net(), 'no/such/folder/net'),
    'load_model: no such file': lambda: ns.load_model('nowhere'),
    'load_model: None': lambda: ns.load_model(None),
    'load_model: a Learner to fill': lambda: ns.load_model('nowhere', learn()),
    'load_model: a class to fill': lambda: ns.load_model('nowhere', nn.Conv2d),
    'load_model: an empty name': lambda: ns.load_model(''),
    'Resumable: None': lambda: ns.Resumable(None),
    'Resumable: another ending': lambda: ns.Resumable('run.pkl'),
    'Resumable: every never': lambda: ns.Resumable('run', every='never'),
    'Resumable: every 0': lambda: ns.Resumable('run', every=0),
    'DAMP: negative': lambda: ns.DAMP(-0.1),
    'DAMP: no parts': lambda: ns.DAMP(m=0),
    'SAM: the class of an optimizer': lambda: ns.SAM(torch.optim.SGD, net()),
    'SAM: rho below zero': lambda: ns.SAM(torch.optim.SGD(net().parameters(), 0.1), net(), rho=-1),
    'SAMCallback: a word': lambda: ns.SAMCallback(rho='large'),
    'MLPMatch: another level': lambda: ns.MLPMatch('fixmatch2'),
    'MLPMatch: a threshold of 95': lambda: ns.MLPMatch(threshold=95),
    'semi_learner: ordinary data': lambda: semi_learner(dls()).fit(1),
    'plot_sweep: None': lambda: ns.plot_sweep(None),
    'plot_sweep: another metric': lambda: ns.plot_sweep(frame(), metric='dice'),
    'plot_prediction: shapes that differ': lambda: ns.plot_prediction(
        x[0], torch.zeros(8, 8).long(), {'a': torch.zeros(32, 32).long()}),
    'plot_card: a sweep': lambda: ns.plot_card(frame()),
    'plot_card: None': lambda: ns.plot_card(None),
    'NoiseExplorer: a path': lambda: ns.NoiseExplorer('net.safetensors', dls()),
    'NoiseExplorer: a class': lambda: ns.NoiseExplorer(nn.Conv2d, dls()),
    'NoiseExplorer: samples below zero': lambda: ns.NoiseExplorer({'a': net7()}, dls(), samples=-1),
    'TrainingMonitor: a word for a law': lambda: ns.TrainingMonitor(law='gaussian'),
    'TrainingMonitor: an interval below zero': lambda: ns.TrainingMonitor(interval=-1),
    'voc: a year that was none': lambda: ns.voc('nowhere', year=1999, download=False),
    'voc: no such folder': lambda: ns.voc('nowhere', download=False),
    'camvid: no such folder': lambda: ns.camvid('nowhere', download=False),
    'cifar10: no such folder': lambda: ns.cifar10('nowhere', download=False),
}
NONSENSE |= {f'{name}: {what}': (lambda f=f, give=give: give(f)) for name, f in TAKE_MODULES.items()
             for what, give in MODULES.items()}

@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('NOISYSEG_DATA', str(tmp_path))


@pytest.mark.parametrize('what', NONSENSE)
def test_nonsense_is_answered_with_what_mends_it(what):
    with pytest.raises((ValueError, TypeError, FileNotFoundError)) as e: NONSENSE[what]()
    told = str(e.value)
    assert len(told) > 20 and MEND.search(told), f'{type(e.value).__name__}: {told}'
    assert 'noisyseg' in str(e.traceback[-1].path), f'it is answered by another library: {told}'


def test_every_public_name_has_its_nonsense():
    "Selectors and bases have no arguments to get wrong"
    spared = {'conv_and_norm', 'conv_and_linear', 'Disturbance', 'Law'}
    assert set(ns.__all__) - spared <= {what.partition(':')[0] for what in NONSENSE}
