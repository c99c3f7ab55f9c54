"""The live pages of the site: procedural scenes, and photographs beside them. `python .ci/live.py FOLDER`

The networks for photographs are two of the study nbs/studies/voc_weight_noise: they have seen VOC's pictures, of which
none is on the page."""
import argparse
from pathlib import Path

import derive
import torch

from noisyseg.data.files import distinct_palette
from noisyseg.nets.encoders import lite0_stats
from noisyseg.perturb.laws import AbsoluteGaussian, MaxGaussian, MultiplicativeGaussian, RelativeGaussian
from noisyseg.perturb.quantization import Quantize
from noisyseg.show.live_page import demo_page, export_explorer, picture_input
from noisyseg.train.checkpoints import load_model, read_card

root = Path(__file__).parents[1]
HOME = derive.settings['doc_url'] + '/live/'
NETWORKS = {'clean-trained': 'small-clean-0', 'noise-trained': 'small-middle-0'}
PICTURES = ('cat', 'astronaut')
# where sliders end, for there all is lost
TOPS = dict(MaxGaussian=0.06, RelativeGaussian=0.6, AbsoluteGaussian=0.03, MultiplicativeGaussian=1.)
LAWS = [MaxGaussian(0.02), RelativeGaussian(0.1), AbsoluteGaussian(0.01), MultiplicativeGaussian(0.2), Quantize(6)]
ABOUT = ("Two networks find people, cats, dogs, horses, cows and sheep in photographs. They are small, and make "
         "mistakes. One was trained as usual, the other with noise in its weights: drag the noise and watch the cat "
         "dissolve.")
SETUP = """from noisyseg.nets.encoders import lite0_stats
from noisyseg.show.live_page import picture_input
from noisyseg.train.checkpoints import load_model

# in a copy of noisyseg's repository
networks = {'clean-trained': 'small-clean-0', 'noise-trained': 'small-middle-0'}
models = {k: load_model(f'nbs/studies/voc_weight_noise/{v}.safetensors') for k, v in networks.items()}
images = torch.cat([picture_input(f'nbs/live/{name}.png', lite0_stats) for name in ('cat', 'astronaut')])"""


def photo_page(folder, networks=NETWORKS, **kwargs):
    "The page with photographs; gives the bytes of the first load"
    files = {name: root/'nbs'/'studies'/'voc_weight_noise'/f'{stem}.safetensors' for name, stem in networks.items()}
    images = torch.cat([picture_input(root/'nbs'/'live'/f'{name}.png', lite0_stats) for name in PICTURES])
    classes = read_card(next(iter(files.values())))['classes']
    return export_explorer({name: load_model(f) for name, f in files.items()}, images, folder, LAWS, classes=classes,
                           palette=distinct_palette(len(classes)), stats=lite0_stats, tops=TOPS,
                           title='Watch the cat dissolve', about=ABOUT, python=SETUP, **kwargs)


def pages(folder, ort=None, **kwargs):
    "Both pages, which share the engine; gives the bytes of each one's first load"
    folder = Path(folder)
    scenes = demo_page(folder, ort, beside={'Photographs': 'photos/index.html'}, address=HOME)
    photos = photo_page(folder/'photos', engine='../ort', beside={'Scenes': '../index.html'}, address=f'{HOME}photos/',
                        **kwargs)
    return scenes, photos


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('folder')
    p.add_argument('--ort', help='a folder with the files of onnxruntime-web; without it npm brings them')
    a = p.parse_args()
    sizes = pages(a.folder, a.ort)
    print('A visitor loads {:.1f} MB for scenes, {:.1f} MB for photographs.'.format(*(n / 1e6 for n in sizes)),
          f'See it with: python -m http.server -d {a.folder}')
