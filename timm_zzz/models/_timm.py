"""What the models use of timm beyond its public interface; tests/models/test_timm_names.py says what else there is.

``_model_args`` of a model: the keyword arguments that ``create_model`` built it with; timm writes them to config.json.
``default_cfgs`` of a module of models: what its weights need, by architecture and tag; ``register_model`` reads it.
``_model_entrypoints`` of the registry: the functions that build models, by name; deprecated names have no other way in.
"""

import sys
from typing import Any, Callable, Dict, Optional

from torch import nn

__all__ = ['default_cfgs', 'entrypoints', 'record_args', 'recorded_args']


def recorded_args(model: nn.Module) -> Optional[Dict[str, Any]]:
    """The arguments of ``create_model`` that a model has recorded; None if it was not made by ``create_model``."""
    args: Any = getattr(model, '_model_args', None)
    return None if args is None else dict(args)


def record_args(model: nn.Module, args: Dict[str, Any]) -> None:
    """Add arguments to those that timm passes to ``create_model`` when it loads the model from its config.json."""
    target: Any = model
    target._model_args = dict(recorded_args(model) or {}, **args)


def default_cfgs(entrypoint: Callable[..., Any]) -> Dict[str, Any]:
    """The configurations in the module of an entrypoint, by architecture; the dict itself, to be added to."""
    return getattr(sys.modules[entrypoint.__module__], 'default_cfgs', {})


def entrypoints() -> Dict[str, Callable[..., Any]]:
    """The entrypoints by name, deprecated ones too; the dict itself, to be added to."""
    from timm.models._registry import _model_entrypoints

    return _model_entrypoints
