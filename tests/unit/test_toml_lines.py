"""The line of every key, however the file is written."""

import json
import tomllib

from hypothesis import given
from hypothesis import strategies as st

from specdec_rt.build.toml_lines import key_lines

TRICKY = '''\
plain = "# no comment" # one
"quoted key" = \'\'\'
[not.a.table]
x = 1\'\'\'
dotted . "a.b" = [ 1, # one
  { inner = "]" },
  """
two""""", 3 ]
date = 2024-01-01 10:00:00
[table.'sub']   # a table
key = { a = { b = [] }, "c\\u0041" = -1e3 }

[[many]]
last = true'''


def test_lines_of_keys():
    tomllib.loads(TRICKY)
    assert key_lines(TRICKY) == {
        ("plain",): 1,
        ("quoted key",): 2,
        ("dotted",): 5,
        ("dotted", "a.b"): 5,
        ("dotted", "a.b", 0): 5,
        ("dotted", "a.b", 1): 6,
        ("dotted", "a.b", 1, "inner"): 6,
        ("dotted", "a.b", 2): 7,
        ("dotted", "a.b", 3): 8,
        ("date",): 9,
        ("table",): 10,
        ("table", "sub"): 10,
        ("table", "sub", "key"): 11,
        ("table", "sub", "key", "a"): 11,
        ("table", "sub", "key", "a", "b"): 11,
        ("table", "sub", "key", "cA"): 11,
        ("many",): 13,
        ("many", "last"): 14,
    }


KEYS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=6)
SCALARS = st.integers() | st.booleans() | st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12)
VALUES = st.recursive(SCALARS, lambda values: st.lists(values, max_size=3), max_leaves=6)


@given(st.dictionaries(KEYS, st.dictionaries(KEYS, VALUES, max_size=3), max_size=4), st.integers(0, 2))
def test_lines_of_any_document(document, gap):
    lines, expected = [], {}
    for table, pairs in document.items():
        lines += [""] * gap + [f"[{json.dumps(table, ensure_ascii=False)}] # ]"]
        expected[(table,)] = len(lines)
        for key, value in pairs.items():
            lines.append(f"{json.dumps(key, ensure_ascii=False)} = {json.dumps(value, ensure_ascii=False)}")
            expected[(table, key)] = len(lines)
    text = "\n".join(lines)
    assert tomllib.loads(text) == document
    assert {path: line for path, line in key_lines(text).items() if not isinstance(path[-1], int)} == expected
