import re
from pathlib import Path

import numpy as np
import pytest
import timm
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from timm_zzz import push_to_hub
from timm_zzz.hub.cards import main, model_card, top1

REPO = 'owner/birds-zzz'


@pytest.fixture
def model():
    return timm.create_model('test_vit.zzz_r4', num_classes=5)


def test_measured_card(hub, model):
    card = model_card(
        model,
        REPO,
        results=[top1(np.float32(91.25), 'CUB-200-2011', 'test')],
        results_command='python validate.py',
        license='apache-2.0',
        base_model='timm/test_vit.r160_in1k',
        datasets=['bentrevett/caltech-ucsd-birds-200-2011'],
        training='AdamW',
    )
    card.validate()
    data = yaml.safe_load(str(card).split('---')[1])
    assert data['library_name'] == 'timm' and data['pipeline_tag'] == 'image-classification'
    assert data['tags'] == ['timm', 'timm_zzz'] and data['metrics'] == ['accuracy']
    assert data['license'] == 'apache-2.0' and data['base_model'] == 'timm/test_vit.r160_in1k'
    metric = data['model-index'][0]['results'][0]['metrics'][0]
    assert metric['value'] == 91.25 and type(metric['value']) is float
    text = card.text
    for part in ('| CUB-200-2011 | test | 91.25 |', 'python validate.py', 'rank 4', '5 classes', 'Sigma_c', 'AdamW'):
        assert part in text, part
    assert text[text.index('```python') :].split('\n')[1].startswith('import timm_zzz')
    assert 'have not been published' not in text and 'Not measured' not in text
    assert ModelCard(str(card)).data.eval_results[0].metric_value == 91.25


def test_card_without_results_says_so(hub, model):
    card = model_card(model, REPO, published=False)
    card.validate()
    assert 'Not measured.' in card.text and 'have not been published' in card.text and 'Not recorded.' in card.text
    assert 'not recorded' in card.text and 'model-index' not in str(card)


def test_results_need_their_command_and_numbers(model):
    with pytest.raises(ValueError, match='results_command'):
        model_card(model, REPO, results=[top1(91.0, 'CUB')])
    with pytest.raises(ValueError, match="number, got '91 or so'"):
        model_card(model, REPO, results=[top1('91 or so', 'CUB')], results_command='x')
    with pytest.raises(ValueError):
        model_card(model, "x'); import os")


def test_nothing_in_a_card_is_markup_but_the_template(hub, model):
    evil = 'a | b\n---\n# <script>alert(1)</script> [x](http://x) `y` {{ 7 * 7 }} ![i](j) $1$'
    card = model_card(
        model,
        REPO,
        results=[top1(1.0, evil, evil, metric_name=evil)],
        results_command='x\n```\n# out',
        license='other',
        backbone=evil,
    )
    card.validate()
    again = ModelCard(str(card))
    assert again.data.eval_results[0].dataset_name == evil and again.data.license == 'other'
    assert not re.search(r'(?<!\\)(<script|\]\(http://x|\$1)', card.text) and '49' not in card.text
    row = next(line for line in card.text.splitlines() if line.endswith('1.0 |'))
    assert len(re.findall(r'(?<!\\)\|', row)) == 5
    assert card.text.count('````') == 2


def test_features(hub):
    card = model_card(timm.create_model('test_resnet.zzz_r4', num_classes=0), REPO)
    card.validate()
    assert card.data.pipeline_tag == 'image-feature-extraction' and 'softmax' not in card.text


def test_usage_examples_run(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new('RGB', (200, 180), 'green').save(tmp_path / 'image.jpg')
    blocks = []
    for i, kwargs in enumerate([dict(num_classes=5), dict(num_classes=5, in_chans=1), dict(num_classes=0)]):
        push_to_hub(timm.create_model('test_resnet.zzz_r4', **kwargs), f'{REPO}-{i}')
        readme = hub.files(f'{REPO}-{i}')['README.md'].decode()
        blocks.append(re.search(r'```python\n(.*?)```', readme, re.S).group(1))
        line = next(line for line in readme.splitlines() if line.startswith('`timm.create_model('))
        blocks.append(line.split('`')[1])
    exec('\n'.join(blocks), {})
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 5 + 5 + 1 and out[-1].startswith('torch.Size([1, ')


def test_cards_of_variants_are_up_to_date(hub, root, tmp_path, capsys):
    facts = sorted((root / 'hub_cards').glob('*.yaml'))
    assert facts
    for path in facts:
        copy = tmp_path / path.name
        copy.write_text(path.read_text(encoding='utf-8'), encoding='utf-8')
        main([str(copy)])
        made = Path(capsys.readouterr().out.strip()).read_text(encoding='utf-8')
        assert made == path.with_suffix('.md').read_text(encoding='utf-8'), path
        ModelCard(made).validate()
