"""Heads by name, and how they start: ``linear:rows=zero``, ``arcface``, ``zzz_r8``, ``zzz_r8:fit=finetune``."""

import re
from dataclasses import dataclass, fields, replace
from typing import Any, Dict, List, Tuple

import torch
from baselines import CosineHead
from torch import Tensor, nn

import timm_zzz
from timm_zzz.fit import ZZZFit
from timm_zzz.head import INIT_STD, SIGMA2_INIT

ROWS = {
    'zero': 'all zero (linear), as train.py --head-init-scale 0.0 starts them',
    'probe': 'a tuned logistic regression of the frozen features (linear)',
    'flat': 'sharing a direction, as those of a new ZZZ head (cosine, arcface, cosface)',
}
KINDS = ('linear', 'cosine', 'arcface', 'cosface', 'zzz')


@dataclass(frozen=True)
class HeadSpec:
    """A head and how it starts; what is 0 or negative by default is as the package has it."""

    name: str
    kind: str
    rank: int = 0
    rows: str = ''  # one of ROWS
    init: str = ''  # 'reference': that start of a ZZZ head
    fit: str = ''  # preset of the closed-form fit of the training features
    sigma2: float = 0.0
    v_ratio: float = 0.0  # v / sigma2
    row_std: float = 0.0  # of the entries of the class means
    spread: float = -1.0  # of a flat start: random differences of the means, relative to what they share
    mean_spread: float = -1.0  # of a fit
    max_precision: float = -1.0  # of a fit
    basis: str = ''  # 'random': subspaces drawn class by class, in a flat start or in place of a fit's
    scale: float = 16.0  # of cosines; at the start, if without a margin
    margin: float = 0.2  # of arcface, an angle, and cosface
    scalar_lr: float = 1.0  # factor on the head's learning rate for v_raw, sigma2_raw and a cosine head's scale
    basis_lr: float = 1.0  # the same for A
    train: int = 1  # 0: no training after the start
    refit: str = ''  # preset of :func:`refit`, after training


def parse(text: str) -> HeadSpec:
    """Read ``KIND[_rRANK][:OPTION=VALUE,...]``; raises ValueError with the options there are."""
    kind, _, options = text.partition(':')
    match = re.fullmatch(r'(linear|cosine|arcface|cosface|zzz_r(\d+))', kind)
    if match is None:
        raise ValueError(f'head {text}: expected {", ".join(KINDS[:-1])} or zzz_rN, got {kind}')
    spec = HeadSpec(name=text, kind=kind.partition('_')[0], rank=int(match[2] or 0))
    known = {f.name: type(f.default) for f in fields(HeadSpec) if f.name not in ('name', 'kind', 'rank')}
    changes: Dict[str, Any] = {}
    for option in filter(None, options.split(',')):
        key, equals, value = option.partition('=')
        if key not in known or not equals:
            raise ValueError(f'head {text}: unknown option {option} (there are: {", ".join(known)})')
        changes[key] = known[key](value)
    if changes.get('rows', 'zero') not in ROWS:
        raise ValueError(f'head {text}: expected rows of {", ".join(ROWS)}, got {changes["rows"]}')
    if changes.get('refit') and not kind.startswith('zzz'):
        raise ValueError(f'head {text}: only a ZZZ head can be fitted')
    return replace(spec, **changes)


def needs_features(spec: HeadSpec) -> bool:
    return bool(spec.fit) or spec.rows == 'probe'


def build(spec: HeadSpec, features: Tensor, target: Tensor, num_classes: int) -> nn.Module:
    """Build a head at its start; a linear one as timm starts it is the model's own.

    Args:
        spec: Which, and how it starts.
        features: The backbone's, of the training images, shape (N, d); of no use if not :func:`needs_features`.
        target: Their classes, shape (N,).
        num_classes: C.
    """
    device, width = features.device, features.shape[1]
    if spec.kind == 'linear':
        return _linear(spec, features, target, num_classes)
    if spec.kind == 'zzz':
        return _zzz(spec, features, target, num_classes)
    head = CosineHead(num_classes, width, device, spec.scale, '' if spec.kind == 'cosine' else spec.kind, spec.margin)
    if spec.rows == 'flat':
        flat = timm_zzz.ZZZHead(num_classes, width, rank=0, device=device)
        head.weight.data.copy_(_spread_out(spec, flat.weight.detach()))
    return head


def _linear(spec: HeadSpec, features: Tensor, target: Tensor, num_classes: int) -> nn.Linear:
    head = nn.Linear(features.shape[1], num_classes, device=features.device)
    nn.init.zeros_(head.bias)
    if spec.rows == 'zero':
        nn.init.zeros_(head.weight)
    if spec.rows == 'probe':
        from probe import fit_probe

        fit_probe(head, features, target)
    return head


@torch.no_grad()
def _zzz(spec: HeadSpec, features: Tensor, target: Tensor, num_classes: int) -> nn.Module:
    options: Dict[str, Any] = dict(init=spec.init) if spec.init else {}
    if spec.sigma2:
        options['sigma2_init'] = spec.sigma2
    if spec.v_ratio:
        options['v_init'] = spec.v_ratio * (spec.sigma2 or SIGMA2_INIT)
    width = features.shape[1]
    head = timm_zzz.ZZZHead(num_classes, width, rank=spec.rank, device=features.device, **options)
    if not spec.fit:
        head.weight.copy_(_spread_out(spec, head.weight))
    else:
        _fit(spec, head, features, target)
    if spec.basis and head.A is not None:
        head.A.normal_(std=INIT_STD)
    return head


def refit(spec: HeadSpec, head: timm_zzz.ZZZHead, features: Tensor, target: Tensor) -> None:
    """Replace a trained head by the fit of the trained features (N, d) of the training images."""
    ZZZFit(head.num_classes, spec.rank, preset=spec.refit).fit(features, target).fill(head)


def _fit(spec: HeadSpec, head: timm_zzz.ZZZHead, features: Tensor, target: Tensor) -> None:
    choices: Dict[str, Any] = dict(preset=spec.fit)
    given = dict(sigma2=spec.sigma2 > 0, v_ratio=spec.v_ratio > 0)
    given.update({key: getattr(spec, key) >= 0 for key in ('mean_spread', 'max_precision')})
    choices.update({key: getattr(spec, key) for key, is_given in given.items() if is_given})
    ZZZFit(head.num_classes, spec.rank, **choices).fit(features, target).fill(head)
    if spec.row_std:
        head.weight.mul_(spec.row_std / head.weight.std())


def _spread_out(spec: HeadSpec, rows: Tensor) -> Tensor:
    """Give the rows of a flat start random differences, and another length."""
    if spec.spread >= 0:
        shared = rows.mean(0)
        rows = shared + spec.spread * shared.norm() / len(shared) ** 0.5 * torch.randn_like(rows)
    return rows * (spec.row_std / rows.std()) if spec.row_std else rows


def parameter_groups(
    model: nn.Module, head: nn.Module, spec: HeadSpec, lr: float, head_lr: float, weight_decay: float
) -> List[Dict[str, Any]]:
    """Group the parameters; what has fewer than two dimensions, and v_raw, is not decayed.

    Args:
        lr: Learning rate of the backbone.
        head_lr: Factor on it for the head.
    """
    of_head = {id(p): name for name, p in head.named_parameters()}
    factors = dict.fromkeys(('v_raw', 'sigma2_raw', 'scale'), spec.scalar_lr) | {'A': spec.basis_lr}
    groups: Dict[Tuple[float, bool], Dict[str, Any]] = {}
    for p in model.parameters():
        name = of_head.get(id(p))
        rate = lr if name is None else lr * head_lr * factors.get(name, 1.0)
        decayed = p.ndim > 1 and name != 'v_raw'
        group = dict(params=[], lr=rate, weight_decay=weight_decay if decayed else 0.0)
        groups.setdefault((rate, decayed), group)['params'].append(p)
    return list(groups.values())
