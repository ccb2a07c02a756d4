"""Choose the implementation of the head's functions: PyTorch operations, or the Triton kernels where they can run.

The kernels are imported when they are first used.
"""

import functools
import importlib.util
import logging
from typing import Any, Optional, Sequence, Tuple

import torch
from torch import Tensor

from . import reference
from .reference import Parameters
from .tracing import is_plain

__all__ = [
    'autocasts',
    'check_impl',
    'choose',
    'class_gaussians',
    'fused_embeddings',
    'fused_logits',
    'fused_plan',
    'orthonormal_basis',
    'zzz_logits',
]

IMPLS = ('auto', 'torch', 'triton')

# Limits of the kernels: one program holds the r x r matrix of a class, or a whole row
MAX_RANK, MAX_WIDTH = 32, 16384
MIN_TRITON = (3, 6)  # the oldest version tested on a GPU, which comes with torch 2.10

_logger = logging.getLogger(__name__)


def check_impl(impl: str) -> str:
    """Return ``impl``, or raise a ValueError if there is no implementation of that name."""
    if impl not in IMPLS:
        raise ValueError(f'impl: expected one of {", ".join(IMPLS)}, got {impl!r}')
    return impl


def choose(impl: str, tensors: Sequence[Tensor], width: int, rank: int, refusal: Optional[str] = None) -> str:
    """Resolve an ``impl`` argument to 'torch' or 'triton' for these tensors.

    Args:
        impl: 'auto', 'torch' or 'triton'.
        tensors: All tensors that the kernels would read.
        width: Width d of the embeddings.
        rank: Rank r.
        refusal: Reason why the kernels can't be used, if the caller knows one.

    Raises:
        ValueError: If ``impl`` is unknown, or if it is 'triton' and the kernels can't run; the message has the reason.
    """
    if check_impl(impl) == 'torch':
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


def choose_for_head(impl: str, features: Tensor, p: Parameters) -> str:
    """Resolve an ``impl`` argument for the logits of a head, by :func:`choose`."""
    C, d = p.weight.shape
    if p.A is None or p.v_raw is None:
        return choose(impl, [features], d, 0)
    r = p.A.shape[2]
    shapes = p.A.shape[:2] == (C, d), p.bias.shape == (C,), p.v_raw.shape == (C, r), p.sigma2_raw.shape in ((1,), ())
    if not all(shapes):
        return choose(impl, [features], d, r, 'the shapes of the parameters disagree')
    return choose(impl, [features, p.weight, p.bias, p.A, p.v_raw, p.sigma2_raw], d, r)


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
    import triton

    if tuple(map(int, triton.__version__.split('.')[:2])) < MIN_TRITON:
        return f'Triton {triton.__version__} is older than {".".join(map(str, MIN_TRITON))}'
    if device_type == 'cpu':
        return None if triton.knobs.runtime.interpret else 'no GPU'
    if device_type != 'cuda':
        return f'device {device_type}'
    if torch.version.hip is not None:
        return 'an AMD GPU'
    capability = torch.cuda.get_device_capability(index)
    return None if capability >= (8, 0) else f'compute capability {capability[0]}.{capability[1]} is below 8.0'


def _half_products(features: Tensor) -> bool:
    """Tell whether large matrix products may round factors to 16 bits: under autocast, or for 16-bit features."""
    return features.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(features.device.type)


def orthonormal_basis(A: Tensor, impl: str = 'auto') -> Tensor:
    """Compute an orthonormal basis of the column spaces: the Q factor of A = Q R with a positive diagonal in R.

    It is twice differentiable. Autocast does not lower the precision, and nothing synchronises with the device.
    Well-conditioned matrices take Cholesky QR, on the CPU in eager mode and on NVIDIA GPUs with Triton; all others take
    Gram-Schmidt. See docs/theory.md, sections 5 and 6.

    The basis stays the same if a column is multiplied by a positive factor, or A from the right by an upper-triangular
    matrix with a positive diagonal. Columns that depend linearly on earlier ones (such as zero columns) are replaced by
    vectors that complete an orthonormal basis, and receive a zero gradient.

    Args:
        A: Matrices of shape (..., d, r), r <= d.
        impl: ``'torch'``, ``'triton'`` or ``'auto'``, which takes Triton where it can run.

    Returns:
        Matrices of shape (..., d, r) with orthonormal columns.

    Raises:
        ValueError: If ``impl`` is unknown, or if it is ``'triton'`` and the kernels can't run.

    Example:
        >>> A = torch.tensor([[[2., 1.], [0., 1.], [0., 0.]]])
        >>> orthonormal_basis(A).round(decimals=3)
        tensor([[[1., 0.],
                 [0., 1.],
                 [0., 0.]]])
    """
    if A.shape[-1] == 0:
        return A
    if impl != 'torch':
        refusal = None if A.dtype == torch.float32 else 'it gives float32 only'
        if choose(impl, [A], A.shape[-2], A.shape[-1], refusal) == 'triton':
            from .triton_ops import orthonormalize

            return reference.factorized_rows(A, orthonormalize).transpose(-1, -2)
    return reference.orthonormal_rows(A).transpose(-1, -2)


def class_gaussians(
    weight: Tensor,
    A: Optional[Tensor],
    v_raw: Optional[Tensor],
    sigma2_raw: Tensor,
    v_min: float = 1e-4,
    sigma2_min: float = 1e-4,
    impl: str = 'auto',
) -> Tuple[Tensor, Optional[Tensor], Optional[Tensor], Tensor]:
    """Compute the Gaussians of the classes from the unconstrained parameters of a head, in the parameters' dtype.

    Arguments and shapes as in :func:`zzz_logits`.

    Returns:
        Class means mu (C, d), orthonormal bases (C, d, r) and variances v (C, r), both None for rank 0, and sigma2 ():
        the arguments of :func:`gaussian_logits` and :func:`log_density`.

    Raises:
        ValueError: As in :func:`orthonormal_basis`.
    """
    basis = None if A is None else orthonormal_basis(A, impl)
    return reference.class_gaussians(weight, basis, v_raw, sigma2_raw, v_min, sigma2_min)


def zzz_logits(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    A: Optional[Tensor],
    v_raw: Optional[Tensor],
    sigma2_raw: Tensor,
    v_min: float = 1e-4,
    sigma2_min: float = 1e-4,
    impl: str = 'auto',
    log_density: bool = False,
) -> Tensor:
    """Compute the logits of a ZZZ head from its unconstrained parameters.

    With ``x = f / |f|``, ``mu_c = weight_c / |weight_c|``, ``U_c = orthonormal_basis(A_c)``,
    ``v_c = softplus(v_raw_c) + v_min`` and ``sigma2 = softplus(sigma2_raw) + sigma2_min``, the logit of class c is
    :func:`gaussian_logits` plus bias_c.

    The computation is in float32, or in float64 if the features or the weight are, also under autocast. If autocast is
    on or the features have 16 bits, the Triton kernels round the factors of the largest matrix products, which are unit
    vectors, to float16, and accumulate in float32. They give first derivatives only: use ``impl='torch'`` for higher
    derivatives and torch.func.

    Args:
        features: Pooled embeddings, shape (..., d).
        weight: Class means before normalisation, shape (C, d).
        bias: Shape (C,).
        A: Matrices whose columns span the class subspaces, shape (C, d, r); None for rank 0.
        v_raw: Unconstrained variances, shape (C, r); None for rank 0.
        sigma2_raw: Unconstrained isotropic variance, shape (1,) or ().
        v_min: Lower bound of the variances along the basis.
        sigma2_min: Lower bound of the isotropic variance.
        impl: ``'torch'``, ``'triton'`` or ``'auto'``, which takes Triton where it can run: on an NVIDIA GPU of compute
            capability 8.0 or higher, for ranks 1 to 32 and widths up to 16384, and not in float64. Traced, scripted and
            exported code uses torch.
        log_density: Return log N(x; mu_c, Sigma_c) + d/2 log(2 pi) + bias_c instead. It has the same softmax, but the
            term that all classes share is hundreds of nats: do not use it with sigmoids, 16-bit floats or int8.

    Returns:
        Logits, shape (..., C), float32 or float64.

    Raises:
        ValueError: If the last dimension of the features is not d, if ``impl`` is unknown, or if it is ``'triton'`` and
            the kernels can't run.
    """
    _check_width(features, weight.shape[-1])
    p = Parameters(weight, bias, A, v_raw, sigma2_raw)
    logits: Optional[Tensor] = None
    if torch.jit.is_scripting():
        if not torch.is_grad_enabled():  # TorchScript would save tensors for a backward pass, even in inference mode
            p = _detached(p)
    else:
        if choose_for_head(impl, features, p) == 'triton':
            logits = _kernel_logits(features, p, v_min, sigma2_min)
        elif autocasts(features):
            with torch.autocast(features.device.type, enabled=False):
                logits = reference.logits(features, p, v_min, sigma2_min)
    if logits is None:
        logits = reference.logits(features, p, v_min, sigma2_min)
    if log_density:
        sigma2 = reference.sigma2_of(p.sigma2_raw.to(logits.dtype), sigma2_min)
        logits = logits + reference.shared_log_density(features, sigma2)
    return logits


def _detached(p: Parameters) -> Parameters:
    A, v_raw = p.A, p.v_raw
    if A is not None and v_raw is not None:
        A, v_raw = A.detach(), v_raw.detach()
    return Parameters(p.weight.detach(), p.bias.detach(), A, v_raw, p.sigma2_raw.detach())


def _kernel_logits(features: Tensor, p: Parameters, v_min: float, sigma2_min: float) -> Tensor:
    from . import triton_ops  # in a function of its own: TorchScript can't compile an import

    parameters: Any = p  # none of them is None: the kernels refuse rank 0
    return triton_ops.logits(features, parameters, v_min, sigma2_min, not _half_products(features))


def fused_embeddings(features: Tensor, width: int, like: Tensor) -> Tensor:
    """Normalise embeddings (..., d) in at least float32, and convert them to the dtype of ``like``.

    Raises:
        ValueError: If the last dimension of the features is not ``width``.
    """
    _check_width(features, width)
    wide = features.dtype == torch.float64 or like.dtype == torch.float64
    return reference.normalize(features.to(torch.float64 if wide else torch.float32)).to(like.dtype)


def fused_logits(outputs: Tensor, features: Tensor, sigma2: Tensor, num_classes: int, rank: int) -> Tensor:
    """Compute logits from the outputs of a fused head's linear layer, in float64 if the features are float64.

    Shapes as in ``timm_zzz.ops.reference.fused_logits``.
    """
    logits = reference.fused_logits(outputs, sigma2, num_classes, rank)
    return logits.to(torch.float64) if features.dtype == torch.float64 else logits


def fused_plan(
    features: Tensor, rows: Tensor, offsets: Tensor, sigma2: Tensor, num_classes: int, impl: str = 'auto'
) -> Any:
    """Prepare the kernels to compute a fused head's logits for features of the same device and dtype as these.

    Args:
        rows, offsets: As ``timm_zzz.ops.reference.fuse`` returns them.

    Returns:
        A function of features, see :class:`timm_zzz.ops.triton_ops.FusedLogits`; None if the kernels can't run.

    Raises:
        ValueError: If the last dimension of the features is not d, and as in :func:`choose`.
    """
    rank, d = rows.shape[0] // num_classes - 1, rows.shape[1]
    _check_width(features, d)
    if choose(impl, [features, rows, offsets, sigma2], d, rank) != 'triton':
        return None
    from . import triton_ops

    return triton_ops.FusedLogits(rows, offsets, sigma2, num_classes, not _half_products(features))


def _check_width(features: Tensor, width: int) -> None:
    if not torch.jit.is_tracing() and features.shape[-1] != width:
        raise ValueError(
            f'features: expected a last dimension of {width} (feat_dim), got shape {list(features.shape)}; '
            f'model.forward_head(features, pre_logits=True) pools maps and tokens'
        )


def autocasts(features: Tensor) -> bool:
    """Tell whether autocast is on for the device of the features."""
    # Asking autocast about the meta device breaks the graph of torch.compile in torch 2.11.
    return features.device.type != 'meta' and torch.is_autocast_enabled(features.device.type)
