"""``python -m timm_zzz fit``: a closed-form start for timm's train.py from a folder of images."""

import argparse
import os
import shlex
import sys
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union

import timm
import torch
from safetensors.torch import save_file
from timm.data import resolve_data_config
from timm.models import load_state_dict
from timm.utils import ParseKwargs
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ..arguments import positive_int
from ..data import device_of, evaluation_loader, open_images
from ..errors import HubError
from ..features import heads_of
from ..fit import OBJECTIVES, fit_model
from ..models._timm import SPLIT_FOLDERS
from ..version import __version__

__all__ = ['main']


class Score(NamedTuple):
    """Of a model on N images."""

    top1: float  # percent
    nll: float  # nats
    images: int

    def __str__(self) -> str:
        return f'top-1 {self.top1:.2f} %, negative log-likelihood {self.nll:.4f}'


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
    add('--val-split', default='validation', metavar='NAME', help='images to evaluate on, if there are any; or empty')
    add('--class-map', type=Path, metavar='FILE.txt', help='class names by index, one per line')
    add('--num-classes', type=positive_int, metavar='N', help="if not the data's")
    add('--img-size', type=positive_int, metavar='PIXELS', help='if not the size of the weights')
    add('--input-size', type=int, nargs=3, metavar='N', help='channels, height and width')
    add('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE', help='for create_model')
    add('-b', '--batch-size', type=positive_int, default=128, metavar='N', help='images at a time')
    add('-j', '--workers', type=int, default=4, metavar='N', help='processes that load images')
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='where to run')
    add('--amp', action='store_true', help='run the backbone in mixed precision')
    add('--amp-dtype', choices=('float16', 'bfloat16'), default='bfloat16', help='with --amp')
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
    try:
        _fit(options)
    except (HubError, ValueError, OSError) as e:
        parser.exit(2, f'timm_zzz: error: {e}\n')


def _fit(options: argparse.Namespace) -> None:
    output: Path = options.output
    if output.suffix != '.safetensors':
        raise ValueError(f'--output: expected a name that ends in .safetensors, got {output}')
    if output.is_dir() or output.exists() and not options.force:
        raise ValueError(f'--output: {output} exists already; give another one or --force')
    channels = options.input_size[0] if options.input_size else options.model_kwargs.get('in_chans', 3)
    train, names = _open(options, options.split, None, channels)
    model = _build(options, _class_count(options, names), channels)
    device = device_of(options.device)
    model.to(device)
    config = resolve_data_config(vars(options), model=model)
    validation = _open_validation(options, names, channels)

    def loader(dataset: Any, name: str) -> Any:
        batches = evaluation_loader(dataset, config, options.batch_size, options.workers, device)
        return tqdm(batches, desc=name, unit='batch', file=sys.stderr)

    amp_dtype = getattr(torch, options.amp_dtype) if options.amp else None
    if validation is not None:
        print(f'before: {_score(model, loader(validation, options.val_split), device, amp_dtype)}')
    keys = ('objective', 'shrinkage', 'prior_count', 'temperature', 'sigma2', 'max_precision')
    choices = {key: getattr(options, key) for key in keys}
    fit_model(model, loader(train, options.split), device=device, amp_dtype=amp_dtype, **choices)
    if validation is not None:
        score = _score(model, loader(validation, options.val_split), device, amp_dtype)
        print(f'after:  {score} ({score.images} images of {options.val_split})')
    _write(output, model, {key: str(value) for key, value in dict(model=options.model, **choices).items()})
    print(f'{output}: go on with\n{_train_command(options, model)}')


# Data


def _open(options: argparse.Namespace, split: str, names: Optional[List[str]], channels: int) -> Tuple[Any, List[str]]:
    """The images of a split, and the classes' names by index, none if unknown; numbered by ``names`` if given."""
    class_map: Any = {name: i for i, name in enumerate(names)} if names else str(options.class_map or '')
    root: Path = options.data_dir
    if not options.dataset and not root.is_dir():
        raise ValueError(f'--data-dir: no such folder: {root}')
    dataset = open_images(options.dataset, root, split, class_map, channels, options.batch_size)
    reader: Any = getattr(dataset, 'reader', None)
    # Where there is no such folder timm takes all images of the root: right only if that is the one set there is
    splits = any((root / name).is_dir() for name in chain(*SPLIT_FOLDERS))
    if not options.dataset and Path(reader.root) == root and (splits or names is not None):
        raise ValueError(f'{root} has no folder {split}')
    indices: Dict[str, int] = getattr(reader, 'class_to_idx', None) or {}
    return dataset, sorted(map(str, indices), key=lambda name: indices[name])


def _open_validation(options: argparse.Namespace, names: List[str], channels: int) -> Optional[Any]:
    if not options.val_split:
        return None
    try:
        return _open(options, options.val_split, names, channels)[0]
    except ValueError as e:
        print(f'Not evaluated: {e}', file=sys.stderr)
        return None


def _class_count(options: argparse.Namespace, names: List[str]) -> int:
    count: Optional[int] = options.num_classes
    if count is None and not names:
        raise ValueError('--num-classes: the data does not say how many classes it has')
    if count is not None and names and count != len(names):
        raise ValueError(
            f'--num-classes: {count}, but {options.split} has {len(names)} classes; --class-map numbers them'
        )
    return count or len(names)


@torch.inference_mode()
def _score(model: nn.Module, loader: Any, device: torch.device, amp_dtype: Optional[torch.dtype]) -> Score:
    model.eval()
    correct, nll, count = 0, 0.0, 0
    for images, target in loader:
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            logits: Tensor = model(images.to(device)).float()
        target = target.to(device)
        correct += int((logits.argmax(1) == target).sum())
        nll += float(F.cross_entropy(logits, target, reduction='sum'))
        count += len(target)
    return Score(100 * correct / max(count, 1), nll / max(count, 1), count)


# Model


def _build(options: argparse.Namespace, num_classes: int, channels: int) -> nn.Module:
    kwargs = dict(in_chans=channels, **{k: v for k, v in options.model_kwargs.items() if k != 'in_chans'})
    if options.pretrained_path:  # as train.py does
        kwargs['pretrained_cfg_overlay'] = dict(file=options.pretrained_path, num_classes=-1)
    try:
        pretrained = options.pretrained or bool(options.pretrained_path)
        model = timm.create_model(options.model, pretrained=pretrained, num_classes=num_classes, **kwargs)
    except (RuntimeError, TypeError) as e:
        raise ValueError(f'{options.model}: {e}') from e
    if not heads_of(model):
        raise ValueError(f'--model: {options.model} has no ZZZ head; append .zzz_r8 to its name')
    if options.checkpoint:
        _load(model, options.checkpoint, options.use_ema)
    return model


def _load(model: nn.Module, checkpoint: str, use_ema: bool) -> None:
    """Load a checkpoint without classifiers of another size."""
    if not os.path.isfile(checkpoint):
        raise ValueError(f'--checkpoint: no such file: {checkpoint}')
    try:
        state: Dict[str, Tensor] = load_state_dict(checkpoint, use_ema=use_ema)
    except Exception as e:  # whatever a broken archive or pickle raises
        raise ValueError(f"--checkpoint: {checkpoint} can't be read: {e}") from e
    own = model.state_dict()
    heads = tuple(f'{path}.' for path in heads_of(model))
    for head in heads:
        found = [key for key in state if key.startswith(head)]
        if any(key not in own or state[key].shape != own[key].shape for key in found):
            state = {key: value for key, value in state.items() if key not in found}
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as e:
        raise ValueError(f'--checkpoint: {checkpoint} does not fit the model: {e}') from e
    missing = [key for key in missing if not key.startswith(heads)]
    if missing or unexpected:
        wrong = f'{len(missing)} tensors are missing and {len(unexpected)} unexpected'
        raise ValueError(
            f'--checkpoint: {checkpoint} does not fit the model: {wrong}, e.g. {(missing + unexpected)[0]}'
        )


def _write(path: Path, model: nn.Module, metadata: Dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().cpu().clone().contiguous() for key, value in model.state_dict().items()}
    with TemporaryDirectory(dir=path.parent, prefix='.zzz-fit-') as temporary:
        draft = Path(temporary) / path.name
        save_file(state, draft, {'format': 'pt', 'timm_zzz': __version__, **metadata})
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
