import copy
import pickle
import shutil
import warnings

import pytest
import timm
import torch
from oracles import distinct
from sklearn.linear_model import LogisticRegression
from timm.utils import reparameterize_model
from torch import nn
from torch.nn import functional as F

from timm_zzz import ZZZHead, attach
from timm_zzz.fit import fit_head
from timm_zzz.head import FusedZZZConvHead, FusedZZZHead, ZZZConvHead
from timm_zzz.models.attach import find_classifiers


def random_head(num_classes=20, feat_dim=33, rank=3, kind=ZZZHead, **kwargs):
    head = distinct(kind(num_classes, feat_dim, rank, **kwargs))
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
    assert not any(t.requires_grad for t in [*fused.parameters(), *fused.buffers()])
    x = torch.randn(4, 33)
    assert torch.equal(fused.train()(x), fused.eval()(x))
    with pytest.raises(ValueError, match='features: expected a last dimension of 33'):
        fused(torch.randn(4, 32))
    assert fused(torch.randn(2, 3, 33)).shape == (2, 3, 20) and fused(torch.randn(33)).shape == (20,)


def test_impl():
    head = random_head(impl='torch')
    fused = head.fuse()
    assert fused.impl == 'torch'
    fused.impl = 'auto'
    assert fused.impl == 'auto' and head.impl == 'torch'
    with pytest.raises(ValueError, match='impl: expected one of auto, torch, triton'):
        fused.impl = 'cuda'
    model = attach(timm.create_model('test_vit', num_classes=5))
    model.head.impl = 'torch'
    model.reset_classifier(7)
    assert model.head.impl == 'torch'


@pytest.mark.parametrize('log_density', [False, True])
def test_a_traced_fused_head_in_16_bits(log_density):
    head, x = random_head(log_density=log_density), torch.randn(4, 33)
    half = torch.fx.symbolic_trace(head.fuse()).half()(x.half())
    assert_same_logits(half.float(), head(x).detach(), 5e-3)


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
    assert head.fuse().to('meta').weight.is_meta


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
    if fuse and dynamo and torch.__version__.startswith('2.6.'):
        pytest.skip("torch 2.6 can't decompose addcmul with a symbolic size for ONNX")
    head, x = random_head(kind=kind, sigma2_init=1e-2), torch.randn(shape)
    shapes = [{0: torch.export.Dim('batch')}]  # by its name from torch 2.7 on
    batch = dict(dynamic_shapes=shapes, verbose=False) if dynamo else dict(dynamic_axes={'input': {0: 'batch'}})
    module, file = head.fuse() if fuse else head, tmp_path / 'head.onnx'
    torch.onnx.export(module, (x[:2],), str(file), input_names=['input'], dynamo=dynamo, **batch)
    for count in (4, 7):
        assert_same_logits(onnx_logits(file, x[:count]), head(x[:count]).detach())


class _Calibration:
    def __init__(self, x):
        self.batches = iter([{'input': part.numpy()} for part in x.split(50)])

    def get_next(self):
        return next(self.batches, None)


@pytest.fixture(scope='module')
def task():
    """Features of 20 classes that vary along directions of their own, and three heads that were made for them."""
    generator = torch.Generator().manual_seed(0)
    means = 0.3 * torch.randn(20, 1, 256, generator=generator) + torch.randn(256, generator=generator)
    directions = 0.2 * torch.randn(20, 4, 256, generator=generator)

    def draw(count):
        along = torch.randn(20, count, 4, generator=generator) @ directions
        x = means + along + torch.randn(20, count, 256, generator=generator)
        return x.flatten(0, 1), torch.arange(20).repeat_interleave(count)

    train, test = draw(100), draw(50)
    linear = nn.Linear(256, 20)
    x = F.normalize(train[0])
    fitted = LogisticRegression(C=100, max_iter=500).fit(x.numpy(), train[1].numpy())
    linear.weight.data, linear.bias.data = (
        torch.tensor(t, dtype=torch.float32) for t in (fitted.coef_, fitted.intercept_)
    )
    zzz = fit_head(*train, rank=4, sigma2=1 / 16).eval()  # as after fine-tuning
    density = ZZZHead(20, 256, 4, log_density=True).eval()
    density.load_state_dict(zzz.state_dict())

    class Normalized(nn.Module):
        def forward(self, x):
            return F.normalize(x)

    heads = {'linear': nn.Sequential(Normalized(), linear), 'zzz': zzz.fuse(), 'log-density': density.fuse()}
    return heads, train[0], test


def accuracy(logits, target):
    return (logits.argmax(1) == target).double().mean().item()


@pytest.mark.filterwarnings('ignore')
def test_exports_of_few_bits_classify_as_well_as_a_linear_layers(task, tmp_path):
    """In float16, inputs and outputs too, and static int8, by onnxruntime; the log-density does not survive int8."""
    onnx, quantization = pytest.importorskip('onnx'), pytest.importorskip('onnxruntime.quantization')
    float16 = pytest.importorskip('onnxruntime.transformers.float16')
    heads, calibration, (x, target) = task
    lost = {}
    for name, head in heads.items():
        files = [str(tmp_path / f'{name}-{form}.onnx') for form in ('float32', 'float16', 'int8')]
        torch.onnx.export(
            head, (x[:2],), files[0], input_names=['input'], dynamo=False, dynamic_axes={'input': {0: 'batch'}}
        )
        onnx.save(float16.convert_float_to_float16(onnx.load(files[0])), files[1])
        quantization.quantize_static(files[0], files[2], _Calibration(calibration))
        exact, half, int8 = (
            accuracy(onnx_logits(file, x.half() if 'float16' in file else x), target) for file in files
        )
        assert exact == accuracy(head(x), target)
        lost[name] = exact - half, exact - int8
    assert lost['zzz'][0] < 0.005 and lost['zzz'][1] < 0.02, lost
    assert lost['log-density'][1] > 0.1, lost


@pytest.mark.parametrize('sigma2', [1e-3, 1e-2, 1 / 16])
def test_int8_keeps_the_directions(sigma2):
    """Rows of means and of directions share a scale, whatever sigma2 is. Against the truth in float64."""
    head = ZZZHead(30, 64, 4, init='reference', sigma2_init=sigma2, v_init=10 * sigma2)
    with torch.no_grad():
        head.weight.copy_(F.normalize(torch.randn(1, 64)) + 0.1 * F.normalize(torch.randn(30, 64)))
    mu, basis, v, _, _ = head.gaussians()
    target = torch.arange(3000) % 30
    x = mu[target] + torch.einsum('bdr,br->bd', basis[target], torch.randn(3000, 4) * v[target].sqrt())
    x += sigma2**0.5 * torch.randn(3000, 64)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(head.fuse()), {nn.Linear}, torch.qint8)
    exact = head.double()(x.double()).detach()
    assert accuracy(quantised(x), target) > accuracy(exact, target) - 0.02
    assert F.cross_entropy(quantised(x), target) < F.cross_entropy(exact, target) + 0.05


def test_dynamic_quantisation_reaches_the_fused_head(task):
    heads, _, (x, target) = task
    fused = nn.Sequential(copy.deepcopy(heads['zzz']))
    before = len(pickle.dumps(fused.state_dict()))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        quantised = torch.ao.quantization.quantize_dynamic(fused, {nn.Linear}, torch.qint8)
    assert accuracy(quantised(x), target) > accuracy(fused(x), target) - 0.02
    assert not torch.equal(quantised(x), fused(x))
    for form in (torch.jit.trace(quantised, x), torch.jit.script(quantised)):
        torch.testing.assert_close(form(x), quantised(x))
    torch.testing.assert_close(
        quantised[0].weight, fused[0].weight, rtol=0, atol=0.05 * fused[0].weight.abs().max().item()
    )
    assert torch.equal(quantised[0].bias, fused[0].bias)
    assert len(pickle.dumps(quantised.state_dict())) < 0.4 * before


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
    model = distinct(attach(timm.create_model(name, num_classes=5), rank=3)).eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(std=0.1)
    x = torch.randn(2, 3, size, size)
    expected = model(x).detach()  # with gradients a head does not fuse itself
    with torch.no_grad():
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
    model = distinct(timm.create_model('test_vit.zzz_r8', num_classes=10)).eval()
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'checkpoint.pth')
    script = ['-m', 'timm_zzz', 'onnx_export.py', 'out.onnx', '--model', 'test_vit.zzz_r8', '--num-classes', 10]
    run(*script, '--checkpoint', 'checkpoint.pth', '--batch-size', 2, *options)
    x = torch.randn(3, 3, 160, 160)
    torch.testing.assert_close(onnx_logits(tmp_path / 'out.onnx', x), model(x).detach(), rtol=1e-5, atol=1e-5)
