"""Where API keys are kept, as `shoal keys` is told: a Serve config file, options, or the local data directory.

Owns the options and the connection to Redis. `app.cli_keys` uses both.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import typer
import yaml
from pydantic import ValidationError
from redis.asyncio import Redis

from actors.errors import Unavailable
from actors.stores.config import StorageConfig
from actors.stores.keys import AuthConfig
from actors.stores.redis import connect, translated
from app.cli_output import CliError, ExitCode, say

T = TypeVar("T")

_GATEWAY = "app.main:build_gateway"
_LOCAL_STORES = "app.main:build_local_services"
_TIMEOUT_S = 3.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where keys are kept."""

    storage: StorageConfig
    auth: AuthConfig
    name: str  # for messages; never the URL, which may hold a password
    hint: str  # what to do when nothing answers there


_PANEL = "Where keys are kept"
Config = Annotated[
    Path | None,
    typer.Option(
        help="Serve config file: `storage` and `auth` of its gateway application.",
        exists=True,
        dir_okay=False,
        rich_help_panel=_PANEL,
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(help="Data directory of a local Shoal.", show_default="~/.shoal", rich_help_panel=_PANEL),
]
RedisUrl = Annotated[
    str | None,
    typer.Option(
        help="Outside Redis, or env:NAME for the value of an environment variable.", rich_help_panel=_PANEL
    ),
]
PepperFile = Annotated[
    Path | None,
    typer.Option(help="The gateways' auth.pepper_file; needed with --redis-url.", rich_help_panel=_PANEL),
]


def place(
    config: Path | None, data_dir: Path | None, redis_url: str | None, pepper_file: Path | None
) -> Place:
    """Decide from the options.

    Raises:
        CliError: the file is no Serve config of ours, or options exclude each other.
    """
    if config is not None:
        if data_dir or redis_url or pepper_file:
            raise CliError(
                "--config excludes --data-dir, --redis-url and --pepper-file: it says all that they say",
                ExitCode.USAGE,
            )
        return _configured(config)
    try:
        storage = StorageConfig.model_validate(
            {"redis_url": redis_url, **({"data_dir": data_dir} if data_dir else {})}
        )
    except ValidationError as error:
        raise CliError(f"--redis-url: {error.errors()[0]['msg']}", ExitCode.USAGE) from None
    return _place(storage, AuthConfig(pepper_file=pepper_file), "serve run configs/local.yaml")


def _configured(path: Path) -> Place:
    try:
        content = yaml.safe_load(path.read_text())
        args = next(
            application.get("args") or {}
            for application in content["applications"]
            if application["import_path"] == _GATEWAY
        )
        starts_stores = _LOCAL_STORES in [
            application["import_path"] for application in content["applications"]
        ]
        storage = StorageConfig.model_validate(args.get("storage", {}))
        auth = AuthConfig.model_validate(args.get("auth", {}))
    except ValidationError as error:
        found = error.errors()[0]
        field = ".".join(str(part) for part in found["loc"])
        raise CliError(f"{path}: {error.title}.{field}: {found['msg']}", ExitCode.USAGE) from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise CliError(f"{path} is not YAML", ExitCode.USAGE) from None
    except (LookupError, TypeError, AttributeError, StopIteration):
        raise CliError(
            f"{path} is no Serve config with an application of {_GATEWAY}", ExitCode.USAGE
        ) from None
    if auth.mode == "open":
        say(f"note: {path} sets auth.mode to open: its gateway asks for no key")
    return _place(
        storage, auth, f"serve run {path}" if starts_stores else f"a config that has {_LOCAL_STORES}"
    )


def _place(storage: StorageConfig, auth: AuthConfig, start: str) -> Place:
    if storage.redis_url is None:
        name, hint = f"the local key store, {storage.valkey_socket}", f"start Shoal with: {start}"
    else:
        name, hint = "the Redis of redis_url", "start it, or check the address and the password"
    return Place(storage=storage, auth=auth, name=name, hint=hint)


@asynccontextmanager
async def _redis(where: Place) -> AsyncIterator[Redis]:
    """A connection that works.

    Raises:
        CliError: nothing answers.
    """
    try:
        redis = connect(where.storage.effective_redis_url, timeout_s=_TIMEOUT_S, client_name="shoal-cli")
    except ValueError as error:  # the address itself, or the variable that should hold it
        raise CliError(str(error), ExitCode.USAGE) from None
    try:
        async with translated("keys"):
            await redis.ping()
        yield redis
    except Unavailable:
        raise CliError(f"cannot reach {where.name}; {where.hint}", ExitCode.UNREACHABLE) from None
    finally:
        await redis.aclose()


def run(where: Place, work: Callable[[Redis], Awaitable[T]]) -> T:
    """Connect and do `work`.

    Raises:
        CliError: nothing answers there.
    """

    async def connected() -> T:
        async with _redis(where) as redis:
            return await work(redis)

    return asyncio.run(connected())
