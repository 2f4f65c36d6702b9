"""One sequence's way from token ids to what its reader sees: text, token ids, stop strings, counts.

The tokens of the answer end with the one that completed a stop; later ones, which the engine may have computed
already, are neither shown nor counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorry.server.engine.messages import FinishReason, TokenLogprobs
from lorry.server.frontend.detokenize import Detokenizer
from lorry.server.frontend.stop_strings import StopFilter, StopStrings


@dataclass(frozen=True, slots=True)
class Piece:
    """What one message of the engine gave."""

    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs] | None
    reason: FinishReason | None
    stop: str = ""


class SequenceOutput:
    """Detokenizer, stop filter and token count of one sequence."""

    __slots__ = ("_detokenizer", "_filter", "_include_stop", "_min_new_tokens", "completion_tokens", "finished")

    def __init__(
        self,
        detokenizer: Detokenizer,
        stop: StopStrings | None = None,
        *,
        min_new_tokens: int = 0,
        include_stop: bool = False,
    ) -> None:
        self._detokenizer = detokenizer
        self._filter = StopFilter(stop) if stop else None
        self._min_new_tokens = min_new_tokens
        self._include_stop = include_stop
        self.completion_tokens = 0
        self.finished = False

    def push(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] | None, finish: FinishReason | None
    ) -> Piece:
        """What the reader gets for new tokens; `reason` is set when the sequence ends with them.

        With `finish` EOS or STOP the last token ended the sequence: its text is shown only with include_stop.
        """
        assert not self.finished
        hidden = 1 if finish in (FinishReason.EOS, FinishReason.STOP) and not self._include_stop else 0
        shown = token_ids[: len(token_ids) - hidden]
        if self._filter is None:
            text = self._detokenizer.push(shown)
        else:
            pieces = []
            for count, token_id in enumerate(shown, 1):
                active = self.completion_tokens + count > self._min_new_tokens
                piece, stop = self._filter.push(self._detokenizer.push((token_id,)), active)
                pieces.append(piece)
                if stop:
                    return self._stopped("".join(pieces), stop, token_ids[:count], logprobs and logprobs[:count])
            text = "".join(pieces)
        if finish is not None:
            tail, stop = self._tail(self.completion_tokens + len(token_ids) > self._min_new_tokens)
            text += tail
            if stop:
                return self._stopped(text, stop, token_ids, logprobs)
            self.finished = True
        self.completion_tokens += len(token_ids)
        return Piece(text, token_ids, logprobs, finish)

    def end(self) -> str:
        """End the sequence from outside (abort); the text that was held back."""
        assert not self.finished
        self.finished = True
        return self._tail(active=False)[0]

    def _tail(self, active: bool) -> tuple[str, str]:
        rest = self._detokenizer.flush()
        if self._filter is None:
            return rest, ""
        text, stop = self._filter.push(rest, active)
        return (text, stop) if stop else (text + self._filter.flush(), "")

    def _stopped(
        self, text: str, stop: str, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] | None
    ) -> Piece:
        self.finished = True
        self.completion_tokens += len(token_ids)
        return Piece(text + stop if self._include_stop else text, token_ids, logprobs, FinishReason.STOP, stop)
