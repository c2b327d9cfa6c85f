"""Faults of kernels, and of QEMU, that their developers know and that this lab has seen in unmodified ones.

A test case that recognises exactly such a wrong result names the fault (fixture ``known_fault``). The case is then an
expected failure on the kernels named here, and a failure on all others. Stable kernels take fixes back, so a kernel in
the range may not have the fault: there the case passes.
"""

from __future__ import annotations

from dataclasses import dataclass

from arm_kvm.support.errors import ConfigError
from arm_kvm.support.hints import hint

Release = tuple[int, int]


@dataclass(frozen=True)
class KnownFault:
    """A fault, and the kernels that have it, as far as that is known."""

    name: str
    text: str  #: what is wrong, as a report shows it
    commit: str = ""  #: the commit that fixes it; "": not known
    since: Release | None = None  #: the first release with it; None: not known
    until: Release | None = None  #: the first release without it; None: not known, or none yet
    architecture: str = ""  #: of the host: "armv7" or "armv8"; "": both
    seen: str = ""  #: where it was seen

    def covers(self, kernel: Release, architecture: str) -> bool:
        """Whether this kernel, on a host of this architecture, may have the fault."""
        if self.architecture not in ("", architecture):
            return False
        return (self.since is None or kernel >= self.since) and (self.until is None or kernel < self.until)

    @property
    def kernels(self) -> str:
        """The kernels that may have the fault, in words: "armv7 kernels before 5.12"."""
        since = f"since {_dotted(self.since)}" if self.since else ""
        until = f"before {_dotted(self.until)}" if self.until else ""
        which = self.architecture or ("" if since or until else "all")
        return " ".join(filter(None, (which, "kernels", since, until)))


def _dotted(release: Release) -> str:
    return ".".join(map(str, release))


_ALL = (
    # -- tables and memslots
    KnownFault(
        "block-beyond-memslot",
        "a block reaches beyond its memslot (until 6794ad5443a2, "
        '"KVM: arm/arm64: Fix unintended stage 2 PMD mappings", 5.0)',
        commit="6794ad5443a2",
        until=(5, 0),
        seen="4.19 on arm",
    ),
    KnownFault(
        "last-page-of-ipa-space-refused",
        "a memslot with the last page of the IPA space is refused (until 262b003d059c, "
        '"KVM: arm64: Fix exclusive limit for IPA size", 5.12)',
        commit="262b003d059c",
        until=(5, 12),
        seen="4.19 and 5.2 on arm",
    ),
    KnownFault(
        "executable-cpu-interface",
        "user_mem_abort() gives a device's leaf the permissions of the memslot's RAM: where the CPU has DIC, a write "
        "to the CPU interface after its memslot began to log makes the leaf executable (6.12)",
        architecture="armv8",
        seen="6.12 on arm64-vhe, with QEMU 11's CPU max, which has DIC (7.2's does not)",
    ),
    # -- what the guest observes
    KnownFault(
        "mmio-load-without-sign",
        "vcpu_data_host_to_guest() masks off the sign of a sign-extending MMIO load (arm64: since b30070862edb; patch "
        'posted in 2026: "KVM: arm64: Fix sign-extension of MMIO loads")',
        seen="5.4 on arm, 6.1 on arm64",
    ),
    KnownFault(
        "walk-of-read-only-tables-is-a-write",
        "a stage-1 walk of tables in a read-only memslot is taken for a write: 32-bit KVM trusts HSR.WnR, as arm64 did "
        "until 406504c7b040",
        commit="406504c7b040",
        seen="5.4 on arm",
    ),
    KnownFault(
        "walk-into-a-hole-ends-the-run",
        "a stage-1 walk into a hole ends KVM_RUN with ENOSYS instead of aborting in the guest: io_mem_abort() wants a "
        "valid syndrome before it checks S1PTW, and a walk never has one (5.4)",
        seen="5.4 on arm",
    ),
    KnownFault(
        "injected-syndrome-sign-extended",
        "the ESR_EL1 of an injected abort is sign-extended into its upper half "
        '("arm64: esr: Define ESR_ELx_EC_* constants as UL", 2024)',
        architecture="armv8",
        seen="6.1 on arm64",
    ),
    # -- TLB maintenance
    KnownFault(
        "vcpus-share-icache",
        "vCPUs of one VM share what the I-cache holds for a virtual address (until 01dc9262ff57, "
        '"KVM: arm64: Ensure I-cache isolation between vcpus of a same VM", 5.12)',
        commit="01dc9262ff57",
        until=(5, 12),
        seen="4.19 and 5.2 on arm",
    ),
    # -- the GICv2's CPU interface
    KnownFault(
        "cpu-interface-end-unchecked",
        "a CPU interface whose second page lies beyond the IPA space is accepted: only its start is checked (until "
        'c56a87da0a7f, "Check cpu interface region ...", 5.16)',
        commit="c56a87da0a7f",
        until=(5, 16),
        seen="5.4 on arm, 5.4 and 5.10 on arm64; on 5.10 the first run is then refused with ERANGE",
    ),
    KnownFault(
        "cpu-interface-behind-root-table",
        "kvm_phys_addr_ioremap() takes what lies behind the root table for an entry of it, since stage2_pgd_index() "
        "has no bound: stage2_set_pte() oopses, or the second page of the CPU interface is in none of the VM's tables "
        "(5.4)",
        architecture="armv7",
        seen="5.4 on arm",
    ),
    KnownFault(
        "cpu-interface-wraps-to-ipa-0",
        "the second page of the CPU interface is mapped at IPA 0 (5.4)",
        architecture="armv8",
        seen="5.4 on arm64",
    ),
    # -- memory management
    KnownFault(
        "no-blocks-of-files",
        "huge pages of files are mapped page by page (until 169226f7e0d2, "
        '"mm: thp: handle page cache THP correctly in PageTransCompoundMap", 5.4)',
        commit="169226f7e0d2",
        until=(5, 4),
        seen="5.2 on arm",
    ),
    KnownFault(
        "accessed-after-reclaim",
        "handle_access_fault() calls kvm_set_pfn_accessed() after it has dropped the lock, when reclaim may have freed "
        'the page (until 2362506f7cff, "KVM: arm64: Don\'t mark "struct page" accessed when making SPTE young", 6.13)',
        commit="2362506f7cff",
        until=(6, 13),
        seen="5.4 on arm64, host arm64-debug; by the source, all before 6.13 have it",
    ),
    KnownFault(
        "stale-page-after-change-pte",
        "change_pte between the start and the end of another invalidation maps a page that is being dropped, and a "
        "permission fault makes it writable (until 6.10, which removed change_pte)",
        until=(6, 10),
        architecture="armv8",
        seen="6.1 on arm64",
    ),
    KnownFault(
        "stale-page-until-next-fault",
        "change_pte between the start and the end of another invalidation maps a page that is being dropped; the next "
        "permission fault maps the right one (user_mem_abort() of virt/kvm/arm/mmu.c, 5.4)",
        architecture="armv7",
        seen="5.4 on arm",
    ),
    KnownFault(
        "page-in-deleted-memslot-after-change-pte",
        "change_pte maps a page into a memslot that is being deleted (until 2230f9e1171a, "
        '"KVM: Avoid illegal stage2 mapping on invalid memory slot", 6.4)',
        commit="2230f9e1171a",
        until=(6, 4),
        seen="5.4 on arm, Debian's 5.10 on arm64",
    ),
    KnownFault(
        "sleeps-with-page-table-mapped",
        "not KVM: khugepaged's collapse_huge_page() ends the MMU notifier's range between pte_offset_map() and "
        "pte_unmap(), where it must not sleep if page tables are in high memory (5.4, HIGHPTE)",
        architecture="armv7",
        seen="5.4 on arm, host a15-debug",
    ),
    # -- QEMU
    KnownFault(
        "qemu-arm-32-bit-hpfar",
        "not KVM: qemu-system-arm before 10.1 cuts the fault IPA in HPFAR to 32 bits (s2addr); the QEMU of host "
        "a15-wide does not",
        architecture="armv7",
        seen="QEMU before 10.1",
    ),
)

KNOWN_FAULTS: dict[str, KnownFault] = {fault.name: fault for fault in _ALL}


def find(name: str) -> KnownFault:
    """Return the fault of this name. Raises ConfigError if there is none."""
    if name not in KNOWN_FAULTS:
        raise ConfigError(
            f"no known fault is called {name!r}; {hint(name, KNOWN_FAULTS, 'there are')}",
            remedy="name one of arm_kvm/known_faults.py, or describe the fault there first",
        )
    return KNOWN_FAULTS[name]
