"""The same job by other libraries, each only if it can be imported.

noisyseg does not need them; `bench.py --peers PYTHON` takes them from elsewhere:

python -m venv peers && peers/bin/pip install --no-deps pytorch-optimizer segmentation-models-pytorch aihwkit-lightning
peers/bin/pip install imagecorruptions opencv-python-headless "setuptools<81"

--no-deps, because they would bring a torch of their own; what they need is here already. UNet3+ as its authors wrote
it is no package: clone ZJUGiveLab/UNet-Version, and put its folder `models` on the PYTHONPATH.
"""
import copy
import importlib.util
import warnings
from functools import partial
from importlib.metadata import version

import torch
from bench_timing import agreement, close, row, skipped
from bench_training import Net, loss_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from noisyseg.data.corruptions import STANDARD_15, Corruption
from noisyseg.data.procedural import scene
from noisyseg.nets.classifiers import resnet18_small, resnet20
from noisyseg.perturb.laws import MaxGaussian
from noisyseg.perturb.clone import clone_weights
from noisyseg.perturb.selectors import conv_and_linear
from noisyseg.nets.unet3plus import from_published, unet3plus_paper, unet3plus_resnet34


def peers(plan):
    there = lambda module: importlib.util.find_spec(module) is not None
    for f, module, package in ((sam, 'pytorch_optimizer', 'pytorch-optimizer'),
                               (noise, 'aihwkit_lightning', 'aihwkit-lightning'),
                               (unetplusplus, 'segmentation_models_pytorch', 'segmentation-models-pytorch'),
                               (corruptions, 'imagecorruptions', 'imagecorruptions')):
        if not there(module): yield skipped(package, f'pip install {package}, as this file says')
        else: yield from f(plan, f'{package} {version(package)}')
    if there('UNet_3Plus'): yield from authors(plan)
    else: yield skipped("the authors' UNet3+", 'clone ZJUGiveLab/UNet-Version; PYTHONPATH=UNet-Version/models')

def classifier(plan):
    "A network that is as large as there is time for, its name, and how many pictures it gets at a time."
    return (resnet18_small, 'ResNet-18', 128) if plan.full or plan.cuda else (resnet20, 'ResNet-20', 32)

def sam(plan, peer):
    from pytorch_optimizer import SAM
    torch.manual_seed(0)
    net, name, n = classifier(plan)
    model = net().to(plan.device)
    x, y = torch.randn(n, 3, 32, 32, device=plan.device), torch.randint(10, (n,), device=plan.device)
    ours, other = Net(model, {}), Net(model)
    other.opt = SAM(other.model.parameters(), torch.optim.SGD, rho=0.05, lr=1e-3, momentum=0.9)
    def closure(net):
        def f():
            net.opt.zero_grad()
            return net.backward(x, y)
        return f
    closures = closure(ours), closure(other)
    def our_step(): ours.opt.step(closures[0])
    def their_step():
        closures[1]()
        other.opt.step(closures[1])
    our_step(), their_step()
    error = close(ours.weights, other.weights, 1e-4, 'a SAM step')
    times = plan.in_turns({'ours': our_step, 'other': their_step}, warm_up=0)
    yield row('a SAM step', f'{name}, 32², batch {n}', times['ours'], peer, times['other'],
              note=f'{agreement(error, "weights")}; ours also puts back the buffers that the first pass has moved')

def noise(plan, peer):
    "aihwkit's weight modifier, from the sibling of aihwkit that is plain PyTorch (aihwkit itself must be compiled)."
    from aihwkit_lightning.nn.conversion import convert_to_analog
    from aihwkit_lightning.nn.modules.torch_utils.torch_linear import TorchLinear
    from aihwkit_lightning.simulator.configs import TorchInferenceRPUConfig
    from aihwkit_lightning.simulator.parameters import WeightNoiseInjectionType
    config = TorchInferenceRPUConfig()
    config.modifier.noise_type, config.modifier.std_dev = WeightNoiseInjectionType.ADD_NORMAL_PER_CHANNEL, 0.05
    config.mapping.max_input_size, config.pre_post.input_range.enable = -1, False
    law = MaxGaussian(0.05, alpha=float('inf'), per='channel')

    torch.manual_seed(0)
    model = unet3plus_resnet34(21, pretrained=False).to(plan.device)
    weights = [m.weight.detach() for m in model.modules() if isinstance(m, nn.Conv2d)]
    clone = clone_weights(model, conv_and_linear)
    def theirs():
        with torch.no_grad(): return [TorchLinear.modify_weight(w.flatten(1), None, config) for w in weights]
    def ours():
        clone.inject(law)
        clone.recover()
    torch.manual_seed(1)
    want = theirs()
    torch.manual_seed(1)
    clone.inject(law)
    error = close([w.flatten(1) for w in weights], want, 1e-5, 'noisy weights') if not plan.cuda else None
    clone.recover()
    times = plan.in_turns({'ours': ours, 'other': theirs}, warm_up=2)
    where, same = (f'UNet3+, ResNet34, {clone.n_weights / 1e6:.1f} million weights', '' if plan.cuda
                   else f'; {agreement(error, "noise")}')
    yield row('noise on all convolutions', where, times['ours'], f'weight modifier of {peer}', times['other'],
              note=f'ours also clones and recovers; theirs makes new tensors{same}')

    mlp = nn.Sequential(nn.Linear(1024, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(),
                        nn.Linear(2048, 10)).to(plan.device)
    net, name, n = classifier(plan)
    nets = (('linear layers, 6.3 million weights, batch 256', mlp, torch.randn(256, 1024, device=plan.device)),
            (f'{name}, 32², batch {n}', net().to(plan.device),
             torch.randn(n, 3, 32, 32, device=plan.device)))
    for where, net, x in nets:
        y = torch.randint(10, (len(x),), device=plan.device)
        a, b = Net(net), Net(net)
        b.model = convert_to_analog(copy.deepcopy(net), config).train()
        b.opt = torch.optim.SGD(b.model.parameters(), lr=1e-3, momentum=0.9)
        clone = clone_weights(a.model, conv_and_linear)
        def our_step():
            a.opt.zero_grad()
            clone.inject(law)
            a.backward(x, y)
            clone.recover()
            a.opt.step()
        def their_step(): b.plain(x, y)
        torch.manual_seed(1), our_step()
        torch.manual_seed(1), their_step()
        size = lambda net: torch.cat([w.detach().flatten() for w in net.weights]).norm()
        assert abs(size(a) / size(b) - 1) < 1e-3 and loss_of(a.model(x), y).isfinite()
        times = plan.in_turns({'ours': our_step, 'other': their_step}, warm_up=0)
        yield row('a training step under noise', where, times['ours'], f'weight modifier of {peer}', times['other'],
                  note='' if net is mlp else 'their convolutions are products of unfolded maps')

def unetplusplus(plan, peer):
    from segmentation_models_pytorch import UnetPlusPlus
    side = 256 if plan.full or plan.cuda else 128
    x = torch.randn(1, 3, side, side, device=plan.device)
    nets = {'ours': unet3plus_resnet34(21, pretrained=False, deep_supervision=False), **{
        name: UnetPlusPlus('resnet34', encoder_weights=None, decoder_channels=channels, classes=21)
        for name, channels in (('64 channels a node', (64,) * 5), ('channels as shipped', (256, 128, 64, 32, 16)))}}
    size = {}
    for name, m in nets.items():
        m.to(plan.device).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            (m.set_decoder('plain') if name == 'ours' else m)(x)
        size[name] = (f'{sum(p.numel() for p in m.parameters()) / 1e6:.1f} M weights, '
                      f'{counter.get_total_flops() / 2e9:.0f} G multiply-adds')
    nets['ours'].set_decoder('fast')
    def train_step(m):
        m(x).square().mean().backward()
        for p in m.parameters(): p.grad = None
    if not (plan.full or plan.cuda): del nets['64 channels a node']
    for train in (False, True):
        for m in nets.values(): m.train(train)
        f = train_step if train else torch.no_grad()(lambda m: m(x))
        times = plan.in_turns({k: lambda m=m: f(m) for k, m in nets.items()})
        for name in list(nets)[1:]:
            yield row('a training step' if train else 'evaluation', f'ResNet34, {side}², batch 1', times['ours'],
                      f'U-Net++, {name}', times[name],
                      note=f'{peer}. Another network: UNet3+ has {size["ours"]}, as written; U-Net++ {size[name]}')

DETERMINISTIC = ('defocus_blur', 'zoom_blur', 'brightness', 'contrast', 'pixelate', 'jpeg_compression')

def corruptions(plan, peer, n=4):
    "Each of the standard corruptions at severity 3; where nothing is drawn, the pictures must agree."
    from imagecorruptions import corrupt
    pictures = [scene(i, 224)[0] for i in range(n)]
    batch = torch.stack([torch.as_tensor(p) for p in pictures]).permute(0, 3, 1, 2)
    def theirs(name):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            return [corrupt(p, corruption_name=name, severity=3) for p in pictures]
    def works(name):
        try: return bool(theirs(name))
        except Exception: return False   # some of them want an older numpy or scikit-image than there is
    ours = {name: partial(Corruption(name, 3, seed=0, table='imagenet'), batch) for name in STANDARD_15}
    there = [name for name in STANDARD_15 if works(name)]
    off = 0
    for name in DETERMINISTIC:
        want = torch.stack([torch.as_tensor(p) for p in theirs(name)]).permute(0, 3, 1, 2).int()
        off = max(off, (ours[name]().int() - want).abs().max().item())
    assert off <= 1, f'other pictures than {peer}: {off} of 255'
    note = f'{n} pictures of 224²; where nothing is drawn, they agree to within {off} of 255'
    if lost := sorted({*STANDARD_15} - {*there}): note += f'; theirs fail here: {", ".join(lost)}'
    total = dict(ours=lambda: [ours[k]() for k in there], other=lambda: [theirs(k) for k in there])
    times = plan.in_turns(total)
    yield row(f'{len(there)} corruptions', 'severity 3', times['ours'], peer, times['other'], note=note)
    for name in there if plan.full else ():
        times = plan.in_turns(dict(ours=ours[name], other=partial(theirs, name)))
        yield row(name.replace('_', ' '), 'severity 3', times['ours'], peer, times['other'])

def authors(plan):
    "UNet3+ as its authors wrote it, with our weights' names translated: the same function."
    from UNet_3Plus import UNet_3Plus
    torch.manual_seed(0)
    other = UNet_3Plus(3, 21).to(plan.device)
    ours = unet3plus_paper(21, deep_supervision=False).to(plan.device)
    ours.load_state_dict(from_published(other.state_dict()))
    x = torch.randn(1, 3, 256, 256, device=plan.device)
    ways = dict(ours=lambda: ours(x).sigmoid(), other=lambda: other(x))   # theirs ends with a sigmoid
    def step(f):
        f().square().mean().backward()
        for p in (*ours.parameters(), *other.parameters()): p.grad = None
    for train in (False, True) if plan.full or plan.cuda else (False,):   # their training step takes ten seconds
        with torch.no_grad():
            ours.eval(), other.eval()
            error = close(ways['ours'](), ways['other'](), 1e-3, "the authors' probabilities")
        ours.train(train), other.train(train)
        times = plan.in_turns({k: partial(step if train else torch.no_grad()(lambda f: f()), f)
                               for k, f in ways.items()})
        yield row('a training step' if train else 'evaluation', "the paper's encoder, 256², batch 1", times['ours'],
                  "the authors' UNet3+", times['other'], target=1/3 if train else 1/3.5, note=agreement(error))
