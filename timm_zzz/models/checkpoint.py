"""Build a model with a ZZZ head and load weights into it; errors name the model or the file that is wrong."""

from typing import Any, Mapping, Optional

import timm
from torch import Tensor, nn

from ..head import heads_of, same_shape
from .registry import did_you_mean

__all__ = ['build_model', 'load_weights']


def build_model(
    name: str,
    /,
    *,
    pretrained: bool = False,
    pretrained_path: Optional[str] = None,
    any_head: bool = False,
    **kwargs: Any,
) -> Any:
    """Create a model as timm's train.py does.

    Args:
        name: timm's name of a model with a ZZZ head.
        pretrained: Load timm's weights.
        pretrained_path: Load such weights from a file, as ``train.py --pretrained-path`` does.
        any_head: Accept a model without a ZZZ head, too.
        kwargs: Further arguments of ``timm.create_model``.

    Raises:
        ValueError: If timm can't build the model, or it has no ZZZ head.
    """
    if pretrained_path:
        kwargs['pretrained_cfg_overlay'] = dict(file=pretrained_path, num_classes=-1)
    try:
        model = timm.create_model(name, pretrained=pretrained or bool(pretrained_path), **kwargs)
    except Exception as e:  # the arguments come from a file or a command line
        raise ValueError(f'{name}: {e}{did_you_mean(name)}') from e
    if not any_head and not heads_of(model):
        raise ValueError(f'--model: {name} has no ZZZ head; append .zzz_r8 to its name')
    return model


def load_weights(model: nn.Module, state: Mapping[str, Tensor], source: str, *, keep_heads: bool = False) -> None:
    """Load a whole state dict into a model.

    Args:
        source: Name of the state dict in error messages.
        keep_heads: Leave a head unchanged if the state dict has none for it, or one of another kind or size.

    Raises:
        ValueError: If the state dict does not fit the model.
    """
    kept, own = dict(state), model.state_dict()
    heads = tuple(f'{path}.' for path in heads_of(model)) if keep_heads else ()
    for head in heads:
        found = [key for key in kept if key.startswith(head)]
        if any(key not in own or not same_shape(key, kept[key].shape, own[key].shape) for key in found):
            kept = {key: value for key, value in kept.items() if key not in found}
    try:
        missing, unexpected = model.load_state_dict(kept, strict=not keep_heads)
    except RuntimeError as e:
        raise ValueError(f'{source} does not fit the model: {e}') from e
    missing = [key for key in missing if not key.startswith(heads)]
    if missing or unexpected:
        count = f'{len(missing)} tensors are missing and {len(unexpected)} unexpected'
        raise ValueError(f'{source} does not fit the model: {count}, e.g. {[*missing, *unexpected][0]}')
