#!/usr/bin/env bash
# The kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer (CPU paths; numpy only): csrc/sanitize.sh [pytest arguments]
# csrc/sanitize.sh --compile only compiles, with a python that has what pyproject.toml builds with.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
built=${DECODE_CORE_SANITIZE_BUILD:-build-sanitize}

command=(build --build-base "$built")
[ "${1:-}" != --compile ] || command=(build_ext)
mkdir -p "$built"
DECODE_CORE_SANITIZE=1 DECODE_CORE_CUDA=0 "$python" setup.py -q "${command[@]}" --build-lib "$built/lib" --build-temp "$built/temp" \
    >"$built/log" 2>&1 || { cat "$built/log"; exit 1; }
[ "${1:-}" != --compile ] || exit 0
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)"
# Python leaks by design; a sanitizer's abort must fail the test that ran in a child process too
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=0:exitcode=99 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export PYTHONPATH="$PWD/$built/lib:$PWD:$PWD/tests/support${PYTHONPATH:+:$PYTHONPATH}" PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
export DECODE_CORE_TEST_SHARE=${DECODE_CORE_TEST_SHARE:-0.02}
arguments=("$@")
[ $# -gt 0 ] || arguments=(tests/core/test_core_{pool,sample,attention,tiles,amx,program,ranks}.py)
# by day on the instruction sets whose sources have the checks, and without a test whose ways others go with fewer rows
[ $# -gt 0 ] || [ -z "${DECODE_CORE_SANITIZE_MARKS-not slow}" ] \
    || { export DECODE_CORE_CHECKED_ISAS=1 DECODE_CORE_ISA=avx512,avx2,portable; arguments+=(-k "not chunks_of_a_prompt"); }
exec timeout --kill-after=10 "${DECODE_CORE_SANITIZE_SECONDS:-300}" \
    "$python" -m pytest -q -c /dev/null --rootdir=. --noconftest -p no:cacheprovider -p xdist.plugin -n 2 \
    -o "markers=slow: for the night" -m "${DECODE_CORE_SANITIZE_MARKS-not slow}" "${arguments[@]}"
