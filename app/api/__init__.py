"""FastAPI routers, one file per OpenAI resource."""
