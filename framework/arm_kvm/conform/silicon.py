"""The board that runs the conformance program. Worlds and results are exchanged through its RAM."""

from __future__ import annotations

import mmap
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from arm_kvm.conform import layout, program
from arm_kvm.conform.case import Probe, Silicon, TableWorld, frame_word
from arm_kvm.host.config import HostConfig
from arm_kvm.machine.board import Boot
from arm_kvm.machine.machine import Logs, Machine
from arm_kvm.model.arch.regime import ARMV7
from arm_kvm.support.errors import ProgramSilent, QemuDied, SetupError

_MEMORY = 1 << 30
_PATIENCE = 5.0  #: seconds; a world takes milliseconds, unless a guest never returns
_SPINS = 1000
_WORDS = layout.RECORD // 8
_OWN_WORDS = 0x2000 // 8  #: more than the program's size
_POISON = (1 << 64) - 1  #: a result that was not written


def _control(name: str) -> int:
    """Physical address of a field of the control block."""
    return layout.CONTROL + layout.CONTROL_FIELDS[name]


class Lab:
    """A machine that runs the program. Use it as a context manager, which leaves no process and no file behind.

    Raises SetupError (no QEMU, no binutils, a board without EL2), QemuRefused.
    """

    def __init__(self, config: HostConfig, logs: Path) -> None:
        self.program = program.build("A32" if config.linux_arch == "arm" else "A64")
        self._architecture = config.architecture
        self._board = replace(config.board, cpus=1, memory=_MEMORY)
        self._logs = Logs(logs)
        self._start()
        end = self._board.ram_base + _MEMORY
        identity = self._slice(_control("MMFR0"), len(self._architecture.identity)).tolist()
        features = self._architecture.features(*identity)
        qemu = self._board.qemu
        self.silicon = Silicon(self._architecture is ARMV7, features, end, qemu.program, qemu.version)
        self.restore()

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- the machine -------------------------------------------------------------------------------------

    def _start(self) -> None:
        with tempfile.NamedTemporaryFile(prefix="arm-kvm-", suffix=".elf") as image:
            image.write(self.program.elf)
            image.flush()
            self.machine = Machine.start(self._board, Boot(Path(image.name)), self._logs)
            self._map = mmap.mmap(self.machine.ram.file, _MEMORY)
            self._words = np.frombuffer(self._map, dtype="<u8")
            self._sequence = 0
            self._written: list[int] = []
            try:
                self._request(0)
                if not self._answered():
                    raise self._not_started()
                self._pristine = self._own_memory()
            except BaseException:
                self.close()
                raise

    def _not_started(self) -> SetupError:
        level, register = self.peek(_control("LEVEL")), "CPSR" if self._architecture is ARMV7 else "CurrentEL"
        found = f"it was entered with {register} {level:#x}" if level else "it never ran"
        return SetupError(
            f"the {self.program.isa.name} conformance program does not answer on this board: {found}",
            remedy="the board needs virtualization=on, no secure=on, and a CPU of the host's instruction set",
            evidence=self.machine.evidence(),
        )

    def close(self) -> None:
        """Stop the machine."""
        self.machine.kill()
        self._words = np.zeros(0, dtype="<u8")
        with suppress(BufferError):  # the traceback of an exception may still hold a view of it
            self._map.close()

    def restart(self) -> None:
        """Start a new machine, as the program does not answer or may have been overwritten."""
        self.close()
        self._start()
        self.restore()

    def heal(self) -> None:
        """Undo unexpected stores of guests. Start a new machine if they hit the program."""
        if self._own_memory() != self._pristine:
            self.restart()
            return
        self._slice(layout.ARENA, layout.ARENA_SIZE // 8)[:] = 0
        self.restore()

    def _own_memory(self) -> bytes:
        """The program's text, and the harness except its table."""
        text = self._slice(layout.PROGRAM, _OWN_WORDS).tobytes()
        return text + self._slice(layout.HARNESS, layout.UPPER_TABLE // 8).tobytes()

    def _slice(self, pa: int, words: int) -> NDArray[np.uint64]:
        first = self._at(pa)
        return self._words[first : first + words]

    def _at(self, pa: int) -> int:
        """Index of the word at a physical address."""
        return (pa - self._board.ram_base) >> 3

    # -- a world -----------------------------------------------------------------------------------------------

    def run(self, world: TableWorld, probes: Sequence[Probe]) -> list[list[int]]:
        """Make these probes of a world. Return the results of eight words, named by layout.RESULT_FIELDS.

        Raises ProgramSilent if the program does not answer, QemuDied; the machine is then a new one.
        """
        if not probes:
            return []
        self._enter(world)
        rows = np.zeros((len(probes), _WORDS), dtype="<u8")
        rows[:, :5] = [self._record(world, probe) for probe in probes]
        self._slice(layout.PROBES, rows.size)[:] = rows.ravel()
        results = self._slice(layout.RESULTS, rows.size)
        results[:] = 0
        results[::_WORDS] = _POISON
        self._request(len(probes))
        self._await()
        answers: list[list[int]] = self._slice(layout.RESULTS, rows.size).reshape(-1, _WORDS).tolist()
        return answers

    def _enter(self, world: TableWorld) -> None:
        for pa in self._written:
            self._poke(pa, 0)
        for pa, word in world.words.items():
            self._poke(pa, word)
        self._written = list(world.words)
        self._poke(layout.HARNESS + layout.UPPER_TABLE, world.upper_table)
        r = world.registers
        self._slice(_control("HCR"), 9)[:] = (r.hcr, r.vtcr, r.vttbr, r.sctlr, r.tcr, r.ttbr0, r.ttbr1, r.mair, r.vbar)

    def _record(self, world: TableWorld, probe: Probe) -> tuple[int, int, int, int, int]:
        """OP, ADDRESS, VALUE, PC, PSTATE."""
        if not probe.runs:
            return probe.op, probe.va, 0, 0, 0
        gadgets = world.harness + layout.GADGETS
        pc = probe.va if probe.gadget is None else gadgets + layout.GADGET_SIZE * probe.gadget
        return probe.op, probe.va, probe.value, pc, self.program.modes[not probe.user]

    def _poke(self, pa: int, word: int) -> None:
        self._words[self._at(pa)] = word

    def peek(self, pa: int) -> int:
        """The word at a physical address."""
        return int(self._words[self._at(pa)])

    def restore(self, pas: Sequence[int] | None = None) -> None:
        """Restore the initial content of these words of the frames, or of all."""
        if pas is None:
            pas = range(layout.FRAMES, layout.FRAMES + layout.FRAMES_SIZE, 16)
            chunks = self._slice(layout.FRAMES, layout.FRAMES_SIZE // 8)
            pages = [frame_word(pa, self.silicon) for pa in pas[::256]]
            chunks[0::2] = np.repeat(np.array(pages, dtype=np.uint64), 256)
            chunks[1::2] = pas
            return
        for pa in pas:
            self._poke(pa, frame_word(pa, self.silicon))

    # -- the handshake -----------------------------------------------------------------------------------------

    def _request(self, count: int) -> None:
        self._sequence += 1
        self._asked = count
        self._poke(_control("COUNT"), count)
        self._poke(_control("REQUEST"), self._sequence)

    def _answered(self) -> bool:
        """Wait for the answer to the last request. Return False after _PATIENCE."""
        where = self._at(_control("ANSWER"))
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            for _ in range(_SPINS):
                if self._words[where] == self._sequence:
                    return True
            self.machine.check()
        return False

    def _await(self) -> None:
        try:
            if self._answered():
                return
        except QemuDied:
            self.restart()
            raise
        done = int((self._slice(layout.RESULTS, self._asked * _WORDS)[::_WORDS] != _POISON).sum())
        lost = ProgramSilent(
            f"the conformance program did not answer within {_PATIENCE:.0f} s; {done} of {self._asked} probes answered",
            evidence=self.machine.evidence(),
        )
        self.restart()
        raise lost
