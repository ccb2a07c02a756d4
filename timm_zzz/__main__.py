"""Command line: ``python -m timm_zzz``."""

import argparse
import os
import runpy
import sys
from typing import Callable, Dict, List, NoReturn, Optional

from . import __version__
from .resources import data_files

_HELP = """\
usage: python -m timm_zzz SCRIPT.py [ARGUMENTS ...]
       python -m timm_zzz COMMAND [ARGUMENTS ...]

Runs one of timm's scripts with the .zzz_rN model names registered, as if the script had been called directly:
  python -m timm_zzz validate.py --model mobilenetv2_100.zzz_r8 --checkpoint model_best.pth.tar --data-dir DIR
  torchrun --nproc-per-node 2 -m timm_zzz train.py --config RECIPE.yaml --data-dir DIR

commands:
  check-hparams
            say what is wrong with recipes for timm's train.py, before it trains
              python -m timm_zzz check-hparams mine.yaml
  demo      train a ZZZ head and a linear head on images drawn on the spot, and compare them
              python -m timm_zzz demo --output zzz-demo
  fit       fit the head in closed form to a folder of images, as a start for train.py
              python -m timm_zzz fit --model resnet50.zzz_r8 --pretrained --data-dir DIR -o start.safetensors
  hparams   list the recipes for timm's train.py, or print the path of one
              python train.py --config "$(python -m timm_zzz hparams quickstart_mobilenetv2_100.zzz_r8)" --data-dir DIR

  push      push what train.py wrote to the Hugging Face Hub, with a model card
              python -m timm_zzz push output/train/mine/model_best.pth.tar USER/bird-zzz --data-dir DIR
  report    write an HTML page about what train.py trained: confusions, spectra, calibration, outliers
              python -m timm_zzz report output/train/mine/model_best.pth.tar --data-dir DIR

options:
  -h, --help     show this help; after a command, that command's
  -V, --version  show the version
"""


def _fail(message: str) -> NoReturn:
    print(f'timm_zzz: error: {message}', file=sys.stderr)
    sys.exit(2)


def run_script(path: str, arguments: List[str]) -> None:
    """Run a Python file as ``python path arguments`` would, in this process: sys.argv, sys.path[0] and ``__main__``."""
    if not os.path.exists(path):
        _fail(f'no such script or command: {path} (see python -m timm_zzz --help)')
    if os.path.isdir(path):
        _fail(f'the script is a directory: {path}')
    try:
        with open(path, 'rb'):
            pass
    except OSError as e:
        _fail(f"can't open the script: {e.strerror}: {path}")
    sys.argv = [path, *arguments]
    if not getattr(sys.flags, 'safe_path', False):
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    runpy.run_path(path, run_name='__main__')


def _hparams(arguments: List[str]) -> None:
    parser = argparse.ArgumentParser(
        prog='python -m timm_zzz hparams',
        description="Recipes for timm's train.py: list them, or print the path of one.",
    )
    parser.add_argument('name', nargs='?', help='name of a recipe, with or without .yaml')
    name: Optional[str] = parser.parse_args(arguments).name
    recipes = data_files('hparams', '.yaml')
    if name is None:
        print('\n'.join(recipes))
        return
    path = recipes.get(name[: -len('.yaml')] if name.endswith('.yaml') else name)
    if path is None:
        _fail(f'no recipe named {name} (there are: {", ".join(recipes)})')
    print(path)


def _check_hparams(arguments: List[str]) -> None:
    from .cli.check_hparams import main

    sys.exit(main(arguments))


def _demo(arguments: List[str]) -> None:
    from .cli.demo import main

    main(arguments)


def _fit(arguments: List[str]) -> None:
    from .cli.fit import main

    main(arguments)


def _push(arguments: List[str]) -> None:
    from .cli.push import main

    main(arguments)


def _report(arguments: List[str]) -> None:
    from .cli.report import main

    main(arguments)


_COMMANDS: Dict[str, Callable[[List[str]], None]] = {
    'check-hparams': _check_hparams,
    'demo': _demo,
    'fit': _fit,
    'hparams': _hparams,
    'push': _push,
    'report': _report,
}


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments:
        print(_HELP, end='', file=sys.stderr)
        sys.exit(2)
    first, *rest = arguments
    if first in ('-h', '--help'):
        print(_HELP, end='')
    elif first in ('-V', '--version'):
        print(f'timm_zzz {__version__}')
    elif first in _COMMANDS:
        _COMMANDS[first](rest)
    elif first.startswith('-'):
        _fail(f'unknown option: {first} (see python -m timm_zzz --help)')
    else:
        run_script(first, rest)


if __name__ == '__main__':
    main()
