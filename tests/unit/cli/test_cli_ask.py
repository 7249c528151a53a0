"""`shoal ask` and `shoal status` against a server on a real port."""

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time

import pytest

from app import cli_ask

DONE = b"data: [DONE]\n\n"
TIMING = b": server-timing queue;dur=3.2, prefill;dur=40.1, decode;dur=1200.7\n\n"
USAGE = b'data: {"choices": [], "usage": {"completion_tokens": 7}}\n\n'


def citation(chunk: str, text: str) -> dict:
    return {"type": "file_citation", "file_id": "f1", "filename": "sea.md", "chunk_id": chunk, "text": text}


def test_an_answer_streams_to_stdout_and_its_sources_and_times_to_stderr(shoal, run, sse):
    store = shoal.add_store("notes")
    notes = [
        citation("c1", "Fish\nswim " + "on " * 100),
        citation("c1", "x"),
        citation("c2", "\x1b]0;evil\x07Whales"),
    ]
    shoal.answer = [sse("Fish"), sse(" swim."), sse("", "stop", annotations=notes), USAGE, TIMING, DONE]
    result = run("ask", "What swims?", "--store", "notes", "--max-tokens", 64, "--url", shoal.url)
    assert result.exit_code == 0, result.output
    assert result.stdout == "Fish swim.\n"
    first, second, timing = result.stderr.splitlines()
    assert first.startswith("[1] sea.md: “Fish swim on on")
    assert first.endswith("on…”")
    assert second == "[2] sea.md: “]0;evilWhales”"
    assert timing == "1.24 s for 7 tokens: queue 3 ms, prefill 40 ms, decode 1,201 ms"
    (asked,) = shoal.asked
    assert asked["model"] == "m1"  # not the embedding model that is listed first
    assert asked["max_completion_tokens"] == 64
    assert asked["retrieval"] == {"vector_store_ids": [store["id"]]}


def test_text_is_shown_before_the_answer_ends(shoal, run, sse, monkeypatch):
    shown = []
    monkeypatch.setattr(cli_ask.typer, "echo", lambda text="", **_: shown.append(text))

    def pieces():
        yield sse("first")
        assert "first" in until(lambda: shown)  # the server holds the rest back until the terminal has it
        yield sse(" last", "stop") + DONE

    shoal.answer = pieces()
    assert run("ask", "?", "--url", shoal.url).exit_code == 0
    assert shown[:2] == ["first", " last"]


def until(read, tries=200):
    for _ in range(tries):
        if read():
            return read()
        time.sleep(0.01)
    return read()


def test_ctrl_c_ends_the_answer_on_the_server_too(shoal, sse):
    ended = threading.Event()

    async def pieces():
        try:
            yield sse("first")
            await asyncio.Event().wait()
        finally:
            ended.set()

    shoal.answer = pieces()
    command = [sys.executable, "-c", "from app.cli import main; main()", "ask", "?", "--url", shoal.url]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.read(5) == "first"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert (process.returncode, said) == (130, "")
    assert ended.wait(5)


def test_less_context_and_a_cut_answer_are_said(shoal, run, sse):
    shoal.add_store("notes")
    shoal.answer_headers = {"x-shoal-degraded": "retrieval=timeout"}
    shoal.answer = [sse("So", "length"), DONE]
    result = run("ask", "?", "--store", "notes", "--url", shoal.url)
    assert "retrieval=timeout" in result.stderr
    assert "no sources" in result.stderr
    assert "cut at the token limit" in result.stderr


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (b"", "the answer was cut off"),
        (
            b'data: {"error": {"message": "the engine broke", "code": "engine_failed"}}\n\n',
            "the engine broke (engine_failed)",
        ),
    ],
)
def test_a_stream_that_breaks_is_no_answer(shoal, run, sse, end, words):
    shoal.answer = [sse("Fi"), end]
    result = run("ask", "?", "--url", shoal.url)
    assert result.exit_code == 1
    assert result.stdout.startswith("Fi")
    assert words in result.stderr


def test_refusals_are_one_line_with_the_code(shoal, run):
    result = run("ask", "?", "--model", "absent", "--url", shoal.url)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: the model 'absent' does not exist (model_not_found, HTTP 404)\n"
    result = run("ask", "?", "--store", "absent", "--url", shoal.url)
    assert result.stderr == "error: there is no vector store 'absent'; there are: none\n"
    for _ in range(2):
        shoal.add_store("twice")
    result = run("ask", "?", "--store", "twice", "--url", shoal.url)
    assert "2 vector stores are named 'twice'; give one's id: vs_0, vs_1" in result.stderr
    shoal.models = shoal.models[:1]
    assert "no chat model is deployed" in run("ask", "?", "--url", shoal.url).stderr


def test_the_key_comes_from_an_option_or_the_environment(shoal, run, sse):
    shoal.key, shoal.answer = "sk-1", [sse("yes", "stop"), DONE]
    assert run("ask", "?", "--url", shoal.url, "--api-key", "sk-1").exit_code == 0
    assert run("ask", "?", SHOAL_URL=shoal.url, SHOAL_API_KEY="sk-1").exit_code == 0
    refused = run("ask", "?", "--url", shoal.url)
    assert "incorrect API key; give a key by --api-key or SHOAL_API_KEY" in refused.stderr
    assert "no key has" in run("ask", "?", "--url", shoal.url, "--api-key", "schlüssel").stderr


# --- status ------------------------------------------------------------------------------------------


def test_status_shows_components_models_and_stores(shoal, run):
    for name in ("notes", "[red]", "third"):
        shoal.add_store(name)
    shoal.stores["vs_0"]["file_counts"] |= {"total": 1203, "completed": 1200, "failed": 3}
    result = run("status", "--url", shoal.url)
    assert result.exit_code == 0, result.output
    for word in ("is ready", "m1", "embedder", "notes", "[red]", "third", "1,203", "1,200"):
        assert word in result.stdout
    found = json.loads(run("status", "--json", "--url", shoal.url).stdout)
    assert found["ready"]
    assert found["components"] == {"m1": "ready"}
    assert [store["name"] for store in found["vector_stores"]] == ["notes", "[red]", "third"]


def test_status_of_a_starting_system_exits_with_1_and_says_what_is_missing(shoal, run):
    shoal.ready = {"m1": "starting"}
    result = run("status", "--url", shoal.url)
    assert result.exit_code == 1
    assert "not ready: m1: starting" in result.stderr
    assert "embedder" in result.stdout  # what can be shown is shown


def test_status_without_a_key_still_shows_whether_it_is_ready(shoal, run):
    shoal.key = "sk-1"
    result = run("status", "--url", shoal.url)
    assert result.exit_code == 0
    assert "is ready" in result.stdout
    assert "models: incorrect API key" in result.stderr


# --- the frame ---------------------------------------------------------------------------------------


def test_nothing_answers_is_exit_code_3(run):
    result = run("status", "--url", "http://127.0.0.1:9")
    assert result.exit_code == 3
    assert result.stderr == (
        "error: nothing answers at http://127.0.0.1:9; start Shoal with: serve run configs/local.yaml\n"
    )


def test_a_bug_is_one_line_and_a_traceback_only_with_debug(run, monkeypatch):
    def bug(_url, _key):
        raise KeyError("lost")

    monkeypatch.setattr("app.cli_status.Api", bug)
    result = run("status")
    assert result.exit_code == 1
    assert result.stderr == "error: KeyError: 'lost'; run it as `shoal --debug …` to see where\n"
    assert isinstance(run("--debug", "status").exception, KeyError)


def test_version_and_help(run):
    assert run("--version").stdout.startswith("shoal 0.")
    text = run("--help").stdout
    assert "Exit codes: 0 done" in text
    for command in ("ask", "ingest", "status", "keys"):
        assert command in text
        assert run(command, "--help").exit_code == 0
    assert run("ingest").exit_code == 2
