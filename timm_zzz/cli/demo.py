"""``python -m timm_zzz demo``: train a ZZZ head and a linear head on images of beetles drawn on the spot.

Everything but the drawing is timm's: models, loaders, optimiser and schedule.
"""

import argparse
import colorsys
import itertools
import random
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Dict, List, Optional, Tuple

import timm
import torch
from huggingface_hub.utils import tqdm
from PIL import Image, ImageDraw
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import random_seed
from torch import nn

from ..data import eval_loader
from ..errors import CheckpointError
from ..hub import save_pretrained
from ..metrics import Predictions, evaluate, predict
from ..models.registry import RANKS
from .common import device_of, exit_on_error, positive_int

__all__ = ['draw_dataset', 'main', 'run_demo', 'train', 'validation_loader']

ARCHITECTURE = 'test_resnet'
IMAGE_SIZE = 64
PREPROCESSING = {'input_size': (3, IMAGE_SIZE, IMAGE_SIZE), 'crop_pct': 1.0, 'interpolation': 'bilinear'}
# What tells the classes apart: pairs of spots in front and behind, a band across the wings, the antennae
SPOTS = {'2spots': (-0.45, 0.5), '3spots': (-0.6, -0.3, 0.45), '4spots': (-0.6, -0.3, 0.35, 0.65)}
CLASSES = list(itertools.product(SPOTS, ('plain', 'banded'), ('straight', 'curled')))
BLACK = (20, 20, 20)
VALIDATION_IMAGES = 40  # per class


def _color(rng: random.Random, saturation: Tuple[float, float], value: Tuple[float, float]) -> Tuple[int, ...]:
    return tuple(int(255 * c) for c in colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value)))


def draw_beetle(rng: random.Random, spots: str, wings: str, antennae: str, size: int = IMAGE_SIZE) -> Image.Image:
    """Draw a beetle of one class, of random colour, size, place and direction, on a random background with noise."""
    side, center = 4 * size, 2 * size  # drawn large, then reduced
    length = side * rng.uniform(0.24, 0.32)
    width = length * rng.uniform(0.6, 0.75)
    line = max(1, round(side * 0.015))
    body = _color(rng, (0.5, 1.0), (0.45, 0.95))
    dark, light = tuple(c // 4 for c in body), tuple((c + 510) // 3 for c in body)
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
            draw.line((start, end), fill=BLACK, width=line)
        x, y = center + s * width * 0.2, center - length * 1.1
        if antennae == 'curled':
            left, right = sorted((x, x + s * length * 0.5))
            draw.arc((left, y - length * 0.35, right, y + length * 0.25), 0, 360, fill=BLACK, width=line)
        else:
            draw.line((x, y + length * 0.1, x + s * length * 0.35, y - length * 0.45), fill=BLACK, width=line)
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


def class_names() -> List[str]:
    """List the names of the classes in an ImageFolder's order."""
    return sorted(map('_'.join, CLASSES))


def validation_loader(model: nn.Module, folder: Path, device: torch.device, workers: int) -> Any:
    """Create the loader of the drawn validation images."""
    dataset = create_dataset('', root=str(folder), split='validation')
    config = resolve_data_config(PREPROCESSING, model=model)
    return eval_loader(dataset, config, batch_size=128, workers=workers, device=device)


def train(name: str, folder: Path, epochs: int, seed: int, device: torch.device, workers: int) -> nn.Module:
    """Train a model from scratch on the drawn images."""
    random_seed(seed)
    model = timm.create_model(name, num_classes=len(CLASSES)).to(device)
    dataset = create_dataset('', root=str(folder), split='train')
    config = resolve_data_config(PREPROCESSING, model=model)
    options: Dict[str, Any] = {key: config[key] for key in ('input_size', 'interpolation', 'mean', 'std')}
    options.update(scale=(0.8, 1.0), ratio=(0.9, 1.1), color_jitter=0.2)
    loader: Any = create_loader(dataset, batch_size=64, is_training=True, num_workers=workers, device=device, **options)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=4e-3, weight_decay=0.05)
    steps: Dict[str, Any] = dict(step_on_epochs=False, updates_per_epoch=len(loader))
    scheduler, _ = create_scheduler_v2(optimizer, num_epochs=epochs, warmup_epochs=2, warmup_lr=0.0, **steps)
    scheduler.step_update(0)
    model.train()
    batches = itertools.chain.from_iterable(itertools.repeat(loader, epochs))
    progress = tqdm(batches, desc=f'{name:>22}', total=epochs * len(loader), unit='step', file=sys.stderr)
    for step, (x, y) in enumerate(progress, 1):
        optimizer.zero_grad()
        criterion(model(x.to(device)), y.to(device)).backward()
        optimizer.step()
        scheduler.step_update(step)
    return model


def draw_confusions(results: Dict[str, Predictions], folder: Path, size: int = 24) -> Image.Image:
    """Draw the confusion matrix of each result, with an image of each class beside its row and column."""
    n = len(CLASSES)
    picture = Image.new('RGB', ((n + 2) * size * len(results), (n + 3) * size), 'white')
    draw = ImageDraw.Draw(picture)
    for k, (name, result) in enumerate(results.items()):
        left, top = (k * (n + 2) + 1) * size, 3 * size
        draw.text((left, 4), f'{name}: top-1 {result.top1:.1f} %', fill='black')
        draw.text((left, 4 + size // 2), 'rows: true class, columns: predicted', fill='gray')
        counts = torch.bincount(result.target * n + result.prediction, minlength=n * n).reshape(n, n)
        for i, row in enumerate(counts.tolist()):
            with Image.open(folder / class_names()[i] / '0000.png') as image:
                icon = image.resize((size, size))
            picture.paste(icon, (left - size, top + i * size))
            picture.paste(icon, (left + i * size, top - size))
            for j, count in enumerate(row):
                x, y, shade = left + j * size, top + i * size, 255 - 255 * count // max(1, sum(row))
                fill = (shade, shade, 255) if i == j else (255, shade, shade)
                draw.rectangle((x, y, x + size - 2, y + size - 2), fill=fill)
                draw.text((x + 5, y + 5), str(count or ''), fill='black' if shade > 127 else 'white')
    return picture


def run_demo(
    output: Path, epochs: int, images: int, rank: int, seed: int, workers: int, device: torch.device
) -> Dict[str, Tuple[Predictions, float]]:
    """Train both models and write the ZZZ model, a picture of the confusions and the validation images to a folder.

    The folder appears when everything is in it.

    Returns:
        Predictions on the validation images and seconds of training, by name of the model.

    Raises:
        ValueError: If the folder exists.
        CheckpointError: If timm does not load the model that was saved.
    """
    if output.exists():
        raise ValueError(f'{output} exists already; give another --output')
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix='.zzz-demo-', dir=output.parent) as temporary:
        data, draft = Path(temporary) / 'data', Path(temporary) / 'results'
        print(f'drawing {len(CLASSES)} classes of beetles, {images} training images each', file=sys.stderr)
        draw_dataset(data, {'train': images, 'validation': VALIDATION_IMAGES}, seed)
        results: Dict[str, Tuple[Predictions, float]] = {}
        for name in (ARCHITECTURE, f'{ARCHITECTURE}.zzz_r{rank}'):
            start = time.perf_counter()
            model = train(name, data, epochs, seed, device, workers)
            seconds = time.perf_counter() - start
            loader = validation_loader(model, data, device, workers)
            results[name] = evaluate(model, loader, device), seconds
        folder = save_pretrained(model, draft / 'model', label_names=class_names(), data_config=PREPROCESSING)
        reloaded = timm.create_model(f'local-dir:{folder}', pretrained=True).to(device)
        logits = [torch.cat([out for _, out, _ in predict(m, loader, device)]) for m in (model, reloaded)]
        if not torch.equal(*logits):
            raise CheckpointError('the model reloaded from the checkpoint gives other logits')
        (data / 'validation').rename(draft / 'validation')
        predictions = {name: result for name, (result, _) in results.items()}
        draw_confusions(predictions, draft / 'validation').save(draft / 'confusions.png')
        draft.rename(output)
    return results


def main(arguments: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(
        prog='python -m timm_zzz demo',
        description=f'Draws {len(CLASSES)} classes of beetles that differ in details, trains {ARCHITECTURE} with a '
        'linear head and with a ZZZ head on them, and saves the latter. Needs no data set and no network.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add('--output', type=Path, default=Path('zzz-demo'), help='folder for the results; must not exist')
    add('--epochs', type=positive_int, default=24, help='training epochs')
    add('--images', type=positive_int, default=120, help='training images per class')
    add('--rank', type=int, choices=RANKS, default=8, help='rank of the ZZZ head')
    add('--seed', type=int, default=0, help='random seed')
    add('--workers', type=positive_int, default=2, help='processes that load images')
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='device to train on')
    options = parser.parse_args(arguments)
    with exit_on_error(parser, 'interrupted, nothing was saved'):
        results = run_demo(**{**vars(options), 'device': device_of(options)})
    print(f'\n{"model":24}{"top-1 %":>9}{"NLL":>9}{"seconds":>9}')
    for name, (result, seconds) in results.items():
        print(f'{name:24}{result.top1:9.1f}{result.mean_nll:9.3f}{seconds:9.1f}')
    print(f"\nreloaded with timm.create_model('local-dir:{options.output}/model', pretrained=True): same logits")
    for what, path in (('checkpoint', 'model'), ('confusions', 'confusions.png'), ('images', 'validation')):
        print(f'{what:12}{options.output}/{path}')
