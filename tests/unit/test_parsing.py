"""Parsing in the limited child: every allowed type becomes text, every bad document one clear refusal."""

from __future__ import annotations

import asyncio
import io
import os
import resource
import signal
import time
import zipfile
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import docx
import pytest
from docx.oxml import OxmlElement
from reportlab.lib import pdfencrypt
from reportlab.pdfgen import canvas

from actors.stores.parsing import BadDocument, ParseLimits, Parser, ParserKilled

_LIMITS = ParseLimits(deadline_s=30)


async def pieces(data: bytes) -> AsyncIterator[bytes]:
    for at in range(0, len(data), 1 << 20):
        yield data[at : at + (1 << 20)]


async def text_of(data: bytes, filename: str, **limits: int) -> str:
    return await Parser(_LIMITS.model_copy(update=limits))(pieces(data), filename)


async def refusal_of(data: bytes, filename: str, **limits: int) -> tuple[str, str]:
    with pytest.raises(BadDocument) as caught:
        await text_of(data, filename, **limits)
    return caught.value.code, caught.value.message


def pdf(pages: int = 1, text: str = "Page {n} about whales", encrypt=None) -> bytes:
    out = io.BytesIO()
    page = canvas.Canvas(out, encrypt=encrypt)
    for n in range(pages):
        page.drawString(72, 700, text.format(n=n))
        page.showPage()
    page.save()
    return out.getvalue()


def word() -> bytes:
    document = docx.Document()
    document.add_heading("Whales")
    document.add_paragraph("They sing.").add_run(" Loudly.")
    table = document.add_table(2, 2)
    for row, cells in zip(table.rows, (("name", "length"), ("blue", "30 m")), strict=True):
        for cell, text in zip(row.cells, cells, strict=True):
            cell.text = text
    inserted = OxmlElement("w:ins")
    inserted.append(document.add_paragraph("tracked")._p.r_lst[0])
    document.paragraphs[-1]._p.append(inserted)
    document.add_paragraph("The end.")
    out = io.BytesIO()
    document.save(out)
    return out.getvalue()


HTML = b"""<html><head><title>Whales</title><style>p{}</style><script>alert(1)</script></head><body>
<h1>Big ones</h1><p>They <b>sing</b>
loudly.</p><ul><li>blue<li>grey</ul><table><tr><th>a<th>b<tr><td>1<td>2</table><pre>x
  y</pre><!-- hidden --></body></html>"""


# --- what is read ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("filename", "data", "text"),
    [
        ("a.txt", b"line one\r\nline two\rthree", "line one\nline two\nthree"),
        ("a.md", "# Ünïcode\n".encode(), "# Ünïcode\n"),
        ("a.csv", b"a,b\n1,2\n", "a,b\n1,2\n"),
        ("a.json", b'{"a": 1}', '{"a": 1}'),
        ("a.py", b"def f(): ...\n", "def f(): ...\n"),
        ("README", b"no extension", "no extension"),
        ("UPPER.TXT", b"x", "x"),
        ("bom.txt", "\ufeffwith mark".encode(), "with mark"),
        ("utf16.txt", "h\u00e9llo".encode("utf-16"), "h\u00e9llo"),
        ("latin.txt", "Grüße aus Köln, schöne Straße".encode("cp1252"), "Grüße aus Köln, schöne Straße"),
        ("russian.txt", "Привет, как дела? Это текст.".encode("cp1251"), "Привет, как дела? Это текст."),
        ("nul.txt", b"a" * 200 + b"\x00", "a" * 200),
    ],
)
async def test_text_of_any_usual_encoding_is_read(filename, data, text):
    assert await text_of(data, filename) == text


async def test_html_becomes_its_visible_text_with_its_structure():
    text = await text_of(HTML, "a.html")
    assert text == "Whales\n\nBig ones\n\nThey sing loudly.\n\nblue\ngrey\n\na\tb\t\n1\t2\t\n\nx\n  y"


async def test_html_is_read_in_the_encoding_it_declares():
    page = '<meta charset="iso-8859-1"><p>café</p>'.encode("latin-1")
    assert await text_of(page, "a.htm") == "café"


async def test_a_pdf_is_read_page_by_page_whatever_its_name():
    assert "Page 0 about whales" in await text_of(pdf(2), "a.pdf")
    assert "Page 1 about whales" in await text_of(pdf(2), "noname")


async def test_a_pdf_that_is_encrypted_without_a_password_is_read():
    only_printing = pdfencrypt.StandardEncryption("", "owner", canPrint=0)
    assert "whales" in await text_of(pdf(encrypt=only_printing), "a.pdf")


async def test_a_word_document_is_read_with_tables_and_tracked_insertions():
    assert await text_of(word(), "a.docx") == (
        "Whales\n\nThey sing. Loudly.\n\nname\tlength\n\nblue\t30 m\n\ntracked\n\nThe end."
    )


# --- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("filename", "data", "code", "part"),
    [
        ("a.exe", b"MZ\x90\x00", "unsupported_file", "allowed: PDF, DOCX"),
        ("a.xlsx", b"PK\x03\x04rest", "unsupported_file", ".xlsx"),
        ("archive", b"PK\x03\x04rest", "unsupported_file", "allowed"),
        ("old.doc", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1rest", "unsupported_file", ".doc"),
        ("binary.txt", bytes(range(256)) * 10, "unsupported_file", "binary"),
        ("noname", b"\x00\x01\x02\x03", "unsupported_file", "binary"),
        ("a.txt", b"", "invalid_file", "empty"),
        ("a.txt", b" \n\t ", "invalid_file", "empty"),
        ("a.pdf", b"hello", "invalid_file", "no PDF"),
        ("a.pdf", b"%PDF-1.4 and then nothing", "invalid_file", "damaged"),
        ("a.docx", b"hello", "invalid_file", "no Word"),
        ("a.docx", b"PK\x03\x04rest", "invalid_file", "damaged"),
        ("a.docx", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1rest", "invalid_file", "encrypted"),
        ("a.html", b"<script>only()</script>", "invalid_file", "no text"),
    ],
)
async def test_a_document_that_cannot_be_read_is_refused_by_name(filename, data, code, part):
    got_code, message = await refusal_of(data, filename)
    assert got_code == code
    assert part in message


async def test_an_encrypted_pdf_is_refused():
    assert await refusal_of(pdf(encrypt="secret"), "a.pdf") == (
        "invalid_file",
        "the PDF is encrypted; upload it without a password",
    )


async def test_a_scanned_pdf_without_text_is_refused():
    code, message = await refusal_of(pdf(text=" "), "a.pdf")
    assert (code, "scanned" in message) == ("invalid_file", True)


async def test_a_pdf_of_too_many_pages_is_refused():
    code, message = await refusal_of(pdf(30), "a.pdf", max_pages=20)
    assert (code, message) == ("invalid_file", "the PDF has 30 pages; allowed are 20")


def bomb(megabytes: int) -> bytes:
    out = io.BytesIO(word())
    with zipfile.ZipFile(out, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("word/bomb.xml", bytes(megabytes << 20))
    return out.getvalue()


async def test_a_zip_bomb_is_refused_before_it_is_unpacked():
    small = len(bomb(200))
    assert small < 1 << 20
    code, message = await refusal_of(bomb(200), "a.docx")
    assert (code, "zip bomb" in message) == ("invalid_file", True)


async def test_a_document_that_unpacks_to_too_much_is_refused_whatever_its_ratio():
    code, message = await refusal_of(bomb(3), "a.docx", max_unpacked_bytes=2 << 20)
    assert (code, "zip bomb" in message) == ("invalid_file", True)


async def test_a_file_that_is_too_large_is_refused_while_it_is_read():
    code, message = await refusal_of(b"x" * (3 << 20), "a.txt", max_source_bytes=2 << 20)
    assert (code, "2 MiB" in message) == ("invalid_file", True)


async def test_too_much_text_is_refused_and_never_cut_off():
    code, message = await refusal_of(b"word " * 1000, "a.txt", max_text_chars=4999)
    assert (code, "4,999 characters" in message) == ("invalid_file", True)


async def test_a_document_that_needs_too_much_memory_is_refused():
    huge = b"<p>" + b"<b>x</b>" * 6_000_000
    code, message = await refusal_of(huge, "a.html", memory_bytes=1 << 28)
    assert code == "invalid_file"
    assert "memory" in message or "damaged" in message


def looping_pdf() -> bytes:
    """A page whose content takes for ever: one form that draws itself twice, and so on, 40 deep."""
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 9 9] /Contents 4 0 R /Resources << /XObject << /F 5 0 R >> >> >>",
        b"<< /Length 20 >>\nstream\n/F Do /F Do\nendstream",
    ]
    depth = 40
    for n in range(depth):
        inner = f"/Resources << /XObject << /F {6 + n} 0 R >> >>".encode() if n < depth - 1 else b""
        body = b"/F Do /F Do" if n < depth - 1 else b"BT (x) Tj ET"
        objects.append(
            b"<< /Type /XObject /Subtype /Form /BBox [0 0 9 9] %b /Length %d >>\nstream\n%b\nendstream"
            % (inner, len(body), body)
        )
    out, offsets = bytearray(b"%PDF-1.4\n"), []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%b\nendobj\n" % (number, body)
    start = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    out += b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    out += b"trailer << /Root 1 0 R /Size %d >>\nstartxref\n%d\n%%%%EOF" % (len(objects) + 1, start)
    return bytes(out)


async def test_a_pdf_that_loops_ends_as_a_refusal():
    started = time.monotonic()
    code, _ = await refusal_of(looping_pdf(), "a.pdf", deadline_s=5)
    assert code == "invalid_file"
    assert time.monotonic() - started < 10


async def endless() -> AsyncIterator[bytes]:
    while True:
        yield b"x"
        await asyncio.sleep(0.05)


async def test_the_deadline_ends_the_child_and_everything_it_started():
    started = time.monotonic()
    with pytest.raises(BadDocument, match="longer than 1 s"):
        await Parser(ParseLimits(deadline_s=1))(endless(), "a.txt")
    assert time.monotonic() - started < 3
    assert children() == []


async def test_a_child_that_only_computes_ends_at_the_deadline():
    code, message = await refusal_of(pdf(2500), "a.pdf", deadline_s=1)
    assert (code, message) == ("invalid_file", "reading the file took longer than 1 s")


async def test_processor_time_is_limited():
    code, message = await refusal_of(pdf(2500), "a.pdf", cpu_s=1)
    assert (code, message) == ("invalid_file", "reading the file took more than 1 s of processor time")


# --- the child ---------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def elder_children() -> set[int]:
    """What this process had started before the test: systems that serve the whole session."""
    _ELDERS.clear()
    _ELDERS.update(children())
    return _ELDERS


_ELDERS: set[int] = set()


def children() -> list[int]:
    found: list[str] = []
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
        with suppress(FileNotFoundError):  # the thread ended since it was listed
            found += (task / "children").read_text().split()
    return [pid for pid in map(int, found) if pid not in _ELDERS]


async def child() -> int:
    for _ in range(200):
        if found := children():
            return found[0]
        await asyncio.sleep(0.01)
    raise AssertionError("no child came")


async def test_a_cancelled_call_leaves_no_child():
    parsing = asyncio.ensure_future(Parser(_LIMITS)(endless(), "a.txt"))
    await child()
    parsing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await parsing
    assert children() == []


async def test_a_child_that_is_killed_from_outside_says_nothing_about_the_document():
    parsing = asyncio.ensure_future(Parser(_LIMITS)(endless(), "a.txt"))
    os.kill(await child(), signal.SIGKILL)
    with pytest.raises(ParserKilled):
        await parsing


async def test_a_source_that_fails_is_the_callers_to_know():
    async def failing() -> AsyncIterator[bytes]:
        yield b"half of "
        raise OSError("the store is away")

    with pytest.raises(OSError, match="the store is away"):
        await Parser(_LIMITS)(failing(), "a.txt")


async def test_the_child_inherits_no_secret(monkeypatch):
    monkeypatch.setenv("CANARY_SECRET", "hunter2")
    parsing = asyncio.ensure_future(Parser(_LIMITS)(endless(), "a.txt"))
    pid = await child()
    await asyncio.sleep(0.2)
    environment = Path(f"/proc/{pid}/environ").read_bytes()
    command = Path(f"/proc/{pid}/cmdline").read_bytes()
    descriptors = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]
    parsing.cancel()
    await asyncio.gather(parsing, return_exceptions=True)
    assert b"hunter2" not in environment
    assert b"a.txt" not in command
    assert all(name.startswith(("pipe:", "/dev/null", "socket:")) for name in descriptors)


async def test_the_child_imports_nothing_heavy():
    code = (
        "import sys, actors.stores.parse_child as c;"
        "bad = [m for m in ('ray','pydantic','torch','numpy','fsspec','redis','lxml','pypdf','msgspec')"
        " if m in sys.modules]; print(bad)"
    )
    process = await asyncio.create_subprocess_exec(
        __import__("sys").executable, "-c", code, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    assert out.strip() == b"[]"


async def test_the_parent_grows_little_while_bad_documents_are_parsed():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bad = bomb(200)
    await asyncio.gather(*(refusal_of(bad, "a.docx") for _ in range(3)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10
