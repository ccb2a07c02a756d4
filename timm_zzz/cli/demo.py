"""``python -m timm_zzz demo``: train a ZZZ head and a linear head on images of beetles drawn on the spot.

Everything but the drawing and the tables is timm's: models, loaders, optimiser, schedule, training task, checkpoints.
"""

import argparse
import colorsys
import itertools
import random
import shutil
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Tuple

import timm
import torch
from PIL import Image, ImageDraw
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from timm.utils import random_seed
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import timm_zzz  # noqa: F401  # registers the .zzz_rN names

from ..arguments import positive_int

ARCHITECTURE = 'test_resnet'
IMAGE_SIZE = 64
# What tells the classes apart: pairs of spots in front and behind, a band across the wings, the antennae
SPOTS = {'2spots': (-0.45, 0.5), '3spots': (-0.6, -0.3, 0.45), '4spots': (-0.6, -0.3, 0.35, 0.65)}
CLASSES = list(itertools.product(SPOTS, ('plain', 'banded'), ('straight', 'curled')))

Color = Tuple[int, int, int]


def _color(rng: random.Random, saturation: Tuple[float, float], value: Tuple[float, float]) -> Color:
    r, g, b = colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value))
    return int(255 * r), int(255 * g), int(255 * b)


def draw_beetle(rng: random.Random, spots: str, wings: str, antennae: str, size: int = IMAGE_SIZE) -> Image.Image:
    """A beetle of one class, of random colour, size, place and direction, on a random background with noise."""
    side = 4 * size  # drawn large, then reduced
    center = side / 2
    length = side * rng.uniform(0.24, 0.32)
    width = length * rng.uniform(0.6, 0.75)
    line = max(1, round(side * 0.015))
    black = (20, 20, 20)
    body = _color(rng, (0.5, 1.0), (0.45, 0.95))
    dark: Color = (body[0] // 4, body[1] // 4, body[2] // 4)
    light: Color = ((body[0] + 510) // 3, (body[1] + 510) // 3, (body[2] + 510) // 3)
    mark = rng.choice((dark, light))

    image = Image.new('RGB', (side, side), _color(rng, (0.05, 0.4), (0.5, 1.0)))
    draw = ImageDraw.Draw(image)
    for _ in range(14):
        x, y, r = rng.uniform(0, side), rng.uniform(0, side), rng.uniform(0.02, 0.12) * side
        draw.ellipse((x - r, y - r / 2, x + r, y + r / 2), fill=_color(rng, (0.05, 0.5), (0.4, 1.0)))

    beetle = Image.new('RGBA', (side, side))
    draw = ImageDraw.Draw(beetle)
    for s in (-1, 1):
        for k in (-0.5, 0.05, 0.55):
            start = (center + s * width * 0.8, center + k * length)
            end = (center + s * (width + length * 0.35), start[1] + length * 0.15 * (k + 0.2))
            draw.line((start, end), fill=black, width=line)
        x, y = center + s * width * 0.2, center - length * 1.1
        if antennae == 'curled':
            left, right = sorted((x, x + s * length * 0.5))
            draw.arc((left, y - length * 0.35, right, y + length * 0.25), 0, 360, fill=black, width=line)
        else:
            draw.line((x, y + length * 0.1, x + s * length * 0.35, y - length * 0.45), fill=black, width=line)
    head = width * 0.5
    draw.ellipse((center - head, center - length * 1.3, center + head, center - length * 0.75), fill=dark)
    draw.ellipse((center - width, center - length, center + width, center + length), fill=body)
    draw.line((center, center - length, center, center + length), fill=dark, width=line)
    if wings == 'banded':
        half = width * 0.92
        draw.rectangle((center - half, center - length * 0.1, center + half, center + length * 0.12), fill=mark)
    r = length * 0.11
    for s, k in itertools.product((-1, 1), SPOTS[spots]):
        x, y = center + s * width * rng.uniform(0.38, 0.5), center + k * length
        draw.ellipse((x - r, y - r, x + r, y + r), fill=mark)

    n = int(side * rng.uniform(0.75, 1.2))
    beetle = beetle.rotate(rng.uniform(-35, 35), Image.Resampling.BICUBIC).resize((n, n))
    place = [int((side - n) / 2 + rng.uniform(-0.1, 0.1) * side) for _ in range(2)]
    image.paste(beetle, (place[0], place[1]), beetle)
    image = image.resize((size, size), Image.Resampling.LANCZOS)
    noise = Image.effect_noise((size, size), rng.uniform(5, 30)).convert('RGB')
    return Image.blend(image, noise, rng.uniform(0.0, 0.15))


def draw_dataset(folder: Path, per_class: Dict[str, int], seed: int) -> None:
    """Write an ImageFolder tree, folder/SPLIT/CLASS/N.png, with ``per_class[SPLIT]`` images a class."""
    for split, count in per_class.items():
        rng = random.Random(f'{seed} {split}')
        for kind in CLASSES:
            target = folder / split / '_'.join(kind)
            target.mkdir(parents=True)
            for i in range(count):
                draw_beetle(rng, *kind).save(target / f'{i:04d}.png')


class Result(NamedTuple):
    top1: float
    nll: float
    seconds: float
    predictions: torch.Tensor
    targets: torch.Tensor


def _loader(model: nn.Module, folder: Path, split: str, device: torch.device, workers: int, batch_size: int) -> Any:
    config = resolve_data_config({'img_size': IMAGE_SIZE, 'crop_pct': 1.0}, model=model)
    training = split == 'train'
    return create_loader(
        create_dataset('', root=str(folder), split=split),
        input_size=config['input_size'],
        batch_size=batch_size,
        is_training=training,
        scale=(0.8, 1.0),
        ratio=(0.9, 1.1),
        color_jitter=0.2,
        interpolation='bilinear',
        mean=config['mean'],
        std=config['std'],
        crop_pct=1.0,
        num_workers=workers,
        device=device,
        pin_memory=device.type == 'cuda',
    )


@torch.inference_mode()
def evaluate(model: nn.Module, loader: Any, device: torch.device) -> Tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, C) and targets (N,) of a loader, on the CPU."""
    model.eval()
    batches = [(model(x.to(device)).float().cpu(), y.cpu()) for x, y in loader]
    return torch.cat([logits for logits, _ in batches]), torch.cat([y for _, y in batches])


def train(
    name: str, folder: Path, epochs: int, seed: int, device: torch.device, workers: int
) -> Tuple[nn.Module, Result]:
    """Train a model from scratch on the drawn images and evaluate it."""
    random_seed(seed)
    model = timm.create_model(name, num_classes=len(CLASSES)).to(device)
    train_loader = _loader(model, folder, 'train', device, workers, batch_size=64)
    test_loader = _loader(model, folder, 'validation', device, workers, batch_size=128)
    task = ClassificationTask(model, criterion=nn.CrossEntropyLoss(label_smoothing=0.1), device=device, verbose=False)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=4e-3, weight_decay=0.05)
    steps = len(train_loader)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched='cosine',
        num_epochs=epochs,
        warmup_epochs=2,
        warmup_lr=0.0,
        min_lr=0.0,
        warmup_prefix=False,
        step_on_epochs=False,
        updates_per_epoch=steps,
    )
    scheduler.step_update(0)
    start = time.perf_counter()
    with tqdm(total=epochs * steps, desc=f'{name:>22}', unit='step', file=sys.stderr) as progress:
        for epoch in range(epochs):
            task.train()
            for i, (x, y) in enumerate(train_loader):
                optimizer.zero_grad()
                loss = task(x.to(device), y.to(device))['loss']
                loss.backward()
                optimizer.step()
                scheduler.step_update(epoch * steps + i + 1)
                progress.update()
            progress.set_postfix(loss=f'{loss.item():.3f}')
    seconds = time.perf_counter() - start
    logits, targets = evaluate(model, test_loader, device)
    predictions = logits.argmax(1)
    top1 = 100 * (predictions == targets).float().mean().item()
    return model, Result(top1, F.cross_entropy(logits, targets).item(), seconds, predictions, targets)


def draw_confusions(results: Dict[str, Result], folder: Path, size: int = 24) -> Image.Image:
    """The confusion matrix of each result side by side, with an image of each class beside its row and column."""
    n = len(CLASSES)
    width, top = (n + 2) * size, 2 * size
    picture = Image.new('RGB', (width * len(results), top + (n + 1) * size), 'white')
    draw = ImageDraw.Draw(picture)
    icons = []
    for kind in sorted('_'.join(kind) for kind in CLASSES):
        with Image.open(folder / 'validation' / kind / '0000.png') as icon:
            icons.append(icon.resize((size, size)))
    for k, (name, result) in enumerate(results.items()):
        left = k * width
        draw.text((left + size, 4), f'{name}: top-1 {result.top1:.1f} %', fill='black')
        draw.text((left + size, 4 + size // 2), 'rows: true class, columns: predicted', fill='gray')
        counts = torch.bincount(result.targets * n + result.predictions, minlength=n * n).reshape(n, n)
        for i in range(n):
            picture.paste(icons[i], (left, top + (i + 1) * size))
            picture.paste(icons[i], (left + (i + 1) * size, top))
            for j in range(n):
                share = counts[i, j].item() / max(1, counts[i].sum().item())
                shade = int(255 * (1 - share))
                x, y = left + (j + 1) * size, top + (i + 1) * size
                fill = (shade, shade, 255) if i == j else (255, shade, shade)
                draw.rectangle((x, y, x + size - 2, y + size - 2), fill=fill)
                if counts[i, j]:
                    draw.text((x + 5, y + 5), str(counts[i, j].item()), fill='black' if share < 0.5 else 'white')
    return picture


@contextmanager
def _all_or_nothing(target: Path) -> Iterator[Path]:
    """A folder to write into that takes its final name only when all is written, and goes if anything interrupts."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.zzz-demo-', dir=target.parent) as parent:
        draft = Path(parent) / target.name
        draft.mkdir()
        yield draft
        draft.rename(target)


def _reload_matches(folder: Path, model: nn.Module, loader: Any, device: torch.device) -> bool:
    reloaded = timm.create_model(f'local-dir:{folder}', pretrained=True).to(device)
    expected, _ = evaluate(model, loader, device)
    actual, _ = evaluate(reloaded, loader, device)
    return torch.equal(actual, expected)


def _print_table(results: Dict[str, Result]) -> None:
    print(f'\n{"model":24}{"top-1 %":>9}{"NLL":>9}{"seconds":>9}')
    for name, result in results.items():
        print(f'{name:24}{result.top1:9.1f}{result.nll:9.3f}{result.seconds:9.1f}')


def main(arguments: List[str]) -> None:
    parser = argparse.ArgumentParser(
        prog='python -m timm_zzz demo',
        description=f'Draws {len(CLASSES)} classes of beetles that differ in details, trains {ARCHITECTURE} with a '
        'linear head and with a ZZZ head on them, and saves the latter. Needs no data set and no network.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument('--output', type=Path, default=Path('zzz-demo'), help='folder for the results; must not exist')
    parser.add_argument('--epochs', type=positive_int, default=24, help='training epochs')
    parser.add_argument('--images', type=positive_int, default=120, help='training images per class')
    parser.add_argument('--rank', type=int, choices=timm_zzz.registry.RANKS, default=8, help='rank of the ZZZ head')
    parser.add_argument('--seed', type=int, default=0, help='random seed')
    parser.add_argument('--workers', type=positive_int, default=2, help='processes that load images')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='device to train on')
    args = parser.parse_args(arguments)
    if args.output.exists():
        parser.error(f'{args.output} exists already; give another --output')
    try:
        _run(args)
    except KeyboardInterrupt:
        print('\ninterrupted, nothing was saved', file=sys.stderr)
        sys.exit(130)


def _run(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory(prefix='zzz-demo-') as temporary, _all_or_nothing(args.output) as draft:
        images = Path(temporary)
        print(f'drawing {len(CLASSES)} classes of beetles, {args.images} training images each', file=sys.stderr)
        draw_dataset(images, {'train': args.images, 'validation': 40}, args.seed)
        results: Dict[str, Result] = {}
        model: nn.Module = nn.Identity()
        for name in (ARCHITECTURE, f'{ARCHITECTURE}.zzz_r{args.rank}'):
            model, results[name] = train(name, images, args.epochs, args.seed, device, args.workers)
        checkpoint = draft / 'model'
        kinds = sorted('_'.join(kind) for kind in CLASSES)  # ImageFolder's order
        save_for_hf(
            model,
            str(checkpoint),
            model_config={'label_names': kinds},
            safe_serialization=True,
            data_config={'input_size': (3, IMAGE_SIZE, IMAGE_SIZE), 'crop_pct': 1.0, 'interpolation': 'bilinear'},
        )
        draw_confusions(results, images).save(draft / 'confusions.png')
        shutil.copytree(images / 'validation', draft / 'validation')
        loader = _loader(model, images, 'validation', device, args.workers, batch_size=128)
        same = _reload_matches(checkpoint, model, loader, device)
        _print_table(results)
        if not same:
            raise RuntimeError('the model reloaded from the checkpoint gives other logits')
    print(f"\nreloaded with timm.create_model('local-dir:{args.output}/model', pretrained=True): same logits")
    for what, name in (('checkpoint', 'model'), ('confusions', 'confusions.png'), ('images', 'validation')):
        print(f'{what:12}{args.output}/{name}')
