"""Work on threads: results computed ahead, and writing in the background."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain, islice
from typing import TypeVar

_THREADS = max(2, min(8, os.cpu_count() or 1))
_QUEUED_CALLS = 4

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def background_writer() -> Iterator[Callable[..., None]]:
    """Context manager: a function that calls functions on a thread, one after the other.

    What one of them raises is raised at a later call or at the end.
    """
    waiting: deque[Future] = deque()
    with ThreadPoolExecutor(1) as pool:

        def call(function: Callable[..., None], *arguments: object) -> None:
            while waiting and (len(waiting) >= _QUEUED_CALLS or waiting[0].done()):
                waiting.popleft().result()
            waiting.append(pool.submit(function, *arguments))

        yield call
        while waiting:
            waiting.popleft().result()


def map_ahead(function: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[T, R]]:
    """Yield (item, function(item)) in order. Threads compute ahead; decoding releases the GIL."""
    remaining = iter(items)
    waiting: deque[tuple[T, Future[R]]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        for item in islice(remaining, 2 * _THREADS):
            waiting.append((item, pool.submit(function, item)))
        while waiting:
            item, future = waiting.popleft()
            yield item, future.result()
            for following in islice(remaining, 1):
                waiting.append((following, pool.submit(function, following)))


def map_batches(
    function: Callable[[T], R], batches: Sequence[Sequence[T]]
) -> Iterator[tuple[Sequence[T], list[R]]]:
    """Yield (batch, [function(item) of each item]). Threads compute ahead across batches."""
    results = map_ahead(function, chain.from_iterable(batches))
    for batch in batches:
        yield batch, [result for _, result in islice(results, len(batch))]
