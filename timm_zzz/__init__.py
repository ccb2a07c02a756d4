"""A Gaussian classifier head with low-rank covariances for every timm model: append ``.zzz_r8`` to its name.

Importing this package registers the names ``ARCHITECTURE[.TAG].zzz_rN`` and the optimiser ``zzzadamw`` with timm, and
does nothing else.
"""

__version__ = '0.1.0.dev0'

from . import errors, fit, functional, scores
from .head import ZZZHead
from .hub import from_pretrained, push_to_hub, save_pretrained
from .models.attach import attach
from .models.predict import predict
from .models.registry import register
from .optim import register_optimizer

__all__ = [
    'ZZZHead',
    'attach',
    'errors',
    'fit',
    'from_pretrained',
    'functional',
    'predict',
    'push_to_hub',
    'register',
    'save_pretrained',
    'scores',
    '__version__',
]

register()
register_optimizer()
