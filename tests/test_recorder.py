"""The recorder: two independent mechanisms record the same, and between recordings nothing is recorded."""

from itertools import groupby

import pytest
from arm_kvm.events.trace import Created, Destroyed, Enter, EntryChange, Exit, Invalidate, Mark, Vttbr, root_of
from arm_kvm.host import config
from arm_kvm.recorder.breakpoints import Breakpoints
from arm_kvm.recorder.points import INSN, KernelMap, What
from arm_kvm.recorder.probe import Probe
from arm_kvm.recorder.recorder import Recorder
from arm_kvm.recorder.recording import Recording
from arm_kvm.support.errors import MachineError
from arm_kvm.vmm.memory import Advice

IPA = 0x8000_0000


def exercise(make_vm):
    """Cause events of all kinds: first runs, faults, an unmap, a refault, a change of vCPUs, a destroyed VM."""
    vm = make_vm(vcpus=2)
    memory = vm.add_memory(IPA, 0x4000)
    for index, vcpu in enumerate(vm.vcpus):
        vcpu.pin(0)
        vm.guests[index].fill(IPA, 4)
    memory.advise(Advice.DONTNEED, 0, 0x2000)
    vm.guest.read(IPA)
    other = make_vm()
    other.vcpus[0].pin(0)
    other.guest.ping()
    other.destroy()
    vm.guest.ping()


def essence(trace):
    """Reduce a trace to what two runs have in common: without addresses, times and VMIDs.

    The number of VTTBR writes and entries depends on interrupts, so each is counted once. An ioctl loads its vCPU, too,
    and depending on the CPU of its thread it may flush once more, so an immediate repetition is dropped.
    """
    names = {}

    def name(address):
        return names.setdefault(address, len(names)) if address else None

    out = []
    for event in trace.events:
        match event:
            case Vttbr(value=value):
                out.append(("vttbr", name(root_of(value))))
            case Enter(vcpu=vcpu):
                out.append(("enter", name(vcpu)))
            case Exit() | Mark():
                continue
            case Invalidate(op=op, operand=operand):
                out.append((op, operand))
            case EntryChange(root=root, ipa=ipa, level=level, old=old, new=new):
                out.append(("entry", name(root), ipa, level, old & 0xFFF, new & 0xFFF))
            case Created(root=root) | Destroyed(root=root):
                out.append((event.word, name(root)))
    switches = [event for event in out if event[0] in ("vttbr", "enter")]
    rest = [event for event, _ in groupby(event for event in out if event not in switches)]
    return rest + list(dict.fromkeys(switches))


@pytest.mark.native
def test_both_mechanisms_see_the_same(host, oracle, make_vm, record):
    exercise(make_vm)  # a host's first VM also begins the first generation of VMIDs
    host.reset()
    with record() as by_probe:
        exercise(make_vm)
    host.reset()
    recorder = Recorder(host, Breakpoints(host), oracle.locator)
    run = Recording(recorder)
    with run.running():
        exercise(make_vm)
    assert run.violations == []
    assert "\n".join(map(str, essence(run.trace))) == "\n".join(map(str, essence(by_probe.trace)))
    assert {type(event) for event in run.trace.events} >= {
        Vttbr,
        Enter,
        Exit,
        Invalidate,
        EntryChange,
        Created,
        Destroyed,
    }


@pytest.mark.native
def test_off_means_off(host, make_vm, record):
    """Between recordings nothing is logged, and the next one starts empty."""
    with record() as first:
        make_vm().guest.ping()
    position = host.machine.plugin.position
    make_vm().guest.ping()
    assert host.machine.plugin.position == position
    with record() as second:
        pass
    assert first.entries() and not second.entries()


@pytest.mark.native
def test_every_point_is_an_instruction_of_the_hypervisor(host, recorder):
    """The points are found by encoding; kallsyms says that they are in KVM, with a guest entry and an exit."""
    assert {p.what for p in recorder.points} >= {What.VTTBR, What.INVALIDATE, What.ENTER, What.EXIT}
    for point in recorder.points:
        assert "kvm" in point.function or "guest_e" in point.function or "hyp" in point.function, point
        assert point.pa % INSN == 0 and point.va % INSN == 0


@pytest.mark.native
def test_trace_survives_saving(make_vm, record, tmp_path):
    from arm_kvm.events.trace import Trace

    with record() as run:
        exercise(make_vm)
    run.trace.save(tmp_path / "run.trace")
    loaded = Trace.load(tmp_path / "run.trace")
    assert loaded.facts == run.trace.facts
    assert [(type(e), e.cpu) for e in loaded.events] == [(type(e), e.cpu) for e in run.trace.events]
    assert essence(loaded) == essence(run.trace)


@pytest.mark.native
def test_a_failed_test_keeps_its_trace(make_vm, record):
    """The trace has the events before the test's exception."""
    with pytest.raises(ZeroDivisionError), record() as run:
        make_vm().guest.ping()
        raise ZeroDivisionError
    assert run.entries()


# -- incomplete logs and unusable kernels -------------------------------------------------------------------------


@pytest.fixture
def probe(own_cache):
    probe = Probe(config.find("a15"))
    yield probe
    probe.close()


@pytest.mark.parametrize(
    ("number", "value", "message"),
    [
        ("mismatch", 3, "3 times the probe did not find an operand"),
        ("granules", 1, "granule other than 4 KiB"),
        ("head", 1 << 40, "the rest is lost"),
    ],
)
def test_an_incomplete_log_raises(probe, number, value, message):
    probe._set(**{number: value})
    with pytest.raises(MachineError, match=message):
        list(probe.records())


def test_kernel_map_needs_symbols():
    with pytest.raises(MachineError, match="CONFIG_KALLSYMS"):
        KernelMap("==\n  40008000-40519fff : Kernel code\n")


def test_kernel_map_that_does_not_fit():
    with pytest.raises(MachineError, match="do not fit"):
        KernelMap("c0008241 T _stext\n==\n  40008000-40519fff : Kernel code\n")
