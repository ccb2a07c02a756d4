import json
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

# Identifiers of https://huggingface.co/docs/hub/repositories-licenses that occur here
HUB_LICENSES = (
    'apache-2.0 apple-amlr apple-ascl bsd-3-clause cc-by-4.0 cc-by-nc-4.0 fair-noncommercial-research-license gemma '
    'mit other unknown'
).split()


@pytest.fixture
def model():
    return timm.create_model('test_vit.zzz_r4', num_classes=5)


def test_measured_card(hub, model):
    card = model_card(
        model,
        REPO,
        results=[top1(np.float32(91.25), 'CUB-200-2011', 'test')],
        results_command='python validate.py',
        label_names=['finch', 'kiwi', 'owl', 'rook', 'wren'],
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
    first = text[text.index('\n\n') : text.index('```')]
    assert 'Tells 5 classes apart: finch, kiwi, owl and 2 more.' in first
    assert 'Top-1 accuracy: **91.25** on CUB-200-2011, test.' in first
    for part in ('| CUB-200-2011 | test | 91.25 |', 'python validate.py', 'rank 4', '5 classes', 'Sigma_c', 'AdamW'):
        assert part in text, part
    assert text[text.index('```python') :].split('\n')[1].startswith('import timm_zzz')
    assert 'have not been published' not in text and 'Not measured' not in text
    assert ModelCard(str(card)).data.eval_results[0].metric_value == 91.25


def test_card_without_results_says_so(hub, model):
    card = model_card(model, REPO, published=False)
    card.validate()
    assert 'Not measured.' in card.text and 'have not been published' in card.text and 'Not recorded.' in card.text
    assert 'starting weights are not recorded' in card.text and 'model-index' not in str(card)


def published_license(hub, repo_id):
    """The licences that a repository's card and its config.json name."""
    card = ModelCard(hub.files(repo_id)['README.md'].decode())
    config = json.loads(hub.files(repo_id)['config.json'])
    return card.data.get('license_name') or card.data.license, config['pretrained_cfg'].get('license'), card.text


def test_card_and_config_name_one_licence(hub, model):
    """The given licence comes first, then the one that timm records for the backbone, and the card names its source."""
    assert timm.get_pretrained_cfg('test_vit').license == 'apache-2.0'
    own_card = '---\nlicense: other\nlicense_name: mine\n---\n'
    for kwargs, expected, text in (
        ({}, 'apache-2.0', "| licence | apache-2.0, that of the backbone's weights |"),
        (dict(license='mit'), 'mit', '| licence | mit |'),
        (dict(license='unknown'), 'unknown', "| licence | not recorded: see the backbone's and the data's |"),
        (dict(card='---\nlicense: mit\n---\n'), 'mit', ''),
        (dict(card=own_card), 'mine', ''),
    ):
        hub.reset()
        push_to_hub(model, REPO, **kwargs)
        *names, card = published_license(hub, REPO)
        assert names == [expected] * 2 and text in card, kwargs
    model.pretrained_cfg['license'] = 'dinov3-license'  # which the Hub does not know
    push_to_hub(model, 'owner/other')
    assert published_license(hub, 'owner/other')[:2] == ('dinov3-license',) * 2
    del model.pretrained_cfg['license']
    push_to_hub(model, 'owner/none')
    assert published_license(hub, 'owner/none')[:2] == ('unknown', None)


def test_every_licence_that_timm_records_can_be_pushed(hub, model):
    for name in {timm.get_pretrained_cfg(name).license for name in timm.list_pretrained()} - {None}:
        model.pretrained_cfg['license'] = name
        data = model_card(model, REPO).data
        assert data.license in HUB_LICENSES and name in (data.license, data.license_name)


def test_image_size_is_that_of_the_preprocessing(hub, model):
    push_to_hub(timm.create_model('test_resnet.zzz_r4', num_classes=5), REPO, data_config=dict(input_size=(3, 96, 128)))
    assert '| image size | 96 x 128 |' in hub.files(REPO)['README.md'].decode()
    assert json.loads(hub.files(REPO)['config.json'])['pretrained_cfg']['input_size'] == [3, 96, 128]


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
        label_names=[evil],
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
    exec('\n'.join(blocks), {'timm': timm})
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
