"""Accuracy and calibration of heads on folders of images: trains all with equal budgets.

    python benchmarks/accuracy.py --data DIR [DIR ...] --backbone NAME FILE PIXELS [--backbone ...] \
        --heads linear:rows=zero zzz_r8 zzz_r8:fit=finetune --results FILE.jsonl

For each number of images a class: first every head at every pair of learning rates, trained on four fifths of the
training images and judged on the last ("inner"); then each head at its own rates, those of the highest mean over the
sets of that for each backbone, trained on all training images and judged on the validation images. Every run is a
line of the results file; runs that are in it already are not repeated. accuracy_table.py makes tables of them.
Settings of the heads: starts.py; of the training: training.py.
"""

import argparse
import base64
import contextlib
import functools
import itertools
import json
import queue
import statistics
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, Callable, ContextManager, Deque, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, Type

import torch
from images import Images, load
from measure import environment_line
from probe import held_out
from safetensors.torch import save_file
from starts import parse
from torch import Tensor, nn
from torch.nn import functional as F
from training import Backbone, Run, Runner, Settings, finish, own_stream

from timm_zzz.head import ZZZHead
from timm_zzz.metrics import cross_calibrate
from timm_zzz.scores import class_gaussians_of

Row = Dict[str, Any]

# What tells runs apart
JOB = (
    *('data', 'backbone', 'size', 'head', 'lr', 'head_lr', 'seed', 'shots', 'split', 'hold_out_every', 'epochs'),
    'smoothing',
)
RATES = ('lr', 'head_lr')
PIXELS = 192  # side of the squashed images in memory


def quality(logits: Tensor, target: Tensor) -> Row:
    """Judge logits (N, C): top-1, top-5 and ECE in percent, NLL in nats; those at one temperature end in ``_t``.

    Each half of the images is judged under the temperature of the other half; ``temperature`` is that of all
    images, as a factor on the logits.
    """
    temperature, before, after, errors = cross_calibrate(logits, target)
    found: Row = dict(top1=before.top1, top5=100 * before.in_top5.double().mean().item())
    found['temperature'] = 1 / temperature
    for suffix, each, error in (('', before, errors[0]), ('_t', after, errors[1])):
        found.update({f'nll{suffix}': each.mean_nll, f'ece{suffix}': 100 * error})
    return found


def packed(right: Tensor) -> str:
    """Write a mask (N,) as text; :func:`unpacked` reads it."""
    bits = F.pad(right.cpu().long(), (0, -len(right) % 8)).view(-1, 8)
    numbers = (bits * torch.tensor([128, 64, 32, 16, 8, 4, 2, 1])).sum(1)
    return base64.b64encode(bytes(numbers.tolist())).decode()


def unpacked(text: str, count: int) -> Tensor:
    numbers = torch.tensor(list(base64.b64decode(text)))
    return (numbers[:, None] >> torch.arange(7, -1, -1) & 1).flatten()[:count].bool()


def spectrum(head: nn.Module) -> Row:
    """Describe a ZZZ head: sigma2, the mean cosine of two means, the median over classes of the sorted variances."""
    if not isinstance(head, ZZZHead):
        return {}
    classes, count = class_gaussians_of(head), head.num_classes
    cosines = classes.mu.double().sum(0).square().sum() - count
    found: Row = dict(sigma2=classes.sigma2.item(), mean_cosine=(cosines / max(1, count * (count - 1))).item())
    if classes.v is not None:
        found['v'] = classes.v.sort(1, descending=True)[0].median(0)[0].tolist()
    return found


def held_out_classes(classes: int, every: int) -> Tuple[List[int], List[int]]:
    """Split the classes into those that are trained on, and every ``every``-th, which is not; all and none for 0."""
    out = [c for c in range(classes) if every and c % every == every - 1]
    return [c for c in range(classes) if c not in set(out)], out


def images_of(data: Dict[str, Images], job: Row) -> Tuple[Images, Images, Images]:
    """Return the images that a job trains on, those that it is judged by, and those of the classes held out."""
    known, unknown = held_out_classes(len(data['train'].classes), job['hold_out_every'])
    training, judged = data['train'].of_classes(known), data['validation'].of_classes(known)
    if job['split'] == 'inner':
        mask = held_out(training.target)
        training, judged = training.select((~mask).nonzero()[:, 0]), training.select(mask.nonzero()[:, 0])
    training = training.per_class(job['shots'], job['seed']) if job['shots'] else training
    return training, judged, data['validation'].of_classes(unknown)


def run(
    runner: Runner, images: Sequence[Images], job: Row, far: Dict[str, Images], keep: Optional[Path] = None
) -> Run[Row]:
    """Train once and compute all figures; ``keep``: a file for what outliers.py reads."""
    training, judged, unknown = images
    start, spec = time.perf_counter(), parse(job['head'])
    model, head = yield from runner.train(training, spec, job['seed'], job['lr'], job['head_lr'])
    embed = functools.partial(runner.embed, model) if spec.train else runner.frozen
    features = embed(judged)
    with torch.no_grad():
        logits = head.eval()(features).float()
    seconds = time.perf_counter() - start
    found = dict(quality(logits, judged.target), train_images=len(training), seconds=seconds, **spectrum(head))
    if job['split'] == 'inner':
        return found
    found['right'] = packed(logits.argmax(1) == judged.target)
    if keep:
        embedded = dict(train=embed(training), validation=features)
        embedded.update({'near': embed(unknown)} if len(unknown) else {})
        embedded.update({f'far.{name}': embed(images) for name, images in far.items()})
        tensors = {k: v.half() for k, v in embedded.items()}
        tensors.update(train_target=training.target, validation_target=judged.target)
        tensors.update({f'head.{k}': v.float() for k, v in head.state_dict().items()})
        save_file({k: v.contiguous() for k, v in tensors.items()}, keep, metadata=dict(job=json.dumps(job)))
    return found


def shared_parser(description: Optional[str]) -> argparse.ArgumentParser:
    """Create a parser of the options that every comparison of trained heads has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--data', type=Path, nargs='+', required=True, metavar='DIR', help='ImageFolder: train, validation')
    add('--heads', nargs='+', default=['linear:rows=zero', 'zzz_r8'], metavar='HEAD')
    add('--seeds', type=int, nargs='+', default=[0, 1, 2], help='of the runs at the own rates')
    add('--shots', type=int, nargs='+', default=[0], metavar='N', help='training images per class; 0: all')
    add('--hold-out-every', type=int, default=0, metavar='K', help='K-th classes are not trained on: near outliers')
    backbone = "several times; FILE '': timm's own weights, PIXELS 0: timm's size"
    add('--backbone', nargs=3, action='append', required=True, metavar=('NAME', 'FILE', 'PIXELS'), help=backbone)
    add('--epochs', type=int, default=20)
    add('--min-steps', type=int, default=320, help='more epochs where few images give fewer steps')
    add('--smoothing', type=float, default=Settings.smoothing, help='of labels')
    add('--results', type=Path, required=True, metavar='FILE.jsonl', help='files FILE*.jsonl are read')
    add('--cache', type=Path, help='folder for decoded images')
    add('--processes', type=int, default=0, metavar='N', help='on each GPU; 0: in this process, one run at a time')
    add('--streams', type=int, default=3, metavar='N', help='of each of those processes: runs at the same time')
    add('--compile', action='store_true', help="the backbone's step by torch.compile: minutes once, then faster")
    add('--seconds', type=float, default=float('inf'), help='after which no run is begun')
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.set_defaults(far=[], keep=None, at=None)
    return parser


def _parser() -> argparse.ArgumentParser:
    parser = shared_parser(__doc__)
    add = parser.add_argument
    add('--far', type=Path, nargs='*', metavar='DIR', help='with --keep: sets of far outliers')
    add('--lrs', type=float, nargs='*', default=[5e-5, 1.5e-4, 5e-4], help='of the backbone; none: no grid')
    add('--head-lrs', type=float, nargs='+', default=[1.0, 5.0], metavar='X', help='factors on it for the head')
    add('--at', type=float, nargs=2, metavar=('LR', 'X'), help='rate and factor of all heads, in place of a grid')
    add('--grid-seed', type=int, default=0, metavar='N', help='of the runs to choose by')
    add('--grid-only', action='store_true', help='no runs at the own rates')
    add('--keep', type=Path, metavar='DIR', help="write every model's features and head there, for outliers.py")
    return parser


def read(path: Path) -> List[Row]:
    """Read all rows of a results file, and of others whose names begin like its own."""
    files = sorted(path.parent.glob(f'{path.stem}*{path.suffix}'))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def append(path: Path, row: Row) -> None:
    """Add a row to a results file, its numbers rounded to six digits."""
    with path.open('a') as f:
        f.write(json.dumps(short(row)) + '\n')


def chosen_rates(rows: Iterable[Row]) -> Dict[Tuple[Any, ...], Dict[str, float]]:
    """Choose the learning rates of each (backbone, head, shots), by the mean over the sets of the inner top-1.

    Among the pairs that ran on the most sets. A run that was repeated counts once.
    """
    found: Dict[Tuple[Any, ...], Dict[Tuple[float, float], Dict[Any, float]]] = {}
    for row in rows:
        if row['split'] == 'inner':
            means = found.setdefault((row['backbone'], row['head'], row['shots']), {})
            means.setdefault((row['lr'], row['head_lr']), {})[row['data'], row['seed']] = row['top1']
    best = {}
    for key, means in found.items():
        full = max(map(len, means.values()))
        complete = {rates: statistics.fmean(each.values()) for rates, each in means.items() if len(each) == full}
        best[key] = dict(zip(RATES, max(complete, key=lambda rates: complete[rates]), strict=True))
    return best


def grid(options: argparse.Namespace, shots: int) -> List[Row]:
    """List the runs by which the learning rates are chosen."""
    if options.at:
        return []
    rates = [dict(lr=lr, head_lr=head_lr) for lr in options.lrs for head_lr in options.head_lrs]
    jobs = [job for job in _jobs(options, 'inner', [options.grid_seed], shots) if is_trained(job['head'])]
    return [dict(job, **each) for job in jobs for each in rates]


def final(options: argparse.Namespace, shots: int, rows: Sequence[Row]) -> List[Row]:
    """List the runs at each head's own learning rates, which ``rows`` say, or at the rates given."""
    jobs = _jobs(options, 'validation', options.seeds, shots)
    if options.at:
        return [dict(job, **dict(zip(RATES, options.at, strict=True))) for job in jobs]
    chosen, none = chosen_rates(rows), dict.fromkeys(RATES, 0.0)
    return [
        dict(job, **(chosen[job['backbone'], job['head'], shots] if is_trained(job['head']) else none)) for job in jobs
    ]


def is_trained(head: str) -> bool:
    """Say whether a head has learning rates: one with ``train=0`` stays as it starts."""
    return 'train=0' not in head


def _jobs(options: argparse.Namespace, split: str, seeds: Sequence[int], shots: int) -> Iterator[Row]:
    shared = {k: getattr(options, k) for k in ('hold_out_every', 'epochs', 'smoothing')}
    for seed, data, (backbone, _, size), head in itertools.product(
        seeds, options.data, options.backbone, options.heads
    ):
        own = dict(data=data.name, backbone=backbone, size=int(size), head=head, seed=seed, shots=shots, split=split)
        yield {**shared, **own}


class Worker:
    """Runs jobs on one device."""

    def __init__(self, options: argparse.Namespace, device: torch.device):
        self.options, self.device = options, device
        self.far = {root.name: self._open(root, ('validation',))['validation'] for root in options.far}
        self.data: Dict[str, Dict[str, Images]] = {}
        self.images: Dict[Tuple[Any, ...], Sequence[Images]] = {}
        self.runners: Dict[str, Runner] = {}

    def _open(self, root: Path, splits: Sequence[str]) -> Dict[str, Images]:
        found = {split: load(root, split, PIXELS, self.options.cache).to(self.device) for split in splits}
        self._wait()
        return found

    def _images(self, job: Row) -> Sequence[Images]:
        name = job['data']
        if name not in self.data:
            root = next(root for root in self.options.data if root.name == name)
            self.data[name] = self._open(root, ('train', 'validation'))
        key = (name, job['split'], job['hold_out_every'], job['shots'], job['shots'] and job['seed'])
        if key not in self.images:
            self.images[key] = images_of(self.data[name], job)
            self._wait()
        return self.images[key]

    def _wait(self) -> None:
        """Wait until what all streams share is there."""
        if self.device.type == 'cuda':
            torch.cuda.synchronize()

    def _runner(self, name: str) -> Runner:
        if name not in self.runners:
            file, size = next(each[1:] for each in self.options.backbone if each[0] == name)
            chosen = self.options
            settings = Settings(chosen.epochs, chosen.min_steps, smoothing=chosen.smoothing, compiled=chosen.compile)
            self.runners[name] = Runner(Backbone(name, file, int(size)), settings, self.device)
            self._wait()
        return self.runners[name]

    def __call__(self, job: Row) -> Run[Row]:
        """Run a job and return its row, one with an ``error`` if it fails. On a GPU, within :func:`own_stream`."""
        try:
            images = self._images(job)
            runner = self._runner(job['backbone'])
            found = yield from self.measure(runner, images, job)
            made = dict(min_steps=self.options.min_steps, compiled=self.options.compile)
            return dict(job, **found, **made, environment=environment_line(self.device))
        except Exception as e:
            return dict(job, error=f'{type(e).__name__}: {e}')

    def measure(self, runner: Runner, images: Sequence[Images], job: Row) -> Run[Row]:
        """Train once and compute all figures, from what :func:`images_of` returns."""
        far = {name: images for name, images in self.far.items() if name != job['data']}
        keep = self.options.keep and self.options.keep / _name(job)
        return (yield from run(runner, images, job, far, keep))


def _name(job: Row) -> str:
    name = '-'.join(str(job[k]) for k in ('data', 'backbone', 'head', 'seed', 'shots'))
    return ''.join(c if c.isalnum() or c in '_.-' else '_' for c in name) + '.safetensors'


def serve(worker: Callable[[Row], Run[Row]], streams: List[ContextManager[Any]], jobs: Any, rows: Any) -> None:
    """Run jobs until one is None: as many at a time as there are streams, some steps of each in turn."""
    underway: Deque[Tuple[ContextManager[Any], Run[Row]]] = deque()
    last = False
    while underway or not last:
        if streams and not last:
            with contextlib.suppress(queue.Empty):
                job = jobs.get(block=not underway)
                last = job is None
                if not last:
                    underway.append((streams.pop(), worker(job)))
        if underway:
            stream, each = underway.popleft()
            try:
                with stream:
                    next(each)
                underway.append((stream, each))
            except StopIteration as e:
                rows.put(e.value)
                streams.append(stream)


def _process(index: int, options: argparse.Namespace, worker: Type[Worker], jobs: Any, rows: Any) -> None:
    device = torch.device('cuda', index % torch.cuda.device_count())
    torch.cuda.set_device(device)
    serve(worker(options, device), [own_stream(device) for _ in range(options.streams)], jobs, rows)


class Runs:
    """Runs jobs, in this process or in several on each GPU, and writes their rows to the results file."""

    def __init__(self, options: argparse.Namespace, worker: Type[Worker] = Worker):
        self.options, self.end = options, time.time() + options.seconds
        self.failed: List[Row] = []
        self.processes: List[Any] = []
        for folder in filter(None, (options.results.parent, options.keep)):
            folder.mkdir(parents=True, exist_ok=True)
        if not options.processes:
            self.worker = worker(options, torch.device(options.device))
            return
        if options.cache:  # once, not in every process
            for root, split in itertools.product((*options.data, *options.far), ('train', 'validation')):
                load(root, split, PIXELS, options.cache)
        context = torch.multiprocessing.get_context('spawn')
        self.jobs, self.rows = context.Queue(), context.Queue()
        for i in range(options.processes * torch.cuda.device_count()):
            arguments = (i, options, worker, self.jobs, self.rows)
            process = context.Process(target=_process, args=arguments, daemon=True)
            self.processes.append(process)
            process.start()

    def __call__(self, jobs: Iterable[Row]) -> None:
        """Run the jobs that the results file has not, until the time is over."""
        done = [{k: row[k] for k in JOB} for row in read(self.options.results)]
        todo = iter([job for job in jobs if {k: job[k] for k in JOB} not in done])
        underway = 0
        for job in itertools.islice(todo, len(self.processes) * self.options.streams):
            self.jobs.put(job)
            underway += 1
        while underway or not self.processes:
            job = next(todo, None) if time.time() < self.end else None
            if self.processes:
                row = self.rows.get()
                underway -= 1
                if job is not None:
                    self.jobs.put(job)
                    underway += 1
            elif job is None:
                break
            else:
                with own_stream(self.worker.device):
                    row = finish(self.worker(job))
            self._write(row)

    def _write(self, row: Row) -> None:
        label = ' '.join(f'{row[k]:g}' if isinstance(row[k], float) else str(row[k]) for k in JOB[:9])
        if 'error' in row:
            self.failed.append(row)
            print(f'{label}: {row["error"]}', file=sys.stderr, flush=True)
            return
        append(self.options.results, row)
        figures = ', '.join(f'{k} {row[k]:.3f}' for k in ('top1', 'nll', 'nll_t', 'seconds'))
        print(f'{label}: {figures}', file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the processes; raises SystemExit if a run has failed."""
        for _ in self.processes:
            self.jobs.put(None)
        if self.failed:
            raise SystemExit(f'{len(self.failed)} runs failed, the first with {self.failed[0]["error"]}')


def main(arguments: Optional[List[str]] = None) -> None:
    options = _parser().parse_args(arguments)
    runs = Runs(options)
    for shots in options.shots:
        runs(grid(options, shots))
        if not options.grid_only and not runs.failed and time.time() < runs.end:
            runs(final(options, shots, read(options.results)))
    runs.close()


def short(value: Any) -> Any:
    """Round the numbers in a row to six digits."""
    if isinstance(value, list):
        return [short(item) for item in value]
    if isinstance(value, dict):
        return {key: short(item) for key, item in value.items()}
    return float(f'{value:.6g}') if isinstance(value, float) else value


if __name__ == '__main__':
    main()
