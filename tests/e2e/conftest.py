"""A tiny random model on disk, and real servers of it: two processes, the real engine, a free port."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

TEXT = (
    "The ferry leaves the harbour at seven, and nobody waits for those who are late. "
    "Grüße aus Köln; naïve café owners sell crème brûlée and 東京 noodles for 5 € each! "
    "A quick brown fox jumps over the lazy dog, then the dog jumps over the quick brown fox."
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIALS = ["<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CONTEXT = 2048


def save_tokenizer(folder: Path) -> int:
    """A byte-level BPE tokenizer with a chat template; returns the vocabulary's size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=331, special_tokens=SPECIALS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    bos = tokenizer.token_to_id("<|bos|>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", bos)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        additional_special_tokens=SPECIALS[2:],
        chat_template=CHAT_TEMPLATE,
    )
    fast.save_pretrained(folder)
    return int(tokenizer.get_vocab_size())


def save_model(folder: Path) -> None:
    """A random Llama whose logits are far from uniform, with its tokenizer, as transformers saves it."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    vocab_size = save_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
        model.lm_head.weight[:5] *= 0.01  # special tokens are unlikely, so that answers go on
    model.to(torch.bfloat16).save_pretrained(folder)


@dataclass(frozen=True)
class LiveServer:
    """A server that serves; `line` is what it printed."""

    address: str
    line: str
    process: subprocess.Popen[str]

    def stub(self, factory: Any) -> Any:
        """A blocking stub on a channel of its own, kept open as long as the stub lives."""
        return factory(grpc.insecure_channel(self.address, options=[("grpc.use_local_subchannel_pool", 1)]))


@contextlib.contextmanager
def live_server(model: Path | None, options: Sequence[str] = ()) -> Iterator[LiveServer]:
    """Serve `model` (None: the default) on a free port; ends by SIGTERM and exit code 0."""
    arguments = ["serve", "--port", "0", "--log-level", "warning", *options]
    if model is not None:
        arguments += ["--model", str(model)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "lorry.server.cli", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("serving "), "the server did not start; its stderr says why"
            yield LiveServer(line.split(" on ", 1)[1].split(" ", 1)[0], line, process)
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random model with tokenizer and chat template."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_server(tiny_model: Path) -> Iterator[LiveServer]:
    """One server of the tiny model for all tests that leave it as they find it; everything in float32."""
    with live_server(tiny_model, ["--kv-dtype", "float32", "--kv-memory", "16MiB", "--threads", "1"]) as server:
        yield server


@pytest.fixture(name="live_server", scope="session")
def _live_server() -> Any:
    """`live_server` of this file."""
    return live_server
