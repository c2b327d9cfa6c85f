"""Conformance: the model agrees with the emulated CPU; a wrong model, or one without a departure, does not."""

from dataclasses import replace

import pytest
from arm_kvm.cli.main import main
from arm_kvm.conform import case, departures, silicon
from arm_kvm.conform.case import Probe, Registers, Silicon, TableWorld
from arm_kvm.conform.departures import Departure
from arm_kvm.conform.predict import HardwareUpdates, Predictor
from arm_kvm.conform.run import Difference, Tally, check, conform
from arm_kvm.conform.silicon import Lab
from arm_kvm.host import config
from arm_kvm.model.arch import attributes, regime, stage1, syndrome, walk
from arm_kvm.model.arch import descriptors as d
from arm_kvm.model.arch.faults import Access, Direction, Fault, FaultType
from arm_kvm.model.arch.regime import SCTLR_M
from arm_kvm.support.errors import NonConformance, ProgramSilent, SetupError

BOARDS = ["a15", "a15-wide", "arm64", "arm64-vhe"]
QUICK = 6_000
THOROUGH = 300_000  # what a fault may take to be found: 50 s


@pytest.fixture(scope="module")
def boards(tmp_path_factory):
    """``boards("a15")``: a board with the program in it. One at a time: an idle program spins."""
    labs = {}

    def board(name):
        if name not in labs:
            end()
            labs[name] = Lab(config.find(name), tmp_path_factory.mktemp(name))
        return labs[name]

    def end():
        while labs:
            labs.popitem()[1].close()

    yield board
    end()


@pytest.mark.parametrize("name", BOARDS)
def test_model_and_silicon_agree(boards, name):
    tally = conform(boards(name), QUICK, start=1)
    assert tally.cases >= QUICK and tally.worlds > 100


ANSWERS = {
    ("both stages", "translated"),
    *(("stage 1", how) for how in ("translation", "permission", "access flag", "external on walk")),
    *(("stage 2", how) for how in ("translation", "permission", "access flag", "external on walk")),
    *(("stage 2 on a stage 1 walk", how) for how in ("translation", "permission", "access flag")),
}
SIZES = {("stage 1", "address size"), ("stage 2", "address size")}


@pytest.mark.parametrize(("name", "wanted"), [("a15", ANSWERS), ("arm64", ANSWERS | SIZES)])
def test_every_kind_of_answer_is_asked_for(boards, name, wanted):
    tally = conform(boards(name), 6 * QUICK, start=2)
    assert wanted <= set(tally.outcomes)
    assert "s1ptw-level" in str(tally) and "translated, both stages" in str(tally)


def test_a_seed_is_a_run(boards):
    runs = [conform(boards("arm64"), 2_000, start=seed) for seed in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]


# -- a wrong model is found ------------------------------------------------------------------------------------


def with_stage2(monkeypatch, change):
    """Apply ``change`` to every world's stage 2."""
    honest = TableWorld.el10
    monkeypatch.setattr(
        TableWorld, "el10", lambda world: (lambda e: replace(e, stage2=change(e.stage2)))(honest(world))
    )


def other(function):
    """Replace a function of a module of the model."""

    def apply(monkeypatch):
        module, name, wrong = function
        monkeypatch.setattr(module, name, wrong)

    return apply


def without_tables_limits(self, desc, inherited, el0, honest=stage1.Stage1Regime._data):
    return honest(self, desc, 0, el0)


def half_a_block(r, ia, read, trace=None, honest=walk.descend):
    found = honest(r, ia, read, trace)
    if isinstance(found, Fault) or found.level == 3:
        return found
    return replace(found, oa=found.oa & ~(1 << r.granule.level_shift(found.level) - 1))


def fetches_anything(r, desc, access, honest=walk.s2_allows):
    return d.s2_executable(desc) if access.fetch else honest(r, desc, access)


def level_too_high(self):
    return self.type.value + min(self.level + (self.type is FaultType.PERMISSION), 3)


def shifted(function, by):
    return lambda *arguments: function(*arguments) + by


#: A mistake: the board that shows it, and how it is made.
MISTAKES = {
    "a wrong start level": (
        "arm64",
        lambda m: with_stage2(m, lambda r: replace(r, start_level=r.start_level + 1) if r.start_level == 1 else r),
    ),
    "a missing concatenated page": (
        "arm64",
        lambda m: with_stage2(m, lambda r: replace(r, entries=min(r.entries, r.granule.entries))),
    ),
    "IPA space one bit too wide": (
        "arm64",
        lambda m: with_stage2(m, lambda r: replace(r, input_bits=r.input_bits + 1)),
    ),
    "physical size not checked": ("arm64", lambda m: with_stage2(m, lambda r: replace(r, output_bits=48))),
    "HCR.PTW ignored": ("arm64", lambda m: with_stage2(m, lambda r: replace(r, protect_walks=False))),
    "S2AP bits swapped": (
        "arm64",
        lambda m: (
            m.setattr(d, "s2_readable", lambda desc: (desc & d.S2AP.put(2)) != 0),
            m.setattr(d, "s2_writable", lambda desc: (desc & d.S2AP.put(1)) != 0),
        ),
    ),
    "XN ignored": ("arm64", other((d, "s2_executable", lambda desc, **how: True))),
    "access flag in the wrong bit": ("arm64", other((walk.d, "AF", d.Field(9)))),
    "blocks of half the size": ("arm64", other((walk, "descend", half_a_block))),
    "a device type that does not win": ("arm64", other((attributes, "_stricter_device", lambda mair, kind: mair))),
    "shareability of stage 1 alone": ("arm64", other((attributes, "_wider", lambda one, other: one))),
    "limits of tables forgotten": ("arm64", other((stage1.Stage1Regime, "_data", without_tables_limits))),
    "permission faults one level too high": ("arm64", other((Fault, "status", property(level_too_high)))),
    "HPFAR with the page offset": ("arm64", other((syndrome, "hpfar", lambda fault: (fault.ipa or 0) >> 8))),
    "S1PTW not reported": ("arm64", other((syndrome, "_S1PTW", 0))),
    "register number off by one": (
        "arm64",
        other((syndrome.Instruction, "iss", property(shifted(syndrome.Instruction.iss.fget, 1 << 16)))),
    ),
    "a fetch that may be unreadable": ("a15", other((walk, "s2_allows", fetches_anything))),
    "SCTLR.UWXN ignored": ("a15", other((stage1, "SCTLR_UWXN", 0))),
    "DFSR without its format bit": (
        "a15",
        other((syndrome, "_fsr_armv7", shifted(syndrome._fsr_armv7, -(1 << 9)))),
    ),
    "XN[0] ignored": ("arm64-vhe", other((d, "XN", d.Field(54)))),
    "FWB ignored": ("arm64-vhe", other((attributes, "_forced", attributes._stricter))),
    "hardware access flag ignored": (
        "arm64-vhe",
        lambda m: with_stage2(m, lambda r: replace(r, hardware_af=False)),
    ),
    "hardware dirty state without HA": (
        "arm64-vhe",
        lambda m: with_stage2(m, lambda r: replace(r, hardware_dirty=True)),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_fault_in_the_model_is_found(boards, monkeypatch, mistake):
    board, make = MISTAKES[mistake]
    lab = boards(board)
    make(monkeypatch)
    with pytest.raises(Difference) as caught:
        conform(lab, THOROUGH, start=5, shrink=False)
    assert "silicon" in caught.value.found[0] or "did not answer" in caught.value.found[0]


def test_a_difference_is_small_and_reads_like_a_walk(boards, monkeypatch):
    """The smallest of three, as hypothesis's shrinker is greedy and sometimes stops early."""
    monkeypatch.setattr(d, "s2_executable", lambda desc, **how: True)
    found = []
    for start in (6, 7, 8):
        with pytest.raises(Difference) as caught:
            conform(boards("a15"), THOROUGH, start=start)
        found.append(caught.value)
    smallest = min(found, key=entries)
    assert entries(smallest) <= 8  # the harness needs four
    text = str(smallest)
    for part in ("VTTBR 0x", "start level", "fetch (EL", "stage 2 level 3 PA", "S2AP 11 XN 10", "model: IPA 0x", "ESR"):
        assert part in text, text


def entries(difference):
    return len([word for word in difference.world.words.values() if word])


# -- departures ---------------------------------------------------------------------------------------------------

SEEN_ON = {
    "ps-bounds-ipa": "arm64",
    "block-anywhere": "arm64",
    "s1ptw-level": "arm64",
    "ptw-level-0": "arm64",
    "fwb-device": "arm64-vhe",
    "transient-lost": "arm64",
    "device-low-nibble": "a15-wide",
    "off-non-shareable": "arm64-vhe",
    "at-marks-dirty": "arm64-vhe",
    "at-ignores-dbm": "arm64-vhe",
    "hpfar-32-bits": "a15",
    "ipa-32-bits": "a15",
}


@pytest.mark.parametrize("departure", departures.ALL, ids=lambda departure: departure.name)
def test_each_departure_is_there_or_mended_as_it_says(boards, monkeypatch, departure):
    """In releases said to have it, the silicon differs from the model without its rule; in others, with it."""
    lab = boards(SEEN_ON[departure.name])
    if departure is departures.IPA_32_BITS and not departure.shown_by(lab.silicon):  # its rule only skips probes
        assert conform(lab, QUICK, start=8).mended[departure.name]
        return
    if departure is departures.AT_MARKS_DIRTY and departures.AT_IGNORES_DBM.shown_by(lab.silicon):
        # AT faults where it could set the dirty state; that it does not is checked in every world.
        assert conform(lab, 10 * QUICK, start=8).departed[departures.AT_IGNORES_DBM.name]
        return
    honest = Departure.shown_by
    monkeypatch.setattr(Departure, "shown_by", lambda d, silicon: honest(d, silicon) != (d is departure))
    with pytest.raises(Difference):
        conform(lab, 2 * THOROUGH, start=8, shrink=False)


def test_a_departure_names_its_releases():
    both = Departure("d", "q", "a", since=(8, 2), until=(10, 1))
    shown = [both.shown_by(Silicon(False, None, 0, "", v)) for v in ((8, 1, 9), (8, 2), (10, 0, 13), (10, 1), (11,))]
    assert shown == [False, True, True, False, False]
    assert str(both).startswith("d (QEMU: since 8.2, before 10.1)\n")
    assert [replace(both, since=()).releases, replace(both, until=()).releases] == ["before 10.1", "since 8.2"]
    assert Departure("d", "q", "a").releases == "all"


# -- when the program is lost ---------------------------------------------------------------------------------------


def lost_world(lab):
    """A guest whose stage 1 does not map its vectors, so that its first fault never ends."""
    words = {0x4200_0000: 0x4200_1003, 0x4200_1000: 0x4200_2003, 0x4200_2080: d.encode(d.LeafFields(0x4200_3000), 3)}
    control = Registers(
        0x8000_2001,
        0x8002_3558,
        0x4200_0000,
        0x30D5_0800 | SCTLR_M,
        25 | 39 << 16 | 2 << 30 | 2 << 32,
        0x1_0000,
        0,
        0xFF,
        0,
    )
    run = Probe(4, 0x5000, Access(Direction.FETCH))
    return TableWorld(lab.silicon, control, words, 0, 0x1_0000, (Probe.at(0, 0x5000), run))


def test_a_guest_that_never_returns_is_reported_and_the_lab_goes_on(boards):
    lab = boards("arm64")
    world = lost_world(lab)
    with pytest.raises(ProgramSilent, match="1 of 2 probes answered"):
        lab.run(world, world.probes)
    with pytest.raises(Difference, match="did not answer") as caught:
        check(lab, world, Tally())
    assert "HCR 0x80002001" in str(caught.value)
    assert conform(lab, 500, start=9).cases >= 500


def test_the_end_of_qemu_is_a_difference_with_its_world(boards):
    lab = boards("arm64")
    lab.machine.process.kill()
    with pytest.raises(Difference, match="QEMU ended") as caught:
        check(lab, replace(lost_world(lab), probes=(Probe.at(0, 0x5000),)), Tally())
    assert "AT_R1 (EL1 read) at 0x5000" in str(caught.value)
    assert conform(lab, 500, start=10).cases >= 500


def test_a_difference_that_does_not_repeat_is_reported_as_such(boards, monkeypatch):
    lab, honest, lies = boards("arm64"), syndrome.par, iter([1])
    monkeypatch.setattr(
        syndrome, "par", lambda outcome: replace(honest(outcome), value=5) if next(lies, 0) else honest(outcome)
    )
    with pytest.raises(Difference, match="model") as caught:
        conform(lab, 1_000, start=11)
    assert "(this did not repeat)" in str(caught.value)


def test_worlds_without_a_case_end_the_run(boards, monkeypatch):
    monkeypatch.setattr(Predictor, "predict", lambda self, probe: None)
    with pytest.raises(ValueError, match="no probe whose answer is known"):
        conform(boards("arm64"), 1, start=12)


def test_a_board_without_el2_is_refused_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(silicon, "_PATIENCE", 1.0)
    host = config.find("arm64")
    plain = replace(host, board=replace(host.board, machine="virt,gic-version=2"))
    with pytest.raises(SetupError, match="does not answer on this board: it was entered with CurrentEL 0x4") as caught:
        Lab(plain, tmp_path)
    assert "virtualization=on" in caught.value.remedy


def test_unknown_memory_is_not_probed(boards):
    lab = boards("arm64")
    world = lost_world(lab)
    with pytest.raises(case.Unknowable, match="PA 0x9000000"):
        case.TableMemory(world).load(0x0900_0000)
    assert case.TableMemory(world).load(0x8000_0000) is None


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_says_how_to_repeat_it(arm_kvm):
    done = arm_kvm("conform", "--host", "a15", "--cases", "2000", "--seed", "7")
    assert done.returncode == 0, done.stderr
    assert "arm-kvm conform --host a15 --cases 2000 --seed 7" in done.stdout
    assert "no unexplained difference" in done.stdout


def test_the_command_wants_at_least_one_case(arm_kvm):
    done = arm_kvm("conform", "--cases", "0")
    assert done.returncode == 2 and "'0' is not a number above 0" in done.stderr


def test_the_command_lists_the_departures(arm_kvm):
    listed = arm_kvm("conform", "--departures").stdout
    assert all(departure.name in listed for departure in departures.ALL)


def test_a_difference_has_an_exit_code_and_a_way_to_repeat_it(monkeypatch, capsys):
    monkeypatch.setattr(d, "s2_executable", lambda desc, **how: True)
    assert main(["conform", "--host", "a15", "--cases", "50000", "--seed", "6"]) == NonConformance.exit_code
    said = capsys.readouterr().err
    assert "a15: model and silicon differ" in said and "--cases 50000 --seed 6" in said and "stage 2 level 3" in said


def test_what_hardware_may_write_into_a_table():
    """AF must be set after an access by a guest; nothing else may change."""
    updates, leaf = HardwareUpdates(), d.encode(d.LeafFields(0, af=False), 3)
    updates.note(walk.Step(2, 3, 8, leaf), d.AF.mask, required=False)
    assert updates.explains(8, leaf, leaf) and updates.explains(8, leaf, leaf | d.AF.mask)
    updates.note(walk.Step(2, 3, 8, leaf), d.AF.mask, required=True)
    assert not updates.explains(8, leaf, leaf) and updates.explains(8, leaf, leaf | d.AF.mask)
    assert not updates.explains(8, leaf | d.AF.mask, leaf) and not updates.explains(16, leaf, leaf | d.AF.mask)


def test_both_stages_can_be_off_the_map(boards):
    """In an impossible regime every address takes a level 0 fault, with stage 1 or without."""
    lab = boards("arm64")
    bad = Registers(0x8000_2001, 0x8002_3518, 0x4200_0000, 0x30D5_0800)  # SL0 0 with a 40-bit space
    world = TableWorld(lab.silicon, bad, probes=tuple(Probe.at(op, va) for va in (0, 1 << 45) for op in range(4)))
    with pytest.raises(regime.ImpossibleRegime):
        world.el10()
    tally = Tally()
    check(lab, world, tally)
    on = replace(bad, sctlr=bad.sctlr | SCTLR_M, tcr=25 | 2 << 32, ttbr0=0x1000)
    check(lab, replace(world, registers=on), tally)
    assert tally.cases == 16
