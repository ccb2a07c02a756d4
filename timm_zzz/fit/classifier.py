"""The closed-form fit as a classifier for scikit-learn, which is imported on first use."""

import copy
from inspect import signature
from typing import Any, Dict, Optional, Sequence

import torch
from torch import Tensor

from ..head import ZZZHead
from .zzzfit import ZZZFit

__all__ = ['ZZZClassifier']

# ZZZFit's options except num_classes, which follows from the labels, and dtype, which is float64 as in scikit-learn
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
    """Classifier for scikit-learn with a ZZZ head that is fitted in closed form.

    It works in pipelines, cross-validation and searches over options. It needs scikit-learn 1.6 or later, which
    ``timm_zzz[benchmark]`` installs.

    Args:
        rank: Rank r of the class covariances; at most the width of the features is used.
        options: Further options of :class:`ZZZFit`, except num_classes and dtype. The head is in float64.

    Attributes:
        classes_: Labels, sorted, shape (C,).
        head_: The fitted :class:`~timm_zzz.ZZZHead`.
        n_features_in_: Width d of the features.
        feature_names_in_: Names of the features, if they were a data frame.

    Raises:
        TypeError: For an option that does not exist. ``fit`` checks values and raises a ValueError.

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
        """Set some options; raise a ValueError for one that does not exist."""
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
        """Create a classifier from a trained head.

        Args:
            head: A head for features of shape (N, d); it is copied.
            classes: Labels in the order of the logits; 0 to C - 1 if None.

        Raises:
            ValueError: If there are not as many different labels as the head has classes.
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
        """Fit a head to features (N, d) and labels (N,) of any type.

        Raises:
            ValueError: As :class:`ZZZFit` and its ``fit``, and as scikit-learn for invalid data.
        """
        sklearn = _sklearn()
        X, y = sklearn.utils.validation.validate_data(self, X, y)
        sklearn.utils.multiclass.check_classification_targets(y)
        encoder = sklearn.preprocessing.LabelEncoder().fit(y)
        options: Dict[str, Any] = dict(self.get_params(), dtype=torch.float64)
        if hasattr(self.rank, '__index__') and not isinstance(self.rank, bool):  # also NumPy's ints
            options['rank'] = min(int(self.rank), X.shape[1])
        estimator = ZZZFit(len(encoder.classes_), **options)
        self.head_, self.classes_ = estimator.fit(X, encoder.transform(y)).to_head(), encoder.classes_
        return self

    @torch.inference_mode()
    def predict_proba(self, X: Any) -> Any:
        """Compute class probabilities for features (N, d), an array (N, C) in the order of ``classes_``."""
        validation = _sklearn().utils.validation
        validation.check_is_fitted(self)
        x: Tensor = torch.as_tensor(validation.validate_data(self, X, reset=False)).to(self.head_.weight)
        logits = ZZZHead.forward(self.head_.eval(), x)  # on rows, also for a head in place of a 1x1 convolution
        return logits.softmax(1).cpu().numpy()

    def predict(self, X: Any) -> Any:
        """Predict labels (N,) for features (N, d)."""
        probabilities = self.predict_proba(X)
        return self.classes_[probabilities.argmax(1)]

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Compute the accuracy on features (N, d) and labels (N,), 0 to 1."""
        return float(_sklearn().metrics.accuracy_score(y, self.predict(X), sample_weight=sample_weight))


ZZZClassifier.__init__.__signature__ = _SIGNATURE  # type: ignore[attr-defined]  # for help() and scikit-learn
