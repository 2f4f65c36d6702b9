"""Options that shape a generation request; `request_spec.py` makes the request of them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lorry.server.config import SpeculationChoice

_SAMPLING, _SEARCH, _STRUCTURE = "Sampling", "Search", "Structured output"
_STOPPING, _ANSWER, _SPEED = "Stopping", "Answer", "Speed"


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
