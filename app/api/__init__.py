"""FastAPI routers, one file per OpenAI resource, and `build_api`, which puts them together."""

from __future__ import annotations

from fastapi import FastAPI


def build_api() -> FastAPI:
    """The HTTP application; `serve.ingress` calls it in each gateway replica.

    Free of side effects. The gateway is looked up per request: there is none yet when this runs.
    """
    # Routers import their schemas: whoever only names `build_api` does not pay for them.
    from app.api import batches, chat, completions, embeddings, errors, files, health, models, responses
    from app.api import vector_store_files as store_files
    from app.api import vector_stores as stores
    from app.api.announce import announcing
    from app.api.middleware import RequestEdge

    app = FastAPI(
        title="Shoal",
        lifespan=announcing,
        # Off, or authenticated: app.api.health answers when the configuration exposes them.
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,  # a redirect would quote the Host header
    )
    app.add_middleware(RequestEdge)
    errors.install(app)
    for module in (
        chat,
        completions,
        responses,
        batches,
        embeddings,
        models,
        files,
        stores,
        store_files,
        health,
    ):
        app.include_router(module.router)
    return app
