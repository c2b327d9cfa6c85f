"""README and docs/: the files that they name exist, the README is short, and no generated part is empty."""

import re
import sys
from enum import Enum

import pytest
from arm_kvm.support.paths import ROOT

sys.path.append(str(ROOT / "docs/_ext"))
from arm_kvm_reference import pages, source

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = "framework|testcases|tests|configs|images|benchmarks|docs"
#: A path in code; a word in capitals stands for something.
PATH = re.compile(rf"`((?:{FOLDERS})/[\w./*-]*)`")
LINK = re.compile(r"\]\((?!https?://)([^)#]+\.md)\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_exist(page):
    named = [path for path in PATH.findall(page.read_text()) if not re.search(r"[A-Z]{4}", path)]
    assert [path for path in named if not list(ROOT.glob(path.rstrip("/")))] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_pages(page):
    assert [link for link in LINK.findall(page.read_text()) if not (page.parent / link).is_file()] == []


def test_named_files_are_found_in_the_text():
    """The two patterns do match."""
    text = "".join(page.read_text() for page in PAGES)
    assert len(PATH.findall(text)) > 20 and len(LINK.findall(text)) > 40


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


class Commented(Enum):
    #: what stands above,
    #: on two lines
    ABOVE = 1
    BEHIND = 2  #: what stands behind


class Uncommented(Enum):
    ONE = 1  #: said
    TWO = 2  # not said


def test_comments_of_members():
    assert source.members(Commented) == {"ABOVE": "what stands above, on two lines", "BEHIND": "what stands behind"}


def test_a_member_without_a_comment_is_an_error():
    with pytest.raises(source.NothingFound, match="TWO"):
        source.members(Uncommented)


def test_a_page_without_content_is_an_error(tmp_path):
    (tmp_path / "empty.py").write_text('"""No fixture."""\n')
    with pytest.raises(source.NothingFound):
        pages.fixtures(str(tmp_path / "empty.py"))


PARTS = [name for name, part in vars(pages).items() if callable(part) and part.__module__ == pages.__name__]


@pytest.mark.parametrize("name", [name for name in PARTS if not name.startswith("_")])
def test_every_generated_part_has_content(name):
    assert getattr(pages, name)().strip()
