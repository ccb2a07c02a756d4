"""``python -m timm_zzz push``: what timm's train.py wrote, to the Hugging Face Hub."""

import argparse
import csv
import math
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Dict, List, Mapping, Optional, Tuple

import timm
import yaml
from huggingface_hub import EvalResult
from timm.data import create_dataset
from timm.models import clean_state_dict
from timm.utils.checkpoint_saver import load_checkpoint_metadata
from torch import nn

from ..arguments import checkpoint_file
from ..errors import HubError
from ..hub import push_to_hub, save_pretrained
from ..hub.cards import model_card, top1

__all__ = ['main', 'load_run', 'Run']

# Options of train.py that say how test images are prepared
_DATA_OPTIONS = ('input_size', 'img_size', 'in_chans', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')


@dataclass
class Run:
    """A model that train.py trained, and what it wrote about it."""

    model: nn.Module
    args: Mapping[str, Any]
    data_config: Dict[str, Any]
    epoch: Optional[int]
    summary: Optional[Path]
    top1: Optional[float] = None
    notes: List[str] = field(default_factory=list)  # why something is not on the card


def load_run(checkpoint: Path, *, use_ema: bool = False, model_name: Optional[str] = None) -> Run:
    """Read a checkpoint of train.py, with args.yaml and summary.csv if they lie beside it.

    Args:
        checkpoint: A ``.pth.tar`` file; read with ``weights_only``, so that no code of it runs.
        use_ema: Take the averaged weights.
        model_name: timm's name of the model, if neither the checkpoint nor args.yaml has it.

    Raises:
        ValueError: If the checkpoint is not one of train.py, is not of a ZZZ model or lacks what is asked for.
    """
    if not checkpoint.is_file():
        raise ValueError(f'no such checkpoint: {checkpoint}')
    try:
        saved = load_checkpoint_metadata(str(checkpoint))
    except Exception as e:  # whatever a broken archive or pickle raises
        raise ValueError(f"{checkpoint} can't be read as a checkpoint of train.py: {e}") from e
    if not isinstance(saved, dict) or not isinstance(saved.get('state_dict'), dict):
        raise ValueError(f'{checkpoint} is not a checkpoint of train.py: it has no state_dict')
    if use_ema and 'state_dict_ema' not in saved:
        raise ValueError(f'--use-ema: {checkpoint} has no averaged weights')
    args = vars(saved['args']) if 'args' in saved else {}
    args_file = checkpoint.with_name('args.yaml')
    if not args and args_file.is_file():
        args = yaml.safe_load(args_file.read_text(encoding='utf-8')) or {}
    name = model_name or args.get('model')
    if not name:
        raise ValueError('--model: neither the checkpoint nor an args.yaml beside it names the model')

    state = clean_state_dict(saved['state_dict_ema' if use_ema else 'state_dict'])
    model = _build(name, args, state)
    if not hasattr(model, 'zzz_options'):
        raise ValueError(f'{name} has no ZZZ head: push it with timm.models.push_to_hf_hub')
    try:
        model.load_state_dict(state)
    except RuntimeError as e:
        raise ValueError(f'{checkpoint} does not fit {name}: {e}') from e
    summary = checkpoint.with_name('summary.csv')
    run = Run(
        model=model,
        args=args,
        data_config={key: args[key] for key in _DATA_OPTIONS if args.get(key) not in (None, '')},
        epoch=saved.get('epoch'),
        summary=summary if summary.is_file() else None,
    )
    _read_metric(run, saved.get('metric'), use_ema)
    return run


def _build(name: str, args: Mapping[str, Any], state: Mapping[str, Any]) -> nn.Module:
    # As train.py builds it. The number of classes is the head's: args has none where it was the model's default.
    biases = {
        len(t) for key, t in state.items() if f'{key[: -len("bias")]}sigma2_raw' in state and key.endswith('bias')
    }
    if len(biases) != 1:
        raise ValueError(f'the checkpoint has no ZZZ head (or several of different sizes): was it trained as {name}?')
    size = args.get('input_size')
    options: Dict[str, Any] = dict(
        in_chans=args.get('in_chans') or (size[0] if size else 3),
        num_classes=biases.pop(),
        global_pool=args.get('gp'),
        bn_momentum=args.get('bn_momentum'),
        bn_eps=args.get('bn_eps'),
    )
    options.update(args.get('model_kwargs') or {})
    try:
        model = timm.create_model(name, **options)
        if any(key in state and state[key].shape != t.shape for key, t in model.state_dict().items()):
            # Newer versions of train.py build models of a fixed input size for the size that they train at.
            size = args.get('img_size') or (tuple(size[1:]) if size else None)
            if size and 'img_size' not in options:
                model = timm.create_model(name, img_size=size, **options)
    except (RuntimeError, ValueError, TypeError) as e:
        raise ValueError(f'{name}: {e}') from e
    return model


def _read_metric(run: Run, metric: Any, use_ema: bool) -> None:
    """Take the top-1 accuracy of the checkpoint's epoch, if it was measured with these weights."""
    if run.summary is None:
        run.notes.append('no summary.csv beside the checkpoint')
        return
    if not run.args.get('val_split', 'validation'):
        run.notes.append('there was no validation split')
        return
    ema_measured = bool(run.args.get('model_ema')) and not run.args.get('model_ema_force_cpu')
    if ema_measured != use_ema:
        kind = 'averaged' if ema_measured else 'raw'
        run.notes.append(f'summary.csv has the accuracy of the {kind} weights, not of those pushed')
        return
    with open(run.summary, newline='', encoding='utf-8') as file:
        rows = [row for row in csv.DictReader(file) if row.get('epoch') == str(run.epoch)]
    row = rows[-1] if rows else {}
    try:
        value = float(row['eval_top1'])
    except (KeyError, TypeError, ValueError):
        run.notes.append(f'summary.csv has no eval_top1 for epoch {run.epoch}')
        return
    name = run.args.get('eval_metric') or 'top1'
    logged = row.get(f'eval_{name}')
    if isinstance(metric, float) and logged and not math.isclose(metric, float(logged), rel_tol=1e-6):
        run.notes.append(f'summary.csv is of another run: {name} {logged}, the checkpoint says {metric}')
        return
    run.top1 = value


def class_names(run: Run, class_map: Optional[Path], data_dir: Optional[Path]) -> Optional[List[str]]:
    """Names of the classes by index, as timm's reader numbers them."""
    if class_map is None and data_dir is None:
        return None
    if class_map is not None and (class_map.suffix != '.txt' or not class_map.is_file()):
        raise ValueError(f'--class-map: expected a .txt file with one class per line: {class_map}')
    if data_dir is None:
        assert class_map is not None
        return [line.strip() for line in class_map.read_text(encoding='utf-8').splitlines() if line.strip()]
    if not data_dir.is_dir():
        raise ValueError(f'--data-dir: no such folder: {data_dir}')
    split = run.args.get('train_split') or 'train'
    try:
        mapping: Any = str(class_map or '')
        dataset: Any = create_dataset('', str(data_dir), split=split, class_map=mapping)
    except (RuntimeError, AssertionError, OSError) as e:
        raise ValueError(f'--data-dir: {data_dir} is not an ImageFolder with a split {split}: {e}') from e
    indices: Dict[str, int] = dataset.reader.class_to_idx
    return sorted(indices, key=lambda name: indices[name])


def public_args(args: Mapping[str, Any]) -> str:
    """args.yaml without the user's folders: of a path only its last component is kept."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, str) and (os.path.isabs(value) or re.search(r'[\\/]', value) and os.path.exists(value)):
            return os.path.basename(value.rstrip('\\/'))
        if isinstance(value, dict):
            return {key: cleaned(item) for key, item in value.items()}
        return [cleaned(item) for item in value] if isinstance(value, (list, tuple)) else value

    return yaml.safe_dump(cleaned(dict(args)), default_flow_style=False)


def _base_model(args: Mapping[str, Any]) -> Tuple[Optional[str], Optional[str]]:
    """Repository and licence of the weights that the run started from, if args says so without doubt."""
    if not args.get('pretrained') or any(args.get(key) for key in ('pretrained_path', 'initial_checkpoint')):
        return None, None
    name = re.sub(r'\.zzz_r\d+$', '', str(args.get('model')))
    if name.startswith('hf-hub:'):
        return name[len('hf-hub:') :].partition('@')[0], None
    try:
        cfg = timm.get_pretrained_cfg(name)
    except RuntimeError:
        return None, None
    source = cfg.hf_hub_id if cfg is not None else None
    return source, cfg.license if cfg is not None and source else None


def _training(run: Run, use_ema: bool, recipe: Optional[Path]) -> str:
    keys = ('opt', 'lr', 'lr_base', 'weight_decay', 'sched', 'epochs', 'batch_size', 'smoothing', 'mixup', 'cutmix')
    facts = ', '.join(f'{key} {run.args[key]}' for key in keys if run.args.get(key) not in (None, 0, 0.0))
    lines = [f"timm's train.py{f' with {facts}' if facts else ''}."]
    if run.epoch is not None:
        lines.append(f'Weights{" averaged by EMA" if use_ema else ""} after epoch {run.epoch}, counted from 0.')
    if run.args:
        lines.append('All arguments are in `args.yaml`, which `train.py --config` reads.')
    if recipe:
        lines.append('The recipe is `recipe.yaml`.')
    return '\n'.join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='python -m timm_zzz push',
        description="Push what timm's train.py wrote to the Hugging Face Hub: weights, config, class names, card, "
        'args.yaml (without your folders) and summary.csv. A card that is there is written anew. The token is that of '
        '`hf auth login` or HF_TOKEN.',
    )
    parser.add_argument('checkpoint', type=Path, help="e.g. output/train/NAME/model_best.pth.tar, or the run's folder")
    parser.add_argument('repo_id', help='user/name; made if it does not exist')
    parser.add_argument('--use-ema', action='store_true', help='push the averaged weights')
    parser.add_argument('--class-map', type=Path, metavar='FILE.txt', help='class names, one per line')
    parser.add_argument('--data-dir', type=Path, metavar='DIR', help='the ImageFolder, for the class names')
    parser.add_argument('--recipe', type=Path, metavar='FILE.yaml', help='the recipe that train.py was given')
    parser.add_argument('--dataset-name', metavar='NAME', help='for the card; by default the name of the data folder')
    parser.add_argument(
        '--license', metavar='ID', help="licence of the weights, e.g. apache-2.0; the backbone's if known"
    )
    parser.add_argument('--model', metavar='NAME', help="timm's name of the model, if the checkpoint has none")
    parser.add_argument('--revision', help='branch to commit to')
    parser.add_argument('--private', action='store_true', default=None, help='make a new repository private')
    parser.add_argument('--create-pr', action='store_true', help='open a pull request')
    parser.add_argument('--message', default='Add model', help='commit message')
    parser.add_argument('--output', type=Path, metavar='DIR', help='write everything to a folder instead of pushing it')
    return parser


def main(arguments: Optional[List[str]] = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        print(_push(options))
    except (HubError, ValueError, OSError) as e:
        parser.exit(1, f'timm_zzz: error: {e}\n')


def _push(options: argparse.Namespace) -> str:
    checkpoint = checkpoint_file(options.checkpoint)
    if options.recipe and not options.recipe.is_file():
        raise ValueError(f'--recipe: no such file: {options.recipe}')
    run = load_run(checkpoint, use_ema=options.use_ema, model_name=options.model)
    names = class_names(run, options.class_map, options.data_dir)
    if names is None:
        print('No class names: neither --class-map nor --data-dir was given.', file=sys.stderr)

    results: List[EvalResult] = []
    dataset = options.dataset_name or run.args.get('dataset') or Path(run.args.get('data_dir') or '').name
    if run.top1 is not None and not dataset:
        run.notes.append('the data set has no name: give --dataset-name')
    elif run.top1 is not None:
        results = [top1(run.top1, dataset, run.args.get('val_split') or 'validation')]
    for note in run.notes:
        print(f'No result on the card: {note}.', file=sys.stderr)
    base_model, base_license = _base_model(run.args)
    card = model_card(
        run.model,
        options.repo_id,
        results=results,
        results_command="# timm's train.py, at the end of that epoch; hardware and versions were not recorded\n"
        'python train.py --config args.yaml --data-dir DIR',
        training=_training(run, options.use_ema, options.recipe),
        license=options.license or base_license,
        base_model=base_model,
    )
    with TemporaryDirectory() as temporary:
        files = {}
        if run.args:
            (Path(temporary) / 'args.yaml').write_text(public_args(run.args), encoding='utf-8')
            files['args.yaml'] = Path(temporary) / 'args.yaml'
        if run.summary:
            files['summary.csv'] = run.summary
        if options.recipe:
            files['recipe.yaml'] = options.recipe
        if options.output is not None:
            folder = save_pretrained(run.model, options.output, label_names=names, data_config=run.data_config)
            card.save(folder / 'README.md')
            for name, path in files.items():
                (folder / name).write_bytes(path.read_bytes())
            return str(folder)
        commit = push_to_hub(
            run.model,
            options.repo_id,
            revision=options.revision,
            private=options.private,
            create_pr=options.create_pr,
            commit_message=options.message,
            label_names=names,
            data_config=run.data_config,
            card=card,
            files=files,
        )
    return str(commit.pr_url or commit.commit_url)
