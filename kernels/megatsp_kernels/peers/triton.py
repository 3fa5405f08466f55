"""Flags between ranks: waiting for one, bounded, and setting those of others."""

import triton
import triton.language as tl


@triton.jit
def at(p_table, rank, offset):
    """The address of `offset` bytes into a rank's buffer; int64. Buffers are aligned to 256 bytes."""
    return tl.multiple_of(tl.load(p_table + rank), 256) + offset


@triton.jit
def wait(p_table, p_status, me, first, stop, target, max_spins, flags, step, failed, CODE: tl.constexpr):
    """1 once the flags of ranks [first, stop) are at least `target`, acquired system-wide; 0 if in vain.

    flags: offset of rank 0's flag in this rank's own buffer, `step` bytes before rank 1's. failed: offset of
    the word that says that a wait has failed, after which none of this rank's waits lasts. The first one to
    fail writes p_status.
    """
    own = tl.load(p_table + me)
    p_failed = (own + failed).to(tl.pointer_type(tl.int32))
    there = 1
    for rank in range(first, stop):
        p_flag = (own + flags + rank * step).to(tl.pointer_type(tl.int32))
        seen = tl.atomic_add(p_flag, 0, sem="acquire", scope="sys")
        spins = 0
        stopped = 0
        # Differences, not values, are compared: a counter may wrap around.
        while (seen - target < 0) & (spins < max_spins) & (stopped == 0):
            seen = tl.atomic_add(p_flag, 0, sem="acquire", scope="sys")
            stopped = tl.atomic_add(p_failed, 0, sem="relaxed", scope="gpu")
            spins += 1
        if seen - target < 0:
            there = 0
            if tl.atomic_cas(p_failed, 0, 1, sem="relaxed", scope="gpu") == 0:
                tl.store(p_status + 1, rank)
                tl.store(p_status + 2, target)
                tl.store(p_status + 3, seen)
                tl.store(p_status, CODE)
    return there


@triton.jit
def finish(DRAIN: tl.constexpr):
    """Ends every warp's loads and stores, so that one thread can release them all.

    A barrier orders a block's stores for its own threads. On CDNA a wave's stores may then still be on
    their way to another GPU when another wave releases (triton emits no wait for them): DRAIN waits.
    """
    if DRAIN:
        tl.inline_asm_elementwise(
            "s_waitcnt vmcnt(0)\n\tv_mov_b32 $0, $1", "=v,v,~{memory}", [0], tl.int32, is_pure=False, pack=1
        )
    tl.debug_barrier()


@triton.jit
def tell(p_table, first, stop, flag, value):
    """Sets the flag at offset `flag` of ranks [first, stop); releases, system-wide. `finish` comes before."""
    for rank in range(first, stop):
        p_flag = (tl.load(p_table + rank) + flag).to(tl.pointer_type(tl.int32))
        tl.atomic_xchg(p_flag, value, sem="release", scope="sys")


@triton.jit
def count(p_table, first, stop, flag):
    """Adds one to the flag at offset `flag` of ranks [first, stop), as `tell` sets it."""
    for rank in range(first, stop):
        p_flag = (tl.load(p_table + rank) + flag).to(tl.pointer_type(tl.int32))
        tl.atomic_add(p_flag, 1, sem="release", scope="sys")
