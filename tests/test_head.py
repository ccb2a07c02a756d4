import copy
import io
import pickle
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from timm_zzz import ZZZHead
from timm_zzz.functional import zzz_logits

SHAPES = {'weight': (5, 12), 'A': (5, 12, 3), 'v_raw': (5, 3), 'sigma2_raw': (), 'bias': (5,)}


def test_parameters_and_defaults():
    head = ZZZHead(5, 12, rank=3)
    assert {name: tuple(p.shape) for name, p in head.named_parameters()} == SHAPES
    assert head.mu is head.weight
    assert (head.v_raw == 0).all() and head.sigma2_raw == 0 and (head.bias == 0).all()
    large = ZZZHead(100, 100)
    assert large.rank == 8
    assert large.weight.std().item() == pytest.approx(0.02, rel=0.1) == large.A.std().item()


def test_rank_0_has_no_subspace():
    head = ZZZHead(5, 12, rank=0)
    assert set(head.state_dict()) == {'weight', 'bias', 'sigma2_raw'}
    assert head(torch.randn(2, 12)).shape == (2, 5)


def test_initial_variances():
    head = ZZZHead(5, 12, v_init=2.0, sigma2_init=1e-3)
    torch.testing.assert_close(F.softplus(head.v_raw) + head.v_min, torch.full((5, 8), 2.0))
    assert (F.softplus(head.sigma2_raw) + head.sigma2_min).item() == pytest.approx(1e-3, rel=1e-4)


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(num_classes=0), 'num_classes: expected at least 1, got 0'),
        (dict(feat_dim=0), 'feat_dim: expected at least 1, got 0'),
        (dict(rank=-1), 'rank: .*got -1'),
        (dict(rank=13), 'rank: expected 0 <= rank <= feat_dim = 12, got 13'),
        (dict(rank=2.0), 'rank: expected an int, got 2.0'),
        (dict(v_min=0.0), 'v_min: .*got 0.0'),
        (dict(sigma2_min=float('nan')), 'sigma2_min: .*got nan'),
        (dict(sigma2_init=1e-5), 'sigma2_init: .*above the minimum 0.0001, got 1e-05'),
        (dict(v_init=float('inf')), 'v_init: .*got inf'),
    ],
)
def test_wrong_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ZZZHead(**{**dict(num_classes=5, feat_dim=12), **kwargs})


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match='features: expected a last dimension of 12'):
        ZZZHead(5, 12)(torch.randn(2, 11))


class _LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return out


def test_never_materialises_batch_times_classes_times_width():
    b, c, d, r = 64, 32, 48, 2
    head, x = ZZZHead(c, d, r), torch.randn(b, d, requires_grad=True)
    with _LargestTensor() as largest:
        F.cross_entropy(head(x), torch.zeros(b, dtype=torch.long)).backward()
    assert c * d * r <= largest.numel <= max(b * c * r, c * d * r) < b * c * d


@pytest.mark.parametrize('rank', [0, 3])
def test_linear_state_dict_warm_starts_the_means(rank):
    linear, head = nn.Linear(12, 5), ZZZHead(5, 12, rank, sigma2_init=0.05)
    before = copy.deepcopy(head.state_dict())
    head.load_state_dict(linear.state_dict(), strict=True)
    assert torch.equal(head.weight, linear.weight) and torch.equal(head.bias, linear.bias)
    assert all(torch.equal(v, before[k]) for k, v in head.state_dict().items() if k not in ('weight', 'bias'))
    if rank == 0:  # then it is the cosine classifier with the linear layer's rows
        x = torch.randn(9, 12)
        expected = F.linear(F.normalize(x), F.normalize(linear.weight)) / 0.05 + linear.bias
        assert torch.equal(head(x).argmax(1), expected.argmax(1))


def test_convolution_and_old_name_load():
    conv, head = nn.Conv2d(12, 5, 1), ZZZHead(5, 12, 3)
    head.load_state_dict(conv.state_dict())
    assert torch.equal(head.weight, conv.weight.flatten(1))
    other = ZZZHead(5, 12, 3)
    other.load_state_dict({'mu' if k == 'weight' else k: v for k, v in head.state_dict().items()})
    assert torch.equal(other.weight, head.weight) and torch.equal(other.A, head.A)


@pytest.mark.parametrize(
    'source, figures',
    [
        (nn.Linear(12, 7), 'classes 7 -> 5, features 12 -> 12'),
        (nn.Linear(10, 5), 'classes 5 -> 5, features 10 -> 12'),
        (ZZZHead(7, 12, 3), 'classes 7 -> 5, features 12 -> 12, rank 3 -> 3'),
        (ZZZHead(5, 12, 4), 'classes 5 -> 5, features 12 -> 12, rank 4 -> 3'),
        (ZZZHead(5, 12, 0), 'classes 5 -> 5, features 12 -> 12, rank 0 -> 3'),
    ],
)
@pytest.mark.parametrize('strict', [True, False])
def test_other_sizes_are_refused_with_both_figures(source, figures, strict):
    head = ZZZHead(5, 12, 3)
    with pytest.raises(RuntimeError, match=re.escape(figures)) as error:
        nn.Sequential(head).load_state_dict({f'0.{k}': v for k, v in source.state_dict().items()}, strict=strict)
    assert 'size mismatch' not in str(error.value)  # said once


@pytest.mark.parametrize('gone', list(SHAPES))
def test_truncated_state_dict_is_an_error(gone):
    state = ZZZHead(5, 12, 3).state_dict()
    state.pop(gone)
    with pytest.raises(RuntimeError, match='Missing key|another size'):
        ZZZHead(5, 12, 3).load_state_dict(state)


def test_remains_of_a_head_for_other_classes_start_anew(caplog):
    head = ZZZHead(5, 12, 3)
    before = copy.deepcopy(head.state_dict())
    remains = {k: v for k, v in ZZZHead(7, 12, 3).state_dict().items() if k not in ('weight', 'bias')}
    with caplog.at_level('INFO', 'timm_zzz'):
        result = head.load_state_dict(remains, strict=False)
    assert set(result.missing_keys) == {'weight', 'bias'} and not result.unexpected_keys
    assert len([r for r in caplog.records if 'starts anew' in r.message]) == 1
    assert all(torch.equal(v, before[k]) for k, v in head.state_dict().items())
    with pytest.raises(RuntimeError, match='Missing key'):
        head.load_state_dict(remains, strict=True)


def test_meta_device():
    head = ZZZHead(5, 12, 3, device='meta', sigma2_init=0.1)
    linear = nn.Linear(12, 5)
    head.load_state_dict(linear.state_dict(), assign=True)
    assert not any(p.is_meta for p in head.parameters())
    assert torch.equal(head.weight, linear.weight) and head.A.std() > 0
    assert head(torch.randn(2, 12)).isfinite().all()


@pytest.mark.parametrize('rank', [0, 3])
def test_other_forms_give_the_same_logits(rank):
    head, x = ZZZHead(5, 12, rank), torch.randn(4, 12)
    expected = head(x)
    buffer = io.BytesIO()
    torch.save(head, buffer)
    buffer.seek(0)
    forms = {
        'deepcopy': copy.deepcopy(head),
        'pickle': pickle.loads(pickle.dumps(head)),
        'torch.save': torch.load(buffer, weights_only=False),
        'script': torch.jit.script(head),
        'trace': torch.jit.trace(head, x),
        'fx': torch.fx.symbolic_trace(head),
        'export': torch.export.export(head, (x,)).module(),
        'compile': torch.compile(head, fullgraph=True, backend='aot_eager'),
    }
    for name, form in forms.items():
        torch.testing.assert_close(form(x), expected, msg=lambda m, name=name: f'{name}: {m}')


def test_compiled_gradients():
    head, x = ZZZHead(5, 12, 3), torch.randn(4, 12)
    compiled = torch.compile(copy.deepcopy(head), fullgraph=True, backend='aot_eager')
    head(x).square().sum().backward()
    compiled(x).square().sum().backward()
    for p, q in zip(head.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_functional_transforms():
    head, x = ZZZHead(5, 12, 3), torch.randn(4, 12)
    params = dict(head.named_parameters())

    def loss(params, row):
        return torch.func.functional_call(head, params, (row,)).logsumexp(-1)

    per_row = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, x)
    (head(x).logsumexp(-1)).sum().backward()
    for name, p in head.named_parameters():
        torch.testing.assert_close(per_row[name].sum(0), p.grad)


def test_float64_module_and_bfloat16_module():
    assert ZZZHead(5, 12, 3, dtype=torch.float64)(torch.randn(2, 12)).dtype == torch.float64
    head = ZZZHead(5, 12, 3).to(torch.bfloat16)
    logits = head(torch.randn(2, 12, dtype=torch.bfloat16))
    assert logits.dtype == torch.float32
    logits.sum().backward()
    assert head.A.grad.dtype == torch.bfloat16


def test_training_fits():
    head, x, y = ZZZHead(3, 6, 2, sigma2_init=0.1), torch.randn(60, 6), torch.arange(60) % 3
    x += 3 * torch.eye(6)[y]
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        loss = F.cross_entropy(head(x), y)
        loss.backward()
        optimizer.step()
    assert loss < 0.1


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_cuda_agrees_and_never_synchronises():
    head, x = ZZZHead(50, 123, 8, sigma2_init=0.05), torch.randn(33, 123)
    expected = zzz_logits(
        x.double(), *[p.double() for p in (head.weight, head.bias, head.A, head.v_raw, head.sigma2_raw)]
    )
    head, x, y = head.cuda(), x.cuda(), torch.arange(33, device='cuda')
    F.cross_entropy(head(x), y).backward()  # loads the kernels
    head.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        logits = head(x)
        F.cross_entropy(logits, y).backward()
        with torch.autocast('cuda', torch.bfloat16):
            half = head(x)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert all(p.grad.isfinite().all() for p in head.parameters())
    torch.testing.assert_close(logits.cpu().double(), expected, rtol=2e-5, atol=2e-4)
    torch.testing.assert_close(half, logits)
