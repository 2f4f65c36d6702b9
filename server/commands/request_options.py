"""Options that shape a generation request, and the spec that they make."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorry.server.commands import values

if TYPE_CHECKING:
    from lorry.v1 import generation_pb2

_SAMPLING, _STOPPING, _ANSWER, _STRUCTURE = "Sampling", "Stopping", "Answer", "Structured output"


def _option(*names: str, panel: str, help: str, **rest: Any) -> Any:
    return typer.Option(*names, rich_help_panel=panel, help=help, show_default=False, **rest)


Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        "-a",
        metavar="ID[=WEIGHT]",
        show_default=False,
        help="An adapter to lay over the base, with its weight (1 unless given); repeat for a mix, at most 8.",
    ),
]
Temperature = Annotated[
    float | None,
    _option("--temperature", "-t", panel=_SAMPLING, help="Divides the logits; 0 is greedy. Unset: 1."),
]
TopP = Annotated[
    float | None,
    _option("--top-p", panel=_SAMPLING, help="Keep the most likely tokens up to this probability. Unset: 1."),
]
TopK = Annotated[
    int | None, _option("--top-k", panel=_SAMPLING, help="Keep this many most likely tokens; 0 keeps all.")
]
MinP = Annotated[
    float | None,
    _option("--min-p", panel=_SAMPLING, help="Keep tokens at least this many times as likely as the top one."),
]
TypicalP = Annotated[
    float | None, _option("--typical-p", panel=_SAMPLING, help="Locally typical sampling; not served yet.")
]
Seed = Annotated[
    int | None,
    _option("--seed", panel=_SAMPLING, help="Same seed, prompt and adapters: same tokens. Unset: drawn."),
]
RepetitionPenalty = Annotated[
    float | None,
    _option("--repetition-penalty", panel=_SAMPLING, help="Above 1: tokens seen before become less likely."),
]
PresencePenalty = Annotated[
    float | None,
    _option("--presence-penalty", panel=_SAMPLING, help="Taken from the logits of tokens in the answer; -2 to 2."),
]
FrequencyPenalty = Annotated[
    float | None,
    _option("--frequency-penalty", panel=_SAMPLING, help="The same for each time that the token is there."),
]
LogitBias = Annotated[
    list[str] | None,
    _option(
        "--logit-bias",
        panel=_SAMPLING,
        metavar="TOKEN_ID=BIAS",
        help="Added to the logits of one token, -100 to 100; repeat for more.",
    ),
]
Number = Annotated[int | None, _option("--n", "-n", panel=_SAMPLING, help="How many answers. Unset: 1.")]
MaxNewTokens = Annotated[
    int | None,
    _option("--max-new-tokens", "-m", panel=_STOPPING, help="Most tokens. Unset: what the context holds."),
]
MinNewTokens = Annotated[
    int | None, _option("--min-new-tokens", panel=_STOPPING, help="Fewest tokens before the answer may end.")
]
Stop = Annotated[
    list[str] | None,
    _option("--stop", panel=_STOPPING, metavar="TEXT", help="End where this text appears; repeat for more."),
]
StopTokenIds = Annotated[
    list[int] | None,
    _option("--stop-token-id", panel=_STOPPING, metavar="ID", help="End at this token; repeat for more."),
]
IgnoreEos = Annotated[
    bool, _option("--ignore-eos", panel=_STOPPING, help="Go on past the model's end-of-sequence token.")
]
TimeLimit = Annotated[
    float | None,
    _option("--time-limit", panel=_STOPPING, metavar="SECONDS", help="End with what is there after this time."),
]
Logprobs = Annotated[
    int | None,
    _option("--logprobs", panel=_ANSWER, help="Log-probabilities, and of this many rivals; see --json."),
]
PromptLogprobs = Annotated[
    bool, _option("--prompt-logprobs", panel=_ANSWER, help="Log-probabilities of the prompt's tokens too.")
]
IncludePrompt = Annotated[bool, _option("--include-prompt", panel=_ANSWER, help="Begin the text with the prompt.")]
IncludeStop = Annotated[
    bool, _option("--include-stop", panel=_ANSWER, help="End the text with the stop text that ended it.")
]
JsonSchema = Annotated[
    str | None,
    _option("--json-schema", panel=_STRUCTURE, metavar="FILE|JSON", help="The answer is JSON of this schema."),
]
JsonObject = Annotated[bool, _option("--json-object", panel=_STRUCTURE, help="The answer is a JSON object.")]
Regex = Annotated[
    str | None, _option("--regex", panel=_STRUCTURE, help="The answer matches this regular expression as a whole.")
]
Choice = Annotated[
    list[str] | None,
    _option("--choice", panel=_STRUCTURE, metavar="TEXT", help="The answer is one of these; repeat for each."),
]
Grammar = Annotated[
    str | None,
    _option("--grammar", panel=_STRUCTURE, metavar="FILE|LARK", help="The answer is a text of this grammar."),
]
SkipForced = Annotated[
    bool,
    _option("--skip-forced", panel=_STRUCTURE, help="Append at once what the structure leaves no choice about."),
]


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
        message.sampling.logit_bias.update(dict(values.biased_token(text) for text in biases))
    if (limit := options.pop("time_limit", None)) is not None:
        message.stopping.time_limit.FromNanoseconds(round(limit * 1e9))
    _set_structure(message, options)
    parts = (message, message.sampling, message.stopping, message.response)
    for name, value in options.items():
        if value is None or value == []:
            continue
        part = next(part for part in parts if name in part.DESCRIPTOR.fields_by_name)
        try:
            if isinstance(value, list):
                getattr(part, name).extend(value)
            else:
                setattr(part, name, value)
        except (ValueError, TypeError):
            option = "--" + name.replace("_", "-")
            raise typer.BadParameter(f"{value} does not fit {option}") from None
    return message


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
