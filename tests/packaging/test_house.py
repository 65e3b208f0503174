"""What the house asks of its code, as far as a program can see it."""

import ast
import statistics
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUNTIME = sorted((ROOT / "specdec_rt").rglob("*.py"))
UNCOUNTED = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def docstring_lines(tree):
    """Lines of strings that stand alone: docstrings, and those below fields and constants."""
    bodies = [node.body for node in ast.walk(tree) if isinstance(getattr(node, "body", None), list)]
    alone = [each for body in bodies for each in body if isinstance(each, ast.Expr)]
    strings = [each for each in alone if isinstance(each.value, ast.Constant) and isinstance(each.value.value, str)]
    return {line for each in strings for line in range(each.lineno, each.end_lineno + 1)}


def code_lines(path):
    with path.open("rb") as file:
        tokens = [token for token in tokenize.tokenize(file.readline) if token.type not in UNCOUNTED]
    lines = {line for token in tokens[1:] for line in range(token.start[0], token.end[0] + 1)}
    return len(lines - docstring_lines(ast.parse(path.read_text(encoding="utf-8"))))


@pytest.mark.parametrize("path", RUNTIME, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_of_the_runtime_has_more_than_300_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300


def test_the_reference_has_fewer_than_80_lines_of_code():
    assert 40 < code_lines(ROOT / "specdec_rt" / "decode" / "reference.py") < 80


def test_half_of_all_functions_have_fewer_than_15_lines():
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in RUNTIME]
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert statistics.median(node.end_lineno - node.lineno + 1 for node in functions) < 15


def test_benchmarks_patch_nothing():
    for path in sorted((ROOT / "benchmarks").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert "mock" not in text, path
        assert "setattr(" not in text, path
