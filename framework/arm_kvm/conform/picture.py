"""A difference as text: registers, regimes, the walk entry by entry, and the results of both sides."""

from __future__ import annotations

from arm_kvm.conform.case import Probe, TableWorld, Unknowable
from arm_kvm.conform.predict import Predictor
from arm_kvm.conform.program import Program
from arm_kvm.model.arch import descriptors as d
from arm_kvm.model.arch.faults import Fault
from arm_kvm.model.arch.regime import Regime
from arm_kvm.model.arch.walk import El10, Step, Translation


def picture(world: TableWorld, probe: Probe | None, found: list[str], program: Program) -> str:
    """Describe a difference. Without a probe (no answer, or memory differs), list all probes of the world."""
    predictor = Predictor.of(world, program)
    lines = [str(world.registers)]
    if predictor.el10 is None:
        lines.append("stage 2: every address takes a level 0 translation fault")
    else:
        lines.append(str(predictor.el10.stage2))
        lines.append(str(predictor.el10.stage1.regime) if predictor.el10.stage1 else "stage 1 is off")
    probes = [str(p) for p in world.probes] if probe is None else [str(probe), *_walk(world, probe, predictor)]
    return "\n".join([*lines, "", *probes, "", *found])


def _walk(world: TableWorld, probe: Probe, predictor: Predictor) -> list[str]:
    """The walk, one line per entry. Stage 2 is indented below the stage-1 step that it belongs to."""
    for earlier in world.probes[: world.probes.index(probe)]:  # whose stores affect this one
        predictor.predict(earlier)
    predictor.predict(probe)
    names = [departure.name for departure in predictor.met if departure.shown_by(world.silicon)]
    try:
        outcome, trace = predictor.outcome(probe)
    except Unknowable as e:
        return [f"  model: not predictable: {e}"]
    lines = [] if predictor.el10 is None else [_step(step, predictor.el10) for step in trace]
    return [*lines, f"  model: {_outcome(outcome)}" + (f" (departures: {', '.join(names)})" if names else "")]


def _outcome(outcome: Translation | Fault) -> str:
    if isinstance(outcome, Fault):
        return str(outcome)
    attr, sh = outcome.combined
    kind = "undefined" if attr is None else f"{attr:#04x}"
    return f"IPA {outcome.ipa:#x} -> PA {outcome.pa:#x}, attributes {kind}, SH {'undefined' if sh is None else int(sh)}"


def _step(step: Step, el10: El10) -> str:
    regime = el10.stage2 if step.stage == 2 or el10.stage1 is None else el10.stage1.regime
    space = "PA" if step.stage == 2 else "IPA"
    indent = "    " if step.stage == 2 else "  "
    where = f"{indent}stage {step.stage} level {step.level} {space} {step.at:#014x}"
    return f"{where}: {step.word:#018x} {_entry(step, regime)}"


def _entry(step: Step, regime: Regime) -> str:
    kind = d.kind(step.word, step.level, regime.granule)
    if kind in (d.EntryKind.INVALID, d.EntryKind.RESERVED):
        return str(kind.value)
    address = step.word & regime.format.address_field()
    if kind is d.EntryKind.TABLE:
        return f"table -> {address:#x}"
    if regime.stage == 1:
        return (
            f"{kind.value} -> IPA {address:#x} AP {d.AP.of(step.word):02b} UXN {d.UXN.of(step.word)} "
            f"PXN {d.PXN.of(step.word)} AF {d.AF.of(step.word)} AttrIndx {d.ATTRINDX.of(step.word)}"
        )
    return (
        f"{kind.value} -> PA {address:#x} S2AP {d.S2AP.of(step.word):02b} XN {d.XN.of(step.word):02b} "
        f"AF {d.AF.of(step.word)} MemAttr {d.MEMATTR.of(step.word):04b} SH {d.SH.of(step.word):02b}"
    )
