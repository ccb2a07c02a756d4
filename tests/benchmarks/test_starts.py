"""Heads by name and how they start: bases, fits and probes against textbook routines."""

import pytest
import starts
import timm
import torch
from probe import fit_probe
from torch import nn
from torch.nn import functional as F
from training import spectrum

from timm_zzz import ZZZHead
from timm_zzz.fit import fit_head
from timm_zzz.head import SIGMA2_INIT
from timm_zzz.scores import class_gaussians_of

D = 12


def build(text, x=None, y=None, num_classes=3, layer=None):
    if x is None:
        x, y = torch.zeros(1, D), torch.zeros(1, dtype=torch.int64)
    return starts.build(starts.parse(text), x, y, num_classes, layer)


def test_names():
    plain = starts.parse('zzz_r8')
    assert (plain.rank, plain.sigma2_init) == (8, SIGMA2_INIT)
    spec = starts.parse('zzz_r4:v_init=0.01,fit=1')
    assert (spec.kind, spec.rank, spec.v_init, spec.fit, spec.name) == ('zzz', 4, 0.01, 1, 'zzz_r4:v_init=0.01,fit=1')
    for text, message in {
        'nearest': 'expected linear, cosine or zzz_rN, got nearest',
        'zzz_r4:vinit=1': 'unknown option vinit=1',
        'zzz_r2:basis=pool': 'expected a basis of fit, tangent, pooled, layer, got pool',
    }.items():
        with pytest.raises(ValueError, match=message):
            starts.parse(text)


def test_parameter_groups_are_timms_for_a_plain_run():
    """With factors 1, what is decayed and what is not are as timm's own filter has them."""
    model = timm.create_model('test_efficientnet', num_classes=5)
    own = starts.parameter_groups(model, model.get_classifier(), starts.parse('linear'), 0.05)
    theirs = timm.optim.param_groups_weight_decay(model, 0.05)
    for decay in (0.0, 0.05):
        sets = [{id(p) for g in groups if g['weight_decay'] == decay for p in g['params']} for groups in (own, theirs)]
        assert sets[0] == sets[1]
    model = timm.create_model('test_efficientnet.zzz_r4', num_classes=5)
    head = model.get_classifier()
    groups = starts.parameter_groups(model, head, starts.parse('zzz_r4:scalar_lr=10,head_lr=3'), 0.05)
    by_id = {id(p): (g['lr_scale'], g['weight_decay']) for g in groups for p in g['params']}
    assert by_id[id(head.v_raw)] == (10.0, 0.0) and by_id[id(head.sigma2_raw)] == (10.0, 0.0)
    assert by_id[id(head.weight)] == (3.0, 0.05) and by_id[id(head.bias)] == (3.0, 0.0)


def test_probe_is_the_logistic_regression_of_sklearn():
    linear_model = pytest.importorskip('sklearn.linear_model')
    y = torch.arange(120) % 3
    x = (torch.randn(120, 6) + 1.5 * torch.eye(3, 6)[y]) * torch.tensor([1.0, 5.0, 0.2, 1.0, 1.0, 1.0])
    head = nn.Linear(6, 3).double()
    penalty = fit_probe(head, x, y)
    scaled = ((x.double() - x.double().mean(0)) / x.double().std(0)).numpy()
    reference = linear_model.LogisticRegression(C=1 / (penalty * len(y)), tol=1e-8, max_iter=5000)
    expected = torch.from_numpy(reference.fit(scaled, y.numpy()).predict_log_proba(scaled))
    torch.testing.assert_close(F.linear(x.double(), head.weight, head.bias).log_softmax(1), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    'text, options',
    [
        ('', {}),
        (',fit_sigma2=0.05', dict(sigma2=0.05)),
        (',fit_sigma2=0.05,fit_precision=0', dict(sigma2=0.05, max_precision=0)),
    ],
)
def test_start_from_the_fit(text, options):
    """The fit's own logits, with the options that it was asked for."""
    y = torch.arange(160) % 8
    x = 1 + 0.3 * torch.eye(8, 48)[y] + torch.randn(160, 48) * torch.logspace(-1, 0, 48)
    head = build(f'zzz_r2:fit=1{text}', x, y, 8)
    expected = fit_head(x, y, rank=2, num_classes=8, **options)
    torch.testing.assert_close(head(x).log_softmax(1), expected(x).log_softmax(1), atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(class_gaussians_of(head).sigma2, class_gaussians_of(expected).sigma2)
    assert spectrum(head)['mean_cosine'] == pytest.approx(spectrum(expected)['mean_cosine'], abs=1e-5)


def test_the_mean_cosine_is_that_of_all_pairs_of_means():
    mu = F.normalize(torch.randn(3, 5), dim=1)
    head = ZZZHead(3, 5, rank=0)
    head.weight.data = mu * torch.tensor([[1.0], [2.0], [3.0]])
    expected = (mu[0] @ mu[1] + mu[0] @ mu[2] + mu[1] @ mu[2]) / 3
    assert spectrum(head)['mean_cosine'] == pytest.approx(float(expected), abs=1e-6)


def test_basis_of_the_pooled_covariance():
    """It spans the directions of the largest variance within classes, by scikit-learn's estimator, the same for all."""
    sklearns = pytest.importorskip('sklearn.covariance')
    y = torch.arange(90) % 3
    x = torch.randn(90, D) * torch.linspace(3, 0.5, D) + 4 * torch.eye(3, D)[y]
    head = build('zzz_r2:basis=pooled', x, y)
    unit = F.normalize(x.double(), dim=1).numpy()
    within = torch.from_numpy(sum(sklearns.empirical_covariance(unit[y == c]) for c in range(3)))
    basis = head.A[0].detach().double()
    explained = (basis.T @ within @ basis).trace()
    assert explained.item() == pytest.approx(torch.linalg.eigvalsh(within)[-2:].sum().item(), rel=1e-5)
    assert torch.equal(head.A, head.A[:1].expand_as(head.A))


def test_tangent_basis_and_basis_of_the_last_layer():
    """One is orthogonal to the means; no basis of rank 2 leaves less of the layer's weights than the other."""
    head = build('zzz_r2:basis=tangent')
    assert (F.normalize(head.weight, dim=1)[:, None] @ head.A).abs().max() < 1e-6
    layer = torch.randn(D, 5, 1, 1)
    basis, flat = build('zzz_r2:basis=layer', layer=layer).A[1].detach(), layer.flatten(1)
    rest = (flat - basis @ (basis.T @ flat)).norm()
    assert rest.item() == pytest.approx(torch.linalg.svdvals(flat)[2:].norm().item(), rel=1e-5)


def test_tied_subspaces_stay_tied():
    head = build('zzz_r2:tied=1')
    before = head.A.detach().clone()
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(head(torch.randn(6, D)), torch.arange(6) % 3).backward()
        optimizer.step()
    for p in (head.A, head.v_raw):
        assert torch.equal(p, p[:1].expand_as(p))
    assert not torch.equal(head.A, before)


def test_factors_on_starts():
    y = torch.arange(60) % 3
    x = torch.randn(60, D) + 3 * torch.eye(3, D)[y]
    v = [class_gaussians_of(build(f'zzz_r2:v_init=0.2{option}')).v for option in ('', ',v_scale=0.25')]
    torch.testing.assert_close(v[1], v[0] / 4)
    whole, tenth = (build(f'linear:rows=probe,row_scale={k}', x, y)(x) for k in (1, 0.1))
    torch.testing.assert_close(tenth, whole / 10)
