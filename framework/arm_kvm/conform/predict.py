"""The model's prediction of what a probe reports."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from arm_kvm.conform import departures, layout
from arm_kvm.conform.case import Probe, TableMemory, TableWorld, Unknowable, frame_number, in_frames
from arm_kvm.conform.departures import Departure
from arm_kvm.conform.program import Program
from arm_kvm.guest.isa import Access as GuestAccess
from arm_kvm.model.arch import descriptors as d
from arm_kvm.model.arch import syndrome
from arm_kvm.model.arch.attributes import is_device
from arm_kvm.model.arch.faults import Fault, FaultType
from arm_kvm.model.arch.granule import LAST_LEVEL
from arm_kvm.model.arch.regime import ImpossibleRegime
from arm_kvm.model.arch.walk import El10, Step, Trace, Translation, descend

_ALL = (1 << 64) - 1
_LOW = (1 << 32) - 1
_EA = 1 << 9

#: A prediction: (name, index of the word in the result, value, bits that are known).
Expected = list[tuple[str, int, int, int]]

_FIELD = {name: offset // 8 for name, offset in layout.RESULT_FIELDS.items()}
_EC_WFX, _EC_HVC32, _EC_HVC64 = 0x01, 0x12, 0x16
_EC_SHIFT = 26
#: Exception vectors of the guest: undefined, prefetch and data abort of Armv7; synchronous, from EL1 and from EL0.
_A32_UNDEFINED, _A32_PREFETCH, _A32_DATA, _A64_SAME, _A64_LOWER = 1, 3, 4, 4, 8


def _field(name: str, value: int, known: int = _ALL) -> tuple[str, int, int, int]:
    return name[2:], _FIELD[name], value & known, known


def _is_leaf(step: Step) -> bool:
    """Whether a step read a page, or a block at any level (see departures.BLOCK_ANYWHERE)."""
    return bool(d.VALID.of(step.word)) and bool(d.TYPE.of(step.word)) == (step.level == LAST_LEVEL)


@dataclass
class HardwareUpdates:
    """The bits that the walks of a world set in its tables, by physical address of the entry.

    Accesses by guests must set the access flag and the dirty state; AT instructions may set the access flag.
    """

    may: dict[int, int] = field(default_factory=dict)
    must: dict[int, int] = field(default_factory=dict)

    def note(self, step: Step, bits: int, required: bool) -> None:
        """Record an update of the entry that ``step`` read."""
        for ledger in (self.may, self.must)[: 1 + required]:
            ledger[step.at] = ledger.get(step.at, 0) | bits

    def explains(self, pa: int, before: int, after: int) -> bool:
        """Whether an entry may have changed from ``before`` to ``after``."""
        must = self.must.get(pa, 0)
        return (before ^ after) & ~(self.may.get(pa, 0) & ~before) == 0 and after & must == must


def _category(outcome: Translation | Fault) -> tuple[str, str]:
    """The kind of outcome, for statistics: (stage that faults, fault)."""
    if isinstance(outcome, Translation):
        return ("both stages", "translated")
    stage = "stage 2 on a stage 1 walk" if outcome.s1ptw else f"stage {outcome.stage}"
    return (stage, outcome.type.name.lower().replace("_", " "))


@dataclass
class Predictor:
    """Predicts the probes of one world in order, as stores affect later loads."""

    world: TableWorld
    program: Program
    memory: TableMemory
    el10: El10 | None  #: None: every address takes a level 0 fault, and no guest can run
    refused: bool = False  #: PS_BOUNDS_IPA applies, in this QEMU or another
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)  #: probes by the outcome in the model
    departed: Counter[str] = field(default_factory=Counter)  #: probes whose prediction a departure changed, by its name
    mended: Counter[str] = field(default_factory=Counter)  #: ... would have changed, if it were not fixed
    silenced: int = 0  #: probes that are not predictable because of a departure
    hardware: HardwareUpdates = field(default_factory=HardwareUpdates)
    met: list[Departure] = field(default_factory=list)  #: departures that apply to the current probe

    @classmethod
    def of(cls, world: TableWorld, program: Program) -> Predictor:
        """Raises ImpossibleRegime if the architecture does not define the result of the registers."""
        try:
            el10 = world.el10()
        except ImpossibleRegime as e:
            if not e.level0:
                raise
            return cls(world, program, TableMemory(world), None)
        refused = departures.refuses(world.silicon, el10.stage2)
        gone = refused and departures.PS_BOUNDS_IPA.shown_by(world.silicon)
        return cls(world, program, TableMemory(world), None if gone else el10, refused=refused)

    def predict(self, probe: Probe) -> Expected | None:
        """What the probe reports. None: it is not predictable, and must not be made."""
        self.met = []
        try:
            outcome, trace = self.outcome(probe)
            expected = self._expected(probe, outcome)
        except Unknowable:
            return None
        if expected is not None:
            self.outcomes[_category(outcome)] += 1
            for departure in self.met:
                self._meets(departure)
            self._note_updates(probe, outcome, trace)
        return expected

    def _expected(self, probe: Probe, outcome: Translation | Fault) -> Expected | None:
        if not probe.runs:
            return self._translated(probe, outcome)
        return self._aborted(probe, outcome) if isinstance(outcome, Fault) else self._completed(probe, outcome)

    def outcome(self, probe: Probe) -> tuple[Translation | Fault, Trace]:
        """The outcome of the probe on this silicon, and the walk. Raises Unknowable."""
        if self.refused:
            self.met.append(departures.PS_BOUNDS_IPA)
        if self.el10 is None:
            return self._departed(self._refused(probe)), []
        if probe.runs and self.el10.stage2.root >> self.el10.stage2.output_bits:
            raise Unknowable("no guest runs without stage 2")
        outcome, trace = self._walk(self.el10, probe)
        if departures.met_a_block(self.el10, outcome):
            outcome, trace = self._instead(
                departures.BLOCK_ANYWHERE, departures.with_blocks_anywhere(self.el10), probe, outcome, trace
            )
        if departures.at_for_write(probe) and self.el10.stage2.hardware_dirty and not self._dirtied(trace):
            outcome, trace = self._instead(
                departures.AT_IGNORES_DBM, departures.without_dirty_state(self.el10), probe, outcome, trace
            )
        if departures.reads_astray(self.world.silicon, trace, outcome):
            self.met.append(departures.IPA_32_BITS)
            if departures.IPA_32_BITS.shown_by(self.world.silicon):
                self.silenced += 1
                raise Unknowable(departures.IPA_32_BITS.name)
        return self._departed(outcome), trace

    def _dirtied(self, trace: Trace) -> bool:
        """Whether an earlier store set the dirty state of the leaf at which the walk ends."""
        return bool(trace and self.hardware.must.get(trace[-1].at, 0) & d.S2AP.put(d.Grant.WRITE))

    def _walk(self, el10: El10, probe: Probe) -> tuple[Translation | Fault, Trace]:
        trace: Trace = []
        return el10.translate(self.memory, probe.va, probe.access, trace), trace

    def _instead(
        self,
        departure: Departure,
        changed: El10,
        probe: Probe,
        outcome: Translation | Fault,
        trace: Trace,
    ) -> tuple[Translation | Fault, Trace]:
        """The outcome and walk in the changed regime, if they differ and this silicon has the departure."""
        other, steps = self._walk(changed, probe)
        if other == outcome:
            return outcome, trace
        self.met.append(departure)
        return (other, steps) if departure.shown_by(self.world.silicon) else (outcome, trace)

    def _departed(self, outcome: Translation | Fault) -> Translation | Fault:
        outcome, met = departures.depart(self.world.silicon, self.el10, outcome)
        self.met += met
        return outcome

    def _meets(self, departure: Departure) -> None:
        """Count a departure that applies to the current probe."""
        (self.departed if departure.shown_by(self.world.silicon) else self.mended)[departure.name] += 1

    def _refused(self, probe: Probe) -> Fault:
        """The level 0 fault of an impossible regime, unless stage 1 faults first; it may be on a stage-1 walk."""
        if probe.runs:
            raise Unknowable("no guest runs without stage 2")
        control = self.world.stage1()
        nothing = Fault(FaultType.TRANSLATION, 0, 2)
        if control is None:
            return Fault(FaultType.ADDRESS_SIZE, 0, 1) if probe.va >> self.world.silicon.features.pa_bits else nothing
        found = descend(control.regime, probe.va, nothing.on_table_walk)
        assert isinstance(found, Fault), "every read of a table faults"
        return found

    def _note_updates(self, probe: Probe, outcome: Translation | Fault, trace: Trace) -> None:
        if self.el10 is None or not self.el10.stage2.hardware_af:
            return
        leaves = [step for step in trace if step.stage == 2 and _is_leaf(step)]
        found = isinstance(outcome, Translation)
        for step in leaves:
            self.hardware.note(step, d.AF.mask, required=found and probe.runs)
        if not (found and probe.access.write and self.el10.stage2.hardware_dirty and d.DBM.of(leaves[-1].word)):
            return
        if probe.runs:
            self.hardware.note(leaves[-1], d.S2AP.put(d.Grant.WRITE), required=True)
        else:
            self._meets(departures.AT_MARKS_DIRTY)
            if departures.AT_MARKS_DIRTY.shown_by(self.world.silicon):
                self.hardware.note(leaves[-1], d.S2AP.put(d.Grant.WRITE), required=True)

    # -- AT -----------------------------------------------------------------------------------------------

    def _translated(self, probe: Probe, outcome: Translation | Fault) -> Expected:
        if isinstance(outcome, Fault) and outcome.type is FaultType.EXTERNAL_ON_WALK:
            taken = syndrome.walk_abort(outcome, probe.va, armv7=self.world.silicon.armv7)
            far = _LOW if self.world.silicon.armv7 else _ALL
            return [
                _field("R_KIND", layout.ABORTED),
                _field("R_ESR", taken.esr, taken.esr_known & ~_EA),  # EA is implementation defined
                _field("R_FAR", taken.far, far),
            ]
        par = syndrome.par(outcome)
        return [_field("R_KIND", layout.PAR), _field("R_VALUE", par.value, par.known)]

    # -- guests -------------------------------------------------------------------------------------------

    def _aborted(self, probe: Probe, fault: Fault) -> Expected | None:
        if fault.type is FaultType.EXTERNAL_ON_WALK:
            return None  # SCR and HCR decide which level takes it; AT reports the fault itself
        gadget = None if probe.gadget is None else self.program.gadgets[probe.gadget].instruction
        armv7 = self.world.silicon.armv7
        taken = syndrome.abort(fault, probe.access, probe.va, at_el0=probe.user, armv7=armv7, instruction=gadget)
        return self._to_el2(probe, taken) if taken.el == 2 else self._to_el1(probe, taken)

    def _to_el2(self, probe: Probe, taken: syndrome.Abort) -> Expected:
        far = self._paired("R_FAR", probe, taken.far)
        expected = [_field("R_KIND", layout.TRAPPED), _field("R_ESR", taken.esr, taken.esr_known), far]
        if taken.hpfar is not None:
            expected.append(_field("R_HPFAR", taken.hpfar))
        return expected

    def _to_el1(self, probe: Probe, taken: syndrome.Abort) -> Expected:
        if self.world.silicon.armv7:
            vector = _A32_PREFETCH if probe.access.fetch else _A32_DATA
        else:
            vector = _A64_LOWER if probe.user else _A64_SAME
        esr, far = self._paired("R_ESR1", probe, taken.esr), self._paired("R_FAR1", probe, taken.far)
        return [*self._hvc(vector), esr, far]

    def _paired(self, name: str, probe: Probe, value: int) -> tuple[str, int, int, int]:
        """A register that Armv7 has twice: for data in the lower half of the field, for fetches in the upper."""
        if not self.world.silicon.armv7:
            return _field(name, value)
        shift = 32 if probe.access.fetch else 0
        return _field(name, value << shift, _LOW << shift)

    def _hvc(self, number: int) -> Expected:
        ec = _EC_HVC32 if self.world.silicon.armv7 else _EC_HVC64
        return [_field("R_KIND", layout.TRAPPED), _field("R_ESR", ec << _EC_SHIFT | 1 << 25 | number)]

    def _completed(self, probe: Probe, found: Translation) -> Expected | None:
        if probe.gadget is None:
            return self._fetched(probe, found)
        access = self.program.gadgets[probe.gadget].access
        if not in_frames(found.pa, access.size):
            return None
        if access.write:
            self._store(found.pa, access.size, probe.value)
            return self._gadget_done(probe)
        known = _LOW if self.world.silicon.armv7 else _ALL
        return [*self._gadget_done(probe), _field("R_VALUE", self._loaded(found.pa, access), known)]

    def _gadget_done(self, probe: Probe) -> Expected:
        """The HVC after the gadget, which is undefined at EL0 and then enters the guest's own vector."""
        if not probe.user:
            return self._hvc(layout.HVC_DONE)
        return self._hvc(_A32_UNDEFINED if self.world.silicon.armv7 else _A64_LOWER)

    def _fetched(self, probe: Probe, found: Translation) -> Expected | None:
        """The frame's two instructions: one moves the frame's number into register 1, the other (WFI) traps.

        Fetches from device memory are not made, as they may fault or not.
        """
        assert self.el10 is not None, "an impossible regime translates nothing"
        device = self.el10.stage2.format.is_device(found.second.attr)
        device |= self.el10.stage1 is not None and is_device(found.first.attr)
        if device or not in_frames(found.pa, 8):
            return None
        return [
            _field("R_KIND", layout.TRAPPED),
            _field("R_ESR", _EC_WFX << _EC_SHIFT, 0x3F << _EC_SHIFT),
            _field("R_VALUE", frame_number(found.pa), _LOW),
            _field("R_ELR", probe.va + 4),
        ]

    def _loaded(self, pa: int, access: GuestAccess) -> int:
        word = self.memory.load_frame(pa & ~7) >> 8 * (pa & 7)
        bits = min(8 * access.size, access.bits)
        value = word & ((1 << bits) - 1)
        if access.signed and value >> (bits - 1):
            value |= (1 << access.bits) - (1 << bits)
        return value

    def _store(self, pa: int, size: int, value: int) -> None:
        at, shift = pa & ~7, 8 * (pa & 7)
        mask = ((1 << 8 * size) - 1) << shift
        self.memory.stored[at] = self.memory.load_frame(at) & ~mask | value << shift & mask
