"""Adapters of durable state: Redis/Valkey and the document store."""
