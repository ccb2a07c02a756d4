"""The reduced sets of docs/results.md, from checkouts with a few images."""

import importlib
import json
import sys

import numpy as np
import pytest
from PIL import Image

pytest.importorskip('scipy.io')
SPLITS = ('train', 'validation')


@pytest.fixture
def make_sets(benchmarks):
    return importlib.import_module('make_sets')


@pytest.fixture
def run(make_sets, monkeypatch, tmp_path):
    def run(*arguments):
        monkeypatch.setattr(sys, 'argv', ['make_sets.py', *map(str, arguments), '--output', str(tmp_path / 'sets')])
        make_sets.main()
        out = tmp_path / 'sets' / arguments[0]
        return {
            split: sorted(str(p.relative_to(out / split)) for p in (out / split).rglob('*.jpg')) for split in SPLITS
        }

    return run


def image(path, color, size=(60, 40)):
    """Of one color, and with bytes of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.broadcast_to(np.array(color, np.uint8), (size[1], size[0], 3))
    Image.fromarray(np.ascontiguousarray(pixels)).save(path, quality=95)
    path.write_bytes(path.read_bytes() + str(path).encode())


def test_birds_train_where_the_flag_is_0(run, tmp_path):
    root = tmp_path / 'ex03/task2/bird_dataset'
    names = ['001.Auk/one.jpg', '001.Auk/two.jpg', '002.Owl/three.jpg', '002.Owl/four.jpg']
    for name in names:
        image(root / 'images' / name, 100)
    lists = dict(
        images=names, image_class_labels=[1, 1, 2, 2], train_test_split=[0, 1, 1, 0], classes=['001.Auk', '002.Owl']
    )
    for name, values in lists.items():
        (root / f'{name}.txt').write_text(''.join(f'{i + 1}, {value}\n' for i, value in enumerate(values)))
    files = run('birds', tmp_path)
    assert files == {'train': [names[0], names[3]], 'validation': [names[1], names[2]]}


def cars_checkout(folder, copies=False):
    from scipy.io import savemat

    names = ['Zed Q/7 2012', 'Acme A-1.5 2010']
    savemat(folder / 'cars_meta.mat', {'class_names': np.array([names], dtype=object)})
    (folder / 'train_perfect_preds.txt').write_text('1\n2\n' * 10)
    for i in range(20):
        image(folder / f'cars_train/{i + 1:05d}.jpg', (200, 20, 60))
    if copies:
        files = sorted((folder / 'cars_train').iterdir())
        for file in files[1:]:
            file.write_bytes(files[0].read_bytes())


def test_cars_are_split_by_class_and_red_swapped_for_blue(run, tmp_path):
    cars_checkout(tmp_path)
    files = run('cars', tmp_path)
    for label, own in (('Zed_Q_7_2012', range(1, 21, 2)), ('Acme_A-1.5_2010', range(2, 21, 2))):
        of_class = {split: {f for f in files[split] if f.startswith(f'{label}/')} for split in SPLITS}
        assert len(of_class['train']) == 6 and len(of_class['validation']) == 4
        assert of_class['train'] | of_class['validation'] == {f'{label}/{i:05d}.jpg' for i in own}
    pixels = np.asarray(Image.open(tmp_path / 'sets/cars/train' / files['train'][0])).astype(int)
    assert abs(pixels - (60, 20, 200)).max() < 8
    assert run('cars2', tmp_path) == {split: [] for split in SPLITS}  # the 101st class and so on


def test_training_copies_of_validation_images_are_left_out(run, tmp_path):
    cars_checkout(tmp_path, copies=True)
    files = run('cars', tmp_path)
    assert not files['train'] and len(files['validation']) == 8


def flowers_checkout(folder, labels):
    from scipy.io import savemat

    (folder / 'cat_to_name.json').write_text(json.dumps({'1': "bishop's  Rose", '12': 'iris'}))
    for key, number in [('1', i) for i in range(1, 72)] + [('12', 72), ('12', 73)]:
        image(folder / f'dataset/{key}/image_{number:05d}.jpg', 90)
    savemat(folder / 'setid.mat', dict(trnid=[[1, 72]], valid=[[2]], tstid=[[*range(3, 72), 73]]))
    savemat(folder / 'imagelabels.mat', dict(labels=[labels]))


def test_flowers_have_the_official_split_and_at_most_60_a_class(run, tmp_path):
    flowers_checkout(tmp_path, [1] * 71 + [12] * 2)
    files = run('flowers', tmp_path, tmp_path)
    assert files['train'] == ['001_bishop_s_rose/image_00001.jpg', '001_bishop_s_rose/image_00002.jpg'] + [
        '012_iris/image_00072.jpg'
    ]
    assert len(files['validation']) == 58 + 1 and '012_iris/image_00073.jpg' in files['validation']


def test_flowers_with_other_labels_are_refused(run, tmp_path):
    flowers_checkout(tmp_path, [1] * 70 + [12] * 3)
    with pytest.raises(ValueError, match='labels are not those of'):
        run('flowers', tmp_path, tmp_path)


def test_butterflies_fill_validation_from_train(run, tmp_path):
    counts = dict(train=60, valid=5, test=5)
    for split, count in counts.items():
        for i in range(count):
            image(tmp_path / f'{split}/RED ADMIRAL/{i:02d}.jpg', 30)
    files = run('butterflies', tmp_path)
    assert len(files['train']) == 30 and len(files['validation']) == 20
    assert sum('RED_ADMIRAL/train_' in f for f in files['validation']) == 10
    assert not set(files['train']) & set(files['validation'])


def test_food_keeps_to_the_official_lists(run, tmp_path):
    for i in range(80):
        image(tmp_path / f'data/train/ramen/{i}.jpg', 70)
    (tmp_path / 'meta').mkdir()
    lists = dict(train=[f'ramen/{i}' for i in range(40)], test=[f'ramen/{i}' for i in range(40, 65)])
    for split, names in lists.items():
        (tmp_path / f'meta/{split}.json').write_text(json.dumps({'ramen': names}))
    files = run('food', tmp_path, tmp_path / 'meta')
    assert len(files['train']) == 29 and len(files['validation']) == 20
    assert all(f[:-4] in lists['train'] for f in files['train'])
    assert all(f[:-4] in lists['test'] for f in files['validation'])


@pytest.mark.parametrize(
    'size, expected', [((400, 288), (200, 144)), ((100, 300), (100, 300)), ((145, 900), (144, 894))]
)
def test_only_large_images_are_resized(make_sets, tmp_path, size, expected):
    image(tmp_path / 'a.png', 10, size)
    assert make_sets.prepared(tmp_path / 'a.png', False).size == expected


def test_what_is_there_stays_and_checkouts_are_counted(run, tmp_path, capsys):
    cars_checkout(tmp_path)
    run('cars', tmp_path)
    with pytest.raises(FileExistsError, match='exists already'):
        run('cars', tmp_path)
    with pytest.raises(SystemExit):
        run('food', tmp_path)
    assert 'food is made of 2 checkouts' in capsys.readouterr().err
