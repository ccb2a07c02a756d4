"""Write an HTML page about a trained model: ``python -m timm_zzz report``.

The template is report.html.jinja, and matplotlib draws the figures. Eight numbers per image are kept, its logits as in
:class:`~timm_zzz.metrics.KeptLogits`, and small JPEGs of the images that are shown.
"""

import argparse
import base64
import importlib
import io
import math
import platform
import warnings
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Set, Tuple

import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from .. import __version__
from ..data import file_of
from ..functional import normalize
from ..head import heads_of, record_inputs
from ..metrics import KeptLogits, Predictions, cross_calibrate, evaluate, reliability
from ..models.attach import find_classifiers
from ..scores import ClassGaussians, class_gaussians_of, log_density
from .common import amp_dtype_of, check_output, data_config_of, device_of, exit_on_error, progress, written_whole
from .figures import (
    MAX_COLORS,
    STYLE,
    draw_map,
    draw_points,
    draw_reliability,
    draw_spectra,
    draw_spread,
    shorten,
)
from .run import Run, add_run_arguments, open_images
from .trained import SOURCES, load_trained

__all__ = ['main', 'write_report']

PAIRS = 30  # rows of a table of class pairs
PICTURED = 6  # confusions that are shown in pictures
KEPT_PAIRS = 500  # confusions whose picture is kept; others are dropped once there are twice as many
OUTLIERS = 24
WIDEST = 8  # classes whose spread is drawn
LABELLED = 5  # closest pairs that are named on a map of many classes
MAX_MAP = 60  # largest number of classes on a map of all pairs
POINTS = 2000  # largest number of images on the map of embeddings
THUMBNAIL = 96  # pixels


# Evaluation on the images


class Lowest:
    """Collects the images with the lowest scores, in constant memory; of equal scores the first image is kept.

    ``keep`` converts an image to what is stored. It must not return a view, which would keep the whole batch.
    """

    def __init__(self, size: int, keep: Callable[[Tensor], Any] = Tensor.clone):
        self.size = size
        self.keep = keep
        self.items: List[Tuple[float, int, Any]] = []  # score, place among all images, what is kept

    def update(self, start: int, score: Tensor, images: Tensor) -> None:
        """Add images (B, ...) with scores (B,); ``start`` is the number of images before them."""
        for value, i in sorted(zip(score.tolist(), range(len(score)), strict=True))[: self.size]:
            if len(self.items) < self.size or value < self.items[-1][0]:
                new = (value, start + i, self.keep(images[i]))
                self.items = sorted([*self.items, new], key=lambda item: item[:2])[: self.size]


class Embeddings:
    """Collects two coordinates of each normalised embedding of one head, and moments of each class."""

    def __init__(self, classes: ClassGaussians):
        self.classes = ClassGaussians(*(t if t is None else t.float().cpu() for t in classes))  # type: ignore[arg-type]
        mu = self.classes.mu
        centred = (mu - mu.mean(0)).double()
        self.axes = torch.linalg.eigh(centred.T @ centred)[1][:, -2:].flip(1).float()
        self.points: List[Tensor] = []
        self.nearest = (mu @ mu.T).fill_diagonal_(-math.inf).argmax(1).tolist()
        self.sum, self.count = torch.zeros_like(mu), torch.zeros(len(mu), 1)
        self.squares = torch.zeros(len(mu), 2)  # sums along the bases of the class and of the nearest class

    def add(self, x: Tensor, target: Tensor) -> None:
        """Add embeddings (B, d) and their classes (B,)."""
        x = normalize(x.float().cpu())
        self.points.append(x @ self.axes)
        self.sum.index_add_(0, target, x)
        self.count.index_add_(0, target, torch.ones(len(x), 1))
        if (basis := self.classes.basis) is not None:
            for c in target.unique().tolist():
                self.squares[c] += (x[target == c] @ basis[[c, self.nearest[c]]]).square().sum((1, 2))

    def deviations(self) -> Tensor:
        """Compute the standard deviation of each class's embeddings about their mean, per direction.

        Returns:
            Shape (C, 3): along the class's directions, those of the nearest class, and all but its own. NaN for classes
            with fewer than two images.
        """
        basis = self.classes.basis
        assert basis is not None
        (_, d, rank), mean = basis.shape, self.sum / self.count
        means = [torch.einsum('cdr,cd->cr', each, mean) for each in (basis, basis[self.nearest])]
        own, other = (self.squares / self.count - torch.stack(means, 1).square().sum(2)).unbind(1)
        rest = 1 - mean.square().sum(1) - own  # embeddings have length 1
        variances = torch.stack([own / rank, other / rank, rest / (d - rank)], 1)
        return (variances.clamp(min=0) * self.count / (self.count - 1)).where(self.count > 1, math.nan).sqrt()


@dataclass
class Seen:
    """Predictions of a model, statistics of its heads, and pictures of some images."""

    predictions: Predictions
    kept: KeptLogits
    heads: Sequence[str]  # paths of the heads that were called
    rank: Optional[int]  # of the first head; None if it is not a ZZZ head
    classes: ClassGaussians  # of the first head; for a linear head only means, its normalised rows
    # Both None if a head does not get one embedding per image
    density: Optional[Tensor]  # the largest log-density of a class, averaged over the heads, in nats
    embeddings: Optional[Embeddings]  # inputs of the first head
    outliers: Lowest  # images with the lowest density
    # By class, its images with the largest logits of the class, which are log-densities up to a constant
    typical: Mapping[int, Lowest]
    mistaken: Mapping[Tuple[int, int], Lowest]  # by true and predicted class, the image with the largest confidence


def observe(
    model: nn.Module,
    loader: Iterable[Any],
    device: torch.device,
    amp_dtype: Optional[torch.dtype],
    picture: Callable[[Tensor], Optional[bytes]],
) -> Seen:
    """Evaluate a model on images, and measure how well each image fits the classes of its heads.

    Args:
        amp_dtype: Dtype of mixed precision; None for full precision.
        picture: Converts an image to the picture that is stored.

    Raises:
        ValueError: As :func:`timm_zzz.metrics.evaluate`, and if no head is used in eval mode.
    """
    zzz_heads = heads_of(model)
    heads: Dict[str, Any] = {**(zzz_heads or find_classifiers(model))}
    classes = {path: class_gaussians_of(head) if zzz_heads else _rows_of(head) for path, head in heads.items()}
    outliers, kept = Lowest(OUTLIERS, picture), KeptLogits()
    typical: Dict[int, Lowest] = defaultdict(lambda: Lowest(2, picture))
    mistaken: Dict[Tuple[int, int], Lowest] = defaultdict(lambda: Lowest(1, picture))
    embeddings = {path: Embeddings(each) for path, each in classes.items()}
    counts = Counter[Tuple[int, int]]()
    densities: List[Tensor] = []
    called: Set[str] = set()

    def add(images: Tensor, logits: Tensor, batch: Predictions, start: int) -> None:
        kept.add(start, logits)
        fit = -logits.cpu().gather(1, batch.target[:, None])[:, 0]
        for i, pair in enumerate(zip(batch.target.tolist(), batch.prediction.tolist(), strict=True)):
            typical[pair[0]].update(start + i, fit[i : i + 1], images[i : i + 1])
            if pair[0] != pair[1]:
                counts[pair] += 1
                mistaken[pair].update(start + i, -batch.confidence[i : i + 1], images[i : i + 1])
        if len(mistaken) > 2 * KEPT_PAIRS:
            for pair in sorted(mistaken, key=lambda pair: counts[pair])[:-KEPT_PAIRS]:
                del mistaken[pair]
        called.update(inputs)
        if inputs and all(x.shape == (len(images), classes[path].mu.shape[1]) for path, x in inputs.items()):
            if zzz_heads:
                scores = [log_density(classes[path], x).amax(1) for path, x in inputs.items()]
                densities.append(torch.stack(scores).mean(0).cpu())
                outliers.update(start, densities[-1], images)
            first = next(path for path in heads if path in inputs)
            embeddings[first].add(inputs[first], batch.target)
        inputs.clear()

    with record_inputs(heads) as inputs, progress(loader, 'images') as batches:
        predictions = evaluate(model, batches, device, amp_dtype, observe=add)
    if not called:
        raise ValueError(f'no {"ZZZ head" if zzz_heads else "classifier"} takes part when the model is evaluated')
    taking_part = [path for path in heads if path in called]
    first = embeddings[taking_part[0]]
    rank = zzz_heads[taking_part[0]].rank if zzz_heads else None
    density, points = torch.cat([torch.empty(0), *densities]), sum(map(len, first.points))
    every = len(predictions.target)
    return Seen(
        predictions=predictions,
        kept=kept,
        heads=taking_part,
        rank=rank,
        classes=first.classes,
        density=density if len(density) == every else None,
        embeddings=first if points == every else None,
        outliers=outliers,
        typical=typical,
        mistaken=mistaken,
    )


def _rows_of(classifier: nn.Module) -> ClassGaussians:
    """Return the normalised rows of a linear layer or 1x1 convolution as class means, without a covariance."""
    rows = classifier.weight.detach().flatten(1)  # type: ignore[operator]
    return ClassGaussians(normalize(rows.float()), None, None, rows.new_tensor(math.nan), rows.new_zeros(len(rows)))


# Contents of the page


def pairs_of(seen: Seen, names: Sequence[str], dataset: Any) -> Dict[str, Any]:
    """Compare the classes, at least two, by their confusions and their means."""
    classes, predictions = seen.classes, seen.predictions
    cosine = (classes.mu @ classes.mu.T).fill_diagonal_(-math.inf)
    images = predictions.target.bincount(minlength=len(names))
    taken = torch.stack(predictions[:2], 1)[~predictions.correct].tolist()
    # Most frequent first, then by index
    confusions = dict(sorted(Counter(map(tuple, taken)).items(), key=lambda item: (-item[1], item[0])))
    # Rank of the second class among the neighbours of the first; 1 is the nearest
    places = {(a, b): 1 + int((cosine[a] > cosine[a, b]).sum()) for a, b in confusions}

    def row(a: int, b: int) -> Dict[str, Any]:
        count, reverse = confusions.get((a, b), 0), confusions.get((b, a), 0)
        row: Dict[str, Any] = dict(
            first=a, second=b, count=count, reverse=reverse, share=count / max(1, int(images[a]))
        )
        row.update(place=places.get((a, b)), cosine=cosine[a, b])
        if classes.basis is not None:  # mean squared cosine between the subspaces, 0 to 1
            row['overlap'] = float((classes.basis[a].T @ classes.basis[b]).square().sum() / classes.basis.shape[2])
        return row

    def pictured(row: Dict[str, Any]) -> Dict[str, Any]:
        items = [*seen.mistaken[row['first'], row['second']].items, *seen.typical.get(row['second'], Lowest(0)).items]
        pictures = [dict(jpeg=jpeg, name=name_of(dataset, i)) for _, i, jpeg in items if jpeg]
        return dict(row, pictures=pictures)

    similarity, nearest = cosine.max(1)
    order = similarity.sort(descending=True, stable=True)[1].tolist()
    closest = dict.fromkeys((min(c, int(nearest[c])), max(c, int(nearest[c]))) for c in order)  # each pair once
    errors = len(taken)
    confused = [row(*pair) for pair in list(confusions)[:PAIRS]]
    similar = [row(*pair) for pair in list(closest)[:PAIRS]]
    context: Dict[str, Any] = dict(
        errors=errors,
        near={k: sum(n for pair, n in confusions.items() if places[pair] <= k) / max(1, errors) for k in (1, 5)},
        confused=confused,
        pictured=[pictured(each) for each in confused[:PICTURED] if (each['first'], each['second']) in seen.mistaken],
        similar=similar,
        overlap=any(each.get('overlap', 0) >= 0.1 for each in confused + similar),
        points=draw_embeddings(seen, similar, names) if seen.embeddings and classes.mu.shape[1] > 1 else None,
        maps=None,
    )
    if len(names) > MAX_MAP:
        return context
    shares = torch.zeros_like(cosine)
    for (a, b), count in confusions.items():
        shares[a, b] = count / images[a]
    order = order_of(classes.mu)
    labels = [shorten(names[c]) for c in order]
    title = 'Cosines between the means of all pairs of classes; the closest pairs are in the table below'
    maps = [draw_map(cosine[order][:, order], labels, title)]
    title = 'Share of the images of each class taken for each other class; the table above has the most frequent'
    pictures = [next((item[2] for item in seen.typical[c].items), None) if c in seen.typical else None for c in order]
    return dict(context, maps=[*maps, draw_map(shares[order][:, order], labels, title, pictures, shares=True)])


def draw_embeddings(seen: Seen, similar: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Draw a map of at most :data:`POINTS` embeddings with class names; of many classes, only the closest pairs."""
    assert seen.embeddings is not None
    points, predictions = torch.cat(seen.embeddings.points), seen.predictions
    means = seen.embeddings.sum @ seen.embeddings.axes / seen.embeddings.count  # NaN without images
    closest = [c for row in similar[:LABELLED] for c in (row['first'], row['second'])]
    labels = range(len(names)) if len(names) <= MAX_COLORS else closest
    step = math.ceil(len(points) / POINTS)
    shown = (points[::step], predictions.target[::step], predictions.correct[::step])
    return draw_points(*shown, means, {c: shorten(names[c]) for c in labels if not means[c].isnan().any()})


def order_of(mu: Tensor) -> List[int]:
    """Order classes by their means (C, d), so that similar ones are side by side.

    Sorts by the second eigenvector of the graph Laplacian of the cosines (Atkins et al. 1998,
    doi:10.1137/S0097539795285771).
    """
    if len(mu) < 3:
        return list(range(len(mu)))
    similarity = mu.double() @ mu.double().T
    weight = similarity - similarity.min()
    vector = torch.linalg.eigh(weight.sum(1).diag() - weight)[1][:, 1]
    order = vector.sort(stable=True)[1].tolist()
    return order if order[0] < order[-1] else order[::-1]


def spectra_of(seen: Seen, names: Sequence[str]) -> Dict[str, Any]:
    """Describe the variances of the classes along their bases, and the spread of the images there; rank >= 1."""
    classes = seen.classes
    assert classes.v is not None
    values = classes.v.double().sort(1, descending=True)[0] + classes.sigma2
    total = values.sum(1)
    context: Dict[str, Any] = dict(directions=draw_spectra(values, float(classes.sigma2)), spread=None)
    context['alike'] = bool(total.max() < 1.05 * total.min())
    if seen.embeddings is None or len(names) < 2 or classes.mu.shape[1] == classes.v.shape[1]:
        return context
    deviations = seen.embeddings.deviations()
    measured = [c for c in total.sort(descending=True, stable=True)[1].tolist() if deviations[c].isfinite().all()]
    if not measured:
        return context
    own, other, rest = deviations[measured].clamp(min=1e-12).unbind(1)
    widest = measured[:WIDEST]
    spread = draw_spread(deviations[widest], [shorten(names[c]) for c in widest])
    return dict(context, spread=spread, ratios=[float((own / each).median()) for each in (other, rest)])


def name_of(dataset: Any, i: int) -> str:
    """Name the file of the ``i``-th image; if it can't be read, name also the file that timm takes in its place."""
    name = file_of(dataset, i)
    with suppress(Exception):  # data sets without a reader, or not read by PIL
        for j in range(i, i + len(dataset)):
            with suppress(OSError), Image.open(dataset.reader[j % len(dataset)][0]) as image:
                image.load()
                other = file_of(dataset, j % len(dataset))
                return name if j == i else f"{other} (in the place of {name}, which can't be read)"
    return name


def outliers_of(seen: Seen, dataset: Any) -> List[Dict[str, Any]]:
    rows = []
    for density, i, jpeg in seen.outliers.items:
        target, prediction, confidence = (t[i].item() for t in seen.predictions[:3])
        row = dict(target=target, prediction=prediction, confidence=confidence, density=density)
        rows.append(dict(row, name=name_of(dataset, i), jpeg=jpeg))
    return rows


def picture_of(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Optional[bytes]:
    """Convert a normalised image to a small JPEG; None if it is neither grey nor RGB."""
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        return None
    image = image.cpu().float() * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    picture = to_pil_image((image.clamp(0, 1) * 255).round().byte())
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    picture.save(file, 'JPEG', quality=80, optimize=True)
    return file.getvalue()


# The page


def check_extra() -> None:
    """Raise a ValueError with the command to install matplotlib, if it is missing."""
    try:
        importlib.import_module('matplotlib')
    except ImportError as e:
        raise ValueError(f'report needs matplotlib: pip install "timm_zzz[report]" ({e})') from e


def write_report(
    run: Run,
    loader: Iterable[Any],
    output: Path,
    device: torch.device,
    *,
    amp_dtype: Optional[torch.dtype] = None,
    names: Sequence[str] = (),
    title: str = 'Report',
    about: Optional[Mapping[str, str]] = None,
) -> None:
    """Evaluate a model on images and write the page about it; an existing page is replaced.

    Args:
        loader: Batches of (images, class indices), preprocessed as in ``run.data_config``.
        output: File of the page.
        amp_dtype: Dtype of mixed precision; None for full precision.
        names: Class names by index, if known.
        about: Rows of the table about the page.

    Raises:
        ValueError: If matplotlib is missing, and as :func:`observe`.
    """
    check_extra()
    from jinja2 import Environment, StrictUndefined
    from matplotlib import style

    config, dataset = data_config_of(run.data_config, run.model), getattr(loader, 'dataset', None)
    picture = partial(picture_of, mean=config['mean'], std=config['std'])
    seen = observe(run.model.to(device), loader, device, amp_dtype, picture)
    predictions, (count, width) = seen.predictions, seen.classes.mu.shape
    names = names or [f'class {c}' for c in range(count)]
    bins, ece = reliability(predictions.confidence, predictions.correct)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters['base64'] = lambda data: base64.b64encode(data).decode()
    template = environment.from_string(Path(__file__).with_name('report.html.jinja').read_text(encoding='utf-8'))
    with style.context(['default', STYLE]), warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph')  # the browser has fonts of its own
        page = template.render(
            title=title,
            about=about or {},
            names=names,
            predictions=predictions,
            top5=predictions.in_top5.double().mean() if len(names) > 5 else None,
            rank=seen.rank,
            width=width,
            heads=seen.heads,
            sigma2=seen.classes.sigma2,
            pairs=pairs_of(seen, names, dataset) if len(names) > 1 else None,
            spectra=spectra_of(seen, names) if seen.rank else None,
            colors=MAX_COLORS,
            most=POINTS,
            bins=bins,
            ece=ece,
            calibration=cross_calibrate(seen.kept.logits, predictions.target[:: seen.kept.step]),
            diagram=draw_reliability([each for each in bins if each.count]),
            median_density=None if seen.density is None else seen.density.double().median(),
            outliers=outliers_of(seen, dataset),
        )
    with written_whole(output) as draft:
        draft.write_text(page, encoding='utf-8')


# The command


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='python -m timm_zzz report',
        description='Write an HTML page about a trained model: its confusions, '
        'the variances and the similarity of its classes, its calibration, and the images most unlike every class. '
        'One file without scripts, which loads nothing. Images are prepared as train.py did for validation. '
        'It needs matplotlib: pip install "timm_zzz[report]".',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add_run_arguments(parser, help=SOURCES)
    add('--output', type=Path, default=Path('report.html'), metavar='FILE', help='the page')
    add('--force', action='store_true', help='replace the page if it exists')
    return parser


def main(arguments: Optional[List[str]] = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    with exit_on_error(parser):
        _report(options)
    print(options.output)


def _report(options: argparse.Namespace) -> None:
    check_extra()
    output: Path = options.output
    device = device_of(options)
    run = load_trained(options.checkpoint, use_ema=options.use_ema, model_name=options.model)
    amp_dtype = amp_dtype_of(options, run.args)
    data, loader, config = open_images(options, run, device)
    check_output(output, options.force)
    dataset = options.dataset or run.args.get('dataset') or options.data_dir.resolve().name
    cfg: Any = run.model.pretrained_cfg
    title = f'{options.model or run.args.get("model") or cfg["architecture"]} on {dataset}'
    size = ' × '.join(map(str, config['input_size']))
    precision = 'float32' if amp_dtype is None else f'mixed precision, {amp_dtype}'.replace('torch.', '')
    asked = options.amp is not None or options.amp_dtype is not None
    source = ', as asked for' if asked else ', as in training' if 'amp' in run.args else ''
    about = {
        'Data': f'{dataset}, {options.split}',
        'Weights': '/'.join(run.checkpoint.parts[-2:])
        + (', averaged' if run.averaged else '')
        + ('' if run.epoch is None else f', after epoch {run.epoch}, counted from 0'),
        'Input': f'{size}, crop {config["crop_pct"]:g} ({config["crop_mode"]})',
        'Run on': f'{device.type}, {precision}{source}; batches of {options.batch_size}',
        'Versions': f'timm_zzz {__version__}, timm {timm.__version__}, torch {torch.__version__}, '
        f'Python {platform.python_version()}',
    }
    write_report(run, loader, output, device, amp_dtype=amp_dtype, names=data.class_names, title=title, about=about)
