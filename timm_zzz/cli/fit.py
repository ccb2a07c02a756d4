"""Fit a closed-form start for timm's train.py, with train.py's own options: ``python -m timm_zzz fit``."""

import argparse
import ast
import json
import os
import shlex
import sys
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Dict, Iterator, List, Mapping, Optional, Union

import torch
from safetensors.torch import save_file
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.models import load_state_dict
from torch import nn

from .. import __version__
from ..data import SHOWN, MissingSplitError, Split, find_left_out, open_split
from ..errors import some
from ..fit import PRESETS, ZZZFit, fit_model
from ..fit.zzzfit import OBJECTIVES
from ..metrics import evaluate
from ..models.attach import OPTION_PREFIX
from ..models.checkpoint import build_model, load_weights
from ..models.start import FIT_OPTIONS
from .check_hparams import PLUGIN, channels_of, merged, model_arguments
from .common import (
    add_ignore_unknown,
    amp_dtype_of,
    check_output,
    check_size,
    data_config_of,
    device_of,
    exit_on_error,
    loader_of,
    one_line,
    open_known,
    progress,
    tensors_of,
    warn_left_out,
    written_whole,
)
from .recipe import NEWEST, Recipe, TrainParser
from .run import args_of

__all__ = ['TRAINING', 'main']

# Options for train.py that neither the recipe nor the command line gives: those of the quickstart recipe, with a
# learning rate that suits this start (docs/results/accuracy.md). train.py's defaults, SGD at 0.05, would undo it.
TRAINING = dict(opt='adamw', lr=5e-4, weight_decay=0.05, epochs=20, warmup_epochs=2)
_NUMBERS = ('sigma2', 'max_precision', 'mean_spread', 'v_ratio', 'shrinkage', 'prior_count', 'temperature')
_FIT = tuple(f'{OPTION_PREFIX}{name}' for name in FIT_OPTIONS)
_WEIGHTS = ('pretrained', 'pretrained_path', 'initial_checkpoint')


def _auto_or_float(text: str) -> Union[str, float]:
    try:
        return text if text == 'auto' else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'expected a number or auto, got {text}') from None


def _parser() -> TrainParser:
    parser = TrainParser(
        {key: option for key, option in NEWEST.options.items() if key != 'output'},  # has another meaning here
        dict(train_split='split', initial_checkpoint='checkpoint'),
        prog='python -m timm_zzz fit',
        usage='%(prog)s [--config FILE.yaml] [options of train.py] -o FILE.safetensors [options below]',
        description='Fit the ZZZ head of a model in closed form, in one pass over the training images, and write the\n'
        "model for train.py's --initial-checkpoint. Options are those of train.py, and those below. The model, its\n"
        'weights (--pretrained, --pretrained-path or --initial-checkpoint), the data and how images are prepared\n'
        'are taken from a recipe and the options, as in train.py. All other options go into the train.py command that\n'
        'is printed at the end. Images are prepared as for validation; the backbone is not changed.',
    )
    add = parser.add_argument
    add('-c', '--config', metavar='FILE.yaml', help='recipe of train.py; options override its values')
    add('-o', '--output', dest='file', type=Path, required=True, metavar='FILE.safetensors', help='what to write')
    add('--force', action='store_true', help='replace the file if it exists')
    add('--use-ema', action='store_true', help='take the averaged weights of --initial-checkpoint')
    add_ignore_unknown(parser)
    add('--preset', choices=tuple(PRESETS), default='finetune', help='what the head is used for (default: %(default)s)')
    numbers = parser.add_argument_group('further options of the fit, see docs/fit.md; some override the preset')
    numbers.add_argument('--objective', choices=tuple(OBJECTIVES), default='discriminant')
    for name in _NUMBERS:
        kind: Dict[str, Any] = dict(type=_auto_or_float, default='auto')
        kind = dict(type=float) if name in ('sigma2', 'mean_spread', 'v_ratio') else kind
        numbers.add_argument(f'--{name.replace("_", "-")}', metavar='X', **kind)
    return parser


def main(arguments: Optional[List[str]] = None) -> None:
    parser = _parser()
    with exit_on_error(parser):
        _fit(parser.parse_args(arguments))


def _fit(options: argparse.Namespace) -> None:
    output: Path = options.file
    check_output(output, options.force, '.safetensors')
    choices = {key: getattr(options, key) for key in ('preset', 'objective', *_NUMBERS)}
    ZZZFit(num_classes=1, **choices)  # checks the options
    given = {key: value for key, value in vars(options).items() if key in NEWEST.options}
    recipe = merged(options.config, given)
    s = argparse.Namespace(**{**vars(options), **vars(recipe.settings)})
    if 'device' not in recipe.values and not torch.cuda.is_available():
        given['device'] = s.device = 'cpu'  # train.py has to be told as well
    s.data_dir = s.data_dir or s.data
    s.model_kwargs = {key: s.model_kwargs[key] for key in s.model_kwargs if key not in _FIT}
    device, amp_dtype = device_of(s), amp_dtype_of(s)

    data: Dict[str, Any] = dict(dataset=s.dataset, channels=channels_of(s), batch_size=s.batch_size)
    data.update(input_key=s.input_key, target_key=s.target_key)
    train = open_split(s.data_dir, s.train_split, class_map=s.class_map or None, **data)
    warn_left_out(find_left_out(train), s.train_split)
    if isinstance(getattr(train.dataset, 'reader', None), ReaderImageFolder):
        found = {target for _, target in train.dataset.reader.samples}
        missing = [name for i, name in enumerate(train.class_names) if i not in found]
        if missing:
            raise ValueError(f'{s.train_split} has no images of {some(missing, SHOWN)}')
    validation = _open_validation(s, 'val_split' in recipe.values, train.class_names, data)
    model = _build(s, train.class_names).to(device)
    config = data_config_of(vars(s), model)
    check_size(model, config)
    output.parent.mkdir(parents=True, exist_ok=True)
    TemporaryFile(dir=output.parent).close()  # raises an OSError if the folder is not writable

    def loader(split: Split, name: str) -> Any:
        return progress(loader_of(s, split.dataset, config, device), name)

    with loader(train, s.train_split) as batches:
        fit_model(model, batches, device=device, amp_dtype=amp_dtype, **choices)
    known = dict(args=json.dumps(args_of(vars(s))), class_names=json.dumps(train.class_names))
    metadata = dict(model=s.model, **known, **choices)
    _write(output, model, {key: str(value) for key, value in metadata.items()})
    if validation is not None:
        with loader(validation, s.val_split) as batches:
            result = evaluate(model, batches, device, amp_dtype)
        figures = f'top-1 {result.top1:.2f} %, negative log-likelihood {result.mean_nll:.4f}'
        print(f'{figures} ({len(result.target)} images of {s.val_split})')
    else:
        given['val_split'] = ''  # train.py would evaluate on the training images
    if recipe.values.get('num_classes') != model.num_classes:
        given['num_classes'] = model.num_classes
    if given.get('model_kwargs', recipe.values.get('model_kwargs', {})) != s.model_kwargs:
        given['model_kwargs'] = s.model_kwargs
    print(f'{output}: go on with', *_train_command(options.config, given, recipe, output), sep='\n')


def _open_validation(s: argparse.Namespace, asked: bool, names: List[str], data: Dict[str, Any]) -> Optional[Split]:
    if not s.val_split:
        return None
    known = '--class-map' if s.class_map else s.train_split
    try:
        return open_known(s, s.val_split, names or s.class_map or None, known, **data)
    except MissingSplitError as e:
        if asked:
            raise ValueError(f'--val-split: {e}') from e
        print(f'Not evaluated: {e}', file=sys.stderr)
        return None


def _build(s: argparse.Namespace, names: List[str]) -> nn.Module:
    num_classes = s.num_classes or len(names)
    if not num_classes:
        raise ValueError('--num-classes: the data does not say how many classes it has')
    if names and num_classes != len(names):
        where = '--class-map' if s.class_map else s.train_split
        raise ValueError(
            f'--num-classes: {num_classes}, but {where} has {len(names)} classes; --class-map numbers them'
        )
    if not any(getattr(s, key) for key in _WEIGHTS):
        raise ValueError('--pretrained: the backbone needs weights, by this, --pretrained-path or --initial-checkpoint')
    for key in ('resume', 'head_init_bias'):
        if getattr(s, key) not in (None, ''):
            raise ValueError(f'--{key.replace("_", "-")}: train.py would put that in place of what is fitted')
    arguments = {**model_arguments(s), 'num_classes': num_classes}
    model: nn.Module = build_model(s.model, pretrained=s.pretrained, pretrained_path=s.pretrained_path, **arguments)
    if s.initial_checkpoint:
        source = f'--initial-checkpoint: {s.initial_checkpoint}'
        if not os.path.isfile(s.initial_checkpoint):
            raise ValueError(f'--initial-checkpoint: no such file: {s.initial_checkpoint}')
        try:
            state = load_state_dict(s.initial_checkpoint, use_ema=s.use_ema)
        except Exception as e:  # a broken archive or pickle may raise anything
            raise ValueError(f"{source} can't be read: {one_line(e)}") from e
        load_weights(model, tensors_of(state, source), source, keep_heads=True)
    return model


def _write(path: Path, model: nn.Module, metadata: Dict[str, str]) -> None:
    state = {key: value.detach().cpu().clone().contiguous() for key, value in model.state_dict().items()}
    with written_whole(path) as draft:
        save_file(state, draft, {'format': 'pt', 'timm_zzz': __version__, **metadata})


def _train_command(config: Optional[str], given: Mapping[str, Any], recipe: Recipe, output: Path) -> Iterator[str]:
    """Yield the lines of the train.py command: the recipe, the options given, and defaults for missing ones."""
    values = recipe.values
    told = {key: value for key, value in given.items() if config or key not in _WEIGHTS}
    modules = values.get('device_modules') or []
    if PLUGIN not in modules:
        told['device_modules'] = [*modules, PLUGIN]
    goes_with = dict(weight_decay='opt', warmup_epochs='epochs', lr='lr_base')
    missing = {k: v for k, v in TRAINING.items() if k not in values and goes_with.get(k) not in values}
    if missing:
        yield f'# {", ".join(missing)}: of the quickstart recipe, with a learning rate that suits this start'
    words = ['python', 'train.py', *(['--config', config] if config else [])]
    for key, value in {**told, **missing, 'initial_checkpoint': output}.items():
        words.append(f'--{key.replace("_", "-")}')
        if isinstance(value, dict):
            words += [f'{name}={_literal(item)}' for name, item in value.items()]
        elif value is not True:
            words += map(str, value if isinstance(value, list) else [value])
    yield shlex.join(words)


def _literal(value: Any) -> str:
    """Write the value of KEY=VALUE so that timm reads the same value back."""
    try:
        return repr(value) if not isinstance(value, str) or ast.literal_eval(value) != value else value
    except (SyntaxError, ValueError):
        return value
