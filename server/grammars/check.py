"""The process that compiles what clients send before anything else does: `python -m lorry.server.grammars.check`.

On stdin a `Vocabulary`, then one `StructuredOutput` after the other; on stdout a line when it is ready, then one
`Verdict` for each; all are lines of JSON. It may be killed at any time, and does it to itself when it takes too much
memory; so whatever a grammar can do to the library that compiles it is done here first.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import msgspec
from llguidance import LLTokenizer

from lorry.server.errors import LorryError
from lorry.server.grammars.compiling import compiled
from lorry.server.grammars.job import Verdict, Vocabulary
from lorry.server.grammars.vocabulary import load_vocabulary
from lorry.server.params import StructuredOutput

MEMORY = 4 << 30  # bytes of addresses
STACK = 16 << 20  # bytes; the engine's thread that compiles has as many
PR_SET_PDEATHSIG = 1


def main() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.nice(5)
    threading.stack_size(STACK)
    thread = threading.Thread(target=_serve)
    thread.start()
    thread.join()


def _serve() -> None:
    lines = sys.stdin.buffer
    about = msgspec.json.decode(lines.readline(), type=Vocabulary)
    verdict, vocabulary = Verdict(), None
    try:
        vocabulary = load_vocabulary(Path(about.folder), about.vocab_size, about.eos_token_ids)
    except LorryError as error:
        verdict = Verdict(kind=error.kind, message=error.message, fields=error.fields)
    _say(verdict)
    if vocabulary is None:
        return
    for line in lines:
        _say(_judge(msgspec.json.decode(line, type=StructuredOutput), vocabulary))


def _judge(wanted: StructuredOutput, vocabulary: LLTokenizer) -> Verdict:
    start = time.perf_counter()
    try:
        compiled(wanted, vocabulary)
    except LorryError as error:
        return Verdict(kind=error.kind, message=error.message, fields=error.fields)
    return Verdict(seconds=time.perf_counter() - start)


def _say(verdict: Verdict) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(verdict) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
