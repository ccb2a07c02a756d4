"""Outlier scores of kept features: distances against pytorch-ood's own loop and scikit-learn's covariances, rows of
a whole run, and the table."""

import json
import statistics

import accuracy
import accuracy_table
import numpy as np
import pytest
import torch
from baselines import CosineHead
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from timm_zzz import ZZZHead, scores

metrics = pytest.importorskip('sklearn.metrics')
detector = pytest.importorskip('pytorch_ood.detector', reason='needs pip install "timm_zzz[benchmark]"')
outliers = pytest.importorskip('outliers')

close = torch.testing.assert_close
D = 12
STANDARD = {'MaxSoftmax', 'MaxLogit', 'Energy', 'KNN 10', 'KNN 50', 'Mahalanobis', 'RMD'}
STANDARD |= {f'{name}, unit length, shrunk' for name in ('Mahalanobis', 'RMD')}


@pytest.fixture
def sample():
    """Training features of three classes with their targets, inliers and outliers."""
    torch.manual_seed(0)
    target = torch.arange(90) % 3
    means = 2 * torch.randn(3, D)
    inliers = means[torch.arange(40) % 3] + torch.randn(40, D)
    return means[target] + torch.randn(90, D), target, inliers, 2 * torch.randn(30, D)


def test_distances_are_those_of_pytorch_ood(sample):
    train, target, x, _ = (t.double() if t.is_floating_point() else t for t in sample)
    with outliers.double_precision():
        found = outliers.mahalanobis_scores(train, target)(x)
        for name, factor in (('Mahalanobis', 2), ('RMD', 1)):  # half the squared distance there
            theirs = getattr(detector, name)(None).fit_features(train, target).predict_features(x)
            close(found[name], factor * theirs, rtol=1e-8, atol=1e-8)
    assert torch.get_default_dtype() == torch.float32


def test_shrinkage_is_scikit_learns(sample):
    covariance = pytest.importorskip('sklearn.covariance')
    train, target, x, _ = (t.double() if t.is_floating_point() else t for t in sample)
    means = torch.stack([train[target == c].mean(0) for c in range(3)])
    delta = train - means[target]
    shrunk = covariance.ShrunkCovariance(shrinkage=0.3, assume_centered=True).fit(delta.numpy())
    expected = np.stack([shrunk.mahalanobis((x - mean).numpy()) for mean in means]).min(0)
    found = outliers.distances(x, means, delta.T @ delta, shrinkage=0.3) * len(train)
    close(found, torch.as_tensor(expected), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize('head', [nn.Linear(D, 3), CosineHead(3, D), ZZZHead(3, D, 2, init='reference')])
def test_auroc_and_fpr95_of_every_head(sample, head):
    train, target, inliers, others = sample
    found = outliers.Outliers(head, train, target, inliers)(others)
    is_zzz, is_linear = isinstance(head, ZZZHead), isinstance(head, nn.Linear)
    assert found.keys() == (set(scores.METHODS) if is_zzz else STANDARD | ({'ViM'} if is_linear else set()))
    with torch.no_grad():
        energies = torch.cat([-head(x.double()).logsumexp(1) for x in (inliers, others)])
    labels = [0] * len(inliers) + [1] * len(others)
    auroc, fpr95 = found['energy' if is_zzz else 'Energy']
    assert auroc == pytest.approx(100 * metrics.roc_auc_score(labels, energies), abs=0.01)
    threshold = energies[: len(inliers)].sort()[0][37]  # 38 of 40 inliers are accepted
    accepted = (energies[len(inliers) :] <= threshold).double().mean().item()
    assert fpr95 == pytest.approx(100 * accepted, abs=0.01)


def test_neighbours_are_those_of_unit_length(sample):
    train, target, inliers, others = sample
    found = outliers.Outliers(nn.Linear(D, 3), train, target, inliers)(others)
    distances = [torch.cdist(F.normalize(x), F.normalize(train)).sort(1)[0][:, 9] for x in (inliers, others)]
    expected = metrics.roc_auc_score([0] * 40 + [1] * 30, torch.cat(distances))
    assert found['KNN 10'][0] == pytest.approx(100 * expected, abs=0.01)


@pytest.fixture(scope='module')
def kept(folder, backbone, tmp_path_factory):
    """Keep two frozen heads with accuracy.py: a class held out, and the same set by another name as far outliers."""
    root = tmp_path_factory.mktemp('kept')
    (root / 'others').symlink_to(folder)
    arguments = ['--data', folder, '--far', folder, root / 'others', '--backbone', *backbone, 0, '--seeds', 0]
    arguments += ['--heads', 'linear:rows=probe,train=0', 'zzz_r2:fit=frozen,train=0', '--hold-out-every', 4]
    arguments += ['--results', root / 'accuracy.jsonl', '--keep', root / 'kept', '--device', 'cpu']
    accuracy.main([str(a) for a in arguments])
    return root / 'kept'


def test_rows_of_kept_features(kept, tmp_path):
    """Scores of the head that was kept, for the job that it was kept of, and not twice."""
    results = tmp_path / 'outliers.jsonl'
    for _ in range(2):
        outliers.main([str(kept), '--results', str(results), '--device', 'cpu'])
        rows = [json.loads(line) for line in results.read_text().splitlines()]
        assert [row['head'] for row in rows] == ['linear:rows=probe,train=0', 'zzz_r2:fit=frozen,train=0']
    for row, names in zip(rows, (STANDARD | {'ViM'}, set(scores.METHODS)), strict=True):
        assert row['data'] == 'gradients' and row['lr'] == 0 and row['hold_out_every'] == 4
        assert row['near'].keys() == names and list(row['far']) == ['others']
        assert row['far']['others'].keys() == names
        assert all(0 <= value <= 100 for pair in row['near'].values() for value in pair)
    found = load_file(next(kept.glob('*zzz*')))
    head = ZZZHead(3, found['train'].shape[1], rank=2)
    head.load_state_dict({k[5:]: v for k, v in found.items() if k.startswith('head.')})
    both = [scores.outlier_scores(head, found[k].float())['mahalanobis'] for k in ('validation', 'near')]
    expected = 100 * metrics.roc_auc_score([0] * len(both[0]) + [1] * len(both[1]), torch.cat(both).detach())
    assert rows[1]['near']['mahalanobis'][0] == pytest.approx(expected, abs=4)  # one of 27 pairs may swap


def row(head, data, near, far, backbone='net', seed=0):
    """A row whose FPR95 are 100 less the AUROC."""

    def both(aurocs):
        return {name: [auroc, 100 - auroc] for name, auroc in aurocs.items()}

    shared = dict(size=0, shots=0, hold_out_every=5, epochs=20, smoothing=0.1, lr=0.0, head_lr=0.0, split='validation')
    far = {name: both(aurocs) for name, aurocs in far.items()}
    return dict(shared, head=head, data=data, backbone=backbone, seed=seed, near=both(near), far=far)


def test_a_score_is_chosen_on_other_sets(tmp_path, capsys):
    """On a, x is the better score everywhere but on a itself, which has no part in the choice."""
    rows = [
        row('linear', 'a', dict(x=60.0, y=90.0), {'b': dict(x=99.0, y=90.0), 'c': dict(x=91.0, y=90.0)}),
        row('linear', 'b', dict(x=80.0, y=70.0), {'a': dict(x=10.0, y=90.0), 'c': dict(x=95.0, y=70.0)}),
        row('linear', 'c', dict(x=70.0, y=60.0), {'a': dict(x=10.0, y=90.0), 'b': dict(x=97.0, y=70.0)}),
    ]
    assert accuracy_table.chosen_score(rows, 'near', 'a') == 'x'
    assert accuracy_table.chosen_score(rows, 'near', 'b') == 'y'  # 90 and 60 against 60 and 70
    assert accuracy_table.chosen_score(rows, 'far', 'a') == 'x'
    assert accuracy_table.chosen_score(rows[:1], 'far', 'a') is None
    found = accuracy_table.judged(rows, 'near')
    assert found['a', 'net'] == ('x', [60, 40]) and found['b', 'net'] == ('y', [70, 30])
    rows += [dict(each, head='zzz_r8', near={'z': [each['near']['x'][0] + 1.5, 20.0]}) for each in rows]
    rows += [dict(each, seed=1) for each in rows]
    file = tmp_path / 'rows.jsonl'
    file.write_text(''.join(json.dumps(each) + '\n' for each in rows))
    accuracy_table.main([str(file), '--outliers', '--base', 'linear'])
    lines = capsys.readouterr().out.splitlines()
    of_base = statistics.fmean([60, 70, 60])
    line = next(line for line in lines if line.startswith('| near | linear'))
    assert [cell.strip() for cell in line.split('|')[1:-1]] == [
        *('near', 'linear', '3', 'y (2), x (1)', f'{of_base:.1f}', f'{100 - of_base:.1f}', '', '', ''),
    ]
    differences = [1.5, 11.5, 11.5]
    error = statistics.stdev(differences) / 3**0.5
    line = next(line for line in lines if line.startswith('| near | zzz_r8'))
    assert line.endswith(f'| z (3) | 71.5 | 20.0 | {statistics.fmean(differences):.1f} ± {error:.1f} | 1.5 | 3 |')
    assert '| linear | x | 70.0 | 30.0 | 67.0 | 33.0 |' in lines
