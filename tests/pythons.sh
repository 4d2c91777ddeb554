#!/bin/sh
# Installs, checks the wheel and runs a quick part of the tests on each Python from 3.11 to 3.14 that is found.
# Each Python gets an environment under .venvs/, made as `make install` makes .venv.
set -u
cd "$(dirname "$0")/.."
quick="tests/test_import.py
tests/test_step.py::test_every_form_of_launch_trains_as_a_plain_torch_loop[single-plain]
tests/test_step.py::test_every_form_of_launch_trains_as_a_plain_torch_loop[ddp2-plain]
tests/test_resume.py::test_a_killed_run_ends_as_one_that_was_not[map-ddp2]"

find_python() {  # of minor version $1: the one on PATH, else one of pyenv's
    for python in "python3.$1" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3."$1".*/bin/python; do
        # It has to run: pyenv's shim on PATH fails while its version is not selected.
        if "$python" -c 'import sys; sys.exit(sys.version_info.minor != int(sys.argv[1]))' "$1" 2>/dev/null; then
            echo "$python"
            return
        fi
    done
    return 1
}

check() {  # the Python of the environment $1
    if ! [ "$1/.installed" -nt pyproject.toml ] || ! [ "$1/.installed" -nt constraints.txt ]; then
        "$1/bin/pip" install --quiet --disable-pip-version-check -c constraints.txt \
            -e '.[data,dev,examples,trackers,transformers,wandb]' || return
        touch "$1/.installed"
    fi
    PYTHON="$1/bin/python" sh tests/check_wheel.sh || return
    # shellcheck disable=SC2086  # one argument for each test
    "$1/bin/pytest" -q $quick
}

results=
failed=0
found=0
for minor in 11 12 13 14; do
    result="not found"
    if python=$(find_python "$minor"); then
        found=1
        folder=.venvs/3.$minor
        echo "--- Python 3.$minor: $python"
        if { [ -x "$folder/bin/python" ] || "$python" -m venv "$folder"; } && check "$folder"; then
            result=passed
        else
            result=FAILED
            failed=1
        fi
    fi
    results="$results
Python 3.$minor: $result"
done
echo "$results"
[ "$found" = 1 ] && [ "$failed" = 0 ]
