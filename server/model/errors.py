"""What can be wrong with a model: refused by name, malformed on disk, or not found."""

from __future__ import annotations

from lorry.server.errors import LorryError


class UnsupportedModel(LorryError):
    """The model asks for something that is not served exactly; `field` names it."""


class MalformedCheckpoint(LorryError):
    """A checkpoint's files contradict their config or their digests; `field` names the file or the tensor."""


class ModelNotFound(LorryError):
    """No folder, file, name or hub id leads to this model."""
