"""Closed-form fit of the ZZZ head from features, in one pass over them: no gradient steps."""

from .classifier import ZZZClassifier
from .zzzfit import PRESETS, ZZZFit, fit_head, fit_model

__all__ = ['PRESETS', 'ZZZClassifier', 'ZZZFit', 'fit_head', 'fit_model']
