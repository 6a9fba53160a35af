"""How many instructions the compiled `split` has for what it does: counted in its machine code, never measured.

A warp decodes 32 tokens of four octets in a *step*, 32 numbers a lane. Steps are told apart by what they load: the
compiler makes one stretch of code without branches of each number of planes. All else of a loop's body is counted as
run once a round, also what only some rounds run.
"""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qaq_core.base.widths import HALF, WIDTHS
from qaq_core.kernels.cuda.structures import DEEPER, NEAR, TILE

BLOCK, WARPS = 1024, 4
GROUP = 4
_LINE = re.compile(r"\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);")


class UnknownCode(RuntimeError):
    """Machine code that is not arranged as expected."""


@dataclass(frozen=True)
class Profile:
    """Rows of a side: steps by their number of planes, and tiles, for 32 tokens; octets of a row."""

    steps: dict[int, float]
    tiles: float
    octets: int


@dataclass(frozen=True)
class Counts:
    """Warp instructions of `split`.

    Attributes:
        keys, values: of a step, by its number of planes; DEEPER stands for that and more.
        key_tile, value_tile: of 32 tokens beside the steps, with what chooses each step.
        means: of 32 tokens. rest: of 32 tokens, sorting and softmax.
        whole: instructions in the kernel.
    """

    keys: dict[int, int]
    values: dict[int, int]
    key_tile: int
    value_tile: int
    means: float
    rest: float
    whole: int

    def per_number(self, rows: tuple[Profile, Profile]) -> float:
        """Warp instructions for 32 numbers of such keys and values."""
        total = self.means + self.rest
        for mine, each, tile in zip(rows, (self.keys, self.values), (self.key_tile, self.value_tile), strict=True):
            total += mine.tiles * tile + sum(share * each[planes] for planes, share in mine.steps.items())
        return total / (2 * rows[0].octets * 8)


def find_disassembler() -> str | None:
    """cuobjdump on PATH or, with the name of its folder, in Triton's wheel; None without."""
    found = shutil.which("cuobjdump")
    if found is None:
        try:
            import triton
        except ImportError:
            return None
        bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(bundled) if bundled.exists() else None
    return found


def count(cubin: Path, head_dim: int, disassembler: str) -> Counts:
    """Counts of a cubin.

    Raises:
        UnknownCode: a compiler arranged the code otherwise.
    """
    done = subprocess.run([disassembler, "-sass", str(cubin)], capture_output=True, text=True, timeout=120, check=True)
    return count_code(_instructions(done.stdout, f"qaq_split_{head_dim}"), head_dim)


def count_code(code: list[tuple[int, str]], head_dim: int) -> Counts:
    """The same of instructions, with their addresses."""
    blocks = [block for block in _blocks(code) if sum(_name(text) == "HMMA" for _, text in block) == 8]
    keys: dict[int, list[list[tuple[int, str]]]] = {}
    values: dict[int, list[list[tuple[int, str]]]] = {}
    for block in blocks:
        planes, of_keys = _step(block)
        (keys if of_keys else values).setdefault(planes, []).append(block)
    wanted = set(range(1, DEEPER + 1))
    groups = min(head_dim, 128) // 32  # steps of values that stand one after the other in the code
    if set(keys) != wanted or set(values) != wanted or any(len(found) != groups for found in values.values()):
        raise UnknownCode(f"steps of {sorted(keys)} planes of keys and {sorted(values)} of values")
    loops = _loops(code)
    mean_inner, mean_outer = _enclosing(loops, _first_block(code, 4 * NEAR // 8), 2)
    key_steps = [block for found in keys.values() for block in found]
    key_inner, key_outer = _enclosing(loops, _span(key_steps), 2)
    value_steps = [block for found in values.values() for block in found]
    (value_loop,) = _enclosing(loops, _span(value_steps), 1)
    inside = {address for block in (*key_steps, *value_steps) for address, _ in block}
    size = {name: sum(low <= address <= high and address not in inside for address, _ in code)
            for name, (low, high) in {"mean": mean_inner, "means": mean_outer, "step": key_inner, "keys": key_outer,
                                      "values": value_loop}.items()}  # fmt: skip
    rounds = head_dim // 32
    passes = max(1, head_dim // 128)
    in_loops = {a for low, high in (mean_outer, key_outer, value_loop) for a, _ in code if low <= a <= high}
    return Counts(
        {planes: len(found[0]) for planes, found in keys.items()},
        {planes: max(map(len, found)) for planes, found in values.items()},
        size["keys"] - size["step"] + rounds * size["step"],
        passes * size["values"],
        (size["means"] + (rounds - 1) * size["mean"]) * TILE / (2 * NEAR),
        _rest(code, loops, in_loops),
        len(code),
    )


def profile(order: Sequence[int], shares: Mapping[float, float], head_dim: int, block: int | None = None) -> Profile:
    """What rows of a side ask of the kernel for 32 tokens.

    Args:
        order: the octet of each unit of a row of a model whose head_dim may be another; then an octet has the planes of
            the one that stands at the same part of the row. shares: of rows, by bits an element; they sum to 1.
        block: tiles are filled as a block of so many tokens with just these shares fills them; if None, all are full.
    """
    steps: dict[int, float] = {}
    octets, given, tiles = head_dim // 8, len(order) // 8, 0.0
    for bits, share in shares.items():
        if not bits or 2 * bits not in WIDTHS or 2 * bits == HALF:
            continue
        held = Counter(order[: int(bits * given)])
        planes_of = [held[octet * given // octets] for octet in range(octets)]
        weight = share if block is None else math.ceil(share * block / TILE) * TILE / block
        tiles += weight
        for first in range(0, octets, GROUP):
            planes = min(DEEPER, max(planes_of[first : first + GROUP]))
            if planes:
                steps[planes] = steps.get(planes, 0.0) + weight
    return Profile(steps, tiles, octets)


def _instructions(listing: str, kernel: str) -> list[tuple[int, str]]:
    found: list[tuple[int, str]] = []
    inside = False
    for line in listing.splitlines():
        if "Function : " in line:
            inside = line.strip().endswith(f"Function : {kernel}")
        elif inside and (match := _LINE.match(line)):
            found.append((int(match[1], 16), match[2].strip()))
    if not found:
        raise UnknownCode(f"there is no {kernel}")
    return found


def _name(text: str) -> str:
    return re.sub(r"^@!?U?P[0-9T]+ ", "", text).split()[0].split(".")[0]


def _target(text: str) -> int | None:
    match = re.search(r"\b(?:BRA|BSSY|CALL)\S* .*?0x([0-9a-f]+)", text)
    return int(match[1], 16) if match else None


def _blocks(code: list[tuple[int, str]]) -> list[list[tuple[int, str]]]:
    """Stretches without branches into or out of them."""
    targets = {_target(text) for _, text in code}
    blocks: list[list[tuple[int, str]]] = [[]]
    for address, text in code:
        if address in targets:
            blocks.append([])
        blocks[-1].append((address, text))
        if _name(text) in ("BRA", "BRX", "EXIT", "BSYNC", "RET", "CALL"):
            blocks.append([])
    return blocks


def _step(block: list[tuple[int, str]]) -> tuple[int, bool]:
    """Planes of a step, and whether it is of keys: they load the query's fragments too, values two words a plane."""
    loads = Counter(text.split("LDG.E")[1].split()[0] for _, text in block if "LDG.E" in text)
    kind = {name: sum(n for text, n in loads.items() if name in text) for name in ("U16", "U8", "128", "64")}
    words = sum(loads.values()) - sum(kind.values())
    if kind["U16"] >= 32:
        return DEEPER, kind["128"] == 2
    pools = 2 if kind["64"] else 1
    of_keys = kind["128"] == 2 + pools
    planes = words - (0 if kind["64"] else 1)
    return (planes, True) if of_keys else (planes // 2, False)


def _loops(code: list[tuple[int, str]]) -> list[tuple[int, int]]:
    """First and last address of loops, the shortest first."""
    ends = [(target, a) for a, text in code if _name(text) == "BRA" and (target := _target(text)) and target < a]
    return sorted(ends, key=lambda loop: loop[1] - loop[0])


def _span(blocks: list[list[tuple[int, str]]]) -> tuple[int, int]:
    return min(block[0][0] for block in blocks), max(block[-1][0] for block in blocks)


def _first_block(code: list[tuple[int, str]], products: int) -> tuple[int, int]:
    for block in _blocks(code):
        if sum(_name(text) == "HMMA" for _, text in block) == products:
            return block[0][0], block[-1][0]
    raise UnknownCode("no product of the means")


def _enclosing(loops: list[tuple[int, int]], span: tuple[int, int], number: int) -> list[tuple[int, int]]:
    found = [loop for loop in loops if loop[0] <= span[0] and span[1] <= loop[1]][:number]
    if len(found) < number:
        raise UnknownCode("steps that stand in no loop")
    return found


def _rest(code: list[tuple[int, str]], loops: list[tuple[int, int]], done: set[int]) -> float:
    """Sorting and softmax for 32 tokens: a block's straight code once, the softmax's loops as often as they run.

    Loops that full blocks do not run (hiding tokens, scores for a statistic, rows in half precision) are left out.
    """
    exponents = [a for a, text in code if _name(text) == "MUFU" and "EX2" in text and a not in done]
    inner = {loop for a in exponents for loop in loops if loop[0] <= a <= loop[1]}
    small = sorted(inner, key=lambda loop: loop[1] - loop[0])[:1]
    looped = {a for low, high in loops if high - low < 0x2000 for a in range(low, high + 1, 16)}
    end = max(done)
    straight = sum(a not in done and a not in looped and a < end for a, _ in code)
    softmax = sum(low <= a <= high for low, high in small for a, _ in code)
    # A thread weighs BLOCK / (32 · WARPS) tokens of four heads, four at a time in what the loop does at least.
    exponentials = max(1, sum(low <= a <= high for a in exponents for low, high in small))
    rounds = 4 * BLOCK / (32 * WARPS) / exponentials
    return (straight + softmax * rounds * 1.5) * TILE / BLOCK * WARPS
