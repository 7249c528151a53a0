"""Files as the API shows them, pages of anything, and what may be uploaded.

`app.api.files` and `app.api.vector_stores` call it. It knows no HTTP.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Any, TypeVar, get_args

from actors.errors import InvalidRequest
from actors.stores.catalog_records import FileRecord, Page, Purpose
from app.schemas.bad_input import shown

T = TypeVar("T")
PURPOSES: tuple[Purpose, ...] = tuple(one for one in get_args(Purpose) if one != "batch_output")
_NAME_CHARS = 255


def file_object(file: FileRecord) -> dict[str, Any]:
    """OpenAI's `file`; `sha256` is ours, so that clients can tell what is there already."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at,
        "expires_at": None,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
        "sha256": file.sha256,
    }


def list_object(page: Page[T], shape: Callable[[T], dict[str, Any]]) -> dict[str, Any]:
    """OpenAI's page of a list."""
    data: Sequence[dict[str, Any]] = [shape(item) for item in page.items]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": page.has_more,
    }


def deleted_object(kind: str, id_: str) -> dict[str, Any]:
    """OpenAI's answer to a deletion; `kind` is "file", "vector_store.deleted" or the like."""
    return {"id": id_, "object": kind, "deleted": True}


def purpose_of(value: object) -> Purpose:
    """What an uploaded file is for.

    Raises:
        InvalidRequest: nothing, or something that Shoal has no use for.
    """
    for purpose in PURPOSES:
        if value == purpose:
            return purpose
    given = f"; got '{shown(value)}'" if value else " and is required"
    raise InvalidRequest(f"purpose must be one of {', '.join(PURPOSES)}{given}", "purpose")


def clean_filename(raw: str | None) -> str:
    """The last part of a name as a client sent it, without anything that is no text; "file" when nothing is left.

    A name never becomes a path of ours; this protects whoever saves it.
    """
    last = PurePosixPath((raw or "").replace("\\", "/")).name
    printable = "".join(char for char in last if unicodedata.category(char)[0] != "C").strip()
    if len(printable) > _NAME_CHARS:
        suffix = PurePosixPath(printable).suffix[:32]
        printable = printable[: _NAME_CHARS - len(suffix)] + suffix
    return printable if printable.strip(".") else "file"
