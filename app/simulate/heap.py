"""A binary heap of integers in a row of an array, for compiled code."""

from __future__ import annotations

from typing import Any

from app.simulate.compiled import compiled


@compiled
def push(heap: Any, size: int, key: int) -> None:
    """Add a key to the first `size` ones."""
    at = size
    while at > 0 and heap[(at - 1) >> 1] > key:
        heap[at] = heap[(at - 1) >> 1]
        at = (at - 1) >> 1
    heap[at] = key


@compiled
def pop(heap: Any, size: int) -> int:
    """Take the least of `size` keys."""
    least = heap[0]
    key = heap[size - 1]
    at, child = 0, 1
    while child < size - 1:
        if child + 1 < size - 1 and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= key:
            break
        heap[at] = heap[child]
        at, child = child, 2 * child + 1
    heap[at] = key
    return int(least)
