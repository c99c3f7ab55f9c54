"""Networks of all kinds on the live page: `python tests/live_networks.py [word]` runs each in Chromium.

The logits under noise are compared with PyTorch's. Those of segmentation_models_pytorch are tried where it is
installed. NOISYSEG_ORT names a folder with onnxruntime-web, else npm brings it."""
import os
import sys
import tempfile
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from foreign import FOREIGN, OF_SMP, SIZE, N
from test_lab import browser_page, served
from test_live import Live, Transformer, warmed

from noisyseg.nets.adapter import logits_of
from noisyseg.nets.deeplab import deeplabv3plus
from noisyseg.nets.edgenets import dicenet, espnetv2
from noisyseg.nets.segformer import segformer_tiny
from noisyseg.nets.unet3plus import unet3plus_tiny
from noisyseg.perturb.clone import perturbed
from noisyseg.perturb.counter import CounterGenerator
from noisyseg.perturb.laws import MaxGaussian
from noisyseg.perturb.selectors import kernels_and_scales
from noisyseg.show.live_page import export_explorer, fetch_engine, halved

law = MaxGaussian(0.05)
NETWORKS = {'UNet3+': lambda: unet3plus_tiny(N), 'DeepLabV3+': lambda: deeplabv3plus(N),
            'ESPNetv2': lambda: espnetv2(N), 'DiCENet': lambda: dicenet(N),
            'SegFormer': lambda: segformer_tiny(N), 'transformer': lambda: Transformer(N, SIZE), **FOREIGN}


def attempt(net, x, engine, folder):
    "Seconds to export, milliseconds for a move of the slider, and how far the logits are, relative to the largest"
    start = time.time()
    export_explorer(net, x, folder, law, {'all': kernels_and_scales}, ort=engine, webgpu=False, gallery=0)
    exported = time.time() - start
    with served(folder) as url, browser_page(Path(folder)/'profile') as page:
        live = Live(page, f'{url}/index.html')
        if live.js('document.body.dataset.engine') == 'none': raise RuntimeError(page.inner_text('#status'))
        live.settle()
        got, = live.logits(level=law.level, seed=3)
        took = live.js('''async () => { const t = performance.now()
            await live.networks.ask('frame', {...live.host.state, level: .04, seed: 3})
            return performance.now() - t }''')
    model = halved(net)
    with torch.no_grad(), perturbed(model, law, kernels_and_scales, CounterGenerator(3)):
        expected = logits_of(model, x, x.shape[2:]).flatten()
    return exported, took, ((got - expected).abs().max() / expected.abs().max()).item()


def main(word=''):
    networks = NETWORKS | (OF_SMP if find_spec('segmentation_models_pytorch') else {})
    x, failed = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)), 0
    engine = os.environ.get('NOISYSEG_ORT') or fetch_engine(tempfile.mkdtemp(), webgpu=False)
    for name, make in networks.items():
        if word.lower() not in name.lower(): continue
        torch.manual_seed(1)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action='ignore'):
            try:
                net = warmed(make(), x).eval()
                exported, took, far = attempt(net, x, engine, folder)
            except Exception as e:
                failed += 1
                print(f'{name}: {type(e).__name__}: {e}', flush=True)
                continue
        failed += not far < 1e-5
        print(f'{name}: {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M weights, exported in {exported:.0f} s, '
              f'{took:.0f} ms a move, logits within {far:.0e}', flush=True)
    print(f'{failed} failed')
    return failed


if __name__ == '__main__': sys.exit(bool(main(*sys.argv[1:])))
