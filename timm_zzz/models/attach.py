"""Replace the classifier of a timm model by a ZZZ head."""

import functools
import inspect
from itertools import takewhile
from typing import Any, Callable, Dict, List, Set, Tuple, TypeVar, Union, cast

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..head import NOT_DECAYED, FusedZZZHead, ZZZConvHead, ZZZHead, heads_of
from . import _timm

__all__ = ['attach', 'find_classifiers', 'FIT_PREFIX', 'HEAD_OPTIONS', 'OPTION_PREFIX']

ModelT = TypeVar('ModelT', bound=nn.Module)
Classifier = Union[nn.Linear, nn.Conv2d, ZZZHead]
_CLASSIFIERS = (nn.Linear, nn.Conv2d, ZZZHead)

OPTION_PREFIX = 'zzz_'  # marks options of the head among arguments of create_model
FIT_PREFIX = f'{OPTION_PREFIX}fit'  # marks options of the fit, which are not recorded

# Arguments of ZZZHead that are options; the others follow from the replaced classifier and the machine
_FOLLOWS = ('num_classes', 'feat_dim', 'impl', 'device', 'dtype')
HEAD_OPTIONS = tuple(name for name in inspect.signature(ZZZHead).parameters if name not in _FOLLOWS)


def attach(model: ModelT, rank: int = 8, *, warm_start: bool = False, **head_options: Any) -> ModelT:
    """Replace a timm model's classifier by a ZZZ head, in place and at the same module path.

    Afterwards ``model.reset_classifier(n)`` gives a new ZZZ head with the same options, or timm's identity for n = 0.
    The head takes the classifier's device and dtype and the model's train/eval mode. The rest of the model, including
    pooling, dropout and pre-logits code, is not changed.

    Args:
        model: A timm classification model whose classifier is, or ends in, a linear layer or a 1x1 convolution. If
            there are several, as in distilled models, ensembles and models with an auxiliary head, each is replaced.
            With ``num_classes=0`` there is nothing to replace yet: ``reset_classifier`` adds the head. Models wrapped
            by ``torch.compile`` or ``DataParallel`` are unwrapped; apply other wrappers after ``attach``.
        rank: Rank of the class covariances, 0 <= rank <= width of the embedding.
        warm_start: Initialise the class means and the bias with the weight and bias of the replaced layer, which has
            been trained on the same classes. If a row of the weight is zero, the head is initialised as usual.
        head_options: Further keyword arguments of :class:`~timm_zzz.ZZZHead`: v_min, sigma2_min, v_init, sigma2_init,
            init, log_density.

    Returns:
        The same model.

    Raises:
        ValueError: If the model has no such classifier, is wrapped by DDP, FSDP or PEFT, which hold its parameters, or
            if an option is out of its range.
        TypeError: For an unknown option.

    Example:
        >>> import timm
        >>> model = attach(timm.create_model('test_vit', num_classes=5), rank=4)
        >>> model(torch.randn(2, 3, 160, 160)).shape
        torch.Size([2, 5])
    """
    options: Dict[str, Any] = dict(head_options, rank=rank)
    unknown = sorted(options.keys() - set(HEAD_OPTIONS))
    if unknown:
        raise TypeError(f'Unknown option of a ZZZ head: {", ".join(unknown)} (known: {", ".join(HEAD_OPTIONS)})')
    inner = _unwrapped(model)
    for path, classifier in find_classifiers(inner).items():
        _replace(inner, path, classifier, options, warm_start)
    _mix(_ZZZModel, inner)
    zzz_model: Any = inner
    zzz_model.zzz_options = options
    # timm writes these to config.json, to build the model again
    _timm.record_args(inner, {f'{OPTION_PREFIX}{key}': value for key, value in options.items()})
    return model


def _unwrapped(model: nn.Module) -> nn.Module:
    """Unwrap a compiled or data-parallel model; raise a ValueError for wrappers that hold the parameters."""
    inner = unwrap_model(model)
    wrappers = takewhile(lambda module: module is not inner, model.modules())
    kinds = [type(wrapper).__name__ for wrapper in wrappers if not isinstance(wrapper, nn.DataParallel)]
    kinds = [kind for kind in kinds if kind != 'OptimizedModule']
    if any(isinstance(p, DTensor) for p in inner.parameters()):
        kinds.append('fully_shard')
    if any(name.endswith('modules_to_save') for name, _ in inner.named_modules()):
        kinds.append('PEFT')
    if kinds:
        raise ValueError(f'{kinds[0]} holds the parameters already: attach the ZZZ head first, then wrap the model')
    return inner


def find_classifiers(model: nn.Module) -> Dict[str, Classifier]:
    """Find the classifiers of a timm model, keyed by module path; empty if they have been removed (``num_classes=0``).

    These are the modules that ``get_classifier()`` returns, or their last layers, and the further classifiers that the
    model's configuration names.

    Raises:
        ValueError: If a classifier neither is nor ends in a linear layer or a 1x1 convolution.
    """
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    name = cfg.get('architecture') or type(model).__name__

    def unsupported(what: str) -> ValueError:
        return ValueError(f'A ZZZ head replaces linear classifiers; {name} has {what}.')

    if not hasattr(model, 'get_classifier') or not hasattr(model, 'reset_classifier'):
        raise unsupported('no classifier')
    try:
        roots: Any = model.get_classifier()  # type: ignore[operator]
    except (AttributeError, NotImplementedError) as e:
        if getattr(model, 'num_classes', None) == 0:  # some models access the removed layer
            return {}
        raise unsupported('no classifier') from e
    if roots is None:
        raise unsupported('no classifier')
    modules = dict(model.named_modules())
    paths = {id(module): path for path, module in modules.items()}
    found: Dict[str, Classifier] = {}
    for root in roots if isinstance(roots, (tuple, list)) else [roots]:
        if root is None:  # no second classifier in this model
            continue
        layers = _last_layers(root)
        if not layers and not _is_identity(root):
            path = paths.get(id(root), '')
            kind = type(root).__name__ if isinstance(root, nn.Module) else repr(root)
            raise unsupported(f'a {kind} as its classifier' + (f' ({path})' if path else ''))
        found.update({paths.get(id(layer), ''): layer for layer in layers})
    if not found:  # removed
        return {}
    names = cfg.get('classifier') or ()
    for path in (names,) if isinstance(names, str) else names:
        layer = modules.get(path)
        if isinstance(layer, _CLASSIFIERS):
            found[path] = layer
    for path, layer in found.items():
        if not path:
            raise unsupported('a classifier that is no part of it')
        if isinstance(layer, nn.Conv2d) and (layer.kernel_size != (1, 1) or layer.groups != 1):
            raise unsupported(f'a convolution over {layer.kernel_size} positions as its classifier ({path})')
    return found


def _is_identity(root: Any) -> bool:
    """Tell whether a classifier has no parameters, only identities, dropout etc., as after ``reset_classifier(0)``."""
    return isinstance(root, nn.Module) and not root.state_dict()


def _last_layers(root: Any) -> List[Classifier]:
    """Return the layer that computes the logits; several if the module is a list or averages two layers."""
    if isinstance(root, _CLASSIFIERS):
        return [root]
    if isinstance(root, nn.ModuleList):
        return [layer for part in root for layer in _last_layers(part)]
    if not isinstance(root, nn.Module) or any(isinstance(module, FusedZZZHead) for module in root.modules()):
        return []  # a fused head contains a linear layer, and is kept
    pair = [getattr(root, name) for name in ('head', 'head_dist') if isinstance(getattr(root, name, None), nn.Module)]
    if pair:
        return [layer for part in pair for layer in _last_layers(part)]
    return [module for module in root.modules() if isinstance(module, _CLASSIFIERS)][-1:]


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
    # Modules around it, such as timm's NormLinear, would silently fuse it as if it were a linear layer.
    above = path.rpartition('.')[0]
    mixin: type = _NormedHead
    while above:
        module = model.get_submodule(above)
        if hasattr(module, 'fuse'):
            _mix(mixin, module)
        above, mixin = above.rpartition('.')[0], _NotFused


class _Mixin(nn.Module):
    """Base of classes that are mixed into the class of a module at run time."""

    def __reduce_ex__(self, protocol: Any) -> Tuple[Any, ...]:
        # The class is created at run time, so a pickle has the classes that it is created from.
        state = super().__reduce_ex__(max(2, protocol))[2:]
        return (_new_module, type(self).__mro__[1:4:2], *state)


class _Affine(nn.Module):
    """A batch norm in inference, for inputs (B, d): ``x * scale + shift``."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor):
        super().__init__()
        self.register_buffer('scale', scale)
        self.register_buffer('shift', shift)

    @classmethod
    def from_batch_norm(cls, norm: Any) -> '_Affine':
        scale = torch.rsqrt(norm.running_var + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight.detach()
        shift = -norm.running_mean * scale
        return cls(scale, shift if norm.bias is None else shift + norm.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class _NormedHead(_Mixin):
    """Mixed into a module of a batch norm and a ZZZ head: it fuses them to two layers, where timm expects one."""

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        for name, child in list(self.named_children()):
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                setattr(self, name, _Affine.from_batch_norm(child))
            elif isinstance(child, ZZZHead):
                setattr(self, name, child.fuse())
        return self


class _NotFused(_Mixin):
    """Mixed into other modules around a ZZZ head: timm then fuses their children, not the whole."""

    __jit_unused_properties__ = ['fuse']

    @property
    def fuse(self) -> Any:
        raise AttributeError('fuse')


class _ZZZModel(_Mixin):
    """Mixed into a timm model's class: the methods that depend on the classifier being a ZZZ head."""

    zzz_options: Dict[str, Any]

    def reset_classifier(self, num_classes: int, *args: Any, **kwargs: Any) -> None:
        impls = [head.impl for head in heads_of(self).values()]
        super().reset_classifier(num_classes, *args, **kwargs)  # type: ignore[misc]
        if num_classes > 0:
            attach(self, **self.zzz_options)
        for head, impl in zip(heads_of(self).values(), impls, strict=False):
            head.impl = impl


def _no_weight_decay_of(base: type) -> Callable[[Any], Set[str]]:
    @torch.jit.ignore
    def no_weight_decay(self: Any) -> Set[str]:
        # A scripted model, which is no instance of these classes, calls it too: super() and isinstance() would fail.
        inherited: Callable[[Any], Any] = getattr(base, 'no_weight_decay', lambda model: ())
        names = (name for name, _ in self.named_parameters())
        return set(inherited(self)) | {
            name for name in names if name.rpartition('.')[2].removesuffix('_orig') in NOT_DECAYED
        }

    return no_weight_decay


def _mix(mixin: type, module: nn.Module) -> None:
    if not isinstance(module, mixin):
        module.__class__ = _mixed_class(mixin, cast(Any, type(module)))


@functools.cache
def _mixed_class(mixin: type, base: type) -> type:
    # timm looks up a model's functions in its class's module, and TorchScript reads annotations of the class itself
    annotations: Dict[str, Any] = {}
    for cls in (*reversed(base.__mro__), mixin):
        annotations.update(inspect.get_annotations(cls))
    body: Dict[str, Any] = dict(__module__=base.__module__, __doc__=base.__doc__, __annotations__=annotations)
    if mixin is _ZZZModel:
        body.update(_timm.recording_all_but(FIT_PREFIX), no_weight_decay=_no_weight_decay_of(base))
    return type(f'ZZZ{base.__name__}', (mixin, base), body)


def _new_module(mixin: type, base: type) -> Any:
    cls: Any = _mixed_class(mixin, base)
    return cls.__new__(cls)
