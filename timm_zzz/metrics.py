"""Run a model over a loader, and compute metrics of its predictions and of outlier scores."""

import math
from dataclasses import dataclass
from typing import Any, Callable, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    'Bin',
    'Calibration',
    'KeptLogits',
    'Predictions',
    'auroc',
    'best_temperature',
    'calibration_temperature',
    'cross_calibrate',
    'ece',
    'evaluate',
    'fpr95',
    'predict',
    'reliability',
]

BINS = 15
PULL = 10.0  # strength of the prior that keeps one wrong image from softening a head
KEPT = 2**27  # largest number of logits that a temperature is fitted to
_VALUES = 2**22  # largest number of values of an intermediate result
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def full_precision(t: Tensor) -> Tensor:
    """Convert 16-bit floats to float32; leave wider ones unchanged."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def check_matrix(name: str, t: Any, width: Optional[int] = None) -> None:
    """Raise a ValueError unless ``t`` is a floating-point tensor of shape (N, width)."""
    wanted = 'a floating-point tensor of shape (N, {})'.format('*' if width is None else width)
    if not isinstance(t, Tensor):
        raise ValueError(f'{name}: expected {wanted}, got {type(t).__name__}')
    if t.ndim != 2 or not t.is_floating_point() or t.shape[1] != (width or max(1, t.shape[1])):
        raise ValueError(f'{name}: expected {wanted}, got {t.dtype} of shape {list(t.shape)}')


def check_targets(targets: Any, count: int, num_classes: int) -> None:
    if not isinstance(targets, Tensor):
        raise ValueError(f'targets: expected a tensor of {count} class indices, got {type(targets).__name__}')
    if targets.shape != (count,) or targets.dtype not in _INTEGERS:
        got = f'{targets.dtype} of shape {list(targets.shape)}'
        raise ValueError(f'targets: expected {count} class indices, got {got}')
    outside = (targets < 0) | (targets >= num_classes)
    if outside.any():
        raise ValueError(f'targets: expected class indices >= 0 and < {num_classes}, got {int(targets[outside][0])}')


# A model's predictions on the images of a loader


@torch.inference_mode()
def predict(
    model: nn.Module, loader: Iterable[Any], device: torch.device, amp_dtype: Optional[torch.dtype] = None
) -> Iterator[Tuple[Tensor, Any, Tensor]]:
    """Run a model in eval mode over a loader of (images, class indices).

    Args:
        amp_dtype: Dtype of mixed precision; None for full precision.

    Yields:
        Per batch, the images as the loader gave them, the model's output and the class indices, both on the device.
    """
    model.eval()
    for images, target in loader:
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            output = model(images.to(device))
        yield images, output, target.to(device)


class Predictions(NamedTuple):
    """Predictions of a model for N images. All tensors have shape (N,) and are on the CPU."""

    target: Tensor
    prediction: Tensor
    confidence: Tensor  # probability of the prediction
    nll: Tensor  # negative log-likelihood of the target, nats
    in_top5: Tensor

    @property
    def correct(self) -> Tensor:
        return self.prediction == self.target

    @property
    def top1(self) -> float:
        """Top-1 accuracy in percent."""
        return 100 * self.correct.double().mean().item()

    @property
    def mean_nll(self) -> float:
        return self.nll.double().mean().item()


def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    device: torch.device,
    amp_dtype: Optional[torch.dtype] = None,
    observe: Optional[Callable[[Tensor, Tensor, Predictions, int], None]] = None,
) -> Predictions:
    """Predict the classes of a loader's images. Five numbers per image are kept, not the logits.

    Args:
        amp_dtype: Dtype of mixed precision; None for full precision.
        observe: Called after each batch with its images, logits and predictions, and the number of earlier images.

    Raises:
        ValueError: If a label is not a class index of the model, the output is not finite logits (N, C), or there are
            no images.
    """
    parts: List[Predictions] = []
    count = 0
    for images, logits, target in predict(model, loader, device, amp_dtype):
        parts.append(Predictions(*_per_image(logits, target, count)))
        if observe is not None:
            observe(images, logits, parts[-1], count)
        count += len(target)
    if not count:
        raise ValueError('--data-dir: no images')
    return Predictions(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _per_image(logits: Any, target: Tensor, start: int) -> Tuple[Tensor, ...]:
    """Compute the columns of :class:`Predictions`."""
    if not isinstance(logits, Tensor) or logits.ndim != 2 or target.ndim != 1:
        raise ValueError('expected a model that gives one row of logits, and data with one class, per image')
    outside = (target < 0) | (target >= logits.shape[1])
    if outside.any():
        raise ValueError(
            f'--data-dir: an image has the label {int(target[outside][0])}, the model has {logits.shape[1]} classes'
        )
    if not logits.isfinite().all():
        first = start + int((~logits.isfinite().all(1)).nonzero()[0])
        raise ValueError(f'the logits of image {first} are NaN or infinite (with --amp: try --amp-dtype bfloat16)')
    log_probability = logits.float().log_softmax(1)
    confidence, prediction = log_probability.exp().max(1)
    nll = F.nll_loss(log_probability, target, reduction='none')
    in_top5 = (logits.topk(min(5, logits.shape[1]), 1)[1] == target[:, None]).any(1)
    return tuple(t.cpu() for t in (target, prediction, confidence, nll, in_top5))


# Metrics


def _sklearn_metrics() -> Any:
    try:
        from sklearn import metrics
    except ImportError as e:
        raise ImportError('auroc and fpr95 need scikit-learn: pip install "timm_zzz[benchmark]"') from e
    return metrics


def _labelled(inlier_scores: Any, outlier_scores: Any) -> Tuple[Any, Any]:
    """Return labels, 1 for outliers, and scores as NumPy arrays."""
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
    """Compute the area under the ROC curve with scikit-learn; outliers are the positive class.

    It is the probability that an outlier has a larger score than an inlier, with ties counted as one half.

    Args:
        inlier_scores: Shape (N,), N >= 1, larger = more outlying.
        outlier_scores: Shape (M,), M >= 1, of the same kind.

    Returns:
        0 to 1, larger = better.

    Raises:
        ValueError: If scores are NaN or infinite, empty, or not one-dimensional.
        ImportError: If scikit-learn is missing; ``timm_zzz[benchmark]`` installs it.

    Example:
        >>> auroc(torch.tensor([0., 1., 2.]), torch.tensor([1., 3.]))  # 4 1/2 of 6 pairs
        0.75
    """
    labels, scores = _labelled(inlier_scores, outlier_scores)
    return float(_sklearn_metrics().roc_auc_score(labels, scores))


def fpr95(inlier_scores: Tensor, outlier_scores: Tensor) -> float:
    """Compute the share of outliers accepted at the smallest threshold that accepts 95 % of the inliers.

    This is FPR95 of Liu et al. 2020 (arXiv:2010.03759), with inliers as the positive class. Nothing is interpolated,
    and outliers that tie with the threshold are accepted. Hendrycks et al. 2019 (arXiv:1812.04606) use the same name
    for the share of inliers rejected if 95 % of the outliers are: ``fpr95(-outlier_scores, -inlier_scores)``.

    Arguments and errors are those of :func:`auroc`.

    Returns:
        0 to 1, smaller = better.

    Example:
        >>> fpr95(torch.arange(20.), torch.tensor([17., 18., 19., 20.]))  # 18 accepts 19 of 20
        0.5
    """
    labels, scores = _labelled(inlier_scores, outlier_scores)
    false, true, _ = _sklearn_metrics().roc_curve(1 - labels, -scores, drop_intermediate=False)
    return float(false[(true >= 0.95).argmax()])


@dataclass(frozen=True)
class Bin:
    """A bin of a reliability diagram: the predictions with a confidence in (low, high]."""

    low: float
    high: float
    count: int
    accuracy: float  # 0 to 1; 0 without images
    confidence: float  # mean, 0 to 1; 0 without images


def reliability(confidence: Tensor, correct: Tensor, bins: int = BINS) -> Tuple[List[Bin], float]:
    """Compute bins of equal width and the expected calibration error (Guo et al. 2017, arXiv:1706.04599, eq. 3).

    Args:
        confidence: Probabilities of the predicted classes, shape (N,), 0 to 1.
        correct: Whether each prediction is correct, shape (N,).
        bins: Number of bins, >= 1.

    Returns:
        The bins, and the error, 0 to 1.

    Raises:
        ValueError: If there are no images, shapes differ, a confidence is not within 0 to 1, or ``bins`` < 1.

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
    """Compute the expected calibration error of a softmax, by :func:`reliability`.

    Args:
        logits: Logits or log-probabilities, shape (N, C).
        targets: Class indices, shape (N,).
        bins: Number of bins of equal width, >= 1.

    Returns:
        0 to 1.

    Raises:
        ValueError: If there are no images, logits are NaN or infinite, targets are not class indices, or ``bins`` < 1.

    Example:
        >>> round(ece(torch.tensor([[0.8, 0.2], [0.2, 0.8]]).log(), torch.tensor([0, 0])), 4)  # 50 % right at 80 %
        0.3
    """
    check_matrix('logits', logits)
    check_targets(targets, len(logits), logits.shape[1])
    confidence, prediction = full_precision(logits).softmax(1).max(1)
    if confidence.isnan().any():
        raise ValueError(f'logits: NaN or infinite in row {int(confidence.isnan().nonzero()[0])}')
    return reliability(confidence, prediction == targets.to(prediction.device), bins)[1]


# Temperature


def best_temperature(
    logits: Tensor, y: Tensor, log_prior: Union[Tensor, float] = 0.0, pull: float = 0.0
) -> Tuple[float, float]:
    """Find the factor T that minimises the mean negative log-likelihood of labels under T * logits + log_prior.

    Regularisation keeps T finite if all examples are classified correctly. With ``pull`` = 0, labels are smoothed by
    1 / (N + 1), as if there were one more example with a uniform label. Otherwise ``pull * (T - 1 - log T)`` is added
    to the sum over examples: a Gamma prior with mode 1, which keeps T close to 1 if there are few examples.

    The objective is convex in T; it is minimised by Newton's method within a bracket.

    Args:
        logits: Shape (N, C).
        y: Class indices, shape (N,).
        log_prior: Shape (C,).
        pull: Strength of the prior, >= 0.

    Returns:
        T, and the mean negative log-likelihood at T in nats, without the regularisation.
    """
    rows, pull = max(1, _VALUES // logits.shape[1]), pull / len(y)

    def centred() -> Iterator[Tuple[Tensor, Tensor]]:
        for part, target in zip(logits.split(rows), y.split(rows), strict=True):
            part = part.double()
            yield part - part.mean(1, keepdim=True), target

    def moments(T: float) -> Tuple[float, float]:
        """Compute the means over examples of the expectation and variance of a logit under the softmax."""
        mean, variance = 0.0, 0.0
        for z, _ in centred():
            p = (T * z + log_prior).softmax(1)
            expected = (p * z).sum(1)
            mean += float(expected.sum()) / len(y)
            variance += float(((p * z.square()).sum(1) - expected.square()).sum()) / len(y)
        return mean, variance

    right = sum(float(z.gather(1, target[:, None]).sum()) for z, target in centred()) / len(y)
    scale = 1.0
    if not pull:
        right *= len(y) / (len(y) + 1)  # smoothed labels; the mean over classes is 0
        spread = float(logits.std(1, correction=0).mean())
        scale = 1 / spread if spread > 1e-12 else 1.0
    low, high, T = 1e-4 * scale, 1e4 * scale, scale
    for _ in range(40):
        mean, variance = moments(T)
        slope = mean - right + pull * (1 - 1 / T)
        if slope == 0:  # also where all logits are equal
            break
        low, high = (low, T) if slope > 0 else (T, high)
        new = T - slope / max(variance + pull / T**2, 1e-300)
        T, old = new if low < new < high else math.sqrt(low * high), T
        if abs(T - old) <= 1e-8 * T:
            break
    return T, sum(F.cross_entropy(T * z + log_prior, t, reduction='sum').item() for z, t in centred()) / len(y)


def calibration_temperature(logits: Tensor, targets: Tensor) -> float:
    """Find the temperature by which to divide the logits (N, C) of held-out images with classes (N,).

    With T = 1 / temperature, it minimises the negative log-likelihood summed over images plus a penalty, which matters
    if there are few images or all are classified correctly. For T > 1 the penalty is the increase of the loss of one
    more, average image with a uniform label; for T < 1 it is :data:`PULL` * (T - 1 - log T). The sum is convex in T,
    and T = 1 unless the images clearly speak against it.

    Raises:
        ValueError: If there are no images, logits are NaN or infinite, or targets are not class indices.
    """
    check_matrix('logits', logits)
    check_targets(targets, len(logits), logits.shape[1])
    if not len(logits):
        raise ValueError('logits: expected at least one row')
    finite = logits.isfinite().all(1)
    if not finite.all():
        raise ValueError(f'logits: NaN or infinite in row {int((~finite).nonzero()[0])}')
    targets = targets.to(logits.device).long()
    sharper = best_temperature(logits, targets)[0]
    return 1 / (sharper if sharper > 1 else min(1.0, best_temperature(logits, targets, pull=PULL)[0]))


class KeptLogits:
    """The logits of every ``step``-th image, on the CPU; enough to fit a temperature.

    ``step`` starts at 1 and doubles whenever there would be more than :data:`KEPT` values. Also used for embeddings.
    """

    def __init__(self) -> None:
        self.step = 1
        self._parts: List[Tensor] = []

    def add(self, start: int, logits: Tensor) -> None:
        """Add logits (B, C) of a batch; ``start`` is the number of images before it."""
        self._parts.append(logits[-start % self.step :: self.step].float().cpu())
        while sum(part.numel() for part in self._parts) > KEPT:
            self.step *= 2
            self._parts = [self.logits[::2].clone()]

    @property
    def logits(self) -> Tensor:
        return torch.cat(self._parts)


class Calibration(NamedTuple):
    """Effect of a temperature on a model's predictions, measured on images that it was not fitted to."""

    temperature: float  # fitted to all images
    before: Predictions
    after: Predictions  # of each half of the images, with the temperature fitted to the other half
    ece: Tuple[float, float]  # before and after, 0 to 1


def cross_calibrate(logits: Tensor, targets: Tensor) -> Calibration:
    """Fit a temperature to logits (N, C) and class indices (N,), and measure its effect by two-fold cross-validation.

    The halves are every other image; each is evaluated with the temperature fitted to the other. For a single image
    that is 1.

    Raises:
        ValueError: As in :func:`calibration_temperature`.
    """
    temperature = calibration_temperature(logits, targets)
    of_halves = [
        calibration_temperature(logits[half::2], targets[half::2]) if len(logits) > 1 else 1.0 for half in (1, 0)
    ]
    rows = 2 * max(1, _VALUES // (2 * logits.shape[1]))

    def under(temperatures: Sequence[float]) -> Predictions:
        columns = []
        for part, target in zip(logits.split(rows), targets.split(rows), strict=True):
            divisor = part.new_tensor(temperatures).repeat(len(part) // 2 + 1)[: len(part), None]
            columns.append(_per_image(part / divisor, target, 0))
        return Predictions(*(torch.cat(column) for column in zip(*columns, strict=True)))

    before, after = under((1.0, 1.0)), under(of_halves)
    errors = [reliability(each.confidence, each.correct)[1] for each in (before, after)]
    return Calibration(temperature, before, after, (errors[0], errors[1]))
