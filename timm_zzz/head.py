"""The ZZZ classifier head as a module."""

import copy
import functools
import logging
import math
import weakref
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from .cache import TensorCache, can_cache
from .deploy import FusedZZZConvHead, FusedZZZHead, fuse_gaussians, fused_logits
from .functional import class_gaussians, zzz_logits
from .ops import dispatch as backends

__all__ = ['ZZZHead', 'ZZZConvHead']

_logger = logging.getLogger(__name__)

INIT_STD = 0.02  # of the entries of new class means and of A

_live_heads: 'weakref.WeakSet[ZZZHead]' = weakref.WeakSet()

# In the order in which the linear classifier's come first
_PARAMETERS = ('weight', 'bias', 'A', 'v_raw', 'sigma2_raw')

# A leaf for symbolic tracing: its argument checks look at shapes, which a traced value has not got.
torch.fx.wrap('zzz_logits')


def live_heads() -> List['ZZZHead']:
    """The ZZZ heads that exist now, of all models; an optimiser tells by them whose its parameters are."""
    return list(_live_heads)


def _inverse_softplus(value: float) -> float:
    return value + math.log(-math.expm1(-value))


def _raw_variance(name: str, init: Optional[float], minimum: float) -> float:
    """The unconstrained value whose softplus plus ``minimum`` is ``init``; 0 if ``init`` is None."""
    if init is None:
        return 0.0
    if not minimum < init < math.inf:
        raise ValueError(f'{name}: expected a finite value above the minimum {minimum}, got {init}')
    return _inverse_softplus(init - minimum)


class ZZZHead(nn.Module):
    """Classifier that models each class as a Gaussian with low-rank covariance over L2-normalised embeddings.

    The logit of class c for an embedding f is, with ``x = f / |f|`` and ``mu_c = weight_c / |weight_c|``::

        -1/2 (x - mu_c)^T Sigma_c^-1 (x - mu_c) - 1/2 log|Sigma_c| + bias_c

    where ``Sigma_c = U_c diag(v_c) U_c^T + sigma2 I``, U_c is the Q factor of A_c, ``v_c = softplus(v_raw_c) + v_min``
    and ``sigma2 = softplus(sigma2_raw) + sigma2_min``. With rank 0 it is a cosine classifier with temperature sigma2.

    A drop-in replacement for ``nn.Linear(feat_dim, num_classes)``: ``weight`` and ``bias`` have the same shapes and the
    state dict of a linear layer loads, its rows becoming the class means. Logits are float32 (float64 for float64
    input), also under autocast and for a float16 or bfloat16 module.

    In eval mode without gradients the bases are derived once and kept, with a copy of the parameters to tell when they
    change: twice the parameters' memory, freed by ``train()``. :meth:`fuse` gives a module that needs neither.

    Args:
        num_classes: Number of classes C, >= 1.
        feat_dim: Width d of the embedding, >= 1.
        rank: Rank r of the class covariances, 0 <= r <= d; useful ranks are 4, 8 and 16.
        v_min: Lower bound of the variances along the basis, > 0.
        sigma2_min: Lower bound of the isotropic variance, > 0.
        v_init: Initial variance along the basis, > v_min; softplus(0) + v_min = 0.69 if None.
        sigma2_init: Initial isotropic variance, > sigma2_min; softplus(0) + sigma2_min = 0.69 if None.
        impl: What computes it, as in :func:`timm_zzz.functional.zzz_logits`: ``'torch'``, ``'triton'`` or ``'auto'``.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Attributes:
        weight: Class means before normalisation, shape (C, d); also readable as ``mu``.
        A: Matrices whose columns span the class subspaces, shape (C, d, r); None at rank 0.
        v_raw: Unconstrained variances along the basis, shape (C, r); None at rank 0.
        sigma2_raw: Unconstrained isotropic variance, shape ().
        bias: Class offsets, log-priors up to a constant, shape (C,).

    Raises:
        ValueError: For an argument out of its range, and in ``forward`` for input whose last dimension is not d.

    Example:
        >>> head = ZZZHead(num_classes=200, feat_dim=768, rank=8)
        >>> head(torch.randn(4, 768)).shape
        torch.Size([4, 200])
    """

    A: Optional[Tensor]
    v_raw: Optional[Tensor]
    _fused_type = FusedZZZHead
    __jit_unused_properties__ = ['impl']

    def __init__(
        self,
        num_classes: int,
        feat_dim: int,
        rank: int = 8,
        v_min: float = 1e-4,
        sigma2_min: float = 1e-4,
        v_init: Optional[float] = None,
        sigma2_init: Optional[float] = None,
        impl: str = 'auto',
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ):
        super().__init__()
        for name, value in (('num_classes', num_classes), ('feat_dim', feat_dim), ('rank', rank)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f'{name}: expected an int, got {value!r}')
        if num_classes < 1:
            raise ValueError(f'num_classes: expected at least 1, got {num_classes}')
        if feat_dim < 1:
            raise ValueError(f'feat_dim: expected at least 1, got {feat_dim}')
        if not 0 <= rank <= feat_dim:
            raise ValueError(f'rank: expected 0 <= rank <= feat_dim = {feat_dim}, got {rank}')
        for name, minimum in (('v_min', v_min), ('sigma2_min', sigma2_min)):
            if not 0 < minimum < math.inf:
                raise ValueError(f'{name}: expected a finite value > 0, got {minimum}')
        # in_features and out_features as on nn.Linear, for code that reads them off a classifier
        self.num_classes = self.out_features = num_classes
        self.feat_dim = self.in_features = feat_dim
        self.rank = rank
        self.v_min = float(v_min)
        self.sigma2_min = float(sigma2_min)
        self._impl = backends.check(impl)
        self._v_raw_init = _raw_variance('v_init', v_init, v_min)
        self._sigma2_raw_init = _raw_variance('sigma2_init', sigma2_init, sigma2_min)

        dd: Dict[str, Any] = dict(device=device, dtype=dtype)
        self.weight = nn.Parameter(torch.empty(num_classes, feat_dim, **dd))
        if rank > 0:
            self.A = nn.Parameter(torch.empty(num_classes, feat_dim, rank, **dd))
            self.v_raw = nn.Parameter(torch.empty(num_classes, rank, **dd))
        else:
            self.register_parameter('A', None)
            self.register_parameter('v_raw', None)
        self.sigma2_raw = nn.Parameter(torch.empty((), **dd))
        self.bias = nn.Parameter(torch.empty(num_classes, **dd))
        for name, parameter in self.named_parameters(recurse=False):
            parameter.zzz_role = name  # type: ignore[attr-defined]
        _live_heads.add(self)
        self._cache = TensorCache()
        self.register_load_state_dict_pre_hook(_adapt_state_dict)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew: weight and A from 0.02 N(0, 1), the variances at their initial values, bias 0."""
        with torch.no_grad():
            self.weight.normal_(std=INIT_STD)
            if self.A is not None and self.v_raw is not None:
                self.A.normal_(std=INIT_STD)
                self.v_raw.fill_(self._v_raw_init)
            self.sigma2_raw.fill_(self._sigma2_raw_init)
            self.bias.zero_()

    @property
    def mu(self) -> Tensor:
        """The class means before normalisation, an alias of ``weight``."""
        return self.weight

    @property
    def impl(self) -> str:
        """What computes the logits of float32 features where the parameters are now, ``'torch'`` or ``'triton'``.

        Set it to ``'torch'``, ``'triton'`` or ``'auto'``.

        Raises:
            ValueError: For another value; on reading, if ``'triton'`` was asked for and can't run.
        """
        return backends.choose_for_head(
            self._impl, self.weight[:0], self.weight, self.bias, self.A, self.v_raw, self.sigma2_raw
        )

    @impl.setter
    def impl(self, value: str) -> None:
        self._impl = backends.check(value)

    @torch.jit.ignore
    def no_weight_decay(self) -> List[str]:
        """Names of the parameters that weight decay would pull towards a variance of 0.69 rather than towards zero."""
        return ['v_raw', 'sigma2_raw'] if self.rank else ['sigma2_raw']

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (..., C) for embeddings of shape (..., d)."""
        return self._logits(x)

    def _logits(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if self._uses_cache(x):
                return self._cached_logits(x)
        return zzz_logits(
            x, self.weight, self.bias, self.A, self.v_raw, self.sigma2_raw, self.v_min, self.sigma2_min, self._impl
        )

    def _uses_cache(self, x: Tensor) -> bool:
        return not self.training and not torch.is_grad_enabled() and can_cache([x, *self._tensors()])

    def _cached_logits(self, x: Tensor) -> Tensor:
        if self.A is not None and x.shape[-1:] == self.weight.shape[1:]:
            impl = backends.choose_for_head(self._impl, x, self.weight, self.bias, self.A, self.v_raw, self.sigma2_raw)
            if impl == 'triton':
                split = not backends.half_products(x)
                key = (split, self.v_min, self.sigma2_min)
                operand, coef = self._cache.get(key, self._tensors(), functools.partial(backends.prepare, *key))
                return backends.prepared_logits(
                    x, operand, coef, self.num_classes, self.rank, split, self.sigma2_raw, self.sigma2_min
                )
        dtype = torch.float64 if torch.float64 in (x.dtype, self.weight.dtype) else torch.float32
        options = (dtype, self.v_min, self.sigma2_min)
        rows, offsets, precision = self._cache.get(options, self._tensors(), functools.partial(_fuse, *options))
        return fused_logits(x, rows, offsets, precision, self.num_classes, self.rank)

    def _tensors(self) -> List[Tensor]:
        # The arguments of _fuse, small ones first: the cache compares them in this order
        tensors = [self.sigma2_raw, self.bias, self.weight, self.v_raw, self.A]
        return [t for t in tensors if t is not None]

    @torch.no_grad()
    def fuse(self) -> FusedZZZHead:
        """The head for inference, as ``timm.utils.reparameterize_model`` asks for it: no QR, one matrix product.

        Returns:
            A new module without parameters that gives the same logits, on the same device.
        """
        dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        tensors = _fuse(dtype, self.v_min, self.sigma2_min, *self._tensors())
        return self._fused_type(*tensors, self.num_classes).train(self.training)

    def __setstate__(self, state: Dict[str, Any]) -> None:
        super().__setstate__(state)
        _live_heads.add(self)

    def train(self, mode: bool = True) -> 'ZZZHead':
        if mode:
            self._cache.clear()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> 'ZZZHead':
        self._cache.clear()
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f'num_classes={self.num_classes}, feat_dim={self.feat_dim}, rank={self.rank}'


class ZZZConvHead(ZZZHead):
    """The head in place of a 1x1 convolution: embeddings (B, d, H, W) to logits (B, C, H, W), position by position."""

    _fused_type = FusedZZZConvHead

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (B, C, H, W) for embeddings of shape (B, d, H, W)."""
        return self._logits(x.movedim(1, -1)).movedim(3, 1)


def _fuse(
    dtype: torch.dtype,
    v_min: float,
    sigma2_min: float,
    sigma2_raw: Tensor,
    bias: Tensor,
    weight: Tensor,
    v_raw: Optional[Tensor] = None,
    A: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor, Tensor]:
    if A is not None and v_raw is not None:
        A, v_raw = A.to(dtype), v_raw.to(dtype)
    with torch.autocast('cpu' if weight.is_meta else weight.device.type, enabled=False):
        mu, basis, v, sigma2 = class_gaussians(weight.to(dtype), A, v_raw, sigma2_raw.to(dtype), v_min, sigma2_min)
        return fuse_gaussians(mu, basis, v, sigma2, bias.to(dtype))


def _adapt_state_dict(
    head: ZZZHead,
    state_dict: Dict[str, Any],
    prefix: str,
    local_metadata: Dict[str, Any],
    strict: bool,
    missing_keys: List[str],
    unexpected_keys: List[str],
    error_msgs: List[str],
) -> None:
    """Load-state-dict hook: reads linear classifiers and old names, and explains what can't be read.

    - ``mu`` is read as ``weight``.
    - A linear classifier (weight and bias, nothing of the ZZZ head) becomes the class means and the bias.
    - A ZZZ head without weight and bias is what timm leaves of one when it adapts a checkpoint to other classes: its
      remains are dropped too. A strict load still fails, on the missing weight and bias.
    - Another number of classes, width or rank is an error that gives both sides' figures.
    """
    head._cache.clear()
    name = prefix.rstrip('.') or 'head'
    if f'{prefix}mu' in state_dict and f'{prefix}weight' not in state_dict:
        state_dict[f'{prefix}weight'] = state_dict.pop(f'{prefix}mu')
    found = {k: state_dict[f'{prefix}{k}'] for k in _PARAMETERS if f'{prefix}{k}' in state_dict}
    zzz_only = [k for k in found if k not in ('weight', 'bias')]

    if 'weight' not in found:
        if zzz_only and 'bias' not in found:
            _keep_own(head, state_dict, prefix, _PARAMETERS[2:])
            _logger.info(f'{name}: the checkpoint is for other classes, the ZZZ head starts anew.')
        return

    weight = found['weight']
    if not zzz_only and weight.shape[2:].numel() == 1:  # a linear layer, maybe written as a 1x1 convolution
        weight = state_dict[f'{prefix}weight'] = weight.flatten(1)
    kind, shape, expected = 'linear classifier', list(weight.shape), list(head.weight.shape)
    labels = ['classes', 'features']
    if zzz_only:
        kind = 'ZZZ head'
        ranked = found.get('A', found.get('v_raw'))
        shape.append(0 if ranked is None else ranked.shape[-1])
        expected.append(head.rank)
        labels.append('rank')
    if shape != expected:
        figures = ', '.join(f'{label} {a} -> {b}' for label, a, b in zip(labels, shape, expected, strict=False))
        if len(shape) != len(expected):
            figures = f'weight shape {shape} -> {expected}'
        error_msgs.append(f'{name}: a {kind} of another size (checkpoint -> model): {figures}.')
        _keep_own(head, state_dict, prefix, _PARAMETERS)
    elif not zzz_only:
        _keep_own(head, state_dict, prefix, _PARAMETERS[2:])


def _keep_own(head: ZZZHead, state_dict: Dict[str, Any], prefix: str, names: Sequence[str]) -> None:
    """Put the head's own parameters into the state dict, so that loading it leaves them as they are."""
    if head.weight.is_meta:  # nothing to keep: draw them where the checkpoint is
        loaded = next((t for k, t in state_dict.items() if k.startswith(prefix)), None)
        head = copy.deepcopy(head).to_empty(device='cpu' if loaded is None else loaded.device)
        head.reset_parameters()
    own = dict(head.named_parameters(recurse=False))
    for name in names:
        state_dict.pop(f'{prefix}{name}', None)
        if name in own:
            state_dict[f'{prefix}{name}'] = own[name].detach()
