"""Tolerance of trained heads: top-1 and NLL on validation images that are occluded, recoloured, blurred and so on.

    python benchmarks/tolerance.py --data DIR [DIR ...] --backbone NAME FILE PIXELS [--backbone ...] \
        --heads linear:rows=zero zzz_r8 zzz_r8:fit=finetune --rates FILE.jsonl --results FILE.jsonl

Every head trains as in accuracy.py, at its own learning rates, which the rows of that say (``--rates``). Then all heads
see the same corrupted images (corruptions.py). Every run is a line of the results file; runs that are in it already
are not repeated. tolerance_table.py makes tables of them.
"""

import argparse
import itertools
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from accuracy import Row, Runs, Worker, chosen_rates, final, is_trained, quality, read, shared_parser, spectrum
from corruptions import CORRUPTIONS, STRENGTHS, corrupt, middle_crops
from images import Images
from starts import parse
from subspaces import shares
from torch import Tensor, nn
from torch.nn import functional as F
from training import Run, Runner

from timm_zzz.functional import normalize
from timm_zzz.head import ZZZHead
from timm_zzz.scores import class_gaussians_of

RATES_FILE = Path(__file__).parent / 'results/accuracy.jsonl'


def class_means(x: Tensor, target: Tensor) -> Tensor:
    """Average the rows (N, d) of each class, (C, d)."""
    means = x.new_zeros(int(target.max()) + 1, x.shape[1]).index_add_(0, target, x)
    return means / target.bincount()[:, None]


class Corrupted:
    """Images as they are evaluated, and corrupted in every way at every strength."""

    def __init__(self, images: Images, size: int, crop_pct: float):
        pixels = middle_crops(images, size, crop_pct)
        self.clean = replace(images, pixels=pixels, aspect=torch.ones_like(images.aspect))
        self.images: Dict[str, List[Images]] = {}  # by name, one for each strength
        self.failed: Dict[str, str] = {}  # by name, why
        for name in CORRUPTIONS:
            try:
                parts = [replace(self.clean, pixels=corrupt(pixels, name, strength)) for strength in STRENGTHS]
                self.images[name] = parts
            except Exception as e:  # one that fails is not to take the others with it
                self.failed[name] = f'{type(e).__name__}: {e}'
                print(f'{name}: {self.failed[name]}', file=sys.stderr, flush=True)


def judge(runner: Runner, model: Any, head: nn.Module, corrupted: Corrupted) -> Row:
    """Compute a trained head's figures on the clean and on the corrupted images.

    Returns:
        Those of :func:`accuracy.quality` on the clean images. ``corruptions``: by name, a value for each strength of
        ``top1`` in percent, ``nll`` in nats and ``nll_t``, that at the one temperature that fits the clean images.
        ``failed``: by name, why a corruption has none. ``within``, of a ZZZ head of rank >= 1:
        :func:`subspaces.shares` of the clean images, about the means of their classes.
    """
    target = corrupted.clean.target

    @torch.no_grad()
    def logits_of(features: Tensor) -> Tensor:
        return head.eval()(features).float()

    features = runner.embed(model, corrupted.clean, crop_pct=1.0)
    found = dict(quality(logits_of(features), target), **spectrum(head))
    if isinstance(head, ZZZHead) and head.rank:
        x = normalize(features)
        found['within'] = shares(x - class_means(x, target)[target], target, class_gaussians_of(head))
    found.update(corruptions={}, failed=dict(corrupted.failed))
    for name, of_strengths in corrupted.images.items():
        figures: Dict[str, List[float]] = dict(top1=[], nll=[], nll_t=[])
        for images in of_strengths:
            logits = logits_of(runner.embed(model, images, crop_pct=1.0))
            figures['top1'].append(100 * (logits.argmax(1) == target).double().mean().item())
            for key, factor in (('nll', 1.0), ('nll_t', found['temperature'])):
                figures[key].append(F.cross_entropy(logits * factor, target).item())
        found['corruptions'][name] = figures
    return found


class ToleranceWorker(Worker):
    """Runs jobs on one device; the corrupted images of the latest set and size stay there."""

    def __init__(self, options: argparse.Namespace, device: torch.device):
        super().__init__(options, device)
        self.corrupted: Dict[Tuple[Any, ...], Corrupted] = {}

    def measure(self, runner: Runner, images: Sequence[Images], job: Row) -> Run[Row]:
        training, judged, _ = images
        start = time.perf_counter()
        model, head = yield from runner.train(training, parse(job['head']), job['seed'], job['lr'], job['head_lr'])
        corrupted = self._corrupted(judged, (job['data'], job['hold_out_every'], runner.size, runner.crop_pct))
        trained = time.perf_counter()
        found = judge(runner, model, head, corrupted)
        seconds = dict(seconds=trained - start, judged_seconds=time.perf_counter() - trained)
        return dict(found, train_images=len(training), **seconds)

    def _corrupted(self, images: Images, key: Tuple[Any, ...]) -> Corrupted:
        if key not in self.corrupted:
            self.corrupted.clear()  # before there are others: they fill much of the device's memory
            self.corrupted[key] = Corrupted(images, *key[2:])
            self._wait()
        return self.corrupted[key]


def jobs(options: argparse.Namespace, rows: Sequence[Row]) -> List[Row]:
    """List the runs at each head's own learning rates, which ``rows`` say; those of the first seed come first.

    A backbone for which ``rows`` choose no rates of a head is left out, with a message.
    """
    chosen, found = chosen_rates(rows), []
    for shots, backbone in itertools.product(options.shots, options.backbone):
        missing = [head for head in options.heads if is_trained(head) and (backbone[0], head, shots) not in chosen]
        if missing:
            images = f'{shots} images a class' if shots else 'all images'
            print(f'{backbone[0]}, {images}: no learning rates of {", ".join(missing)}', file=sys.stderr)
            continue
        found += final(argparse.Namespace(**dict(vars(options), backbone=[backbone])), shots, rows)
    return sorted(found, key=lambda job: job['seed'])


def main(arguments: Optional[List[str]] = None) -> None:
    parser = shared_parser(__doc__)
    parser.add_argument('--rates', type=Path, default=RATES_FILE, metavar='FILE.jsonl', help='rows of accuracy.py')
    options = parser.parse_args(arguments)
    todo = jobs(options, read(options.rates))
    if not todo:
        raise SystemExit(f'{options.rates}: no learning rates for these heads and backbones; accuracy.py finds them')
    runs = Runs(options, ToleranceWorker)
    runs(todo)
    runs.close()


if __name__ == '__main__':
    main()
