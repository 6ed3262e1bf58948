from hypothesis import given
from hypothesis import strategies as st

from thrifty.spec.windows import scoring_windows


@given(st.integers(0, 300), st.integers(1, 64), st.data())
def test_every_token_is_scored_once_and_sees_enough(length, window, data):
    stride = data.draw(st.integers(1, window))
    seen = []
    for begin, scored, stop in scoring_windows(length, window, stride):
        assert 0 <= begin < scored < stop <= length
        assert stop - 1 - begin <= window
        assert scored - begin >= min(scored, window - stride + 1)
        seen += range(scored, stop)
    assert seen == list(range(1, length))
