"""The ZZZ classifier head as modules: for linear and 1x1-convolution classifiers, and their fused forms."""

import contextlib
import copy
import itertools
import logging
import math
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .ops import reference
from .ops.dispatch import (
    autocasts,
    check_impl,
    choose_for_head,
    class_gaussians,
    fused_embeddings,
    fused_logits,
    fused_plan,
    zzz_logits,
)
from .ops.reference import Parameters
from .ops.tracing import is_plain, raw_stream

__all__ = ['FusedZZZConvHead', 'FusedZZZHead', 'ZZZConvHead', 'ZZZHead', 'heads_of', 'record_inputs', 'same_shape']

_logger = logging.getLogger(__name__)

INIT_STD = 0.02  # standard deviation of the entries of A, and of the class means if init='reference'
# Defaults if init='flat'
ROW_STD = 0.005  # of the entries of the class means: short rows turn quickly even at a small learning rate
SIGMA2_INIT = 1 / 16
V_RATIO = 0.1  # v / sigma2

# The parameters of a linear classifier come first
_PARAMETERS = Parameters._fields
# Weight decay would pull these variances towards softplus(0) = 0.69, not towards zero
NOT_DECAYED = ('v_raw', 'sigma2_raw')

# Leaves of symbolic tracing: they check the shapes of their arguments, which traced values do not have.
torch.fx.wrap('zzz_logits')
torch.fx.wrap('fused_embeddings')
torch.fx.wrap('fused_logits')

# Number of optimiser steps so far: some optimisers write to parameter.data, which version counters do not see.
_steps = itertools.count(1)  # thread-safe: no two steps get the same number
_optimizer_steps = [0]


def _count_step(*args: Any) -> None:
    _optimizer_steps[0] = next(_steps)


register_optimizer_step_post_hook(_count_step)


def _raw_variance(name: str, init: Optional[float], minimum: float) -> float:
    """Compute the unconstrained value whose softplus plus ``minimum`` is ``init``; 0 if ``init`` is None."""
    if init is None:
        return 0.0
    if not minimum < init < math.inf:
        raise ValueError(f'{name}: expected a finite value above the minimum {minimum}, got {init}')
    return reference.inverse_softplus(torch.tensor(init - minimum, dtype=torch.float64, device='cpu')).item()


class FusedZZZHead(nn.Module):
    """The form of a ZZZ head for inference: one linear layer and a sum of squares, with the same logits.

    Made by :meth:`timm_zzz.ZZZHead.fuse`. Embeddings of shape (..., d) give logits of shape (..., C), in float32 or
    float64. ``.half()`` and ``.to(torch.bfloat16)`` keep the dtype of its tensors, because the logits are a difference
    of large numbers if sigma2 is small. Quantisation that replaces ``nn.Linear`` reaches ``linear``.

    Args:
        rows, offsets: Weight ((1 + r) C, d) and bias ((1 + r) C,) of the linear layer, see
            ``timm_zzz.ops.reference.fuse``.
        sigma2: Isotropic variance, shape ().
        num_classes: Number of classes C.
        impl: Implementation, as in :class:`~timm_zzz.ZZZHead`.
        log_density: As in :class:`~timm_zzz.ZZZHead`.

    Raises:
        ValueError: For an unknown ``impl``, and in ``forward`` if the last dimension of the input is not d.

    Example:
        >>> from timm_zzz import ZZZHead
        >>> head, x = ZZZHead(num_classes=5, feat_dim=12, rank=3), torch.randn(2, 12)
        >>> torch.allclose(head.fuse()(x), head(x), rtol=1e-5, atol=1e-5)
        True
    """

    sigma2: Tensor
    __jit_unused_properties__ = ['weight', 'bias', 'impl']

    def __init__(
        self,
        rows: Tensor,
        offsets: Tensor,
        sigma2: Tensor,
        num_classes: int,
        impl: str = 'auto',
        log_density: bool = False,
    ):
        super().__init__()
        # in_features and out_features are for code that takes the classifier for an nn.Linear
        self.num_classes = self.out_features = num_classes
        self.feat_dim = self.in_features = rows.shape[1]
        self.rank = rows.shape[0] // num_classes - 1
        self.log_density = log_density
        self.linear = nn.Linear(rows.shape[1], rows.shape[0], device='meta')
        self.linear.weight = nn.Parameter(rows, requires_grad=False)
        self.linear.bias = nn.Parameter(offsets, requires_grad=False)
        self.register_buffer('sigma2', sigma2)
        self._impl = check_impl(impl)
        # The plan of the kernels, and the tensors and features that it is for
        self._plan = cast(Optional[Tuple[Any, Any]], None)

    @property
    def impl(self) -> str:
        """Chosen implementation, ``'torch'``, ``'triton'`` or ``'auto'``; setting another raises a ValueError."""
        return self._impl

    @impl.setter
    def impl(self, value: str) -> None:
        self._impl = check_impl(value)

    @property
    def weight(self) -> Tensor:
        """Class means divided by sigma2, shape (C, d), as the weight of a linear layer on normalised embeddings."""
        return self._of_the_means(self.linear.weight)

    @property
    def bias(self) -> Tensor:
        """Offsets of the classes, shape (C,), as the bias of that linear layer."""
        return self._of_the_means(self.linear.bias)

    @torch.jit.unused
    def _of_the_means(self, t: Any) -> Tensor:
        t = t() if callable(t) else t  # a quantised layer has methods for them
        t = t.dequantize() if t.is_quantized else t
        return t[: self.num_classes] * reference.fused_scale(self.sigma2)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits of shape (..., C) for embeddings of shape (..., d)."""
        return self.logits(x)

    def logits(self, x: Tensor) -> Tensor:
        """Compute logits (..., C) for embeddings (..., d), also in the form for 1x1 convolutions."""
        return self._logits(x, False)

    def _logits(self, x: Tensor, plain: bool) -> Tensor:
        """Compute logits; ``plain`` says that no tensor is traced or transformed, which saves the check."""
        logits: Optional[Tensor] = None
        if not torch.jit.is_scripting():
            logits = self._kernel_logits(x, plain)
            if logits is None and isinstance(x, Tensor) and autocasts(x):
                with torch.autocast(x.device.type, enabled=False):
                    logits = self._linear_logits(x)
        if logits is None:
            logits = self._linear_logits(x)
        return logits + reference.shared_log_density(x, self.sigma2) if self.log_density else logits

    def _linear_logits(self, x: Tensor) -> Tensor:
        outputs = self.linear(fused_embeddings(x, self.feat_dim, self.sigma2))
        return fused_logits(outputs, x, self.sigma2, self.num_classes, self.rank)

    @torch.jit.unused
    def _kernel_logits(self, x: Tensor, plain: bool) -> Optional[Tensor]:
        """Compute logits with the kernels; None if they can't run or would lose a gradient."""
        linear: Any = self._modules['linear']
        if type(linear) is not nn.Linear:  # quantised
            return None
        tensors = [linear.weight, linear.bias, self.sigma2]
        if not plain and not is_plain([x, *tensors]) or not (x.is_cuda or self._impl == 'triton'):
            return None
        if x.requires_grad and torch.is_grad_enabled():
            return None
        if x.shape[-1] != linear.weight.shape[1]:  # out of bounds for a kept plan; _linear_logits raises
            return None
        # Unlike trained parameters, these are only replaced or rewritten as a whole: address and version identify them.
        state = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]
        key = (x.device, x.dtype, torch.is_autocast_enabled(x.device.type), self._impl, state)
        if self._plan is not None and self._plan[0] == key:
            plan = self._plan[1]
        else:
            plan = fused_plan(x, linear.weight, linear.bias, self.sigma2, self.num_classes, self._impl)
            if not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
                self._plan = key, plan
        return None if plan is None else plan(x)

    def __getstate__(self) -> Dict[str, Any]:
        return {**self.__dict__, '_plan': None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> 'FusedZZZHead':
        def wide(t: Tensor) -> Tensor:
            new = fn(t)
            return t.to(new.device) if new.dtype in (torch.float16, torch.bfloat16) else new

        super()._apply(wide, recurse)
        return self

    def extra_repr(self) -> str:
        return f'num_classes={self.num_classes}, feat_dim={self.feat_dim}, rank={self.rank}'


class FusedZZZConvHead(FusedZZZHead):
    """The fused form of :class:`ZZZConvHead`: embeddings (B, d, H, W) to logits (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits of shape (B, C, H, W) for embeddings of shape (B, d, H, W)."""
        return self.logits(x.movedim(1, -1)).movedim(3, 1)


class ZZZHead(nn.Module):
    """Classifier that models each class as a Gaussian with low-rank covariance over L2-normalised embeddings.

    The logit of class c for an embedding f is, with ``x = f / |f|`` and ``mu_c = weight_c / |weight_c|``
    (docs/theory.md, eq. 1)::

        log N(x; mu_c, Sigma_c) - log N(x; 0, sigma2 I) + bias_c

    where ``Sigma_c = U_c diag(v_c) U_c^T + sigma2 I``, U_c is the Q factor of A_c, ``v_c = softplus(v_raw_c) + v_min``
    and ``sigma2 = softplus(sigma2_raw) + sigma2_min``. With rank 0 it is a cosine classifier with temperature sigma2.
    The subtracted density is the same for all classes, so the softmax does not depend on it. Subtracting it makes the
    logits small enough for sigmoids, 16-bit floats and int8.

    A drop-in replacement for ``nn.Linear(feat_dim, num_classes)``: ``weight`` and ``bias`` have the same shapes, and
    the state dict of a linear layer loads, with its rows as class means. Logits are float32 (float64 for float64
    input), also under autocast and for a float16 or bfloat16 module.

    In eval mode without gradients the head caches its fused form (see :meth:`fuse`) until a parameter changes through
    a module, an optimiser or an in-place operation. PyTorch's version counters miss writes through ``.data`` (by hand,
    or by a package that averages weights), through shared memory, by collectives of torch.distributed and by replayed
    CUDA graphs. Call ``train()`` or ``eval()`` after these: both clear the cache.

    Args:
        num_classes: Number of classes C, >= 1.
        feat_dim: Width d of the embedding, >= 1.
        rank: Rank r of the class covariances, 0 <= r <= d; useful ranks are 4, 8 and 16.
        v_min: Lower bound of the variances along the basis, > 0.
        sigma2_min: Lower bound of the isotropic variance, > 0.
        v_init: Initial variance along the basis, > v_min; by default a tenth of the initial sigma2, or 2 v_min if that
            is larger.
        sigma2_init: Initial isotropic variance, > sigma2_min; by default 1/16, or 2 sigma2_min if that is larger.
        log_density: Return log N(x; mu_c, Sigma_c) + d/2 log(2 pi) + bias_c as logits instead.
        impl: Implementation, as in :func:`timm_zzz.functional.zzz_logits`: ``'torch'``, ``'triton'`` or ``'auto'``.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        init: Initialisation. ``'flat'``: all classes start as the same Gaussian, with one random mean and subspace. All
            logits are equal then, so no random gradient reaches the backbone, and the differences between classes are
            learnt from the images. ``'reference'``: means and A are drawn for each class, and both variances are
            softplus(0) = 0.69 plus their minimum, unless given.

    Attributes:
        weight: Class means before normalisation, shape (C, d); also readable as ``mu``.
        A: Matrices whose columns span the class subspaces, shape (C, d, r); None at rank 0.
        v_raw: Unconstrained variances along the basis, shape (C, r); None at rank 0.
        sigma2_raw: Unconstrained isotropic variance, shape (1,).
        bias: Class offsets, shape (C,): log-priors up to a constant.

    Raises:
        ValueError: For an argument out of its range, and in ``forward`` if the last dimension of the input is not d.

    Example:
        >>> head = ZZZHead(num_classes=200, feat_dim=768, rank=8)
        >>> head(torch.randn(4, 768)).shape
        torch.Size([4, 200])
    """

    A: Optional[Tensor]
    v_raw: Optional[Tensor]
    _fused_type = FusedZZZHead
    __jit_unused_properties__ = ['impl', 'active_impl']

    def __init__(
        self,
        num_classes: int,
        feat_dim: int,
        rank: int = 8,
        v_min: float = 1e-4,
        sigma2_min: float = 1e-4,
        v_init: Optional[float] = None,
        sigma2_init: Optional[float] = None,
        log_density: bool = False,
        impl: str = 'auto',
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
        init: str = 'flat',
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
        if init not in ('flat', 'reference'):
            raise ValueError(f"init: expected 'flat' or 'reference', got {init!r}")
        if not isinstance(log_density, bool):
            raise ValueError(f'log_density: expected True or False, got {log_density!r}')
        # in_features and out_features are for code that takes the classifier for an nn.Linear
        self.num_classes = self.out_features = num_classes
        self.feat_dim = self.in_features = feat_dim
        self.rank = rank
        self.log_density = log_density
        self.v_min = float(v_min)
        self.sigma2_min = float(sigma2_min)
        self._impl = check_impl(impl)
        self._init = init
        if init == 'flat' and sigma2_init is None:
            sigma2_init = max(SIGMA2_INIT, 2 * sigma2_min)
        self._sigma2_raw_init = _raw_variance('sigma2_init', sigma2_init, sigma2_min)
        if init == 'flat' and v_init is None:
            v_init = max(V_RATIO * cast(float, sigma2_init), 2 * v_min)
        self._v_raw_init = _raw_variance('v_init', v_init, v_min)

        dd: Dict[str, Any] = dict(device=device, dtype=dtype)
        self.weight = nn.Parameter(torch.empty(num_classes, feat_dim, **dd))
        if rank > 0:
            self.A = nn.Parameter(torch.empty(num_classes, feat_dim, rank, **dd))
            self.v_raw = nn.Parameter(torch.empty(num_classes, rank, **dd))
        else:
            self.register_parameter('A', None)
            self.register_parameter('v_raw', None)
        self.sigma2_raw = nn.Parameter(torch.empty(1, **dd))  # FSDP can't shard a scalar
        self.bias = nn.Parameter(torch.empty(num_classes, **dd))
        self._kept = cast(Optional['_Kept'], None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw ``weight`` and ``A`` as ``init`` says; set the variances to their initial values and the bias to 0."""
        with torch.no_grad():
            self.weight.normal_(std=INIT_STD)
            if self.A is not None and self.v_raw is not None:
                self.A.normal_(std=INIT_STD)
                self.v_raw.fill_(self._v_raw_init)
            self.sigma2_raw.fill_(self._sigma2_raw_init)
            self.bias.zero_()
            if self._init == 'flat':
                for p, std in ((self.weight, ROW_STD), (self.A, INIT_STD)):
                    if p is not None:
                        # A sum of C normal variables over sqrt(C) is normal too; as a sum it is the same in all shards
                        shared = p.sum(0) * (std / INIT_STD / self.num_classes**0.5)
                        p.zero_().add_(shared)

    @property
    def mu(self) -> Tensor:
        """Class means before normalisation, an alias of ``weight``."""
        return self.weight

    @property
    def impl(self) -> str:
        """Chosen implementation, ``'torch'``, ``'triton'`` or ``'auto'``; setting another raises a ValueError."""
        return self._impl

    @impl.setter
    def impl(self, value: str) -> None:
        self._impl = check_impl(value)

    @property
    def active_impl(self) -> str:
        """Implementation used for float32 features on the device of the parameters, ``'torch'`` or ``'triton'``.

        Raises:
            ValueError: If ``impl`` is ``'triton'`` and the kernels can't run.
        """
        return choose_for_head(self._impl, self.weight[:0], self._parameter_tuple())

    @torch.jit.ignore
    def no_weight_decay(self) -> List[str]:
        """List the parameters that must not be decayed: weight decay would pull these variances towards 0.69, not 0."""
        return [name for name in NOT_DECAYED if getattr(self, name) is not None]

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits of shape (..., C) for embeddings of shape (..., d)."""
        return self._logits(x)

    def _logits(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if not self.training and not torch.is_grad_enabled():
                kept = self._kept_fused(x)
                if kept is not None:
                    return kept._logits(x, True)
        return zzz_logits(
            x,
            self.weight,
            self.bias,
            self.A,
            self.v_raw,
            self.sigma2_raw,
            self.v_min,
            self.sigma2_min,
            self._impl,
            self.log_density,
        )

    def _kept_fused(self, x: Tensor) -> Optional[FusedZZZHead]:
        """Return the cached fused form, derived again if a parameter has changed; None if it must not be cached."""
        parameters = self._parameter_tuple()
        tensors = [t for t in parameters if t is not None]
        if not is_plain([x, *tensors]):
            return None
        # The cache is for one stream: another might read the tensors before they are written.
        stream = 0
        if x.is_cuda:
            if torch.cuda.is_current_stream_capturing():
                return None
            stream = raw_stream(x.device)
        key = (x.dtype == torch.float64, stream, _optimizer_steps[0], self._drops)
        kept = self._kept
        if kept is None or kept.key != key or not kept.is_of(tensors):
            kept = self._kept = self._keep(key, tensors)
        return None if kept is None else kept.fused

    def _keep(self, key: Any, tensors: List[Tensor]) -> Optional['_Kept']:
        """Derive the fused form to cache; None if changes of the parameters could not be noticed."""
        if any(t.is_inference() or t.device.type not in ('cpu', 'cuda', 'mps', 'xpu') for t in tensors):
            return None
        # Read before deriving, so that a change by another thread meanwhile is noticed at the next call
        versions, memory = [t._version for t in tensors], [t.detach() for t in tensors]
        with torch.inference_mode(False):
            fused = self._fuse(torch.float64 if key[0] or self.weight.dtype == torch.float64 else torch.float32)
        return _Kept(key, versions, memory, fused)

    def _drop(self) -> None:
        """Clear the cached fused form, also one that another thread is deriving."""
        self.__dict__['_drops'] = self.__dict__.get('_drops', 0) + 1
        self.__dict__['_kept'] = None

    def _parameter_tuple(self) -> Parameters:
        own: Any = self._parameters
        try:  # faster than attributes, which pruned and parametrized heads need
            return Parameters(own['weight'], own['bias'], own['A'], own['v_raw'], own['sigma2_raw'])
        except KeyError:
            return Parameters(self.weight, self.bias, self.A, self.v_raw, self.sigma2_raw)

    @torch.no_grad()
    def fuse(self) -> FusedZZZHead:
        """Return the form for inference: no QR, one matrix product. ``timm.utils.reparameterize_model`` calls it.

        Returns:
            A new module on the same device, without trainable parameters, that gives the same logits.
        """
        return self._fuse()

    @torch.no_grad()
    def gaussians(self, dtype: Optional[torch.dtype] = None) -> Tuple[Any, ...]:
        """Compute means (C, d), bases (C, d, r), variances (C, r), sigma2 () and bias (C,) in at least float32."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32) if dtype is None else dtype
        tensors: Any = (t if t is None else t.detach().to(dtype) for t in self._parameter_tuple())
        p = Parameters(*tensors)
        with torch.autocast('cpu' if p.weight.is_meta else p.weight.device.type, enabled=False):
            return (*class_gaussians(p.weight, p.A, p.v_raw, p.sigma2_raw, self.v_min, self.sigma2_min), p.bias)

    @torch.no_grad()
    def _fuse(self, dtype: Optional[torch.dtype] = None) -> FusedZZZHead:
        gaussians = self.gaussians(dtype)
        tensors = (*reference.fuse(*gaussians), gaussians[3])
        return self._fused_type(*tensors, len(gaussians[0]), self._impl, self.log_density).train(self.training)

    def register_parameter(self, name: str, param: Optional[nn.Parameter]) -> None:
        super().register_parameter(name, param)
        self._mark_parameters()

    def _mark_parameters(self) -> None:
        """Mark the parameters as a head's, for optimisers; copies and tensors that replace them have no mark."""
        for name, p in self.named_parameters(recurse=False):
            p.zzz_role = name.removesuffix('_orig')  # type: ignore[attr-defined]  # of a pruned head

    def __setattr__(self, name: str, value: Any) -> None:
        # FSDP replaces the parameters by tensors whose version counters miss some writes. fully_shard calls this
        # method, and so register_parameter, only because the class defines it.
        if name != '_kept':
            self._drop()
        super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *args: Any) -> None:
        self._drop()
        _adapt_state_dict(self, state_dict, prefix, args[-1])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __setstate__(self, state: Dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mark_parameters()

    def __getstate__(self) -> Dict[str, Any]:
        return {**self.__dict__, '_kept': None}

    def train(self, mode: bool = True) -> 'ZZZHead':
        self._drop()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> 'ZZZHead':
        self._drop()
        super()._apply(fn, recurse)
        self._drop()
        self._mark_parameters()
        return self

    def init_non_persistent_buffers(self) -> None:
        """Raise a RuntimeError if some parameters have no values; transformers calls this after loading."""
        loaded = {name: hasattr(p, '_is_hf_initialized') for name, p in self.named_parameters(recurse=False)}
        if any(loaded.values()) and not all(loaded.values()):
            missing = ', '.join(name for name, there in loaded.items() if not there)
            raise RuntimeError(
                f'transformers leaves {missing} of a ZZZ head without values: load the model by '
                'timm_zzz.from_pretrained(..., num_classes=N)'
            )

    def extra_repr(self) -> str:
        return f'num_classes={self.num_classes}, feat_dim={self.feat_dim}, rank={self.rank}'


class ZZZConvHead(ZZZHead):
    """The head in place of a 1x1 convolution: embeddings (B, d, H, W) to logits (B, C, H, W) at each position."""

    _fused_type = FusedZZZConvHead

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits of shape (B, C, H, W) for embeddings of shape (B, d, H, W)."""
        return self._logits(x.movedim(1, -1)).movedim(3, 1)


class _Kept(NamedTuple):
    """A cached fused form and the state of the parameters that it was derived from."""

    key: Any
    versions: List[int]
    # Aliases of the parameters: they hold the memory, so that no other tensor can get its address
    memory: List[Tensor]
    fused: FusedZZZHead

    def is_of(self, tensors: List[Tensor]) -> bool:
        """Tell whether the parameters have the same memory as before, and versions that show no write to it."""
        return (
            [t._version for t in tensors] == self.versions
            and [t.dtype for t in tensors] == [t.dtype for t in self.memory]
            and all(map(Tensor.is_set_to, tensors, self.memory))
        )


# Loading of state dicts


def _adapt_state_dict(head: ZZZHead, state_dict: Dict[str, Any], prefix: str, error_msgs: List[str]) -> None:
    """Convert linear classifiers and old names in place, and report what can't be read in ``error_msgs``.

    - ``mu`` is read as ``weight``, and sigma2_raw of shape () as (1,).
    - A linear classifier (weight and bias, no other parameter of a head) becomes the class means and the bias.
    - A different number of classes, width or rank is an error, with the sizes of checkpoint and model.

    Any other part of a head is loaded unchanged: shards, only the trainable parameters, a pruned head.
    """
    name = prefix.rstrip('.') or 'head'
    if f'{prefix}mu' in state_dict and f'{prefix}weight' not in state_dict:
        state_dict[f'{prefix}weight'] = state_dict.pop(f'{prefix}mu')
    found = {k: state_dict[f'{prefix}{k}'] for k in _PARAMETERS if f'{prefix}{k}' in state_dict}
    if 'sigma2_raw' in found and found['sigma2_raw'].ndim == 0:
        state_dict[f'{prefix}sigma2_raw'] = found['sigma2_raw'].reshape(1)
    if 'weight' not in found:
        return

    weight = found['weight']
    keys = {key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)}
    linear = keys <= {'weight', 'bias'}
    if linear and weight.ndim > 2 and weight.shape[2:].numel() == 1:  # of a 1x1 convolution
        weight = state_dict[f'{prefix}weight'] = weight.flatten(1)
    kind, shape, expected = 'linear classifier', list(weight.shape), list(head.weight.shape)
    labels = ['classes', 'features']
    ranked = found.get('A', found.get('v_raw'))
    if not linear:
        kind = 'ZZZ head'
    if ranked is not None:
        shape.append(ranked.shape[-1])
        expected.append(head.rank)
        labels.append('rank')
    if shape != expected:
        figures = ', '.join(f'{label} {a} -> {b}' for label, a, b in zip(labels, shape, expected, strict=False))
        if len(shape) != len(expected):
            figures = f'weight shape {shape} -> {expected}'
        error_msgs.append(f'{name}: a {kind} of another size (checkpoint -> model): {figures}.')
        _keep_own(head, state_dict, prefix, _PARAMETERS)
    elif linear:
        _keep_own(head, state_dict, prefix, _PARAMETERS[2:])


def same_shape(key: str, a: Sequence[int], b: Sequence[int]) -> bool:
    """Compare two shapes of a model's tensor; for sigma2_raw, () and (1,) are the same."""
    return tuple(a) == tuple(b) or key.endswith('sigma2_raw') and {tuple(a), tuple(b)} == {(), (1,)}


def _keep_own(head: ZZZHead, state_dict: Dict[str, Any], prefix: str, names: Sequence[str]) -> None:
    """Put the head's own parameters into the state dict, so that loading does not change them."""
    own = dict(head.named_parameters(recurse=False))
    if any(own[name].is_meta for name in names if name in own):  # no values yet: draw them beside the checkpoint
        loaded = next((t for k, t in state_dict.items() if k.startswith(prefix)), None)
        drawn = copy.deepcopy(head).to_empty(device='cpu' if loaded is None else loaded.device)
        drawn.reset_parameters()
        own = {name: drawn.get_parameter(name) if p.is_meta else p for name, p in own.items()}
    for name in names:
        state_dict.pop(f'{prefix}{name}', None)
        if name in own:
            state_dict[f'{prefix}{name}'] = own[name].detach()


# The heads of a model


def heads_of(model: nn.Module) -> Dict[str, ZZZHead]:
    """Find the ZZZ heads of a model, keyed by module path; of PEFT's copies of a head only those in use."""
    idle = [copy for module in model.modules() if hasattr(module, 'modules_to_save') for copy in _idle(module)]
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, ZZZHead) and not any(module is copy for copy in idle)
    }


def _idle(wrapper: Any) -> List[nn.Module]:
    """List the modules in PEFT's ``modules_to_save`` wrapper that the forward pass does not use."""
    copies = getattr(wrapper, 'modules_to_save', None)
    if not isinstance(copies, nn.ModuleDict):  # other modules of PEFT have a list of names
        return []
    active = [] if wrapper.disable_adapters else [name for name in wrapper.active_adapters if name in copies]
    used = [copies[name] for name in active] or [wrapper.original_module]
    return [module for module in (wrapper.original_module, *copies.values()) if module not in used]


@contextlib.contextmanager
def record_inputs(heads: Mapping[str, nn.Module]) -> Iterator[Dict[str, Tensor]]:
    """Record each head's most recent input, keyed by module path. Clear the dict before each forward pass.

    An input of shape (B, d, 1, 1), to a head in place of a 1x1 convolution, is recorded as (B, d).
    """
    inputs: Dict[str, Tensor] = {}

    def record(path: str, x: Tensor) -> None:
        inputs[path] = x.flatten(1) if x.ndim == 4 and x.shape[2:].numel() == 1 else x

    hooks = [
        head.register_forward_pre_hook(lambda module, args, path=path: record(path, args[0]))
        for path, head in heads.items()
    ]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()
