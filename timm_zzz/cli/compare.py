"""Compare trained models on the same images, with a paired test: ``python -m timm_zzz compare``."""

import argparse
import csv
import math
from pathlib import Path
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..data import file_of
from ..metrics import Calibration, KeptLogits, Predictions, cross_calibrate, evaluate, reliability
from .common import Images, amp_dtype_of, check_output, device_of, exit_on_error, positive_int, progress, written_whole
from .run import Run, add_run_arguments, open_images
from .trained import SOURCES, load_trained

__all__ = ['Difference', 'difference', 'labels', 'main']

BINS = 5  # number of bins of the reliability table


class Result(NamedTuple):
    """Predictions and calibration of one model."""

    name: str
    predictions: Predictions
    calibration: Calibration


class Difference(NamedTuple):
    """Difference between two models on the same images: the second compared with the first."""

    only_first: int  # images that only the first classifies correctly
    only_second: int
    top1: float  # second minus first, percentage points
    interval: Tuple[float, float]  # 95 % confidence interval of top1, percentage points
    p_value: float  # of McNemar's exact test of equal accuracy


def difference(first: Tensor, second: Tensor) -> Difference:
    """Compare two models by masks (N,) of the images that they classify correctly.

    The interval is that of Agresti and Min 2005 (doi:10.1002/sim.1781): Wald's after adding half an image to each of
    the four cells, so that it is not too short if few images differ.
    """
    count, b, c = len(first), int((first & ~second).sum()), int((second & ~first).sum())
    n, most = b + c, min(b, c)
    logs = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2) for k in range(most + 1)]
    p_value = min(1.0, 2 * math.fsum(map(math.exp, logs)))
    middle = (c - b) / (count + 2)
    error = math.sqrt((n + 1) / (count + 2) - middle**2) / math.sqrt(count + 2)
    interval = tuple(100 * max(-1.0, min(1.0, middle + sign * 1.96 * error)) for sign in (-1, 1))
    return Difference(b, c, 100 * (c - b) / count, interval, p_value)  # type: ignore[arg-type]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='python -m timm_zzz compare',
        description='Evaluate trained models, with ZZZ or other heads, on the same images: accuracy, negative '
        'log-likelihood and calibration, as they are and at one temperature for each, and for each model after the '
        'first a paired test against the first. Each model prepares images in its own way.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add_run_arguments(parser, 'models', nargs='+', metavar='MODEL', help=SOURCES)
    add('--show', type=positive_int, default=5, metavar='N', help='number of classes and of images to list')
    add('-o', '--output', type=Path, metavar='FILE.csv', help='write the prediction of each model for every image')
    add('--force', action='store_true', help='replace the file if it exists')
    return parser


def main(arguments: Optional[List[str]] = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    if len(options.models) < 2:
        parser.error('compare needs two models at least')
    with exit_on_error(parser):
        _compare(options)


def _compare(options: argparse.Namespace) -> None:
    if options.output:
        check_output(options.output, options.force, '.csv')
        options.output.parent.mkdir(parents=True, exist_ok=True)
    device = device_of(options)
    runs = [load_trained(source, use_ema=options.use_ema, model_name=options.model) for source in options.models]
    opened = [open_images(options, run, device) for run in runs]
    images = [
        (split.class_names, [file_of(split.dataset, i) for i in range(len(split.dataset))]) for split, *_ in opened
    ]
    names, files = images[0]
    for source, each in zip(options.models, images, strict=True):
        if each != (names, files):
            raise ValueError(f'{source}: its classes are others than those of {options.models[0]}, or in another order')
    results = [
        _evaluated(label, run, loader, options, device)
        for label, run, (_, loader, _) in zip(labels(options.models), runs, opened, strict=True)
    ]
    model: Any = runs[0].model
    names = names or [f'class {c}' for c in range(model.num_classes)]
    _print(results, names, files, options)
    if options.output:
        with written_whole(options.output) as draft:
            _write(draft, results, names, files)
        print(options.output)


def _evaluated(label: str, run: Run, loader: Images, options: argparse.Namespace, device: torch.device) -> Result:
    kept, amp_dtype = KeptLogits(), amp_dtype_of(options, run.args)
    with progress(loader, label) as batches:
        predictions = evaluate(
            run.model.to(device), batches, device, amp_dtype, lambda _, logits, __, start: kept.add(start, logits)
        )
    run.model.cpu()
    return Result(label, predictions, cross_calibrate(kept.logits, predictions.target[:: kept.step]))


def labels(sources: Sequence[str]) -> List[str]:
    """Shorten the paths of models to the parts in which they differ.

    Raises:
        ValueError: If a model is named twice.
    """
    paths = [Path(source).parts for source in sources]
    if len({*paths}) < len(paths):
        raise ValueError(f'compare: a model is named twice: {", ".join(sources)}')
    shared = min(map(len, paths)) - 1
    start = next((i for i in range(shared) if len({path[i] for path in paths}) > 1), max(0, shared))
    end = next((i for i in range(shared - start) if len({path[-1 - i] for path in paths}) > 1), max(0, shared - start))
    found = ['/'.join(path[start : len(path) - end]) for path in paths]
    return found if all(found) and len({*found}) == len(found) else list(sources)


def _print(results: Sequence[Result], names: Sequence[str], files: Sequence[str], options: argparse.Namespace) -> None:
    width = max(len(result.name) for result in results)
    count = len(results[0].predictions.target)
    print(f'{count} images of {options.split}; T: one temperature for each model, of the other half of the images')
    print(f'{"":{width}}  top-1 %  top-5 %      NLL    ECE %  NLL at T  ECE % at T       T')
    for name, predictions, calibration in results:
        ece = reliability(predictions.confidence, predictions.correct)[1]
        top5 = 100 * predictions.in_top5.double().mean().item()
        print(
            f'{name:{width}}{predictions.top1:9.2f}{top5:9.2f}{predictions.mean_nll:9.4f}{100 * ece:9.2f}'
            f'{calibration.after.mean_nll:10.4f}{100 * calibration.ece[1]:12.2f}{calibration.temperature:8.3g}'
        )
    first = results[0]
    for other in results[1:]:
        _print_difference(first, other, names, files, options.show)
    print(f'\nReliability: accuracy - mean confidence, percentage points (images)\n{"confidence":{width}}', end='')
    tables = [reliability(result.predictions.confidence, result.predictions.correct, BINS)[0] for result in results]
    print(''.join(f'{f"{100 * each.low:.0f} to {100 * each.high:.0f} %":>18}' for each in tables[0]))
    for result, table in zip(results, tables, strict=True):
        cells = (
            f'{100 * (each.accuracy - each.confidence):+.1f} ({each.count})' if each.count else '' for each in table
        )
        print(f'{result.name:{width}}' + ''.join(f'{cell:>18}' for cell in cells))


def _print_difference(first: Result, other: Result, names: Sequence[str], files: Sequence[str], show: int) -> None:
    right, new = first.predictions.correct, other.predictions.correct
    found = difference(right, new)
    low, high = found.interval
    print(
        f'\n{other.name} against {first.name}: top-1 {found.top1:+.2f} (95 % interval {low:+.2f} to {high:+.2f}), '
        f"McNemar's test p = {found.p_value:.2g}"
    )
    target, count = first.predictions.target, len(names)
    images = target.bincount(minlength=count)
    gain = target.bincount(new.double() - right.double(), minlength=count).long()
    for what, sign in (('gained', 1), ('lost', -1)):
        order = (sign * gain).sort(descending=True, stable=True)[1][:show].tolist()
        classes = [f'{names[c]} {int(gain[c]):+d} of {int(images[c])}' for c in order if sign * gain[c] > 0]
        _print_items(f'classes that {what} most', classes)
    for result, rest, mask in ((other, first, new & ~right), (first, other, right & ~new)):
        which = mask.nonzero()[:, 0].tolist()
        shown = [f'{files[i]} (not {names[int(rest.predictions.prediction[i])]})' for i in which[:show]]
        if len(which) > show:
            shown.append(f'and {len(which) - show} more')
        _print_items(f'{len(which)} images that only {result.name} gets right', shown)


def _print_items(title: str, items: Sequence[str]) -> None:
    print(f'  {title}:' if items else f'  {title}: none', *items, sep='\n    ')


def _write(path: Path, results: Sequence[Result], names: Sequence[str], files: Sequence[str]) -> None:
    """Write a row per image: its class, and the prediction of each model with its probability."""
    with open(path, 'w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file)
        writer.writerow(
            ['image', 'class', *(f'{each.name}{what}' for each in results for what in ('', ' probability'))]
        )
        for i, target in enumerate(results[0].predictions.target.tolist()):
            row = [files[i], names[target]]
            for result in results:
                row += [names[int(result.predictions.prediction[i])], f'{result.predictions.confidence[i]:.6g}']
            writer.writerow(row)
