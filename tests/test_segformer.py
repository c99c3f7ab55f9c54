"SegFormer: its parts by selectors, noise in the fused attention, sizes, checkpoints, gradients."
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from noisyseg import MaxGaussian, conv_and_linear, load_model, perturbed, save_model
from noisyseg.nets.segformer import (EfficientAttention, SegFormer, Staged, convnet_lite0, segformer_b0,
                                     segformer_lite0, segformer_tiny)
from noisyseg.perturb.selectors import attention, by_name, embeddings, norms


def small(**kwargs): return segformer_tiny(3, dims=(8, 8, 8), heads=(1, 2, 2), width=8, **kwargs)


def by_hand(attn, x, size):
    "Attention by its formula"
    other = attn.coarser(x, size)
    found = []
    for q, k, v in zip(*(t.chunk(attn.heads, 2) for t in (attn.q(x), attn.k(other), attn.v(other)))):
        found.append((q @ k.transpose(1, 2) / q.shape[2]**0.5).softmax(2) @ v)
    return attn.proj(torch.cat(found, 2))


@pytest.mark.parametrize('part', ['q', 'k', 'v', 'proj', 'reduce'])
@pytest.mark.parametrize('backend', [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
@torch.no_grad()
def test_fused_attention_carries_the_noise(part, backend):
    torch.manual_seed(0)
    attn = EfficientAttention(32, heads=2, reduction=2).eval()
    x = torch.randn(2, 6 * 8, 32)
    clean = attn(x, (6, 8))
    with sdpa_kernel(backend), perturbed(attn, MaxGaussian(0.3), f'{part}.weight', generator=0):
        noisy = attn(x, (6, 8))
        assert not torch.equal(noisy, clean)
        torch.testing.assert_close(noisy, by_hand(attn, x, (6, 8)))
    with sdpa_kernel(backend): torch.testing.assert_close(attn(x, (6, 8)), clean)


@pytest.mark.parametrize('size', [(32, 32), (33, 47), (8, 8)])
def test_any_size(size):
    "Sides that are no multiples of the strides or of the reduction; every weight learns"
    net = small()
    out = net(torch.randn(2, 3, *size))
    assert tuple(out.shape) == (2, 3, *size)
    out.square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_selectors_know_its_parts():
    "Attention, MLPs and patch embeddings are all kernels of the stages, and share none"
    net = segformer_lite0(3, pretrained=False)
    parts = [attention, by_name('stages.*.mlp.*.weight'), embeddings]
    found = [set(s.names(net)) for s in parts]
    assert sum(map(len, found)) == len(set.union(*found))
    assert set.union(*found) == set((conv_and_linear & by_name('stages.*')).names(net))
    kinds = [type(s.module) for s in (norms & by_name('stages.*'))(net)]
    assert set(kinds) == {nn.LayerNorm} and len(kinds) == 2 * 4 + 2 + 2 + 2
    assert len(by_name('*.attn.q.weight', '*.attn.k.weight').names(net)) == 8


def test_its_published_size():
    assert round(sum(p.numel() for p in segformer_b0(150).parameters()) / 1e5) == 38   # 3.8 M, table 1


@pytest.mark.parametrize('factory', [segformer_lite0, convnet_lite0, segformer_tiny])
@torch.no_grad()
def test_checkpoints_know_them(factory, tmp_path):
    torch.manual_seed(0)
    net = factory(3, **({} if factory is segformer_tiny else {'pretrained': False})).eval()
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(load_model(save_model(net, tmp_path/'net'))(x), net(x))
    if net.stem is not None: assert torch.equal(net.from_maps(net.stem(x), (32, 32)), net(x))


def test_twins_differ_in_the_stages_only():
    a, b = segformer_lite0(3, pretrained=False), convnet_lite0(3, pretrained=False)
    shapes = lambda part: {k: v.shape for k, v in part.state_dict().items()}
    assert isinstance(a, Staged) and shapes(a.stem) == shapes(b.stem) and shapes(a.head) == shapes(b.head)


def test_errors():
    with pytest.raises(ValueError, match='dim=9'): EfficientAttention(8, heads=3)
    with pytest.raises(ValueError, match='a number for each stage'): SegFormer(3, dims=(8, 8))
    with pytest.raises(ValueError, match=r'x\[None\]'): small()(torch.zeros(3, 8, 8))
