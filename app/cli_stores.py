"""Vector stores by the name that a user gives them; for `shoal ingest`, `ask` and `status`."""

from __future__ import annotations

from app.cli_http import Api
from app.cli_output import CliError, say


async def store_named(api: Api, name: str, *, create: bool = False) -> str:
    """The id of a vector store.

    Args:
        api: where.
        name: its name, or its id, which wins.
        create: make it when there is none.

    Raises:
        CliError: there is none, or several have this name.
    """
    stores = [store async for store in api.pages("/v1/vector_stores")]
    ids = [store["id"] for store in stores if store["id"] == name]
    ids = ids or [store["id"] for store in stores if store.get("name") == name]
    if len(ids) > 1:
        raise CliError(f"{len(ids)} vector stores are named {name!r}; give one's id: {', '.join(ids)}")
    if ids:
        return str(ids[0])
    if not create:
        known = ", ".join(sorted({store["name"] for store in stores if store.get("name")})) or "none"
        raise CliError(f"there is no vector store {name!r}; there are: {known}")
    made = await api.call("POST", "/v1/vector_stores", json={"name": name})
    say(f"made the vector store {name} ({made['id']})")
    return str(made["id"])
