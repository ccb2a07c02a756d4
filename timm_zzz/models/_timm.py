"""Access private names of timm, and provide for older versions what timm has since 1.0.31.

tests/models/test_timm_names.py lists all private names that the package uses. Those here are:

- ``_model_args`` of a model: the keyword arguments of ``create_model`` that built it; timm writes them to config.json.
- ``default_cfgs`` of a module of models: configurations of weights by architecture and tag, for ``register_model``.
- ``_model_entrypoints`` of the registry: the functions that build models, by name; the only access to deprecated names.
"""

import sys
from inspect import signature
from pathlib import Path
from typing import Any, Callable, Dict, Optional, cast

import timm
from torch import nn

__all__ = [
    'SAVES_ARGS',
    'default_cfgs',
    'entrypoints',
    'input_config',
    'model_args',
    'record_args',
    'recorded_args',
    'recording_all_but',
    'save',
]

# Whether timm's save_for_hf writes the recorded arguments and the preprocessing
SAVES_ARGS = 'data_config' in signature(timm.models.save_for_hf).parameters
_NOT_RECORDED = {*signature(timm.create_model).parameters, 'device', 'dtype', 'pretrained_model_args'}


def model_args(kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """Return the keyword arguments of an entrypoint that ``create_model`` records since timm 1.0.31."""
    return {key: value for key, value in kwargs.items() if key not in _NOT_RECORDED}


def recorded_args(model: nn.Module) -> Optional[Dict[str, Any]]:
    """Return the ``create_model`` arguments recorded on a model; None if it was not made by ``create_model``."""
    args: Any = getattr(model, '_model_args', None)
    return None if args is None else dict(args)


def record_args(model: nn.Module, args: Dict[str, Any]) -> None:
    """Record further arguments, which timm passes to ``create_model`` when it loads the model from config.json."""
    target: Any = model
    target._model_args = dict(recorded_args(model) or {}, **args)


def recording_all_but(prefix: str) -> Dict[str, Any]:
    """Return attributes for a model's class that keep timm from recording arguments with a prefix."""

    def get(model: Any) -> Dict[str, Any]:
        if '_model_args' not in model.__dict__:
            raise AttributeError
        args: Dict[str, Any] = model.__dict__['_model_args']
        return args

    def put(model: Any, args: Dict[str, Any]) -> None:
        model.__dict__['_model_args'] = {key: value for key, value in args.items() if not key.startswith(prefix)}

    return dict(_model_args=property(get, put), __jit_unused_properties__=['_model_args'])


def default_cfgs(entrypoint: Callable[..., Any]) -> Dict[str, Any]:
    """Return timm's own dict of configurations in the module of an entrypoint, keyed by architecture."""
    return getattr(sys.modules[entrypoint.__module__], 'default_cfgs', {})


def entrypoints() -> Dict[str, Callable[..., Any]]:
    """Return timm's own dict of entrypoints by name, deprecated ones included."""
    from timm.models._registry import _model_entrypoints

    return _model_entrypoints


def input_config(
    model: nn.Module, data_config: Optional[Dict[str, Any]] = None, args: Optional[Dict[str, Any]] = None
) -> Dict[str, Any]:
    """Resolve the preprocessing of a model; its channels and size may differ from those of its weights.

    Args:
        data_config: Settings that replace the model's.
        args: Arguments that build the model; those recorded if None.
    """
    resolve: Any = getattr(timm.data, 'resolve_input_data_config', None)
    if resolve is not None:
        return resolve(model, data_config)
    args, cfg = args or recorded_args(model) or {}, dict(cast(Any, model).pretrained_cfg)
    channels, size = args.get('in_chans') or cfg['input_size'][0], args.get('img_size') or cfg['input_size'][1:]
    cfg['input_size'] = (channels, *((size, size) if isinstance(size, int) else size))
    for key in ('mean', 'std'):
        if len(cfg[key]) not in (1, channels):
            cfg[key] = (sum(cfg[key]) / len(cfg[key]),) * channels
    return timm.data.resolve_data_config(data_config or {}, pretrained_cfg=cfg)


def save(
    model: nn.Module,
    folder: Path,
    config: Dict[str, Any],
    args: Optional[Dict[str, Any]],
    data_config: Optional[Dict[str, Any]],
) -> Dict[str, Any]:
    """Write weights and config.json as ``save_for_hf`` does since timm 1.0.31.

    Args:
        config: Further entries of config.json, ``pretrained_cfg`` included.
        args: Arguments of ``create_model`` that replace recorded ones.
        data_config: Preprocessing settings that replace the model's.

    Returns:
        Entries that the written ``pretrained_cfg`` still lacks.
    """
    if SAVES_ARGS:
        timm.models.save_for_hf(model, str(folder), config, args, safe_serialization=True, data_config=data_config)
        return {}
    args = dict(dict(recorded_args(model) or {}, num_classes=model.num_classes), **(args or {}))
    cfg = dict(input_config(model, data_config, args), **config.pop('pretrained_cfg'))
    timm.models.save_for_hf(model, str(folder), config, args, safe_serialization=True)
    if data_config:  # recommended test settings would override it
        cfg.update(test_input_size=None, test_crop_pct=None)
    return dict(cfg, num_classes=model.num_classes, custom_load=False)
