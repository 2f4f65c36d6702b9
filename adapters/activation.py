"""Where an activated LoRA begins to act (aLoRA, arXiv:2504.12397), as PEFT's `generate` has it.

    y_t = W₀ x_t + 1[t ≥ t*] · s · B A x_t

with t* the start of the last match of the invocation tokens in the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence


def activation(prompt: Sequence[int], invocation_tokens: tuple[int, ...]) -> int | None:
    """t*; None: the tokens do not appear in the prompt, which then runs on the base alone, and so does its answer."""
    first, count = invocation_tokens[0], len(invocation_tokens)
    for start in range(len(prompt) - count, -1, -1):
        if prompt[start] == first and tuple(prompt[start : start + count]) == invocation_tokens:
            return start
    return None
