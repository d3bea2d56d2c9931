"""Reads machine code as cuobjdump prints it: what each instruction is, what spills, what can follow what."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

# "        /*0c90*/              @!P0 STG.E.128 desc[UR4][R2.64+0x10], R8 ;     /* 0x… */"
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_FUNCTION = re.compile(r"^\s*Function : (\S+)")
_ARCHITECTURE = re.compile(r"^\s*code for (sm_\w+)")
_LANE_INDEX = re.compile(r"\[R\d")
_TARGET = re.compile(r"(?:^|[\s(`])(0x[0-9a-f]+)\)?$")


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str  # "P0", "!P0"; empty when it always runs
    opcode: str  # with its modifiers: "LDG.E.128.CONSTANT"
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def bits(self) -> int:
        """Width of what a load or store moves for each thread."""
        for word in self.opcode.split(".")[1:]:
            if word in ("8", "16", "32", "64", "128", "256"):
                return int(word)
            if re.fullmatch(r"[US](8|16)", word):
                return int(word[1:])
        return 32


@dataclass
class Function:
    """The code of one kernel for one architecture."""

    architecture: str
    symbol: str
    instructions: list[Instruction] = field(default_factory=list)

    def named(self, *names: str) -> list[Instruction]:
        return [one for one in self.instructions if one.name in names]

    @property
    def local_accesses(self) -> list[Instruction]:
        """Loads and stores in local memory: spilled registers, or arrays that did not fit into registers."""
        return self.named("LDL", "STL")

    @property
    def indexed_constants(self) -> list[Instruction]:
        """Loads of constants whose address is in a register of the lane's own: a pass for each different address."""
        return [one for one in self.named("LDC") if _LANE_INDEX.search(one.operands)]

    @property
    def count(self) -> int:
        """Instructions, without the padding at the end."""
        return sum(1 for one in self.instructions if one.name != "NOP" and not _loops_at_itself(one))

    @property
    def size(self) -> int:
        """Bytes of code, padding included; 16 an instruction."""
        return self.instructions[-1].address + 16 if self.instructions else 0

    def successors(self) -> dict[int, set[int]]:
        """Addresses that can come next, by address. Errs on the side of too many.

        Raises:
            ValueError: for a jump whose target is not in the text.
        """
        following = {a.address: {b.address} for a, b in zip(self.instructions, self.instructions[1:])}
        joins: dict[str, set[int]] = {}
        for one in self.named("BSSY"):
            register, _, target = one.operands.partition(",")
            joins.setdefault(register.strip(), set()).add(int(target.strip(), 16))
        addresses = {one.address for one in self.instructions}
        result = {}
        for one in self.instructions:
            after = following.get(one.address, set())
            if one.name in ("BRX", "JMX", "JMXU", "BRXU"):
                raise ValueError(f"{self.symbol}: {one.opcode} at {one.address:#x} jumps to an address in a register")
            if one.name in ("EXIT", "RET", "KILL"):
                result[one.address] = set(after) if one.predicate else set()
            elif one.name == "WARPSYNC" and not (
                (target := _TARGET.search(one.operands)) and int(target[1], 16) in addresses
            ):
                result[one.address] = set(after)  # "WARPSYNC 0xffffffff" has a mask
            elif one.name in ("BRA", "JMP", "CALL", "WARPSYNC") and (target := _TARGET.search(one.operands)):
                # "BRA P0, 0x580" and "BRA.DIV UR4, 0x16c0" have conditions of their own.
                always = one.name in ("BRA", "JMP") and not one.predicate and target.start() == 0
                result[one.address] = {int(target[1], 16)} | (set() if always else after)
            elif one.name == "BSYNC":
                # To where BSSY said: nearly always the next instruction.
                targets = joins.get(one.operands.strip(), set())
                result[one.address] = set(after) if after & targets else targets | after
            else:
                result[one.address] = set(after)
        return result

    def after(self, starts: set[int]) -> set[int]:
        """Addresses that can be reached from some, those themselves only if by a loop."""
        edges = self.successors()
        seen: set[int] = set()
        todo = [target for start in starts for target in edges[start]]
        while todo:
            address = todo.pop()
            if address not in seen:
                seen.add(address)
                todo.extend(edges.get(address, ()))
        return seen

    def mixed_stores(self) -> list[Instruction]:
        """Global stores below 128 bits that one thread can execute as well as one of 128 bits."""
        stores = self.named("STG")
        wide = {one.address for one in stores if one.bits == 128}
        narrow = {one.address for one in stores if one.bits < 128}
        mixed = narrow & self.after(wide) | {address for address in narrow if self.after({address}) & wide}
        return [one for one in stores if one.address in mixed]


def _loops_at_itself(one: Instruction) -> bool:
    return one.name == "BRA" and one.operands == hex(one.address)


def parse(text: str) -> list[Function]:
    """The functions in the output of ``cuobjdump -sass``."""
    functions: list[Function] = []
    architecture = ""
    for line in text.splitlines():
        if match := _ARCHITECTURE.match(line):
            architecture = match[1]
        elif match := _FUNCTION.match(line):
            functions.append(Function(architecture, match[1]))
        elif functions and (match := _INSTRUCTION.match(line)):
            functions[-1].instructions.append(
                Instruction(int(match[1], 16), match[2] or "", match[3], match[4].rstrip())
            )
    return functions


def parse_usage(text: str) -> dict[tuple[str, str], dict[str, int]]:
    """Registers, stack, shared and local memory by architecture and symbol: ``cuobjdump -res-usage``."""
    usage: dict[tuple[str, str], dict[str, int]] = {}
    architecture = symbol = ""
    for line in text.splitlines():
        if match := re.match(r"^arch = (sm_\w+)", line):
            architecture = match[1]
        elif match := re.match(r"^\s*Function (\S+):$", line):
            symbol = match[1]
        elif symbol and "REG:" in line:
            usage[architecture, symbol] = {
                key: int(value) for key, value in re.findall(r"(\w+)(?:\[\d+\])?:(\d+)", line)
            }
            symbol = ""
    return usage
