"""Predict the classes of images, and find outlying images: ``python -m timm_zzz predict``."""

import argparse
import csv
import glob
import json
import os
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, TextIO

from huggingface_hub.utils import tqdm
from timm.data.readers.reader_image_folder import find_images_and_targets

from ..data import read_class_map
from ..models.predict import Prediction, iterate_predictions, percentiles_of
from .common import (
    add_loader_arguments,
    amp_dtype_of,
    check_count,
    check_order,
    check_output,
    check_size,
    data_config_of,
    device_of,
    exit_on_error,
    positive_int,
    warn,
    written_whole,
)
from .trained import SOURCES, load_trained

__all__ = ['NONE', 'find_images', 'main']

NONE = 'none of these'


def find_images(places: Sequence[str]) -> List[str]:
    """List the images named by files, folders, glob patterns and, for ``-``, the lines of stdin."""
    files: List[str] = []
    for place in places:
        if place == '-':
            files += [line for line in sys.stdin.read().splitlines() if line]
            continue
        found = [place] if os.path.exists(place) else sorted(glob.glob(place, recursive=True))
        for path in found or [place]:
            if not os.path.isdir(path):
                files.append(path)
                continue
            images = [file for file, _ in find_images_and_targets(path)[0]]
            if not images:
                warn(f'no images in {path}')
            files += images
    return files


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f'expected a share between 0 and 1, got {text}')
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='python -m timm_zzz predict',
        description='Name the most probable classes of images, with their probabilities, and for a ZZZ model that was '
        'calibrated the percentage of the validation images that are less outlying. Images are prepared as in '
        'evaluation. One that cannot be read has its error in its row.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add('source', metavar='MODEL', help=SOURCES)
    add('images', nargs='+', metavar='IMAGES', help='files, folders, patterns, or - for names on stdin, one a line')
    add('-k', '--top-k', type=positive_int, default=5, metavar='N', help='classes to name for each image')
    add('--class-map', type=Path, metavar='FILE.txt', help='class names by index, one per line')
    help = f'answer "{NONE}" first where an image is more outlying than all but this share of the validation images'
    add('--reject', type=_share, metavar='SHARE', help=help)
    add('--format', choices=tuple(_WRITERS), help="format; if not given, that of the output's suffix, else a table")
    add('-o', '--output', type=Path, metavar='FILE', help='write to a file instead of stdout')
    add('--force', action='store_true', help='replace the file if it exists')
    add('--use-ema', action='store_true', help='take the averaged weights of a checkpoint')
    add('--model', metavar='NAME', help="timm's name of the model, if a checkpoint has none")
    add_loader_arguments(parser, batch_size=64)
    return parser


def main(arguments: Optional[List[str]] = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    with exit_on_error(parser):
        _predict(options)


def _predict(options: argparse.Namespace) -> None:
    output: Optional[Path] = options.output
    if output:
        check_output(output, options.force)
        if not options.format and output.suffix[1:].lower() not in ('txt', *_WRITERS):
            raise ValueError(f'--output: give --format, {output.name} does not say which')
    device = device_of(options)
    files = find_images(options.images)
    if not files:
        raise ValueError('IMAGES: no images')
    run = load_trained(options.source, use_ema=options.use_ema, model_name=options.model)
    count = run.model.num_classes
    names = run.names
    if options.class_map:
        names = read_class_map(options.class_map)
        check_count('--class-map', len(names), count)
        check_order(names, run.names)
    model = run.model.to(device)
    known = percentiles_of(model)
    percentiles = known is not None
    if options.reject is not None and not percentiles:
        raise ValueError(
            f'--reject: {options.source} has no percentiles of validation images: take what python -m timm_zzz '
            'calibrate makes of a checkpoint'
        )
    steps = len(known.quantiles) - 1 if known else 0
    if options.reject is not None and options.reject * steps < 1:
        raise ValueError(
            f'--reject: the percentiles have {steps} steps, too few for a share of {options.reject:g}; calibrate with '
            'more images'
        )
    config = data_config_of(run.data_config, model)
    check_size(model, config)
    settings: Dict[str, Any] = dict(batch_size=options.batch_size, workers=options.workers)
    predictions = iterate_predictions(
        model, files, options.top_k, names, config, amp_dtype=amp_dtype_of(options, run.args), **settings
    )
    rejected = 101.0 if options.reject is None else 100 * (1 - options.reject)
    broken = 0

    def rows() -> Iterator[Row]:
        nonlocal broken
        hidden = not sys.stderr.isatty() or output is None and sys.stdout.isatty()  # printed rows show the progress
        with tqdm(predictions, total=len(files), unit='image', file=sys.stderr, disable=hidden) as found:
            for name, each in zip(files, found, strict=True):
                broken += bool(each.error)
                shown = name.encode('utf-8', 'surrogateescape').decode('utf-8', 'replace')
                yield Row(shown, each, each.percentile is not None and each.percentile > rejected)

    layout = Layout(min(options.top_k, count), percentiles, max(map(len, files)))
    suffix = output.suffix[1:].lower() if output else ''
    write = _WRITERS[options.format or (suffix if suffix in _WRITERS else 'table')]
    if output:
        with written_whole(output) as draft, open(draft, 'w', newline='', encoding='utf-8') as file:
            write(file, rows(), layout)
        print(output)
    else:
        write(sys.stdout, rows(), layout)
    if broken == len(files):
        raise ValueError(f'none of the {len(files)} images has a prediction: their rows say why')
    if broken:
        warn(f'{broken} of {len(files)} images have an error in their row')


# Formats


class Row(NamedTuple):
    image: str
    prediction: Prediction
    rejected: bool

    @property
    def answer(self) -> str:
        return NONE if self.rejected else self.prediction.names[0] if self.prediction.names else ''


class Layout(NamedTuple):
    top_k: int
    percentiles: bool
    width: int  # of the column of image names


def _write_table(file: TextIO, rows: Iterable[Row], layout: Layout) -> None:
    print(f'{"image":{layout.width}}' + '  percentile' * layout.percentiles + '  classes', file=file)
    for image, prediction, rejected in rows:
        names, probabilities, percentile, error = prediction
        cells = [NONE] * rejected + [f'{name} {p:.3f}' for name, p in zip(names, probabilities, strict=True)]
        line = f'{image:{layout.width}}'
        if layout.percentiles:
            line += f'{"" if percentile is None else f"{percentile:.1f}":>12}'
        print(f'{line}  {f"error: {error}" if error else ", ".join(cells)}', file=file)


def _write_csv(file: TextIO, rows: Iterable[Row], layout: Layout) -> None:
    """Write a row per image: the answer, then classes and probabilities."""
    writer = csv.writer(file, lineterminator='\n')
    pairs = [name for k in range(layout.top_k) for name in (f'class {k + 1}', f'probability {k + 1}')]
    writer.writerow(['image', 'answer', *(['percentile'] if layout.percentiles else []), *pairs, 'error'])
    for row in rows:
        names, probabilities, percentile, error = row.prediction
        share = ['' if percentile is None else f'{percentile:.6g}'] if layout.percentiles else []
        cells = [cell for name, p in zip(names, probabilities, strict=True) for cell in (name, f'{p:.6g}')]
        writer.writerow([row.image, row.answer, *share, *(cells or [''] * len(pairs)), error])


def _write_jsonl(file: TextIO, rows: Iterable[Row], layout: Layout) -> None:
    """Write a JSON object per image, with the content of the other formats."""
    for row in rows:
        names, probabilities, percentile, error = row.prediction
        about: Dict[str, Any] = dict(image=row.image)
        if error:
            about.update(error=error)
        else:
            about.update(answer=row.answer, classes=names, probabilities=probabilities)
            if layout.percentiles:
                about.update(percentile=percentile)
        print(json.dumps(about, ensure_ascii=False), file=file)


_WRITERS: Dict[str, Callable[[TextIO, Iterable[Row], Layout], None]] = dict(
    table=_write_table, csv=_write_csv, jsonl=_write_jsonl
)
