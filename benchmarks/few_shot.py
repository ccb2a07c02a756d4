"""Frozen features and few examples per class: the closed-form fit against a tuned linear probe, without fine-tuning.

    python benchmarks/few_shot.py --data DIR [DIR ...] --backbone NAME FILE PIXELS --cache FOLDER --results FILE.jsonl

Features are those of timm's evaluation transform, in float32, and lie in the cache afterwards. Every classifier is a
line of the results file, which holds its figures on the validation images; what is there is not computed again.
tables.py makes tables of them.
"""

import argparse
import sys
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import torch
from accuracy import append, quality, read
from measure import environment_line
from probe import fit_probe, held_out
from timm.data import resolve_data_config
from torch import Tensor, nn
from training import Backbone, create

from timm_zzz.data import eval_loader, open_split
from timm_zzz.fit import fit_head
from timm_zzz.metrics import predict

JOB = ('data', 'backbone', 'size', 'shots', 'seed', 'head')  # what tells rows apart

SVM_PENALTIES = (1.0, 10.0, 100.0)

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


class KernelMachine(nn.Module):
    """Support vector machine with an RBF kernel on standardised features (N, d), its C chosen on held-out examples."""

    def __init__(self, x: Tensor, y: Tensor):
        super().__init__()
        from sklearn.svm import SVC

        self.mean, self.spread = x.mean(0), x.std(0).clamp(min=1e-6)
        mask, x = held_out(y), (x - self.mean) / self.spread
        scores = {c: SVC(C=c).fit(x[~mask], y[~mask]).score(x[mask], y[mask]) for c in SVM_PENALTIES}
        self.machine = SVC(C=max(scores, key=lambda c: scores[c])).fit(x, y)

    def forward(self, x: Tensor) -> Tensor:
        found = torch.from_numpy(self.machine.decision_function((x - self.mean) / self.spread)).float()
        return found if found.ndim == 2 else torch.stack([-found, found], 1)  # one column for two classes


def classifiers(x: Tensor, y: Tensor, ranks: Sequence[int], several: bool) -> Dict[str, Callable[[], nn.Module]]:
    """List what is compared, by name, each made from the same features (N, d), which the fit normalises.

    Args:
        several: The classes are of several kinds, which a kernel may tell apart better than a linear classifier.
    """

    def probe() -> nn.Module:
        head = nn.Linear(x.shape[1], int(y.max()) + 1)
        fit_probe(head, x, y)
        return head

    def fit(rank: int) -> Callable[[], nn.Module]:
        return lambda: fit_head(x, y, rank=rank, num_classes=int(y.max()) + 1)

    machine = {'svm': lambda: KernelMachine(x, y)} if several else {}
    return {'linear:rows=probe': probe, **machine, **{f'zzz_r{rank}:fit=frozen,train=0': fit(rank) for rank in ranks}}


def main(arguments: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, nargs='+', required=True, metavar='DIR')
    parser.add_argument('--backbone', nargs=3, required=True, metavar=('NAME', 'FILE', 'PIXELS'))
    parser.add_argument('--cache', type=Path, required=True, metavar='FOLDER')
    parser.add_argument('--results', type=Path, required=True, metavar='FILE.jsonl')
    parser.add_argument('--shots', type=int, nargs='+', default=[1, 2, 5, 10, 0], help='examples per class; 0: all')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2], help='of the draws of examples')
    parser.add_argument('--ranks', type=int, nargs='+', default=[0, 8], help='of the fit')
    parser.add_argument('--merge', type=int, default=1, metavar='K', help='K classes in a row are one, of K kinds')
    options = parser.parse_args(arguments)
    name, checkpoint, size = options.backbone
    backbone, cpu = Backbone(name, checkpoint, int(size)), torch.device('cpu')
    done = {tuple(row[k] for k in JOB) for row in read(options.results)}
    for root in options.data:
        data = features_of(root, backbone, options.cache)
        (x, y), (test_x, test_y) = ((x, y // options.merge) for x, y in (data['train'], data['validation']))
        title = root.name if options.merge == 1 else f'{root.name}, {options.merge} in one'
        for shots in options.shots:
            for seed in options.seeds if shots else options.seeds[:1]:
                index = draw(y, shots, seed)
                for head, make in classifiers(x[index], y[index], options.ranks, options.merge > 1).items():
                    job = (title, name, backbone.size, shots, seed, head)
                    if job in done:
                        continue
                    with torch.no_grad():
                        found = quality(make()(test_x), test_y)
                    row = dict(zip(JOB, job, strict=True), **found, environment=environment_line(cpu))
                    append(options.results, row)
                    print(*job, f'{found["top1"]:.2f} {found["nll"]:.3f}', file=sys.stderr, flush=True)


if __name__ == '__main__':
    main()
