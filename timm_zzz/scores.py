"""How well an embedding fits the classes: log-densities, outlier scores, and what they are judged by.

Of every outlier score a larger value means more outlying. docs/scores.md says what each one is and assumes.

Scores are computed in float32, or in float64 if an argument is, whatever autocast says; covariances of data always in
float64. NaN in, NaN out.
"""

import math
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import functional
from .functional import class_gaussians, gaussian_logits, normalize
from .head import ZZZHead

__all__ = [
    'METHODS',
    'Background',
    'Bin',
    'ClassGaussians',
    'SharedGaussian',
    'auroc',
    'class_gaussians_of',
    'ece',
    'energy',
    'fpr95',
    'log_density',
    'mahalanobis',
    'max_logit',
    'max_softmax',
    'negative_log_density',
    'outlier_scores',
    'relative_mahalanobis',
    'reliability',
]

# Those that need nothing but logits come first
_FROM_LOGITS = ('max_logit', 'max_softmax', 'energy')
METHODS = (*_FROM_LOGITS, 'negative_log_density', 'mahalanobis', 'relative_mahalanobis')
BINS = 15
SHRINKAGE = 1e-3
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_VALUES = 2**25  # of an intermediate result that are held at a time


def _full(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _in_parts(function: Callable[[Tensor], Tensor], rows: Tensor, values: int) -> Tensor:
    """``function(rows)`` by a few rows at a time, as it needs ``values`` numbers for each."""
    size = max(1, _VALUES // values)
    # Autocast would take the products of float32 to 16 bits
    with torch.autocast(rows.device.type, enabled=False):
        return torch.cat([function(part) for part in rows.split(size)])


def _check_matrix(name: str, t: Any, width: Optional[int] = None) -> None:
    wanted = 'a floating-point tensor of shape (N, {})'.format('*' if width is None else width)
    if not isinstance(t, Tensor):
        raise ValueError(f'{name}: expected {wanted}, got {type(t).__name__}')
    if t.ndim != 2 or not t.is_floating_point() or t.shape[1] != (width or max(1, t.shape[1])):
        raise ValueError(f'{name}: expected {wanted}, got {t.dtype} of shape {list(t.shape)}')


def _check_targets(targets: Any, count: int, num_classes: Optional[int] = None) -> None:
    if not isinstance(targets, Tensor):
        raise ValueError(f'targets: expected a tensor of {count} class indices, got {type(targets).__name__}')
    if targets.shape != (count,) or targets.dtype not in _INTEGERS:
        got = f'{targets.dtype} of shape {list(targets.shape)}'
        raise ValueError(f'targets: expected {count} class indices, got {got}')
    outside = targets < 0
    if num_classes is not None:
        outside |= targets >= num_classes
    if outside.any():
        limit = '' if num_classes is None else f' and < {num_classes}'
        raise ValueError(f'targets: expected class indices >= 0{limit}, got {int(targets[outside][0])}')


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


@torch.no_grad()
def class_gaussians_of(head: ZZZHead, dtype: Optional[torch.dtype] = None) -> ClassGaussians:
    """The Gaussians of a head's classes, as constants; every score takes them in the place of the head.

    A head's bases are derived at every call, its Gaussians' not: take them where many batches are scored.

    Args:
        head: Any ZZZ head.
        dtype: float32, or float64 for a float64 head, if None.

    Raises:
        ValueError: If ``head`` is something else.

    Example:
        >>> head = ZZZHead(num_classes=200, feat_dim=768, rank=8)
        >>> class_gaussians_of(head).basis.shape
        torch.Size([200, 768, 8])
    """
    if not isinstance(head, ZZZHead):
        raise ValueError(f'head: expected a ZZZHead, got {type(head).__name__}')
    if dtype is None:
        dtype = torch.promote_types(head.weight.dtype, torch.float32)
    weight, sigma2_raw, bias = (t.detach().to(dtype) for t in (head.weight, head.sigma2_raw, head.bias))
    A, v_raw = (t if t is None else t.detach().to(dtype) for t in (head.A, head.v_raw))
    with torch.autocast(weight.device.type, enabled=False):
        mu, basis, v, sigma2 = class_gaussians(weight, A, v_raw, sigma2_raw, head.v_min, head.sigma2_min)
    return ClassGaussians(mu, basis, v, sigma2, bias)


Head = Union[ZZZHead, ClassGaussians]


def _prepare(head: Head, features: Tensor) -> Tuple[ClassGaussians, Tensor]:
    """The head's classes and the normalised embeddings, of one dtype."""
    if not isinstance(head, (ZZZHead, ClassGaussians)):
        raise ValueError(f'head: expected a ZZZHead or its ClassGaussians, got {type(head).__name__}')
    mu = head.weight if isinstance(head, ZZZHead) else head.mu
    _check_matrix('features', features, mu.shape[1])
    dtype = torch.promote_types(torch.promote_types(features.dtype, mu.dtype), torch.float32)
    if isinstance(head, ZZZHead):
        classes = class_gaussians_of(head, dtype)
    else:
        cast: List[Any] = [t if t is None else t.to(dtype) for t in head]
        classes = ClassGaussians(*cast)
    return classes, normalize(features.to(dtype))


def _per_row(classes: ClassGaussians) -> int:
    """How many numbers the densities of one embedding need."""
    return len(classes.mu) * (1 if classes.v is None else 1 + classes.v.shape[1])


def log_density(head: Head, features: Tensor) -> Tensor:
    """Log-densities of the classes, log N(x; mu_c, Sigma_c), for ``x = f / |f|``.

    They are densities on R^d, at points of the unit sphere. The head's logits are these plus d/2 log(2 pi) plus bias_c.

    Args:
        head: A ZZZ head, or its :func:`class_gaussians_of`.
        features: Pooled embeddings f as the head gets them, shape (N, d).

    Returns:
        Nats, shape (N, C). They differentiate in the features, not in the head.

    Raises:
        ValueError: If ``head`` is no ZZZ head, or ``features`` not of shape (N, d).

    Example:
        >>> head = ZZZHead(num_classes=2, feat_dim=3, rank=0, sigma2_init=0.5)
        >>> _ = head.load_state_dict({'weight': torch.eye(2, 3), 'bias': torch.zeros(2)})
        >>> log_density(head, torch.tensor([[5., 0., 0.]]))  # the squared distances are 0 and 2
        tensor([[-1.7171, -3.7171]])
    """
    classes, x = _prepare(head, features)
    return _in_parts(lambda part: functional.log_density(part, *classes[:4]), x, _per_row(classes))


# Outlier scores from logits


def max_logit(logits: Tensor) -> Tensor:
    """Minus the largest logit (Hendrycks et al. 2022, arXiv:1911.11132).

    Args:
        logits: Of any head, shape (N, C).

    Returns:
        Shape (N,), larger = more outlying.

    Raises:
        ValueError: If ``logits`` is not of shape (N, C).

    Example:
        >>> max_logit(torch.tensor([[1., 3.]]))
        tensor([-3.])
    """
    _check_matrix('logits', logits)
    return -_full(logits).amax(1)


def max_softmax(logits: Tensor) -> Tensor:
    """One minus the largest softmax probability (Hendrycks and Gimpel 2017, arXiv:1610.02136).

    Taken as the sum of the other classes' probabilities, which keeps its digits where 1 - p would be rounded to 0.

    Args:
        logits: Of any head, shape (N, C).

    Returns:
        0 to 1 - 1 / C, shape (N,), larger = more outlying.

    Raises:
        ValueError: If ``logits`` is not of shape (N, C).

    Example:
        >>> max_softmax(torch.tensor([[0., 0.], [0., 40.]]))
        tensor([5.0000e-01, 4.2484e-18])
    """
    _check_matrix('logits', logits)
    logits = _full(logits)
    top, index = logits.max(1, keepdim=True)
    others = (logits - top).exp().scatter(1, index, 0.0).sum(1)  # as multiples of the largest probability
    return others / (1 + others)


def energy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """The energy -T log sum_c exp(logit_c / T) (Liu et al. 2020, arXiv:2010.03759, eq. 4).

    Of a ZZZ head's logits with T = 1 it is :func:`negative_log_density` up to a constant.

    Args:
        logits: Of any head, shape (N, C).
        temperature: T > 0, in the logits' units.

    Returns:
        Shape (N,), larger = more outlying.

    Raises:
        ValueError: If ``logits`` is not of shape (N, C), or ``temperature`` not finite and > 0.

    Example:
        >>> energy(torch.tensor([[0., 0.]]))
        tensor([-0.6931])
    """
    _check_matrix('logits', logits)
    if not 0 < temperature < math.inf:
        raise ValueError(f'temperature: expected a finite number > 0, got {temperature}')
    return -temperature * (_full(logits) / temperature).logsumexp(1)


# Outlier scores from a ZZZ head


def negative_log_density(head: Head, features: Tensor) -> Tensor:
    """-log p(x) of the mixture of the classes, p(x) = sum_c pi_c N(x; mu_c, Sigma_c) with pi = softmax(bias).

    The head's softmax is the posterior exp(bias_c) N_c(x) / sum_k exp(bias_k) N_k(x), so the biases are log-priors up
    to a constant, which no softmax sees; that the priors sum to 1 settles it.

    Args:
        head: A ZZZ head, or its :func:`class_gaussians_of`.
        features: Pooled embeddings as the head gets them, shape (N, d).

    Returns:
        Nats, shape (N,), larger = more outlying.

    Raises:
        ValueError: If ``head`` is no ZZZ head, or ``features`` not of shape (N, d).

    Example:
        >>> head = ZZZHead(num_classes=2, feat_dim=3, rank=0, sigma2_init=0.5)
        >>> _ = head.load_state_dict({'weight': torch.eye(2, 3), 'bias': torch.zeros(2)})
        >>> negative_log_density(head, torch.tensor([[1., 0., 0.], [0., 0., 1.]]))
        tensor([2.2833, 3.7171])
    """
    classes, x = _prepare(head, features)
    log_prior = classes.bias.log_softmax(0)
    return _in_parts(
        lambda part: -(functional.log_density(part, *classes[:4]) + log_prior).logsumexp(1), x, _per_row(classes)
    )


def mahalanobis(head: Head, features: Tensor) -> Tensor:
    """The smallest squared Mahalanobis distance to a class, min_c (x - mu_c)^T Sigma_c^-1 (x - mu_c).

    As Lee et al. 2018 (arXiv:1807.03888), but under each class's own covariance and with what the head has learnt.

    Args:
        head: A ZZZ head, or its :func:`class_gaussians_of`.
        features: Pooled embeddings as the head gets them, shape (N, d).

    Returns:
        >= 0, shape (N,), larger = more outlying.

    Raises:
        ValueError: If ``head`` is no ZZZ head, or ``features`` not of shape (N, d).

    Example:
        >>> head = ZZZHead(num_classes=2, feat_dim=3, rank=0, sigma2_init=0.5)
        >>> _ = head.load_state_dict({'weight': torch.eye(2, 3), 'bias': torch.zeros(2)})
        >>> mahalanobis(head, torch.tensor([[1., 0., 0.], [0., 0., 1.]])).round(decimals=4)
        tensor([0., 4.])
    """
    classes, x = _prepare(head, features)
    mu, basis, v, sigma2, _ = classes
    # In units of sigma the density's d log sigma2, which may be in the thousands, is 0 and costs no digits.
    sigma, one = sigma2.sqrt(), torch.ones_like(sigma2)
    mu, v = mu / sigma, v if v is None else v / sigma2
    log_det = 0.0 if v is None else v.log1p().sum(1)

    def smallest(part: Tensor) -> Tensor:
        return (-2 * gaussian_logits(part / sigma, mu, basis, v, one) - log_det).amin(1)

    return _in_parts(smallest, x, _per_row(classes)).clamp(min=0)


def relative_mahalanobis(head: Head, features: Tensor, background: Optional['Background'] = None) -> Tensor:
    """:func:`mahalanobis` minus the squared Mahalanobis distance to a background (Ren et al. 2021, arXiv:2106.09022).

    Args:
        head: A ZZZ head, or its :func:`class_gaussians_of`.
        features: Pooled embeddings as the head gets them, shape (N, d).
        background: ``Background.fit(training_features)``; ``Background.of(head)``, which needs no data, if None.

    Returns:
        Shape (N,), of either sign, larger = more outlying.

    Raises:
        ValueError: If ``head`` is no ZZZ head, ``features`` not of shape (N, d), or ``background`` no
            :class:`Background`, or of another width.

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
    """Several outlier scores of the same embeddings.

    Args:
        head: A ZZZ head or its :func:`class_gaussians_of`, or a linear layer.
        features: Pooled embeddings as the head gets them, shape (N, d).
        methods: Names of :data:`METHODS`. If None all of them, for a linear layer the three that need nothing but
            logits: :func:`max_logit`, :func:`max_softmax`, :func:`energy`.
        background: As in :func:`relative_mahalanobis`.

    Returns:
        By name the scores, each of shape (N,), larger = more outlying.

    Raises:
        ValueError: For an unknown method, one that the head has no Gaussians for, another ``head``, or ``features`` not
            of shape (N, d).

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
        _check_matrix('features', features, head.in_features)
        logits = _linear_logits(head, features)
        return {method: _LOGIT_SCORES[method](logits) for method in methods}

    head, _ = _prepare(head, features)
    scores: Dict[str, Tensor] = {}
    if any(method in _LOGIT_SCORES for method in methods):
        logits = log_density(head, features) + (0.5 * features.shape[1] * math.log(2 * math.pi) + head.bias)
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


# Gaussians of data


def _factor(covariance: Tensor, count: int, shrinkage: float) -> Tensor:
    """The Cholesky factor of a covariance (d, d) of ``count`` embeddings, shrunk towards a multiple of the identity."""
    if not covariance.isfinite().all():
        raise ValueError('features: NaN or infinite')
    width, variance = len(covariance), covariance.diagonal()
    covariance = (1 - shrinkage) * covariance
    covariance.diagonal().add_(shrinkage * variance.mean())
    factor, info = torch.linalg.cholesky_ex(covariance)
    if info or factor.diagonal().square().min() <= width * torch.finfo(factor.dtype).eps * variance.max():
        raise ValueError(
            f'features: the covariance of {count} embeddings of width {width} is singular with shrinkage {shrinkage}; '
            'more embeddings are needed, or more shrinkage'
        )
    return factor


def _check_fit(features: Tensor, shrinkage: float) -> None:
    _check_matrix('features', features)
    if not len(features):
        raise ValueError(f'features: expected at least one embedding, got shape {list(features.shape)}')
    if not 0 <= shrinkage <= 1:
        raise ValueError(f'shrinkage: expected a number from 0 to 1, got {shrinkage}')


def _covariance(features: Tensor, means: Tensor, index: Tensor) -> Tensor:
    """Mean outer product of what features (N, d) deviate from the rows ``index`` (N,) of means (K, d), in float64."""
    total = means.new_zeros(means.shape[1], means.shape[1])
    size = max(1, _VALUES // means.shape[1])
    for x, i in zip(features.split(size), index.split(size), strict=True):
        delta = x.double() - means[i]
        total += delta.T @ delta
    return total / len(features)


def _whiten(delta: Tensor, factor: Tensor) -> Tensor:
    """Rows (N, d) in coordinates in which the covariance is the identity."""
    return torch.linalg.solve_triangular(factor, delta.T, upper=False).T


@dataclass(frozen=True, eq=False)
class Background:
    """One Gaussian for all embeddings, whatever their class, over normalised embeddings as the head has them.

    Attributes:
        mean: Shape (d,), float64.
        factor: Lower Cholesky factor of the covariance, shape (d, d), float64.

    Example:
        >>> background = Background.fit(torch.randn(1000, 16))
        >>> background.mahalanobis(torch.randn(3, 16)).shape
        torch.Size([3])
    """

    mean: Tensor
    factor: Tensor

    @classmethod
    @torch.no_grad()
    def fit(cls, features: Tensor, shrinkage: float = SHRINKAGE) -> 'Background':
        """From embeddings of training images, by their mean and covariance S.

        Args:
            features: Pooled embeddings as the head gets them, shape (N, d).
            shrinkage: s in (1 - s) S + s tr(S) / d I, 0 to 1. The small default is there against singular covariances.

        Raises:
            ValueError: If ``features`` is not of shape (N, d) or empty or has NaN or infinite values, if the covariance
                is singular, or ``shrinkage`` is out of its range.
        """
        _check_fit(features, shrinkage)
        x = normalize(_full(features))
        mean = x.mean(0, dtype=torch.float64)
        index = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return cls(mean, _factor(_covariance(x, mean[None], index), len(x), shrinkage))

    @classmethod
    @torch.no_grad()
    def of(cls, head: Head) -> 'Background':
        """Without data: with the mean and covariance of the head's own mixture of classes, weighted by softmax(bias).

        The covariance is that of the means plus the mean of the classes' own.

        Raises:
            ValueError: If ``head`` is no ZZZ head.
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
        """Squared Mahalanobis distances to the mean, shape (N,), for pooled embeddings of shape (N, d).

        Raises:
            ValueError: If ``features`` is not of shape (N, d).
        """
        _check_matrix('features', features, len(self.mean))
        x = normalize(_full(features))
        distance2 = _in_parts(
            lambda part: _whiten(part.double() - self.mean, self.factor).square().sum(1), x, x.shape[1]
        )
        return distance2.to(x.dtype)


@dataclass(frozen=True, eq=False)
class SharedGaussian:
    """Class means and one covariance for all classes, from training embeddings: what goes with a linear head.

    Its scores are those of Lee et al. 2018 (arXiv:1807.03888), of the last layer alone, and Ren et al. 2021
    (arXiv:2106.09022). Embeddings are taken as they are: for unit vectors pass
    :func:`timm_zzz.functional.normalize` of them, here and to the scores.

    Attributes:
        means: Means of the K classes that have examples, shape (K, d), float64.
        factor: Lower Cholesky factor of the covariance about them, shape (d, d), float64.
        mean: Mean of all embeddings, shape (d,), float64.
        background_factor: Lower Cholesky factor of the covariance about it, shape (d, d), float64.

    Example:
        >>> targets = torch.arange(300) % 3
        >>> features = torch.randn(300, 8) + 5 * torch.eye(3, 8)[targets]
        >>> gaussian = SharedGaussian.fit(features, targets)
        >>> near, far = gaussian.mahalanobis(torch.stack([5 * torch.eye(3, 8)[0], -5 * torch.ones(8)]))
        >>> bool(near < far)
        True
    """

    means: Tensor
    factor: Tensor
    mean: Tensor
    background_factor: Tensor

    @classmethod
    @torch.no_grad()
    def fit(cls, features: Tensor, targets: Tensor, shrinkage: float = SHRINKAGE) -> 'SharedGaussian':
        """From embeddings and classes of training images.

        Args:
            features: Pooled embeddings, shape (N, d).
            targets: Class indices, shape (N,), >= 0.
            shrinkage: Of both covariances, as in :meth:`Background.fit`.

        Raises:
            ValueError: As in :meth:`Background.fit`, and for ``targets`` that are no class indices of shape (N,).
        """
        _check_fit(features, shrinkage)
        _check_targets(targets, len(features))
        index = torch.unique(targets.to(features.device), return_inverse=True)[1]
        count = index.bincount()
        means = torch.zeros(len(count), features.shape[1], dtype=torch.float64, device=features.device)
        size = max(1, _VALUES // features.shape[1])
        for x, i in zip(features.split(size), index.split(size), strict=True):
            means.index_add_(0, i, x.double())
        mean = means.sum(0) / len(features)
        means /= count[:, None]
        covariances = [_covariance(features, means, index), _covariance(features, mean[None], torch.zeros_like(index))]
        factor, background_factor = (_factor(covariance, len(features), shrinkage) for covariance in covariances)
        return cls(means, factor, mean, background_factor)

    def mahalanobis(self, features: Tensor) -> Tensor:
        """The smallest squared Mahalanobis distance to a class mean.

        Args:
            features: Pooled embeddings, shape (N, d).

        Returns:
            >= 0, shape (N,), larger = more outlying.

        Raises:
            ValueError: If ``features`` is not of shape (N, d).
        """
        _check_matrix('features', features, len(self.mean))
        means = _whiten(self.means - self.mean, self.factor)

        def smallest(part: Tensor) -> Tensor:
            return torch.cdist(_whiten(part.double() - self.mean, self.factor), means).amin(1).square()

        return _in_parts(smallest, features, sum(means.shape)).to(_full(features[:0]).dtype)

    def relative_mahalanobis(self, features: Tensor) -> Tensor:
        """:meth:`mahalanobis` minus the squared distance to the mean of all under the covariance of all.

        Args:
            features: Pooled embeddings, shape (N, d).

        Returns:
            Shape (N,), of either sign, larger = more outlying.

        Raises:
            ValueError: If ``features`` is not of shape (N, d).
        """
        near = self.mahalanobis(features)

        def distance2(part: Tensor) -> Tensor:
            return _whiten(part.double() - self.mean, self.background_factor).square().sum(1)

        return near - _in_parts(distance2, features, features.shape[1]).to(near.dtype)


# What scores and probabilities are judged by


def _sklearn_metrics() -> Any:
    try:
        from sklearn import metrics
    except ImportError as e:
        raise ImportError('auroc and fpr95 need scikit-learn: pip install "timm_zzz[benchmark]"') from e
    return metrics


def _labelled(inlier_scores: Any, outlier_scores: Any) -> Tuple[Any, Any]:
    """Labels, 1 for outliers, and scores, as NumPy arrays."""
    parts: List[Tensor] = []
    for name, scores in (('inlier_scores', inlier_scores), ('outlier_scores', outlier_scores)):
        scores = torch.as_tensor(scores, dtype=torch.float64).detach().cpu()
        if scores.ndim != 1 or not len(scores):
            raise ValueError(f'{name}: expected shape (N,) with N >= 1, got {list(scores.shape)}')
        if not scores.isfinite().all():
            i = int((~scores.isfinite()).nonzero()[0])
            raise ValueError(f'{name}: expected finite scores, got {scores[i]} at index {i}')
        parts.append(scores)
    labels = torch.cat([torch.full_like(part, label) for label, part in enumerate(parts)])
    return labels.numpy(), torch.cat(parts).numpy()


def auroc(inlier_scores: Tensor, outlier_scores: Tensor) -> float:
    """The area under the ROC curve with outliers as the positive class; by scikit-learn.

    It is the probability that an outlier has a larger score than an inlier, ties counted half: 0.5 for a score that
    knows nothing, 1 for one that separates the two.

    Args:
        inlier_scores: Shape (N,), larger = more outlying.
        outlier_scores: Shape (M,), of the same kind.

    Raises:
        ValueError: For scores that are NaN or infinite, none, or not of one dimension.
        ImportError: Without scikit-learn, which ``timm_zzz[benchmark]`` brings.

    Example:
        >>> auroc(torch.tensor([0., 1., 2.]), torch.tensor([1., 3.]))  # 4 1/2 of 6 pairs
        0.75
    """
    labels, scores = _labelled(inlier_scores, outlier_scores)
    return float(_sklearn_metrics().roc_auc_score(labels, scores))


def fpr95(inlier_scores: Tensor, outlier_scores: Tensor) -> float:
    """The share of outliers that are taken for inliers where at least 95 % of the inliers are; by scikit-learn.

    An image is accepted if its score is at most t; t is the smallest inlier score that accepts at least 95 % of the
    inliers. Nothing is interpolated, and outliers that tie with t are accepted.

    With outliers as the positive class, as in :func:`auroc`, this is their false negative rate where the true negative
    rate is 95 %; Liu et al. 2020 (arXiv:2010.03759), for whom inliers are positive, call it FPR95. Hendrycks et al.
    2019 (arXiv:1812.04606) call by the same name the share of inliers rejected where 95 % of the outliers are: that is
    ``fpr95(-outlier_scores, -inlier_scores)``.

    Args:
        inlier_scores: Shape (N,), larger = more outlying.
        outlier_scores: Shape (M,), of the same kind.

    Returns:
        0 to 1, smaller = better.

    Raises:
        ValueError: For scores that are NaN or infinite, none, or not of one dimension.
        ImportError: Without scikit-learn, which ``timm_zzz[benchmark]`` brings.

    Example:
        >>> fpr95(torch.arange(20.), torch.tensor([17., 18., 19., 20.]))  # 18 accepts 19 of 20
        0.5
    """
    labels, scores = _labelled(inlier_scores, outlier_scores)
    false, true, _ = _sklearn_metrics().roc_curve(1 - labels, -scores, drop_intermediate=False)
    return float(false[(true >= 0.95).argmax()])


@dataclass(frozen=True)
class Bin:
    """Images whose predictions have a confidence in (low, high]."""

    low: float
    high: float
    count: int
    accuracy: float  # 0 without images
    confidence: float  # mean


def reliability(confidence: Tensor, correct: Tensor, bins: int = BINS) -> Tuple[List[Bin], float]:
    """Bins of equal width and the expected calibration error (Guo et al. 2017, arXiv:1706.04599, eq. 3).

    Args:
        confidence: Probabilities of the predicted classes, shape (N,), 0 to 1.
        correct: Whether the predictions are right, shape (N,).
        bins: How many, >= 1.

    Returns:
        The bins, and the error, 0 to 1.

    Raises:
        ValueError: For no images, shapes that differ, a confidence that is no probability, or ``bins`` < 1.

    Example:
        >>> table, error = reliability(torch.tensor([0.9, 0.8, 0.3]), torch.tensor([True, False, True]), bins=2)
        >>> [(row.count, row.accuracy) for row in table], round(error, 4)
        ([(1, 1.0), (2, 0.5)], 0.4667)
    """
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise ValueError(f'bins: expected an int >= 1, got {bins!r}')
    if confidence.ndim != 1 or not len(confidence):
        raise ValueError(f'confidence: expected shape (N,) with N >= 1, got {list(confidence.shape)}')
    if correct.shape != confidence.shape:
        raise ValueError(f'correct: expected shape {list(confidence.shape)}, got {list(correct.shape)}')
    outside = ~((confidence >= 0) & (confidence <= 1))
    if outside.any():
        raise ValueError(f'confidence: expected probabilities, 0 to 1, got {float(confidence[outside][0])}')
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    count = index.bincount(minlength=bins)
    divisor = count.clamp(min=1)
    accuracy = index.bincount(correct.double(), minlength=bins) / divisor
    mean = index.bincount(confidence.double(), minlength=bins) / divisor
    error = ((accuracy - mean).abs() * count).sum() / len(confidence)
    rows = zip(count.tolist(), accuracy.tolist(), mean.tolist(), strict=True)
    return [Bin(k / bins, (k + 1) / bins, *row) for k, row in enumerate(rows)], error.item()


def ece(logits: Tensor, targets: Tensor, bins: int = BINS) -> float:
    """The expected calibration error of a softmax, by :func:`reliability`; logits may be log-probabilities.

    Args:
        logits: Shape (N, C).
        targets: Class indices, shape (N,).
        bins: How many bins of equal width.

    Returns:
        0 to 1.

    Raises:
        ValueError: For no images, logits without a softmax (NaN, inf), targets that are no class indices, or
            ``bins`` < 1.

    Example:
        >>> round(ece(torch.tensor([[0.8, 0.2], [0.2, 0.8]]).log(), torch.tensor([0, 0])), 4)  # 50 % right at 80 %
        0.3
    """
    _check_matrix('logits', logits)
    _check_targets(targets, len(logits), logits.shape[1])
    confidence, prediction = _full(logits).softmax(1).max(1)
    if confidence.isnan().any():
        raise ValueError(f'logits: NaN or infinite in row {int(confidence.isnan().nonzero()[0])}')
    return reliability(confidence, prediction == targets.to(prediction.device), bins)[1]
