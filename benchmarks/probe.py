"""A tuned linear probe: multinomial logistic regression on frozen features, its penalty chosen on held-out examples."""

from typing import Any, List, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PENALTIES: Tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def _fit(x: Tensor, target: Tensor, num_classes: int, penalty: float, start: Any = None) -> Tuple[Tensor, Tensor]:
    """Rows (C, d) and bias (C,) that minimise the mean cross-entropy plus ``penalty`` / 2 times the rows' square."""
    weight = torch.zeros(num_classes, x.shape[1], dtype=x.dtype, device=x.device) if start is None else start[0].clone()
    bias = torch.zeros(num_classes, dtype=x.dtype, device=x.device) if start is None else start[1].clone()
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    optimizer = torch.optim.LBFGS(parameters, max_iter=100, history_size=10, line_search_fn='strong_wolfe')

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), target) + 0.5 * penalty * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def held_out(target: Tensor, seed: int = 0) -> Tensor:
    """A mask (N,) of a fifth of each class's examples, at least one of two."""
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(seed)).to(target.device)
    mask = torch.zeros_like(target, dtype=torch.bool)
    for c in target.unique():
        own = order[target[order] == c]
        mask[own[: max(1, len(own) // 5) if len(own) > 1 else 0]] = True
    return mask


def fit_probe(head: nn.Linear, features: Tensor, target: Tensor) -> float:
    """Fill a linear layer with the tuned probe on features as they are; returns the penalty.

    The features are standardised for the optimisation, by which the penalty acts on comparable columns. Without two
    examples in a class there is nothing to choose by: the penalty is 0.01.
    """
    x = features
    x = x.float() if x.dtype != torch.float64 else x
    center, spread = x.mean(0), x.std(0).clamp(min=1e-6)
    x = (x - center) / spread
    classes = head.out_features
    mask = held_out(target)
    best = 1e-2
    if mask.any():
        losses: List[Tuple[float, float]] = []
        start = None
        for penalty in sorted(PENALTIES, reverse=True):
            start = _fit(x[~mask], target[~mask], classes, penalty, start)
            losses.append((F.cross_entropy(F.linear(x[mask], *start), target[mask]).item(), penalty))
        best = min(losses)[1]
    weight, bias = _fit(x, target, classes, best)
    with torch.no_grad():
        head.weight.copy_(weight / spread)
        head.bias.copy_(bias - (weight / spread) @ center)
    return best
