"""Read a finished run of timm's train.py: checkpoint, arguments, metrics, classes and images."""

import argparse
import csv
import math
from argparse import Namespace
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple

import torch
import yaml
from timm.models import clean_state_dict, get_pretrained_cfg
from torch import nn

from ..data import SPLIT_FOLDERS, Split, find_left_out, open_split, read_class_map
from ..head import same_shape
from ..hub.config import BUILDER_ARGS
from ..models.attach import FIT_PREFIX
from ..models.checkpoint import build_model, load_weights
from ..models.predict import keep_percentiles
from .common import (
    Images,
    add_ignore_unknown,
    add_loader_arguments,
    check_count,
    check_order,
    check_size,
    data_config_of,
    loader_of,
    one_line,
    open_known,
    tensors_of,
    warn_left_out,
)
from .recipe import FACTS, NEWEST, Option

__all__ = [
    'CARD_OPTIONS',
    'Run',
    'add_images_arguments',
    'args_of',
    'build_for',
    'checked_args',
    'data_config_of_args',
    'add_run_arguments',
    'class_names',
    'load_run',
    'open_images',
    'read_checkpoint',
]

# Options of train.py for the preprocessing of test images
_DATA_OPTIONS = ('input_size', 'img_size', 'in_chans', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')
# Options that a model card lists
CARD_OPTIONS = ('opt', 'lr', 'lr_base', 'weight_decay', 'sched', 'epochs', 'batch_size', 'smoothing', 'mixup', 'cutmix')
# All options that are used to read a run
_USED = (
    *(*_DATA_OPTIONS, *CARD_OPTIONS),
    *('model', 'model_kwargs', 'gp', 'bn_momentum', 'bn_eps', 'model_ema', 'model_ema_force_cpu'),
    *('dataset', 'data_dir', 'class_map', 'train_split', 'val_split', 'eval_metric'),
    *('pretrained', 'pretrained_path', 'initial_checkpoint', 'amp', 'amp_dtype'),
)
_POSITIVE = ('input_size', 'img_size', 'in_chans', 'crop_pct')
_TYPES: Dict[str, Any] = {'str': str, 'int': int, 'float': (int, float), 'flag': bool, 'mapping': dict}


@dataclass
class Run:
    """A trained model, and the facts that train.py wrote about it."""

    checkpoint: Path
    model: nn.Module
    averaged: bool = False  # whether the weights are averaged by EMA
    args: Mapping[str, Any] = field(default_factory=dict)  # arguments of train.py; empty if unknown
    data_config: Dict[str, Any] = field(default_factory=dict)  # preprocessing at test time, as in save_pretrained
    epoch: Optional[int] = None  # counted from 0
    summary: Optional[Path] = None  # summary.csv
    top1: Optional[float] = None  # on the validation images, in percent
    notes: List[str] = field(default_factory=list)  # reasons why top1 is None
    calibration: str = ''  # a line for each temperature folded into the heads
    names: List[str] = field(default_factory=list)  # class names, if they are stored with the model


def load_run(path: Path, *, use_ema: bool = False, model_name: Optional[str] = None, any_head: bool = False) -> Run:
    """Read a checkpoint of train.py, with args.yaml and summary.csv if they lie beside it.

    Args:
        path: A ``.pth.tar`` file, or the folder of a run. It is read with ``weights_only``, so that no code in it runs.
        use_ema: Take the averaged weights.
        model_name: timm's name of the model, if neither the checkpoint nor args.yaml has it.
        any_head: Accept a model without a ZZZ head, too.

    Raises:
        ValueError: If the checkpoint is not from train.py, has no ZZZ head, or lacks averaged weights or a model name.
    """
    checkpoint = path / 'model_best.pth.tar' if path.is_dir() else path
    if not checkpoint.is_file():
        raise ValueError(f'no such checkpoint: {checkpoint}')
    args_file, summary = checkpoint.with_name('args.yaml'), checkpoint.with_name('summary.csv')
    saved = read_checkpoint(checkpoint)
    args, source = saved.get('args'), checkpoint
    args = vars(args) if isinstance(args, Namespace) else {} if args is None else args
    if isinstance(args, dict) and not args and args_file.is_file():
        source = args_file
        try:
            args = yaml.safe_load(args_file.read_text(encoding='utf-8'))
        except Exception as e:  # a broken YAML file may raise anything
            raise ValueError(f"{args_file} can't be read: {one_line(e)}") from e
    args = checked_args(args, source)
    if use_ema and 'state_dict_ema' not in saved:
        raise ValueError(f'--use-ema: {checkpoint} has no averaged weights')
    name = model_name or args.get('model')
    if not name:
        raise ValueError('--model: neither the checkpoint nor an args.yaml names the model: give its name in timm')
    state = clean_state_dict(tensors_of(saved['state_dict_ema' if use_ema else 'state_dict'], str(checkpoint)))
    model = build_for(name, args, state, any_head)
    load_weights(model, state, str(checkpoint))
    run = Run(
        checkpoint=checkpoint,
        model=model,
        averaged=use_ema,
        args=args,
        data_config=data_config_of_args(args),
        epoch=saved['epoch'] if type(saved.get('epoch')) is int else None,
        summary=summary if summary.is_file() else None,
        calibration=str(saved.get('calibration') or ''),
    )
    _read_metric(run, saved.get('metric'))
    if saved.get('percentiles') is not None:
        try:
            keep_percentiles(model, saved['percentiles'])
        except ValueError as e:
            raise ValueError(f'{checkpoint}: {e}') from e
    return run


def read_checkpoint(path: Path) -> Dict[str, Any]:
    """Read a checkpoint file of train.py to the CPU.

    Raises:
        ValueError: If the file is not such a checkpoint.
    """
    try:
        with torch.serialization.safe_globals([Namespace]):
            saved = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except Exception as e:  # a broken archive or pickle may raise anything
        raise ValueError(f"{path} can't be read as a checkpoint of train.py: {one_line(e)}") from e
    if not isinstance(saved, dict) or not isinstance(saved.get('state_dict'), dict):
        raise ValueError(f'{path} is not a checkpoint of train.py: it has no state_dict')
    return saved


def data_config_of_args(args: Mapping[str, Any]) -> Dict[str, Any]:
    """Select the options of train.py for preprocessing."""
    return {key: args[key] for key in _DATA_OPTIONS if args.get(key) not in (None, '')}


def args_of(settings: Mapping[str, Any]) -> Dict[str, Any]:
    """Select the options of train.py for building the model and for preprocessing."""
    keys = (*_DATA_OPTIONS, 'model_kwargs', 'gp', 'bn_momentum', 'bn_eps')
    found = {key: settings[key] for key in keys if settings.get(key) is not None}
    return {**found, 'model_kwargs': _model_kwargs(found)}


def _model_kwargs(args: Mapping[str, Any]) -> Dict[str, Any]:
    """Return the arguments of the model's class, without those that could open other files."""
    kwargs: Dict[str, Any] = args.get('model_kwargs') or {}
    others = {'any_head', 'pretrained_path', *BUILDER_ARGS}  # arguments of build_model and of timm's functions
    found = {key: value for key, value in kwargs.items() if not key.startswith(FIT_PREFIX) and key not in others}
    if isinstance(overlay := kwargs.get('pretrained_cfg_overlay'), dict):  # keep only the preprocessing
        found['pretrained_cfg_overlay'] = {key: value for key, value in overlay.items() if key in _DATA_OPTIONS}
    return found


def _is(option: Option, value: Any) -> bool:
    """Tell whether train.py may have written a value for an option."""
    if option.is_list:
        right = isinstance(value, (list, tuple)) and (option.nargs == '+' or len(value) == option.nargs)
        return right and all(_is(option._replace(nargs=None), item) for item in value)
    right = isinstance(value, _TYPES[option.type]) and (option.type == 'flag' or not isinstance(value, bool))
    return right and not (isinstance(value, float) and not math.isfinite(value))


def checked_args(args: Any, source: Path) -> Dict[str, Any]:
    """Return the arguments of train.py; raise a ValueError if those in use have values that it does not write."""
    args = {} if args is None else args
    if not isinstance(args, dict) or not all(isinstance(key, str) for key in args):
        raise ValueError(f'{source}: expected the arguments of train.py by name, got {args!r:.60}')
    for key in (key for key in _USED if args.get(key) is not None):
        value, option = args[key], NEWEST.options.get(key, Option())
        sizes = value if isinstance(value, (list, tuple)) else [value]
        right = _is(option, value) and not (key in _POSITIVE and any(size <= 0 for size in sizes))
        right = right and value in FACTS['words'].get(key, [value])
        if not right or (isinstance(value, dict) and not all(isinstance(name, str) for name in value)):
            raise ValueError(f'{source}: {key}: not a value that train.py takes: {value!r:.60}')
    return args


def build_for(name: str, args: Mapping[str, Any], state: Mapping[str, Any], any_head: bool) -> nn.Module:
    """Build a model as train.py does, with the class count of the state dict: args may not have it."""
    heads = {key.removesuffix('sigma2_raw') for key in state if key.endswith('sigma2_raw')}
    if any_head and not heads:
        cfg = get_pretrained_cfg(name, allow_unregistered=True)
        paths = (cfg and cfg.classifier) or ()
        heads = {f'{path}.' for path in ((paths,) if isinstance(paths, str) else paths)}
    counts = {len(state[f'{head}weight']) for head in heads if f'{head}weight' in state}
    if any_head and not counts:
        raise ValueError(f'the checkpoint has no classifier: was it trained as {name}? Else give --model')
    if len(counts) != 1:
        raise ValueError(
            f'the checkpoint has no ZZZ head (or several sizes of them): was it trained as {name}? Else give --model'
        )
    size = args.get('input_size')
    options: Dict[str, Any] = dict(bn_momentum=args.get('bn_momentum'), bn_eps=args.get('bn_eps'))
    options.update(num_classes=counts.pop(), in_chans=args.get('in_chans') or (size[0] if size else 3))
    options.update({'global_pool': args.get('gp'), **_model_kwargs(args)})
    model = build_model(name, any_head=any_head, **options)
    if any(key in state and not same_shape(key, state[key].shape, t.shape) for key, t in model.state_dict().items()):
        # Newer versions of train.py build a model with a fixed input size for the size of the training images.
        size = args.get('img_size') or (tuple(size[1:]) if size else None)
        if size and 'img_size' not in options:
            model = build_model(name, any_head=any_head, **{**options, 'img_size': size})
    return model


def _read_metric(run: Run, metric: Any) -> None:
    """Read the top-1 accuracy at the checkpoint's epoch, if it was measured with these weights, into the run."""
    if run.summary is None:
        run.notes.append('no summary.csv beside the checkpoint')
        return
    if not run.args.get('val_split', 'validation'):
        run.notes.append('there was no validation split')
        return
    ema_measured = bool(run.args.get('model_ema')) and not run.args.get('model_ema_force_cpu')
    if ema_measured != run.averaged:
        kind = 'averaged' if ema_measured else 'raw'
        run.notes.append(f'summary.csv has the accuracy of the {kind} weights, not of those pushed')
        return
    try:
        with open(run.summary, newline='', encoding='utf-8') as file:
            rows = [row for row in csv.DictReader(file) if row.get('epoch') == str(run.epoch)]
    except (OSError, ValueError, csv.Error) as e:
        raise ValueError(f"{run.summary} can't be read: {one_line(e)}") from e
    row = rows[-1] if rows else {}
    name = run.args.get('eval_metric') or 'top1'
    value, logged = _number(row.get('eval_top1')), _number(row.get(f'eval_{name}'))
    if value is None or not 0 <= value <= 100:
        run.notes.append(f'summary.csv has no eval_top1 for epoch {run.epoch}')
    elif isinstance(metric, float) and logged is not None and not math.isclose(metric, logged, rel_tol=1e-6):
        run.notes.append(f'summary.csv is of another run: {name} {logged}, the checkpoint says {metric}')
    else:
        run.top1 = value


def _number(text: Any) -> Optional[float]:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def mapped_names(run: Run, class_map: Optional[Path]) -> Optional[List[str]]:
    """Read the class names of a class map; None without one.

    Raises:
        ValueError: If the file can't be read, or if the run had a class map and none is given.
    """
    if class_map is None and run.args.get('class_map') and not run.names:
        raise ValueError(f'--class-map: the model was trained with one ({run.args["class_map"]}); give it again')
    return None if class_map is None else read_class_map(class_map)


def class_names(run: Run, class_map: Optional[Path], data_dir: Optional[Path]) -> Optional[List[str]]:
    """Read the class names by index, as timm numbers them, from a class map or the folders of the training images.

    Raises:
        ValueError: If the file or folder can't be read, the run had a class map and none is given, or the model has
            another number of classes.
    """
    names, where = mapped_names(run, class_map), '--class-map'
    if data_dir is not None:
        split = run.args.get('train_split') or 'train'
        images = open_split(data_dir, split, class_map=class_map)
        warn_left_out(find_left_out(images), split)
        if names is None:
            names, where = images.class_names, f'--data-dir: {split}'
    if names is not None:
        check_count(where, len(names), run.model.num_classes)
    return names


# Images to evaluate a run on


def add_run_arguments(parser: argparse.ArgumentParser, name: str = 'checkpoint', **run: Any) -> None:
    """Add the run, with the arguments ``run`` of add_argument, and the images on which a command evaluates it."""
    add = parser.add_argument
    add(name, **(run or dict(type=Path, help="e.g. output/train/NAME/model_best.pth.tar, or the run's folder")))
    add('--data-dir', type=Path, required=True, metavar='DIR', help='the ImageFolder')
    add('--class-map', type=Path, metavar='FILE.txt', help='class names by index, one per line')
    add('--use-ema', action='store_true', help='take the averaged weights')
    add('--model', metavar='NAME', help="timm's name of the model, if the checkpoint has none")
    add_images_arguments(parser)


def add_images_arguments(parser: Any) -> None:
    """Add the options for the images on which a run is evaluated."""
    add = parser.add_argument
    add('--dataset', metavar='NAME', help="timm's TYPE/NAME of the data, if not that of the run")
    add('--split', '--val-split', default='validation', metavar='NAME', help='split to evaluate')
    add_ignore_unknown(parser)
    add_loader_arguments(parser, batch_size=256)


def open_images(options: argparse.Namespace, run: Run, device: torch.device) -> Tuple[Split, Images, Dict[str, Any]]:
    """Open the images that the options name, with classes numbered as in training.

    Returns:
        The split, its loader, and the preprocessing.

    Raises:
        ValueError: If the images can't be opened, the class numbers are unknown, or the model does not accept the size.
    """
    config = data_config_of(run.data_config, run.model)
    dataset = options.dataset if options.dataset is not None else run.args.get('dataset') or ''
    settings: Dict[str, Any] = dict(dataset=dataset, channels=config['input_size'][0], batch_size=options.batch_size)
    count, train = run.model.num_classes, run.args.get('train_split') or 'train'
    names, known = mapped_names(run, options.class_map), '--class-map'
    if names:
        check_count(known, len(names), count)
        check_order(names, run.names)
    elif run.names and not dataset:
        names, known = run.names, 'the model'
    elif not dataset and any((options.data_dir / name).is_dir() for name in (train, *SPLIT_FOLDERS[0])):
        # timm numbers the classes that it finds in a split, which may differ from those of training
        with suppress(ValueError):  # the folder may have no images
            trained = open_split(options.data_dir, train).class_names
            names, known = (trained, train) if len(trained) == count else (None, '')
    data = open_known(options, options.split, options.class_map or names, known, **settings)
    if data.class_names or not dataset:
        check_count(f'--data-dir: {options.split}', len(data.class_names), count)
    loader = loader_of(options, data.dataset, config, device)
    check_size(run.model, config)
    return Split(data.dataset, data.class_names or names or []), loader, config
