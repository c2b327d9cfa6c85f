"""Faults of kernels, and of QEMU, that their developers know and that unmodified kernels were seen to have here.

A test case that recognises exactly such a wrong result names the fault (fixture ``known_fault``). The case is then an
expected failure on the kernels named here, and a failure on all others. Stable kernels take fixes back: one within the
range that does not show the fault passes.
"""

from __future__ import annotations

from dataclasses import dataclass

from arm_kvm.host.config import hint
from arm_kvm.support.errors import ConfigError

Release = tuple[int, int]


@dataclass(frozen=True)
class KnownFault:
    """A fault, and which kernels have it, as far as that is known."""

    name: str
    text: str  #: what is wrong, in the words of a report
    commit: str = ""  #: that mends it, where it is known
    since: Release | None = None  #: the first release with it; None: not known
    until: Release | None = None  #: the first release without it; None: not known, or none yet
    architecture: str = ""  #: of the host: "armv7" or "armv8"; "": both

    def covers(self, kernel: Release, architecture: str) -> bool:
        """Whether this kernel, of a host of this architecture, may have it."""
        if self.architecture not in ("", architecture):
            return False
        return (self.since is None or kernel >= self.since) and (self.until is None or kernel < self.until)

    @property
    def kernels(self) -> str:
        """The range in words: "armv7 kernels before 5.12"."""
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
    ),
    KnownFault(
        "last-page-of-ipa-space-refused",
        "a memslot with the last page of the IPA space is refused (until 262b003d059c, "
        '"KVM: arm64: Fix exclusive limit for IPA size", 5.12)',
        commit="262b003d059c",
        until=(5, 12),
    ),
    KnownFault(
        "executable-cpu-interface",
        "user_mem_abort() gives a device's leaf what the memslot's RAM allows: with DIC, execution (6.12)",
        architecture="armv8",
    ),
    # -- what the guest is told
    KnownFault(
        "mmio-load-without-sign",
        "vcpu_data_host_to_guest() masks the sign off again (arm64: since b30070862edb; patch posted in 2026: "
        '"KVM: arm64: Fix sign-extension of MMIO loads")',
    ),
    KnownFault(
        "walk-of-read-only-tables-is-a-write",
        "a walk of tables in a read-only memslot is taken for a write: 32-bit KVM believes HSR.WnR, arm64 did so until "
        "406504c7b040",
        commit="406504c7b040",
    ),
    KnownFault(
        "walk-into-a-hole-ends-the-run",
        "io_mem_abort() asks for a syndrome before S1PTW, and a walk never has one (5.4)",
    ),
    KnownFault(
        "injected-syndrome-sign-extended",
        'ESR_EL1 is sign-extended ("arm64: esr: Define ESR_ELx_EC_* constants as UL", 2024)',
        architecture="armv8",
    ),
    # -- TLB maintenance
    KnownFault(
        "vcpus-share-icache",
        "vCPUs of one VM share what the I-cache has under a virtual address (until 01dc9262ff57, "
        '"KVM: arm64: Ensure I-cache isolation between vcpus of a same VM", 5.12)',
        commit="01dc9262ff57",
        until=(5, 12),
    ),
    # -- the GICv2's CPU interface
    KnownFault(
        "cpu-interface-end-unchecked",
        'only its beginning is looked at (before c56a87da0a7f, "Check cpu interface region ...", 5.16)',
        commit="c56a87da0a7f",
        until=(5, 16),
    ),
    KnownFault(
        "cpu-interface-behind-root-table",
        "5.4 arm: kvm_phys_addr_ioremap() takes what lies behind the root table for an entry",
        architecture="armv7",
    ),
    KnownFault(
        "cpu-interface-wraps-to-ipa-0",
        "5.4 arm64: the second page of the CPU interface is mapped at IPA 0",
        architecture="armv8",
    ),
    # -- memory management
    KnownFault(
        "no-blocks-of-files",
        "huge pages of files are mapped page by page (until 169226f7e0d2, "
        '"mm: thp: handle page cache THP correctly in PageTransCompoundMap", 5.4)',
        commit="169226f7e0d2",
        until=(5, 4),
    ),
    KnownFault(
        "accessed-after-reclaim",
        "kvm_set_pfn_accessed() of a page that reclaim has freed: handle_access_fault() has let the lock go (until "
        '2362506f7cff, "KVM: arm64: Don\'t mark "struct page" accessed when making SPTE young", 6.13)',
        commit="2362506f7cff",
        until=(6, 13),
    ),
    KnownFault(
        "stale-page-after-change-pte",
        "a change_pte between another invalidation's start and its end maps a page that goes, and a permission fault "
        "makes it writable (change_pte: removed in 6.10)",
        until=(6, 10),
        architecture="armv8",
    ),
    KnownFault(
        "stale-page-until-next-fault",
        "a change_pte between another invalidation's start and its end maps a page that goes; the next permission "
        "fault maps the right one (user_mem_abort() of virt/kvm/arm/mmu.c, 5.4)",
        architecture="armv7",
    ),
    KnownFault(
        "page-in-deleted-memslot-after-change-pte",
        "change_pte maps a page into a memslot that is being deleted (until 2230f9e1171a, "
        '"KVM: Avoid illegal stage2 mapping on invalid memory slot", 6.4)',
        commit="2230f9e1171a",
        until=(6, 4),
    ),
    KnownFault(
        "sleeps-with-page-table-mapped",
        "collapse_huge_page() ends the notifier's range while it has a page table mapped (5.4, HIGHPTE)",
        architecture="armv7",
    ),
    # -- QEMU
    KnownFault(
        "qemu-arm-32-bit-hpfar",
        "qemu-system-arm before 10.1 cuts HPFAR to a 32-bit IPA (s2addr); host a15-wide does not",
        architecture="armv7",
    ),
)

KNOWN_FAULTS: dict[str, KnownFault] = {fault.name: fault for fault in _ALL}


def find(name: str) -> KnownFault:
    """The fault of this name. Raises ConfigError: there is none."""
    if name not in KNOWN_FAULTS:
        raise ConfigError(
            f"no known fault is called {name!r}; {hint(name, KNOWN_FAULTS, 'there are')}",
            remedy="name one of arm_kvm/known_faults.py, or describe the fault there first",
        )
    return KNOWN_FAULTS[name]
