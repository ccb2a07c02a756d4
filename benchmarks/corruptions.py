"""Corruptions of images at five strengths, by torchvision: the same for every head, computed once."""

from concurrent.futures import ThreadPoolExecutor
from typing import Callable, Dict, Tuple

import torch
from images import Images, center_boxes, crop
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

_BATCH = 512
_SEED = 1000

# Each takes images (B, 3, S, S) from 0 to 1, an image of another class for each of them, and an amount; what it draws
# comes from torch's global generators.
Corruption = Callable[[Tensor, Tensor, float], Tensor]


def _patch(x: Tensor, fill: Tensor, area: float) -> Tensor:
    """Cover a square of a part of the image, at random places, by the same square of another."""
    size = x.shape[-1]
    side = round(size * area**0.5)
    x = x.clone()
    for image, its, (i, j) in zip(x, fill, torch.randint(size - side + 1, (len(x), 2)).tolist(), strict=True):
        tv.erase(image, i, j, side, side, its[:, i : i + side, j : j + side], inplace=True)
    return x


def _border(x: Tensor, fill: Tensor, width: float) -> Tensor:
    """Put a border of a part of the side around the middle, from other images."""
    size = x.shape[-1]
    edge = round(size * width)
    inner = size - 2 * edge
    return tv.erase(fill, edge, edge, inner, inner, tv.center_crop(x, [inner, inner]))


def _blur(x: Tensor, sigma: float) -> Tensor:
    """Blur by a Gaussian whose standard deviation is a part of the side."""
    sigma *= x.shape[-1]
    kernel = 2 * int(2 * sigma + 1) + 1
    return tv.gaussian_blur(x, [kernel, kernel], [sigma, sigma])


def _either(x: Tensor, change: Callable[[Tensor, float], Tensor], first: float, second: float) -> Tensor:
    """Change images by one amount or by the other, at random."""
    chosen = (torch.rand(len(x), 1, 1, 1) < 0.5).to(x.device)
    return torch.where(chosen, change(x, first), change(x, second))


def _jpeg(x: Tensor, quality: float) -> Tensor:
    """Compress and decode, on the CPU."""

    def one(image: Tensor) -> Tensor:
        return tv.pil_to_tensor(tv.jpeg(tv.to_pil_image(image), int(quality)))  # torchvision's own codec is going

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(one, _to_bytes(x).cpu()))
    return tv.to_dtype(torch.stack(found).to(x.device), torch.float32, scale=True)


def _rotate(x: Tensor, angle: float) -> Tensor:
    """Rotate by an angle up to 40 degrees; mirrored images fill the corners."""
    size = x.shape[-1]
    edge = size // 4
    padded = tv.pad(x, [edge] * 4, padding_mode='reflect')
    return tv.center_crop(tv.rotate(padded, angle, InterpolationMode.BILINEAR), [size, size])


def _zoom(x: Tensor, side: float) -> Tensor:
    """Enlarge a corner or the middle, drawn at random, whose side is a part of the image's."""
    size = x.shape[-1]
    parts = torch.stack(tv.five_crop(x, [round(size * side)] * 2))
    chosen = parts[torch.randint(5, (len(x),)), torch.arange(len(x))]
    return tv.resize(chosen, [size, size], antialias=True)


_Entry = Tuple[Corruption, Tuple[float, float, float, float, float]]
CORRUPTIONS: Dict[str, _Entry] = {
    'grey patch': (lambda x, other, area: _patch(x, torch.full_like(x, 0.5), area), (0.05, 0.1, 0.2, 0.3, 0.4)),
    'patch of another image': (_patch, (0.05, 0.1, 0.2, 0.3, 0.4)),
    'border of another image': (_border, (0.04, 0.08, 0.12, 0.16, 0.2)),
    'blurred border': (lambda x, other, width: _border(x, _blur(x, 0.05), width), (0.04, 0.08, 0.12, 0.16, 0.2)),
    'brightness': (
        lambda x, other, by: _either(x, tv.adjust_brightness, 1 - by, 1 + by),
        (0.15, 0.3, 0.45, 0.6, 0.75),
    ),
    'contrast': (lambda x, other, by: tv.adjust_contrast(x, 1 - by), (0.2, 0.4, 0.6, 0.75, 0.9)),
    'saturation': (lambda x, other, by: tv.adjust_saturation(x, 1 - by), (0.2, 0.4, 0.6, 0.8, 1.0)),
    'hue': (lambda x, other, by: _either(x, tv.adjust_hue, -by, by), (0.03, 0.06, 0.1, 0.15, 0.25)),
    'blur': (lambda x, other, sigma: _blur(x, sigma), (0.005, 0.01, 0.015, 0.02, 0.025)),
    'noise': (lambda x, other, sigma: tv.gaussian_noise(x, sigma=sigma), (0.04, 0.08, 0.12, 0.18, 0.26)),
    'JPEG': (lambda x, other, quality: _jpeg(x, quality), (40, 25, 15, 10, 6)),
    'rotation': (lambda x, other, angle: _either(x, _rotate, -angle, angle), (5, 10, 15, 20, 30)),
    'crop': (lambda x, other, side: _zoom(x, side), (0.9, 0.8, 0.7, 0.6, 0.5)),
}
STRENGTHS = range(1, 6)


def _to_bytes(x: Tensor) -> Tensor:
    return tv.to_dtype(x.clamp(0, 1), torch.uint8, scale=True)


def middle_crops(images: Images, size: int, crop_pct: float) -> Tensor:
    """Crop the middles of images as they are evaluated, (N, 3, size, size), uint8."""
    device = images.pixels.device
    mean, std = torch.zeros(1, device=device), torch.ones(1, device=device)
    parts = [
        _to_bytes(crop(images, index, center_boxes(images, index, crop_pct), size, mean, std))
        for index in torch.arange(len(images), device=device).split(_BATCH)
    ]
    return torch.cat(parts)


def corrupt(pixels: Tensor, name: str, strength: int) -> Tensor:
    """Corrupt images; the same arguments give the same images.

    Args:
        pixels: Shape (N, 3, S, S), uint8, sorted by class: the other image of one of them is half the set away.
        name: One of :data:`CORRUPTIONS`.
        strength: 1 to 5.

    Returns:
        Shape and type of ``pixels``.
    """
    change, amounts = CORRUPTIONS[name]
    device = pixels.device
    others = pixels.roll(len(pixels) // 2, 0)
    with torch.random.fork_rng([torch.cuda.current_device()] if device.type == 'cuda' else []):
        torch.manual_seed(_SEED + list(CORRUPTIONS).index(name))
        parts = []
        for both in zip(pixels.split(_BATCH), others.split(_BATCH), strict=True):
            x, other = (tv.to_dtype(part, torch.float32, scale=True) for part in both)
            parts.append(_to_bytes(change(x, other, amounts[strength - 1])))
    return torch.cat(parts)
