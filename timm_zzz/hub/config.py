"""What a repository's config.json and weights may hold, checked before a model is built from them."""

import hashlib
import json
import logging
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, Dict, Sequence, Tuple

import safetensors
import timm
import torch
from timm.models import PretrainedCfg

from ..errors import CheckpointError, ConfigError
from ..models.attach import HEAD_OPTIONS, OPTION_PREFIX, find_classifiers
from ..models.registry import SOURCE_KEYS, TAG

__all__ = ['check_weights', 'read_config', 'sha256', 'some', 'Corrupt', 'CONFIG', 'WEIGHTS', 'SECTION']

_logger = logging.getLogger(__name__)

CONFIG = 'config.json'
WEIGHTS = 'model.safetensors'
SECTION = 'timm_zzz'  # of config.json

MAX_CLASSES = 1_000_000
_MAX_INT = 10_000  # any other size that a config may ask for
_MAX_CONFIG_BYTES = 256 * 2**20  # a million class names fit

# Constructor arguments that a config may set: what a user of create_model gives that changes parameters or their use.
# Not among them are arguments that size the backbone, which the architecture's name fixes, those that timm's builder
# acts on (features_only, out_indices, pretrained_*, ...) and where the model is put (device, dtype).
_MODEL_ARGS = frozenset(
    'num_classes in_chans img_size global_pool act_layer aa_layer always_partition attn_drop_rate bn_eps '
    'bn_momentum bn_tf class_token conv_mlp drop_block_rate drop_path_rate drop_rate dynamic_img_pad '
    'dynamic_img_size fc_norm final_norm head_bias head_init_scale init_values layer_scale_init_value '
    'ls_init_value no_embed_class norm_eps norm_layer output_stride pad_type patch_drop_rate patch_size '
    'pos_drop_rate pos_embed pre_norm proj_bias proj_drop_rate qk_norm qkv_bias ref_feat_shape reg_tokens '
    'rope_type scale_attn_norm scale_mlp_norm stem_type strict_img_size use_fc_norm use_naflex weight_init '
    'window_size zero_init_last'.split()
) | {f'{OPTION_PREFIX}{name}' for name in HEAD_OPTIONS}
_CONFIG_KEYS = frozenset(
    'architecture num_classes num_features global_pool label_names label_descriptions model_args pretrained_cfg'.split()
) | {SECTION}
_CFG_KEYS = frozenset(f.name for f in fields(PretrainedCfg)) - {'architecture'}


class Corrupt(CheckpointError):
    """The bytes of the weights are wrong, which a new download may mend."""


def read_config(path: Path) -> Dict[str, Any]:
    """Read config.json and refuse everything in it that does not belong to a ZZZ model."""
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise ConfigError(f'{path}: larger than {_MAX_CONFIG_BYTES} bytes')
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
    unknown = sorted(map(str, config.keys() - _CONFIG_KEYS))
    if unknown:
        raise ValueError(f'unknown keys {some(unknown)}')
    architecture = config.get('architecture')
    if not isinstance(architecture, str) or '.' in architecture or not timm.is_model(architecture):
        raise ValueError(f'architecture: timm knows no {_short(architecture)}')
    args = config.get('model_args', {})
    cfg = config['pretrained_cfg']
    if not isinstance(args, dict):
        raise ValueError('model_args: expected an object')
    unknown = sorted(map(str, args.keys() - _MODEL_ARGS))
    if unknown:
        raise ValueError(f'model_args: {some(unknown)} is not allowed there')
    tag = cfg.get('tag')
    if 'zzz_rank' not in args and not TAG.fullmatch(str(tag)):
        raise ValueError('no zzz_rank: not a model with a ZZZ head')
    for key, value in args.items():
        _check_value(f'model_args.{key}', value, MAX_CLASSES if key == 'num_classes' else _MAX_INT)
    unknown = sorted(map(str, cfg.keys() - _CFG_KEYS))
    if unknown:
        raise ValueError(f'pretrained_cfg: unknown keys {some(unknown)}')
    sources = sorted(key for key in (*SOURCE_KEYS, 'custom_load') if cfg.get(key))
    if sources:
        raise ValueError(f'pretrained_cfg: {some(sources)} would take the weights from elsewhere')
    counts = {where.get('num_classes') for where in (config, cfg, args) if 'num_classes' in where}
    if len(counts) != 1 or not all(isinstance(n, int) and 0 <= n <= MAX_CLASSES for n in counts):
        raise ValueError(f'num_classes: expected one number between 0 and {MAX_CLASSES}, got {_short(sorted(counts))}')
    for key in ('input_size', 'test_input_size', 'min_input_size'):
        size = cfg.get(key)
        if size is not None and not (isinstance(size, list) and len(size) == 3 and all(_is_size(n) for n in size)):
            raise ValueError(f'pretrained_cfg.{key}: expected three sizes from 1 to {_MAX_INT}, got {_short(size)}')
    rank = args.get('zzz_rank', 0)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
        raise ValueError(f'zzz_rank: expected an int >= 0, got {_short(rank)}')
    for key in ('label_names', 'label_descriptions', SECTION):
        if not isinstance(config.get(key, {}), (dict, list) if key == 'label_names' else dict):
            raise ValueError(f'{key}: got {_short(config[key])}')
    digest = config.get(SECTION, {}).get('weights_sha256', '0' * 64)
    if not isinstance(digest, str) or not re.fullmatch('[0-9a-f]{64}', digest):
        raise ValueError(f'{SECTION}.weights_sha256: got {_short(digest)}')


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MAX_INT


def _check_value(name: str, value: Any, maximum: int, depth: int = 0) -> None:
    if isinstance(value, (list, tuple)) and depth < 2 and len(value) <= 16:
        for item in value:
            _check_value(name, item, maximum, depth + 1)
    elif isinstance(value, (int, float)):
        if not math.isfinite(value) or abs(value) > maximum:
            raise ValueError(f'{name}: expected at most {maximum}, got {_short(value)}')
    elif not (value is None or isinstance(value, str) and len(value) <= 100):
        raise ValueError(f'{name}: got {_short(value)}')


def check_weights(folder: Path, config: Dict[str, Any]) -> None:
    """Hold the weights of a folder against its config, which has been read: shapes first, then the SHA-256.

    Raises:
        Corrupt: If the file is incomplete or its bytes are not those that were written.
        CheckpointError: If it holds another model.
        ConfigError: If no model can be built from the config.
    """
    _check_shapes(folder, config, _read_shapes(folder / WEIGHTS))
    expected = config.get(SECTION, {}).get('weights_sha256')
    if expected is None:
        _logger.info(f'{folder}: {CONFIG} has no SHA-256 of the weights, so they were not compared with it.')
    elif sha256(folder / WEIGHTS) != expected:
        raise Corrupt(f'the SHA-256 of {WEIGHTS} is not the one in {CONFIG}: the file was changed')


def _read_shapes(path: Path) -> Dict[str, Tuple[int, ...]]:
    """Shapes of the tensors in a safetensors file, from its header alone."""
    try:
        with safetensors.safe_open(path, 'pt') as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    except safetensors.SafetensorError as e:
        raise Corrupt(f'{path.name} is not a complete safetensors file: {e}') from e


def _check_shapes(folder: Path, config: Dict[str, Any], shapes: Dict[str, Tuple[int, ...]]) -> None:
    """Hold the shapes in the file against a model without memory, built from the config."""
    try:
        with torch.device('meta'):
            model: Any = timm.create_model(f'local-dir:{folder}')
    except (TypeError, ValueError, RuntimeError, AssertionError) as e:
        raise ConfigError(f'{folder / CONFIG} does not describe a model: {e}') from e
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    heads = tuple(f'{path}.' for path in find_classifiers(model))
    if not hasattr(model, 'zzz_options') or config['num_classes'] and not heads:
        raise ConfigError(f'{folder / CONFIG} describes a model without a ZZZ head')
    wrong = [
        f'{key} {list(shapes[key])}, expected {list(shape)}'
        for key, shape in expected.items()
        if key in shapes and shapes[key] != shape
    ]
    wrong += [f'no {key}' for key in expected if key not in shapes and key.startswith(heads)]
    wrong += [f'unexpected {key}' for key in shapes if key not in expected and key.startswith(heads)]
    if wrong:
        raise CheckpointError(f'{folder / WEIGHTS} does not hold the model of {CONFIG}: {some(wrong)}')
    sizes = [sum(map(math.prod, each.values())) for each in (expected, shapes)]
    if sizes[0] > 2 * sizes[1]:
        raise CheckpointError(
            f'{folder / WEIGHTS} has {sizes[1]} values, the model that {CONFIG} describes has {sizes[0]}'
        )


def sha256(path: Path) -> str:
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def some(items: Sequence[str], count: int = 3) -> str:
    return ', '.join(items[:count]) + (f' and {len(items) - count} more' if len(items) > count else '')


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f'{text[:57]}...'
