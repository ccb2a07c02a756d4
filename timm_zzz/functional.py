"""The mathematics of the ZZZ head as pure functions; they are defined in :mod:`timm_zzz.ops`."""

from .ops.reference import class_gaussians, gaussian_logits, log_density, normalize, orthonormal_basis, zzz_logits

__all__ = ['normalize', 'orthonormal_basis', 'gaussian_logits', 'class_gaussians', 'log_density', 'zzz_logits']
