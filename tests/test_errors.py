"""The tree of errors: a distinct exit code for every kind, and one message each."""

import arm_kvm.support.errors as errors
from arm_kvm.support.errors import LabError


def kinds():
    found = [LabError]
    for kind in found:
        found += kind.__subclasses__()
    return found


def test_exit_codes_are_distinct():
    own = [kind for kind in kinds() if "exit_code" in vars(kind)]
    codes = [kind.exit_code for kind in own]
    assert len(set(codes)) == len(codes) and 0 not in codes


def test_every_kind_says_what_went_wrong():
    for kind in kinds():
        assert "__doc__" in vars(kind) and kind.__doc__, kind


def test_message_remedy_and_evidence_in_one_text():
    error = LabError("it broke\nin two lines", remedy="mend it", evidence="proof")
    assert str(error) == "it broke\nin two lines\nRemedy: mend it\nproof"
    assert error.one_line == "it broke - mend it"


def test_a_host_errno_has_its_name():
    assert str(errors.HostOsError("KVM_RUN", 14)) == "KVM_RUN: EFAULT (Bad address)"
