"""Push a run of timm's train.py to the Hugging Face Hub: ``python -m timm_zzz push``."""

import argparse
import os
import re
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Dict, List, Mapping, Optional

import yaml
from huggingface_hub import ModelCard

from ..hub import push_to_hub, save_pretrained
from ..hub.cards import license_of, model_card, top1
from ..hub.onnx import export_onnx
from .calibrate import calibrate_run
from .common import exit_on_error, one_line
from .run import CARD_OPTIONS, Run, add_images_arguments, class_names, load_run

__all__ = ['main', 'public_args', 'push_run', 'run_card']

_COMMAND = """\
# timm's train.py, at the end of that epoch; hardware and versions were not recorded
python train.py --config args.yaml --data-dir DIR"""


def public_args(args: Mapping[str, Any]) -> str:
    """Write arguments as YAML, without the user's folders: only the last component of a path is kept.

    Raises:
        ValueError: If a value can't be written as YAML.
    """

    def cleaned(value: Any) -> Any:
        if isinstance(value, str) and (os.path.isabs(value) or re.search(r'[\\/]', value) and os.path.exists(value)):
            return os.path.basename(value.rstrip('\\/'))
        if isinstance(value, dict):
            return {key: cleaned(item) for key, item in value.items()}
        return [cleaned(item) for item in value] if isinstance(value, (list, tuple)) else value

    try:
        return yaml.safe_dump(cleaned(dict(args)), default_flow_style=False)
    except (yaml.YAMLError, RecursionError) as e:
        raise ValueError(f"the run's arguments can't be written as YAML: {one_line(e)}") from e


def run_card(
    run: Run,
    repo_id: str,
    *,
    dataset: Optional[str],
    license: Optional[str],
    recipe: bool,
    onnx: bool = False,
    names: Optional[List[str]] = None,
) -> ModelCard:
    """Create the model card of a run; if it has no result, add the reason to ``run.notes``.

    Args:
        dataset: Name of the data set; by default that of the run's data set or data folder.
        license: Licence of the weights; by default that of the backbone's weights, if the run says which they were.
        recipe: Whether recipe.yaml is pushed with the card.
        onnx: Whether model.onnx is pushed with the card.
        names: Class names in the order of the logits.
    """
    args = run.args
    dataset = dataset or args.get('dataset') or Path(args.get('data_dir') or '').name
    results = []
    if run.top1 is not None and dataset:
        results = [top1(run.top1, dataset, args.get('val_split') or 'validation')]
    elif run.top1 is not None:
        run.notes.append('the data set has no name: give --dataset-name')
    facts = ', '.join(f'{key} {args[key]}' for key in _acted(args))
    training = f"timm's train.py{f' with {facts}' if facts else ''}."
    if run.epoch is not None:
        training += f'\nWeights{" averaged by EMA" if run.averaged else ""} after epoch {run.epoch}, counted from 0.'
    if args:
        training += '\nAll arguments are in `args.yaml`, which `train.py --config` reads.'
    if recipe:
        training += '\nThe recipe is `recipe.yaml`.'
    if run.calibration:
        training += f'\n\n{run.calibration}'
    base_model = _base_model(run)
    weights: Dict[str, Any] = dict(base_model=base_model, license=license or (None if base_model else 'unknown'))
    weights.update(data_config=run.data_config, training=training, onnx=onnx, label_names=names or ())
    return model_card(run.model, repo_id, results=results, results_command=_COMMAND, **weights)


def _acted(args: Mapping[str, Any]) -> List[str]:
    """List the options of train.py to name on the card, without those that had no effect."""
    off = {'lr_base'} if args.get('lr') else set()
    off |= {'mixup', 'cutmix'} if args.get('mixup_prob') == 0 else set()
    return [key for key in CARD_OPTIONS if key not in off and args.get(key) not in (None, 0, '', 'none')]


def _base_model(run: Run) -> Optional[str]:
    """Return the repository of the weights that a run started from; None if its arguments leave doubt."""
    cfg: Dict[str, Any] = run.model.pretrained_cfg  # type: ignore[assignment]
    elsewhere = run.args.get('pretrained_path') or run.args.get('initial_checkpoint')
    if not run.args.get('pretrained') or elsewhere or not cfg.get('hf_hub_id'):
        return None
    return str(cfg['hf_hub_id']).partition('@')[0]


def push_run(
    run: Run,
    repo_id: str,
    card: ModelCard,
    *,
    names: Optional[List[str]] = None,
    recipe: Optional[Path] = None,
    onnx: bool = False,
    output: Optional[Path] = None,
    **commit: Any,
) -> str:
    """Push the model of a run with its card, args.yaml, summary.csv and recipe.

    Args:
        names: Class names in the order of the logits.
        recipe: File to push as recipe.yaml.
        onnx: Export the model as model.onnx, too.
        output: Write all files to this folder instead of pushing them.
        commit: Further arguments of :func:`~timm_zzz.push_to_hub`.

    Returns:
        URL of the commit or pull request, or the folder.
    """
    saving: Dict[str, Any] = dict(label_names=names, data_config=run.data_config)
    with TemporaryDirectory() as temporary:
        args_file = Path(temporary) / 'args.yaml'
        args_file.write_text(public_args(run.args), encoding='utf-8')
        sources = {'args.yaml': args_file if run.args else None, 'summary.csv': run.summary, 'recipe.yaml': recipe}
        files = {name: path for name, path in sources.items() if path}
        if onnx:
            files['model.onnx'] = Path(temporary) / 'model.onnx'
            export_onnx(run.model, files['model.onnx'], run.data_config)
        if output is None:
            info = push_to_hub(run.model, repo_id, card=card, files=files, **saving, **commit)
            return str(info.pr_url or info.commit_url)
        card.save(save_pretrained(run.model, output, license=license_of(card.data), **saving) / 'README.md')
        (output / 'model.onnx').unlink(missing_ok=True)  # an older export has other weights
        for name, path in files.items():
            shutil.copyfile(path, output / name)
    return str(output)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='python -m timm_zzz push',
        description="Push what timm's train.py wrote to the Hugging Face Hub: weights, config, class names, card, "
        'args.yaml (without your folders) and summary.csv. An existing card is replaced. The token is that of '
        '`hf auth login` or HF_TOKEN.',
    )
    add = parser.add_argument
    add('checkpoint', type=Path, help="e.g. output/train/NAME/model_best.pth.tar, or the run's folder")
    add('repo_id', help='user/name; made if it does not exist')
    add('--use-ema', action='store_true', help='push the averaged weights')
    add('--class-map', type=Path, metavar='FILE.txt', help='class names, one per line')
    add('--data-dir', type=Path, metavar='DIR', help='the ImageFolder, for the class names and --calibrate')
    add('--recipe', type=Path, metavar='FILE.yaml', help='the recipe that train.py was given')
    add('--dataset-name', metavar='NAME', help='for the card; by default the name of the data folder')
    add('--license', metavar='ID', help="licence of the weights, e.g. apache-2.0; by default the backbone's, if known")
    add('--model', metavar='NAME', help="timm's name of the model, if the checkpoint has none")
    add('--revision', help='branch to commit to')
    add('--private', action='store_true', default=None, help='make a new repository private')
    add('--create-pr', action='store_true', help='open a pull request')
    add('--message', dest='commit_message', metavar='TEXT', default='Add model', help='commit message')
    add('--output', type=Path, metavar='DIR', help='write everything to a folder instead of pushing it')
    help = 'divide the logits by the temperature of the held-out images in --data-dir, as the command calibrate does'
    add('--calibrate', action='store_true', help=help)
    help = 'add model.onnx, which runs without this package; the card shows how'
    add('--onnx', action='store_true', help=help)
    add_images_arguments(parser.add_argument_group('with --calibrate'))
    return parser


def main(arguments: Optional[List[str]] = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    recipe: Optional[Path] = options.recipe
    with exit_on_error(parser):
        if recipe and not recipe.is_file():
            raise ValueError(f'--recipe: no such file: {recipe}')
        if options.calibrate and not options.data_dir:
            raise ValueError('--calibrate: it needs held-out images, give --data-dir')
        if not options.calibrate and (options.dataset is not None or options.split != parser.get_default('split')):
            raise ValueError('--dataset, --split: they name the images of --calibrate; a card has --dataset-name')
        run = load_run(options.checkpoint, use_ema=options.use_ema, model_name=options.model)
        names = class_names(run, options.class_map, options.data_dir)
        if names is None:
            print('No class names: neither --class-map nor --data-dir was given.', file=sys.stderr)
        if options.calibrate:
            calibrate_run(run, options)
            print(run.calibration, file=sys.stderr)
        about: Dict[str, Any] = dict(dataset=options.dataset_name, license=options.license, recipe=bool(recipe))
        about.update(onnx=options.onnx, names=names)
        card = run_card(run, options.repo_id, **about)
        for note in run.notes:
            print(f'No result on the card: {note}.', file=sys.stderr)
        commit = {key: getattr(options, key) for key in ('revision', 'private', 'create_pr', 'commit_message')}
        print(
            push_run(
                run,
                options.repo_id,
                card,
                names=names,
                recipe=recipe,
                onnx=options.onnx,
                output=options.output,
                **commit,
            )
        )
