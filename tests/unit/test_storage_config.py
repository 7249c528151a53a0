from __future__ import annotations

import pytest
from pydantic import ValidationError

from actors.stores.config import StorageConfig

URLS = ("redis_url", "chroma_url", "documents_url")


@pytest.mark.parametrize("field", URLS)
def test_a_url_may_stand_in_an_environment_variable_and_is_read_at_use(field, monkeypatch):
    storage = StorageConfig(**{field: "env:SHOAL_URL"})
    monkeypatch.setenv("SHOAL_URL", "scheme://:secret@host")
    assert getattr(storage, f"effective_{field}") == "scheme://:secret@host"
    assert "secret" not in repr(storage)
    assert "secret" not in storage.model_dump_json()


@pytest.mark.parametrize("field", URLS)
def test_an_unset_variable_is_refused_by_its_name(field, monkeypatch):
    monkeypatch.delenv("SHOAL_URL", raising=False)
    storage = StorageConfig(**{field: "env:SHOAL_URL"})
    with pytest.raises(ValueError, match=f"storage.{field} is env:SHOAL_URL, and .* SHOAL_URL is not set"):
        getattr(storage, f"effective_{field}")


@pytest.mark.parametrize("value", ["env:", "env:$REDIS_URL", "env:redis url"])
def test_what_is_no_variable_name_is_refused_when_the_config_is_read(value):
    with pytest.raises(ValidationError, match="name of an environment variable"):
        StorageConfig(redis_url=value)


def test_a_plain_url_is_taken_as_it_is_and_none_means_local():
    assert StorageConfig(chroma_url="http://chroma:8000").effective_chroma_url == "http://chroma:8000"
    assert StorageConfig().effective_redis_url.startswith("unix:///")
