"""Images of one split of a data set, numbered and prepared as a model expects: timm's data sets and loaders.

Also the files that travel with the package.
"""

from itertools import chain
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Union

import torch
from timm.data import create_dataset, create_loader
from timm.data.readers.class_map import load_class_map

__all__ = ['SPLIT_FOLDERS', 'Split', 'eval_loader', 'open_split', 'read_class_map', 'shipped_files']

# Names of folders that timm's create_dataset takes for each other
SPLIT_FOLDERS = (('train', 'training'), ('val', 'valid', 'validation', 'eval', 'evaluation'))


class Split(NamedTuple):
    """A data set of timm and its class names by index, empty where the data does not name its classes."""

    dataset: Any
    class_names: List[str]


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
        class_map: Class names by index, or a file of timm's with them; None numbers the classes found by name.
        channels: 3 for RGB, 1 for grey.
        batch_size: For data sets that are read in batches.

    Raises:
        ValueError: If there is no such folder or split; timm itself would take the images of all splits.
    """
    root = Path(data_dir)
    if not dataset and not root.is_dir():
        raise ValueError(f'--data-dir: no such folder: {root}')
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
        raise ValueError(f'--data-dir: {root} has no images of a split {split}: {e}') from e
    reader: Any = getattr(opened, 'reader', None)  # torchvision's data sets have none
    if not dataset and Path(getattr(reader, 'root', '')) == root:  # timm found no folder of that name
        splits = {*chain(*SPLIT_FOLDERS), 'test'}
        others = sorted(path.name for path in root.iterdir() if path.is_dir() and path.name in splits)
        if others or names is not None:
            only = f', only {", ".join(others)}' if others else ''
            raise ValueError(f'--data-dir: {root} has no folder {split}{only}')
    indices: Dict[str, int] = getattr(reader, 'class_to_idx', None) or {}
    return Split(opened, sorted(map(str, indices), key=lambda name: indices[name]))


def read_class_map(path: Path) -> List[str]:
    """Read the class names, by index, from a text file of one name a line, as timm reads it.

    Raises:
        ValueError: If there is no such .txt file.
    """
    if path.suffix != '.txt' or not path.is_file():
        raise ValueError(f'--class-map: expected a .txt file with one class per line: {path}')
    indices: Dict[str, int] = load_class_map(str(path))
    return sorted(indices, key=lambda name: indices[name])


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
