"""Closed-form fit of the ZZZ head from features, in one pass over them: no gradient steps."""

from .zzzfit import PRESETS, ZZZFit, fit_head, fit_model

__all__ = ['PRESETS', 'ZZZFit', 'fit_head', 'fit_model']
