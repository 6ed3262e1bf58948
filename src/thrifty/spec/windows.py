"""Windows in which a long text is scored: the one definition behind bits per byte and perplexity."""

from collections.abc import Iterator


def scoring_windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Triples (begin, scored, stop): feed tokens begin … stop - 2, which predict and so score scored … stop - 1.

    The text has `length` tokens, of which token 0 is given. At most `window` tokens are fed; each window but the first
    scores `stride` new tokens, so that they see at least window - stride tokens before them. Every token from 1 on is
    scored exactly once.
    """
    scored = 1
    while scored < length:
        # The window's last input predicts the token after it.
        stop = min(scored + (window if scored == 1 else stride), length)
        yield max(0, stop - 1 - window), scored, stop
        scored = stop
