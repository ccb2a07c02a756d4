"""``python -m timm_zzz hparams``: the recipes that travel with the package."""

import argparse
from typing import List, Optional

from ..data import shipped_files

__all__ = ['main']


def main(arguments: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(
        prog='python -m timm_zzz hparams',
        description="Recipes for timm's train.py: list them, or print the path of one.",
    )
    parser.add_argument('name', nargs='?', help='name of a recipe, with or without .yaml')
    name: Optional[str] = parser.parse_args(arguments).name
    recipes = shipped_files('hparams', '.yaml')
    if name is None:
        print('\n'.join(recipes))
    elif name.removesuffix('.yaml') in recipes:
        print(recipes[name.removesuffix('.yaml')])
    else:
        parser.error(f'no recipe named {name} (there are: {", ".join(recipes)})')
