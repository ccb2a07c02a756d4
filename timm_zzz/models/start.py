"""Fit the heads of a model that timm has just built to images: the argument ``zzz_fit`` of ``create_model``."""

import logging
import os
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, Sequence, Union

import torch
from huggingface_hub.utils import tqdm
from torch import nn

from ..data import SPLIT_FOLDERS, Names, eval_loader, find_left_out, open_split
from ..errors import one_line
from ..fit import fit_model
from ..fit.gather import process
from ..head import heads_of
from ._timm import input_config
from .attach import FIT_PREFIX

__all__ = ['FIT_OPTIONS', 'NAMES', 'fit_start', 'settings_of']

_logger = logging.getLogger(__name__)

FIT_OPTIONS = ('fit', 'fit_class_map', 'fit_preset')
NAMES = Names(FIT_PREFIX, f'{FIT_PREFIX}_class_map')
BATCH_SIZE = 128
MAX_WORKERS = 4

_DATASET_TYPES = ('hfds', 'hfids', 'tfds', 'torch', 'wds')  # prefixes of timm's data set names
_KEYS = ('data_dir', 'dataset', 'split', 'class_map', 'input_key', 'target_key')

ClassMap = Union[None, str, Path, Sequence[str]]


def fit_start(
    model: nn.Module,
    fit: Any,
    fit_class_map: ClassMap = None,
    fit_preset: str = 'finetune',
    *,
    pretrained: bool = True,
    device: Union[None, str, torch.device] = None,
) -> None:
    """Fit the ZZZ heads of a model in closed form, in place, to the images that ``zzz_fit`` names.

    It runs on the model's device, or if that is the CPU and ``device`` is None, on the GPU of this process if there is
    one; the model is moved back afterwards. With torch.distributed, each process reads its share of the images, and all
    get the same heads.

    Args:
        fit: A folder with one folder of images per class; a data set of timm as ``TYPE/NAME:SPLIT``; a dict of
            arguments of :func:`~timm_zzz.data.open_split`; or a loader of (images, class indices), preprocessed for the
            model.
        fit_class_map: Class names by index, or a file of them; if None, timm numbers the folders.
        fit_preset: One of :data:`timm_zzz.fit.PRESETS`.
        pretrained: Whether the backbone has pretrained weights; if not, a warning is logged.
        device: Device given to ``create_model``.

    Raises:
        ValueError: If the model has no classifier or is on the meta device, or if the images can't be read or don't fit
            the model.
        RuntimeError: If the fit failed in another process.
    """
    first = process()[0] == 0
    if any(p.is_meta for p in model.parameters()):
        raise ValueError('zzz_fit: a model on the meta device has no values: leave the option out')
    if not heads_of(model):
        raise ValueError('zzz_fit: num_classes=0 leaves the model no classifier to fit')
    if not pretrained and first:
        _logger.warning('zzz_fit: the backbone has random weights (pretrained=False), and the head is fitted to them')
    home = next(model.parameters()).device
    if device is None and home.type == 'cpu' and torch.cuda.is_available():
        model.to(torch.device('cuda', torch.cuda.current_device()))
    there = next(model.parameters()).device
    fast = there.type == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False)
    images = fit if _is_loader(fit) else _images(model, fit, fit_class_map, there)
    try:
        with torch.random.fork_rng(devices=[]):  # a loader draws a seed, which must not change training's
            fit_model(model, images, amp_dtype=torch.bfloat16 if fast else None, distributed=True, preset=fit_preset)
    except ValueError as e:
        if str(e).startswith(FIT_PREFIX):
            raise
        raise ValueError(f'zzz_fit: {e}') from e
    finally:
        model.to(home)


def _is_loader(fit: Any) -> bool:
    return hasattr(fit, '__iter__') and not isinstance(fit, (str, dict))


def _images(model: Any, fit: Any, class_map: ClassMap, device: torch.device) -> Iterator[Any]:
    """Yield this process's batches of images; as a generator, it raises where all processes wait for each other."""
    number, count = process()
    config = input_config(model)
    settings = settings_of(fit)
    if class_map is not None:
        settings['class_map'] = class_map
    split = open_split(**settings, channels=config['input_size'][0], batch_size=BATCH_SIZE, names=NAMES)
    where = settings['split'] or str(settings['data_dir'])
    mapped = settings.get('class_map') is not None
    if number == 0:
        for message in find_left_out(split).messages(where, NAMES.class_map):
            _logger.warning(f'zzz_fit: {message}')
    found = len(split.class_names)
    if found and found != model.num_classes:
        hint = '' if mapped else f'; give num_classes={found}, or {NAMES.class_map} to number them'
        raise ValueError(
            f'zzz_fit: {NAMES.class_map if mapped else where} has {found} classes, '
            f'but num_classes is {model.num_classes}{hint}'
        )
    try:
        workers = min(MAX_WORKERS, os.cpu_count() or 1)
        loader = eval_loader(
            split.dataset, config, batch_size=BATCH_SIZE, workers=workers, device=device, share=(number, count)
        )
        dtype = next(model.parameters()).dtype
        with tqdm(loader, desc=FIT_PREFIX, unit='batch', file=sys.stderr, disable=number > 0) as batches:
            for images, target in batches:
                yield images.to(dtype), target
    except Exception as e:  # a broken file, its reader or timm's transforms may raise anything
        raise ValueError(f"zzz_fit: the images can't be read: {one_line(e)}") from e


def settings_of(fit: Any) -> Dict[str, Any]:
    """Convert the argument ``zzz_fit`` to arguments of :func:`~timm_zzz.data.open_split`; may raise a ValueError."""
    if isinstance(fit, dict):
        unknown = sorted(str(key) for key in fit.keys() - {*_KEYS})
        if unknown:
            raise ValueError(f'zzz_fit: unknown keys {", ".join(unknown)} (known: {", ".join(_KEYS)})')
        return {'data_dir': None, 'split': 'train', **fit}
    if not isinstance(fit, (str, Path)):
        raise ValueError(f'zzz_fit: expected a folder, TYPE/NAME:SPLIT, a dict or a loader, got {fit!r:.60}')
    folder = Path(fit).expanduser()
    if str(fit) and folder.is_dir():
        splits = (folder / name for name in (*SPLIT_FOLDERS[0], *SPLIT_FOLDERS[1], 'test'))  # training splits first
        nested = [path for path in splits if _has_folders(path)]
        if nested:
            raise ValueError(f'zzz_fit: {folder} has splits in it, not classes: name one, such as {nested[0]}')
        return dict(data_dir=folder, split='')
    name, _, split = str(fit).partition(':')
    kind = name.partition('/')[0].lower()
    if split and kind == 'torch':
        raise ValueError(f'zzz_fit: {name} needs its folder: {{dataset: {name}, data_dir: DIR, split: {split}}}')
    if split and kind in _DATASET_TYPES:
        return dict(data_dir=None, dataset=name, split=split)
    raise ValueError(f'zzz_fit: no such folder: {folder} (a data set of timm is TYPE/NAME:SPLIT)')


def _has_folders(path: Path) -> bool:
    return path.is_dir() and any(child.is_dir() for child in path.iterdir())
