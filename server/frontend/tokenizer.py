"""The model's tokenizer: text ↔ token ids, and a detokenizer for each sequence.

Read with the `tokenizers` library from tokenizer.json, whose post-processor says which special tokens text gets.
Only a folder without that file needs transformers, whose import alone takes seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from lorry.server.errors import InvalidField
from lorry.server.frontend import chat_template
from lorry.server.frontend.detokenize import ByteLevelDetokenizer, Detokenizer, OffsetDetokenizer
from lorry.server.frontend.request import ChatPrompt, TextPrompt

FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def _byte_alphabet() -> dict[str, int]:
    """Character → byte of GPT-2's byte-level alphabet: printable bytes are themselves, the others 256 + k."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + k): byte for k, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()


class Tokenizer:
    """Thread-safe after construction: `encode` may run in a worker thread beside the loop's detokenizing."""

    def __init__(self, backend: Backend, template: chat_template.ChatTemplate | None = None) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._template = template
        self._hidden = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self._byte_level = isinstance(backend.decoder, decoders.ByteLevel)
        self._bytes: dict[int, bytes] = {}  # of the tokens that were shown so far

    @property
    def knows_text(self) -> bool:
        """Whether there is any text: see NoTokenizer."""
        return True

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of plain text."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def render(self, prompt: ChatPrompt) -> str:
        """A conversation as the text that the model was trained on; encode it without adding special tokens."""
        if self._template is None:
            raise InvalidField("the model has no chat template: send text or token ids", field="chat")
        return self._template.render(prompt.messages, prompt.add_generation_prompt)

    def encode_prompt(self, prompt: TextPrompt | ChatPrompt, add_special_tokens: bool = True) -> list[int]:
        """Token ids as the model sees them; a rendered conversation has its special tokens already."""
        if isinstance(prompt, TextPrompt):
            return self.encode(prompt.text, add_special_tokens)
        return self.encode(self.render(prompt), add_special_tokens=False)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of a whole list; ids without a token are left out."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def detokenizer(self, prompt_token_ids: Sequence[int] = ()) -> Detokenizer:
        """For one sequence that continues a prompt; special tokens are not shown."""
        if self._byte_level:
            return ByteLevelDetokenizer(self._token_bytes)
        return OffsetDetokenizer(self.decode, self._hidden, prompt_token_ids)

    def _token_bytes(self, token_id: int) -> bytes:
        found = self._bytes.get(token_id)
        if found is None:
            token = None if token_id in self._hidden else self._backend.id_to_token(token_id)
            found = _bytes_of(token) if token else b""
            self._bytes[token_id] = found
        return found


def _bytes_of(token: str) -> bytes:
    """A token outside the byte alphabet (an added one) stands for its own text."""
    values = [BYTE_OF.get(character, -1) for character in token]
    return token.encode() if -1 in values else bytes(values)


class NoTokenizer(Tokenizer):
    """Of a model folder without one: token ids go in and out, the text of an answer is empty, text is refused."""

    def __init__(self) -> None:
        super().__init__(Backend(models.WordLevel({}, "")))

    @property
    def knows_text(self) -> bool:
        return False

    def encode_prompt(self, prompt: TextPrompt | ChatPrompt, add_special_tokens: bool = True) -> list[int]:
        field = "text" if isinstance(prompt, TextPrompt) else "chat"
        raise InvalidField("the model has no tokenizer: send token ids", field=field)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        raise InvalidField("the model has no tokenizer, so token ids have no text", field="token_ids")

    def detokenizer(self, prompt_token_ids: Sequence[int] = ()) -> Detokenizer:
        return ByteLevelDetokenizer(lambda _: b"")


def from_folder(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder. Raises ValueError for a folder that has none that `tokenizers` can run."""
    if not any((folder / name).is_file() for name in FILES):
        return NoTokenizer()
    path = folder / "tokenizer.json"
    if path.is_file():
        return Tokenizer(Backend.from_file(str(path)), chat_template.from_folder(folder))
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise ValueError("the model's tokenizer has no fast form: save it as tokenizer.json")
    return Tokenizer(backend, chat_template.from_folder(folder))
