"""Machine code for the simulator's inner loop where numba is installed; the same functions run without it.

numba comes with vLLM and with the extra `simulate`. Without it a trace of an hour takes minutes instead of a
second; the results are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    from numba import njit

    compiled: Callable[..., Any] = njit(cache=True)
except ImportError:

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        """The function itself."""
        return function
