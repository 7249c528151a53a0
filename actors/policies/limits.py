"""The maths of requests and tokens per minute: how a bucket fills, what is refused, what the headers say.

Pure, in seconds, with the time as an argument. `actors.stores.limits` applies it: `lua/limits_*.lua` are the
same formulas over Redis, and a property test holds the two together. The functions here run directly where
Redis is down and every gateway keeps to its own share.

The algorithm is the virtual-scheduling form of GCRA (ITU-T I.371, annex A), which is a token bucket that
stores one number. With limit L per period T, the theoretical arrival time `tat` is when the bucket is full
again; a cost of n moves it on by n * T / L and is granted while it stays within now + T. A full bucket holds
L, so a burst may use a whole minute's allowance at once and at most 2 L pass in any one minute; over t
seconds it is never more than L * (1 + t / T).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from actors.errors import InvalidRequest

PERIOD_S = 60.0

Unit = Literal["requests", "tokens"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a key, or a whole tenant, may use per minute; None is unlimited."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # prompt and output together

    def __post_init__(self) -> None:
        """Refuse limits under which no request would ever pass."""
        for name in ("requests_per_minute", "tokens_per_minute"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidRequest(f"{name} must be at least 1, or left out for no limit", param=name)


UNLIMITED = Limits()


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketState:
    """One bucket after a decision: what the x-ratelimit headers of its unit say."""

    unit: Unit
    limit: int  # per minute
    remaining: int
    reset_s: float  # until the bucket is full again


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Whether one bucket grants a cost."""

    granted: bool
    tat_s: float  # to store; unchanged by a refusal
    wait_s: float  # until the same cost would be granted; 0 when it is
    remaining: int
    reset_s: float


def take(tat_s: float, now_s: float, limit: int, cost: float) -> Verdict:
    """Ask one bucket for `cost`.

    Args:
        tat_s: theoretical arrival time as stored; anything in the past means a full bucket.
        now_s: the time, on the same clock.
        limit: allowance per `PERIOD_S`, at least 1.
        cost: at most `limit`, else it is never granted.
    """
    start_s = _within(tat_s, now_s)
    next_s = start_s + cost * PERIOD_S / limit
    wait_s = next_s - PERIOD_S - now_s
    granted = wait_s <= _ROUNDING_S
    tat_s = next_s if granted else start_s
    left = (PERIOD_S - (tat_s - now_s)) * limit / PERIOD_S
    return Verdict(
        granted=granted,
        tat_s=tat_s,
        wait_s=0.0 if granted else wait_s,
        remaining=max(0, int(left + _ROUNDING_COST)),
        reset_s=tat_s - now_s,
    )


def settle(tat_s: float, now_s: float, limit: int, difference: float) -> float:
    """The new `tat_s` once the true cost is known.

    Args:
        tat_s: as stored.
        now_s: the time, on the same clock.
        limit: allowance per `PERIOD_S`.
        difference: true cost minus the cost taken; negative gives back. Never gives more than a full bucket.
    """
    return _within(_within(tat_s, now_s) + difference * PERIOD_S / limit, now_s)


# A debt (a settlement above its reservation, a server clock that was set back) is forgiven beyond one period
# more than an empty bucket, so that no caller ever waits longer than two periods.
_MOST_AHEAD_S = 2 * PERIOD_S
_ROUNDING_S = 1e-6
_ROUNDING_COST = 1e-3


def _within(tat_s: float, now_s: float) -> float:
    return min(max(tat_s, now_s), now_s + _MOST_AHEAD_S)


def share(limit: int, gateways: int) -> int:
    """The part of a limit that one of `gateways` may use on its own, at least 1."""
    return max(1, limit // max(1, gateways))


def duration(seconds: float) -> str:
    """A time span as OpenAI's headers write it ("20ms", "1.5s", "6m0s", "1h0m0s"), rounded up to 1 ms."""
    millis = max(0, -int(-seconds * 1000 // 1))
    if millis < 1000:
        return f"{millis}ms" if millis else "0s"
    hours, rest = divmod(millis, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    text = f"{rest / 1000:g}s"
    if hours or minutes:
        text = f"{minutes}m{text}"
    return f"{hours}h{text}" if hours else text


def headers(states: Sequence[BucketState]) -> Mapping[str, str]:
    """The x-ratelimit-* headers; where key and tenant are both limited, of whichever has less left."""
    found: dict[str, str] = {}
    for unit in ("requests", "tokens"):
        of_unit = [state for state in states if state.unit == unit]
        if not of_unit:
            continue
        tightest = min(of_unit, key=lambda state: state.remaining)
        found[f"x-ratelimit-limit-{unit}"] = str(tightest.limit)
        found[f"x-ratelimit-remaining-{unit}"] = str(tightest.remaining)
        found[f"x-ratelimit-reset-{unit}"] = duration(tightest.reset_s)
    return found
