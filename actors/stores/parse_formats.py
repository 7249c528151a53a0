"""Text out of the file types we read; runs only inside the limited child process (`parse_child`).

Owns which types are allowed and how each becomes text. Parsers import their library, and `re`, when they need
them: the child must start fast. Limits on memory, time and processor are the child's; the ones that a format
needs (pages, expansion) are passed in.
"""

from __future__ import annotations

import io
import os

TYPE_CHECKING = False  # of `typing`, which takes 3 ms to import
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

_HTML = frozenset({".html", ".htm", ".xhtml"})
_TEXT = frozenset(
    f".{extension}"
    for extension in """
    txt text md markdown rst adoc org tex log csv tsv json jsonl ndjson xml yaml yml toml ini cfg conf srt vtt eml
    py pyi ipynb js mjs cjs jsx ts tsx vue css scss java kt kts scala groovy c h cc cpp cxx hpp cs go rs swift m
    rb php pl lua r jl sh bash zsh ps1 bat sql graphql proto tf dart ex exs erl hs clj ml diff patch
    """.split()  # noqa: SIM905  a list of 80 lines reads worse
)
EXTENSIONS = _TEXT | _HTML | {".pdf", ".docx"}  # of files that are read; a file may also have none
ALLOWED = "PDF, DOCX, HTML, Markdown, plain text, CSV, JSON, XML, YAML and source code"

# What a text that is no UTF may be written in, so that a rare relative never beats Western European.
_CHARSETS = ["cp1252", "cp1251", "koi8_r", "cp932", "euc_jp", "gb18030", "big5", "cp949"]
# Control characters that no text has: all but tab, line feed, form feed, carriage return and escape.
_NO_CONTROLS = dict.fromkeys(set(range(32)) - {9, 10, 12, 13, 27})
_SNIFFED_CHARS = 100_000
_BOMS = (
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
_OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"  # old Office files, and new ones with a password

_UNREAD = ("script", "style", "noscript", "template", "svg")
_KEPT_SPACE = "\ue000"  # of a private area: indentation inside <pre> until the rest is tidied
_HEADINGS = frozenset({"h1", "h2", "h3", "h4", "h5", "h6"})
_PARAGRAPHS = _HEADINGS | {"p", "div", "section", "article", "header", "footer", "ul", "ol", "table", "pre"}
_LINES = frozenset({"br", "li", "tr", "dt", "dd", "title", "option"})

_WORD = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
_RUN_MARKS = {"tab": "\t", "br": "\n", "cr": "\n", "noBreakHyphen": "-"}
_ZIP_ENTRIES = 10_000
_SMALL_BYTES = 10_000_000  # below this, any expansion is harmless


class Refused(Exception):
    """The document cannot become text; `code` is OpenAI's `last_error.code`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def extract(data: bytes, filename: str, limits: dict[str, int]) -> str:
    """The text of a document.

    Args:
        data: the whole file.
        filename: its extension decides the type, checked against the first bytes.
        limits: `max_pages`, `max_unpacked_bytes`, `max_expansion`, `max_text_chars`.

    Raises:
        Refused: it is of another type, empty, encrypted, or over a limit.
    """
    if not data.strip():
        raise Refused("invalid_file", "the file is empty")
    text = _parser(data, filename)(data, limits)
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\x00", "")
    text = text.encode("utf-8", "replace").decode()  # lone surrogates have no place in JSON or an index
    if len(text) > limits["max_text_chars"]:
        most = f"{limits['max_text_chars']:,} characters"
        raise Refused("invalid_file", f"the file holds more than {most} of text")
    if not text.strip():
        raise Refused("invalid_file", "the file holds no text (scanned pages and images are not read)")
    return text


def _parser(data: bytes, filename: str) -> Callable[[bytes, dict[str, int]], str]:
    extension = os.path.splitext(filename)[1].lower()  # noqa: PTH122  pathlib takes 6 ms to import
    if b"%PDF-" in data[:1024]:
        return _pdf
    if extension == ".docx":
        if data.startswith(_OLE):
            raise Refused("invalid_file", "the document is encrypted; upload it without a password")
        if not data.startswith(b"PK\x03\x04"):
            raise Refused("invalid_file", "the file is named .docx and is no Word document")
        return _docx
    if extension == ".pdf":
        raise Refused("invalid_file", "the file is named .pdf and is no PDF")
    if data.startswith((_OLE, b"PK\x03\x04")) or (extension and extension not in _TEXT | _HTML):
        named = f"files of type {extension}" if extension else "files of this type"
        raise Refused("unsupported_file", f"{named} are not supported; allowed: {ALLOWED}")
    return _html if extension in _HTML else _plain


def _plain(data: bytes, _limits: dict[str, int]) -> str:
    text = _decoded(data)
    sample = (text or "")[:_SNIFFED_CHARS]
    controls = len(sample) - len(sample.translate(_NO_CONTROLS))
    if text is None or controls * 100 > len(sample):
        raise Refused("unsupported_file", f"the file is binary; allowed: {ALLOWED}")
    return text


def _decoded(data: bytes) -> str | None:
    encoding = next((name for bom, name in _BOMS if data.startswith(bom)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        if b"\x00" in data:
            return None
    import charset_normalizer

    guess = charset_normalizer.from_bytes(data, cp_isolation=_CHARSETS).best()
    return None if guess is None else str(guess)


def _html(data: bytes, _limits: dict[str, int]) -> str:
    import re

    from lxml import etree, html

    try:
        data.decode("utf-8")
        encoding = "utf-8"
    except UnicodeDecodeError:
        encoding = None  # what the document says of itself
    parser = html.HTMLParser(encoding=encoding, remove_comments=True, remove_pis=True, no_network=True)
    root = html.document_fromstring(data, parser=parser)
    etree.strip_elements(root, *_UNREAD, with_tail=False)
    text = "".join(_html_pieces(etree.iterwalk(root, events=("start", "end"))))
    text = re.sub(r"\n{3,}", "\n\n", re.sub(r" *\n *", "\n", text)).strip()
    return text.replace(_KEPT_SPACE, " ")


def _html_pieces(events: Iterator[tuple[str, Any]]) -> Iterator[str]:
    import re

    preformatted = 0
    for event, element in events:
        tag = element.tag
        mark = "\n\n" if tag in _PARAGRAPHS else "\n" if tag in _LINES else ""
        if event == "start":
            preformatted += tag == "pre"
            piece = element.text
        else:
            preformatted -= tag == "pre"
            piece = element.tail
            mark = mark or ("\t" if tag in {"td", "th"} else "")
        # A cell and a line end where they close; a paragraph is set off on both sides.
        before = mark if event == "end" or tag in _PARAGRAPHS else ""
        text = piece or ""
        yield before + (text.replace(" ", _KEPT_SPACE) if preformatted else re.sub(r"\s+", " ", text))


def _pdf(data: bytes, limits: dict[str, int]) -> str:
    import pypdf
    from pypdf.errors import DependencyError, FileNotDecryptedError

    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        # Many files are encrypted with an empty password: that only restricts printing and the like.
        if reader.is_encrypted and not reader.decrypt(""):
            raise Refused("invalid_file", "the PDF is encrypted; upload it without a password")
        pages, most = len(reader.pages), limits["max_pages"]
        if pages > most:
            raise Refused("invalid_file", f"the PDF has {pages:,} pages; allowed are {most:,}")
        return "\n\n".join(_pages(reader, limits["max_text_chars"]))
    except (DependencyError, FileNotDecryptedError):
        raise Refused("invalid_file", "the PDF is encrypted in a way that cannot be read") from None


def _pages(reader: Any, max_chars: int) -> Iterator[str]:
    left = max_chars
    for page in reader.pages:
        text = str(page.extract_text())
        yield text
        left -= len(text)
        if left < 0:  # `extract` refuses it by name; no need to read the rest
            return


def _docx(data: bytes, limits: dict[str, int]) -> str:
    import zipfile

    try:
        _check_expansion(zipfile.ZipFile(io.BytesIO(data)).infolist(), len(data), limits)
    except zipfile.BadZipFile:
        raise Refused("invalid_file", "the document is damaged") from None
    import docx

    body = docx.Document(io.BytesIO(data)).element.body
    return "\n\n".join(filter(None, _docx_blocks(body)))


def _check_expansion(entries: list[Any], packed_bytes: int, limits: dict[str, int]) -> None:
    # The declared sizes can be trusted: zipfile never unpacks more of an entry than it declares.
    unpacked_bytes = sum(entry.file_size for entry in entries)
    expands = unpacked_bytes > max(_SMALL_BYTES, limits["max_expansion"] * packed_bytes)
    if expands or unpacked_bytes > limits["max_unpacked_bytes"] or len(entries) > _ZIP_ENTRIES:
        raise Refused("invalid_file", "the document unpacks to far more than its size (a zip bomb?)")


def _docx_blocks(parent: Any) -> Iterator[str]:
    """Paragraphs and table rows in reading order, content controls and text boxes included."""
    for child in parent:
        name = _local_name(child)
        if name == "p":
            yield _docx_paragraph(child)
            # A text box stands twice: as it is, and once more for old readers.
            for box in child.xpath(".//w:txbxContent[not(ancestor::*[local-name()='Fallback'])]"):
                yield from _docx_blocks(box)
        elif name == "tr":
            cells = child.xpath("./w:tc | ./w:sdt/w:sdtContent/w:tc")
            yield "\t".join(" ".join(filter(None, _docx_blocks(cell))) for cell in cells)
        elif len(child):
            yield from _docx_blocks(child)


def _docx_paragraph(paragraph: Any) -> str:
    # Every run, also in links, fields and tracked insertions, which python-docx's own `text` leaves out.
    runs = (run for run in paragraph.iter(f"{_WORD}r") if next(run.iterancestors(f"{_WORD}p")) is paragraph)
    return "".join(_run_text(node) for run in runs for node in run)


def _run_text(node: Any) -> str:
    name = _local_name(node)
    return (node.text or "") if name == "t" else _RUN_MARKS.get(name, "")


def _local_name(element: Any) -> str:
    return str(element.tag).rpartition("}")[2]
