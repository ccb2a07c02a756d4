"""The facts about the function, each against torch.distributions or numerical differentiation."""

import math

import pytest
import torch
from oracles import dense_logits, low_rank_logits, make, qr_basis, reference_logits
from torch.nn import functional as F

from timm_zzz.functional import normalize, orthonormal_basis, zzz_logits
from timm_zzz.ops import reference

# (batch, classes, width, rank); rank None stands for the full width
SHAPES = [(5, 4, 12, 0), (1, 3, 7, 1), (3, 1, 23, 4), (6, 7, 31, 8), (2, 5, 37, 16), (4, 3, 9, None), (2, 2, 1, 1)]
TOLERANCE = {torch.float32: dict(rtol=2e-5, atol=2e-5), torch.float64: dict(rtol=1e-11, atol=1e-11)}


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('shape', SHAPES)
def test_logits_are_the_dense_gaussians_log_density(shape, dtype):
    args = make(*shape)
    actual = zzz_logits(*[t if t is None else t.to(dtype) for t in args])
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), dense_logits(*args), **TOLERANCE[dtype])
    if shape[-1] != 0:
        torch.testing.assert_close(actual.double(), low_rank_logits(*args), **TOLERANCE[dtype])


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('shape', SHAPES)
def test_gradients_are_the_dense_gaussians(shape, dtype):
    args = [t if t is None else t.requires_grad_() for t in make(*shape)]
    cast = [t if t is None else t.to(dtype).detach().requires_grad_() for t in args]
    direction = torch.randn(shape[0], shape[1], dtype=torch.float64)
    losses = (dense_logits(*args) * direction).sum(), (zzz_logits(*cast) * direction.to(dtype)).sum()
    leaves = [[t for t in tensors if t is not None] for tensors in (args, cast)]
    expected, actual = map(torch.autograd.grad, losses, leaves)
    scale = max(g.abs().max().item() for g in expected)
    tolerance = TOLERANCE[dtype]['rtol'] * max(1.0, scale) * 10
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=0, atol=tolerance)


@pytest.mark.parametrize('shape', SHAPES)
def test_gradcheck(shape):
    args = [t if t is None else t.requires_grad_() for t in make(*shape)]
    assert torch.autograd.gradcheck(zzz_logits, args)


def test_basis_gradgradcheck():
    A = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(orthonormal_basis, (A,))
    assert torch.autograd.gradgradcheck(orthonormal_basis, (A,))


def conditioned(c, d, r, condition, dtype=torch.float32):
    U, _, V = torch.linalg.svd(torch.randn(c, d, r, dtype=torch.float64), full_matrices=False)
    return ((U * torch.logspace(0, -math.log10(condition), r, dtype=torch.float64)) @ V).to(dtype)


@pytest.mark.parametrize('condition', [1, 1e3, 1e6])
def test_basis_stays_orthonormal_in_float32(condition):
    A = conditioned(5, 123, 16, condition).requires_grad_()
    basis = orthonormal_basis(A)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(16).expand(5, 16, 16), rtol=0, atol=1e-5)
    basis.square().sum().backward()
    assert A.grad.isfinite().all()


def basis_and_gradient(A, direction):
    A = A.detach().requires_grad_()
    basis = orthonormal_basis(A)
    return basis.detach(), torch.autograd.grad(basis, A, direction)[0]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('condition, r', [(1, 1), (1, 4), (1, 8), (1, 16), (10, 8), (200, 8)])
def test_fast_path_is_lapacks_q_factor_with_its_gradient(condition, r, dtype, monkeypatch):
    monkeypatch.setattr(reference, '_gram_schmidt', lambda rows: pytest.fail('left the fast path'))
    A = conditioned(6, 50, r, condition, dtype) * torch.logspace(-4, 4, r, dtype=dtype)
    direction = torch.randn(A.shape, dtype=dtype)
    basis, grad = basis_and_gradient(A, direction)
    A = A.double().requires_grad_()
    expected = qr_basis(A)
    (expected_grad,) = torch.autograd.grad(expected, A, direction.double())
    eps = condition * (3e-6 if dtype == torch.float32 else 1e-13)
    identity = torch.eye(r, dtype=dtype).expand(6, r, r)
    torch.testing.assert_close(basis.mT @ basis, identity, rtol=0, atol=3e-6 if dtype == torch.float32 else 1e-14)
    torch.testing.assert_close(basis.double(), expected, rtol=0, atol=eps)
    error = (grad - expected_grad).norm(dim=1) / expected_grad.norm(dim=1)
    assert error.max() < condition * eps


def test_each_class_gets_what_it_gets_alone():
    A = conditioned(13, 40, 5, 1)
    A[1], A[2] = conditioned(1, 40, 5, 1e3), conditioned(1, 40, 5, 1e6)
    A[3] = 0
    A[4, :, 3] = A[4, :, 1]
    A[5, :, 2] = 0
    A[6, 7, 1], A[7, 7, 1] = float('nan'), float('inf')
    A[8] *= 1e37
    A[9] *= 1e-37
    A[10, :, 2] *= 1e30
    A[12] = A[12, :, :1]
    direction = torch.randn(A.shape)
    basis, grad = basis_and_gradient(A, direction)
    for i in range(len(A)):
        alone, alone_grad = basis_and_gradient(A[i], direction[i])
        torch.testing.assert_close(basis[i], alone, equal_nan=True)
        tolerance = 1e-5 * alone_grad.nan_to_num().abs().max().item()
        torch.testing.assert_close(grad[i], alone_grad, rtol=1e-5, atol=tolerance, equal_nan=True)
    for usual, tolerance in (([0, 8, 10, 11], 1e-5), ([1], 2e-3)):
        torch.testing.assert_close(basis[usual].double(), qr_basis(A[usual].double()), rtol=0, atol=tolerance)
    finite = basis[[i for i in range(len(A)) if i not in (6, 7)]]
    torch.testing.assert_close(finite.mT @ finite, torch.eye(5).expand(len(finite), 5, 5), rtol=0, atol=1e-5)
    assert not basis[6].isfinite().all() and not basis[7].isfinite().all()
    assert grad[3].abs().max() < 1e-20
    assert grad[4, :, 3].abs().max() < 1e-20 and grad[5, :, 2].abs().max() < 1e-20
    assert grad[[0, 4, 5, 8, 10, 11, 12]].isfinite().all()


def test_fast_and_slow_path_agree(monkeypatch):
    A = conditioned(4, 30, 6, 50, torch.float64)
    direction = torch.randn_like(A)
    fast = basis_and_gradient(A, direction)
    monkeypatch.setattr(reference, '_may_branch', lambda x: False)
    monkeypatch.setattr(reference, '_cholesky_qr', lambda rows: pytest.fail('took the fast path'))
    torch.testing.assert_close(fast, basis_and_gradient(A, direction))


@pytest.mark.parametrize('scale', [1, 1e37])
def test_autocast_does_not_lower_the_precision_of_the_basis(scale):
    A, direction = conditioned(4, 60, 8, 30) * scale, torch.randn(4, 60, 8)
    expected = basis_and_gradient(A, direction)
    with torch.autocast('cpu', torch.bfloat16):
        actual = basis_and_gradient(A, direction)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


@pytest.mark.parametrize('mode', ['real', 'fake', 'symbolic'])
def test_recording_never_looks_at_values(mode):
    record = torch.fx.experimental.proxy_tensor.make_fx(lambda A: orthonormal_basis(A), tracing_mode=mode)
    A = torch.zeros(2, 7, 3)  # recorded on matrices without a basis of their own, run on others
    graph = record(A)
    A = conditioned(2, 7, 3, 10)
    torch.testing.assert_close(graph(A), orthonormal_basis(A))
    assert orthonormal_basis(A.to('meta')).is_meta


def test_vmap_and_repeated_differentiation_of_the_basis():
    A = conditioned(6, 9, 3, 5, torch.float64).reshape(2, 3, 9, 3)
    torch.testing.assert_close(torch.func.vmap(orthonormal_basis, 1, 1)(A), orthonormal_basis(A))
    torch.testing.assert_close(torch.func.vmap(torch.func.vmap(orthonormal_basis))(A), orthonormal_basis(A))
    small = A[0, 0, :4]

    def first(A):
        return orthonormal_basis(A).pow(3).sum()

    expected = torch.autograd.functional.hessian(first, small)
    torch.testing.assert_close(torch.func.jacrev(torch.func.jacrev(first))(small), expected)


def test_rank_0_is_a_cosine_classifier():
    f, weight, bias, _, _, s2_raw = args = make(6, 5, 11, 0)
    a = 1 / (F.softplus(s2_raw) + 1e-4)
    constant = zzz_logits(*args) - a * F.cosine_similarity(f.unsqueeze(1), weight, dim=-1) - bias
    torch.testing.assert_close(constant, constant[:1, :1].expand(6, 5))


def test_only_span_and_order_of_the_columns_matter():
    f, weight, bias, A, v_raw, s2_raw = make(4, 3, 13, 5)
    expected = zzz_logits(f, weight, bias, A, v_raw, s2_raw)
    signs = torch.tensor([1.0, -1, 1, -1, -1], dtype=A.dtype)
    triangular = torch.randn(3, 5, 5, dtype=A.dtype).triu(1) + torch.diag_embed(torch.rand(3, 5, dtype=A.dtype) + 0.5)
    order = [3, 1, 0, 4, 2]
    torch.testing.assert_close(zzz_logits(f, weight, bias, A * signs, v_raw, s2_raw), expected)
    torch.testing.assert_close(zzz_logits(f, weight, bias, A @ triangular, v_raw, s2_raw), expected)
    permuted = zzz_logits(f, weight, bias, A[..., order], v_raw[..., order], s2_raw)
    assert (permuted - expected).abs().max() > 1e-3  # which has another basis
    basis = orthonormal_basis(A)  # orthonormal columns may be permuted together with their variances
    torch.testing.assert_close(zzz_logits(f, weight, bias, basis[..., order], v_raw[..., order], s2_raw), expected)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('sigma2_raw', [0.0, -2.7, -20.0])
def test_autocast_error_is_bounded_by_the_references_own(dtype, sigma2_raw):
    args = make(127, 7, 123, 8, torch.float32)
    args[-1] = torch.tensor(sigma2_raw)
    truth = dense_logits(*[t.double() for t in args])
    with torch.autocast('cpu', dtype=dtype):
        actual, reference = zzz_logits(*args), reference_logits(*args)
    assert actual.dtype == torch.float32
    error, bound = (actual - truth).abs().max(), (reference - truth).abs().max()
    assert error <= bound + 1e-6 * truth.abs().max()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_input_and_parameters(dtype):
    args = [t if t is None else t.to(dtype) for t in make(5, 4, 33, 4)]
    actual = zzz_logits(*args)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), dense_logits(*[t.double() for t in args]), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize('v_raw', [-1e4, 0.0, 1e4])
@pytest.mark.parametrize('sigma2_raw', [-1e4, 0.0])
@pytest.mark.parametrize('case', ['none', 'features', 'weight', 'A', 'columns'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_degenerate_input_gives_finite_logits_and_gradients(case, sigma2_raw, v_raw, dtype):
    f, weight, bias, A, v, _ = [t.to(dtype) for t in make(3, 4, 11, 3)]
    v.fill_(v_raw)
    zero = dict(features=f[1], weight=weight[2], A=A[0])
    if case in zero:
        zero[case].zero_()
    elif case == 'columns':
        A[1, :, 2] = A[1, :, 0] + 1e-6 * A[1, :, 1]
    leaves = [t.requires_grad_() for t in (f, weight, bias, A, v, torch.tensor(sigma2_raw, dtype=dtype))]
    logits = zzz_logits(*leaves)
    assert logits.isfinite().all()
    F.cross_entropy(logits, torch.tensor([0, 1, 2])).backward()
    assert not any(t.grad.isnan().any() for t in leaves)
    # A gradient may by right exceed float16's range
    assert dtype == torch.float16 or all(t.grad.isfinite().all() for t in leaves)


@pytest.mark.parametrize('scale', [1e-30, 1e30])
def test_embeddings_of_any_magnitude(scale):
    args = make(4, 3, 10, 2, torch.float32)
    expected = zzz_logits(*args)
    torch.testing.assert_close(zzz_logits(args[0] * scale, args[1] / scale, *args[2:]), expected)


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_non_finite_input_gives_non_finite_logits_where_it_is(value):
    f, weight, bias, A, v_raw, s2_raw = make(3, 4, 11, 3, torch.float32)
    f[1, 0] = value
    logits = zzz_logits(f, weight, bias, A, v_raw, s2_raw)
    assert not logits[1].isfinite().any() and logits[[0, 2]].isfinite().all()
    for broken in (weight, A):
        clean = broken.clone()
        broken[2, 0] = value
        logits = zzz_logits(f[[0, 2]], weight, bias, A, v_raw, s2_raw)
        assert not logits[:, 2].isfinite().any() and logits[:, [0, 1, 3]].isfinite().all()
        broken.copy_(clean)


def test_normalize_keeps_zero():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    y = normalize(x)
    assert y.tolist() == [[0, 0], pytest.approx([0.6, 0.8])]
    y.sum().backward()
    assert x.grad.isfinite().all()


def test_shapes_of_features():
    f, *rest = make(6, 4, 9, 2)
    torch.testing.assert_close(zzz_logits(f.reshape(2, 3, 9), *rest).reshape(6, 4), zzz_logits(f, *rest))
    assert zzz_logits(f[:0], *rest).shape == (0, 4)
    with pytest.raises(ValueError, match=r'features: expected a last dimension of 9 .*\[6, 8\]'):
        zzz_logits(f[:, :8], *rest)
