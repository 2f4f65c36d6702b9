"""Names of tensors as trainers have written them: what only wraps a module, and whose names no rule reads."""

from __future__ import annotations

import re

# torch.compile, FSDP, activation checkpointing and DistributedDataParallel name themselves in a state dict.
_WRAPPERS = re.compile(r"^module\.|(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

_FOREIGN = (
    (r"\blanguage_model\.", "of the language model inside a larger one: take language_model out of names and config"),
    (r"\b(?:vision_tower|vision_model|visual|multi_modal_projector|audio_tower)\.", "of what sees or hears"),
    (r"\bexperts\.", "of a mixture of experts"),
    (r"\.lora_[ab](?:\.weight)?$", "as MLX and torchtune call it: convert the adapter to PEFT's form"),
    (r"\.lora_(?:up|down)\.weight$|^lora_unet_|^lora_te", "as kohya's trainers call it: convert it to PEFT's form"),
    (r"^(?:base_model\.model\.)?layers\.", "of a model without its head: begin the names with base_model.model.model."),
    (r"\.(?:lora_[AB]|lora_magnitude_vector)\.[^.]+(?:\.weight)?$", "of an adapter by a name that PEFT does not save"),
)


def unwrapped(name: str) -> str:
    """The name without segments that stand for no module of the model."""
    return _WRAPPERS.sub("", name)


def kind_of(name: str) -> str:
    """What a name that no rule reads looks like, as the end of a sentence; "" where nobody can tell."""
    return next((f", {kind}" for pattern, kind in _FOREIGN if re.search(pattern, name[:1000])), "")
