"""A client's request and its token ids become the engine's command; what the model cannot do is refused here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from lorry.server.engine.messages import Generate, ModelInfo, StoppingParams
from lorry.server.errors import InvalidField, PromptTooLong
from lorry.server.frontend.dola import with_layers
from lorry.server.frontend.request import Request
from lorry.server.params import Guidance


def check_token_ids(token_ids: Iterable[int], vocab_size: int, field: str) -> None:
    """Raises InvalidField for ids outside [0, vocab_size): they would index past the embedding."""
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidField(f"token id {token_id} is not in [0, {vocab_size})", field=field)


def check_no_text(request: Request) -> None:
    """Raises InvalidField for what a request of token ids may ask of a tokenizer that is not there."""
    for field, asked in (
        ("stopping.stop", bool(request.stopping.stop)),
        ("response.include_prompt", request.response.include_prompt),
        ("structured_output", request.sampling.structured_output is not None),
    ):
        if asked:
            raise InvalidField("the model has no tokenizer: only token ids are taken and given", field=field)


def new_tokens(prompt_tokens: int, wanted: int | None, context_length: int) -> int:
    """How many tokens may be generated: `wanted`, or what the context still holds.

    Raises PromptTooLong when the prompt leaves no room for one token, or not for the `wanted` ones.
    """
    room = context_length - prompt_tokens
    if room < (1 if wanted is None else wanted):
        answer = "" if wanted is None else f" and max_new_tokens {wanted}"
        raise PromptTooLong(
            f"the prompt's {prompt_tokens} tokens{answer} do not fit the context of {context_length} tokens",
            prompt_tokens=prompt_tokens,
            max_new_tokens=1 if wanted is None else wanted,
            context_length=context_length,
        )
    return room if wanted is None else wanted


def generate_command(request: Request, wire_id: str, prompt_token_ids: Sequence[int], model: ModelInfo) -> Generate:
    """The engine's command for `request`, which it knows as `wire_id`.

    Raises InvalidField and PromptTooLong.
    """
    if not prompt_token_ids:
        raise InvalidField("the prompt has no tokens", field="prompt")
    check_token_ids(prompt_token_ids, model.vocab_size, "prompt")
    sampling = request.sampling
    check_token_ids(sampling.logit_bias, model.vocab_size, "sampling.logit_bias")
    check_token_ids(sampling.allowed_token_ids, model.vocab_size, "sampling.allowed_token_ids")
    for word in sampling.bad_words:
        check_token_ids(word, model.vocab_size, "sampling.bad_words")
    banned = {word[0] for word in sampling.bad_words if len(word) == 1}
    if sampling.allowed_token_ids and banned.issuperset(sampling.allowed_token_ids):
        raise InvalidField("all of allowed_token_ids are bad words", field="sampling.allowed_token_ids")
    if any(adapter.id == model.name for adapter in request.adapters):
        raise InvalidField(f"{model.name!r} is the base: leave adapters empty to use it", field="adapters.id")
    stopping, longest = request.stopping, len(prompt_token_ids)
    if isinstance(sampling.search, Guidance) and sampling.search.negative is not None:
        check_token_ids(sampling.search.negative, model.vocab_size, "guidance")
        longest = max(longest, len(sampling.search.negative))
    max_new_tokens = new_tokens(longest, stopping.max_new_tokens, model.context_length)
    if stopping.min_new_tokens > max_new_tokens:
        raise InvalidField(
            f"min_new_tokens {stopping.min_new_tokens} is more than the {max_new_tokens} that may be generated",
            field="stopping.min_new_tokens",
        )
    sampling, logprobs = request.sampling, request.response.logprobs
    if sampling.dola is not None:
        sampling = msgspec.structs.replace(sampling, dola=with_layers(sampling.dola, model))
    if request.best_of is not None:
        sampling = msgspec.structs.replace(sampling, n=request.best_of.candidates)
        logprobs = logprobs or 0
    return Generate(
        request_id=wire_id,
        prompt_token_ids=list(prompt_token_ids),
        sampling=sampling,
        stopping=StoppingParams(
            max_new_tokens=max_new_tokens,
            min_new_tokens=stopping.min_new_tokens,
            stop_token_ids=stopping.stop_token_ids,
            ignore_eos=stopping.ignore_eos,
            time_limit=stopping.time_limit,
        ),
        adapters=request.adapters,
        logprobs=logprobs,
        entropy=request.response.entropy,
        prompt_logprobs_from=1 if request.response.prompt_logprobs and len(prompt_token_ids) > 1 else None,
        priority=request.priority,
        cache_salt=request.cache_salt,
        arrival=request.arrival,
        deadline=request.deadline,
    )
