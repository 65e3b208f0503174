"""What `import specdec_rt` costs, drags in and offers."""

import json
import statistics
import subprocess
import sys

import specdec_rt

LIMIT_SECONDS = 0.5
HEAVY = ("cuda", "onnx", "onnxruntime", "polygraphy", "scipy", "tensorrt", "tensorrt_rtx", "torch")

# Processor time, not the clock: what the import costs, whatever else the machine is busy with.
SCRIPT = f"""
import json, sys, time
started = time.process_time()
import specdec_rt
seconds = time.process_time() - started
print(json.dumps([seconds, [name for name in {HEAVY!r} if name in sys.modules]]))
"""


def test_the_import_is_light():
    seconds, heavy = zip(*(json.loads(fresh_process(SCRIPT)) for _ in range(3)), strict=True)
    assert heavy == ([], [], [])
    assert statistics.median(seconds) < LIMIT_SECONDS


def test_the_command_line_imports_no_execution_library():
    script = f"import json, sys, specdec_rt.cli; print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    assert json.loads(fresh_process(script)) == []


def fresh_process(script):
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout


def test_exported_names():
    """Frozen: a name that goes or comes is a change of the API, and belongs into the CHANGELOG."""
    assert specdec_rt.__all__ == [
        "BackendError",
        "BundleError",
        "ChainError",
        "DecodeOptions",
        "OutputError",
        "Pipeline",
        "Result",
        "SpecDecError",
        "UsageError",
        "__version__",
        "load",
    ]
    assert all(hasattr(specdec_rt, name) for name in specdec_rt.__all__)
