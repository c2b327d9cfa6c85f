"""The agent's request server: one request at a time, an answer for every one."""

import os
import resource
import signal
import sys
import threading
import time

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
    streams,
    timers,
    uffd,
    wire,
)

#: A VM with one vCPU is two open files, and a test may want a thousand.
_FILES = 65536


class Agent:
    """The operations the lab can ask for. Each returns a JSON value, or ``(value, blob)``."""

    def __init__(self):
        self._vms = {}
        self._next_vm = 0
        self._runners = {}
        self._children = {}
        self._userfaults = {}
        self._kvm = os.open("/dev/kvm", os.O_RDWR) if os.path.exists("/dev/kvm") else None
        self._tracer = ftrace.Tracer()
        self._log = ftrace.KernelLog()
        self._hello = {
            "machine": os.uname().machine,
            "release": os.uname().release,
            "kvm": self._kvm is not None,
            "pid": os.getpid(),
            "cpus": os.cpu_count(),
        }

    def hello(self):
        return self._hello

    def restored(self, now, blob=b""):
        """This machine was saved some time ago.

        Have its CPUs program their timers anew, set its clock (seconds since 1970), and stir this entropy in.
        """
        timers.program_anew(placement.CPUS)
        time.clock_settime(time.CLOCK_REALTIME, now)
        if blob:
            entropy.add(blob)

    def batch(self, requests):
        """Several requests whose results are no blobs, in one: [[op, args], ...]. The first that fails ends it."""
        return [getattr(self, op)(**args) for op, args in requests]

    # -- VMs -------------------------------------------------------------------------------------

    def vm_create(self, ipa_bits=0):
        self._next_vm += 1
        self._vms[self._next_vm] = kvm.Vm(self._kvm, ipa_bits)
        return self._next_vm

    def vm_destroy(self, vm):
        self._vms.pop(vm).close()

    def vm_close(self, vm, what):
        """Close one that keeps a VM: "vm", "vgic", and of vCPU 0 "vcpu" (the descriptor) or "run" (its mapping)."""
        self._vms[vm].close_part(what)

    def vm_destroy_elsewhere(self, vm):
        """Destroy a VM in a thread that has nothing to do with it."""
        thread = threading.Thread(target=self._vms.pop(vm).close)
        with placement.anywhere():
            thread.start()
        thread.join()

    def vm_memslot(self, vm, slot, ipa, size, hva, flags):
        self._vms[vm].set_memslot(slot, ipa, size, hva, flags)

    def vm_dirty_log(self, vm, slot, pages):
        return None, self._vms[vm].dirty_log(slot, pages)

    def vgic_create(self, vm, kind):
        target = self._vms[vm]
        target.vgic = device.Device(target.fd, kind)

    def vgic_set(self, vm, group, attribute, value):
        self._vms[vm].vgic.set(group, attribute, value)

    def vgic_get(self, vm, group, attribute):
        return self._vms[vm].vgic.get(group, attribute)

    def vm_irq_line(self, vm, irq, level):
        device.irq_line(self._vms[vm].fd, irq, level)

    def fail_nth(self, n, op, args):
        """Carry out one request whose n-th allocation fails: [whether there was an n-th, its errno or 0, its result].

        Of ``vcpu_run`` it is the allocations of KVM_RUN alone.
        """
        failing.prepare()
        nth = failing.Nth(n)
        try:
            if op == "vcpu_run":
                result = self._vms[args["vm"]].vcpus[args["vcpu"]].run_once(nth)
                return [nth.injected, result.get("errno", 0), result]
            with nth:
                result = getattr(self, op)(**args)
        except OSError as e:
            return [nth.injected, e.errno, None]
        return [nth.injected, 0, result]

    # -- vCPUs -----------------------------------------------------------------------------------

    def vcpu_create(self, vm, vcpu, features):
        self._vms[vm].add_vcpu(vcpu, features)

    def vcpu_init(self, vm, vcpu):
        self._vms[vm].vcpus[vcpu].init()

    def vcpu_register(self, vm, vcpu, reg, value=None):
        return self._vms[vm].vcpus[vcpu].register(reg, value)

    def vcpu_pin(self, vm, vcpu, cpu):
        self._vms[vm].vcpus[vcpu].pin(cpu)

    def vcpu_run(self, vm, vcpu, answer=None, seconds=0.0, orders=None, persistent=False, blob=b""):
        """Start the vCPU, with the data of a pending MMIO read; its exit, or None if it runs on.

        ``orders`` is the HVA that ``blob`` is stored at before the run; after an exit as much of it comes back.
        """
        target = self._vms[vm].vcpus[vcpu]
        if orders is not None:
            memory.write(orders, blob)
        if answer is not None:
            target.answer_mmio(answer)
        exit_ = target.run_for(seconds, target.run_on if persistent else target.run_once)
        return exit_ if exit_ is None or orders is None else (exit_, libc.read_memory(orders, len(blob)))

    def vcpu_wait(self, vm, vcpu, seconds):
        return self._vms[vm].vcpus[vcpu].wait(seconds)

    def vcpu_kick(self, vm, vcpu):
        self._vms[vm].vcpus[vcpu].kick()

    def turns_start(self, cpu, vcpus, mailboxes, doorbell, blob):
        """Run ``vcpus``, [[vm, vcpu], ...], one after another on ``cpu``, each until it rings its doorbell.

        ``blob`` is cut evenly into what each finds in its mailbox. :meth:`turns_wait` takes the result.
        """
        if cpu not in self._runners:
            self._runners[cpu] = kvm.Runner(cpu)
        targets = [self._vms[vm].vcpus[vcpu] for vm, vcpu in vcpus]
        self._runners[cpu].start(targets, mailboxes, doorbell, blob)

    def turns_wait(self, cpu, seconds):
        """[exits that were no doorbell, as [index, exit]] and the mailboxes' content; None while vCPUs still run."""
        return self._runners[cpu].wait(seconds)

    def vcpu_measure_mmio(self, vm, vcpu, exits):
        target = self._vms[vm].vcpus[vcpu]
        target.start(lambda: kvm.measure_mmio(target, exits))
        return target.wait(60.0)

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

    def storm_begin(self, hva, size, advice):
        """madvise this memory again and again in a thread, until :meth:`storm_end`."""
        self._storm = memory.Storm(hva, size, advice)

    def storm_end(self):
        """How often it was done."""
        return self._storm.end()

    def userfault_begin(self, hva, size, protect):
        """Answer the page faults of this memory from now on; a number to end it with."""
        handler = uffd.Handler(hva, size, protect)
        self._userfaults[id(handler)] = handler
        return id(handler)

    def userfault_end(self, number):
        return self._userfaults.pop(number).end()

    # -- children ----------------------------------------------------------------------------------

    def child_fork(self):
        child = children.Child()
        self._children[child.pid] = child
        return child.pid

    def child_write(self, pid, hva, blob):
        self._children[pid].write(hva, blob)

    def child_read(self, pid, hva, size):
        return self._children[pid].read(hva, size)

    def child_end(self, pid):
        self._children.pop(pid).end()

    def process_alive(self, pid):
        return os.path.exists(f"/proc/{pid}")

    def process_kill(self, pid):
        os.kill(pid, signal.SIGKILL)

    # -- the kernel's own words ---------------------------------------------------------------------

    def trace_start(self, events):
        self._tracer.start(events)

    def trace_stop(self):
        return None, self._tracer.stop()

    def kernel_log(self):
        return None, self._log.read()

    def bytecode(self):
        """Compile what this process has imported: [[path, length], ...] and the .pyc files as one blob.

        Hash-checked, so that a .pyc is never stale, whatever the file system does to time stamps.
        """
        import py_compile

        mode = py_compile.PycInvalidationMode.CHECKED_HASH
        files, blob = [], b""
        for module in list(sys.modules.values()):
            source, cached = getattr(module, "__file__", None), getattr(module, "__cached__", None)
            if source and cached and source.endswith(".py"):
                source, cached = os.path.abspath(source), os.path.abspath(cached)
                py_compile.compile(source, cached, doraise=True, invalidation_mode=mode)
                with open(cached, "rb") as f:
                    data = f.read()
                files.append([cached, len(data)])
                blob += data
        return files, blob

    def pose(self, seconds):
        """Stay in user mode for a while, so that the lab can read this process's TTBR0."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pass


def answer(agent, request, blob):
    """The reply to one request; never raises."""
    reply, out = {"id": request.get("id")}, b""
    try:
        operation = getattr(agent, request["op"])
        arguments = request.get("args", {})
        result = operation(**arguments, blob=blob) if blob else operation(**arguments)
        if isinstance(result, tuple):
            result, out = result
        reply["ok"] = result
    except OSError as e:
        reply["errno"], reply["call"] = e.errno, e.filename or "system call"
    except Exception:
        import traceback  # seldom needed, and slow to load on an emulated CPU

        reply["fault"] = traceback.format_exc()
    return reply, out


def main(name=""):
    """Serve the lab on the virtio serial port of this name, or on standard input and output."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (_FILES, _FILES))
    for interruption in (signal.SIGUSR1, signal.SIGALRM):  # of KVM_RUN
        signal.signal(interruption, lambda *_: None)
    poison.keep_out()
    placement.stay_home()
    stream = streams.Port(name) if name else streams.Pipes()
    agent = Agent()
    while True:
        try:
            request, blob = wire.decode(stream.read)
        except EOFError:
            return
        reply, out = answer(agent, request, blob)
        stream.write(wire.encode(reply, out))


main(*sys.argv[1:])
