"""Fine-tune to new classes with few images, with a linear and with a ZZZ head: ``python -m timm_zzz demo``.

The images show beetles and are drawn by this module. Models, loaders, optimiser and schedule are timm's.
"""

import argparse
import colorsys
import itertools
import random
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple

import timm
import torch
from huggingface_hub.utils import tqdm
from PIL import Image, ImageDraw
from timm.data import ImageDataset, create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import random_seed
from torch import Tensor, nn

from ..data import eval_loader
from ..errors import CheckpointError
from ..hub import save_pretrained
from ..metrics import Predictions, evaluate, predict
from ..models.registry import RANKS
from ..scores import outlier_scores
from .common import count, device_of, exit_on_error, positive_int

__all__ = ['draw_classes', 'main', 'run_demo', 'train']

ARCHITECTURE = 'test_resnet'
IMAGE_SIZE = 64
PREPROCESSING: Dict[str, Any] = dict(
    input_size=(3, IMAGE_SIZE, IMAGE_SIZE),
    crop_pct=1.0,
    crop_mode='center',
    interpolation='bilinear',
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
# Features that distinguish species: pairs of spots in front and behind, a band across the wings, the antennae
SPOTS = {'2spots': (-0.45, 0.5), '3spots': (-0.6, -0.3, 0.45), '4spots': (-0.6, -0.3, 0.35, 0.65)}
NUISANCES = ('color', 'pose', 'background', 'noise')  # what tells none apart; the proportions of a beetle vary, too
WINGS, ANTENNAE = ('plain', 'banded'), ('straight', 'curled')
Classes = Dict[str, List[Tuple[str, str, str]]]  # the kinds of beetles in each class
FINE: Classes = {'_'.join(kind): [kind] for kind in itertools.product(SPOTS, WINGS, ANTENNAE)}
# Each coarse class has two kinds: beetles with three spots may have any wings, the others any antennae
COARSE: Classes = {}
for _spots, _wings, _antennae in itertools.product(SPOTS, WINGS, ANTENNAE):
    _name = f'{_spots}_{_antennae if _spots == "3spots" else _wings}'
    COARSE.setdefault(_name, []).append((_spots, _wings, _antennae))
UNKNOWN: Classes = {'striped': [(spots, 'striped', antennae) for spots, antennae in itertools.product(SPOTS, ANTENNAE)]}
COARSE_IMAGES, COARSE_EPOCHS = 160, 24  # to train the backbone; images per class
TEST_IMAGES = 40  # per class
BATCH_SIZE = 64
BLACK = (20, 20, 20)


class Rates(NamedTuple):
    """Learning rates."""

    backbone: float
    head: float


class Method(NamedTuple):
    """A way to train a model for the finer classes on the backbone of the coarse ones."""

    preset: Optional[str]  # for the fit of a ZZZ head; None for a linear head
    rates: Optional[Rates]  # for fine-tuning; None for none
    score: str  # outlier score that detects unknown classes


COARSE_RATES, ZZZ_RATES = Rates(4e-3, 4e-3), Rates(1e-4, 5e-4)
# docs/results/demo.md says how the rates were chosen
METHODS = {
    'linear, best rates': Method(None, Rates(3e-5, 3.2e-2), 'max_softmax'),
    "linear, ZZZ's rates": Method(None, ZZZ_RATES, 'energy'),
    'ZZZ, fitted only': Method('frozen', None, 'relative_mahalanobis'),
    'ZZZ, fitted and fine-tuned': Method('finetune', ZZZ_RATES, 'relative_mahalanobis'),
}


def _color(rng: random.Random, saturation: Tuple[float, float], value: Tuple[float, float]) -> Tuple[int, ...]:
    return tuple(int(255 * c) for c in colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value)))


def draw_beetle(
    rng: random.Random,
    spots: str,
    wings: str,
    antennae: str,
    size: int = IMAGE_SIZE,
    own: Optional[Mapping[str, random.Random]] = None,
) -> Image.Image:
    """Draw a beetle of one kind with random colour, size, place and direction, on a random, noisy background.

    Each of :data:`NUISANCES` that ``own`` names is drawn by its generator there, the rest by ``rng``.
    """
    color, pose, background, noise = ((own or {}).get(name, rng) for name in NUISANCES)
    side, center = 4 * size, 2 * size  # drawn at four times the size, then reduced
    length = side * rng.uniform(0.24, 0.32)
    width = length * rng.uniform(0.6, 0.75)
    line = max(1, round(side * 0.015))
    body = _color(color, (0.5, 1.0), (0.45, 0.95))
    dark, light = tuple(c // 4 for c in body), tuple((c + 510) // 3 for c in body)
    mark = color.choice((dark, light))

    image = Image.new('RGB', (side, side), _color(background, (0.05, 0.4), (0.5, 1.0)))
    draw = ImageDraw.Draw(image)
    for _ in range(14):
        x, y, r = (background.uniform(*bounds) * side for bounds in ((0, 1), (0, 1), (0.02, 0.12)))
        draw.ellipse((x - r, y - r / 2, x + r, y + r / 2), fill=_color(background, (0.05, 0.5), (0.4, 1.0)))

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
    elif wings == 'striped':
        for x in (center - width * 0.3, center + width * 0.3):
            draw.line((x, center - length * 0.8, x, center + length * 0.8), fill=mark, width=3 * line)
    r = length * 0.11
    for s, k in itertools.product((-1, 1), SPOTS[spots]):
        x, y = center + s * width * rng.uniform(0.38, 0.5), center + k * length
        draw.ellipse((x - r, y - r, x + r, y + r), fill=mark)

    n = int(side * pose.uniform(0.75, 1.2))
    beetle = beetle.rotate(pose.uniform(-35, 35), Image.Resampling.BICUBIC).resize((n, n))
    place = [int((side - n) / 2 + pose.uniform(-0.1, 0.1) * side) for _ in range(2)]
    image.paste(beetle, (place[0], place[1]), beetle)
    image = image.resize((size, size), Image.Resampling.LANCZOS)
    grain = Image.effect_noise((size, size), noise.uniform(5, 30)).convert('RGB')
    return Image.blend(image, grain, noise.uniform(0.0, 0.15))


def draw_classes(folder: Path, classes: Classes, images: int, seed: str) -> None:
    """Write an ImageFolder, folder/CLASS/N.png, with ``images`` images per class, whose kinds alternate."""
    rng = random.Random(seed)
    for name, kinds in classes.items():
        (folder / name).mkdir(parents=True)
        for i in range(images):
            draw_beetle(rng, *kinds[i % len(kinds)]).save(folder / name / f'{i:04d}.png')


def images_of(folder: Path, device: torch.device, workers: int) -> Any:
    """Create a loader of the images in a folder, preprocessed for evaluation."""
    return eval_loader(ImageDataset(str(folder)), PREPROCESSING, batch_size=128, workers=workers, device=device)


def create_model(rank: Optional[int], weights: Path, **start: Any) -> Any:
    """Create a model for the finer classes on the backbone of a checkpoint, with a ZZZ head unless ``rank`` is None.

    A linear head starts at zero, as with ``train.py --head-init-scale 0.0``; ``start`` has the arguments of a ZZZ head.
    """
    checkpoint = dict(PREPROCESSING, file=str(weights), num_classes=len(COARSE))
    options: Dict[str, Any] = dict(pretrained=True, pretrained_cfg_overlay=checkpoint, num_classes=len(FINE))
    if rank is not None:
        return timm.create_model(f'{ARCHITECTURE}.zzz_r{rank}', **options, **start)
    model: Any = timm.create_model(ARCHITECTURE, **options)
    nn.init.zeros_(model.get_classifier().weight)
    return model


def train(model: nn.Module, folder: Path, epochs: int, rates: Rates, device: torch.device, workers: int) -> None:
    """Train a model on a folder of images, in place."""
    dataset = ImageDataset(str(folder))
    options: Dict[str, Any] = {key: PREPROCESSING[key] for key in ('input_size', 'interpolation', 'mean', 'std')}
    options.update(scale=(0.8, 1.0), ratio=(0.9, 1.1), color_jitter=0.2, persistent_workers=workers > 0)
    batch_size = min(BATCH_SIZE, max(1, len(dataset) // 2))
    loader: Any = create_loader(
        dataset, batch_size=batch_size, is_training=True, num_workers=workers, device=device, **options
    )
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    scale = rates.backbone / rates.head
    scales: Dict[str, Any] = dict(layer_decay=scale, layer_decay_min_scale=scale)  # of all layers below the head
    optimizer = create_optimizer_v2(model, opt='adamw', lr=rates.head, weight_decay=0.05, **scales)
    steps: Dict[str, Any] = dict(step_on_epochs=False, updates_per_epoch=len(loader))
    scheduler, _ = create_scheduler_v2(optimizer, num_epochs=epochs, warmup_epochs=epochs // 10, warmup_lr=0.0, **steps)
    scheduler.step_update(0)
    model.train()
    batches = itertools.chain.from_iterable(itertools.repeat(loader, epochs))
    total = epochs * len(loader)
    with tqdm(batches, desc=f'{folder.name:>10}', total=total, unit='step', file=sys.stderr) as progress:
        for step, (x, y) in enumerate(progress, 1):
            optimizer.zero_grad()
            criterion(model(x.to(device)), y.to(device)).backward()
            optimizer.step()
            scheduler.step_update(step)


class Result(NamedTuple):
    """Predictions for the validation images, and how well an outlier score detects an unknown class."""

    predictions: Predictions
    auroc: float  # percent
    seconds: float


@torch.inference_mode()
def features_of(model: Any, loader: Any, device: torch.device) -> Tuple[Tensor, Tensor]:
    """Compute the inputs (N, d) of a model's head for a loader's images; return them with the classes (N,)."""
    model.eval()
    batches = [(model.forward_head(model.forward_features(x.to(device)), pre_logits=True), y) for x, y in loader]
    features, target = (torch.cat(column) for column in zip(*batches, strict=True))
    return features, target


def auroc(inliers: Tensor, outliers: Tensor) -> float:
    """Compute the AUROC in percent: how often an outlier has a larger score than an inlier, ties counted half."""
    return 50 + 50 * (outliers[:, None] - inliers).sign().double().mean().item()


def draw_confusions(results: Dict[str, Predictions], folder: Path, size: int = 24) -> Image.Image:
    """Draw the confusion matrix of each result, with an image of each class beside its row and column."""
    n = len(FINE)
    picture = Image.new('RGB', ((n + 2) * size * len(results), (n + 3) * size), 'white')
    draw = ImageDraw.Draw(picture)
    for k, (name, result) in enumerate(results.items()):
        left, top = (k * (n + 2) + 1) * size, 3 * size
        draw.text((left, 4), f'{name}: top-1 {result.top1:.1f} %', fill='black')
        draw.text((left, 4 + size // 2), 'rows: true class, columns: predicted', fill='gray')
        counts = torch.bincount(result.target * n + result.prediction, minlength=n * n).reshape(n, n)
        for i, row in enumerate(counts.tolist()):
            with Image.open(folder / sorted(FINE)[i] / '0000.png') as image:
                icon = image.resize((size, size))
            picture.paste(icon, (left - size, top + i * size))
            picture.paste(icon, (left + i * size, top - size))
            for j, number in enumerate(row):
                x, y, shade = left + j * size, top + i * size, 255 - 255 * number // max(1, sum(row))
                fill = (shade, shade, 255) if i == j else (255, shade, shade)
                draw.rectangle((x, y, x + size - 2, y + size - 2), fill=fill)
                draw.text((x + 5, y + 5), str(number or ''), fill='black' if shade > 127 else 'white')
    return picture


def run_demo(
    output: Path, epochs: int, images: int, repeats: int, rank: int, seed: int, workers: int, device: torch.device
) -> Dict[str, List[Result]]:
    """Train a backbone, fine-tune it by each method, and write the last model and the validation images to a folder.

    The folder also gets a picture of the confusions. It appears once it is complete.

    Args:
        output: The folder; must not exist.
        images: Training images per class.
        repeats: Number of repeats, each with training images of its own.

    Returns:
        Results by name of the method, one per repeat.

    Raises:
        ValueError: If the folder exists.
        CheckpointError: If timm loads another model from the folder.
    """
    if output.exists():
        raise ValueError(f'{output} exists already; give another --output')
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix='.zzz-demo-', dir=output.parent) as temporary:
        data, draft = Path(temporary) / 'data', Path(temporary) / 'results'
        print(f'drawing beetles: {len(COARSE)} coarse and {len(FINE)} finer classes', file=sys.stderr)
        draw_classes(data / 'coarse', COARSE, COARSE_IMAGES, f'{seed} coarse')
        draw_classes(data / 'validation', FINE, TEST_IMAGES, f'{seed} validation')
        draw_classes(data / 'unknown', UNKNOWN, 6 * TEST_IMAGES, f'{seed} unknown')
        random_seed(seed)
        backbone: nn.Module = timm.create_model(ARCHITECTURE, num_classes=len(COARSE)).to(device)
        train(backbone, data / 'coarse', COARSE_EPOCHS, COARSE_RATES, device, workers)
        torch.save(backbone.state_dict(), data / 'backbone.pth')

        results: Dict[str, List[Result]] = {name: [] for name in METHODS}
        validation, unknown = (images_of(data / name, device, workers) for name in ('validation', 'unknown'))
        for repeat in range(repeats):
            folder = data / f'fine{repeat}'
            draw_classes(folder, FINE, images, f'{seed} {folder.name}')
            for name, (preset, rates, score) in METHODS.items():
                random_seed(seed + repeat)
                began = time.perf_counter()
                fit: Dict[str, Any] = dict(zzz_fit=images_of(folder, device, workers), zzz_fit_preset=preset)
                model = create_model(rank if preset else None, data / 'backbone.pth', **fit).to(device)
                if rates is not None:
                    train(model, folder, epochs, rates, device, workers)
                seconds = time.perf_counter() - began
                head = model.get_classifier()
                features, target = features_of(model, validation, device)
                others, _ = features_of(model, unknown, device)
                scores = [outlier_scores(head, x, [score])[score] for x in (features, others)]
                results[name].append(Result(evaluate(head, [(features, target)], device), auroc(*scores), seconds))

        saved = save_pretrained(model, draft / 'model', label_names=sorted(FINE), data_config=PREPROCESSING)
        reloaded = timm.create_model(f'local-dir:{saved}', pretrained=True).to(device)
        logits = [torch.cat([out for _, out, _ in predict(m, validation, device)]) for m in (model, reloaded)]
        if not torch.equal(*logits):
            raise CheckpointError('the model reloaded from the checkpoint gives other logits')
        (data / 'validation').rename(draft / 'validation')
        predictions = {name: result[-1].predictions for name, result in results.items()}
        draw_confusions(predictions, draft / 'validation').save(draft / 'confusions.png')
        draft.rename(output)
    return results


def main(arguments: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(
        prog='python -m timm_zzz demo',
        description=f'Draw images of beetles, train {ARCHITECTURE} on {len(COARSE)} coarse classes, and fine-tune it '
        f'to {len(FINE)} finer classes with few images each: with a linear head that starts at zero, and with a ZZZ '
        'head that is fitted to the images first. Save the latter. No data set and no network are needed.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add('--output', type=Path, default=Path('zzz-demo'), help='folder for the results; must not exist')
    add('--epochs', type=positive_int, default=30, help='epochs of fine-tuning')
    add('--images', type=positive_int, default=5, help='training images of each finer class')
    add('--repeats', type=positive_int, default=2, help='number of repeats, each with other training images')
    add('--rank', type=int, choices=RANKS, default=8, help='rank of the ZZZ head')
    add('--seed', type=int, default=0, help='random seed')
    add('--workers', type=count, default=2, help='processes that load images')
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='device to train on')
    options = parser.parse_args(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as fast for tiny images; waiting threads would keep the cores of loader processes busy
    try:
        with exit_on_error(parser, 'interrupted, nothing was saved'):
            results = run_demo(**{**vars(options), 'device': device_of(options)})
    finally:
        torch.set_num_threads(threads)
    print(f'\n{options.images} images a class, means of {options.repeats} runs; AUROC: a class that no model has seen')
    print(f'{"":28}{"top-1 %":>9}{"NLL":>9}{"AUROC %":>9}{"seconds":>9}  score of the AUROC')
    for name, runs in results.items():
        rows = [(run.predictions.top1, run.predictions.mean_nll, run.auroc, run.seconds) for run in runs]
        top1, nll, area, seconds = (sum(column) / len(column) for column in zip(*rows, strict=True))
        print(f'{name:28}{top1:9.1f}{nll:9.3f}{area:9.1f}{seconds:9.1f}  {METHODS[name].score}')
    print(f"\nreloaded with timm.create_model('local-dir:{options.output}/model', pretrained=True): same logits")
    for what, path in (('checkpoint', 'model'), ('confusions', 'confusions.png'), ('images', 'validation')):
        print(f'{what:12}{options.output}/{path}')
