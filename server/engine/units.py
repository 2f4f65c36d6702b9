"""The sequences of a search, or of a guided answer, as a unit: what its members share, and what they take together.

A unit decodes in the same step or not at all, and is preempted as one. It comes back member by member, each sharing the
blocks of those before it, so that it is never larger than it was.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from lorry.server.cache.blocks import BLOCK_SIZE, blocks_for
from lorry.server.cache.prefix import Match, Node, PrefixIndex
from lorry.server.engine.sequence import Request, Sequence, Status
from lorry.server.errors import OutOfMemory, PromptTooLong
from lorry.server.params import Guidance


def check_fits(request: Request, context_length: int, num_blocks: int) -> None:
    """Refuse a request whose unit could not run to its end with all memory for itself."""
    prompt, new = max(map(len, request.prompts)), request.message.stopping.max_new_tokens
    if prompt + new > context_length:
        raise PromptTooLong(
            f"the prompt has {prompt} tokens and {new} are wanted, together there may be {context_length}",
            prompt_tokens=prompt,
            max_new_tokens=new,
            context_length=context_length,
        )
    needed = _blocks(request, [new] * request.rows)
    if needed > num_blocks:
        raise OutOfMemory(
            f"{request.rows} sequences of {prompt} + {new} tokens may need {needed} blocks, there are"
            f" {num_blocks}; a smaller max_new_tokens needs fewer"
        )


def blocks_to_come_back(request: Request) -> int:
    """What all of a unit that is out needs for its tokens and the next ones."""
    lengths = [len(each.output) for each in request.live]
    return _blocks(request, lengths) + request.rows - len(lengths)


def comes_back(request: Request) -> bool:
    """Whether one of a unit computes what the rest of the unit will share."""
    return (
        request.search is not None
        and request.guidance is None
        and any(each.status is Status.RUNNING and each.length - each.computed > 1 for each in request.sequences)
    )


def shared(sequence: Sequence, index: PrefixIndex) -> Match | None:
    """What a sequence shares with those of its unit that are back, from their blocks themselves: the index may know
    others of the same content, or none."""
    if sequence.request.search is None:
        return None
    best, blocks = 0, list[int]()
    for each in sequence.request.sequences:
        if each.namespace == sequence.namespace and each.status is Status.RUNNING:
            found = _common(sequence, each) // BLOCK_SIZE
            if found >= best:
                best, blocks = found, each.table.blocks[:found]
    if not best:
        return None
    node: Node = sequence.namespace
    for number, block in enumerate(blocks):
        tokens = sequence.tokens(number * BLOCK_SIZE, (number + 1) * BLOCK_SIZE)
        node = index.insert(sequence.namespace.before(number, node), tokens, block)
    return Match(blocks, node)


def _blocks(request: Request, lengths: SequenceOf[int]) -> int:
    """Blocks that sequences with outputs of these lengths take at most, when they share what a search lets them."""
    assert request.search is not None
    if isinstance(request.search, Guidance):
        return sum(blocks_for(len(prompt) + length) for prompt, length in zip(request.prompts, lengths, strict=True))
    prompt, longest = len(request.prompt), max(lengths)
    alike = (prompt + longest - request.search.diverging(longest)) // BLOCK_SIZE
    return alike + sum(blocks_for(prompt + length) - alike for length in lengths)


def _common(one: Sequence, other: Sequence) -> int:
    """How many tokens both begin with, of those that are computed of the other; not the last of the one."""
    most = min(one.length - 1, other.computed)
    pairs = zip(one.tokens(0, most), other.tokens(0, most), strict=True)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), most)
