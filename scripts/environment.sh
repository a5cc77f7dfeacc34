# Sourced by the other scripts: goes to the repository's root, makes .venv there if it is missing,
# installs the given requirements file into it unless that has been done, and puts it first in PATH.
# Usage: source scripts/environment.sh requirements.txt

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "$*" >&2; exit 1; }

make_venv() {
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
        fail "Python 3.10 or newer is needed as python3; this machine has $(python3 -V 2>&1 || true)"
    rm -rf .venv
    if python3 -m venv .venv >/dev/null 2>&1; then return; fi
    # Debian and Ubuntu keep venv's pip in a package of its own.
    rm -rf .venv
    local sudo=""
    [ "$(id -u)" -eq 0 ] || sudo="sudo"
    echo "Python's venv module is incomplete; installing the package python3-venv"
    { $sudo apt-get update -qq && $sudo apt-get install -y -qq python3-venv >/dev/null; } ||
        fail "install python3-venv (apt-get install python3-venv), then run this again"
    python3 -m venv .venv
}

[ -x .venv/bin/pip ] || make_venv
installed=.venv/installed-requirements.txt
wanted="$(cat "$1" requirements.txt)"
if [ "$(cat "$installed" 2>/dev/null)" != "$wanted" ]; then
    echo "Installing $1 into .venv (PyTorch is large: some minutes)"
    .venv/bin/pip install --quiet --disable-pip-version-check -r "$1"
    echo "$wanted" >"$installed"
fi
export PATH="$PWD/.venv/bin:$PATH"
