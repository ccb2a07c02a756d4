"""Share a pass over examples between the processes of torch.distributed."""

from typing import Any, Dict, Iterable, Iterator, List, Tuple

import torch
from torch import Tensor

from ..head import ZZZHead

__all__ = ['broadcast', 'gathered', 'process']

Step = Tuple[Dict[str, Tensor], Tensor]


def process() -> Tuple[int, int]:
    """Return rank and world size of this process: 0 and 1 outside of torch.distributed."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def gathered(steps: Iterator[Step], device: torch.device) -> Iterator[Step]:
    """Yield the steps of all processes concatenated, on ``device``, in every process; end with the longest process.

    Examples are interleaved: if process i of n reads every n-th example, starting with the i-th, they come in their
    original order.

    Raises:
        RuntimeError: If another process failed. An error of this process is raised as it is.
    """
    while True:
        step, error = None, None
        try:
            step = next(steps, None)
            if step is not None:
                step = {path: x.cpu() for path, x in step[0].items()}, torch.as_tensor(step[1]).cpu()
        except Exception as e:  # the other processes wait for this one: tell them
            error = e
        found: List[Any] = [None] * process()[1]
        torch.distributed.all_gather_object(
            found, (step, None if error is None else f'{type(error).__name__}: {error}')
        )
        if error is not None:
            raise error
        for number, (_, message) in enumerate(found):
            if message is not None:
                raise RuntimeError(f'process {number} failed: {message}')
        parts: List[Step] = [part for part, _ in found if part is not None]
        if not parts:
            return
        places = [torch.arange(len(target)) * len(parts) + i for i, (_, target) in enumerate(parts)]
        order = torch.cat(places).argsort()
        target = torch.cat([target for _, target in parts])[order]
        yield {path: torch.cat([x[path] for x, _ in parts])[order].to(device) for path in parts[0][0]}, target


def broadcast(heads: Iterable[ZZZHead]) -> None:
    """Copy the parameters of the heads of process 0 to all processes."""
    parameters = [p for head in heads for p in head.parameters()]
    values = [[p.detach().cpu() for p in parameters] if process()[0] == 0 else None]
    torch.distributed.broadcast_object_list(values, 0)
    with torch.no_grad():
        for p, value in zip(parameters, values[0] or (), strict=True):
            p.copy_(value)
