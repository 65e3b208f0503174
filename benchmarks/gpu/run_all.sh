#!/usr/bin/env bash
# All that is to be seen on a GPU, in one command without a network:
#
#     benchmarks/gpu/run_all.sh [OUT]           (default: benchmarks/results/gpu)
#
# It takes at most TOTAL seconds (480). Every part has a limit of its own; one that fails or is stopped leaves what it
# has written, and the others go on. WHEELS (.whl) is the folder that prepare.sh fills; PYTHON (python3) has PyTorch.
# WORK (a temporary folder, removed in the end) takes the environment, engines and random bundles, some 10 GB.
# OUT then holds doctor.json, rtx_load.json, tests.json, steps.json, throughput.json, parts.json and log.txt.
# DEVICE=cpu MODELS=digits SIZES= runs the same without a GPU, to test it.
set -uo pipefail

cd "$(dirname "$0")/../.."
out=$(realpath -m "${1:-benchmarks/results/gpu}")
wheels=$(realpath -m "${WHEELS:-.whl}")
python=$(command -v "${PYTHON:-python3}")
total=${TOTAL:-480}
device=${DEVICE:-cuda}
models=${MODELS-digits}
sizes=${SIZES-base,large,huge}
temporary=
if [[ -z ${WORK:-} ]]; then temporary=$(mktemp -d); fi
work=${WORK:-$temporary}
exports=() # processes
finish() {
  if ((${#exports[@]})); then kill "${exports[@]}" 2>/dev/null; fi
  if [[ -n $temporary ]]; then rm -rf "$temporary"; fi
}
trap finish EXIT
mkdir -p "$out" "$work"
log=$out/log.txt
parts=$work/parts.tsv
: >"$log" >"$parts"
rm -f "$out"/{doctor,rtx_load,tests,steps,throughput,parts}.json

# part NAME SECONDS COMMAND…: at most so long, and never past the end; some seconds are left for the table.
part() {
  local name=$1 limit=$2 began=$SECONDS left=$((total - 10 - SECONDS)) status
  shift 2
  ((limit = limit < left ? limit : left))
  if ((limit < 5)); then
    printf '%s\tout of time\t0\n' "$name" >>"$parts"
    return 1
  fi
  printf '\n=== %s (from second %d, at most %d s)\n' "$name" "$began" "$limit" | tee -a "$log"
  timeout --signal=INT --kill-after=10 "$limit" "$@" >>"$log" 2>&1 # interrupted, pytest still writes its report
  status=$?
  printf '%s\t%d\t%d\n' "$name" "$status" "$((SECONDS - began))" >>"$parts"
  ((status == 0)) || printf '    ended with %d, see %s\n' "$status" "$log"
  return "$status"
}

# --- an environment over the one that has PyTorch ---------------------------------------------------------

join_wheels() {
  mkdir -p "$work/wheels"
  local file
  for file in "$wheels"/*.whl; do
    if [[ -e $file ]]; then ln -sf "$file" "$work/wheels/"; fi
  done
  for file in "$wheels"/*.whl.part00; do
    if [[ -e $file ]]; then cat "${file%00}"?? >"$work/wheels/$(basename "${file%.part00}")"; fi
  done
}

make_environment() {
  join_wheels || return
  "$python" -m venv --without-pip "$work/venv" || return
  local site files
  site=$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
  files=$(find "$work/wheels" -name '*.whl')
  if [[ -n $files ]]; then
    # Whatever version the outer environment has: these go before it.
    # shellcheck disable=SC2086  # no spaces in the names of wheels
    "$python" -m pip --python "$work/venv/bin/python" install --quiet --disable-pip-version-check \
      --no-index --no-deps --ignore-installed --no-compile $files || return
  fi
  # PYTHON may be of an environment itself, which --system-site-packages would not see. Its packages come after ours.
  "$python" -c 'import sys; print("\n".join(path for path in sys.path if path.endswith("-packages")))' >"$site/outer.pth"
  # Without a build backend the working tree itself serves, which comes before what is installed anyhow.
  "$python" -m pip --python "$work/venv/bin/python" install --quiet --disable-pip-version-check \
    --no-index --no-deps --no-build-isolation --ignore-installed . || pwd >>"$site/outer.pth"
}

part environment 120 bash -c "$(declare -f join_wheels make_environment); $(declare -p work wheels python); make_environment"
run=$work/venv/bin/python
[[ -x $run ]] || run=$python
# CUDA's libraries are those that PyTorch brings: an onnxruntime-gpu beside other packages does not look there.
nvidia=$("$run" -c '
import importlib.util, pathlib
spec = importlib.util.find_spec("nvidia")
roots = spec.submodule_search_locations if spec else []
print(":".join(str(path) for root in roots for path in sorted(pathlib.Path(root).glob("*/lib")))) ' 2>>"$log")
export LD_LIBRARY_PATH=$nvidia${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export PYTHONUNBUFFERED=1

# --- the parts --------------------------------------------------------------------------------------------

# Exporting needs no GPU: it goes on beside all that is not timed.
for size in ${sizes//,/ }; do
  OMP_NUM_THREADS=5 timeout --kill-after=5 240 \
    "$run" -m benchmarks.gpu.random_mar --work "$work" --sizes "$size" >"$work/export_$size.txt" 2>&1 &
  exports+=($!)
done

part doctor 60 bash -c '"$1" -c "from specdec_rt.cli import main; main()" doctor --json >"$2"' - "$run" "$out/doctor.json"
part rtx_load 60 "$run" -m benchmarks.gpu.rtx_load --out "$out/rtx_load.json"
# What that machine's other packages warn of is no failure.
part tests 170 "$run" -m pytest tests/gpu -n 0 -m gpu -W default -p no:cacheprovider --junit-xml="$work/tests.xml" -rs

sizes_left=${#exports[@]}
if ((sizes_left)); then
  began=$SECONDS
  for pid in "${exports[@]}"; do
    while kill -0 "$pid" 2>/dev/null && ((SECONDS < total - 120)); do sleep 1; done
  done
  kill "${exports[@]}" 2>/dev/null # one that is still at work would be heard in the figures
  wait
  exports=()
  cat "$work"/export_*.txt >>"$log"
  printf 'waiting for exports\t0\t%d\n' "$((SECONDS - began))" >>"$parts"
fi

# measure NAME SECONDS OPTION…
measure() {
  local name=$1 limit=$2
  shift 2
  # It stops by itself a little before it is stopped.
  part "$name" "$limit" "$run" -m benchmarks.gpu.measure --out "$out" --work "$work" --device "$device" \
    --limit "$((limit - 10))" ${OPTIONS:-} "$@"
}
for model in ${models//,/ }; do
  measure "steps of $model" 60 --models "$model" --what steps
done
for model in ${models//,/ }; do
  measure "images of $model" 60 --models "$model" --what throughput
done
for size in ${sizes//,/ }; do
  if [[ -e $work/mar_$size/manifest.json ]]; then
    measure "steps of mar_$size" "$(((total - 10 - SECONDS) / sizes_left))" \
      --models "mar_$size" --what steps --case-seconds 4
  else
    printf 'steps of mar_%s\tno bundle\t0\n' "$size" >>"$parts"
  fi
  ((sizes_left -= 1))
done

"$run" -m benchmarks.gpu.report "$out" --parts "$parts" --junit "$work/tests.xml" 2>>"$log" || tail -n 5 "$log"
