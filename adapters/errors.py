"""What can be wrong with an adapter or a request for one; the engine maps these to the server's domain errors.

Messages are fit for a client's eyes: they name fields, tensors and ids, never a host path. What strangers have named
is escaped here where it cannot be printed, for it goes into logs, terminals and messages that hold nothing but UTF-8.
"""

from __future__ import annotations


class AdapterError(Exception):
    """Base. `field`: the config field, tensor or id at fault; `details`: the values that were compared, as text."""

    def __init__(self, message: str, field: str = "", **details: object) -> None:
        self.message = _printable(message)
        super().__init__(self.message)
        self.field = _printable(field)
        self.details = {key: _printable(str(value)) for key, value in details.items()}


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


class MalformedAdapter(AdapterError):
    """The files contradict the PEFT format, themselves or each other; `field` names the config field or tensor."""


class UnsupportedField(AdapterError):
    """The adapter is legal but needs a method that is not served; `field` names the config field."""


class PathRefused(AdapterError):
    """A path that does not lead to a folder below an allowed root."""


class UnknownAdapter(AdapterError):
    """No adapter has the id; `field` is the id."""


class WrongBase(AdapterError):
    """The tensors fit another base model's shape; `field` names the tensor."""


class RevisionMismatch(AdapterError):
    """The adapter is there in another revision; details: `expected` and `actual`."""


class AdapterExists(AdapterError):
    """The id is taken; `field` is the id."""


class MixRefused(AdapterError):
    """A request's adapters have no sum; `field` is the request's."""


class PoolTooSmall(AdapterError):
    """What is asked for can never be resident together; details: `needed` and `available` in bytes."""
