"""noisyseg: what happens to a network when its weights are not what training left behind.

The names that people type are here. Each is loaded when it is first used, so `import noisyseg` costs next to nothing.
All others are in the subpackages, which build on one another in this order: `perturb`, `data`, `nets`, `measure`,
`train`, `mend`, `show`."""
import os
from importlib import import_module

from .docments import install

# comments beside parameters in help(); the site has a table of them instead (`make docs`)
if os.environ.get('NOISYSEG_DOCMENTS') != '0': install(__name__)

__version__ = "0.1.0"

_names = {
    'perturb.clone': ['perturbed', 'clone_weights'],
    'perturb.selectors': ['select', 'conv_and_norm', 'conv_and_linear'],
    'perturb.disturbance': ['Disturbance', 'Law', 'compose'],
    'perturb.laws': ['MaxGaussian', 'AbsoluteGaussian', 'RelativeGaussian', 'MultiplicativeGaussian'],
    'perturb.quantization': ['Quantize'],
    'data.datasets': ['scenes', 'camvid', 'voc'],
    'data.own': ['custom_masks'],
    'data.doctor': ['check_dataset'],
    'data.cifar': ['cifar10'],
    'data.semi_supervised': ['semi'],
    'data.corruptions': ['Corruption'],
    'nets.unet3plus': ['UNet3Plus', 'unet3plus_tiny'],
    'nets.deeplab': ['deeplabv3plus'],
    'nets.classifiers': ['resnet20'],
    'measure.sweeps': ['sweep'],
    'measure.summary': ['summarise', 'paired_difference', 'until'],
    'train.noise': ['WeightNoise'],
    'train.learner': ['segmentation_learner'],
    'train.checkpoints': ['save_model', 'load_model'],
    'train.resume': ['Resumable'],
    'train.methods.damp': ['DAMP'],
    'train.methods.sam': ['SAM'],
    'train.methods.sam_callback': ['SAMCallback'],
    'train.methods.mlpmatch': ['MLPMatch'],
    'mend.tolerances': ['tolerance'],
    'mend.protection': ['protect', 'sensitivity'],
    'mend.recalibration': ['rescue', 'rescued'],
    'mend.finetuning': ['harden'],
    'show.plots': ['plot_sweep'],
    'show.pictures': ['plot_prediction'],
    'measure.card': ['robustness_card'],
    'show.card': ['plot_card'],
    'show.explorer': ['NoiseExplorer'],
    'show.monitor': ['TrainingMonitor'],
}
_module_of = {name: module for module, names in _names.items() for name in names}
__all__ = list(_module_of)


def __getattr__(name):
    if name not in _module_of: raise AttributeError(f"module 'noisyseg' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f'noisyseg.{_module_of[name]}'), name)
    return value


def __dir__(): return sorted([*globals(), *__all__])
