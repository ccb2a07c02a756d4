"""The ZZZ head for inference: a linear layer and a sum of squares.

With ``a = 1 / sigma2``, x normalised and ``s_ci = a (a v_ci) / (1 + a v_ci)``, the logit of class c is::

    a mu_c^T x + sum_i [sqrt(s_ci / 2) (u_ci^T x - u_ci^T mu_c)]^2 + constant_c - a/2 |x|^2,

so that all that needs the bases is one matrix product with rows a mu_c and sqrt(s_ci / 2) u_ci.
"""

from typing import Any, Callable, Dict, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .functional import normalize
from .ops import dispatch as backends
from .ops.tracing import is_plain

__all__ = ['Affine', 'FusedZZZHead', 'FusedZZZConvHead', 'fuse_gaussians', 'fused_logits']

# A leaf for symbolic tracing: its argument check looks at shapes, which a traced value has not got.
torch.fx.wrap('fused_logits')
# Shapes of features whose launches are kept
_MAX_REPEATED = 16


def fuse_gaussians(
    mu: Tensor,
    basis: Optional[Tensor],
    v: Optional[Tensor],
    sigma2: Tensor,
    bias: Tensor,
) -> Tuple[Tensor, Tensor, Tensor]:
    """Fold what :func:`~timm_zzz.functional.class_gaussians` gives and the class offsets into what is used per batch.

    Not differentiable: call it under ``torch.no_grad()``.

    Args:
        mu: Class means, shape (C, d).
        basis: Orthonormal bases of the class subspaces, shape (C, d, r); None for rank 0.
        v: Variances along the basis directions, shape (C, r), > 0; None for rank 0.
        sigma2: Isotropic variance, shape (), > 0.
        bias: Shape (C,).

    Returns:
        rows ((1 + r) C, d) and offsets ((1 + r) C,) of the linear layer, first the C means, then direction by direction
        C basis vectors, and the precision 1 / sigma2 (), in the dtype of the arguments.
    """
    num_classes, dim = mu.shape
    rank = 0 if v is None else v.shape[1]
    precision = 1 / sigma2
    rows = mu.new_empty(1 + rank, num_classes, dim)
    torch.mul(mu, precision, out=rows[0])
    offsets = bias - 0.5 * (precision * (mu * mu).sum(-1) + dim * torch.log(sigma2))
    if basis is not None and v is not None:
        ratio = v * precision
        scale = torch.sqrt(0.5 * precision * (ratio / (1 + ratio)))
        torch.mul(basis.permute(2, 0, 1), scale.T.unsqueeze(-1), out=rows[1:])
        along = scale * (basis * mu.unsqueeze(-1)).sum(-2)
        offsets = torch.cat([offsets - 0.5 * torch.log1p(ratio).sum(-1), -along.T.flatten()])
    return rows.flatten(0, 1), offsets, precision


def _fused_logits(
    features: Tensor, rows: Tensor, offsets: Tensor, precision: Tensor, num_classes: int, rank: int
) -> Tensor:
    dtype = torch.float32
    if features.dtype == torch.float64 or rows.dtype == torch.float64:
        dtype = torch.float64
    x = normalize(features.to(dtype))
    y = F.linear(x, rows.to(dtype), offsets.to(dtype))
    logits = y[..., :num_classes] - 0.5 * precision.to(dtype) * (x * x).sum(-1, keepdim=True)
    if rank > 0:
        t = y[..., num_classes:].unflatten(-1, (rank, num_classes))
        logits = logits + (t * t).sum(-2)
    return logits


def fused_logits(
    features: Tensor, rows: Tensor, offsets: Tensor, precision: Tensor, num_classes: int, rank: int
) -> Tensor:
    """Logits of the ZZZ head from what :func:`fuse_gaussians` returns.

    Computed in float32, or in float64 if the features or the rows are, whatever autocast says.

    Args:
        features: Pooled embeddings, shape (..., d).
        rows: Shape ((1 + r) C, d).
        offsets: Shape ((1 + r) C,).
        precision: 1 / sigma2, shape ().
        num_classes: C.
        rank: r.

    Returns:
        Logits, shape (..., C), float32 or float64.

    Raises:
        ValueError: If the last dimension of the features is not d.
    """
    if not torch.jit.is_tracing() and features.shape[-1] != rows.shape[-1]:
        raise ValueError(
            f'features: expected a last dimension of {rows.shape[-1]} (feat_dim), got shape {list(features.shape)}'
        )
    if not torch.jit.is_scripting():
        device_type = features.device.type
        # Asking autocast whether it knows the meta device would break the graph of torch.compile in torch 2.11.
        if device_type != 'meta' and torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                return _fused_logits(features, rows, offsets, precision, num_classes, rank)
    return _fused_logits(features, rows, offsets, precision, num_classes, rank)


def _can_repeat(x: Tensor) -> bool:
    return x.is_contiguous() and x.data_ptr() % 16 == 0 and x.device.index == torch.cuda.current_device()


class FusedZZZHead(nn.Module):
    """A ZZZ head for inference: no parameters, one matrix product, the same logits.

    Made by :meth:`timm_zzz.ZZZHead.fuse`. For embeddings of shape (..., d) logits of shape (..., C), float32 or wider.
    Its tensors stay at least float32 through ``.half()`` and ``.to(torch.bfloat16)``: in 16 bits the constants,
    hundreds of nats, would lose the digits that tell the classes apart.

    Args:
        rows, offsets, precision: What :func:`fuse_gaussians` returns.
        num_classes: Number of classes C.

    Raises:
        ValueError: In ``forward`` for input whose last dimension is not d.

    Example:
        >>> from timm_zzz import ZZZHead
        >>> head, x = ZZZHead(num_classes=5, feat_dim=12, rank=3), torch.randn(2, 12)
        >>> torch.allclose(head.fuse()(x), head(x), rtol=1e-5, atol=1e-5)
        True
    """

    rows: Tensor
    offsets: Tensor
    precision: Tensor

    def __init__(self, rows: Tensor, offsets: Tensor, precision: Tensor, num_classes: int):
        super().__init__()
        # in_features and out_features as on nn.Linear, for code that reads them off a classifier
        self.num_classes = self.out_features = num_classes
        self.feat_dim = self.in_features = rows.shape[1]
        self.rank = rows.shape[0] // num_classes - 1
        self.register_buffer('rows', rows)
        self.register_buffer('offsets', offsets)
        self.register_buffer('precision', precision)
        # For the kernels: the buffers in their form, and what launches them for features like some seen before
        self._folded: Optional[Tuple[Any, Tuple[Tensor, ...]]] = None
        self._repeated: Dict[Any, Callable[[Tensor], Tensor]] = {}

    @property
    def weight(self) -> Tensor:
        """The class means over sigma2, shape (C, d), as the rows of a linear layer on normalised embeddings."""
        return self.rows[: self.num_classes]

    @property
    def bias(self) -> Tensor:
        """What is added to the logits class by class, shape (C,)."""
        return self.offsets[: self.num_classes]

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (..., C) for embeddings of shape (..., d)."""
        return self._logits(x)

    def _logits(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            logits = self._kernel_logits(x)
            if logits is not None:
                return logits
        return fused_logits(x, self.rows, self.offsets, self.precision, self.num_classes, self.rank)

    @torch.jit.unused
    def _kernel_logits(self, x: Tensor) -> Optional[Tensor]:
        """None where the GPU's kernels can't run, or would lose a gradient."""
        buffers = [b for b in self._buffers.values() if b is not None]  # faster than by attributes
        if not is_plain([x, *buffers]) or not x.is_cuda or (x.requires_grad and torch.is_grad_enabled()):
            return None
        split = not backends.half_products(x)
        # Unlike parameters these are not written to but as a whole, so it is enough to know them by their addresses.
        key = (split, *((b.data_ptr(), 0 if b.is_inference() else b._version) for b in buffers))
        like = x.shape, x.dtype, x.device.index
        if self._folded is not None and self._folded[0] == key:
            repeat = self._repeated.get(like)
            if repeat is not None and _can_repeat(x):
                return repeat(x)
        return self._first_kernel_logits(x, split, key, like)

    def _first_kernel_logits(self, x: Tensor, split: bool, key: Any, like: Any) -> Optional[Tensor]:
        buffers = self.rows, self.offsets, self.precision
        if x.shape[-1] != self.feat_dim or backends.choose('auto', [x, *buffers], self.feat_dim, self.rank) != 'triton':
            return None
        capturing = torch.cuda.is_current_stream_capturing()
        folded = self._folded
        if folded is None or folded[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                folded = key, backends.fold(*buffers, self.num_classes, split)
            if not capturing:
                self._folded, self._repeated = folded, {}
        operand, coef, sigma2_raw = folded[1]
        args = operand, coef, self.num_classes, self.rank, split, sigma2_raw, 0.0
        if capturing or x.numel() == 0 or not _can_repeat(x):
            return backends.prepared_logits(x, *args)
        if len(self._repeated) >= _MAX_REPEATED:
            self._repeated.clear()
        repeat = self._repeated[like] = backends.repeated_logits(x, *args)
        return repeat(x)

    def __getstate__(self) -> Dict[str, Any]:
        return {**self.__dict__, '_folded': None, '_repeated': {}}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> 'FusedZZZHead':
        before: Dict[str, Any] = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = before[name].to(buffer.device)
        return self

    def extra_repr(self) -> str:
        return f'num_classes={self.num_classes}, feat_dim={self.feat_dim}, rank={self.rank}'


class FusedZZZConvHead(FusedZZZHead):
    """The fused head in place of a 1x1 convolution: embeddings (B, d, H, W) to logits (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (B, C, H, W) for embeddings of shape (B, d, H, W)."""
        return self._logits(x.movedim(1, -1)).movedim(3, 1)


class Affine(nn.Module):
    """A batch norm for inference on (B, d): ``x * scale + shift``."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor):
        super().__init__()
        self.register_buffer('scale', scale)
        self.register_buffer('shift', shift)

    @classmethod
    def from_batch_norm(cls, norm: Any) -> 'Affine':
        scale = torch.rsqrt(norm.running_var + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight.detach()
        shift = -norm.running_mean * scale
        return cls(scale, shift if norm.bias is None else shift + norm.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift
