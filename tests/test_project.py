"""The files around the code: citation, issue form, changelog, design."""

import re
from pathlib import Path

import pytest

import kdops

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "CITATION.cff").exists(), reason="needs a source checkout")
LINK = re.compile(r"\]\(([^)#]+)[^)]*\)")


def top_level(text):
    """The keys of a YAML mapping and the text of their scalar values, one line each."""
    return dict(re.findall(r"^([a-z-]+):[ ]?(.*)$", text, flags=re.MULTILINE))


def test_citation_is_cff_1_2_0():
    text = (ROOT / "CITATION.cff").read_text()
    fields = top_level(text)
    assert fields["cff-version"] == "1.2.0" and fields["type"] == "software"
    assert fields["message"] and fields["title"]
    assert fields["version"] == kdops.__version__
    license_ = re.search(r'^license = "(.*)"', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)[1]
    assert fields["license"] == license_
    assert re.search(r"^authors:\n  - name: \S", text, flags=re.MULTILINE)
    allowed = {"cff-version", "message", "title", "type", "version", "license", "authors", "keywords", "references"}
    assert set(fields) <= allowed and "\t" not in text


def test_issue_form_asks_for_kdops_info():
    text = (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text()
    assert {"name", "description", "body"} <= set(top_level(text))
    questions = text.split("  - type: ")[1:]
    (info,) = [question for question in questions if "kdops info" in question]
    assert "required: true" in info


def test_changelog_has_the_sections_of_keep_a_changelog():
    releases = re.split(r"^## ", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1:]
    assert re.match(rf"\[{re.escape(kdops.__version__)}\] - ", releases[0])
    for release in releases:
        sections = re.findall(r"^### (.*)$", release, flags=re.MULTILINE)
        allowed = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
        assert sections and sections == [name for name in allowed if name in sections]


@pytest.mark.parametrize("document", ["README.md", "DESIGN.md", "CONTRIBUTING.md"])
def test_links_of_documents(document):
    path = ROOT / document
    links = [link for link in LINK.findall(path.read_text()) if not link.startswith("http")]
    assert links
    assert not [link for link in links if not (path.parent / link).exists()]


@pytest.mark.parametrize("document", ["README.md", "DESIGN.md", "CONTRIBUTING.md", "docs/design/notation.md"])
def test_files_that_documents_name_exist(document):
    """Every path in backticks that starts with a folder of the repository; a pattern matches something."""
    text = (ROOT / document).read_text()
    folders = r"(?:kdops|csrc|tests|benchmarks|integrations|examples|docs)"
    paths = re.findall(rf"`({folders}/[\w./*-]*)`", text)
    assert not [path for path in paths if not list(ROOT.glob(path.rstrip("/")))]


def test_make_targets_that_contributing_names_exist():
    named = set(re.findall(r"`make ([a-z-]+)", (ROOT / "CONTRIBUTING.md").read_text()))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert len(named) >= 7 and named <= targets
