"""Frozen features and few examples per class: the closed-form fit against a tuned linear probe, without fine-tuning.

    python benchmarks/few_shot.py --data DIR [DIR ...] --backbone mobilenetv2_100 FILE PIXELS --cache FOLDER

Features are those of timm's evaluation transform, in float32, and lie in the cache afterwards. Prints a table of top-1
and NLL on the validation images, mean and standard error over draws of the examples.
"""

import argparse
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import torch
from accuracy_table import show
from probe import fit_probe
from timm.data import resolve_data_config
from torch import Tensor, nn
from training import Backbone, create

from timm_zzz.data import eval_loader, open_split
from timm_zzz.fit import fit_head
from timm_zzz.metrics import evaluate, predict

Set = Dict[str, Tuple[Tensor, Tensor]]


def features_of(root: Path, backbone: Backbone, cache: Path) -> Set:
    """Compute or read the features (N, d) and targets (N,) of the splits train and validation."""
    file = cache / f'{root.name}-{backbone.name}-{backbone.size}.pt'
    if file.exists():
        found: Set = torch.load(file)
        return found
    model = create(backbone)
    config = resolve_data_config(dict(img_size=backbone.size or None), model=model)
    found = {}
    for split in ('train', 'validation'):
        loader = eval_loader(open_split(root, split).dataset, config, batch_size=64, workers=0)
        _, x, y = zip(*predict(model, loader, torch.device('cpu')), strict=True)
        found[split] = torch.cat(x), torch.cat(y)
    cache.mkdir(parents=True, exist_ok=True)
    torch.save(found, file)
    return found


def draw(target: Tensor, shots: int, seed: int) -> Tensor:
    """Indices of ``shots`` examples of each class, or of all for 0, in the order of the draw."""
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(seed))
    if not shots:
        return order
    return torch.cat([order[target[order] == c][:shots] for c in range(int(target.max()) + 1)])


def heads(x: Tensor, y: Tensor, num_classes: int) -> Dict[str, nn.Module]:
    """The classifiers that are compared, each from the same features (N, d); the fit normalises them."""
    probe = nn.Linear(x.shape[1], num_classes)
    fit_probe(probe, x, y)
    found: Dict[str, nn.Module] = {'linear probe, tuned': probe}
    for rank in (0, 8):
        found[f'fit, rank {rank}'] = fit_head(x, y, rank=rank, num_classes=num_classes)
    return found


def main(arguments: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, nargs='+', required=True, metavar='DIR')
    parser.add_argument('--backbone', nargs=3, required=True, metavar=('NAME', 'FILE', 'PIXELS'))
    parser.add_argument('--cache', type=Path, required=True)
    parser.add_argument('--shots', type=int, nargs='+', default=[1, 2, 5, 10, 0], help='examples per class; 0: all')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    options = parser.parse_args(arguments)
    name, checkpoint, size = options.backbone
    backbone = Backbone(name, checkpoint, int(size))
    print('| set | per class | head | top-1 | NLL |\n|---|---|---|---|---|')
    for root in options.data:
        data = features_of(root, backbone, options.cache)
        (x, y), (test_x, test_y) = data['train'], data['validation']
        for shots in options.shots:
            figures: Dict[str, List[Tuple[float, float]]] = {}
            for seed in options.seeds if shots else options.seeds[:1]:
                index = draw(y, shots, seed)
                for name, head in heads(x[index], y[index], int(y.max()) + 1).items():
                    predicted = evaluate(head, [(test_x, test_y)], torch.device('cpu'))
                    figures.setdefault(name, []).append((predicted.top1, predicted.mean_nll))
            for name, values in figures.items():
                top1s, nlls = zip(*values, strict=True)
                print(f'| {root.name} | {shots or "all"} | {name} | {show(top1s)} | {show(nlls, 3)} |', flush=True)


if __name__ == '__main__':
    main()
