"""Compute the ZZZ head's logits and gradients with the Triton kernels, as one differentiable function.

Forward: coefficients of the classes, their bases and means, normalised embeddings, then one kernel for the logits.
Backward: one pass over the gradients of the logits, three matrix products, then one kernel for the gradients of the
classes and the embeddings. Nothing synchronises with the device, uses atomic additions or allocates a tensor of shape
(batch, classes, width).
"""

import contextvars
import functools
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
import triton
from torch import Tensor

from . import triton_kernels as kernels
from .reference import fused_scale

__all__ = ['FusedLogits', 'logits', 'orthonormalize']

CHUNK_BYTES = 64 * 2**20  # size of the bases computed at a time, if all of them are too large to keep
_REPAIR_PROGRAMS = 256
MAX_REPEATED = 16  # number of feature shapes whose launches a fused head caches
MAX_COMPILED = 1024  # number of launches whose compiled kernels are cached
_FP16, _FP32 = torch.float16, torch.float32
Options = Dict[str, int]  # a kernel's tile sizes and compiler options


class Classes(NamedTuple):
    """What the kernels read about some classes; triton_kernels describes the layouts."""

    # float16 (rows, dp): bases, then means as hi, lo, hi; with split, bases as hi, lo, then means as hi, lo
    operand: Tensor
    coef: Tensor  # float32
    num_classes: int
    padded: int  # number of classes, padded
    R: int  # rank, padded
    split: bool  # keep float32 precision


class Embeddings(NamedTuple):
    """Normalised embeddings as the sum of ``hi`` and ``lo``, float16 (B, dp).

    16-bit features, unless float32 precision is asked for, are ``hi`` times a float32 ``factor`` (B,), which is exact,
    and ``lo`` is empty; see triton_kernels._embed.
    """

    hi: Tensor
    lo: Tensor
    factor: Tensor

    @property
    def exact(self) -> bool:
        return self.lo.numel() == 0


class Parameters(NamedTuple):
    """The head's parameters with r >= 1, shapes as in timm_zzz.functional.zzz_logits."""

    weight: Tensor
    bias: Tensor
    A: Tensor
    v_raw: Tensor
    sigma2_raw: Tensor

    def part(self, start: int, stop: int) -> 'Parameters':
        """Return the parameters of the classes from ``start`` to ``stop``."""
        weight, bias, A, v_raw = (p[start:stop] for p in self[:4])
        return Parameters(weight, bias, A, v_raw, self.sigma2_raw)


# Triton's own functions take the CPU as long as a launch
def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_2(n: int) -> int:
    """Return the smallest power of 2 that is >= n, for n >= 1."""
    return 1 << (n - 1).bit_length()


def _pad(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _coef_size(cp: int, R: int) -> int:
    """Return the number of values in COEF; see triton_kernels."""
    return cp * (R * R + 2 * R + 5)


# Tile sizes, chosen by measurement on an H200 with Triton 3.6


@functools.lru_cache(MAX_COMPILED)
def _factor_options(R: int, cp: int, split: bool) -> Options:
    if R == 8 and cp >= 2048 and not split:  # measured on an H100; fewer classes need the larger tile
        return dict(NC=2, BLOCK=32, num_warps=1)
    return dict(NC=max(1, 16 // R), BLOCK=64 if R <= 16 else 32, num_warps=2)


@functools.cache
def _basis_options(R: int) -> Options:
    return dict(NC=max(1, 16 // R), BLOCK=128, num_warps=2 if R <= 16 else 4)


@functools.cache
def _class_grad_options(R: int, split: bool) -> Options:
    return dict(NC=max(1, 16 // R), BLOCK=128, num_warps=4 if split or R > 16 else 1 if R == 8 else 2)


@functools.lru_cache(MAX_COMPILED)
def _logits_options(device: torch.device, B: int, C: int, R: int, split: bool, exact: bool) -> Options:
    BM, BC, BK, warps = 64, max(16, min(64, 128 // R)), 64, 4
    if B <= 32 or (R == 32 and split):
        BM = 16 if B <= 16 else 32
    elif R == 8 and not split and B > 64:
        BM, BC, BK, warps = (128, 16, 32, 4) if B * C >= 2**20 else (128, 16, 64, 8)
    elif R == 16 and not split and B > 64:
        BM, BK = 128, 32
    if R == 32 or split:
        BK = 32
    if BM * BC * R > 128 * 128:
        warps = 8
    # Each stage of the pipeline holds its tiles of x (hi, lo), U and mu in shared memory
    x, mu = (1, 2) if exact else (2, 3)
    stage = 2 * BK * (x * BM + BC * R * (2 if split else 1) + mu * BC)
    return dict(BM=BM, BC=BC, BK=BK, num_warps=warps, num_stages=max(1, min(4, _shared_memory(device) // stage)))


@functools.cache
def keep_bytes(device: torch.device) -> int:
    """Return the size in bytes up to which bases are kept for the backward pass.

    Larger ones are computed in chunks, and again in the backward pass. Keeping those of 21843 classes of rank 8 (256
    MiB) takes 0.6 GiB more and makes a step a sixth shorter on an H100, where launching chunks would keep the CPU
    busier than the GPU.
    """
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == 'cuda' else 0
    return max(128 * 2**20, memory // 256)


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that one program may use."""
    if device.type != 'cuda':
        return 2**16
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin


@functools.cache
def _logits_grad_options(R: int, split: bool) -> Options:
    if R in (8, 16) and not split:
        return dict(BB=64, BC=2, num_warps=1)
    return dict(BB=32 if split or R >= 32 else 64, BC=max(2, min(16, 32 // R)), num_warps=4)


@functools.cache
def _product_options() -> Options:
    return dict(BN=64, BD=128, BB=32, num_warps=4)


def _row_warps(width: int) -> int:
    return min(16, max(1, width // 256))


# Compiled kernels, keyed by all that they were launched with except addresses
compiled: Dict[Any, Any] = {}
# The list that records launches for _Repeated, if there is one
_record: contextvars.ContextVar[Any] = contextvars.ContextVar('record', default=None)


@functools.cache
def _overlaps(device: torch.device) -> bool:
    """Tell whether a kernel may be launched while the previous one runs; see triton_kernels._wait."""
    return device.type == 'cuda' and torch.cuda.get_device_capability(device) >= (9, 0)


_INTERPRETED = not isinstance(kernels.rows_kernel, triton.JITFunction)


def _addresses(tensors: Sequence[Tensor]) -> List[Any]:
    """Return the addresses of tensors, for compiled kernels; Triton's interpreter takes the tensors."""
    return list(tensors) if _INTERPRETED else [t.data_ptr() for t in tensors]


def _launch(
    kernel: Any, grid: Tuple[int, ...], tensors: Sequence[Tensor], numbers: Tuple[Any, ...], options: Options
) -> None:
    """Launch a Triton kernel; from the second time on without checks of arguments, which take longer than a launch.

    Args:
        tensors, numbers: The kernel's arguments in order.
        options: Tile sizes in order, num_warps and num_stages.
    """
    grid, device, addresses = (*grid, 1, 1)[:3], tensors[0].device, _addresses(tensors)
    # Triton compiles again for other dtypes, alignments and constants, and for some values of numbers
    aligned = _INTERPRETED or tuple([at & 15 == 0 for at in addresses])
    key = (kernel.__name__, device, numbers, *options.values(), aligned, *[t.dtype for t in tensors])
    known = compiled.get(key)
    if known is None:
        if len(compiled) >= MAX_COMPILED:
            compiled.clear()
        overlap = _overlaps(device)
        tiles = [value for name, value in options.items() if name not in ('num_warps', 'num_stages')]
        code = kernel[grid](*tensors, *numbers, **options, OVERLAP=overlap, **dict(launch_pdl=True) if overlap else {})
        known = compiled[key] = kernel if _INTERPRETED else code, (*numbers, *tiles, overlap)
        launch = known[0][grid]
    else:
        launch = known[0][grid]
        launch(*addresses, *known[1])
    record = _record.get()
    if record is not None:
        record.append((launch, tensors, known[1]))


class _Stay:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *args: Any) -> None:
        pass


_STAY = _Stay()


def _device(x: Tensor) -> Any:
    """Return a context for launches on the device of ``x``: Triton launches on the current device."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return _STAY


def _mm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply float16 matrices with float32 accumulation, also under autocast."""
    if not a.is_cuda:  # Triton's interpreter
        return (a.float() @ b.float()).to(dtype)
    if torch.is_autocast_enabled('cuda'):
        with torch.autocast('cuda', enabled=False):
            return _mm(a, b, dtype)
    return torch.mm(a, b) if dtype == a.dtype else torch.mm(a, b, out_dtype=dtype)


def _new_classes(p: Parameters, split: bool, coef: Optional[Tensor] = None) -> Classes:
    C, d, r = p.A.shape
    R, cp = _power_of_2(r), _pad(C, 16)
    if coef is None:
        coef = torch.empty(_coef_size(cp, R), dtype=_FP32, device=p.A.device)
    rows = cp * (2 * R + 2 if split else R + 3)
    return Classes(torch.empty((rows, _pad(d, 8)), dtype=_FP16, device=p.A.device), coef, C, cp, R, split)


def _new_embeddings(features: Tensor, split: bool) -> Embeddings:
    B, d = features.shape
    hi = torch.empty((B, _pad(d, 8)), dtype=_FP16, device=features.device)
    exact = features.dtype != _FP32 and not split
    lo = torch.empty((0,) if exact else hi.shape, dtype=_FP16, device=features.device)
    return Embeddings(hi, lo, torch.empty(B if exact else 0, dtype=_FP32, device=features.device))


def _new_products(B: int, classes: Classes) -> Tuple[Tensor, Tensor]:
    """Allocate t, shape (B, padded R), and x mu, shape (B, padded)."""
    device, cp = classes.coef.device, classes.padded
    t = torch.empty((B, cp * classes.R), dtype=_FP32 if classes.split else _FP16, device=device)
    return t, torch.empty((B, cp), dtype=_FP32, device=device)


def _fill_coef(
    coef: Tensor, p: Parameters, v_min: float, sigma2_min: float, split: bool, basis_only: bool = False
) -> None:
    C, d, r = p.A.shape
    R, cp = _power_of_2(r), _pad(C, 16)
    options = _factor_options(R, cp, split)
    _launch(
        kernels.factor_kernel, (_cdiv(cp, options['NC']),),
        (p.A, p.weight, p.v_raw, p.bias, p.sigma2_raw, coef),
        (v_min, sigma2_min, C, cp, d, r, R, split or R == 4, basis_only), options,
    )  # fmt: skip


def _fill_operand(classes: Classes, p: Parameters, basis_only: bool = False) -> None:
    C, d, r = p.A.shape
    out, coef, _, cp, R, split = classes
    options = _basis_options(R)
    _launch(
        kernels.basis_kernel, (_cdiv(cp, options['NC']), _cdiv(out.shape[1], options['BLOCK'])),
        (p.A, p.weight, coef, out), (C, cp, d, out.shape[1], r, R, split, basis_only), options,
    )  # fmt: skip


def _fill_rows(
    classes: Classes,
    p: Optional[Parameters],
    features: Optional[Tensor],
    x: Optional[Embeddings],
    basis_only: bool = False,
) -> None:
    """Repair flagged bases if parameters are given, and normalise embeddings if features are given."""
    out, coef, _, cp, R, split = classes
    dp = out.shape[1]
    width = _power_of_2(dp)
    A = weight = scratch = coef
    programs, per_program, C, d, r = 0, 16, 0, dp, 1
    if p is not None:
        A, weight = p.A, p.weight
        C, d, r = A.shape
        per_program = max(16, _power_of_2(_cdiv(C, _REPAIR_PROGRAMS)))
        programs = _cdiv(C, per_program)
        scratch = torch.empty(programs * r * width, dtype=_FP32, device=A.device)
    B, exact, f, (hi, lo, factor) = 0, False, coef, (out, out, coef)
    if features is not None and x is not None:
        exact, f, (hi, lo, factor) = x.exact, features, x
        B, d = f.shape
    _launch(
        kernels.rows_kernel, (programs + B,),
        (A, weight, out, coef, scratch, f, hi, lo, factor),
        (programs, C, cp, d, dp, r, R, per_program, split, basis_only, exact),
        dict(BLOCK=width, num_warps=_row_warps(width)),
    )  # fmt: skip


def _fill_logits(
    out: Tensor,
    start: int,
    x: Embeddings,
    classes: Classes,
    sigma2_raw: Tensor,
    sigma2_min: float,
    saved: Sequence[Tensor],
) -> None:
    """Write the logits of some classes into columns of ``out`` from ``start``, and t and x mu into ``saved``."""
    B, dp = x.hi.shape
    R, cp = classes.R, classes.padded
    chunk = out[:, start:] if start else out
    t, xm = saved or (chunk, chunk)
    options = _logits_options(out.device, B, cp, R, classes.split, x.exact)
    _launch(
        kernels.logits_kernel, (_cdiv(cp, options['BC']), _cdiv(B, options['BM'])),
        (*x, classes.operand, classes.coef, sigma2_raw, chunk, t, xm),
        (sigma2_min, B, classes.num_classes, cp, dp, out.stride(0), R, classes.split, bool(saved), x.exact), options,
    )  # fmt: skip


def _fold(rows: Tensor, offsets: Tensor, sigma2: Tensor, num_classes: int, split: bool) -> Tuple[Classes, Tensor]:
    """Convert a fused head to what the kernels read: its classes, and sigma2_raw for a sigma2_min of 0."""
    C, d = num_classes, rows.shape[1]
    rank = rows.shape[0] // C - 1
    R, cp, dp = _power_of_2(rank), _pad(C, 16), _pad(d, 8)
    rows, offsets, sigma2 = rows.float(), offsets.float(), sigma2.double()
    scale = fused_scale(sigma2)
    scaled = rows[C:].view(rank, C, d).transpose(0, 1)
    norm = torch.linalg.vector_norm(scaled, dim=-1)
    bases = rows.new_zeros(cp, R, dp)
    bases[:C, :rank, :d] = scaled / norm.unsqueeze(-1) * kernels.SCALE
    means = rows.new_zeros(cp, dp)
    means[:C, :d] = rows[:C] * (kernels.SCALE * sigma2 * scale).float()
    parts = []
    for part in (bases.flatten(0, 1), means):
        hi = part.half()
        parts += [hi, (part - hi).half()]
    if not split:
        parts = [parts[0], *parts[2:], parts[2]]
    coef = rows.new_zeros(_coef_size(cp, R))
    sections = coef[: 2 * cp * R].view(2, cp, R)
    sections[0, :C, :rank] = -offsets[C:].view(rank, C).T / norm
    sections[1, :C, :rank] = (2 * norm.double().square() * sigma2).float()
    coef[(2 * R + 1) * cp :][:C] = (offsets[:C] * scale).float()
    classes = Classes(torch.cat(parts), coef, C, cp, R, split)
    return classes, torch.log(torch.expm1(sigma2)).float()


def orthonormalize(A: Tensor) -> Tuple[Tensor, Tensor]:
    """Compute q (C, r, d) and R^-1 (C, r, r) of A = q^T R, shape (C, d, r), in float32."""
    C, d, r = A.shape
    A = A.contiguous()
    p = Parameters(A, A, A, A, A)
    R, cp = _power_of_2(r), _pad(C, 16)
    coef = torch.empty(_coef_size(cp, R), dtype=_FP32, device=A.device)
    out = torch.empty((cp * R, _pad(d, 8)), dtype=_FP32, device=A.device)
    classes = Classes(out, coef, C, cp, R, False)
    if C:
        with _device(A):
            _fill_coef(coef, p, 0.0, 0.0, True, True)
            _fill_operand(classes, p, True)
            _fill_rows(classes, p, None, None, True)
    factor = coef[cp * (2 * R + 5) :].view(cp, R, R)
    return out.view(cp, R, -1)[:C, :r, :d].contiguous(), factor[:C, :r, :r].contiguous().mT


def _class_logits(features: Tensor, classes: Classes, sigma2_raw: Tensor, sigma2_min: float) -> Tensor:
    """Compute logits (..., C) of embeddings (..., d), without a gradient."""
    d = features.shape[-1]
    flat = features.detach().reshape(-1, d).contiguous()
    out = torch.empty((flat.shape[0], classes.num_classes), dtype=_FP32, device=features.device)
    if flat.shape[0]:
        x = _new_embeddings(flat, classes.split)
        with _device(flat):
            _fill_rows(classes, None, flat, x)
            _fill_logits(out, 0, x, classes, sigma2_raw, sigma2_min, ())
    return out.reshape(features.shape[:-1] + out.shape[1:])


class FusedLogits:
    """Callable that computes the logits of a fused head from features, without a gradient.

    Args:
        rows, offsets: As timm_zzz.ops.reference.fuse returns them, for rank >= 1.
        sigma2: Isotropic variance, shape ().
        num_classes: Number of classes C.
        split: Keep float32 precision in the matrix products; otherwise their operands are rounded to float16.
    """

    def __init__(self, rows: Tensor, offsets: Tensor, sigma2: Tensor, num_classes: int, split: bool):
        with torch.inference_mode(False), torch.no_grad():
            self.classes, self.sigma2_raw = _fold(rows, offsets, sigma2, num_classes, split)
        self._repeated: Dict[Any, _Repeated] = {}

    def __call__(self, features: Tensor) -> Tensor:
        aligned = features.is_contiguous() and features.data_ptr() % 16 == 0 and features.numel() > 0
        captured = features.is_cuda and torch.cuda.is_current_stream_capturing()
        if not aligned or captured or _device(features) is not _STAY:
            return _class_logits(features, self.classes, self.sigma2_raw, 0.0)
        like = features.shape, features.dtype
        repeated = self._repeated.get(like)
        if repeated is None:
            if len(self._repeated) >= MAX_REPEATED:
                self._repeated.clear()
            repeated = self._repeated[like] = _Repeated(features, self.classes, self.sigma2_raw)
        return repeated(features)


class _Repeated:
    """Repeat recorded launches for features of one shape, dtype and device, with less CPU work than a first call."""

    def __init__(self, features: Tensor, classes: Classes, sigma2_raw: Tensor):
        self.shape = *features.shape[:-1], classes.num_classes
        self.classes = classes
        tensors = f, hi, lo, factor, out = self._tensors(features)
        token = _record.set([])
        try:
            x = Embeddings(hi, lo, factor)
            _fill_rows(classes, None, f, x)
            _fill_logits(out, 0, x, classes, sigma2_raw, 0.0, ())
            record = _record.get()
        finally:
            _record.reset(token)
        self.launches = []
        for launch, args, numbers in record:
            changing = [(i, k) for i, a in enumerate(args) for k, t in enumerate(tensors) if a is t]
            self.launches.append((launch, _addresses(args), changing, numbers))

    def __call__(self, features: Tensor) -> Tensor:
        tensors = self._tensors(features)
        addresses = _addresses(tensors)
        for launch, args, changing, numbers in self.launches:
            args = args.copy()
            for i, k in changing:
                args[i] = addresses[k]
            launch(*args, *numbers)
        return tensors[-1] if features.ndim == 2 else tensors[-1].view(self.shape)

    def _tensors(self, features: Tensor) -> Tuple[Tensor, ...]:
        flat = features if features.ndim == 2 else features.view(-1, features.shape[-1])
        out = torch.empty((flat.shape[0], self.shape[-1]), dtype=_FP32, device=flat.device)
        return (flat, *_new_embeddings(flat, self.classes.split), out)


def _chunks(A: Tensor) -> List[Tuple[int, int]]:
    C, d, r = A.shape
    size = 2 * C * d * _power_of_2(r)
    count = 1 if size <= keep_bytes(A.device) else -(-size // CHUNK_BYTES)
    step = _pad(-(-C // count), 16)
    return [(start, min(C, start + step)) for start in range(0, C, step)]


def forward(
    features: Tensor,
    parameters: Sequence[Tensor],
    v_min: float,
    sigma2_min: float,
    split: bool,
    save: bool = True,
    launch: bool = True,
) -> List[Tensor]:
    """Compute logits (B, C) in float32, and what :func:`backward` needs.

    That is the embeddings, and the classes without their bases if there are several chunks.

    Args:
        features: Shape (B, d), B >= 1.
        parameters: weight, bias, A, v_raw, sigma2_raw; shapes as in timm_zzz.functional.zzz_logits.
        split: Keep float32 precision in the matrix products; otherwise their operands are rounded to float16.
        save: Return what :func:`backward` needs, too.
        launch: If False, return tensors of the right shapes without values.
    """
    features, p = features.contiguous(), Parameters(*(t.contiguous() for t in parameters))
    B, d = features.shape
    C = p.A.shape[0]
    out = torch.empty((B, C), dtype=_FP32, device=features.device)
    x = _new_embeddings(features, split)
    kept: List[Tensor] = []
    with _device(features):
        chunks = _chunks(p.A)
        for start, stop in chunks:
            part = p if len(chunks) == 1 else p.part(start, stop)
            classes = _new_classes(part, split)
            saved = _new_products(B, classes) if save else ()
            kept += [classes.coef, *saved]
            if len(chunks) == 1:
                kept += [classes.operand]
            if launch:
                _fill_coef(classes.coef, part, v_min, sigma2_min, split)
                _fill_operand(classes, part)
                _fill_rows(classes, part, features if start == 0 else None, x)
                _fill_logits(out, start, x, classes, p.sigma2_raw, sigma2_min, saved)
    return [out, *x, *kept] if save else [out]


def backward(
    grad: Tensor,
    features: Tensor,
    parameters: Sequence[Tensor],
    kept: Sequence[Tensor],
    v_min: float,
    sigma2_min: float,
    split: bool,
) -> List[Tensor]:
    """Compute gradients of features and parameters from that of the logits (B, C) and what :func:`forward` kept."""
    features, p = features.contiguous(), Parameters(*(t.contiguous() for t in parameters))
    B, d = features.shape
    C, _, r = p.A.shape
    R, dp = _power_of_2(r), _pad(d, 8)
    device = features.device
    x, kept = Embeddings(*kept[:3]), kept[3:]
    grad = grad.contiguous()
    dfeatures = torch.empty_like(features)
    g = Parameters(*(torch.empty_like(t) for t in p))
    dprec = torch.empty(C, dtype=_FP32, device=device)
    # float16 ends at 65504: |s g rho t| <= 2 top, and a sum of B of them times SCALE x has to fit
    top = min(8.0, 1024 / B)
    dx: Optional[Tensor] = None
    with _device(features):
        amax = torch.empty(kernels.AMAX_PROGRAMS, dtype=_FP32, device=device)
        _launch(kernels.amax_kernel, (len(amax),), (grad, amax), (grad.numel(),), dict(BLOCK=2048, num_warps=8))
        chunks = _chunks(p.A)
        for k, (start, stop) in enumerate(chunks):
            part, dpart = (p, g) if len(chunks) == 1 else (p.part(start, stop), g.part(start, stop))
            n_classes, cp = stop - start, _pad(stop - start, 16)
            coef, t, xm = kept[3 * k : 3 * k + 3]
            if len(chunks) == 1:
                classes = Classes(kept[3], coef, C, cp, R, split)
            else:
                classes = _new_classes(part, split, coef)
                _fill_operand(classes, part)
                _fill_rows(classes, part, None, None)
            n = cp * R  # rows of the bases
            # Columns: s g rho t, s g as lo, hi, hi; with split: s g rho t as hi, lo, s g as lo, hi, s g t as hi, lo
            means = 2 * n if split else n
            width = means + (2 if split else 3) * cp
            operands = torch.empty((B, width + (2 * n if split else 0)), dtype=_FP16, device=device)
            partial = torch.empty(cp * (R * R + 2 * R + 2), dtype=_FP32, device=device)
            options = _logits_grad_options(R, split)
            _launch(
                kernels.logits_grad_kernel, (cp // options['BC'],),
                (grad[:, start:stop], t, xm, x.factor, part.v_raw, p.sigma2_raw, classes.coef, amax, operands, partial,
                 dpart.v_raw, dpart.bias, dprec[start:stop]),
                (v_min, sigma2_min, top, B, n_classes, cp, C, operands.stride(0), r, R, split, x.exact), options,
            )  # fmt: skip
            del t, xm
            product = _exact_product(operands, classes) if split else _mm(operands, classes.operand, _FP32)
            dx = product if dx is None else dx.add_(product)
            hi, lo = operands[:, means + cp :], operands[:, means:]
            if split:
                dU = _product(operands[:, width:], operands[:, width + n :], n, x)
                P = _exact_mm((hi[:, :cp].float() + lo[:, :cp].float()).t(), x.hi.float() + x.lo.float())
            else:
                dU = _mm(operands[:, :n].t(), x.hi, _FP16)
                P = _product(hi, lo, cp, x)
            del operands
            options = dict(WIDTH=_power_of_2(dp), **_class_grad_options(R, split))
            tiles = _cdiv(n_classes, options['NC']) * _cdiv(d, options['BLOCK'])
            rest = B + 1 if stop == C else 0
            _launch(
                kernels.class_grad_kernel, (tiles + rest,),
                (p.sigma2_raw, amax, classes.operand, classes.coef, partial, dU, P, dpart.A, dpart.weight,
                 features, x.factor, dx, dprec, dfeatures, g.sigma2_raw),
                (sigma2_min, top, tiles, B, n_classes, C, cp, d, dp, r, R, split, x.exact), options,
            )  # fmt: skip
            del classes, dU, P
    return [dfeatures, *g]


def _exact_product(operands: Tensor, classes: Classes) -> Tensor:
    """Compute operands @ classes.operand in float32."""
    n, cp = classes.padded * classes.R, classes.padded
    total: Optional[Tensor] = None
    for at, size in ((0, n), (2 * n, cp)):
        g = operands[:, at : at + size].float() + operands[:, at + size : at + 2 * size].float()
        rows = classes.operand[at : at + size].float() + classes.operand[at + size : at + 2 * size].float()
        product = _exact_mm(g, rows)
        total = product if total is None else total.add_(product)
    assert total is not None
    return total


def _exact_mm(a: Tensor, b: Tensor) -> Tensor:
    """Multiply in float32: in a long sum, float16 products of the matrix units would lose the last digits."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def _product(hi: Tensor, lo: Tensor, n: int, x: Embeddings) -> Tensor:
    """Compute (hi + lo)^T x in float32 precision, for the first n columns."""
    B, dp = x.hi.shape
    out = torch.empty((n, dp), dtype=_FP32, device=x.hi.device)
    options = _product_options()
    _launch(
        kernels.product_kernel, (_cdiv(n, options['BN']), _cdiv(dp, options['BD'])),
        (hi, lo, x.hi, x.lo, out), (B, n, dp, hi.stride(0), x.exact), options,
    )  # fmt: skip
    return out


class _Logits(torch.autograd.Function):
    """Autograd function for eager and compiled code; the compiler does not look into its two operators."""

    @staticmethod
    def forward(ctx, features, weight, bias, A, v_raw, sigma2_raw, v_min, sigma2_min, split):
        parameters = [weight, bias, A, v_raw, sigma2_raw]
        run = forward_op if torch.compiler.is_compiling() else forward
        out, *kept = run(features, parameters, v_min, sigma2_min, split)
        ctx.options = v_min, sigma2_min, split
        ctx.save_for_backward(features, *parameters, *kept)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        features, *saved = ctx.saved_tensors
        run = backward_op if torch.compiler.is_compiling() else backward
        return (*run(grad, features, saved[:5], saved[5:], *ctx.options), None, None, None)


@torch.library.custom_op('timm_zzz::logits', mutates_args=())
def forward_op(
    features: Tensor, parameters: List[Tensor], v_min: float, sigma2_min: float, split: bool
) -> List[Tensor]:
    """Run :func:`forward` as an operator for the compiler."""
    return forward(features, parameters, v_min, sigma2_min, split)


@torch.library.custom_op('timm_zzz::logits_grad', mutates_args=())
def backward_op(
    grad: Tensor,
    features: Tensor,
    parameters: List[Tensor],
    kept: List[Tensor],
    v_min: float,
    sigma2_min: float,
    split: bool,
) -> List[Tensor]:
    """Run :func:`backward` as an operator for the compiler."""
    return backward(grad, features, parameters, kept, v_min, sigma2_min, split)


@forward_op.register_fake
def _(features, parameters, v_min, sigma2_min, split):
    return forward(features, parameters, v_min, sigma2_min, split, launch=False)


@backward_op.register_fake
def _(grad, features, parameters, kept, v_min, sigma2_min, split):
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (features, *parameters)]


def logits(features: Tensor, p: Sequence[Tensor], v_min: float, sigma2_min: float, split: bool) -> Tensor:
    """Compute logits (..., C) of embeddings (..., d) in float32, differentiable once.

    Args:
        p: Parameters of a head of rank >= 1, see :class:`timm_zzz.ops.reference.Parameters`.
        split: Keep float32 precision in the matrix products; otherwise their operands are rounded to float16.
    """
    flat = features.reshape(-1, features.shape[-1])
    compiling = torch.compiler.is_compiling()
    if not compiling and flat.shape[0] == 0:
        out = flat.new_zeros((0, len(p[0])), dtype=_FP32) + 0 * flat.sum()
    elif compiling or torch.is_grad_enabled() and (flat.requires_grad or any(t.requires_grad for t in p)):
        out = _Logits.apply(flat, *p, v_min, sigma2_min, split)
    else:
        out = forward(flat, p, v_min, sigma2_min, split, save=False)[0]
    return out.reshape(features.shape[:-1] + out.shape[1:])
