"""A small scenario that tests of benchmarks share, and a machine that it was measured on."""

from benchmarks.scenario import read_scenario

SCENARIO = """
title = "a test"
bundle = "digits-mar"
ar_steps = 3
batches = [1]
warmup = 1
samples = 2
repeats = 1

[[variants]]
name = "target"
engine = "runtime"
options = { mode = "target" }

[[variants]]
name = "fewer"
engine = "runtime"
options = { mode = "target", ar_steps = 2 }

[[variants]]
name = "exact, self"
engine = "runtime"
options = { mode = "exact", draft = "self" }
observe = true

[[variants]]
name = "eager"
engine = "torch"
style = "eager"
"""

MACHINE = {
    "cpu": "a processor",
    "cores": 2,
    "memory_bytes": 2**30,
    "versions": {"numpy": "2"},
    "commit": None,
    "dirty": None,
    "command": "python -m benchmarks run test",
    "load_average": 0.0,
}


def small_scenario(folder, *replaced):
    """The scenario, read from a file in this folder; each of `replaced` is a piece of its text and what replaces it."""
    text = SCENARIO
    for old, new in replaced:
        text = text.replace(old, new, 1)
    path = folder / "test.toml"
    path.write_text(text)
    return read_scenario(str(path))[1]
