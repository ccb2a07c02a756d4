"""Register the names ``ARCHITECTURE[.TAG].zzz_rN`` with timm. The only file that changes timm's registry."""

import dataclasses
import functools
import logging
import re
import warnings
from collections import deque
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence, Union

import timm
import torch
from timm.models import (
    DefaultCfg,
    PretrainedCfg,
    get_arch_pretrained_cfgs,
    get_deprecated_models,
    get_pretrained_cfg,
    is_model,
    list_models,
    model_entrypoint,
    register_model,
)
from torch import nn

from ..errors import nearest
from ..head import heads_of
from ._timm import SAVES_ARGS, default_cfgs, entrypoints, model_args, record_args
from .attach import FIT_PREFIX, HEAD_OPTIONS, OPTION_PREFIX, attach, find_classifiers
from .loading import on_load
from .start import FIT_OPTIONS, fit_start

__all__ = ['asks_for_head', 'did_you_mean', 'register', 'RANKS', 'SOURCE_KEYS', 'TAG']

_logger = logging.getLogger(__name__)

RANKS = (0, 4, 8, 16)
DEFAULT_RANK = 8

TAG = re.compile(r'(?:(?P<base>.+)\.)?zzz_r(?P<rank>0|[1-9]\d*)')
SOURCE_KEYS = ('url', 'file', 'hf_hub_id', 'hf_hub_filename', 'state_dict', 'source')
# Layers between backbone and classifier that exist or not, depending on the kind of pooling
_POOLING_LAYERS = ('fc_norm', 'attn_pool')

# Options that change the logits and do not follow from the weights
_NOT_IN_WEIGHTS = {'v_min', 'sigma2_min', 'log_density'}

Cfg = Union[None, str, Dict[str, Any], PretrainedCfg]


class _Request(NamedTuple):
    """The options in a call of an entrypoint that are for this package."""

    tag: Optional[str]  # the whole tag, if it ends in zzz_rN
    options: Dict[str, Any]
    fit: Dict[str, Any]  # arguments of fit_start; empty without zzz_fit


def register(names: Union[str, Iterable[str], None] = None, ranks: Sequence[int] = RANKS) -> None:
    """Register ``NAME.zzz_rN`` and ``NAME.TAG.zzz_rN`` with timm; importing timm_zzz does this for all names and RANKS.

    Plain names, their tags and default weights, and all listings without tags stay the same. A deprecated name gives
    the ZZZ form of the model to which timm maps it.

    Args:
        names: Architectures, e.g. ``'resnet50'``; all architectures that timm lists if None.
        ranks: Ranks N to register, >= 0.

    Raises:
        ValueError: For an unknown name or a rank that is not an int >= 0.

    Example:
        >>> import timm
        >>> register('test_vit', ranks=[2])
        >>> timm.create_model('test_vit.zzz_r2').head.rank
        2
    """
    ranks = list(ranks)
    for rank in ranks:
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
            raise ValueError(f'ranks: expected ints >= 0, got {rank!r}')
    known = set(list_models())
    names = known if names is None else [names] if isinstance(names, str) else list(names)
    unknown = sorted(set(names) - known)
    if unknown:
        raise ValueError(f'names: timm lists no architecture named {", ".join(unknown)}')
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='Overwriting .* in registry')
        for name in names:
            _register(name, ranks)
    for name, current in get_deprecated_models().items():
        shim = entrypoints()[name]
        if current is not None and not hasattr(shim, 'zzz_original'):
            entrypoints()[name] = _wrap_deprecated(name, current, shim)


def _register(name: str, ranks: Sequence[int]) -> None:
    entrypoint = model_entrypoint(name)
    cfgs = default_cfgs(entrypoint)
    cfg = cfgs.get(name)
    if cfg is not None:
        if not isinstance(cfg, DefaultCfg):  # older form: one configuration per architecture
            cfg = cfgs[name] = DefaultCfg(tags=deque(['']), cfgs={'': PretrainedCfg(**cfg)})
        # The weights belong to the base tag, so timm's list_pretrained does not change.
        weightless: Dict[str, Any] = dict.fromkeys(SOURCE_KEYS)
        default = cfg.tags[0]
        for tag in [tag for tag in cfg.tags if not TAG.fullmatch(tag)]:
            base_cfg = dataclasses.replace(cfg.cfgs[tag], **weightless)
            for zzz_tag in [f'{OPTION_PREFIX}r{rank}' for rank in ranks]:
                for new in ([zzz_tag] if tag == default else []) + ([f'{tag}.{zzz_tag}'] if tag else []):
                    if new not in cfg.cfgs:
                        cfg.tags.append(new)
                        cfg.cfgs[new] = base_cfg
    if not hasattr(entrypoint, 'zzz_original'):
        entrypoint = _wrap(entrypoint)
    register_model(entrypoint)


def _wrap(original: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    @functools.wraps(original)
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        args = model_args(kwargs)
        request = _parse(original, kwargs)
        if request is None:
            model = original(pretrained=pretrained, **kwargs)
        else:
            model = _create(original, request, pretrained, kwargs)
        record_args(model, args)
        if request is not None and request.fit:
            fit_start(model, **request.fit, pretrained=pretrained, device=kwargs.get('device'))
        return model

    entrypoint.zzz_original = original  # type: ignore[attr-defined]
    return entrypoint


def _wrap_deprecated(name: str, current: str, shim: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Wrap timm's function for a deprecated name, which calls the current entrypoint without this package."""
    architecture, _, current_tag = current.partition('.')

    @functools.wraps(shim)
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        cfg = kwargs.get('pretrained_cfg')
        tag = _tag_of(cfg)
        if not asks_for_head(tag or '') and not any(key.startswith(OPTION_PREFIX) for key in kwargs):
            return shim(pretrained=pretrained, **kwargs)
        if current_tag and (tag is None or isinstance(cfg, str) and TAG.fullmatch(tag) and '.' not in tag):
            cfg = tag = f'{current_tag}.{tag}' if tag else current_tag
        present = f'{architecture}.{tag}' if tag else current
        warnings.warn(f'Mapping deprecated model name {name} to current {present}.', stacklevel=2)
        return model_entrypoint(architecture)(pretrained=pretrained, **{**kwargs, 'pretrained_cfg': cfg})

    entrypoint.zzz_original = shim  # type: ignore[attr-defined]
    return entrypoint


def _parse(original: Callable[..., nn.Module], kwargs: Dict[str, Any]) -> Optional[_Request]:
    """Remove this package's options from an entrypoint's keyword arguments and return them; None if there are none."""
    name = original.__name__
    options = {key[len(OPTION_PREFIX) :]: kwargs.pop(key) for key in list(kwargs) if key.startswith(OPTION_PREFIX)}
    fit = {key: options.pop(key) for key in FIT_OPTIONS if key in options}
    unknown = sorted(options.keys() - set(HEAD_OPTIONS))
    if unknown:
        raise TypeError(
            f'Unknown argument {", ".join(OPTION_PREFIX + key for key in unknown)} '
            f'(known: {", ".join(OPTION_PREFIX + key for key in (*HEAD_OPTIONS, *FIT_OPTIONS))})'
        )
    cfg = kwargs.get('pretrained_cfg')
    _check_fit(fit, cfg, kwargs)
    tag = _tag_of(cfg)
    match = TAG.fullmatch(tag or '')
    if match is None:
        # A mistyped tag comes as a string; a configuration may have any tag of its own.
        if tag and (asks_for_head(tag) if isinstance(cfg, str) else tag.rpartition('.')[2].startswith(OPTION_PREFIX)):
            raise _malformed(name, tag)
        if not options and not fit:
            return None
        options.setdefault('rank', DEFAULT_RANK)
        return _Request(None, options, fit)
    if isinstance(cfg, str):
        _check_registered(original, match['base'], match['rank'], kwargs)
    options.setdefault('rank', int(match['rank']))
    kwargs['pretrained_cfg'] = _base_cfg(name, cfg, match['base'])
    return _Request(tag, options, fit)


def _check_fit(fit: Dict[str, Any], cfg: Cfg, kwargs: Dict[str, Any]) -> None:
    """Raise a ValueError for fit options without ``zzz_fit``, without a classifier, or from a config.json."""
    if fit and 'fit' not in fit:
        raise ValueError(f'{OPTION_PREFIX}{min(fit)}: it goes with {FIT_PREFIX}, the images to fit to')
    if fit and kwargs.get('features_only', False):
        raise ValueError(f'{FIT_PREFIX}: it needs a classifier, features_only=True leaves none')
    saved = kwargs.get('pretrained_model_args') or {}
    source = cfg.get('source') if isinstance(cfg, dict) else getattr(cfg, 'source', None)
    # A downloaded file must not choose what to open here; older timm does not separate its arguments from the caller's
    if any(key.startswith(FIT_PREFIX) for key in saved) or (
        fit and not SAVES_ARGS and source in ('hf-hub', 'local-dir')
    ):
        raise ValueError(f'{FIT_PREFIX}: a config.json may not ask for it; use timm_zzz.fit.fit_model')


def _tag_of(cfg: Cfg) -> Optional[str]:
    return cfg if isinstance(cfg, str) else cfg.get('tag') if isinstance(cfg, dict) else getattr(cfg, 'tag', None)


def asks_for_head(tag: str) -> bool:
    """Tell whether a tag is, or is probably meant to be, that of a ZZZ head; no tag of timm resembles one."""
    tag = tag.lower()
    ranks = [f'{OPTION_PREFIX}r{rank}' for rank in RANKS]
    return OPTION_PREFIX.strip('_') in tag or bool(nearest(tag.rpartition('.')[2], ranks))


def did_you_mean(name: str) -> str:
    """Return the end of a message that suggests a similar name of timm; '' if the name is known or none is similar."""
    if is_model(name) or ':' in name:  # 'hf-hub:...' names a repository
        return ''
    return nearest(name, {*list_models(), *list_models(include_tags=True)})


def _malformed(name: str, tag: str) -> ValueError:
    """Create the error for a misspelt tag of a ZZZ head; it shows the right form, with a base tag that timm knows."""
    base = '.'.join([name, *(part for part in tag.split('.') if not asks_for_head(part))])
    try:
        get_pretrained_cfg(base)
    except RuntimeError:
        base = name
    return ValueError(
        f'Invalid tag in {name}.{tag}: a ZZZ head is asked for as {base}.zzz_r{DEFAULT_RANK}, '
        f'with rank {", ".join(map(str, RANKS[:-1]))} or {RANKS[-1]}'
    )


def _check_registered(
    original: Callable[..., nn.Module], base_tag: Optional[str], rank: str, kwargs: Dict[str, Any]
) -> None:
    """Raise a ValueError that says which part of ``NAME[.TAG].zzz_rN`` is not registered with timm."""
    prefix = name = original.__name__
    if base_tag and asks_for_head(base_tag):
        raise _malformed(name, f'{base_tag}.zzz_r{rank}')
    try:
        if base_tag:
            prefix = f'{name}.{base_tag}'
            get_pretrained_cfg(prefix)
    except RuntimeError as e:
        tags = [key.partition('.')[2] for key in get_arch_pretrained_cfgs(name)]
        tags = [tag for tag in tags if tag and not TAG.fullmatch(tag)]
        raise ValueError(
            f'Invalid tag: timm knows no {prefix}, so there is no {prefix}.zzz_r{rank}. For the default weights ask '
            f'for {name}.zzz_r{DEFAULT_RANK}, else for {name}.TAG.zzz_r{DEFAULT_RANK} '
            f'(tags: {", ".join(tags) or "none"})'
        ) from e
    try:
        get_pretrained_cfg(f'{prefix}.zzz_r{rank}')
    except RuntimeError as e:
        width = _width(original, kwargs)
        if width is not None and int(rank) > width:
            raise ValueError(
                f'{prefix}.zzz_r{rank}: the rank is larger than the width of the embeddings, {width}; '
                f'ask for {prefix}.zzz_r{DEFAULT_RANK}'
            ) from e
        raise ValueError(
            f'{prefix}.zzz_r{rank} is not registered: create {prefix}.zzz_r{DEFAULT_RANK} with zzz_rank={rank} '
            f'(in a recipe model_kwargs: {{zzz_rank: {rank}}}), or first call timm_zzz.register({name!r}, [{rank}])'
        ) from e


def _width(original: Callable[..., nn.Module], kwargs: Dict[str, Any]) -> Optional[int]:
    """Return the width of the embeddings, from a model on the meta device; None if that fails."""
    others = ('pretrained_cfg', 'pretrained_cfg_overlay', 'cache_dir', 'num_classes', 'device')
    try:
        with torch.device('meta'):
            model = original(pretrained=False, **{key: value for key, value in kwargs.items() if key not in others})
        widths = [layer.weight.shape[1] for layer in find_classifiers(model).values()]
    except (AssertionError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return None  # a wrong argument is reported once the rank is right
    return min(widths, default=None)


def _base_cfg(name: str, cfg: Cfg, base_tag: Optional[str]) -> Cfg:
    """Return the configuration of the backbone: the one that timm would pass for the name without the ZZZ tag."""
    if isinstance(cfg, str) or cfg is None:
        return base_tag
    fields = dict(cfg) if isinstance(cfg, dict) else {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg)}
    fields['tag'] = base_tag
    if not any(fields.get(key) for key in SOURCE_KEYS):
        base = get_pretrained_cfg(f'{name}.{base_tag}' if base_tag else name)
        if base is not None:
            fields.update({key: getattr(base, key) for key in SOURCE_KEYS})
    return fields


def _create(
    original: Callable[..., nn.Module],
    request: _Request,
    pretrained: bool,
    kwargs: Dict[str, Any],
) -> Any:
    if kwargs.get('features_only', False):  # timm's feature extractor has no classifier
        return original(pretrained=pretrained, **kwargs)

    def swap(model: nn.Module, state_dict: Dict[str, Any]) -> None:
        attach(model, **request.options)
        for path in heads_of(model):
            _restart(path, state_dict)

    def check(model: nn.Module, missing_keys: List[str]) -> None:
        _check_backbone(model, missing_keys, kwargs.get('in_chans'))

    def read(model: nn.Module, load: Callable[[], Any]) -> None:
        # It skips a linear layer with other classes. Zero rows tell attach that nothing was loaded.
        for layer in find_classifiers(model).values():
            nn.init.zeros_(layer.weight)
        load()
        attach(model, warm_start=True, **request.options)

    if pretrained:
        with on_load(swap, check, read):
            model: Any = original(pretrained=True, **kwargs)
    else:
        model = original(pretrained=False, **kwargs)
    if not hasattr(model, 'zzz_options'):
        attach(model, **request.options)

    if request.tag:
        model.pretrained_cfg['tag'] = request.tag
        unsaved = () if SAVES_ARGS else _NOT_IN_WEIGHTS & request.options.keys()
        if unsaved:
            _warn_of_timms_save(*sorted(unsaved))
    return model


@functools.cache
def _warn_of_timms_save(*options: str) -> None:
    names = ', '.join(OPTION_PREFIX + name for name in options)
    _logger.warning(f'save_for_hf of timm {timm.__version__} leaves out {names}: save with timm_zzz.save_pretrained')


def _restart(path: str, state_dict: Dict[str, Any]) -> None:
    """Keep a head's initial values if timm has removed its weight and bias because class counts differ."""
    rest = [key for key in state_dict if key.startswith(f'{path}.')]
    if rest and not any(key.rpartition('.')[2] in ('weight', 'bias') for key in rest):
        for key in rest:
            del state_dict[key]
        _logger.info(f'{path}: the checkpoint has no weight and bias for these classes, the ZZZ head starts anew.')


def _check_backbone(model: nn.Module, missing_keys: List[str], in_chans: Optional[int]) -> None:
    """Raise a RuntimeError if weights of the backbone are missing; timm only logs it if it adapts the class count."""
    cfg: Dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    names = cfg.get('classifier') or ()
    paths = [*find_classifiers(model), *((names,) if isinstance(names, str) else names)]
    lenient = {path.partition('.')[0] for path in paths} | set(_POOLING_LAYERS)
    missing = [key for key in missing_keys if key.partition('.')[0] not in lenient]
    if in_chans not in (None, cfg['input_size'][0]):  # timm reinitialises an input layer that it can't convert
        first = cfg.get('first_conv') or ()
        inputs = {f'{name}.weight' for name in ((first,) if isinstance(first, str) else first)}
        missing = [key for key in missing if key not in inputs]
    if missing:
        raise RuntimeError(
            f'{cfg.get("architecture")}: the checkpoint lacks {len(missing)} tensors of the backbone '
            f'({", ".join(missing[:4])}{", ..." if len(missing) > 4 else ""}): '
            f'it is truncated or of another architecture.'
        )
