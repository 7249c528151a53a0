"""`shoal jobs`: what waits, what was given up, and putting it back.

Talks to Redis directly, like `shoal keys`: it works while the gateways are down.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import msgspec
import typer
from redis.asyncio import Redis
from rich.table import Table

from actors.errors import NotFound
from actors.policies.batches import KIND as BATCH
from actors.policies.ingestion import KIND as INGESTION
from actors.policies.responses import KIND as RESPONSE
from actors.policies.webhooks import KIND as WEBHOOK
from actors.stores.job_records import Job, JobStats
from actors.stores.jobs import JobLog
from app.cli_output import CliError, one_line, print_json, say, stdout
from app.cli_place import Config, DataDir, RedisUrl, place, run

KINDS = (RESPONSE, BATCH, WEBHOOK, INGESTION)

app = typer.Typer(no_args_is_help=True, help="Durable jobs and dead letters.")

JobId = Annotated[str, typer.Argument(help="Id of the job, or of its response or batch.")]


@app.command("list")
def list_jobs(
    *,
    count: Annotated[int, typer.Option(min=1, max=10_000, help="Most dead letters of each kind.")] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    config: Config = None,
    data_dir: DataDir = None,
    redis_url: RedisUrl = None,
) -> None:
    """Show how much is pending, and the dead letters, newest first."""

    async def work(redis: Redis) -> tuple[dict[str, JobStats], list[tuple[str, Job]]]:
        log = JobLog(redis)
        stats = await asyncio.gather(*(log.stats(kind) for kind in KINDS))
        dead = [(kind, job) for kind in KINDS for job in await log.dead_letters(kind, count)]
        return dict(zip(KINDS, stats, strict=True)), dead

    pending, dead = run(place(config, data_dir, redis_url, None), work)
    if as_json:
        print_json({"pending": pending, "dead": [_shown(kind, job) for kind, job in dead]})
        return
    for kind, stats in pending.items():
        say(
            f"{kind}: {stats.waiting} waiting, {stats.leased} running, {stats.delayed} to be tried again, "
            f"oldest {stats.oldest_age_s:.0f} s"
        )
    table = Table("id", "kind", "tenant", "attempts", "deaths", "why")
    for kind, job in dead:
        counts = (str(job.attempts), str(job.deaths))
        table.add_row(job.job_id, kind, job.tenant, *counts, one_line(job.error, 80))
    if dead:
        stdout().print(table)
    else:
        say("no dead letters")


@app.command()
def show(
    job_id: JobId, *, config: Config = None, data_dir: DataDir = None, redis_url: RedisUrl = None
) -> None:
    """Show one dead letter with everything that it asks for, as JSON."""

    async def work(redis: Redis) -> tuple[str, Job]:
        return await _found(JobLog(redis), job_id)

    kind, job = run(place(config, data_dir, redis_url, None), work)
    print_json({**_shown(kind, job), "payload": job.payload})


@app.command()
def replay(
    job_id: JobId, *, config: Config = None, data_dir: DataDir = None, redis_url: RedisUrl = None
) -> None:
    """Put a dead letter back: it runs again from its beginning."""

    async def work(redis: Redis) -> str:
        log = JobLog(redis)
        kind, job = await _found(log, job_id)
        await log.replay(kind, job.job_id)
        return kind

    say(f"put back into the log of kind {run(place(config, data_dir, redis_url, None), work)}")


async def _found(log: JobLog, job_id: str) -> tuple[str, Job]:
    bare = job_id.removeprefix("resp_").removeprefix("batch_")
    for kind in KINDS:
        try:
            return kind, await log.dead_letter(kind, bare)
        except NotFound:
            continue
    raise CliError(f"no dead letter {one_line(job_id, 80)}; see `shoal jobs list`")


def _shown(kind: str, job: Job) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.to_builtins(job)
    del fields["payload"]
    return {"kind": kind, **fields}
