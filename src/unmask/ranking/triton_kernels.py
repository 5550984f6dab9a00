"""The two Triton kernels of `unmask.ranking.triton_buffer`: one scores and appends, the other one keeps the best."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import triton.language as tl


@cache
def kernels() -> tuple[Any, Any]:
    """Returns the two kernels. Triton compiles them once per dtype: `do_not_specialize` keeps it from doing so per size."""
    global tl
    import triton
    import triton.language as tl

    varying = ["start", "first", "held", "steps", "index", "eps"]
    return (
        triton.jit(_append_kernel, do_not_specialize=varying),
        triton.jit(_cut_kernel, do_not_specialize=["keep", "limit", "bits"]),
    )


def _append_kernel(  # type: ignore[no-untyped-def]
    gradient, other, members, keys, positions, payload, status, cut,
    size, start, first, held, steps, index, eps,
    KIND: tl.constexpr, POWER: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * B + tl.arange(0, B)
    inside = at < size
    g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    if KIND == "given":
        score = tl.load(other + at, mask=inside, other=0.0)
    else:
        score = tl.abs(g)
        if KIND == "snip":
            score = tl.abs(g * tl.load(other + at, mask=inside, other=0.0).to(tl.float32))
        if KIND == "d3":  # Triton's plain division is not rounded as IEEE 754 says.
            base = tl.abs(tl.load(other + at, mask=inside, other=0.0).to(tl.float32)) + eps
            if POWER == 2:
                base = base * base
            if POWER == -1:
                base = tl.div_rn(tl.full((B,), 1.0, tl.float32), base)
            score = tl.div_rn(score, base)
    infinite = tl.where(score == float("inf"), 1, tl.where(score == float("-inf"), 2, 0))
    broken = tl.max(tl.where(inside, tl.where(score != score, 3, infinite), 0), axis=0)
    if broken > 0:
        tl.atomic_max(status + 1 + index, broken)
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)  # -0.0 equals 0.0
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    flat = first + at.to(tl.int64)
    position = start + flat
    least = tl.load(cut)
    enters = inside & ((key > least) | ((key == least) & (position < tl.load(cut + 1))))
    if tl.max(enters.to(tl.int32), axis=0) > 0:
        low = tl.zeros((B,), tl.int32)  # how many members come before the entry
        high = low + held
        for _ in range(steps):
            middle = (low + high) // 2
            before = tl.load(members + middle, mask=enters & (low < high), other=0) < flat
            low, high = tl.where((low < high) & before, middle + 1, low), tl.where((low < high) & ~before, middle, high)
        member = tl.load(members + low, mask=enters & (low < held), other=-1) == flat
        enters = enters & ~member
        number = enters.to(tl.int32)
        place = tl.atomic_add(status, tl.sum(number, axis=0)) + tl.cumsum(number, axis=0) - 1
        tl.store(keys + place, key, mask=enters)
        tl.store(positions + place, position, mask=enters)
        tl.store(payload + place, g, mask=enters)


def _cut_kernel(keys, positions, payload, status, cut, keep, limit, bits, B: tl.constexpr):  # type: ignore[no-untyped-def]
    count = tl.load(status)
    if count > limit:
        lane = tl.arange(0, B)
        # The largest integer that at least `keep` keys reach, bit by bit, is the key of the last entry that stays.
        least, reach, above = tl.full((), -(1 << 31), tl.int64), count, tl.full((), 0, tl.int32)
        for bit in range(32):
            candidate = least + (tl.full((), 1 << 31, tl.int64) >> bit)
            reached = tl.zeros((B,), tl.int32)
            for low in range(0, count, B):
                key = tl.load(keys + low + lane, mask=low + lane < count, other=-(1 << 31))
                reached += (key >= candidate).to(tl.int32)
            number = tl.sum(reached, axis=0)
            least = tl.where(number >= keep, candidate, least)
            # The last candidate that too few keys reach is least + 1.
            reach, above = tl.where(number >= keep, number, reach), tl.where(number >= keep, above, number)
        last = tl.full((), 1 << 62, tl.int64)
        if reach > keep:  # Of the entries with this key, the first by position stay.
            last = tl.full((), 0, tl.int64)
            for bit in range(bits):
                candidate = last + (tl.full((), 1, tl.int64) << (bits - 1 - bit))
                before = tl.zeros((B,), tl.int32)
                for low in range(0, count, B):
                    ties = tl.load(keys + low + lane, mask=low + lane < count, other=0) == least
                    ties = ties & (low + lane < count)
                    position = tl.load(positions + low + lane, mask=ties, other=0)
                    before += (ties & (position < candidate)).to(tl.int32)
                last = tl.where(tl.sum(before, axis=0) < keep - above, candidate, last)
        kept = tl.full((), 0, tl.int32)
        for low in range(0, count, B):  # An entry moves towards the front, never over one that was not read yet.
            inside = low + lane < count
            key = tl.load(keys + low + lane, mask=inside, other=0)
            position = tl.load(positions + low + lane, mask=inside, other=0)
            travels = tl.load(payload + low + lane, mask=inside, other=0.0)
            stays = inside & ((key > least) | ((key == least) & (position <= last)))
            number = stays.to(tl.int32)
            place = kept + tl.cumsum(number, axis=0) - 1
            tl.debug_barrier()  # All lanes have read before one of them writes.
            tl.store(keys + place, key, mask=stays)
            tl.store(positions + place, position, mask=stays)
            tl.store(payload + place, travels, mask=stays)
            kept += tl.sum(number, axis=0)
        tl.store(status, kept)
        tl.store(cut, least)
        tl.store(cut + 1, last)
