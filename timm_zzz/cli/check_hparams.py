"""``python -m timm_zzz check-hparams FILE...``: what is wrong with recipes for timm's train.py, before it trains.

A finding is a line ``FILE:LINE: error: ...`` or ``FILE:LINE: note: ...``, all of a file's in one pass and in the order
of its lines. An error is what train.py would stop at, drop, or take for something else than the file says; a note is
what is easily overlooked. The exit status is 1 if there is an error, 2 for a wrong command line, else 0.

The file is judged alone, as train.py's --config: options on the command line beat it, and a split for validation should
stand in it. Nothing is downloaded. The model is built without memory and run once for each image size.
"""

import argparse
import inspect
import logging
import os
import re
import sys
import warnings
from argparse import Namespace
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Set, Union

import timm
import torch
from timm.data import resolve_data_config
from timm.models import (
    get_arch_pretrained_cfgs,
    get_pretrained_cfg,
    is_model,
    list_models,
    resolve_model_input_args,
)
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from torch import nn

from ..head import ZZZHead
from ..models._timm import SPLIT_FOLDERS
from ..models.attach import HEAD_OPTIONS, OPTION_PREFIX
from ..models.registry import TAG
from ..optim import ZZZAdamW
from .recipe import Finding, Recipe, nearest, reason
from .train_options import TrainScript, newest, read_script

__all__ = ['Finding', 'check', 'main']

PLUGIN = 'timm_zzz'
OPTIMIZER = 'zzzadamw'
_ZZZ_OPTIONS = [f'{OPTION_PREFIX}{name}' for name in HEAD_OPTIONS]

# Arguments of create_model by the option that train.py fills them from
_MODEL_ARGUMENTS = {
    'num_classes': 'num_classes',
    'drop': 'drop_rate',
    'drop_path': 'drop_path_rate',
    'drop_block': 'drop_block_rate',
    'gp': 'global_pool',
    'bn_momentum': 'bn_momentum',
    'bn_eps': 'bn_eps',
    'torchscript': 'scriptable',
}
_DATASETS = ('torch', 'hfds', 'hfids', 'tfds', 'wds')
_FOLDERS = ('image_folder', 'folder')
_TORCH_DATASETS = (
    *_FOLDERS,
    *('cifar10', 'cifar100', 'mnist', 'kmnist', 'fashion_mnist', 'qmnist'),
    *('imagenet', 'places365', 'inaturalist', 'inat'),
)


def check(path: Union[str, Path], script: Optional[TrainScript] = None, build_model: bool = True) -> List[Finding]:
    """Check a recipe for timm's train.py.

    Args:
        path: YAML file for its ``--config``.
        script: The train.py; the newest if None.
        build_model: Build the model without memory and run it at the recipe's image sizes, some tenths of a second.

    Returns:
        What was found, by line; a file that can't be read is a finding too.
    """
    places = dict.fromkeys(_parameters(ZZZAdamW) - newest().options.keys(), 'opt_kwargs')
    places |= dict.fromkeys(_ZZZ_OPTIONS, 'model_kwargs')
    recipe = Recipe(newest() if script is None else script, places)
    if recipe.read(path):
        _check_plugin(recipe)
        _check_data(recipe)
        _check_settings(recipe)
        model = _check_model(recipe, build_model)
        _check_optimizer(recipe, model)
    return sorted(set(recipe.findings), key=lambda finding: (finding.line or 0, finding.level, finding.message))


# What belongs together


def _zzz_kwargs(recipe: Recipe) -> List[str]:
    return [key for key in recipe.get('model_kwargs') if key.startswith(OPTION_PREFIX)]


def _tag(name: Optional[str]) -> str:
    """What follows the architecture in a model's name."""
    return '' if name is None or ':' in name else name.partition('.')[2]


def _named_zzz(recipe: Recipe) -> Optional[bool]:
    """Whether the recipe asks for a ZZZ head; None where only the command line or a repository can tell."""
    name = recipe.given('model')
    if _zzz_kwargs(recipe) or TAG.fullmatch(_tag(name)):
        return True
    return None if name is None or ':' in name else False


def _optimizer_name(recipe: Recipe) -> str:
    """As timm takes it: in lower case, and what stands in front of an underscore is another matter."""
    return recipe.get('opt').lower().rpartition('_')[2]


def _check_plugin(recipe: Recipe) -> None:
    if recipe.is_wrong('device_modules'):
        return
    modules = recipe.get('device_modules') or []
    for module in modules:
        try:
            known = find_spec(module.partition('.')[0]) is not None
        except (ImportError, ValueError):
            known = False
        if not known:
            recipe.note('device_modules', f'Python finds no module {module} here{nearest(module, [PLUGIN])}')
    if PLUGIN in [module.partition('.')[0] for module in modules]:
        return
    if TAG.fullmatch(_tag(recipe.given('model'))):
        where = 'model'
    elif _zzz_kwargs(recipe):
        where = f'model_kwargs.{_zzz_kwargs(recipe)[0]}'
    elif _optimizer_name(recipe) == OPTIMIZER:
        where = 'opt'
    else:
        return
    if 'device_modules' in recipe.script.options:
        recipe.error(where, f'the plugin is not imported: add the line device_modules: [{PLUGIN}]')
    else:
        recipe.note(where, f'this train.py has no option that imports the plugin: run it by python -m {PLUGIN}')


def _check_data(recipe: Recipe) -> None:
    dataset = recipe.get('dataset')
    prefix, slash, name = dataset.partition('/')
    kind = prefix.lower() if slash else ''
    torch_name = dataset.split('/', 2)[-1].lower()  # as timm takes it
    folder = kind not in _DATASETS or (kind == 'torch' and torch_name in _FOLDERS)
    if kind == 'torch' and torch_name not in _TORCH_DATASETS:
        recipe.error('dataset', f'timm knows no torch/{name}{nearest(torch_name, _TORCH_DATASETS)}')
    elif kind not in _DATASETS and dataset and 'folder' not in dataset.lower():
        kinds = ', '.join(f'{kind}/' for kind in _DATASETS)
        recipe.error('dataset', f'{dataset} does not start with {kinds}: timm ignores it and reads a folder of images')
    if recipe.given('data_dir'):
        recipe.note('data_dir', 'on the command line only --data-dir beats it, not a folder without an option')
    if dataset and not folder and 'num_classes' not in recipe.lines:
        recipe.note('dataset', "num_classes is missing: it has to come with the command line, or the model's own stays")
    if 'val_split' not in recipe.lines:
        near = [key for key in ('train_split', 'dataset', 'data_dir', 'model') if key in recipe.lines]
        line = recipe.line(near[0]) if near else 1
        if folder:
            recipe.error(line, 'val_split is missing: without validation/ or val/ in its folder timm takes all images')
        else:
            recipe.note(line, f'val_split is missing: the data set needs a split named {recipe.get("val_split")}')
    elif recipe.is_wrong('val_split'):
        pass
    elif not recipe.get('val_split'):
        recipe.note('val_split', 'no evaluation: the training loss picks the best checkpoint')
    elif folder:
        _check_folders(recipe)
    else:
        _check_splits(recipe)


def _check_splits(recipe: Recipe) -> None:
    """Splits by name, with sums and slices: ``train+validation``, ``train[:90%]``."""
    train, val = ([part.strip() for part in recipe.get(key).split('+')] for key in ('train_split', 'val_split'))
    if any(part in train or part.partition('[')[0] in train for part in val):
        recipe.error('val_split', f'evaluates on images of train_split, {recipe.get("train_split")}')


def _check_folders(recipe: Recipe) -> None:
    """Splits that are folders."""
    keys = ('train_split', 'val_split')
    folders = {}
    for key in keys:
        split = recipe.get(key)
        if '[' in split or '+' in split:
            recipe.error(key, f'{split}: slices and sums are for hfds/ and tfds/, timm looks for one folder')
        name = split.partition('[')[0]
        folders[key] = next((names for names in SPLIT_FOLDERS if name in names), (name,))
    if folders['train_split'] == folders['val_split']:
        recipe.error('val_split', f'evaluates on the images of train_split, {recipe.get("train_split")}')
        return
    root = recipe.get('data_dir') or recipe.get('data')
    if not root or not os.path.isdir(root):
        return
    for key in keys:
        if not any(os.path.exists(os.path.join(root, name)) for name in folders[key]):
            where = next(name for name in (key, 'data_dir', 'data') if name in recipe.lines)
            recipe.error(where, f'{root} has no {"/ or ".join(folders[key])}/: timm would take all images in it')


def _check_settings(recipe: Recipe) -> None:
    """Settings that do something else than they seem to."""
    get = recipe.get
    if recipe.given('workers') == 0:
        recipe.note('workers', '0 loads the images within the training process, and stops older versions of timm')
    if get('clip_grad') and get('clip_mode') == 'agc' and _named_zzz(recipe):
        message = "agc leaves out the model's last two parameters as the classifier's; a ZZZ head has more: take norm"
        recipe.note('clip_mode', message)
    if get('model_ema') and not get('model_ema_warmup') and not get('model_ema_force_cpu'):
        message = "the average's metric picks the best checkpoint; in a short run it needs model_ema_warmup: true"
        recipe.note('model_ema', message)
    if get('sched') == 'none':
        recipe.error('sched', 'none stops train.py, which asks the scheduler for its unit; take constant')
    epochs, warmup = get('epochs'), get('warmup_epochs')
    if recipe.values.keys() & {'epochs', 'warmup_epochs'} and warmup >= epochs and not get('warmup_prefix'):
        where = 'warmup_epochs' if 'warmup_epochs' in recipe.lines else 'epochs'
        recipe.note(where, f'{warmup} epochs of warm-up out of {epochs} in all: lr is never reached')
    crop_pct, num_classes = get('crop_pct'), get('num_classes')
    if crop_pct is not None and not 0 < crop_pct <= 1:
        recipe.error('crop_pct', f'a fraction above 0, at most 1, is needed, not {crop_pct}')
    if num_classes is not None and num_classes < 1:
        recipe.error('num_classes', f'at least 1 is needed, not {num_classes}')
        recipe.values.pop('num_classes')
    channels = _channels(recipe)
    for key in ('mean', 'std'):
        numbers = get(key)
        if numbers is not None and len(numbers) not in (1, channels):
            recipe.error(key, f'{channels} numbers are needed, one for each channel, or 1, not {len(numbers)}')


def _channels(recipe: Recipe) -> int:
    in_chans, input_size = recipe.get('in_chans'), recipe.get('input_size')
    return in_chans if in_chans is not None else input_size[0] if input_size else 3


# The model


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep timm's warnings and log out of the report."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(disabled)


def _check_model(recipe: Recipe, build: bool) -> Optional[nn.Module]:
    """Check the model's name, arguments and image sizes; the model, without memory, if it could be built."""
    unknown = [key for key in _zzz_kwargs(recipe) if key not in _ZZZ_OPTIONS]
    for key in unknown:
        recipe.error(f'model_kwargs.{key}', f'no option of a ZZZ head{nearest(key, _ZZZ_OPTIONS)}')
    name = recipe.given('model')
    if name is None or ':' in name:  # from the command line; a repository, whose config.json is not read here
        return None
    known = _check_name(recipe, name)
    if not known or unknown or recipe.is_wrong('model_kwargs') or not (build or _has_unknown_tag(name)):
        return None
    try:
        model = _create(recipe, name, recipe.get('model_kwargs'))
    except Exception as e:  # whatever a model makes of its arguments
        recipe.error(_guilty_argument(recipe, e), f'timm: {reason(e)}')
        return None
    if TAG.fullmatch(_tag(name)) and not any(isinstance(module, ZZZHead) for module in model.modules()):
        recipe.error('model', f'a deprecated name, which gives the linear head; the present one is {_present(model)}')
    _check_sizes(recipe, name, model)
    return model


def _present(model: nn.Module) -> str:
    cfg: Any = model.pretrained_cfg
    return f'{cfg["architecture"]}.{cfg["tag"]}' if cfg.get('tag') else cfg['architecture']


def _has_unknown_tag(name: str) -> bool:
    try:
        get_pretrained_cfg(name)
    except RuntimeError:
        return True
    return False


def _check_name(recipe: Recipe, name: str) -> bool:
    architecture, _, tag = name.partition('.')
    if '/' in name:
        recipe.error('model', f'no name of a model; of a repository it would be hf-hub:{name}')
        return False
    if not is_model(architecture):
        names = [f'{other}.{tag}' if tag else other for other in list_models()]
        recipe.error('model', f'timm knows no {architecture}{nearest(name, names, 3)}')
        return False
    match = TAG.fullmatch(tag)
    if match is None and _has_unknown_tag(name) and OPTION_PREFIX.strip('_') not in tag.lower():
        tags = [key.partition('.')[2] for key in get_arch_pretrained_cfgs(architecture)]
        tags = [tag for tag in tags if not TAG.fullmatch(tag)]
        recipe.error('model', f'timm knows no weights {tag} of {architecture}{nearest(tag, tags, 3)}')
        return False
    if recipe.get('pretrained') and not recipe.get('pretrained_path'):
        base = name if match is None else f'{architecture}.{match["base"]}' if match['base'] else architecture
        cfg = None if _has_unknown_tag(base) else get_pretrained_cfg(base)
        if cfg is not None and not cfg.has_weights:
            recipe.error('pretrained', f'timm has no weights for {base}')
    return True


def _input_size(recipe: Recipe) -> Dict[str, Any]:
    return {key: recipe.get(key) for key in ('input_size', 'img_size', 'in_chans')}


def _create(recipe: Recipe, name: str, model_kwargs: Dict[str, Any]) -> nn.Module:
    """The model that train.py builds, without memory and weights."""
    arguments = {argument: recipe.get(key) for key, argument in _MODEL_ARGUMENTS.items()}
    arguments['in_chans'] = _channels(recipe)
    arguments['num_classes'] = arguments['num_classes'] or 2  # comes with the command line
    repeated = sorted(model_kwargs.keys() & {*arguments, 'pretrained', 'checkpoint_path'})
    if repeated:
        raise TypeError(f'model_kwargs: {", ".join(repeated)} has an option of its own, and train.py passes both')
    arguments.update((key, value) for key, value in model_kwargs.items() if key != 'device')
    if recipe.script.resizes_model:
        resolved = resolve_model_input_args(name, _input_size(recipe), **arguments)
        name, arguments = resolved.pop('model_name'), resolved
    with _quiet(), torch.device('meta'):
        return timm.create_model(name, **arguments).eval()


def _guilty_argument(recipe: Recipe, e: Exception) -> str:
    """The key that an error's message names, else the model's."""
    words = set(re.findall(r'\w+', str(e)))
    words |= {f'{OPTION_PREFIX}{word}' for word in words}
    found = [f'model_kwargs.{key}' for key in recipe.get('model_kwargs') if key in words]
    found += [key for key, argument in _MODEL_ARGUMENTS.items() if argument in words and key in recipe.values]
    return next(iter(found), 'model')


def _check_sizes(recipe: Recipe, name: str, model: nn.Module) -> None:
    img_size, input_size = recipe.get('img_size'), recipe.get('input_size')
    if input_size and img_size and list(input_size[1:]) != [img_size, img_size]:
        recipe.error('img_size', f'input_size says {input_size}; train.py takes one of the two')
    if input_size and recipe.get('in_chans') not in (None, input_size[0]):
        recipe.error('in_chans', f'input_size says {input_size}; train.py takes one of the two')
        return
    model_kwargs = recipe.get('model_kwargs')
    keys = [key for key in ('input_size', 'img_size') if recipe.get(key)]
    keys += [f'model_kwargs.{key}' for key in model_kwargs if not key.startswith(OPTION_PREFIX)]
    training = recipe.get('train_img_sizes') or []
    if recipe.get('naflex_loader') or not (keys or training):
        return
    channels, height, width = resolve_data_config(_input_size(recipe), model=model)['input_size']
    sizes = [(keys[0] if keys else 'model', height, width), *(('train_img_sizes', size, size) for size in training)]
    for where, *size in sizes:
        problem = _run(model, channels, size)
        if not problem:
            continue
        cfg: Any = model.pretrained_cfg
        if _run(_create(recipe, name, {}), channels, cfg['input_size'][1:]):
            return  # nothing can be said of a model that doesn't run without memory
        hint = _size_hint(recipe, name, channels, size)
        recipe.error(where, f'images of {size[0]} x {size[1]} do not fit {name}: {problem}{hint}')


def _run(model: nn.Module, channels: int, size: Sequence[int]) -> str:
    """What a model says to images of a size, '' if it takes them."""
    try:
        with _quiet(), torch.no_grad():
            model(torch.empty(1, channels, *size, device='meta'))
    except Exception as e:  # whatever a model makes of a size
        return reason(e)
    return ''


def _size_hint(recipe: Recipe, name: str, channels: int, size: Sequence[int]) -> str:
    model_kwargs = recipe.get('model_kwargs')
    if 'img_size' in model_kwargs:
        return '' if recipe.get('img_size') else f'; train.py needs img_size: {model_kwargs["img_size"]} too'
    img_size = size[0] if size[0] == size[1] else list(size)
    try:
        fits = not _run(_create(recipe, name, {**model_kwargs, 'img_size': img_size}), channels, size)
    except Exception:
        fits = False
    return f'; add model_kwargs: {{img_size: {img_size}}}' if fits else ''


# The optimiser and its schedule


def _parameters(optimizer: Any) -> Set[str]:
    """The arguments of an optimiser, those of its base classes included."""
    names: Set[str] = set()
    for cls in inspect.getmro(optimizer):
        if cls is not torch.optim.Optimizer and '__init__' in vars(cls):
            names.update(inspect.signature(vars(cls)['__init__']).parameters)
    return names - {'self', 'params', 'args', 'kwargs', 'lr'}


def _check_optimizer(recipe: Recipe, model: Optional[nn.Module]) -> None:
    settings = recipe.settings()
    name, names = _optimizer_name(recipe), list(map(str, list_optimizers()))
    known = name in names and settings.opt.lower() in (name, f'lookahead_{name}')
    optimizer = None
    if not known:
        recipe.error('opt', f'timm knows no {settings.opt}{nearest(settings.opt.lower(), names)}')
    elif not recipe.is_wrong('opt') and (torch.cuda.is_available() or not name.startswith(('bnb', 'fused'))):
        optimizer = _create_optimizer(recipe, settings, model)  # those two can't even be named without a GPU
    if optimizer is None:
        optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    if settings.sched != 'none':
        try:
            with _quiet():
                create_scheduler_v2(optimizer, **scheduler_kwargs(settings), updates_per_epoch=1)
        except Exception as e:  # timm's own check
            recipe.error('sched', f'timm: {reason(e)}')
    scale = settings.opt_kwargs.get('head_lr_scale', 1)
    if name == OPTIMIZER and isinstance(scale, int | float) and scale != 1:
        for key, used in (('warmup_lr', settings.warmup_epochs), ('min_lr', True)):
            value = recipe.get(key)
            if value and used:
                where = key if key in recipe.lines else 'opt_kwargs.head_lr_scale'
                recipe.note(where, f'{key} is {value:g}, and {value * scale:g} for the head; write {key}: 0.0')


def _create_optimizer(
    recipe: Recipe, settings: Namespace, model: Optional[nn.Module]
) -> Optional[torch.optim.Optimizer]:
    name = _optimizer_name(recipe)
    known = _parameters(get_optimizer_class(name, bind_defaults=False))
    taken = known | set(inspect.signature(create_optimizer_v2).parameters)
    unknown = [key for key in settings.opt_kwargs if key not in taken]
    for key in unknown:
        recipe.error(f'opt_kwargs.{key}', f'no option of {name}{nearest(key, sorted(known))}')
    if unknown or recipe.is_wrong('opt_kwargs'):
        return None
    arguments = optimizer_kwargs(settings)
    if model is None:  # a stand-in with the same kind of head
        zzz = _named_zzz(recipe)
        model = ZZZHead(2, 2, 1) if zzz or (zzz is None and name == OPTIMIZER) else nn.Linear(2, 2)
        arguments.pop('layer_decay', None)
    arguments['lr'] = arguments['lr'] or settings.lr_base
    try:
        with _quiet():
            return create_optimizer_v2(model, **arguments, **settings.opt_kwargs)
    except Exception as e:  # whatever an optimiser makes of its arguments
        words = set(re.findall(r'\w+', str(e)))
        found = [f'opt_kwargs.{key}' for key in settings.opt_kwargs if key in words]
        recipe.error(next(iter(found), 'opt'), f'timm: {reason(e)}')
    return None


# The command


def _report(path: str, findings: Sequence[Finding]) -> None:
    for finding in findings:
        line = '' if finding.line is None else f':{finding.line}'
        print(f'{path}{line}: {finding.level}: {finding.message}')
    if not any(finding.level == 'error' for finding in findings):
        print(f'{path}: OK')


def _count(number: int, word: str) -> str:
    return f'{number} {word}' + ('' if number == 1 else 's')


def main(arguments: Optional[List[str]] = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=f'python -m {PLUGIN} check-hparams',
        description='Says ' + (__doc__ or '').partition(': ')[2].replace('``', ''),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('files', nargs='*', metavar='FILE', help='recipe for train.py --config')
    parser.add_argument(
        '--train-script',
        metavar='PATH',
        help="take the options from this train.py, which is read, not run (default: timm's newest, from this package)",
    )
    parser.add_argument(
        '--no-model', action='store_true', help="don't build the model: no check of arguments and sizes"
    )
    parser.add_argument('--print-options', action='store_true', help='print the options as YAML instead, one a line')
    args = parser.parse_args(arguments)
    try:
        script = read_script(args.train_script) if args.train_script else newest()
    except (OSError, ValueError) as e:
        reason = f"can't read {args.train_script}: {e.strerror}" if isinstance(e, OSError) else str(e)
        print(f'{PLUGIN}: error: {reason}', file=sys.stderr)
        return 2
    if args.print_options:
        print(script.dump(), end='')
        return 0
    if not args.files:
        parser.error('no FILE to check')
    findings: List[Finding] = []
    for path in args.files:
        found = check(path, script, build_model=not args.no_model)
        _report(path, found)
        findings += found
    errors = sum(finding.level == 'error' for finding in findings)
    if findings:
        files = _count(len(args.files), 'file')
        print(f'{_count(errors, "error")}, {_count(len(findings) - errors, "note")} in {files}')
    return int(errors > 0)
