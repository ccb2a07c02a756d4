"""Run callbacks when timm loads weights into a model that it has just built.

timm's entrypoints build a model and load its weights in one call. The ZZZ head has to be attached in between, so that
timm's own code (download, key remapping, adaptation of the class count) fills it like any other layer. PyTorch's hooks
allow that without replacing a function of timm or torch. One hook runs when a module gets a child, to tell the root of
a model from its parts; it does nothing outside of ``on_load``. The others run when that root loads a state dict. Models
that read NumPy files do so in a method ``load_pretrained``, which an attribute of the root shadows.
"""

import functools
import threading
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, Set

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

__all__ = ['on_load']


Before = Callable[[nn.Module, Dict[str, Any]], None]
After = Callable[[nn.Module, List[str]], None]
Read = Callable[[nn.Module, Callable[[], Any]], None]


class _Watch(threading.local):
    current: Any = None


_watch = _Watch()


class _Loading:
    """The models under construction in one thread, and the callbacks for when one of them loads weights."""

    def __init__(self, before: Before, after: After, read: Read):
        self.before = before
        self.after = after
        self.read = read
        self.children: Set[int] = set()
        self.handles: Dict[int, Any] = {}
        self.modules: List[nn.Module] = []  # references, so that the ids above are not used again

    def registered(self, parent: nn.Module, child: Any) -> None:
        if not isinstance(child, nn.Module):
            return
        if id(parent) not in self.children and id(parent) not in self.handles:
            self.modules.append(parent)
            self.handles[id(parent)] = (
                parent.register_load_state_dict_pre_hook(_before),
                parent.register_load_state_dict_post_hook(_after),
            )
            if hasattr(parent, 'load_pretrained'):
                parent.load_pretrained = functools.partial(_read, parent)  # type: ignore[assignment]
        if id(child) not in self.children:
            self.modules.append(child)
            self.children.add(id(child))
            self.release(child)

    def release(self, module: nn.Module) -> None:
        for handle in self.handles.pop(id(module), ()):
            handle.remove()
            module.__dict__.pop('load_pretrained', None)


# Plain functions: a model that is copied or pickled with its hooks must not take the state of this module along.
def _before(module: nn.Module, state_dict: Dict[str, Any], *args: Any) -> None:
    if _watch.current is not None and id(module) in _watch.current.handles:
        _watch.current.before(module, state_dict)


def _after(module: nn.Module, incompatible_keys: Any) -> None:
    if _watch.current is not None and id(module) in _watch.current.handles:
        _watch.current.after(module, incompatible_keys.missing_keys)


def _read(module: Any, *args: Any, **kwargs: Any) -> None:
    del module.load_pretrained
    _watch.current.read(module, functools.partial(module.load_pretrained, *args, **kwargs))


def _registered(parent: nn.Module, name: str, child: Any) -> None:
    if _watch.current is not None:
        _watch.current.registered(parent, child)


# Registered once: adding or removing a hook would break the iteration of other threads over torch's hooks.
register_module_module_registration_hook(_registered)


@contextmanager
def on_load(before: Before, after: After, read: Read) -> Iterator[None]:
    """Call functions when a model that is built within the context, in this thread, loads weights.

    Args:
        before: Called with the model and the state dict before any tensor is copied. It may change the model's
            submodules and the state dict.
        after: Called with the model and the keys that the state dict lacked.
        read: Called in place of the model's ``load_pretrained``, with the model and a function that calls that method.
    """
    outer, _watch.current = _watch.current, _Loading(before, after, read)
    try:
        yield
    finally:
        loading, _watch.current = _watch.current, outer
        for module in loading.modules:
            loading.release(module)
