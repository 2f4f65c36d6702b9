"""Whether a grammar is served, asked of a process that may be killed, before the engine hears of the request.

A grammar that takes too long, too much memory or the process itself is refused like one with a wrong keyword. One is
checked at a time; verdicts are kept. The process starts with the first grammar, and anew after each that ended it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections import OrderedDict
from collections.abc import Sequence

import msgspec

from lorry.server.errors import Draining, EngineUnavailable, InvalidField, LorryError, from_wire
from lorry.server.grammars.job import Verdict, Vocabulary
from lorry.server.params import StructuredOutput

logger = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "lorry.server.grammars.check")
SECONDS = 3.0  # to compile one grammar
START_SECONDS = 60.0
KEPT = 1024  # verdicts
KEPT_CHARACTERS = 16 << 20  # of their grammars together


class GrammarChecks:
    """`check` grammars for one vocabulary."""

    def __init__(
        self, vocabulary: Vocabulary, *, command: Sequence[str] = COMMAND, seconds: float = SECONDS, kept: int = KEPT
    ) -> None:
        self._vocabulary = vocabulary
        self._command = tuple(command)
        self._seconds = seconds
        self._kept = kept
        self._verdicts: OrderedDict[tuple[str, str], LorryError | None] = OrderedDict()
        self._characters = 0
        self._turn = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._closed = False

    async def check(self, wanted: StructuredOutput) -> None:
        """Raises InvalidField for a grammar that is not served."""
        key = wanted.kind, wanted.text
        if key not in self._verdicts:
            async with self._turn:
                if key not in self._verdicts:
                    self._keep(key, await self._ask(wanted))
        self._verdicts.move_to_end(key)
        error = self._verdicts[key]
        if error is not None:
            raise from_wire(error.kind, error.message, error.fields)

    async def close(self) -> None:
        """End the process; no check begins any more."""
        self._closed = True
        await self._kill()

    def _keep(self, key: tuple[str, str], error: LorryError | None) -> None:
        self._verdicts[key] = error
        self._characters += len(key[1])
        while len(self._verdicts) > self._kept or (self._characters > KEPT_CHARACTERS and len(self._verdicts) > 1):
            (_, text), _ = self._verdicts.popitem(last=False)
            self._characters -= len(text)

    async def _ask(self, wanted: StructuredOutput) -> LorryError | None:
        field = f"structured_output.{wanted.kind}"
        for _ in range(2):  # the process may have ended for a reason of its own
            process = await self._started()
            try:
                async with asyncio.timeout(self._seconds):
                    verdict = await self._answer(process, wanted)
            except TimeoutError:
                await self._kill()
                late = f"{field} is refused: it takes more than {self._seconds:g} s to compile"
                return InvalidField(late, field=field)
            except BaseException:
                await self._kill()  # its next answer would be taken for another's
                raise
            if verdict is not None:
                return from_wire(verdict.kind, verdict.message, verdict.fields) if verdict.kind else None
            await self._kill()
        logger.warning("a grammar of %d characters ended the process that compiled it", len(wanted.text))
        return InvalidField(f"{field} is refused: it takes too much memory to compile", field=field)

    async def _started(self) -> asyncio.subprocess.Process:
        if self._closed:
            raise Draining("the server is going away")
        if self._process is not None and self._process.returncode is None:
            return self._process
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=pipe, stdout=pipe, start_new_session=True
        )
        try:
            async with asyncio.timeout(START_SECONDS):
                ready = await self._answer(self._process, self._vocabulary)
        except BaseException as error:
            await self._kill()
            if isinstance(error, TimeoutError):
                raise EngineUnavailable("grammars cannot be checked now") from error
            raise
        if ready is None or ready.kind:
            await self._kill()
            if ready is not None:
                raise from_wire(ready.kind, ready.message, ready.fields)
            logger.error("the process that checks grammars does not start")
            raise EngineUnavailable("grammars cannot be checked now")
        return self._process

    @staticmethod
    async def _answer(process: asyncio.subprocess.Process, question: object) -> Verdict | None:
        """One line for one line; None when the process has ended."""
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(ConnectionError):
            process.stdin.write(msgspec.json.encode(question) + b"\n")
            await process.stdin.drain()
        line = await process.stdout.readline()
        return msgspec.json.decode(line, type=Verdict) if line else None

    async def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await asyncio.shield(process.wait())
