"""The shell scripts: env.sh from anywhere with a bare PATH, -h of each, and that those the texts name are there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

INTERPRETER = Path(sys.executable).parent


def bash(*words: object, folder: Path = ROOT, home: Path = ROOT) -> subprocess.CompletedProcess:
    """bash with no more than HOME, a PATH with this interpreter, which has all requirements, and GPUS=1."""
    return subprocess.run(
        ["bash", *map(str, words)],
        cwd=folder,
        env={"PATH": f"{INTERPRETER}:/usr/bin:/bin", "HOME": str(home), "GPUS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_env_works_from_another_folder_and_installs_nothing(tmp_path):
    command = (
        f"source '{ROOT}/scripts/env.sh' && python -c "
        "'import sys, ratlip, torch, clip; print(sys.executable, ratlip.__file__, sep=chr(10))'"
    )
    result = bash("-euo", "pipefail", "-c", command, folder=tmp_path, home=tmp_path)
    assert result.returncode == 0, result.stderr
    executable, module = map(Path, result.stdout.splitlines())
    assert executable.parent == INTERPRETER
    assert module == ROOT / "code" / "ratlip" / "__init__.py"
    assert "nstall" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_env_keeps_the_callers_pythonpath(tmp_path):
    (tmp_path / "mine.py").touch()
    command = f"export PYTHONPATH='{tmp_path}'; source '{ROOT}/scripts/env.sh' && python -c 'import mine, ratlip'"
    result = bash("-c", command, folder=tmp_path, home=tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", ["train.sh", "prepare.sh", "sample.sh", "check.sh"])
def test_help(name, tmp_path):
    result = bash(ROOT / "scripts" / name, "-h", folder=tmp_path, home=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"bash scripts/{name}" in result.stdout  # the usage or an example, as it is to be typed
    assert "Traceback" not in result.stderr


def test_all_scripts_parse_and_say_what_they_do():
    scripts = sorted((ROOT / "scripts").glob("*.sh"))
    assert scripts
    for script in scripts:
        assert bash("-n", script).returncode == 0, script
        lines = script.read_text().splitlines()
        assert (lines[1] if lines[0].startswith("#!") else lines[0]).startswith("# "), script


def test_scripts_that_the_texts_name_are_there():
    texts = [ROOT / "README.md", ROOT / "data" / "README.md"]
    for pattern in ("scripts/*.sh", "cfg/*.yml", "code/*.py", "code/ratlip/**/*.py"):
        texts += ROOT.glob(pattern)
    named = {
        (str(path.relative_to(ROOT)), script)
        for path in texts
        if path.is_file()
        for script in re.findall(r"\bbash (scripts/[\w./-]*\w)", path.read_text(encoding="utf-8"))
    }
    assert len(named) > 5
    assert [pair for pair in sorted(named) if not (ROOT / pair[1]).is_file()] == []
