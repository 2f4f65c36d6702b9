"""The other end of `protocol.py`: start a peer in its environment, hand it work, take the times."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


class PeerFailed(Exception):
    """The peer ended or said something else than an answer; the message holds the end of its log."""


@dataclass(frozen=True)
class Answer:
    """One run: seconds from the call to its return, and the new tokens of each prompt."""

    seconds: float
    outputs: list[list[int]]

    @property
    def tokens_per_second(self) -> float:
        return sum(len(ids) for ids in self.outputs) / self.seconds


class Peer:
    """A running worker. A context manager: the process ends with the block.

    name: file of the worker without its suffix; python: interpreter of its environment; log: takes its stderr
    """

    def __init__(self, name: str, python: Path, settings: dict[str, Any], log: Path) -> None:
        self._log = log
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [str(python), str(HERE / f"{name}.py"), json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )
        self.versions: dict[str, str] = self._read()["versions"]

    def run(self, work: dict[str, Any]) -> Answer:
        """See `protocol.py` for the work's fields; raises PeerFailed."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(work) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer's absence says more
        return Answer(**self._read())

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-8:])
            raise PeerFailed(f"{self._log.stem} ended:\n{tail}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process; it has nothing to save."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
