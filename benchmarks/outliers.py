"""Outlier detection from the features that accuracy.py keeps: AUROC and FPR95 of every score of each head.

    python benchmarks/accuracy.py ... --hold-out-every 5 --far DIR [DIR ...] --keep KEPT
    python benchmarks/outliers.py KEPT --results FILE.jsonl

Near outliers are images of the classes that were held out, far ones those of other sets; inliers are the validation
images. The scores of a ZZZ head are its own (timm_zzz.scores); those of any other head are pytorch-ood's detectors on
its logits and features, fitted to the training images. A row has, for each score, the AUROC and the FPR95 (the share
of outliers accepted where 95 % of the inliers are) in percent: ``near`` by score, ``far`` by set and score. Rows that
the results file has are not computed again; accuracy_table.py --outliers makes the tables.
"""

import argparse
import contextlib
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

import torch
from accuracy import JOB, append, read
from measure import environment_line
from pytorch_ood.detector import KNN, RMD, EnergyBased, MaxLogit, MaxSoftmax, ViM
from safetensors import safe_open
from starts import build, parse
from torch import Tensor, nn
from torch.nn import functional as F

from timm_zzz import scores
from timm_zzz.head import ZZZHead

Scores = Callable[[Tensor], Dict[str, Tensor]]

NEIGHBOURS = (10, 50)  # for sets of a few dozen images a class, and pytorch-ood's default
PRINCIPAL = 512  # dimensions of ViM's subspace, as its authors for widths from 768 to 2047; half of smaller ones
SHRINKAGE = 0.1


@contextlib.contextmanager
def double_precision() -> Iterator[None]:
    """Let pytorch-ood allocate its covariances in float64, since it inverts them."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def distances(x: Tensor, means: Tensor, scatter: Tensor, shrinkage: float = 0.0) -> Tensor:
    """Compute the smallest squared Mahalanobis distance (N,) of rows (N, d) to means (C, d).

    It is what pytorch-ood's ``predict_features`` computes class by class, which takes minutes for 100 classes.

    Args:
        scatter: N times the covariance S, shape (d, d).
        shrinkage: s of (1 - s) S + s tr(S) / d I.
    """
    spread = scatter.diagonal().mean() * torch.eye(len(scatter), dtype=scatter.dtype, device=scatter.device)
    factor = torch.linalg.cholesky(scatter.lerp(spread, shrinkage))
    white = [torch.linalg.solve_triangular(factor, t.T, upper=False).T for t in (x, means)]
    return torch.cdist(*white).amin(1).square()


def mahalanobis_scores(features: Tensor, target: Tensor, shrinkage: float = 0.0) -> Scores:
    """Fit class means and one covariance: Mahalanobis distance, and relative to that of all images (RMD)."""
    fitted = RMD(None).fit_features(features, target)

    def score(x: Tensor) -> Dict[str, Tensor]:
        near = distances(x, fitted.mu, fitted.cov, shrinkage)
        all_images = distances(x, fitted.background_mu[None], fitted.background_cov, shrinkage)
        return dict(Mahalanobis=near, RMD=near - all_images)

    return score


def standard_scores(head: nn.Module, features: Tensor, target: Tensor) -> Scores:
    """Fit pytorch-ood's detectors to a head's training features (N, d) and targets (N,), both float64.

    Covariances of few images are poorly conditioned, so there are the published distances, and those of features of
    unit length under a shrunk covariance, which are better at times.
    """
    of_logits = dict(MaxSoftmax=MaxSoftmax(None), MaxLogit=MaxLogit(None), Energy=EnergyBased(None))
    of_features: Dict[str, Any] = {f'KNN {k}': KNN(None, k=min(k, len(features))) for k in NEIGHBOURS}
    if isinstance(head, nn.Linear):
        of_features['ViM'] = ViM(None, min(PRINCIPAL, features.shape[1] // 2), head.weight, head.bias)
    for detector in of_features.values():
        detector.fit_features(features.cpu() if isinstance(detector, KNN) else features, target.cpu())
    published = mahalanobis_scores(features, target)
    shrunk = mahalanobis_scores(F.normalize(features), target, SHRINKAGE)

    def score(x: Tensor) -> Dict[str, Tensor]:
        logits = head(x)
        found = {name: detector.predict_logits(logits) for name, detector in of_logits.items()}
        found.update({name: detector.predict_features(x) for name, detector in of_features.items()})
        found.update(published(x))
        found.update({f'{name}, unit length, shrunk': each for name, each in shrunk(F.normalize(x)).items()})
        return found

    return score


class Outliers:
    """AUROC and FPR95, in percent, of every outlier score that a head has, for inliers that stay the same."""

    @torch.no_grad()
    def __init__(self, head: nn.Module, train_features: Tensor, train_target: Tensor, inliers: Tensor):
        head = head.double().eval()
        if isinstance(head, ZZZHead):
            classes = scores.class_gaussians_of(head)
            self.scores: Scores = lambda x: scores.outlier_scores(classes, x)
        else:
            with double_precision():
                self.scores = standard_scores(head, train_features.double(), train_target)
        self.inliers = self.scores(inliers.double())

    @torch.no_grad()
    def __call__(self, outliers: Tensor) -> Dict[str, List[float]]:
        found = self.scores(outliers.double())
        both = {name: (self.inliers[name].cpu(), score.cpu()) for name, score in found.items()}
        return {name: [100 * scores.auroc(*each), 100 * scores.fpr95(*each)] for name, each in both.items()}


def row_of(file: Path, done: List[Dict[str, Any]], device: torch.device) -> Optional[Dict[str, Any]]:
    """Compute the row of a file that accuracy.py --keep has written; None for one that is done."""
    with safe_open(file, 'pt', device=str(device)) as kept:
        job = json.loads(kept.metadata()['job'])
        if job in done:
            return None
        tensors = {key: kept.get_tensor(key) for key in kept.keys()}
    train, target = tensors['train'].float(), tensors['train_target']
    kind = parse(job['head'].partition(':')[0])  # how it started does not matter here
    head = build(kind, train[:1], target, int(target.max()) + 1)
    head.load_state_dict({key[5:]: value for key, value in tensors.items() if key.startswith('head.')})
    outliers = Outliers(head, train, target, tensors['validation'])
    found = {key[4:]: outliers(value) for key, value in tensors.items() if key.startswith('far.')}
    row = dict(job, near=outliers(tensors['near'])) if 'near' in tensors else dict(job)
    return dict(row, far=found, environment=f'{environment_line(device)}, pytorch-ood {version("pytorch-ood")}')


def main(arguments: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('kept', type=Path, metavar='KEPT', help='folder of accuracy.py --keep')
    parser.add_argument('--results', type=Path, required=True, metavar='FILE.jsonl')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    options = parser.parse_args(arguments)
    done = [{key: row[key] for key in JOB} for row in read(options.results)]
    for file in sorted(options.kept.glob('*.safetensors')):
        row = row_of(file, done, torch.device(options.device))
        if row is not None:
            append(options.results, row)
            print(file.stem, file=sys.stderr, flush=True)


if __name__ == '__main__':
    main()
