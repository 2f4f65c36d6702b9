"""Wire → domain: protobuf requests become domain requests here, and every field is checked on the way.

A field that cannot be honoured is refused by its path as the client wrote it (`spec.sampling.top_p`), with
its value and what is accepted. Ranges stand in the sentences of the protos; defaults are the domain types'.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec

from lorry.server.engine.messages import AdapterRef
from lorry.server.errors import InvalidField
from lorry.server.frontend.request import (
    ChatMessage,
    ChatPrompt,
    Prompt,
    Request,
    ResponseOptions,
    StoppingCriteria,
    TextPrompt,
    TokenPrompt,
    fresh_request_id,
)
from lorry.server.rpc import fields, sampling, speculation, strategy, structured
from lorry.server.rpc.fields import refuse
from lorry.v1 import adapter_pb2, control_pb2, generation_pb2

MAX_ADAPTERS = 8
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_LENGTH = 256
MAX_STOP_TOKENS = 64
MAX_LOGPROBS = 20
MAX_SALT_BYTES = 256
MAX_PAGE = 1000


def generation(spec: generation_pb2.GenerationSpec, present: bool, vocab_size: int, deadline: float | None) -> Request:
    """A GenerationSpec → Request.

    `present`: whether the client sent one at all; `deadline`: time.time() after which nobody waits, or None.
    """
    if not present:
        raise InvalidField("spec is not set; accepted: a GenerationSpec", field="spec")
    if len(spec.cache_salt.encode()) > MAX_SALT_BYTES:
        raise refuse("spec.cache_salt", spec.cache_salt, f"at most {MAX_SALT_BYTES} bytes of UTF-8")
    return Request(
        prompt=_prompt(spec, vocab_size),
        adapters=adapter_refs("spec.adapters", spec.adapters),
        sampling=msgspec.structs.replace(
            sampling.params(spec.sampling, vocab_size),
            dola=strategy.dola(spec),
            search=strategy.search(spec),
            structured_output=structured.output(spec),
        ),
        texts=sampling.texts(spec.sampling),
        stopping=_stopping(spec.stopping, vocab_size),
        response=_response(spec.response),
        best_of=strategy.best_of(spec),
        negative=_negative(spec.guidance, vocab_size),
        speculation=speculation.wish(spec),
        priority=fields.integer("spec.priority", spec.priority, -1000, 1000),
        cache_salt=spec.cache_salt,
        request_id=fields.request_id("spec.request_id", spec.request_id) if spec.request_id else fresh_request_id(),
        arrival=time.time(),
        deadline=deadline,
    )


def _prompt(spec: generation_pb2.GenerationSpec, vocab_size: int) -> Prompt:
    prompt = _prompt_in("spec", spec, spec.WhichOneof("prompt"), vocab_size)
    if prompt is None:
        raise InvalidField("spec.prompt is not set; accepted: one of text, token_ids, chat", field="spec.prompt")
    return prompt


def _negative(guidance: generation_pb2.Guidance, vocab_size: int) -> Prompt | None:
    """The negative prompt of a guidance, which `strategy.search` has looked at."""
    return _prompt_in("spec.guidance", guidance, guidance.WhichOneof("negative"), vocab_size)


def _prompt_in(
    path: str,
    message: generation_pb2.GenerationSpec | generation_pb2.Guidance,
    kind: str | None,
    vocab_size: int,
) -> Prompt | None:
    match kind:
        case "text":
            return _text(f"{path}.text", message.text)
        case "token_ids":
            return _token_ids(f"{path}.token_ids.ids", message.token_ids, vocab_size)
        case "chat":
            return _chat(f"{path}.chat", message.chat)
        case _:
            return None


def _text(path: str, value: str) -> TextPrompt:
    if not value:
        raise refuse(path, value, "at least one character")
    return TextPrompt(value)


def _token_ids(path: str, value: generation_pb2.TokenIds, vocab_size: int) -> TokenPrompt:
    if not value.ids:
        raise refuse(path, [], "at least one token id")
    return TokenPrompt(fields.tokens(path, value.ids, vocab_size))


def _chat(path: str, value: generation_pb2.ChatPrompt) -> ChatPrompt:
    if not value.messages:
        raise refuse(f"{path}.messages", [], "at least one message")
    for index, message in enumerate(value.messages):
        if not message.role:
            raise refuse(f"{path}.messages[{index}].role", "", 'a role, usually "system", "user" or "assistant"')
    return ChatPrompt(
        messages=tuple(ChatMessage(message.role, message.content) for message in value.messages),
        add_generation_prompt=value.add_generation_prompt or not value.HasField("add_generation_prompt"),
    )


def adapter_refs(path: str, refs: Sequence[generation_pb2.AdapterRef]) -> tuple[AdapterRef, ...]:
    """At most 8 adapters, no id twice, weights of any sign."""
    if len(refs) > MAX_ADAPTERS:
        raise InvalidField(
            f"{path} names {len(refs)} adapters; accepted: at most {MAX_ADAPTERS}",
            field=path,
            value=len(refs),
        )
    converted = tuple(_adapter_ref(f"{path}[{index}]", ref) for index, ref in enumerate(refs))
    seen: set[str] = set()
    for index, ref in enumerate(converted):
        if ref.id in seen:
            raise refuse(f"{path}[{index}].id", ref.id, "no id twice; add up the weights instead")
        seen.add(ref.id)
    return converted


def _adapter_ref(path: str, ref: generation_pb2.AdapterRef) -> AdapterRef:
    return AdapterRef(
        id=fields.adapter_id(f"{path}.id", ref.id),
        weight=fields.number(f"{path}.weight", ref.weight, -1000, 1000) if ref.HasField("weight") else 1.0,
        revision=fields.revision(f"{path}.revision", ref.revision) if ref.HasField("revision") else None,
    )


def _stopping(criteria: generation_pb2.StoppingCriteria, vocab_size: int) -> StoppingCriteria:
    path = "spec.stopping"
    most = criteria.max_new_tokens if criteria.HasField("max_new_tokens") else None
    if most == 0:
        raise refuse(f"{path}.max_new_tokens", most, "1 or more")
    if most is not None and criteria.min_new_tokens > most:
        raise refuse(f"{path}.min_new_tokens", criteria.min_new_tokens, f"0 to {most}, which is max_new_tokens")
    if len(criteria.stop) > MAX_STOP_STRINGS:
        raise refuse(f"{path}.stop", list(criteria.stop), f"at most {MAX_STOP_STRINGS} strings")
    for index, stop in enumerate(criteria.stop):
        if not 1 <= len(stop) <= MAX_STOP_STRING_LENGTH:
            raise refuse(f"{path}.stop[{index}]", stop, f"1 to {MAX_STOP_STRING_LENGTH} characters")
    fields.unique(f"{path}.stop", criteria.stop)
    if len(criteria.stop_token_ids) > MAX_STOP_TOKENS:
        raise refuse(f"{path}.stop_token_ids", list(criteria.stop_token_ids), f"at most {MAX_STOP_TOKENS} token ids")
    fields.unique(f"{path}.stop_token_ids", criteria.stop_token_ids)
    return StoppingCriteria(
        max_new_tokens=most,
        min_new_tokens=criteria.min_new_tokens,
        stop=tuple(criteria.stop),
        stop_token_ids=fields.tokens(f"{path}.stop_token_ids", criteria.stop_token_ids, vocab_size),
        ignore_eos=criteria.ignore_eos,
        time_limit=fields.seconds(f"{path}.time_limit", criteria.time_limit)
        if criteria.HasField("time_limit")
        else None,
    )


def _response(options: generation_pb2.ResponseOptions) -> ResponseOptions:
    logprobs = None
    if options.HasField("logprobs"):
        logprobs = fields.integer("spec.response.logprobs", options.logprobs, 0, MAX_LOGPROBS)
    if options.entropy and logprobs is None:
        raise refuse("spec.response.entropy", True, "false without logprobs: it comes with each log-probability")
    return ResponseOptions(
        logprobs=logprobs,
        prompt_logprobs=options.prompt_logprobs,
        include_prompt=options.include_prompt,
        include_stop=options.include_stop,
        entropy=options.entropy,
    )


def score(
    request: generation_pb2.ScoreRequest, vocab_size: int
) -> tuple[TextPrompt | TokenPrompt, tuple[int, ...], tuple[AdapterRef, ...]]:
    """A ScoreRequest → prompt, continuation, adapters."""
    prompt: TextPrompt | TokenPrompt
    match request.WhichOneof("prompt"):
        case "text":
            prompt = _text("text", request.text)
        case "token_ids":
            prompt = _token_ids("token_ids.ids", request.token_ids, vocab_size)
        case _:
            raise InvalidField("prompt is not set; accepted: one of text, token_ids", field="prompt")
    continuation = _token_ids("continuation.ids", request.continuation, vocab_size)
    return prompt, continuation.token_ids, adapter_refs("adapters", request.adapters)


def tokenize(request: generation_pb2.TokenizeRequest) -> tuple[TextPrompt | ChatPrompt, bool]:
    """A TokenizeRequest → prompt, whether special tokens are added. Empty text is served."""
    match request.WhichOneof("prompt"):
        case "text":
            special = request.add_special_tokens or not request.HasField("add_special_tokens")
            return TextPrompt(request.text), special
        case "chat":
            if request.HasField("add_special_tokens"):
                raise refuse(
                    "add_special_tokens",
                    request.add_special_tokens,
                    "unset with chat: the template brings its special tokens",
                )
            return _chat("chat", request.chat), True
        case _:
            raise InvalidField("prompt is not set; accepted: one of text, chat", field="prompt")


def detokenize(request: generation_pb2.DetokenizeRequest, vocab_size: int) -> tuple[tuple[int, ...], bool]:
    """A DetokenizeRequest → token ids, whether special tokens are skipped."""
    skip = request.skip_special_tokens or not request.HasField("skip_special_tokens")
    return fields.tokens("token_ids", request.token_ids, vocab_size), skip


def load_adapter(request: adapter_pb2.LoadAdapterRequest) -> tuple[str, str, str | None]:
    """A LoadAdapterRequest → id, path, expected revision; the engine says whether the path is allowed."""
    adapter_id = fields.adapter_id("id", request.id)
    if not request.path or "\0" in request.path or len(request.path.encode()) > 4096:
        raise refuse("path", request.path, "a folder below an adapter root or an address, at most 4096 bytes")
    if not request.HasField("expected_revision"):
        return adapter_id, request.path, None
    return adapter_id, request.path, fields.revision("expected_revision", request.expected_revision)


def update_adapter(request: adapter_pb2.UpdateAdapterRequest) -> tuple[str, bool]:
    """An UpdateAdapterRequest → id, whether it is pinned."""
    adapter_id = fields.adapter_id("id", request.id)
    if not request.HasField("pinned"):
        raise InvalidField("pinned is not set; accepted: true or false", field="pinned")
    return adapter_id, request.pinned


def page(request: adapter_pb2.ListAdaptersRequest) -> tuple[int, str]:
    """A ListAdaptersRequest → page size, the id after which the page begins ("": from the first one on)."""
    size = request.page_size if request.HasField("page_size") else MAX_PAGE
    fields.integer("page_size", size, 1, MAX_PAGE)
    if request.page_token and not fields.ADAPTER_ID.fullmatch(request.page_token):
        raise refuse("page_token", request.page_token, "a next_page_token of an earlier answer")
    return size, request.page_token


def watch(request: adapter_pb2.WatchAdaptersRequest) -> tuple[str, ...]:
    """A WatchAdaptersRequest → the ids to watch, none for all."""
    if len(request.ids) > MAX_PAGE:
        raise refuse("ids", list(request.ids), f"at most {MAX_PAGE} ids")
    return tuple(fields.adapter_id(f"ids[{index}]", value) for index, value in enumerate(request.ids))


def drain(request: control_pb2.DrainRequest) -> float | None:
    """A DrainRequest → seconds, None for the server's own drain timeout."""
    return fields.seconds("timeout", request.timeout, zero=True) if request.HasField("timeout") else None
