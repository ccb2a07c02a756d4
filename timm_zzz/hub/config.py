"""Check a config.json and weights before a model is built from them."""

import hashlib
import json
import logging
import math
import re
from dataclasses import fields
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, Dict, Iterable, Set, Tuple

import safetensors
import timm
import torch
from timm.models import PretrainedCfg
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import CheckpointError, ConfigError, some
from ..head import same_shape
from ..models.attach import FIT_PREFIX, find_classifiers
from ..models.predict import Percentiles
from ..models.registry import SOURCE_KEYS, TAG

__all__ = [
    'BUILDER_ARGS',
    'CONFIG',
    'PERCENTILES',
    'SECTION',
    'WEIGHTS',
    'Changed',
    'Corrupt',
    'check_weights',
    'is_of_zzz_model',
    'read_config',
    'sha256',
]

_logger = logging.getLogger(__name__)

CONFIG = 'config.json'
WEIGHTS = 'model.safetensors'
SECTION = 'timm_zzz'  # section of config.json
PERCENTILES = 'percentiles'  # key in that section

_MAX_CLASSES = 1_000_000
_MAX_INT = 10_000  # limit of all other sizes in a config
_MAX_CONFIG_BYTES = 256 * 2**20  # enough for a million class names

# Limits for building a model. timm's architectures make up to 14 calls per tensor and have up to 2,000 tensors.
_CALLS_PER_TENSOR = 25
_MAX_TENSORS = 10_000
_MAX_BUFFER = 2**24  # elements of buffers that are not saved, e.g. indices of relative positions

# Arguments of timm's functions that build a model. All others go to the model's class, and their effect on sizes is
# compared with the weights.
BUILDER_ARGS = set('features_only out_indices feature_cls pruned device dtype'.split()).union(
    *(signature(function).parameters for function in (timm.create_model, timm.models.build_model_with_cfg))
)
_CONFIG_KEYS = {SECTION}.union(
    'architecture num_classes num_features global_pool label_names label_descriptions model_args pretrained_cfg'.split()
)
_CFG_KEYS = {f.name for f in fields(PretrainedCfg)} - {'architecture'}


class Corrupt(CheckpointError):
    """The bytes of the weights are wrong; a new download may fix that."""


class Changed(Corrupt):
    """The weights are not those that config.json was written for; the owner of a folder may have changed them."""


def read_config(path: Path) -> Dict[str, Any]:
    """Read a config.json, and refuse keys and values that do not belong to a ZZZ model.

    Raises:
        ConfigError: If the file is not a config.json of timm, or has keys or values that are not allowed.
    """
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise ConfigError(f'{path}: larger than {_MAX_CONFIG_BYTES} bytes')
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as e:
        raise ConfigError(f'{path}: not a JSON file: {e}') from e
    if not isinstance(config, dict) or not isinstance(config.get('pretrained_cfg'), dict):
        raise ConfigError(f'{path}: not a config.json of timm')
    try:
        _check_config(config)
    except ValueError as e:
        raise ConfigError(f'{path}: {e}. Only timm.create_model loads such a model, unchecked.') from e
    return config


def _check_config(config: Dict[str, Any]) -> None:
    args, cfg = config.get('model_args', {}), config['pretrained_cfg']
    unknown = _others(config, _CONFIG_KEYS)
    _refuse(f'unknown keys {unknown}', unknown)
    name = config.get('architecture')
    is_model = isinstance(name, str) and '.' not in name and timm.is_model(name)
    _refuse(f'architecture: timm knows no {_short(name)}', not is_model)
    _refuse('model_args: expected an object', not isinstance(args, dict))
    builders = some(sorted(key for key in args if key in BUILDER_ARGS or key.startswith(FIT_PREFIX)))
    _refuse(f'model_args: {builders} is not allowed there', builders)
    _refuse('no zzz_rank: not a model with a ZZZ head', not _is_zzz(args, cfg))
    for key, value in args.items():
        _check_value(f'model_args.{key}', value, _MAX_CLASSES if key == 'num_classes' else _MAX_INT)
    rank = args.get('zzz_rank', 0)
    _refuse(f'zzz_rank: expected an int >= 0, got {_short(rank)}', not _is_int(rank, 0, _MAX_INT))
    unknown = _others(cfg, _CFG_KEYS)
    _refuse(f'pretrained_cfg: unknown keys {unknown}', unknown)
    sources = some(sorted(key for key in (*SOURCE_KEYS, 'custom_load') if cfg.get(key)))
    _refuse(f'pretrained_cfg: {sources} would take the weights from elsewhere', sources)
    counts = [where['num_classes'] for where in (config, cfg, args) if 'num_classes' in where]
    is_one = counts and all(_is_int(n, 0, _MAX_CLASSES) and n == counts[0] for n in counts)
    _refuse(f'num_classes: expected one number between 0 and {_MAX_CLASSES}, got {_short(counts)}', not is_one)
    for key in ('input_size', 'test_input_size', 'min_input_size'):
        size = cfg.get(key)
        fits = size is None or isinstance(size, list) and [_is_int(n, 1, _MAX_INT) for n in size] == [True] * 3
        _refuse(f'pretrained_cfg.{key}: expected three sizes from 1 to {_MAX_INT}, got {_short(size)}', not fits)
    for key, types in (('label_names', (dict, list)), ('label_descriptions', dict), (SECTION, dict)):
        _refuse(f'{key}: got {_short(config.get(key))}', not isinstance(config.get(key, {}), types))
    digest = config.get(SECTION, {}).get('weights_sha256', '0' * 64)
    is_digest = isinstance(digest, str) and re.fullmatch('[0-9a-f]{64}', digest)
    _refuse(f'{SECTION}.weights_sha256: got {_short(digest)}', not is_digest)
    if PERCENTILES in config.get(SECTION, {}):
        Percentiles.checked(config[SECTION][PERCENTILES])


def _is_zzz(args: Any, cfg: Any) -> bool:
    return 'zzz_rank' in (args or {}) or TAG.fullmatch(str((cfg or {}).get('tag'))) is not None


def is_of_zzz_model(file: Path) -> bool:
    """Tell whether a config.json describes a model with a ZZZ head; False if it can't be read."""
    try:
        config = json.loads(file.read_text(encoding='utf-8'))
        return _is_zzz(config.get('model_args'), config.get('pretrained_cfg'))
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def _refuse(message: str, wrong: Any) -> None:
    if wrong:
        raise ValueError(message)


def _others(keys: Iterable[str], known: Set[str]) -> str:
    return some(sorted({*keys} - known))


def _is_int(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _check_value(name: str, value: Any, maximum: int, depth: int = 0) -> None:
    if isinstance(value, list) and depth < 2 and len(value) <= 16:
        for item in value:
            _check_value(name, item, maximum, depth + 1)
    elif isinstance(value, (int, float)):
        within = math.isfinite(value) and abs(value) <= maximum
        _refuse(f'{name}: expected at most {maximum}, got {_short(value)}', not within)
    else:
        _refuse(
            f'{name}: got {_short(value)}', value is not None and not (isinstance(value, str) and len(value) <= 100)
        )


def check_weights(folder: Path, config: Dict[str, Any], *, check_sha256: bool = True) -> None:
    """Compare the weights in a folder with its config from :func:`read_config`: first shapes, then the SHA-256.

    Raises:
        Corrupt: If the file is incomplete.
        Changed: If its bytes are not those that were written.
        CheckpointError: If it holds the weights of another model.
        ConfigError: If no model can be built from the config.
    """
    try:
        with safetensors.safe_open(folder / WEIGHTS, 'pt') as file:  # reads only the header
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    except safetensors.SafetensorError as e:
        raise Corrupt(f'{WEIGHTS} is not a complete safetensors file: {e}') from e
    _check_shapes(folder, config, shapes)
    expected = config.get(SECTION, {}).get('weights_sha256')
    if expected is None:
        _logger.info(f'{folder}: {CONFIG} has no SHA-256 of the weights, so they were not compared with it.')
    elif check_sha256 and sha256(folder / WEIGHTS) != expected:
        raise Changed(f'the SHA-256 of {WEIGHTS} is not the one in {CONFIG}: the file was changed')


def _check_shapes(folder: Path, config: Dict[str, Any], shapes: Dict[str, Tuple[int, ...]]) -> None:
    """Compare the shapes of a file's tensors with those of a model built from the config on the meta device."""
    size = sum(map(math.prod, shapes.values()))
    too_large = f'{folder / WEIGHTS} has {size} values, the model that {CONFIG} describes has many more'
    budget = _Budget(1000 + _CALLS_PER_TENSOR * min(len(shapes), _MAX_TENSORS), 2 * size + _MAX_BUFFER)
    try:
        with torch.device('meta'), budget:
            model: Any = timm.create_model(f'local-dir:{folder}')
    except Exception as e:  # a model's class may raise anything for unexpected values
        if budget.exceeded:
            raise CheckpointError(too_large) from e
        raise ConfigError(f'{folder / CONFIG} does not describe a model: {e}') from e
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    heads = tuple(f'{path}.' for path in find_classifiers(model))
    if not hasattr(model, 'zzz_options') or config['num_classes'] and not heads:
        raise ConfigError(f'{folder / CONFIG} describes a model without a ZZZ head')
    wrong = [
        f'{key} {list(shapes[key])}, expected {list(shape)}'
        for key, shape in expected.items()
        if not same_shape(key, shapes.get(key, shape), shape)
    ]
    wrong += [f'no {key}' for key in expected if key not in shapes and key.startswith(heads)]
    wrong += [f'unexpected {key}' for key in shapes if key not in expected and key.startswith(heads)]
    if wrong:
        raise CheckpointError(f'{folder / WEIGHTS} does not hold the model of {CONFIG}: {some(wrong)}')
    held = sum(map(math.prod, expected.values())), sum(buffer.nelement() for buffer in model.buffers())
    if held[0] > 2 * size or held[1] > budget.elements:
        raise CheckpointError(too_large)


class _Budget(TorchFunctionMode):
    """Raise a ValueError after a number of calls to torch, or at a tensor with too many elements."""

    def __init__(self, calls: int, elements: int):
        super().__init__()
        self.calls, self.elements, self.exceeded = calls, elements, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls -= 1
        if self.calls < 0 or isinstance(result, Tensor) and result.nelement() > self.elements:
            self.exceeded = True
            raise ValueError
        return result


def sha256(path: Path) -> str:
    """Compute the SHA-256 of a file as a hexadecimal string."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        for block in iter(partial(file.read, 2**20), b''):
            digest.update(block)
    return digest.hexdigest()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f'{text[:57]}...'
