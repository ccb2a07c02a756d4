"""Files that come with the package: recipes and model cards."""

from pathlib import Path
from typing import Dict

__all__ = ['data_files']


def data_files(folder: str, suffix: str) -> Dict[str, Path]:
    """Files of a data folder by name without suffix: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for parent in (package, package.parent):
        if (parent / folder).is_dir():
            return {path.name[: -len(suffix)]: path for path in sorted((parent / folder).glob(f'*{suffix}'))}
    return {}
