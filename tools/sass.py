"""What the order of the instructions says about the wgmma of a kernel (sm_90). Needs no GPU.

A wgmma (HGMMA) is asynchronous. It reads its operands and writes its accumulators while the program goes
on, until a wait (WARPGROUP.DEPBAR) covers its group. A group ends with the HGMMA that carries `gsb0`.

1. The listing of `cuobjdump -sass` becomes a graph of instructions.
2. What is in flight, and whether a barrier followed the last wait, is carried along every path until
   nothing changes. Where paths meet, the worse holds. A path that no data takes counts too.
3. Each instruction is judged by what may hold in front of it.

In a kernel without wgmma all facts are zero.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?(U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", re.M)
_JUMPS = ("BRA", "CALL", "JMP")
_ENDS = ("EXIT", "RET", "BRX", "JMX")
_SHARED_WRITES = ("STS", "STSM", "LDGSTS", "UTMALDG", "UBLKCP", "ATOMS")
_WRITES_NONE = ("ST", "RED", "UTMA", "SYNCS")
# a predicate may stand before the register
_MAY_WRITE_BOTH = ("ATOM", "LOP3", "MATCH", "SHFL")
_UNCOMMITTED = -1
_OLDEST = 8  # no kernel waits for a group that so many others follow
_NOWHERE: frozenset[int] = frozenset()


class Instruction(NamedTuple):
    """One line of a listing.

    Attributes:
        opcode: with its modifiers, such as "LDS.128".
        operands: as written.
        successors: places in the program that may run next.
        is_predicated: it runs only where a predicate holds.
    """

    opcode: str
    operands: tuple[str, ...]
    successors: tuple[int, ...]
    is_predicated: bool

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]


class State(NamedTuple):
    """What may hold in front of an instruction.

    Attributes:
        accumulators: register of a wgmma in flight -> groups that were committed after its own.
        inputs: the same for the registers that it reads.
        is_barred: whether a barrier stands between the last wait and here.
        origins: register of a left operand -> places of the instructions that may have written it last.
    """

    accumulators: dict[int, int]
    inputs: dict[int, int]
    is_barred: bool
    origins: dict[int, frozenset[int]]


class Facts(NamedTuple):
    """Counts of instructions, as in the columns of tools/resources.

    Attributes:
        unbarred: writes to shared memory with no barrier (BAR.SYNC) since the last wait. A wait holds for one
            warpgroup, and another one may still read what is overwritten (triton #11047).
        touched: instructions that write a register of a wgmma in flight, or read an accumulator of one.
        overlap: exponentials while a wgmma is in flight: the softmax runs beside the tensor cores.
        mixed: wgmma whose left operand lies in registers that more than one instruction may have written.
            ptxas 12.8 can give the registers of a loop's constant queries to what the loop computes, and the
            next round multiplies that (bench/NOTES.md).
    """

    unbarred: int
    touched: int
    overlap: int
    mixed: int


def parse(listing: str) -> list[Instruction]:
    """The instructions of one kernel, with the places that each may lead to."""
    lines = _LINE.findall(listing)
    places = {int(address, 16): i for i, (address, *_) in enumerate(lines)}
    program = []
    for i, (_, predicate, opcode, text) in enumerate(lines):
        name, operands = opcode.split(".")[0], tuple(filter(None, re.split(r",\s*", text)))
        following = [i + 1] if i + 1 < len(lines) else []
        if name in _JUMPS:
            target = places[int(operands[-1], 16)]
            # BRA.DIV, and BRA.U with its predicate among the operands, may go on
            is_sure = name != "CALL" and not predicate and len(operands) == 1 and ".DIV" not in opcode
            following = [target] if is_sure else [*following, target]
        elif name in _ENDS and not predicate:
            following = []
        program.append(Instruction(opcode, operands, tuple(following), bool(predicate)))
    return program


def facts(listing: str) -> Facts:
    """The facts of one kernel."""
    program = parse(listing)
    if not any(instruction.name == "HGMMA" for instruction in program):
        return Facts(0, 0, 0, 0)
    unbarred = touched = overlap = mixed = 0
    for i, state in _states(program).items():
        instruction = program[i]
        unbarred += instruction.name in _SHARED_WRITES and not state.is_barred
        touched += _touches(instruction, state)
        overlap += instruction.opcode.startswith("MUFU.EX2") and bool(state.accumulators)
        if instruction.name == "HGMMA":
            mixed += any(len(state.origins.get(r, ())) > 1 for r in _wgmma_registers(instruction)[1])
    return Facts(unbarred, touched, overlap, mixed)


def _states(program: list[Instruction]) -> dict[int, State]:
    """What may hold in front of every instruction that a path reaches."""
    left = {r for x in program if x.name == "HGMMA" for r in _wgmma_registers(x)[1]}
    before = {0: State({}, {}, True, {})}
    pending = [0]
    while pending:
        i = pending.pop()
        after = _after(program[i], before[i])
        if written := left.intersection(_written(program[i])):
            here = frozenset((i,))
            # where the predicate does not hold, what was there stays
            kept = after.origins if program[i].is_predicated else {}
            after = after._replace(origins=after.origins | {r: here | kept.get(r, here) for r in written})
        for j in program[i].successors:
            merged = _worse(before[j], after) if j in before else after
            if merged != before.get(j):
                before[j] = merged
                pending.append(j)
    return before


def _after(instruction: Instruction, state: State) -> State:
    name, operands = instruction.name, instruction.operands
    if name == "HGMMA":
        accumulators, inputs = _wgmma_registers(instruction)
        state = state._replace(
            accumulators=state.accumulators | dict.fromkeys(accumulators, _UNCOMMITTED),
            inputs=state.inputs | dict.fromkeys(inputs, _UNCOMMITTED),
        )
        if "gsb0" in operands:
            state = state._replace(
                accumulators=_committed(state.accumulators), inputs=_committed(state.inputs)
            )
    elif instruction.opcode.startswith("WARPGROUP.DEPBAR"):
        allowed = int(operands[-1], 16)
        state = state._replace(
            accumulators=_waited(state.accumulators, allowed),
            inputs=_waited(state.inputs, allowed),
            is_barred=False,
        )
    elif instruction.opcode.startswith("BAR.SYNC") and operands == ("0x0",):
        # barrier 0 without a count of threads: all warps of the program
        state = state._replace(is_barred=True)
    return state


def _committed(groups: dict[int, int]) -> dict[int, int]:
    return {register: min(age + 1, _OLDEST) for register, age in groups.items()}


def _waited(groups: dict[int, int], allowed: int) -> dict[int, int]:
    return {register: age for register, age in groups.items() if age < allowed}


def _worse(one: State, other: State) -> State:
    return State(
        _youngest(one.accumulators, other.accumulators),
        _youngest(one.inputs, other.inputs),
        one.is_barred and other.is_barred,
        {
            r: one.origins.get(r, _NOWHERE) | other.origins.get(r, _NOWHERE)
            for r in one.origins | other.origins
        },
    )


def _youngest(one: dict[int, int], other: dict[int, int]) -> dict[int, int]:
    return {r: min(one.get(r, _OLDEST), other.get(r, _OLDEST)) for r in one | other}


def _registers(operand: str, count: int) -> range:
    found = re.match(r"[-|~]*R(\d+)", operand)
    return range(int(found[1]), int(found[1]) + count) if found else range(0)


def _wgmma_registers(instruction: Instruction) -> tuple[range, range]:
    """(accumulators, registers of the left operand) of an HGMMA, whose accumulators are fp32."""
    shape = re.match(r"HGMMA\.64x(\d+)x", instruction.opcode)
    assert shape, f"an HGMMA of an unknown shape: {instruction.opcode}"
    return _registers(instruction.operands[0], int(shape[1]) // 2), _registers(instruction.operands[1], 4)


def _width(opcode: str) -> int:
    """Registers that an instruction loads, stores or makes."""
    parts = opcode.split(".")
    if "128" in parts or (parts[0] == "LDSM" and "4" in parts):
        return 4
    if "64" in parts or "WIDE" in parts or (parts[0] == "CS2R" and "32" not in parts) or parts[-1] == "2":
        return 2
    return 1


def _written(instruction: Instruction) -> range:
    if instruction.name == "HGMMA":
        return _wgmma_registers(instruction)[0]
    if instruction.name.startswith(_WRITES_NONE) or not instruction.operands:
        return range(0)
    written = instruction.operands[0]
    if instruction.name.startswith(_MAY_WRITE_BOTH) and re.fullmatch(r"P[0-6T]", written):
        written = instruction.operands[1]
    return _registers(written, _width(instruction.opcode))


def _touches(instruction: Instruction, state: State) -> bool:
    name, operands = instruction.name, instruction.operands
    if not state.accumulators or not operands:
        return False
    if name == "HGMMA":
        # the next product may go on with the same accumulators, but not read them as its left operand
        return _meets(_wgmma_registers(instruction)[1], state.accumulators)
    made = _written(instruction)
    if _meets(made, state.accumulators) or _meets(made, state.inputs):
        return True
    first_read = 0 if name.startswith(_WRITES_NONE) else 1
    read = [int(r) for o in operands[first_read:] for r in re.findall(r"\bR(\d+)", o)]
    if name.startswith("ST"):
        read += _registers(operands[-1], _width(instruction.opcode))
    return _meets(read, state.accumulators)


def _meets(registers: Iterable[int], groups: dict[int, int]) -> bool:
    return any(register in groups for register in registers)
