"""What several threads make, taken in order, few at a time."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def made_in_order(makes: Iterable[Callable[[], T]], n_threads: int = 2) -> Iterator[T]:
    """What each of `makes` gives, in order, while `n_threads` of them run: at most that many wait to be taken."""
    with ThreadPoolExecutor(n_threads) as pool:
        ahead: deque[Future[T]] = deque()
        try:
            for make in makes:
                ahead.append(pool.submit(make))
                if len(ahead) == n_threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
