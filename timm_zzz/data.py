"""Images, loaders and devices for the command lines, as timm has them, with errors that name the option."""

from pathlib import Path
from typing import Any, Dict, Union

import torch
from timm.data import create_dataset, create_loader

__all__ = ['device_of', 'evaluation_loader', 'open_images']


def device_of(name: str) -> torch.device:
    """The device of ``--device``; a ValueError if it is not there."""
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f'--device: {name} is not available: {e}') from e


def open_images(
    dataset: str, data_dir: Path, split: str, class_map: Union[str, Dict[str, int]], channels: int, batch_size: int
) -> Any:
    """timm's data set of a split; a ValueError if there is none."""
    try:
        return create_dataset(
            dataset,
            root=str(data_dir),
            split=split,
            class_map=class_map,  # type: ignore[arg-type]
            input_img_mode='RGB' if channels == 3 else 'L',
            batch_size=batch_size,
        )
    except (RuntimeError, AssertionError, OSError, ImportError, ValueError) as e:
        raise ValueError(f'--data-dir: {data_dir} has no images of a split {split}: {e}') from e


def evaluation_loader(dataset: Any, config: Dict[str, Any], batch_size: int, workers: int, device: torch.device) -> Any:
    """timm's loader with the transforms of validation; ``config`` is what ``resolve_data_config`` gives."""
    return create_loader(
        dataset,
        input_size=config['input_size'],
        batch_size=batch_size,
        interpolation=config['interpolation'],
        mean=config['mean'],
        std=config['std'],
        num_workers=workers,
        crop_pct=config['crop_pct'],
        crop_mode=config['crop_mode'],
        pin_memory=device.type == 'cuda',
        device=device,
        persistent_workers=False,
    )
