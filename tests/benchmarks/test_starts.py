"""Heads by name and how they start: fits, probes and margins against textbook routines."""

import math

import pytest
import starts
import timm
import torch
from baselines import CosineHead
from probe import fit_probe
from torch import nn
from torch.nn import functional as F

from timm_zzz import ZZZHead
from timm_zzz.fit import fit_head
from timm_zzz.scores import class_gaussians_of

D = 12


def build(text, x=None, y=None, num_classes=3):
    if x is None:
        x, y = torch.zeros(1, D), torch.zeros(1, dtype=torch.int64)
    return starts.build(starts.parse(text), x, y, num_classes)


def test_names():
    plain = starts.parse('zzz_r8')
    assert (plain.kind, plain.rank, plain.fit) == ('zzz', 8, '')
    spec = starts.parse('zzz_r4:v_ratio=0.01,fit=finetune')
    assert (spec.rank, spec.v_ratio, spec.fit, spec.name) == (4, 0.01, 'finetune', 'zzz_r4:v_ratio=0.01,fit=finetune')
    for text, message in {
        'nearest': 'expected linear, cosine, arcface, cosface or zzz_rN, got nearest',
        'zzz_r4:vinit=1': 'unknown option vinit=1',
        'linear:refit=frozen': 'only a ZZZ head can be fitted',
        'linear:rows=one': 'expected rows of zero, probe, flat, got one',
    }.items():
        with pytest.raises(ValueError, match=message):
            starts.parse(text)


def test_parameter_groups_are_timms_for_a_plain_run():
    """With factors 1, what is decayed and what is not are as timm's own filter has them."""
    model = timm.create_model('test_efficientnet', num_classes=5)
    own = starts.parameter_groups(model, model.get_classifier(), starts.parse('linear'), 0.1, 1.0, 0.05)
    theirs = timm.optim.param_groups_weight_decay(model, 0.05)
    for decay in (0.0, 0.05):
        sets = [{id(p) for g in groups if g['weight_decay'] == decay for p in g['params']} for groups in (own, theirs)]
        assert sets[0] == sets[1]
    model = timm.create_model('test_efficientnet.zzz_r4', num_classes=5)
    head = model.get_classifier()
    groups = starts.parameter_groups(model, head, starts.parse('zzz_r4:scalar_lr=10'), 0.1, 3.0, 0.05)
    by_id = {id(p): (g['lr'], g['weight_decay']) for g in groups for p in g['params']}
    assert by_id[id(head.v_raw)] == by_id[id(head.sigma2_raw)] == (pytest.approx(3.0), 0.0)
    assert by_id[id(head.weight)] == (pytest.approx(0.3), 0.05) and by_id[id(head.bias)] == (pytest.approx(0.3), 0.0)
    assert by_id[id(model.conv_stem.weight)] == (0.1, 0.05)


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


@pytest.mark.parametrize('kind', ['arcface', 'cosface'])
def test_margins_make_the_own_class_harder_and_no_other(kind):
    x, y = torch.randn(7, D), torch.arange(7) % 3
    head = CosineHead(3, D, margin_kind=kind, margin=0.2, scale=16.0)
    assert not head.scale.requires_grad
    cosines = F.cosine_similarity(x[:, None], head.weight[None], dim=2)
    expected = 16 * cosines.detach().clone()
    for i, c in enumerate(y.tolist()):
        own = cosines[i, c].item()
        expected[i, c] = 16 * (math.cos(math.acos(own) + 0.2) if kind == 'arcface' else own - 0.2)
    torch.testing.assert_close(head(x), 16 * cosines, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(head.with_margin(head(x), y).detach(), expected, atol=1e-4, rtol=1e-4)
    plain = CosineHead(3, D)
    assert plain.scale.requires_grad and torch.equal(plain.with_margin(plain(x), y), plain(x))


@pytest.mark.parametrize(
    'text, options',
    [
        ('fit=frozen', {}),
        ('fit=frozen,sigma2=0.05', dict(sigma2=0.05)),
        ('fit=frozen,sigma2=0.05,max_precision=0', dict(sigma2=0.05, max_precision=0)),
        ('fit=finetune', dict(preset='finetune')),
        ('fit=finetune,mean_spread=0.5,v_ratio=0.2', dict(preset='finetune', mean_spread=0.5, v_ratio=0.2)),
    ],
)
def test_start_from_the_fit(text, options):
    """The fit's own logits, with the options that it was asked for."""
    y = torch.arange(160) % 8
    x = 1 + 0.3 * torch.eye(8, 48)[y] + torch.randn(160, 48) * torch.logspace(-1, 0, 48)
    head = build(f'zzz_r2:{text}', x, y, 8)
    expected = fit_head(x, y, rank=2, num_classes=8, **options)
    torch.testing.assert_close(head(x).log_softmax(1), expected(x).log_softmax(1), atol=2e-3, rtol=1e-3)
    assert starts.needs_features(starts.parse(f'zzz_r2:{text}')) and not starts.needs_features(starts.parse('zzz_r2'))


def test_a_fit_with_other_subspaces():
    y = torch.arange(60) % 3
    x = torch.randn(60, D) + 3 * torch.eye(3, D)[y]
    own, other = (class_gaussians_of(build(f'zzz_r2:fit=finetune{text}', x, y)) for text in ('', ',basis=random'))
    torch.testing.assert_close(other.mu, own.mu)
    torch.testing.assert_close(other.v, own.v)
    assert not torch.allclose(other.basis @ other.basis.mT, own.basis @ own.basis.mT, atol=0.1)


@pytest.mark.parametrize('kind', ['zzz_r2', 'arcface:rows=flat', 'cosine:rows=flat'])
def test_flat_starts(kind):
    colon = ',' if ':' in kind else ':'
    head = build(f'{kind}{colon}spread=0.2,row_std=0.003', num_classes=40)
    own = head.weight - head.weight.mean(0)
    assert head.weight.std().item() == pytest.approx(0.003, rel=1e-3)
    assert (own.norm(dim=1).mean() / head.weight.mean(0).norm()).item() == pytest.approx(0.2, rel=0.05)


def test_linear_and_reference_starts():
    assert not build('linear:rows=zero').weight.any()
    reference = build('zzz_r4:init=reference', num_classes=50)
    assert isinstance(reference, ZZZHead) and (reference.v_raw == 0).all() and (reference.sigma2_raw == 0).all()
    assert F.normalize(reference.weight, dim=1).mean(0).norm() < 0.5
