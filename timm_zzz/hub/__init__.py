"""Save, push and load models with a ZZZ head: timm's file formats, with checks around them."""

from .transfer import from_pretrained, push_to_hub, save_pretrained

__all__ = ['from_pretrained', 'push_to_hub', 'save_pretrained']
