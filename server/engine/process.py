"""The engine's process: `python -m lorry.server.engine.process --socket ipc://…`, an EngineConfig as JSON on stdin.

Load the model, say how far it is, say Ready, run until Shutdown (exit 0). It logs to stderr, opens no other socket, and
goes when its parent goes. SIGINT and SIGTERM are left to the parent, which drains and then sends Shutdown: a terminal
or a service manager sends them to both.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import msgspec
import torch

from lorry.kernels import native
from lorry.server.config import EngineConfig, engine_config_from_json
from lorry.server.engine.build import Types, build_engine, describe, grammar_desk, warm_up
from lorry.server.engine.channel import SocketChannel
from lorry.server.engine.loop import Engine
from lorry.server.engine.messages import Loading, LoadingStage, Ready
from lorry.server.engine.start.gpu_start import Progress
from lorry.server.engine.start.memory import processors
from lorry.server.engine.start.memory_plan import check_fraction
from lorry.server.errors import InvalidField, LorryError, OutOfMemory
from lorry.server.model.decoder import Decoder
from lorry.server.model.load import load_model
from lorry.server.model.store import cache_root, resolve_model

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1
PROGRESS_INTERVAL = 0.05  # seconds between two Loading of one stage
EXIT_REFUSED = 2  # the configuration or the model is refused: starting again changes nothing


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 after Shutdown, EXIT_REFUSED for what cannot be served; a bug ends in 1."""
    parser = argparse.ArgumentParser(prog="lorry-engine", description="The engine process of a Lorry server.")
    parser.add_argument("--socket", required=True, help="ipc:// address that the frontend has bound")
    address = parser.parse_args(arguments).socket
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    _follow_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    try:
        config = engine_config_from_json(sys.stdin.buffer.read())
    except (msgspec.DecodeError, InvalidField) as error:
        log.error("the configuration on stdin is refused: %s", error)
        return EXIT_REFUSED
    channel = SocketChannel(address)
    try:
        _serve(config, channel)
    except LorryError as error:
        log.error("%s: %s", error.kind, error.message)
        return EXIT_REFUSED
    except Exception:
        log.exception("fault %s ends the engine", uuid.uuid4().hex[:12])
        return 1
    finally:
        channel.close()
    return 0


def _serve(config: EngineConfig, channel: SocketChannel) -> None:
    torch.set_num_threads(config.threads or processors())
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # cuBLAS' parts of a sum stay float32
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.manual_seed(config.seed)
    types = Types.choose(config)
    progress = _Progress(channel)
    with torch.inference_mode():
        engine = (
            _on_gpu(config, types, channel, progress) if types.on_gpu else _on_cpu(config, types, channel, progress)
        )
        gc.collect()
        gc.freeze()  # what is loaded stays: the collector need not look at it between steps
        folder = str(resolve_model(config.model))
        channel.send([Ready(describe(config, types, engine), os.getpid(), folder)])
        engine.run()


def _load(config: EngineConfig, types: Types, progress: Progress) -> Decoder:
    if config.load_format == "dummy":
        log.warning("the weights are random (load format dummy): answers have speed, but no meaning")
    return load_model(
        config.model,
        device=types.device,
        dtype=types.dtype,
        products=types.products,
        context_length=config.context_length,
        load_format=config.load_format,
        seed=config.seed,
        progress=progress,
    )


def _load_draft(config: EngineConfig, types: Types, progress: Progress) -> Decoder | None:
    if config.draft_model is None:
        return None
    return _load(replace(config, model=config.draft_model, context_length=None), types, progress)


def _on_cpu(config: EngineConfig, types: Types, channel: SocketChannel, progress: Progress) -> Engine:
    decoder = _load(config, types, progress)
    progress("warm up", 0, 3)
    native.library()
    progress("warm up", 1, 3)
    grammars, draft = grammar_desk(resolve_model(config.model), decoder), _load_draft(config, types, progress)
    engine = build_engine(config, types, decoder, channel, grammars=grammars, draft=draft)
    progress("warm up", 2, 3)
    warm_up(engine)
    progress("warm up", 3, 3)
    return engine


def _on_gpu(config: EngineConfig, types: Types, channel: SocketChannel, progress: Progress) -> Engine:
    """Compilations are kept from one start to the next; one that a request has to wait for all the same is logged."""
    from lorry.kernels.triton.compilations import keep_in, report_late

    check_fraction(config.gpu_memory_fraction)
    keep_in(cache_root("triton"))
    try:
        decoder = _load(config, types, progress)
        grammars = grammar_desk(resolve_model(config.model), decoder)
        draft = _load_draft(config, types, progress)
        engine = build_engine(config, types, decoder, channel, progress, grammars, draft)
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"the GPU's memory does not suffice to start, gpu_memory_fraction may be too high: {error}"
        ) from error
    report_late(lambda kernel: log.warning("%s was compiled while serving", kernel))
    return engine


class _Progress:
    """Loading messages, the last one of a stage always, others at most every PROGRESS_INTERVAL."""

    def __init__(self, channel: SocketChannel) -> None:
        self._channel = channel
        self._next = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done in (0, total) or now >= self._next:
            self._next = now + PROGRESS_INTERVAL
            self._channel.send([Loading(cast(LoadingStage, stage), done, total)])


def _follow_parent() -> None:
    """Die with the parent: at once where the kernel offers it (Linux), else within a second."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
