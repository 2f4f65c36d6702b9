"""`lorry serve` over the scripted engine: argv is the script and the drain timeout in seconds."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import backends

from lorry.server import app
from lorry.server.config import EngineConfig, ServerConfig
from lorry.server.frontend.frontend import EngineFrontend
from lorry.server.frontend.tokenizer import Tokenizer

app.EngineFrontend = functools.partial(
    EngineFrontend,
    command=(sys.executable, str(Path(__file__).with_name("fake_engine.py"))),
    load_tokenizer=lambda config, ready: Tokenizer(backends.byte_level()),
)
script, drain_timeout, port = sys.argv[1:]
sys.exit(
    app.run(
        ServerConfig(
            engine=EngineConfig(model=script),
            port=int(port),
            metrics_port=0,
            drain_timeout=float(drain_timeout),
            restart_backoff=0.3,
        )
    )
)
