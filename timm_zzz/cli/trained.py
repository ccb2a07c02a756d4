"""Load trained models from checkpoints of train.py, outputs of fit, folders of weights and the Hub."""

import json
import re
from pathlib import Path
from typing import Any, Dict, Optional

import timm
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open

from ..hub.client import translated
from ..hub.config import CONFIG, is_of_zzz_model
from ..hub.load import from_pretrained
from ..models.checkpoint import load_weights
from ..models.predict import label_names
from .common import one_line
from .run import Run, build_for, checked_args, data_config_of_args, load_run

__all__ = ['SOURCES', 'load_trained']

SOURCES = 'a checkpoint or run of train.py, an output of fit, a folder of save_pretrained, or OWNER/NAME on the Hub'
_REPOSITORY = re.compile(r'(hf[-_]hub:)?([\w.-]+/[\w.-]+)(@[\w./-]+)?')


def load_trained(source: str, *, use_ema: bool = False, model_name: Optional[str] = None) -> Run:
    """Load a trained model with any head; no code in the files runs.

    Args:
        source: One of :data:`SOURCES`.
        use_ema: Take the averaged weights of a checkpoint.
        model_name: timm's name of the model, for a checkpoint without one.

    Raises:
        ValueError: If the source does not exist, or can't be read as a trained model.
        HubError: As :func:`timm_zzz.from_pretrained`.
    """
    path = Path(source.removeprefix('local-dir:'))
    if path.suffix == '.safetensors' and path.is_file():
        return _fitted(path, model_name)
    if path.is_file() or path.is_dir() and not (path / CONFIG).is_file():
        return load_run(path, use_ema=use_ema, model_name=model_name, any_head=True)
    is_path = path.is_dir() or path.is_absolute() or Path(path.parts[0]).exists() or path.parts[0] in ('.', '..')
    repository = None if is_path else _REPOSITORY.fullmatch(source)
    if repository is None and not path.is_dir():
        raise ValueError(f'{source}: no such file or folder; expected {SOURCES}')
    return _saved(path, repository and repository[2], repository and (repository[3] or '')[1:] or None)


def _saved(path: Path, repo_id: Optional[str], revision: Optional[str]) -> Run:
    """Load a model saved by save_pretrained, push or timm from a folder or repository; without a ZZZ head, by timm."""
    name, config = str(path), path / CONFIG
    if repo_id:
        name = f'{repo_id}@{revision}' if revision else repo_id
        with translated(repo_id, revision, CONFIG):
            config = Path(hf_hub_download(repo_id, CONFIG, revision=revision))
    model: Any
    if is_of_zzz_model(config):
        model = from_pretrained(name)
    else:
        try:
            model = timm.create_model(f'{"hf-hub" if repo_id else "local-dir"}:{name}', pretrained=True)
        except Exception as e:  # timm may raise anything for a foreign file
            raise ValueError(f'{name}: {one_line(e)}') from e
    return Run(Path(name), model, names=label_names(model))


def _fitted(path: Path, model_name: Optional[str]) -> Run:
    """Load an output of the command fit."""
    try:
        with safe_open(path, 'pt') as file:
            about: Dict[str, str] = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}
        args, names = (json.loads(about.get(key) or empty) for key, empty in (('args', '{}'), ('class_names', '[]')))
    except (SafetensorError, ValueError) as e:
        raise ValueError(f"{path} can't be read as an output of fit: {one_line(e)}") from e
    args = checked_args(args, path)
    name = model_name or about.get('model')
    if not name:
        raise ValueError(f'--model: {path} does not name the model: give its name in timm')
    model = build_for(name, args, state, any_head=True)
    load_weights(model, state, str(path))
    return Run(path, model, args=args, data_config=data_config_of_args(args), names=[str(name) for name in names])
