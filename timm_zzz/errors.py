"""Errors between a model and the Hugging Face Hub; ``__cause__`` is the Hub client's own, where there is one."""

import difflib
from typing import Iterable, Sequence

__all__ = ['AccessError', 'CheckpointError', 'ConfigError', 'HubError', 'NotFoundError', 'UnavailableError']


class HubError(RuntimeError):
    """Base class of the errors below; also raised where the Hub refuses for another reason."""


class NotFoundError(FileNotFoundError, HubError):
    """No such folder, repository, revision or file, or a private repository and no token that may read it."""


class AccessError(PermissionError, HubError):
    """The token is invalid or may not do this: a gated or disabled repository, or no right to push."""


class UnavailableError(ConnectionError, HubError):
    """The Hub can't be reached, fails, or is offline, and the local cache does not have the files."""


class CheckpointError(HubError):
    """The weights are not what they should be: truncated, changed, of another model, or no safetensors file."""


class ConfigError(HubError):
    """config.json does not describe a ZZZ model, or asks for something that is not allowed."""


def one_line(e: BaseException) -> str:
    """Give an error's message in one line; of an error in a process that loads images, what it was."""
    inner = 'Traceback (most recent call last)' in str(e)
    return ' '.join((str(e).strip().rpartition('\n')[2] if inner else str(e)).split()) or type(e).__name__


def nearest(word: str, words: Iterable[str], n: int = 1) -> str:
    """End a message: which of the known words may have been meant, if any."""
    near = difflib.get_close_matches(word, list(words), n)
    return f'; did you mean {", ".join(near[:-1])}{" or " if near[1:] else ""}{near[-1]}?' if near else ''


def some(items: Sequence[str], count: int = 3) -> str:
    """List the first items of a message, and how many more there are."""
    return ', '.join(items[:count]) + (f' and {len(items) - count} more' if len(items) > count else '')
