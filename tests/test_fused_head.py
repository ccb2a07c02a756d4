import copy
import pickle
import shutil

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn

from timm_zzz import ZZZHead, attach
from timm_zzz.head import FusedZZZConvHead, FusedZZZHead, ZZZConvHead
from timm_zzz.models.attach import find_classifiers


def random_head(num_classes=20, feat_dim=33, rank=3, kind=ZZZHead, **kwargs):
    head = kind(num_classes, feat_dim, rank, **kwargs)
    with torch.no_grad():
        head.bias.normal_()
    return head.eval()


def assert_same_logits(actual, expected, tolerance=1e-5):
    """The same up to ``tolerance`` of the logits' scale."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize('rank', [0, 1, 3, 8, 16])
@pytest.mark.parametrize('sigma2', [1.01e-4, 1e-2, 0.69])
@pytest.mark.parametrize('v', [1.01e-4, 0.69, 1e4])
def test_same_logits(rank, sigma2, v):
    head = random_head(rank=rank, sigma2_init=sigma2, v_init=v)
    x = torch.randn(40, 33)
    x[:20] = head.weight.detach() + 1e-4 * torch.randn(20, 33)  # next to the means, where distances cancel
    fused = head.fuse()
    exact = copy.deepcopy(head).double()
    expected = exact(x.double()).detach()
    assert_same_logits(fused(x), head(x).detach())
    assert_same_logits(fused(x).double(), expected)
    assert_same_logits(exact.fuse()(x.double()), expected, 1e-12)
    before = fused(x)
    assert not before.requires_grad
    with torch.no_grad():
        for p in head.parameters():
            p.add_(1)
    assert torch.equal(fused(x), before)  # a copy


def test_attributes():
    head = random_head()
    fused = head.fuse()
    for name in ('num_classes', 'feat_dim', 'in_features', 'out_features', 'rank', 'training'):
        assert getattr(fused, name) == getattr(head, name)
    assert fused.weight.shape == head.weight.shape and fused.bias.shape == head.bias.shape
    assert not list(fused.parameters()) and not any(b.requires_grad for b in fused.buffers())
    x = torch.randn(4, 33)
    assert torch.equal(fused.train()(x), fused.eval()(x))
    with pytest.raises(ValueError, match='features: expected a last dimension of 33'):
        fused(torch.randn(4, 32))
    assert fused(torch.randn(2, 3, 33)).shape == (2, 3, 20) and fused(torch.randn(33)).shape == (20,)


def test_unusual_embeddings():
    head = random_head()
    x = torch.randn(4, 33) * torch.tensor([[0.0], [1e30], [1e-30], [1.0]])
    assert_same_logits(head.fuse()(x), head(x).detach())
    x[3, 5] = float('nan')
    assert head.fuse()(x).isfinite().all(1).tolist() == [True, True, True, False]


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_16_bit(dtype):
    head, x = random_head(sigma2_init=1e-3).to(dtype), torch.randn(4, 33, dtype=dtype)
    expected = head(x).detach()
    assert_same_logits(head.fuse()(x), expected)
    assert_same_logits(head.float().fuse().to(dtype)(x), expected)
    fused = random_head(sigma2_init=1e-3).fuse()
    expected = fused(x)
    assert expected.dtype == torch.float32
    assert torch.equal(nn.Sequential(copy.deepcopy(fused)).to(dtype)(x), expected)
    head, x = random_head(), torch.randn(4, 33)
    expected = head.fuse()(x)
    with torch.autocast('cpu', dtype):
        assert torch.equal(head.fuse()(x), expected)


def test_float64():
    head, x = random_head(dtype=torch.float64), torch.randn(4, 33)
    fused = head.fuse()
    assert_same_logits(fused(x), head(x).detach(), 1e-12)
    assert fused.float()(x).dtype == torch.float32 and fused.double()(x).dtype == torch.float64
    assert fused.float()(x.double()).dtype == torch.float64
    assert random_head(device='meta').fuse()(torch.randn(4, 33, device='meta')).shape == (4, 20)
    assert head.fuse().to('meta').rows.is_meta


def onnx_logits(file, x):
    runtime = pytest.importorskip('onnxruntime')
    session = runtime.InferenceSession(str(file), providers=['CPUExecutionProvider'])
    return torch.from_numpy(session.run([], {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize('dynamo', [False, True])
@pytest.mark.parametrize('kind, shape', [(ZZZHead, (7, 33)), (ZZZConvHead, (7, 33, 2, 3))])
@pytest.mark.parametrize('fuse', [True, False])
@pytest.mark.filterwarnings('ignore')
def test_onnx(kind, shape, fuse, dynamo, tmp_path):
    """For batches of other sizes than the exported one."""
    pytest.importorskip('onnxscript')
    head, x = random_head(kind=kind, sigma2_init=1e-2), torch.randn(shape)
    batch = dict(dynamic_shapes=[{0: 'batch'}], verbose=False) if dynamo else dict(dynamic_axes={'input': {0: 'batch'}})
    module, file = head.fuse() if fuse else head, tmp_path / 'head.onnx'
    torch.onnx.export(module, (x[:2],), str(file), input_names=['input'], dynamo=dynamo, **batch)
    for count in (4, 7):
        assert_same_logits(onnx_logits(file, x[:count]), head(x[:count]).detach())


def heads_of(model):
    classifiers = model.get_classifier()
    return list(classifiers) if isinstance(classifiers, (tuple, list)) else [classifiers]


@pytest.mark.parametrize(
    'name, size, kind, count',
    [
        ('test_vit', 160, FusedZZZHead, 1),
        ('dla46_c', 64, FusedZZZConvHead, 1),
        ('deit_tiny_distilled_patch16_224', 224, FusedZZZHead, 2),
        ('repghostnet_050', 64, FusedZZZHead, 1),  # has branches of its own to fuse
        ('shvit_s1', 64, FusedZZZHead, 1),  # would fuse the norm before its classifier with it
    ],
)
def test_reparameterize_model(name, size, kind, count):
    model = attach(timm.create_model(name, num_classes=5), rank=3).eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(std=0.1)
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = model(x)
        fused = reparameterize_model(model)
        assert_same_logits(fused(x), expected)
        forms = [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
        for form in forms + [torch.jit.script] if name != 'repghostnet_050' else forms:  # nor can timm's be scripted
            torch.testing.assert_close(form(fused)(x), fused(x))
    assert [type(head) for head in heads_of(fused)] == [kind] * count
    assert all(isinstance(head, ZZZHead) for head in heads_of(model))  # a copy was fused
    with pytest.raises(ValueError, match=f'a {kind.__name__} as its classifier'):
        find_classifiers(fused)
    fused.reset_classifier(7)  # a new head to train
    assert all(isinstance(head, ZZZHead) and head.rank == 3 for head in heads_of(fused))
    assert fused(x).shape == (2, 7)
    assert reparameterize_model(fused, inplace=True) is fused and type(heads_of(fused)[0]) is kind
    fused.reset_classifier(0)
    assert fused(x).shape == (2, fused.head_hidden_size)


@pytest.mark.parametrize('options', [['--reparam'], ['--reparam', '--dynamo'], []], ids=' '.join)
def test_onnx_export_script(options, timm_scripts, run, tmp_path):
    pytest.importorskip('onnxscript')
    shutil.copy(timm_scripts / 'onnx_export.py', tmp_path)
    model = timm.create_model('test_vit.zzz_r8', num_classes=10).eval()
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'checkpoint.pth')
    script = ['-m', 'timm_zzz', 'onnx_export.py', 'out.onnx', '--model', 'test_vit.zzz_r8', '--num-classes', 10]
    run(*script, '--checkpoint', 'checkpoint.pth', '--batch-size', 2, *options)
    x = torch.randn(3, 3, 160, 160)
    torch.testing.assert_close(onnx_logits(tmp_path / 'out.onnx', x), model(x).detach(), rtol=1e-5, atol=1e-5)
