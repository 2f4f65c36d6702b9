"""Fixtures that several rooms share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """The default model as an NF4 checkpoint folder, converted into the user's cache if it is not there yet."""
    from lorry.server.model.store import DEFAULT_MODEL, resolve_model

    return resolve_model(DEFAULT_MODEL)
