"""The retriever as the gateway calls it. What a search does is `actors.retriever`."""

from __future__ import annotations

from typing import Any

from actors.handles.call import deployment_handle, result
from actors.types import RetrievalQuery, RetrievalResult

RETRIEVER_DEPLOYMENT = "Retriever"
_WAY_SHARE = (
    0.1  # of the time-out is kept for the way there and back, so that a late search can say so itself
)
_MOST_WAY_S = 0.1


class RetrieverClient:
    """The retriever of one retrieval application.

    Args:
        app_name: its Serve application.
    """

    def __init__(self, app_name: str = "retrieval") -> None:
        self._app_name = app_name
        self._handle: Any = None  # made in the event loop that uses it

    async def search(self, query: RetrievalQuery, *, timeout_s: float) -> RetrievalResult:
        """Search; what could not be asked in time is left out and named in `degraded`.

        Args:
            query: the search, with its tenant.
            timeout_s: for all of it.

        Raises:
            NotFound: there is no such vector store.
            InvalidRequest: the query, a filter or a bound is wrong.
            Unavailable, DeadlineExceeded: neither index answered (in time), or no retriever did.
        """
        if self._handle is None:
            handle = deployment_handle(RETRIEVER_DEPLOYMENT, self._app_name)
            self._handle = handle.options(method_name="search", _by_reference=False)
        inside_s = timeout_s - min(_WAY_SHARE * timeout_s, _MOST_WAY_S)
        call = self._handle.remote(query, inside_s)
        found: RetrievalResult = await result(call, timeout_s=timeout_s, what="retriever")
        return found
