"""Translate errors of the Hub's client into errors of this package."""

import json
from contextlib import contextmanager
from typing import Any, Iterator, Optional

from huggingface_hub import errors as client

from ..errors import AccessError, HubError, NotFoundError, UnavailableError
from .config import WEIGHTS

__all__ = ['TransportError', 'translated']

# Base class of transport errors of the HTTP library that this version of the client uses
_bases = client.HfHubHTTPError.__mro__
TransportError: Any = _bases[_bases.index(OSError) - 1]


@contextmanager
def translated(repo_id: str, revision: Optional[str], filename: Optional[str] = None) -> Iterator[None]:
    """Raise errors of the Hub's client as errors of :mod:`timm_zzz.errors`, and leave all others as they are."""
    try:
        yield
    except Exception as e:
        error = _translate(e, repo_id, revision, filename)
        if error is None:
            raise
        raise error from e


def _translate(e: Any, repo_id: str, revision: Optional[str], filename: Optional[str]) -> Optional[HubError]:
    at = f'{repo_id}@{revision}' if revision else repo_id
    status = _status(e)
    match e:  # The first match counts: subclasses stand before their base class.
        case client.GatedRepoError():
            return AccessError(
                f'{repo_id} is gated: ask for access on its page, then pass a token of that account (or hf auth login)'
            )
        case client.DisabledRepoError():
            return AccessError(f'{repo_id} has been disabled on the Hub')
        case client.RepositoryNotFoundError():
            return NotFoundError(
                f'{repo_id}: no such repository, or it is private: check the name, or pass a token (or hf auth login)'
            )
        case client.RevisionNotFoundError():
            return NotFoundError(f'{repo_id} has no revision {revision}: expected a branch, a tag or a commit')
        case client.LocalEntryNotFoundError() if _status(e.__cause__):
            return _translate(e.__cause__, repo_id, revision, filename)
        case client.LocalEntryNotFoundError():
            return UnavailableError(
                f'{at}: the Hub is offline or out of reach, and the cache has no {filename}: check the connection'
            )
        case client.EntryNotFoundError():
            only = ': only safetensors weights are read' if filename == WEIGHTS else ''
            return NotFoundError(f'{at} has no {filename}{only}')
        case TransportError() if status in (401, 403):
            return AccessError(
                f'{at}: the Hub refused ({status}): the token is missing or invalid, or has no right to do this'
            )
        case TransportError() if status in (408, 429) or status >= 500:
            return UnavailableError(f'{at}: the Hub failed ({status}): try again later')
        case client.HfHubHTTPError():
            return HubError(f'{at}: {e}')
        case TransportError():
            return UnavailableError(f"{at}: the Hub can't be reached: {e}")
        case ConnectionError() | TimeoutError() | OSError(errno=None):  # Errors of the local disk have an errno.
            return UnavailableError(f"{at}: the Hub can't be reached or the transfer broke off: {e}")
        case json.JSONDecodeError():
            return UnavailableError(f'{at}: what answered is not the Hub: {e}')
        case RuntimeError(__cause__=Exception()):  # a failed upload
            return _translate(e.__cause__, repo_id, revision, filename)
    return None


def _status(e: Any) -> int:
    """Return the HTTP status code of an error's response, 0 if there was none."""
    return getattr(getattr(e, 'response', None), 'status_code', 0)
