"""The server without its wire: requests in, events out, one engine process below.

    submit ─▶ tokenize ─▶ prepare ─▶ Generate ═▶ engine ═▶ Tokens… ─▶ handle ─▶ events

See `interface.Frontend` for what each method promises.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from lorry.server.config import ServerConfig
from lorry.server.engine import messages
from lorry.server.engine.messages import AdapterRef, EngineMessage, Loading, ModelInfo, Ready
from lorry.server.errors import DeadlineExceeded, Draining, EngineUnavailable, InvalidField
from lorry.server.frontend import tokenizer as tokenizers
from lorry.server.frontend.adapters import EngineAdapters
from lorry.server.frontend.best_of import BestOfHandle
from lorry.server.frontend.downloads import Downloads
from lorry.server.frontend.engine_process import COMMAND, EngineFailed, EngineProcess
from lorry.server.frontend.grammars import GrammarChecks
from lorry.server.frontend.handle import Handle
from lorry.server.frontend.interface import Load, RequestHandle, State
from lorry.server.frontend.latest import Latest
from lorry.server.frontend.output import SequenceOutput
from lorry.server.frontend.prepare import check_no_text, check_token_ids, generate_command
from lorry.server.frontend.request import (
    ChatPrompt,
    Prompt,
    PromptLogprobs,
    Request,
    ResponseOptions,
    Score,
    StoppingCriteria,
    TextPrompt,
    TokenPrompt,
)
from lorry.server.frontend.requests import Entry, Requests
from lorry.server.frontend.sampling_texts import tokenized
from lorry.server.frontend.speculation import resolved
from lorry.server.frontend.stop_strings import StopStrings
from lorry.server.frontend.tokenizer import Tokenizer
from lorry.server.grammars.job import Vocabulary
from lorry.server.observability.engine_stats import record
from lorry.server.observability.logs import request_id_in_logs
from lorry.server.observability.metrics import Metrics
from lorry.server.params import Guidance, SamplingParams

logger = logging.getLogger(__name__)

IN_LOOP_CHARACTERS = 4096  # longer text is tokenized in a thread: 1 MB takes about a second
LAST_READ_SECONDS = 1.0  # after a drain's time is over


def _load_tokenizer(config: ServerConfig, ready: Ready) -> Tokenizer:
    return tokenizers.from_folder(Path(_model_folder(config, ready)))


def _model_folder(config: ServerConfig, ready: Ready) -> str:
    if ready.model_folder:
        return ready.model_folder
    from lorry.server.model.store import resolve_model

    return str(resolve_model(config.engine.model))


class EngineFrontend:
    """The `Frontend` that serves. Everything runs in the event loop that calls `start`."""

    def __init__(
        self,
        config: ServerConfig,
        *,
        on_loading: Callable[[Loading], None] = lambda loading: None,
        command: Sequence[str] = COMMAND,
        load_tokenizer: Callable[[ServerConfig, Ready], Tokenizer] = _load_tokenizer,
        downloads: Downloads | None = None,
    ) -> None:
        """`on_loading`: progress of each start of the engine. `command`: how the engine is started."""
        self._config = config
        self._load_tokenizer = load_tokenizer
        self._tokenizer: Tokenizer | None = None
        self._ready: Ready | None = None
        self._engine_up = False
        self._state = Latest(State.STARTING)
        self._stats = messages.Stats(0, 0, 0, 0, 0, 0)
        self._drain_timer: asyncio.TimerHandle | None = None
        self._drained = asyncio.Event()
        self._metrics = Metrics()
        self._engine = EngineProcess(
            config.engine,
            on_messages=self._on_messages,
            on_loading=on_loading,
            on_ready=self._on_ready,
            on_down=self._on_down,
            backoff=config.restart_backoff,
            backoff_max=config.restart_backoff_max,
            command=command,
        )
        self._downloads = downloads or Downloads(
            config.engine.adapter_sources, cache_bytes=config.engine.adapter_cache_size
        )
        self._grammars: GrammarChecks | None = None
        self._adapters = EngineAdapters(self._engine.send, self._check_up, self._fetch_adapter, self._downloads.keep)
        self._requests = Requests(self._engine.send, self._metrics, config.engine.max_waiting, self._check_drained)
        self._start_time = time.time()

    # ---------------------------------------------------------------- what it is

    @property
    def adapters(self) -> EngineAdapters:
        return self._adapters

    @property
    def metrics(self) -> Metrics:
        return self._metrics

    @property
    def state(self) -> State:
        return self._state.value

    @property
    def start_time(self) -> float:
        return self._start_time

    @property
    def engine_pid(self) -> int | None:
        """Process id of the engine that was started last."""
        return self._engine.pid

    def watch_state(self) -> AsyncIterator[State]:
        return self._state.watch()

    @property
    def model_info(self) -> ModelInfo:
        if self._ready is None:
            raise EngineUnavailable("the model is being loaded")
        return self._ready.model

    def load(self) -> Load:
        stats, limits = self._stats, self._config.engine
        return Load(
            running=stats.running,
            waiting=stats.waiting,
            max_running=limits.max_running,
            max_waiting=limits.max_waiting,
            kv_blocks_used=stats.kv_blocks_used,
            kv_blocks_total=stats.kv_blocks_total,
            adapter_pages_used=stats.adapter_pages_used,
            adapter_pages_total=stats.adapter_pages_total,
            adapters_loaded=stats.adapters_loaded,
            in_flight=len(self._requests),
        )

    # ---------------------------------------------------------------- its life

    async def start(self) -> None:
        await self._engine.start()
        assert self._ready is not None
        try:
            self._tokenizer = await asyncio.to_thread(self._load_tokenizer, self._config, self._ready)
        except Exception as error:
            raise EngineFailed(f"the model's tokenizer cannot be read: {error}") from error
        if not self._tokenizer.knows_text:
            logger.warning("the model has no tokenizer: only token ids are taken and given")
        self._serve_if_ready()

    async def stop(self, at_once: bool = False) -> None:
        """`at_once`: the engine is not asked but killed."""
        self._requests.abort_all()
        if self._drain_timer is not None:
            self._drain_timer.cancel()
        self._downloads.close()
        if self._grammars is not None:
            await self._grammars.close()
        self._adapters.close()
        await self._engine.stop(at_once)

    def drain(self, timeout: float | None = None) -> int:
        loop = asyncio.get_running_loop()
        when = loop.time() + (self._config.drain_timeout if timeout is None else timeout)
        if self._drain_timer is None or when < self._drain_timer.when():
            if self._drain_timer is not None:
                self._drain_timer.cancel()
            self._drain_timer = loop.call_at(when, self._end_drain)
        if self._state.value is not State.DRAINING:
            logger.info("draining: %d requests in flight", len(self._requests))
            self._state.set(State.DRAINING)
        self._check_drained()
        return len(self._requests)

    async def drained(self) -> None:
        await self._drained.wait()

    # ---------------------------------------------------------------- requests

    async def submit(self, request: Request) -> RequestHandle:
        handle = await self._submit(request)
        return handle if request.best_of is None else BestOfHandle(handle, request)

    def abort(self, request_id: str) -> bool:
        return self._requests.abort(request_id)

    async def score(
        self,
        prompt: TextPrompt | TokenPrompt,
        continuation: Sequence[int],
        *,
        adapters: tuple[AdapterRef, ...] = (),
        entropy: bool = False,
        deadline: float | None = None,
    ) -> Score:
        self._check_serving()
        before = await self._token_ids(prompt)
        if not before:
            raise InvalidField("the prompt has no tokens", field="prompt")
        if not continuation:
            raise InvalidField("there is nothing to score", field="continuation")
        request = Request(
            prompt=TokenPrompt((*before, *continuation)),
            adapters=adapters,
            sampling=SamplingParams(temperature=0.0),
            stopping=StoppingCriteria(max_new_tokens=0),
            response=ResponseOptions(logprobs=1, entropy=entropy),
            deadline=deadline,
        )
        scores: tuple[messages.TokenLogprobs, ...] = ()
        async with await self._submit(request, score_from=len(before)) as handle:
            async for event in handle:
                if isinstance(event, PromptLogprobs):
                    scores = event.logprobs
        if len(scores) != len(continuation):
            raise Draining("the server ended the request before it was scored")
        return Score(
            tuple(s.logprob for s in scores),
            tuple(s.top[0].token_id for s in scores),
            tuple(s.entropy for s in scores if s.entropy is not None),
        )

    async def tokenize(self, prompt: TextPrompt | ChatPrompt, *, add_special_tokens: bool = True) -> list[int]:
        self._require_tokenizer()
        return await self._encode(prompt, add_special_tokens)

    async def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        tokenizer = self._require_tokenizer()
        check_token_ids(token_ids, self.model_info.vocab_size, "token_ids")
        return await asyncio.to_thread(tokenizer.decode, token_ids, skip_special_tokens)

    async def _submit(self, request: Request, score_from: int | None = None) -> Handle:
        request_id_in_logs.set(request.request_id)
        self._check_serving()
        if request.deadline is not None and request.deadline <= time.time():
            raise DeadlineExceeded("the deadline had passed when the request came")
        entry = self._requests.reserve(request.request_id)
        try:
            token_ids = await self._token_ids(request.prompt)
            request = await self._with_negative(request)
            await self._check_grammar(request)
            self._check_up()
            handle = self._handle(request, entry, token_ids, score_from)
        except BaseException:
            self._requests.give_up(entry)
            raise
        self._requests.open(entry, handle)
        return handle

    async def _with_negative(self, request: Request) -> Request:
        """With the tokens of the negative prompt in its guidance."""
        guidance = request.sampling.search
        if request.negative is None or not isinstance(guidance, Guidance):
            return request
        negative = tuple(await self._token_ids(request.negative))
        if not negative:
            raise InvalidField("the negative prompt has no tokens", field="guidance")
        guidance = msgspec.structs.replace(guidance, negative=negative)
        return replace(request, sampling=msgspec.structs.replace(request.sampling, search=guidance))

    async def _check_grammar(self, request: Request) -> None:
        wanted = request.sampling.structured_output
        if wanted is None or not self._require_tokenizer().knows_text:
            return
        if self._grammars is None:
            assert self._ready is not None
            folder, model = _model_folder(self._config, self._ready), self._ready.model
            self._grammars = GrammarChecks(
                Vocabulary(folder=folder, vocab_size=model.vocab_size, eos_token_ids=model.eos_token_ids)
            )
        try:
            await self._grammars.check(wanted)
        except InvalidField:
            self._metrics.grammars_refused.inc()
            raise

    def _handle(self, request: Request, entry: Entry, token_ids: Sequence[int], score_from: int | None) -> Handle:
        tokenizer, response = self._require_tokenizer(), request.response
        sampling = msgspec.structs.replace(
            tokenized(request.sampling, request.texts, tokenizer),
            speculation=resolved(request.speculation, self._config.engine),
        )
        request = replace(request, sampling=sampling)
        command = generate_command(request, entry.wire_id, token_ids, self.model_info)
        if score_from is not None:
            command = msgspec.structs.replace(command, prompt_logprobs_from=score_from, prompt_end=score_from)
        if not tokenizer.knows_text:
            check_no_text(request)
        stop = StopStrings(request.stopping.stop) if request.stopping.stop else None
        outputs = [
            SequenceOutput(
                tokenizer.detokenizer(token_ids),
                stop,
                min_new_tokens=request.stopping.min_new_tokens,
                include_stop=response.include_stop,
            )
            for _ in range(command.sampling.n)
        ]
        handle = Handle(
            command,
            request.request_id,
            outputs,
            self._requests.owner,
            prompt_text=self._prompt_text(request.prompt, token_ids) if response.include_prompt else "",
            empty_prompt_logprobs=response.prompt_logprobs and command.prompt_logprobs_from is None,
        )
        self._engine.send(command)
        return handle

    # ---------------------------------------------------------------- text and tokens

    async def _token_ids(self, prompt: Prompt) -> Sequence[int]:
        return prompt.token_ids if isinstance(prompt, TokenPrompt) else await self._encode(prompt)

    async def _encode(self, prompt: TextPrompt | ChatPrompt, add_special_tokens: bool = True) -> list[int]:
        tokenizer = self._require_tokenizer()
        texts = (prompt.text,) if isinstance(prompt, TextPrompt) else (m.content for m in prompt.messages)
        if sum(map(len, texts)) <= IN_LOOP_CHARACTERS:
            return tokenizer.encode_prompt(prompt, add_special_tokens)
        return await asyncio.to_thread(tokenizer.encode_prompt, prompt, add_special_tokens)

    def _prompt_text(self, prompt: Prompt, token_ids: Sequence[int]) -> str:
        """What include_prompt shows: the text as it came, or what the token ids say, special tokens included."""
        if isinstance(prompt, TextPrompt):
            return prompt.text
        return self._require_tokenizer().decode(token_ids, skip_special_tokens=False)

    # ---------------------------------------------------------------- states

    def _require_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise EngineUnavailable("the model is being loaded")
        return self._tokenizer

    async def _fetch_adapter(self, address: str) -> str:
        self._check_serving()
        return await self._downloads.fetch(address, self.model_info.max_weights_bytes)

    def _check_up(self) -> None:
        if not self._engine_up:
            gone = "the engine is gone and is being started again"
            raise EngineUnavailable("the model is being loaded" if self._ready is None else gone)

    def _check_serving(self) -> None:
        if self._state.value is State.DRAINING:
            raise Draining("the server is draining")
        self._require_tokenizer()
        self._check_up()

    def _check_drained(self) -> None:
        if self._state.value is State.DRAINING and not self._requests:
            self._drained.set()

    def _end_drain(self) -> None:
        """The time is over; readers that stall get a moment for what is left."""
        self._requests.abort_all()
        asyncio.get_running_loop().call_later(LAST_READ_SECONDS, self._drained.set)

    def _serve_if_ready(self) -> None:
        if self._engine_up and self._tokenizer is not None and self._state.value is not State.DRAINING:
            self._state.set(State.SERVING)

    # ---------------------------------------------------------------- what the engine says

    def _on_ready(self, ready: Ready) -> None:
        logger.info("the engine (process %d) is ready", ready.pid)
        self._ready = ready
        self._engine_up = True
        self._metrics.engine_started(ready.model.name, ready.model.device)
        self._adapters.engine_up()
        self._serve_if_ready()

    def _on_down(self) -> None:
        self._engine_up = False
        self._metrics.engine_up.set(0)
        self._stats = messages.Stats(0, 0, 0, 0, 0, 0)
        record(self._metrics, self._stats)
        if self._state.value is not State.DRAINING:
            self._state.set(State.DOWN)
        error = EngineUnavailable("the engine died while it computed the answer")
        self._requests.fail_all(error)
        self._adapters.engine_down(error)

    def _on_messages(self, batch: Sequence[EngineMessage]) -> None:
        for message in batch:
            match message:
                case messages.AdapterReply():
                    self._adapters.replied(message)
                case messages.AdapterEvent():
                    self._adapters.changed(message)
                case messages.Stats():
                    self._stats = message
                    record(self._metrics, message)
                case messages.Ready() | messages.Loading():
                    pass
                case _:
                    self._requests.dispatch(message)
