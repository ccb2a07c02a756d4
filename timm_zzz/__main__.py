"""Run ``python -m timm_zzz``: a command, which is imported when it runs, or one of timm's scripts."""

import importlib
import os
import re
import runpy
import sys
from typing import Dict, List, NoReturn

from . import __version__
from .errors import nearest
from .models.registry import did_you_mean

# What each command does, and an example
COMMANDS: Dict[str, str] = {
    'calibrate': """calibrate a checkpoint of train.py by a temperature fitted to held-out images
  python -m timm_zzz calibrate output/train/mine/model_best.pth.tar --data-dir DIR""",
    'check-hparams': """find errors in recipes for timm's train.py, before it trains
  python -m timm_zzz check-hparams mine.yaml --data-dir DIR""",
    'compare': """evaluate trained models, with ZZZ or other heads, on the same images, with a paired test
  python -m timm_zzz compare output/train/linear output/train/mine --data-dir DIR""",
    'demo': """train a ZZZ head and a linear head on generated images, and compare them
  python -m timm_zzz demo --output zzz-demo""",
    'fit': """fit the head in closed form to a folder of images, as a start for train.py
  python -m timm_zzz fit --config mine.yaml --data-dir DIR --num-classes N -o start.safetensors""",
    'hparams': """list the recipes for timm's train.py with what each is for, or print the path of one
  python train.py --config "$(python -m timm_zzz hparams quickstart_mobilenetv2_100.zzz_r8)" --data-dir DIR""",
    'predict': """name the most probable classes of images, and say which images are outlying
  python -m timm_zzz predict USER/bird-zzz photos""",
    'push': """push a run of train.py to the Hugging Face Hub, with a model card
  python -m timm_zzz push output/train/mine/model_best.pth.tar USER/bird-zzz --data-dir DIR""",
    'report': """write an HTML page about a trained model: confusions, spectra, calibration, outliers
  python -m timm_zzz report output/train/mine/model_best.pth.tar --data-dir DIR""",
}

_USAGE = """\
usage: python -m timm_zzz SCRIPT.py [ARGUMENTS ...]
       python -m timm_zzz COMMAND [ARGUMENTS ...]

Runs one of timm's scripts with the .zzz_rN model names registered, as if the script had been called directly:
  python -m timm_zzz validate.py --model mobilenetv2_100.zzz_r8 --checkpoint model_best.pth.tar --data-dir DIR
  torchrun --nproc-per-node 2 -m timm_zzz train.py --config RECIPE.yaml --data-dir DIR

commands:
{}
options:
  -h, --help     show this help; after a command, that command's
  -V, --version  show the version

exit status: 0 done, 1 check-hparams found an error, 2 wrong use, wrong input or a failure, 130 interrupted
"""


def usage() -> str:
    """Return the help text of ``python -m timm_zzz``."""
    lines = []
    for name, text in COMMANDS.items():
        what, example = text.split('\n')
        lines.append(f'  {name:13} {what}\n                {example}\n')
    return _USAGE.format(''.join(lines))


def fail(message: str) -> NoReturn:
    """Print an error and exit with status 2."""
    from .cli import common

    common.fail(message)


def run_script(path: str, arguments: List[str]) -> None:
    """Run a Python file in this process as ``python path arguments`` does, with its sys.argv and sys.path[0]."""
    if not os.path.exists(path):
        fail(f'no such script or command: {path}{nearest(path, COMMANDS)} (see python -m timm_zzz --help)')
    if os.path.isdir(path):
        fail(f'the script is a directory: {path}')
    try:
        with open(path, 'rb'):
            pass
    except OSError as e:
        fail(f"can't open the script: {e.strerror}: {path}")
    sys.argv = [path, *arguments]
    if not getattr(sys.flags, 'safe_path', False):
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    try:
        runpy.run_path(path, run_name='__main__')
    except RuntimeError as e:
        unknown = re.fullmatch(r'Unknown model \((.+)\)', str(e))  # timm's message, without the tag
        if unknown:
            values = (argument.rpartition('=')[2] for argument in arguments)
            name = next((value for value in values if value.partition('.')[0] == unknown[1]), unknown[1])
            e.args = (f'{e}{did_you_mean(name)}',)
        raise


def run_command(name: str, arguments: List[str]) -> None:
    """Run a command: the ``main`` of a module of :mod:`timm_zzz.cli`, which may return an exit status."""
    module = importlib.import_module(f'timm_zzz.cli.{name.replace("-", "_")}')
    sys.exit(module.main(arguments))


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments:
        print(usage(), end='', file=sys.stderr)
        sys.exit(2)
    first, *rest = arguments
    if first in ('-h', '--help'):
        print(usage(), end='')
    elif first in ('-V', '--version'):
        print(f'timm_zzz {__version__}')
    elif first in COMMANDS:
        run_command(first, rest)
    elif first.startswith('-'):
        fail(f'unknown option: {first} (see python -m timm_zzz --help)')
    else:
        run_script(first, rest)


if __name__ == '__main__':
    main()
