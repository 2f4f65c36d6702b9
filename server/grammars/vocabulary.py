"""The model's vocabulary as llguidance reads it: the bytes of each token, and which ones end an answer.

Special tokens stand for no bytes, so that no grammar takes them for text; those that end an answer are allowed where
the grammar may end. Ids that the model has and the tokenizer has not are never allowed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llguidance import LLTokenizer
from tokenizers import Tokenizer

from lorry.server.errors import InvalidField


def load_vocabulary(folder: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
    """Takes half a second of one core for 49,152 tokens, with Python's lock held.

    Raises InvalidField for a model whose tokenizer or whose end-of-sequence token is missing.
    """
    path = folder / "tokenizer.json"
    ending = [token for token in eos_token_ids if token < vocab_size]
    if not ending:
        raise InvalidField("the model has no end-of-sequence token, so no answer could end", field="structured_output")
    if path.is_file():
        backend = Tokenizer.from_file(str(path))
    else:
        backend = _converted(folder)
    backend.no_truncation()
    backend.no_padding()
    size = max(vocab_size, backend.get_vocab_size())
    try:
        return LLTokenizer(backend.to_str(), n_vocab=size, eos_token=ending)
    except ValueError as error:
        raise InvalidField(f"the model's tokenizer serves no grammars: {error}", field="structured_output") from error


def _converted(folder: Path) -> Tokenizer:
    if not any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.model", "vocab.json")):
        raise InvalidField("the model has no tokenizer: only token ids are taken and given", field="structured_output")
    from transformers import AutoTokenizer

    backend = getattr(AutoTokenizer.from_pretrained(str(folder), local_files_only=True), "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise InvalidField("the model's tokenizer has no fast form", field="structured_output")
    return backend
