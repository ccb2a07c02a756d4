"""Folders of images as tensors, and the crops of training and evaluation, on the device.

All images of a set lie on the device, squashed to squares; a crop undoes the squashing. Decoding and the crops of
every epoch would otherwise cost more than the training of a small backbone.
"""

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import List, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import pil_to_tensor

from timm_zzz.data import open_split


@dataclass(frozen=True)
class Images:
    """Images of a set: squashed pixels (N, 3, S, S), uint8; width / height (N,); targets (N,); names of the classes."""

    pixels: Tensor
    aspect: Tensor
    target: Tensor
    classes: Tuple[str, ...]

    def __len__(self) -> int:
        return len(self.target)

    def to(self, device: torch.device) -> 'Images':
        return replace(self, **{k: getattr(self, k).to(device) for k in ('pixels', 'aspect', 'target')})

    def select(self, index: Tensor) -> 'Images':
        index = index.to(self.target.device)
        return replace(self, pixels=self.pixels[index], aspect=self.aspect[index], target=self.target[index])

    def of_classes(self, chosen: Sequence[int]) -> 'Images':
        """The images of some classes, which are numbered anew in the given order."""
        number = torch.full((len(self.classes),), -1, device=self.target.device)
        number[list(chosen)] = torch.arange(len(chosen), device=self.target.device)
        kept = self.select((number[self.target] >= 0).nonzero()[:, 0])
        return replace(kept, target=number[kept.target], classes=tuple(self.classes[c] for c in chosen))

    def per_class(self, count: int, seed: int) -> 'Images':
        """``count`` images of each class, or all where there are fewer, drawn by the seed."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        target = self.target.cpu()[order]
        chosen = [order[target == c][:count] for c in range(len(self.classes))]
        return self.select(torch.cat(chosen))


def load(root: Path, split: str, size: int, cache: Optional[Path] = None) -> Images:
    """Read one split of an ImageFolder tree with timm; ``cache`` is a folder that keeps the decoded pixels."""
    dataset, names = open_split(root, split)
    file = None
    if cache is not None:
        listing = '\n'.join(dataset.filenames(absolute=True))
        key = hashlib.sha256(f'{size} {listing}'.encode()).hexdigest()[:16]
        file = cache / f'{root.name}-{split}-{key}.pt'
        if file.exists():
            return Images(*torch.load(file), tuple(names))

    def decode(i: int) -> Tuple[Tensor, float, int]:
        image, target = dataset[i]
        return pil_to_tensor(image.convert('RGB').resize((size, size), 2)), image.width / image.height, target

    with ThreadPoolExecutor() as pool:
        pixels, aspect, target = zip(*pool.map(decode, range(len(dataset))), strict=True)
    tensors = torch.stack(pixels), torch.tensor(aspect), torch.tensor(target)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(tensors, file)
    return Images(*tensors, tuple(names))


def crop(images: Images, index: Tensor, box: Tensor, size: int, mean: Tensor, std: Tensor) -> Tensor:
    """Normalised crops (B, 3, size, size) of images ``index`` (B,).

    Boxes (B, 4) hold the centre x, y and the half width and height, as parts of the image from -1 to 1; a negative half
    width mirrors.
    """
    theta = torch.zeros(len(index), 2, 3, device=box.device)
    theta[:, 0, 0], theta[:, 1, 1] = box[:, 2], box[:, 3]
    theta[:, :, 2] = box[:, :2]
    grid = F.affine_grid(theta, [len(index), 3, size, size], align_corners=False)
    pixels = images.pixels[index].float().div_(255)
    return (F.grid_sample(pixels, grid, padding_mode='reflection', align_corners=False) - mean) / std


def center_boxes(images: Images, index: Tensor, crop_pct: float) -> Tensor:
    """The square in the middle whose side is ``crop_pct`` of the short side, as timm evaluates."""
    aspect = images.aspect[index]
    half = torch.stack([(1 / aspect).clamp(max=1), aspect.clamp(max=1)], 1) * crop_pct
    return torch.cat([torch.zeros_like(half), half], 1)


def random_boxes(
    images: Images, index: Tensor, scale: Tuple[float, float], generator: torch.Generator, tries: int = 10
) -> Tensor:
    """Boxes of random area, aspect ratio 3/4 to 4/3, place and mirroring, like torchvision's RandomResizedCrop.

    Of ``tries`` draws the first that fits is taken; where none fits, the middle of the image, as there.
    """
    device = generator.device

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(tries, len(index), device=device).uniform_(low, high, generator=generator)

    aspect = images.aspect[index]
    area, ratio = uniform(*scale), uniform(math.log(3 / 4), math.log(4 / 3)).exp()
    width, height = (area * ratio / aspect).sqrt(), (area / ratio * aspect).sqrt()  # as parts of the image
    fits = (width <= 1) & (height <= 1)
    first = fits.int().argmax(0, keepdim=True)
    half = torch.stack([t.gather(0, first)[0] for t in (width, height)], 1)
    bounded = aspect.clamp(3 / 4, 4 / 3) / aspect
    middle = torch.stack([bounded.clamp(max=1), (1 / bounded).clamp(max=1)], 1)
    half = torch.where(fits.any(0)[:, None], half, middle)
    place = torch.rand(len(index), 2, device=device, generator=generator) * 2 - 1
    mirror = torch.rand(len(index), device=device, generator=generator) < 0.5
    half_signed = torch.stack([torch.where(mirror, -half[:, 0], half[:, 0]), half[:, 1]], 1)
    return torch.cat([place * (1 - half), half_signed], 1)


def jitter(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Brightness, contrast and saturation of normalised images times 1 +- strength, each image by its own factors."""
    b, c, s = (
        torch.empty(len(x), 1, 1, 1, device=x.device).uniform_(1 - strength, 1 + strength, generator=generator)
        for _ in range(3)
    )
    x = x * b
    x = x.mean((1, 2, 3), keepdim=True).lerp(x, c)
    return x.mean(1, keepdim=True).lerp(x, s)


def batches(count: int, batch_size: int, generator: torch.Generator) -> List[Tensor]:
    """One epoch: every image once in random order, in batches of one size, which wraps around at the end."""
    steps = math.ceil(count / batch_size)
    order = torch.cat(
        [
            torch.randperm(count, device=generator.device, generator=generator)
            for _ in range(math.ceil(steps * batch_size / count))
        ]
    )
    return list(order[: steps * batch_size].split(batch_size))
