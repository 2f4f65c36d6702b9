"""What stands between the products of a layer, against its bytes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from gpu.measure import Case, Figure, Stage, expect_close
from gpu.shapes import layer

from lorry.kernels.kv_store import qkv_finish_reference
from lorry.kernels.rms_norm import rms_norm_reference
from lorry.kernels.silu_mul import silu_mul_reference

ROWS = (1, 16, 64, 4096)
EPS = 1e-5
BF16 = 2  # bytes


def rows_of(stage: Stage) -> tuple[int, ...]:
    return tuple(stage.some(stage.pick(ROWS, (1, 3))))


@torch.inference_mode()
def norm(stage: Stage) -> Iterator[Figure]:
    from lorry.kernels.triton.rms_norm import rms_norm

    width = layer(stage).hidden
    weight = stage.randn(width, scale=0.1) + 1
    for rows in rows_of(stage):
        moved = 4 * BF16 * rows * width + weight.nbytes  # x, residual twice, y
        pairs = [(stage.randn(rows, width), stage.randn(rows, width)) for _ in range(stage.copies(moved))]
        x, residual = pairs[0][0], pairs[0][1].clone()
        expected = rms_norm_reference((residual + x).float(), weight.float(), EPS)
        expect_close(f"rms_norm, {rows} rows", rms_norm(x, weight, EPS, residual), expected, 1e-2)
        figure = Figure("rms_norm + residual", f"{width}", rows, None, moved)
        figure.seconds = stage.time([partial(rms_norm, x, weight, EPS, r) for x, r in pairs], figure.eager)
        peer = [partial(_torch_norm, x, weight, r) for x, r in pairs]
        figure.peers["torch add_ + F.rms_norm"] = stage.time(peer, figure.eager, "torch")
        yield figure


def _torch_norm(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(residual.add_(x), (x.shape[1],), weight, EPS)


@torch.inference_mode()
def silu(stage: Stage) -> Iterator[Figure]:
    from lorry.kernels.triton.silu_mul import silu_mul

    width = layer(stage).intermediate
    for rows in rows_of(stage):
        moved = 3 * BF16 * rows * width
        inputs = [stage.randn(rows, 2 * width) for _ in range(stage.copies(moved))]
        expect_close(f"silu_mul, {rows} rows", silu_mul(inputs[0]), silu_mul_reference(inputs[0].float()), 1e-2)
        figure = Figure("silu_mul", f"{width}", rows, None, moved)
        figure.seconds = stage.time([partial(silu_mul, x) for x in inputs], figure.eager)
        figure.peers["torch"] = stage.time([partial(silu_mul_reference, x) for x in inputs], figure.eager, "torch")
        yield figure


@torch.inference_mode()
def finish(stage: Stage) -> Iterator[Figure]:
    from lorry.kernels.triton.kv_store import qkv_finish

    shape = layer(stage)
    kv = shape.kv_heads * shape.head_dim
    for rows in rows_of(stage):
        moved = 2 * BF16 * rows * (shape.hidden + 2 * kv)
        inputs = [stage.randn(rows, shape.hidden + 2 * kv) for _ in range(stage.copies(moved))]
        blocks = -(-rows // 16)
        caches = [torch.zeros(blocks, shape.kv_heads, 16, shape.head_dim, dtype=torch.bfloat16, device=stage.device)
                  for _ in range(4)]  # fmt: skip
        slots = torch.randperm(16 * blocks, device=stage.device)[:rows]
        positions = torch.arange(rows, device=stage.device)
        angles = torch.rand(rows, shape.head_dim // 2, device=stage.device)
        table = torch.cat((angles.cos(), angles.sin()), 1)
        qkv = inputs[0].clone()
        q = qkv_finish(qkv, positions, table, caches[0], caches[1], slots)
        wide = qkv_finish_reference(inputs[0].float(), positions, table, caches[2], caches[3], slots)
        for what, actual, expected in (
            ("q", q, wide),
            ("keys", caches[0], caches[2]),
            ("values", caches[1], caches[3]),
        ):
            expect_close(f"qkv finish, {rows} rows, {what}", actual, expected, 1e-2)
        figure = Figure("qkv finish", f"{shape.heads}+2x{shape.kv_heads} heads of {shape.head_dim}", rows, None, moved)
        calls = [partial(qkv_finish, x, positions, table, caches[0], caches[1], slots) for x in inputs]
        figure.seconds = stage.time(calls, figure.eager)
        yield figure


CASES: dict[str, Case] = {"rms_norm": norm, "silu_mul": silu, "qkv finish": finish}
