"""The generation request that the options of a command make."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from lorry.server.commands import values

if TYPE_CHECKING:
    from lorry.v1 import generation_pb2

UINT32 = f"0 to {2**32 - 1}"  # what a field of the spec holds; the server says what it accepts

_OF_STRATEGIES = {  # option: strategy, field
    "beam_width": ("beam", "width"),
    "length_penalty": ("beam", "length_penalty"),
    "early_stopping": ("beam", "early_stopping"),
    "beam_groups": ("beam", "groups"),
    "diversity_penalty": ("beam", "diversity_penalty"),
    "contrastive_top_k": ("contrastive", "top_k"),
    "penalty_alpha": ("contrastive", "penalty_alpha"),
    "guidance_scale": ("guidance", "scale"),
    "guide_from_base": ("guidance", "base"),
    "best_of": ("best_of", "candidates"),
    "best_of_by": ("best_of", "ranking"),
}


def adapter_refs(adapters: list[str] | None) -> list[generation_pb2.AdapterRef]:
    """References from `ID` and `ID=WEIGHT`."""
    from lorry.v1 import generation_pb2

    pairs = [values.adapter(text) for text in adapters or ()]
    return [generation_pb2.AdapterRef(id=id, weight=weight) for id, weight in pairs]


def spec(adapters: list[str] | None, **options: Any) -> generation_pb2.GenerationSpec:
    """A spec without a prompt. `options`: fields of the spec and its messages by name; None leaves one unset.

    Raises typer.BadParameter for a value that does not fit the field's type.
    """
    from lorry.v1 import generation_pb2

    message = generation_pb2.GenerationSpec(adapters=adapter_refs(adapters))
    if biases := options.pop("logit_bias", None):
        with _fits(" ".join(biases), "--logit-bias", f"token ids of {UINT32}"):
            message.sampling.logit_bias.update(dict(values.biased_token(text) for text in biases))
    _set_mirostat(message.sampling, options.pop("mirostat", None))
    _set_dry(message.sampling, options.pop("dry", None), options.pop("dry_breakers", None) or [])
    for text in options.pop("bad_words", None) or []:
        message.sampling.bad_words.add(text=text)
    for text in options.pop("bad_word_ids", None) or []:
        with _fits(text, "--bad-word-ids", f"token ids of {UINT32}"):
            message.sampling.bad_words.add().token_ids.ids.extend(values.numbers(text, int, "--bad-word-ids"))
    if (limit := options.pop("time_limit", None)) is not None:
        with _fits(limit, "--time-limit", "above 0 to 86400 seconds"):
            message.stopping.time_limit.FromNanoseconds(round(limit * 1e9))
    _set_strategy(message, {name: options.pop(name, None) for name in _OF_STRATEGIES})
    _set_dola(message, options.pop("dola", None))
    _set_structure(message, options)
    _set_speculation(message, *(options.pop(name, None) for name in ("speculation", "draft_tokens", "adaptive")))
    parts = (message, message.sampling, message.stopping, message.response)
    for name, value in options.items():
        if value is None or value == []:
            continue
        part = next(part for part in parts if name in part.DESCRIPTOR.fields_by_name)
        field, several = part.DESCRIPTOR.fields_by_name[name], isinstance(value, list)
        option = "--" + name.replace("_", "-")
        with _fits(value, option.removesuffix("s") if several else option, _held(field)):
            if several:
                getattr(part, name).extend(value)
            else:
                setattr(part, name, value)
    return message


@contextmanager
def _fits(value: object, option: str, accepted: str) -> Iterator[None]:
    """Makes an error of the option of what protobuf says of a value that its field cannot hold."""
    try:
        yield
    except (ValueError, TypeError, OverflowError):
        raise typer.BadParameter(f"{value} does not fit {option}; accepted: {accepted}") from None


def _held(field: Any) -> str:
    """What a field can hold."""
    whole = {field.TYPE_UINT32: UINT32, field.TYPE_UINT64: f"0 to {2**64 - 1}", field.TYPE_INT32: f"±{2**31 - 1}"}
    if field.enum_type is not None:
        return " or ".join(_choices(field.enum_type))
    return f"whole numbers, {whole[field.type]}" if field.type in whole else "numbers"


def _set_dola(message: generation_pb2.GenerationSpec, text: str | None) -> None:
    from lorry.v1 import generation_pb2

    if text == "low":
        message.dola.bucket = generation_pb2.LAYER_BUCKET_LOW
    elif text == "high":
        message.dola.bucket = generation_pb2.LAYER_BUCKET_HIGH
    elif text is not None:
        with _fits(text, "--dola", f"low, high, or layers, {UINT32}, separated by commas"):
            message.dola.layers.extend(values.numbers(text, int, "--dola"))


def _set_mirostat(sampling: generation_pb2.SamplingParams, text: str | None) -> None:
    if text is not None:
        _set_in_order(sampling.mirostat, ("tau", "eta"), values.numbers(text, float, "--mirostat"), "--mirostat")


def _set_dry(sampling: generation_pb2.SamplingParams, text: str | None, breakers: list[str]) -> None:
    if text is None:
        if breakers:
            raise typer.BadParameter("--dry-breaker needs --dry")
        return
    names = ("multiplier", "base", "allowed_length", "range")
    _set_in_order(sampling.dry, names, values.numbers(text, float, "--dry"), "--dry")
    sampling.dry.sequence_breakers.extend(breakers)


def _set_in_order(message: Any, names: tuple[str, ...], numbers: list[float], option: str) -> None:
    """Set the first fields of a message."""
    if len(numbers) > len(names):
        raise typer.BadParameter(f"{option} takes {', '.join(names)}")
    for name, value in zip(names, numbers, strict=False):
        field = message.DESCRIPTOR.fields_by_name[name]
        with _fits(f"{value:g}", f"{name} of {option}", _held(field)):
            whole = field.type == field.TYPE_UINT32
            if whole and value != int(value):
                raise ValueError
            setattr(message, name, int(value) if whole else value)


def _set_strategy(message: generation_pb2.GenerationSpec, options: dict[str, Any]) -> None:
    for option, value in options.items():
        if value is None:
            continue
        strategy, name = _OF_STRATEGIES[option]
        if message.WhichOneof("strategy") not in (None, strategy):
            raise typer.BadParameter("beam search, contrastive search, guidance and --best-of exclude each other")
        part = getattr(message, strategy)
        field = part.DESCRIPTOR.fields_by_name[name]
        with _fits(value, "--" + option.replace("_", "-"), _held(field)):
            if field.enum_type is not None:
                value = _choices(field.enum_type).get(value, value)
            setattr(part, name, value)


def _choices(enum: Any) -> dict[str, int]:
    """What an option calls the values of an enum."""
    return {name.rsplit("_", 1)[1].lower(): number for name, number in enum_values(enum) if number}


def enum_values(enum: Any) -> list[tuple[str, int]]:
    """Names and numbers of a protobuf enum."""
    return [(value.name, value.number) for value in enum.values]


def _set_structure(message: generation_pb2.GenerationSpec, options: dict[str, Any]) -> None:
    """Take the options of structured output out of `options`."""
    found = {name: options.pop(name, None) for name in ("json_schema", "json_object", "regex", "choice", "grammar")}
    given = {name: value for name, value in found.items() if value}
    skip_forced = options.pop("skip_forced", False)
    if len(given) > 1:
        raise typer.BadParameter(f"--{' and --'.join(given)} exclude each other".replace("_", "-"))
    if skip_forced and not given:
        raise typer.BadParameter("--skip-forced needs --json-schema, --json-object, --regex, --choice or --grammar")
    for name, value in given.items():
        wanted = message.structured_output
        if name == "choice":
            wanted.choice.values.extend(value)
        else:
            setattr(wanted, name, values.file_or_text(value) if name in ("json_schema", "grammar") else value)
        wanted.skip_forced = skip_forced


def _set_speculation(
    message: generation_pb2.GenerationSpec, proposer: str | None, most: int | None, adaptive: bool | None
) -> None:
    from lorry.v1 import generation_pb2

    name = proposer and "SPECULATION_PROPOSER_" + proposer.upper().replace("-", "_")
    with _fits(most, "--draft-tokens", UINT32):
        wanted = generation_pb2.Speculation(proposer=name, max_draft_tokens=most, adaptive=adaptive)
    if wanted.ListFields():
        message.speculation.CopyFrom(wanted)
