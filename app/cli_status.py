"""`shoal status`: what runs and what is stored, as one HTTP client sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from app.cli_http import DEFAULT_URL, Api, ApiError, ApiKey, Url
from app.cli_output import ExitCode, print_json, printable, say, stdout


@dataclass(kw_only=True, slots=True)
class Status:
    """Everything that is shown; also the JSON."""

    url: str
    ready: bool = False
    components: dict[str, str] = field(default_factory=dict)  # component → "ready" or why not
    models: list[dict[str, Any]] = field(default_factory=list)
    vector_stores: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # what could not be asked, and why


def status(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as JSON.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = "",
) -> None:
    """Show components, models and vector stores; exit code 1 while a component is not ready."""
    found = asyncio.run(ask_all(Api(url, api_key)))
    if as_json:
        print_json(asdict(found))
    else:
        _show(found)
    if not found.ready:
        raise typer.Exit(ExitCode.FAILED)


async def ask_all(api: Api) -> Status:
    """Ask for each part by itself: one that is refused does not hide the others.

    Raises:
        CliError: nothing answers.
    """
    found = Status(url=api.url)
    async with api:
        try:
            found.components = (await api.call("GET", "/readyz"))["components"]
            found.ready = True
        except ApiError as error:
            found.problems.append(error.reason)
        try:
            found.models = (await api.call("GET", "/v1/models"))["data"]
        except ApiError as error:
            found.problems.append(f"models: {error.message}")
        try:
            found.vector_stores = [store async for store in api.pages("/v1/vector_stores")]
        except ApiError as error:
            found.problems.append(f"vector stores: {error.message}")
    return found


def _show(found: Status) -> None:
    out = stdout()
    out.print(f"{found.url} is {'ready' if found.ready else 'not ready'}", markup=False)
    if found.components:
        out.print(_table(("component", "state"), found.components.items()))
    if found.models:
        rows = [(model["id"], str(model.get("max_model_len", ""))) for model in found.models]
        out.print(_table(("model", "context tokens"), rows))
    if found.vector_stores:
        columns = ("vector store", "id", "files", "completed", "in progress", "failed", "bytes")
        out.print(_table(columns, [_store_row(store) for store in found.vector_stores]))
    for problem in found.problems:
        say(problem)


def _store_row(store: dict[str, Any]) -> tuple[str, ...]:
    counts = store.get("file_counts") or {}
    numbers = [counts.get(name, 0) for name in ("total", "completed", "in_progress", "failed")]
    sizes = [f"{number:,}" for number in (*numbers, store.get("usage_bytes") or 0)]
    return (str(store.get("name") or ""), store["id"], *sizes)


def _table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Table:
    table = Table(*columns)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table
