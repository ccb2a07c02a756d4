"""Make the sets of docs/results.md as ImageFolders, from checkouts of public repositories or the official archives.

    python benchmarks/make_sets.py SET CHECKOUT [CHECKOUT] --output DIR [--side PIXELS]

SET is one of these, CHECKOUT the folder of the repository on GitHub at that commit (two for flowers and food):

    birds        serizba/vision 16a8a47
    cars, cars2  fmejbah/car_dataset1 2ac6920
    flowers      Tas-r/Knn-Classifier-Oxford-Flower 77f1748, wallace-zhou/FloralVision c767552
    butterflies  pilicorredor/inteligencia a092ed8
    food         Gandolier/genai_food101_repo 1ed9ca6, Neilus03/GAN_food101 aeee0e5

or one of the official sets, CHECKOUT where they were unpacked:

    cub            CUB_200_2011, with images, images.txt, classes.txt, image_class_labels.txt, train_test_split.txt
    stanford_cars  the folder of stanford_cars, as torchvision.datasets.StanfordCars reads it
    aircraft       the folder of fgvc-aircraft-2013b, as torchvision.datasets.FGVCAircraft reads it

Images are made smaller, to a short side of 144 pixels or --side; with --side 0 they are copied as they are.

The images keep the licences that their authors gave them; none is part of this project. The sets of cars and flowers
need SciPy.
"""

import argparse
import hashlib
import json
import random
import re
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, TypeVar

from PIL import Image
from torchvision import datasets

SIDE = 144  # pixels of the short side, at most
QUALITY = 72  # of JPEG

T = TypeVar('T')


class Item(NamedTuple):
    split: str  # train or validation
    label: str
    source: Path
    name: str  # of the file without its suffix


def items_of(label: str, train: Sequence[Path], validation: Sequence[Path]) -> List[Item]:
    parts = (('train', train), ('validation', validation))
    return [Item(split, label, path, path.stem.replace(' ', '_')) for split, paths in parts for path in paths]


def shuffled(paths: Sequence[T]) -> List[T]:
    result = list(paths)
    random.Random(0).shuffle(result)
    return result


def sample(paths: Sequence[T], count: int) -> List[T]:
    return random.Random(0).sample(list(paths), count) if len(paths) > count else list(paths)


def find(checkout: Path, name: str) -> Path:
    found = next(checkout.rglob(name), None)
    if found is None:
        raise FileNotFoundError(f'{checkout} has no {name}')
    return found


def folder_name(text: str) -> str:
    return re.sub(r'[^A-Za-z0-9.-]+', '_', text)


def table(path: Path) -> Dict[str, str]:
    """Read a key and a value a line, with a comma or a space between them."""
    lines = path.read_text().splitlines()
    return dict(re.split(r'[,\s]+', line.strip(), maxsplit=1) for line in lines if line.strip())


def cub(root: Path, training: str = '1') -> List[Item]:
    images, labels, flags, names = (
        table(root / f'{name}.txt') for name in ('images', 'image_class_labels', 'train_test_split', 'classes')
    )
    items = []
    for key, path in images.items():
        source = root / 'images' / path
        items.append(Item('train' if flags[key] == training else 'validation', names[labels[key]], source, source.stem))
    return items


def birds(checkout: Path) -> List[Item]:
    """Flag 0 of the split marks CUB's training images here, though CUB's own flag is 1."""
    return cub(checkout / 'ex03/task2/bird_dataset', '0')


def of_torchvision(name: str, train: str, test: str) -> Callable[[Path], List[Item]]:
    """List the images of a data set of torchvision by its names for the splits."""

    def items(root: Path) -> List[Item]:
        found = []
        for split, its_name in (('train', train), ('validation', test)):
            dataset: Any = getattr(datasets, name)(root, split=its_name, loader=Path)
            for path, label in (dataset[i] for i in range(len(dataset))):
                found.append(Item(split, folder_name(dataset.classes[label]), path, path.stem))
        return found

    return items


def cars(checkout: Path, first: int = 0, last: int = 100) -> List[Item]:
    """List images of some of the 196 classes by name, 60 % for training: the official test part is missing."""
    from scipy.io import loadmat

    names = [folder_name(str(name[0])) for name in loadmat(checkout / 'cars_meta.mat')['class_names'][0]]
    files: Dict[str, List[Path]] = {name: [] for name in names}
    for i, label in enumerate((checkout / 'train_perfect_preds.txt').read_text().split()):
        files[names[int(label) - 1]].append(checkout / f'cars_train/{i + 1:05d}.jpg')
    items = []
    for name in sorted(files)[first:last]:
        paths = shuffled(sorted(files[name]))
        count = round(len(paths) * 0.6)
        items += items_of(name, paths[:count], paths[count:])
    return items


def cars2(checkout: Path) -> List[Item]:
    return cars(checkout, 100, 196)


def flowers(checkout: Path, lists: Path) -> List[Item]:
    """The official training and validation parts for training; at most 60 images a class."""
    from scipy.io import loadmat

    parts, labels = loadmat(find(lists, 'setid.mat')), loadmat(find(lists, 'imagelabels.mat'))['labels'][0]
    training = {int(i) for part in ('trnid', 'valid') for i in parts[part][0]}
    items = []
    for key, name in json.loads((checkout / 'cat_to_name.json').read_text()).items():
        paths = sorted(checkout.glob(f'dataset/{key}/*.jpg'))
        numbers = {path: int(path.stem[-5:]) for path in paths}
        if any(labels[number - 1] != int(key) for number in numbers.values()):
            raise ValueError(f'{checkout}: labels are not those of {lists}')
        train = [path for path in paths if numbers[path] in training]
        rest = sample([path for path in paths if numbers[path] not in training], 60 - len(train))
        label = f'{int(key):03d}_' + re.sub(r'[^a-z0-9-]+', '_', name.lower()).strip('_')
        items += items_of(label, train, rest)
    return items


def butterflies(checkout: Path) -> List[Item]:
    """Validation: what is called valid and test there, filled up to 20 a class from train; 30 others for training."""
    items = []
    for folder in sorted((checkout / 'train').iterdir()):
        splits = [sorted((checkout / split / folder.name).glob('*')) for split in ('valid', 'test')]
        validation, rest = splits[0] + splits[1], shuffled(sorted(folder.iterdir()))
        count = 20 - len(validation)
        chosen = items_of(folder_name(folder.name), rest[count : count + 30], validation + rest[:count])
        items += [item._replace(name=f'{item.source.parts[-3]}_{item.name}') for item in chosen]
    return items


def food(checkout: Path, lists: Path) -> List[Item]:
    """List 29 training and 20 validation images per class from Food-101's official lists."""
    official = {}
    for split in ('train', 'test'):
        names = json.loads(find(lists, f'{split}.json').read_text()).values()
        official[split] = {name for of_class in names for name in of_class}
    items = []
    for folder in sorted((checkout / 'data/train').iterdir()):
        train, test = (
            [path for path in sorted(folder.iterdir()) if f'{folder.name}/{path.stem}' in official[split]]
            for split in ('train', 'test')
        )
        items += items_of(folder.name, sample(train, 29), sample(test, 20))
    return items


SETS: Dict[str, Tuple[Callable[..., List[Item]], int, bool]] = {  # number of checkouts; red and blue swapped there
    'birds': (birds, 1, False),
    'cars': (cars, 1, True),
    'cars2': (cars2, 1, True),
    'flowers': (flowers, 2, False),
    'butterflies': (butterflies, 1, False),
    'food': (food, 2, False),
    'cub': (cub, 1, False),
    'stanford_cars': (of_torchvision('StanfordCars', 'train', 'test'), 1, False),
    'aircraft': (of_torchvision('FGVCAircraft', 'trainval', 'test'), 1, False),
}


def prepared(path: Path, swap: bool, side: int = SIDE) -> Image.Image:
    """Open an image in RGB, the short side at most ``side``; ``swap``: red for blue."""
    image: Any = Image.open(path)
    image.draft('RGB', (2 * side, 2 * side))
    image = image.convert('RGB')
    if swap:
        image = Image.merge('RGB', image.split()[::-1])
    scale = side / min(image.size)
    if scale < 1:
        image = image.resize([max(side, round(length * scale)) for length in image.size], Image.Resampling.BICUBIC)
    return image


def write(items: List[Item], output: Path, swap: bool, side: int = SIDE) -> List[Item]:
    """Write the images, as they are for side 0; returns those that were.

    Training images whose bytes a validation image has are left out.
    """
    digests = {item.source: hashlib.sha256(item.source.read_bytes()).digest() for item in items}
    validation = {digests[item.source] for item in items if item.split == 'validation'}
    kept = [item for item in items if item.split == 'validation' or digests[item.source] not in validation]
    for item in kept:
        target = output / item.split / item.label / f'{item.name}.jpg'
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            raise FileExistsError(f'{target} exists already')
        if side:
            prepared(item.source, swap, side).save(target, 'JPEG', quality=QUALITY)
        else:
            shutil.copyfile(item.source, target)
    return kept


def main(arguments: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('set', choices=SETS)
    parser.add_argument('checkouts', type=Path, nargs='+', metavar='CHECKOUT')
    parser.add_argument('--output', type=Path, required=True, metavar='DIR', help='the set is DIR/SET')
    parser.add_argument('--side', type=int, default=SIDE, metavar='PIXELS', help='short side; 0: as they are')
    options = parser.parse_args(arguments)
    function, count, swap = SETS[options.set]
    if len(options.checkouts) != count:
        parser.error(f'{options.set} is made of {count} checkout{"s" if count > 1 else ""}')
    kept = write(function(*options.checkouts), options.output / options.set, swap, options.side)
    for split in ('train', 'validation'):
        labels = [item.label for item in kept if item.split == split]
        print(f'{split}: {len(labels)} images of {len(set(labels))} classes')


if __name__ == '__main__':
    main()
