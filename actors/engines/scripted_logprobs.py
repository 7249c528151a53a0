"""Log probabilities of the scripted engine: made up, deterministic and plausible.

Called by `scripted_script`. The chosen token is always the likeliest and the probabilities of the list add up to
at most 1.
"""

from __future__ import annotations

import math
import zlib

from actors.types import TokenLogprob

# What the model "also considered"; one more than the 20 alternatives that OpenAI allows.
_ALTERNATIVES = (
    " the", " a", " of", " to", " and", " in", " is", " it", " for", " on", " as",
    " at", " by", " or", " we", " not", " so", " if", " no", " but", " an",
)  # fmt: skip


def token_logprob(piece: str, position: int, top: int) -> TokenLogprob:
    """The logprob of `piece` as token number `position`, with the `top` likeliest tokens, likeliest first."""
    chosen = 0.5 + 0.49 * (zlib.crc32(f"{position}:{piece}".encode("utf-8", "surrogatepass")) / 2**32)
    ranked = [(piece, math.log(chosen))]
    rest = 1.0 - chosen
    for other in _ALTERNATIVES:
        if len(ranked) >= top:
            break
        if other != piece:
            rest /= 2  # each alternative takes half of what is left
            ranked.append((other, math.log(rest)))
    return TokenLogprob(piece, ranked[0][1], tuple(ranked[:top]))
