"""The sets of docs/results.md, from checkouts and folders laid out like the official archives, with a few images."""

import json

import make_sets
import numpy as np
import pytest
from PIL import Image

savemat = pytest.importorskip('scipy.io').savemat
SPLITS = ('train', 'validation')


@pytest.fixture
def run(tmp_path):
    """Make a set from folders in tmp_path and return the files of each split."""

    def run(name, *folders, side=()):
        options = [*side, '--output', str(tmp_path / 'sets')]
        make_sets.main([name, *(str(tmp_path / folder) for folder in folders), *options])
        out = tmp_path / 'sets' / name
        return {k: sorted(str(p.relative_to(out / k)) for p in (out / k).rglob('*.jpg')) for k in SPLITS}

    return run


def image(path, color, size=(60, 40)):
    """Write an image of one color, with bytes of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.broadcast_to(np.array(color, np.uint8), (size[1], size[0], 3))
    Image.fromarray(np.ascontiguousarray(pixels)).save(path, quality=95)
    path.write_bytes(path.read_bytes() + str(path).encode())


def test_birds_train_where_the_flag_is_0(run, tmp_path):
    root = tmp_path / 'ex03/task2/bird_dataset'
    names = ['001.Auk/one.jpg', '001.Auk/two.jpg', '002.Owl/three.jpg', '002.Owl/four.jpg']
    for name in names:
        image(root / 'images' / name, 100)
    lists = dict(images=names, image_class_labels=[1, 1, 2, 2], train_test_split=[0, 1, 1, 0])
    lists.update(classes=['001.Auk', '002.Owl'])
    for name, values in lists.items():
        (root / f'{name}.txt').write_text(''.join(f'{i + 1}, {value}\n' for i, value in enumerate(values)))
    assert run('birds', '.') == {'train': [names[0], names[3]], 'validation': [names[1], names[2]]}


def test_official_cub_trains_where_the_flag_is_1(run, tmp_path):
    names = ['001.Black_footed_Albatross/one.jpg', '001.Black_footed_Albatross/two.jpg', '002.Owl/three.jpg']
    for name in names:
        image(tmp_path / 'CUB_200_2011/images' / name, 100, (400, 300))
    lists = dict(images=names, image_class_labels=[1, 1, 2], train_test_split=[1, 0, 1])
    lists.update(classes=['001.Black_footed_Albatross', '002.Owl'])
    for name, values in lists.items():
        (tmp_path / f'CUB_200_2011/{name}.txt').write_text(''.join(f'{i + 1} {v}\n' for i, v in enumerate(values)))
    files = run('cub', 'CUB_200_2011', side=('--side', '224'))
    assert files == {'train': [names[0], names[2]], 'validation': [names[1]]}
    assert Image.open(tmp_path / 'sets/cub/train' / names[0]).size == (299, 224)


def test_official_cars_as_they_are(run, tmp_path):
    """Laid out as the archives unpack: test labels in a file of their own, numbers that both splits have."""
    root = tmp_path / 'stanford_cars'
    (root / 'devkit').mkdir(parents=True)
    classes = np.array([['AM General Hummer SUV 2000', 'Ram C/V Cargo Van 2012']], dtype=object)
    savemat(root / 'devkit/cars_meta.mat', dict(class_names=classes))
    for split, file, labels in (
        ('train', 'devkit/cars_train_annos.mat', (2, 1)),
        ('test', 'cars_test_annos_withlabels.mat', (1, 1, 2)),
    ):
        names = [f'{i + 1:05d}.jpg' for i in range(len(labels))]
        annotations = np.array(list(zip(labels, names, strict=True)), dtype=[('class', 'i4'), ('fname', 'O')])
        savemat(root / file, dict(annotations=annotations))
        for name in names:
            image(root / f'cars_{split}' / name, 80, (300, 200))
    files = run('stanford_cars', '.', side=('--side', '0'))
    first, second = 'AM_General_Hummer_SUV_2000', 'Ram_C_V_Cargo_Van_2012'
    assert files['train'] == [f'{first}/00002.jpg', f'{second}/00001.jpg']
    assert files['validation'] == [f'{first}/00001.jpg', f'{first}/00002.jpg', f'{second}/00003.jpg']
    copy = tmp_path / f'sets/stanford_cars/train/{second}/00001.jpg'
    assert copy.read_bytes() == (root / 'cars_train/00001.jpg').read_bytes()


def test_official_aircraft_are_variants(run, tmp_path):
    data = tmp_path / 'fgvc-aircraft-2013b/data'
    lists = dict(trainval=['0034309 F-16A/B', '0034958 707-320'], test=['1025794 F-16A/B'])
    for split, lines in lists.items():
        for line in lines:
            image(data / 'images' / f'{line.split()[0]}.jpg', 90)
        (data / f'images_variant_{split}.txt').write_text('\n'.join(lines) + '\n')
    (data / 'variants.txt').write_text('707-320\nF-16A/B\n')
    files = run('aircraft', '.')
    assert files['train'] == ['707-320/0034958.jpg', 'F-16A_B/0034309.jpg']
    assert files['validation'] == ['F-16A_B/1025794.jpg']


@pytest.fixture
def cars(tmp_path):
    names = np.array([['Zed Q/7 2012', 'Acme A-1.5 2010']], dtype=object)
    savemat(tmp_path / 'cars_meta.mat', {'class_names': names})
    (tmp_path / 'train_perfect_preds.txt').write_text('1\n2\n' * 10)
    files = [tmp_path / f'cars_train/{i + 1:05d}.jpg' for i in range(20)]
    for file in files:
        image(file, (200, 20, 60))
    return files


def test_cars_are_split_by_class_and_red_swapped_for_blue(run, cars, tmp_path):
    files = run('cars', '.')
    for label, own in (('Zed_Q_7_2012', range(1, 21, 2)), ('Acme_A-1.5_2010', range(2, 21, 2))):
        of_class = {split: {f for f in files[split] if f.startswith(f'{label}/')} for split in SPLITS}
        assert len(of_class['train']) == 6 and len(of_class['validation']) == 4
        assert of_class['train'] | of_class['validation'] == {f'{label}/{i:05d}.jpg' for i in own}
    pixels = np.asarray(Image.open(tmp_path / 'sets/cars/train' / files['train'][0])).astype(int)
    assert abs(pixels - (60, 20, 200)).max() < 8
    assert run('cars2', '.') == {split: [] for split in SPLITS}  # the 101st class and so on


def test_training_copies_of_validation_images_are_left_out(run, cars):
    for file in cars[1:]:
        file.write_bytes(cars[0].read_bytes())
    files = run('cars', '.')
    assert not files['train'] and len(files['validation']) == 8


def test_flowers_have_the_official_split_and_at_most_60_a_class(run, tmp_path):
    (tmp_path / 'cat_to_name.json').write_text(json.dumps({'1': "bishop's  Rose", '12': 'iris'}))
    for key, number in [('1', i) for i in range(1, 72)] + [('12', 72), ('12', 73)]:
        image(tmp_path / f'dataset/{key}/image_{number:05d}.jpg', 90)
    savemat(tmp_path / 'setid.mat', dict(trnid=[[1, 72]], valid=[[2]], tstid=[[*range(3, 72), 73]]))
    savemat(tmp_path / 'imagelabels.mat', dict(labels=[[1] * 70 + [12] * 3]))
    with pytest.raises(ValueError, match='labels are not those of'):
        run('flowers', '.', '.')
    savemat(tmp_path / 'imagelabels.mat', dict(labels=[[1] * 71 + [12] * 2]))
    files = run('flowers', '.', '.')
    rose, iris = '001_bishop_s_rose/image_', '012_iris/image_'
    assert files['train'] == [f'{rose}00001.jpg', f'{rose}00002.jpg', f'{iris}00072.jpg']
    assert len(files['validation']) == 58 + 1 and f'{iris}00073.jpg' in files['validation']


def test_butterflies_fill_validation_from_train(run, tmp_path):
    for split, count in dict(train=60, valid=5, test=5).items():
        for i in range(count):
            image(tmp_path / f'{split}/RED ADMIRAL/{i:02d}.jpg', 30)
    files = run('butterflies', '.')
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
    files = run('food', '.', 'meta')
    assert len(files['train']) == 29 and len(files['validation']) == 20
    assert all(f[:-4] in lists['train'] for f in files['train'])
    assert all(f[:-4] in lists['test'] for f in files['validation'])


def test_only_large_images_are_resized(tmp_path):
    for size, expected in {(400, 288): (200, 144), (100, 300): (100, 300), (145, 900): (144, 894)}.items():
        image(tmp_path / 'a.png', 10, size)
        assert make_sets.prepared(tmp_path / 'a.png', False).size == expected


def test_what_is_there_stays_and_checkouts_are_counted(run, cars, capsys):
    run('cars', '.')
    with pytest.raises(FileExistsError, match='exists already'):
        run('cars', '.')
    with pytest.raises(SystemExit):
        run('food', '.')
    assert 'food is made of 2 checkouts' in capsys.readouterr().err
