"""Accuracy, calibration and outlier detection of heads on folders of images: trains all with equal budgets.

    python benchmarks/accuracy.py --data DIR [DIR ...] --backbone mobilenetv2_100 --checkpoint FILE \
        --heads linear cosine zzz_r0 zzz_r8 --seeds 0 1 2 --results FILE.jsonl

Every run is a line of the results file; runs that are in it already are not repeated. The table of all its runs is
printed at the end (``--table`` only prints). Settings of the heads: starts.py; of the training: training.py.
"""

import argparse
import itertools
import json
import re
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from accuracy_table import tables
from images import Images, load
from measure import environment_line
from outliers import Outliers
from safetensors.torch import save_file
from starts import parse
from torch import Tensor, nn
from training import Runner, Settings, backbone, predictions, spectrum

from timm_zzz.metrics import reliability

JOB = ('data', 'head', 'seed', 'shots', 'hold_out_every', 'epochs', 'backbone', 'smoothing')  # what tells runs apart
PIXELS = 192  # side of the squashed images in memory


def quality(head: nn.Module, features: Tensor, target: Tensor) -> Dict[str, Any]:
    """Evaluate a head: top-1 in percent, NLL in nats, ECE in percent, and the reliability diagram's bins."""
    found = predictions(head, features, target)
    bins, error = reliability(found.confidence, found.correct)
    return dict(
        top1=found.top1,
        nll=found.mean_nll,
        ece=100 * error,
        reliability=[(b.count, b.confidence, b.accuracy) for b in bins],
    )


def held_out_classes(classes: int, every: int) -> Tuple[List[int], List[int]]:
    """Split the classes into those that are trained on, and every ``every``-th, which is not; all and none for 0."""
    out = [c for c in range(classes) if every and c % every == every - 1]
    return [c for c in range(classes) if c not in set(out)], out


def run(
    runner: Runner,
    data: Dict[str, Images],
    job: Dict[str, Any],
    curve: int,
    far: Dict[str, Images],
    keep: Optional[Path] = None,
) -> Dict[str, Any]:
    """Train once and compute all figures; ``keep``: a file for what the scores are computed from."""
    known, unknown = held_out_classes(len(data['train'].classes), job['hold_out_every'])
    train_images, test_images = (data[k].of_classes(known) for k in ('train', 'validation'))
    if job['shots']:
        train_images = train_images.per_class(job['shots'], job['seed'])
    points: List[Tuple[int, float]] = []

    def watch(epoch: int, model: nn.Module) -> None:
        if curve and epoch % curve == 0:
            head = model.get_submodule(model.pretrained_cfg['classifier'])
            points.append((epoch, predictions(head, runner.embed(model, test_images), test_images.target).top1))

    start = time.perf_counter()
    model, head, seconds = runner.train(train_images, parse(job['head']), job['seed'], watch)
    total = time.perf_counter() - start
    features = runner.embed(model, test_images)
    result = quality(head, features, test_images.target)
    result.update(
        epochs=runner.settings.epochs,
        train_images=len(train_images),
        seconds=total,
        img_s=points[-1][0] * len(train_images) / seconds if points and seconds else None,
        curve=points,
        **spectrum(head),
    )
    if unknown or far or keep:
        train_features = runner.embed(model, train_images)
        near = runner.embed(model, data['validation'].of_classes(unknown)) if unknown else features[:0]
        if keep:
            embedded = dict(train=train_features, validation=features, near=near)
            targets = dict(train_target=train_images.target, validation_target=test_images.target)
            state = {f'head.{k}': v.float() for k, v in head.state_dict().items()}
            tensors = {**{k: v.half() for k, v in embedded.items()}, **targets, **state}
            save_file({k: v.contiguous() for k, v in tensors.items()}, keep)
        outliers = Outliers(head, train_features, train_images.target, features)
        if unknown:
            result['near'] = outliers.auroc(near)
        result['far'] = {name: outliers.auroc(runner.embed(model, images)) for name, images in far.items()}
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--data', type=Path, nargs='+', default=[], metavar='DIR', help='ImageFolder: train, validation'
    )
    parser.add_argument('--far', type=Path, nargs='*', default=[], metavar='DIR', help='sets of other images, far OOD')
    parser.add_argument('--heads', nargs='+', default=['linear', 'cosine', 'zzz_r0', 'zzz_r8'], metavar='HEAD')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--shots', type=int, nargs='+', default=[0], help='training images per class; 0: all')
    parser.add_argument('--hold-out-every', type=int, default=0, metavar='K', help='K-th classes are near OOD')
    parser.add_argument('--backbone', default='mobilenetv2_100')
    parser.add_argument('--checkpoint', metavar='FILE', help="its weights; timm's pretrained ones if not given")
    parser.add_argument('--epochs', type=int, default=20)
    parser.add_argument('--min-steps', type=int, default=0, help='more epochs where a small set gives fewer steps')
    parser.add_argument('--curve', type=int, default=0, metavar='N', help='evaluate every N epochs')
    parser.add_argument('--results', type=Path, required=True, metavar='FILE.jsonl')
    parser.add_argument('--cache', type=Path, help='folder for decoded images')
    parser.add_argument('--shard', default='0/1', metavar='I/N', help='every N-th run only, from the I-th')
    parser.add_argument('--features', type=Path, metavar='DIR', help="only write the frozen backbone's features there")
    parser.add_argument('--keep', type=Path, metavar='DIR', help="write every trained model's features and head there")
    parser.add_argument('--smoothing', type=float, default=Settings.smoothing, help='of labels')
    parser.add_argument('--table', action='store_true', help='only print the table')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    return parser


def jobs(options: argparse.Namespace) -> Iterator[Dict[str, Any]]:
    """List the runs that are asked for, in the order in which they are made."""
    shared = {k: getattr(options, k) for k in JOB[4:]}
    for data, seed, shots, head in itertools.product(options.data, options.seeds, options.shots, options.heads):
        yield dict(data=data.name, head=head, seed=seed, shots=shots, **shared)


def _file_name(job: Dict[str, Any]) -> str:
    name = '-'.join(str(job[k]) for k in ('data', 'head', 'seed', 'shots'))
    return re.sub(r'[^\w.-]', '_', name) + '.safetensors'


def read(path: Path) -> List[Dict[str, Any]]:
    """Read all rows of a results file and of its shards."""
    rows = []
    for file in sorted(path.parent.glob(f'{path.stem}*{path.suffix}')):
        rows += [{'smoothing': Settings.smoothing, **json.loads(line)} for line in file.read_text().splitlines()]
    return rows


def main(arguments: Optional[List[str]] = None) -> None:
    options = _parser().parse_args(arguments)
    if options.table:
        print(tables(read(options.results)))
        return
    device = torch.device(options.device)
    settings = Settings(
        options.backbone, options.checkpoint, options.epochs, smoothing=options.smoothing, min_steps=options.min_steps
    )
    runner = Runner(settings, device)
    shard, shards = map(int, options.shard.split('/'))
    file = options.results.with_stem(f'{options.results.stem}-{shard}') if shards > 1 else options.results
    for folder in filter(None, (file.parent, options.keep)):
        folder.mkdir(parents=True, exist_ok=True)
    done = [{k: row[k] for k in JOB} for row in read(options.results)]

    def open_set(root: Path, splits: Tuple[str, ...]) -> Dict[str, Images]:
        return {split: load(root, split, PIXELS, options.cache).to(device) for split in splits}

    far = {root.name: open_set(root, ('validation',))['validation'] for root in options.far}
    data: Dict[str, Dict[str, Images]] = {}
    roots = {root.name: root for root in options.data}
    if options.features:
        _write_features(
            runner, {name: open_set(root, ('train', 'validation')) for name, root in roots.items()}, options
        )
        return
    for number, job in enumerate(jobs(options)):
        if number % shards != shard or job in done:
            continue
        if job['data'] not in data:
            data = {job['data']: open_set(roots[job['data']], ('train', 'validation'))}
        others = {name: images for name, images in far.items() if name != job['data']}
        keep = options.keep and options.keep / _file_name(job)
        result = run(runner, data[job['data']], job, options.curve, others, keep)
        row = dict(job, **result, environment=environment_line(device))
        with file.open('a') as f:
            f.write(json.dumps(row) + '\n')
        figures = ', '.join(f'{k} {row[k]:.3f}' for k in ('top1', 'nll', 'ece', 'seconds'))
        print(f'{job["data"]} {job["head"]} seed {job["seed"]} shots {job["shots"]}: {figures}', file=sys.stderr)
    if shards == 1:
        print(tables(read(options.results)))


def _write_features(runner: Runner, sets: Dict[str, Dict[str, Images]], options: argparse.Namespace) -> None:
    model = backbone(runner.settings).to(runner.device, memory_format=torch.channels_last)
    options.features.mkdir(parents=True, exist_ok=True)
    for name, splits in sets.items():
        embedded = {
            split: (runner.embed(model, images).half().cpu(), images.target.cpu()) for split, images in splits.items()
        }
        torch.save(embedded, options.features / f'{name}.pt')


if __name__ == '__main__':
    main()
