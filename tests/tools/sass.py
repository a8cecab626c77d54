"""Reads compiled kernels: which registers instructions write while matrix products may still read them."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from typing import NamedTuple

import triton

_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]+)\*/\s+(.*?);")
_DESTINATION = re.compile(r"(?:@!?U?P\d+ )?([^@\s]\S*) R(\d+)")
_PRODUCT = re.compile(r"HGMMA\.\S+ R\d+, R(\d+), gdesc")
_JUMP = re.compile(r"BRA (?:!?U?P\d+, )?0x([0-9a-f]+)")
#: Waits leave at most so many groups running.
_MOST_WAITED_FOR = 7
_WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)")
#: Begin of the names of instructions whose first operand is no register that they write.
_WRITES_NONE = tuple(
    "HGMMA ST BAR BRA SYNCS WARPGROUP EXIT UTMA USETMAXREG NOP ISETP FSETP PLOP R2UR UI UL US UM UP DEPBAR RED ATOM "
    "BSSY BSYNC FENCE MEMBAR CCTL WARPSYNC VOTE ELECT S2UR".split()
)


def disassemble(cubin: bytes) -> str:
    """SASS of a compiled kernel, by the cuobjdump that comes with Triton."""
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout


class _Instruction(NamedTuple):
    """One line of a kernel. `written` are the numbers of the registers that it writes."""

    address: int
    text: str
    written: range


def _written(instruction: str) -> range:
    """Numbers of the registers that an instruction writes."""
    match = _DESTINATION.match(instruction)
    if match is None or match[1].startswith(_WRITES_NONE):
        return range(0)
    name, first = match[1], int(match[2])
    return range(first, first + (4 if ".128" in name else 2 if ".64" in name or "WIDE" in name else 1))


def _code(sass: str) -> tuple[list[_Instruction], dict[int, int]]:
    """Instructions in order, and the place of each address."""
    lines = [(int(m[1], 16), m[2]) for m in map(_INSTRUCTION.match, sass.splitlines()) if m]
    code = [_Instruction(address, text, _written(text)) for address, text in lines]
    return code, {instruction.address: i for i, instruction in enumerate(code)}


def overwritten_operands(sass: str) -> list[str]:
    """Products whose left operand, in registers, another instruction may overwrite before a wait for them.

    ptxas must not do so, since the product reads them at its leisure, but does where one runs across the end of a
    loop (Triton 3.6 and its ptxas 12.8; see triton issues 9433 and 11781).
    """
    code, place = _code(sass)
    found = []
    for start, (address, product, _) in enumerate(code):
        match = _PRODUCT.match(product)
        if match is None:
            continue
        operand = set(range(int(match[1]), int(match[1]) + 4))
        # Places to go on from, and how many groups of products were closed since the product was issued, its own
        # counted: `gsb0` closes one, and a wait leaves the newest ones running.
        todo, seen = [(start + 1, int("gsb0" in product))], set()
        while todo:
            i, closed = todo.pop()
            while i < len(code) and (i, closed) not in seen:
                seen.add((i, closed))
                _, instruction, written = code[i]
                wait = _WAIT.match(instruction)
                if instruction.startswith("EXIT") or (wait and closed > int(wait[1])):
                    break
                if not operand.isdisjoint(written):
                    found.append(f"{address:#x} {product} / {code[i].address:#x} {instruction}")
                    break
                if instruction.startswith("HGMMA") and "gsb0" in instruction:
                    closed = min(closed + 1, _MOST_WAITED_FOR + 1)
                if jump := _JUMP.search(instruction):
                    target = place.get(int(jump[1], 16))
                    if target is not None:
                        todo.append((target, closed))
                    if instruction.startswith("BRA 0x"):
                        break
                i += 1
    return found


def lost_operands(sass: str) -> list[str]:
    """Products in a loop whose left operand was loaded into registers ahead of it, and that the loop overwrites.

    ptxas gives away registers of such operands where it lacks some (Triton 3.6 and its ptxas 12.8): the next round
    multiplies with whatever they hold.
    """
    code, place = _code(sass)
    before: list[list[int]] = [[] for _ in code]
    for i, following in enumerate(_successors(code, place)):
        for j in following:
            before[j].append(i)
    loops = _loops(before)
    found = []
    for i, (address, product, _) in enumerate(code):
        match = _PRODUCT.match(product)
        around = [loop for loop in loops if i in loop[1]]
        if match is None or not around:
            continue
        head, body = min(around, key=lambda loop: len(loop[1]))
        operand = set(range(int(match[1]), int(match[1]) + 4))
        writes = {at for at, instruction in enumerate(code) if not operand.isdisjoint(instruction.written)}
        own = sorted(writes & body)
        is_held = head in _reach(before, [i], writes, body)
        ahead = _reach(before, [at for at in before[head] if at not in body], writes, set(range(len(code))))
        if own and is_held and {code[at].text.split(".")[0] for at in ahead & writes} == {"LDSM"}:
            found.append(f"{address:#x} {product} / {code[own[0]].address:#x} {code[own[0]].text}")
    return found


def _successors(code: list[_Instruction], place: dict[int, int]) -> list[list[int]]:
    """Which instructions may follow each."""
    following = []
    for i, (_, instruction, _) in enumerate(code):
        jump = _JUMP.search(instruction)
        targets = [place[int(jump[1], 16)]] if jump and int(jump[1], 16) in place else []
        if not instruction.startswith(("EXIT", "BRA 0x")) and i + 1 < len(code):
            targets.append(i + 1)
        following.append(targets)
    return following


def _loops(before: list[list[int]]) -> list[tuple[int, set[int]]]:
    """Natural loops: the head, which each path into the loop passes, and all instructions. A wait that is repeated
    somewhere behind, and jumps back from there, makes no loop of what lies between."""
    # Bit j of dominators[i]: every path from the first instruction to i passes j.
    dominators = [1] + [-1] * (len(before) - 1)
    changed = True
    while changed:
        changed = False
        for i in range(1, len(before)):
            passed = -1
            for j in before[i]:
                passed &= dominators[j]
            passed |= 1 << i
            if passed != dominators[i]:
                dominators[i], changed = passed, True
    bodies: dict[int, set[int]] = {}
    for head in range(len(before)):
        for tail in before[head]:
            if dominators[tail] >= 0 and dominators[tail] >> head & 1:
                body, todo = bodies.setdefault(head, {head}), [tail]
                while todo:
                    if (i := todo.pop()) not in body:
                        body.add(i)
                        todo += before[i]
    return list(bodies.items())


def _reach(before: list[list[int]], ends: list[int], writes: set[int], within: set[int]) -> set[int]:
    """Instructions from which `ends` can be reached without one of `writes` between, all `within` a set; the ends, and
    writes that come first, included."""
    reached, todo = set(), list(ends)
    while todo:
        i = todo.pop()
        if i not in reached and i in within:
            reached.add(i)
            if i not in writes:
                todo += before[i]
    return reached
