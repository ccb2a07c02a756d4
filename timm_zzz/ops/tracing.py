"""Detect traced, transformed or fake tensors. The only file that calls private functions of torch."""

from typing import Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

__all__ = ['is_plain', 'raw_stream']


def is_plain(tensors: Sequence[Tensor]) -> bool:
    """Tell whether tensors have plain values that may be read.

    They have not while they are traced, exported, compiled, transformed by torch.func, differentiated in forward mode
    or fake: a kernel, a read of a value or a cached result would be wrong there.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if not all(type(t) in (Tensor, nn.Parameter) and not t.is_meta for t in tensors):  # fake tensors, fx proxies, ...
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or _get_current_dispatch_mode() is not None:
        return False
    # Dual numbers exist only inside a level of forward-mode differentiation.
    return forward_ad._current_level < 0 or all(forward_ad.unpack_dual(t).tangent is None for t in tensors)


def raw_stream(device: torch.device) -> int:
    """Return the handle of a GPU's current stream, without creating a Stream object."""
    return torch._C._cuda_getCurrentRawStream(device.index)
