"""What the models use of timm beyond its public interface; tests/models/test_timm_names.py says what else there is.

Also what timm has from 1.0.31 on and this package needs before.

``_model_args`` of a model: the keyword arguments that ``create_model`` built it with; timm writes them to config.json.
``default_cfgs`` of a module of models: what its weights need, by architecture and tag; ``register_model`` reads it.
``_model_entrypoints`` of the registry: the functions that build models, by name; deprecated names have no other way in.
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

# Whether timm's save_for_hf writes the recorded arguments, and the preprocessing
SAVES_ARGS = 'data_config' in signature(timm.models.save_for_hf).parameters
_NOT_RECORDED = {*signature(timm.create_model).parameters, 'device', 'dtype', 'pretrained_model_args'}


def model_args(kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """Of an entrypoint's keyword arguments those that ``create_model`` records, which it does from timm 1.0.31 on."""
    return {key: value for key, value in kwargs.items() if key not in _NOT_RECORDED}


def recorded_args(model: nn.Module) -> Optional[Dict[str, Any]]:
    """The arguments of ``create_model`` that a model has recorded; None if it was not made by ``create_model``."""
    args: Any = getattr(model, '_model_args', None)
    return None if args is None else dict(args)


def record_args(model: nn.Module, args: Dict[str, Any]) -> None:
    """Add arguments to those that timm passes to ``create_model`` when it loads the model from its config.json."""
    target: Any = model
    target._model_args = dict(recorded_args(model) or {}, **args)


def recording_all_but(prefix: str) -> Dict[str, Any]:
    """Return attributes of a model's class that leave out arguments by their prefix: timm records all of them."""

    def get(model: Any) -> Dict[str, Any]:
        if '_model_args' not in model.__dict__:
            raise AttributeError
        args: Dict[str, Any] = model.__dict__['_model_args']
        return args

    def put(model: Any, args: Dict[str, Any]) -> None:
        model.__dict__['_model_args'] = {key: value for key, value in args.items() if not key.startswith(prefix)}

    return dict(_model_args=property(get, put), __jit_unused_properties__=['_model_args'])


def default_cfgs(entrypoint: Callable[..., Any]) -> Dict[str, Any]:
    """The configurations in the module of an entrypoint, by architecture; the dict itself, to be added to."""
    return getattr(sys.modules[entrypoint.__module__], 'default_cfgs', {})


def entrypoints() -> Dict[str, Callable[..., Any]]:
    """The entrypoints by name, deprecated ones too; the dict itself, to be added to."""
    from timm.models._registry import _model_entrypoints

    return _model_entrypoints


def input_config(
    model: nn.Module, data_config: Optional[Dict[str, Any]] = None, args: Optional[Dict[str, Any]] = None
) -> Dict[str, Any]:
    """Resolve the preprocessing of a model, which may differ from that of its weights in channels and size.

    Args:
        data_config: What differs from the model's.
        args: Arguments that build the model, if not the recorded ones.
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
    """Write weights and config.json as ``save_for_hf`` does from timm 1.0.31 on.

    Args:
        config: Further entries of config.json, those of pretrained_cfg among them.
        args: Arguments of ``create_model`` in place of the recorded ones.
        data_config: Preprocessing in place of the model's.

    Returns:
        Entries that pretrained_cfg still lacks.
    """
    if SAVES_ARGS:
        timm.models.save_for_hf(model, str(folder), config, args, safe_serialization=True, data_config=data_config)
        return {}
    args = dict(dict(recorded_args(model) or {}, num_classes=model.num_classes), **(args or {}))
    cfg = dict(input_config(model, data_config, args), **config.pop('pretrained_cfg'))
    timm.models.save_for_hf(model, str(folder), config, args, safe_serialization=True)
    if data_config:  # which the recommendations for testing would precede
        cfg.update(test_input_size=None, test_crop_pct=None)
    return dict(cfg, num_classes=model.num_classes, custom_load=False)
