"""Measure the share of the scatter of embeddings that lies inside the class subspaces of a ZZZ head."""

from typing import Dict

import torch
from torch import Tensor

from timm_zzz.scores import ClassGaussians


def shares(deviations: Tensor, target: Tensor, classes: ClassGaussians) -> Dict[str, float]:
    """Compute the parts of a variance that lie inside span(U_c), in percent, for a head of rank >= 1.

    What a deviation has along the mean mu_c of its class is removed first: normalised embeddings vary along the sphere.

    Args:
        deviations: Of normalised embeddings from the mean of their group, shape (N, d).
        target: Their classes, shape (N,).
        classes: Of the head.

    Returns:
        ``own``: inside the subspace of its class; ``other``: inside that of another class, averaged over all others;
        ``random``: inside a random subspace of that size, on average, which is r / d. ``tolerated``: what the metric of
        the class leaves out, (x - mu_c)^T (I - sigma2 Sigma_c^-1) (x - mu_c), which is v / (v + sigma2) of what lies
        along a direction of U_c; ``tolerated_random``: in the place of those, random directions. ``variance``: of all,
        the mean squared length, not in percent.
    """
    assert classes.basis is not None and classes.v is not None
    count, width, rank = classes.basis.shape
    mu = classes.mu[target]
    deviations = deviations - (deviations * mu).sum(1, keepdim=True) * mu
    coordinates = (deviations @ classes.basis.transpose(0, 1).reshape(width, count * rank)).unflatten(1, (count, rank))
    squares = coordinates.square()  # (N, C, r)
    total = deviations.square().sum()
    of_own = squares[torch.arange(len(target), device=target.device), target]
    left_out = (classes.v / (classes.v + classes.sigma2))[target]
    inside = dict(
        own=of_own.sum() / total,
        other=(squares.sum() - of_own.sum()) / max(1, count - 1) / total,
        tolerated=(of_own * left_out).sum() / total,
        tolerated_random=left_out.sum(1).mean() / width,
    )
    percent = {k: 100 * v.item() for k, v in inside.items()}
    return dict(percent, random=100 * rank / width, variance=(total / len(deviations)).item())
