"""The threads that run functions in generated C++."""

from __future__ import annotations

import threading
import weakref
from typing import Any


class Team:
    """Threads that stay, of one function or of several that run one after the other.

    A thread that has just worked waits awake for a moment. With threads of their own, the functions of one program
    would keep each other's from the cores: a target's would wait awake while a draft's want to begin.
    """

    def __init__(self, library: Any, threads: int) -> None:
        """`library` is any that codegen.cpp.library.load gave; what it opens may work for the others too."""
        self.library, self.wanted = library, threads
        self.open()

    def open(self) -> None:
        """Start the threads, which end when this is collected."""
        self.lock = threading.Lock()
        """Held while a function runs."""
        self.handle: int = self.library.graft_open(self.wanted)
        weakref.finalize(self, self.library.graft_close, self.handle)

    def check(self) -> None:
        """Start anew in a forked child: the threads are not here, and one that held the lock may not be either."""
        if not self.library.graft_here(self.handle):
            self.open()
