"""``python -m timm_zzz compare``: its figures against the models' own logits, scipy and scikit-learn."""

import argparse
import csv
import math
import re

import pytest
import timm
import torch
from oracles import distinct
from PIL import Image
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score
from timm.data import create_transform

import timm_zzz
from timm_zzz.cli.compare import difference, labels, main

SIZE, NAMES, EACH = 32, ['ant', 'bee', 'cicada', 'dragonfly', 'earwig', 'fly', 'gnat'], 6
MODELS = {'linear': 'test_resnet', 'zzz': 'test_vit.zzz_r4'}


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """Images, a run of each model, and the models."""
    torch.manual_seed(0)
    folder, models = tmp_path_factory.mktemp('compare'), {}
    for c, name in enumerate(NAMES):
        (folder / 'data/validation' / name).mkdir(parents=True)
        for i in range(EACH):
            image = Image.effect_noise((36, 36), 15.0 * (c + 1) + i).convert('RGB')
            image.save(folder / 'data/validation' / name / f'{i}.png')
    for run, name in MODELS.items():
        size = dict(img_size=SIZE) if 'vit' in name else {}
        models[run] = distinct(timm.create_model(name, num_classes=len(NAMES), **size)).eval()
        args = argparse.Namespace(model=name, img_size=SIZE, crop_pct=1.0)
        (folder / 'train' / run).mkdir(parents=True)
        torch.save(dict(state_dict=models[run].state_dict(), args=args), folder / 'train' / run / 'model_best.pth.tar')
    return folder, models


def compare(folder, *options, runs=MODELS):
    sources = [folder / 'train' / run / 'model_best.pth.tar' if isinstance(run, str) else run for run in runs]
    main([str(a) for a in (*sources, '--data-dir', folder / 'data', '-j', 0, '--device', 'cpu', *options)])


@torch.no_grad()
def probabilities(folder, model):
    transform = create_transform(
        (3, SIZE, SIZE),
        crop_pct=1.0,
        mean=model.pretrained_cfg['mean'],
        std=model.pretrained_cfg['std'],
        interpolation=model.pretrained_cfg['interpolation'],
    )
    files = [folder / 'data/validation' / name / f'{i}.png' for name in NAMES for i in range(EACH)]
    return model(torch.stack([transform(Image.open(file)) for file in files])).softmax(1).double().numpy()


def test_figures(made, capsys, tmp_path):
    folder, models = made
    table = tmp_path / 'images.csv'
    compare(folder, '-o', table, '--show', 2)
    out = capsys.readouterr().out
    target = [c for c in range(len(NAMES)) for _ in range(EACH)]
    right = {}
    rows = list(csv.DictReader(table.open()))
    for run, model in models.items():
        p = probabilities(folder, model)
        p = p / p.sum(1, keepdims=True)
        right[run] = p.argmax(1) == target
        top1, top5, nll = map(float, re.search(rf'^{run} +([\d.]+) +([\d.]+) +([\d.]+) ', out, re.M).groups())
        assert top1 == pytest.approx(100 * accuracy_score(target, p.argmax(1)), abs=0.005)
        assert top5 == pytest.approx(100 * top_k_accuracy_score(target, p, k=5), abs=0.005)
        assert nll == pytest.approx(log_loss(target, p), abs=2e-4)
        assert [row[run] for row in rows] == [NAMES[c] for c in p.argmax(1)]
        assert [float(row[f'{run} probability']) for row in rows] == pytest.approx(p.max(1).tolist(), rel=1e-3)
    assert [row['class'] for row in rows] == [NAMES[c] for c in target]
    assert rows[1]['image'] == 'ant/1.png'
    only = {run: int((right[run] & ~right[other]).sum()) for run, other in (('zzz', 'linear'), ('linear', 'zzz'))}
    for run, count in only.items():
        assert f'  {count} images that only {run} gets right:' in out
    shown = re.search(r'zzz against linear: top-1 (\S+) \(.*\), McNemar\'s test p = (\S+)', out)
    count, n = len(target), sum(only.values())
    assert float(shown[1]) == pytest.approx(100 * (only['zzz'] - only['linear']) / count, abs=0.005)
    assert float(shown[2]) == pytest.approx(binomtest(only['zzz'], n).pvalue if n else 1, rel=0.06)
    gains = {
        name: int((right['zzz'][c * EACH :][:EACH].astype(int) - right['linear'][c * EACH :][:EACH]).sum())
        for c, name in enumerate(NAMES)
    }
    best, worst = max(gains.values()), min(gains.values())
    for what, gain in (('gained', best), ('lost', worst)):
        first = re.search(rf'classes that {what} most:\s+(\w+)( [+-]\d+ of {EACH})?', out)
        assert (
            (gains[first[1]] == gain and f'{gain:+d}' in first[2])
            if gain * (1 if what == 'gained' else -1) > 0
            else first[1] == 'none'
        )


def test_difference_is_mcnemars():
    generator = torch.Generator().manual_seed(0)
    for count in (1, 7, 200, 3000):
        first, second = (torch.rand(count, generator=generator) < share for share in (0.6, 0.68))
        b, c = int((first & ~second).sum()), int((second & ~first).sum())
        found = difference(first, second)
        assert found[:2] == (b, c) and found.top1 == pytest.approx(100 * (c - b) / count)
        assert found.p_value == pytest.approx(binomtest(b, b + c).pvalue if b + c else 1.0, rel=1e-9)
        low, high = found.interval
        assert low <= found.top1 <= high or count < 3
        per_image = torch.cat(
            [second.double() - first.double(), torch.tensor([0.0, 0.0])]
        )  # half an image in each cell
        variance = ((second ^ first).double().sum() + 1) / (count + 2) - per_image.mean() ** 2
        expected = [per_image.mean() + sign * 1.96 * math.sqrt(variance / (count + 2)) for sign in (-1, 1)]
        assert [low, high] == pytest.approx([100 * max(-1, min(1, float(e))) for e in expected], abs=1e-9)
    none, all_ = torch.zeros(6, dtype=torch.bool), torch.ones(6, dtype=torch.bool)
    assert difference(none, all_).interval[0] < 90 and difference(none, none).interval[1] > 10  # wide, of six images


def test_labels():
    """Shorten paths to the parts they do not share; leave them whole where the rest would be the same."""
    assert labels(['out/train/a/best.tar', 'out/train/b/best.tar']) == ['a', 'b']
    assert labels(['a/x', 'b']) == ['a/x', 'b']
    assert labels(['.', '..']) == ['.', '..']
    with pytest.raises(ValueError, match='a model is named twice'):
        labels(['out/lin', 'out/lin/'])


def test_folders_and_several_models(made, capsys, tmp_path):
    """A folder of save_pretrained beside checkpoints; names are what paths do not share."""
    folder, models = made
    config = dict(input_size=(3, SIZE, SIZE), crop_pct=1.0)
    timm_zzz.save_pretrained(models['zzz'], tmp_path / 'saved', label_names=NAMES, data_config=config)
    compare(folder, runs=['zzz', 'linear', tmp_path / 'saved'])
    out = capsys.readouterr().out
    assert 'saved against' in out and '0 images that only' in out
    figures = [re.search(rf'^\S*{name}\S* +(.*)$', out, re.M)[1] for name in ('zzz', 'saved')]
    assert figures[0] == figures[1]


def test_what_is_refused(made, capsys, tmp_path):
    folder, models = made
    for options, what in (
        (dict(runs=['zzz']), 'compare needs two models at least'),
        (dict(runs=['zzz', 'none']), 'expected a checkpoint or run of train.py'),
        (dict(runs=['zzz', 'other']), 'the model has 3'),
    ):
        if 'other' in options['runs']:
            model = timm.create_model('test_resnet', num_classes=3)
            (folder / 'train/other').mkdir()
            args = argparse.Namespace(model='test_resnet', img_size=SIZE)
            torch.save(dict(state_dict=model.state_dict(), args=args), folder / 'train/other/model_best.pth.tar')
        with pytest.raises(SystemExit) as e:
            compare(folder, **options)
        err = capsys.readouterr().err
        assert e.value.code == 2 and what in err and 'Traceback' not in err, err
    (tmp_path / 'a.csv').touch()
    with pytest.raises(SystemExit):
        compare(folder, '-o', tmp_path / 'a.csv')
    assert 'exists already' in capsys.readouterr().err
