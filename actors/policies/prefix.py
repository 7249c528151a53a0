"""Which replica has read the beginning of a prompt before.

Pure. Gateways name a prompt by the hashes of its blocks (`prefix_of`); the queue remembers per replica which blocks
it granted there (`KnownPrefixes`). The hashes are salted with the tenant's cache salt, as the engines' own prefix
caches are: no tenant's prompts show through another's.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from actors.types import GenerationRequest, Message

_MOST_BLOCKS = 64
_BLOCK_CHARS = 512
_BLOCK_TOKENS = 128  # about as long as a block of text
_MOST_CHARS = _MOST_BLOCKS * _BLOCK_CHARS
_MIX = 8  # bytes of a hash
_ANY_TOKEN = (1 << 64) - 1  # whether it is one of the model's is for the engine to say


def prefix_blocks(prompt: str | Sequence[int], salt: str) -> tuple[int, ...]:
    """Chained 64-bit hashes of a prompt's blocks, at most 64: equal up to where two prompts are equal.

    The last, shorter block counts as well, so the last hash names the whole prompt (or its first 32,768 characters
    or 8,192 tokens).

    Args:
        prompt: text or token ids.
        salt: the tenant's secret; prompts of different salts share no hash.
    """
    digest = hashlib.blake2b(salt.encode(), digest_size=_MIX).digest()
    hashes = []
    for block in _blocks(prompt):
        digest = hashlib.blake2b(block, digest_size=_MIX, key=digest).digest()
        hashes.append(int.from_bytes(digest, "big"))
    return tuple(hashes)


def prefix_of(request: GenerationRequest) -> tuple[int, ...]:
    """The blocks of a request's prompt, as far as they can be known without the model's template."""
    if request.prompt_token_ids is not None:
        return prefix_blocks(request.prompt_token_ids, request.cache_salt)
    if request.prompt is not None:
        return prefix_blocks(request.prompt, request.cache_salt)
    parts, chars = [], 0
    for part in _parts(request):
        parts.append(part)
        chars += len(part)
        if chars >= _MOST_CHARS:
            break
    return prefix_blocks("".join(parts), request.cache_salt)


@dataclass(slots=True)
class KnownPrefixes:
    """Blocks that one replica has read lately, as many as its KV cache may hold.

    A block is kept at least as long as those that follow it, so what is known of a prompt is its beginning.
    """

    kv_tokens: int
    _blocks: OrderedDict[int, None] = field(default_factory=OrderedDict)

    def add(self, prefix: Sequence[int]) -> None:
        """A prompt is read here; the oldest blocks make room."""
        for block in reversed(prefix):
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > max(self.kv_tokens // _BLOCK_TOKENS, 1):
            self._blocks.popitem(last=False)

    def matched(self, prefix: Sequence[int]) -> int:
        """Leading blocks of the prompt that are known."""
        if not prefix or prefix[0] not in self._blocks:
            return 0
        return bisect_left(range(len(prefix)), True, key=lambda i: prefix[i] not in self._blocks)  # noqa: FBT003  the sought value


def _blocks(prompt: str | Sequence[int]) -> Iterator[bytes]:
    if isinstance(prompt, str):
        for start in range(0, min(len(prompt), _MOST_CHARS), _BLOCK_CHARS):
            yield prompt[start : start + _BLOCK_CHARS].encode("utf-8", "surrogatepass")
    else:
        for start in range(0, min(len(prompt), _MOST_BLOCKS * _BLOCK_TOKENS), _BLOCK_TOKENS):
            block = prompt[start : start + _BLOCK_TOKENS]
            yield array("Q", [token & _ANY_TOKEN for token in block]).tobytes()


def _parts(request: GenerationRequest) -> Iterator[str]:
    for tool in request.tools:  # templates show them before the first message
        yield f"{tool.name}\0{tool.description}\0{tool.parameters}\0"
    for message in request.messages or ():
        yield _rendered(message)


def _rendered(message: Message) -> str:
    calls = "".join(f"{call.name}\0{call.arguments}\0" for call in message.tool_calls)
    return f"\0{message.role}\0{message.name or ''}\0{message.content}\0{calls}"
