"""The payload and its driver on real hosts: batches, exceptions, hypercalls, registers, concurrency."""

import pytest
from arm_kvm.guest import payload
from arm_kvm.guest.driver import Order
from arm_kvm.guest.isa import A32, A64, ISAS, GuestException, Status
from arm_kvm.support.errors import AgentTimeout, HostOsError, SetupError
from arm_kvm.vmm.client import op
from arm_kvm.vmm.memory import Child

IPA = 0x8000_0000
UNDEFINED = {"A32": bytes.fromhex("f000f0e7"), "A64": bytes(4)}


@pytest.mark.parametrize("name", ISAS)
def test_payload_fits_and_starts_with_code(name):
    image = payload.assemble(name)
    assert 0 < len(image) <= payload.CODE_SIZE and any(image[:4])


def test_missing_binutils_name_the_remedy(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    payload.assemble.cache_clear()
    with pytest.raises(SetupError, match="arm-linux-gnueabi-as is not installed"):
        payload.assemble("A32")


def test_unknown_accesses_and_registers_are_refused():
    with pytest.raises(ValueError, match="A32 has no access 'ldr-x'"):
        A32.access("ldr-x")
    with pytest.raises(ValueError, match="no access of 8 bytes"):
        A32.default_access(8, write=False)
    with pytest.raises(ValueError, match="registers 0 to 14"):
        A64.gadget(A64.accesses[0], 15)


def test_a_batch_has_a_result_for_each_order(vm):
    vm.add_memory(IPA, 0x1000)
    orders = [
        Order("fill", IPA, count=2, stride=4),
        Order("execute", 0x3000_0000),
        Order("check", IPA, count=2, stride=4),
        Order("check", IPA, value=1, count=2, stride=4),
    ]
    filled, aborted, good, bad = vm.guest.batch(orders)
    assert filled.status is Status.OK and aborted.status not in (Status.OK, Status.PENDING)
    assert (good.value, bad.value, bad.address) == (0, 2, IPA)
    with pytest.raises(ValueError, match="1 to 59 orders"):
        vm.guest.batch([Order("nop")] * 64)


def test_an_undefined_instruction_raises_guest_exception(vm, isa):
    vm.add_memory(IPA, 0x1000).write(8, UNDEFINED[isa])
    with pytest.raises(GuestException) as caught:
        vm.guest.execute(IPA + 8)
    assert (caught.value.kind, caught.value.pc, caught.value.external) == ("undefined", IPA + 8, False)
    vm.guest.ping()


def test_an_unknown_hypercall_is_not_supported(vm, isa):
    """Arm DEN0022 (PSCI), DEN0028 (SMCCC): NOT_SUPPORTED, -1, in the result register."""
    assert vm.guest.hypercall(0x8400_FFFF) == (1 << ISAS[isa].pointer_bits) - 1


def test_flush_and_registers(vm):
    vm.guest.flush_tlb()
    bits, core = (32, 0x4020_0000_0010_0000) if vm.host_bits == 32 else (64, 0x6030_0000_0010_0000)
    vcpu = vm.vcpus[0]
    vcpu.set_register(core + 4 * bits // 32, 0xFEED)
    assert vcpu.get_register(core + 4 * bits // 32) == 0xFEED


def test_a_guest_that_never_exits_is_kicked(vm):
    vm.add_memory(IPA, 0x1000).write(0, bytes.fromhex("feffffea" if vm.isa is A32 else "00000014"))  # b .
    vcpu = vm.vcpus[0]
    vm.guest._begin([Order("execute", IPA)], wait=0.0)
    with pytest.raises(AgentTimeout, match="vCPU 0 did not exit within 1 s"):
        vcpu.wait(deadline=1.0)
    vcpu.restart()
    vm.guest.ping()


def test_a_failure_in_meanwhile_leaves_no_answer_unread(host):
    def fail():
        raise ValueError("not the agent's")

    host.agent.meanwhile(fail)
    with pytest.raises(ValueError, match="not the agent's"):
        host.agent(op.memory_map, size=0x1000)
    assert host.agent(op.hello) == host.agent.hello


def test_a_vcpu_runs_one_order_at_a_time(vm):
    with vm.guest.spinning(), pytest.raises(HostOsError, match="KVM_RUN: EBUSY"):
        vm.guest.ping()


def test_tables_are_read_while_guests_spin(make_vm, stage2):
    vm = make_vm(vcpus=2)
    with vm.guests[0].spinning(), vm.guests[1].spinning():
        assert stage2(vm).leaf(payload.CODE).executable
    vm.guests[1].ping()


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("rounds", [1, 1 << 25])
def test_spinning_for_some_rounds_ends_by_itself(vm, pinned, rounds):
    """The larger number of rounds takes longer than the agent waits before it answers that the vCPU still runs."""
    if pinned:
        vm.vcpus[0].pin(1)
    with vm.guest.spinning_for(rounds):
        pass
    vm.guest.ping()


def test_threads_and_children_of_the_agent_may_run_on_every_cpu(host, make_vm):
    """The agent's main thread is bound to the first CPU; the threads of vCPUs and forked children are not."""

    def allowed(pid):
        found = host.ssh.run(f"grep -H Cpus_allowed_list /proc/{pid}/task/*/status")
        return {int(line.split("/")[4]): line.split()[-1] for line in found.splitlines()}

    vm, agent = make_vm(), host.agent.hello["pid"]
    child = Child(host.agent)
    with vm.guest.spinning():
        threads, of_child = allowed(agent), allowed(child.pid)
    child.end()
    assert threads.pop(agent) == "0" and set(threads.values()) == {"0-1"}
    assert of_child == {child.pid: "0-1"}


def test_a_vm_that_cannot_be_created_leaves_nothing(host, isa, make_vm):
    with pytest.raises(HostOsError):
        make_vm(ipa_bits=7 << 8)
    make_vm().guest.ping()
