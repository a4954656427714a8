# Sourced by every script: afterwards `python` is an interpreter that has requirements.txt (REQUIREMENTS overrides).
#
# An active virtual or conda environment, or any `python` on the PATH, is used as it is when it meets the
# requirements. Otherwise .venv is made at the repository root and filled once; a stamp remembers the
# requirements it was filled from. Example: source scripts/env.sh && tensorboard --logdir logs
if [ "${BASH_SOURCE[0]:-}" = "$0" ]; then # run, not sourced
    case "${1:-}" in -h | --help) sed -n '/^#/!q;p' "$0" | cut -c3-; exit 0 ;; esac
fi

ratlip_root=$(CDPATH= cd "$(dirname "${BASH_SOURCE[0]:-$0}")/.." && pwd)
ratlip_requirements=$ratlip_root/${REQUIREMENTS:-requirements.txt}

# Exit code 0 if interpreter $1 is recent enough and has all of the requirements file $2 installed; else 1, and what it
# lacks in one line.
ratlip_meets() {
    "$1" - "$2" <<'PYTHON' 2>/dev/null
import sys

sys.path[:] = filter(None, sys.path)  # not the folder that this is called from: it may hold a re.py
import importlib.metadata as metadata
import pathlib
import re

try:
    from packaging.requirements import Requirement
except ImportError:
    from pip._vendor.packaging.requirements import Requirement


def lacking(requirement, extra=""):
    """What is missing of a requirement, and of what its extras ask for; `extra`: the one that it is asked for by."""
    if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
        return
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        version = None
    wanted = f"{requirement.name}{requirement.specifier}"
    if not version:
        yield f"{wanted} (not installed)"
    elif not requirement.specifier.contains(version.split("+")[0], prereleases=True):
        yield f"{wanted} (it has {version})"
    elif requirement.extras:
        for own in map(Requirement, metadata.requires(requirement.name) or []):
            if own.marker and not own.marker.evaluate({"extra": ""}):
                for name in requirement.extras:
                    yield from lacking(own, name)


def check(path):
    for line in path.read_text(encoding="utf-8").splitlines():
        line = re.sub(r"(^|\s)#.*", "", line).strip()
        if line.startswith("-r"):
            yield from check(path.parent / line[2:].strip())
        elif line and not line.startswith("-"):
            yield from lacking(Requirement(line))


found = ["Python>=3.10 (it is %d.%d)" % sys.version_info[:2]] if sys.version_info < (3, 10) else []
found += check(pathlib.Path(sys.argv[1]))
if found:
    print(*dict.fromkeys(found), sep=", ")
    sys.exit(1)
PYTHON
}

ratlip_fail() {
    echo "error: $1" >&2
    return 2
}

# Make or complete .venv, after saying $1. Holding .env.lock keeps two scripts that start together from installing twice.
ratlip_install() {
    local base candidate size stamp=$ratlip_root/.venv/requirements.sha256 sum
    sum=$(cat "$ratlip_root"/requirements*.txt "$ratlip_requirements" | cksum)
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$sum" ] && return 0
    for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then base=$candidate; break; fi
    done
    [ -n "${base:-}" ] || { ratlip_fail "no Python 3.10 or later found; install one and run this again"; return 2; }
    [ -d "$ratlip_root/.venv" ] || size=", some minutes, about 6 GB on disk"
    [ -z "${1:-}" ] || echo "$1" >&2
    echo "Installing $(basename "$ratlip_requirements") into $ratlip_root/.venv: once${size:-}." >&2
    # A .venv without its stamp was interrupted: pip completes what is there.
    [ -x "$ratlip_root/.venv/bin/python" ] && "$ratlip_root/.venv/bin/python" -m pip --version >/dev/null 2>&1 ||
        "$base" -m venv --clear "$ratlip_root/.venv" ||
        { ratlip_fail "$base cannot make a virtual environment (on Debian: apt-get install python3-venv)"; return 2; }
    "$ratlip_root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$ratlip_requirements" ||
        { ratlip_fail "pip could not install $(basename "$ratlip_requirements") (see above); is a package registry reachable?"; return 2; }
    echo "$sum" >"$stamp"
}

ratlip_setup() {
    local lacks python status=0 why=
    if lacks=$(ratlip_meets python "$ratlip_requirements"); then return 0; fi
    if ! ratlip_meets "$ratlip_root/.venv/bin/python" "$ratlip_requirements" >/dev/null; then
        python=$(command -v python) || python=
        # An environment that somebody activated, or that has PyTorch, was meant to be used.
        if [ -n "$python" ] && [ "$python" != "$ratlip_root/.venv/bin/python" ] &&
            { [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] || [[ -n $lacks && ", $lacks" != *", torch>"* ]]; }; then
            why="The active environment ($python) lacks ${lacks:-pip and packaging, by which requirements are looked up}."
            why="$why To use it, stop this and run: $python -m pip install -r $ratlip_requirements"
        fi
        if command -v flock >/dev/null; then
            exec 9>"$ratlip_root/.env.lock"
            flock 9 2>/dev/null || echo "No file locks here: start no other script before this installation is done." >&2
            ratlip_install "$why" || status=$?
            exec 9>&-
        else
            ratlip_install "$why" || status=$?
        fi
    fi
    [ $status -eq 0 ] || return $status
    export VIRTUAL_ENV=$ratlip_root/.venv PATH=$ratlip_root/.venv/bin:$PATH
    unset PYTHONHOME
    hash -r
}

# What `python -c` is to run first: the caller's folder, which may hold a random.py, is no place for modules.
ratlip_path='import sys; sys.path[:] = filter(None, sys.path)'
ratlip_torchrun="$ratlip_path; from torch.distributed.run import main; main()"

# How many processes to start: GPUS where it is set, else one for each GPU.
ratlip_processes() {
    echo "${GPUS:-$(python -c "$ratlip_path; import torch; print(torch.cuda.device_count())")}"
}

ratlip_setup || { ratlip_status=$?; [ "${BASH_SOURCE[0]:-}" = "$0" ] && exit $ratlip_status; return $ratlip_status; }
export PYTHONPATH=$ratlip_root/code${PYTHONPATH:+:$PYTHONPATH}
