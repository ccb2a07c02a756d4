"""Fit the ZZZ head in closed form, in one pass over features or images, without gradient steps."""

from .classifier import ZZZClassifier
from .zzzfit import PRESETS, ZZZFit, fit_head, fit_model

__all__ = ['PRESETS', 'ZZZClassifier', 'ZZZFit', 'fit_head', 'fit_model']
