"""Weights in several files: an index that names, for each tensor, the file that has it.

    adapter_model.safetensors.index.json            {"weight_map": {tensor: file, …}, "metadata": {…}}
    adapter_model-00001-of-0000N.safetensors …      N files, numbered from 1

Source: `save_torch_state_dict` of huggingface_hub with PEFT's name of the weights. PEFT itself writes one file, and
reads that where there is one; who shards large models' folders shards adapters in the same way.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lorry.adapters.errors import MalformedAdapter
from lorry.adapters.reading.strict_json import parse_object

INDEX_NAME = "adapter_model.safetensors.index.json"
MAX_INDEX_BYTES = 4 << 20
MAX_SHARDS = 256

_SHARD = re.compile(r"adapter_model-([0-9]{5})-of-([0-9]{5})\.safetensors")


@dataclass(frozen=True)
class ShardIndex:
    """File → the tensors that it must have, no others; files in order of their numbers, all of 1 to N.

    metadata: the texts among the index's, which stand here and not in the shards when huggingface_hub writes them.
    """

    shards: dict[str, frozenset[str]]
    metadata: dict[str, str]

    @classmethod
    def from_bytes(cls, data: bytes) -> ShardIndex:
        """Parse the content of the index; raises MalformedAdapter."""
        index = parse_object(data, INDEX_NAME, MAX_INDEX_BYTES)
        for key in index:
            if key not in ("weight_map", "metadata"):
                raise _wrong(f"has the field {key[:80]!r}, known are weight_map and metadata")
        metadata, weight_map = index.get("metadata", {}), index.get("weight_map")
        if not isinstance(metadata, dict):
            raise _wrong("has metadata that are no object")
        if not isinstance(weight_map, dict) or not weight_map:
            raise _wrong("has no weight_map from tensors to files")
        found: dict[str, set[str]] = {}
        for tensor, name in weight_map.items():
            if not is_shard(name):
                raise _wrong(f"names the file {str(name)[:80]!r}, expected is {shard_name(1, 1)} or the like", tensor)
            found.setdefault(name, set()).add(tensor)
        count = _numbers(next(iter(found)))[1]
        if count > MAX_SHARDS:
            raise _wrong(f"names one of {count} files, at most {MAX_SHARDS} are read")
        expected = [shard_name(number, count) for number in range(1, count + 1)]
        for name in (*expected, *found):
            if name not in found or name not in expected:
                raise _wrong(f"has {'no tensor in' if name in expected else 'besides'} {name}, one of {count} files")
        texts = {key: value for key, value in metadata.items() if isinstance(value, str)}
        return cls({name: frozenset(found[name]) for name in expected}, texts)


def shard_name(number: int, count: int) -> str:
    """The name of a shard, the first is number 1."""
    return f"adapter_model-{number:05d}-of-{count:05d}.safetensors"


def is_shard(name: object) -> bool:
    """Whether a file is called as shards are."""
    return isinstance(name, str) and _SHARD.fullmatch(name) is not None and 1 <= _numbers(name)[0] <= _numbers(name)[1]


def _numbers(name: str) -> tuple[int, int]:
    match = _SHARD.fullmatch(name)
    assert match is not None
    return int(match[1]), int(match[2])


def _wrong(what: str, field: str = INDEX_NAME) -> MalformedAdapter:
    return MalformedAdapter(f"{INDEX_NAME} {what}", field[:200])
