"""Errors of saving, loading and pushing models; ``__cause__`` is the error of the Hub's client, if there was one."""

import difflib
from typing import Iterable, Sequence

__all__ = ['AccessError', 'CheckpointError', 'ConfigError', 'HubError', 'NotFoundError', 'UnavailableError']


class HubError(RuntimeError):
    """Base class of the errors below; raised itself if the Hub refuses for a reason that none of them covers."""


class NotFoundError(FileNotFoundError, HubError):
    """The folder, repository, revision or file does not exist, or is private and the token may not read it."""


class AccessError(PermissionError, HubError):
    """The token is invalid or has no permission: a gated or disabled repository, or no right to push."""


class UnavailableError(ConnectionError, HubError):
    """The Hub is offline, unreachable or failing, and the local cache does not have the files."""


class CheckpointError(HubError):
    """The weights are truncated, changed or those of another model, or the file is not a safetensors file."""


class ConfigError(HubError):
    """config.json does not describe a ZZZ model, or asks for something that is not allowed."""


def one_line(e: BaseException) -> str:
    """Return an error's message in one line; for an error in a loader process, the last line of its traceback."""
    inner = 'Traceback (most recent call last)' in str(e)
    return ' '.join((str(e).strip().rpartition('\n')[2] if inner else str(e)).split()) or type(e).__name__


def nearest(word: str, words: Iterable[str], n: int = 1) -> str:
    """Return the end of a message that suggests the ``n`` nearest known words; '' if none is near."""
    near = difflib.get_close_matches(word, list(words), n)
    return f'; did you mean {", ".join(near[:-1])}{" or " if near[1:] else ""}{near[-1]}?' if near else ''


def some(items: Sequence[str], count: int = 3) -> str:
    """Join the first items for a message, and say how many more there are."""
    return ', '.join(items[:count]) + (f' and {len(items) - count} more' if len(items) > count else '')
