import re
from pathlib import Path

import pytest

from tests.architecture.repository import ROOT, files, texts

FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)")
HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*$", re.MULTILINE)
CODE_SPAN = re.compile(r"`([^`\n]+)`")
FILE_NAME = re.compile(r"[\w.-]+(?:/[\w.-]+)*/?")
TEST_NAME = re.compile(r"test_\w+")
TEST = re.compile(r"def (test_\w+)\(")
MAKE_TARGET = re.compile(r"\bmake (?:[A-Z]+=\S+ )*([a-z][a-z-]*)\b")
RULE = re.compile(r"^([a-z-]+):", re.MULTILINE)

REQUIRED = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "README.md",
    "docs/architecture.md",
    "docs/glossary.md",
    "docs/performance.md",
    "docs/protocol.md",
)


def anchors(markdown: str) -> set[str]:
    """Returns the fragments that a page's headings answer to, made as Git hosts make them."""
    titles = HEADING.findall(FENCED.sub("", markdown))
    plain = (re.sub(r"[^\w\s-]", "", title.lower()) for title in titles)
    return {title.replace(" ", "-") for title in plain}


def broken_links(page: Path, markdown: str) -> list[str]:
    """Returns the relative links of a page that lead nowhere."""
    known = set(files()) | {parent for path in files() for parent in path.parents}
    broken = []
    for target in LINK.findall(FENCED.sub("", markdown)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, fragment = target.partition("#")
        path = (ROOT / page.parent / name).resolve() if name else ROOT / page
        exists = path.is_relative_to(ROOT) and path.relative_to(ROOT) in known
        if not exists or (
            fragment
            and path.suffix == ".md"
            and fragment not in anchors(path.read_text(encoding="utf-8"))
        ):
            broken.append(f"{page}: {target}")
    return broken


def missing_files(page: Path, markdown: str) -> list[str]:
    """Returns the paths from the root that a page names in code spans and that do not exist."""
    top = {path.parts[0] for path in files() if len(path.parts) > 1}
    spans = CODE_SPAN.findall(FENCED.sub("", markdown))
    paths = (name for name in spans if FILE_NAME.fullmatch(name) and "/" in name)
    return [
        f"{page}: {name}"
        for name in paths
        if name.partition("/")[0] in top and not (ROOT / name).exists()
    ]


def missing_tests(page: Path, markdown: str) -> list[str]:
    """Returns the tests that a page names in code spans and that do not exist."""
    known = {path.stem for path in files()}
    for _, text in texts(".py"):
        known.update(TEST.findall(text))
    spans = CODE_SPAN.findall(FENCED.sub("", markdown))
    names = [name for name in spans if TEST_NAME.fullmatch(name)]
    return [f"{page}: {name}" for name in names if name not in known]


def test_stale_references_are_found() -> None:
    page = Path("docs/page.md")
    assert anchors("# A page: two\n\n## `code` there") == {"a-page-two", "code-there"}
    assert broken_links(page, "[a](../pyproject.toml) [b](https://example.org/x)") == []
    assert broken_links(page, "[a](../no-such.toml)") == ["docs/page.md: ../no-such.toml"]
    assert missing_files(page, "`tests/architecture/` and `tests/no_such.py`") == [
        "docs/page.md: tests/no_such.py"
    ]
    assert missing_tests(
        page, "`test_stale_references_are_found`, `test_docs`, `test_nothing`"
    ) == ["docs/page.md: test_nothing"]


@pytest.mark.parametrize("name", REQUIRED)
def test_document_exists(name: str) -> None:
    assert Path(name) in files()


def test_relative_links_lead_somewhere() -> None:
    assert [each for page, text in texts(".md") for each in broken_links(page, text)] == []


def test_files_named_in_documents_exist() -> None:
    assert [each for page, text in texts(".md") for each in missing_files(page, text)] == []


def test_tests_named_in_documents_exist() -> None:
    assert [each for page, text in texts(".md") for each in missing_tests(page, text)] == []


def test_make_targets_named_in_documents_exist() -> None:
    targets = set(RULE.findall((ROOT / "Makefile").read_text(encoding="utf-8")))
    named = {
        (page, target)
        for page, text in texts(".md")
        for span in CODE_SPAN.findall(text) + FENCED.findall(text)
        for target in MAKE_TARGET.findall(span)
    }
    assert {(page, target) for page, target in named if target not in targets} == set()


def test_architecture_names_every_top_level_folder() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    folders = {path.parts[0] for path in files() if len(path.parts) > 1}
    visible = {name for name in folders if not name.startswith(".")}
    assert {name for name in visible if f"{name}/" not in page} == set()
