"""A Gaussian classifier head with low-rank covariances for every timm model: append ``.zzz_r8`` to its name.

Importing this package registers the names ``ARCHITECTURE[.TAG].zzz_rN`` with timm, and does nothing else.
"""

from . import functional
from .attach import attach
from .head import ZZZHead
from .registry import register
from .version import __version__

__all__ = ['ZZZHead', 'attach', 'functional', 'register', '__version__']

register()
