"""UNet3+ beside a second one, written straight from its paper (arXiv 2004.08790) as functions of a dictionary of
weights.
It shares no code with noisyseg and has no layers: pooling, interpolation and batch norm are spelled out."""
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import noisyseg.nets.encoders
import noisyseg.nets.unet3plus
from noisyseg.nets.unet3plus import PlainEncoder, UNet3Plus, resnet_encoder

FILTERS = (4, 6, 8, 10, 12)


class Reference:
    "The weights by name, whether batch norm uses the batch, and what it then remembers"
    def __init__(self, model, upsample):
        self.w = {k: v.detach().clone() for k, v in model.state_dict().items()}
        for k, _ in model.named_parameters(): self.w[k].requires_grad_()
        self.training, self.corners = model.training, upsample == 'after'

    def conv(self, x, name, stride=1):
        w = self.w[f'{name}.weight']
        return F.conv2d(x, w, self.w.get(f'{name}.bias'), stride, (w.shape[-1] - 1)//2)

    def norm(self, x, name):
        mean, var = self.w[f'{name}.running_mean'], self.w[f'{name}.running_var']
        if self.training:
            n, old_mean, old_var, mean = x.numel()/x.shape[1], mean, var, x.mean((0, 2, 3))
            var = ((x - mean[:, None, None])**2).mean((0, 2, 3))
            self.w[f'{name}.running_mean'] = (0.9*old_mean + 0.1*mean).detach()
            self.w[f'{name}.running_var'] = (0.9*old_var + 0.1*var*n/(n - 1)).detach()
        x = (x - mean[:, None, None])/(var[:, None, None] + 1e-5).sqrt()
        return x*self.w[f'{name}.weight'][:, None, None] + self.w[f'{name}.bias'][:, None, None]

    def block(self, x, name, stride=1): return self.norm(self.conv(x, f'{name}.conv', stride), f'{name}.bn').relu()

    def down(self, x, k):
        "The largest of each k×k pixels; windows at the border may be smaller"
        x = F.pad(x, (0, -x.shape[3] % k, 0, -x.shape[2] % k), value=-torch.inf)
        return x.unflatten(3, (-1, k)).unflatten(2, (-1, k)).amax((3, 5))

    def up(self, x, size):
        "Bilinear: a matrix for the rows and one for the columns"
        return self.weights(x.shape[2], size[0]) @ x @ self.weights(x.shape[3], size[1]).T

    def weights(self, n, m):
        out = torch.zeros(m, n, dtype=torch.double)
        for i in range(m):
            at = i*(n - 1)/max(m - 1, 1) if self.corners else max((i + 0.5)*n/m - 0.5, 0)
            low, high = int(at), min(int(at) + 1, n - 1)
            out[i, low] += 1 - (at - low)
            out[i, high] += at - low
        return out

    def plain(self, x, stride):
        maps = []
        for i in range(len(FILTERS)):
            x = self.block(self.down(x, 2) if i else x, f'encoder.levels.{i}.0', 1 if i else stride)
            maps.append(x := self.block(x, f'encoder.levels.{i}.1'))
        return maps

    def resnet34(self, x):
        x = self.norm(self.conv(x, 'encoder.conv1', 2), 'encoder.bn1').relu()
        maps, x = [x], F.max_pool2d(x, 3, 2, 1)
        for stage, n_blocks in enumerate((3, 4, 6, 3), 1):
            for k in range(n_blocks):
                p, stride = f'encoder.layer{stage}.{k}', 2 if stage > 1 and k == 0 else 1
                y = self.norm(self.conv(x, f'{p}.conv1', stride), f'{p}.bn1').relu()
                y = self.norm(self.conv(y, f'{p}.conv2'), f'{p}.bn2')
                if stride == 2: x = self.norm(self.conv(x, f'{p}.downsample.0', 2), f'{p}.downsample.1')
                x = (x + y).relu()
            maps.append(x)
        return maps

    def decoder(self, e):
        "The five maps, finest first: decoder 1 to 4, and the encoder's deepest"
        if 'compress.0.weight' in self.w: e = [self.conv(x, f'compress.{i}') for i, x in enumerate(e)]
        d = [None, None, None, None, e[4]]
        for i in (3, 2, 1, 0):
            size, parts = e[i].shape[2:], []
            for j in range(5):
                name = f'decoder.{i}.branches.{j}'
                if j <= i: parts.append(self.block(self.down(e[j], 2**(i - j)), name))
                elif self.corners: parts.append(self.up(self.block(d[j], name), size))
                else: parts.append(self.block(self.up(d[j], size), name))
            d[i] = self.block(torch.cat(parts, 1), f'decoder.{i}.fuse')
        return d

    def __call__(self, x, kind, heads):
        d = self.decoder(self.resnet34(x) if kind == 'resnet34' else self.plain(x, 2 if kind == 'strided' else 1))
        self.deepest = d[4]
        return [self.up(self.conv(d[i], f'heads.{i}'), x.shape[2:]) for i in range(heads)]


def network(kind, n_classes, in_channels, **kw):
    ("Small, in double precision, with signals that survive the encoder and batch norms that do something, also in "
     "evaluation")
    torch.manual_seed(0)
    encoder = resnet_encoder('resnet34', in_channels) if kind == 'resnet34' else PlainEncoder(in_channels, FILTERS,
            stem_stride=2 if kind == 'strided' else 1)
    m = UNet3Plus(encoder, n_classes, width=3, in_channels=in_channels, **kw).double()
    for conv in (o for o in encoder.modules() if isinstance(o, nn.Conv2d)): nn.init.kaiming_normal_(conv.weight)
    for bn in (o for o in m.modules() if isinstance(o, nn.BatchNorm2d)):
        for t, low, high in (bn.weight, 0.5, 1.5), (bn.bias, -0.2, 0.2), (bn.running_mean, -0.3, 0.3), (bn.running_var,
                0.5, 2):
            nn.init.uniform_(t, low, high)
    return m


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def close(got, want, what=''):
    assert got.shape == want.shape, what
    assert (got - want).abs().max() <= 1e-10*max(1, want.abs().max()), f'{what}: off by {(got - want).abs().max():.2g}'


CASES = [  # encoder, size, classes, channels of the image, further arguments
    ('plain', (97, 131), 4, 1, {}),
    ('strided', (97, 131), 3, 3, {}),
    ('strided', (101, 131), 3, 1, {}),
    ('strided', (250, 16), 2, 1, {}),
    ('strided', (130, 250), 1, 1, dict(deep_supervision=False, compress=(3, 4, 5, 6, 7), bias=False)),
    ('resnet34', (49, 67), 2, 3, dict(deep_supervision=False)),
    ('resnet34', (66, 122), 5, 1, {})]


MODES = [(training, upsample) for training in (False, True) for upsample in ('before', 'after')]


def in_turn(cases):
    "Each case in two of the four modes, two in which both settings differ: any two of the three meet somewhere"
    for i, case in enumerate(cases):
        for training, upsample in MODES[::3] if i % 2 else MODES[1:3]: yield case, training, upsample


def named(modes, case):
    return [f'{case(o)}-{"train" if training else "eval"}-{upsample}' for o, training, upsample in modes]


@pytest.mark.parametrize('case, training, upsample', list(in_turn(CASES)), ids=named(
    in_turn(CASES), lambda o: '{}-{}x{}'.format(o[0], *o[1])))
def test_reference(case, training, upsample):
    "The same logits from every head, the same gradients for every parameter and the image, the same running statistics"
    kind, size, n_classes, in_channels, kw = case
    m = network(kind, n_classes, in_channels, upsample=upsample, **kw).train(training)
    ref, heads = Reference(m, upsample), len(m.heads)
    x, y = (images(2 if training and kind != 'resnet34' else 1, in_channels, *size).requires_grad_() for _ in range(2))
    got, want = m(x, all_levels=True), ref(y, kind, heads)
    assert len(got) == len(want) == (5 if kw.get('deep_supervision', True) else 1)
    if not training:
        with torch.no_grad(): close(m(x), want[0], 'by default')
    for i, (a, b) in enumerate(zip(got, want)): close(a, b, f'head {i}')
    for outs in (got, want): sum((o*images(*o.shape, seed=2 + i)).sum() for i, o in enumerate(outs)).backward()
    close(x.grad, y.grad, 'image')
    for k, p in m.named_parameters(): close(p.grad, ref.w[k].grad, k)
    for k, b in m.named_buffers():
        if 'running' in k: close(b, ref.w[k], k)


def test_reference_can_fail():
    "The two orders are two functions, and the reference tells them apart"
    m = network('strided', 3, 3).eval()
    x = images(1, 3, 101, 131)
    assert (m(x) - Reference(m, 'after')(x, 'strided', 1)[0]).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize('upsample', ['before', 'after'])
@pytest.mark.parametrize('n_classes', [1, 4])
def test_classification_guided(n_classes, upsample):
    ("Each head's probabilities times those of presence, image by image: neither neighbours nor their order and number "
     "change a result")
    m, x = network('strided', n_classes, 1, upsample=upsample, cgm=True).eval(), images(3, 1, 101, 131)
    x[1] *= 5                                            # a picture unlike the others
    ref = Reference(m, upsample)
    raw = ref(x, 'strided', 5)
    there = torch.cat([ref.conv(o[None], 'presence.1').amax((2, 3), keepdim=True).sigmoid() for o in ref.deepest])
    assert there.std(0).max() > 1e-3                     # the images differ in it
    got, presence = m(x, all_levels=True)
    close(presence.sigmoid(), there[..., 0, 0], 'presence')
    for i, (a, b) in enumerate(zip(got, raw)):
        p = b.sigmoid()*there if n_classes == 1 else b.softmax(1)*there/(b.softmax(1)*there).sum(1, keepdim=True)
        close(a.sigmoid() if n_classes == 1 else a.softmax(1), p, f'head {i}')
    for batch in ([0], [1], [2], [2, 0], [1, 1, 0, 2]): close(m(x[batch]), got[0][batch], f'batch {batch}')


def wide(upsample='before', width=48, **kw):
    "Wide enough for Winograd's convolution in the two finest levels"
    torch.manual_seed(0)
    m = UNet3Plus(PlainEncoder(1, FILTERS), 3, width=width, in_channels=1, upsample=upsample, **kw)
    for bn in (o for o in m.modules() if isinstance(o, nn.BatchNorm2d)):
        for t, low, high in (bn.weight, 0.5, 1.5), (bn.bias, -0.2, 0.2), (bn.running_mean, -0.3, 0.3), (bn.running_var,
                0.5, 2):
            nn.init.uniform_(t, low, high)
    return m


def both_ways(m, x, ways=('fast', 'plain')):
    "Outputs, gradients and buffers of the fast and the plain decoder"
    out = []
    for way in ways:
        k = copy.deepcopy(m).set_decoder(way)
        heads = k(x, all_levels=True)
        sum((o*images(*o.shape, seed=2 + i).to(o)).sum() for i, o in enumerate(heads)).backward()
        out.append(([o.detach() for o in heads], {n: p.grad for n, p in k.named_parameters()}, dict(k.named_buffers())))
    return out


@pytest.fixture
def counted(monkeypatch):
    "How often each shortcut was taken"
    calls = dict.fromkeys(('winograd_conv', 'batch_norm_relu', 'conv_of_upsampled', 'conv_of_concatenated'), 0)
    def count(name, f):
        def counting(*args, **kw):
            calls[name] += 1
            return f(*args, **kw)
        return counting
    for module in (noisyseg.nets.encoders, noisyseg.nets.unet3plus):
        for name in calls:
            if hasattr(module, name): monkeypatch.setattr(module, name, count(name, getattr(module, name)))
    return calls


# a little above 60·60 pixels, from where on Winograd's convolution is taken
SHAPES = [(1, 1, 57, 67), (2, 1, 48, 80), (1, 1, 70, 52)]


@pytest.mark.parametrize('shape, training, upsample', list(in_turn(SHAPES)), ids=named(in_turn(SHAPES), str))
def test_fast_is_plain(shape, training, upsample, counted):
    "In double precision: outputs, with autograd and without, and running statistics to 1e-12, gradients to 1e-10"
    m, x = wide(upsample).double().train(training), images(*shape)
    fast, plain = both_ways(m, x)
    assert counted['winograd_conv'] >= 1 and counted['batch_norm_relu'] >= 4
    for a, b in zip(fast[0], plain[0]): assert (a - b).abs().max() <= 1e-12*b.abs().max()
    for k, g in plain[1].items(): assert (fast[1][k] - g).abs().max() <= 1e-10*max(1, g.abs().max()), k
    for k, b in plain[2].items(): assert (fast[2][k] - b).abs().max() <= 1e-12*max(1, b.abs().max()), k
    with torch.no_grad():   # in evaluation, batch norm is folded into the convolutions
        for a, b in zip(m(x, all_levels=True), plain[0]): assert (a - b).abs().max() <= 1e-12*b.abs().max()


@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('shape, kw', [((2, 1, 97, 131), {}), ((1, 1, 16, 250), dict(bias=False)),
                                       ((2, 1, 64, 64), dict(compress=(3, 4, 5, 6, 7), checkpoint=True))],
                         ids=['odd', 'flat', 'even'])
def test_coarse_maps_through_the_fusion(shape, kw, training, counted):
    "upsample='after', in double precision: large levels never enlarge some of their coarse sources"
    m, x = wide('after', width=16, **kw).double().train(training), images(*shape)
    fast, plain = both_ways(m, x)
    assert counted['conv_of_concatenated'] >= 1 and counted['winograd_conv'] == 0
    for a, b in zip(fast[0], plain[0]): assert (a - b).abs().max() <= 1e-12*b.abs().max()
    for k, g in plain[1].items(): assert (fast[1][k] - g).abs().max() <= 1e-10*max(1, g.abs().max()), k
    for k, b in plain[2].items(): assert (fast[2][k] - b).abs().max() <= 1e-12*max(1, b.abs().max()), k
    with torch.no_grad():
        for a, b in zip(m(x, all_levels=True), plain[0]): assert (a - b).abs().max() <= 1e-12*b.abs().max()


def test_dropout_takes_the_enlarged_maps(counted):
    "Dropout before the fusion acts on the concatenation: in training it has to be there, in evaluation it need not"
    m, x = wide('after', width=16, dropout=0.3).double().train(), images(2, 1, 64, 64)
    m(x)
    assert counted['conv_of_concatenated'] == 0
    with torch.no_grad(): close(m.eval()(x), copy.deepcopy(m).set_decoder('plain')(x))
    assert counted['conv_of_concatenated'] == 2


@pytest.mark.parametrize('upsample, width, shortcut', [('before', 48, 'winograd_conv'),
                                                       ('after', 16, 'conv_of_concatenated')])
@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
def test_single_precision(training, upsample, width, shortcut, counted):
    "The fast decoder's distance from double precision is at most three times the plain one's"
    m, x = wide(upsample, width).train(training), images(1, 1, 78, 49)
    exact = both_ways(copy.deepcopy(m).double(), x, ['plain'])[0][0]
    ways = [way[0] for way in both_ways(m, x.float())]
    assert counted[shortcut] >= 1
    with torch.no_grad(): ways.insert(0, m(x.float(), all_levels=True))
    errors = [max(((o - e).norm()/e.norm()).item() for o, e in zip(way, exact)) for way in ways]
    assert max(errors[:2]) <= 3*errors[2] and max(errors) <= 1e-5, errors


def test_watched_layers_are_called(counted):
    "A hook sees its layer, autocast and torch.func see ordinary layers"
    m, x, seen = wide().eval(), images(1, 1, 64, 64).float(), []
    with torch.no_grad():
        want = m(x)
        assert counted['winograd_conv'] == 1
        for name in ('decoder.0.fuse.bn', 'decoder.0.fuse.conv', 'decoder.0.fuse'):
            h = m.get_submodule(name).register_forward_hook(lambda m, i, o: seen.append(o.shape))
            got = m(x)
            h.remove()
            assert (got - want).abs().max() <= 1e-5*want.abs().max()
        # with a hook on the whole block its inside may be short
        assert len(seen) == 3 and counted['winograd_conv'] == 2
        with torch.autocast('cpu', dtype=torch.bfloat16): assert m(x).dtype == torch.bfloat16
        before = dict(counted)
        out = torch.func.functional_call(m, {k: v for k, v in m.named_parameters()}, (x,))
        assert (out - want).abs().max() <= 1e-5*want.abs().max() and counted != before
        torch.func.vmap(lambda w: torch.func.functional_call(m, {'heads.0.weight': w},
                                                             (x,)))(torch.stack([m.heads[0].weight]*2))


@pytest.mark.parametrize('decoder', ['fast', 'plain'])
def test_checkpoint(decoder):
    "The same outputs, gradients and running statistics, dropout included"
    results = []
    for checkpoint in (False, True):
        m = wide(dropout=0.3, checkpoint=checkpoint, decoder=decoder).double().train()
        torch.manual_seed(5)
        outs = m(images(2, 1, 33, 40))
        sum(o.square().sum() for o in outs).backward()
        results.append((outs, [p.grad for p in m.parameters()], list(m.buffers())))
    for a, b in zip(*results):
        for s, t in zip(a, b): assert torch.equal(s, t) or (s - t).abs().max() <= 1e-12*t.abs().max()
