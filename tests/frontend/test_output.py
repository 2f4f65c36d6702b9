"""Stop strings and counts, token by token, against a plain search in the whole text."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.server.engine.messages import FinishReason, TokenLogprobs
from lorry.server.frontend.output import SequenceOutput
from lorry.server.frontend.stop_strings import StopFilter, StopStrings

LETTERS = st.text(alphabet="ab.", min_size=1, max_size=4)


class Letters:
    """A detokenizer whose token k is the k-th entry of a list; nothing is held back."""

    def __init__(self, vocabulary):
        self.vocabulary = vocabulary

    def push(self, token_ids):
        return "".join(self.vocabulary[token] for token in token_ids)

    def flush(self):
        return ""


def first_stop(text, stop, ends_at_least=0):
    """The oracle: (start, end, string) of the match that ends first, of those the longest."""
    found = [
        (end, end - len(string), string)
        for string in stop
        for end in range(len(string), len(text) + 1)
        if text[end - len(string) : end] == string and end > ends_at_least
    ]
    return min(found, default=None)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_output_equals_a_search_in_the_whole_text(data):
    vocabulary = data.draw(st.lists(LETTERS | st.just(""), min_size=1, max_size=9))
    stop = tuple(data.draw(st.lists(LETTERS, min_size=1, max_size=4, unique=True)))
    ids = data.draw(st.lists(st.integers(0, len(vocabulary) - 1), max_size=14))
    minimum = data.draw(st.integers(0, 5))
    include_stop = data.draw(st.booleans())
    output = SequenceOutput(Letters(vocabulary), StopStrings(stop), min_new_tokens=minimum, include_stop=include_stop)

    whole = "".join(vocabulary[token] for token in ids)
    ineligible = len("".join(vocabulary[token] for token in ids[:minimum]))
    match = first_stop(whole, stop, ends_at_least=ineligible)
    shown, tokens, rest, reason, found = "", [], list(ids), None, ""
    while reason is None:
        size = data.draw(st.integers(1, 3))
        chunk, rest = rest[:size], rest[size:]
        logprobs = [TokenLogprobs(token, -1.0, 1) for token in chunk]
        piece = output.push(chunk, logprobs, None if rest else FinishReason.LENGTH)
        shown += piece.text
        tokens += piece.token_ids
        assert [entry.token_id for entry in piece.logprobs] == list(piece.token_ids)
        reason, found = piece.reason, piece.stop
        limit = len(whole) if match is None else match[0] if include_stop and reason else match[1]
        assert len(shown) <= limit and whole.startswith(shown)
    if match is None:
        assert (shown, tokens, reason, found) == (whole, ids, FinishReason.LENGTH, "")
    else:
        end, start, string = match
        assert (reason, found) == (FinishReason.STOP, string)
        assert shown == whole[: end if include_stop else start]
        before_last = "".join(vocabulary[token] for token in tokens[:-1])
        assert tokens == ids[: len(tokens)] and len(before_last) < end
    assert output.completion_tokens == len(tokens)
    assert output.finished


@settings(max_examples=300, deadline=None)
@given(st.lists(LETTERS, min_size=1, max_size=5, unique=True), st.lists(LETTERS, max_size=10))
def test_what_is_held_back_is_the_longest_suffix_that_may_become_a_stop(stop, pieces):
    state, seen = StopFilter(StopStrings(stop)), ""
    for piece in pieces:
        seen += piece
        _, found = state.push(piece, active=True)
        if found:
            return
        longest = max((k for string in stop for k in range(1, len(string)) if seen.endswith(string[:k])), default=0)
        assert state.pending == seen[len(seen) - longest :]


def test_the_text_of_the_token_that_ended_a_sequence_is_shown_only_on_request():
    vocabulary = ["hello", "\n"]
    for include_stop, text in ((False, "hello"), (True, "hello\n")):
        output = SequenceOutput(Letters(vocabulary), include_stop=include_stop)
        piece = output.push([0, 1], None, FinishReason.STOP)
        assert (piece.text, list(piece.token_ids), piece.stop) == (text, [0, 1], "")
        assert output.completion_tokens == 2


def test_a_stop_string_beats_the_end_that_came_with_the_same_message():
    output = SequenceOutput(Letters(["a", "STOP", "b"]), StopStrings(["STOP"]))
    piece = output.push([0, 1, 2], None, FinishReason.EOS)
    assert (piece.text, piece.reason, piece.stop, list(piece.token_ids)) == ("a", FinishReason.STOP, "STOP", [0, 1])


def test_an_abort_shows_what_was_held_back():
    output = SequenceOutput(Letters(["a ST"]), StopStrings(["STOP"]))
    assert output.push([0], None, None).text == "a "
    assert output.end() == "ST"
