#!/usr/bin/env bash
# Fills a folder with the wheels that a GPU machine without a network needs beside PyTorch:
#
#     benchmarks/gpu/prepare.sh [FOLDER]        (default: .whl, which git ignores)
#
# run_all.sh installs from there. Files above PART_MB megabytes (60) are split into NAME.part00, NAME.part01, …
# for machines that take no larger ones. PYTHON_VERSION (3.12) is that machine's; PYTHON runs pip here.
set -euo pipefail

cd "$(dirname "$0")/../.."
folder=${1:-.whl}
python=${PYTHON:-python3}
version=${PYTHON_VERSION:-3.12}
part_mb=${PART_MB:-60}

packages=(
  # backends
  onnxruntime-gpu tensorrt-rtx-cu13-bindings tensorrt-rtx-cu13-libs
  cuda-core cuda-bindings cuda-pathfinder
  # what specdec_rt imports
  filelock platformdirs pillow pydantic pydantic-core annotated-types typing-inspection typing-extensions
  rich markdown-it-py mdurl pygments typer click shellingham
  # exporting, comparing, and building this package's own wheel
  safetensors onnxscript onnx-ir ml-dtypes polygraphy
  hatchling trove-classifiers pathspec pluggy packaging
)
platforms=()
for platform in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux2010 manylinux1; do
  platforms+=(--platform "${platform}_x86_64")
done

mkdir -p "$folder"
find "$folder" -maxdepth 1 -type f \( -name '*.whl' -o -name '*.whl.part*' \) -delete # two versions of one package stop pip
pip() { "$python" -m pip --quiet --disable-pip-version-check "$@"; }
pip download --no-deps --only-binary=:all: --implementation cp --python-version "$version" "${platforms[@]}" \
  --dest "$folder" "${packages[@]}"
pip wheel --no-deps --wheel-dir "$folder" tensorrt-rtx-cu13 # published as source, of a few lines of Python

for file in "$folder"/*.whl; do
  if (($(stat -c %s "$file") > part_mb * 1000000)); then
    split --bytes="${part_mb}MB" --numeric-suffixes --suffix-length=2 "$file" "$file.part"
    rm "$file"
  fi
done
for file in "$folder"/*.whl*; do
  printf '%8.1f MB  %s\n' "$(($(stat -c %s "$file") / 100000))e-1" "${file##*/}"
done
printf '%8.1f MB  in all, for Python %s on linux x86_64\n' "$(($(du -cb "$folder"/*.whl* | tail -n 1 | cut -f 1) / 100000))e-1" "$version"
