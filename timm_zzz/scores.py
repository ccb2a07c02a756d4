"""Log-densities, outlier scores and calibration of a ZZZ head.

For every outlier score, a larger value means more outlying; docs/outliers.md says what each score assumes. ``head`` is
a ZZZ head or its :func:`class_gaussians_of`. Scores are computed in float32, or in float64 if an argument is, also
under autocast. NaN features give NaN scores. A different ``head`` or a tensor of the wrong shape raises a ValueError.
"""

import logging
import math
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .functional import gaussian_logits, normalize
from .functional import log_density as gaussian_log_density
from .head import ZZZHead, heads_of
from .metrics import (
    KEPT,
    Bin,
    auroc,
    calibration_temperature,
    check_matrix,
    check_targets,
    ece,
    fpr95,
    full_precision,
    reliability,
)
from .ops.reference import inverse_softplus

__all__ = [
    'METHODS',
    'Background',
    'Bin',
    'ClassGaussians',
    'auroc',
    'calibrate',
    'class_gaussians_of',
    'ece',
    'energy',
    'fold_temperature',
    'fpr95',
    'log_density',
    'log_dict',
    'mahalanobis',
    'max_logit',
    'max_softmax',
    'negative_log_density',
    'outlier_scores',
    'relative_mahalanobis',
    'reliability',
]

# Scores that need only logits come first
_FROM_LOGITS = ('max_logit', 'max_softmax', 'energy')
METHODS = (*_FROM_LOGITS, 'negative_log_density', 'mahalanobis', 'relative_mahalanobis')
_logger = logging.getLogger(__name__)

_VALUES = 2**25  # largest number of values of an intermediate result


def _in_parts(function: Callable[[Tensor], Tensor], rows: Tensor, values: int) -> Tensor:
    """Compute ``function(rows)`` a few rows at a time; it needs ``values`` numbers per row."""
    size = max(1, _VALUES // values)
    # Autocast would compute float32 products in 16 bits
    with torch.autocast(rows.device.type, enabled=False):
        return torch.cat([function(part) for part in rows.split(size)])


# The classes of a head


class ClassGaussians(NamedTuple):
    """The classes of a head: means (C, d), bases (C, d, r), variances (C, r), sigma2 () and bias (C,).

    Bases and variances are None at rank 0.
    """

    mu: Tensor
    basis: Optional[Tensor]
    v: Optional[Tensor]
    sigma2: Tensor
    bias: Tensor


def class_gaussians_of(head: ZZZHead, dtype: Optional[torch.dtype] = None) -> ClassGaussians:
    """Compute the Gaussians of a head's classes, as constants; every score accepts them in place of the head.

    A score derives the bases of a head at every call. To score many batches, derive them once by this function.

    Args:
        head: A ZZZ head.
        dtype: Dtype of the Gaussians; if None, float32, or float64 for a float64 head.

    Raises:
        ValueError: If ``head`` is not a ZZZ head.

    Example:
        >>> head = ZZZHead(num_classes=200, feat_dim=768, rank=8)
        >>> class_gaussians_of(head).basis.shape
        torch.Size([200, 768, 8])
    """
    if not isinstance(head, ZZZHead):
        raise ValueError(f'head: expected a ZZZHead, got {type(head).__name__}')
    return ClassGaussians(*head.gaussians(dtype))


Head = Union[ZZZHead, ClassGaussians]


def _prepare(head: Head, features: Tensor) -> Tuple[ClassGaussians, Tensor]:
    """Return the head's classes and the normalised embeddings in one dtype."""
    if not isinstance(head, (ZZZHead, ClassGaussians)):
        raise ValueError(f'head: expected a ZZZHead or its ClassGaussians, got {type(head).__name__}')
    mu = head.weight if isinstance(head, ZZZHead) else head.mu
    check_matrix('features', features, mu.shape[1])
    dtype = torch.promote_types(torch.promote_types(features.dtype, mu.dtype), torch.float32)
    if isinstance(head, ZZZHead):
        classes = class_gaussians_of(head, dtype)
    else:
        cast: List[Any] = [t if t is None else t.to(dtype) for t in head]
        classes = ClassGaussians(*cast)
    return classes, normalize(features.to(dtype))


def _per_row(classes: ClassGaussians) -> int:
    """Return how many values the densities of one embedding need."""
    return len(classes.mu) * (1 if classes.v is None else 1 + classes.v.shape[1])


def _logits(classes: ClassGaussians, x: Tensor) -> Tensor:
    """Compute the head's logits (N, C) of normalised embeddings."""
    return _in_parts(lambda part: gaussian_logits(part, *classes[:4]) + classes.bias, x, _per_row(classes))


def log_density(head: Head, features: Tensor) -> Tensor:
    """Compute the log-densities of the classes, log N(x; mu_c, Sigma_c), for ``x = f / |f|``.

    They are densities on R^d, evaluated on the unit sphere (docs/theory.md, sections 1 and 3). The logits of a head
    with ``log_density=True`` are these plus d/2 log(2 pi) + bias_c. Without, they lack a term that all classes and
    embeddings share.

    Args:
        head: A ZZZ head, or its :func:`class_gaussians_of`.
        features: Pooled embeddings f as the head gets them, shape (N, d).

    Returns:
        Nats, shape (N, C), differentiable in the features but not in the head.

    Raises:
        ValueError: If ``head`` is not a ZZZ head, or ``features`` are not of shape (N, d).

    Example:
        >>> head = ZZZHead(num_classes=2, feat_dim=3, rank=0, sigma2_init=0.5)
        >>> _ = head.load_state_dict({'weight': torch.eye(2, 3), 'bias': torch.zeros(2)})
        >>> log_density(head, torch.tensor([[5., 0., 0.]]))  # the squared distances are 0 and 2
        tensor([[-1.7171, -3.7171]])
    """
    classes, x = _prepare(head, features)
    return _in_parts(lambda part: gaussian_log_density(part, *classes[:4]), x, _per_row(classes))


# Numbers to log during training


@torch.no_grad()
def log_dict(model: nn.Module, embeddings: Union[None, Tensor, Mapping[str, Tensor]] = None) -> Dict[str, float]:
    """Summarise every ZZZ head of a model in numbers to log with W&B or TensorBoard (docs/recipes.md).

    - ``sigma2``: The isotropic variance.
    - ``mu_cosine_distance``: Mean of 1 - cos(mu_c, mu_k) over all pairs of classes. It is 0 after the flat start and
      for a single class, and about 1 for means in random directions.
    - ``v_ratio_1``, ..., ``v_ratio_r``: v / sigma2 in descending order within each class; the median over classes (the
      lower of two).
    - ``low_rank_share``, if there are ``embeddings``: Share of the low-rank part in the logits' variance between
      classes. Let l be the logits, m the logits at rank 0 (same means, sigma2 and biases) and q = l - m, each minus its
      mean over classes. The share is sum(q l) / sum(l^2) over images and classes, and 0 if all logits are equal. The
      rest up to 1 is due to means and biases; if the two parts oppose each other, one of them is negative.

    Args:
        model: A model or a head.
        embeddings: Inputs of the head, shape (N, d). For several heads, a dict keyed by module path, as
            :func:`~timm_zzz.head.record_inputs` records it; a head without an entry gets no share.

    Returns:
        Numbers by name; names are ``path/sigma2`` etc. if there are several heads. Empty if there is no head.

    Raises:
        ValueError: If ``embeddings`` are not of shape (N, d).

    Example:
        >>> head = ZZZHead(num_classes=5, feat_dim=16, rank=2, sigma2_init=0.25, v_init=0.5)
        >>> {name: round(value, 4) for name, value in log_dict(head).items()}
        {'sigma2': 0.25, 'mu_cosine_distance': 0.0, 'v_ratio_1': 2.0, 'v_ratio_2': 2.0}
    """
    heads, found = heads_of(model), dict[str, float]()
    for path, head in heads.items():
        classes = class_gaussians_of(head, torch.float64)
        count, total = head.num_classes, classes.mu.sum(0).square().sum().item()
        values = dict(sigma2=classes.sigma2.item(), mu_cosine_distance=(count**2 - total) / max(1, count**2 - count))
        if classes.v is not None:
            ratios = (classes.v / classes.sigma2).sort(1, descending=True)[0].median(0)[0]
            values.update((f'v_ratio_{i}', ratio) for i, ratio in enumerate(ratios.tolist(), 1))
        x = embeddings.get(path) if isinstance(embeddings, Mapping) else embeddings
        if x is not None:
            values['low_rank_share'] = _low_rank_share(classes, x)
        found.update({f'{path}/{name}' if len(heads) > 1 else name: value for name, value in values.items()})
    return found


def _low_rank_share(classes: ClassGaussians, embeddings: Tensor) -> float:
    classes, x = _prepare(classes, embeddings)
    logits, means = (_logits(each, x) for each in (classes, classes._replace(basis=None, v=None)))
    logits, means = (each - each.mean(1, keepdim=True) for each in (logits, means))
    equal = 1e-20 * logits.numel()  # equal logits differ by rounding
    return (((logits - means) * logits).sum() / logits.square().sum().clamp(min=equal)).item()


# Outlier scores from logits


def max_logit(logits: Tensor) -> Tensor:
    """Compute minus the largest logit (Hendrycks et al. 2022, arXiv:1911.11132).

    Logits (N, C) of any head give shape (N,), larger = more outlying.

    Example:
        >>> max_logit(torch.tensor([[1., 3.]]))
        tensor([-3.])
    """
    check_matrix('logits', logits)
    return -full_precision(logits).amax(1)


def max_softmax(logits: Tensor) -> Tensor:
    """Compute one minus the largest softmax probability (Hendrycks and Gimpel 2017, arXiv:1610.02136).

    It is computed as the sum of the other classes' probabilities, which is accurate where 1 - p would round to 0.

    Logits (N, C) of any head give shape (N,), 0 to 1 - 1 / C, larger = more outlying.

    Example:
        >>> max_softmax(torch.tensor([[0., 0.], [0., 40.]]))
        tensor([5.0000e-01, 4.2484e-18])
    """
    check_matrix('logits', logits)
    logits = full_precision(logits)
    top, index = logits.max(1, keepdim=True)
    others = (logits - top).exp().scatter(1, index, 0.0).sum(1)  # as multiples of the largest probability
    return others / (1 + others)


def energy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute the energy -T log sum_c exp(logit_c / T) (Liu et al. 2020, arXiv:2010.03759, eq. 4).

    For logits of a ZZZ head and T = 1, it is :func:`negative_log_density` up to a constant.

    Logits (N, C) of any head give shape (N,), larger = more outlying. T > 0 is in units of the logits.

    Raises:
        ValueError: If the temperature is not finite and > 0.

    Example:
        >>> energy(torch.tensor([[0., 0.]]))
        tensor([-0.6931])
    """
    check_matrix('logits', logits)
    if not 0 < temperature < math.inf:
        raise ValueError(f'temperature: expected a finite number > 0, got {temperature}')
    return -temperature * (full_precision(logits) / temperature).logsumexp(1)


# Outlier scores from a ZZZ head


def negative_log_density(head: Head, features: Tensor) -> Tensor:
    """Compute -log p(x) of the mixture of the classes, p(x) = sum_c pi_c N(x; mu_c, Sigma_c) with pi = softmax(bias).

    The head's softmax is the posterior exp(bias_c) N_c(x) / sum_k exp(bias_k) N_k(x), so the biases are log-priors up
    to a constant (docs/theory.md, claim 1); the priors sum to 1.

    Pooled embeddings (N, d), as the head gets them, give nats, shape (N,), larger = more outlying.

    Example:
        >>> head = ZZZHead(num_classes=2, feat_dim=3, rank=0, sigma2_init=0.5)
        >>> _ = head.load_state_dict({'weight': torch.eye(2, 3), 'bias': torch.zeros(2)})
        >>> negative_log_density(head, torch.tensor([[1., 0., 0.], [0., 0., 1.]]))
        tensor([2.2833, 3.7171])
    """
    classes, x = _prepare(head, features)
    log_prior = classes.bias.log_softmax(0)
    return _in_parts(
        lambda part: -(gaussian_log_density(part, *classes[:4]) + log_prior).logsumexp(1), x, _per_row(classes)
    )


def mahalanobis(head: Head, features: Tensor) -> Tensor:
    """Compute the smallest squared Mahalanobis distance to a class, min_c (x - mu_c)^T Sigma_c^-1 (x - mu_c).

    As in Lee et al. 2018 (arXiv:1807.03888), but with each class's own covariance, and with the head's parameters in
    place of sample moments.

    Pooled embeddings (N, d), as the head gets them, give values >= 0, shape (N,), larger = more outlying.

    Example:
        >>> head = ZZZHead(num_classes=2, feat_dim=3, rank=0, sigma2_init=0.5)
        >>> _ = head.load_state_dict({'weight': torch.eye(2, 3), 'bias': torch.zeros(2)})
        >>> mahalanobis(head, torch.tensor([[1., 0., 0.], [0., 0., 1.]])).round(decimals=4)
        tensor([0., 4.])
    """
    classes, x = _prepare(head, features)
    mu, basis, v, sigma2, _ = classes
    # In units of sigma, log N(x; 0, I) is -|x|^2 / 2 up to a constant, and log|Sigma_c| is small.
    sigma, one = sigma2.sqrt(), torch.ones_like(sigma2)
    mu, v = mu / sigma, v if v is None else v / sigma2
    log_det = 0.0 if v is None else v.log1p().sum(1)

    def smallest(part: Tensor) -> Tensor:
        part = part / sigma
        norm2 = part.square().sum(1, keepdim=True)
        return (norm2 - 2 * gaussian_logits(part, mu, basis, v, one) - log_det).amin(1)

    return _in_parts(smallest, x, _per_row(classes)).clamp(min=0)


def relative_mahalanobis(head: Head, features: Tensor, background: Optional['Background'] = None) -> Tensor:
    """Compute :func:`mahalanobis` minus the squared distance to a background (Ren et al. 2021, arXiv:2106.09022).

    Args:
        head: A ZZZ head, or its :func:`class_gaussians_of`.
        features: Pooled embeddings as the head gets them, shape (N, d).
        background: ``Background.of(head)``, to derive it once for several calls; derived anew if None.

    Returns:
        Shape (N,), positive or negative, larger = more outlying.

    Raises:
        ValueError: For another ``head``, ``features`` not of shape (N, d), or a background of another width.

    Example:
        >>> head = ZZZHead(num_classes=2, feat_dim=3, rank=0, sigma2_init=0.5)
        >>> _ = head.load_state_dict({'weight': torch.eye(2, 3), 'bias': torch.zeros(2)})
        >>> relative_mahalanobis(head, torch.tensor([[1., 0., 0.], [0., 0., 1.]]))  # less 1/2 and 3
        tensor([-0.5000,  1.0000])
    """
    classes, _ = _prepare(head, features)
    if background is None:
        background = Background.of(classes)
    if not isinstance(background, Background):
        raise ValueError(f'background: expected a Background, got {type(background).__name__}')
    if len(background.mean) != features.shape[1]:
        raise ValueError(f'background: expected one of width {features.shape[1]}, got {len(background.mean)}')
    near = mahalanobis(classes, features)
    return near - background.mahalanobis(features).to(near.dtype)


def outlier_scores(
    head: Union[ZZZHead, ClassGaussians, nn.Linear],
    features: Tensor,
    methods: Optional[Sequence[str]] = None,
    background: Optional['Background'] = None,
) -> Dict[str, Tensor]:
    """Compute several outlier scores of the same embeddings.

    Args:
        head: A ZZZ head or its :func:`class_gaussians_of`, or a linear layer.
        features: Pooled embeddings as the head gets them, shape (N, d).
        methods: Names from :data:`METHODS`. If None, all; for a linear layer, the three that need only logits:
            :func:`max_logit`, :func:`max_softmax`, :func:`energy`.
        background: As in :func:`relative_mahalanobis`.

    Returns:
        Scores by name, each of shape (N,), larger = more outlying.

    Raises:
        ValueError: For an unknown method, a method that needs Gaussians with a linear layer, another ``head``, or
            ``features`` not of shape (N, d).

    Example:
        >>> scores = outlier_scores(ZZZHead(num_classes=5, feat_dim=16, rank=4), torch.randn(3, 16))
        >>> {name: len(score) for name, score in scores.items()}['mahalanobis']
        3
    """
    linear = isinstance(head, nn.Linear)
    known = _FROM_LOGITS if linear else METHODS
    methods = known if methods is None else methods
    for method in methods:
        if method not in known:
            raise ValueError(f'methods: expected names of {", ".join(known)} for this head, got {method!r}')
    if isinstance(head, nn.Linear):
        check_matrix('features', features, head.in_features)
        logits = _linear_logits(head, features)
        return {method: _LOGIT_SCORES[method](logits) for method in methods}

    head, x = _prepare(head, features)
    scores: Dict[str, Tensor] = {}
    if any(method in _LOGIT_SCORES for method in methods):
        logits = _logits(head, x)
    for method in methods:
        if method in _LOGIT_SCORES:
            scores[method] = _LOGIT_SCORES[method](logits)
        elif method == 'negative_log_density':
            scores[method] = negative_log_density(head, features)
        elif method == 'mahalanobis':
            scores[method] = mahalanobis(head, features)
        else:
            scores[method] = relative_mahalanobis(head, features, background)
    return scores


_LOGIT_SCORES: Dict[str, Callable[[Tensor], Tensor]] = dict(max_logit=max_logit, max_softmax=max_softmax, energy=energy)


def _linear_logits(head: nn.Linear, features: Tensor) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(features.dtype, head.weight.dtype), torch.float32)
    weight, bias = head.weight.detach().to(dtype), head.bias if head.bias is None else head.bias.detach().to(dtype)
    return _in_parts(lambda part: F.linear(part.to(dtype), weight, bias), features, sum(weight.shape))


# Calibration


@torch.no_grad()
def calibrate(head: ZZZHead, features: Tensor, targets: Tensor) -> float:
    """Calibrate a head by temperature scaling on held-out images (Guo et al. 2017, arXiv:1706.04599), in place.

    :func:`fold_temperature` writes the temperature into the head's parameters. It minimises the negative log-likelihood
    plus a penalty, which matters if there are few images or all are classified correctly. With T = 1 / temperature, the
    negative log-likelihood L(T) summed over N images, and the same sum U(T) for uniform labels, the objective is
    L(T) + (U(T) - U(1)) / N for T > 1 and L(T) + 10 (T - 1 - log T) for T < 1. If there are more than 2^27 logits,
    every k-th image is used.

    Args:
        head: A ZZZ head.
        features: Pooled embeddings of images that it was not trained on, as the head gets them, shape (N, d).
        targets: Class indices of the images, shape (N,).

    Returns:
        The temperature, > 0; above 1 if the head was overconfident.

    Raises:
        ValueError: If ``head`` is not a ZZZ head, there are no images, logits are NaN or infinite, or tensors have
            other shapes; and as in :func:`fold_temperature`.

    Example:
        >>> head, features = ZZZHead(num_classes=2, feat_dim=16, rank=4), torch.randn(100, 16)
        >>> before, temperature = head(features), calibrate(head, features, torch.arange(100) % 2)
        >>> torch.allclose(head(features).softmax(1), (before / temperature).softmax(1), atol=1e-4)
        True
    """
    classes = class_gaussians_of(head, torch.float64)
    check_matrix('features', features, head.feat_dim)
    check_targets(targets, len(features), head.num_classes)
    if not len(features):
        raise ValueError('features: expected at least one row')
    step = math.ceil(len(features) * head.num_classes / KEPT)
    _, x = _prepare(classes, features[::step])
    return fold_temperature(head, calibration_temperature(_logits(classes, x), targets[::step]))


@torch.no_grad()
def fold_temperature(head: ZZZHead, temperature: float) -> float:
    """Divide a head's logits by a temperature, up to a term that all classes share, by changing its parameters.

    sigma2 and the variances are multiplied by the temperature, and the biases are corrected (docs/theory.md, claim 11).
    The ranking of the classes stays the same. No temperature has to be stored beside the head, on the Hub or in ONNX.

    Returns:
        The temperature that was applied. It differs from the one asked for if sigma2 would fall below sigma2_min. A
        warning is logged then, and if variances would fall below v_min.

    Raises:
        ValueError: If ``head`` is not a ZZZ head, if its sigma2_raw, v_raw or bias is pruned or parametrized, or if the
            temperature is not finite and > 0.

    Example:
        >>> head = ZZZHead(num_classes=3, feat_dim=16, rank=4, init='reference', dtype=torch.float64)
        >>> features = torch.randn(5, 16)
        >>> before, _ = head(features.double()), fold_temperature(head, 2.0)
        >>> torch.allclose(head(features.double()), before / 2)
        True
    """
    if not isinstance(head, ZZZHead):
        raise ValueError(f'head: expected a ZZZHead, got {type(head).__name__}')
    if not 0 < temperature < math.inf:
        raise ValueError(f'temperature: expected a finite number > 0, got {temperature}')
    own = dict(head.named_parameters(recurse=False))
    for name in ('sigma2_raw', 'bias', *(['v_raw'] if head.rank else [])):
        if name not in own:
            raise ValueError(f'head: its {name} is pruned or parametrized; make that permanent first')
    met: List[str] = []

    def value(name: str) -> Tensor:
        return F.softplus(own[f'{name}_raw'].double()) + getattr(head, f'{name}_min')

    def multiply(name: str, factor: Union[Tensor, float]) -> Tuple[Tensor, Tensor]:
        """Multiply variances by a factor, but not below their minimum; return them before and after."""
        before, minimum = value(name), getattr(head, f'{name}_min')
        above = factor * before - minimum
        if (above < 0).any():
            met.append(f'{name}_min = {minimum}')
        own[f'{name}_raw'].copy_(inverse_softplus(above.clamp(min=1e-3 * minimum)))
        return before, value(name)

    # The other parameters follow the value that was written, which is rounded to the head's dtype
    before, after = multiply('sigma2', temperature)
    taken = after / before
    bias = own['bias'].double()
    if not head.rank:
        own['bias'].copy_(bias / taken)
    else:
        v_before, v_after = multiply('v', taken)
        bias = (bias - 0.5 * (v_before / before).log1p().sum(1)) / taken
        own['bias'].copy_(bias + 0.5 * (v_after / after).log1p().sum(1))
    if met:
        bounds = ' and '.join(met)
        _logger.warning(f'The temperature {temperature:.4g} leads below {bounds}: {taken.item():.4g} is taken')
    return taken.item()


@dataclass(frozen=True, eq=False)
class Background:
    """A single Gaussian for the normalised embeddings of all classes, made by :meth:`of`.

    Attributes:
        mean: Shape (d,), float64.
        factor: Lower Cholesky factor of the covariance, shape (d, d), float64.

    Example:
        >>> background = Background.of(ZZZHead(num_classes=5, feat_dim=16, rank=4))
        >>> background.mahalanobis(torch.randn(3, 16)).shape
        torch.Size([3])
    """

    mean: Tensor
    factor: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, head: Head) -> 'Background':
        """Compute the mean and covariance of a head's mixture of classes, weighted by softmax(bias).

        The covariance is the covariance of the class means plus the mean covariance of the classes.

        Raises:
            ValueError: If ``head`` is not a ZZZ head.
        """
        mu, basis, v, sigma2, bias = head if isinstance(head, ClassGaussians) else class_gaussians_of(head)
        weight = bias.double().softmax(0)
        mean = weight @ mu.double()
        covariance = sigma2.double() * torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
        size = max(1, _VALUES // (mu.shape[1] * (1 if v is None else 1 + v.shape[1])))
        for c in torch.arange(len(mu), device=mu.device).split(size):
            rows = weight[c, None].sqrt() * (mu[c].double() - mean)
            covariance += rows.T @ rows
            if basis is not None and v is not None:
                scale = (weight[c, None] * v[c].double()).sqrt()
                rows = (basis[c].double() * scale[:, None]).mT.flatten(0, 1)
                covariance += rows.T @ rows
        return cls(mean, torch.linalg.cholesky_ex(covariance)[0])

    def mahalanobis(self, features: Tensor) -> Tensor:
        """Compute squared Mahalanobis distances to the mean, shape (N,), for pooled embeddings of shape (N, d).

        Raises:
            ValueError: If ``features`` are not of shape (N, d).
        """
        check_matrix('features', features, len(self.mean))
        x = normalize(full_precision(features))

        def distance2(part: Tensor) -> Tensor:
            delta = part.double() - self.mean
            return torch.linalg.solve_triangular(self.factor, delta.T, upper=False).square().sum(0)

        return _in_parts(distance2, x, x.shape[1]).to(x.dtype)
