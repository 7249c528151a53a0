"""The scripted engine's tokenizer: word-like pieces whose ids can be turned back without a table.

Called by the scripted engine and by `tokens.counter_for("scripted")`. A token is at most four bytes of UTF-8
and its id is those bytes read as a number, so every id fits 32 bits, every process agrees on it, and a prompt
of ids can be decoded by a replica that has never seen the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from actors.errors import InvalidRequest

MAX_PIECE_BYTES = 4
# Whitespace goes with the word that follows. NUL stands alone: in a longer piece it would be a leading zero.
_PIECE = re.compile(r"\x00|\s[^\s\x00]{0,3}|[^\s\x00]{1,4}")


def split(text: str) -> list[str]:
    """The pieces of `text`; joined they are `text` again."""
    pieces: list[str] = _PIECE.findall(text)
    if text.isascii():
        return pieces
    return [part for piece in pieces for part in _fit(piece)]


def token_id(piece: str) -> int:
    """The id of one piece, 0 <= id < 2**32."""
    return int.from_bytes(piece.encode("utf-8", "surrogatepass"), "big")


def encode(text: str) -> list[int]:
    """The token ids of `text`."""
    return [token_id(piece) for piece in split(text)]


def decode(token_ids: Iterable[int]) -> str:
    """The text of `token_ids`.

    Raises:
        InvalidRequest: an id that this tokenizer never gives.
    """
    return "".join(_piece(token) for token in token_ids)


def _piece(token: int) -> str:
    size = max(1, (token.bit_length() + 7) // 8) if token >= 0 else MAX_PIECE_BYTES + 1
    if size <= MAX_PIECE_BYTES:
        try:
            piece = token.to_bytes(size, "big").decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            piece = ""
        if _PIECE.fullmatch(piece):
            return piece
    raise InvalidRequest(
        f"token id {token} is not in the scripted model's vocabulary: its ids are the UTF-8 bytes of pieces of "
        f"at most {MAX_PIECE_BYTES} bytes",
        param="prompt",
    )


def _fit(piece: str) -> list[str]:
    """Cut a piece with characters of several bytes into pieces of at most `MAX_PIECE_BYTES`."""
    parts = [""]
    used = 0
    for char in piece:
        size = len(_encode(char))
        if used + size > MAX_PIECE_BYTES:
            parts.append("")
            used = 0
        parts[-1] += char
        used += size
    return parts


def _encode(text: str) -> bytes:
    # JSON may carry lone surrogates ("\ud83d"); they are counted and echoed like any other character.
    return text.encode("utf-8", "surrogatepass")
