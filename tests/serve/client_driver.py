"""Python code inside the cluster, as a user would write it; `test_client` runs it and reads its JSON."""

import asyncio
import json
import sys
import time

import ray

from actors.errors import ShoalError
from actors.types import Message, RetrievalOptions, SamplingParams
from app.client import ShoalClient

MODEL = "scripted"
LONG = "a long answer " * 60  # about 2 s of the scripted engine
ENDLESS = LONG * 6


def said(text: str) -> list[Message]:
    return [Message(role="user", content=text)]


async def code_of(call) -> str:
    """The code of the error that a call ends with."""
    try:
        await call
    except ShoalError as error:
        return error.code
    return ""


async def stream(client: ShoalClient) -> dict:
    began, arrivals, shown = time.perf_counter(), [], ""
    async with client.stream_chat(said(LONG), MODEL) as pieces:
        async for text in pieces:
            arrivals.append(time.perf_counter() - began)
            shown += text
        answer = await pieces.answer()
    return {
        "pieces": len(arrivals),
        "first_s": arrivals[0],
        "last_s": arrivals[-1],
        "same": answer.text == shown,
    }


async def documents(client: ShoalClient) -> dict:
    """A document's way: embedded, stored, found, answered from."""
    vectors = await client.embed(["one", "one"])
    store = await client.create_store("mills")
    text = b"The mill on the hill has four sails and a red roof."
    added = await client.add_document(store.id, "mill.txt", text, {"kind": "mill"})
    bad = await client.add_document(store.id, "mill.png", b"\x89PNG\r\n\x1a\n")
    ingested = await client.wait_until_ingested(store.id, added.file_id, timeout_s=60)
    question = "How many sails does the mill on the hill have?"
    other = {"type": "eq", "key": "kind", "value": "house"}
    answer = await client.chat(
        said(question), MODEL, retrieval=RetrievalOptions(vector_store_ids=(store.id,))
    )
    return {
        "rows": list(vectors.shape),
        "dimensions": vectors.shape[1],
        "same": bool((vectors[0] == vectors[1]).all()),
        "status": ingested.status,
        "found": [one.filename for one in (await client.search(store.id, question)).passages],
        "filtered": [
            one.filename for one in (await client.search(store.id, question, filters=other)).passages
        ],
        "answer": answer.text,
        "cited": [citation.passage.filename for citation in answer.citations],
        "unreadable": await code_of(client.wait_until_ingested(store.id, bad.file_id, timeout_s=60)),
        "no_store": await code_of(client.search("vs_none", question)),
    }


async def leave(client: ShoalClient) -> bool:
    """Two answers that nobody wants any more; what the engine does about it is the test's to see."""
    async with client.stream_chat(said(ENDLESS), MODEL) as pieces:
        await anext(aiter(pieces))
    task = asyncio.create_task(client.chat(said(ENDLESS), MODEL))
    await asyncio.sleep(0.3)
    task.cancel()
    (ended,) = await asyncio.gather(task, return_exceptions=True)
    return isinstance(ended, asyncio.CancelledError)


async def main() -> dict:
    client = ShoalClient(timeout_s=60)
    whole = await client.chat(said("one two three"), MODEL, sampling=SamplingParams(n=2, max_tokens=50))
    every = await asyncio.gather(*(client.chat(said(f"number {n}"), MODEL) for n in range(32)))
    return {
        "models": [card.name for card in await client.models()],
        "texts": [choice.text for choice in whole.choices],
        "usage": whole.usage.total_tokens,
        "stages": sorted(whole.stage_s),
        "completion": (await client.complete("one two three", MODEL)).text,
        "together": [answer.text for answer in every],
        "stream": await stream(client),
        "documents": await documents(client),
        "unknown_model": await code_of(client.chat(said("x"), "absent")),
        "late": await code_of(client.chat(said(ENDLESS), MODEL, timeout_s=0.5)),
        "no_app": await code_of(ShoalClient(app_name="absent").models()),
        "left": await leave(client),
    }


if __name__ == "__main__":
    ray.init(log_to_driver=False)
    print(json.dumps(asyncio.run(main())), flush=True)
    sys.stdin.read()  # alive until the test has looked at the engine: a dead driver would end its calls anyway
