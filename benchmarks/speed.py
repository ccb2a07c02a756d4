"""Speed, memory and numerics of the ZZZ head: ``python benchmarks/speed.py --suite head eval``, tables in markdown.

Every suite runs alone, interleaves the methods it compares, and shows a method's error in its row. See README.md.
"""

import argparse
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numerics
import timm
import torch
from baselines import METHODS, CosineHead
from measure import (
    EvalStep,
    Skip,
    Table,
    Timed,
    TrainStep,
    capture,
    ceilings,
    environment,
    free_memory,
    interleave,
    number,
    prepare,
    release,
    span,
)
from torch import Tensor, nn

import timm_zzz

Rows = List[Dict[str, Any]]


class Shape(NamedTuple):
    batch: int
    num_classes: int
    feat_dim: int
    rank: int

    def __str__(self) -> str:
        return ', '.join(map(str, self))

    def build(self, method: str, device: torch.device) -> nn.Module:
        return METHODS[method](self.num_classes, self.feat_dim, self.rank, self.batch, device)

    def data(self, device: torch.device) -> Tuple[Tensor, Tensor]:
        """Features as a backbone under autocast gives them, and labels."""
        dtype = torch.bfloat16 if device.type == 'cuda' else torch.float32
        features = torch.randn(self.batch, self.feat_dim, device=device, dtype=dtype, requires_grad=True)
        return features, torch.randint(self.num_classes, (self.batch,), device=device)


HEAD_SHAPES = [
    Shape(256, 1000, 768, 8),
    Shape(1024, 1000, 768, 8),
    Shape(256, 10000, 768, 8),
    Shape(256, 21843, 768, 8),
    Shape(256, 1000, 2048, 16),
]
HEAD_METHODS = [name for name in METHODS if name != 'zzz auto']  # it is one of the others
COMPILED_SHAPES = HEAD_SHAPES[0], HEAD_SHAPES[3]  # compiling takes longer than all the rest of a shape
EVAL_SHAPES = [Shape(256, 1000, 768, 8), Shape(256, 10000, 768, 8)]
CPU_EVAL_SHAPES = [*(Shape(b, 1000, 768, 8) for b in (1, 16, 64)), Shape(1, 10000, 768, 8)]
CPU_SHAPES = [Shape(64, 200, 768, 8), Shape(64, 200, 1280, 8)]
QUICK_SHAPES = [Shape(8, 10, 32, 4)]

COLUMNS = ('method', 'B, C, d, r', 'pass', 'mode', 'ms', 'min-max', 'ms, events', 'peak MiB', 'total MiB')
CAPTION = (
    'ms: wall time a step, median of the rounds; events: median of single steps between CUDA events. Peak: allocated '
    'during a step above parameters and inputs, gradients counted; total: with parameters and inputs.'
)


def amp_dtype(device: torch.device) -> Optional[torch.dtype]:
    return torch.bfloat16 if device.type == 'cuda' else None


def print_rows(
    table: Table,
    methods: Sequence[Timed],
    rows: Rows,
    bases: Sequence[str] = ('linear', 'cosine'),
    **fields: Any,
) -> None:
    """Add the methods to the table, their times as multiples of each base's in the same run, and to the JSON rows."""
    by_name = {m.name: m for m in methods}
    for m in methods:
        ratios = [m.ratio(by_name[base]) if base in by_name else None for base in bases]
        rows.append(m.record(**fields, **{f'ratio_{b}': q for b, q in zip(bases, ratios, strict=True)}))
        cells = [m.name, *fields.values()]
        if m.ms is None:
            table.row([*cells, m.error or 'no time'])
            continue
        events = number(statistics.median(m.events)) if m.events else ''
        cells += [number(m.ms), span(m.wall), events, number(m.peak), number(m.total)]
        table.row(cells + [number(q) for q in ratios])


def time_modes(
    table: Table,
    methods: List[Timed],
    rows: Rows,
    args: argparse.Namespace,
    bases: Sequence[str] = ('linear', 'cosine'),
    rounds: int = 5,
    total_s: float = 2.0,
    **fields: Any,
) -> None:
    """Time the methods eager and, on a GPU, as CUDA graphs."""
    options: Dict[str, Any] = dict(rounds=args.rounds or rounds, round_s=args.round_s or 0.1, total_s=total_s)
    interleave(methods, args.device, **options)
    print_rows(table, methods, rows, bases, **fields, mode='eager')
    if args.device.type != 'cuda':
        return
    # torch.linalg.qr makes launches for every single class; its graph would be thousands of nodes
    graphed = [capture(m, args.device) for m in methods if m.name != 'reference']
    interleave(graphed, args.device, **options)
    print_rows(table, graphed, rows, bases, **fields, mode='graph')


# Suites


def suite_head(args: argparse.Namespace) -> Rows:
    """Forward, cross-entropy and backward of the head alone."""
    table = Table('Head', args.device, (*COLUMNS, 'x linear', 'x cosine'), CAPTION)
    rows: Rows = []
    for shape in QUICK_SHAPES if args.quick else HEAD_SHAPES:
        names = args.methods or [n for n in HEAD_METHODS if 'compiled' not in n or shape in COMPILED_SHAPES]
        time_head(table, shape, names, rows, args)
        release()
    return rows


def time_head(
    table: Table,
    shape: Shape,
    names: Sequence[str],
    rows: Rows,
    args: argparse.Namespace,
    bases: Sequence[str] = ('linear', 'cosine'),
    **options: Any,
) -> None:
    features, target = shape.data(args.device)

    def build(name: str) -> TrainStep:
        return TrainStep(shape.build(name, args.device), features, target, amp_dtype(args.device))

    methods = [prepare(n, partial(build, n), args.device) for n in names]
    time_modes(table, methods, rows, args, bases, **options, shape=shape, work='fwd+bwd')


def suite_eval(args: argparse.Namespace) -> Rows:
    """Forward without gradients."""
    caption = f'{CAPTION} What an evaluated ZZZ head keeps is in neither. Threads: {torch.get_num_threads()}.'
    table = Table('Evaluation', args.device, (*COLUMNS, 'x linear', 'x fused'), caption)
    rows: Rows = []
    for shape in QUICK_SHAPES if args.quick else EVAL_SHAPES if args.device.type == 'cuda' else CPU_EVAL_SHAPES:
        time_eval(table, shape, rows, args)
        release()
    return rows


def time_eval(table: Table, shape: Shape, rows: Rows, args: argparse.Namespace) -> None:
    features = shape.data(args.device)[0].detach()

    def build(name: str) -> EvalStep:
        head: Any = shape.build('zzz auto' if name.startswith('zzz') else name, args.device).eval()
        if name == 'zzz fused':
            if not hasattr(head, 'fuse'):
                raise Skip('this ZZZHead has no fuse()')
            head = head.fuse()
        return EvalStep(head, features, amp_dtype(args.device))

    names = ('linear', 'cosine', 'zzz eval', 'zzz fused')
    methods = [prepare(n, partial(build, n), args.device) for n in names]
    time_modes(table, methods, rows, args, ('linear', 'zzz fused'), shape=shape, work='forward')


class Model(NamedTuple):
    name: str
    batch: int
    num_classes: int
    optimizer: bool = False
    image_size: int = 224


MODELS = [
    Model('vit_base_patch16_224', 256, 1000),
    Model('resnet18', 256, 200),
    Model('mobilenetv2_100', 256, 200),
    Model('vit_base_patch16_224', 256, 10000, optimizer=True),
]
QUICK_MODELS = [Model('test_vit', 4, 10, image_size=160), Model('test_resnet', 4, 10, optimizer=True, image_size=160)]


def create_model(name: str, num_classes: int, head: str, device: torch.device) -> nn.Module:
    with torch.device(device):
        model = timm.create_model(name, num_classes=num_classes)
        if head == 'cosine':
            classifier = model.get_classifier()
            path = next(n for n, m in model.named_modules() if m is classifier)
            model.set_submodule(path, CosineHead(num_classes, classifier.in_features, device))
    if head == 'zzz_r8':
        timm_zzz.attach(model, rank=8, init='reference')
    return model.train()


def model_step(spec: Model, head: str, images: Tensor, target: Tensor, args: argparse.Namespace) -> TrainStep:
    model = create_model(spec.name, spec.num_classes, head, args.device)
    if args.channels_last and 'vit' not in spec.name:
        model, images = (t.to(memory_format=torch.channels_last) for t in (model, images))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True) if spec.optimizer else None
    return TrainStep(model, images, target, amp_dtype(args.device), optimizer)


def suite_model(args: argparse.Namespace) -> Rows:
    """Whole training steps of timm models."""
    if args.device.type == 'cuda':  # as timm's train.py has it
        torch.backends.cudnn.benchmark = torch.backends.cuda.matmul.allow_tf32 = True
    layout = 'channels_last for the convnets' if args.channels_last else 'contiguous'
    rows: Rows = []
    table = model_table('Training step', args, f'Random images on the device, {layout}.')
    for spec in QUICK_MODELS if args.quick else [m for m in MODELS if not args.models or m.name in args.models]:
        time_model(table, spec, ('linear', 'cosine', 'zzz_r8'), rows, args, round_s=0.8, rounds=8)
        release()
    return rows


def model_table(title: str, args: argparse.Namespace, caption: str) -> Table:
    columns = ('head', 'model', 'B, C', 'pass', 'ms', 'min-max', 'img/s', 'img/s / linear', 'min-max', 'peak MiB')
    return Table(title, args.device, (*columns, 'impl'), f'{caption} Ratios are the median over rounds of all heads.')


def time_model(
    table: Table,
    spec: Model,
    heads: Sequence[str],
    rows: Rows,
    args: argparse.Namespace,
    round_s: float,
    rounds: int,
) -> None:
    size = spec.image_size
    images = torch.randn(spec.batch, 3, size, size, device=args.device)
    target = torch.randint(spec.num_classes, (spec.batch,), device=args.device)
    methods = [prepare(h, partial(model_step, spec, h, images, target, args), args.device) for h in heads]
    options = dict(round_s=args.round_s or round_s, rounds=args.rounds or rounds)
    interleave(methods, args.device, **options, total_s=1e9, with_events=False)
    base = methods[0]
    work = 'fwd+bwd+AdamW' if spec.optimizer else 'fwd+bwd'
    for m in methods:
        cells = [m.name, spec.name, f'{spec.batch}, {spec.num_classes}', work]
        ratios = [a / b for a, b in zip(base.wall, m.wall, strict=False)]
        ratio = statistics.median(ratios) if ratios else None
        rows.append(m.record(model=spec.name, batch=spec.batch, num_classes=spec.num_classes, work=work, ratio=ratio))
        if m.ms is None:
            table.row([*cells, m.error or 'no time'])
            continue
        cells += [number(m.ms, 4), span(m.wall), number(spec.batch / m.ms * 1e3, 4)]
        cells += [number(ratio, 4), f'{min(ratios):.3f}-{max(ratios):.3f}' if ratios else '']
        table.row([*cells, number(m.peak, 4), m.info.get('impl')])


def suite_cpu(args: argparse.Namespace) -> Rows:
    """The head and a small model's training step in fp32 on two CPU threads."""
    args = argparse.Namespace(**{**vars(args), 'device': torch.device('cpu')})
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    bases = 'linear', 'cosine', 'reference'
    table = Table('Head, CPU', args.device, (*COLUMNS, *(f'x {b}' for b in bases)), 'ms: wall time a step, fp32.')
    rows: Rows = []
    for shape in QUICK_SHAPES if args.quick else CPU_SHAPES:
        names = 'linear', 'cosine', 'reference', 'zzz torch'
        time_head(table, shape, names, rows, args, bases, rounds=3 if args.quick else 11, total_s=10)
    table = model_table('Training step, CPU', args, 'fp32.')
    spec = Model('mobilenetv2_100', 16, 200, image_size=32 if args.quick else 224)
    # One step at a time, so that what else the machine does hits both
    time_model(table, spec, ('linear', 'zzz_r8'), rows, args, round_s=0, rounds=4 if args.quick else 12)
    torch.set_num_threads(threads)
    return rows


class Sweep(NamedTuple):
    batches: Sequence[int]
    classes: Sequence[int]
    ranks: Sequence[int]


SWEEP = Sweep((64, 256, 1024), (100, 1000, 10000, 21843), (4, 8, 16))
CPU_SWEEP = Sweep((16, 64), (100, 200, 1000), (4, 8))
QUICK_SWEEP = Sweep((4, 8), (10, 20), (2, 4))


def floor_work(shape: Shape, half: int) -> Tuple[float, float]:
    """Bytes and FLOPs that a training step of the head can't do without.

    ``half`` is the size in bytes of what the matrix products read: 2 with 16-bit tensor cores, 4 in float32.
    """
    b, c, d, r = shape
    full = 4
    size = 2 * full * c * d * r  # A read, dA written
    # U written and read once. The two products with it and the backward of QR read it three times; once is the least.
    size += 2 * half * c * d * r
    size += 2 * full * c * d + 2 * half * c * d  # weight and its gradient; mu written and read
    size += 2 * half * b * d  # features read, their gradient written
    size += 4 * full * b * c  # logits and their gradient, each written and read
    size += 4 * full * c * (r + 1)  # v, bias and their gradients, at most
    # Products of features with mu and U: forward, and the gradients of either factor
    return size, 6 * b * c * (r + 1) * d


def suite_sweep(args: argparse.Namespace) -> Rows:
    """Forward and backward over classes, rank and batch size, with the floor of bytes and FLOPs beside it."""
    cuda = args.device.type == 'cuda'
    bandwidth, flops = ceilings(args.device, args.quick)
    columns = (
        'method',
        'B, C, d, r',
        'mode',
        'ms',
        'min-max',
        'floor ms',
        'x floor',
        'MB',
        'GFLOP',
        'x linear',
        'impl',
    )
    precision = 'bf16' if cuda else 'fp32'
    caption = (
        f'Forward, cross-entropy, backward. Floor: the larger of bytes at {bandwidth / 1e12:.3g} TB/s (measured on a '
        f'copy) and FLOPs at {flops / 1e12:.3g} TFLOP/s (measured on a {precision} product).'
    )
    table = Table('Sweep', args.device, columns, caption)
    sweep = QUICK_SWEEP if args.quick else SWEEP if cuda else CPU_SWEEP
    rows: Rows = []
    for batch in sweep.batches:
        for num_classes in sweep.classes:
            shapes = [Shape(batch, num_classes, 768, r) for r in (0, *sweep.ranks)]
            sweep_point(table, shapes, rows, args, bandwidth, flops)
            release()
    return rows


def sweep_point(
    table: Table,
    shapes: Sequence[Shape],
    rows: Rows,
    args: argparse.Namespace,
    bandwidth: float,
    flops: float,
) -> None:
    """The linear layer (rank 0) and the ranks at one batch size and class count, in turn."""
    features, target = shapes[0].data(args.device)

    def build(shape: Shape) -> TrainStep:
        if 40 * shape.num_classes * shape.feat_dim * shape.rank > free_memory(args.device):
            raise Skip('too little memory')
        head = shape.build('zzz auto' if shape.rank else 'linear', args.device)
        return TrainStep(head, features, target, amp_dtype(args.device))

    methods = []
    for shape in shapes:
        method = prepare('zzz' if shape.rank else 'linear', partial(build, shape), args.device)
        mode = 'eager'
        if args.device.type == 'cuda' and method.step is not None:
            graphed = capture(method, args.device)
            if graphed.step is not None:
                method, mode = graphed, 'graph'
        methods.append((shape, mode, method))
    options = dict(rounds=args.rounds or 5, round_s=args.round_s or 0.03)
    interleave([m for _, _, m in methods], args.device, **options, with_events=False)
    for shape, mode, m in methods:
        size, work = floor_work(shape, 2 if args.device.type == 'cuda' else 4)
        floor = 1e3 * max(size / bandwidth, work / flops)
        ratio = m.ratio(methods[0][2])
        fields = dict(shape._asdict(), mode=mode, floor_ms=floor, floor_bytes=size, floor_flops=work)
        rows.append(m.record(**fields, ratio_linear=ratio))
        cells = [m.name, shape, mode]
        if m.ms is None:
            table.row([*cells, m.error or 'no time'])
            continue
        cells += [number(m.ms), span(m.wall), number(floor), number(m.ms / floor, 2), number(size / 1e6)]
        table.row([*cells, number(work / 1e9), number(ratio), m.info.get('impl')])


def suite_numerics(args: argparse.Namespace) -> Rows:
    """Errors against float64 beside those of the reference."""
    return numerics.run(args.device, args.quick)


SUITES: Dict[str, Callable[[argparse.Namespace], Rows]] = {
    'head': suite_head,
    'eval': suite_eval,
    'model': suite_model,
    'cpu': suite_cpu,
    'sweep': suite_sweep,
    'numerics': suite_numerics,
}


def parse(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--suite', nargs='+', choices=list(SUITES), default=['head'])
    parser.add_argument('--device', type=torch.device, default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the measurements here, suite by suite')
    parser.add_argument('--rounds', type=int, help="rounds over the methods, instead of the suite's own number")
    parser.add_argument('--round-s', type=float, help="seconds a method has in a round, instead of the suite's own")
    parser.add_argument('--channels-last', action='store_true', help='for the convnets of the model suite')
    parser.add_argument('--methods', nargs='+', choices=list(METHODS), help='of the head suite')
    parser.add_argument('--models', nargs='+', choices=[m.name for m in MODELS], help='of the model suite')
    parser.add_argument('--quick', action='store_true', help='tiny shapes, to see whether everything runs')
    args = parser.parse_args(argv)
    if args.device.type == 'cuda' and args.device.index is None:
        args.device = torch.device('cuda', torch.cuda.current_device())
    return args


def main(arguments: Optional[List[str]] = None) -> None:
    args = parse(arguments)
    torch.manual_seed(0)
    results: Dict[str, Any] = {'environment': environment(args.device)}
    for name in args.suite:
        results[name] = SUITES[name](args)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1, default=str) + '\n')


if __name__ == '__main__':
    main()
