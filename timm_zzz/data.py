"""Open one split of a data set with timm, with its classes numbered as a model expects, and load the images.

Also find the data files that are installed with the package.
"""

import os
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, NoReturn, Optional, Sequence, Tuple, Union

import torch
from PIL import Image
from timm.data import create_dataset, create_loader
from timm.data.readers.class_map import load_class_map
from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch.utils.data import IterableDataset, Subset

from .errors import some

__all__ = [
    'SPLIT_FOLDERS',
    'SHOWN',
    'LeftOut',
    'Names',
    'MissingSplitError',
    'Split',
    'UnknownClassesError',
    'counted',
    'eval_loader',
    'file_of',
    'find_left_out',
    'open_split',
    'read_class_map',
    'shipped_files',
]

SHOWN = 8  # number of classes that a message names

# Folder names that timm's create_dataset treats as synonyms
SPLIT_FOLDERS = (('train', 'training'), ('val', 'valid', 'validation', 'eval', 'evaluation'))


class Split(NamedTuple):
    """A data set of timm and its class names by index; no names if the data has none."""

    dataset: Any
    class_names: List[str]


def _count(n: int, unit: str) -> str:
    return f'{n} {unit}' if n == 1 else f'{n} {unit}{"es" if unit == "class" else "s"}'


def counted(counts: Mapping[str, int], unit: str = 'image') -> str:
    """List the first folders or suffixes for a message, each with its count."""
    return some([f'{name or "the folder itself"} ({_count(n, unit)})' for name, n in counts.items()], SHOWN)


class LeftOut(NamedTuple):
    """The files in the folder of a split that timm leaves out of its data set, without a message."""

    unknown: Dict[str, int]  # number of images by name of a folder that is not a class
    empty: List[str]  # class folders without images
    unread: Dict[str, int]  # number of images by suffix, for formats that timm does not read

    def messages(self, name: str, known: str) -> List[str]:
        """Describe in messages what was left out of a split; ``known`` names the source of the classes."""
        notes = []
        if self.unknown:
            count = f'{_count(sum(self.unknown.values()), "image")} of {_count(len(self.unknown), "class")}'
            notes.append(f'{name}: left out {count} that {known} has not: {counted(self.unknown)}')
        if self.empty:
            notes.append(f'{name}: class folders without images: {some(self.empty, SHOWN)}')
        if self.unread:
            unread = counted(self.unread, 'file')
            notes.append(f'{name}: left out files of formats that timm does not look for: {unread}')
        return notes


def file_of(dataset: Any, i: int) -> str:
    """Return timm's file name of the ``i``-th image, or ``image i`` if it has no file of its own."""
    try:
        return str(dataset.filename(i))
    except (AttributeError, NotImplementedError, AssertionError, KeyError):
        return f'image {i}'


class MissingSplitError(ValueError):
    """The split does not exist or has no images."""


class UnknownClassesError(ValueError):
    """The split has images, but none of a class of the class map."""

    def __init__(self, split: str, left_out: LeftOut, known: str = '--class-map'):
        super().__init__(f'{known} has none of the classes of {split}: {some([*left_out.unknown], SHOWN)}')
        self.left_out = left_out


class Names(NamedTuple):
    """Names of the options for the data and the class map, for error messages."""

    data: str = '--data-dir'
    class_map: str = '--class-map'


def open_split(
    data_dir: Union[None, str, Path],
    split: str,
    *,
    dataset: str = '',
    class_map: Union[None, str, Path, Sequence[str]] = None,
    channels: int = 3,
    batch_size: int = 1,
    input_key: Optional[str] = None,
    target_key: Optional[str] = None,
    names: Names = Names(),  # noqa: B008
) -> Split:
    """Open one split of a data set, as timm's scripts do.

    Args:
        data_dir: Folder with the splits. If it has no folders of splits, its images are the only split. None if timm
            finds the data set by its name.
        split: Name of the split, e.g. ``'validation'``; empty if the folder holds the class folders itself.
        dataset: timm's ``TYPE/NAME`` of the data set; an ImageFolder if empty.
        class_map: Class names by index, or a file for :func:`read_class_map`. If None, timm numbers the classes found.
        channels: 3 for RGB, 1 for grey.
        batch_size: Batch size, for data sets that timm reads in batches.
        input_key: Key of the image in an example, if not timm's default.
        target_key: Key of the class in an example, if not timm's default.
        names: Names of ``data_dir`` and ``class_map`` in error messages.

    Raises:
        MissingSplitError: If the split does not exist or has no images; timm itself would take those of all splits.
        UnknownClassesError: If none of the images is of a class of the class map.
        ValueError: If the folder does not exist, or as in :func:`read_class_map`.
    """
    root = Path(data_dir or '')
    if not dataset and not (data_dir and root.is_dir()):
        raise ValueError(f'{names.data}: no such folder: {root}')
    known: Optional[Sequence[str]] = None
    mapping: Any = ''
    if isinstance(class_map, (str, Path)):
        known, mapping = read_class_map(class_map, names.class_map), str(class_map)
    elif class_map is not None:
        known, mapping = class_map, {name: i for i, name in enumerate(class_map)}
    try:
        opened: Any = create_dataset(
            dataset,
            root=str(root) if data_dir else None,
            split=split,
            search_split=bool(split),
            class_map=mapping,
            input_img_mode='RGB' if channels == 3 else 'L',
            batch_size=batch_size,
            input_key=input_key,  # timm drops arguments that are None
            target_key=target_key,
        )
    except (RuntimeError, AssertionError, OSError, ImportError, ValueError, TypeError) as e:
        if known and not dataset:
            left_out = find_left_out(Split(open_split(data_dir, split, names=names).dataset, [*known]))
            raise UnknownClassesError(split or str(root), left_out, names.class_map) from e
        of = f' of a split {split}' if split else ''
        raise MissingSplitError(f'{names.data}: {root if data_dir else dataset} has no images{of}: {e}') from e
    reader: Any = getattr(opened, 'reader', None)  # torchvision's data sets have no reader
    if split and not dataset and Path(getattr(reader, 'root', '')) == root:  # timm found no folder of that name
        splits = {*chain(*SPLIT_FOLDERS), 'test'}
        others = sorted(path.name for path in root.iterdir() if path.is_dir() and path.name in splits)
        if others or isinstance(mapping, dict):
            only = f', only {", ".join(others)}' if others else ''
            raise MissingSplitError(f'{names.data}: {root} has no folder {split}{only}')
    indices: Dict[str, int] = getattr(reader, 'class_to_idx', None) or {}
    return Split(opened, sorted(map(str, indices), key=lambda name: indices[name]))


def find_left_out(split: Split) -> LeftOut:
    """Count the files that timm leaves out of an ImageFolder: images of unknown classes or formats.

    All counts are empty for other kinds of data sets.

    Raises:
        OSError: If a folder can't be read; timm treats it as empty.
    """

    def refuse(e: OSError) -> NoReturn:
        raise e

    images, unread, folders = Counter[str](), Counter[str](), set()
    reader = getattr(split.dataset, 'reader', None)
    if isinstance(reader, ReaderImageFolder):
        others = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}
        for folder, children, files in os.walk(reader.root, onerror=refuse, followlinks=True):
            name = os.path.basename(folder) if folder != reader.root else ''
            if name and not children and not name.startswith('.'):
                folders.add(name)
            for suffix in (os.path.splitext(file)[1].lower() for file in files):
                images[name] += suffix in get_img_extensions(as_set=True)
                unread[suffix] += suffix in others - get_img_extensions(as_set=True)
    known = set(split.class_names)
    unknown = {name: n for name, n in sorted(images.items()) if n and name not in known}
    return LeftOut(unknown, sorted(name for name in folders if not images[name]), dict(+unread))


def read_class_map(path: Union[str, Path], name: str = '--class-map') -> List[str]:
    """Read the class names by index from a class map, as timm does.

    A text file has one name a line; a blank line is a class without a name. Of a pickled dict of indices by name, only
    names and indices are read. ``name`` stands for the file in error messages.

    Raises:
        ValueError: If the file does not exist, can't be read, or does not give each index exactly one name.
    """
    path = Path(path)
    if path.suffix not in ('.txt', '.pkl') or not path.is_file():
        raise ValueError(f'{name}: expected a .txt file with one class per line: {path}')
    try:
        indices: Dict[str, int] = load_class_map(str(path))
        names = sorted(indices, key=lambda each: indices[each])
    except Exception as e:  # an unreadable file or a broken pickle may raise anything
        raise ValueError(f"{name}: {path} can't be read: {e}") from e
    if not names:
        raise ValueError(f'{name}: {path} names no class')
    for i, each in enumerate(names):
        if type(indices[each]) is not int or indices[each] != i:  # of equal lines timm keeps the last
            raise ValueError(f'{name}: {path} has no class of index {i}; is its line {i + 1} there twice?')
    return [str(each) for each in names]


def eval_loader(
    dataset: Any,
    config: Dict[str, Any],
    *,
    batch_size: int,
    workers: int = 4,
    device: Optional[torch.device] = None,
    share: Tuple[int, int] = (0, 1),
) -> Any:
    """Create timm's loader with its transforms for evaluation.

    Args:
        dataset: A data set of timm; its transform is set.
        config: Preprocessing, as timm's ``resolve_data_config`` returns it.
        batch_size: Images per batch.
        workers: Number of processes that load images.
        device: Where the images go; the CPU if None.
        share: ``(i, n)`` to read every n-th image, starting with the i-th. Iterable data sets ignore it: they take
            their share by torch.distributed themselves.
    """
    device = torch.device('cpu') if device is None else device
    keys = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')
    first, step = share
    part = dataset
    if step > 1 and not isinstance(dataset, IterableDataset):
        part = Subset(dataset, range(first, len(dataset), step))
    loader = create_loader(
        part,
        batch_size=batch_size,
        num_workers=workers,
        pin_memory=device.type == 'cuda',
        device=device,
        persistent_workers=False,
        **{key: config[key] for key in keys},
    )
    dataset.transform = part.transform  # timm sets it on the part
    return loader


def shipped_files(folder: str, suffix: str) -> Dict[str, Path]:
    """Find files of the package by name without suffix: in its folder if installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for parent in (package, package.parent):
        if (parent / folder).is_dir():
            return {path.name[: -len(suffix)]: path for path in sorted((parent / folder).glob(f'*{suffix}'))}
    return {}
