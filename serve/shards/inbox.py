"""What other threads want of the engine thread: a queue that it empties between steps."""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Inbox(Generic[Item]):
    """Many writers, one reader."""

    def __init__(self) -> None:
        self._items: deque[Item] = deque()
        self._is_filled = threading.Event()

    def put(self, item: Item) -> None:
        """Add an item; never blocks."""
        self._items.append(item)
        self._is_filled.set()

    def wait(self) -> None:
        """Block until there is an item."""
        self._is_filled.wait()

    def take_all(self) -> list[Item]:
        """Everything that is there, oldest first; may be empty."""
        self._is_filled.clear()
        items = []
        while self._items:
            items.append(self._items.popleft())
        return items
