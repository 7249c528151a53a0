"""What the document routes need beside `app.api.deps`: their services, typed, and OpenAI's cursors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Protocol, cast

from fastapi import Depends

from actors.stores.catalog import Catalog
from actors.stores.catalog_records import PageQuery
from actors.stores.documents import DocumentStore
from actors.stores.jobs import JobLog
from actors.telemetry import StageClock
from actors.types import Principal, RetrievalQuery, RetrievalResult
from app.api.deps import DocumentsSession, Services, Session, services

MAX_FILES_PER_PAGE = 10_000


class DocumentServices(Protocol):
    """`app.api.deps.Services` with the stores' own types."""

    catalog: Catalog
    documents: DocumentStore
    jobs: JobLog

    async def search(
        self, principal: Principal, query: RetrievalQuery, clock: StageClock | None = None
    ) -> RetrievalResult:
        """Search the caller's vector stores."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentsCall:
    """An authenticated call on documents."""

    session: Session
    services: DocumentServices

    @property
    def tenant(self) -> str:
        """Whose documents: from the key alone."""
        return self.session.caller.principal.tenant

    @property
    def catalog(self) -> Catalog:
        """The records."""
        return self.services.catalog


async def documents_call(
    session: DocumentsSession, found: Annotated[Services, Depends(services)]
) -> DocumentsCall:
    """Dependency: a key with the scope `documents`, and the services."""
    return DocumentsCall(session=session, services=cast(DocumentServices, found))


def page_query(
    limit: int = 20,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
    before: str | None = None,
) -> PageQuery:
    """Dependency: OpenAI's cursor pagination, 1 to 100 per page."""
    return PageQuery(limit=limit, order=order, after=after, before=before)


def files_page_query(
    limit: int = MAX_FILES_PER_PAGE, order: Literal["asc", "desc"] = "desc", after: str | None = None
) -> PageQuery:
    """Dependency: the same for `GET /v1/files`, whose pages are larger."""
    return PageQuery(limit=limit, order=order, after=after, max_limit=MAX_FILES_PER_PAGE)


Documents = Annotated[DocumentsCall, Depends(documents_call)]
Cursor = Annotated[PageQuery, Depends(page_query)]
FilesCursor = Annotated[PageQuery, Depends(files_page_query)]
