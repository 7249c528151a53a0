"""The two sides of one durable queue, each a process: `python durable_queue_sides.py QUEUE SIDE SOCKET RATE COUNT`.

Called by `durable_queue`. QUEUE is shoal, arq or celery; SIDE is produce or work. The producer enqueues `COUNT` jobs
at `RATE` a second, whatever comes of them; the worker prints, as JSON, how long each took from before it was enqueued
until it was finished and acknowledged. Imports only what its own queue needs: peers have their own environments.
"""

import asyncio
import json
import sys
import time

CONCURRENCY = 16


class Taken:
    """Seconds from enqueue to finish; both clocks are this machine's monotonic one."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._seconds: list[float] = []

    def note(self, sent_at: float) -> None:
        self._seconds.append(time.monotonic() - sent_at)
        if len(self._seconds) == self._count:
            print(json.dumps(self._seconds), flush=True)


async def paced(enqueue, rate: float, count: int) -> None:
    """Call `enqueue` at this rate; one that is late holds up no other."""
    started, under_way = time.monotonic(), set()
    for number in range(count):
        await asyncio.sleep(max(0.0, started + number / rate - time.monotonic()))
        task = asyncio.create_task(enqueue(time.monotonic()))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
    await asyncio.gather(*under_way)


# --- Shoal -------------------------------------------------------------------------------------------


async def shoal_produce(path: str, rate: float, count: int) -> None:
    from actors.stores.durable import DurableWrites
    from actors.stores.jobs import JobLog
    from actors.stores.redis import connect

    async with connect(f"unix://{path}", timeout_s=30) as redis:
        jobs = JobLog(redis, durable=DurableWrites(redis, "appended"))
        await paced(lambda sent_at: jobs.enqueue("bench", "t", {"sent_at": sent_at}), rate, count)


async def shoal_work(path: str, count: int) -> None:
    import structlog

    from actors.job_loop import JobLoop, JobLoopConfig
    from actors.stores.jobs import JobLog
    from actors.stores.redis import connect

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    taken = Taken(count)

    class Work:
        kind, subject = "bench", "this job"

        def task(self, lease):
            return lease.payload

        async def run(self, tenant, task):
            return "done"

        async def give_up(self, tenant, task, message):
            raise AssertionError(message)

    class Noting(JobLog):
        async def done(self, lease) -> bool:
            done = await super().done(lease)
            taken.note(lease.payload["sent_at"])
            return done

    url = f"unix://{path}"
    async with connect(url, timeout_s=30) as redis, connect(url, timeout_s=30) as blocking:
        loop = JobLoop(Noting(redis, blocking=blocking), Work(), JobLoopConfig(concurrency=CONCURRENCY))
        loop.start()
        print("ready", flush=True)
        await asyncio.Event().wait()


# --- arq ---------------------------------------------------------------------------------------------


def _arq_settings(path: str):
    from arq.connections import RedisSettings

    return RedisSettings(unix_socket_path=path)


async def arq_produce(path: str, rate: float, count: int) -> None:
    from arq import create_pool

    redis = await create_pool(_arq_settings(path))
    await paced(lambda sent_at: redis.enqueue_job("job", sent_at), rate, count)


async def arq_work(path: str, count: int) -> None:
    from arq.worker import Worker, func

    taken, sent = Taken(count), {}

    async def job(ctx, sent_at):
        sent[ctx["job_id"]] = sent_at

    async def after(ctx):  # its result is recorded and the job removed
        taken.note(sent.pop(ctx["job_id"]))

    async def ready(ctx):
        print("ready", flush=True)

    # It polls: half a second by default. Ten milliseconds is what makes it comparable here.
    worker = Worker(
        [func(job, name="job")], redis_settings=_arq_settings(path), max_jobs=CONCURRENCY, poll_delay=0.01,
        after_job_end=after, on_startup=ready, handle_signals=False,
    )  # fmt: skip
    await worker.async_run()


# --- Celery ------------------------------------------------------------------------------------------


def _celery(path: str):
    from celery import Celery

    app = Celery("bench", broker=f"redis+socket://{path}")
    app.conf.update(
        task_acks_late=True,
        task_ignore_result=True,
        worker_prefetch_multiplier=4,
        worker_redirect_stdouts=False,
    )
    return app


async def celery_produce(path: str, rate: float, count: int) -> None:
    task = _celery(path).signature("job")

    async def enqueue(sent_at: float) -> None:
        task.apply_async((sent_at,))  # blocks, as Celery does

    await paced(enqueue, rate, count)


def celery_work(path: str, count: int) -> None:
    from celery import signals

    app, taken = _celery(path), Taken(count)

    @app.task(name="job")
    def job(sent_at):
        return None

    @signals.task_postrun.connect(weak=False)
    def after(args=None, **_):  # the acknowledgement follows, and is not counted
        taken.note(args[0])

    @signals.worker_ready.connect(weak=False)
    def ready(**_):
        print("ready", flush=True)

    app.worker_main(["worker", "--pool=threads", f"--concurrency={CONCURRENCY}", "--loglevel=CRITICAL",
                     "--without-gossip", "--without-mingle", "--without-heartbeat"])  # fmt: skip


def main() -> None:
    queue, side, path, rate, count = sys.argv[1:]
    call = globals()[f"{queue}_{side}"]
    made = call(path, float(rate), int(count)) if side == "produce" else call(path, int(count))
    if made is not None:
        asyncio.run(made)


if __name__ == "__main__":
    main()
