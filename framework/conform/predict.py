"""What the model says a probe must report."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from framework.model import syndrome
from framework.model.attributes import is_device
from framework.model.faults import Fault, FaultType
from framework.model.regime import ImpossibleRegime
from framework.model.walk import El10, Translation, descend

from . import departures, layout
from .case import Memory, Probe, Unknowable, World, in_frames
from .program import Program

_ALL = (1 << 64) - 1
_LOW = (1 << 32) - 1

#: A prediction: (name, offset of the field in the result in words, value, bits that are known).
Expected = list[tuple[str, int, int, int]]

_FIELD = {name: offset // 8 for name, offset in layout.RESULT_FIELDS.items()}
_EC_WFX, _EC_HVC32, _EC_HVC64 = 0x01, 0x12, 0x16
_EC_SHIFT = 26
#: Exception vectors of the guest that faults reach: data and prefetch abort of Armv7; synchronous, from EL1 and from
#: EL0.
_A32_DATA, _A32_PREFETCH, _A64_SAME, _A64_LOWER = 4, 3, 4, 8


def _field(name: str, value: int, known: int = _ALL) -> tuple[str, int, int, int]:
    return name[2:], _FIELD[name], value & known, known


def _category(outcome: Translation | Fault) -> tuple[str, str]:
    """What kind of answer this is, for statistics: the stage that faults, and how."""
    if isinstance(outcome, Translation):
        return ("both stages", "translated")
    stage = "stage 2 on a stage 1 walk" if outcome.s1ptw else f"stage {outcome.stage}"
    return (stage, outcome.type.name.lower().replace("_", " "))


@dataclass(frozen=True)
class Predictor:
    """Predicts the probes of one world, in order: stores change what later loads find."""

    world: World
    program: Program
    memory: Memory
    el10: El10 | None  #: None: every address takes a level 0 fault, and no guest can run
    departed: Counter = field(default_factory=Counter)  #: probes that each departure changed
    outcomes: Counter = field(default_factory=Counter)  #: probes by what the model says becomes of them

    @classmethod
    def of(cls, world: World, program: Program) -> Predictor:
        """Raises ImpossibleRegime where the architecture does not say what the registers do."""
        try:
            el10 = world.el10()
        except ImpossibleRegime as e:
            if not e.level0:
                raise
            return cls(world, program, Memory(world), None)
        if departures.refuses(world.silicon, el10.stage2):
            return cls(world, program, Memory(world), None, Counter({departures.PS_BOUNDS_IPA.name: len(world.probes)}))
        return cls(world, program, Memory(world), el10)

    def predict(self, probe: Probe) -> Expected | None:
        """What the probe reports.

        None where the architecture or the lab does not know, and the probe must not be made.
        """
        try:
            outcome = self._outcome(probe)
            expected = self._expected(probe, outcome)
        except Unknowable:
            return None
        if expected is not None:
            self.outcomes[_category(outcome)] += 1
        return expected

    def _expected(self, probe: Probe, outcome: Translation | Fault) -> Expected | None:
        if not probe.runs:
            return self._translated(probe, outcome)
        return self._aborted(probe, outcome) if isinstance(outcome, Fault) else self._completed(probe, outcome)

    def _outcome(self, probe: Probe) -> Translation | Fault:
        if self.el10 is None:
            return self._departed(self._refused(probe), fwb=False)
        if probe.runs and departures.harness_astray(self.world):
            raise Unknowable(departures.IPA_32_BITS.name)
        trace = [] if self.world.silicon.qemu == "qemu-system-arm" else None
        outcome = self.el10.translate(self.memory, probe.va, probe.access, trace)
        if departures.met_a_block(self.el10, outcome):
            lenient = departures.with_blocks_anywhere(self.el10).translate(self.memory, probe.va, probe.access, trace)
            self.departed[departures.BLOCK_ANYWHERE.name] += lenient != outcome
            outcome = lenient
        if departures.reads_astray(self.world.silicon, trace or [], outcome):
            raise Unknowable(departures.IPA_32_BITS.name)
        return self._departed(outcome, self.el10.stage2.format.fwb)

    def _departed(self, outcome: Translation | Fault, fwb: bool) -> Translation | Fault:
        outcome, names = departures.depart(self.world.silicon, fwb, outcome)
        self.departed.update(names)
        return outcome

    def _refused(self, probe: Probe) -> Fault:
        """The level 0 fault of an impossible regime; stage 1 may object first, or be what meets it."""
        if probe.runs:
            raise Unknowable("no guest runs without stage 2")
        control = self.world.stage1()
        nothing = Fault(FaultType.TRANSLATION, 0, 2)
        if control is None:
            return Fault(FaultType.ADDRESS_SIZE, 0, 1) if probe.va >> self.world.silicon.features.pa_bits else nothing
        return descend(control.regime, probe.va, nothing.on_table_walk)

    # -- AT -----------------------------------------------------------------------------------------------

    def _translated(self, probe: Probe, outcome: Translation | Fault) -> Expected:
        if isinstance(outcome, Fault) and outcome.type is FaultType.EXTERNAL_ON_WALK:
            taken = syndrome.walk_abort(outcome, probe.va, armv7=self.world.silicon.armv7)
            far = _LOW if self.world.silicon.armv7 else _ALL
            return [
                _field("R_KIND", layout.ABORTED),
                _field("R_ESR", taken.esr),
                _field("R_FAR", taken.far, far),
            ]
        par = syndrome.par(outcome)
        return [_field("R_KIND", layout.PAR), _field("R_VALUE", par.value, par.known)]

    # -- guests -------------------------------------------------------------------------------------------

    def _aborted(self, probe: Probe, fault: Fault) -> Expected:
        if fault.type is FaultType.EXTERNAL_ON_WALK:
            return None  # who takes it is for SCR and HCR to say; AT shows the fault itself
        gadget = None if probe.access.fetch else self.program.gadgets[probe.gadget].instruction
        at_el0 = probe.access.fetch and probe.access.el0
        armv7 = self.world.silicon.armv7
        taken = syndrome.abort(fault, probe.access, probe.va, at_el0=at_el0, armv7=armv7, instruction=gadget)
        if taken.el == 2:
            return self._to_el2(probe, taken)
        return self._to_el1_armv7(probe, fault) if armv7 else self._to_el1(taken, at_el0)

    def _to_el2(self, probe: Probe, taken: syndrome.Abort) -> Expected:
        expected = [_field("R_KIND", layout.TRAPPED), _field("R_ESR", taken.esr)]
        if self.world.silicon.armv7:
            shift = 32 if probe.access.fetch else 0
            expected.append(_field("R_FAR", taken.far << shift, _LOW << shift))
        else:
            expected.append(_field("R_FAR", taken.far))
        if taken.hpfar is not None:
            expected.append(_field("R_HPFAR", taken.hpfar))
        return expected

    def _to_el1(self, taken: syndrome.Abort, at_el0: bool) -> Expected:
        vector = _A64_LOWER if at_el0 else _A64_SAME
        return [*self._hvc(vector), _field("R_ESR1", taken.esr), _field("R_FAR1", taken.far)]

    def _to_el1_armv7(self, probe: Probe, fault: Fault) -> Expected:
        fetch = probe.access.fetch
        shift = 32 if fetch else 0
        return [
            *self._hvc(_A32_PREFETCH if fetch else _A32_DATA),
            _field("R_ESR1", syndrome.fsr_armv7(fault, probe.access) << shift, _LOW << shift),
            _field("R_FAR1", probe.va << shift, _LOW << shift),
        ]

    def _hvc(self, number: int) -> Expected:
        ec = _EC_HVC32 if self.world.silicon.armv7 else _EC_HVC64
        return [_field("R_KIND", layout.TRAPPED), _field("R_ESR", ec << _EC_SHIFT | 1 << 25 | number)]

    def _completed(self, probe: Probe, found: Translation) -> Expected | None:
        if probe.access.fetch:
            return self._fetched(probe, found)
        access = self.program.gadgets[probe.gadget].access
        if not in_frames(found.pa, access.size):
            return None
        if access.write:
            self._store(found.pa, access.size, probe.value)
            return self._hvc(layout.HVC_DONE)
        known = _LOW if self.world.silicon.armv7 else _ALL
        return [*self._hvc(layout.HVC_DONE), _field("R_VALUE", self._loaded(found.pa, access), known)]

    def _fetched(self, probe: Probe, found: Translation) -> Expected | None:
        """The WFI traps (HCR.TWI), with ELR at the instruction itself.

        Fetches from device memory are nobody's business.
        """
        device = self.el10.stage2.format.is_device(found.second.attr)
        device |= self.el10.stage1 is not None and is_device(found.first.attr)
        if device or not in_frames(found.pa, 4):
            return None
        return [
            _field("R_KIND", layout.TRAPPED),
            _field("R_ESR", _EC_WFX << _EC_SHIFT, 0x3F << _EC_SHIFT),
            _field("R_ELR", probe.va),
        ]

    def _loaded(self, pa: int, access) -> int:
        word = self.memory.load(pa & ~7) >> 8 * (pa & 7)
        bits = min(8 * access.size, access.bits)
        value = word & ((1 << bits) - 1)
        if access.signed and value >> (bits - 1):
            value |= (1 << access.bits) - (1 << bits)
        return value

    def _store(self, pa: int, size: int, value: int) -> None:
        at, shift = pa & ~7, 8 * (pa & 7)
        mask = ((1 << 8 * size) - 1) << shift
        self.memory.stored[at] = self.memory.load(at) & ~mask | value << shift & mask
