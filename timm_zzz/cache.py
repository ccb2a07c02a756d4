"""Tensors derived from parameters, kept as long as the parameters have the same values."""

from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .ops.tracing import is_plain

__all__ = ['TensorCache', 'can_cache']

Tensors = Tuple[Tensor, ...]


class _Entry(NamedTuple):
    key: Any
    inputs: List[Tensor]  # copies of the values
    result: Tensors


class TensorCache:
    """The last result of a function of tensors, for as long as those have the same values.

    Values are compared with a copy of them: a write through ``.data`` changes neither a tensor's version counter nor
    its address. That costs one pass over the tensors and, on a GPU, one synchronisation.

    Threads may share it: an entry is one object and replaced as a whole. Copies and pickles of it are empty.
    """

    def __init__(self) -> None:
        self._entry: Optional[_Entry] = None

    def get(self, key: Any, tensors: Sequence[Tensor], derive: Callable[..., Tensors]) -> Tensors:
        """``derive(*tensors)``, or what it gave last time if key and tensors are the same as then.

        Args:
            key: Whatever else the result depends on; compared by ``==``.
            tensors: Arguments of ``derive``; those that change most often or compare fastest first. Only where
                :func:`can_cache` says so.
            derive: Called without autograd, on copies, so that a change meanwhile in another thread can't mix values.
        """
        if tensors[0].is_cuda:  # another stream might read a result before it is there
            key = (key, torch.cuda.current_stream(tensors[0].device).cuda_stream)
        entry = self._entry
        if entry is not None and entry.key == key and _same_values(tensors, entry.inputs):
            return entry.result
        # Inference mode's tensors can't be used outside it in all ways.
        with torch.inference_mode(False), torch.no_grad():
            inputs = [t.detach().clone() for t in tensors]
            entry = _Entry(key, inputs, derive(*inputs))
        self._entry = entry
        return entry.result

    def clear(self) -> None:
        """Free the memory."""
        self._entry = None

    def __reduce__(self) -> Tuple[Any, ...]:
        return (type(self), ())


def _same_values(tensors: Sequence[Tensor], copies: Sequence[Tensor]) -> bool:
    if len(tensors) != len(copies):
        return False
    pairs = list(zip(tensors, copies, strict=True))
    if any(a.shape != b.shape or a.dtype != b.dtype or a.device != b.device for a, b in pairs):
        return False
    if all(a.device.type == 'cpu' for a in tensors):
        return all(torch.equal(a, b) for a, b in pairs)
    return bool(torch.stack([(a == b).all() for a, b in pairs]).all())  # one synchronisation for all


def can_cache(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors have values that can be read and kept: not where they are traced, transformed or captured."""
    return is_plain(tensors) and not (any(t.is_cuda for t in tensors) and torch.cuda.is_current_stream_capturing())
