"""An engine in the caller's process, stepped by the caller: for tests, parity checks and benches."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from lorry.server.config import EngineConfig
from lorry.server.engine.build import Types, build_engine
from lorry.server.engine.channel import LocalChannel
from lorry.server.engine.grammars import GrammarDesk
from lorry.server.engine.messages import (
    AdapterReply,
    Command,
    EngineMessage,
    Failed,
    FinishReason,
    Generate,
    PromptLogprobs,
    Started,
    Timings,
    TokenLogprobs,
    Tokens,
)
from lorry.server.errors import LorryError, from_wire
from lorry.server.model.decoder import Decoder

LOAD_POLL = 0.001  # seconds


@dataclass
class Completion:
    """One sequence of an answer so far."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: FinishReason | None = None
    timings: Timings | None = None
    score: float | None = None


@dataclass
class Answer:
    """What the engine has said about one request so far."""

    started: Started | None = None
    completions: dict[int, Completion] = field(default_factory=dict)
    prompt_logprobs: list[TokenLogprobs] | None = None
    error: LorryError | None = None

    def tokens(self, index: int = 0) -> list[int]:
        return self.completions[index].token_ids


class LocalEngine:
    """`send` commands, `step` or `run`, read `answers`. Build it with a decoder that is loaded."""

    def __init__(
        self,
        decoder: Decoder,
        config: EngineConfig,
        types: Types | None = None,
        grammars: GrammarDesk | None = None,
        draft: Decoder | None = None,
    ) -> None:
        self.channel = LocalChannel()
        self.types = types or Types.choose(config)
        self.engine = build_engine(config, self.types, decoder, self.channel, grammars=grammars, draft=draft)
        self.answers: dict[str, Answer] = {}
        self.replies: dict[int, AdapterReply] = {}
        self.messages: list[EngineMessage] = []

    def send(self, *commands: Command) -> None:
        """They take effect at the next step."""
        for command in commands:
            if isinstance(command, Generate):
                self.answers[command.request_id] = Answer()
            self.channel.commands.append(command)

    def step(self) -> bool:
        """One step; whether anything ran. Where only a load could go on, it is given a moment."""
        with torch.inference_mode():
            busy = self.engine.step()
        if not busy and (self.engine.adapters.busy or self.engine.grammars.busy):
            time.sleep(LOAD_POLL)  # or the interpreter hardly ever leaves this thread for the loader's
        self._sort(self.channel.messages)
        self.channel.messages = []
        return busy

    def run(self, *commands: Command, timeout: float = 60.0) -> None:
        """Send commands, then step until no request is left and no adapter is on its way; TimeoutError if it hangs."""
        self.send(*commands)
        end = time.monotonic() + timeout
        engine = self.engine
        while (
            self.step()
            or engine.scheduler.requests
            or engine.adapters.busy
            or engine.grammars.busy
            or self.channel.commands
        ):
            if time.monotonic() > end:
                raise TimeoutError(f"requests {sorted(self.engine.scheduler.requests)} do not end")

    def generate(self, *requests: Generate) -> list[Answer]:
        """Run requests together to their end; their answers in the order given."""
        self.run(*requests)
        return [self.answers[request.request_id] for request in requests]

    def close(self) -> None:
        """End the adapters' loader."""
        self.engine.adapters.manager.close()

    def _sort(self, messages: Sequence[EngineMessage]) -> None:
        self.messages += messages
        for message in messages:
            match message:
                case Started():
                    self.answers[message.request_id].started = message
                case PromptLogprobs():
                    self.answers[message.request_id].prompt_logprobs = message.logprobs
                case Failed():
                    error = message.error
                    self.answers[message.request_id].error = from_wire(error.kind, error.message, error.fields)
                case Tokens():
                    completions = self.answers[message.request_id].completions
                    completion = completions.setdefault(message.index, Completion())
                    completion.token_ids += message.token_ids
                    completion.logprobs += message.logprobs or []
                    completion.finish, completion.timings = message.finish, message.timings
                    completion.score = message.score
                case AdapterReply():
                    self.replies[message.call_id] = message
