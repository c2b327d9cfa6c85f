"""Tables as KVM builds them: the algebra of map and unmap, counts of table pages, break before make."""

from contextlib import suppress

import pytest
from arm_kvm.model.arch import descriptors as d
from arm_kvm.model.arch import regime, walk
from arm_kvm.model.arch.faults import Access, Direction, Fault, FaultType
from arm_kvm.model.arch.granule import KIB4
from arm_kvm.model.kvm.tables import Freed, Invalidated, Stage2Tables, Written
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

PAGE, BLOCK, GIB = 1 << 12, 1 << 21, 1 << 30
ROOT = 0x4000_0000
IPA, PA = 0x8000_0000, 0x6000_0000
KVM = 0x80023558


def make(vtcr=KVM):
    pages = iter(range(ROOT + 0x10_0000, ROOT + 0x1000_0000, PAGE))
    return Stage2Tables(regime.stage2_armv8(ROOT, vtcr), lambda: next(pages))


@pytest.fixture
def tables():
    return make()


READ = Access(Direction.READ)


def pa_of(tables, ipa, access=READ):
    found = walk.stage2(tables.regime, tables, ipa, access)
    return None if isinstance(found, Fault) else found.oa


def test_mapping_a_page_makes_the_tables_above_it(tables):
    events = tables.map(IPA, 3, d.LeafFields(PA))
    assert [e.level for e in events] == [1, 2, 3] and pa_of(tables, IPA + 5) == PA + 5
    assert sorted(tables.pages.values()) == [1, 2, 2, 2]  # the second page of the root is empty


def test_mapping_the_same_again_changes_nothing(tables):
    tables.map(IPA, 3, d.LeafFields(PA))
    assert tables.map(IPA, 3, d.LeafFields(PA)) == []


def test_a_changed_page_is_broken_before_it_is_made(tables):
    tables.map(IPA, 3, d.LeafFields(PA))
    broken, invalidated, made = tables.map(IPA, 3, d.LeafFields(PA + PAGE))
    assert (broken.new, made.old, invalidated) == (0, 0, Invalidated(IPA, PAGE))
    assert pa_of(tables, IPA) == PA + PAGE


def test_the_last_page_takes_its_tables_along(tables):
    tables.map(IPA, 3, d.LeafFields(PA))
    tables.map(IPA + PAGE, 3, d.LeafFields(PA))
    assert not any(isinstance(e, Freed) for e in tables.unmap(IPA, PAGE))
    events = tables.unmap(IPA + PAGE, PAGE)
    assert [type(e) for e in events] == [Written, Invalidated] + [Written, Invalidated, Freed] * 2
    assert tables.pages == {ROOT: 1, ROOT + PAGE: 1} and tables.leaves() == {}


def test_a_block_replaces_its_pages(tables):
    tables.map(IPA + PAGE, 3, d.LeafFields(PA))
    tables.map(IPA, 2, d.LeafFields(PA))
    assert tables.leaves() == {IPA: (2, d.encode(d.LeafFields(PA), 2))} and len(tables.pages) == 3


def test_a_page_breaks_the_block_over_it(tables):
    """The rest of the block is unmapped, and faults back (stage2_map_walk_leaf)."""
    tables.map(IPA, 2, d.LeafFields(PA))
    tables.map(IPA + PAGE, 3, d.LeafFields(PA + PAGE))
    assert list(tables.leaves()) == [IPA + PAGE] and pa_of(tables, IPA) is None


def test_unmapping_a_page_of_a_block_takes_all_of_it(tables):
    tables.map(IPA, 2, d.LeafFields(PA))
    tables.unmap(IPA + 5 * PAGE, PAGE)
    assert tables.leaves() == {}


def test_splitting_keeps_every_translation(tables):
    tables.map(IPA, 2, d.LeafFields(PA, s2ap=d.Grant.READ))
    before = [pa_of(tables, IPA + offset) for offset in range(0, BLOCK, PAGE)]
    tables.split(IPA + 7 * PAGE)
    assert [pa_of(tables, IPA + offset) for offset in range(0, BLOCK, PAGE)] == before
    assert len(tables.leaves()) == 512 and max(tables.pages.values()) == 513
    tables.coalesce(IPA)
    assert tables.leaves() == {IPA: (2, d.encode(d.LeafFields(PA, s2ap=d.Grant.READ), 2))}


def test_what_cannot_be_split_or_coalesced(tables):
    tables.map(IPA, 3, d.LeafFields(PA))
    with pytest.raises(ValueError, match="no block maps IPA"):
        tables.split(IPA)
    with pytest.raises(ValueError, match=r"IPA 0x80001000 does not continue"):
        tables.coalesce(IPA)
    with pytest.raises(ValueError, match="begins a table"):
        tables.coalesce(IPA + PAGE)


@pytest.mark.parametrize(
    ("ipa", "level", "why"), [(IPA + PAGE, 2, "not aligned"), (1 << 40, 3, "beyond the 40-bit"), (IPA, 0, "level 0")]
)
def test_impossible_mappings_are_refused(tables, ipa, level, why):
    with pytest.raises(ValueError, match=why):
        tables.map(ipa, level, d.LeafFields(0))
    assert tables.leaves() == {}


def test_write_protection_takes_one_permission_and_one_invalidation(tables):
    for i in range(3):
        tables.map(IPA + i * PAGE, 3, d.LeafFields(PA + i * PAGE))
    *written, invalidated = tables.write_protect(IPA, 2 * PAGE)
    assert [type(e) for e in written] == [Written, Written] and invalidated == Invalidated(0, 1 << 40)
    assert tables.write_protect(IPA, 2 * PAGE) == []
    write = Access(Direction.WRITE)
    assert [pa_of(tables, IPA + i * PAGE, write) is not None for i in range(3)] == [False, False, True]


def test_write_protecting_a_page_of_a_block_protects_and_invalidates_all_of_it(tables):
    tables.map(IPA, 2, d.LeafFields(PA))
    tables.write_protect(IPA + 5 * PAGE, PAGE)
    assert pa_of(tables, IPA, Access(Direction.WRITE)) is None and pa_of(tables, IPA) == PA


def test_permissions_are_relaxed_in_place(tables):
    tables.map(IPA, 3, d.LeafFields(PA, s2ap=d.Grant.READ, xn=d.Never.EL0_EL1))
    assert [type(e) for e in tables.relax(IPA + 5, d.Grant.WRITE)] == [Written, Invalidated]
    assert pa_of(tables, IPA, Access(Direction.WRITE)) and not pa_of(tables, IPA, Access(Direction.FETCH))
    tables.relax(IPA, d.Grant.READ, execute=True)
    assert pa_of(tables, IPA, Access(Direction.FETCH)) == PA
    with pytest.raises(ValueError, match="nothing maps"):
        tables.relax(0, d.Grant.READ)


def test_old_kernels_age_one_leaf_of_a_range(tables):
    for i in range(3):
        tables.map(IPA + i * PAGE, 3, d.LeafFields(PA))
    assert len(tables.make_old(IPA, 3 * PAGE, first_only=True)) == 1
    assert len(tables.make_old(IPA, 3 * PAGE)) == 2


def test_tables_go_as_soon_as_they_are_empty(tables):
    """unmap_stage2_ptes() frees the first table before the second leaf is touched."""
    for ipa in (IPA, IPA + BLOCK):
        tables.map(ipa, 3, d.LeafFields(PA))
    events = [e for e in tables.unmap(IPA, 2 * BLOCK) if not isinstance(e, Invalidated)]
    assert [getattr(e, "level", "freed") for e in events] == [3, 2, "freed", 3, 2, "freed", 1, "freed"]


def test_ageing_is_seen_by_the_next_access(tables):
    tables.map(IPA, 3, d.LeafFields(PA))
    assert len(tables.make_old(IPA, PAGE)) == 1
    assert walk.stage2(tables.regime, tables, IPA, Access(Direction.READ)).type is FaultType.ACCESS_FLAG
    tables.make_young(IPA)
    assert pa_of(tables, IPA) == PA


def test_destruction_gives_every_page_back(tables):
    tables.map(IPA, 3, d.LeafFields(PA))
    tables.map(0, 1, d.LeafFields(0))
    pages = set(tables.pages)
    assert {e.page for e in tables.destroy() if isinstance(e, Freed)} == pages
    assert tables.pages == {} and tables.load(ROOT) is None


@pytest.mark.parametrize("stock", [0, 1, 2])
def test_failed_allocation_changes_nothing(stock):
    """Also where a block would have been broken first; what was got is used the next time."""
    pages = iter([ROOT + 0x10_0000, ROOT + 0x10_1000][:stock])

    def allocate():
        if (page := next(pages, None)) is None:
            raise MemoryError
        return page

    tables = Stage2Tables(regime.stage2_armv8(ROOT, KVM), allocate)
    tables.map(0, 1, d.LeafFields(0))
    if stock < 2:
        with pytest.raises(MemoryError):
            tables.map(PAGE, 3, d.LeafFields(PA))
        assert tables.leaves() == {0: (1, d.encode(d.LeafFields(0), 1))} and set(tables.pages) == {ROOT, ROOT + PAGE}
    else:
        tables.map(PAGE, 3, d.LeafFields(PA))
        assert list(tables.leaves()) == [PAGE]


def test_one_level_is_enough_for_a_small_space():
    tables = make(5 << 16 | 3 << 6 | 64 - 24)  # level 3, eight concatenated tables
    tables.map(0xFF_F000, 3, d.LeafFields(PA))
    assert pa_of(tables, 0xFF_F000) == PA
    tables.unmap(0, 1 << 24)
    assert tables.leaves() == {} and len(tables.pages) == 8


class Algebra(RuleBasedStateMachine):
    """Random histories against the plainest model there is: a dictionary from page to page."""

    spots = st.integers(0, 2 * 512 - 1)

    @initialize()
    def start(self):
        self.free = list(range(ROOT + 0x10_0000, ROOT + 0x14_0000, PAGE))
        self.tables = Stage2Tables(regime.stage2_armv8(ROOT, KVM), self.free.pop)
        self.pages = {}
        self.seen = {}  # every entry, as the events have it

    def apply(self, events):
        """What the hardware sees: no valid entry becomes another, what goes is invalidated, what is freed is empty."""
        for i, event in enumerate(events):
            if isinstance(event, Written):
                assert self.seen.pop(event.at, 0) == event.old
                if event.new:
                    self.seen[event.at] = event.new
                same_address = (event.old ^ event.new) & d.Format().address_field() == 0
                assert not (event.old & 1 and event.new & 1) or same_address
                if event.old & 1 and not event.new & 1:
                    size = 1 << KIB4.level_shift(event.level)
                    assert events[i + 1] == Invalidated(event.ipa, size)
            elif isinstance(event, Freed):
                assert not any(event.page <= at < event.page + PAGE for at in self.seen)
                assert not any(
                    word & 3 == 3 and word & -PAGE & (1 << 48) - 1 == event.page for word in self.seen.values()
                )
                self.free.append(event.page)

    @rule(spot=spots, frame=st.integers(0, 7))
    def map_page(self, spot, frame):
        covered = self.tables.leaves().get(IPA + spot // 512 * BLOCK, (3, 0))[0] == 2
        self.apply(self.tables.map(IPA + spot * PAGE, 3, d.LeafFields(PA + frame * PAGE)))
        if covered:
            for page in range(spot // 512 * 512, spot // 512 * 512 + 512):
                self.pages.pop(page, None)
        self.pages[spot] = frame

    @rule(half=st.integers(0, 1))
    def map_block(self, half):
        self.apply(self.tables.map(IPA + half * BLOCK, 2, d.LeafFields(PA)))
        self.pages |= {half * 512 + i: i for i in range(512)}

    @rule(spot=spots, count=st.integers(1, 40))
    def unmap(self, spot, count):
        count = min(count, 1024 - spot)
        levels = self.tables.leaves()
        gone = set(range(spot, spot + count))
        for half in range(2):
            block = set(range(half * 512, half * 512 + 512))
            if gone & block and levels.get(IPA + half * BLOCK, (3, 0))[0] == 2:
                gone |= block
        self.apply(self.tables.unmap(IPA + spot * PAGE, count * PAGE))
        for page in gone:
            self.pages.pop(page, None)

    @rule(half=st.integers(0, 1))
    def split(self, half):
        if self.tables.leaves().get(IPA + half * BLOCK, (3, 0))[0] == 2:
            events = self.tables.split(IPA + half * BLOCK)
            table = d.decode(events[-1].new, 2).address
            self.seen |= {table + 8 * i: self.tables.load(table + 8 * i) for i in range(512)}  # before it is linked
            self.apply(events)

    @rule(half=st.integers(0, 1))
    def coalesce(self, half):
        whole = [self.pages.get(half * 512 + i) for i in range(512)] == list(range(512))
        if whole and self.tables.leaves()[IPA + half * BLOCK][0] == 3:
            with suppress(ValueError):  # not alike any more
                self.apply(self.tables.coalesce(IPA + half * BLOCK))

    @rule(spot=spots, what=st.sampled_from(["write_protect", "make_old"]))
    def weaken(self, spot, what):
        self.apply(getattr(self.tables, what)(IPA + spot * PAGE, 8 * PAGE))

    @invariant()
    def the_events_are_the_whole_story(self):
        assert all(self.tables.load(at) == word for at, word in self.seen.items())

    @invariant()
    def translations_are_the_dictionarys(self):
        mapped = {}
        for ipa, (level, desc) in self.tables.leaves().items():
            for i in range(1 << 9 * (3 - level)):
                frame = ((desc & d.Format().address_field(level)) - PA) // PAGE + i
                mapped[(ipa - IPA) // PAGE + i] = frame
        assert mapped == self.pages

    @invariant()
    def every_table_page_counts_its_entries(self):
        for page, count in self.tables.pages.items():
            valid = sum(self.tables.load(page + 8 * i) & 1 for i in range(512))
            assert count == 1 + valid and (valid or page in (ROOT, ROOT + PAGE))


TestAlgebra = Algebra.TestCase
TestAlgebra.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
