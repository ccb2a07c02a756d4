"""Errors of the paths against float64, as multiples of the errors of the reference code in the same dtype."""

import itertools
import math
import statistics
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from baselines import METHODS, SIGMA2_MIN, V_MIN, ReferenceHead, TruthHead
from measure import Table, autocast, describe, number
from torch import Tensor, nn
from torch.nn import functional as F

SIGMA2 = (0.69, 1 / 16, 1e-4)
V = (1e-4, 0.7, 1e4)
BATCH, CLASSES, WIDTHS, RANKS = 127, (7, 252), (123, 507), (3, 8, 13)
DTYPES = {'fp32': None, 'bf16 autocast': torch.bfloat16, 'fp16 autocast': torch.float16}
PATHS = ('zzz torch', 'zzz triton')
PARAMETERS = ('weight', 'bias', 'A', 'v_raw', 'sigma2_raw')
QUANTITIES = ('logits', 'features', *PARAMETERS)
# A path passes with |path - truth| <= LIMIT |reference - truth| + TOLERANCE |truth|
LIMIT, TOLERANCE = 1.5, 1e-6
# The gradient of sigma2_raw is one number, in which the reference is exact now and then by luck; with several losses
# it is a vector like the others.
LOSSES = 8


class Case(NamedTuple):
    batch: int
    num_classes: int
    feat_dim: int
    rank: int
    sigma2: float
    v: float

    def __str__(self) -> str:
        return f'{", ".join(map(str, self[:4]))}, s2 {number(self.sigma2, 2)}, v {self.v:g}'


class Error(NamedTuple):
    case: Case
    max_ratio: float
    norm_ratio: float
    path: float  # relative, in the Frobenius norm
    reference: float


def cases(quick: bool) -> Iterator[Case]:
    classes, widths, ranks = (CLASSES[:1], WIDTHS[:1], RANKS[:2]) if quick else (CLASSES, WIDTHS, RANKS)
    for shape in itertools.product([BATCH], classes, widths, ranks):
        for sigma2, v in itertools.product(SIGMA2, V):
            yield Case(*shape, sigma2, v)


def run(device: torch.device, quick: bool = False) -> List[Dict[str, Any]]:
    """Print the table and return its rows."""
    table = Table(
        'Numerics',
        device,
        ('path', 'dtype', 'quantity', 'worst, max norm', 'worst, Frobenius', f'cases over {LIMIT}')
        + ('median rel. error', 'reference', 'worst case (B, C, d, r)'),
        caption=f'Ratio (|path - truth| - {TOLERANCE:g} |truth|) / |reference - truth|, at most {LIMIT} to pass, in '
        'the max and the Frobenius norm. Truth: float64 through torch.distributions. The quantities after the logits '
        f'are the gradients; that of the scalar sigma2_raw is taken for {LOSSES} losses.',
    )
    errors: Dict[Any, List[Error]] = {}
    failures: Dict[Any, str] = {}
    for seed, case in enumerate(cases(quick)):
        for key, found in compare(case, seed, device, failures).items():
            errors.setdefault(key, []).append(found)
    rows = []
    for path, dtype in itertools.product(PATHS, DTYPES):
        if (path, dtype) in failures:
            table.row([path, dtype, '', failures[path, dtype]])
            rows.append(dict(path=path, dtype=dtype, error=failures[path, dtype]))
        for quantity in QUANTITIES:
            found_all = errors.get((path, dtype, quantity))
            if found_all:
                rows.append(summary(path, dtype, quantity, found_all))
                table.row(rows[-1]['cells'])
    return rows


def summary(path: str, dtype: str, quantity: str, errors: List[Error]) -> Dict[str, Any]:
    worst = max(errors, key=lambda e: e.max_ratio)
    over = sum(max(e.max_ratio, e.norm_ratio) > LIMIT for e in errors)
    norm_ratio = max(e.norm_ratio for e in errors)
    medians = [statistics.median(e[i] for e in errors) for i in (3, 4)]
    cells = [path, dtype, quantity, number(worst.max_ratio), number(norm_ratio), f'{over} of {len(errors)}']
    cells += [f'{m:.1e}' for m in medians] + [str(worst.case)]
    row = dict(path=path, dtype=dtype, quantity=quantity, max_ratio=worst.max_ratio, norm_ratio=norm_ratio, over=over)
    return dict(row, cases=len(errors), median=medians[0], reference=medians[1], worst=str(worst.case), cells=cells)


def compare(case: Case, seed: int, device: torch.device, failures: Dict[Any, str]) -> Dict[Any, Error]:
    """The errors of every path in every dtype; a path that fails is noted in ``failures`` and not tried again."""
    torch.manual_seed(seed)
    values = parameters(case, device)
    features, grads = inputs(case, values['weight'])
    shape = case.num_classes, case.feat_dim, case.rank
    truth = evaluate(TruthHead(*shape, device, torch.float64), values, features.double(), grads, None)
    errors = {}
    for dtype, amp_dtype in DTYPES.items():
        x = features if amp_dtype is None else features.to(amp_dtype)
        reference = evaluate(ReferenceHead(*shape, device), values, x, grads, amp_dtype)
        for path in PATHS:
            if (path, dtype) in failures:
                continue
            try:
                found = evaluate(METHODS[path](*shape, case.batch, device), values, x, grads, amp_dtype)
            except Exception as e:
                failures[path, dtype] = describe(e)
                continue
            for quantity in QUANTITIES:
                errors[path, dtype, quantity] = error(case, found[quantity], reference[quantity], truth[quantity])
    return errors


def parameters(case: Case, device: torch.device) -> Dict[str, Tensor]:
    """Random parameters with variances around the case's."""
    c, d, r = case.num_classes, case.feat_dim, case.rank
    v = case.v * torch.exp(0.3 * torch.randn(c, r, device=device))
    return dict(
        weight=0.02 * torch.randn(c, d, device=device),
        bias=0.1 * torch.randn(c, device=device),
        A=0.02 * torch.randn(c, d, r, device=device),
        v_raw=inverse_softplus(v - V_MIN),
        sigma2_raw=inverse_softplus(torch.tensor([case.sigma2 - SIGMA2_MIN], device=device)),
    )


def inverse_softplus(x: Tensor) -> Tensor:
    x = x.clamp(min=1e-9)  # the minimum itself is out of softplus's reach
    return x + torch.log(-torch.expm1(-x))


def inputs(case: Case, weight: Tensor) -> Tuple[Tensor, List[Tensor]]:
    """Features, half of them near a class mean, that are the same numbers in fp32, bf16 and fp16; losses' gradients."""
    label = torch.randint(case.num_classes, (case.batch,), device=weight.device)
    noise = torch.randn(case.batch, case.feat_dim, device=weight.device)
    near = 50 * weight[label] + 0.1 * noise
    features = torch.where(torch.arange(case.batch, device=weight.device)[:, None] % 2 == 0, near, noise)
    features = features.bfloat16().half().float()
    # What cross-entropy sends back for some logits, the same for all, so that only the head's own errors count
    grads = []
    for _ in range(LOSSES):
        probability = torch.randn(case.batch, case.num_classes, device=weight.device).softmax(-1)
        grads.append((probability - F.one_hot(label, case.num_classes)) / case.batch)
        label = label[torch.randperm(case.batch, device=weight.device)]
    return features, grads


def evaluate(
    head: nn.Module,
    values: Dict[str, Tensor],
    features: Tensor,
    grads: Sequence[Tensor],
    amp_dtype: Optional[torch.dtype],
) -> Dict[str, Tensor]:
    """Logits and the gradients with respect to features and parameters, in float64."""
    with torch.no_grad():
        for name, value in values.items():
            getattr(head, name).copy_(value)
    leaves = [features.detach().requires_grad_(), *(getattr(head, name) for name in PARAMETERS)]
    with autocast(features.device, amp_dtype):
        logits = head(leaves[0])
    found = [logits, *torch.autograd.grad(logits, leaves, grads[0].to(logits.dtype), retain_graph=True)]
    scalar = head.sigma2_raw
    others = [torch.autograd.grad(logits, scalar, g.to(logits.dtype), retain_graph=True)[0] for g in grads[1:]]
    found[-1] = torch.stack([found[-1], *others])
    return {q: t.detach().double() for q, t in zip(QUANTITIES, found, strict=True)}


def error(case: Case, found: Tensor, reference: Tensor, truth: Tensor) -> Error:
    path_error, reference_error = found - truth, reference - truth
    norm = truth.norm().item()
    return Error(
        case,
        ratio(path_error.abs().max().item(), reference_error.abs().max().item(), truth.abs().max().item()),
        ratio(path_error.norm().item(), reference_error.norm().item(), norm),
        path_error.norm().item() / norm if norm else 0.0,
        reference_error.norm().item() / norm if norm else 0.0,
    )


def ratio(found: float, reference: float, scale: float) -> float:
    if not math.isfinite(found):
        return math.inf
    excess = max(0.0, found - TOLERANCE * scale)
    if excess == 0 or not math.isfinite(reference):
        return 0.0
    return excess / reference if reference else math.inf
