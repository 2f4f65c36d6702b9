"""Drive a server over gRPC and time every token: closed loop of N streams, or Poisson arrivals.

time to first token   from the call to the first delta that holds a token
inter-token latency   from one delta to the next; a delta of k tokens counts as k gaps of 1/k of it
tokens per second     output tokens of all requests / from the first call to the last token
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import grpc
import numpy as np
from workload import Workload, adapter_name

from lorry.v1 import generation_pb2 as pb
from lorry.v1.generation_pb2_grpc import GenerationServiceStub

PERCENTILES = (50, 95, 99)
Percentiles = dict[str, float]  # of "p50" and so on


@dataclass
class RequestTimes:
    """Moments of one request, in seconds of the monotonic clock."""

    sent: float
    deltas: list[tuple[float, int]] = field(default_factory=list)  # when, how many tokens
    token_ids: list[int] = field(default_factory=list)
    finished: pb.FinishReason | None = None

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.deltas)

    @property
    def time_to_first_token(self) -> float:
        return self.deltas[0][0] - self.sent

    def gaps(self) -> list[float]:
        """One inter-token latency for each token after the first delta."""
        found: list[float] = []
        for (before, _), (now, count) in zip(self.deltas, self.deltas[1:], strict=False):
            found += [(now - before) / count] * count
        return found


@dataclass(frozen=True)
class Report:
    """What one run showed; latencies in milliseconds by percentile."""

    requests: int
    output_tokens: int
    seconds: float
    output_tokens_per_second: float
    time_to_first_token_ms: Percentiles
    inter_token_latency_ms: Percentiles
    request_latency_ms: Percentiles


def summarize(times: Sequence[RequestTimes]) -> Report:
    """Percentiles over the requests and over all their tokens."""
    start = min(t.sent for t in times)
    end = max(t.deltas[-1][0] for t in times)
    tokens = sum(t.tokens for t in times)
    return Report(
        requests=len(times),
        output_tokens=tokens,
        seconds=end - start,
        output_tokens_per_second=tokens / (end - start),
        time_to_first_token_ms=percentiles([t.time_to_first_token for t in times]),
        inter_token_latency_ms=percentiles([gap for t in times for gap in t.gaps()]),
        request_latency_ms=percentiles([t.deltas[-1][0] - t.sent for t in times]),
    )


def percentiles(seconds: Sequence[float]) -> Percentiles:
    """In milliseconds; empty for nothing."""
    if not seconds:
        return {}
    values = np.percentile(np.array(seconds) * 1e3, PERCENTILES)
    return {f"p{p}": round(float(v), 3) for p, v in zip(PERCENTILES, values, strict=True)}


def stream_request(workload: Workload, prompt: Sequence[int], adapter: int | None) -> pb.GenerateStreamRequest:
    """Greedy, of exactly `new_tokens`."""
    return pb.GenerateStreamRequest(
        spec=pb.GenerationSpec(
            token_ids=pb.TokenIds(ids=prompt),
            adapters=[] if adapter is None else [pb.AdapterRef(id=adapter_name(adapter))],
            sampling=pb.SamplingParams(temperature=0.0),
            stopping=pb.StoppingCriteria(max_new_tokens=workload.new_tokens, ignore_eos=True),
        )
    )


async def drive(
    target: str, workload: Workload, vocab_size: int, on_finish: Callable[[], None] = lambda: None
) -> list[RequestTimes]:
    """Run the whole workload against `target`; raises RuntimeError when a stream is not as long as asked."""
    requests = [
        stream_request(workload, prompt, adapter)
        for prompt, adapter in zip(workload.prompts(vocab_size), workload.adapter_of(), strict=True)
    ]
    free = asyncio.Semaphore(workload.streams)
    async with grpc.aio.insecure_channel(target) as channel:
        await channel.channel_ready()
        stub = GenerationServiceStub(channel)
        start = time.perf_counter()

        async def one(request: pb.GenerateStreamRequest, arrival: float) -> RequestTimes:
            await asyncio.sleep(max(0.0, start + arrival - time.perf_counter()))
            async with free:
                times = RequestTimes(sent=time.perf_counter() if workload.rate is None else start + arrival)
                async for event in stub.GenerateStream(request):
                    if event.HasField("delta") and event.delta.token_ids:
                        times.deltas.append((time.perf_counter(), len(event.delta.token_ids)))
                        times.token_ids.extend(event.delta.token_ids)
                    elif event.HasField("finished"):
                        times.finished = event.finished.reason
            if times.finished != pb.FINISH_REASON_LENGTH or times.tokens != workload.new_tokens:
                raise RuntimeError(f"a stream ended after {times.tokens} tokens with reason {times.finished}")
            on_finish()
            return times

        arrivals = workload.arrivals()
        return await asyncio.gather(*(one(r, a) for r, a in zip(requests, arrivals, strict=True)))
