"""The mathematics of the ZZZ head as pure functions, which ``timm_zzz.ops`` defines.

A class ``c`` is a Gaussian over L2-normalised embeddings with mean ``mu_c`` and covariance
``Sigma_c = U_c diag(v_c) U_c^T + sigma2 I``. Only ``U_c`` (d x r), ``v_c`` (r) and the scalar ``sigma2`` are stored.
docs/theory.md derives the formulas.
"""

from .ops.dispatch import class_gaussians, orthonormal_basis, zzz_logits
from .ops.reference import gaussian_logits, log_density, normalize

__all__ = ['normalize', 'orthonormal_basis', 'gaussian_logits', 'class_gaussians', 'log_density', 'zzz_logits']
