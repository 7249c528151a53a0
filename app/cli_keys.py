"""`shoal keys`: make, list and revoke API keys, and limit tenants.

Talks to Redis directly, so it works before any gateway runs and while one is down. Where Redis is comes from
`app.cli_place`; what a key is from `actors.stores.keys`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import msgspec
import typer
from redis.asyncio import Redis
from rich.table import Table
from rich.text import Text

from actors.policies.limits import UNLIMITED, Limits
from actors.stores.key_records import SCOPES, KeyRecord
from actors.stores.keys import KeyStore
from actors.stores.pepper import load_pepper
from actors.stores.redis import translated
from actors.types import PriorityClass
from app.cli_output import CliError, ExitCode, print_json, printable, say, stdout
from app.cli_place import Config, DataDir, PepperFile, RedisUrl, place, run

_DURATION = re.compile(r"([0-9]{1,9})([smhdw])")
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}

app = typer.Typer(no_args_is_help=True, help="API keys and limits.")


def _store(redis: Redis) -> KeyStore:
    return KeyStore(redis, pepper=b"")  # reading records and revoking need no pepper


def duration_s(text: str) -> int:
    """Seconds of "30d", "12h", "45m", "90s" or "2w"."""
    match = _DURATION.fullmatch(text.strip().lower())
    if match is None or not int(match[1]):
        raise typer.BadParameter("must be like 30d, 12h, 45m, 90s or 2w")
    return int(match[1]) * _UNIT_S[match[2]]


@app.command()
def create(  # noqa: PLR0913  one argument per option
    *,
    tenant: Annotated[str, typer.Option(help="Whose key it is; tenants never see each other's data.")],
    name: Annotated[str, typer.Option(help="What its owner calls it.")] = "",
    priority: Annotated[
        PriorityClass, typer.Option("--class", help="Which of the queue's classes its requests are in.")
    ] = PriorityClass.STANDARD,
    scope: Annotated[
        list[str] | None,
        typer.Option(
            help=f"What it may do: {', '.join(SCOPES)}; give it once per scope.",
            show_default="inference and documents",
        ),
    ] = None,
    expires_in: Annotated[
        int | None,
        typer.Option(parser=duration_s, metavar="30d", help="When it ends.", show_default="never"),
    ] = None,
    rpm: Annotated[
        int | None, typer.Option(min=1, help="Requests per minute of this key.", show_default="unlimited")
    ] = None,
    tpm: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens per minute of this key, prompt and answer.", show_default="unlimited"
        ),
    ] = None,
    config: Config = None,
    data_dir: DataDir = None,
    redis_url: RedisUrl = None,
    pepper_file: PepperFile = None,
) -> None:
    """Make a key and print it, once.

    The key alone goes to stdout:  export SHOAL_API_KEY=$(shoal keys create --tenant acme)
    """
    where = place(config, data_dir, redis_url, pepper_file)

    async def work(redis: Redis) -> tuple[str, KeyRecord]:
        try:
            pepper = load_pepper(where.auth.pepper_file, where.storage)
        except ValueError as error:
            raise CliError(str(error), ExitCode.USAGE) from None
        return await KeyStore(redis, pepper).create(
            tenant,
            priority=priority,
            scopes=scope or ["inference", "documents"],
            name=name,
            expires_in_s=expires_in,
            limits=Limits(requests_per_minute=rpm, tokens_per_minute=tpm),
        )

    key, record = run(where, work)
    say(f"key {record.id} of tenant {record.tenant}. It is shown once and cannot be shown again:")
    typer.echo(key)


@app.command("list")
def list_keys(  # noqa: PLR0913  one argument per option
    *,
    tenant: Annotated[str | None, typer.Option(help="Of this tenant only.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Records as JSON.")] = False,
    config: Config = None,
    data_dir: DataDir = None,
    redis_url: RedisUrl = None,
    pepper_file: PepperFile = None,
) -> None:
    """Show all keys, revoked and expired ones too; never a secret."""

    async def work(redis: Redis) -> tuple[list[KeyRecord], int]:
        records = await _store(redis).list(tenant)
        async with translated("keys"):
            return records, (await redis.time())[0]

    records, now = run(place(config, data_dir, redis_url, pepper_file), work)
    if as_json:
        print_json([{**msgspec.to_builtins(record), "state": state(record, now)} for record in records])
    elif records:
        stdout().print(_table(records, now))
    else:
        say("there are no keys; make one with: shoal keys create --tenant NAME")


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="The id that `shoal keys list` shows.")],
    config: Config = None,
    data_dir: DataDir = None,
    redis_url: RedisUrl = None,
    pepper_file: PepperFile = None,
) -> None:
    """End a key for good. Gateways refuse it at once, those cut off from Redis as soon as they are back."""
    where = place(config, data_dir, redis_url, pepper_file)
    record = run(where, lambda redis: _store(redis).revoke(_public_id(key_id)))
    say(f"key {record.id} of tenant {record.tenant} is revoked")


@app.command()
def limits(  # noqa: PLR0913  one argument per option
    *,
    tenant: Annotated[str, typer.Argument(help="Whose keys.")],
    rpm: Annotated[int | None, typer.Option(min=1, help="Requests per minute.")] = None,
    tpm: Annotated[int | None, typer.Option(min=1, help="Tokens per minute, prompt and answer.")] = None,
    unlimited: Annotated[bool, typer.Option("--unlimited", help="Take both limits away.")] = False,
    config: Config = None,
    data_dir: DataDir = None,
    redis_url: RedisUrl = None,
    pepper_file: PepperFile = None,
) -> None:
    """Limit all of a tenant's keys together; without an option, show the limits.

    What is not named stays as it is. In force everywhere within 30 seconds.
    """
    if unlimited and (rpm or tpm):
        raise CliError("--unlimited excludes --rpm and --tpm", ExitCode.USAGE)
    changes = {
        name: value
        for name, value in (("requests_per_minute", rpm), ("tokens_per_minute", tpm))
        if value is not None
    }

    async def work(redis: Redis) -> Limits:
        store = _store(redis)
        wanted = UNLIMITED if unlimited else replace(await store.tenant_limits(tenant), **changes)
        if unlimited or changes:
            await store.set_tenant_limits(tenant, wanted)
        return wanted

    found = run(place(config, data_dir, redis_url, pepper_file), work)
    typer.echo(f"{tenant}: {_limits(found)}")


def _public_id(text: str) -> str:
    """The id, also of a whole key: whoever must end a leaked key may have nothing else at hand."""
    match = re.fullmatch(r"sk-([0-9a-f]{16})-.*", text)
    return match[1] if match else text


# --- how records look --------------------------------------------------------------------------------


def state(record: KeyRecord, now: int) -> str:
    """Whether a key opens anything; `now` is the Redis server's clock."""
    if record.revoked_at is not None:
        return "revoked"
    return "expired" if record.expires_at is not None and now >= record.expires_at else "active"


def _table(records: Sequence[KeyRecord], now: int) -> Table:
    table = Table("id", "tenant", "name", "class", "scopes", "per minute", "created", "expires", "state")
    for record in records:
        table.add_row(
            record.id,
            record.tenant,
            Text(printable(record.name)),
            record.priority.value,
            ", ".join(record.scopes),
            _limits(record.limits),
            _date(record.created_at),
            _date(record.expires_at) if record.expires_at else "never",
            state(record, now),
        )
    return table


def _limits(found: Limits) -> str:
    parts = [
        f"{value:,} {unit}"
        for value, unit in ((found.requests_per_minute, "requests"), (found.tokens_per_minute, "tokens"))
        if value is not None
    ]
    return ", ".join(parts) or "unlimited"


def _date(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
