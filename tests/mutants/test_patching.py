"""Mutants in a running kernel: exactly the intended instructions change, or none."""

from dataclasses import replace

import pytest
from arm_kvm.mutants.catalogue import NotApplicable, Word
from arm_kvm.mutants.fingerprint import fingerprint
from arm_kvm.mutants.patching import put_in

from .examples import mutant, sum_of, words_at

RET, NOP = 0xD65F_03C0, 0xD503_201F


NO = ("00000000",)  #: sums that no function has


def test_a_function_returns_at_once(victim):
    put_in(mutant(returns=("kvm_age_gfn", "kvm_age_hva"), value=7), victim)
    assert words_at(victim, "kvm_age_gfn", 2) == [0xD280_00E0, RET]


def test_an_invalidation_is_dropped_or_made_local(victim):
    where = "__kvm_nvhe___kvm_tlb_flush_vmid_ipa"
    put_in(mutant(operations=("ipas2e1is",), functions=("__kvm_tlb_flush_vmid_ipa",), local=True), victim)
    body = words_at(victim, where, 40)
    assert [w for w in body if w & ~0x1F == 0xD50C_8420], "IPAS2E1, with the register unchanged"
    put_in(mutant(operations=("vmalle1is",), functions=("__kvm_tlb_flush_vmid_ipa",)), victim)
    assert NOP in words_at(victim, where, 40)


def test_a_word_is_replaced_where_it_is_the_nth(victim):
    before = words_at(victim, "kvm_set_spte_gfn", 12)
    word = before[3]
    nth = before[:4].count(word)
    sums = (sum_of(victim, "kvm_set_spte_gfn"),)
    put_in(mutant(words=(Word("kvm_set_spte_gfn", word, NOP, nth, "armv8-6.1", sums),)), victim)
    assert words_at(victim, "kvm_set_spte_gfn", 12) == [*before[:3], NOP, *before[4:]]


def test_a_word_is_replaced_in_any_kernel_with_the_same_function(victim):
    """A word read in another release is replaced if the function is the same; a branch keeps this kernel's offset."""
    body = words_at(victim, "kvm_set_spte_gfn", 40)
    at = next(n for n, word in enumerate(body) if word >> 26 == 0b100101)
    elsewhere = 0x9400_0000 | ~body[at] & 0x3FF_FFFF
    nth = sum(word >> 26 == 0b100101 for word in body[: at + 1])
    jump = elsewhere & ~(1 << 31)  # BL becomes B, with the same target
    word = Word("kvm_set_spte_gfn", elsewhere, jump, nth, "armv8-5.10", (sum_of(victim, "kvm_set_spte_gfn"),))
    put_in(mutant(words=(word,)), victim)
    assert words_at(victim, "kvm_set_spte_gfn", 40)[at] == body[at] & ~(1 << 31)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"returns": ("no_such_function",)}, "no no_such_function in this kernel"),
        ({"operations": ("alle1os",), "functions": ("__kvm_flush_vm_context",)}, "no alle1os in"),
        ({"words": (Word("kvm_test_age_gfn", NOP, NOP, 1, "armv7-6.1", NO),)}, "of armv7-6.1, this is armv8-6.1"),
        ({"words": (Word("kvm_test_age_gfn", NOP, NOP, 1, "armv8-5.10", NO),)}, "of armv8-5.10, this is armv8-6.1"),
        (
            {"words": (Word("kvm_test_age_gfn", NOP, NOP, 1, "armv8-6.1", NO),)},
            "is not as in the catalogue's .* its sum",
        ),
        ({"words": (Word("no_such", NOP, NOP, 1, "armv8-6.1", NO),)}, "no no_such in this build of armv8-6.1"),
    ],
)
def test_mutants_that_are_not_applicable(victim, how, words):
    with pytest.raises(NotApplicable, match=words):
        put_in(mutant(**how), victim)


def test_a_word_that_is_not_in_its_function(victim):
    word = Word("kvm_test_age_gfn", 0x1234_5678, NOP, 1, "armv8-6.1", (sum_of(victim, "kvm_test_age_gfn"),))
    with pytest.raises(NotApplicable, match="has no 12345678 number 1"):
        put_in(mutant(words=(word,)), victim)


def test_a_fingerprint_does_not_depend_on_the_address():
    def text(*words):
        return b"".join(word.to_bytes(4, "little") for word in words)

    here = text(0x9000_0001, 0x9104_0021, 0x9400_0010, 0x5400_0261, 0xF940_0C21)  # adrp, add, bl, b.ne, ldr [x1, #24]
    there = text(0xB000_0501, 0x9108_4021, 0x97FF_0010, 0x5400_0141, 0xF940_1021)
    other = text(0x9000_0001, 0x9104_0021, 0x9400_0010, 0x5400_0260, 0xF940_0C21)  # b.eq
    assert fingerprint("armv8", here) == fingerprint("armv8", there) != fingerprint("armv8", other)
    assert fingerprint("armv8", text(0xF940_0C41)) != fingerprint("armv8", text(0xF940_1041))  # not based on an ADRP
    here, there = text(0xE301_1234, 0xEB00_0010), text(0xE30F_1ABC, 0xEBFF_0010)  # movw, bl
    assert (
        fingerprint("armv7", here)
        == fingerprint("armv7", there)
        != fingerprint("armv7", text(0xE301_2234, 0xEB00_0010))
    )


def test_a_host_that_lacks_a_capability(victim):
    with pytest.raises(NotApplicable, match="arm64 lacks fail-nth"):
        put_in(replace(mutant(returns=("kvm_age_gfn",)), needs=frozenset({"fail-nth"})), victim)
