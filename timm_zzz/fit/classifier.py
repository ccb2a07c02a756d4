"""The closed-form fit as a classifier of scikit-learn, which is imported where it is used."""

import copy
from inspect import signature
from typing import Any, Dict, Optional, Sequence

import torch
from torch import Tensor

from ..head import ZZZHead
from .zzzfit import ZZZFit

__all__ = ['ZZZClassifier']

# Of ZZZFit, but for the classes, which come with the labels, and the dtype, which is scikit-learn's float64
_SIGNATURE = signature(ZZZFit.__init__)
_SIGNATURE = _SIGNATURE.replace(
    parameters=[p for p in _SIGNATURE.parameters.values() if p.name not in ('num_classes', 'dtype')]
)
_OPTIONS = {name: p.default for name, p in _SIGNATURE.parameters.items() if name != 'self'}


def _sklearn() -> Any:
    try:
        import sklearn.metrics
        import sklearn.preprocessing
        import sklearn.utils.multiclass
        import sklearn.utils.validation
    except ImportError as e:
        raise ImportError('ZZZClassifier needs scikit-learn: pip install "timm_zzz[benchmark]"') from e
    return sklearn


class ZZZClassifier:
    """Classify features by a ZZZ head that is fitted in closed form, as an estimator of scikit-learn.

    It goes where those of scikit-learn go: pipelines, cross-validation, searches over options. Needs scikit-learn 1.6,
    which ``timm_zzz[benchmark]`` brings.

    Args:
        rank: Rank r of the class covariances; the width of the features if that is less.
        options: Further ones of :class:`ZZZFit`, but for num_classes and dtype. The head is of float64.

    Attributes:
        classes_: The labels, sorted, shape (C,).
        head_: The :class:`~timm_zzz.ZZZHead` that was fitted.
        n_features_in_: Width of the features.
        feature_names_in_: Their names, where they came as a data frame.

    Raises:
        TypeError: For an option that does not exist. Values are checked by ``fit``.

    Example:
        >>> X, y = torch.eye(2).repeat(20, 1) + 0.1 * torch.randn(40, 2), ['ant', 'bee'] * 20
        >>> classifier = ZZZClassifier(rank=1).fit(X, y)
        >>> classifier.predict([[1.0, 0.1], [0.1, 1.0]]).tolist()
        ['ant', 'bee']
    """

    _estimator_type = 'classifier'
    rank: int
    classes_: Any
    head_: ZZZHead
    n_features_in_: int

    def __init__(self, rank: int = 8, **options: Any):
        unknown = ', '.join(options.keys() - _OPTIONS.keys())
        if unknown:
            raise TypeError(f'ZZZClassifier has no option {unknown} (there are: {", ".join(_OPTIONS)})')
        vars(self).update({**_OPTIONS, 'rank': rank, **options})

    def get_params(self, deep: bool = True) -> Dict[str, Any]:
        """Return all options by name."""
        return {name: getattr(self, name) for name in _OPTIONS}

    def set_params(self, **options: Any) -> 'ZZZClassifier':
        """Set some options; a ValueError for one that does not exist."""
        try:
            ZZZClassifier.__init__(self, **{**self.get_params(), **options})
        except TypeError as e:
            raise ValueError(str(e)) from e
        return self

    def __repr__(self) -> str:
        changed = (f'{name}={value!r}' for name, value in self.get_params().items() if value is not _OPTIONS[name])
        return f'ZZZClassifier({", ".join(changed)})'

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import ClassifierTags, Tags, TargetTags

        return Tags(
            estimator_type='classifier', target_tags=TargetTags(required=True), classifier_tags=ClassifierTags()
        )

    @classmethod
    def from_head(cls, head: ZZZHead, classes: Optional[Sequence[Any]] = None) -> 'ZZZClassifier':
        """Take a trained head of features (N, d), with its classes in the order of the logits, 0 to C - 1 if None.

        Raises:
            ValueError: For another number of classes than the head has.
        """
        self = cls(head.rank)
        encoder = _sklearn().preprocessing.LabelEncoder().fit(range(head.num_classes) if classes is None else classes)
        if len(encoder.classes_) != head.num_classes or classes is not None and len(classes) != head.num_classes:
            raise ValueError(f'classes: expected {head.num_classes} different ones, got {len(encoder.classes_)}')
        self.head_, self.classes_, self.n_features_in_ = copy.deepcopy(head), encoder.classes_, head.feat_dim
        if classes is not None:
            order = torch.as_tensor(encoder.transform(classes)).argsort()
            with torch.no_grad():
                for name, p in self.head_.named_parameters():
                    if name != 'sigma2_raw':
                        p.copy_(p[order.to(p.device)])
        return self

    def fit(self, X: Any, y: Any) -> 'ZZZClassifier':
        """Fit a head to features (N, d) and labels of any kind (N,)."""
        sklearn = _sklearn()
        X, y = sklearn.utils.validation.validate_data(self, X, y)
        sklearn.utils.multiclass.check_classification_targets(y)
        encoder = sklearn.preprocessing.LabelEncoder().fit(y)
        options: Dict[str, Any] = dict(self.get_params(), dtype=torch.float64)
        if hasattr(self.rank, '__index__') and not isinstance(self.rank, bool):  # of NumPy too
            options['rank'] = min(int(self.rank), X.shape[1])
        estimator = ZZZFit(len(encoder.classes_), **options)
        self.head_, self.classes_ = estimator.fit(X, encoder.transform(y)).to_head(), encoder.classes_
        return self

    @torch.inference_mode()
    def predict_proba(self, X: Any) -> Any:
        """Compute the probabilities of the classes, an array (N, C) in the order of ``classes_``."""
        validation = _sklearn().utils.validation
        validation.check_is_fitted(self)
        x: Tensor = torch.as_tensor(validation.validate_data(self, X, reset=False)).to(self.head_.weight)
        logits = ZZZHead.forward(self.head_.eval(), x)  # of rows also where it stands for a 1x1 convolution
        return logits.softmax(1).cpu().numpy()

    def predict(self, X: Any) -> Any:
        """Predict labels, shape (N,)."""
        probabilities = self.predict_proba(X)
        return self.classes_[probabilities.argmax(1)]

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Compute the accuracy, 0 to 1."""
        return float(_sklearn().metrics.accuracy_score(y, self.predict(X), sample_weight=sample_weight))


ZZZClassifier.__init__.__signature__ = _SIGNATURE  # type: ignore[attr-defined]  # for help() and scikit-learn
