"""Load a model with a ZZZ head from the Hugging Face Hub or a folder."""

import logging
import os
import re
from pathlib import Path
from typing import Any, Dict, Optional, Tuple, Union, cast

import timm
from huggingface_hub import errors as client_errors
from huggingface_hub import hf_hub_download
from torch import nn

from .. import __version__
from ..errors import CheckpointError, HubError, NotFoundError
from ..models.predict import keep_percentiles
from .client import TransportError, translated
from .config import CONFIG, PERCENTILES, SECTION, WEIGHTS, Changed, Corrupt, check_weights, read_config

__all__ = ['from_pretrained', 'load_folder']

_logger = logging.getLogger(__name__)


def from_pretrained(
    repo_id_or_folder: Union[str, os.PathLike],
    *,
    revision: Optional[str] = None,
    token: Union[str, bool, None] = None,
    cache_dir: Union[str, os.PathLike, None] = None,
    local_files_only: bool = False,
    check_sha256: bool = True,
    **model_args: Any,
) -> nn.Module:
    """Load a model with a ZZZ head from the Hugging Face Hub or from a folder.

    The model is that of ``timm.create_model('hf-hub:...', pretrained=True)``. It is loaded after these checks:

    - config.json has only keys and values that are allowed.
    - The shapes of the weights fit config.json.
    - config.json and the weights are from the same commit.
    - The SHA-256 of the weights is the one in config.json. Files that timm wrote have none.

    No pickle is ever read.

    Args:
        repo_id_or_folder: ``user/name``, a folder, or timm's ``hf-hub:user/name@revision`` or ``local-dir:folder``.
        revision: Branch, tag, commit or ``refs/pr/N``; the default branch if None.
        token: Access token for a private repository; by default that of ``hf auth login`` or HF_TOKEN.
        cache_dir: Cache folder; huggingface_hub's own if None.
        local_files_only: Use only files in the cache.
        check_sha256: False to load a folder whose weights were changed after saving. Shapes are always checked, and the
            SHA-256 of downloaded weights too.
        model_args: Arguments of ``create_model`` that differ from the saved ones. A different ``num_classes`` keeps the
            backbone and gives a new head; ``num_classes=0`` gives features; ``in_chans`` and ``img_size`` adapt the
            weights as timm does.

    Returns:
        The model in training mode, as from ``create_model``; call ``.eval()`` to predict. Weights are float32, whatever
        their dtype in the file, unless ``dtype`` is given.

    Raises:
        HubError: Usually one of its five subclasses in :mod:`timm_zzz.errors`.
        ValueError: For a malformed repository id, or ``check_sha256=False`` with a repository.

    Example:
        >>> model = from_pretrained('someone/bird-zzz', num_classes=5)  # doctest: +SKIP
    """
    place, revision = _locate(repo_id_or_folder, revision)
    if isinstance(place, Path):
        for name in (CONFIG, WEIGHTS):
            if not (place / name).is_file():
                raise NotFoundError(f'{place} has no {name}')
        try:
            return load_folder(place, read_config(place / CONFIG), model_args, check_sha256=check_sha256)
        except Changed as e:
            raise CheckpointError(f'{e}. If you changed it yourself, pass check_sha256=False.') from e
    if not check_sha256:
        raise ValueError(f'check_sha256: what is downloaded is always compared; {place} is not a folder')

    options: Dict[str, Any] = dict(token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    config_file = _download(place, CONFIG, revision, options)
    commit = config_file.parent.name  # .../snapshots/COMMIT/config.json
    if not re.fullmatch('[0-9a-f]{40}', commit):
        raise HubError(f'{place}: no commit in the path of the downloaded file: {config_file}')
    config = read_config(config_file)
    weights_file = _download(place, WEIGHTS, commit, options)
    try:
        model = load_folder(weights_file.parent, config, model_args)
    except Corrupt as e:
        try:
            _drop(weights_file)
            advice = 'It was dropped from the cache: call again to download it.'
        except OSError as not_dropped:  # e.g. a cache owned by another user
            advice = f'It is still in the cache ({not_dropped}): delete it, or give another cache_dir.'
        raise CheckpointError(f'{place}: {e}. {advice}') from e
    cfg: Dict[str, Any] = cast(Any, model).pretrained_cfg
    cfg.pop('file', None)
    cfg.update(source='hf-hub', hf_hub_id=f'{place}@{commit}')
    return model


def load_folder(
    folder: Path, config: Dict[str, Any], model_args: Dict[str, Any], *, check_sha256: bool = True
) -> nn.Module:
    """Check the weights in a folder and load a model from it; ``config`` is from :func:`read_config`."""
    check_weights(folder, config, check_sha256=check_sha256)
    try:
        model = timm.create_model(f'local-dir:{folder}', pretrained=True, **model_args)
    except RuntimeError as e:
        if model_args:  # they may not fit the saved model
            raise
        raise CheckpointError(f'{folder / WEIGHTS} does not hold the model of {CONFIG}: {e}') from e
    if PERCENTILES in config.get(SECTION, {}):
        keep_percentiles(model, config[SECTION][PERCENTILES])
    return model


def _locate(location: Union[str, os.PathLike], revision: Optional[str]) -> Tuple[Union[Path, str], Optional[str]]:
    """Split a location into a folder (a path) or a repository (a string), and the revision."""
    source, _, rest = os.fspath(location).partition(':')
    hub = source in ('hf-hub', 'hf_hub')
    folder = Path(rest if source == 'local-dir' else location)
    if not hub and (source == 'local-dir' or not isinstance(location, str) or folder.is_dir()):
        if not folder.is_dir():
            raise NotFoundError(f'no such folder: {folder}')
        return folder, None
    repo_id, _, inline = (rest if hub else str(location)).partition('@')
    if inline and revision not in (None, inline):
        raise ValueError(f'revision: got {revision!r}, but the name says {inline!r}')
    return repo_id, inline or revision


def _download(repo_id: str, filename: str, revision: Optional[str], options: Dict[str, Any]) -> Path:
    options = dict(options, revision=revision, library_name='timm_zzz', library_version=__version__)
    with translated(repo_id, revision, filename):
        try:
            return Path(hf_hub_download(repo_id, filename, **options))
        except TransportError as e:
            if isinstance(e, client_errors.HfHubHTTPError):
                raise
            try:  # The client itself falls back to the cache only after some errors.
                path = hf_hub_download(repo_id, filename, **{**options, 'local_files_only': True})
            except client_errors.LocalEntryNotFoundError:
                raise e from None
            _logger.warning(f'{repo_id}: the Hub did not answer ({e}), using {filename} from the cache.')
            return Path(path)


def _drop(path: Path) -> None:
    """Delete a file in the cache and the target of its link."""
    for file in (path.resolve(), path):
        file.unlink(missing_ok=True)
