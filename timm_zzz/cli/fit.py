"""``python -m timm_zzz fit``: a closed-form start for timm's train.py from a folder of images."""

import argparse
import os
import shlex
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Dict, List, Optional, Union

from huggingface_hub.utils import tqdm
from safetensors.torch import save_file
from timm.models import load_state_dict
from timm.utils import ParseKwargs
from torch import nn

from .. import __version__
from ..data import MissingSplitError, Split, find_left_out, open_split
from ..fit import fit_model
from ..fit.zzzfit import OBJECTIVES
from ..head import heads_of
from ..metrics import evaluate
from ..models.checkpoint import build_model, load_weights
from .common import (
    add_ignore_unknown,
    add_loader_arguments,
    amp_dtype_of,
    check_size,
    data_config_of,
    device_of,
    exit_on_error,
    loader_of,
    one_line,
    open_known,
    positive_int,
    tensors_of,
    warn,
    warn_left_out,
)

__all__ = ['main']


# Arguments of create_model that have an option
_OWN_OPTIONS = {
    'in_chans': '--input-size',
    'num_classes': '--num-classes',
    'pretrained': '--pretrained',
    'pretrained_path': '--pretrained-path',
    'checkpoint_path': '--checkpoint',
}


def _key_value(text: str) -> str:
    if text.count('=') != 1:
        raise argparse.ArgumentTypeError(f'expected KEY=VALUE, got {text}')
    return text


def _auto_or_float(text: str) -> Union[str, float]:
    try:
        return text if text == 'auto' else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'expected a number or auto, got {text}') from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='python -m timm_zzz fit',
        description='Fit the ZZZ head of a model in closed form, in one pass over images, and write the model for '
        "train.py's --initial-checkpoint. Images are prepared as timm does for validation; the backbone stays as it "
        'is.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add('--model', required=True, metavar='NAME', help='e.g. resnet50.zzz_r8')
    add('--data-dir', type=Path, required=True, metavar='DIR', help='the ImageFolder')
    add('-o', '--output', type=Path, required=True, metavar='FILE.safetensors', help='where to write the model')
    add('--force', action='store_true', help='replace the file if it exists')
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument('--pretrained', action='store_true', help="the backbone of timm's pretrained weights")
    weights.add_argument('--pretrained-path', metavar='FILE', help='the same from a file, as train.py has it')
    weights.add_argument('--checkpoint', metavar='FILE', help='weights that train.py or this command wrote')
    add('--use-ema', action='store_true', help="take the checkpoint's averaged weights")
    add('--dataset', default='', metavar='NAME', help="timm's TYPE/NAME of the data; an ImageFolder if empty")
    add('--split', default='train', metavar='NAME', help='the images to fit to')
    add('--val-split', metavar='NAME', help='images to evaluate on; without it validation, if there is such a folder')
    add_ignore_unknown(parser)
    add('--class-map', type=Path, metavar='FILE.txt', help='class names by index, one per line')
    add('--num-classes', type=positive_int, metavar='N', help="if not the data's")
    add('--img-size', type=positive_int, metavar='PIXELS', help='if not the size of the weights')
    add('--input-size', type=int, nargs=3, metavar='N', help='channels, height and width')
    pairs: Dict[str, Any] = dict(nargs='*', default={}, type=_key_value, action=ParseKwargs, metavar='KEY=VALUE')
    add('--model-kwargs', help='for create_model', **pairs)
    add_loader_arguments(parser, batch_size=128, amp_dtype='bfloat16')
    add('--objective', choices=tuple(OBJECTIVES), default='discriminant', help='see docs/fit.md')
    for name, text in (
        ('shrinkage', 'of the pooled covariance, 0 to 1'),
        ('prior-count', 'examples that the pooled covariance counts for'),
        ('temperature', 'factor on the logits'),
        ('max-precision', 'largest 1 / sigma2 for the sake of variances of single classes, 200 with --sigma2'),
    ):
        add(f'--{name}', type=_auto_or_float, default='auto', metavar='X', help=f'{text}; auto: by held-out images')
    add('--sigma2', type=float, metavar='X', help="the head's isotropic variance, as a start of training: 0.0625")
    return parser


def main(arguments: Optional[List[str]] = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    with exit_on_error(parser):
        _fit(options)


def _fit(options: argparse.Namespace) -> None:
    output: Path = options.output
    if output.suffix != '.safetensors':
        raise ValueError(f'--output: expected a name that ends in .safetensors, got {output}')
    if output.is_dir() or output.exists() and not options.force:
        raise ValueError(f'--output: {output} exists already; give another one or --force')
    for key, option in _OWN_OPTIONS.items():
        if key in options.model_kwargs:  # train.py would refuse it, too
            raise ValueError(f'--model-kwargs: give {option} instead of {key}')
    channels = options.input_size[0] if options.input_size else 3
    data: Dict[str, Any] = dict(dataset=options.dataset, channels=channels, batch_size=options.batch_size)
    train = open_split(options.data_dir, options.split, class_map=options.class_map, **data)
    warn_left_out(find_left_out(train), options.split)
    val_split = 'validation' if options.val_split is None else options.val_split
    validation = _open_validation(options, val_split, train.class_names, data)
    device, amp_dtype = device_of(options), amp_dtype_of(options)
    model = _build(options, train.class_names, channels).to(device)
    config = data_config_of(vars(options), model)
    check_size(model, config)

    def loader(split: Split, name: str) -> Any:
        batches = loader_of(options, split.dataset, config, device)
        return tqdm(batches, desc=name, unit='batch', file=sys.stderr)

    def score(when: str) -> None:
        if validation is not None:
            with loader(validation, val_split) as batches:
                result = evaluate(model, batches, device, amp_dtype)
            figures = f'top-1 {result.top1:.2f} %, negative log-likelihood {result.mean_nll:.4f}'
            print(f'{when} {figures} ({len(result.target)} images of {val_split})')

    score('before:')
    keys = ('objective', 'shrinkage', 'prior_count', 'temperature', 'sigma2', 'max_precision')
    choices = {key: getattr(options, key) for key in keys}
    with loader(train, options.split) as batches:
        fit_model(model, batches, device=device, amp_dtype=amp_dtype, **choices)
    score('after: ')
    _write(output, model, {key: str(value) for key, value in dict(model=options.model, **choices).items()})
    print(f'{output}: go on with\n{_train_command(options, model)}')


def _open_validation(options: argparse.Namespace, name: str, names: List[str], data: Dict[str, Any]) -> Optional[Split]:
    if not name:
        return None
    known = '--class-map' if options.class_map else options.split
    try:
        return open_known(options, name, names or options.class_map, known, **data)
    except MissingSplitError as e:
        if options.val_split is not None:
            raise ValueError(f'--val-split: {e}') from e
        print(f'Not evaluated: {e}', file=sys.stderr)
        return None


def _build(options: argparse.Namespace, names: List[str], channels: int) -> nn.Module:
    num_classes = options.num_classes or len(names)
    if not num_classes:
        raise ValueError('--num-classes: the data does not say how many classes it has')
    if names and num_classes != len(names):
        where = '--class-map' if options.class_map else options.split
        raise ValueError(
            f'--num-classes: {num_classes}, but {where} has {len(names)} classes; --class-map numbers them'
        )
    weights = dict(pretrained=options.pretrained, pretrained_path=options.pretrained_path)
    arguments = dict(weights, num_classes=num_classes, in_chans=channels, **options.model_kwargs)
    model: nn.Module = build_model(options.model, **arguments)
    if options.checkpoint:
        if not os.path.isfile(options.checkpoint):
            raise ValueError(f'--checkpoint: no such file: {options.checkpoint}')
        try:
            state = load_state_dict(options.checkpoint, use_ema=options.use_ema)
        except Exception as e:  # whatever a broken archive or pickle raises
            raise ValueError(f"--checkpoint: {options.checkpoint} can't be read: {one_line(e)}") from e
        state = tensors_of(state, f'--checkpoint: {options.checkpoint}')
        load_weights(model, state, f'--checkpoint: {options.checkpoint}', keep_heads=True)
        biases = [state[key] for key in (f'{path}.bias' for path in heads_of(model)) if key in state]
        if any(bias.numel() != num_classes for bias in biases):
            found = f'{biases[0].numel()} classes, the model has {num_classes}'
            warn(f'--checkpoint: {options.checkpoint} has {found}: its head is left out')
    return model


def _write(path: Path, model: nn.Module, metadata: Dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().cpu().clone().contiguous() for key, value in model.state_dict().items()}
    with TemporaryDirectory(dir=path.parent, prefix='.zzz-fit-') as temporary:
        draft, new = Path(temporary) / path.name, Path(temporary) / 'new'
        save_file(state, draft, {'format': 'pt', 'timm_zzz': __version__, **metadata})
        new.touch()
        shutil.copymode(new, draft)  # the umask's: safetensors writes for the owner only
        os.replace(draft, path)


def _train_command(options: argparse.Namespace, model: nn.Module) -> str:
    command = ['python', 'train.py', '--device-modules', 'timm_zzz', '--model', options.model]
    command += ['--num-classes', str(model.num_classes), '--data-dir', str(options.data_dir)]
    for name in ('dataset', 'class_map', 'img_size'):
        if getattr(options, name):
            command += [f'--{name.replace("_", "-")}', str(getattr(options, name))]
    if options.input_size:
        command += ['--input-size', *map(str, options.input_size)]
    if options.model_kwargs:
        command += ['--model-kwargs', *(f'{key}={value}' for key, value in options.model_kwargs.items())]
    return shlex.join([*command, '--initial-checkpoint', str(options.output)])
