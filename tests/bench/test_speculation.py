"""What bench/speculation.py asks and reckons; what it measures needs the default model and minutes."""

from __future__ import annotations

import importlib
from collections import Counter

import numpy as np
import pytest


def test_prompts_are_one_for_each_file_and_every_task_in_turn() -> None:
    editing = importlib.import_module("editing")
    prompts = editing.edits()
    assert len({prompt.message for prompt in prompts}) == len(prompts) == len(editing.FILES) == 16
    assert Counter(prompt.task for prompt in prompts) == dict.fromkeys(editing.TASKS, 4)
    assert all(editing.CHARACTERS < len(prompt.message) < 2 * editing.CHARACTERS for prompt in prompts)
    questions = editing.questions()
    assert len({prompt.message for prompt in questions}) == len(questions) == 16


def test_misspelling_moves_two_letters_of_some_words() -> None:
    editing = importlib.import_module("editing")
    assert editing.misspelt("alpha beta bravo charlie delta", every=2) == "alpha beta barvo charlie dleta"
    text = "Words of four stay, longer ones may change."
    found = editing.misspelt(text, every=1)
    assert found != text and sorted(found) == sorted(text)


def test_cases_have_floors_where_the_goals_are() -> None:
    speculation = importlib.import_module("speculation")
    cases = list(speculation.cases([1, 4], draft_model=True))
    assert len(set(cases)) == len(cases) == 2 * (2 * 2 * 2 + 1)
    floors = {(case.workload, case.streams): case.floor for case in cases if case.floor is not None}
    assert floors == {("edit", 1): 1.5, ("chat", 1): 0.95}
    assert all(case.proposer == "prompt_lookup" and not case.adapters for case in cases if case.floor is not None)


def test_a_ratio_is_the_median_of_rounds_over_some_groups() -> None:
    speculation = importlib.import_module("speculation")
    plain = np.array([[3.0, 9.0], [5.0, 1.0], [8.0, 9.0]])  # [rounds, groups]
    ahead = np.array([[1.0, 3.0], [5.0, 1.0], [4.0, 1.0]])
    seconds = np.stack((plain, ahead))
    assert speculation.ratio(seconds, [0, 1]) == pytest.approx(3.0)
    assert speculation.ratio(seconds, [0]) == pytest.approx(2.0)
