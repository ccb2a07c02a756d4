"""List the recipes installed with the package: ``python -m timm_zzz hparams``."""

import argparse
from typing import List, Optional

from ..data import shipped_files

__all__ = ['QUICKSTART', 'main']

QUICKSTART = 'quickstart_mobilenetv2_100.zzz_r8'  # the recipe to start with


def main(arguments: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(
        prog='python -m timm_zzz hparams',
        description="Recipes for timm's train.py: list them with what each is for, or print the path of one.",
    )
    parser.add_argument('name', nargs='?', help='name of a recipe, with or without .yaml')
    name: Optional[str] = parser.parse_args(arguments).name
    recipes = shipped_files('hparams', '.yaml')
    if name is None:
        for name, path in sorted(recipes.items(), key=lambda item: item[0] != QUICKSTART):
            print(f'{name:{max(map(len, recipes))}}', path.read_text(encoding='utf-8').partition('\n')[0].strip('# '))
        print(f'\nStart with {QUICKSTART}. At the top of each file are its commands.')
    elif name.removesuffix('.yaml') in recipes:
        print(recipes[name.removesuffix('.yaml')])
    else:
        parser.error(f'no recipe named {name} (there are: {", ".join(recipes)})')
