"""Outlier scores of any head and their AUROC: its own scores, and those of a shared Gaussian of its features."""

from typing import Dict

import torch
from torch import Tensor, nn

from timm_zzz import scores
from timm_zzz.functional import normalize
from timm_zzz.head import ZZZHead


def class_means(x: Tensor, target: Tensor) -> Tensor:
    """Average the rows (N, d) of each class, (C, d)."""
    means = x.new_zeros(int(target.max()) + 1, x.shape[1]).index_add_(0, target, x)
    return means / target.bincount()[:, None]


class SharedGaussian:
    """Class means and one covariance for all classes, from training features: the outlier scores of a linear head.

    Lee et al. 2018 (arXiv:1807.03888), of the last layer alone, and Ren et al. 2021 (arXiv:2106.09022). Features are
    taken as they are. A covariance S is shrunk to (1 - s) S + s tr(S) / d I.
    """

    def __init__(self, features: Tensor, target: Tensor, shrinkage: float):
        x, index = features.double(), target.unique(return_inverse=True)[1]
        means = class_means(x, index)
        self.mean = x.mean(0)
        self.within, self.total = (_factor(delta, shrinkage) for delta in (x - means[index], x - self.mean))
        self.means = self._whiten(means, self.within)

    def _whiten(self, x: Tensor, factor: Tensor) -> Tensor:
        """Centre rows (N, d) and map them so that the covariance of this factor becomes the identity."""
        return torch.linalg.solve_triangular(factor, (x.double() - self.mean).T, upper=False).T

    def mahalanobis(self, features: Tensor) -> Tensor:
        """Compute the smallest squared distance to a class mean, (N,)."""
        return torch.cdist(self._whiten(features, self.within), self.means).amin(1).square()

    def relative_mahalanobis(self, features: Tensor) -> Tensor:
        """Subtract the squared distance to the mean of all under the covariance of all, (N,)."""
        return self.mahalanobis(features) - self._whiten(features, self.total).square().sum(1)


def _factor(delta: Tensor, shrinkage: float) -> Tensor:
    """Compute the lower Cholesky factor of the shrunk covariance of centred rows (N, d)."""
    covariance = delta.T @ delta / len(delta)
    spread = covariance.diagonal().mean() * torch.ones_like(delta[0]).diag()
    return torch.linalg.cholesky(covariance.lerp(spread, shrinkage))


class Outliers:
    """AUROC, in percent, of every outlier score that a head has, for inliers that stay the same."""

    def __init__(self, head: nn.Module, train_features: Tensor, train_target: Tensor, inliers: Tensor):
        self.head = head
        self.shared = SharedGaussian(normalize(train_features), train_target, shrinkage=0.1)
        self.inliers = self._scores(inliers)

    @torch.no_grad()
    def _scores(self, features: Tensor) -> Dict[str, Tensor]:
        if isinstance(self.head, (ZZZHead, nn.Linear)):
            found = scores.outlier_scores(self.head, features)
        else:
            logits = self.head(features)
            found = {name: getattr(scores, name)(logits) for name in ('max_logit', 'max_softmax', 'energy')}
        x = normalize(features)
        found['shared_mahalanobis'] = self.shared.mahalanobis(x)
        found['shared_relative_mahalanobis'] = self.shared.relative_mahalanobis(x)
        return found

    def auroc(self, outliers: Tensor) -> Dict[str, float]:
        return {name: 100 * scores.auroc(self.inliers[name], score) for name, score in self._scores(outliers).items()}
