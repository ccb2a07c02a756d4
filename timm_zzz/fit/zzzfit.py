"""Fit the ZZZ head in closed form; docs/fit_theory.md has the estimators, their form in the head, and the cost."""

import copy
import logging
import math
import warnings
from typing import Any, Callable, Dict, Iterable, Iterator, Optional, Tuple, Union

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.nn import functional as F

from ..head import INIT_STD, SIGMA2_INIT, ZZZHead, heads_of, record_inputs
from ..metrics import best_temperature
from ..ops.reference import inverse_softplus
from .estimators import Density, Discriminant, Estimator, Quadratic
from .gather import Step, broadcast, gathered, process
from .moments import HeldOut, Moments, as_features, as_labels

__all__ = ['PRESETS', 'ZZZFit', 'fit_head', 'fit_model']

_logger = logging.getLogger(__name__)

OBJECTIVES: Dict[str, Callable[[Moments, int, bool], Estimator]] = {'discriminant': Discriminant, 'density': Density}
SHRINKAGES = {'discriminant': (0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02), 'density': (0.0,)}
PRIOR_COUNTS = (1000.0, 100.0, 10.0)  # of options with equal likelihood the first is chosen
PRECISIONS = (9000.0, 3000.0, 1000.0)  # upper bounds on 1 / sigma2 to choose from
PRECISION_OF_A_START = 200.0  # the bound if sigma2 is given
# Purposes of a fit; docs/fit.md says which to use
PRESETS: Dict[str, Dict[str, Any]] = {
    'frozen': dict(sigma2=None, mean_spread=1.0, v_ratio=None),
    'finetune': dict(sigma2=1 / 16, mean_spread=0.3, v_ratio=0.1),
}
OVERSAMPLING = 8  # number of rows of a class's sketch beyond the rank


class ZZZFit:
    """Estimate a ZZZ head in closed form from batches of features, in one pass; the interface is scikit-learn's.

    The objective ``'discriminant'`` is linear discriminant analysis with a shrunken pooled covariance, to which each
    class adds up to r directions along which its own examples vary more. ``'density'`` is the maximum likelihood of the
    head's own model. The latest examples of each class are held out until the end: their likelihood chooses the options
    that are ``'auto'``. Up to rounding, the head does not depend on how the examples are split into batches. The
    derivation is in docs/fit_theory.md.

    Args:
        num_classes: Number of classes C, >= 1.
        rank: Rank r of the class covariances, 0 <= r <= d. A class with few examples has fewer directions of its own;
            the others are leading directions of the pooled covariance, with variance v_min.
        preset: A name in ``PRESETS``: ``'frozen'`` for a classifier on a backbone that is not trained, or
            ``'finetune'`` for a start from which the backbone is trained too. It sets those of sigma2, mean_spread and
            v_ratio that are None.
        objective: ``'discriminant'`` or ``'density'``.
        shrinkage: Weight of the identity, scaled to the same trace, in the pooled covariance, 0 to 1. ``'auto'`` is 0
            for the density.
        prior_count: Weight of the pooled covariance in the covariance of a class, as a number of examples, >= 0.
        temperature: Factor T > 0 on the logits; with 1 they are the log-densities of the estimated Gaussians.
        sigma2: The head's isotropic variance, in place of the one that follows from the temperature.
        max_precision: Upper bound on 1 / sigma2, at the fit's own temperature, >= 0. Smaller values spread the class
            means further apart and clip class-specific variance of the discriminant. ``'auto'`` chooses 9000, 3000 or
            1000 by held-out examples; if sigma2 is given it is 200, which trained better.
        mean_spread: Factor on the distances of the class means mu_c from their common direction m, 0 to 1: they become
            normalize(m + mean_spread (mu_c - m)). The bias is adapted so that decisions stay nearly the same.
        v_ratio: Ratio v / sigma2 of all directions, >= 0, in place of the fitted ones. The directions stay; those that
            a class lacks are of the largest pooled variance, not of the least.
        holdout: Share of each class's examples to hold out, 0 to 0.5, at least one of every class that has two.
        max_holdout: Approximate upper limit of held-out examples; one per class is held out in any case.
        class_prior: ``'uniform'``, or ``'empirical'`` for a bias from the class frequencies.
        device: Device to compute on; that of the first features if None.
        dtype: Dtype of the head's parameters. Everything else is in float64.

    Attributes:
        n_samples_: Number of examples so far.
        class_count_: Number of examples of each class, int64, shape (C,).
        shrinkage_: Chosen or given shrinkage; set by :meth:`fit` or :meth:`to_head`.
        prior_count_: Chosen or given prior count, likewise.
        temperature_: Chosen or given temperature, likewise.

    Raises:
        ValueError: For an argument out of its range.

    Example:
        >>> X, y = torch.randn(60, 16), torch.arange(60) % 3
        >>> estimator = ZZZFit(num_classes=3, rank=2)
        >>> for batch in range(0, 60, 20):
        ...     _ = estimator.partial_fit(X[batch : batch + 20], y[batch : batch + 20])
        >>> estimator.to_head()
        ZZZHead(num_classes=3, feat_dim=16, rank=2)
    """

    n_samples_: int
    class_count_: Tensor
    shrinkage_: float
    prior_count_: float
    temperature_: float

    def __init__(
        self,
        num_classes: int,
        rank: int = 8,
        *,
        preset: str = 'frozen',
        objective: str = 'discriminant',
        shrinkage: Union[str, float] = 'auto',
        prior_count: Union[str, float] = 'auto',
        temperature: Union[str, float] = 'auto',
        sigma2: Optional[float] = None,
        max_precision: Union[str, float] = 'auto',
        mean_spread: Optional[float] = None,
        v_ratio: Optional[float] = None,
        holdout: float = 0.2,
        max_holdout: int = 4096,
        class_prior: str = 'uniform',
        device: Union[None, str, torch.device] = None,
        dtype: torch.dtype = torch.float32,
    ):
        for name, value, least in (('num_classes', num_classes, 1), ('rank', rank, 0), ('max_holdout', max_holdout, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f'{name}: expected an int >= {least}, got {value!r}')
        for name, choice, choices in (
            ('objective', objective, tuple(OBJECTIVES)),
            ('class_prior', class_prior, ('uniform', 'empirical')),
            ('preset', preset, tuple(PRESETS)),
        ):
            if choice not in choices:
                raise ValueError(f'{name}: expected one of {", ".join(choices)}, got {choice!r}')
        if sigma2 is not None and temperature != 'auto':
            raise ValueError(f'sigma2: it sets the temperature, give only one of them, got temperature={temperature}')
        numbers = PRESETS[preset]
        if sigma2 is None and temperature == 'auto':
            sigma2 = numbers['sigma2']
        mean_spread = numbers['mean_spread'] if mean_spread is None else mean_spread
        v_ratio = numbers['v_ratio'] if v_ratio is None else v_ratio
        self.num_classes = num_classes
        self.rank = rank
        self.preset = preset
        self.objective = objective
        self.shrinkage = _auto_or_number('shrinkage', shrinkage, 0, 1)
        self.prior_count = _auto_or_number('prior_count', prior_count, 0, math.inf)
        self.temperature = _auto_or_number('temperature', temperature, 1e-9, 1e9)
        self.sigma2 = None if sigma2 is None else _number('sigma2', sigma2, 1e-6, 1e6)
        self.max_precision = _auto_or_number('max_precision', max_precision, 0, 1e9)
        self.mean_spread = _number('mean_spread', mean_spread, 0, 1)
        self.v_ratio = None if v_ratio is None else _number('v_ratio', v_ratio, 0, 1e6)
        self.holdout = _number('holdout', holdout, 0, 0.5)
        self.max_holdout = max_holdout
        self.class_prior = class_prior
        self.device = None if device is None else torch.device(device)
        self.dtype = dtype
        self._reset()

    def _reset(self) -> None:
        self._held_out: Optional[HeldOut] = None
        self._solution: Optional[Tuple[Quadratic, float, float]] = None
        self.n_samples_ = 0

    @torch.no_grad()
    def fit(self, X: Any, y: Any) -> 'ZZZFit':
        """Fit to these examples only. Arguments as in :meth:`partial_fit`, errors also as in :meth:`to_head`."""
        self._reset()
        self.partial_fit(X, y)
        self._solved()
        return self

    @torch.no_grad()
    def partial_fit(self, X: Any, y: Any) -> 'ZZZFit':
        """Add a batch of examples.

        Args:
            X: Features as the head gets them, a tensor or array of shape (N, d). Zero vectors stay zero.
            y: Class indices of the features, integers from 0 to C - 1, shape (N,).

        Raises:
            ValueError: For other shapes or labels, NaN or infinite features, or a rank above d; nothing is added then.
        """
        X, y = as_features(X), as_labels(y, self.num_classes)
        width = X.shape[1]
        if len(X) != len(y):
            raise ValueError(f'y: expected {len(X)} labels, one per row of X, got {len(y)}')
        if self.rank > width:
            raise ValueError(f'rank: expected at most the width {width} of the features, got {self.rank}')
        if self._held_out is None:
            device = X.device if self.device is None else self.device
            if device.type == 'mps':  # does not support float64
                device = torch.device('cpu')
            moments = Moments(self.num_classes, width, min(self.rank + OVERSAMPLING, width) if self.rank else 0, device)
            self._held_out = HeldOut(moments, self.holdout if self._tunes() else 0.0, self.max_holdout)
            self.class_count_ = torch.zeros(self.num_classes, dtype=torch.int64, device=device)
        before = self._held_out.moments.mean.shape[1]
        if before != width:
            raise ValueError(f'X: expected rows of {before} values as before, got {width}')
        y = y.to(self.class_count_.device)
        self._solution = None
        self.class_count_ += y.bincount(minlength=self.num_classes)
        self.n_samples_ += len(y)
        self._held_out.add(X, y)
        return self

    @torch.no_grad()
    def to_head(self, **options: Any) -> ZZZHead:
        """Create a head from the examples so far.

        Args:
            options: Further arguments of :class:`~timm_zzz.ZZZHead`. Variances are at least its v_min and sigma2_min.

        Raises:
            ValueError: If there are no examples, or a class has none.

        Warns:
            UserWarning: If options are ``'auto'`` and there is no held-out example to choose them by. The defaults are
                a shrinkage of 0.9, a prior count of 1000, and the temperature for which sigma2 is 1/16.
        """
        rows = self._solved()[0].rows
        options = dict(device=rows.device, dtype=self.dtype, **options)
        return self.fill(ZZZHead(self.num_classes, rows.shape[1], self.rank, **options))

    @torch.no_grad()
    def fill(self, head: ZZZHead) -> ZZZHead:
        """Set the parameters of a head of the same size, in place, and return it.

        Raises:
            ValueError: If the head has another size, and as :meth:`to_head`.
        """
        form, temperature, fraction = self._solved()
        size = (self.num_classes, form.rows.shape[1], self.rank)
        if (head.num_classes, head.feat_dim, head.rank) != size:
            raise ValueError(f'head: expected classes, features and rank {size}, got {head}')
        a = form.precision()
        sigma2 = max(1 / (a * temperature), 1.01 * head.sigma2_min)
        v = (form.gain / (a - form.gain) * sigma2).clamp(min=1.01 * head.v_min)
        left = (form.centre.square().sum(1) / sigma2 + (v / sigma2).log1p().sum(1)) / 2  # what the head subtracts
        bias = form.offset / (a * sigma2) + left + fraction * self._log_prior()
        # As long as random rows: shorter ones would change direction within a few steps
        head.weight.copy_(form.centre * (INIT_STD * form.centre.shape[1] ** 0.5))
        head.bias.copy_(bias - bias.mean())
        head.sigma2_raw.copy_(inverse_softplus(torch.tensor(sigma2 - head.sigma2_min, dtype=torch.float64)))
        if head.A is not None and head.v_raw is not None:
            head.A.copy_(form.directions.mT)
            head.v_raw.copy_(inverse_softplus(v - head.v_min))
        return head

    def _solved(self) -> Tuple[Quadratic, float, float]:
        """Return the classifier in the form of the head, its temperature, and the factor of mean_spread on logits."""
        if self._solution is not None:
            return self._solution
        if self._held_out is None:
            raise ValueError('no examples yet: call fit or partial_fit')
        missing = (self.class_count_ == 0).nonzero()[:, 0].tolist()
        if missing:
            some = ', '.join(map(str, missing[:5])) + (', ...' if len(missing) > 5 else '')
            raise ValueError(f'y: {len(missing)} of {self.num_classes} classes have no example: {some}')
        x, y = self._held_out.examples()
        temperature, most = self._choose(self._held_out.moments, x, y)
        everything = copy.deepcopy(self._held_out.moments)
        everything.add(x, y)
        estimator = self._estimator(everything)
        if not isinstance(self.temperature, str):
            temperature = self.temperature / estimator.scale
        elif temperature is None:
            form = estimator.head_form(self.shrinkage_, self.prior_count_, 1.0, math.inf)
            temperature = 1 / (SIGMA2_INIT * form.precision())
        form = estimator.head_form(self.shrinkage_, self.prior_count_, temperature, most)
        if self.sigma2 is not None:
            temperature = 1 / (self.sigma2 * form.precision())
        self.temperature_ = temperature * estimator.scale
        fraction = 1.0
        if self.mean_spread < 1 or self.v_ratio is not None:
            form, fraction = form.pulled(self.mean_spread, self.v_ratio, everything.mean_embedding())
        self._solution = form, temperature, fraction
        few = int((self.class_count_ <= self.rank).sum())
        if few:
            _logger.info(f'{few} of {self.num_classes} classes have at most {self.rank} examples: fewer directions.')
        return self._solution

    def _choose(self, moments: Moments, x: Tensor, y: Tensor) -> Tuple[Optional[float], float]:
        """Choose shrinkage and prior count by the likelihood of held-out examples; use defaults if there are none.

        Returns:
            The temperature, None without held-out examples, and the bound on the precision.
        """
        shrinkages = SHRINKAGES[self.objective] if isinstance(self.shrinkage, str) else (self.shrinkage,)
        prior_counts = PRIOR_COUNTS if isinstance(self.prior_count, str) else (self.prior_count,)
        bounds: Tuple[float, ...] = PRECISIONS if self.sigma2 is None else (PRECISION_OF_A_START,)
        if not isinstance(self.max_precision, str):
            bounds = (self.max_precision,)
        self.shrinkage_, self.prior_count_ = shrinkages[0], prior_counts[0]
        if not len(y):
            if self._tunes():
                message = 'no held-out example to choose shrinkage, prior_count or temperature by: defaults are taken'
                warnings.warn(message, UserWarning, stacklevel=5)
            return None, bounds[0]
        estimator = self._estimator(moments)

        def scored(form: Quadratic, x: Tensor) -> Tuple[float, float]:
            """Return the temperature, given or the best, and the mean negative log-likelihood with it in nats."""
            logits, log_prior = form.logits(x), self._log_prior()
            if isinstance(self.temperature, str):
                return best_temperature(logits, y, log_prior)
            given = self.temperature / estimator.scale
            return given, F.cross_entropy(given * logits + log_prior, y).item()

        z, best, start = x @ estimator.basis, math.inf, 1.0
        prior_counts = prior_counts if self.rank else prior_counts[:1]
        for shrinkage in shrinkages:
            results = [scored(form, z) for form in estimator.candidates(shrinkage, prior_counts)]
            (temperature, nll), prior_count = min(zip(results, prior_counts, strict=True), key=lambda each: each[0][1])
            if nll >= best * (1 - 1e-9):
                break  # nll has a single minimum over shrinkages
            best, start, self.shrinkage_, self.prior_count_ = nll, temperature, shrinkage, prior_count
        best, chosen, precision = math.inf, (start, bounds[0]), math.inf
        for most in bounds:
            if precision * start <= most:
                continue  # this bound would not change the form
            form = estimator.head_form(self.shrinkage_, self.prior_count_, start, most)
            precision = form.precision()
            temperature, nll = scored(form, x)
            if nll < best * (1 - 1e-9):
                best, chosen = nll, (temperature, most)
        _logger.info(
            f'shrinkage {self.shrinkage_:g}, prior count {self.prior_count_:g}, temperature '
            f'{chosen[0] * estimator.scale:.3g}: negative log-likelihood {best:.4f} of {len(y)} held-out examples.'
        )
        return chosen

    def _estimator(self, moments: Moments) -> Estimator:
        return OBJECTIVES[self.objective](moments, self.rank, self.v_ratio is not None)

    def _tunes(self) -> bool:
        return 'auto' in (self.shrinkage, self.prior_count, self.temperature)

    def _log_prior(self) -> Union[Tensor, float]:
        if self.class_prior == 'uniform':
            return 0.0
        return (self.class_count_.double() / self.n_samples_).log()


def _number(name: str, value: Any, least: float, most: float) -> float:
    if isinstance(value, (bool, str)) or not least <= value <= most or math.isinf(value):
        raise ValueError(f'{name}: expected a finite number from {least} to {most}, got {value!r}')
    return float(value)


def _auto_or_number(name: str, value: Any, least: float, most: float) -> Union[str, float]:
    return 'auto' if isinstance(value, str) and value == 'auto' else _number(name, value, least, most)


def fit_head(X: Any, y: Any, rank: int = 8, num_classes: Optional[int] = None, **options: Any) -> ZZZHead:
    """Fit a ZZZ head in closed form to features and labels.

    Args:
        X: Features as the head gets them, a tensor or array of shape (N, d).
        y: Class indices, integers from 0 to C - 1, shape (N,); every class needs an example.
        rank: Rank r of the class covariances, 0 <= r <= d.
        num_classes: Number of classes C; the largest label plus 1 if None.
        options: Further options of :class:`ZZZFit`.

    Raises:
        ValueError: As :class:`ZZZFit`, its ``partial_fit`` and ``to_head``.

    Example:
        >>> X = torch.eye(3).repeat(20, 1) + 0.1 * torch.randn(60, 3)
        >>> head = fit_head(X, torch.arange(60) % 3, rank=1)
        >>> head(torch.eye(3)).argmax(1)
        tensor([0, 1, 2])
    """
    if num_classes is None:
        labels = as_labels(y)
        num_classes = int(labels.max()) + 1 if len(labels) else 0
    return ZZZFit(num_classes, rank, **options).fit(X, y).to_head()


@torch.no_grad()
def fit_model(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    device: Union[None, str, torch.device] = None,
    amp_dtype: Optional[torch.dtype] = None,
    distributed: bool = False,
    **options: Any,
) -> nn.Module:
    """Fit the ZZZ heads of a model in closed form, in place, in one pass over a loader; return the model.

    The backbone is not changed. The model runs in eval mode, and each module's mode is restored. If there are several
    heads, as in distilled models, each is fitted to its own input.

    Args:
        model: A model with ZZZ heads, e.g. from :func:`timm_zzz.attach` or a name that ends in ``.zzz_r8``.
        loader: Batches of (images, class indices).
        device: Device for the images; that of the model's parameters if None.
        amp_dtype: Dtype of mixed precision for the backbone; None for full precision.
        distributed: Each process of ``torch.distributed`` has a part of the images in its loader. All processes get the
            same heads, fitted to all images.
        options: Options of :class:`ZZZFit`.

    Raises:
        RuntimeError: If another process failed.
        ValueError: If the model has no ZZZ head, or if a head is not used in eval mode or gets more than one embedding
            per image; otherwise as :func:`fit_head`. The heads are unchanged then.

    Example:
        >>> import timm, timm_zzz
        >>> model = timm.create_model('test_resnet.zzz_r4', num_classes=3)
        >>> loader = [(torch.randn(6, 3, 64, 64), torch.arange(6) % 3) for _ in range(3)]
        >>> model = fit_model(model, loader)
    """
    heads = heads_of(model)
    if not heads:
        raise ValueError('model: it has no ZZZ head; use timm_zzz.attach, or a model name that ends in .zzz_r8')
    estimators = {path: ZZZFit(head.num_classes, head.rank, **options) for path, head in heads.items()}
    device = torch.device(device) if device is not None else next(model.parameters()).device
    distributed = distributed and process()[1] > 1
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with record_inputs(heads) as inputs:
            steps = _steps(model, inputs, heads, loader, device, amp_dtype)
            for x, target in gathered(steps, device) if distributed else steps:
                for path, estimator in estimators.items():
                    estimator.partial_fit(x[path], target)
    finally:
        for module, mode in modes:
            module.training = mode
    for estimator in estimators.values():
        estimator._solved()
    for path, head in heads.items():
        estimators[path].fill(head)
    if distributed:
        broadcast(heads.values())
    if process()[0] == 0:
        path, estimator = next(iter(estimators.items()))
        _logger.info(
            f'{path}: fitted to {estimator.n_samples_} images of {estimator.num_classes} classes, {estimator.preset}.'
        )
    return model


def _steps(
    model: nn.Module,
    inputs: Dict[str, Tensor],
    heads: Iterable[str],
    loader: Iterable[Any],
    device: torch.device,
    amp_dtype: Optional[torch.dtype],
) -> Iterator[Step]:
    """Yield each head's input (B, d), keyed by path, and the classes (B,); ``inputs`` is from record_inputs."""
    plain = unwrap_model(model)  # compiled code skips hooks
    for images, target in loader:
        inputs.clear()
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            plain(images.to(device))
        for path in heads:
            if path not in inputs:
                raise ValueError(f'model: its head {path} takes no part in eval mode')
            shape = list(inputs[path].shape)
            if len(shape) != 2 or shape[0] != len(images):
                raise ValueError(f'model: its head {path} gets an input of shape {shape}, not one embedding per image')
        yield dict(inputs), target
