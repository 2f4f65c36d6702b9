"""Wire → domain: how the next token is chosen. `convert.py` says how a field is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lorry.server.engine.messages import Dry, Mirostat, SamplingParams
from lorry.server.errors import InvalidField
from lorry.server.frontend.request import SamplingTexts, fresh_seed
from lorry.server.rpc import fields
from lorry.server.rpc.fields import refuse
from lorry.v1 import generation_pb2

PATH = "spec.sampling"
MAX_BIASED_TOKENS = 1024
MAX_SEQUENCES = 16
MAX_NGRAM = 1024
MAX_BAD_WORDS = 256
MAX_BAD_WORD_TOKENS = 64
MAX_BAD_WORD_LENGTH = 256
MAX_BREAKERS = 64
MAX_BREAKER_LENGTH = 64
CUTS = ("top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_n_sigma")
OFF = {"top_p": 1.0, "typical_p": 1.0}


def params(wire: generation_pb2.SamplingParams, vocab_size: int) -> SamplingParams:
    """SamplingParams of the wire → those of the engine, less what is text."""
    temperature = wire.temperature if wire.HasField("temperature") else 1.0
    if temperature != 0:
        fields.number(f"{PATH}.temperature", temperature, 0.001, 100, "0 (greedy), or 0.001 to 100")
    n = wire.n if wire.HasField("n") else 1
    fields.integer(f"{PATH}.n", n, 1, MAX_SEQUENCES)
    if n > 1 and temperature == 0:
        raise refuse(f"{PATH}.n", n, "1 with temperature 0: greedy sequences of one prompt are equal")
    repetition = wire.repetition_penalty if wire.HasField("repetition_penalty") else 1.0
    bad_words = _bad_words(wire.bad_words, vocab_size)
    return SamplingParams(
        temperature=temperature,
        top_k=fields.integer(f"{PATH}.top_k", wire.top_k, 0, vocab_size),
        top_p=_share("top_p", wire.top_p if wire.HasField("top_p") else 1.0),
        min_p=fields.number(f"{PATH}.min_p", wire.min_p, 0, 1),
        typical_p=_share("typical_p", wire.typical_p if wire.HasField("typical_p") else 1.0),
        epsilon_cutoff=_cutoff("epsilon_cutoff", wire.epsilon_cutoff),
        eta_cutoff=_cutoff("eta_cutoff", wire.eta_cutoff),
        top_n_sigma=fields.number(f"{PATH}.top_n_sigma", wire.top_n_sigma, 0, 100),
        mirostat=_mirostat(wire, temperature) if wire.HasField("mirostat") else None,
        repetition_penalty=fields.number(f"{PATH}.repetition_penalty", repetition, 0.01, 100),
        presence_penalty=fields.number(f"{PATH}.presence_penalty", wire.presence_penalty, -2, 2),
        frequency_penalty=fields.number(f"{PATH}.frequency_penalty", wire.frequency_penalty, -2, 2),
        logit_bias=_logit_bias(dict(wire.logit_bias), vocab_size),
        dry=_dry(wire.dry) if wire.HasField("dry") else None,
        no_repeat_ngram_size=fields.integer(f"{PATH}.no_repeat_ngram_size", wire.no_repeat_ngram_size, 0, MAX_NGRAM),
        bad_words=bad_words,
        allowed_token_ids=_allowed(wire.allowed_token_ids, bad_words, vocab_size),
        seed=wire.seed if wire.HasField("seed") else fresh_seed(),
        n=n,
    )


def texts(wire: generation_pb2.SamplingParams) -> SamplingTexts:
    """What of the parameters is text; call `params` first."""
    words = [
        (word.text, f"{PATH}.bad_words[{index}].text")
        for index, word in enumerate(wire.bad_words)
        if word.WhichOneof("word") == "text"
    ]
    return SamplingTexts(tuple(words), tuple(wire.dry.sequence_breakers))


def _share(name: str, value: float) -> float:
    if fields.number(f"{PATH}.{name}", value, 0, 1, "above 0, to 1") == 0:
        raise refuse(f"{PATH}.{name}", value, "above 0, to 1")
    return value


def _cutoff(name: str, value: float) -> float:
    if fields.number(f"{PATH}.{name}", value, 0, 1, "0 (off), or above it and below 1") == 1:
        raise refuse(f"{PATH}.{name}", value, "0 (off), or above it and below 1")
    return value


def _positive(path: str, value: float, high: float) -> float:
    if not math.isfinite(value) or not 0 < value <= high:
        raise refuse(path, value, f"above 0, to {high:g}")
    return value


def _mirostat(wire: generation_pb2.SamplingParams, temperature: float) -> Mirostat:
    path, settings = f"{PATH}.mirostat", wire.mirostat
    if temperature == 0:
        raise InvalidField(f"{path} is set with temperature 0; accepted: one of the two", field=path)
    for name in CUTS:
        off = OFF.get(name, 0)
        if wire.HasField(name) and getattr(wire, name) != off:
            raise refuse(f"{PATH}.{name}", getattr(wire, name), f"{off:g} (off) beside mirostat, which cuts by itself")
    return Mirostat(
        tau=_positive(f"{path}.tau", settings.tau if settings.HasField("tau") else 5.0, 20),
        eta=_positive(f"{path}.eta", settings.eta if settings.HasField("eta") else 0.1, 1),
    )


def _dry(wire: generation_pb2.Dry) -> Dry:
    path = f"{PATH}.dry"
    breakers = wire.sequence_breakers
    if len(breakers) > MAX_BREAKERS:
        raise refuse(f"{path}.sequence_breakers", list(breakers), f"at most {MAX_BREAKERS} texts")
    for index, text in enumerate(breakers):
        if not 1 <= len(text) <= MAX_BREAKER_LENGTH:
            raise refuse(f"{path}.sequence_breakers[{index}]", text, f"1 to {MAX_BREAKER_LENGTH} characters")
    fields.unique(f"{path}.sequence_breakers", breakers)
    allowed_length = wire.allowed_length if wire.HasField("allowed_length") else 2
    fields.integer(f"{path}.allowed_length", allowed_length, 1, 50)
    if 0 < wire.range <= allowed_length:
        raise refuse(f"{path}.range", wire.range, f"0 (all), or more than {allowed_length}, which is allowed_length")
    return Dry(
        multiplier=_positive(f"{path}.multiplier", wire.multiplier if wire.HasField("multiplier") else 0.8, 100),
        base=fields.number(f"{path}.base", wire.base if wire.HasField("base") else 1.75, 1, 4),
        allowed_length=allowed_length,
        range=wire.range,
    )


def _bad_words(words: Sequence[generation_pb2.BadWord], vocab_size: int) -> tuple[tuple[int, ...], ...]:
    path = f"{PATH}.bad_words"
    if len(words) > MAX_BAD_WORDS:
        raise InvalidField(f"{path} has {len(words)} entries; accepted: at most {MAX_BAD_WORDS}", field=path)
    found: list[tuple[int, ...]] = []
    for index, word in enumerate(words):
        where = f"{path}[{index}]"
        match word.WhichOneof("word"):
            case "text":
                if not 1 <= len(word.text) <= MAX_BAD_WORD_LENGTH:
                    raise refuse(f"{where}.text", word.text, f"1 to {MAX_BAD_WORD_LENGTH} characters")
            case "token_ids":
                ids = fields.tokens(f"{where}.token_ids.ids", word.token_ids.ids, vocab_size)
                if not 1 <= len(ids) <= MAX_BAD_WORD_TOKENS:
                    raise refuse(f"{where}.token_ids.ids", list(ids), f"1 to {MAX_BAD_WORD_TOKENS} token ids")
                found.append(ids)
            case _:
                raise InvalidField(f"{where} is empty; accepted: one of text, token_ids", field=where)
    seen: set[bytes] = set()
    for index, word in enumerate(words):
        key = word.SerializeToString(deterministic=True)
        if key in seen:
            raise InvalidField(f"{path}[{index}] is there already; accepted: no value twice", field=f"{path}[{index}]")
        seen.add(key)
    return tuple(found)


def _allowed(ids: Sequence[int], bad_words: tuple[tuple[int, ...], ...], vocab_size: int) -> tuple[int, ...]:
    path = f"{PATH}.allowed_token_ids"
    if len(ids) > vocab_size:
        raise InvalidField(f"{path} has {len(ids)} entries; accepted: at most {vocab_size}", field=path)
    allowed = fields.tokens(path, ids, vocab_size)
    fields.unique(path, allowed)
    if allowed and {word[0] for word in bad_words if len(word) == 1}.issuperset(allowed):
        raise InvalidField(f"{path} are bad_words, all of them; accepted: at least one that is none", field=path)
    return allowed


def _logit_bias(bias: dict[int, float], vocab_size: int) -> dict[int, float]:
    path = f"{PATH}.logit_bias"
    if len(bias) > MAX_BIASED_TOKENS:
        raise InvalidField(
            f"{path} has {len(bias)} entries; accepted: at most {MAX_BIASED_TOKENS}", field=path, value=len(bias)
        )
    for token, value in bias.items():
        if token >= vocab_size:
            raise refuse(f"{path}[{token}]", token, f"token ids 0 to {vocab_size - 1}")
        fields.number(f"{path}[{token}]", value, -100, 100)
    return bias
