"""Save, push and load models with a ZZZ head in timm's file formats, and check what is written and read."""

from .load import from_pretrained
from .save import push_to_hub, save_pretrained

__all__ = ['from_pretrained', 'push_to_hub', 'save_pretrained']
