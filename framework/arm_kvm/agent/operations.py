"""The operations that the lab can request of the agent: the methods of :class:`Operations`.

Both ends import this module. The agent carries out the methods; the lab names them in requests
(``agent(op.memory_read, hva=..., size=...)``), so that a type checker finds a misspelt operation or argument.
Arguments and results are JSON values; one ``blob`` of bytes can accompany them in each direction.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import Any

from . import (
    ageing,
    children,
    device,
    entropy,
    failing,
    ftrace,
    ioctls,
    ksm,
    kvm,
    libc,
    memory,
    placement,
    poison,
    replies,
    timers,
    uffd,
    workers,
)


class Operations:
    """The agent's state and its operations. Each operation returns a JSON value, bytes, or a pair of both.

    Sizes and addresses are in bytes. A failed system call raises OSError with the call's name, in the lab HostOsError.
    """

    def __init__(self) -> None:
        self._vms: dict[int, kvm.Vm] = {}
        self._next_vm = 0
        self._runners: dict[int, kvm.Runner] = {}
        self._children: dict[int, children.Child] = {}
        self._userfaults: dict[int, uffd.Handler] = {}
        self._actors: dict[int, workers.Worker[tuple[dict[str, object], bytes]]] = {}
        self._storm: memory.Storm | None = None
        self._kvm = os.open("/dev/kvm", os.O_RDWR) if os.path.exists("/dev/kvm") else -1
        self._tracer = ftrace.Tracer()
        self._log = ftrace.KernelLog()
        self._hello: dict[str, object] = {
            "machine": os.uname().machine,
            "release": os.uname().release,
            "kvm": self._kvm >= 0,
            "pid": os.getpid(),
            "cpus": os.cpu_count(),
        }

    def hello(self) -> dict[str, object]:
        """Describe the agent and its host: machine, release, kvm (whether it has KVM), pid, cpus."""
        return self._hello

    def restored(self, now: float, blob: bytes = b"") -> None:
        """Adjust a host restored from a snapshot.

        Make its CPUs program their timers again, set its clock to ``now`` (seconds since 1970), and add the blob to
        its entropy.
        """
        timers.program_anew(placement.CPUS)
        time.clock_settime(time.CLOCK_REALTIME, now)
        if blob:
            entropy.add(blob)

    def batch(self, requests: list[tuple[str, dict[str, object]]]) -> list[object]:
        """Carry out several requests, [[op, args], ...], none of which has a blob. The first failure ends the batch."""
        return [getattr(self, op)(**args) for op, args in requests]

    # -- VMs -------------------------------------------------------------------------------------

    def vm_create(self, ipa_bits: int = 0) -> int:
        """KVM_CREATE_VM with this IPA size, 0 for KVM's default. Returns the agent's number for the VM."""
        vm = kvm.Vm(self._kvm, ipa_bits)
        self._next_vm += 1
        self._vms[self._next_vm] = vm
        return self._next_vm

    def vm_destroy(self, vm: int) -> None:
        """Close the VM's descriptors, vCPUs first."""
        self._vms.pop(vm).close()

    def vm_close(self, vm: int, what: str) -> None:
        """Close one reference to a VM: the descriptor "vm", "vgic" or "vcpu" (vCPU 0's), or vCPU 0's mapping "run"."""
        self._vms[vm].close_part(what)

    def vm_destroy_elsewhere(self, vm: int) -> None:
        """Destroy a VM in a thread that has not used it."""
        thread = threading.Thread(target=self._vms.pop(vm).close)
        with placement.anywhere():
            thread.start()
        thread.join()

    def vm_memslot(self, vm: int, slot: int, ipa: int, size: int, hva: int, flags: int) -> None:
        """KVM_SET_USER_MEMORY_REGION."""
        self._vms[vm].set_memslot(slot, ipa, size, hva, flags)

    def vm_dirty_log(self, vm: int, slot: int, pages: int) -> bytes:
        """KVM_GET_DIRTY_LOG: little-endian u64 words, one bit per page."""
        return self._vms[vm].dirty_log(slot, pages)

    def vgic_create(self, vm: int, kind: int) -> None:
        """KVM_CREATE_DEVICE of type ``kind``, a KVM_DEV_TYPE_ARM_VGIC_*."""
        target = self._vms[vm]
        target.vgic = device.Device(target.fd, kind)

    def vgic_set(self, vm: int, group: int, attribute: int, value: int) -> None:
        """KVM_SET_DEVICE_ATTR with a 64-bit value."""
        self._vms[vm].device.set(group, attribute, value)

    def vgic_get(self, vm: int, group: int, attribute: int, value: int = 0) -> int:
        """KVM_GET_DEVICE_ATTR; ``value`` initialises the 64-bit buffer."""
        return self._vms[vm].device.get(group, attribute, value)

    def vm_irq_line(self, vm: int, irq: int, level: int) -> None:
        """KVM_IRQ_LINE."""
        device.irq_line(self._vms[vm].fd, irq, level)

    def fail_nth(self, n: int, op: str, args: dict[str, Any]) -> tuple[bool, int, object]:
        """Carry out one request and make its n-th allocation fail. For ``vcpu_run``, only KVM_RUN's allocations count.

        Returns [whether there was an n-th allocation, the request's errno or 0, its result].
        """
        failing.prepare()
        nth = failing.Nth(n)
        try:
            if op == "vcpu_run":
                exit_ = self._vcpu(args["vm"], args["vcpu"]).run_once(nth)
                return nth.injected, exit_.get("errno", 0), exit_
            with nth:
                result = getattr(self, op)(**args)
        except OSError as e:
            return nth.injected, e.errno or 0, None
        return nth.injected, 0, result

    # -- vCPUs -----------------------------------------------------------------------------------

    def _vcpu(self, vm: int, vcpu: int) -> kvm.Vcpu:
        return self._vms[vm].vcpus[vcpu]

    def vcpu_create(self, vm: int, vcpu: int, features: int, init: bool = True) -> None:
        """KVM_CREATE_VCPU, and with ``init`` also KVM_ARM_VCPU_INIT, else that is left to :meth:`vcpu_init`."""
        self._vms[vm].add_vcpu(vcpu, features, init)

    def vcpu_init(self, vm: int, vcpu: int) -> None:
        """KVM_ARM_VCPU_INIT with the preferred target."""
        self._vcpu(vm, vcpu).init()

    def vcpu_register(self, vm: int, vcpu: int, reg: int, value: int | None = None) -> int:
        """KVM_GET_ONE_REG, or KVM_SET_ONE_REG with a value; ``reg`` is the full 64-bit id."""
        return self._vcpu(vm, vcpu).register(reg, value)

    def vcpu_pin(self, vm: int, vcpu: int, cpu: int) -> None:
        """Bind the vCPU's thread to a CPU of the host."""
        self._vcpu(vm, vcpu).pin(cpu)

    def vcpu_run(
        self,
        vm: int,
        vcpu: int,
        answer: int | None = None,
        seconds: float = 0.0,
        orders: int | None = None,
        persistent: bool = False,
        blob: bytes = b"",
    ) -> kvm.Exit | tuple[kvm.Exit, bytes] | None:
        """Run the vCPU. Returns the exit, or None when there is none within ``seconds``; the vCPU then runs on.

        ``answer`` completes a pending MMIO read. ``orders`` is the HVA to which ``blob`` is stored before the run, and
        whose bytes are returned as the blob after an exit. ``persistent`` repeats a KVM_RUN that fails with EFAULT.
        """
        target = self._vcpu(vm, vcpu)
        if orders is not None:
            memory.write(orders, blob)
        if answer is not None:
            target.answer_mmio(answer)
        exit_ = target.run_for(seconds, target.run_on if persistent else target.run_once)
        return exit_ if exit_ is None or orders is None else (exit_, libc.read_memory(orders, len(blob)))

    def vcpu_wait(self, vm: int, vcpu: int, seconds: float) -> kvm.Exit | None:
        """Return the exit of the run under way, or None if it takes longer than ``seconds``."""
        return self._vcpu(vm, vcpu).wait(seconds)

    def vcpu_kick(self, vm: int, vcpu: int) -> None:
        """Force a running vCPU out of the guest."""
        self._vcpu(vm, vcpu).kick()

    def turns_start(
        self, cpu: int, vcpus: list[tuple[int, int]], mailboxes: list[int], doorbell: int, blob: bytes
    ) -> None:
        """Run ``vcpus``, [[vm, vcpu], ...], one after another on ``cpu``, each until its next exit.

        ``blob`` holds the contents of their mailboxes, all of one size. :meth:`turns_wait` returns the result.
        """
        if cpu not in self._runners:
            self._runners[cpu] = kvm.Runner(cpu)
        targets = [self._vcpu(vm, vcpu) for vm, vcpu in vcpus]
        self._runners[cpu].start(targets, mailboxes, doorbell, blob)

    def turns_wait(self, cpu: int, seconds: float) -> tuple[list[tuple[int, kvm.Exit]], bytes] | None:
        """Return the exits other than doorbells, as [[index, exit], ...], and as blob the mailboxes.

        Returns None if the turns take longer than ``seconds``.
        """
        return self._runners[cpu].wait(seconds)

    def vcpu_measure_mmio(self, vm: int, vcpu: int, exits: int) -> dict[str, float] | None:
        """Measure the seconds that one MMIO exit takes, as the mean of ``exits``."""
        target = self._vcpu(vm, vcpu)
        target.start(lambda: kvm.measure_mmio(target, exits))
        return target.wait(60.0)

    # -- descriptors and system calls, raw ---------------------------------------------------------------

    def kvm_fd(self) -> int:
        """Return the descriptor of /dev/kvm."""
        return self._kvm

    def vm_fd(self, vm: int) -> int:
        """Return the VM's descriptor."""
        return self._vms[vm].fd

    def vcpu_fd(self, vm: int, vcpu: int) -> int:
        """Return the vCPU's descriptor."""
        return self._vcpu(vm, vcpu).fd

    def vgic_fd(self, vm: int) -> int:
        """Return the VGIC's descriptor."""
        return self._vms[vm].device.fd

    def ioctl(self, fd: int, name: str, request: int, argument: int = 0, blob: bytes = b"") -> tuple[int, bytes]:
        """ioctl(2) with a number, or with a pointer to the blob. Returns its result and the blob's new content."""
        return libc.raw_ioctl(ioctls.Ioctl(name, request), fd, argument, blob)

    def syscall(self, name: str, arguments: list[int]) -> int:
        """Make a system call of :data:`.syscalls.NUMBERS`."""
        return libc.syscall(name, *arguments)

    def signals_block(self, signals: list[int]) -> None:
        """Block these signals in the agent's main thread and in the threads that it starts from now on.

        Threads started before take them, without effect: no signal ends the agent any more.
        """
        for number in signals:
            signal.signal(number, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    def signals_take(self, signals: list[int]) -> list[list[int]]:
        """Take those of these blocked signals that are pending: [si_signo, si_code, si_addr, si_addr_lsb] each."""
        return poison.take(signals)

    # -- actors ------------------------------------------------------------------------------------------

    def actor_create(self, cpu: int | None = None) -> int:
        """Start a thread that carries out operations, bound to a CPU if one is given, and return its number."""
        number = max(self._actors, default=0) + 1
        self._actors[number] = workers.Worker(f"actor{number}", cpu)
        self._actors[number].begin()  # now: starting a thread may move this one to a CPU that is held later
        return number

    def actor_begin(self, actor: int, op: str, args: dict[str, object], blob: bytes = b"") -> None:
        """Start one operation in the actor's thread. OSError (EBUSY) while another is under way."""
        self._actors[actor].start(lambda: replies.carry_out(self, {"op": op, "args": args}, blob))

    def actor_wait(self, actor: int, seconds: float) -> tuple[dict[str, object], bytes] | None:
        """Return the reply of the operation under way, as on the wire; None if it takes longer than ``seconds``."""
        return self._actors[actor].wait(seconds)

    def actor_end(self, actor: int) -> None:
        """End the actor's thread, after the operation under way."""
        self._actors.pop(actor).close()

    # -- memory ----------------------------------------------------------------------------------

    memory_map = staticmethod(memory.map_memory)
    memory_unmap = staticmethod(memory.unmap)
    memory_protect = staticmethod(memory.protect)
    memory_advise = staticmethod(memory.advise)
    memory_takes = staticmethod(memory.takes)
    memory_lock = staticmethod(memory.lock)
    memory_unlock = staticmethod(memory.unlock)
    memory_page_out = staticmethod(memory.page_out)
    memory_read = staticmethod(memory.read)
    memory_write = staticmethod(memory.write)
    memory_pagemap = staticmethod(memory.pagemap)
    memory_move = staticmethod(memory.move)
    memory_maps = staticmethod(memory.maps)
    memory_drain = staticmethod(ageing.drain)
    memory_mark_idle = staticmethod(ageing.mark_idle)
    memory_idle = staticmethod(ageing.idle)
    memory_merge = staticmethod(ksm.merge)
    memory_unmerge = staticmethod(ksm.unmerge)
    file_open = staticmethod(memory.open_file)
    file_close = staticmethod(memory.close_file)
    file_truncate = staticmethod(memory.truncate)
    file_punch_hole = staticmethod(memory.punch_hole)
    file_sync = staticmethod(memory.sync)

    def storm_begin(self, hva: int, size: int, advice: int) -> None:
        """Call madvise(2) on this memory repeatedly in a thread, until :meth:`storm_end`."""
        self._storm = memory.Storm(hva, size, advice)

    def storm_end(self) -> int:
        """Stop, and return the number of madvise(2) calls."""
        return self._storm.end() if self._storm else 0

    def userfault_begin(self, hva: int, size: int, protect: bool) -> int:
        """Resolve the page faults of this memory from now on. Returns the number for :meth:`userfault_end`."""
        handler = uffd.Handler(hva, size, protect)
        self._userfaults[id(handler)] = handler
        return id(handler)

    def userfault_end(self, number: int) -> list[tuple[int, str]]:
        """Stop, and return the faults as [[address, "missing" or "write-protect"], ...]."""
        return self._userfaults.pop(number).end()

    # -- children ----------------------------------------------------------------------------------

    def child_fork(self) -> int:
        """Fork a child, which shares this process's memory copy on write, and return its pid."""
        child = children.Child()
        self._children[child.pid] = child
        return child.pid

    def child_write(self, pid: int, hva: int, blob: bytes) -> None:
        """Store into the child's memory."""
        self._children[pid].write(hva, blob)

    def child_read(self, pid: int, hva: int, size: int) -> bytes:
        """Load from the child's memory."""
        return self._children[pid].read(hva, size)

    def child_end(self, pid: int) -> None:
        """Make the child exit and reap it."""
        self._children.pop(pid).end()

    def process_alive(self, pid: int) -> bool:
        """Return whether a process with this pid exists."""
        return os.path.exists(f"/proc/{pid}")

    def process_kill(self, pid: int) -> None:
        """Send SIGKILL to a process."""
        os.kill(pid, signal.SIGKILL)

    # -- the kernel's trace and log -----------------------------------------------------------------

    def trace_start(self, events: list[str]) -> None:
        """Start to record these ftrace events."""
        self._tracer.start(events)

    def trace_stop(self) -> bytes:
        """Stop recording and return the text of the trace."""
        return self._tracer.stop()

    def kernel_log(self) -> bytes:
        """Return the records of /dev/kmsg since the last call."""
        return self._log.read()

    def bytecode(self) -> tuple[list[tuple[str, int]], bytes]:
        """Compile the modules that this process has imported: [[path, length], ...] and the .pyc files as one blob."""
        from . import bytecode  # which loads the compiler, for the first boot of a root file system only

        return bytecode.compile_all(sys.modules.values())

    def stay_in_user_mode(self, seconds: float) -> None:
        """Loop in user mode for a while, so that the lab can read this process's TTBR0 from a CPU's registers."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pass
