"""What a kernel's assembly shows: AMD's, or PTX, whose instructions NVIDIA's assembler keeps."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

WIDE_BYTES = 16  # of a lane: the widest that a chip loads at once


@dataclass(frozen=True)
class Instructions:
    """Counts in the text, not at run time; masked and conditional ones too.

    matrix: by name. loads, stores: of device memory; wide: those of 16 bytes a lane.
    system_acquires, system_releases: that order memory with other GPUs and the host.
    loop_flops, loop_bytes: of one warp, in one turn of the innermost loop with matrix instructions and loads
    (in all of the kernel where no loop has them): products, and bytes loaded from device memory.
    """

    matrix: Mapping[str, int]
    loads: int
    wide_loads: int
    stores: int
    wide_stores: int
    atomics: int
    float_atomics: int
    system_acquires: int
    system_releases: int
    loop_flops: int
    loop_bytes: int

    @property
    def intensity(self) -> float | None:
        """FLOPs for each byte that the loop loads; None without products or loads."""
        return self.loop_flops / self.loop_bytes if self.loop_flops and self.loop_bytes else None


def has_system_scope(asm: str, target: str) -> bool:
    """Whether there are acquires and releases at system scope."""
    found = count(asm, target)
    return found.system_acquires > 0 and found.system_releases > 0


def count(asm: str, target: str) -> Instructions:
    """The instructions of a kernel for "gfx942", "gfx950" or "sm_90" (PTX)."""
    dialect = _AMD if target.startswith("gfx") else _PTX
    lines = list(_lines(asm, dialect.comment))
    matrix = Counter(name for line in lines for name in dialect.matrix.findall(line))
    loads, stores = dialect.widths(lines, "load"), dialect.widths(lines, "store")
    loop = _innermost(lines, dialect)
    atomics = [line for line in lines if dialect.atomic.search(line)]
    return Instructions(
        matrix=dict(sorted(matrix.items())),
        loads=len(loads),
        wide_loads=sum(width >= WIDE_BYTES for width in loads),
        stores=len(stores),
        wide_stores=sum(width >= WIDE_BYTES for width in stores),
        atomics=len(atomics),
        float_atomics=sum(bool(dialect.float_atomic.search(line)) for line in atomics),
        system_acquires=sum(bool(dialect.acquire.search(line)) for line in lines),
        system_releases=sum(bool(dialect.release.search(line)) for line in lines),
        loop_flops=sum(dialect.flops(name) for line in loop for name in dialect.matrix.findall(line)),
        loop_bytes=dialect.lanes * sum(dialect.widths(loop, "load")),
    )


@dataclass(frozen=True)
class _Dialect:
    """How one assembler writes things."""

    comment: str
    lanes: int
    matrix: re.Pattern[str]
    shape: re.Pattern[str]  # of a matrix instruction: M, N, K, and blocks where there are several
    access: re.Pattern[str]
    label: re.Pattern[str]
    branch: re.Pattern[str]
    atomic: re.Pattern[str]
    float_atomic: re.Pattern[str]
    acquire: re.Pattern[str]
    release: re.Pattern[str]

    def flops(self, name: str) -> int:
        """Of one warp. A wgmma is shared by four warps."""
        found = self.shape.search(name)
        assert found, f"unknown matrix instruction {name}"
        m, n, k, blocks = (int(text or 1) for text in found.groups())
        return 2 * m * n * k * blocks // (4 if name.startswith("wgmma") else 1)

    def widths(self, lines: Sequence[str], kind: str) -> list[int]:
        """Bytes a lane of each load or store of device memory."""
        found = (self.access.search(line) for line in lines)
        return [_width(match) for match in found if match and _kind(match) == kind]


_AMD = _Dialect(
    comment=";",
    lanes=64,
    matrix=re.compile(r"^(v_s?mfma\w+)"),
    shape=re.compile(r"_(\d+)x(\d+)x(\d+)(?:_(\d+)b)?"),
    access=re.compile(r"^(?:global|buffer|flat)_(?P<kind>load|store)_(?:lds_)?(?P<type>\w+)"),
    label=re.compile(r"^(\.?\w+):"),
    branch=re.compile(r"^s_c?branch\w*\s+(\.?\w+)"),
    atomic=re.compile(r"^(?:global|buffer|flat)_atomic_"),
    float_atomic=re.compile(r"_atomic_(?:pk_)?(?:add|min|max)_(?:f|bf)\d+"),
    # Scope bits: sc0 sc1 is the system, sc1 alone the GPU.
    acquire=re.compile(r"^buffer_inv sc0 sc1"),
    release=re.compile(r"^buffer_wbl2 sc0 sc1"),
)
_SYSTEM = r"(?=.*\.sys\b)"
_PTX = _Dialect(
    comment="//",
    lanes=32,
    matrix=re.compile(r"\b((?:wgmma\.mma_async|mma\.sync)[\w.]*)"),
    shape=re.compile(r"\.m(\d+)n(\d+)k(\d+)()"),
    access=re.compile(
        r"\b(?P<kind>ld|st)\.(?:global|[\w.]*\.global)(?P<type>[\w.:]*)"
        r"|\b(?P<async>cp\.async\.c[ag]\.shared[\w:]*\.global)[^,]*,[^,]*,\s*(?P<bytes>\w+)"
    ),
    label=re.compile(r"^(\$?\w+):"),
    branch=re.compile(r"\bbra(?:\.uni)?\s+(\$?\w+)"),
    atomic=re.compile(r"\b(?:atom|red)\."),
    float_atomic=re.compile(r"\b(?:atom|red)\.[\w.:]*\.(?:f|bf)\d+"),
    acquire=re.compile(rf"^{_SYSTEM}.*\b(?:ld|atom|red|fence)\.[\w.]*\b(?:acquire|acq_rel|sc)\b"),
    release=re.compile(rf"^{_SYSTEM}.*\b(?:st|atom|red|fence)\.[\w.]*\b(?:release|acq_rel|sc)\b"),
)
_AMD_BYTES = {"dword": 4, "ubyte": 1, "sbyte": 1, "byte": 1, "ushort": 2, "sshort": 2, "short": 2}


def _lines(asm: str, comment: str) -> Iterator[str]:
    """Instructions and labels, without comments, blanks and directives."""
    for line in asm.splitlines():
        text = line.split(comment, 1)[0].strip()
        if text and not (text.startswith(".") and not text.endswith(":")):
            yield text


def _kind(access: re.Match[str]) -> str:
    groups = access.groupdict()
    if groups.get("async"):
        return "load"
    return {"ld": "load", "st": "store"}.get(groups["kind"], groups["kind"])


def _width(access: re.Match[str]) -> int:
    """Bytes a lane."""
    groups = access.groupdict()
    if groups.get("async"):
        return int(groups["bytes"], 0)
    kind = groups["type"]
    if "." not in kind:  # AMD: dwordx4, ubyte_d16
        base, _, times = kind.split("_")[0].partition("x")
        return _AMD_BYTES[base] * int(times or 1)
    vector = re.search(r"\.v(\d+)\b", kind)
    bits = re.search(r"\.[busf](\d+)$", kind)
    return int(vector[1] if vector else 1) * int(bits[1] if bits else 32) // 8


def _innermost(lines: list[str], dialect: _Dialect) -> list[str]:
    """The shortest loop with matrix instructions and loads, else everything.

    A loop ends in a branch back. So does the way out of one that LLVM moved before it, but without loads.
    """
    labels = {found[1]: i for i, line in enumerate(lines) if (found := dialect.label.search(line))}
    loops = []
    for end, line in enumerate(lines):
        found = dialect.branch.search(line)
        if found and labels.get(found[1], end) < end:
            loops.append(lines[labels[found[1]] : end])
    whole = [loop for loop in loops if any(map(dialect.matrix.search, loop)) and dialect.widths(loop, "load")]
    return min(whole, key=len, default=lines)
