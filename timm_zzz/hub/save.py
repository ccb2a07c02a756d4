"""Save a model with a ZZZ head to a folder or push it to the Hugging Face Hub.

Both contain model.safetensors and timm's config.json, with the SHA-256 of the weights in a section that timm ignores.
timm loads what this module writes, and the other way round.
"""

import json
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Dict, List, Mapping, Optional, Sequence, Union, cast

import yaml
from huggingface_hub import CommitInfo, HfApi, ModelCard
from timm.utils import unwrap_model
from torch import Tensor, nn

from .. import __version__
from ..errors import CheckpointError, ConfigError, some
from ..head import ZZZHead
from ..models import _timm
from ..models.attach import find_classifiers
from ..models.predict import percentiles_of
from .client import translated
from .config import CONFIG, PERCENTILES, SECTION, WEIGHTS, read_config, sha256
from .load import load_folder

__all__ = ['push_to_hub', 'save_pretrained']

_Labels = Union[Sequence[str], Mapping[int, str]]


def save_pretrained(
    model: nn.Module,
    folder: Union[str, os.PathLike],
    *,
    label_names: Optional[_Labels] = None,
    model_args: Optional[Dict[str, Any]] = None,
    data_config: Optional[Dict[str, Any]] = None,
    license: Optional[str] = None,
) -> Path:
    """Write config.json and model.safetensors, after reloading them and comparing every tensor.

    Args:
        model: A model with a ZZZ head from ``timm.create_model`` or :func:`~timm_zzz.attach`, also with
            ``num_classes=0``. Wrappers of DistributedDataParallel and torch.compile are removed.
        folder: Folder to write to, created if necessary. Other files in it are kept. Nothing is written if a check
            fails.
        label_names: Class names in the order of the logits.
        model_args: Arguments of ``create_model`` that the model needs but has not recorded, e.g. the name of a layer
            type that was given as a class.
        data_config: Settings of preprocessing at test time that differ from the model's: input_size, mean, std,
            interpolation, crop_pct, crop_mode.
        license: Licence of the weights; by default that of the backbone's weights, which timm records.

    Returns:
        The folder.

    Raises:
        ValueError: If the model has no ZZZ head or was not made by timm, or if the label names don't fit.
        CheckpointError: If reloading the files does not give the same model.
        ConfigError: If the model was built with arguments that are not allowed in a config.
    """
    model = unwrap_model(model)
    _check_model(model)
    names = None if label_names is None else _check_labels(label_names, int(cast(Any, model).num_classes))
    described: Dict[str, Any] = dict(label_names=names, pretrained_cfg=dict(license=license) if license else {})
    percentiles = percentiles_of(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix='.saving-') as temporary:
        new = Path(temporary)
        handle = model.register_state_dict_post_hook(_own_memory)
        try:
            lacking = _timm.save(model, new, described, model_args, data_config)
        finally:
            handle.remove()
        config = json.loads((new / CONFIG).read_text(encoding='utf-8'))
        config['pretrained_cfg'].update(lacking)
        config[SECTION] = dict(version=__version__, weights_sha256=sha256(new / WEIGHTS))
        if percentiles is not None:
            config[SECTION][PERCENTILES] = percentiles._asdict()
        (new / CONFIG).write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')
        shutil.copymode(new / CONFIG, new / WEIGHTS)  # the umask's mode: safetensors makes files private to the owner
        _check_saved(model, new)
        for name in (WEIGHTS, CONFIG):
            os.replace(new / name, folder / name)
    return folder


def _check_model(model: nn.Module) -> None:
    kind = type(model).__name__
    if not getattr(model, 'pretrained_cfg', None) or _timm.recorded_args(model) is None:
        raise ValueError(f'{kind}: expected a model made by timm.create_model')
    if not hasattr(model, 'zzz_options'):
        raise ValueError(
            f'{kind} has no ZZZ head: attach one with timm_zzz.attach(model), '
            f'or push it with timm.models.push_to_hf_hub'
        )
    others = [type(m).__name__ for m in find_classifiers(model).values() if not isinstance(m, ZZZHead)]
    if others:
        raise ValueError(f'the ZZZ head has been replaced by {", ".join(others)}: attach it again')


def _check_labels(labels: _Labels, num_classes: int) -> List[str]:
    if isinstance(labels, Mapping):
        if sorted(labels) != list(range(len(labels))):
            raise ValueError('label_names: expected the keys 0, 1, ..., one per class')
        labels = [labels[i] for i in range(len(labels))]
    if isinstance(labels, str) or not all(isinstance(name, str) for name in labels):
        raise ValueError('label_names: expected one string per class')
    if len(labels) != num_classes:
        raise ValueError(f'label_names: got {len(labels)} names for {num_classes} classes')
    return list(labels)


def _own_memory(module: nn.Module, state_dict: Dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Give each tensor contiguous memory of its own: safetensors refuses tied and channels-last tensors."""
    seen = set()
    for key, value in state_dict.items():
        if isinstance(value, Tensor):
            value = value.detach().contiguous()
            pointer = value.untyped_storage().data_ptr()
            state_dict[key] = value.clone() if pointer in seen else value
            seen.add(pointer)


def _check_saved(model: nn.Module, folder: Path) -> None:
    """Load a saved folder as from_pretrained does, and compare it with the model."""
    try:
        config = read_config(folder / CONFIG)
    except ConfigError as e:
        message = f'from_pretrained would refuse this model: {e.__cause__}. timm.models.push_to_hf_hub takes it.'
        raise ConfigError(message) from e
    try:
        loaded = load_folder(folder, config, {}).state_dict()
    except Exception as e:
        raise CheckpointError(
            f"the saved model can't be built again: {e}. If it was changed after create_model, or built with arguments "
            f'that timm does not record, pass them as model_args.'
        ) from e
    expected = model.state_dict()
    different = sorted(expected.keys() ^ loaded.keys())
    different += [key for key in expected.keys() & loaded.keys() if not _equal(expected[key].cpu(), loaded[key].cpu())]
    if different:
        raise CheckpointError(f'what was written differs from the saved model in {some(different)}')


def _equal(saved: Tensor, loaded: Tensor) -> bool:
    """Compare two tensors in the dtype of the second: timm loads in float32, whatever the dtype in the file."""
    saved = saved.to(loaded.dtype)
    return saved.shape == loaded.shape and bool(((saved == loaded) | saved.isnan() & loaded.isnan()).all())


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
    license: Optional[str] = None,
    card: Union[ModelCard, str, None] = None,
    files: Optional[Mapping[str, Union[str, os.PathLike]]] = None,
) -> CommitInfo:
    """Push a model with a ZZZ head and its card to the Hugging Face Hub, in one commit.

    Nothing is created on the Hub before the saved files have been reloaded and compared, and the card has been
    validated. The repository loads with :func:`from_pretrained` and ``timm.create_model('hf-hub:...')``.

    Args:
        model: As in :func:`save_pretrained`.
        repo_id: ``user/name``; created if it does not exist.
        token: Access token with write permission; by default that of ``hf auth login`` or HF_TOKEN.
        revision: Existing branch to commit to; the default branch if None.
        private: Make a new repository private (True) or public (False); the account's default if None.
        create_pr: Open a pull request with the commit.
        commit_message: First line of the commit.
        label_names, model_args, data_config: As in :func:`save_pretrained`.
        license: Licence of the weights, for config.json and the generated card; by default that of ``card``, if it has
            one, else that of the backbone's weights.
        card: A model card. By default one is generated by :func:`timm_zzz.hub.cards.model_card`, unless the repository
            has a card already, which is kept.
        files: Further files to push: paths, keyed by name in the repository.

    Returns:
        The commit, with ``.commit_url``, ``.oid`` and ``.pr_url``, as huggingface_hub's HfApi.upload_folder returns it.

    Raises:
        ValueError: As :func:`save_pretrained`, and if the Hub finds the card invalid.
        HubError: As :func:`save_pretrained`, and an AccessError, NotFoundError or UnavailableError if the Hub fails.
    """
    from .cards import license_of, model_card  # here: python -m warns if it is imported before it runs

    try:
        own_card = None if card is None else ModelCard(str(card))
    except yaml.YAMLError as e:
        raise ValueError(f"card: its metadata can't be read: {e}") from e
    license = license or (license_of(own_card.data) if own_card else None)
    with TemporaryDirectory() as temporary:
        about: Dict[str, Any] = dict(data_config=data_config, license=license)
        folder = save_pretrained(model, temporary, label_names=label_names, model_args=model_args, **about)
        for name, path in (files or {}).items():
            if name in (CONFIG, WEIGHTS, 'README.md') or Path(name).is_absolute() or '..' in Path(name).parts:
                raise ValueError(f'files: {name} is not a name for a further file')
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
        names = [label_names[i] for i in range(len(label_names))] if label_names else []
        new_card = own_card or model_card(unwrap_model(model), repo_id, label_names=names, **about)
        new_card.save(folder / 'README.md')

        api = HfApi(token=token, library_name='timm_zzz', library_version=__version__)
        with translated(repo_id, revision):
            new_card.validate()
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if card is None and api.file_exists(repo_id, 'README.md', revision=revision):
                (folder / 'README.md').unlink()
            commit: Dict[str, Any] = dict(revision=revision, create_pr=create_pr, commit_message=commit_message)
            return api.upload_folder(repo_id=repo_id, folder_path=folder, **commit)
