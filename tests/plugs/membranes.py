"A data set: a folder of grey pictures of cells, with masks that are 0 inside and 255 on the membranes."
from pathlib import Path

import numpy as np
from PIL import Image

from noisyseg.data.loaders import mask_dataloaders


def write_some(folder, n=12, side=48):
    "Stands for the download: discs with a rim"
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:side, :side]
    for i in range(n):
        distance = np.full((side, side), 99.)
        for y, x in rng.integers(8, side - 8, (4, 2)):
            distance = np.minimum(distance, abs(np.hypot(rows - y, columns - x) - 7))
        membrane = distance < 1.5
        picture = np.where(membrane, 60, 170) + rng.normal(0, 8, (side, side))
        for name, pixels in ('images', picture.clip(0, 255)), ('labels', 255 * membrane):
            (Path(folder)/name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(Path(folder)/name/f'{i:02}.png')


def read(item):
    "(image, mask) of a pair of files"
    image, mask = (np.array(Image.open(p)) for p in item)
    return np.repeat(image[..., None], 3, 2), (mask > 127).astype(np.uint8)


def membranes(folder, size=48, bs=4, **kwargs):
    "DataLoaders of cells and their membranes"
    pairs = [(p, p.parents[1]/'labels'/p.name) for p in sorted((Path(folder)/'images').glob('*.png'))]
    return mask_dataloaders(pairs[:-4], pairs[-4:], read, ['cell', 'membrane'], [(230, 230, 230), (160, 30, 90)],
                            ignore_index=255, size=size, bs=bs, **kwargs)
