"""What lies in an adapter folder by name, and what to say of one that has no adapter in it."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

from lorry.adapters.errors import MalformedAdapter
from lorry.adapters.reading.shards import INDEX_NAME, is_shard
from lorry.adapters.reading.spec import CONFIG_NAME
from lorry.adapters.reading.tensor_file import WEIGHTS_NAME

_MOST_ENTRIES = 1000  # of a folder that are looked at
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_OF_TRAINING = (
    "optimizer",
    "scheduler",
    "scaler",
    "training_args",
    "rng_state",
)  # what a checkpoint has beside weights


def weight_names(folder: Path) -> frozenset[str]:
    """The files there that could be an adapter's weights."""
    return frozenset(name for name in _names(folder) if name in (WEIGHTS_NAME, INDEX_NAME) or is_shard(name))


def no_config(folder: Path) -> MalformedAdapter:
    """The error of a folder without adapter_config.json: often that of a training, whose checkpoints are adapters."""
    for name in reversed(_names(folder)):
        if name.startswith("checkpoint-") and (folder / name / CONFIG_NAME).is_file():
            return MalformedAdapter(
                f"the folder has no {CONFIG_NAME}, but {name[:80]} in it has: name that folder", CONFIG_NAME
            )
    return MalformedAdapter(f"the folder has no {CONFIG_NAME}", CONFIG_NAME)


def no_weights(folder: Path, missing: str) -> MalformedAdapter:
    """The error of a folder without the file `missing`, which says what is there instead."""
    names = _names(folder)
    if missing != WEIGHTS_NAME:
        return MalformedAdapter(f"the folder has no {missing}, which {INDEX_NAME} names", missing)
    if any(map(is_shard, names)):
        return MalformedAdapter(f"the folder has shards of the weights and no {INDEX_NAME}", INDEX_NAME)
    for name in sorted(names, key=lambda name: not name.startswith("adapter_model")):
        if name.endswith(_PICKLES) and not name.startswith(_OF_TRAINING):
            return MalformedAdapter(
                f"{name[:80]} is not read, only {WEIGHTS_NAME} is: load it with PEFT and save it again",
                name[:80],
            )
    return MalformedAdapter(f"the folder has no {WEIGHTS_NAME}", WEIGHTS_NAME)


def _names(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in islice(entries, _MOST_ENTRIES))
