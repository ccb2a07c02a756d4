"""Save, push and load models with a ZZZ head: timm's file formats, with checks around them.

A folder or repository holds timm's config.json, with the SHA-256 of the weights in a section of ours that timm ignores,
and model.safetensors. timm reads what this module writes and the other way round.
"""

import json
import logging
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union, cast

import safetensors
import timm
import torch
import yaml
from huggingface_hub import CommitInfo, HfApi, ModelCard, hf_hub_download
from huggingface_hub import errors as hub_errors
from timm.utils import unwrap_model
from torch import Tensor, nn

from ..errors import AccessError, CheckpointError, HubError, NotFoundError, UnavailableError
from ..head import ZZZHead
from ..models._timm import recorded_args
from ..models.attach import find_classifiers
from ..version import __version__
from .config import CONFIG, SECTION, WEIGHTS, Corrupt, check_weights, read_config, sha256, some

__all__ = ['save_pretrained', 'push_to_hub', 'from_pretrained']

_logger = logging.getLogger(__name__)

_Labels = Union[Sequence[str], Mapping[int, str]]

# The HTTP library's base class of everything that goes wrong on the way; which library it is depends on the client.
_TRANSPORT_ERROR = cast(Any, hub_errors.HfHubHTTPError.__bases__[0])
_COMMIT = re.compile(r'[0-9a-f]{40}')

# --- save -------------------------------------------------------------------------------------------------------------


def save_pretrained(
    model: nn.Module,
    folder: Union[str, os.PathLike],
    *,
    label_names: Optional[_Labels] = None,
    model_args: Optional[Dict[str, Any]] = None,
    data_config: Optional[Dict[str, Any]] = None,
) -> Path:
    """Write config.json and model.safetensors, having reloaded and compared them tensor by tensor.

    Args:
        model: A model with a ZZZ head made by ``timm.create_model`` or :func:`~timm_zzz.attach`, or one made so with
            ``num_classes=0``; wrappers of DistributedDataParallel and torch.compile are taken off.
        folder: Where to write; made if need be. Other files in it stay. Nothing is written if a check fails.
        label_names: Names of the classes in the order of the logits.
        model_args: Arguments of ``create_model`` that the model needs and that it has not recorded itself, e.g. a
            layer type as a string that was given as a class.
        data_config: Preprocessing at test time where it differs from the model's: input_size, mean, std,
            interpolation, crop_pct, crop_mode.

    Returns:
        The folder.

    Raises:
        ValueError: If the model has no ZZZ head, was not made by timm, or the label names don't fit.
        CheckpointError: If what was written does not give the same model again.
        ConfigError: If the model was built with arguments that a config may not hold.
    """
    model = unwrap_model(model)
    _check_model(model)
    folder = Path(folder)
    config: Dict[str, Any] = {}
    if label_names is not None:
        config['label_names'] = _check_labels(label_names, int(cast(Any, model).num_classes))
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix='.saving-') as temporary:
        new = Path(temporary)
        # Tied or channels-last tensors have no place in a safetensors file until each owns its memory.
        handle = model.register_state_dict_post_hook(_own_memory)
        try:
            timm.models.save_for_hf(
                model,
                str(new),
                model_config=config,
                model_args=model_args,
                data_config=data_config,
                safe_serialization=True,
            )
        finally:
            handle.remove()
        written = json.loads((new / CONFIG).read_text(encoding='utf-8'))
        written[SECTION] = dict(version=__version__, weights_sha256=sha256(new / WEIGHTS))
        (new / CONFIG).write_text(json.dumps(written, indent=2) + '\n', encoding='utf-8')
        _compare(model, new)
        for name in (WEIGHTS, CONFIG):
            os.replace(new / name, folder / name)
    return folder


def _check_model(model: nn.Module) -> None:
    if not getattr(model, 'pretrained_cfg', None) or recorded_args(model) is None:
        raise ValueError(f'{type(model).__name__}: expected a model made by timm.create_model')
    if not hasattr(model, 'zzz_options'):
        raise ValueError(
            f'{type(model).__name__} has no ZZZ head: attach one with timm_zzz.attach(model), '
            f'or push it with timm.models.push_to_hf_hub'
        )
    heads = [type(m).__name__ for m in find_classifiers(model).values() if not isinstance(m, ZZZHead)]
    if heads:
        raise ValueError(f'the ZZZ head has been replaced by {", ".join(heads)}: attach it again')


def _check_labels(labels: _Labels, num_classes: int) -> List[str]:
    names = [labels[i] for i in sorted(labels)] if isinstance(labels, Mapping) else list(labels)
    if isinstance(labels, Mapping) and sorted(labels) != list(range(len(names))):
        raise ValueError('label_names: expected the keys 0, 1, ..., one per class')
    if isinstance(labels, str) or not all(isinstance(name, str) for name in names):
        raise ValueError('label_names: expected one string per class')
    if len(names) != num_classes:
        raise ValueError(f'label_names: got {len(names)} names for {num_classes} classes')
    return names


def _own_memory(module: nn.Module, state_dict: Dict[str, Any], prefix: str, local_metadata: Any) -> None:
    seen = set()
    for key, value in state_dict.items():
        if isinstance(value, Tensor):
            value = value.detach().contiguous()
            pointer = value.untyped_storage().data_ptr()
            state_dict[key] = value.clone() if pointer in seen else value
            seen.add(pointer)


def _compare(model: nn.Module, folder: Path) -> None:
    """Reload a saved folder as from_pretrained would and hold it against the model."""
    expected = model.state_dict()
    with safetensors.safe_open(folder / WEIGHTS, 'pt') as file:
        _check_equal(expected, {key: file.get_tensor(key) for key in file.keys()}, 'the file')
    config = read_config(folder / CONFIG)
    try:
        again = _build(folder, config, {})
    except Exception as e:
        raise CheckpointError(
            f"the saved model can't be built again: {e}. If it was changed after create_model, or built with arguments "
            f'that timm does not record, pass them as model_args.'
        ) from e
    _check_equal(expected, again.state_dict(), 'the model built from it')


def _check_equal(expected: Dict[str, Tensor], got: Dict[str, Tensor], what: str) -> None:
    different = sorted(expected.keys() ^ got.keys())
    for key in expected.keys() & got.keys():
        a, b = expected[key].detach().cpu(), got[key].detach().cpu()
        # The model built again is in float32, whatever the dtype of the weights; the file is compared as it is.
        if a.shape != b.shape or not torch.equal(*(t.to(b.dtype).nan_to_num(0.0) for t in (a, b))):
            different.append(key)
        elif a.is_floating_point() and not torch.equal(a.isfinite(), b.isfinite()):
            different.append(key)
    if different:
        raise CheckpointError(f'{what} differs from the saved model in {some(different)}')


# --- push -------------------------------------------------------------------------------------------------------------


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    token: Union[str, bool, None] = None,
    revision: Optional[str] = None,
    private: Optional[bool] = None,
    create_pr: bool = False,
    commit_message: str = 'Add model',
    label_names: Optional[_Labels] = None,
    model_args: Optional[Dict[str, Any]] = None,
    data_config: Optional[Dict[str, Any]] = None,
    card: Union[ModelCard, str, None] = None,
    files: Optional[Mapping[str, Union[str, os.PathLike]]] = None,
) -> CommitInfo:
    """Push a model with a ZZZ head and its card to the Hugging Face Hub, in one commit.

    Nothing is created on the Hub before the saved files have been reloaded and compared and the card has been
    validated. The repository then loads with :func:`from_pretrained` and, where timm_zzz is imported, with
    ``timm.create_model('hf-hub:...')``.

    Args:
        model: As for :func:`save_pretrained`.
        repo_id: ``user/name``; made if it does not exist.
        token: Access token with the right to write; by default the one of ``hf auth login`` or HF_TOKEN.
        revision: Branch to commit to, which has to exist; the default branch if None.
        private: Make a new repository private (True) or public (False); the account's default if None. Does not change
            a repository that exists.
        create_pr: Open a pull request with the commit.
        commit_message: First line of the commit.
        label_names, model_args, data_config: As for :func:`save_pretrained`.
        card: A model card; by default one is generated (:func:`timm_zzz.cards.model_card`) unless the repository
            has a card already, which then stays.
        files: Further files to push, name in the repository to path.

    Returns:
        The commit, with ``.commit_url``, ``.oid`` and ``.pr_url``, as huggingface_hub's HfApi.upload_folder gives it.

    Raises:
        ValueError: As :func:`save_pretrained`, and for a card that the Hub finds invalid.
        AccessError: If the token is missing or invalid or has no right to push there.
        NotFoundError: For a revision that does not exist.
        UnavailableError: If the Hub can't be reached.
    """
    from .cards import model_card  # what draws in Jinja2 is loaded by those who push

    with TemporaryDirectory() as temporary:
        folder = save_pretrained(
            model, temporary, label_names=label_names, model_args=model_args, data_config=data_config
        )
        for name, path in (files or {}).items():
            if name in (CONFIG, WEIGHTS, 'README.md') or Path(name).is_absolute() or '..' in Path(name).parts:
                raise ValueError(f'files: {name} is not a name for a further file')
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
        try:
            new_card = model_card(unwrap_model(model), repo_id) if card is None else ModelCard(str(card))
        except yaml.YAMLError as e:
            raise ValueError(f"card: its metadata can't be read: {e}") from e
        new_card.save(folder / 'README.md')

        api = HfApi(token=token, library_name='timm_zzz', library_version=__version__)
        with _translated(repo_id, revision):
            new_card.validate()
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if card is None and api.file_exists(repo_id, 'README.md', revision=revision):
                (folder / 'README.md').unlink()
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message,
            )


# --- load -------------------------------------------------------------------------------------------------------------


def from_pretrained(
    repo_id_or_folder: Union[str, os.PathLike],
    *,
    revision: Optional[str] = None,
    token: Union[str, bool, None] = None,
    cache_dir: Union[str, os.PathLike, None] = None,
    local_files_only: bool = False,
    **model_args: Any,
) -> nn.Module:
    """Load a model with a ZZZ head from the Hugging Face Hub or from a folder.

    The same model as ``timm.create_model('hf-hub:...', pretrained=True)`` gives, with these differences: config.json is
    checked against what such a file may hold before anything is built, and against the shapes in the weights; config
    and weights come from one commit; the weights' SHA-256 is compared with the one in config.json (a repository that
    timm wrote has none: then there is nothing to compare); no pickle is ever read.

    Args:
        repo_id_or_folder: ``user/name``, or a folder that exists. timm's ``hf-hub:user/name@revision`` and
            ``local-dir:folder`` are understood too.
        revision: Branch, tag, commit or ``refs/pr/N``; the default branch if None.
        token: Access token for a private repository; by default the one of ``hf auth login`` or HF_TOKEN.
        cache_dir: Cache folder in place of huggingface_hub's own.
        local_files_only: Use only what the cache has.
        model_args: Arguments of ``create_model`` that differ from the saved ones. With another ``num_classes`` the head
            starts anew and the backbone is kept; ``num_classes=0`` gives features; ``in_chans`` and ``img_size`` adapt
            the weights as timm does.

    Returns:
        The model in training mode, like ``create_model``; call ``.eval()`` to predict. Weights come back in
        float32, whatever they were saved in, unless ``dtype`` is given.

    Raises:
        NotFoundError: No such folder, repository, revision or file, or a private repository without a token for it.
        AccessError: An invalid token, a gated or a disabled repository.
        UnavailableError: The Hub can't be reached and the cache does not have the model.
        ConfigError: config.json is not one of a ZZZ model or asks for something that is not allowed.
        CheckpointError: The weights are truncated, changed or don't fit config.json.
        ValueError: For a malformed repository id.

    Example:
        >>> model = from_pretrained('someone/bird-zzz', num_classes=5)  # doctest: +SKIP
    """
    folder, repo_id, revision = _parse_location(repo_id_or_folder, revision)
    if folder is not None:
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise NotFoundError(f'{folder} has no {name}')
        return _build(folder, read_config(folder / CONFIG), model_args)

    def download(filename: str, revision: Optional[str]) -> Path:
        options: Dict[str, Any] = dict(revision=revision, token=token, cache_dir=cache_dir)
        options.update(library_name='timm_zzz', library_version=__version__)
        with _translated(repo_id, revision, filename):
            try:
                return Path(hf_hub_download(repo_id, filename, local_files_only=local_files_only, **options))
            except _TRANSPORT_ERROR as e:
                if isinstance(e, hub_errors.HfHubHTTPError):
                    raise
                try:  # the client itself turns to the cache after some failures only
                    path = hf_hub_download(repo_id, filename, local_files_only=True, **options)
                except hub_errors.LocalEntryNotFoundError:
                    raise e from None
                _logger.warning(f'{repo_id}: the Hub did not answer ({e}), using {filename} from the cache.')
                return Path(path)

    config_file = download(CONFIG, revision)
    commit = config_file.parent.name  # .../snapshots/COMMIT/config.json
    if not _COMMIT.fullmatch(commit):
        raise HubError(f'{repo_id}: no commit in the path of the downloaded file: {config_file}')
    config = read_config(config_file)
    weights_file = download(WEIGHTS, commit)
    try:
        model = _build(weights_file.parent, config, model_args)
    except Corrupt as e:
        try:
            _drop(weights_file)
            advice = 'It was dropped from the cache: call again to download it.'
        except OSError as not_dropped:  # a cache that others own
            advice = f'It is still in the cache ({not_dropped}): delete it, or give another cache_dir.'
        raise CheckpointError(f'{repo_id}: {e}. {advice}') from e
    cfg: Dict[str, Any] = cast(Any, model).pretrained_cfg
    cfg.pop('file', None)
    cfg.update(source='hf-hub', hf_hub_id=f'{repo_id}@{commit}')
    return model


def _parse_location(
    location: Union[str, os.PathLike], revision: Optional[str]
) -> Tuple[Optional[Path], str, Optional[str]]:
    """Folder if it is one, else repository and revision."""
    text = os.fspath(location)
    source, _, rest = text.partition(':')
    if source == 'local-dir':
        folder = Path(rest)
        if not folder.is_dir():
            raise NotFoundError(f'no such folder: {folder}')
        return folder, '', None
    if source in ('hf-hub', 'hf_hub'):
        text = rest
    elif not isinstance(location, str) or Path(text).is_dir():
        if not Path(text).is_dir():
            raise NotFoundError(f'no such folder: {text}')
        return Path(text), '', None
    repo_id, at, inline = text.partition('@')
    if at and revision is not None and revision != inline:
        raise ValueError(f'revision: got {revision!r}, but the name says {inline!r}')
    return None, repo_id, inline if at else revision


def _build(folder: Path, config: Dict[str, Any], model_args: Dict[str, Any]) -> nn.Module:
    """Build and fill a model from a folder whose config has been read, after holding the weights against it."""
    check_weights(folder, config)
    return timm.create_model(f'local-dir:{folder}', pretrained=True, **model_args)


def _drop(path: Path) -> None:
    """Delete a file of the cache with everything that it is a link to."""
    while path.is_symlink():
        target = path.parent / os.readlink(path)
        path.unlink()
        path = target
    path.unlink(missing_ok=True)


# --- errors -----------------------------------------------------------------------------------------------------------


@contextmanager
def _translated(repo_id: str, revision: Optional[str], filename: Optional[str] = None) -> Iterator[None]:
    """Turn what the Hub's client raises into this package's errors."""
    try:
        yield
    except (hub_errors.EntryNotFoundError, _TRANSPORT_ERROR, OSError, RuntimeError, json.JSONDecodeError) as e:
        error = _translate(e, repo_id, revision, filename)
        if error is None:
            raise
        raise error from e


def _translate(e: BaseException, repo_id: str, revision: Optional[str], filename: Optional[str]) -> Optional[HubError]:
    """The error to raise for one of the client; None if it is of another kind."""
    at = f'{repo_id}@{revision}' if revision else repo_id
    if isinstance(e, hub_errors.GatedRepoError):
        return AccessError(
            f'{repo_id} is gated: ask for access on its page, then pass a token of that account (or hf auth login)'
        )
    if isinstance(e, hub_errors.DisabledRepoError):
        return AccessError(f'{repo_id} has been disabled on the Hub')
    if isinstance(e, hub_errors.RepositoryNotFoundError):
        return NotFoundError(
            f'{repo_id}: no such repository, or it is private: check the name, or pass a token (or hf auth login)'
        )
    if isinstance(e, hub_errors.RevisionNotFoundError):
        return NotFoundError(f'{repo_id} has no revision {revision}: expected a branch, a tag or a commit')
    if isinstance(e, hub_errors.LocalEntryNotFoundError):  # before EntryNotFoundError, of which it is one
        # Neither in the cache nor on the Hub, for the reason that is the cause
        if isinstance(e.__cause__, hub_errors.HfHubHTTPError):
            return _translate(e.__cause__, repo_id, revision, filename)
        return UnavailableError(
            f'{at}: the Hub is offline or out of reach, and the cache has no {filename}: check the connection'
        )
    if isinstance(e, hub_errors.EntryNotFoundError):
        hint = ': only safetensors weights are read' if filename == WEIGHTS else ''
        return NotFoundError(f'{at} has no {filename}{hint}')
    if isinstance(e, hub_errors.HfHubHTTPError):
        status = e.response.status_code if e.response is not None else 0
        if status in (401, 403):
            return AccessError(
                f'{at}: the Hub refused ({status}): the token is missing or invalid, or has no right to do this'
            )
        if status in (408, 429) or status >= 500:
            return UnavailableError(f'{at}: the Hub failed ({status}): try again later')
        return HubError(f'{at}: {e}')
    if isinstance(e, _TRANSPORT_ERROR):
        return UnavailableError(f"{at}: the Hub can't be reached: {e}")
    if isinstance(e, OSError) and (e.errno is None or isinstance(e, (ConnectionError, TimeoutError))):
        return UnavailableError(f"{at}: the Hub can't be reached or the transfer broke off: {e}")
    if isinstance(e, json.JSONDecodeError):
        return UnavailableError(f'{at}: what answered is not the Hub: {e}')
    if isinstance(e, RuntimeError) and e.__cause__ is not None:  # a failed upload
        return _translate(e.__cause__, repo_id, revision, filename)
    return None  # the local disk's, or a mistake
