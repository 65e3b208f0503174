"""What `import specdec_rt` costs, drags in and offers."""

import json
import os
import statistics
import subprocess
import sys

import pytest

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


@pytest.mark.skipif(sys.platform == "win32", reason="Windows collects such events by itself")
def test_onnx_runtime_reports_nothing(tmp_path):
    """Left alone, it makes an identifier of the device and queues events to be sent as soon as a session starts."""
    script = "import specdec_rt; specdec_rt.load().generate([3], mode='draft')"
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    fresh_process(script, {**environment, "XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)})
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def fresh_process(script, environment=None):
    command = [sys.executable, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


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
