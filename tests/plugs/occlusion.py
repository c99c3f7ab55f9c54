"A corruption: a grey square hides part of the picture."
import torch

from noisyseg.data.corruption_functions import corruption


@corruption('occlusion', (.1, .2, .3, .4, .5))
def square(x, share, g):
    h, w = x.shape[1:]
    height, width = round(share * h), round(share * w)
    top, left = (int(torch.randint(n, (), generator=g)) for n in (h - height + 1, w - width + 1))
    x = x.clone()
    x[:, top:top + height, left:left + width] = .5
    return x
