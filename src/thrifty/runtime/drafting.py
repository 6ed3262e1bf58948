"""Speculative drafting by n-grams: what followed the last words before is proposed, and one step checks all of it."""

from thrifty.errors import ThriftyError

#: Tokens that must have occurred before, the longer first, for what followed them to be proposed.
_NGRAMS = (6, 4, 2)
#: Most tokens that pass without a draft after drafts that were wrong from their first token on.
_LONGEST_PAUSE = 64


class Drafting:
    """How many tokens a draft may have, and how many were `proposed` and `accepted` so far.

    A step that checks a draft of n tokens computes n + 1 positions, whose logits have the bits of n + 1 steps; tokens
    are chosen from them in order, by the same random numbers, until one differs from the draft. So the text is the one
    without drafting. Prompt lookup decoding (A. Saxena, 2023), checked as in arXiv 2211.17192, section 2.
    """

    def __init__(self, longest: int) -> None:
        """longest: most tokens of a draft; 0 for none."""
        if longest < 0:
            raise ThriftyError(f"[generate] draft must be a number of tokens, at least 0; got {longest}")
        self.longest = longest
        self.proposed = 0
        self.accepted = 0


class Drafter:
    """Drafts for one sequence.

    A draft that holds to its end doubles the next one, up to the longest; one that does not sets its length to what
    held. One that is wrong from the start is followed by a pause, twice as long each time.
    """

    def __init__(self, drafting: Drafting, most: int) -> None:
        """most: tokens that one step can check."""
        self._drafting = drafting
        self._longest = min(drafting.longest, most)
        self._length = max(1, self._longest // 2)
        self._pause = 0
        self._waiting = 0
        #: Where the latest n-gram with a token after it ends, by n.
        self._ends: dict[int, dict[tuple[int, ...], int]] = {n: {} for n in _NGRAMS}
        self._indexed = 0
        #: Tokens of the last proposal, and how many of them were chosen.
        self._size = 0
        self._held = 0

    def propose(self, seen: list[int], room: int) -> list[int]:
        """Tokens that may follow `seen`, at most `room`; none where nothing suggests any."""
        if self._longest == 0:
            return []
        self._learn()
        self._index(seen)
        if self._waiting > 0:
            self._waiting -= 1
            return []
        end = next((end for n in _NGRAMS if (end := self._ends[n].get(tuple(seen[-n:])))), None)
        if end is None:
            return []
        self._size = min(self._length, room)
        self._drafting.proposed += self._size
        # What repeats within the draft's length goes on repeating.
        return [seen[end + i % (len(seen) - end)] for i in range(self._size)]

    def accept(self) -> None:
        """Count a token of the last proposal that was chosen."""
        self._drafting.accepted += 1
        self._held += 1

    def _learn(self) -> None:
        """Take from the last proposal how long the next may be, and when."""
        size, held = self._size, self._held
        self._size = self._held = 0
        if size == 0:
            return
        self._length = min(2 * self._length, self._longest) if held == size else max(1, held)
        if held > 0:
            self._pause = 0
        else:
            self._pause = min(2 * self._pause + 1, _LONGEST_PAUSE)
            self._waiting = self._pause

    def _index(self, seen: list[int]) -> None:
        for end in range(self._indexed, len(seen)):
            for n in _NGRAMS:
                if end >= n:
                    self._ends[n][tuple(seen[end - n : end])] = end
        self._indexed = len(seen)
