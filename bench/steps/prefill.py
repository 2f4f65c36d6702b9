"""Prompts that nobody has computed before: tokens per second of one request alone, to its first token."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator

from gpu.measure import Figure, Wrong
from steps.session import Session
from steps.sizes import Mix

from lorry.server.engine.messages import AdapterRef


def prefill(session: Session) -> Iterator[Figure]:
    sizes, vocabulary = session.sizes, session.decoder.config.vocab_size
    draw = random.Random(1)
    linear = sum(projection.nf4_weights for projection in session.decoder.projections)
    for tokens in sizes.prefill:
        for mix in (Mix(0), Mix(1)):
            name, seconds = mix.adapter(0), list[float]()
            refs = () if name is None else (AdapterRef(name),)
            for _ in range(1 + sizes.rounds):
                request = session.request(draw.choices(range(2, vocabulary), k=tokens), 1, refs)
                session.engine.send(request)
                begin = time.perf_counter()
                answer = session.engine.answers[request.request_id]
                while not answer.completions and answer.error is None:
                    session.engine.step()
                seconds.append(time.perf_counter() - begin)
                session.generate([])  # the last step, of nothing
                started = session.taken([request])[0].started
                if started is None or started.cached_tokens:
                    raise Wrong(f"a prompt of {tokens} tokens was found in the cache")
            figure = Figure("prefill", str(mix), tokens, None, session.bytes_of(0, mix, 0), flops=2.0 * linear * tokens)
            if not session.stage.dry:
                figure.seconds = statistics.median(seconds[1:])  # the first one warms up
            yield figure
