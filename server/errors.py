"""Domain errors: what can go wrong for a client, without a word about gRPC.

`rpc/` maps each class to a status code with one table. `fields` carries what the details need:
the offending field, the numbers that were compared, the resource's name.
"""

from __future__ import annotations


class LorryError(Exception):
    """Base of all errors that may reach a client; the message is fit for a client's eyes."""

    def __init__(self, message: str, **fields: object) -> None:
        super().__init__(message)
        self.message = message
        self.fields = {key: str(value) for key, value in fields.items()}

    @property
    def kind(self) -> str:
        return type(self).__name__


class InvalidField(LorryError):
    """A request field has a value that cannot be honoured; `field` names it."""


class PromptTooLong(LorryError):
    """The prompt does not fit: `prompt_tokens` and `context_length`."""


class MalformedAdapter(LorryError):
    """An adapter's files are refused; `field` names the config field or tensor."""


class PathRefused(LorryError):
    """A path outside the allowed roots, or not of a kind that is served."""


class NotFound(LorryError):
    """Unknown adapter or model: `resource_type` and `resource_name`."""


class WrongBase(LorryError):
    """An adapter trained on another base."""


class RevisionMismatch(LorryError):
    """The adapter is there in another revision: `expected` and `actual`."""


class AlreadyExists(LorryError):
    """The id is taken: `resource_type` and `resource_name`."""


class OutOfMemory(LorryError):
    """This request alone can never fit into the memory it needs."""


class SourceUnavailable(LorryError):
    """An adapter's source does not answer as it should; another attempt may succeed."""


class QueueFull(LorryError):
    """The server holds as many requests as it may."""


class Draining(LorryError):
    """The server or the adapter is going away."""


class EngineUnavailable(LorryError):
    """The engine is loading or gone."""


class DeadlineExceeded(LorryError):
    """The client's deadline passed."""


def from_wire(kind: str, message: str, fields: dict[str, str]) -> LorryError:
    """Rebuild the error that the engine process described."""
    for cls in LorryError.__subclasses__():
        if cls.__name__ == kind:
            return cls(message, **fields)
    return LorryError(message, **fields)
