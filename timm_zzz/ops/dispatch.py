"""Which implementation runs: PyTorch's operations, or the Triton kernels of :mod:`timm_zzz.kernels`.

The kernels are imported where they can run, and not before they do.
"""

import functools
import importlib.util
import logging
from typing import Any, Callable, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .tracing import is_plain

__all__ = [
    'IMPLS',
    'check',
    'choose',
    'choose_for_head',
    'fold',
    'half_products',
    'orthonormalize',
    'prepare',
    'prepared_logits',
    'zzz_logits',
]

IMPLS = ('auto', 'torch', 'triton')

# The largest rank and width that the kernels were made for: a class's r x r matrix and a whole row in one program
MAX_RANK, MAX_WIDTH = 32, 16384

_logger = logging.getLogger(__name__)


def check(impl: str) -> str:
    """Return the name of an implementation, or raise a ValueError."""
    if impl not in IMPLS:
        raise ValueError(f'impl: expected one of {", ".join(IMPLS)}, got {impl!r}')
    return impl


def choose(impl: str, tensors: Sequence[Tensor], width: int, rank: int, refusal: Optional[str] = None) -> str:
    """'torch' or 'triton': what an ``impl`` argument means for these tensors.

    Args:
        impl: 'auto', 'torch' or 'triton'.
        tensors: All that the kernels would read.
        width: d.
        rank: r.
        refusal: Why the kernels can't do what is asked, if the caller knows a reason.

    Raises:
        ValueError: If ``impl`` is unknown, or 'triton' where the kernels can't run, with the reason.
    """
    if check(impl) == 'torch':
        return 'torch'
    device = tensors[0].device
    if refusal is None:
        refusal = _device_refusal(device.type, device.index) or _tensor_refusal(tensors, width, rank)
    if refusal is None and (torch.compiler.is_compiling() or is_plain(tensors)):
        if impl == 'triton' or device.type == 'cuda':  # Triton's interpreter on the CPU is for tests
            _log('triton', 'it can run')
            return 'triton'
    if refusal is not None and impl == 'triton':
        raise ValueError(f"impl='triton' can't run: {refusal}")
    _log('torch', refusal or 'what is traced or transformed takes it')
    return 'torch'


def choose_for_head(
    impl: str,
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    A: Optional[Tensor],
    v_raw: Optional[Tensor],
    sigma2_raw: Tensor,
) -> str:
    """:func:`choose` for the arguments of timm_zzz.functional.zzz_logits."""
    C, d = weight.shape
    if A is None or v_raw is None:
        return choose(impl, [features], d, 0)
    r = A.shape[2]
    if A.shape[:2] != (C, d) or bias.shape != (C,) or v_raw.shape != (C, r) or sigma2_raw.shape != ():
        return choose(impl, [features], d, r, 'the shapes of the parameters disagree')
    return choose(impl, [features, weight, bias, A, v_raw, sigma2_raw], d, r)


def _log(impl: str, reason: str) -> None:
    if not torch.compiler.is_compiling():
        _log_once(impl, reason)


@functools.cache
def _log_once(impl: str, reason: str) -> None:
    _logger.debug(f'impl: {impl} ({reason})')


def _tensor_refusal(tensors: Sequence[Tensor], width: int, rank: int) -> Optional[str]:
    if not 1 <= rank <= MAX_RANK:
        return f'rank {rank} is not between 1 and {MAX_RANK}'
    if width > MAX_WIDTH:
        return f'width {width} exceeds {MAX_WIDTH}'
    for t in tensors:
        if t.device != tensors[0].device:
            return f'tensors on {tensors[0].device} and {t.device}'
        if t.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f'a tensor of {t.dtype}'
    return None


@torch.compiler.assume_constant_result
def _device_refusal(device_type: str, index: Optional[int]) -> Optional[str]:
    return _cached_device_refusal(device_type, index)


@functools.cache
def _cached_device_refusal(device_type: str, index: Optional[int]) -> Optional[str]:
    if importlib.util.find_spec('triton') is None:
        return 'Triton is not installed'
    if device_type == 'cpu':
        import triton

        return None if triton.knobs.runtime.interpret else 'no GPU'
    if device_type != 'cuda':
        return f'device {device_type}'
    if torch.version.hip is not None:
        return 'an AMD GPU'
    capability = torch.cuda.get_device_capability(index)
    return None if capability >= (8, 0) else f'compute capability {capability[0]}.{capability[1]} is below 8.0'


def half_products(features: Tensor) -> bool:
    """Whether large matrix products may round their factors to 16 bits: autocast is on, or the features have 16."""
    return features.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(features.device.type)


def orthonormalize(A: Tensor) -> Tuple[Tensor, Tensor]:
    """q and R^-1 of A = q^T R by the kernels, shapes (n, d, r) to (n, r, d) and (n, r, r), float32."""
    from . import triton_ops as kernels

    q, factor = kernels.orthonormalize(A)
    return q, factor.mT


def zzz_logits(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    A: Optional[Tensor],
    v_raw: Optional[Tensor],
    sigma2_raw: Tensor,
    v_min: float,
    sigma2_min: float,
) -> Tensor:
    """timm_zzz.functional.zzz_logits by the kernels."""
    split = not half_products(features)
    if torch.compiler.is_compiling():
        flat = features.reshape(-1, features.shape[-1])
        out = _operator(flat, weight, bias, A, v_raw, sigma2_raw, v_min, sigma2_min, split)[0]
        return out.reshape(features.shape[:-1] + out.shape[1:])
    from . import triton_ops as kernels

    assert A is not None and v_raw is not None
    return kernels.zzz_logits(features, weight, bias, A, v_raw, sigma2_raw, v_min, sigma2_min, split)


def prepare(
    split: bool,
    v_min: float,
    sigma2_min: float,
    sigma2_raw: Tensor,
    bias: Tensor,
    weight: Tensor,
    v_raw: Tensor,
    A: Tensor,
) -> Tuple[Tensor, Tensor]:
    """What :func:`prepared_logits` needs of the classes."""
    from . import triton_ops as kernels

    return kernels.prepare(weight, bias, A, v_raw, sigma2_raw, v_min, sigma2_min, split)[:2]


def fold(rows: Tensor, offsets: Tensor, precision: Tensor, num_classes: int, split: bool) -> Tuple[Tensor, ...]:
    """What :func:`prepared_logits` needs of the classes, and sigma2_raw for a sigma2_min of 0, of a fused head."""
    from . import triton_ops as kernels

    return kernels.fold(rows, offsets, precision, num_classes, split)


def prepared_logits(
    features: Tensor,
    operand: Tensor,
    coef: Tensor,
    num_classes: int,
    rank: int,
    split: bool,
    sigma2_raw: Tensor,
    sigma2_min: float,
) -> Tensor:
    """Logits (..., C) of embeddings (..., d) from classes that :func:`prepare` or :func:`fold` made; no gradient."""
    from . import triton_ops as kernels

    return kernels.logits(features, kernels.classes(operand, coef, num_classes, rank, split), sigma2_raw, sigma2_min)


def repeated_logits(
    features: Tensor,
    operand: Tensor,
    coef: Tensor,
    num_classes: int,
    rank: int,
    split: bool,
    sigma2_raw: Tensor,
    sigma2_min: float,
) -> Callable[[Tensor], Tensor]:
    """:func:`prepared_logits` as a function of features alike; see timm_zzz.kernels.head.RepeatedLogits."""
    from . import triton_ops as kernels

    classes = kernels.classes(operand, coef, num_classes, rank, split)
    return kernels.RepeatedLogits(features, classes, sigma2_raw, sigma2_min)


# What torch.compile sees of the kernels: two operators, the second of which is the gradient of the first.


@torch.library.custom_op('timm_zzz::logits', mutates_args=())
def _operator(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    A: Tensor,
    v_raw: Tensor,
    sigma2_raw: Tensor,
    v_min: float,
    sigma2_min: float,
    split: bool,
) -> List[Tensor]:
    from . import triton_ops as kernels

    return kernels.forward(features, (weight, bias, A, v_raw, sigma2_raw), v_min, sigma2_min, split)


@torch.library.custom_op('timm_zzz::logits_grad', mutates_args=())
def _grad_operator(
    grad: Tensor,
    features: Tensor,
    parameters: List[Tensor],
    kept: List[Tensor],
    v_min: float,
    sigma2_min: float,
    split: bool,
) -> List[Tensor]:
    from . import triton_ops as kernels

    return kernels.backward(grad, features, parameters, kept, v_min, sigma2_min, split)


@_operator.register_fake
def _(features, weight, bias, A, v_raw, sigma2_raw, v_min, sigma2_min, split):
    from . import triton_ops as kernels

    return kernels.forward(features, (weight, bias, A, v_raw, sigma2_raw), v_min, sigma2_min, split, launch=False)


@_grad_operator.register_fake
def _(grad, features, parameters, kept, v_min, sigma2_min, split):
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (features, *parameters)]


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    features, weight, bias, A, v_raw, sigma2_raw, *ctx.options = inputs
    ctx.save_for_backward(features, weight, bias, A, v_raw, sigma2_raw, *output[1:])


def _backward(ctx: Any, grads: List[Optional[Tensor]]) -> Tuple[Optional[Tensor], ...]:
    features, *rest = ctx.saved_tensors
    if grads[0] is None:
        return (None,) * 9
    return (*_grad_operator(grads[0], features, rest[:5], rest[5:], *ctx.options), None, None, None)


_operator.register_autograd(_backward, setup_context=_setup_context)
