"""Whether an adapter belongs to the base that is served: by its fingerprint, by its name where there is no other word.

An adapter names the fingerprint of its quantized base (server/model/fingerprint.py) in the metadata of its
safetensors file, which PEFT leaves alone, under `FINGERPRINT_KEY`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from lorry.adapters.errors import MalformedAdapter, WrongBase
from lorry.adapters.layout import ModelLayout

FINGERPRINT_KEY = "lorry.base_fingerprint"

_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_VARIANT = re.compile(r"([-_.]?(unsloth|bnb|nf4|4bit|8bit|gguf|hf))+$")  # the same model in another wrapping


def check_base(metadata: Mapping[str, str], named: str, layout: ModelLayout) -> str:
    """What to warn of, "" for nothing. named: the config's base_model_name_or_path.

    Raises WrongBase for another fingerprint than the base's, unless the layout allows that, and MalformedAdapter for
    what is no fingerprint. Nothing is compared with a base that has none.
    """
    theirs, ours = metadata.get(FINGERPRINT_KEY), layout.fingerprint
    if theirs is not None and not _FINGERPRINT.fullmatch(theirs):
        raise MalformedAdapter(
            f"{FINGERPRINT_KEY} is {theirs[:80]!a}, 64 hexadecimal digits are expected", FINGERPRINT_KEY
        )
    if not ours or theirs == ours:
        return ""
    if theirs is None:
        return doubt_without_fingerprint(named, layout.base)
    both = f"it was trained on the base {theirs[:12]}, this one is {ours[:12]}"
    if layout.allow_base_mismatch:
        return both
    raise WrongBase(
        f"the adapter is of another quantized base: {both}; --allow-base-mismatch serves it all the same",
        FINGERPRINT_KEY,
        expected=ours,
        actual=theirs,
    )


def doubt_without_fingerprint(theirs: str, ours: str) -> str:
    """What to warn of when only the bases' names can be compared."""
    unsaid = "it does not say which quantized base it was trained on"
    if not theirs:
        return f"{unsaid}; its config names no base either"
    alike = "as this one is" if _family(theirs) == _family(ours) else f"this one {ours!a}"
    return f"{unsaid}; its base was called {_last(theirs)!a}, {alike}"


def _last(name: str) -> str:
    """The model's own name in a hub id or a path."""
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1][:80]


def _family(name: str) -> str:
    return _VARIANT.sub("", _last(name).lower().removesuffix(".gguf")).replace("_", "-").replace(".", "-")
