"""``python -m timm_zzz report``: one HTML page about a model that timm's train.py trained.

The page is report.html.jinja, its figures are drawn by matplotlib. Of each image six numbers are kept, and its logits
as far as :class:`~timm_zzz.metrics.KeptLogits` does.
"""

import argparse
import base64
import importlib
import io
import math
import platform
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Set, Tuple

import timm
import torch
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from .. import __version__
from ..head import ZZZHead, heads_of, record_inputs
from ..metrics import KeptLogits, Predictions, cross_calibrate, evaluate, reliability
from ..scores import ClassGaussians, class_gaussians_of, log_density
from .common import amp_dtype_of, check_output, data_config_of, device_of, exit_on_error, progress
from .figures import STYLE, draw_bars, draw_histogram, draw_map, draw_reliability, draw_spectra, shorten
from .run import Run, add_run_arguments, load_run, open_images

__all__ = ['main', 'write_report']

PAIRS = 30  # rows of a table of class pairs
OUTLIERS = 24
EXTREMES = 8  # classes of the largest, and of the smallest, variance
MAX_MAP = 60  # classes that a map of all pairs shows
THUMBNAIL = 96  # pixels


# What the model makes of the images


class Lowest:
    """The images with the lowest scores so far, of equal ones the first, in memory that does not grow."""

    def __init__(self, size: int):
        self.size = size
        self.items: List[Tuple[float, int, Tensor]] = []  # score, place among all images, image on the CPU

    def update(self, start: int, score: Tensor, images: Tensor) -> None:
        """Offer images (B, ...) of scores (B,); the first is the ``start``-th of all."""
        first = score.sort(stable=True)[1][: self.size].tolist()
        # Copies: a view would keep all of its batch
        self.items += [(float(score[i]), start + i, images[i].cpu().clone()) for i in first]
        self.items = sorted(self.items, key=lambda item: item[:2])[: self.size]


def observe(
    model: nn.Module, loader: Iterable[Any], device: torch.device, amp_dtype: Optional[torch.dtype]
) -> Tuple[Predictions, KeptLogits, Optional[Tensor], Lowest, Dict[str, ZZZHead]]:
    """Evaluate a model, and how well each image fits the classes of its heads.

    Returns:
        The predictions; the logits that are kept; for each image the largest log-density of a class, averaged over the
        heads, in nats, or None if a head is not given one embedding per image; the images for which it is lowest; the
        heads that take part.

    Raises:
        ValueError: As :func:`timm_zzz.metrics.evaluate`, and if no ZZZ head takes part.
    """
    heads = heads_of(model)
    classes = {path: class_gaussians_of(head) for path, head in heads.items()}
    lowest, kept = Lowest(OUTLIERS), KeptLogits()
    densities: List[Tensor] = []
    called: Set[str] = set()

    def add(images: Tensor, logits: Tensor, _: Predictions, start: int) -> None:
        kept.add(start, logits)
        called.update(inputs)
        if inputs and all(x.shape == (len(images), heads[path].feat_dim) for path, x in inputs.items()):
            scores = [log_density(classes[path], x).amax(1) for path, x in inputs.items()]
            densities.append(torch.stack(scores).mean(0).cpu())
            lowest.update(start, densities[-1], images)
        inputs.clear()

    with record_inputs(heads) as inputs, progress(loader, 'images') as batches:
        predictions = evaluate(model, batches, device, amp_dtype, observe=add)
    if not called:
        raise ValueError('no ZZZ head takes part when the model is evaluated')
    density = torch.cat([torch.empty(0), *densities])
    heads = {path: head for path, head in heads.items() if path in called}
    return predictions, kept, density if len(density) == len(predictions.target) else None, lowest, heads


# What the page says


def pairs_of(classes: ClassGaussians, predictions: Predictions, names: Sequence[str]) -> Dict[str, Any]:
    """Compare classes, at least two: by the confusions between them, and by their means."""
    cosine = (classes.mu @ classes.mu.T).fill_diagonal_(-math.inf)
    images = predictions.target.bincount(minlength=len(names))
    taken = torch.stack(predictions[:2], 1)[~predictions.correct].tolist()
    # The most frequent first, then by index
    confusions = dict(sorted(Counter(map(tuple, taken)).items(), key=lambda item: (-item[1], item[0])))
    # Of the second class among the neighbours of the first, 1 for the nearest
    places = {(a, b): 1 + int((cosine[a] > cosine[a, b]).sum()) for a, b in confusions}

    def row(a: int, b: int) -> Dict[str, Any]:
        count, reverse = confusions.get((a, b), 0), confusions.get((b, a), 0)
        row: Dict[str, Any] = dict(
            first=a, second=b, count=count, reverse=reverse, share=count / max(1, int(images[a]))
        )
        row.update(place=places.get((a, b)), cosine=cosine[a, b])
        if classes.basis is not None:  # mean squared cosine between the subspaces, 0 to 1
            row['overlap'] = (classes.basis[a].T @ classes.basis[b]).square().sum() / classes.basis.shape[2]
        return row

    similarity, nearest = cosine.max(1)
    order = similarity.sort(descending=True, stable=True)[1].tolist()
    closest = dict.fromkeys((min(c, int(nearest[c])), max(c, int(nearest[c]))) for c in order)  # each pair once
    errors = len(taken)
    context: Dict[str, Any] = dict(
        errors=errors,
        near={k: sum(n for pair, n in confusions.items() if places[pair] <= k) / max(1, errors) for k in (1, 5)},
        confused=[row(*pair) for pair in list(confusions)[:PAIRS]],
        similar=[row(*pair) for pair in list(closest)[:PAIRS]],
    )
    if len(names) > MAX_MAP:
        title = 'Number of classes by the cosine between their mean and the nearest other mean'
        return dict(context, maps=None, neighbours=draw_histogram(similarity, title, 'cosine to the nearest mean'))
    shares = torch.zeros_like(cosine)
    for (a, b), count in confusions.items():
        shares[a, b] = count / images[a]
    order = order_of(classes.mu)
    labels = [shorten(names[c]) for c in order]
    title = 'Cosines between the means of all pairs of classes; the closest pairs are in the table below'
    maps = [draw_map(cosine[order][:, order], labels, title)]
    title = 'Share of the images of each class taken for each other class; the table above has the most frequent'
    return dict(context, maps=[*maps, draw_map(shares[order][:, order], labels, title, shares=True)])


def order_of(mu: Tensor) -> List[int]:
    """Order classes so that like ones are side by side.

    By the second eigenvector of the graph Laplacian of the cosines (Atkins et al. 1998, doi:10.1137/S0097539795285771).
    """
    if len(mu) < 3:
        return list(range(len(mu)))
    similarity = mu.double() @ mu.double().T
    weight = similarity - similarity.min()
    vector = torch.linalg.eigh(weight.sum(1).diag() - weight)[1][:, 1]
    order = vector.sort(stable=True)[1].tolist()
    return order if order[0] < order[-1] else order[::-1]


def spectra_of(classes: ClassGaussians, predictions: Predictions) -> Dict[str, Any]:
    """Describe the eigenvalues of the class covariances along their bases, for rank >= 1."""
    assert classes.v is not None
    sigma2 = classes.sigma2.double()
    values = classes.v.double().sort(1, descending=True)[0] + sigma2
    beyond = classes.v.double().sum(1)
    total = beyond + classes.mu.shape[1] * sigma2
    order = total.sort(descending=True, stable=True)[1].tolist()
    each = min(EXTREMES, (len(order) + 1) // 2)
    rows = []
    for i, c in enumerate(order[:each] + order[each:][-each:]):
        correct = predictions.correct[predictions.target == c].double()
        row = dict(index=c, size='large' if i < each else 'small', total=total[c], share=beyond[c] / total[c])
        row.update(images=len(correct), accuracy=correct.mean() if len(correct) else None)
        rows.append(dict(row, bars=draw_bars(values[c], float(values.max()))))
    histogram = draw_histogram(total, 'Number of classes by total variance', 'total variance (trace of the covariance)')
    return dict(rows=rows, directions=draw_spectra(values, float(sigma2)), total=histogram)


def outliers_of(
    lowest: Lowest, predictions: Predictions, config: Mapping[str, Any], dataset: Any
) -> List[Dict[str, Any]]:
    rows = []
    for density, i, image in lowest.items:
        target, prediction, confidence = (t[i].item() for t in predictions[:3])
        try:
            name = str(dataset.filename(i))
        except (AttributeError, NotImplementedError, AssertionError, KeyError):  # data that is in no files
            name = f'image {i}'
        row = dict(target=target, prediction=prediction, confidence=confidence, density=density, name=name)
        rows.append(dict(row, picture=picture_of(image, config['mean'], config['std'])))
    return rows


def picture_of(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Optional[str]:
    """Undo the normalisation of what the model was given: a small JPEG in Base64; None if neither grey nor RGB."""
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        return None
    image = image.float() * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    picture = to_pil_image((image.clamp(0, 1) * 255).round().byte())
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    picture.save(file, 'JPEG', quality=80, optimize=True)
    return base64.b64encode(file.getvalue()).decode()


# The page


def check_extra() -> None:
    """Raise a ValueError that says how to install what draws the page, if it is missing."""
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
    """Evaluate a model on images and write the page about it, in the place of one that is there.

    Args:
        loader: Batches of images, prepared as ``run.data_config`` says, and class indices.
        names: Class names by index, if they are known.
        about: Rows of the table about the page.

    Raises:
        ValueError: Without matplotlib, and as :func:`observe`.
    """
    check_extra()
    from jinja2 import Environment, StrictUndefined
    from matplotlib import style

    predictions, kept, density, lowest, heads = observe(run.model.to(device), loader, device, amp_dtype)
    head = next(iter(heads.values()))
    classes = ClassGaussians(*(t if t is None else t.cpu() for t in class_gaussians_of(head)))  # type: ignore[arg-type]
    names = names or [f'class {c}' for c in range(head.num_classes)]
    config, dataset = data_config_of(run.data_config, run.model), getattr(loader, 'dataset', None)
    bins, ece = reliability(predictions.confidence, predictions.correct)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name('report.html.jinja').read_text(encoding='utf-8'))
    with style.context(['default', STYLE]), warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph')  # the browser has other fonts
        page = template.render(
            title=title,
            about=about or {},
            names=names,
            predictions=predictions,
            top5=predictions.in_top5.double().mean() if len(names) > 5 else None,
            head=head,
            heads=list(heads),
            sigma2=classes.sigma2,
            pairs=pairs_of(classes, predictions, names) if len(names) > 1 else None,
            spectra=spectra_of(classes, predictions) if head.rank else None,
            bins=bins,
            ece=ece,
            calibration=cross_calibrate(kept.logits, predictions.target[:: kept.step]),
            diagram=draw_reliability([each for each in bins if each.count]),
            median_density=None if density is None else density.double().median(),
            outliers=outliers_of(lowest, predictions, config, dataset),
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding='utf-8')


# The command


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='python -m timm_zzz report',
        description='Write an HTML page about a model with a ZZZ head that train.py trained: its confusions, '
        'the variances and the similarity of its classes, its calibration, and the images most unlike every class. '
        'One file without scripts, which loads nothing. Images are prepared as train.py did for validation. '
        'It needs matplotlib: pip install "timm_zzz[report]".',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add_run_arguments(parser)
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
    run = load_run(options.checkpoint, use_ema=options.use_ema, model_name=options.model)
    amp_dtype = amp_dtype_of(options, run.args)
    data, loader, config = open_images(options, run, device)
    check_output(output, options.force)
    dataset = options.dataset or run.args.get('dataset') or options.data_dir.resolve().name
    title = f'{options.model or run.args["model"]} on {dataset}'
    size = ' × '.join(map(str, config['input_size']))
    precision = 'float32' if amp_dtype is None else f'mixed precision, {amp_dtype}'.replace('torch.', '')
    asked = options.amp is not None or options.amp_dtype is not None
    source = ', as asked for' if asked else ', as in training' if 'amp' in run.args else ''
    about = {
        'Data': f'{dataset}, {options.split}',
        'Checkpoint': f'{run.checkpoint.resolve().parent.name}/{run.checkpoint.name}',
        'Weights': ('averaged, ' if run.averaged else '') + f'after epoch {run.epoch}, counted from 0',
        'Input': f'{size}, crop {config["crop_pct"]:g} ({config["crop_mode"]})',
        'Run on': f'{device.type}, {precision}{source}; batches of {options.batch_size}',
        'Versions': f'timm_zzz {__version__}, timm {timm.__version__}, torch {torch.__version__}, '
        f'Python {platform.python_version()}',
    }
    write_report(run, loader, output, device, amp_dtype=amp_dtype, names=data.class_names, title=title, about=about)
