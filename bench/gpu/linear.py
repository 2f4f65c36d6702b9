"""nf4_linear against bf16 weights in cuBLAS and against bitsandbytes on the same NF4 weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu.measure import Call, Case, Figure, Stage, expect_close
from gpu.shapes import LLAMA, layer

from lorry.kernels import nf4
from lorry.kernels.nf4 import NF4Weight

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
BITSANDBYTES_ROWS = 64


def fragments(stage: Stage, parts: list[NF4Weight]) -> Any:
    """The GPU's form of the weights."""
    from lorry.kernels.triton.nf4_fragments import Fragments

    return Fragments(parts, None, sms=stage.sms) if stage.dry else Fragments.on_device(parts, None)


def bitsandbytes_calls(x: torch.Tensor, weight: NF4Weight, copies: int) -> dict[str, list[Call]]:
    """Its products of x and one weight, each on a copy of its own; {} where it cannot be had."""
    try:
        import bitsandbytes
        from bitsandbytes import functional
    except ImportError:
        return {}
    if tuple(int(part) for part in bitsandbytes.__version__.split(".")[:2]) < (0, 50):
        return {}
    second = functional.QuantState(
        absmax=weight.nested_absmax, code=weight.nested_code, blocksize=weight.nested_blocksize, dtype=torch.float32
    )
    calls: dict[str, list[Call]] = {"bitsandbytes matmul_4bit": []}
    if x.shape[0] == 1:
        calls["bitsandbytes gemv_4bit"] = []
    for _ in range(copies):
        state = functional.QuantState(
            absmax=weight.absmax.clone(), shape=torch.Size(weight.shape), code=weight.code, quant_type="nf4",
            blocksize=weight.blocksize, dtype=x.dtype, offset=torch.tensor(weight.nested_offset, device=x.device),
            state2=second,
        )  # fmt: skip
        packed = weight.packed.clone().view(-1, 1)
        calls["bitsandbytes matmul_4bit"].append(partial(bitsandbytes.matmul_4bit, x, packed, state))
        if x.shape[0] == 1:
            calls["bitsandbytes gemv_4bit"].append(partial(functional.gemv_4bit, x, packed.t(), state=state))
    return calls


def split(whole: NF4Weight, sizes: tuple[int, ...]) -> list[NF4Weight]:
    """The rows of one weight as parts of their own, with its bytes; each must hold whole nested groups."""
    parts, row, k = [], 0, whole.shape[1]
    assert whole.nested_absmax is not None
    for n in sizes:
        block, blocks = row * k // whole.blocksize, n * k // whole.blocksize
        assert block % whole.nested_blocksize == 0
        nested = slice(block // whole.nested_blocksize, -(-(block + blocks) // whole.nested_blocksize))
        parts.append(
            replace(
                whole,
                packed=whole.packed[row * k // 2 : (row + n) * k // 2],
                absmax=whole.absmax[block : block + blocks],
                nested_absmax=whole.nested_absmax[nested],
                shape=(n, k),
            )
        )
        row += n
    return parts


@torch.inference_mode()
def linear(stage: Stage, name: str) -> Iterator[Figure]:
    from lorry.kernels.triton.nf4_linear import nf4_linear, plan

    sizes, k = layer(stage).linears[name]
    whole = nf4.quantize(stage.randn(sum(sizes), k, scale=k**-0.5))
    parts, dense, nbytes = split(whole, sizes), nf4.dequantize(whole, torch.bfloat16), whole.nbytes
    weights = [fragments(stage, parts) for _ in range(stage.copies(nbytes))]
    denses = [dense] + [dense.clone() for _ in range(stage.copies(dense.nbytes) - 1)]
    for rows in stage.some(stage.pick(ROWS, (1, 67))):
        x = stage.randn(rows, k)
        expected = x.float() @ dense.float().T
        expect_close(f"nf4_linear {name}, M = {rows}", nf4_linear(x, weights[0]), expected, 1e-2)
        shape = f"{name} {sum(sizes)}x{k}"
        how = plan(rows, weights[0])
        moved = nbytes + x.nbytes + 2 * expected.numel()
        figure = Figure("nf4_linear", shape, rows, None, moved, 2.0 * rows * dense.numel(), plan=how.name)
        figure.seconds = stage.time([partial(nf4_linear, x, weight) for weight in weights], figure.eager)
        calls: dict[str, list[Call]] = {"bf16 F.linear": [partial(F.linear, x, weight) for weight in denses]}
        if rows <= BITSANDBYTES_ROWS:
            calls |= bitsandbytes_calls(x, whole, stage.copies(nbytes))
        for peer, peer_calls in calls.items():
            if peer.startswith("bitsandbytes"):
                answer = peer_calls[0]()
                assert isinstance(answer, torch.Tensor)
                expect_close(f"{peer} {name}, M = {rows}", answer, expected, 1e-2)
            figure.peers[peer] = stage.time(peer_calls, figure.eager, peer)
        yield figure


CASES: dict[str, Case] = {f"nf4_linear {name}": partial(linear, name=name) for name in LLAMA.linears}
