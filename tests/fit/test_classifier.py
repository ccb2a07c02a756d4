"""``ZZZClassifier`` where estimators of scikit-learn go, against the fit's own functions and scikit-learn's checks."""

import pickle
import sys

import numpy as np
import pytest
import torch
from sklearn.base import clone, is_classifier
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from timm_zzz import ZZZHead
from timm_zzz.fit import ZZZClassifier, fit_head

LABELS = np.array(['wasp', 'ant', 'bee'])  # not in order


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(90) % 3
    X = 2 * torch.eye(3, 6)[y] + torch.randn(90, 6, generator=generator) * torch.tensor([1.0, 1, 1, 1, 9, 0.1]) + 5
    return X.double().numpy(), LABELS[y.numpy()]


def by_hand(X, y, X_new, **options):
    """The probabilities of sorted labels, from fit_head."""
    classes, codes = np.unique(y, return_inverse=True)
    head = fit_head(X, codes, dtype=torch.float64, **options)
    with torch.no_grad():
        return classes, head(torch.as_tensor(X_new)).softmax(1).numpy()


def test_fit_and_predict(data):
    X, y = data
    classifier = ZZZClassifier(2, shrinkage=0.1)
    assert classifier.fit(X[:60], y[:60]) is classifier and is_classifier(classifier)
    classes, expected = by_hand(X[:60], y[:60], X[60:], rank=2, shrinkage=0.1)
    assert classifier.classes_.tolist() == classes.tolist() == sorted(LABELS)
    np.testing.assert_allclose(classifier.predict_proba(X[60:]), expected)
    assert classifier.predict(X[60:]).tolist() == classes[expected.argmax(1)].tolist()
    assert classifier.score(X[60:], y[60:]) == (classes[expected.argmax(1)] == y[60:]).mean()
    again = pickle.loads(pickle.dumps(classifier))
    np.testing.assert_array_equal(again.predict_proba(X), classifier.predict_proba(X))


def test_cross_validation_in_a_pipeline(data):
    X, y = data
    folds = StratifiedKFold(3)
    expected = []
    for train, test in folds.split(X, y):
        mean, std = X[train].mean(0), X[train].std(0)
        classes, p = by_hand((X[train] - mean) / std, y[train], (X[test] - mean) / std, rank=1)
        expected.append((classes[p.argmax(1)] == y[test]).mean())
    pipeline = make_pipeline(StandardScaler(), ZZZClassifier(rank=1))
    scores = cross_val_score(pipeline, X, y, cv=folds)
    assert scores.tolist() == pytest.approx(expected) and scores.mean() > cross_val_score(ZZZClassifier(1), X, y).mean()
    search = GridSearchCV(pipeline, {'zzzclassifier__preset': ['frozen', 'finetune']}, scoring='neg_log_loss', cv=3)
    assert search.fit(X, y).best_params_ == {'zzzclassifier__preset': 'frozen'}  # the other is a start, not sure of any


def test_options():
    classifier = ZZZClassifier(4, sigma2=0.5)
    assert repr(classifier) == 'ZZZClassifier(rank=4, sigma2=0.5)'
    copied = clone(classifier.set_params(holdout=0.1))
    assert copied.get_params() == classifier.get_params() and copied.holdout == 0.1 and copied.rank == 4
    for call, error in ((ZZZClassifier, TypeError), (classifier.set_params, ValueError)):
        with pytest.raises(error, match='ZZZClassifier has no option ranks'):
            call(ranks=3)
    with pytest.raises(ValueError, match='preset: expected one of'):
        ZZZClassifier(preset='x').fit(np.eye(3), [0, 1, 2])
    with pytest.raises(ValueError, match='rank: expected an int'):
        ZZZClassifier('x').fit(np.eye(3), [0, 1, 2])


@pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::sklearn.exceptions.SkipTestWarning')
def test_checks_of_scikit_learn():
    results = check_estimator(ZZZClassifier(), on_fail=None)
    assert len(results) > 40 and not [r['check_name'] for r in results if r['status'] not in ('passed', 'skipped')]


def test_trained_heads(data):
    X = data[0]
    head = ZZZHead(3, 6, 2, init='reference')
    with torch.no_grad():
        head.bias.normal_()
        logits = head(torch.as_tensor(X, dtype=torch.float32))
    before = {name: p.clone() for name, p in head.named_parameters()}
    classifier = ZZZClassifier.from_head(head, LABELS)
    assert classifier.classes_.tolist() == sorted(LABELS) and all(
        torch.equal(before[n], p) for n, p in head.named_parameters()
    )
    assert classifier.predict(X).tolist() == LABELS[logits.argmax(1)].tolist()
    order = LABELS.argsort()
    np.testing.assert_allclose(classifier.predict_proba(X), logits.softmax(1).numpy()[:, order], rtol=1e-4)
    assert ZZZClassifier.from_head(head).predict(X).tolist() == logits.argmax(1).tolist()
    for classes in (['a', 'b'], ['a', 'b', 'b'], list('abcd')):
        with pytest.raises(ValueError, match='classes: expected 3 different ones'):
            ZZZClassifier.from_head(head, classes)


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, 'sklearn.metrics', None)
    with pytest.raises(ImportError, match=r'ZZZClassifier needs scikit-learn: pip install "timm_zzz\[benchmark\]"'):
        ZZZClassifier().fit(np.eye(3), [0, 1, 2])
