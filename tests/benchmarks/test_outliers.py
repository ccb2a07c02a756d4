"""The shared Gaussian against scikit-learn's covariances, with inverse matrices; the AUROC of each head's scores."""

import numpy as np
import pytest
import torch
from baselines import CosineHead
from outliers import Outliers, SharedGaussian
from torch import nn

from timm_zzz import ZZZHead, scores

close = torch.testing.assert_close
D = 12


def embeddings(count):
    return 4 * torch.randn(count, D, dtype=torch.float64)


def distances2(x, mean, covariance):
    delta = (x - mean).numpy()
    return torch.as_tensor(np.einsum('ni,ij,nj->n', delta, np.linalg.inv(covariance), delta))


@pytest.mark.parametrize('shrinkage', [0.0, 0.3])
def test_shared_gaussian(shrinkage):
    covariance = pytest.importorskip('sklearn.covariance')
    labels = (0, 4, 7)
    targets = torch.tensor(labels)[torch.randint(3, (80,))]
    train, f = embeddings(80) + torch.randn(8, D).double()[targets], embeddings(7)
    gaussian = SharedGaussian(train, targets, shrinkage)
    means = {c: train[targets == c].mean(0) for c in labels}
    within = torch.cat([train[targets == c] - means[c] for c in labels])
    shrunk = covariance.ShrunkCovariance(shrinkage=shrinkage)
    shared = shrunk.fit(within.numpy()).covariance_
    near = torch.stack([distances2(f, mean, shared) for mean in means.values()]).amin(0)
    close(gaussian.mahalanobis(f), near, rtol=1e-9, atol=1e-9)
    background = torch.as_tensor(shrunk.fit(train.numpy()).mahalanobis(f.numpy()))
    close(gaussian.relative_mahalanobis(f), near - background, rtol=1e-9, atol=1e-9)


def test_shrinkage_lets_a_dead_feature_be_and_an_outlier_that_has_it_is_far():
    train = embeddings(80)
    train[:, 5] = 0
    f = train[:2].clone()
    f[1, 5] = 3.0
    near, far = SharedGaussian(train, torch.arange(80) % 3, 1e-3).mahalanobis(f)
    assert far > 10 * near > 0
    with pytest.raises(torch.linalg.LinAlgError):
        SharedGaussian(train, torch.arange(80) % 3, 0)


def test_auroc_of_every_head():
    metrics = pytest.importorskip('sklearn.metrics')
    targets, inlier, outlier = torch.arange(60) % 3, torch.randn(30, D), torch.randn(20, D) + 1
    names = ['max_logit', 'max_softmax', 'energy']
    shared = ['shared_mahalanobis', 'shared_relative_mahalanobis']
    for head, own in (
        (nn.Linear(D, 3), names),
        (CosineHead(3, D), names),
        (ZZZHead(3, D, 2, init='reference'), scores.METHODS),
    ):
        head.eval()
        found = Outliers(head, torch.randn(60, D), targets, inlier).auroc(outlier)
        assert sorted(found) == sorted([*own, *shared])
        with torch.no_grad():
            energies = torch.cat([-head(x).logsumexp(1) for x in (inlier, outlier)])
        expected = 100 * metrics.roc_auc_score([0] * 30 + [1] * 20, energies.numpy())
        assert found['energy'] == pytest.approx(expected, abs=0.4)  # roundings may swap a few of 600 pairs
