"""Helpers that several commands share: arguments, warnings, errors and output files."""

import argparse
import os
import re
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Dict, Iterator, Mapping, NoReturn, Optional, Sequence

import torch
from huggingface_hub.utils import tqdm
from timm.data import resolve_data_config
from torch import Tensor, nn

from ..data import LeftOut, Split, UnknownClassesError, counted, eval_loader, find_left_out, open_split
from ..errors import HubError, one_line

__all__ = [
    'add_ignore_unknown',
    'add_loader_arguments',
    'amp_dtype_of',
    'check_count',
    'check_order',
    'check_output',
    'check_size',
    'count',
    'data_config_of',
    'device_of',
    'exit_on_error',
    'fail',
    'loader_of',
    'one_line',
    'open_known',
    'positive_int',
    'progress',
    'tensors_of',
    'warn',
    'warn_left_out',
    'written_whole',
]


@contextmanager
def exit_on_error(parser: argparse.ArgumentParser, interrupted: str = 'interrupted') -> Iterator[None]:
    """End a command: print an error that the user can fix in one line and exit with 2, after an interrupt with 130."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, e.g. `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # the shell's status for SIGPIPE
    except (HubError, ValueError, OSError, torch.OutOfMemoryError) as e:
        fail(one_line(e))
    except KeyboardInterrupt:
        parser.exit(130, f'\ntimm_zzz: {interrupted}\n')


def fail(message: str) -> NoReturn:
    """Print an error and exit with status 2."""
    _print(f'timm_zzz: error: {message}', 31)
    sys.exit(2)


def warn(message: str) -> None:
    """Print a warning."""
    _print(f'timm_zzz: warning: {message}', 33)


def _print(line: str, color: int) -> None:
    """Print a line above open progress bars; on a terminal, its second word in colour (see no-color.org)."""
    if sys.stderr.isatty() and not os.environ.get('NO_COLOR') and os.environ.get('TERM') != 'dumb':
        line = re.sub(r' (\S+)', rf' \033[1;{color}m\1\033[0m', line, count=1)
    tqdm.write(line, file=sys.stderr)


def progress(batches: Any, name: str) -> Any:
    """Show the progress of a loader from its first batch on, after the output of its starting processes."""
    return tqdm(batches, desc=name, unit='batch', file=sys.stderr, delay=1e-9)


def warn_left_out(left_out: LeftOut, name: str, known: str = '--class-map') -> None:
    """Warn of files that timm leaves out of the folder of a split; ``known`` names the source of the classes."""
    for message in left_out.messages(name, known):
        warn(message)


def open_known(options: argparse.Namespace, name: str, class_map: Any, known: str, **settings: Any) -> Split:
    """Open a split with the class numbers of another split or a class map, and warn of files that are left out.

    Args:
        options: data_dir and ignore_unknown_classes.
        name: Name of the split.
        class_map: As in :func:`~timm_zzz.data.open_split`.
        known: Source of the class map, for messages.
        settings: Further arguments of open_split.

    Raises:
        ValueError: If the split can't be opened, or has images of other classes and ``--ignore-unknown-classes`` is
            not given.
    """
    try:
        split = open_split(options.data_dir, name, class_map=class_map, **settings)
    except UnknownClassesError as e:
        unknown = counted(e.left_out.unknown)
        hint = '; --class-map FILE.txt names those of the model' if known == 'the model' else ''
        raise ValueError(f'{name} has classes that {known} has not, and no others: {unknown}{hint}') from e
    left_out = find_left_out(split)
    if left_out.unknown and not options.ignore_unknown_classes:
        unknown, way = counted(left_out.unknown), '--ignore-unknown-classes leaves them out'
        raise ValueError(f'{name} has classes that {known} has not: {unknown}; {way}')
    warn_left_out(left_out, name, known)
    return split


def check_output(path: Path, force: bool, suffix: str = '') -> None:
    """Raise a ValueError if a file name has another suffix, or if the file exists and ``force`` is False."""
    if suffix and not path.name[1:].endswith(suffix):  # at least one character before the suffix
        raise ValueError(f'--output: expected a name that ends in {suffix}, got {path}')
    if path.is_dir() or path.exists() and not force:
        raise ValueError(f'--output: {path} exists already; give another one or --force')


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield the path of a draft, which replaces the file if the context ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix='.zzz-') as temporary:
        draft, new = Path(temporary) / path.name, Path(temporary) / 'new'
        yield draft
        new.touch()
        shutil.copymode(new, draft)  # the umask's mode: safetensors makes files private to the owner
        os.replace(draft, path)


def check_count(where: str, found: int, count: Any) -> None:
    """Raise a ValueError unless as many classes were found as the model has."""
    if found != count:
        hint = '' if where == '--class-map' else '; --class-map FILE.txt numbers them'
        raise ValueError(f'{where} has {found} classes, the model has {count}{hint}')


def check_order(names: Sequence[str], own: Sequence[str]) -> None:
    """Raise a ValueError if a class map has the classes of the model, but in another order."""
    if list(names) != list(own) and sorted(names) == sorted(own):
        raise ValueError('--class-map: it has the classes of the model in another order; leave the option out')


def tensors_of(state: Any, source: str) -> Dict[str, Tensor]:
    """Return a copy of a state dict.

    Raises:
        ValueError: If ``state`` is not a dict of tensors by name.
    """
    named = isinstance(state, dict) and all(isinstance(key, str) for key in state)
    if not named or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f'{source} holds something else than tensors by name')
    return dict(state)


def add_ignore_unknown(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--ignore-unknown-classes`` of :func:`open_known`."""
    help = 'leave out images of classes that the model does not know, with a warning; else they are an error'
    parser.add_argument('--ignore-unknown-classes', action='store_true', help=help)


def _at_least(least: int, text: str) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f'expected at least {least}, got {value}')
    return value


def positive_int(text: str) -> int:
    """Parse an argument that is at least 1."""
    return _at_least(1, text)


def count(text: str) -> int:
    """Parse an argument that is at least 0."""
    return _at_least(0, text)


def add_loader_arguments(parser: argparse.ArgumentParser, batch_size: int) -> None:
    """Add the options of a pass over images: batch size, workers, device and precision."""
    add = parser.add_argument
    add('-b', '--batch-size', type=positive_int, default=batch_size, metavar='N', help='images at a time')
    add('-j', '--workers', type=count, default=4, metavar='N', help='processes that load images')
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='where to run')
    help = "run the backbone in mixed precision, or not; if not given, as in the run's validation"
    add('--amp', action=argparse.BooleanOptionalAction, help=help)
    add('--amp-dtype', choices=('float16', 'bfloat16'), help='dtype of mixed precision; if not given, that of the run')


def device_of(options: argparse.Namespace) -> torch.device:
    """Return the device of ``--device``.

    Raises:
        ValueError: If it is not available.
    """
    try:
        torch.empty(0, device=options.device)
        return torch.device(options.device)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f'--device: {options.device} is not available: {e}') from e


def amp_dtype_of(options: argparse.Namespace, args: Optional[Mapping[str, Any]] = None) -> Optional[torch.dtype]:
    """Return the dtype of mixed precision by the options, or else by the arguments of a run; None if it is off."""
    args = args or {}
    amp = args.get('amp') if options.amp is None else options.amp
    return getattr(torch, options.amp_dtype or args.get('amp_dtype') or 'float16') if amp else None


def data_config_of(settings: Mapping[str, Any], model: nn.Module) -> Dict[str, Any]:
    """Resolve the preprocessing by timm's ``resolve_data_config``.

    Raises:
        ValueError: If the settings contradict each other.
    """
    try:
        config: Dict[str, Any] = resolve_data_config(dict(settings), model=model)
    except Exception as e:  # timm asserts
        raise ValueError(f"images can't be prepared as the settings say: {one_line(e)}") from e
    return config


class Images:
    """A loader of timm that raises a ValueError if images can't be read or a label is not a class."""

    def __init__(self, loader: Any):
        self.loader = loader
        self.dataset = loader.dataset

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self.loader
        except Exception as e:  # a broken file or its reader may raise anything
            raise ValueError(f"--data-dir: the images can't be read: {one_line(e)}") from e


def loader_of(options: argparse.Namespace, dataset: Any, config: Dict[str, Any], device: torch.device) -> Images:
    """Create the loader that the options ask for.

    Raises:
        ValueError: If timm rejects the preprocessing.
    """
    try:
        loader = eval_loader(dataset, config, batch_size=options.batch_size, workers=options.workers, device=device)
    except Exception as e:  # timm's transforms may raise anything
        raise ValueError(f"images can't be prepared as the settings say: {one_line(e)}") from e
    return Images(loader)


def check_size(model: nn.Module, config: Dict[str, Any]) -> None:
    """Raise a ValueError unless the model accepts images of the configured size; it is put in eval mode."""
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, *config['input_size'], device=next(model.parameters()).device))
    except Exception as e:  # a model may raise anything for a size
        raise ValueError(f'the model takes no images of {config["input_size"]}: {one_line(e)}') from e
