# Sourced by every script: afterwards `python` is an interpreter that has requirements.txt (REQUIREMENTS overrides).
#
# An active virtual or conda environment, or any `python` on the PATH, is used as it is when it meets the
# requirements. Otherwise .venv is made at the repository root and filled once; a stamp remembers the
# requirements it was filled from. Example: source scripts/env.sh && tensorboard --logdir logs
if [ "${BASH_SOURCE[0]:-}" = "$0" ]; then # run, not sourced
    case "${1:-}" in -h | --help) sed -n '/^#/!q;p' "$0" | cut -c3-; exit 0 ;; esac
fi

ratlip_root=$(cd "$(dirname "${BASH_SOURCE[0]:-$0}")/.." && pwd)
ratlip_requirements=$ratlip_root/${REQUIREMENTS:-requirements.txt}

# Exit code 0 if interpreter $1 is recent enough and has all of the requirements file $2 installed.
ratlip_meets() {
    "$1" - "$2" <<'PYTHON' >/dev/null 2>&1
import importlib.metadata as metadata
import pathlib
import re
import sys

try:
    from packaging.requirements import Requirement
except ImportError:
    from pip._vendor.packaging.requirements import Requirement


def check(path):
    for line in path.read_text().splitlines():
        line = re.sub(r"#.*", "", line).strip()
        if line.startswith("-r"):
            check(path.parent / line[2:].strip())
        elif line:
            requirement = Requirement(line)
            version = metadata.version(requirement.name).split("+")[0]
            assert requirement.specifier.contains(version, prereleases=True), line


assert sys.version_info >= (3, 10)
check(pathlib.Path(sys.argv[1]))
PYTHON
}

ratlip_fail() {
    echo "error: $1" >&2
    return 2
}

# Make or complete .venv. Holding .env.lock keeps two scripts that start together from installing twice.
ratlip_install() {
    local base candidate size stamp=$ratlip_root/.venv/requirements.sha256 sum
    sum=$(cat "$ratlip_root"/requirements*.txt "$ratlip_requirements" | cksum)
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$sum" ] && return 0
    for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then base=$candidate; break; fi
    done
    [ -n "${base:-}" ] || { ratlip_fail "no Python 3.10 or later found; install one and run this again"; return 2; }
    [ -d "$ratlip_root/.venv" ] || size=", some minutes, about 6 GB on disk"
    echo "Installing $(basename "$ratlip_requirements") into .venv: once${size:-}." >&2
    # A .venv without its stamp was interrupted: pip completes what is there.
    [ -x "$ratlip_root/.venv/bin/python" ] && "$ratlip_root/.venv/bin/python" -m pip --version >/dev/null 2>&1 ||
        "$base" -m venv --clear "$ratlip_root/.venv" ||
        { ratlip_fail "$base cannot make a virtual environment (on Debian: apt-get install python3-venv)"; return 2; }
    "$ratlip_root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$ratlip_requirements" ||
        { ratlip_fail "pip could not install $(basename "$ratlip_requirements") (see above); is a package registry reachable?"; return 2; }
    echo "$sum" >"$stamp"
}

ratlip_setup() {
    if ratlip_meets python "$ratlip_requirements"; then return 0; fi
    local status=0
    if ! ratlip_meets "$ratlip_root/.venv/bin/python" "$ratlip_requirements"; then
        if command -v flock >/dev/null; then
            exec 9>"$ratlip_root/.env.lock"
            flock 9 2>/dev/null || echo "No file locks here: start no other script before this installation is done." >&2
            ratlip_install || status=$?
            exec 9>&-
        else
            ratlip_install || status=$?
        fi
    fi
    [ $status -eq 0 ] || return $status
    export VIRTUAL_ENV=$ratlip_root/.venv PATH=$ratlip_root/.venv/bin:$PATH
    unset PYTHONHOME
    hash -r
}

# How many processes to start: GPUS where it is set, else one for each GPU.
ratlip_processes() {
    echo "${GPUS:-$(python -c 'import torch; print(torch.cuda.device_count())')}"
}

ratlip_setup || { ratlip_status=$?; [ "${BASH_SOURCE[0]:-}" = "$0" ] && exit $ratlip_status; return $ratlip_status; }
export PYTHONPATH=$ratlip_root/code${PYTHONPATH:+:$PYTHONPATH}
