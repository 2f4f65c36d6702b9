"""Times the CPU kernels against the memory's own speed and against torch, after proving them right.

    python bench/kernels_cpu.py [--out bench/results/kernels-cpu.json] [--only nf4 --only lora] [--threads 2]

Every figure is the median over interleaved rounds; weights are rotated through more memory than the caches hold, as
in a model's step. GB/s counts the bytes an ideal kernel would have to read.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from lorry.kernels import native, nf4
from lorry.kernels.kv_store import empty_caches, kv_store
from lorry.kernels.linear import DenseLinear, dense_linear, dense_linear_reference
from lorry.kernels.lora import SITES, AdapterPages, Segments, Site, lora_add, lora_add_reference
from lorry.kernels.nf4_linear import NF4Linear, Products, nf4_linear, nf4_linear_reference
from lorry.kernels.paged_attention import paged_attention, paged_attention_reference
from lorry.kernels.rms_norm import rms_norm
from lorry.kernels.rope import rope
from lorry.kernels.silu_mul import silu_mul

Figure = dict[str, Any]
MODELS = {
    "smollm2-135m": {"hidden": 576, "intermediate": 1536, "heads": 9, "kv_heads": 3, "head_dim": 64, "vocab": 49152},
    "llama-1b-like": {"hidden": 2048, "intermediate": 8192, "heads": 32, "kv_heads": 8, "head_dim": 64, "vocab": 32768},
}
ROWS = (1, 2, 4, 8, 16, 32, 64, 256, 512)
WORKING_SET = 96 << 20  # bytes; more than the last-level cache that one machine is likely to give


def median_time(calls: list[Callable[[], object]], rounds: int, limit: float = 3.0) -> list[float]:
    """Median seconds of each call, interleaved so that a disturbance meets all of them."""
    times: list[list[float]] = [[] for _ in calls]
    begin = time.perf_counter()
    for i in range(rounds + 1):
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
        if i >= 3 and time.perf_counter() - begin > limit:
            break
    return [statistics.median(taken[1:]) for taken in times]


def rotating(function: Callable[[Any], object], items: list[Any]) -> Callable[[], object]:
    """Calls `function` on all items, one after the other."""

    def run() -> None:
        for item in items:
            function(item)

    return run


def expect_equal(actual: Tensor, expected: Tensor, limit: float = 1e-6) -> None:
    error = float(((actual - expected).square().mean() / expected.square().mean()).sqrt())
    if not error < limit:
        raise SystemExit(f"correctness gate: relative RMS {error:.2e} is not below {limit:.0e}; no figures")


def bandwidth(rounds: int) -> Figure:
    """Read and copy bandwidth of this machine, GB/s over 256 MiB."""
    words = torch.zeros(64 << 20)
    target = torch.empty_like(words)
    read, copied = median_time([words.sum, lambda: target.copy_(words)], rounds)
    return {"read_gb_s": words.nbytes / read / 1e9, "copy_gb_s": 2 * words.nbytes / copied / 1e9}


def copies(nbytes: int) -> int:
    return max(1, min(64, WORKING_SET // nbytes))


def figure(op: str, model: str, shape: str, rows: int, seconds: float, nbytes: float, flops: float) -> Figure:
    return {
        "op": op,
        "model": model,
        "shape": shape,
        "rows": rows,
        "microseconds": seconds * 1e6,
        "gb_s": nbytes / seconds / 1e9,
        "gflop_s": flops / seconds / 1e9,
    }


def bench_nf4(model: str, m: dict[str, int], rounds: int) -> list[Figure]:
    """Fused linears against torch's dequantize + F.linear and against F.linear on a dense float32 weight."""
    hidden, inner = m["hidden"], m["intermediate"]
    qkv = (m["heads"] * m["head_dim"], m["kv_heads"] * m["head_dim"], m["kv_heads"] * m["head_dim"])
    figures = []
    for name, sizes, k in (
        ("qkv", qkv, hidden),
        ("o", (hidden,), hidden),
        ("gate_up", (inner, inner), hidden),
        ("down", (hidden,), inner),
    ):
        parts = [nf4.quantize(torch.randn(n, k)) for n in sizes]
        dense = torch.cat([nf4.dequantize(part) for part in parts])
        count = copies(NF4Linear(parts).nbytes)
        kinds: dict[Products, float] = {"float32": 1e-6, "int16": 1.5e-4}
        linears = {kind: [NF4Linear(parts, products=kind) for _ in range(count)] for kind in kinds}
        for rows in ROWS:
            x, out = torch.randn(rows, k), torch.empty(rows, sum(sizes))
            for kind, limit in kinds.items():
                expect_equal(nf4_linear(x, linears[kind][0]), nf4_linear_reference(x, parts), limit)
            used = count if rows <= 64 else min(count, 2)
            reference, float32, *ours = median_time(
                [
                    partial(nf4_linear_reference, x, parts),
                    partial(F.linear, x, dense),
                    *(rotating(partial(nf4_linear, x, out=out), linears[kind][:used]) for kind in kinds),
                ],
                rounds,
            )
            for kind, seconds in zip(kinds, (total / used for total in ours), strict=True):
                flops = 2 * rows * dense.numel()
                row = figure(
                    f"nf4_linear {kind}",
                    model,
                    f"{name} {sum(sizes)}x{k}",
                    rows,
                    seconds,
                    linears[kind][0].nbytes,
                    flops,
                )
                row["over_torch_dequantize_linear"] = reference / seconds
                row["over_torch_float32_linear"] = float32 / seconds
                figures.append(row)
    return figures


def bench_head(model: str, m: dict[str, int], rounds: int) -> list[Figure]:
    weight = torch.randn(m["vocab"], m["hidden"]).bfloat16()
    linear, wide = DenseLinear(weight), weight.float()
    figures = []
    for rows in (1, 2, 4, 8, 16, 32):
        x = torch.randn(rows, m["hidden"])
        expect_equal(dense_linear(x, linear), dense_linear_reference(x, weight))
        ours, float32, bfloat16 = median_time(
            [
                partial(dense_linear, x, linear),
                partial(F.linear, x, wide),
                partial(F.linear, x.bfloat16(), weight),
            ],
            rounds,
        )
        row = figure(
            "dense_linear",
            model,
            f"head {m['vocab']}x{m['hidden']} bf16",
            rows,
            ours,
            weight.nbytes,
            2 * rows * weight.numel(),
        )
        row["over_torch_float32_linear"] = float32 / ours
        row["over_torch_bfloat16_linear"] = bfloat16 / ours
        figures.append(row)
    return figures


def bench_lora(model: str, m: dict[str, int], rounds: int) -> list[Figure]:
    """A layer's seven linears with `adapters` distinct rank-16 adapters over `rows` rows; ratio to the bytes' time."""
    hidden, inner = m["hidden"], m["intermediate"]
    q, kv = m["heads"] * m["head_dim"], m["kv_heads"] * m["head_dim"]
    widths = dict(
        zip(
            SITES,
            ((hidden, q), (hidden, kv), (hidden, kv), (q, hidden), (hidden, inner), (hidden, inner), (inner, hidden)),
            strict=True,
        )
    )
    page = {name: 16 * (k + n) for name, (k, n) in widths.items()}
    adapters = 8
    layers = max(2, min(30, WORKING_SET // (2 * adapters * sum(page.values()))))
    offsets = torch.full((adapters, layers, len(SITES), 1), -1, dtype=torch.int64)
    end = 0
    for layer in range(layers):
        for slot in range(adapters):
            for index, name in enumerate(SITES):
                offsets[slot, layer, index, 0] = end
                end += page[name]
    pages = AdapterPages(torch.randn(end).bfloat16(), offsets, torch.ones(adapters, layers, len(SITES)))
    groups: list[tuple[tuple[Site, ...], int, int]] = []
    for names in (SITES[:3], SITES[3:4], SITES[4:6], SITES[6:]):
        starts = [sum(widths[other][1] for other in names[:i]) for i in range(len(names) + 1)] + [
            sum(widths[n][1] for n in names)
        ]
        sites = tuple(Site(SITES.index(n), starts[i], widths[n][1]) for i, n in enumerate(names))
        groups.append((sites, widths[names[0]][0], starts[-1]))
    figures = []
    for distinct, rows in ((1, 1), (1, 16), (2, 16), (8, 8), (8, 16), (8, 64)):
        bounds = torch.linspace(0, rows, distinct + 1).int()
        segments = Segments(bounds, torch.arange(distinct).int().unsqueeze(1), torch.ones(distinct, 1))
        data = [(sites, torch.randn(rows, k), torch.randn(rows, n)) for sites, k, n in groups]

        def step(
            layer: int, data: Any = data, segments: Segments = segments, add: Callable[..., None] = lora_add
        ) -> None:
            for sites, x, y in data:
                add(y, x, pages, layer, sites, segments)

        for sites, x, y in data:
            actual, expected = y.clone(), y.clone()
            lora_add(actual, x, pages, 0, sites, segments)
            lora_add_reference(expected, x, pages, 0, sites, segments)
            expect_equal(actual, expected)
        ours, reference = median_time(
            [rotating(step, list(range(layers))), partial(step, 0, add=lora_add_reference)], rounds
        )
        nbytes = 2 * distinct * sum(page.values())
        row = figure(
            "lora_add",
            model,
            f"7 linears, {distinct} adapters of rank 16",
            rows,
            ours / layers,
            nbytes,
            2 * rows * sum(page.values()),
        )
        row["over_torch"] = reference * layers / ours
        figures.append(row)
    return figures


def bench_attention(model: str, m: dict[str, int], rounds: int) -> list[Figure]:
    heads, kv_heads, width = m["heads"], m["kv_heads"], m["head_dim"]
    figures = []
    for name, sequences, q_len, kv_len in (
        ("decode", 1, 1, 128),
        ("decode", 1, 1, 1024),
        ("decode", 16, 1, 128),
        ("decode", 16, 1, 1024),
        ("prefill", 1, 512, 512),
        ("prefill", 1, 256, 2048),
    ):
        blocks = -(-kv_len // 16) * sequences
        caches = [
            empty_caches(blocks, kv_heads, 16, width, torch.bfloat16)
            for _ in range(copies(4 * blocks * kv_heads * 16 * width))
        ]
        for cache in (cache for pair in caches for cache in pair):
            cache.copy_(torch.randn(cache.shape))
        tables = torch.randperm(blocks).int().view(sequences, -1)
        bounds = torch.arange(0, (sequences + 1) * q_len, q_len).int()
        lens = torch.full((sequences,), kv_len).int()
        q = torch.randn(sequences * q_len, heads, width)

        def attend(
            cache: tuple[Tensor, Tensor],
            function: Callable[..., Tensor] = paged_attention,
            a: Any = (q, tables, bounds, lens),
        ) -> Tensor:
            return function(a[0], cache[0], cache[1], a[1], a[2], a[3], width**-0.5)

        expect_equal(attend(caches[0]), attend(caches[0], paged_attention_reference))
        ours, reference = median_time(
            [rotating(attend, caches), partial(attend, caches[0], paged_attention_reference)], rounds
        )
        ours /= len(caches)
        seen = q_len * kv_len - q_len * (q_len - 1) / 2
        row = figure(
            f"attention {name}",
            model,
            f"{sequences} sequences of {kv_len}",
            q_len,
            ours,
            2 * caches[0][0].nbytes,
            4 * sequences * heads * width * seen,
        )
        row["over_torch"] = reference / ours
        figures.append(row)
    return figures


def bench_small(model: str, m: dict[str, int], rounds: int) -> list[Figure]:
    """What stands between the products; at one row this is the cost of a call."""
    hidden, inner, heads, kv_heads, width = m["hidden"], m["intermediate"], m["heads"], m["kv_heads"], m["head_dim"]
    figures = []
    for rows in (1, 16, 256):
        x, residual, weight = torch.randn(rows, hidden), torch.randn(rows, hidden), torch.ones(hidden)
        q, k, v = (torch.randn(rows, count, width) for count in (heads, kv_heads, kv_heads))
        positions, angles = torch.arange(rows), torch.rand(1024, width // 2)
        table = torch.cat((angles.cos(), angles.sin()), dim=-1)
        caches = empty_caches(-(-rows // 16), kv_heads, 16, width, torch.bfloat16)
        gate_up = torch.randn(rows, 2 * inner)
        calls: dict[str, tuple[Callable[[], object], int]] = {
            "rms_norm": (partial(rms_norm, x, weight, 1e-5), 2 * x.nbytes),
            "rms_norm+residual": (partial(rms_norm, x, weight, 1e-5, residual), 4 * x.nbytes),
            "rope": (partial(rope, q, k, positions, table), 2 * (q.nbytes + k.nbytes)),
            "kv_store": (partial(kv_store, k, v, caches[0], caches[1], positions), 3 * k.nbytes),
            "silu_mul": (partial(silu_mul, gate_up), 3 * gate_up.nbytes // 2),
        }
        times = median_time([call for call, _ in calls.values()], 50 * rounds)
        for (name, (_, nbytes)), seconds in zip(calls.items(), times, strict=True):
            figures.append(figure(name, model, "", rows, seconds, nbytes, 0))
    return figures


BENCHES = {"nf4": bench_nf4, "head": bench_head, "lora": bench_lora, "attention": bench_attention, "small": bench_small}


def main(
    out: Annotated[Path, typer.Option(help="Where the result goes.")] = Path("bench/results/kernels-cpu.json"),
    only: Annotated[list[str] | None, typer.Option(help=f"Some of {', '.join(BENCHES)}; all by default.")] = None,
    model: Annotated[list[str] | None, typer.Option(help=f"Some of {', '.join(MODELS)}; all by default.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads; torch's own number by default.")] = None,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds whose median counts.")] = 15,
) -> None:
    """Check, time and write the figures of the CPU kernels."""
    unknown = set(only or ()) - set(BENCHES) | set(model or ()) - set(MODELS)
    if unknown:
        raise typer.BadParameter(f"unknown: {', '.join(sorted(unknown))}")
    library = native.library()
    if library is None:
        raise SystemExit("the native kernels are not available on this machine")
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    memory = bandwidth(rounds)
    typer.echo(
        f"read {memory['read_gb_s']:.1f} GB/s, copy {memory['copy_gb_s']:.1f} GB/s, {torch.get_num_threads()} threads"
    )
    figures: list[Figure] = []
    for model_name in model or MODELS:
        for bench in only or BENCHES:
            for row in BENCHES[bench](model_name, MODELS[model_name], rounds):
                row["of_read_bandwidth"] = row["gb_s"] / memory["read_gb_s"]
                figures.append(row)
                ratios = "  ".join(f"{key} {row[key]:.2f}x" for key in row if key.startswith("over_"))
                typer.echo(
                    f"{model_name:14} {row['op']:18} {row['shape']:36} rows {row['rows']:4} "
                    f"{row['microseconds']:10.1f} us {row['gb_s']:6.1f} GB/s ({row['of_read_bandwidth']:4.0%}) "
                    f"{row['gflop_s']:7.1f} GFLOP/s  {ratios}"
                )
    result = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "lanes": library.simd_name().decode(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_before": os.getloadavg()[0],
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "memory": memory,
        "figures": figures,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    typer.echo(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
