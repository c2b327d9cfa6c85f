"""What the lab can ask of the agent: the methods of :class:`Operations`, and nothing else.

Both ends import this module. Inside the host its methods are carried out; the lab names them in requests
(``agent(op.memory_read, hva=..., size=...)``), so that a type checker sees a misspelt operation or argument.
Arguments and results are what JSON carries; one ``blob`` of bytes goes each way beside it.
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
    ksm,
    kvm,
    libc,
    memory,
    placement,
    poison,
    timers,
    uffd,
    workers,
)


class Operations:
    """The agent's state, and its operations. Each returns a JSON value, bytes, or both as a pair.

    Sizes and addresses are bytes. A failed system call raises OSError with the call's name: HostOsError at the lab.
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
        """Who answers: machine, release, kvm, pid, cpus."""
        return self._hello

    def restored(self, now: float, blob: bytes = b"") -> None:
        """This machine was saved some time ago.

        Have its CPUs program their timers anew, set its clock (seconds since 1970), and stir this entropy in.
        """
        timers.program_anew(placement.CPUS)
        time.clock_settime(time.CLOCK_REALTIME, now)
        if blob:
            entropy.add(blob)

    def batch(self, requests: list[tuple[str, dict[str, object]]]) -> list[object]:
        """Several requests whose results are no blobs, in one: [[op, args], ...]. The first that fails ends it."""
        return [getattr(self, op)(**args) for op, args in requests]

    # -- VMs -------------------------------------------------------------------------------------

    def vm_create(self, ipa_bits: int = 0) -> int:
        """KVM_CREATE_VM; ``ipa_bits`` 0 is KVM's default. The VM's number here."""
        vm = kvm.Vm(self._kvm, ipa_bits)
        self._next_vm += 1
        self._vms[self._next_vm] = vm
        return self._next_vm

    def vm_destroy(self, vm: int) -> None:
        """Close the VM's descriptors, vCPUs first."""
        self._vms.pop(vm).close()

    def vm_close(self, vm: int, what: str) -> None:
        """Close one that keeps a VM: "vm", "vgic", and of vCPU 0 "vcpu" (the descriptor) or "run" (its mapping)."""
        self._vms[vm].close_part(what)

    def vm_destroy_elsewhere(self, vm: int) -> None:
        """Destroy a VM in a thread that has nothing to do with it."""
        thread = threading.Thread(target=self._vms.pop(vm).close)
        with placement.anywhere():
            thread.start()
        thread.join()

    def vm_memslot(self, vm: int, slot: int, ipa: int, size: int, hva: int, flags: int) -> None:
        """KVM_SET_USER_MEMORY_REGION."""
        self._vms[vm].set_memslot(slot, ipa, size, hva, flags)

    def vm_dirty_log(self, vm: int, slot: int, pages: int) -> bytes:
        """KVM_GET_DIRTY_LOG: little-endian u64 words, one bit a page."""
        return self._vms[vm].dirty_log(slot, pages)

    def vgic_create(self, vm: int, kind: int) -> None:
        """KVM_CREATE_DEVICE of this KVM_DEV_TYPE_ARM_VGIC_*."""
        target = self._vms[vm]
        target.vgic = device.Device(target.fd, kind)

    def vgic_set(self, vm: int, group: int, attribute: int, value: int) -> None:
        """KVM_SET_DEVICE_ATTR with a 64-bit value."""
        self._vms[vm].device.set(group, attribute, value)

    def vgic_get(self, vm: int, group: int, attribute: int, value: int = 0) -> int:
        """KVM_GET_DEVICE_ATTR; ``value`` is what is in the 64-bit buffer before."""
        return self._vms[vm].device.get(group, attribute, value)

    def vm_irq_line(self, vm: int, irq: int, level: int) -> None:
        """KVM_IRQ_LINE."""
        device.irq_line(self._vms[vm].fd, irq, level)

    def fail_nth(self, n: int, op: str, args: dict[str, object]) -> tuple[bool, int, object]:
        """Carry out one request whose n-th allocation fails: [whether there was an n-th, its errno or 0, its result].

        Of ``vcpu_run`` it is the allocations of KVM_RUN alone.
        """
        failing.prepare()
        nth = failing.Nth(n)
        try:
            if op == "vcpu_run":
                result: object = self._vcpu(args["vm"], args["vcpu"]).run_once(nth)
                failure = result.get("errno", 0) if isinstance(result, dict) else 0
                return nth.injected, failure, result
            with nth:
                result = getattr(self, op)(**args)
        except OSError as e:
            return nth.injected, e.errno or 0, None
        return nth.injected, 0, result

    # -- vCPUs -----------------------------------------------------------------------------------

    def _vcpu(self, vm: object, vcpu: object) -> kvm.Vcpu:
        return self._vms[int(str(vm))].vcpus[int(str(vcpu))]

    def vcpu_create(self, vm: int, vcpu: int, features: int, init: bool = True) -> None:
        """KVM_CREATE_VCPU, and KVM_ARM_VCPU_INIT unless that is left for :meth:`vcpu_init`."""
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
        """Start the vCPU, with the data of a pending MMIO read; its exit, or None if it runs on.

        ``orders`` is the HVA that ``blob`` is stored at before the run; after an exit as much of it comes back.
        ``persistent``: a run that ends with EFAULT is tried again.
        """
        target = self._vcpu(vm, vcpu)
        if orders is not None:
            memory.write(orders, blob)
        if answer is not None:
            target.answer_mmio(answer)
        exit_ = target.run_for(seconds, target.run_on if persistent else target.run_once)
        return exit_ if exit_ is None or orders is None else (exit_, libc.read_memory(orders, len(blob)))

    def vcpu_wait(self, vm: int, vcpu: int, seconds: float) -> kvm.Exit | None:
        """The exit of the run under way, or None when it has not come in time."""
        return self._vcpu(vm, vcpu).wait(seconds)

    def vcpu_kick(self, vm: int, vcpu: int) -> None:
        """Force a running vCPU out of the guest."""
        self._vcpu(vm, vcpu).kick()

    def turns_start(
        self, cpu: int, vcpus: list[tuple[int, int]], mailboxes: list[int], doorbell: int, blob: bytes
    ) -> None:
        """Run ``vcpus``, [[vm, vcpu], ...], one after another on ``cpu``, each until it rings its doorbell.

        ``blob`` is cut evenly into what each finds in its mailbox. :meth:`turns_wait` takes the result.
        """
        if cpu not in self._runners:
            self._runners[cpu] = kvm.Runner(cpu)
        targets = [self._vcpu(vm, vcpu) for vm, vcpu in vcpus]
        self._runners[cpu].start(targets, mailboxes, doorbell, blob)

    def turns_wait(self, cpu: int, seconds: float) -> tuple[list[tuple[int, kvm.Exit]], bytes] | None:
        """[exits that were no doorbell, as [index, exit]] and the mailboxes' content; None while vCPUs still run."""
        return self._runners[cpu].wait(seconds)

    def vcpu_measure_mmio(self, vm: int, vcpu: int, exits: int) -> dict[str, object] | None:
        """Seconds that one MMIO exit takes, over so many."""
        target = self._vcpu(vm, vcpu)
        target.start(lambda: kvm.measure_mmio(target, exits))
        return target.wait(60.0)

    # -- descriptors and system calls, raw ---------------------------------------------------------------

    def kvm_fd(self) -> int:
        """The descriptor of /dev/kvm."""
        return self._kvm

    def vm_fd(self, vm: int) -> int:
        return self._vms[vm].fd

    def vcpu_fd(self, vm: int, vcpu: int) -> int:
        return self._vcpu(vm, vcpu).fd

    def vgic_fd(self, vm: int) -> int:
        return self._vms[vm].device.fd

    def ioctl(self, fd: int, name: str, request: int, argument: int = 0, blob: bytes = b"") -> tuple[int, bytes]:
        """ioctl(2) with a number, or with a pointer to the blob's bytes: its result, and what became of the bytes."""
        return libc.raw_ioctl(name, fd, request, argument, blob)

    def syscall(self, name: str, number: int, arguments: list[int]) -> int:
        """A system call by its number; its result."""
        return libc.raw_syscall(name, number, *arguments)

    def signals_block(self, signals: list[int]) -> None:
        """Keep these signals pending for the agent's main thread and the threads begun from now on."""
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    def signals_take(self, signals: list[int]) -> list[list[int]]:
        """What is pending of these, blocked, signals: [signal, code, address, address's low bits] each."""
        return poison.take(signals)

    # -- actors ------------------------------------------------------------------------------------------

    def actor_create(self, cpu: int | None = None) -> int:
        """A thread that carries out operations beside this one, bound to a CPU if one is given; its number."""
        number = len(self._actors) + 1
        self._actors[number] = workers.Worker(f"actor{number}", cpu)
        self._actors[number].begin()  # now: to begin a thread, this one leaves its CPU, for one that may be held later
        return number

    def actor_begin(self, actor: int, op: str, args: dict[str, object], blob: bytes = b"") -> None:
        """Have it carry out one operation. OSError (EBUSY) while another is under way."""
        self._actors[actor].start(lambda: carry_out(self, {"op": op, "args": args}, blob))

    def actor_wait(self, actor: int, seconds: float) -> tuple[dict[str, object], bytes] | None:
        """The reply of the operation under way, as on the wire; None when it has not come in time."""
        return self._actors[actor].wait(seconds)

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
        """madvise this memory again and again in a thread, until :meth:`storm_end`."""
        self._storm = memory.Storm(hva, size, advice)

    def storm_end(self) -> int:
        """How often it was done."""
        return self._storm.end() if self._storm else 0

    def userfault_begin(self, hva: int, size: int, protect: bool) -> int:
        """Answer the page faults of this memory from now on; a number to end it with."""
        handler = uffd.Handler(hva, size, protect)
        self._userfaults[id(handler)] = handler
        return id(handler)

    def userfault_end(self, number: int) -> list[tuple[int, str]]:
        """Stop answering; the faults as [address, "missing" or "write-protect"]."""
        return self._userfaults.pop(number).end()

    # -- children ----------------------------------------------------------------------------------

    def child_fork(self) -> int:
        """A forked child, which keeps this process's memory copy on write; its pid."""
        child = children.Child()
        self._children[child.pid] = child
        return child.pid

    def child_write(self, pid: int, hva: int, blob: bytes) -> None:
        self._children[pid].write(hva, blob)

    def child_read(self, pid: int, hva: int, size: int) -> bytes:
        return self._children[pid].read(hva, size)

    def child_end(self, pid: int) -> None:
        self._children.pop(pid).end()

    def process_alive(self, pid: int) -> bool:
        return os.path.exists(f"/proc/{pid}")

    def process_kill(self, pid: int) -> None:
        """SIGKILL."""
        os.kill(pid, signal.SIGKILL)

    # -- the kernel's own words ---------------------------------------------------------------------

    def trace_start(self, events: list[str]) -> None:
        """Record these ftrace events from now on."""
        self._tracer.start(events)

    def trace_stop(self) -> bytes:
        """Stop recording; the text of the trace."""
        return self._tracer.stop()

    def kernel_log(self) -> bytes:
        """Records of /dev/kmsg since this was last asked."""
        return self._log.read()

    def bytecode(self) -> tuple[list[tuple[str, int]], bytes]:
        """Compile what this process has imported: [[path, length], ...] and the .pyc files as one blob.

        Hash-checked, so that a .pyc is never stale, whatever the file system does to time stamps.
        """
        import py_compile  # for the first boot of a root file system only

        mode = py_compile.PycInvalidationMode.CHECKED_HASH
        files: list[tuple[str, int]] = []
        blob = b""
        for module in list(sys.modules.values()):
            source, cached = getattr(module, "__file__", None), getattr(module, "__cached__", None)
            if source and cached and source.endswith(".py"):
                source, cached = os.path.abspath(source), os.path.abspath(cached)
                py_compile.compile(source, cached, doraise=True, invalidation_mode=mode)
                with open(cached, "rb") as f:
                    data = f.read()
                files.append((cached, len(data)))
                blob += data
        return files, blob

    def stay_in_user_mode(self, seconds: float) -> None:
        """Do nothing else for a while, so that the lab can read this process's TTBR0 from a CPU's registers."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pass


def carry_out(operations: Operations, request: dict[str, Any], blob: bytes) -> tuple[dict[str, object], bytes]:
    """The reply to one request, as :mod:`.wire` describes it, and its blob. Never raises."""
    reply: dict[str, object] = {"id": request.get("id")}
    out: bytes | None = None
    try:
        arguments = request.get("args") or {}
        result = getattr(operations, request["op"])(**arguments, **({"blob": blob} if blob else {}))
        reply["ok"], out = _parted(result)
        reply["blob"] = out is not None
    except OSError as e:
        reply["errno"], reply["call"] = e.errno, e.filename or "system call"
    except Exception:
        import traceback  # seldom needed, and slow to load on an emulated CPU

        reply["fault"] = traceback.format_exc()
    return reply, out or b""


def _parted(result: object) -> tuple[object, bytes | None]:
    """What JSON carries of a result, and the bytes beside it; None where none belong to it."""
    if isinstance(result, bytes):
        return None, result
    if isinstance(result, tuple) and isinstance(result[-1], bytes):
        return result[0], result[1]
    return result, None
