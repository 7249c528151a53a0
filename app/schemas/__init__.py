"""Wire models (pydantic) and their translation to the domain."""
