"""The benchmarks' own rules: generated pages are current, links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tables

    return tables


def test_generated_pages_are_current(tables: ModuleType) -> None:
    assert tables.outdated() == [], "run python benchmarks/tables.py"


def test_a_changed_result_is_noticed(tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "results/h200"
    folder.mkdir(parents=True)
    text = (ROOT / "benchmarks/results/h200/forward.json").read_text()
    (folder / "forward.json").write_text(text)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments/README.md").write_text("# Experiments\n\n" + tables.INDEX + "\n")
    monkeypatch.setattr(tables, "BENCHMARKS", tmp_path)
    for path, page in tables.pages():
        path.write_text(page)
    assert tables.outdated() == []
    (folder / "forward.json").write_text(text.replace('"ratio_cudnn": 1.', '"ratio_cudnn": 2.', 1))
    assert tables.outdated() == [folder / "tables.md"]


def test_a_page_without_its_two_first_lines_is_refused(tables: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Experiments\n")
    (tmp_path / "001-idea.md").write_text("# 001 An idea\n\nTopic: none of these. Verdict: kept.\n")
    with pytest.raises(SystemExit, match=r"001-idea\.md: a page begins"):
        tables.experiments_page(tmp_path)


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")) + sorted((ROOT / "benchmarks").rglob("*.md")), ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    """To files, and to headings within them."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}
            assert heading in slugs, target
