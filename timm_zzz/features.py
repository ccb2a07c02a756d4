"""What the ZZZ heads of a model are given."""

import contextlib
from typing import Dict, Iterator

from torch import Tensor, nn

from .head import ZZZHead

__all__ = ['caught_inputs', 'heads_of', 'pooled']


def heads_of(model: nn.Module) -> Dict[str, ZZZHead]:
    """The ZZZ heads of a model by module path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, ZZZHead)}


@contextlib.contextmanager
def caught_inputs(heads: Dict[str, ZZZHead]) -> Iterator[Dict[str, Tensor]]:
    """Within it the latest input of each head, by path, of those that have been called; to be cleared before a call."""
    inputs: Dict[str, Tensor] = {}
    hooks = [
        head.register_forward_pre_hook(lambda module, args, path=path: inputs.__setitem__(path, args[0]))
        for path, head in heads.items()
    ]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def pooled(x: Tensor) -> Tensor:
    """Maps (B, d, 1, 1), which a head in place of a 1x1 convolution gets, as (B, d); others as they are."""
    return x.flatten(1) if x.ndim == 4 and x.shape[2:].numel() == 1 else x
