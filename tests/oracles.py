"""The head's function written down by textbook routines, for tests to compare with, and what to compare on."""

import math

import torch
from torch.distributions import LowRankMultivariateNormal, MultivariateNormal, Normal
from torch.nn import functional as F

from timm_zzz.head import heads_of

PARAMETERS = ('features', 'weight', 'bias', 'A', 'v_raw', 'sigma2_raw')


def make(b, c, d, r, dtype=torch.float64):
    r = d if r is None else r
    tensors = [torch.randn(b, d), torch.randn(c, d), torch.randn(c)]
    tensors += [torch.randn(c, d, r), torch.randn(c, r)] if r else [None, None]
    tensors.append(torch.tensor([-1.0]))
    return [t if t is None else t.to(dtype) for t in tensors]


@torch.no_grad()
def distinct(module):
    """Set the classes of a module's ZZZ heads apart in every parameter that they have: they start as one Gaussian."""
    for head in heads_of(module).values():
        for p, scale in ((head.weight, 0.02), (head.A, 0.02), (head.v_raw, 0.3), (head.bias, 0.3)):
            if p is not None:
                p.add_(scale * torch.randn_like(p))
    return module


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


def shared(x, s2, log_density):
    """What the logits are less than log-densities: log N(x; 0, s2 I), or the constant -d/2 log(2 pi) alone."""
    d = x.shape[-1]
    if log_density:
        return -d / 2 * math.log(2 * math.pi)
    return Normal(0.0, s2.sqrt()).log_prob(x).sum(-1, keepdim=True)


def dense_logits(*args, log_density=False):
    """By dense covariance matrices and their Cholesky factors."""
    x, mu, U, v, s2 = parts(*args)
    sigma = (U * v.unsqueeze(-2)) @ U.mT + s2 * torch.eye(x.shape[-1], dtype=x.dtype)
    return MultivariateNormal(mu, sigma).log_prob(x.unsqueeze(-2)) - shared(x, s2, log_density) + args[2]


def low_rank_logits(*args, log_density=False):
    x, mu, U, v, s2 = parts(*args)
    density = LowRankMultivariateNormal(mu, U * v.sqrt().unsqueeze(-2), s2.expand(mu.shape))
    return density.log_prob(x.unsqueeze(-2)) - shared(x, s2, log_density) + args[2]


def reference_logits(f, weight, bias, A, v_raw, s2_raw, log_density=False):
    """The straightforward code, which materialises delta and lets autocast have its way."""
    x, mu, U, v, s2 = parts(f.float(), weight, bias, A, v_raw, s2_raw)
    delta = x.unsqueeze(1) - mu
    t = torch.einsum('bcd,cdr->bcr', delta, U)
    a = 1 / s2
    quadratic = a * delta.square().sum(-1) - a * a * (t.square() * (v / (1 + a * v))).sum(-1)
    free = x.shape[-1] * s2.log() if log_density else -a * x.square().sum(-1, keepdim=True)
    return -0.5 * (quadratic + free + torch.log1p(a * v).sum(-1)) + bias
