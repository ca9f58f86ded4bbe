"""What documents and comments name exists: files, folders, pages of experiments."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("csrc", "flash_attn", "tests", "benchmarks", "docs", "examples", ".ci")
CODE = {".h", ".cu", ".cpp", ".py"}
pytestmark = pytest.mark.skipif(
    not all((ROOT / folder).exists() for folder in FOLDERS), reason="a part of the source tree is not here"
)
_PATH_END = re.compile(r"(\.(h|cpp|cu|py|md|txt|toml)|/)$")


def _tree() -> list[str]:
    """Files of the tree and their folders, from its root on."""
    found = [path.name for path in ROOT.iterdir() if path.is_file()]
    for folder in FOLDERS:
        for place, folders, files in os.walk(ROOT / folder):
            folders[:] = [name for name in folders if name not in ("__pycache__", "lib")]
            here = os.path.relpath(place, ROOT)
            found += [here, *(os.path.join(here, name) for name in files)]
    return found


TREE = _tree()
DOCUMENTS = sorted(path for path in TREE if path.endswith(".md") and "experiments/" not in path)
SOURCES = sorted(path for path in TREE if Path(path).suffix in CODE)


def _exists(named: str, document: str) -> bool:
    """From the document's folder or the root on, or as the end of a path that exists."""
    name = named.rstrip("/")
    if os.path.normpath(os.path.join(os.path.dirname(document), name)) in TREE:
        return True
    return not name.startswith("..") and any(f"/{path}".endswith(f"/{name}") for path in TREE)


def test_documents_name_files_that_exist() -> None:
    of_a_build = {"build/", ".cu"}
    missing = []
    for document in DOCUMENTS:
        for named in re.findall(r"`([^`\s*<>$]+)`", (ROOT / document).read_text()):
            if _PATH_END.search(named) and named not in of_a_build and not _exists(named, document):
                missing.append(f"{document}: {named}")
    assert missing == []


def test_comments_name_files_that_exist() -> None:
    missing = []
    for source in SOURCES:
        for comment in re.findall(r"(?://|# )(?!include)(.*)", (ROOT / source).read_text()):
            for named in re.findall(r"(?<![\w/*])[\w./]+\.(?:h|cu|cpp|md)\b(?!\w)", comment):
                if not _exists(named, source):
                    missing.append(f"{source}: {named}")
    assert [text for text in missing if "DEVICE" not in text] == []


def test_pages_of_experiments_that_are_named_exist() -> None:
    pages = {path.name[:3] for path in (ROOT / "benchmarks" / "experiments").glob("[0-9]*.md")}
    assert len(pages) > 100
    missing = [
        f"{path}: {number}"
        for path in [*DOCUMENTS, *SOURCES]
        for number in re.findall(r"experiments[/ ](\d{3})\b", (ROOT / path).read_text())
        if number not in pages
    ]
    assert missing == []
