"""Images of one split of a data set, numbered and prepared as a model expects: timm's data sets and loaders.

Also the files that travel with the package.
"""

import os
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, NoReturn, Optional, Sequence, Union

import torch
from PIL import Image
from timm.data import create_dataset, create_loader
from timm.data.readers.class_map import load_class_map
from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader_image_folder import ReaderImageFolder

from .errors import some

__all__ = [
    'SPLIT_FOLDERS',
    'SHOWN',
    'LeftOut',
    'MissingSplitError',
    'Split',
    'UnknownClassesError',
    'eval_loader',
    'find_left_out',
    'open_split',
    'read_class_map',
    'shipped_files',
]

SHOWN = 8  # classes that a message names

# Names of folders that timm's create_dataset takes for each other
SPLIT_FOLDERS = (('train', 'training'), ('val', 'valid', 'validation', 'eval', 'evaluation'))


class Split(NamedTuple):
    """A data set of timm and its class names by index, empty where the data does not name its classes."""

    dataset: Any
    class_names: List[str]


class LeftOut(NamedTuple):
    """What lies in the folder of a split and is not in its data set: timm says nothing about it."""

    unknown: Dict[str, int]  # images by class folder, of those that are no class
    empty: List[str]  # class folders without images
    unread: Dict[str, int]  # images by suffix, of formats that timm does not look for


class MissingSplitError(ValueError):
    """There is no such split, or no image in it."""


class UnknownClassesError(ValueError):
    """There are images in a split, and none is of a class of the class map."""

    def __init__(self, split: str, left_out: LeftOut):
        super().__init__(f'--class-map has none of the classes of {split}: {some([*left_out.unknown], SHOWN)}')
        self.left_out = left_out


def open_split(
    data_dir: Union[str, Path],
    split: str,
    *,
    dataset: str = '',
    class_map: Union[None, str, Path, Sequence[str]] = None,
    channels: int = 3,
    batch_size: int = 1,
) -> Split:
    """Open one split of a data set, as timm's scripts do.

    Args:
        data_dir: Folder with the splits; without any, its images are the only split.
        split: Name of the split, e.g. ``'validation'``.
        dataset: timm's ``TYPE/NAME`` of the data; an ImageFolder if empty.
        class_map: Class names by index, or a file as :func:`read_class_map` takes; None numbers the classes found.
        channels: 3 for RGB, 1 for grey.
        batch_size: For data sets that are read in batches.

    Raises:
        MissingSplitError: If there is no such split; timm itself would take the images of all splits.
        UnknownClassesError: If all images are of other classes than those of the class map.
        ValueError: If there is no such folder, or as :func:`read_class_map`.
    """
    root = Path(data_dir)
    if not dataset and not root.is_dir():
        raise ValueError(f'--data-dir: no such folder: {root}')
    known = read_class_map(class_map) if isinstance(class_map, (str, Path)) else class_map
    names = None if class_map is None or isinstance(class_map, (str, Path)) else list(class_map)
    mapping: Any = str(class_map or '') if names is None else {name: i for i, name in enumerate(names)}
    try:
        opened: Any = create_dataset(
            dataset,
            root=str(root),
            split=split,
            class_map=mapping,
            input_img_mode='RGB' if channels == 3 else 'L',
            batch_size=batch_size,
        )
    except (RuntimeError, AssertionError, OSError, ImportError, ValueError) as e:
        if known and not dataset:
            unmapped = open_split(data_dir, split)
            raise UnknownClassesError(split, find_left_out(Split(unmapped.dataset, [*known]))) from e
        raise MissingSplitError(f'--data-dir: {root} has no images of a split {split}: {e}') from e
    reader: Any = getattr(opened, 'reader', None)  # torchvision's data sets have none
    if not dataset and Path(getattr(reader, 'root', '')) == root:  # timm found no folder of that name
        splits = {*chain(*SPLIT_FOLDERS), 'test'}
        others = sorted(path.name for path in root.iterdir() if path.is_dir() and path.name in splits)
        if others or names is not None:
            only = f', only {", ".join(others)}' if others else ''
            raise MissingSplitError(f'--data-dir: {root} has no folder {split}{only}')
    indices: Dict[str, int] = getattr(reader, 'class_to_idx', None) or {}
    return Split(opened, sorted(map(str, indices), key=lambda name: indices[name]))


def find_left_out(split: Split) -> LeftOut:
    """Count what timm left out of an ImageFolder: it takes an image whose folder is no class for none at all.

    Nothing is counted for other kinds of data sets.

    Raises:
        OSError: If a folder can't be read; timm takes it for empty.
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


def read_class_map(path: Union[str, Path]) -> List[str]:
    """Read the class names, by index, from a text file of one name a line, as timm reads it.

    A blank line is a class without a name, as for timm. Of its other format, a pickled dict of indices by name, nothing
    but names and indices is read.

    Raises:
        ValueError: If there is no such file, it can't be read, or it does not give each index to one name.
    """
    path = Path(path)
    if path.suffix not in ('.txt', '.pkl') or not path.is_file():
        raise ValueError(f'--class-map: expected a .txt file with one class per line: {path}')
    try:
        indices: Dict[str, int] = load_class_map(str(path))
        names = sorted(indices, key=lambda name: indices[name])
    except Exception as e:  # whatever an unreadable file or a broken pickle raises
        raise ValueError(f"--class-map: {path} can't be read: {e}") from e
    if not names:
        raise ValueError(f'--class-map: {path} names no class')
    for i, name in enumerate(names):
        if type(indices[name]) is not int or indices[name] != i:  # timm keeps the last of equal lines
            raise ValueError(f'--class-map: {path} has no class of index {i}; is its line {i + 1} there twice?')
    return [str(name) for name in names]


def eval_loader(
    dataset: Any, config: Dict[str, Any], *, batch_size: int, workers: int = 4, device: Optional[torch.device] = None
) -> Any:
    """Create timm's loader with the transforms of evaluation; ``config`` is what ``resolve_data_config`` returns."""
    device = torch.device('cpu') if device is None else device
    keys = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')
    return create_loader(
        dataset,
        batch_size=batch_size,
        num_workers=workers,
        pin_memory=device.type == 'cuda',
        device=device,
        persistent_workers=False,
        **{key: config[key] for key in keys},
    )


def shipped_files(folder: str, suffix: str) -> Dict[str, Path]:
    """List the files of a data folder by stem: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for parent in (package, package.parent):
        if (parent / folder).is_dir():
            return {path.name[: -len(suffix)]: path for path in sorted((parent / folder).glob(f'*{suffix}'))}
    return {}
