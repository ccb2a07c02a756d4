"""Put ZZZ heads in place of the classifier of a timm model."""

import functools
import inspect
from typing import Any, Callable, Dict, Set, Tuple, TypeVar, Union, cast

import torch
from timm.layers import AttentionPool2d, RotAttentionPool2d
from torch import nn

from .head import ZZZConvHead, ZZZHead

__all__ = ['attach', 'find_classifiers', 'HEAD_OPTIONS', 'OPTION_PREFIX', 'SIGMA2_INIT']

ModelT = TypeVar('ModelT', bound=nn.Module)
Classifier = Union[nn.Linear, nn.Conv2d, ZZZHead]

SIGMA2_INIT = 1 / 16
OPTION_PREFIX = 'zzz_'  # of a head's options among a model's

# What a model's creator chooses of a head; the rest follows from the classifier that it replaces and from the machine
_FOLLOWS = ('num_classes', 'feat_dim', 'impl', 'device', 'dtype')
HEAD_OPTIONS = tuple(name for name in inspect.signature(ZZZHead).parameters if name not in _FOLLOWS)


def attach(model: ModelT, rank: int = 8, *, warm_start: bool = True, **head_options: Any) -> ModelT:
    """Put a ZZZ head in place of a timm model's classifier, in place and at the same module path.

    From then on ``model.reset_classifier(n)`` gives a new ZZZ head with the same options, or timm's identity for n = 0.
    The head takes the classifier's device and dtype and the model's train/eval mode. Everything else of the model, its
    pooling, dropout and pre-logits code included, stays as it is.

    Args:
        model: A timm classification model whose classifier is a linear layer or a 1x1 convolution, or a pair of linear
            layers as distilled models have, each of which is replaced. With ``num_classes=0`` there is nothing to
            replace yet; the head comes with ``reset_classifier``.
        rank: Rank of the class covariances, 0 <= rank <= width of the embedding.
        warm_start: Take the class means and the bias from the linear layer's rows and bias; with False, or where the
            rows are zero, start from a new head.
        head_options: Further keyword arguments of :class:`~timm_zzz.ZZZHead`: v_min, sigma2_min, v_init, sigma2_init.
            sigma2_init is 1/16 unless given, not the bare head's 0.69, from which a fine-tuning run is too short to
            bring sigma2 down to where the logits are sharp enough.

    Returns:
        The same model.

    Raises:
        ValueError: If a classifier of the model is not a linear layer fed pooled embeddings, or for an option out of
            its range.
        TypeError: For an unknown option.

    Example:
        >>> import timm
        >>> model = attach(timm.create_model('test_vit', num_classes=5), rank=4)
        >>> model(torch.randn(2, 3, 160, 160)).shape
        torch.Size([2, 5])
    """
    options: Dict[str, Any] = dict(dict(sigma2_init=SIGMA2_INIT), **head_options, rank=rank)
    unknown = sorted(options.keys() - set(HEAD_OPTIONS))
    if unknown:
        raise TypeError(f'Unknown option of a ZZZ head: {", ".join(unknown)} (known: {", ".join(HEAD_OPTIONS)})')
    for path, classifier in find_classifiers(model).items():
        _replace(model, path, classifier, options, warm_start)
    if not isinstance(model, _ZZZModel):
        model.__class__ = _zzz_class(cast(Any, type(model)))
    zzz_model: Any = model
    zzz_model.zzz_options = options
    # What timm writes to config.json to build the model again
    recorded = getattr(model, '_model_args', {})
    zzz_model._model_args = dict(recorded, **{f'{OPTION_PREFIX}{key}': value for key, value in options.items()})
    return model


def find_classifiers(model: nn.Module) -> Dict[str, Classifier]:
    """Classifiers of a timm model by module path; empty if they have been removed (``num_classes=0``).

    Raises:
        ValueError: If a classifier is not a linear layer or 1x1 convolution fed pooled embeddings; says what it is.
    """
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    name = cfg.get('architecture') or type(model).__name__

    def unsupported(what: str) -> ValueError:
        return ValueError(f'A ZZZ head replaces linear classifiers fed pooled embeddings; {name} has {what}.')

    if not hasattr(model, 'get_classifier') or not hasattr(model, 'reset_classifier'):
        raise unsupported('no classifier')
    try:
        classifier: Any = model.get_classifier()  # type: ignore[operator]
    except (AttributeError, NotImplementedError) as e:
        raise unsupported('no classifier') from e
    if classifier is None:
        raise unsupported('no classifier')
    classifiers = list(classifier) if isinstance(classifier, (tuple, list)) else [classifier]
    if all(isinstance(c, nn.Identity) for c in classifiers):
        return {}
    paths = {id(module): path for path, module in model.named_modules()}
    found: Dict[str, Classifier] = {}
    for c in classifiers:
        path = paths.get(id(c), '')
        if not path or not isinstance(c, (nn.Linear, nn.Conv2d, ZZZHead)):
            kind = type(c).__name__ if isinstance(c, nn.Module) else repr(c)
            raise unsupported(f'a {kind} as its classifier' + (f' ({path})' if path else ''))
        if isinstance(c, nn.Conv2d) and (c.kernel_size != (1, 1) or c.groups != 1):
            raise unsupported(f'a convolution over {c.kernel_size} positions as its classifier ({path})')
        if isinstance(model.get_submodule(path.rpartition('.')[0]), (AttentionPool2d, RotAttentionPool2d)):
            raise unsupported(f'a projection inside its attention pooling ({path}), fed tokens')
        found[path] = c
    names = cfg.get('classifier')
    others = sorted(set(names) - found.keys()) if isinstance(names, (tuple, list)) else []
    if others:
        raise unsupported(f'further classifiers ({", ".join(others)})')
    return found


def _replace(model: nn.Module, path: str, classifier: Classifier, options: Dict[str, Any], warm_start: bool) -> None:
    weight = classifier.weight.flatten(1)
    kind = ZZZConvHead if isinstance(classifier, (nn.Conv2d, ZZZConvHead)) else ZZZHead
    head = kind(weight.shape[0], weight.shape[1], device=weight.device, dtype=weight.dtype, **options)
    if warm_start and not weight.is_meta and bool((weight.detach() != 0).any(1).all()):
        with torch.no_grad():
            head.weight.copy_(weight)
            if classifier.bias is not None:
                head.bias.copy_(classifier.bias)
    model.set_submodule(path, head.train(model.training))
    parent = model.get_submodule(path.rpartition('.')[0])
    if isinstance(parent, nn.Sequential) and hasattr(parent, 'fuse'):
        # timm's NormLinear: its fuse() would take the head for a linear layer, without an error.
        parent.__class__ = nn.Sequential


class _ZZZModel(nn.Module):
    """Mixed into a timm model's class: what has to know that the classifier is a ZZZ head."""

    zzz_options: Dict[str, Any]

    def reset_classifier(self, num_classes: int, *args: Any, **kwargs: Any) -> None:
        super().reset_classifier(num_classes, *args, **kwargs)  # type: ignore[misc]
        if num_classes > 0:
            attach(self, warm_start=False, **self.zzz_options)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        inherited: Callable[[], Any] = getattr(super(), 'no_weight_decay', set)
        return set(inherited()) | {
            f'{path}.{name}'
            for path, module in self.named_modules()
            if isinstance(module, ZZZHead)
            for name in module.no_weight_decay()
        }

    def __reduce_ex__(self, protocol: Any) -> Tuple[Any, ...]:
        # The class is made at run time, so a pickle names the class that it was made from.
        state = super().__reduce_ex__(max(2, protocol))[2:]
        return (_new_model, (type(self).__mro__[2],), *state)


@functools.cache
def _zzz_class(base: type) -> type:
    return type(f'ZZZ{base.__name__}', (_ZZZModel, base), dict(__module__=__name__, __doc__=base.__doc__))


def _new_model(base: type) -> Any:
    cls: Any = _zzz_class(base)
    return cls.__new__(cls)
