"""Heads by name, and how they start: ``linear``, ``cosine``, ``zzz_r8``, ``zzz_r8:fit=1,v_init=0.01``."""

import re
from dataclasses import dataclass, fields, replace
from typing import Any, Dict, List, Optional, Tuple

import torch
from baselines import CosineHead
from numerics import inverse_softplus
from outliers import class_means
from torch import Tensor, nn
from torch.nn import functional as F

import timm_zzz
from timm_zzz.fit import ZZZFit
from timm_zzz.head import SIGMA2_INIT
from timm_zzz.scores import class_gaussians_of

BASES = {
    'fit': 'of the fit only its subspaces, and its variances relative to sigma2',
    'tangent': 'random, orthogonal to the means',
    'pooled': 'the leading directions of the covariance within classes of the training features, for all classes',
    'layer': 'the leading left singular vectors of the last layer before the head, for all classes',
}


@dataclass(frozen=True)
class HeadSpec:
    """A head and how it starts and learns. The learning-rate factors multiply that of the backbone."""

    name: str
    kind: str  # linear, cosine or zzz
    rank: int = 0
    lr: float = 1e-3  # of the backbone
    head_lr: float = 1.0  # factor for the class means or rows, and bias
    basis_lr: float = 1.0  # factor for A
    scalar_lr: float = 1.0  # factor for v_raw, sigma2_raw and the cosine head's scale
    sigma2_init: float = SIGMA2_INIT
    v_init: float = 0.6932
    scale_init: float = 16.0  # cosine
    fit: int = 0  # 1: start from the closed-form fit of the training features
    rows: str = ''  # 'fit': only the means and the bias of that fit; 'zero', 'probe' (linear): that start of the rows
    row_scale: float = 1.0  # factor on the rows and the bias of that start
    basis: str = ''  # one of BASES
    tied: int = 0  # 1: one subspace, with one set of variances, for all classes; that of the first class at the start
    fit_sigma2: float = 0.0  # if > 0, the fit is asked for this sigma2
    fit_precision: float = -1.0  # if >= 0, the fit's max_precision
    v_scale: float = 1.0  # factor on the variances of the start
    objective: str = 'discriminant'
    v_shrinkage: float = 0.0
    mu_decoupling: float = 0.0
    train: int = 1  # 0: no training after the start


def parse(text: str) -> HeadSpec:
    """Read ``KIND[_rRANK][:OPTION=VALUE,...]``; raises ValueError with the options there are."""
    kind, _, options = text.partition(':')
    match = re.fullmatch(r'(linear|cosine|zzz_r(\d+))', kind)
    if match is None:
        raise ValueError(f'head {text}: expected linear, cosine or zzz_rN, got {kind}')
    spec = HeadSpec(name=text, kind=kind.partition('_')[0], rank=int(match[2] or 0))
    known = {f.name: type(f.default) for f in fields(HeadSpec) if f.name not in ('name', 'kind', 'rank')}
    changes: Dict[str, Any] = {}
    for option in filter(None, options.split(',')):
        key, equals, value = option.partition('=')
        if key not in known or not equals:
            raise ValueError(f'head {text}: unknown option {option} (there are: {", ".join(known)})')
        changes[key] = known[key](value)
    if changes.get('basis', 'fit') not in BASES:
        raise ValueError(f'head {text}: expected a basis of {", ".join(BASES)}, got {changes["basis"]}')
    return replace(spec, **changes)


def needs_features(spec: HeadSpec) -> bool:
    return bool(spec.fit) or spec.rows in ('fit', 'probe') or spec.basis in ('fit', 'pooled')


def build(
    spec: HeadSpec, features: Tensor, target: Tensor, num_classes: int, layer: Optional[Tensor] = None
) -> nn.Module:
    """Build a head at its start.

    Args:
        spec: Which, and how it starts.
        features: The backbone's, of the training images, shape (N, d); of no use if not :func:`needs_features`.
        target: Their classes, shape (N,).
        num_classes: C.
        layer: Weights (d, ...) of the layer that the features come from, for a basis from it.
    """
    device, width = features.device, features.shape[1]
    if spec.kind == 'linear':
        head: Any = nn.Linear(width, num_classes, device=device)
        if spec.rows == 'zero':
            nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        if spec.rows == 'probe':
            from probe import fit_probe

            fit_probe(head, features, target)
            with torch.no_grad():
                for p in head.parameters():
                    p *= spec.row_scale
        return head
    if spec.kind == 'cosine':
        head = CosineHead(num_classes, width, device)
        nn.init.constant_(head.scale, spec.scale_init)
        return head
    options = dict(rank=spec.rank, sigma2_init=spec.sigma2_init, v_init=spec.v_init)
    head = timm_zzz.ZZZHead(num_classes, width, device=device, **options)
    if spec.fit or spec.rows == 'fit' or spec.basis == 'fit':
        choices: Dict[str, Any] = dict(objective=spec.objective, sigma2=spec.fit_sigma2 or None)
        if spec.fit_precision >= 0:
            choices['max_precision'] = spec.fit_precision
        estimator = ZZZFit(num_classes, spec.rank, **choices)
        _start_from(head, estimator.fit(features, target).to_head().to(device), spec)
    if head.A is not None:
        _shape_basis(head, spec, features, target, layer)
    return head


@torch.no_grad()
def _shape_basis(head: Any, spec: HeadSpec, features: Tensor, target: Tensor, layer: Optional[Tensor]) -> None:
    if spec.basis == 'tangent':
        mu = F.normalize(head.weight, dim=1)[..., None]
        head.A -= mu * (mu.mT @ head.A)
    if spec.basis == 'pooled':
        x = F.normalize(features.double(), dim=1)
        delta = x - class_means(x, target)[target]
        head.A.copy_(torch.linalg.eigh(delta.T @ delta)[1][:, -spec.rank :])
    if spec.basis == 'layer':
        assert layer is not None
        head.A.copy_(torch.linalg.svd(layer.flatten(1), full_matrices=False)[0][:, : spec.rank])
    if spec.v_scale != 1:
        _set_variances(head, class_gaussians_of(head).v * spec.v_scale)
    if spec.tied:
        for p in (head.A, head.v_raw):
            p.copy_(p[:1].expand_as(p).clone())
            p.register_hook(lambda grad: grad.mean(0, keepdim=True).expand_as(grad))


@torch.no_grad()
def _start_from(head: Any, fitted: Any, spec: HeadSpec) -> None:
    if spec.fit:
        head.load_state_dict(fitted.state_dict())
    if spec.rows == 'fit':
        head.weight.copy_(fitted.weight)
        head.bias.copy_(fitted.bias)
    if spec.basis == 'fit' and head.A is not None:
        head.A.copy_(fitted.A)
        theirs, own = class_gaussians_of(fitted), class_gaussians_of(head)
        _set_variances(head, theirs.v / theirs.sigma2 * own.sigma2)


def _set_variances(head: Any, v: Tensor) -> None:
    head.v_raw.copy_(inverse_softplus((v - head.v_min).clamp(min=1e-6)))


def parameter_groups(model: nn.Module, head: nn.Module, spec: HeadSpec, weight_decay: float) -> List[Dict[str, Any]]:
    """Group the parameters, with timm's ``lr_scale``; what has fewer than two dimensions, and v_raw, is not decayed."""
    of_head = {id(p): name for name, p in head.named_parameters()}
    groups: Dict[Tuple[float, bool], Dict[str, Any]] = {}
    for p in model.parameters():
        name = of_head.get(id(p))
        factors = dict.fromkeys(('v_raw', 'sigma2_raw', 'scale'), spec.scalar_lr)
        scale = 1.0 if name is None else {**factors, 'A': spec.basis_lr}.get(name, spec.head_lr)
        decayed = p.ndim > 1 and name != 'v_raw'
        group = groups.setdefault(
            (scale, decayed),
            dict(params=[], lr=spec.lr * scale, lr_scale=scale, weight_decay=weight_decay if decayed else 0.0),
        )
        group['params'].append(p)
    return list(groups.values())
