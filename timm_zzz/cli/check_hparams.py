"""Check recipes for timm's train.py before it trains: ``python -m timm_zzz check-hparams FILE...``.

A finding is a line ``FILE:LINE: error: ...`` or ``FILE:LINE: note: ...``. All findings of a file come in one pass, in
the order of its lines. An error is something that stops train.py, that it ignores, or that it reads in another way than
the file means. A note is something that is easily overlooked. The exit status is 1 if there is an error, 2 for a wrong
command line, else 0.

The file is checked as train.py's --config. Options of train.py on the command line override it, as in train.py; a
finding about them has no line. val_split should be set, unless the folders show that the default works. Files are
looked up from the current folder. Nothing is downloaded. The model is built without memory and run once for each image
size; it is not fitted.
"""

import argparse
import inspect
import json
import logging
import os
import re
import sys
import warnings
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Set, Tuple, Union

import timm
import torch
import yaml
from timm.data import create_transform, resolve_data_config
from timm.models import (
    get_arch_pretrained_cfgs,
    get_deprecated_models,
    is_model,
    is_model_pretrained,
)
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from torch import nn

from ..data import SPLIT_FOLDERS, open_split, read_class_map
from ..errors import nearest, some
from ..fit import PRESETS
from ..head import ZZZHead
from ..models._timm import input_config
from ..models.attach import FIT_PREFIX, HEAD_OPTIONS, OPTION_PREFIX
from ..models.registry import DEFAULT_RANK, TAG, asks_for_head, did_you_mean
from ..models.start import FIT_OPTIONS, NAMES, settings_of
from ..optim import ZZZAdamW
from .common import exit_on_error
from .recipe import FACTS, NEWEST, Finding, Recipe, TrainParser, TrainScript, ask_script, reason, shorten

__all__ = ['Finding', 'channels_of', 'check', 'main', 'merged', 'model_arguments']

PLUGIN = 'timm_zzz'
OPTIMIZER = 'zzzadamw'
MAX_LR = 0.1  # larger learning rates of Adam and its variants are noted
_ZZZ_OPTIONS = [f'{OPTION_PREFIX}{name}' for name in (*HEAD_OPTIONS, *FIT_OPTIONS)]


def check(
    path: Union[str, Path],
    script: TrainScript = NEWEST,
    build_model: bool = True,
    given: Optional[Mapping[str, Any]] = None,
) -> List[Finding]:
    """Check a recipe for a train.py.

    Args:
        script: Options of the train.py.
        build_model: Build the model without memory, and run it at its image sizes.
        given: Options of a command line, which override the recipe's.

    Returns:
        Findings in the order of lines.
    """
    recipe = _new_recipe(script)
    with _quiet():
        if recipe.read(path):
            recipe.override(given or {})
            _check_plugin(recipe)
            _check_data(recipe)
            _check_files(recipe)
            _check_settings(recipe)
            model = _check_model(recipe, build_model)
            _check_fit(recipe, model)
            _check_optimizer(recipe, model)
    return sorted(set(recipe.findings), key=lambda finding: (finding.line or 0, finding.level, finding.message))


def merged(path: Optional[str], given: Mapping[str, Any]) -> Recipe:
    """Read a recipe, if there is one, and override it by options of a command line, as train.py does.

    Raises:
        ValueError: For the first option with a wrong name or value; those of model and data are not checked.
    """
    recipe = _new_recipe(NEWEST)
    with _quiet():
        if path is None or recipe.read(path):
            recipe.override(given)
            _check_settings(recipe)
            _check_optimizer(recipe, None)
    for line, level, message in recipe.findings:
        if level == 'error':
            where = '' if line is None and path in (None, '') else f'{path}: ' if line is None else f'{path}:{line}: '
            raise ValueError(f'{where}{message}')
    return recipe


def _new_recipe(script: TrainScript) -> Recipe:
    places = dict.fromkeys(_parameters(ZZZAdamW) - NEWEST.options.keys(), 'opt_kwargs')
    return Recipe(script, {**places, **dict.fromkeys(_ZZZ_OPTIONS, 'model_kwargs')})


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence timm's log and warnings."""
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter('ignore')
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.CRITICAL)
        yield


def _model_name(recipe: Recipe) -> Optional[str]:
    """Return the model's name; None if there is none, or if it is of a repository, which is not read here."""
    name = recipe.values.get('model')
    return None if name is None or ':' in name else name


def _zzz_key(recipe: Recipe) -> Optional[str]:
    """Return the key that asks for a ZZZ head; None if there is none."""
    if TAG.fullmatch((_model_name(recipe) or '').partition('.')[2]):
        return 'model'
    options = [key for key in recipe.settings.model_kwargs if key.startswith(OPTION_PREFIX)]
    return f'model_kwargs.{options[0]}' if options else None


def _attempt(
    recipe: Recipe, function: Callable[[argparse.Namespace], Any], names: Mapping[str, str], fallback: str
) -> Any:
    """Call a function that builds something of timm from the settings, and report the keys that it refuses.

    Args:
        names: Keys that may be at fault, with their names in timm's messages.
        fallback: Key for an error that no single key explains.

    Returns:
        The function's result without the refused keys; None if an error remains.
    """
    keys, refused = [key for key in names if key.partition('.')[0] in recipe.values], list[str]()

    def call(*further: str) -> Tuple[str, Any]:
        try:
            return '', function(recipe.without([*refused, *further]))
        except Exception as e:  # timm may raise anything for its arguments
            return reason(e), None

    def culprit(message: str, left: Sequence[str]) -> Optional[str]:
        """Find the key without which there is no error, or else a different error."""
        others = {}
        for key in left:
            others[key] = call(key)[0]
            if not others[key]:
                return key
        text = partial(re.sub, '[0-9.]+', '')  # an error that differs only in numbers is the same
        return next((key for key in left if text(others[key]) != text(message)), None)

    while True:
        message, result = call()
        if not message:
            return result
        words = re.findall(r'\w+', message.replace(OPTION_PREFIX, ''))
        named = [key for key in keys if names[key].removeprefix(OPTION_PREFIX) in words]
        key = culprit(message, [key for key in dict.fromkeys([*named, *keys]) if key not in refused])
        recipe.error(key or [*named, fallback][0], f'timm: {message}')
        if key is None:
            return None
        refused.append(key)


def _check_plugin(recipe: Recipe) -> None:
    if recipe.is_wrong('device_modules'):
        return
    modules = recipe.settings.device_modules or []
    packages = [module.partition('.')[0] for module in modules]
    for module, package in zip(modules, packages, strict=True):
        if not package.isidentifier() or find_spec(package) is None:
            recipe.note('device_modules', f'Python finds no module {module} here{nearest(module, [PLUGIN])}')
    where = _zzz_key(recipe) or ('opt' if recipe.settings.opt.lower().endswith(OPTIMIZER) else None)
    if where is None or PLUGIN in packages:
        return
    if 'device_modules' in recipe.script.options:
        recipe.error(where, f'the plugin is not imported: add the line device_modules: [{PLUGIN}]')
    else:
        recipe.note(where, f'this train.py has no option that imports the plugin: run it by python -m {PLUGIN}')


def _check_data(recipe: Recipe) -> None:
    s, kinds, torch_names = recipe.settings, FACTS['datasets'], FACTS['torch_folders'] + FACTS['torch_datasets']
    prefix, slash, name = s.dataset.partition('/')
    kind = prefix.lower() if slash else ''
    torch_name = s.dataset.split('/', 2)[-1].lower()  # as timm parses it
    folder = kind not in kinds or (kind == 'torch' and torch_name in FACTS['torch_folders'])
    if kind == 'torch' and torch_name not in torch_names:
        recipe.error('dataset', f'timm knows no torch/{name}{nearest(torch_name, torch_names)}')
    elif kind not in kinds and s.dataset and 'folder' not in s.dataset.lower():
        start = '/, '.join(kinds)
        recipe.error(
            'dataset', f'{s.dataset} does not start with {start}/: timm ignores it and reads a folder of images'
        )
    if s.data_dir and recipe.line('data_dir'):  # the key is in the file
        recipe.note('data_dir', 'on the command line only --data-dir beats it, not a folder without an option')
    if s.dataset and not folder and 'num_classes' not in recipe.lines:
        recipe.note('dataset', "num_classes is missing: it has to come with the command line, or the model's own stays")
    if 'val_split' not in recipe.lines:
        line = recipe.line(recipe.first('train_split', 'dataset', 'data_dir', 'model'))
        if folder and os.path.isdir(s.data_dir or s.data or ''):
            _check_folders(recipe)
        elif folder:
            recipe.error(line, 'val_split is missing: without validation/ or val/ in its folder timm takes all images')
        elif kind != 'torch':  # for torch/ timm maps the default to the split that exists
            recipe.note(line, f'val_split is missing: the data set needs a split named {s.val_split}')
    elif recipe.is_wrong('val_split'):
        return
    elif not s.val_split:
        recipe.note('val_split', 'no evaluation: the training loss picks the best checkpoint')
    elif folder:
        _check_folders(recipe)
    else:  # splits by name, with sums and slices: train+validation, train[:90%]
        train, val = ([part.strip() for part in split.split('+')] for split in (s.train_split, s.val_split))
        if any(part in train or part.partition('[')[0] in train for part in val):
            recipe.error('val_split', f'evaluates on images of train_split, {s.train_split}')


def _check_folders(recipe: Recipe) -> None:
    s, folders = recipe.settings, {}
    for key, split in (('train_split', s.train_split), ('val_split', s.val_split)):
        if '[' in split or '+' in split:
            recipe.error(key, f'{split}: slices and sums are for hfds/ and tfds/, timm looks for one folder')
        name = split.partition('[')[0]
        folders[key] = next((names for names in SPLIT_FOLDERS if name in names), (name,))
    root = s.data_dir or s.data
    if folders['train_split'] == folders['val_split']:
        where = recipe.first('val_split', 'train_split')
        recipe.error(where, f'evaluates on the images of train_split, {s.train_split}')
    elif root and os.path.isdir(root):
        for key, names in folders.items():
            if not any(os.path.exists(os.path.join(root, name)) for name in names):
                where = recipe.first(key, 'data_dir', 'data')
                recipe.error(where, f'{root} has no {"/ or ".join(names)}/: timm would take all images in it')


def _check_files(recipe: Recipe) -> None:
    s = recipe.settings
    for key in ('initial_checkpoint', 'pretrained_path', 'resume'):
        path = getattr(s, key)
        if path and not os.path.isfile(path):
            recipe.error(key, f'no such file here: {path}')
    if s.pretrained_path and not s.pretrained:
        recipe.error('pretrained_path', 'without pretrained: true train.py does not load it')
    if not s.class_map:
        return
    path = _class_map_file(s)
    if path is None:
        if s.data_dir or s.data or os.path.isabs(s.class_map):
            recipe.error('class_map', f'no such file here: {s.class_map}')
        else:
            recipe.note('class_map', f'no such file here: {s.class_map}; train.py looks in the folders of images, too')
        return
    try:
        count = len(read_class_map(path))
    except ValueError as e:
        recipe.error('class_map', str(e).removeprefix('--class-map: '))
        return
    if s.num_classes is not None and count != s.num_classes:
        add = recipe.error if count > s.num_classes else recipe.note
        add('class_map', f'{count} classes, num_classes says {s.num_classes}')


def _class_map_file(s: argparse.Namespace) -> Optional[str]:
    """Find the class map in the folders where timm looks for it; None if it is in none."""
    root = s.data_dir or s.data or ''
    folders = ('', s.train_split, *SPLIT_FOLDERS[0])
    places = [s.class_map, *(os.path.join(root, name, s.class_map) for name in folders)] if s.class_map else []
    return next(filter(os.path.isfile, places), None)


def _check_settings(recipe: Recipe) -> None:
    """Find settings that stop train.py or have an unexpected effect."""
    s, channels = recipe.settings, channels_of(recipe.settings)
    if s.workers == 0:
        recipe.note('workers', '0 loads the images within the training process, and stops older versions of timm')
    if s.clip_grad and s.clip_mode == 'agc' and _zzz_key(recipe):
        why = "agc leaves out the model's last two parameters, sigma2_raw and bias of a ZZZ head, and clips its others"
        recipe.note('clip_mode', f'{why}: take norm')
    if s.head_init_scale is not None and _zzz_key(recipe):
        why = "it multiplies a ZZZ head's class means and biases after they were loaded or fitted, and 0 wipes them out"
        recipe.error('head_init_scale', f'{why}: leave it to linear heads')
    if s.model_ema and not s.model_ema_warmup and not s.model_ema_force_cpu:
        why = "the average's metric picks the best checkpoint"
        recipe.note('model_ema', f'{why}; in a short run it needs model_ema_warmup: true')
    if s.sched == 'none':
        recipe.error('sched', 'none stops train.py, which asks the scheduler for its unit; take constant')
    where = recipe.first('warmup_epochs', 'epochs')
    if where in recipe.values and s.warmup_epochs >= s.epochs and not s.warmup_prefix:
        recipe.note(where, f'{s.warmup_epochs} epochs of warm-up out of {s.epochs} in all: lr is never reached')
    if s.aug_splits == 1:
        recipe.error('aug_splits', '0 or at least 2 is needed, not 1')
    for key, needs in (('split_bn', s.aug_splits > 1 or s.resplit), ('jsd_loss', s.aug_splits > 1)):
        if getattr(s, key) and not needs:
            recipe.error(key, 'it needs aug_splits, at least 2')
    _attempt(recipe, _create_transform, FACTS['augmentation'], 'aa')
    for key, numbers in (('mean', s.mean), ('std', s.std)):
        if numbers is not None and len(numbers) not in (1, channels):
            recipe.error(key, f'{channels} numbers are needed, one for each channel, or 1, not {len(numbers)}')
    both = f'input_size says {s.input_size}; train.py takes one of the two'
    if s.input_size and s.img_size and s.input_size[1:] != [s.img_size, s.img_size]:
        recipe.error('img_size', both)
    if s.input_size and s.input_size[0] != channels:
        recipe.error('in_chans', both)


def _create_transform(s: argparse.Namespace) -> Any:
    """Create the training transform of train.py."""
    arguments = {argument: getattr(s, key) for key, argument in FACTS['augmentation'].items()}
    return create_transform(is_training=True, **arguments)


def channels_of(s: argparse.Namespace) -> int:
    """Return the number of channels of the images."""
    return s.in_chans if s.in_chans is not None else s.input_size[0] if s.input_size else 3


def _check_model(recipe: Recipe, build: bool) -> Optional[nn.Module]:
    """Check the model's name, arguments and image sizes; return the model without memory, None if it can't be built."""
    s, name = recipe.settings, _model_name(recipe)
    unknown = [key for key in s.model_kwargs if key.startswith(OPTION_PREFIX) and key not in _ZZZ_OPTIONS]
    for key in unknown:
        recipe.error(f'model_kwargs.{key}', f'no option of a ZZZ head{nearest(key, _ZZZ_OPTIONS)}')
    if unknown:
        asked = _zzz_key(recipe)
        recipe.drop([f'model_kwargs.{key}' for key in unknown])
        if asked and not _zzz_key(recipe):  # the recipe still asks for a head
            recipe.values['model_kwargs'].update(zzz_rank=1)
        s = recipe.settings
    if name is None:
        return None
    architecture, _, tag = name.partition('.')
    known = name in (architecture, *get_arch_pretrained_cfgs(architecture))
    problem = ''
    if '/' in name:
        problem = f'no name of a model; of a repository it would be hf-hub:{name}'
    elif not is_model(architecture):
        problem = f'timm knows no {architecture}{did_you_mean(name)}'
    elif not known and not asks_for_head(tag):  # the plugin reports errors in its own tags
        tags = [other.partition('.')[2] for other in get_arch_pretrained_cfgs(architecture)]
        tags = [tag for tag in tags if not TAG.fullmatch(tag)]
        problem = f'timm knows no weights {tag} of {architecture}{nearest(tag, tags, 3)}'
    if problem:
        recipe.error('model', problem)
        recipe.drop(['model'])
        return None
    base = name.partition(f'.{OPTION_PREFIX}')[0]
    if known and s.pretrained and not s.pretrained_path and not is_model_pretrained(base):
        recipe.error('pretrained', f'timm has no weights for {base}')
    if recipe.is_wrong('model_kwargs') or (known and not build):
        return None
    keys = {**{f'model_kwargs.{key}': key for key in s.model_kwargs}, **FACTS['model_arguments']}
    model = _attempt(recipe, lambda s: _create(recipe, name, s), keys, 'model')
    if model is None:
        recipe.drop(['model'])
        return None
    if architecture in get_deprecated_models():
        present = '.'.join(filter(None, (model.pretrained_cfg['architecture'], model.pretrained_cfg.get('tag'))))
        recipe.note('model', f'a deprecated name; the present one is {present}')
    _check_sizes(recipe, name, model)
    return model


def model_arguments(s: argparse.Namespace) -> Dict[str, Any]:
    """Collect the arguments that train.py passes to create_model, except those for weights.

    Raises:
        ValueError: If model_kwargs repeats an argument that train.py passes.
    """
    arguments = {argument: getattr(s, key) for key, argument in FACTS['model_arguments'].items()}
    arguments['in_chans'] = channels_of(s)
    own = {*arguments, 'pretrained', 'checkpoint_path', *(['pretrained_cfg_overlay'] if s.pretrained_path else [])}
    repeated = sorted(s.model_kwargs.keys() & own)
    if repeated:
        raise ValueError(f'model_kwargs: {", ".join(repeated)} has an option of its own, and train.py passes both')
    return {**arguments, **s.model_kwargs}


def _create(recipe: Recipe, name: str, s: argparse.Namespace) -> nn.Module:
    """Build the model of train.py without memory and weights."""
    arguments = model_arguments(s)
    arguments['num_classes'] = max(s.num_classes or 2, 1)  # None: it will come from the command line
    fit = [arguments.pop(key) for key in s.model_kwargs if key.startswith(FIT_PREFIX)]
    if fit and not TAG.fullmatch(name.partition('.')[2]):  # zzz_fit asks for a ZZZ head
        arguments.setdefault(f'{OPTION_PREFIX}rank', DEFAULT_RANK)
    arguments.pop('device', None)
    resolve: Any = getattr(timm.models, 'resolve_model_input_args', None)  # in timm since 1.0.31, like such scripts
    if recipe.script.resizes_model and resolve is not None:
        arguments = resolve(name, vars(s), **arguments)
        name = arguments.pop('model_name')
    with torch.device('meta'):
        return timm.create_model(name, **arguments).eval()


def _check_sizes(recipe: Recipe, name: str, model: Any) -> None:
    s = recipe.settings
    keys = [key for key in ('input_size', 'img_size') if getattr(s, key)]
    keys += [f'model_kwargs.{key}' for key in s.model_kwargs if not key.startswith(OPTION_PREFIX)]
    training = s.train_img_sizes or []
    if s.naflex_loader or not (keys or training):
        return
    given = {key: getattr(s, key) for key in ('input_size', 'img_size', 'in_chans')}
    channels, *size = resolve_data_config(given, model=model)['input_size']

    def refusal(size: Sequence[int], model_kwargs: Optional[Dict[str, Any]] = None) -> str:
        """Return the error of the model, or of one with other arguments, for images of a size; '' if there is none."""
        try:
            changed = argparse.Namespace(**{**vars(s), 'model_kwargs': model_kwargs})
            taker = model if model_kwargs is None else _create(recipe, name, changed)
            with torch.no_grad():
                taker(torch.empty(1, channels, *size, device='meta'))
        except Exception as e:  # a model may raise anything for a size
            return reason(e)
        return ''

    for where, (height, width) in [((*keys, 'model')[0], size), *(('train_img_sizes', (n, n)) for n in training)]:
        problem = refusal((height, width))
        if not problem:
            continue
        if refusal(model.pretrained_cfg['input_size'][1:], {}):
            return  # a model that does not run on the meta device can't be checked
        img_size = height if height == width else [height, width]
        if 'img_size' not in s.model_kwargs:
            fits = not refusal((height, width), {**s.model_kwargs, 'img_size': img_size})
            hint = f'; add model_kwargs: {{img_size: {img_size}}}' if fits else ''
        else:
            hint = '' if s.img_size else f'; train.py needs img_size: {s.model_kwargs["img_size"]} too'
        recipe.error(where, f'images of {height} x {width} do not fit {name}: {problem}{hint}')


def _check_fit(recipe: Recipe, model: Optional[nn.Module]) -> None:
    """Check the options of the fit by create_model, which does not get train.py's options for images."""
    s, key = recipe.settings, f'model_kwargs.{FIT_PREFIX}'
    fit = {name: value for name, value in s.model_kwargs.items() if name.startswith(FIT_PREFIX)}
    if not fit:
        return
    preset = fit.get(f'{FIT_PREFIX}_preset', 'finetune')
    if preset not in list(PRESETS):  # a list, since YAML values may be unhashable
        recipe.error(f'{key}_preset', f'{preset!r} is none of {", ".join(map(repr, PRESETS))}')
    if FIT_PREFIX not in fit:
        recipe.error(f'model_kwargs.{min(fit)}', f'it goes with {FIT_PREFIX}, the images to fit to')
        return
    if not (s.pretrained or s.pretrained_path):
        recipe.error(key, 'without pretrained: true the heads are fitted to what a random backbone says')
    if s.head_init_bias is not None:
        recipe.error('head_init_bias', 'it replaces the biases of the fit')
    for name in ('initial_checkpoint', 'resume'):
        if getattr(s, name):
            recipe.note(key, f'the head of {name} takes the place of what is fitted: leave it out')
    try:
        images = {'class_map': None, **settings_of(fit[FIT_PREFIX])}
        images['class_map'] = fit.get(NAMES.class_map, images['class_map'])
        _check_fitted_images(recipe, images)
    except (ValueError, OSError) as e:
        recipe.error(key, reason(e).removeprefix(f'{FIT_PREFIX}: '))
    if model is not None:
        _check_fitted_size(recipe, model)


def _check_fitted_images(recipe: Recipe, images: Dict[str, Any]) -> None:
    """Compare classes and numbering of the images of the fit, given as arguments of open_split, with training."""
    s, key = recipe.settings, f'model_kwargs.{FIT_PREFIX}'
    dataset, class_map, mapped = images.get('dataset', ''), images['class_map'], f'model_kwargs.{NAMES.class_map}'
    if dataset != (s.dataset or ''):
        recipe.error(key, f'the classes of {dataset or "a folder"} may have other numbers than those of {s.dataset!r}')
        return
    split = images['split'] or os.path.basename(os.path.normpath(str(images['data_dir'])))
    if split == s.val_split and split != s.train_split:
        recipe.error(key, f'fitted to the images of val_split, {split}')
    elif dataset and split != s.train_split:
        recipe.note(key, f'fitted to {split}, trained on {s.train_split}')
    names = class_map if isinstance(class_map, list) else [class_map or '']
    if not all(isinstance(name, str) for name in names):
        recipe.error(key, f'a class map is a file or a list of names, not {shorten(str(class_map), 60)}')
        return
    if (class_map is None) != (not s.class_map):
        given = s.class_map or class_map
        without = f'model_kwargs needs {NAMES.class_map}: {given}' if s.class_map else f'class_map: {given} is needed'
        recipe.error(mapped if class_map else key, f'training and the fit number the classes differently; {without}')
        return
    names = read_class_map(class_map, NAMES.class_map) if isinstance(class_map, str) else class_map or []
    trained = _class_map_file(s)
    others = read_class_map(trained) if names and trained else None
    if not dataset and not names:
        names = open_split(**images, names=NAMES).class_names
        root = os.path.join(s.data_dir or s.data or '', '')
        if os.path.isdir(root) and not recipe.is_wrong('train_split'):
            others = open_split(root, s.train_split).class_names
    if names and others and list(names) != others:
        differing = [name for name in names if name not in others] or [name for name in others if name not in names]
        about = f': {some(sorted(differing))}' if differing else ', in another order'
        recipe.error(mapped if class_map else key, f'its classes are not those of training{about}')
    elif names and s.num_classes is not None and len(names) != s.num_classes:
        recipe.error(key, f'{len(names)} classes, num_classes says {s.num_classes}')


def _check_fitted_size(recipe: Recipe, model: nn.Module) -> None:
    """Compare the preprocessing of the fit, which is the model's own, with that of train.py."""
    s, key, name = recipe.settings, f'model_kwargs.{FIT_PREFIX}', _model_name(recipe) or ''
    try:
        fitted, trained = input_config(model), resolve_data_config(dict(vars(s)), model=model)
    except Exception:  # wrong settings are reported elsewhere
        return
    changes = {k: list(v) if isinstance(v, tuple) else v for k, v in trained.items() if v != fitted[k]}
    for k in ('mean', 'std'):  # for grey images one of them has one number and the other three
        if len(fitted[k]) != len(trained[k]):
            changes.pop(k, None)
    (height, width), own = trained['input_size'][1:], fitted['input_size'][1:]
    if own == (height, width):
        changes.pop('input_size', None)
    if not changes:
        return
    overlay = {**(s.model_kwargs.get('pretrained_cfg_overlay') or {}), **changes}
    if s.pretrained_path:
        overlay.update(file=s.pretrained_path, num_classes=-1)
    add = f'pretrained_cfg_overlay: {_flow(overlay)}'
    if 'input_size' in changes:
        img_size = height if height == width else [height, width]
        with suppress(Exception):  # the model may not have this argument
            other = argparse.Namespace(**{**vars(s), 'model_kwargs': {**s.model_kwargs, 'img_size': img_size}})
            if input_config(_create(recipe, name, other))['input_size'][1:] == (height, width):
                add = f'img_size: {img_size}'
    add = f'add model_kwargs: {{{add}}}' + (
        ' in place of pretrained_path' if 'overlay' in add and s.pretrained_path else ''
    )
    if 'input_size' in changes:
        recipe.error(key, f'the fit runs at {own[0]} x {own[1]}, training at {height} x {width}; {add}')
    else:
        differing = ', '.join(f'{k} {fitted[k]}' for k in changes)
        recipe.note(key, f'the fit prepares images with {differing}, unlike training; {add}')


def _flow(value: Any) -> str:
    """Write a value as YAML in one line."""
    return yaml.safe_dump(json.loads(json.dumps(value)), default_flow_style=True, width=1000, sort_keys=False).strip()


def _parameters(optimizer: Any) -> Set[str]:
    """List the arguments of an optimiser, including those of its base classes."""
    names = {name for cls in inspect.getmro(optimizer) for name in inspect.signature(cls).parameters}
    return names - {'params', 'defaults', 'args', 'kwargs', 'lr'}


def _check_optimizer(recipe: Recipe, model: Optional[nn.Module]) -> None:
    """Check the optimiser, its options and the schedule; a small module stands in for a model that was not built."""
    s, names = recipe.settings, [str(name) for name in list_optimizers()]
    name = s.opt.lower().removeprefix('lookahead_')
    optimizer = None
    if name not in names:
        recipe.error('opt', f'timm knows no {s.opt}{nearest(s.opt.lower(), names)}')
    elif torch.cuda.is_available() or not name.startswith(('bnb', 'fused')):  # these need a GPU even to be looked up
        known = _parameters(get_optimizer_class(name, bind_defaults=False))
        unknown = s.opt_kwargs.keys() - known - inspect.signature(create_optimizer_v2).parameters.keys()
        if not recipe.is_wrong('opt'):
            for key in unknown:
                recipe.error(f'opt_kwargs.{key}', f'no option of {name}{nearest(key, sorted(known))}')
            recipe.drop([f'opt_kwargs.{key}' for key in unknown])
            zzz = _zzz_key(recipe) or (name == OPTIMIZER and _model_name(recipe) is None)
            stand_in = ZZZHead(2, 2, 1) if zzz else nn.Linear(2, 2)

            def create(s: argparse.Namespace) -> Any:
                arguments = {**optimizer_kwargs(s), 'lr': s.lr or s.lr_base}
                if model is None:
                    arguments.pop('layer_decay', None)
                return create_optimizer_v2(stand_in if model is None else model, **arguments, **s.opt_kwargs)

            keys = {**{f'opt_kwargs.{key}': key for key in recipe.settings.opt_kwargs}, **FACTS['optimizer_arguments']}
            optimizer = _attempt(recipe, create, keys, 'opt')
    optimizer = optimizer or torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    keys = {key: key for key in chain(*FACTS['schedule'])}
    _attempt(recipe, partial(_create_scheduler, optimizer), keys, 'sched')
    _check_lr(recipe, name)
    scale = s.opt_kwargs.get('head_lr_scale', 1)
    for key, value in (('warmup_lr', s.warmup_epochs and s.warmup_lr), ('min_lr', s.min_lr)):
        if value and name == OPTIMIZER and isinstance(scale, int | float) and scale != 1:
            where = recipe.first(key, 'opt_kwargs.head_lr_scale')
            recipe.note(where, f'{key} is {value:g}, and {value * scale:g} for the head; write {key}: 0.0')


def _create_scheduler(optimizer: torch.optim.Optimizer, s: argparse.Namespace) -> Any:
    scheduler, _ = create_scheduler_v2(optimizer, **scheduler_kwargs(s), updates_per_epoch=1)
    if scheduler is None and s.sched != 'none':  # timm itself raises since 1.0.31
        raise ValueError(f"Unknown scheduler '{s.sched}'")
    return scheduler


def _check_lr(recipe: Recipe, optimizer: str) -> None:
    """Note a learning rate too large for Adam and its variants, whose updates do not shrink with the gradient."""
    s, scale = recipe.settings, recipe.settings.opt_kwargs.get('head_lr_scale', 1)
    if not re.search('adam|adan|adopt|adabelief|lion', optimizer):
        return
    where, lr = 'lr', s.lr
    if lr is None and 'lr_base' in recipe.values:  # as train.py computes it, for one process
        ratio = s.batch_size * s.grad_accum_steps / s.lr_base_size
        linear = (s.lr_base_scale or ('sqrt' if 'ada' in optimizer else 'linear')) == 'linear'
        where, lr = 'lr_base', s.lr_base * (ratio if linear else ratio**0.5)
    why = f'large for {optimizer}: each update moves weights by about as much, and they are of the order of 0.02'
    if lr is not None and lr > MAX_LR:
        recipe.note(where, f'a learning rate of {lr:g} is {why}')
    elif lr is not None and optimizer == OPTIMIZER and isinstance(scale, int | float) and lr * scale > MAX_LR:
        where = recipe.first('opt_kwargs.head_lr_scale', where)
        recipe.note(where, f'a learning rate of {lr * scale:g} for the head is {why}')


def main(arguments: Optional[List[str]] = None) -> int:
    """Run the command; return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    script_help = 'take the options from this train.py: it is imported (its top level runs), it does not train; the'
    script_help = f"{script_help} default is timm's newest, from this package"
    first.add_argument('--train-script', metavar='PATH', help=script_help)
    with exit_on_error(first):
        path = first.parse_known_args(arguments)[0].train_script
        script = ask_script(path) if path else NEWEST
        parser = TrainParser(
            script.options,
            parents=[first],
            prog=f'python -m {PLUGIN} check-hparams',
            usage='%(prog)s FILE... [options of train.py]',
            description=(__doc__ or '').replace('``', ''),
        )
        add = parser.add_argument
        add('files', nargs='*', metavar='FILE', help='recipe for train.py --config')
        add('--config', '-c', metavar='FILE', help='a further recipe, as for train.py')
        add('--no-model', action='store_true', help="don't build the model: no check of arguments and sizes")
        add('--print-options', action='store_true', help='print the options as YAML instead')
        args = parser.parse_args(arguments)
        files = [*args.files, *filter(None, [args.config])]
        if not files and not args.print_options:
            parser.error('no FILE to check')
    if args.print_options:
        print(script.dump(), end='')
        return 0
    given = {key: value for key, value in vars(args).items() if key in script.options}
    levels: List[str] = []
    for path in files:
        findings = check(path, script, not args.no_model, given)
        for line, level, message in findings:
            print(f'{path}{"" if line is None else f":{line}"}: {level}: {message}')
        if not any(finding.level == 'error' for finding in findings):
            print(f'{path}: OK')
        levels += [finding.level for finding in findings]
    if levels:
        counts = ((levels.count('error'), 'error'), (levels.count('note'), 'note'), (len(files), 'file'))
        errors, notes, files_ = (f'{n} {word}{"s" * (n != 1)}' for n, word in counts)
        print(f'{errors}, {notes} in {files_}')
    return int('error' in levels)
