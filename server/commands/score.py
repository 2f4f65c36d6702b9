"""`lorry score`: how likely a text is, said by a running server.

    sum = Σ log p(t_i | prompt, t_1 … t_i-1)     mean = sum / n     perplexity = exp(-mean)

over the n tokens of the continuation. These are what prompt and continuation have as one text behind the tokens of the
prompt, as lm-evaluation-harness takes them for decoder-only models: " upon" behind "Once" is one token and not a space
and "upon". Where the prompt's tokens do not begin those of the whole ("up" before "on"), the harness cuts the whole at
their number all the same; here the continuation is then tokenized by itself, without special tokens, so that what is
scored spells the text. Nor do spaces at the end of the prompt move to the continuation, as they do there.
"""

from __future__ import annotations

import json
import math
import sys
from typing import Annotated, Any

import typer

from lorry.server.commands import request_options as options
from lorry.server.commands import request_spec, values
from lorry.server.commands.client import DEFAULT_SERVER, Server, connect


def score(
    prompt: Annotated[str, typer.Argument(help="What comes before; - reads it from stdin.")],
    continuation: Annotated[str, typer.Argument(help="The text to score.")],
    server: Server = DEFAULT_SERVER,
    adapter: options.Adapters = None,
    token_ids: Annotated[
        bool, typer.Option("--token-ids", help="Both are token ids, separated by spaces or commas.")
    ] = False,
    entropy: Annotated[
        bool, typer.Option("--entropy", help="The entropy of the distribution in the place of each token.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as one JSON object.")] = False,
    timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", show_default=False, help="Give up, and let the server give up."),
    ] = None,
) -> None:
    """Say how likely a continuation of a prompt is, token by token.

    Prompt and continuation are tokenized as one text, so mind the space between two words: it belongs to the
    continuation.
    """
    from lorry.v1 import generation_pb2, generation_pb2_grpc

    adapters = request_spec.adapter_refs(adapter)
    text = sys.stdin.read() if prompt == "-" else prompt
    if token_ids:
        before, scored = values.token_ids(text, "PROMPT"), values.token_ids(continuation, "CONTINUATION")
    with connect(server) as channel:
        stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)
        if not token_ids:
            before, scored = _split(stub, text, continuation, timeout)
        request = generation_pb2.ScoreRequest(
            token_ids=generation_pb2.TokenIds(ids=before),
            continuation=generation_pb2.TokenIds(ids=scored),
            adapters=adapters,
            entropy=entropy,
        )
        answer = stub.Score(request, timeout=timeout)
        texts = _texts(stub, {*scored, *answer.greedy_token_ids}, timeout, may_lack=token_ids)
    rows: list[dict[str, Any]] = [
        {"token_id": token, "text": texts.get(token), "logprob": logprob}
        | {"greedy_token_id": greedy, "greedy_text": texts.get(greedy)}
        for token, logprob, greedy in zip(scored, answer.logprobs, answer.greedy_token_ids, strict=True)
    ]
    for row, value in zip(rows, answer.entropies, strict=entropy):
        row["entropy"] = value
    total = math.fsum(answer.logprobs)
    mean = total / len(rows)
    found = {"prompt_token_ids": before, "tokens": rows, "sum": total, "mean": mean, "perplexity": math.exp(-mean)}
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False, indent=2))
    else:
        _print_table(rows, entropy)
        typer.echo(f"sum {total:.4f}, mean {mean:.4f}, perplexity {found['perplexity']:.4f}")


def _split(stub: Any, prompt: str, continuation: str, timeout: float | None) -> tuple[list[int], list[int]]:
    """The tokens of the prompt, and those of the continuation behind them."""
    from lorry.v1 import generation_pb2

    def tokens(text: str, special: bool = True) -> list[int]:
        request = generation_pb2.TokenizeRequest(text=text, add_special_tokens=special)
        return list(stub.Tokenize(request, timeout=timeout).token_ids)

    before, whole = tokens(prompt), tokens(prompt + continuation)
    if whole[: len(before)] == before:
        return before, whole[len(before) :]
    typer.secho("the two share a token; the continuation is tokenized by itself", dim=True, err=True)
    return before, tokens(continuation, special=False)


def _texts(stub: Any, token_ids: set[int], timeout: float | None, may_lack: bool) -> dict[int, str]:
    """The text of each token; of none where the server has no tokenizer and that `may_lack`."""
    import grpc

    from lorry.v1 import generation_pb2

    asked = {
        token: stub.Detokenize.future(
            generation_pb2.DetokenizeRequest(token_ids=[token], skip_special_tokens=False), timeout=timeout
        )
        for token in sorted(token_ids)
    }
    try:
        return {token: call.result().text for token, call in asked.items()}
    except grpc.RpcError as error:
        if may_lack and error.code() is grpc.StatusCode.INVALID_ARGUMENT:
            return {}
        raise


def _print_table(rows: list[dict[str, Any]], entropy: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    def shown(token: int, text: str | None) -> str:
        return str(token) if text is None else json.dumps(text, ensure_ascii=False)

    table = Table(box=None, pad_edge=False)
    table.add_column("token", overflow="fold")
    table.add_column("log-probability", justify="right", no_wrap=True)
    table.add_column("most likely", overflow="fold")
    if entropy:
        table.add_column("entropy", justify="right", no_wrap=True)
    for row in rows:
        cells = [
            shown(row["token_id"], row["text"]),
            f"{row['logprob']:.4f}",
            shown(row["greedy_token_id"], row["greedy_text"]),
        ]
        table.add_row(*cells, *([f"{row['entropy']:.4f}"] if entropy else []))
    Console(markup=False, emoji=False, highlight=False).print(table)
