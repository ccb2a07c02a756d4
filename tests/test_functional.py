"""The facts about the function, each against torch.distributions or numerical differentiation."""

import math

import pytest
import torch
from torch.distributions import LowRankMultivariateNormal, MultivariateNormal
from torch.nn import functional as F

from timm_zzz.functional import log_density, normalize, orthonormal_basis, zzz_logits

# (batch, classes, width, rank); rank None stands for the full width
SHAPES = [(5, 4, 12, 0), (1, 3, 7, 1), (3, 1, 23, 4), (6, 7, 31, 8), (2, 5, 37, 16), (4, 3, 9, None), (2, 2, 1, 1)]
TOLERANCE = {torch.float32: dict(rtol=2e-5, atol=2e-5), torch.float64: dict(rtol=1e-11, atol=1e-11)}


def make(b, c, d, r, dtype=torch.float64):
    r = d if r is None else r
    tensors = [torch.randn(b, d), torch.randn(c, d), torch.randn(c)]
    tensors += [torch.randn(c, d, r), torch.randn(c, r)] if r else [None, None]
    tensors.append(torch.tensor(-1.0))
    return [t if t is None else t.to(dtype) for t in tensors]


def qr_basis(A):
    Q, R = torch.linalg.qr(A)
    return Q * R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)


def parts(f, weight, bias, A, v_raw, s2_raw, v_min=1e-4, s2_min=1e-4):
    """x, mu, U, v, sigma2 by textbook routines."""
    x = f / torch.linalg.norm(f, dim=-1, keepdim=True)
    mu = weight / torch.linalg.norm(weight, dim=-1, keepdim=True)
    U = weight.new_zeros(*weight.shape, 0) if A is None else qr_basis(A)
    v = weight.new_zeros(len(weight), 0) if v_raw is None else F.softplus(v_raw) + v_min
    return x, mu, U, v, F.softplus(s2_raw) + s2_min


def dense_logits(*args):
    """By dense covariance matrices and their Cholesky factors."""
    x, mu, U, v, s2 = parts(*args)
    d = x.shape[-1]
    sigma = (U * v.unsqueeze(-2)) @ U.mT + s2 * torch.eye(d, dtype=x.dtype)
    return MultivariateNormal(mu, sigma).log_prob(x.unsqueeze(-2)) + d / 2 * math.log(2 * math.pi) + args[2]


def low_rank_logits(*args):
    x, mu, U, v, s2 = parts(*args)
    d = x.shape[-1]
    density = LowRankMultivariateNormal(mu, U * v.sqrt().unsqueeze(-2), s2.expand(mu.shape))
    return density.log_prob(x.unsqueeze(-2)) + d / 2 * math.log(2 * math.pi) + args[2]


def reference_logits(f, weight, bias, A, v_raw, s2_raw):
    """The straightforward code, which materialises delta and lets autocast have its way."""
    x, mu, U, v, s2 = parts(f.float(), weight, bias, A, v_raw, s2_raw)
    delta = x.unsqueeze(1) - mu
    t = torch.einsum('bcd,cdr->bcr', delta, U)
    a = 1 / s2
    quadratic = a * delta.square().sum(-1) - a * a * (t.square() * (v / (1 + a * v))).sum(-1)
    return -0.5 * (quadratic + x.shape[-1] * s2.log() + torch.log1p(a * v).sum(-1)) + bias


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
    args = make(*shape)
    leaves = [t.clone().requires_grad_() for t in args if t is not None]
    cast = [t.to(dtype).detach().requires_grad_() for t in leaves]

    def fill(tensors):
        it = iter(tensors)
        return [None if t is None else next(it) for t in args]

    direction = torch.randn(shape[0], shape[1], dtype=torch.float64)
    expected = torch.autograd.grad((dense_logits(*fill(leaves)) * direction).sum(), leaves)
    actual = torch.autograd.grad((zzz_logits(*fill(cast)) * direction.to(dtype)).sum(), cast)
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


@pytest.mark.parametrize('r', [1, 4, 8, 16])
def test_basis_is_the_q_factor(r):
    A = torch.randn(3, 40, r, dtype=torch.float64)
    torch.testing.assert_close(orthonormal_basis(A), qr_basis(A))


@pytest.mark.parametrize('condition', [1, 1e3, 1e6])
def test_basis_stays_orthonormal_in_float32(condition):
    U, _, V = torch.linalg.svd(torch.randn(5, 123, 16), full_matrices=False)
    A = ((U * torch.logspace(0, -math.log10(condition), 16)) @ V).requires_grad_()
    basis = orthonormal_basis(A)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(16).expand(5, 16, 16), rtol=0, atol=1e-5)
    basis.square().sum().backward()
    assert A.grad.isfinite().all()


@pytest.mark.parametrize('kind', ['zero', 'equal columns', 'zero column', 'huge', 'tiny'])
def test_basis_of_degenerate_matrices(kind):
    A = torch.randn(4, 9, 5)
    if kind == 'zero':
        A.zero_()
    elif kind == 'equal columns':
        A[..., 1:] = A[..., :1]
    elif kind == 'zero column':
        A[..., 2] = 0
    else:
        A *= 1e37 if kind == 'huge' else 1e-37
    A.requires_grad_()
    basis = orthonormal_basis(A)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(5).expand(4, 5, 5), rtol=0, atol=1e-5)
    if kind != 'tiny':  # whose gradient is of the order 1e37 by right
        (basis * torch.randn_like(basis)).sum().backward()
        assert A.grad.isfinite().all()


def test_rank_0_is_a_cosine_classifier():
    f, weight, bias, _, _, s2_raw = args = make(6, 5, 11, 0)
    a = 1 / (F.softplus(s2_raw) + 1e-4)
    constant = zzz_logits(*args) - a * F.cosine_similarity(f.unsqueeze(1), weight, dim=-1) - bias
    torch.testing.assert_close(constant, constant[:1, :1].expand(6, 5))


def test_rank_0_with_equal_norms_is_a_linear_layer_on_normalised_features():
    f, weight, bias, _, _, s2_raw = make(6, 5, 11, 0)
    weight = 3 * F.normalize(weight)
    scale = 1 / (F.softplus(s2_raw) + 1e-4) / 3
    expected = F.linear(F.normalize(f), scale * weight, bias).softmax(-1)
    torch.testing.assert_close(zzz_logits(f, weight, bias, None, None, s2_raw).softmax(-1), expected)


def test_only_span_and_order_of_the_columns_matter():
    f, weight, bias, A, v_raw, s2_raw = make(4, 3, 13, 5)
    expected = zzz_logits(f, weight, bias, A, v_raw, s2_raw)
    signs = torch.tensor([1.0, -1, 1, -1, -1], dtype=A.dtype)
    triangular = torch.randn(3, 5, 5, dtype=A.dtype).triu(1) + torch.diag_embed(torch.rand(3, 5, dtype=A.dtype) + 0.5)
    order = [3, 1, 0, 4, 2]
    torch.testing.assert_close(zzz_logits(f, weight, bias, A * signs, v_raw, s2_raw), expected)
    torch.testing.assert_close(zzz_logits(f, weight, bias, A @ triangular, v_raw, s2_raw), expected)
    basis = orthonormal_basis(A)  # orthonormal columns may be permuted together with their variances
    torch.testing.assert_close(zzz_logits(f, weight, bias, basis[..., order], v_raw[..., order], s2_raw), expected)


def test_class_free_terms_change_no_softmax():
    args = make(4, 3, 13, 5)
    x, mu, U, v, s2 = parts(*args)
    covariance = (U * v.unsqueeze(-2)) @ U.mT + s2 * torch.eye(13, dtype=s2.dtype)
    delta = x.unsqueeze(1) - mu
    quadratic = -0.5 * torch.einsum('bci,cij,bcj->bc', delta, torch.linalg.inv(covariance), delta)
    without_constant = quadratic - 0.5 * torch.log1p(v / s2).sum(-1) + args[2]
    torch.testing.assert_close(zzz_logits(*args).softmax(-1), without_constant.softmax(-1))


def test_log_density():
    args = make(4, 3, 13, 5)
    x, mu, U, v, s2 = parts(*args)
    density = LowRankMultivariateNormal(mu, U * v.sqrt().unsqueeze(-2), s2.expand(mu.shape))
    torch.testing.assert_close(log_density(x, mu, U, v, s2), density.log_prob(x.unsqueeze(-2)))


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
    if case == 'features':
        f[1] = 0
    elif case == 'weight':
        weight[2] = 0
    elif case == 'A':
        A[0] = 0
    elif case == 'columns':
        A[1, :, 2] = A[1, :, 0] + 1e-6 * A[1, :, 1]
    leaves = [t.requires_grad_() for t in (f, weight, bias, A, v, torch.tensor(sigma2_raw, dtype=dtype))]
    logits = zzz_logits(*leaves)
    assert logits.isfinite().all()
    F.cross_entropy(logits, torch.tensor([0, 1, 2])).backward()
    if dtype == torch.float32:
        assert all(t.grad.isfinite().all() for t in leaves)
    else:  # a gradient may by right exceed float16's range; it is never NaN
        assert not any(t.grad.isnan().any() for t in leaves)


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


def test_leading_dimensions_and_empty_batch():
    f, *rest = make(6, 4, 9, 2)
    torch.testing.assert_close(zzz_logits(f.reshape(2, 3, 9), *rest).reshape(6, 4), zzz_logits(f, *rest))
    assert zzz_logits(f[:0], *rest).shape == (0, 4)


def test_wrong_width_is_named():
    f, *rest = make(2, 3, 9, 2)
    with pytest.raises(ValueError, match=r'features: expected a last dimension of 9 .*\[2, 8\]'):
        zzz_logits(f[:, :8], *rest)
