"""What can go wrong between a model and the Hugging Face Hub, as a few types; the cause is always attached."""

__all__ = ['HubError', 'NotFoundError', 'AccessError', 'UnavailableError', 'CheckpointError', 'ConfigError']


class HubError(RuntimeError):
    """Base of the errors below, and what the Hub refuses for another reason."""


class NotFoundError(HubError):
    """No such repository, revision or file, or a private repository and no token that may read it."""


class AccessError(HubError):
    """The token is invalid or may not do this: a gated or disabled repository, or no right to push."""


class UnavailableError(HubError):
    """The Hub can't be reached, fails, or is offline, and the local cache does not have the files."""


class CheckpointError(HubError):
    """The weights are not what they should be: truncated, changed, of another model, or no safetensors file."""


class ConfigError(HubError):
    """config.json does not describe a ZZZ model, or asks for something that is not allowed."""
