"""``python -m timm_zzz predict``: names, probabilities and percentiles, against timm's transform, softmax and NumPy."""

import argparse
import csv
import io
import json
import random
import re
import sys

import numpy as np
import pytest
import timm
import torch
from oracles import distinct
from PIL import Image
from timm.data import create_transform, resolve_data_config

import timm_zzz
from timm_zzz import scores
from timm_zzz.cli import calibrate, push
from timm_zzz.cli.predict import NONE, find_images, main
from timm_zzz.head import heads_of, record_inputs
from timm_zzz.models.predict import Percentiles

SIZE, NAMES = 32, ['ant', 'bee', 'hornet', 'wasp']
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
CONFIG = dict(input_size=(3, SIZE, SIZE), mean=MEAN, std=STD, crop_pct=0.8, interpolation='bicubic', crop_mode='center')


def picture(seed, size=(48, 40)):
    rng = random.Random(seed)
    image = Image.effect_noise(size, 10 + 10 * rng.random()).convert('RGB')
    return Image.blend(image, Image.new('RGB', size, tuple(rng.randrange(256) for _ in range(3))), 0.8)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Images in a tree with other files, and held-out images of each class."""
    folder = tmp_path_factory.mktemp('predict')
    (folder / 'photos/more').mkdir(parents=True)
    for i, name in enumerate(['a.png', 'b 2.jpg', 'more/c.png', 'more/ä.JPG']):
        picture(i).save(folder / 'photos' / name)
    (folder / 'photos/more/notes.txt').write_text('not an image')
    for c, name in enumerate(NAMES):
        for split in ('train', 'validation'):
            (folder / 'data' / split / name).mkdir(parents=True)
            for i in range(15):
                picture(100 * c + i + 50).save(folder / 'data' / split / name / f'{i:02}.png')
    return folder


FILES = ['a.png', 'b 2.jpg', 'more/c.png', 'more/ä.JPG']


def saved(folder, name='test_vit.zzz_r4', names=NAMES):
    model = distinct(timm.create_model(name, num_classes=len(NAMES), img_size=SIZE)).eval()
    with torch.no_grad():
        model.get_classifier().sigma2_raw.fill_(-2.0)
    timm_zzz.save_pretrained(model, folder, label_names=names, data_config=CONFIG)
    return model


def prepared(paths):
    transform = create_transform(**CONFIG, is_training=False)
    return torch.stack([transform(Image.open(path).convert('RGB')) for path in paths])


@torch.no_grad()
def expected(model, paths):
    return model.cpu().eval()(prepared(paths)).double().softmax(1)


def predict(capsys, *arguments):
    main([*map(str, arguments), '-j', '0', '--device', 'cpu'])
    return capsys.readouterr()


def test_three_formats(folder, tmp_path, capsys):
    model = saved(tmp_path / 'model')
    paths = [folder / 'photos' / name for name in FILES]
    probabilities, order = expected(model, paths).sort(1, descending=True)
    arguments = (tmp_path / 'model', folder / 'photos', '--top-k', 2, '-b', 3)
    out, err = predict(capsys, *arguments, '--format', 'jsonl')
    assert err == ''  # no progress bar, as stderr is no terminal
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row['image'] for row in rows] == [str(path) for path in paths]
    for row, p, classes in zip(rows, probabilities, order, strict=True):
        assert row['classes'] == [NAMES[c] for c in classes[:2]] and row['answer'] == row['classes'][0]
        assert row['probabilities'] == pytest.approx(p[:2].tolist(), rel=1e-4)
        assert 'percentile' not in row
    table = list(csv.DictReader(io.StringIO(predict(capsys, *arguments, '--format', 'csv').out)))
    assert list(table[0]) == 'image,answer,class 1,probability 1,class 2,probability 2,error'.split(',')
    for row, cells in zip(rows, table, strict=True):
        assert [cells['class 1'], cells['class 2']] == row['classes'] and cells['error'] == ''
        assert float(cells['probability 2']) == pytest.approx(row['probabilities'][1], rel=1e-4)
    lines = predict(capsys, *arguments).out.splitlines()
    assert len(lines) == 5 and 'percentile' not in lines[0]
    first = ', '.join(f'{NAMES[c]} {p:.3f}' for p, c in zip(probabilities[0][:2], order[0][:2], strict=True))
    assert lines[1].startswith(str(paths[0])) and lines[1].endswith(first)
    for suffix, form in (('jsonl', 'jsonl'), ('csv', 'csv'), ('txt', 'table')):
        file = tmp_path / f'x.{suffix}'
        assert predict(capsys, *arguments, '-o', file).out == f'{file}\n'
        assert file.read_text('utf-8') == predict(capsys, *arguments, '--format', form).out
    with pytest.raises(SystemExit):
        predict(capsys, *arguments, '-o', file)
    assert 'exists already' in capsys.readouterr().err


@pytest.mark.parametrize('name', ['test_resnet', 'test_resnet.zzz_r0', 'deit_tiny_distilled_patch16_224.zzz_r4'])
def test_checkpoints_of_train_py(folder, tmp_path, capsys, name):
    """Any head; the preprocessing is that of the run, the class names are those of --class-map, else numbers."""
    kwargs = dict(depth=1, embed_dim=48, num_heads=3, img_size=SIZE) if 'deit' in name else {}
    model = distinct(timm.create_model(name, num_classes=len(NAMES), **kwargs)).eval()
    args = dict(model=name, img_size=SIZE, mean=list(MEAN), std=list(STD), crop_pct=0.8, model_kwargs=kwargs)
    args.update(interpolation='bicubic', class_map='gone.txt')
    torch.save(dict(state_dict=model.state_dict(), args=argparse.Namespace(**args)), tmp_path / 'a.pth.tar')
    best = expected(model, [folder / 'photos/a.png'])[0].sort(descending=True)[1].tolist()
    arguments = (tmp_path / 'a.pth.tar', folder / 'photos/a.png', '--format', 'jsonl')
    assert json.loads(predict(capsys, *arguments).out)['classes'] == [f'class {c}' for c in best]
    (tmp_path / 'names.txt').write_text('\n'.join(NAMES))
    row = json.loads(predict(capsys, *arguments, '--class-map', tmp_path / 'names.txt').out)
    assert row['classes'] == [NAMES[c] for c in best]
    (tmp_path / 'names.txt').write_text('ant\nbee\n')
    with pytest.raises(SystemExit):
        predict(capsys, *arguments, '--class-map', tmp_path / 'names.txt')
    assert '--class-map has 2 classes, the model has 4' in capsys.readouterr().err


def test_files_folders_patterns_and_stdin(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder / 'photos')
    monkeypatch.setattr(sys, 'stdin', io.StringIO('b 2.jpg\n\nmore/notes.txt\n'))
    assert find_images(['more', 'a.png', '*.jpg', '-', 'gone*.png']) == [
        *('more/c.png', 'more/ä.JPG', 'a.png', 'b 2.jpg'),
        *('b 2.jpg', 'more/notes.txt', 'gone*.png'),
    ]
    assert find_images(['**/*.png']) == ['a.png', 'more/c.png'] and capsys.readouterr().err == ''
    (folder / 'empty').mkdir()
    assert find_images([str(folder / 'empty')]) == []
    assert 'warning: no images in' in capsys.readouterr().err


def test_broken_images(folder, tmp_path, capsys):
    model = saved(tmp_path / 'model')
    (tmp_path / 'cut.png').write_bytes((folder / 'photos/a.png').read_bytes()[:200])
    (tmp_path / 'bad,"name\n.jpg').write_bytes(b'x')
    images = [folder / 'photos/a.png', tmp_path / 'cut.png', tmp_path / 'bad,"name\n.jpg', tmp_path / 'gone.png']
    images += [folder / 'photos/more/notes.txt', folder / 'photos/b 2.jpg']
    out, err = predict(capsys, tmp_path / 'model', *images, '-b', 2, '--format', 'csv')
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row['image'] for row in rows] == [str(path) for path in images]
    assert [bool(row['error']) for row in rows] == [False, True, True, True, True, False]
    assert 'No such file' in rows[3]['error'] and rows[3]['answer'] == rows[3]['class 1'] == ''
    best = expected(model, [images[0], images[5]]).argmax(1).tolist()
    assert [rows[0]['answer'], rows[5]['answer']] == [NAMES[c] for c in best]
    assert err == 'timm_zzz: warning: 4 of 6 images have an error in their row\n'
    assert 'error: ' in predict(capsys, tmp_path / 'model', *images).out.splitlines()[2]
    with pytest.raises(SystemExit) as e:
        predict(capsys, tmp_path / 'model', *images[1:3], '--format', 'jsonl')
    out, err = capsys.readouterr()
    assert e.value.code == 2 and 'none of the 2 images has a prediction' in err
    assert [list(json.loads(line)) for line in out.splitlines()] == [['image', 'error']] * 2


def test_other_errors_are_one_line(folder, tmp_path, capsys):
    saved(tmp_path / 'model')
    photos = folder / 'photos'
    for arguments, message in (
        ([tmp_path / 'model', photos, '--reject', 0.05], '--reject: .*has no percentiles of validation images'),
        ([tmp_path / 'model', photos, '--reject', 1], 'expected a share between 0 and 1'),
        ([tmp_path / 'gone/x/y', photos], 'no such file or folder'),
        ([tmp_path / 'model', tmp_path / 'model'], 'IMAGES: no images'),
    ):
        with pytest.raises(SystemExit) as e:
            predict(capsys, *arguments)
        err = capsys.readouterr().err
        assert e.value.code == 2 and re.search(message, err) and 'Traceback' not in err


@pytest.fixture
def calibrated(folder, tmp_path, capsys):
    """A checkpoint that calibrate wrote, its model, and the score of the held-out images by hand."""
    model = distinct(timm.create_model('test_vit.zzz_r4', num_classes=len(NAMES), img_size=SIZE)).eval()
    with torch.no_grad():
        model.head.sigma2_raw.fill_(-3.0)
    args = dict(model='test_vit.zzz_r4', img_size=SIZE, mean=list(MEAN), std=list(STD), crop_pct=0.8)
    args.update(interpolation='bicubic')
    torch.save(dict(state_dict=model.state_dict(), args=argparse.Namespace(**args)), tmp_path / 'a.pth.tar')
    images = ['--data-dir', str(folder / 'data'), '-j', '0', '--device', 'cpu', '-b', '7']
    calibrate.main([str(tmp_path / 'a.pth.tar'), *images])
    capsys.readouterr()
    file = tmp_path / 'calibrated.pth.tar'
    model.load_state_dict(torch.load(file, weights_only=False)['state_dict'])

    @torch.no_grad()
    def score(paths):
        with record_inputs(heads_of(model)) as inputs:
            model.eval()(prepared(paths))
        return scores.relative_mahalanobis(model.head, inputs['head']).double().numpy()

    held_out = score(sorted((folder / 'data/validation').glob('*/*.png')))
    return file, model, held_out, score


def test_percentiles(folder, calibrated, tmp_path, capsys):
    file, model, held_out, score = calibrated
    kept = torch.load(file, weights_only=False)['percentiles']
    assert kept['score'] == 'relative_mahalanobis'
    quantiles = np.sort(held_out)  # all of them, as there are fewer than a thousand
    assert kept['quantiles'] == pytest.approx(quantiles.tolist(), rel=1e-4, abs=1e-4)
    paths = [folder / 'photos' / name for name in FILES]
    percentiles = np.interp(score(paths), quantiles, np.linspace(0, 100, len(quantiles)))
    out = predict(capsys, file, folder / 'photos', '--format', 'jsonl').out
    assert [json.loads(line)['percentile'] for line in out.splitlines()] == pytest.approx(percentiles, abs=0.1)
    torch.save(
        {**torch.load(file, weights_only=False), 'percentiles': {**kept, 'quantiles': [2, 1]}}, tmp_path / 'b.pth'
    )
    with pytest.raises(SystemExit):
        predict(capsys, tmp_path / 'b.pth', folder / 'photos')
    assert 'finite quantiles in order, got [2, 1]' in capsys.readouterr().err

    inside = folder / 'data/validation'
    out = predict(capsys, file, inside, '--format', 'csv', '--reject', 0.25).out
    rows = list(csv.DictReader(io.StringIO(out)))
    rejected = [row['answer'] == NONE for row in rows]
    assert rejected == [float(row['percentile']) > 75 for row in rows] and sum(rejected) == 15
    assert all(row['class 1'].startswith('class ') for row in rows)
    out = predict(capsys, file, inside, '--reject', 0.25).out
    assert [NONE in line for line in out.splitlines()[1:]] == rejected and 'percentile' in out.splitlines()[0]


def test_interpolation_between_quantiles():
    """Interpolate as NumPy does, with 0 and 100 at the ends, also between equal quantiles."""
    quantiles = [-1.0, 0.0, 2.0, 2.5, 7.0]
    where = torch.tensor([-5.0, -1.0, -0.5, 0.0, 1.9, 2.2, 6.9, 7.0, 8.0])
    expected = np.interp(where.numpy(), quantiles, [0, 25, 50, 75, 100])
    assert Percentiles('energy', tuple(quantiles), '').of(where).tolist() == pytest.approx(expected)
    equal = Percentiles('energy', (0.0, 1.0, 1.0, 1.0), '').of(torch.tensor([0.5, 1.0, 2.0]))
    assert equal.tolist() == pytest.approx([100 / 6, 100, 100])
    assert Percentiles('energy', (1.0, 1.0), '').of(torch.tensor([0.0, 2.0])).tolist() == [0, 100]


def test_percentiles_travel(calibrated, folder, tmp_path, capsys, caplog):
    """Through push, save_pretrained and from_pretrained; not to other heads, and timm reads the config as ever."""
    file = calibrated[0]
    first = predict(capsys, file, folder / 'photos', '--format', 'jsonl').out
    push.main([str(file), 'owner/x', '--output', str(tmp_path / 'pushed')])
    capsys.readouterr()
    model = timm_zzz.from_pretrained(tmp_path / 'pushed')
    timm_zzz.save_pretrained(model, tmp_path / 'again')
    for place in ('pushed', 'again'):
        assert predict(capsys, tmp_path / place, folder / 'photos', '--format', 'jsonl').out == first
    plain = timm.create_model(f'local-dir:{tmp_path / "again"}', pretrained=True)
    assert all(map(torch.equal, plain.state_dict().values(), model.state_dict().values()))
    paths = [folder / 'photos' / name for name in FILES]
    assert timm_zzz.predict(plain, paths)[0].percentile is None
    other = timm_zzz.from_pretrained(tmp_path / 'again', num_classes=3)
    assert timm_zzz.predict(other, paths)[0].percentile is None and not caplog.records
    with torch.no_grad():
        model.head.bias += 1e-3
    assert timm_zzz.predict(model, paths)[0].percentile is None
    timm_zzz.save_pretrained(model, tmp_path / 'changed')
    assert [record.message.split(':')[0] for record in caplog.records] == [
        'The outlier percentiles are of other weights than the heads have now'
    ] * 2
    assert 'percentiles' not in json.loads((tmp_path / 'changed/config.json').read_text())['timm_zzz']


def test_push_calibrate(calibrated, folder, tmp_path, capsys):
    """The same percentiles as of the checkpoint that calibrate wrote from the same run and images."""
    file = calibrated[0]
    images = ['--calibrate', '--data-dir', str(folder / 'data'), '-j', '0', '--device', 'cpu']
    push.main([str(file.with_name('a.pth.tar')), 'owner/x', '--output', str(tmp_path / 'pushed'), *images])
    capsys.readouterr()
    config = json.loads((tmp_path / 'pushed/config.json').read_text())
    kept = torch.load(file, weights_only=False)['percentiles']
    assert config['timm_zzz']['percentiles']['quantiles'] == pytest.approx(kept['quantiles'], rel=1e-3, abs=1e-3)


def test_from_python(folder, tmp_path):
    """Paths and images of PIL, the model's own names, modes as they were, and what is wrong said by name."""
    reference = saved(tmp_path / 'model')
    paths = [folder / 'photos' / name for name in FILES]
    model = timm_zzz.from_pretrained(tmp_path / 'model')
    model.blocks.eval()
    modes = [module.training for module in model.modules()]
    found = timm_zzz.predict(model, [paths[0], str(paths[1]), Image.open(paths[2]).convert('RGBA'), 'gone.png'], 3)
    assert [module.training for module in model.modules()] == modes
    probabilities, order = expected(reference, paths[:3]).sort(1, descending=True)
    for each, p, classes in zip(found[:3], probabilities, order, strict=True):
        assert each.names == tuple(NAMES[c] for c in classes[:3]) and each.percentile is None and each.error == ''
        assert each.probabilities == pytest.approx(p[:3].tolist(), rel=1e-4)
    assert found[3][:3] == ((), (), None) and 'No such file' in found[3].error
    assert timm_zzz.predict(model, paths[0], top_k=9, workers=1)[0].names == tuple(NAMES[c] for c in order[0])
    assert timm_zzz.predict(model, iter(paths[:1]), class_names='wxyz')[0].names[0] == 'wxyz'[order[0][0]]
    assert timm_zzz.predict(model, []) == []
    grey = timm.create_model('test_resnet.zzz_r4', num_classes=2, in_chans=1)
    assert len(timm_zzz.predict(grey, paths)) == 4
    for model, options, message in (
        (timm.create_model('test_resnet.zzz_r4', num_classes=0), {}, 'num_classes=0 leaves it no classes'),
        (grey, dict(top_k=0), 'top_k: expected at least 1, got 0'),
        (grey, dict(class_names=['a']), 'class_names: got 1 names for 2 classes'),
    ):
        with pytest.raises(ValueError, match=message):
            timm_zzz.predict(model, paths, **options)
    with torch.no_grad():
        grey.get_classifier().bias.fill_(float('nan'))
    assert 'NaN' in timm_zzz.predict(grey, paths)[0].error


def test_grey_checkpoint_of_train_py(folder, tmp_path, capsys):
    """Three means of RGB become one, as timm's loader does it."""
    model = distinct(timm.create_model('test_resnet.zzz_r4', num_classes=3, in_chans=1)).eval()
    args = argparse.Namespace(model='test_resnet.zzz_r4', in_chans=1, input_size=[1, SIZE, SIZE], crop_pct=1.0)
    torch.save(dict(state_dict=model.state_dict(), args=args), tmp_path / 'grey.pth.tar')
    paths = [folder / 'photos' / name for name in FILES]
    out = predict(capsys, tmp_path / 'grey.pth.tar', *paths, '--format', 'jsonl', '-k', 3).out
    config = resolve_data_config(dict(crop_pct=1.0, in_chans=1, input_size=(1, SIZE, SIZE)), model=model)
    keys = ('interpolation', 'crop_pct')
    means = {key: sum(config[key]) / len(config[key]) for key in ('mean', 'std')}
    transform = create_transform((1, SIZE, SIZE), **means, **{key: config[key] for key in keys})
    with torch.no_grad():
        probabilities = model(torch.stack([transform(Image.open(path).convert('L')) for path in paths])).softmax(1)
    for line, row in zip(out.splitlines(), probabilities, strict=True):
        assert json.loads(line)['probabilities'] == pytest.approx(row.sort(descending=True)[0].tolist(), abs=1e-4)


def test_output_and_shares_that_say_too_little(folder, calibrated, tmp_path, capsys):
    saved(tmp_path / 'model')
    for arguments, what in (
        ((tmp_path / 'model', folder / 'photos', '-o', tmp_path / 'x.parquet'), '--output: give --format, x.parquet'),
        ((calibrated[0], folder / 'photos', '--reject', 1e-4), 'too few for a share of 0.0001; calibrate with more'),
    ):
        with pytest.raises(SystemExit):
            predict(capsys, *arguments)
        assert what in capsys.readouterr().err
    (tmp_path / 'names.txt').write_text('\n'.join(NAMES[::-1]))
    with pytest.raises(SystemExit):
        predict(capsys, tmp_path / 'model', folder / 'photos', '--class-map', tmp_path / 'names.txt')
    assert '--class-map: it has the classes of the model in another order' in capsys.readouterr().err
