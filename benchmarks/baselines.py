"""The heads that are compared: the package's own and independent code for the others."""

import math
import os
from typing import Any, Callable, Dict, Optional

import torch
from measure import Skip, free_memory
from torch import Tensor, nn
from torch.distributions import LowRankMultivariateNormal, Normal
from torch.nn import functional as F

import timm_zzz

V_MIN = SIGMA2_MIN = 1e-4


class CosineHead(nn.Module):
    """Normalised features times normalised weight times a scale, which is learned unless there is a margin.

    Args:
        margin_kind: ``'arcface'`` adds the margin to the angle between an embedding and its class's row (Deng et al.
            2019, arXiv:1801.07698), ``'cosface'`` takes it off their cosine (Wang et al. 2018, arXiv:1801.09414).
    """

    def __init__(
        self,
        num_classes: int,
        feat_dim: int,
        device: Optional[torch.device] = None,
        scale: float = 16.0,
        margin_kind: str = '',
        margin: float = 0.0,
    ):
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(num_classes, feat_dim, device=device))
        self.scale = nn.Parameter(torch.tensor(scale, device=device), requires_grad=not margin_kind)
        self.margin_kind, self.margin = margin_kind, margin

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))

    def with_margin(self, logits: Tensor, target: Tensor) -> Tensor:
        """The logits (B, C) of training, harder by the margin for the classes (B,) of the examples."""
        if not self.margin_kind:
            return logits
        own = (logits.gather(1, target[:, None]) / self.scale).clamp(-1 + 1e-6, 1 - 1e-6)
        if self.margin_kind == 'arcface':
            angle = own.acos() + self.margin
            # Beyond pi the cosine would grow again: a straight line goes on from there, as in the authors' code
            harder = torch.where(angle <= math.pi, angle.cos(), own - math.sin(self.margin) * self.margin)
        else:
            harder = own - self.margin
        return logits.scatter(1, target[:, None], self.scale * harder)


class ReferenceHead(nn.Module):
    """The straightforward code: `torch.linalg.qr`, and delta of shape (B, C, d). Autocast reaches its einsum."""

    def __init__(
        self,
        num_classes: int,
        feat_dim: int,
        rank: int,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ):
        super().__init__()
        dd: Dict[str, Any] = dict(device=device, dtype=dtype)
        self.weight = nn.Parameter(0.02 * torch.randn(num_classes, feat_dim, **dd))
        self.A = nn.Parameter(0.02 * torch.randn(num_classes, feat_dim, rank, **dd))
        self.v_raw = nn.Parameter(torch.zeros(num_classes, rank, **dd))
        self.sigma2_raw = nn.Parameter(torch.zeros(1, **dd))
        self.bias = nn.Parameter(torch.zeros(num_classes, **dd))

    def forward(self, features: Tensor) -> Tensor:
        x = F.normalize(features.to(self.weight.dtype), dim=-1)
        mu = F.normalize(self.weight, dim=-1)
        basis = torch.linalg.qr(self.A)[0]
        v = F.softplus(self.v_raw) + V_MIN
        sigma2 = F.softplus(self.sigma2_raw) + SIGMA2_MIN
        return self.log_ratio(x, mu, basis, v, sigma2) + self.bias

    def log_ratio(self, x: Tensor, mu: Tensor, basis: Tensor, v: Tensor, sigma2: Tensor) -> Tensor:
        a = 1 / sigma2
        delta = x[:, None] - mu
        t = torch.einsum('bcd,cdr->bcr', delta, basis).to(v.dtype)  # 16 bits under autocast
        mahalanobis = a * delta.square().sum(-1) - a * a * (t.square() * v / (1 + a * v)).sum(-1)
        return -0.5 * (mahalanobis - a * x.square().sum(-1, keepdim=True) + torch.log1p(a * v).sum(-1))


class TruthHead(ReferenceHead):
    """The same logits through `torch.distributions`; to be used in float64."""

    def log_ratio(self, x: Tensor, mu: Tensor, basis: Tensor, v: Tensor, sigma2: Tensor) -> Tensor:
        factor, diagonal = basis * v.sqrt()[:, None], sigma2.expand(mu.shape)
        density = LowRankMultivariateNormal(mu, factor, diagonal, validate_args=False)
        return density.log_prob(x[:, None]) - Normal(0.0, sigma2.sqrt()).log_prob(x).sum(-1, keepdim=True)


def linear(num_classes: int, feat_dim: int, rank: int, batch: int, device: torch.device) -> nn.Module:
    return nn.Linear(feat_dim, num_classes, device=device)


def cosine(num_classes: int, feat_dim: int, rank: int, batch: int, device: torch.device) -> nn.Module:
    return CosineHead(num_classes, feat_dim, device)


def reference(num_classes: int, feat_dim: int, rank: int, batch: int, device: torch.device) -> nn.Module:
    need = 4.2 * batch * num_classes * feat_dim * 4  # delta, its square, and the gradient of each: 3.9 measured
    free = free_memory(device)
    if need > free:
        raise Skip(f'needs {need / 1e9:.0f} GB, {free / 1e9:.0f} GB are free')
    return ReferenceHead(num_classes, feat_dim, rank, device)


def zzz(impl: str, compiled: bool = False) -> Callable[..., nn.Module]:
    def build(num_classes: int, feat_dim: int, rank: int, batch: int, device: torch.device) -> nn.Module:
        if impl == 'triton' and device.type != 'cuda' and os.environ.get('TRITON_INTERPRET') != '1':
            raise Skip('the kernels need a GPU, or TRITON_INTERPRET=1')
        head = zzz_head(num_classes, feat_dim, rank, impl, device)
        return torch.compile(head, fullgraph=True, dynamic=False) if compiled else head

    return build


def zzz_head(num_classes: int, feat_dim: int, rank: int, impl: str, device: torch.device) -> timm_zzz.ZZZHead:
    return timm_zzz.ZZZHead(num_classes, feat_dim, rank=rank, init='reference', impl=impl, device=device)


# A method builds its head from (num_classes, feat_dim, rank, batch, device).
METHODS: Dict[str, Callable[..., nn.Module]] = {
    'linear': linear,
    'cosine': cosine,
    'reference': reference,
    'zzz auto': zzz('auto'),
    'zzz torch': zzz('torch'),
    'zzz triton': zzz('triton'),
    'zzz torch compiled': zzz('torch', compiled=True),
}
