"""The mathematics of the ZZZ head in plain PyTorch: the reference for every other implementation.

A class ``c`` is a Gaussian over L2-normalised embeddings with mean ``mu_c`` and covariance::

    Sigma_c = U_c diag(v_c) U_c^T + sigma2 I,        U_c^T U_c = I,

of which only ``U_c`` (d x r), ``v_c`` (r) and the scalar ``sigma2`` are stored. No d x d matrix and no tensor of shape
(batch, classes, d) is formed: with ``a = 1 / sigma2``, ``delta = x - mu_c``, ``t = U_c^T delta``::

    delta^T Sigma_c^-1 delta = a |delta|^2 - a sum_i t_i^2 (a v_i) / (1 + a v_i)       (Woodbury identity)
    log |Sigma_c|            = d log sigma2 + sum_i log(1 + a v_i)                      (matrix determinant lemma)

Unless they say otherwise, functions compute in the dtype of their arguments and are differentiable in all of them.
"""

import math
from typing import Callable, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .tracing import is_plain

__all__ = [
    'Parameters',
    'class_gaussians',
    'factorized_rows',
    'fuse',
    'fused_logits',
    'fused_scale',
    'gaussian_logits',
    'inverse_softplus',
    'log_density',
    'logits',
    'normalize',
    'orthonormal_rows',
    'shared_log_density',
    'sigma2_of',
]


class Parameters(NamedTuple):
    """The unconstrained parameters of a head of C classes, width d and rank r; A and v_raw are None at rank 0."""

    weight: Tensor  # (C, d)
    bias: Tensor  # (C,)
    A: Optional[Tensor]  # (C, d, r)
    v_raw: Optional[Tensor]  # (C, r)
    sigma2_raw: Tensor  # (1,) or ()


def normalize(x: Tensor) -> Tensor:
    """Divide vectors by their Euclidean norm; zero vectors stay zero.

    The result is accurate even where ``|x|^2`` overflows or underflows, and the gradient at zero is finite.

    Args:
        x: Vectors, shape (..., d).

    Returns:
        Unit (or zero) vectors, shape (..., d).

    Example:
        >>> normalize(torch.tensor([[3e30, 4e30], [0., 0.]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    # The result does not depend on the scale, so the gradient needs no term for it.
    x = x / _scale(x)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(norm > 0, norm, torch.ones_like(norm))


def _gram_schmidt(rows: Tensor) -> Tuple[Tensor, Tensor]:
    """Orthonormalise by Gram-Schmidt with one re-orthogonalisation.

    One is enough (Giraud et al. 2005, doi:10.1007/s00211-005-0615-4). Element-wise products and sums take the place of
    matrix products, whose precision autocast or TF32 would lower. No step raises or synchronises with the device.

    Args:
        rows: Vectors to orthonormalise in order, shape (..., r, d), r <= d.

    Returns:
        Orthonormal rows q of shape (..., r, d) and upper-triangular R of shape (..., r, r) with rows = R^T q. A row
        that depends linearly on earlier ones is replaced by a unit vector orthogonal to them and gets a huge diagonal
        entry in R, so that no gradient flows back to it.
    """
    r, d = rows.shape[-2], rows.shape[-1]
    eps = 2.3e-16 if rows.dtype == torch.float64 else 1.2e-7
    coordinate = torch.arange(d, device=rows.device)
    leverage = torch.zeros_like(rows[..., 0, :])
    q: List[Tensor] = []
    columns: List[Tensor] = []
    for j in range(r):
        a = rows[..., j, :]
        size = torch.linalg.vector_norm(a, dim=-1, keepdim=True)
        coef = a[..., :0]
        basis = leverage.unsqueeze(-2)
        if j > 0:
            basis = torch.stack(q, -2)
            coef = (basis * a.unsqueeze(-2)).sum(-1)
            a = a - (basis * coef.unsqueeze(-1)).sum(-2)
        dependent = torch.linalg.vector_norm(a, dim=-1, keepdim=True) <= 4 * eps * size
        # The coordinate axis with the least leverage is at least sqrt(1 / d) away from the span of the rows so far.
        axis = (coordinate == leverage.argmin(-1, keepdim=True)).to(a.dtype)
        a = torch.where(dependent, axis, a)
        if j > 0:
            correction = (basis * a.unsqueeze(-2)).sum(-1)
            a = a - (basis * correction.unsqueeze(-1)).sum(-2)
            coef = coef + torch.where(dependent, torch.zeros_like(correction), correction)
        norm = torch.linalg.vector_norm(a, dim=-1, keepdim=True)
        a = a / norm
        leverage = leverage + a.detach() * a.detach()
        q.append(a)
        diagonal = torch.where(dependent, torch.full_like(norm, 1e30), norm)
        below = torch.zeros_like(rows[..., j + 1 :, 0])
        columns.append(torch.cat([coef, diagonal, below], -1))
    return torch.stack(q, -2), torch.stack(columns, -1)


def _inverse_cholesky(gram: Tensor) -> Tuple[Tensor, Tensor]:
    """Compute the inverse of the Cholesky factor and its squared Frobenius norm, infinite if there is no factor."""
    factor, info = torch.linalg.cholesky_ex(gram)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
    return inverse, inverse.square().sum((-2, -1)).masked_fill(info != 0, math.inf)


def _cholesky_qr(rows: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """Orthonormalise by Cholesky QR, twice where once is not accurate (Yamamoto et al. 2015, ETNA 44, 306-326).

    The error of q is that of the unit-diagonal Gram matrix, a few eps, times the squared norm of its inverse factor.

    Args:
        rows: Vectors to orthonormalise in order, shape (n, r, d), r <= d.

    Returns:
        Orthonormal rows q of shape (n, r, d), the upper-triangular X = R^-1 of shape (n, r, r), with rows = R^T q, and
        a mask of shape (n,) of the well-conditioned matrices; q and X of the others are meaningless.
    """
    limits = torch.finfo(rows.dtype)
    gram = rows @ rows.mT
    square = gram.diagonal(dim1=-2, dim2=-1)
    in_range = ((square > limits.tiny**0.5) & (square < limits.max**0.5)).all(-1)
    scale = square.rsqrt()
    inverse, growth = _inverse_cholesky(gram * scale.unsqueeze(-1) * scale.unsqueeze(-2))
    inverse = inverse * scale.unsqueeze(-2)
    well = in_range & (growth < 0.01 / limits.eps)
    q = inverse @ rows
    if (growth[well] > 2 * rows.shape[-2]).any():
        again = _inverse_cholesky(q @ q.mT)[0]
        q, inverse = again @ q, again @ inverse
    return q, inverse.mT, well


def _scale(x: Tensor) -> Tensor:
    """Return the largest magnitude of each vector, 1 for zero vectors, as a constant."""
    scale = x.detach().abs().amax(-1, keepdim=True)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _scaled_gram_schmidt(rows: Tensor) -> Tuple[Tensor, Tensor]:
    """Compute q and the inverse of R by Gram-Schmidt, for rows of any magnitude."""
    scale = _scale(rows)
    q, R = _gram_schmidt(rows / scale)
    R = R.to(torch.promote_types(R.dtype, torch.float32))
    X = torch.linalg.solve_triangular(R, torch.eye(R.shape[-1], dtype=R.dtype, device=R.device), upper=True)
    # An entry beyond the dtype's range would turn a zero gradient into NaN.
    limit = torch.finfo(rows.dtype).max
    return q, (X / scale).clamp(-limit, limit).to(rows.dtype)


def _may_branch(x: Tensor) -> bool:
    """Tell whether Python may read the values: on the CPU, and while nothing traces or batches the tensor."""
    return x.device.type == 'cpu' and x.dtype in (torch.float32, torch.float64) and is_plain([x])


def _orthonormalize_backward(q: Tensor, X: Tensor, grad_q: Optional[Tensor], grad_X: Optional[Tensor]) -> Tensor:
    if grad_q is None:
        grad_q = torch.zeros_like(q)
    m = (grad_q @ q.mT).neg()
    if grad_X is not None:
        m = m - grad_X.mT @ X
    symmetric = m.tril() + m.tril(-1).mT
    return torch.baddbmm(X @ grad_q, X @ symmetric, q).mT


class _Orthonormalize(torch.autograd.Function):
    """Autograd function from A = q^T R, shape (n, d, r), to q (n, r, d) and X = R^-1 (n, r, r).

    The backward pass has a closed form in q and X (Walter et al., arXiv:1009.6112; docs/theory.md, section 6).
    """

    @staticmethod
    def forward(A: Tensor, factorize: Optional[Callable[[Tensor], Tuple[Tensor, Tensor]]]) -> Tuple[Tensor, Tensor]:
        if factorize is not None:
            return factorize(A)
        rows = A.mT
        if not _may_branch(A):
            return _scaled_gram_schmidt(rows)
        with torch.autocast('cpu', enabled=False):
            q, X, well = _cholesky_qr(rows)
            if not well.all():
                q[~well], X[~well] = _scaled_gram_schmidt(rows[~well])
        return q, X

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_q, grad_X):
        q, X = ctx.saved_tensors
        device_type = q.device.type
        if device_type != 'meta' and torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                return _orthonormalize_backward(q, X, grad_q, grad_X), None
        return _orthonormalize_backward(q, X, grad_q, grad_X), None

    @staticmethod
    def vmap(info, in_dims, A, factorize):
        # Written out so that forward never gets a batched tensor, whose values Python can't read.
        A = A.movedim(in_dims[0], 0)
        q, X = _Orthonormalize.apply(A.flatten(0, 1), factorize)
        return (q.unflatten(0, A.shape[:2]), X.unflatten(0, A.shape[:2])), (0, 0)


def orthonormal_rows(A: Tensor) -> Tensor:
    """Orthonormalise the columns of A (..., d, r), r >= 1; return them as rows, shape (..., r, d)."""
    rows = A.transpose(-1, -2)
    if torch.jit.is_scripting():  # TorchScript does not support autograd.Function
        return _gram_schmidt(rows / _scale(rows))[0]
    elif torch.onnx.is_in_onnx_export():  # ONNX has no triangular solver
        return _gram_schmidt(rows / _scale(rows))[0]
    else:
        return factorized_rows(A, None)


def factorized_rows(A: Tensor, factorize: Optional[Callable[[Tensor], Tuple[Tensor, Tensor]]]) -> Tensor:
    """Orthonormalise the columns of A (..., d, r); return them as rows, shape (..., r, d).

    Args:
        factorize: Function from A (n, d, r) to q (n, r, d) and R^-1 (n, r, r), where A = q^T R; PyTorch's if None.
    """
    flat = A.reshape((-1,) + A.shape[-2:])
    return _Orthonormalize.apply(flat, factorize)[0].reshape(A.transpose(-1, -2).shape)


def gaussian_logits(
    x: Tensor,
    mu: Tensor,
    basis: Optional[Tensor],
    v: Optional[Tensor],
    sigma2: Tensor,
) -> Tensor:
    """Compute log N(x; mu_c, Sigma_c) - log N(x; 0, sigma2 I) for each class c (docs/theory.md, eq. 6).

    These are the log-densities of the classes minus a term that all of them share, hundreds of nats or more. The
    softmax is the same, and the values are small enough for sigmoids, 16-bit floats and int8.

    Args:
        x: Embeddings, shape (..., d).
        mu: Class means, shape (C, d).
        basis: Orthonormal bases of the class subspaces, shape (C, d, r); None for rank 0.
        v: Variances along the basis directions, shape (C, r), > 0; None for rank 0.
        sigma2: Isotropic variance, shape (), > 0.

    Returns:
        Log-density ratios in nats, shape (..., C).

    Example:
        >>> x, sigma2 = torch.tensor([[1., 0.]]), torch.tensor(0.5)
        >>> gaussian_logits(x, torch.eye(2), None, None, sigma2)  # (x mu - |mu|^2 / 2) / sigma2
        tensor([[ 1., -1.]])
    """
    precision = 1 / sigma2
    logits = precision * F.linear(x, mu, -0.5 * (mu * mu).sum(-1))
    if basis is not None and v is not None:
        rows = basis.transpose(-1, -2)
        # t = U^T x - U^T mu, for all classes and directions in one matrix product
        offset = (rows * mu.unsqueeze(-2)).sum(-1)
        t = F.linear(x, rows.reshape(-1, rows.shape[-1]), -offset.reshape(-1))
        t = t.reshape(x.shape[:-1] + v.shape)
        ratio = v * precision
        shrink = precision * (ratio / (1 + ratio))
        logits = logits + 0.5 * ((t * t * shrink).sum(-1) - torch.log1p(ratio).sum(-1))
    return logits


def log_density(
    x: Tensor,
    mu: Tensor,
    basis: Optional[Tensor],
    v: Optional[Tensor],
    sigma2: Tensor,
) -> Tensor:
    """Compute log-densities log N(x; mu_c, Sigma_c) in nats; arguments and shapes as in :func:`gaussian_logits`."""
    shared = (x * x).sum(-1, keepdim=True) / sigma2 + mu.shape[-1] * torch.log(2 * math.pi * sigma2)
    return gaussian_logits(x, mu, basis, v, sigma2) - 0.5 * shared


def shared_log_density(features: Tensor, sigma2: Tensor) -> Tensor:
    """Compute log N(x; 0, sigma2 I) + d/2 log(2 pi) of the normalised embeddings (..., d), as a column (..., 1)."""
    norm2 = (features.abs().amax(-1, keepdim=True) > 0).to(sigma2.dtype)  # |x|^2, 0 for a zero embedding
    return -0.5 * (norm2 / sigma2 + features.shape[-1] * torch.log(sigma2))


def inverse_softplus(x: Tensor) -> Tensor:
    """Compute the inverse of softplus, for values > 0."""
    return x + (-torch.expm1(-x)).log()


def sigma2_of(sigma2_raw: Tensor, sigma2_min: float) -> Tensor:
    """Compute sigma2, shape (), from the unconstrained parameter of shape (1,) or ()."""
    return F.softplus(sigma2_raw).reshape(()) + sigma2_min


def class_gaussians(
    weight: Tensor,
    basis: Optional[Tensor],
    v_raw: Optional[Tensor],
    sigma2_raw: Tensor,
    v_min: float,
    sigma2_min: float,
) -> Tuple[Tensor, Optional[Tensor], Optional[Tensor], Tensor]:
    """Compute the means, bases, variances and sigma2 of the classes from their bases and unconstrained parameters."""
    v = None if v_raw is None else F.softplus(v_raw) + v_min
    return normalize(weight), basis, v, sigma2_of(sigma2_raw, sigma2_min)


def logits(features: Tensor, p: Parameters, v_min: float, sigma2_min: float) -> Tensor:
    """Compute the logits (..., C) of embeddings (..., d) in float32, or in float64 if an argument has it."""
    dtype = torch.float32
    if features.dtype == torch.float64 or p.weight.dtype == torch.float64:
        dtype = torch.float64
    A, v_raw = p.A, p.v_raw
    basis: Optional[Tensor] = None
    if A is not None and v_raw is not None:
        basis, v_raw = orthonormal_rows(A.to(dtype)).transpose(-1, -2), v_raw.to(dtype)
    mu, basis, v, sigma2 = class_gaussians(p.weight.to(dtype), basis, v_raw, p.sigma2_raw.to(dtype), v_min, sigma2_min)
    return gaussian_logits(normalize(features.to(dtype)), mu, basis, v, sigma2) + p.bias.to(dtype)


# The fused head


def fuse(
    mu: Tensor, basis: Optional[Tensor], v: Optional[Tensor], sigma2: Tensor, bias: Tensor
) -> Tuple[Tensor, Tensor]:
    """Fold the classes' Gaussians and offsets into a linear layer and a sum of squares (docs/theory.md, eq. 6).

    With ``a = 1 / sigma2``, x normalised and ``s_ci = a (a v_ci) / (1 + a v_ci)``, the logit of class c is::

        sqrt(2 a) [sqrt(a / 2) mu_c^T x + constant_c] + sum_i [sqrt(s_ci / 2) (u_ci^T x - u_ci^T mu_c)]^2

    The rows of the means have length ``sqrt(a / 2)``, and no row is longer: one scale suits all of them in int8.

    Returns:
        rows ((1 + r) C, d) and offsets ((1 + r) C,) of the linear layer, first the C means, then direction by direction
        C basis vectors. Not differentiable: call it under ``torch.no_grad()``.
    """
    num_classes, dim = mu.shape
    rank = 0 if v is None else v.shape[1]
    precision = 1 / sigma2
    rows = mu.new_empty(1 + rank, num_classes, dim)
    torch.mul(mu, torch.sqrt(0.5 * precision), out=rows[0])
    offsets = bias - 0.5 * precision * (mu * mu).sum(-1)
    if basis is not None and v is not None:
        ratio = v * precision
        scale = torch.sqrt(0.5 * precision * (ratio / (1 + ratio)))
        torch.mul(basis.permute(2, 0, 1), scale.T.unsqueeze(-1), out=rows[1:])
        along = scale * (basis * mu.unsqueeze(-1)).sum(-2)
        offsets = offsets - 0.5 * torch.log1p(ratio).sum(-1)
        return rows.flatten(0, 1), torch.cat([offsets / fused_scale(sigma2), -along.T.flatten()])
    return rows.flatten(0, 1), offsets / fused_scale(sigma2)


def fused_scale(sigma2: Tensor) -> Tensor:
    """Compute sqrt(2 / sigma2), the factor on the outputs for the means."""
    return torch.sqrt(2 / sigma2)


def fused_logits(outputs: Tensor, sigma2: Tensor, num_classes: int, rank: int) -> Tensor:
    """Compute logits (..., C) from the outputs (..., (1 + r) C) of the linear layer that :func:`fuse` returns."""
    scale = fused_scale(sigma2).to(outputs.dtype)
    if rank == 0:
        return outputs * scale
    t = outputs[..., num_classes:].unflatten(-1, (rank, num_classes))
    return torch.addcmul((t * t).sum(-2), outputs[..., :num_classes], scale)
