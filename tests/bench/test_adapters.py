"""What bench/adapters.py measures, on servers of a tiny model with random weights; its plots; its floors."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from lorry.adapters.catalog import Catalog
from lorry.adapters.device.pool import PagePool
from lorry.adapters.loader import load_adapter
from lorry.kernels import native


class NoBase:
    """For adapters that need nothing of the base."""

    def weight(self, linear: Any) -> Any:
        raise NotImplementedError

    bias = weight


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(importlib.import_module("steps.sizes").TINY))
    return folder


def test_a_dry_run_measures_and_draws(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    bench = importlib.import_module("adapters")
    native.library()
    (tmp_path / "lorry").mkdir()
    (tmp_path / "lorry" / "native").symlink_to(native.cache_folder())  # compiled once for all tests
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    output = tmp_path / "new" / "result.json"
    bench.main(
        model=str(model),
        adapters=[7],
        pool=2,
        files=3,
        streams=2,
        prompt_tokens=5,
        new_tokens=6,
        registering=40,
        cold=2,
        quick=True,
        server_option=["--load-format=dummy", "--threads=1", "--device=cpu", "--adapter-host-memory=1MiB"],
        output=output,
    )
    result = json.loads(output.read_text())
    assert [(row["adapters"], row["popularity"]) for row in result["registered"]] == [(7, "uniform"), (7, "zipf")]
    for row in result["registered"]:
        assert row["tokens_per_second"] > 0 and sum(row["found"].values()) == 4 and 0 <= row["hit_rate"] <= 1
    assert result["bystanders"]["loads"] > 0
    assert result["cold"]["alone"]["cold_ms"]["p50"] > 0 and result["cold"]["alone"]["adapter_bytes"] > 0
    assert result["registering"]["adapters"] == 40 and result["registering"]["seconds"] > 0
    assert set(result["floors"]) >= {"bystanders_p99_more", "cold_more_ms", "register_seconds", "register_bytes"}
    assert output.with_suffix(".png").stat().st_size > 1000
    assert "register_seconds" in capsys.readouterr().out


@pytest.mark.parametrize(("adapters", "rank"), [(1, 16), (3, 16), (5, 40)])
def test_the_pool_holds_as_many_as_asked(model: Path, adapters: int, rank: int) -> None:
    registered = importlib.import_module("registered")
    layout = registered.layout_of(model)
    pool = PagePool(layout, registered.pool_bytes(layout, adapters, rank))
    each = [0] * len(pool.demand([]))
    for _, site in layout.linears():
        each[pool._kind[site]] += -(-rank // 16)
    each[-1] = 1
    fits = lambda number: pool.ever_fits(tuple(number * count for count in each))
    assert fits(adapters) and not fits(2 * adapters)


def test_adapters_that_share_files_are_revisions_of_their_own(model: Path, tmp_path: Path) -> None:
    registered = importlib.import_module("registered")
    layout = registered.layout_of(model)
    folder = registered.write_catalog(model, tmp_path / "root", 5, 8, 2)
    pool = PagePool(layout, 1 << 20)
    loaded = [load_adapter(place, layout, pool.dtype, NoBase()) for place in Catalog(folder).scan().values()]
    assert len({adapter.revision for adapter in loaded}) == 5
    assert len({next(iter(adapter.linears.values())).scaling for adapter in loaded}) == 5
    inodes = {(path / "adapter_model.safetensors").stat().st_ino for path in folder.iterdir()}
    assert len(inodes) == 2
    assert registered.write_catalog(model, tmp_path / "root", 5, 8, 2) == folder


def test_floors() -> None:
    bench = importlib.import_module("adapters")
    registered, cold = importlib.import_module("registered"), importlib.import_module("registered").ColdStart
    latencies = importlib.import_module("bystanders").Latencies
    results = [
        registered.Registered(count, popularity, [speed, 1.0, 500.0])
        for count, speed in ((8, 100.0), (64, 90.0), (2000, 69.0))
        for popularity in ("uniform", "zipf")
    ]
    aside = bench.Beside(
        latencies({"p99": 40.0}, {"p99": 49.0}, 9, 9.0),
        cold(20, {"p50": 700.0}, {"p50": 250.0}),
        cold(20, {"p50": 900.0}, {"p50": 250.0}),
        4.9,
        int(201e6),
    )
    found = bench.figures(results, aside)
    assert found["many_over_few"] == {"measured": 0.69, "at least": 0.7, "reached": False}
    assert {name: row["reached"] for name, row in found.items() if name != "many_over_few"} == {
        "bystanders_p99_more": True,
        "cold_more_ms": True,
        "cold_beside_streams_more_ms": False,
        "register_seconds": True,
        "register_bytes": False,
    }
    assert "many_over_few" not in bench.figures(results[:2], aside)
