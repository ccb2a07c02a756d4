"""Write model cards for the Hugging Face Hub from the facts about a model and ``hub_cards/template.md.jinja``.

``python -m timm_zzz.hub.cards FACTS.yaml ...`` writes the card of a variant beside the file with its facts.
"""

import argparse
import re
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, cast

import timm
import torch
import yaml
from huggingface_hub import CardData, EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from torch import nn

from ..data import shipped_files
from ..errors import some
from ..head import heads_of
from ..models._timm import input_config

__all__ = ['model_card', 'top1', 'write_card']

TASK = 'image-classification'

# The licences recorded by timm that are also identifiers of the Hub
_HUB_LICENSES = (
    'apache-2.0 apple-amlr apple-ascl bsd-3-clause cc-by-4.0 cc-by-nc-4.0 fair-noncommercial-research-license gemma '
    'mit other unknown'
).split()


def top1(value: float, dataset: str, split: Optional[str] = None, *, metric_name: str = 'Top-1 accuracy') -> EvalResult:
    """Convert a top-1 accuracy in percent to an EvalResult for :func:`model_card`."""
    identifier = re.sub(r'[^\w./-]+', '-', dataset).strip('-') or 'unknown'
    names: Dict[str, Any] = dict(task_name='Image classification', dataset_split=split, metric_name=metric_name)
    return EvalResult(TASK, identifier, dataset, 'accuracy', value, **names)


def model_card(
    model: nn.Module,
    repo_id: str,
    *,
    results: Sequence[EvalResult] = (),
    results_command: Optional[str] = None,
    training: Optional[str] = None,
    license: Optional[str] = None,
    base_model: Optional[str] = None,
    backbone: Optional[str] = None,
    datasets: Sequence[str] = (),
    data_config: Optional[Dict[str, Any]] = None,
    published: bool = True,
    onnx: bool = False,
    label_names: Sequence[str] = (),
) -> ModelCard:
    """Create the card of a model with a ZZZ head. It states only facts that it is given.

    Args:
        model: A model with a ZZZ head, or one without classifier (``num_classes=0``); may be on the meta device.
        repo_id: ``user/name`` of the repository, for the usage example.
        results: Measured results with numbers as values, e.g. from :func:`top1`.
        results_command: Commands that measured the results, with hardware and versions; required with results.
        training: How the model was trained, in Markdown.
        license: Licence of the weights, a Hub identifier such as ``apache-2.0``. If None, the licence that timm records
            for the backbone's weights, named as theirs; ``unknown`` if there is none.
        base_model: Repository of the weights from which training started, e.g. ``timm/resnet50.a1_in1k``.
        backbone: Source of those weights, if it is not a repository on the Hub.
        datasets: Ids of the data sets on the Hub that the model was trained on.
        data_config: Preprocessing, as in :func:`~timm_zzz.save_pretrained`; the model's if None.
        published: False if the weights are not on the Hub yet; the card then says so.
        onnx: Describe how to run model.onnx, which lies beside the card.
        label_names: Class names; the card's first line shows three of them.

    Returns:
        The card: ``str(card)`` is the README.md, ``card.save(path)`` writes it, ``card.validate()`` asks the Hub.

    Raises:
        ValueError: If results come without their command, a value is not a number, or the repository id is malformed.
    """
    from jinja2 import Template

    validate_repo_id(repo_id)
    if results and not results_command:
        raise ValueError('results_command: results need the command that measured them')
    rows = []
    for result in results:
        if isinstance(result.metric_value, str):
            raise ValueError(f'results: expected a number, got {result.metric_value!r}')
        result.metric_value = round(float(result.metric_value), 4)  # YAML can't hold NumPy scalars
        texts = dict(
            metric=result.metric_name or result.metric_type, dataset=result.dataset_name, split=result.dataset_split
        )
        rows.append({'value': result.metric_value, **{key: _escape(text or '') for key, text in texts.items()}})
    heads = [*heads_of(model).values()]
    title = repo_id.rpartition('/')[2]
    cfg: Dict[str, Any] = cast(Any, model).pretrained_cfg
    inherited = None if license else cfg.get('license')
    named = inherited if inherited not in (None, *_HUB_LICENSES) else None
    licence = license or inherited or 'unknown'
    data = ModelCardData(
        library_name='timm',
        pipeline_tag=TASK if heads else 'image-feature-extraction',
        license='other' if named else licence,
        license_name=named,
        base_model=base_model,
        datasets=list(datasets) or None,
        metrics=sorted({result.metric_type for result in results}) or None,
        tags=['timm', 'timm_zzz'],
        model_name=title if results else None,
        eval_results=list(results) or None,
    )
    config = input_config(model, data_config)
    channels, *size = config['input_size']
    license_text = _escape(licence) + (", that of the backbone's weights" if inherited else '')
    if licence == 'unknown':
        license_text = "not recorded: see the backbone's and the data's"
    source = _escape(backbone) if backbone else 'its starting weights are not recorded'
    if base_model:
        source = f'starting from [{base_model}](https://huggingface.co/{base_model})'
    template = shipped_files('hub_cards', '.md.jinja')['template'].read_text(encoding='utf-8')
    text = Template(template, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True).render(
        card_data=data.to_yaml(),
        title=_escape(title),
        published=published,
        features=not heads,
        architecture=cfg['architecture'],
        backbone=source,
        license_text=license_text,
        num_classes=heads[0].num_classes if heads else 0,
        class_names=_escape(some(label_names)),
        rank=heads[0].rank if heads else 0,
        feat_dim=heads[0].feat_dim if heads else 0,
        log_density=bool(heads) and heads[0].log_density,
        head_parameters=_count(*heads),
        parameters=_count(model),
        image_size=' x '.join(map(str, size)),
        onnx=onnx,
        config=config,
        image_mode='RGB' if channels == 3 else 'L',
        repo_literal=repr(repo_id),
        hub_literal=repr(f'hf-hub:{repo_id}'),
        results=rows,
        results_command=_code_block(results_command or ''),
        training=training,
    )
    return ModelCard(text)


def license_of(data: CardData) -> Optional[str]:
    """Return the licence in a card's metadata; None if it has none."""
    return data.get('license_name') or data.get('license')


def _count(*modules: nn.Module) -> str:
    return f'{sum(p.numel() for module in modules for p in module.parameters()):,}'


def _escape(text: str) -> str:
    """Escape text so that Markdown shows it literally in one line, without markup, HTML, links or table cells."""
    return re.sub(r'([\\`*_{}\[\]<>()#|~$&!])', r'\\\1', ' '.join(text.split()))


def _code_block(text: str) -> str:
    fence = '`' * max([3, *(len(run) + 1 for run in re.findall('`+', text))])
    return f'{fence}sh\n{text.strip()}\n{fence}'


def write_card(facts_file: Path) -> Path:
    """Write the card of a variant beside the YAML file with its facts; return its path."""
    facts: Dict[str, Any] = yaml.safe_load(facts_file.read_text(encoding='utf-8'))
    with torch.device('meta'):
        model = timm.create_model(facts.pop('model'), num_classes=facts.pop('num_classes'))
    results = [top1(**result) for result in facts.pop('results', [])]
    path = facts_file.with_suffix('.md')
    model_card(model, facts.pop('repo_id'), results=results, **facts).save(path)
    return path


def main(arguments: Optional[List[str]] = None) -> None:
    """Run ``python -m timm_zzz.hub.cards``."""
    parser = argparse.ArgumentParser(
        prog='python -m timm_zzz.hub.cards', description='Write model cards beside the files with their facts.'
    )
    parser.add_argument('facts', nargs='+', type=Path, metavar='FACTS.yaml')
    for facts in parser.parse_args(arguments).facts:
        print(write_card(facts))


if __name__ == '__main__':
    main()
