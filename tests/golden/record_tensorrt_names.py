"""Records in `tensorrt_names.json` which names TensorRT's published Python bindings have, on Linux.

    python tests/golden/record_tensorrt_names.py tensorrt.pyi tensorrt_bindings/

The first is from the sdist of `tensorrt-stubs` 10.13 (src/tensorrt_bindings), the second from the wheel of
`tensorrt-cu13-bindings` 11.4. The bindings are imported without TensorRT's libraries: a C compiler makes
empty ones, of which nothing is ever called.
"""

import ast
import ctypes
import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

GOLDEN = Path(__file__).with_name("tensorrt_names.json")
_CLASSES = """
Builder BuilderFlag ComputeCapability CudaGraphStrategy DataType ExecutionContextAllocationStrategy IAttention
IAttentionInputLayer IBuilderConfig ICudaEngine IExecutionContext IHostMemory ILayer ILogger ILogger.Severity
INetworkDefinition IOptimizationProfile IProgressMonitor IRuntimeCache IRuntimeConfig ITensor ITimingCache LayerType
MemoryPoolType NetworkDefinitionCreationFlag OnnxParser ParserError Runtime TensorIOMode TensorLocation
"""
CLASSES = _CLASSES.split()
_FUNCTIONS = """
createInferBuilder_INTERNAL createInferRefitter_INTERNAL createInferRuntime_INTERNAL createNvOnnxParserRefitter_INTERNAL
createNvOnnxParser_INTERNAL getBuilderPluginRegistry getNvOnnxParserVersion getPluginRegistry initLibNvInferPlugins
"""
FUNCTIONS = _FUNCTIONS.split()


def from_stubs(path):
    """Names by class ("" for the module itself), as the stub file declares them."""
    names = {}

    def read(body, owner):
        found = set()
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                found.add(node.name)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(node.target.id)
            if isinstance(node, ast.ClassDef):
                read(node.body, f"{owner}.{node.name}" if owner else node.name)
        names[owner] = found

    # Some of its signatures are no valid Python; names are all that is asked for.
    read(ast.parse(re.sub(r"(?m)^( *def \w+)\(.*:$", r"\1():", path.read_text())).body, "")
    return names


def from_bindings(folder):
    """The same of the bindings that are imported from `folder`."""
    with tempfile.TemporaryDirectory() as libraries:
        for name in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
            source, library = Path(libraries, f"{name}.c"), Path(libraries, f"lib{name}.so.11")
            functions = FUNCTIONS if name == "nvinfer" else []
            source.write_text("".join(f"long {function}(void) {{ return 0; }}\n" for function in functions))
            subprocess.run(
                ["cc", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", library, source],  # noqa: S607
                check=True,
            )
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        sys.path.insert(0, str(folder.resolve().parent))
        module = importlib.import_module(folder.name)
    names = {"": set(dir(module))}
    for dotted in CLASSES:
        found = module
        for part in dotted.split("."):
            found = getattr(found, part, None)
        if found is not None:
            names[dotted] = set(dir(found))
    return names


def main(stubs, bindings):
    """Write the file."""
    sources = {
        "10.13": ("tensorrt-stubs 10.13.0.35.1, src/tensorrt_bindings/tensorrt.pyi", from_stubs(Path(stubs))),
        "11.4": ("tensorrt-cu13-bindings 11.4.0.106, imported without its libraries", from_bindings(Path(bindings))),
    }
    record = {}
    for version, (origin, names) in sources.items():
        kept = {owner: names[owner] for owner in ["", *CLASSES] if owner in names}
        public = {owner: sorted(name for name in found if name[0] != "_") for owner, found in kept.items()}
        record[version] = {"origin": origin, "names": {owner: " ".join(found) for owner, found in public.items()}}
    GOLDEN.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
