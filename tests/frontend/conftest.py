"""A frontend over the scripted engine of fake_engine.py, and a reader of what that engine saw."""

from __future__ import annotations

import logging
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from lorry.server.config import EngineConfig, ServerConfig
from lorry.server.frontend.frontend import EngineFrontend
from lorry.server.frontend.tokenizer import Tokenizer

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # backends.py and fake_engine.py serve several tests here


@pytest.fixture(scope="session")
def tokenizer():
    import backends

    return Tokenizer(backends.byte_level())


@pytest.fixture
def serving(tokenizer):
    """`async with serving(script) as frontend`: started, and stopped at the end."""

    @asynccontextmanager
    async def serve(script="", **options):
        engine = ("max_waiting", "speculation", "draft_model", "draft_tokens")
        limits = {key: options.pop(key) for key in engine if key in options}
        downloads = options.pop("downloads", None)
        config = ServerConfig(engine=EngineConfig(model=script, **limits), restart_backoff=0.05, **options)
        frontend = EngineFrontend(
            config,
            command=(sys.executable, str(HERE / "fake_engine.py")),
            load_tokenizer=lambda config, ready: tokenizer,
            downloads=downloads,
        )
        try:
            await frontend.start()
            yield frontend
        finally:
            await frontend.stop()

    return serve


@pytest.fixture
def seen(caplog):
    """`seen("Abort")`: what the engine saw of commands of that kind, as text, in order."""
    caplog.set_level(logging.INFO, logger="lorry.engine")

    def read(kind):
        lines = [record.getMessage() for record in caplog.records if record.name == "lorry.engine"]
        return [line.removeprefix("saw ") for line in lines if line.startswith(f"saw {kind}(")]

    return read
