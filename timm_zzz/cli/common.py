"""What several commands share: arguments, and how they end with an error."""

import argparse
from contextlib import contextmanager
from typing import Any, Dict, Iterator, Optional

import torch

from ..data import eval_loader
from ..errors import HubError

__all__ = ['add_loader_arguments', 'amp_dtype_of', 'device_of', 'exit_on_error', 'loader_of', 'positive_int']


@contextmanager
def exit_on_error(parser: argparse.ArgumentParser, status: int = 2) -> Iterator[None]:
    """Print an error that a user can mend in one line, and exit with a status."""
    try:
        yield
    except (HubError, ValueError, OSError) as e:
        parser.exit(status, f'timm_zzz: error: {e}\n')


def positive_int(text: str) -> int:
    """Parse an argument that is at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'expected at least 1, got {value}')
    return value


def add_loader_arguments(parser: argparse.ArgumentParser, batch_size: int, amp_dtype: str) -> None:
    """Add the options of a pass over images: batches, processes, device and precision."""
    add = parser.add_argument
    add('-b', '--batch-size', type=positive_int, default=batch_size, metavar='N', help='images at a time')
    add('-j', '--workers', type=int, default=4, metavar='N', help='processes that load images')
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='where to run')
    add('--amp', action='store_true', help='run the backbone in mixed precision')
    add('--amp-dtype', choices=('float16', 'bfloat16'), default=amp_dtype, help='with --amp')


def device_of(options: argparse.Namespace) -> torch.device:
    """Return the device of ``--device``.

    Raises:
        ValueError: If it is not there.
    """
    try:
        torch.empty(0, device=options.device)
        return torch.device(options.device)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f'--device: {options.device} is not available: {e}') from e


def amp_dtype_of(options: argparse.Namespace) -> Optional[torch.dtype]:
    """Return the dtype of mixed precision, None without ``--amp``."""
    return getattr(torch, options.amp_dtype) if options.amp else None


def loader_of(options: argparse.Namespace, dataset: Any, config: Dict[str, Any], device: torch.device) -> Any:
    """Create the loader that the options ask for."""
    return eval_loader(dataset, config, batch_size=options.batch_size, workers=options.workers, device=device)
