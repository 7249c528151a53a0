"""`shoal ingest`: which files are taken, what a second run does, and what the user is told."""

import os
import signal
import subprocess
import sys
import time

import pytest

from app.cli_ingest_plan import LocalFile, StoredFile, find, plan


@pytest.fixture
def docs(tmp_path):
    folder = tmp_path / "docs"
    for name, text in (
        ("a.md", "alpha"),
        ("guide/b.txt", "beta"),
        ("guide/deep/c.md", "gamma"),
        (".git/config", "hidden"),
        (".hidden.md", "hidden"),
        ("photo.jpg", "no text"),
        ("LICENSE", "no extension"),
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def names(found):
    return [file.name for file in found.files]


# --- which files -------------------------------------------------------------------------------------


def test_a_folder_gives_its_readable_files_and_says_what_it_skips(docs):
    found = find([docs], [])
    assert names(found) == ["LICENSE", "a.md", "guide/b.txt", "guide/deep/c.md"]
    assert found.skipped == [("photo.jpg", "files of type .jpg are not supported")]


def test_patterns_match_names_or_where_they_have_a_slash_paths(docs):
    assert names(find([docs], ["*.md"])) == ["a.md", "guide/deep/c.md"]
    assert names(find([docs], ["guide/*"])) == ["guide/b.txt", "guide/deep/c.md"]
    assert names(find([docs], ["*.txt", "a.*"])) == ["a.md", "guide/b.txt"]
    assert names(find([docs / "a.md", docs / "guide"], [])) == ["a.md", "b.txt", "deep/c.md"]


# --- what is done about each -------------------------------------------------------------------------


def local(name, sha, folder="/docs"):
    from pathlib import Path

    return LocalFile(path=Path(folder, name), name=name, sha256=sha)


def there(file, status="completed", file_id=None):
    return StoredFile(
        file_id=file_id or f"file-{file.sha256}", source=file.source, sha256=file.sha256, status=status
    )


def test_the_same_bytes_are_never_sent_again_wherever_they_lie():
    a, moved = local("a.md", "1"), local("b.md", "1", "/elsewhere")
    made = plan([moved], [there(a)])
    assert (made.unchanged, made.upload, made.replaced) == ([moved], [], {})


def test_what_an_earlier_run_left_is_watched_or_tried_again():
    files = [local("a.md", "1"), local("b.md", "2"), local("c.md", "3")]
    made = plan(
        files, [there(files[0], "in_progress"), there(files[1], "failed"), there(files[2], "cancelled")]
    )
    assert made.watch == [(files[0], "file-1")]
    assert made.again == [(files[1], "file-2"), (files[2], "file-3")]
    assert not made.upload


def test_a_changed_file_replaces_its_old_version_and_nothing_else():
    new, other = local("a.md", "2"), local("a.md", "9", "/another/project")
    made = plan([new], [there(local("a.md", "1")), there(other)])
    assert made.upload == [new]
    assert made.replaced == {"2": ["file-1"]}


def test_an_old_version_goes_also_when_the_run_that_replaced_it_was_stopped():
    new = local("a.md", "2")
    made = plan([new], [there(local("a.md", "1")), there(new)])
    assert made.unchanged == [new]
    assert made.replaced == {"2": ["file-1"]}


def test_bytes_that_another_file_still_has_are_not_old():
    changed, copy = local("a.md", "2"), local("b.md", "1")
    made = plan([changed, copy], [there(local("a.md", "1"))])
    assert (made.upload, made.unchanged, made.replaced) == ([changed], [copy], {})


def test_copies_are_sent_once():
    one, two = local("a.md", "1"), local("b.md", "1")
    made = plan([one, two], [])
    assert (made.upload, made.unchanged) == ([one], [two])


def test_files_that_others_put_there_are_left_alone():
    made = plan(
        [local("a.md", "1")], [StoredFile(file_id="file-x", source="", sha256="", status="completed")]
    )
    assert made.replaced == {}


# --- a whole run -------------------------------------------------------------------------------------


def test_a_run_ends_when_everything_can_be_searched(shoal, run, docs):
    result = run("ingest", docs, "--store", "notes", "--url", shoal.url)
    assert result.exit_code == 0, result.output
    assert result.stdout == "notes (vs_0): 4 completed, 1 skipped\n"
    assert "made the vector store notes" in result.stderr
    assert "skipped photo.jpg: files of type .jpg are not supported" in result.stderr
    assert "4 of 4 files" in result.stderr
    assert sorted(shoal.files.values()) == [
        ("LICENSE", b"no extension"), ("a.md", b"alpha"), ("b.txt", b"beta"), ("c.md", b"gamma"),
    ]  # fmt: skip
    paths = {wire["attributes"]["path"] for wire in shoal.attached["vs_0"].values()}
    assert "guide/deep/c.md" in paths


def test_a_second_run_sends_only_what_changed(shoal, run, docs):
    words = ("ingest", docs, "--store", "notes", "--url", shoal.url)
    run(*words)
    uploads = shoal.uploads
    assert run(*words).stdout == "notes (vs_0): 4 unchanged, 1 skipped\n"
    assert shoal.uploads == uploads
    (docs / "a.md").write_text("new alpha")
    assert run(*words).stdout == "notes (vs_0): 1 completed, 3 unchanged, 1 skipped\n"
    contents = sorted(data for _, data in shoal.files.values())
    assert contents == [b"beta", b"gamma", b"new alpha", b"no extension"]
    assert len(shoal.attached["vs_0"]) == 4


def test_a_failed_file_is_named_with_its_reason_and_tried_again_by_the_next_run(shoal, run, docs):
    shoal.failing = {"b.txt": "the document is encrypted"}
    words = (
        "ingest",
        docs,
        "--store",
        "notes",
        "--pattern",
        "*.txt",
        "--pattern",
        "*.md",
        "--url",
        shoal.url,
    )
    result = run(*words)
    assert result.exit_code == 1
    assert result.stdout == "notes (vs_0): 2 completed, 1 failed\n"
    assert "failed  guide/b.txt: the document is encrypted" in result.stderr
    shoal.failing, uploads = {}, shoal.uploads
    result = run(*words)
    assert (result.exit_code, result.stdout) == (0, "notes (vs_0): 1 completed, 2 unchanged\n")
    assert shoal.uploads == uploads  # attached again, not sent again


def test_a_busy_server_is_waited_for_and_a_refused_file_fails_alone(shoal, run, docs):
    shoal.refuse_upload(429, "slow down", "rate_limit_exceeded", retry_after="0")
    shoal.refuse_upload(413, "the file is too large", "payload_too_large")
    result = run("ingest", docs / "a.md", docs / "LICENSE", "--store", "notes", "--url", shoal.url)
    assert result.exit_code == 1
    assert result.stdout == "notes (vs_0): 1 completed, 1 failed\n"
    assert "the file is too large (payload_too_large, HTTP 413)" in result.stderr
    assert shoal.uploads == 3


def test_a_key_that_is_refused_ends_the_run_at_once(shoal, run, docs):
    shoal.key = "sk-1"
    result = run("ingest", docs, "--store", "notes", "--url", shoal.url)
    assert result.exit_code == 1
    assert result.stderr.count("incorrect API key") == 1


def test_nothing_to_ingest_is_an_error(shoal, run, docs):
    result = run("ingest", docs, "--store", "notes", "--pattern", "*.nothing", "--url", shoal.url)
    assert (result.exit_code, result.stderr) == (
        1,
        "error: there is no file to ingest that matches --pattern\n",
    )


def test_a_file_that_cannot_be_read_fails_and_the_others_do_not(shoal, run, docs):
    (docs / "broken.md").symlink_to(docs / "gone.md")  # no file: not found by the walk
    (docs / "a.md").unlink()
    os.mkfifo(docs / "pipe.md")
    result = run("ingest", docs, "--store", "notes", "--url", shoal.url)
    assert result.stdout == "notes (vs_0): 3 completed, 1 skipped\n"


def test_ctrl_c_leaves_the_work_to_the_server_and_says_so(shoal, docs):
    shoal.stuck = True
    command = [sys.executable, "-c", "from app.cli import main; main()", "ingest", docs, "--store", "notes"]
    process = subprocess.Popen([*command, "--url", shoal.url], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while len(shoal.attached.get("vs_0", {})) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Stopped watching. 4 uploaded files go on being ingested by the server; 0 were not sent." in said
    assert "Traceback" not in said
    assert len(shoal.attached["vs_0"]) == 4  # nothing was taken back
