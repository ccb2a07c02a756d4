"""Measure the ZZZ head's own claim: that a class's subspace holds what varies within it, not what tells it apart.

    python benchmarks/nuisance.py --results FILE.jsonl

On the beetles of ``python -m timm_zzz demo``, whose nuisances are known: beetles of a class are drawn with one of them
varied (color, pose, background, noise) and all else fixed but the grain of the noise, which Pillow draws without a
seed, or with ``all`` varied; for contrast, beetles of every ``class`` with all else fixed. The figures are the parts of
the variance that this makes among the embeddings that lie inside span(U_c) of the head. Each seed has a backbone,
training images and drawn images of its own; seeds that the file has are not repeated. Prints a table of all rows. Runs
on a CPU, two to three minutes a seed.
"""

import argparse
import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Dict, List, Optional, Sequence, Tuple

import timm
import torch
from accuracy import Row, append, read
from accuracy_table import groups, markdown, show
from measure import environment_line
from subspaces import shares
from timm.utils import random_seed
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from timm_zzz.cli import demo
from timm_zzz.fit import ZZZFit
from timm_zzz.functional import normalize
from timm_zzz.models.registry import RANKS
from timm_zzz.scores import class_gaussians_of

VARIED = (*demo.NUISANCES, 'all', 'class')
SETTINGS, DRAWS = 3, 12  # of what is fixed, for each class, and images in each
# Options of the fit, and learning rates to fine-tune with: the demo's, and the fit of the scatter itself
HEADS: Dict[str, Tuple[Dict[str, str], Optional[demo.Rates]]] = {
    name: (dict(preset=method.preset), method.rates) for name, method in demo.METHODS.items() if method.preset
}
HEADS['ZZZ, fitted as densities'] = (dict(objective='density'), None)
CPU = torch.device('cpu')


def draw(varied: str, seed: str, settings: int = SETTINGS, draws: int = DRAWS) -> Tensor:
    """Draw beetles of every class with one nuisance varied and all else fixed.

    For ``class`` nothing varies but the class: as many images, each of a setting of its own, in which all classes are
    drawn.

    Returns:
        Shape (C, settings, draws, 3, S, S), uint8.
    """
    if varied == 'class':
        settings, draws = settings * draws, 1
    changed = {'all': demo.NUISANCES, 'class': ()}.get(varied, (varied,))
    images = []
    for name in sorted(demo.FINE):
        for i in range(settings):
            fixed = f'{seed} {varied} {i}' if varied == 'class' else f'{seed} {varied} {name} {i}'
            for j in range(draws):
                # A generator each, so that what one draws leaves the others as they are
                new = f'{fixed} {j}'
                own = {k: random.Random(f'{new if k in changed else fixed} {k}') for k in demo.NUISANCES}
                rest = random.Random(new if varied == 'all' else fixed)
                images.append(tv.pil_to_tensor(demo.draw_beetle(rest, *demo.FINE[name][0], own=own)))
    return torch.stack(images).unflatten(0, (len(demo.FINE), settings, draws))


@torch.inference_mode()
def embed(model: Any, images: Tensor) -> Tensor:
    """Compute the embeddings (..., d) of images (..., 3, S, S), uint8."""
    mean, std = (list(demo.PREPROCESSING[key]) for key in ('mean', 'std'))
    model.eval()
    parts = []
    for part in images.flatten(0, -4).split(256):
        x = tv.normalize(tv.to_dtype(part, torch.float32, scale=True), mean, std)
        parts.append(model.forward_head(model.forward_features(x), pre_logits=True))
    return torch.cat(parts).unflatten(0, images.shape[:-3])


def deviations(x: Tensor) -> Tensor:
    """Compute deviations (C, N, d) of embeddings (C, settings, draws, d): from the mean over the draws of a setting.

    With one draw a setting: from the class to each other one.
    """
    count, _, draws, width = x.shape
    if draws > 1:
        return (x - x.mean(2, keepdim=True)).flatten(1, 2)
    difference = x.transpose(0, 1).flatten(1, 2) - x  # (C, settings, C, d)
    others = ~torch.eye(count, dtype=torch.bool)
    return difference.transpose(1, 2)[others].reshape(count, -1, width)


def measure(model: Any, drawn: Dict[str, Tensor]) -> Row:
    """Compute :func:`shares` of a model by what was varied, and its top-1 in percent where all was."""
    head = model.get_classifier()
    classes = class_gaussians_of(head)
    found: Row = {}
    for varied, images in drawn.items():
        features = embed(model, images)
        delta = deviations(normalize(features))
        target = torch.arange(len(delta)).repeat_interleave(delta.shape[1])
        found[varied] = shares(delta.flatten(0, 1), target, classes)
        if varied == 'all':
            with torch.inference_mode():
                right = head(features.flatten(0, -2)).argmax(1) == target
            found['top1'] = 100 * right.double().mean().item()
    return found


def run(seed: int, images: Sequence[int], rank: int, coarse_epochs: int, epochs: int) -> List[Row]:
    """Train a backbone and take it on with each ZZZ head, as the demo does; returns a row of each head and count."""
    drawn = {varied: draw(varied, f'{seed} nuisance') for varied in VARIED}
    rows = []
    with TemporaryDirectory() as temporary:
        data = Path(temporary)
        demo.draw_classes(data / 'coarse', demo.COARSE, demo.COARSE_IMAGES, f'{seed} coarse')
        random_seed(seed)
        backbone = timm.create_model(demo.ARCHITECTURE, num_classes=len(demo.COARSE))
        demo.train(backbone, data / 'coarse', coarse_epochs, demo.COARSE_RATES, CPU, workers=0)
        torch.save(backbone.state_dict(), data / 'backbone.pth')
        for count in images:
            folder = data / f'fine{count}'
            demo.draw_classes(folder, demo.FINE, count, f'{seed} {folder.name}')
            loader = demo.images_of(folder, CPU, workers=0)
            for name, (preset, rates) in HEADS.items():
                random_seed(seed)
                model = demo.create_model(rank, data / 'backbone.pth')
                fit = ZZZFit(len(demo.FINE), rank, **preset).fit(*demo.features_of(model, loader, CPU))
                with torch.no_grad():
                    fit.fill(model.get_classifier())
                if rates is not None:
                    demo.train(model, folder, epochs, rates, CPU, workers=0)
                job = dict(seed=seed, images=count, head=name, rank=rank, width=model.num_features)
                rows.append(dict(job, **measure(model, drawn), environment=environment_line(CPU)))
    return rows


def table(rows: Sequence[Row]) -> str:
    """Show the shares of every head by what varied, as means over seeds with standard errors."""
    titles = ['images a class', 'head', 'top-1', 'varied', 'variance', 'inside its own subspace, %', "another class's"]
    titles += ['a random one', 'tolerated, %', 'with random directions']
    lines = []
    for (count, rank, name), group in sorted(groups(rows, 'images', 'rank', 'head').items()):
        for varied in VARIED:
            columns = {k: [row[varied][k] for row in group] for k in group[0][varied]}
            cells = [str(count), f'{name}, rank {rank}', show([row['top1'] for row in group], 1), varied]
            cells.append(show(columns['variance'], 4))
            cells += [show(columns[k], 1) for k in ('own', 'other', 'random', 'tolerated', 'tolerated_random')]
            lines.append(cells)
    return markdown(titles, lines)


def main(arguments: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--results', type=Path, required=True, metavar='FILE.jsonl', help='files FILE*.jsonl are read')
    add('--seeds', type=int, nargs='*', default=[0, 1, 2, 3, 4], help='none: only the table')
    add('--images', type=int, nargs='+', default=[5, 20], metavar='N', help='training images of each class')
    add('--rank', type=int, choices=RANKS, default=8)
    add('--coarse-epochs', type=int, default=demo.COARSE_EPOCHS, help="of the backbone's own training")
    add('--epochs', type=int, default=30, help='of fine-tuning')
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        done = {(row['seed'], row['images'], row['rank']) for row in read(options.results)}
        images = [count for count in options.images if (seed, count, options.rank) not in done]
        rows = run(seed, images, options.rank, options.coarse_epochs, options.epochs) if images else []
        for row in rows:
            append(options.results, row)
    print(table(read(options.results)))


if __name__ == '__main__':
    main()
