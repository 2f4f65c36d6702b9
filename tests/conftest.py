"""Fixtures that several rooms share.

Triton decides when it is first imported, which bitsandbytes does too, whether its kernels run in the interpreter; so
that is settled here, before any test module is imported.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """The default model as an NF4 checkpoint folder, converted into the user's cache if it is not there yet."""
    from lorry.server.model.store import DEFAULT_MODEL, resolve_model

    return resolve_model(DEFAULT_MODEL)
