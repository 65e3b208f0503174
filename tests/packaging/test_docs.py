"""What the documentation points at exists: files, headings, functions, layers, and the version that is cited."""

import re
import tomllib
from pathlib import Path
from urllib.parse import unquote

import pytest

import specdec_rt

ROOT = Path(__file__).parents[2]
SKIPPED = {"node_modules", "work"}
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in ROOT.rglob("*.md")
    if not any(part.startswith(".") or part in SKIPPED for part in path.relative_to(ROOT).parts[:-1])
)
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


def prose(page):
    """A page without what stands in code blocks, where brackets are code."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^    .*$", "", text, flags=re.MULTILINE)
    return re.sub(r"`[^`]*`", lambda span: "" if "](" in span[0] else span[0], text)  # `p[j](x)` is no link


def links(page):
    """`(text, file, fragment)` of every link into the repository."""
    for text, target in LINK.findall(prose(page)):
        if not re.match(r"[a-z]+:", target):
            file, _, fragment = unquote(target).partition("#")
            yield text, (ROOT / page).parent / file if file else ROOT / page, fragment


def headings(page):
    """The fragments that GitHub makes of a page's headings."""
    found = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def named(name, source):
    """Whether a module defines a name, or `Class.name`."""
    parts = (rf"(?:class|def) {part}\b|^ *{part}(?::| =)" for part in name.split("."))
    return all(re.search(part, source, re.MULTILINE) for part in parts)


def test_pages_are_found():
    assert {"README.md", "docs/algorithm.md", "docs/architecture.md", "engines/README.md"} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    dead = []
    for text, file, fragment in links(page):
        if not file.exists():
            dead.append((text, str(file)))
        elif fragment and fragment not in headings(file.resolve().relative_to(ROOT)):
            dead.append((text, f"{file}#{fragment}"))
    assert not dead


@pytest.mark.parametrize("page", PAGES)
def test_functions_stand_in_the_modules_that_links_name(page):
    """A link such as [`block_verify`](../specdec_rt/acceptance.py) says where a function is."""
    wrong = [
        (text, file.name)
        for text, file, _ in links(page)
        if file.suffix == ".py" and file.exists() and re.fullmatch(r"`[A-Za-z_.]+`", text)
        if not named(text.strip("`"), file.read_text(encoding="utf-8"))
    ]
    assert not wrong


def test_contributing_describes_every_layer():
    configuration = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = configuration["tool"]["importlinter"]["contracts"][0]["layers"]
    modules = {module for layer in layers for module in layer.replace("(", "").replace(")", "").split(" | ")}
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    names = {module.removeprefix("specdec_rt.").strip() for module in modules}
    assert {name for name in names if f"`{name}`" not in text and f"`{name}/`" not in text} == set()


def test_the_cited_version_is_that_of_the_package():
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert cited is not None
    assert cited[1] == specdec_rt.__version__


def test_the_readme_has_the_two_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "\n    pip install . && specdec-rt generate\n" in text
    assert '\n    pip install -e ".[test]" && pytest\n' in text
