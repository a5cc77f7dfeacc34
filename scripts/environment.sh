# Sourced by the other scripts: goes to the repository's root, makes .venv there if it is missing,
# installs the given requirements file into it unless that has been done, and puts it first in PATH.
# With a version of PyTorch as well it is another environment, .venv-torch-VERSION.
# Usage: source scripts/environment.sh requirements.txt [VERSION]

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=".venv${2:+-torch-$2}"
fail() { echo "$*" >&2; exit 1; }

make_venv() {
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
        fail "Python 3.10 or newer is needed as python3; here it is: $(python3 -V 2>&1 || true)"
    if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
        # Debian and Ubuntu keep these in a package of their own.
        local sudo=""
        [ "$(id -u)" -eq 0 ] || sudo="sudo"
        echo "Installing the package python3-venv"
        { $sudo apt-get update -qq && $sudo apt-get install -y -qq python3-venv >/dev/null; } ||
            fail "install python3-venv (apt-get install python3-venv), then run this again"
    fi
    rm -rf "$venv"
    python3 -m venv "$venv"
}

"$venv/bin/python" -m pip --version >/dev/null 2>&1 || make_venv
installed="$venv/installed-$1"
wanted="$(cat requirements*.txt)" # of all files, as they include each other
if [ "$(cat "$installed" 2>/dev/null)" != "$wanted" ]; then
    echo "Installing $1 into $venv (PyTorch is large: some minutes)"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$1" ${2:+"torch==$2"}
    echo "$wanted" >"$installed"
fi
export PATH="$PWD/$venv/bin:$PATH"
