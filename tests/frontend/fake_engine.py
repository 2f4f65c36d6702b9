"""A scripted engine that speaks the protocol: run as the engine's process by the supervisor's tests.

Its model's name is its script, words separated by commas: "fail" exits before Ready, "slow" sends Loading first,
"hang" never gets on, "once=PATH" fails unless PATH is absent (it creates it). A request's first prompt token says
what to do: 1 echo the prompt token by token and end, 2 go on until aborted, 3 die by SIGKILL, 4 never start, 5 fail
as an unknown adapter.
Every command goes to the log as one line "saw <repr>".
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from pathlib import Path

import msgspec
import zmq

from lorry.server.config import engine_config_from_json
from lorry.server.engine import messages as m

MODEL = m.ModelInfo(
    name="fake",
    architecture="FakeForCausalLM",
    parameters=1,
    layers=3,
    hidden_size=5,
    vocab_size=400,
    context_length=200,
    eos_token_ids=(1,),
    dtype="float32",
    kv_dtype="bfloat16",
    adapter_dtype="bfloat16",
    device="cpu",
    bits_per_linear_weight=4.127,
    weight_bytes=7,
    kv_blocks=11,
    block_size=16,
    adapter_pages=13,
    kernels="reference",
    max_weights_bytes=1000,
)
ECHO, FOREVER, DIE, STALL, REFUSE = 1, 2, 3, 4, 5


def main() -> None:
    parent = os.getppid()
    config = engine_config_from_json(sys.stdin.buffer.read())
    script = config.model.split(",")
    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.connect(sys.argv[sys.argv.index("--socket") + 1])
    send = lambda *batch: socket.send(msgspec.msgpack.encode(list(batch)))
    if "slow" in script:
        send(m.Loading("load", 1, 2))
        send(m.Loading("load", 2, 2))
    for word in script:
        if word.startswith("once="):
            mark = Path(word.removeprefix("once="))
            if mark.exists():
                sys.exit("ModelNotFound: the second start fails")
            mark.touch()
    if "hang" in script:
        print("hanging", file=sys.stderr, flush=True)
        time.sleep(60)
    if "fail" in script:
        print("ModelNotFound: there is no model 'fail'", file=sys.stderr)
        sys.exit(3)
    send(m.Ready(MODEL, os.getpid()), m.Stats(1, 2, 3, 11, 5, 13))
    decoder = msgspec.msgpack.Decoder(list[m.Command])
    forever: dict[str, itertools.count[int]] = {}
    adapters: dict[str, m.AdapterInfo] = {}
    while os.getppid() == parent:
        commands = decoder.decode(socket.recv()) if socket.poll(2) else []
        out: list[m.EngineMessage] = []
        for command in commands:
            print("saw", command, file=sys.stderr, flush=True)
            match command:
                case m.Generate():
                    generate(command, out, forever)
                case m.Abort():
                    forever.pop(command.request_id, None)
                case m.GetAdapters():
                    found = [adapters[command.id]] if command.id else [adapters[id] for id in sorted(adapters)]
                    found = [info for info in found if info.id > command.after][: command.limit]
                    out.append(m.AdapterReply(command.call_id, found))
                case m.LoadAdapter():
                    info = m.AdapterInfo(
                        command.id, "0" * 64, 8, ("q_proj",), m.AdapterState.DEVICE, command.pin, 17, 0
                    )
                    adapters[command.id] = info
                    out += [m.AdapterReply(command.call_id, [info]), m.AdapterEvent(info)]
                case m.UnloadAdapter():
                    if command.id in adapters:
                        info = adapters.pop(command.id)
                        out += [m.AdapterReply(command.call_id, [info]), m.AdapterEvent(info, removed=True)]
                    else:
                        error = m.ErrorInfo("NotFound", "unknown adapter", {"resource_name": command.id})
                        out.append(m.AdapterReply(command.call_id, error=error))
                case m.Shutdown():
                    time.sleep(0.05)
                    return
        for request_id, count in forever.items():
            out.append(m.Tokens(request_id, 0, [100 + next(count) % 100]))
        if out:
            send(*out)


def generate(command: m.Generate, out: list[m.EngineMessage], forever: dict[str, itertools.count[int]]) -> None:
    kind, ids = command.prompt_token_ids[0], command.prompt_token_ids
    request_id = command.request_id
    if kind == DIE:
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == REFUSE:
        out.append(m.Failed(request_id, m.ErrorInfo("NotFound", "unknown adapter", {"resource_name": "x"})))
    elif kind in (ECHO, FOREVER):
        out.append(m.Started(request_id, len(ids), 0, command.adapters))
        if command.prompt_logprobs_from is not None:
            scored = ids[command.prompt_logprobs_from :]
            out.append(
                m.PromptLogprobs(
                    request_id,
                    [
                        m.TokenLogprobs(
                            t, -t / 100, 2, (m.TokenLogprob(t + 1, -0.1),), t / 50 if command.entropy else None
                        )
                        for t in scored
                    ],
                )
            )
        if kind == FOREVER:
            forever[request_id] = itertools.count()
            return
        if command.stopping.max_new_tokens == 0:
            out.append(m.Tokens(request_id, 0, [], None, m.FinishReason.LENGTH, m.Timings()))
            return
        for index in range(command.sampling.n):
            echoed = ids[1:][: command.stopping.max_new_tokens]
            out += [m.Tokens(request_id, index, [token]) for token in echoed]
            out.append(m.Tokens(request_id, index, [], None, m.FinishReason.LENGTH, m.Timings(0.1, 0.2, 0.3)))


if __name__ == "__main__":
    main()
