"""What is told to the operator: each gain once, and nothing where nothing has changed."""

from __future__ import annotations

from typing import Any

from lorry.server.cache.blocks import BlockAllocator
from lorry.server.cache.prefix import PrefixIndex
from lorry.server.engine.report import Report
from lorry.server.engine.scheduler import Limits, Scheduler


def test_drafts_are_told_once() -> None:
    allocator = BlockAllocator(5)
    residency: Any = None
    report = Report(Scheduler(Limits(3, 7, 11), allocator, PrefixIndex(allocator), residency))
    first = report.stats(0.0)
    assert first is not None and (first.drafted, first.accepted) == ({}, {})
    report.drafted["prompt_lookup"] += 7
    report.accepted["prompt_lookup"] += 5
    report.drafted["draft_model"] += 3
    second = report.stats(1.0)
    assert second is not None
    assert (second.drafted, second.accepted) == ({"prompt_lookup": 7, "draft_model": 3}, {"prompt_lookup": 5})
    assert report.stats(2.0) is None
