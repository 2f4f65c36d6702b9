"""`lorry generate`: one request to a running server."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorry.server.commands import request_options as options
from lorry.server.commands import request_spec, values
from lorry.server.commands.client import DEFAULT_SERVER, Server, connect
from lorry.server.commands.output import fail

if TYPE_CHECKING:
    from lorry.v1 import generation_pb2


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="The text to continue; - or nothing reads it from stdin.")
    ] = None,
    server: Server = DEFAULT_SERVER,
    adapter: options.Adapters = None,
    chat: Annotated[
        bool, typer.Option("--chat", "-c", help="The prompt is a user's message; the model's template is used.")
    ] = False,
    system: Annotated[
        str | None, typer.Option(help="A system message before it; implies --chat.", show_default=False)
    ] = None,
    token_ids: Annotated[
        bool, typer.Option("--token-ids", help="The prompt is token ids, separated by spaces or commas.")
    ] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Show the text as it is decoded.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the answer as JSON; with --stream, one event a line.")
    ] = False,
    timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", show_default=False, help="Give up, and let the server give up."),
    ] = None,
    request_id: Annotated[str | None, typer.Option(show_default=False, help="Names the request.")] = None,
    priority: Annotated[int | None, typer.Option(show_default=False, help="Higher goes first.")] = None,
    cache_salt: Annotated[
        str | None, typer.Option(show_default=False, help="Shares prefixes with the same salt only.")
    ] = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    typical_p: options.TypicalP = None,
    epsilon_cutoff: options.EpsilonCutoff = None,
    eta_cutoff: options.EtaCutoff = None,
    top_n_sigma: options.TopNSigma = None,
    mirostat: options.MirostatOption = None,
    seed: options.Seed = None,
    repetition_penalty: options.RepetitionPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    dry: options.DryOption = None,
    dry_breakers: options.DryBreakers = None,
    no_repeat_ngram_size: options.NoRepeatNgramSize = None,
    bad_words: options.BadWords = None,
    bad_word_ids: options.BadWordIds = None,
    allowed_token_ids: options.AllowedTokenIds = None,
    logit_bias: options.LogitBias = None,
    n: options.Number = None,
    beam_width: options.BeamWidth = None,
    length_penalty: options.LengthPenalty = None,
    early_stopping: options.EarlyStopping = None,
    beam_groups: options.BeamGroups = None,
    diversity_penalty: options.DiversityPenalty = None,
    contrastive_top_k: options.ContrastiveTopK = None,
    penalty_alpha: options.PenaltyAlpha = None,
    guidance_scale: options.GuidanceScale = None,
    negative_prompt: options.NegativePrompt = None,
    guide_from_base: options.GuideFromBase = None,
    dola: options.Dola = None,
    best_of: options.BestOf = None,
    best_of_by: options.BestOfBy = None,
    max_new_tokens: options.MaxNewTokens = None,
    min_new_tokens: options.MinNewTokens = None,
    stop: options.Stop = None,
    stop_token_ids: options.StopTokenIds = None,
    ignore_eos: options.IgnoreEos = False,
    time_limit: options.TimeLimit = None,
    logprobs: options.Logprobs = None,
    prompt_logprobs: options.PromptLogprobs = False,
    entropy: options.Entropy = False,
    include_prompt: options.IncludePrompt = False,
    include_stop: options.IncludeStop = False,
    json_schema: options.JsonSchema = None,
    json_object: options.JsonObject = False,
    regex: options.Regex = None,
    choice: options.Choice = None,
    grammar: options.Grammar = None,
    skip_forced: options.SkipForced = False,
    speculation: options.Speculation = None,
    draft_tokens: options.DraftTokens = None,
    adaptive: options.Adaptive = None,
) -> None:
    """Ask a running server for an answer."""
    spec = request_spec.spec(
        adapter,
        request_id=request_id,
        priority=priority,
        cache_salt=cache_salt,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        typical_p=typical_p,
        epsilon_cutoff=epsilon_cutoff,
        eta_cutoff=eta_cutoff,
        top_n_sigma=top_n_sigma,
        mirostat=mirostat,
        seed=seed,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        dry=dry,
        dry_breakers=dry_breakers,
        no_repeat_ngram_size=no_repeat_ngram_size,
        bad_words=bad_words,
        bad_word_ids=bad_word_ids,
        allowed_token_ids=allowed_token_ids,
        logit_bias=logit_bias,
        n=n,
        beam_width=beam_width,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        beam_groups=beam_groups,
        diversity_penalty=diversity_penalty,
        contrastive_top_k=contrastive_top_k,
        penalty_alpha=penalty_alpha,
        guidance_scale=guidance_scale,
        guide_from_base=guide_from_base,
        dola=dola,
        best_of=best_of,
        best_of_by=best_of_by,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        stop=stop,
        stop_token_ids=stop_token_ids,
        ignore_eos=ignore_eos,
        time_limit=time_limit,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        entropy=entropy,
        include_prompt=include_prompt,
        include_stop=include_stop,
        json_schema=json_schema,
        json_object=json_object,
        regex=regex,
        choice=choice,
        grammar=grammar,
        skip_forced=skip_forced,
        speculation=speculation,
        draft_tokens=draft_tokens,
        adaptive=adaptive,
    )
    text = sys.stdin.read() if prompt in (None, "-") else str(prompt)
    _set_prompt(spec, text, chat or system is not None, system, token_ids)
    if negative_prompt is not None:
        if guidance_scale is None or guide_from_base:
            raise typer.BadParameter("--negative-prompt needs --guidance-scale, and excludes --guide-from-base")
        _set_prompt(spec.guidance, negative_prompt, chat or system is not None, system, token_ids, "--negative-prompt")
    if stream:
        _stream(server, spec, timeout, as_json)
    else:
        _whole(server, spec, timeout, as_json)


def _set_prompt(
    spec: generation_pb2.GenerationSpec | generation_pb2.Guidance,
    text: str,
    chat: bool,
    system: str | None,
    token_ids: bool,
    argument: str = "PROMPT",
) -> None:
    if chat and token_ids:
        raise typer.BadParameter("--token-ids and --chat exclude each other")
    if chat:
        if system is not None:
            spec.chat.messages.add(role="system", content=system)
        spec.chat.messages.add(role="user", content=text)
    elif token_ids:
        spec.token_ids.ids.extend(values.token_ids(text, argument))
    else:
        spec.text = text


def _whole(server: str, spec: generation_pb2.GenerationSpec, timeout: float | None, as_json: bool) -> None:
    from lorry.v1 import generation_pb2, generation_pb2_grpc

    with connect(server) as channel:
        stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)
        answer = stub.Generate(generation_pb2.GenerateRequest(spec=spec), timeout=timeout)
    if as_json:
        typer.echo(_json(answer, indent=2))
        return
    for completion in answer.completions:
        if len(answer.completions) > 1:
            score = f" score {completion.score:.4f}" if completion.HasField("score") else ""
            typer.secho(f"[{completion.index}]{score}", dim=True)
        typer.echo(completion.text)
    _summary(answer.usage, answer.timings, [completion.reason for completion in answer.completions])


def _stream(server: str, spec: generation_pb2.GenerationSpec, timeout: float | None, as_json: bool) -> None:
    from lorry.v1 import generation_pb2, generation_pb2_grpc

    if not as_json and spec.sampling.n > 1:
        raise fail("--stream shows one answer; with --n use --json or no --stream")
    with connect(server) as channel:
        stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)
        call = stub.GenerateStream(generation_pb2.GenerateStreamRequest(spec=spec), timeout=timeout)
        for event in call:
            if as_json:
                typer.echo(_json(event))
            elif event.HasField("delta"):
                typer.echo(event.delta.text, nl=False)
                sys.stdout.flush()
            elif event.HasField("finished"):
                typer.echo()
                _summary(event.finished.usage, event.finished.timings, [event.finished.reason])


def _json(message: Any, indent: int | None = None) -> str:
    from google.protobuf import json_format

    fields = json_format.MessageToDict(message, preserving_proto_field_name=True)
    return json.dumps(fields, ensure_ascii=False, indent=indent)


def _summary(
    usage: generation_pb2.Usage, timings: generation_pb2.Timings, reasons: list[generation_pb2.FinishReason]
) -> None:
    """One dim line on stderr: what it cost and why it ended."""
    from lorry.v1 import generation_pb2

    names = [generation_pb2.FinishReason.Name(reason) for reason in reasons]
    ended = ", ".join(name.removeprefix("FINISH_REASON_").lower() for name in names)
    seconds = timings.decode.ToNanoseconds() / 1e9
    speed = f", {usage.completion_tokens / seconds:.1f} tokens/s" if seconds > 0 else ""
    typer.secho(
        f"{usage.prompt_tokens} prompt tokens, {usage.completion_tokens} new ones{speed}, ended: {ended}",
        dim=True,
        err=True,
    )
