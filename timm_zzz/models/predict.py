"""Predict the classes of images, and rank how outlying they are among held-out images."""

import hashlib
import logging
import os
import re
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union, cast

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.loader import adapt_to_chs
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..errors import one_line
from ..head import heads_of, record_inputs
from ..scores import METHODS, Background, ClassGaussians, class_gaussians_of, outlier_scores
from ._timm import input_config

__all__ = [
    'Percentiles',
    'Prediction',
    'iterate_predictions',
    'keep_percentiles',
    'label_names',
    'measure_percentiles',
    'percentiles_of',
    'predict',
]

_logger = logging.getLogger(__name__)

SCORE = 'relative_mahalanobis'  # discounts the direction that all means share after a flat start or a fit
_MAX_QUANTILES = 1001
_ATTRIBUTE = 'zzz_percentiles'  # attribute of a model

Images = Union[str, 'os.PathLike[str]', Image.Image]


class Prediction(NamedTuple):
    """The most probable classes of an image.

    Attributes:
        names: Names of the classes, most probable first.
        probabilities: Probabilities of these classes, by the softmax over all classes.
        percentile: Percentage of held-out images that are not more outlying, 0 to 100; None if the model has no
            percentiles.
        error: Reason why there is no prediction, e.g. an image that can't be read; the other fields are empty then.
    """

    names: Tuple[str, ...] = ()
    probabilities: Tuple[float, ...] = ()
    percentile: Optional[float] = None
    error: str = ''


# Percentiles


class Percentiles(NamedTuple):
    """Quantiles of an outlier score over held-out images, stored with a model."""

    score: str  # a name of METHODS
    quantiles: Tuple[float, ...]  # ascending, of equally spaced probabilities from 0 to 1
    head_sha256: str  # of the heads' parameters, on which the score depends

    @classmethod
    def checked(cls, found: Any) -> 'Percentiles':
        """Validate what a file holds; raise a ValueError if it is not percentiles."""
        if not isinstance(found, dict) or found.keys() != {*cls._fields}:
            raise ValueError(f'percentiles: expected an object of {", ".join(cls._fields)}, got {found!r:.60}')
        score, values, digest = (found[name] for name in cls._fields)
        if score not in METHODS:
            raise ValueError(f'percentiles: expected a score of {", ".join(METHODS)}, got {score!r:.60}')
        listed = isinstance(values, (list, tuple)) and 2 <= len(values) <= _MAX_QUANTILES
        finite = listed and all(type(value) in (int, float) and abs(value) < 1e300 for value in values)
        if not finite or list(values) != sorted(values):
            raise ValueError(
                f'percentiles: expected 2 to {_MAX_QUANTILES} finite quantiles in order, got {values!r:.60}'
            )
        if not isinstance(digest, str) or not re.fullmatch('[0-9a-f]{64}', digest):
            raise ValueError(f'percentiles: expected the SHA-256 of the heads, got {digest!r:.60}')
        return cls(score, tuple(map(float, values)), digest)

    def of(self, scores: Tensor) -> Tensor:
        """Convert scores (N,) to percentiles, 0 to 100, by linear interpolation between the quantiles."""
        quantiles, scores = scores.new_tensor(self.quantiles, dtype=torch.float64), scores.double()
        upper = torch.searchsorted(quantiles, scores, right=True).clamp(1, len(quantiles) - 1)
        low, high = quantiles[upper - 1], quantiles[upper]
        share = ((scores - low) / (high - low)).nan_to_num(1.0).clamp(0, 1)  # 0 / 0 if the last two quantiles are equal
        return 100 * (upper - 1 + share) / (len(quantiles) - 1)


def _digest(model: nn.Module) -> str:
    """Compute the SHA-256 of the parameters of a model's heads, converted to float32."""
    digest = hashlib.sha256()
    for _, head in sorted(heads_of(model).items()):
        for _, t in sorted(head.state_dict().items()):
            digest.update(t.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()


def keep_percentiles(model: nn.Module, found: Any) -> None:
    """Attach the percentiles that a file holds to a model, unless its heads have other weights."""
    percentiles = Percentiles.checked(found)
    if percentiles.head_sha256 == _digest(model):
        setattr(model, _ATTRIBUTE, percentiles)


def measure_percentiles(model: nn.Module, features: Dict[str, Tensor]) -> None:
    """Measure percentiles on held-out images and attach them to the model; features are (N, d), keyed by head path."""
    scores = _Outlyingness(model, SCORE)(features)
    if scores is not None and scores.isfinite().all():
        count = min(max(len(scores), 2), _MAX_QUANTILES)  # at most one per image
        quantiles = torch.quantile(scores.double(), torch.linspace(0, 1, count).to(scores.device, torch.float64))
        setattr(model, _ATTRIBUTE, Percentiles(SCORE, tuple(quantiles.tolist()), _digest(model)))


def percentiles_of(model: nn.Module) -> Optional[Percentiles]:
    """Return the percentiles attached to a model; None if it has none or its heads have changed since."""
    found: Optional[Percentiles] = getattr(model, _ATTRIBUTE, None)
    if found is not None and found.head_sha256 != _digest(model):
        _logger.warning('The outlier percentiles are of other weights than the heads have now: they are left out.')
        return None
    return found


class _Outlyingness:
    """Computes an outlier score from the inputs of a model's heads: the mean over the heads that were called."""

    def __init__(self, model: nn.Module, score: str):
        self.score = score
        self.known: Dict[str, Tuple[ClassGaussians, Background]] = {}
        for path, head in heads_of(model).items():
            tensors: Any = class_gaussians_of(head)
            if head.weight.device.type == 'mps':  # does not support float64
                tensors = (t if t is None else t.cpu() for t in tensors)
            classes = ClassGaussians(*tensors)
            self.known[path] = classes, Background.of(classes)

    def __call__(self, inputs: Dict[str, Tensor]) -> Optional[Tensor]:
        """Compute scores (N,) for embeddings (N, d), keyed by path; None for other shapes."""
        scores = []
        for path, x in inputs.items():
            classes, background = self.known[path]
            if x.ndim != 2:
                return None
            x = x.to(classes.mu.device)
            scores.append(outlier_scores(classes, x, [self.score], background)[self.score])
        return torch.stack(scores).mean(0) if scores else None


# Predictions


class _Prepared(Dataset):
    """Data set of preprocessed images; an image that can't be read is replaced by its error message."""

    def __init__(self, images: Sequence[Images], config: Dict[str, Any]):
        self.images = images
        self.mode = 'RGB' if config['input_size'][0] == 3 else 'L'  # as in timm's data sets
        keys = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')
        self.transform: Any = create_transform(**{key: config[key] for key in keys})

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Union[Tensor, str]:
        image = self.images[i]
        try:
            if isinstance(image, Image.Image):
                return self.transform(image.convert(self.mode))
            with Image.open(image) as file:
                return self.transform(file.convert(self.mode))
        except Exception as e:  # a broken file may raise anything
            return one_line(e)


def _collate(items: List[Union[Tensor, str]]) -> Tuple[Optional[Tensor], List[str]]:
    """Stack the images that were read, None if none was; return also each item's error message, or ''."""
    images = [item for item in items if isinstance(item, Tensor)]
    errors = [item if isinstance(item, str) else '' for item in items]
    return torch.stack(images) if images else None, errors


def label_names(model: nn.Module) -> List[str]:
    """Return the class names stored with a model; an empty list if there are none or their number is wrong."""
    found: Any = (getattr(model, 'pretrained_cfg', None) or {}).get('label_names') or []
    names = [str(name) for name in (found.values() if isinstance(found, dict) else found)]
    return names if len(names) == cast(Any, model).num_classes else []


def predict(
    model: nn.Module,
    images: Iterable[Images],
    top_k: int = 5,
    *,
    class_names: Optional[Sequence[str]] = None,
    data_config: Optional[Dict[str, Any]] = None,
    batch_size: int = 64,
    workers: int = 0,
    amp_dtype: Optional[torch.dtype] = None,
) -> List[Prediction]:
    """Predict the most probable classes of images, preprocessed as in timm's evaluation, on the model's device.

    Args:
        model: Any classifier made by timm. One from :func:`~timm_zzz.from_pretrained` has class names and percentiles
            if they were saved.
        images: Paths of files, or PIL images.
        top_k: Number of classes to return for each image; all if the model has fewer.
        class_names: Names by index; by default those stored with the model, else ``'class 17'`` etc.
        data_config: Preprocessing settings that differ from the model's: input_size, mean, std, interpolation,
            crop_pct, crop_mode.
        batch_size: Images per batch.
        workers: Number of processes that load images.
        amp_dtype: Dtype of mixed precision; None for full precision.

    Returns:
        A :class:`~timm_zzz.models.predict.Prediction` for each image, in order. If an image can't be read, its
        prediction has the error.

    Raises:
        ValueError: If the model has no classes, the number of names is not that of its classes, or ``top_k`` < 1.

    Example:
        >>> import timm, timm_zzz
        >>> model = timm.create_model('test_resnet.zzz_r4', num_classes=3)
        >>> [prediction] = timm_zzz.predict(model, [Image.new('RGB', (64, 64))], top_k=2)
        >>> prediction.names, prediction.percentile
        (('class 0', 'class 1'), None)
    """
    if isinstance(images, (str, os.PathLike, Image.Image)):
        images = [images]
    options: Dict[str, Any] = dict(batch_size=batch_size, workers=workers, amp_dtype=amp_dtype)
    return [*iterate_predictions(model, [*images], top_k, class_names, data_config, **options)]


@torch.inference_mode()
def iterate_predictions(
    model: nn.Module,
    images: Sequence[Images],
    top_k: int,
    class_names: Optional[Sequence[str]] = None,
    data_config: Optional[Dict[str, Any]] = None,
    *,
    batch_size: int,
    workers: int,
    amp_dtype: Optional[torch.dtype],
) -> Iterator[Prediction]:
    """Yield the results of :func:`predict`, batch by batch; arguments and errors are the same."""
    plain: Any = unwrap_model(model)  # compiled code skips hooks
    count: int = plain.num_classes
    if count < 1:
        raise ValueError('model: num_classes=0 leaves it no classes to predict')
    if top_k < 1:
        raise ValueError(f'top_k: expected at least 1, got {top_k}')
    names = list(class_names) if class_names else label_names(plain) or [f'class {c}' for c in range(count)]
    if len(names) != count:
        raise ValueError(f'class_names: got {len(names)} names for {count} classes')
    config = {**input_config(plain), **(data_config or {})}
    channels = config['input_size'][0]
    config.update({key: adapt_to_chs(config[key], channels) for key in ('mean', 'std')})
    loader = DataLoader(
        cast(Any, _Prepared(images, config)),
        batch_size,
        num_workers=min(workers, -(-len(images) // batch_size)),  # a worker loads whole batches
        collate_fn=_collate,
    )
    percentiles = percentiles_of(plain)
    outlyingness = None if percentiles is None else _Outlyingness(plain, percentiles.score)
    parameter = next(plain.parameters())
    modes = [(module, module.training) for module in plain.modules()]
    plain.eval()
    try:
        with record_inputs(heads_of(plain)) as inputs:
            for batch, errors in loader:
                found: Iterator[Prediction] = iter(())
                if batch is not None:
                    inputs.clear()
                    dtype = parameter.dtype if amp_dtype is None else batch.dtype
                    with torch.autocast(parameter.device.type, amp_dtype, enabled=amp_dtype is not None):
                        logits = plain(batch.to(parameter.device, dtype))
                    scores = None if outlyingness is None else outlyingness(inputs)
                    shares = None if percentiles is None or scores is None else percentiles.of(scores)
                    found = _predictions(logits, shares, names, top_k)
                yield from [Prediction(error=error) if error else next(found) for error in errors]
    finally:
        for module, mode in modes:
            module.training = mode


def _predictions(logits: Any, percentiles: Optional[Tensor], names: Sequence[str], top_k: int) -> Iterator[Prediction]:
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] != len(names):
        raise ValueError('model: expected one that gives one row of logits per image')
    values, indices = logits.float().softmax(1).topk(min(top_k, len(names)), 1)
    shares = [None] * len(logits) if percentiles is None else percentiles.tolist()
    for row, classes, share in zip(values.tolist(), indices.tolist(), shares, strict=True):
        if row[0] != row[0]:
            yield Prediction(error='the logits are NaN or infinite (in float16: try bfloat16)')
        else:
            yield Prediction(tuple(names[c] for c in classes), tuple(row), share)
