"""``python -m timm_zzz report``: one HTML page about a model that timm's train.py trained.

The page is report.html.jinja, which draws; here is what it draws. Of an image six numbers are kept, not its logits.
"""

import argparse
import base64
import io
import math
import os
import platform
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

import timm
import torch
from timm.data import resolve_data_config
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from ..arguments import checkpoint_file, positive_int
from ..data import device_of, evaluation_loader, open_images
from ..errors import HubError
from ..features import caught_inputs, heads_of, pooled
from ..head import ZZZHead
from ..models._timm import SPLIT_FOLDERS
from ..scores import ClassGaussians, class_gaussians_of, log_density, reliability
from ..version import __version__
from .push import Run, class_names, load_run

__all__ = ['main']

PAIRS = 30  # rows of a table of class pairs
OUTLIERS = 24
EXTREMES = 8  # classes of the largest, and of the smallest, variance
MAX_MAP = 60  # classes that a map of all pairs shows
THUMBNAIL = 96  # pixels
_LEVELS = 9  # shades of a map
_ROWS = 1024  # classes, or pairs, that are held against all classes at a time
_SPLITS = (*chain(*SPLIT_FOLDERS), 'test')


class Lowest:
    """The images with the lowest scores so far, of equal ones the first, in memory that does not grow."""

    def __init__(self, size: int):
        self.size = size
        self.items: List[Tuple[float, int, Tensor]] = []  # score, place among all images, image on the CPU

    def update(self, start: int, score: Tensor, images: Tensor) -> None:
        """Offer images (B, ...) of scores (B,); the first is the ``start``-th of all."""
        limit = self.items[-1][0] if len(self.items) == self.size else math.inf
        for i in score.sort(stable=True)[1][: self.size].tolist():
            if float(score[i]) < limit:
                self.items.append((float(score[i]), start + i, images[i].float().cpu()))
        self.items.sort(key=lambda item: item[:2])
        del self.items[self.size :]


@dataclass
class Results:
    """What a model made of N images. All tensors are (N,), on the CPU."""

    target: Tensor
    prediction: Tensor
    confidence: Tensor  # of the prediction, 0 to 1
    nll: Tensor  # nats
    in_top5: Tensor
    density: Optional[Tensor]  # the largest log-density of a class, nats, a mean over the heads
    lowest: Lowest  # by density
    heads: Dict[str, ZZZHead]  # those that took part
    no_density: str = ''  # why there is none

    @property
    def correct(self) -> Tensor:
        return self.prediction == self.target


@torch.inference_mode()
def evaluate(
    model: nn.Module, loader: Iterable[Any], device: torch.device, amp_dtype: Optional[torch.dtype] = None
) -> Results:
    """Run a model over the images of a loader.

    Raises:
        ValueError: For labels that are no class indices of the model, output that is no logits, or no images.
    """
    heads = heads_of(model)
    classes = {path: class_gaussians_of(head) for path, head in heads.items()}
    columns: List[Tuple[Tensor, ...]] = []
    lowest = Lowest(OUTLIERS)
    count, reason = 0, ''
    model.eval()
    with caught_inputs(heads) as inputs:
        for images, target in tqdm(loader, desc='images', unit='batch', file=sys.stderr):
            inputs.clear()
            with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                logits = model(images.to(device))
            target = target.to(device)
            columns.append(_per_image(logits, target, count))
            density, reason = _density(inputs, heads, classes, len(target))
            if density is not None:
                columns[-1] += (density.cpu(),)
                lowest.update(count, density.cpu(), images)
            count += len(target)
    if not count:
        raise ValueError('--data-dir: no images')
    joined = [torch.cat(column) for column in zip(*columns, strict=True)]
    return Results(
        target=joined[0],
        prediction=joined[1],
        confidence=joined[2],
        nll=joined[3],
        in_top5=joined[4],
        density=joined[5] if len(joined) > 5 else None,
        lowest=lowest,
        heads={path: heads[path] for path in heads if path in inputs},
        no_density=reason,
    )


def _per_image(logits: Any, target: Tensor, start: int) -> Tuple[Tensor, ...]:
    """Target, prediction, confidence, negative log-likelihood and whether the target is among the first five."""
    if not isinstance(logits, Tensor) or logits.ndim != 2 or target.ndim != 1:
        raise ValueError('a report is of a model that gives one row of logits, and data with one class, per image')
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


def _density(
    inputs: Dict[str, Tensor], heads: Dict[str, ZZZHead], classes: Dict[str, ClassGaussians], batch: int
) -> Tuple[Optional[Tensor], str]:
    """The largest log-density of a class for each image (B,), a mean over the heads; or None, and why."""
    densities = []
    for path, x in inputs.items():
        x = pooled(x)
        if x.shape != (batch, heads[path].feat_dim):
            return None, f'{path} gets an input of shape {list(x.shape)}, not one embedding per image'
        densities.append(log_density(classes[path], x).amax(1))
    if not densities:
        return None, 'no ZZZ head takes part when the model is evaluated'
    return torch.stack(densities).mean(0), ''


@dataclass
class Neighbours:
    """For each class the one whose mean is nearest, (C,), and the cosine between the two, (C,)."""

    nearest: Tensor
    cosine: Tensor


def neighbours_of(mu: Tensor) -> Neighbours:
    """Nearest other means of unit means (C, d), C >= 2."""
    nearest, cosine = [], []
    for start in range(0, len(mu), _ROWS):
        similarity = mu[start : start + _ROWS] @ mu.T
        similarity.diagonal(start).fill_(-math.inf)
        values, indices = similarity.max(1)
        nearest.append(indices.cpu())
        cosine.append(values.cpu())
    return Neighbours(torch.cat(nearest), torch.cat(cosine))


@dataclass(frozen=True)
class Pair:
    """Two classes, how alike they are, and how often the first was taken for the second and the reverse."""

    first: int
    second: int
    count: int
    reverse: int
    cosine: float
    overlap: Optional[float]  # mean squared cosine between their subspaces, 0 to 1
    place: int  # of the second among the neighbours of the first, 1 for the nearest


def pairs_of(
    classes: ClassGaussians, first: Tensor, second: Tensor, confusions: Dict[Tuple[int, int], int]
) -> List[Pair]:
    """Pairs of the classes first (P,) and second (P,)."""
    first, second = first.to(classes.mu.device), second.to(classes.mu.device)
    cosine = (classes.mu[first] * classes.mu[second]).sum(1).tolist()
    overlap: List[Optional[float]] = [None] * len(first)
    if classes.basis is not None:
        cross = classes.basis[first].mT @ classes.basis[second]
        overlap = (cross.square().sum((1, 2)) / classes.basis.shape[2]).tolist()
    places = _places(classes.mu, first, second).tolist()
    keys = list(zip(first.tolist(), second.tolist(), strict=True))
    counts = [(confusions.get((a, b), 0), confusions.get((b, a), 0)) for a, b in keys]
    return [Pair(*key, *count, *rest) for key, count, *rest in zip(keys, counts, cosine, overlap, places, strict=True)]


def _places(mu: Tensor, first: Tensor, second: Tensor) -> Tensor:
    places = [torch.empty(0, dtype=torch.int64)]
    for a, b in zip(first.split(_ROWS), second.split(_ROWS), strict=True):
        similarity = mu[a] @ mu.T
        similarity.scatter_(1, a[:, None], -math.inf)
        places.append((similarity > similarity.gather(1, b[:, None])).sum(1).cpu() + 1)
    return torch.cat(places)


def confusions_of(target: Tensor, prediction: Tensor) -> Dict[Tuple[int, int], int]:
    """How often each class was taken for each other one, the most frequent pairs first, then by index."""
    wrong = target != prediction
    counts = Counter(zip(target[wrong].tolist(), prediction[wrong].tolist(), strict=True))
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def order_of(mu: Tensor) -> List[int]:
    """Classes in an order that puts like ones side by side.

    By the second eigenvector of the graph Laplacian of the cosines (Atkins et al. 1998, doi:10.1137/S0097539795285771).
    """
    if len(mu) < 3:
        return list(range(len(mu)))
    similarity = (mu.double() @ mu.double().T).cpu()
    weight = similarity - similarity.min()
    vector = torch.linalg.eigh(weight.sum(1).diag() - weight)[1][:, 1]
    order = vector.sort(stable=True)[1].tolist()
    return order if order[0] < order[-1] else order[::-1]


@dataclass
class Map:
    """Values of all pairs of classes as shades: for each shade the cells (column, row) that have it."""

    shades: List[List[Tuple[int, int]]]
    least: float
    largest: float

    @classmethod
    def of(cls, values: Tensor, least: Optional[float] = None) -> 'Map':
        """Of values (n, n), whose diagonal is left out; with ``least`` given, cells of that value too."""
        off = ~torch.eye(len(values), dtype=torch.bool)
        low = float(values[off].min()) if least is None else least
        high = float(values[off].max())
        shown = off if least is None else off & (values > least)
        levels = ((values - low) / max(high - low, 1e-12) * _LEVELS).long().clamp(0, _LEVELS - 1)
        cells = [((levels == level) & shown).nonzero().tolist() for level in range(_LEVELS)]
        return cls([[(x, y) for y, x in each] for each in cells], low, high)


class Axis:
    """A scale of a chart: the place of a value in pixels, and round values with their names, in units of ``unit``."""

    def __init__(self, low: float, high: float, start: float, end: float, *, kind: str = '', unit: float = 1.0):
        self.log = kind == 'log'
        if not low < high:
            low, high = (low / 2, high * 2) if self.log else (low - 0.5, high + 0.5)
        self.low, self.high, self.start, self.end = low, high, start, end
        self.ticks = self._log_ticks() if self.log else self._ticks(kind == 'count', unit)

    def at(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)

    def _ticks(self, whole: bool, unit: float) -> List[Tuple[float, str]]:
        """At least three round values, fewer where they must be whole numbers."""
        most = (self.high - self.low) / 3
        decade = 10.0 ** math.floor(math.log10(most))
        step = max(m * decade for m in (1, 2, 5) if m == 1 or m * decade <= most)
        step = max(1.0, step) if whole else step
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        digits = max(0, -math.floor(math.log10(step * unit) + 1e-9))
        return [(k * step, f'{k * step * unit:,.{digits}f}') for k in range(first, last + 1)]

    def _log_ticks(self) -> List[Tuple[float, str]]:
        exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        values = [10.0**k for k in exponents if self.low <= 10.0**k <= self.high]
        if len(values) < 3:
            values = [m * 10.0**k for k in exponents for m in (1, 2, 5) if self.low <= m * 10.0**k <= self.high]
        if len(values) < 2:
            values = [self.low, self.high]
        return [(value, f'{value:.3g}') for value in values[:: math.ceil(len(values) / 6)]]


def shorten(text: str, size: int = 24) -> str:
    """The ends of a text, which tell classes apart, without its middle if it is too long."""
    return text if len(text) <= size else f'{text[: size // 2]}…{text[-(size - 1) // 2 :]}'


@dataclass
class Histogram:
    edges: List[float]
    counts: List[int]

    @classmethod
    def of(cls, values: Tensor, bins: int = 24) -> 'Histogram':
        low, high = float(values.min()), float(values.max())
        if high - low <= 1e-6 * max(abs(low), abs(high)):  # nothing but rounding
            margin = 0.01 * max(abs(low), abs(high)) or 0.5
            low, high = low - margin, high + margin
        counts = torch.histc(values.double(), bins, low, high)
        return cls([low + (high - low) * k / bins for k in range(bins + 1)], counts.long().tolist())


@dataclass(frozen=True)
class ClassSpectrum:
    index: int
    images: int
    accuracy: Optional[float]  # percent; None without images
    total: float  # the trace of the covariance
    share: float  # of it that lies in the subspace beyond sigma2, 0 to 1
    values: List[float]  # the covariance's largest eigenvalues, in descending order


@dataclass
class Spectra:
    """Eigenvalues of the class covariances along their bases, and of all classes their quantiles."""

    levels: Dict[str, List[float]]  # least, tenth, median, ninetieth percentile, largest: r values each
    total: Histogram
    wide: List[ClassSpectrum]
    narrow: List[ClassSpectrum]
    largest: float


def spectra_of(classes: ClassGaussians, results: Results) -> Optional[Spectra]:
    """None at rank 0, where the covariance of every class is sigma2 I."""
    if classes.v is None:
        return None
    v = classes.v.double().cpu().sort(1, descending=True)[0]
    sigma2 = classes.sigma2.double().cpu()
    total = v.sum(1) + classes.mu.shape[1] * sigma2
    images = results.target.bincount(minlength=len(v))
    correct = results.target[results.correct].bincount(minlength=len(v))

    def row(c: int) -> ClassSpectrum:
        n = int(images[c])
        accuracy = 100 * int(correct[c]) / n if n else None
        share = float(v[c].sum() / total[c])
        return ClassSpectrum(c, n, accuracy, float(total[c]), share, (v[c] + sigma2).tolist())

    order = total.sort(descending=True, stable=True)[1].tolist()
    each = min(EXTREMES, (len(order) + 1) // 2)
    quantiles = torch.quantile(v + sigma2, torch.tensor([0, 0.1, 0.5, 0.9, 1], dtype=v.dtype), dim=0)
    names = ('least', 'tenth', 'median', 'ninetieth', 'largest')
    return Spectra(
        levels=dict(zip(names, quantiles.tolist(), strict=True)),
        total=Histogram.of(total),
        wide=[row(c) for c in order[:each]],
        narrow=[row(c) for c in order[each:][-each:]],
        largest=float(v.max() + sigma2),
    )


@dataclass(frozen=True)
class Outlier:
    picture: Optional[str]  # a JPEG in Base64; None for images that are neither grey nor RGB
    name: str
    target: int
    prediction: int
    confidence: float
    density: float


def outliers_of(results: Results, config: Dict[str, Any], dataset: Any) -> List[Outlier]:
    return [
        Outlier(
            picture=_picture(image, config['mean'], config['std']),
            name=_file_name(dataset, i),
            target=int(results.target[i]),
            prediction=int(results.prediction[i]),
            confidence=float(results.confidence[i]),
            density=density,
        )
        for density, i, image in results.lowest.items
    ]


def _picture(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Optional[str]:
    """What the model was given, its normalisation undone, small."""
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        return None
    image = image * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    picture = to_pil_image((image.clamp(0, 1) * 255).round().byte())
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    picture.save(file, 'JPEG', quality=80, optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def _file_name(dataset: Any, index: int) -> str:
    try:
        return str(dataset.filename(index))
    except (AttributeError, NotImplementedError, AssertionError, KeyError):  # data that is in no files
        return f'image {index}'


def open_dataset(options: argparse.Namespace, run: Run, channels: int) -> Tuple[Any, Optional[List[str]]]:
    """The images, their labels numbered as in training, and the names of the classes if they are known."""
    data_dir: Path = options.data_dir
    name = options.dataset if options.dataset is not None else run.args.get('dataset') or ''
    if not name and not data_dir.exists():
        raise ValueError(f'--data-dir: no such folder: {data_dir}')
    if options.class_map is None and run.args.get('class_map'):
        raise ValueError(f'--class-map: the model was trained with one ({run.args["class_map"]}); give it again')
    count: int = run.model.num_classes  # type: ignore[assignment]
    names = class_names(run, options.class_map, None)
    dataset = _create_dataset(options, name, names, channels)
    reader = getattr(dataset, 'reader', None)  # none for torchvision's data sets
    found: Dict[str, int] = getattr(reader, 'class_to_idx', None) or {}
    if not name:
        _check_split(data_dir, options.split, dataset)
        train = run.args.get('train_split') or 'train'
        if names is None and len(found) != count and (data_dir / train).is_dir():
            # timm numbers the classes that it finds: not all need be among these images
            names = class_names(run, None, data_dir)
            if not names or not set(found) <= set(names):
                raise ValueError(f'--data-dir: {options.split} has classes that {train} has not')
            dataset = _create_dataset(options, name, names, channels)
        found = dataset.reader.class_to_idx
    if (found or not name) and len(found) != count:
        where = '--class-map' if options.class_map else f'--data-dir: {options.split}'
        raise ValueError(f'{where} has {len(found)} classes, the model has {count}; --class-map FILE.txt numbers them')
    return dataset, sorted(map(str, found), key=lambda key: found[key]) if found else names


def _create_dataset(options: argparse.Namespace, name: str, names: Optional[List[str]], channels: int) -> Any:
    class_map: Any = {each: i for i, each in enumerate(names)} if names else ''
    return open_images(name, options.data_dir, options.split, class_map, channels, options.batch_size)


def _check_split(data_dir: Path, split: str, dataset: Any) -> None:
    """Refuse what timm does with a split that is not there: it takes the images of all splits."""
    if Path(getattr(dataset.reader, 'root', '')) != data_dir or not data_dir.is_dir():
        return
    others = sorted(path.name for path in data_dir.iterdir() if path.is_dir() and path.name in _SPLITS)
    if others:
        raise ValueError(f'--split: {data_dir} has no {split}, only {", ".join(others)}')


def contents(run: Run, results: Results, config: Dict[str, Any], dataset: Any, names: Sequence[str]) -> Dict[str, Any]:
    """What the page shows, by the template's names."""
    path, head = next(iter(results.heads.items()), (None, None))
    if head is None:
        raise ValueError('no ZZZ head takes part when the model is evaluated')
    classes = class_gaussians_of(head)
    confusions = confusions_of(results.target, results.prediction)
    bins, ece = reliability(results.confidence, results.correct)
    context: Dict[str, Any] = dict(
        names=names,
        images=len(results.target),
        num_classes=len(names),
        top1=100 * results.correct.double().mean().item(),
        top5=100 * results.in_top5.double().mean().item() if len(names) > 5 else None,
        nll=results.nll.double().mean().item(),
        ece=100 * ece,
        bins=bins,
        sigma2=classes.sigma2.item(),
        rank=head.rank,
        feat_dim=head.feat_dim,
        heads=list(results.heads),
        errors=sum(confusions.values()),
        spectra=spectra_of(classes, results),
        outliers=outliers_of(results, config, dataset),
        no_density=results.no_density,
        median_density=None if results.density is None else results.density.double().median().item(),
        most=PAIRS,
    )
    context.update(_alike(classes, confusions, results, context['errors']))
    return context


def _alike(
    classes: ClassGaussians, confusions: Dict[Tuple[int, int], int], results: Results, errors: int
) -> Dict[str, Any]:
    """Confusions and similarities of pairs of classes."""
    count = len(classes.mu)
    if count < 2:
        return dict(confused=[], similar=[], near=None, similarity_map=None, neighbours=None)
    keys = torch.tensor(list(confusions), dtype=torch.int64).reshape(-1, 2)
    places = _places(classes.mu, keys[:, 0].to(classes.mu.device), keys[:, 1].to(classes.mu.device))
    times = torch.tensor(list(confusions.values()), dtype=torch.int64)
    near = {k: 100 * int(times[places <= k].sum()) / errors for k in (1, 5)} if errors else None
    neighbours = neighbours_of(classes.mu)
    first, second = _closest(neighbours)
    context: Dict[str, Any] = dict(
        confused=pairs_of(classes, keys[:PAIRS, 0], keys[:PAIRS, 1], confusions),
        similar=pairs_of(classes, first, second, confusions),
        class_images=results.target.bincount(minlength=count).tolist(),
        near=near,
        neighbours=Histogram.of(neighbours.cosine),
        similarity_map=None,
    )
    if count <= MAX_MAP:
        order = order_of(classes.mu)
        mu = classes.mu[order].double().cpu()
        table = (results.target * count + results.prediction).bincount(minlength=count**2).reshape(count, count)
        shares = table.double() / table.sum(1, keepdim=True).clamp(min=1)
        context.update(
            order=order,
            similarity_map=Map.of(mu @ mu.T),
            confusion_map=Map.of(shares[order][:, order], least=0.0),
        )
    return context


def _closest(neighbours: Neighbours) -> Tuple[Tensor, Tensor]:
    """The pairs of a class and its nearest that are closest to each other, each pair once."""
    pairs: Dict[Tuple[int, int], None] = {}
    for c in neighbours.cosine.sort(descending=True, stable=True)[1].tolist():
        other = int(neighbours.nearest[c])
        pairs[min(c, other), max(c, other)] = None
        if len(pairs) == PAIRS:
            break
    first, second = torch.tensor(list(pairs)).T
    return first, second


def render(context: Dict[str, Any]) -> str:
    """The page, every text in it escaped."""
    from jinja2 import Environment, StrictUndefined  # a dependency of torch

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters['short'] = shorten
    environment.filters['number'] = lambda value: f'{value:.3g}'
    template = environment.from_string(Path(__file__).with_name('report.html.jinja').read_text(encoding='utf-8'))
    return template.render(context, Axis=Axis)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='python -m timm_zzz report',
        description='Write an HTML page about a model with a ZZZ head that train.py trained: its confusions, '
        'the variances and the similarity of its classes, its calibration, and the images most unlike every class. '
        'One file without scripts, which loads nothing. Images are prepared as train.py did for validation.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument('checkpoint', type=Path, help="e.g. output/train/NAME/model_best.pth.tar, or the run's folder")
    parser.add_argument('--data-dir', type=Path, required=True, metavar='DIR', help='the ImageFolder')
    parser.add_argument('--dataset', metavar='NAME', help="timm's TYPE/NAME of the data, if not that of the run")
    parser.add_argument('--split', default='validation', metavar='NAME', help='which images')
    parser.add_argument('--class-map', type=Path, metavar='FILE.txt', help='class names by index, one per line')
    parser.add_argument('--output', type=Path, default=Path('report.html'), metavar='FILE', help='the page')
    parser.add_argument('--force', action='store_true', help='replace the page if it exists')
    parser.add_argument('--use-ema', action='store_true', help='take the averaged weights')
    parser.add_argument('--model', metavar='NAME', help="timm's name of the model, if the checkpoint has none")
    parser.add_argument('-b', '--batch-size', type=positive_int, default=256, metavar='N', help='images at a time')
    parser.add_argument('-j', '--workers', type=int, default=4, metavar='N', help='processes that load images')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='where to run')
    parser.add_argument('--amp', action='store_true', help='run the backbone in mixed precision')
    parser.add_argument('--amp-dtype', choices=('float16', 'bfloat16'), default='float16', help='with --amp')
    return parser


def main(arguments: Optional[List[str]] = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        print(_report(options))
    except (HubError, ValueError, OSError) as e:
        parser.exit(2, f'timm_zzz: error: {e}\n')


def _load(options: argparse.Namespace) -> Tuple[Path, Run]:
    checkpoint = checkpoint_file(options.checkpoint)
    try:
        return checkpoint, load_run(checkpoint, use_ema=options.use_ema, model_name=options.model)
    except ValueError as e:
        raise ValueError(f"{e}. A report needs train.py's checkpoint of a model such as resnet50.zzz_r8.") from e


def _report(options: argparse.Namespace) -> Path:
    output: Path = options.output
    if output.is_dir() or output.exists() and not options.force:
        raise ValueError(f'--output: {output} exists already; give another one or --force')
    device = device_of(options.device)
    checkpoint, run = _load(options)
    config = resolve_data_config(run.data_config, model=run.model)
    dataset, names = open_dataset(options, run, config['input_size'][0])
    model = run.model.to(device)
    amp_dtype = getattr(torch, options.amp_dtype) if options.amp else None
    loader = evaluation_loader(dataset, config, options.batch_size, options.workers, device)
    results = evaluate(model, loader, device, amp_dtype)
    num_classes: int = model.num_classes  # type: ignore[assignment]
    context = contents(run, results, config, dataset, names or [f'class {c}' for c in range(num_classes)])
    data = options.dataset or run.args.get('dataset') or options.data_dir.resolve().name
    precision = f'mixed precision, {options.amp_dtype}' if options.amp else 'float32'
    context.update(
        model=options.model or run.args['model'],
        dataset=data,
        split=options.split,
        about={
            'Data': f'{data}, {options.split}',
            'Checkpoint': f'{checkpoint.resolve().parent.name}/{checkpoint.name}',
            'Weights': ('averaged, ' if options.use_ema else '') + f'after epoch {run.epoch}, counted from 0',
            'Input': f'{" × ".join(map(str, config["input_size"]))}, '
            f'crop {config["crop_pct"]:g} ({config["crop_mode"]})',
            'Run on': f'{device.type}, {precision}, batches of {options.batch_size}',
            'Versions': f'timm_zzz {__version__}, timm {timm.__version__}, torch {torch.__version__}, '
            f'Python {platform.python_version()}',
        },
    )
    _write(output, render(context))
    return output


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix='.zzz-report-') as temporary:
        draft = Path(temporary) / path.name
        draft.write_text(text, encoding='utf-8')
        os.replace(draft, path)
