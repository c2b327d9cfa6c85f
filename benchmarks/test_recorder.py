"""What recording costs, and how long a rollover with full checking takes. `tox -e bench`; no figure decides a test."""

import pytest
from arm_kvm.recorder.breakpoints import Breakpoints
from arm_kvm.recorder.recorder import Recorder
from arm_kvm.recorder.recording import Recording
from arm_kvm.vmm.fleet import Fleet

IPA = 0x8000_0000


@pytest.mark.native
@pytest.mark.needs("vmid8")
def test_300_vms_through_a_rollover(benchmark, make_vms, record):
    """Create the VMs, each with a page of its own; run and judge each in turn; check the trace against the model."""

    def run():
        with record() as events:
            fleet = Fleet(make_vms(300))
            fleet.add_memory(IPA, 0x1000)
            fleet.fill(IPA)
            assert fleet.strangers(IPA) == []
        return fleet, events

    def end(fleet_and_events):
        fleet, events = fleet_and_events
        benchmark.extra_info["events"] = len(events.trace.events)
        fleet.destroy()

    runs = []
    benchmark.pedantic(lambda: runs.append(run()), rounds=5, teardown=lambda: end(runs.pop()))


@pytest.mark.native
@pytest.mark.parametrize("recording", ["off", "probe", "breakpoints"])
def test_mmio_exit(benchmark, host, oracle, recorder, vm, recording):
    """The round trip of an MMIO exit: with the probe loaded but idle, and while either mechanism records."""
    exits = {"off": 2000, "probe": 2000, "breakpoints": 50}[recording]
    vm.guest.ping()

    def ring():
        return vm.vcpus[0].measure_mmio(exits)

    def measure():
        result = benchmark.pedantic(ring, rounds=3)
        benchmark.extra_info["microseconds_per_exit"] = round(result * 1e6, 1)

    if recording == "off":
        measure()
        return
    chosen = recorder if recording == "probe" else Recorder(host, Breakpoints(host), oracle.locator)
    with Recording(chosen).running():
        measure()
