"""A difference as a person reads it: registers, regimes, the walk entry by entry, and what was said on both sides."""

from __future__ import annotations

from framework.model import descriptors as d
from framework.model.regime import Regime
from framework.model.walk import Step

from .case import Probe, Unknowable, World
from .predict import Predictor


def picture(world: World, probe: Probe | None, found: list[str], predictor: Predictor) -> str:
    """Several lines of text."""
    lines = [str(world.registers)]
    if predictor.el10 is None:
        lines.append("stage 2: no regime; every address takes a level 0 translation fault")
    else:
        lines.append(str(predictor.el10.stage2))
        lines.append(str(predictor.el10.stage1.regime) if predictor.el10.stage1 else "stage 1 is off")
    if probe is not None:
        lines += ["", str(probe), *_walk(probe, predictor)]
    return "\n".join([*lines, "", *found])


def _walk(probe: Probe, predictor: Predictor) -> list[str]:
    """The model's walk, one line an entry; stage 2 is indented under the stage-1 step that it serves."""
    if predictor.el10 is None:
        return []
    trace: list[Step] = []
    try:
        outcome = predictor.el10.translate(predictor.memory, probe.va, probe.access, trace)
    except Unknowable as e:
        outcome = f"into memory that nobody knows: {e}"
    lines = [_step(step, predictor) for step in trace]
    return [*lines, f"  model: {outcome}"]


def _step(step: Step, predictor: Predictor) -> str:
    regime = predictor.el10.stage2 if step.stage == 2 else predictor.el10.stage1.regime
    space = "PA" if step.stage == 2 else "IPA"
    indent = "    " if step.stage == 2 else "  "
    where = f"{indent}stage {step.stage} level {step.level} {space} {step.at:#014x}"
    return f"{where}: {step.word:#018x} {_entry(step, regime)}"


def _entry(step: Step, regime: Regime) -> str:
    kind = d.kind(step.word, step.level, regime.granule)
    if kind in (d.Kind.INVALID, d.Kind.RESERVED):
        return kind.value
    address = step.word & regime.format.address_field()
    if kind is d.Kind.TABLE:
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
