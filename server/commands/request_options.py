"""Options that shape a generation request, and the spec that they make."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorry.server.commands import values
from lorry.server.config import SpeculationChoice

if TYPE_CHECKING:
    from lorry.v1 import generation_pb2

_SAMPLING, _SEARCH, _STRUCTURE = "Sampling", "Search", "Structured output"
_STOPPING, _ANSWER, _SPEED = "Stopping", "Answer", "Speed"

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
    float | None,
    _option("--typical-p", panel=_SAMPLING, help="Keep the tokens of most usual surprise up to this probability."),
]
EpsilonCutoff = Annotated[
    float | None, _option("--epsilon-cutoff", panel=_SAMPLING, help="Keep tokens of at least this probability.")
]
EtaCutoff = Annotated[
    float | None,
    _option("--eta-cutoff", panel=_SAMPLING, help="The same, but less where the distribution is flat."),
]
TopNSigma = Annotated[
    float | None,
    _option("--top-n-sigma", panel=_SAMPLING, help="Keep tokens so many standard deviations below the top logit."),
]
MirostatOption = Annotated[
    str | None,
    _option(
        "--mirostat",
        panel=_SAMPLING,
        metavar="TAU[,ETA]",
        help="Mirostat 2.0: bits of surprise a token, and how fast it gets there (0.1).",
    ),
]
DryOption = Annotated[
    str | None,
    _option(
        "--dry",
        panel=_SAMPLING,
        metavar="MULTIPLIER[,BASE[,LENGTH[,RANGE]]]",
        help="DRY: penalize what lengthens a repetition; 0.8,1.75,2,0 is usual.",
    ),
]
DryBreakers = Annotated[
    list[str] | None,
    _option("--dry-breaker", panel=_SAMPLING, metavar="TEXT", help="No repetition reaches over it; repeat for more."),
]
NoRepeatNgramSize = Annotated[
    int | None,
    _option("--no-repeat-ngram-size", panel=_SAMPLING, help="No so many tokens in a row come twice."),
]
BadWords = Annotated[
    list[str] | None,
    _option("--bad-word", panel=_SAMPLING, metavar="TEXT", help="Text that must not come; repeat for more."),
]
BadWordIds = Annotated[
    list[str] | None,
    _option("--bad-word-ids", panel=_SAMPLING, metavar="ID,ID,…", help="The same by token ids; repeat for more."),
]
AllowedTokenIds = Annotated[
    list[int] | None,
    _option("--allowed-token-id", panel=_SAMPLING, metavar="ID", help="Only such tokens come; repeat for more."),
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
BeamWidth = Annotated[
    int | None, _option("--beam-width", panel=_SEARCH, help="Beam search: how many partial answers are kept, 2 to 16.")
]
LengthPenalty = Annotated[
    float | None,
    _option("--length-penalty", panel=_SEARCH, help="Exponent of the length that a beam's score is divided by."),
]
EarlyStopping = Annotated[
    str | None,
    _option(
        "--early-stopping", panel=_SEARCH, metavar="heuristic|first|never", help="When a beam search ends; see docs."
    ),
]
BeamGroups = Annotated[
    int | None, _option("--beam-groups", panel=_SEARCH, help="Diverse beam search: groups of beams.")
]
DiversityPenalty = Annotated[
    float | None,
    _option("--diversity-penalty", panel=_SEARCH, help="What a token costs for each beam of an earlier group."),
]
ContrastiveTopK = Annotated[
    int | None, _option("--contrastive-top-k", panel=_SEARCH, help="Contrastive search: tokens weighed, 2 to 64.")
]
PenaltyAlpha = Annotated[
    float | None,
    _option("--penalty-alpha", panel=_SEARCH, help="Contrastive search: weight of the similarity, 0 to 1."),
]
Dola = Annotated[
    str | None,
    _option("--dola", panel=_SEARCH, metavar="low|high|LAYERS", help="DoLa: layers to contrast with, such as 0,2,4."),
]
BestOf = Annotated[
    int | None, _option("--best-of", panel=_SEARCH, help="Sample this many answers and keep the --n most likely ones.")
]
BestOfBy = Annotated[
    str | None, _option("--best-of-by", panel=_SEARCH, metavar="mean|sum", help="Of their log-probabilities.")
]
GuidanceScale = Annotated[
    float | None,
    _option("--guidance-scale", panel=_SEARCH, help="Guidance: how far from what is negative, 0 to 20; 1 is off."),
]
NegativePrompt = Annotated[
    str | None,
    _option("--negative-prompt", panel=_SEARCH, metavar="TEXT", help="Guidance: a prompt in the place of the prompt."),
]
GuideFromBase = Annotated[
    bool | None, _option("--guide-from-base", panel=_SEARCH, help="Guidance: the same prompt without the adapters.")
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
Entropy = Annotated[
    bool, _option("--entropy", panel=_ANSWER, help="The distribution's entropy with each log-probability.")
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
Speculation = Annotated[
    SpeculationChoice | None,
    _option(
        "--speculation",
        panel=_SPEED,
        help="What proposes tokens; the answer is the same. Unset: the server's default.",
    ),
]
DraftTokens = Annotated[
    int | None, _option("--draft-tokens", panel=_SPEED, help="Most tokens proposed at once, to 32.")
]
Adaptive = Annotated[
    bool | None,
    _option("--adaptive/--no-adaptive", panel=_SPEED, help="Whether fewer are proposed while more do not pay."),
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
    _set_mirostat(message.sampling, options.pop("mirostat", None))
    _set_dry(message.sampling, options.pop("dry", None), options.pop("dry_breakers", None) or [])
    for text in options.pop("bad_words", None) or []:
        message.sampling.bad_words.add(text=text)
    for text in options.pop("bad_word_ids", None) or []:
        message.sampling.bad_words.add().token_ids.ids.extend(values.numbers(text, int, "--bad-word-ids"))
    if (limit := options.pop("time_limit", None)) is not None:
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
        try:
            if isinstance(value, list):
                getattr(part, name).extend(value)
            else:
                setattr(part, name, value)
        except (ValueError, TypeError):
            option = "--" + name.replace("_", "-")
            raise typer.BadParameter(f"{value} does not fit {option}") from None
    return message


def _set_dola(message: generation_pb2.GenerationSpec, text: str | None) -> None:
    from lorry.v1 import generation_pb2

    if text == "low":
        message.dola.bucket = generation_pb2.LAYER_BUCKET_LOW
    elif text == "high":
        message.dola.bucket = generation_pb2.LAYER_BUCKET_HIGH
    elif text is not None:
        try:
            message.dola.layers.extend(values.numbers(text, int, "--dola"))
        except ValueError:
            raise typer.BadParameter(f"{text} does not fit --dola") from None


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
        whole = message.DESCRIPTOR.fields_by_name[name].type == message.DESCRIPTOR.fields_by_name[name].TYPE_UINT32
        try:
            if whole and value != int(value):
                raise ValueError
            setattr(message, name, int(value) if whole else value)
        except (ValueError, OverflowError):
            raise typer.BadParameter(f"{value:g} does not fit {name} of {option}") from None


def _set_strategy(message: generation_pb2.GenerationSpec, options: dict[str, Any]) -> None:
    for option, value in options.items():
        if value is None:
            continue
        strategy, name = _OF_STRATEGIES[option]
        if message.WhichOneof("strategy") not in (None, strategy):
            raise typer.BadParameter("beam search, contrastive search, guidance and --best-of exclude each other")
        part = getattr(message, strategy)
        try:
            if (enum := part.DESCRIPTOR.fields_by_name[name].enum_type) is not None:
                names = {each.rsplit("_", 1)[1].lower(): number for each, number in enum_values(enum) if number}
                if value not in names:
                    raise ValueError(value)
                value = names[value]
            setattr(part, name, value)
        except (ValueError, TypeError):
            raise typer.BadParameter(f"{value} does not fit --{option.replace('_', '-')}") from None


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
    try:
        wanted = generation_pb2.Speculation(proposer=name, max_draft_tokens=most, adaptive=adaptive)
    except ValueError:
        raise typer.BadParameter(f"{most} does not fit --draft-tokens") from None
    if wanted.ListFields():
        message.speculation.CopyFrom(wanted)
