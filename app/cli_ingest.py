"""`shoal ingest`: local files into a vector store, through the public HTTP API.

Owns the command and its report. Which files, and what is done about each, is decided in `app.cli_ingest_plan`;
`app.cli_ingest_run` does it. The work is the server's: leaving early stops the watching and the uploads that
have not ended, nothing else.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, get_args

import typer

from app.cli_http import DEFAULT_URL, Api, ApiKey, Url
from app.cli_ingest_plan import Found, LocalFile, StoredFile, find, hashed, plan, stored
from app.cli_ingest_run import PURPOSE, Outcome, Run, Work, in_words
from app.cli_output import CliError, ExitCode, say
from app.cli_stores import store_named

_UPLOADS_PER_PAGE = "10000"  # the most that OpenAI's API gives


def ingest(
    *,
    paths: Annotated[list[Path], typer.Argument(exists=True, help="Folders and files.", metavar="PATH")],
    store: Annotated[str, typer.Option(help="Name or id of the vector store; made if there is none.")],
    pattern: Annotated[
        list[str] | None,
        typer.Option(
            help="Take only files that match this glob, as '*.md' or 'guide/*'; give it once per glob."
        ),
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = "",
) -> None:
    """Put documents into a vector store and wait until they can be searched.

    Run it again at any time: files that are there already are not sent again, changed ones replace their old
    version. Ctrl-C stops watching; what was uploaded goes on being ingested.
    """
    found = find(paths, pattern or [])
    for name, why in found.skipped:
        say(f"skipped {name}: {why}")
    if not found.files:
        raise CliError("there is no file to ingest" + (" that matches --pattern" if pattern else ""))
    failed = asyncio.run(_ingest(found, store, url, api_key))
    if failed:
        raise typer.Exit(ExitCode.FAILED)


async def _ingest(found: Found, store: str, url: str, api_key: str) -> int:
    async with Api(url, api_key) as api:
        store_id = await store_named(api, store, create=True)
        files, unread = await _hashes(found.files)
        run = Run(api, store_id, plan(files, await _stored(api, store_id)), unread)
        try:
            await run.finish()
        except asyncio.CancelledError:
            say(run.left_early())
            raise
    counts = Counter(work.outcome for work in run.work)
    counts["skipped"] += len(found.skipped)
    for work in run.work:
        if work.outcome == "failed":
            say(f"failed  {work.file.name}: {work.why}")
    parts = [f"{counts[outcome]} {outcome}" for outcome in get_args(Outcome) if counts[outcome]]
    typer.echo(f"{store} ({store_id}): {', '.join(parts)}")
    return counts["failed"]


async def _stored(api: Api, store_id: str) -> list[StoredFile]:
    attached = [wire async for wire in api.pages(f"/v1/vector_stores/{store_id}/files")]
    if not attached:
        return []
    uploads = api.pages("/v1/files", purpose=PURPOSE, limit=_UPLOADS_PER_PAGE)
    sha256_of = {file["id"]: str(file.get("sha256", "")) async for file in uploads}
    return [stored(wire, sha256_of) for wire in attached]


async def _hashes(files: Sequence[LocalFile]) -> tuple[list[LocalFile], list[Work]]:
    read, unread = [], []
    for file in files:
        try:
            read.append(await asyncio.to_thread(hashed, file))
        except OSError as error:
            unread.append(Work(file=file, outcome="failed", why=in_words(error)))
    return read, unread
