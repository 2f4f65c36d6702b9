"""The tokenizer inside a .gguf file as tokenizer.json and tokenizer_config.json.

GGUF holds the vocabulary, the merges and the name of the pre-tokenizer (`tokenizer.ggml.pre`), not its rules;
the rules of the names below are those of the models that bear them. A name that is not below is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lorry.server.model.errors import MalformedCheckpoint, UnsupportedModel

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

SERVED = ("smollm", "llama-bpe", "qwen2")


def write_tokenizer(metadata: Mapping[str, Any], folder: Path) -> None:
    """Write both files into `folder`; raises UnsupportedModel naming the tokenizer that is not served."""
    tokenizer = build_tokenizer(metadata)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = tokenizer_config(metadata)
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """Byte-level BPE with the vocabulary of the file; token ids are the file's."""
    kind, pre = metadata.get("tokenizer.ggml.model"), str(metadata.get("tokenizer.ggml.pre", "default"))
    if kind != "gpt2":
        raise UnsupportedModel(
            f"GGUF tokenizer model {kind!r} is not served; 'gpt2' (byte-level BPE) is", field="tokenizer.ggml.model"
        )
    if pre not in SERVED:
        raise UnsupportedModel(
            f"GGUF pre-tokenizer {pre!r} is not served; served: {', '.join(SERVED)}", field="tokenizer.ggml.pre"
        )
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise MalformedCheckpoint("the GGUF vocabulary is inconsistent", field="tokenizer.ggml.tokens")
    merges = [_pair(merge) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = _post_processor(metadata, pre, tokens)
    added = {_CONTROL: True, _UNKNOWN: True, _USER_DEFINED: False}
    tokenizer.add_tokens(
        [
            AddedToken(token, special=added[kind], normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in added
        ]
    )
    if tokenizer.get_vocab_size() != len(tokens):
        raise MalformedCheckpoint("the GGUF vocabulary is inconsistent", field="tokenizer.ggml.tokens")
    return tokenizer


def tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer_config.json that transformers reads beside tokenizer.json, chat template included."""
    tokens = metadata["tokenizer.ggml.tokens"]
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": _adds_bos(metadata, str(metadata.get("tokenizer.ggml.pre"))),
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(metadata.get(f"{metadata['general.architecture']}.context_length", 2**30)),
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None:
            config[f"{name}_token"] = tokens[int(index)]
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    return config


def _pair(merge: str) -> tuple[str, str]:
    first, _, second = merge.partition(" ")
    return first, second


def _pre_tokenizer(pre: str) -> pre_tokenizers.PreTokenizer:
    if pre == "smollm":
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    digits = r"\p{N}{1,3}" if pre == "llama-bpe" else r"\p{N}"
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS + digits + _REST), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _adds_bos(metadata: Mapping[str, Any], pre: str) -> bool:
    """What the file says; files of Llama 3 that say nothing mean yes."""
    return bool(metadata.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"))


def _post_processor(metadata: Mapping[str, Any], pre: str, tokens: list[str]) -> processors.PostProcessor:
    byte_level = processors.ByteLevel(trim_offsets=False)
    if not _adds_bos(metadata, pre):
        return byte_level
    index = int(metadata["tokenizer.ggml.bos_token_id"])
    bos = tokens[index]
    template = processors.TemplateProcessing(
        single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, index)]
    )
    return processors.Sequence([byte_level, template])
