"Networks of other houses, through everything. The larger ones take minutes: `python tests/foreign.py`"
from importlib.util import find_spec

import foreign
import pytest
import torch

SMALL = ('transformers-like', 'torchvision lraspp_mobilenet_v3_large', 'UNet3+ on timm convnext_atto',
         'UNet3+ on timm pvt_v2_b0')
smp = pytest.mark.skipif(not find_spec('segmentation_models_pytorch'), reason='pip install segmentation-models-pytorch')
CASES = [*SMALL, *(pytest.param(k, marks=smp) for k in foreign.OF_SMP)]


@pytest.fixture(scope='module')
def dls(): return foreign.data()


@pytest.mark.parametrize('name', CASES)
def test_a_network_of_others(dls, name):
    torch.manual_seed(0)
    foreign.attempt((foreign.FOREIGN | foreign.OF_SMP)[name](), dls)
