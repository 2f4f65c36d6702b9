"""Domain → wire: events, adapters and the server's own numbers become protobuf answers here."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field

from google.protobuf.duration_pb2 import Duration

from lorry.server.engine import messages
from lorry.server.frontend import request as domain
from lorry.server.frontend.interface import AdapterChange, Load
from lorry.server.params import TokenLogprobs
from lorry.v1 import adapter_pb2, control_pb2, generation_pb2


def duration(seconds: float) -> Duration:
    """Seconds from 0 on, rounded to nanoseconds."""
    whole, nanos = divmod(round(max(seconds, 0.0) * 1e9), 1_000_000_000)
    return Duration(seconds=whole, nanos=nanos)


def adapter_refs(refs: Iterable[messages.AdapterRef]) -> list[generation_pb2.AdapterRef]:
    return [generation_pb2.AdapterRef(id=ref.id, weight=ref.weight, revision=ref.revision or "") for ref in refs]


def logprobs(entries: Iterable[TokenLogprobs]) -> list[generation_pb2.TokenLogprobs]:
    return [
        generation_pb2.TokenLogprobs(
            token_id=entry.token_id,
            logprob=entry.logprob,
            rank=entry.rank,
            top=[generation_pb2.TokenLogprob(token_id=rival.token_id, logprob=rival.logprob) for rival in entry.top],
            entropy=entry.entropy,
        )
        for entry in entries
    ]


def usage(value: domain.Usage) -> generation_pb2.Usage:
    return generation_pb2.Usage(
        prompt_tokens=value.prompt_tokens,
        cached_tokens=value.cached_tokens,
        completion_tokens=value.completion_tokens,
    )


def timings(value: messages.Timings) -> generation_pb2.Timings:
    return generation_pb2.Timings(
        queue=duration(value.queue), prefill=duration(value.prefill), decode=duration(value.decode)
    )


def event(value: domain.Event) -> generation_pb2.GenerateStreamResponse:
    """One event of a stream."""
    match value:
        case domain.Started():
            started = generation_pb2.Started(
                request_id=value.request_id,
                prompt_tokens=value.prompt_tokens,
                cached_tokens=value.cached_tokens,
                adapters=adapter_refs(value.adapters),
            )
            return generation_pb2.GenerateStreamResponse(started=started)
        case domain.PromptLogprobs():
            prompt_logprobs = generation_pb2.PromptLogprobs(logprobs=logprobs(value.logprobs))
            return generation_pb2.GenerateStreamResponse(prompt_logprobs=prompt_logprobs)
        case domain.Delta():
            delta = generation_pb2.Delta(
                index=value.index,
                text=value.text,
                token_ids=value.token_ids,
                logprobs=logprobs(value.logprobs or ()),
            )
            return generation_pb2.GenerateStreamResponse(delta=delta)
        case domain.Finished():
            finished = generation_pb2.Finished(
                index=value.index,
                reason=generation_pb2.FinishReason.Name(value.reason),
                stop=value.stop,
                usage=usage(value.usage),
                timings=timings(value.timings),
                score=value.score,
            )
            return generation_pb2.GenerateStreamResponse(finished=finished)


@dataclass
class _Sequence:
    """What one sequence has gained so far."""

    pieces: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finished: domain.Finished | None = None


async def collect(events: AsyncIterator[domain.Event]) -> generation_pb2.GenerateResponse:
    """The whole answer of a request, from all its events."""
    response = generation_pb2.GenerateResponse()
    sequences: dict[int, _Sequence] = {}
    async for value in events:
        match value:
            case domain.Started():
                response.request_id = value.request_id
                response.usage.prompt_tokens = value.prompt_tokens
                response.usage.cached_tokens = value.cached_tokens
                response.adapters.extend(adapter_refs(value.adapters))
            case domain.PromptLogprobs():
                response.prompt_logprobs.extend(logprobs(value.logprobs))
            case domain.Delta():
                sequence = sequences.setdefault(value.index, _Sequence())
                sequence.pieces.append(value.text)
                sequence.token_ids.extend(value.token_ids)
                sequence.logprobs.extend(value.logprobs or ())
            case domain.Finished():
                sequences.setdefault(value.index, _Sequence()).finished = value
                response.usage.completion_tokens += value.usage.completion_tokens
                response.timings.CopyFrom(timings(value.timings))
    for index, sequence in sorted(sequences.items()):
        assert sequence.finished is not None, f"events ended before sequence {index} did"
        response.completions.append(
            generation_pb2.Completion(
                index=index,
                text="".join(sequence.pieces),
                token_ids=sequence.token_ids,
                logprobs=logprobs(sequence.logprobs),
                reason=generation_pb2.FinishReason.Name(sequence.finished.reason),
                stop=sequence.finished.stop,
                score=sequence.finished.score,
            )
        )
    return response


def adapter(info: messages.AdapterInfo) -> adapter_pb2.Adapter:
    return adapter_pb2.Adapter(
        id=info.id,
        revision=info.revision,
        rank=info.rank,
        target_modules=info.target_modules,
        state=adapter_pb2.AdapterState.Name(info.state),
        pinned=info.pinned,
        bytes=info.bytes,
        in_flight=info.in_flight,
        methods=info.methods,
        error=info.error,
    )


def adapter_change(change: AdapterChange) -> adapter_pb2.WatchAdaptersResponse:
    return adapter_pb2.WatchAdaptersResponse(
        type=adapter_pb2.AdapterEventType.Name(change.kind), adapter=adapter(change.adapter)
    )


def model_info(info: messages.ModelInfo) -> control_pb2.GetModelInfoResponse:
    return control_pb2.GetModelInfoResponse(
        name=info.name,
        architecture=info.architecture,
        parameters=info.parameters,
        layers=info.layers,
        hidden_size=info.hidden_size,
        vocab_size=info.vocab_size,
        context_length=info.context_length,
        eos_token_ids=info.eos_token_ids,
        dtype=info.dtype,
        kv_dtype=info.kv_dtype,
        adapter_dtype=info.adapter_dtype,
        device=info.device,
        bits_per_linear_weight=info.bits_per_linear_weight,
        weight_bytes=info.weight_bytes,
        kv_blocks=info.kv_blocks,
        block_size=info.block_size,
        adapter_pages=info.adapter_pages,
        kernels=info.kernels,
        base_fingerprint=info.base_fingerprint,
        draft_model=info.draft_model,
    )


def load(value: Load) -> control_pb2.GetLoadResponse:
    return control_pb2.GetLoadResponse(
        running=value.running,
        waiting=value.waiting,
        max_running=value.max_running,
        max_waiting=value.max_waiting,
        kv_blocks_used=value.kv_blocks_used,
        kv_blocks_total=value.kv_blocks_total,
        adapter_pages_used=value.adapter_pages_used,
        adapter_pages_total=value.adapter_pages_total,
        adapters_loaded=value.adapters_loaded,
    )
