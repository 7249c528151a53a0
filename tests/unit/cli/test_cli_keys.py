"""`shoal keys` against a real Valkey, and against none."""

import asyncio
import json
import re
import shutil
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from actors.errors import AuthenticationFailed
from actors.local_services import ValkeyServer, ValkeyServerConfig
from actors.stores.config import StorageConfig
from actors.stores.keys import KeyStore
from actors.stores.pepper import load_pepper
from actors.stores.redis import connect
from actors.types import PriorityClass
from app.cli_keys import duration_s

KEY = re.compile(r"sk-([0-9a-f]{16})-[A-Za-z0-9_-]{43}\n")


@pytest.fixture(scope="module")
def storage():
    folder = Path(tempfile.mkdtemp(prefix="shoal-"))  # short: a socket's path has 107 bytes
    storage = StorageConfig(data_dir=folder)
    server = ValkeyServer(ValkeyServerConfig(storage=storage, max_memory_bytes=32 * 2**20))
    yield storage
    server.stop()
    shutil.rmtree(folder)


@pytest.fixture
def keys(run, storage):
    return lambda *words, **env: run("keys", *words, "--data-dir", storage.data_dir, **env)


def authenticate(storage, key):
    async def ask():
        async with connect(storage.effective_redis_url) as redis:
            store = KeyStore(redis, load_pepper(None, storage))
            try:
                return await store.authenticate(f"Bearer {key}")
            finally:
                await store.aclose()

    return asyncio.run(ask())


def as_config(tmp_path, **args):
    applications = [
        {"name": "m", "import_path": "app.main:build_model", "args": {"model": "m"}},
        {"name": "gateway", "import_path": "app.main:build_gateway", "args": args},
    ]
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump({"applications": applications}))
    return path


def test_a_key_is_printed_alone_on_stdout_and_opens_the_door(keys, storage):
    result = keys(
        "create", "--tenant", "acme", "--name", "[bold]ci", "--class", "batch", "--scope", "inference",
        "--expires-in", "30d", "--rpm", 60, "--tpm", 9000,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert KEY.fullmatch(result.stdout)
    assert "cannot be shown again" in result.stderr
    found = authenticate(storage, result.stdout.strip())
    assert found.principal.tenant == "acme"
    assert found.principal.priority is PriorityClass.BATCH
    assert found.principal.scopes == ("inference",)
    assert (found.limits.requests_per_minute, found.limits.tokens_per_minute) == (60, 9000)


def test_keys_are_listed_without_their_secret_and_revoked_by_id_or_by_the_whole_key(keys, storage):
    key = keys("create", "--tenant", "beta", "--name", "[red]x").stdout.strip()
    shown = keys("list").stdout
    assert "[red]x" in shown
    assert key not in shown
    assert key.split("-")[2] not in keys("list", "--json").stdout
    assert json.loads(keys("list", "--tenant", "beta", "--json").stdout)[0]["state"] == "active"
    assert keys("revoke", key).exit_code == 0
    assert json.loads(keys("list", "--tenant", "beta", "--json").stdout)[0]["state"] == "revoked"
    with pytest.raises(AuthenticationFailed, match="revoked"):
        authenticate(storage, key)
    missing = keys("revoke", "0123456789abcdef")
    assert (missing.exit_code, missing.stderr) == (
        1,
        "error: there is no API key '0123456789abcdef' (not_found)\n",
    )


def test_an_expired_key_is_listed_as_expired(keys, monkeypatch):
    keys("create", "--tenant", "gamma", "--expires-in", "1s")
    time.sleep(1.1)
    (record,) = json.loads(keys("list", "--tenant", "gamma", "--json").stdout)
    assert record["state"] == "expired"


def test_limits_of_a_tenant_change_one_by_one(keys):
    assert keys("limits", "acme", "--rpm", 100).stdout == "acme: 100 requests\n"
    assert keys("limits", "acme", "--tpm", 5000).stdout == "acme: 100 requests, 5,000 tokens\n"
    assert keys("limits", "acme").stdout == "acme: 100 requests, 5,000 tokens\n"
    assert keys("limits", "acme", "--unlimited").stdout == "acme: unlimited\n"
    assert keys("limits", "acme", "--unlimited", "--rpm", 1).exit_code == 2


def test_bad_input_names_what_is_allowed(keys):
    bad_scope = keys("create", "--tenant", "acme", "--scope", "everything")
    assert bad_scope.exit_code == 1
    assert "inference, documents, admin" in bad_scope.stderr
    assert "1 to 64 letters" in keys("create", "--tenant", "a{b}").stderr
    assert "must be like 30d" in keys("create", "--tenant", "acme", "--expires-in", "soon").stderr
    assert keys("create", "--tenant", "acme", "--class", "vip").exit_code == 2
    assert [duration_s(text) for text in ("90s", "2m", "1h", "30d", "1W")] == [
        90,
        120,
        3600,
        2_592_000,
        604_800,
    ]


def test_a_serve_config_says_where_the_keys_are(run, storage, tmp_path):
    pepper = tmp_path / "pepper"
    pepper.write_text("p" * 32)
    config = as_config(
        tmp_path, storage={"redis_url": "env:SOME_REDIS"}, auth={"mode": "keys", "pepper_file": str(pepper)}
    )
    made = run(
        "keys", "create", "--tenant", "delta", "--config", config, SOME_REDIS=storage.effective_redis_url
    )
    assert KEY.fullmatch(made.stdout), made.output
    unset = run("keys", "list", "--config", config)
    assert (unset.exit_code, "SOME_REDIS is not set" in unset.stderr) == (2, True)
    both = run("keys", "list", "--config", config, "--data-dir", tmp_path)
    assert (both.exit_code, "--config excludes" in both.stderr) == (2, True)


def test_a_gateway_in_open_mode_is_pointed_out(run, storage, tmp_path):
    config = as_config(tmp_path, storage={"data_dir": str(storage.data_dir)}, auth={"mode": "open"})
    result = run("keys", "list", "--config", config)
    assert result.exit_code == 0, result.output
    assert "its gateway asks for no key" in result.stderr


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("applications: [", "is not YAML"),
        ("applications: []", "no Serve config with an application of app.main:build_gateway"),
        ("just text", "no Serve config"),
    ],
)
def test_a_file_that_is_no_config_is_refused(run, tmp_path, content, words):
    path = tmp_path / "x.yaml"
    path.write_text(content)
    result = run("keys", "list", "--config", path)
    assert result.exit_code == 2
    assert words in result.stderr


def test_a_misspelt_key_in_the_config_is_named(run, tmp_path):
    result = run("keys", "list", "--config", as_config(tmp_path, storage={"redis": "redis://x"}))
    assert result.exit_code == 2
    assert "StorageConfig.redis" in result.stderr


def test_without_redis_one_line_says_what_to_start_and_nothing_is_made(run, tmp_path):
    data_dir = tmp_path / "data"
    result = run("keys", "create", "--tenant", "acme", "--data-dir", data_dir)
    assert result.exit_code == 3
    assert result.stderr == (
        f"error: cannot reach the local key store, {data_dir}/valkey/valkey.sock; "
        "start Shoal with: serve run configs/local.yaml\n"
    )
    assert not data_dir.exists()


def test_the_hint_names_a_config_that_starts_the_stores(run, tmp_path):
    config = as_config(tmp_path, storage={"data_dir": str(tmp_path / "data")})
    assert (
        "start Shoal with: a config that has app.main:build_local_services"
        in run("keys", "list", "--config", config).stderr
    )
    content = yaml.safe_load(config.read_text())
    content["applications"].append({"name": "local", "import_path": "app.main:build_local_services"})
    config.write_text(yaml.safe_dump(content))
    assert f"start Shoal with: serve run {config}" in run("keys", "list", "--config", config).stderr


def test_an_outside_redis_needs_the_gateways_pepper_and_its_url_is_never_shown(run, storage):
    url = storage.effective_redis_url
    needed = run("keys", "create", "--tenant", "acme", "--redis-url", url)
    assert (needed.exit_code, "pepper_file must be set" in needed.stderr) == (2, True)
    assert run("keys", "list", "--redis-url", url).exit_code == 0  # reading needs none
    gone = run("keys", "list", "--redis-url", "redis://user:hunter2@127.0.0.1:9")
    assert gone.exit_code == 3
    assert "hunter2" not in gone.output
    wrong = run("keys", "list", "--redis-url", "http://user:hunter2@x")
    assert (wrong.exit_code, "hunter2" in wrong.output) == (2, False)
