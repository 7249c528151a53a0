"""`/healthz`, `/readyz`, and the API's description when the configuration exposes it. No key is needed.

They say nothing of tenants: probes and load balancers read them.
"""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.exceptions import HTTPException
from starlette.responses import Response

from actors.errors import Unavailable
from app.api.deps import gateway_of
from app.api.errors import JsonResponse

router = APIRouter(include_in_schema=False)


@router.get("/healthz")
async def healthz() -> Response:
    """This process answers."""
    return JsonResponse({"status": "ok"})


@router.get("/readyz")
async def readyz(request: Request) -> Response:
    """All parts are there: 200, or 503 with what is missing."""
    parts = await gateway_of(request.app).ready()
    missing = [f"{part}: {state}" for part, state in sorted(parts.items()) if state != "ready"]
    if missing:
        raise Unavailable(f"not ready: {', '.join(missing)}", retry_after_s=1)
    return JsonResponse({"status": "ready", "components": dict(parts)})


@router.get("/openapi.json")
async def openapi(request: Request) -> Response:
    """The API's description."""
    _require_docs(request)
    description = request.app.openapi()
    # Each body brings the definitions it refers to: their place is among the components.
    schemas = description.setdefault("components", {}).setdefault("schemas", {})
    for path in description["paths"].values():
        for operation in path.values():
            for content in operation.get("requestBody", {}).get("content", {}).values():
                schemas.update(content["schema"].pop("$defs", {}))
    return JsonResponse(description)


@router.get("/docs")
async def docs(request: Request) -> Response:
    """The description as a page."""
    _require_docs(request)
    return get_swagger_ui_html(openapi_url="openapi.json", title=request.app.title)


def _require_docs(request: Request) -> None:
    # The configuration is known only at run time: the routes exist always and answer as if they did not.
    if not gateway_of(request.app).config.expose_docs:
        raise HTTPException(404)
