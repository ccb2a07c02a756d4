"""What the command lines of this package share."""

import argparse
from pathlib import Path

__all__ = ['checkpoint_file', 'positive_int']


def positive_int(text: str) -> int:
    """Type of an argument that is at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'expected at least 1, got {value}')
    return value


def checkpoint_file(path: Path) -> Path:
    """The checkpoint that a file, or the folder of a run of train.py, stands for."""
    return path / 'model_best.pth.tar' if path.is_dir() else path
