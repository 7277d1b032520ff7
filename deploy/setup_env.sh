#!/bin/sh
# Make .venv in the repository root and install baton into it; instant when nothing changed since the last time.
#
#   sh deploy/setup_env.sh         to run baton
#   sh deploy/setup_env.sh dev     to test and change it, too
#
# PYTHON names the interpreter (3.11 or newer); otherwise the first fitting one on the PATH is used. Nothing is written outside
# the repository.
set -eu
cd "$(dirname "$0")/.."

device=cpu
[ -e /dev/nvidia0 ] && device=gpu
extras=$device${1:+,$1}
sum=$(cat pyproject.toml deploy/setup_env.sh | cksum | tr -d ' ')
stamp=.venv/.baton-$device-$sum
# The development set includes the other one.
[ -e "$stamp-dev" ] && exit 0
[ -z "${1:-}" ] && [ -e "$stamp" ] && exit 0

python=
for candidate in "${PYTHON:-python3}" python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "baton: needs Python 3.11 or newer; set PYTHON to one" >&2
    exit 1
fi
if [ ! -x .venv/bin/python ]; then
    echo "baton: creating .venv with $("$python" --version)"
    "$python" -m venv .venv
fi
echo "baton: installing into .venv (extras: $extras); this takes a minute or two"
# On a machine without a GPU pip is asked for one release line of torch, of which it takes the CPU build where it can see one.
torch=
[ "$device" = cpu ] && torch='torch==2.13.*'
# Python compiles what it imports, when it does: a tenth of what pip would compile here, one file after the other.
.venv/bin/python -m pip install --quiet --no-compile --no-cache-dir --disable-pip-version-check ${torch:+"$torch"} --editable ".[$extras]"
touch "$stamp${1:+-$1}"
