"""Mutants in a kernel's source: edits become a patch of one function."""

import subprocess

import pytest
from arm_kvm.mutants import source
from arm_kvm.mutants.catalogue import Edit, NotApplicable
from arm_kvm.support.errors import KernelError

from .examples import ARM64, mutant

C = """\
static void fault(struct kvm *kvm);

/* fault() takes the lock; */
static int
fault_on(struct kvm *kvm,
         unsigned long ipa)
{
        if (!ipa)
                return fault(kvm);
        lock(kvm);
        return 0;
}

static void fault(struct kvm *kvm)
{
        lock(kvm);
        map(kvm);
}

void unlock_all(void)
{
        lock(kvm);
}
"""


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "mmu.c").write_text(C)
    return tmp_path


def edit(function, find="lock(kvm)", new="nolock(kvm)", file="mmu.c"):
    return mutant(edits=(Edit(file, function, find, new),))


def patched(tree, what):
    """Apply the mutant's patch, and return the lines that it changes by their numbers."""
    subprocess.run(["patch", "-p1", "-d", tree], input=source.as_patch(what, tree), text=True, check=True)
    after = (tree / "mmu.c").read_text().splitlines()
    pairs = zip(C.splitlines(), after, strict=True)
    return {number: new.strip() for number, (old, new) in enumerate(pairs, 1) if new != old}


def test_edits_become_a_patch(tree):
    """Only in the function's body: not in declarations, calls or comments, nor in a function with a longer name."""
    assert patched(tree, edit("fault")) == {16: "nolock(kvm);"}


def test_a_definition_of_several_lines(tree):
    assert patched(tree, edit("fault_on")) == {10: "nolock(kvm);"}


def test_edits_add_up(tree):
    edits = (*edit("fault").edits, *edit("fault", "map", "unmap").edits, *edit("fault", "gone").edits)
    assert patched(tree, mutant(edits=edits)) == {16: "nolock(kvm);", 17: "unmap(kvm);"}


@pytest.mark.parametrize("what", [edit("no_such"), edit("fault", find="gone"), edit("fault", file="arm.c")])
def test_edits_that_match_nothing(tree, what):
    with pytest.raises(NotApplicable, match="nothing to edit in"):
        source.as_patch(what, tree)


def test_a_folder_that_is_no_tree(tree):
    with pytest.raises(KernelError, match="is not a kernel source tree"):
        source.broken_kernel(edit("fault"), ARM64, str(tree), tree)


def test_bytes_that_are_not_utf8_are_kept(tree):
    (tree / "mmu.c").write_bytes(C.replace("map(kvm)", "map(kvm) /* \udcfc\f */").encode(errors="surrogateescape"))
    patch = source.as_patch(edit("fault"), tree).encode(errors="surrogateescape")
    subprocess.run(["patch", "-p1", "-d", tree], input=patch, check=True)
    assert b"nolock(kvm);\n        map(kvm) /* \xfc\f */;" in (tree / "mmu.c").read_bytes()


def test_a_kernel_that_is_not_built_from_a_tree(tmp_path):
    with pytest.raises(NotApplicable, match="not built from a tree: --kernel arm64=PATH gives one"):
        source.broken_kernel(edit("fault"), ARM64, None, tmp_path)
