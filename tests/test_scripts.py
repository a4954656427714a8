"""The shell scripts: env.sh from anywhere with a bare PATH, -h of each, and that those the texts name are there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, run

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


EVERY = [
    "train.sh",
    "resume.sh",
    "pretrain.sh",
    "prepare.sh",
    "sample.sh",
    "test.sh",
    "check.sh",
    "env.sh",
    "slurm.sbatch",
]


@pytest.mark.parametrize("name", EVERY)
def test_help_of_every_script_has_an_example_and_needs_no_package(name, tmp_path):
    """With a python3 that has nothing installed, as on a bare machine; and nothing is installed for it."""
    (tmp_path / "python3").write_text(f"#!/bin/sh\nexec '{sys.executable}' -S -E \"$@\"\n")
    (tmp_path / "python3").chmod(0o755)
    command = f"PATH='{tmp_path}':/usr/bin:/bin bash '{ROOT}/scripts/{name}' --help"
    result = bash("-c", command, folder=tmp_path, home=tmp_path)
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert "xample" in result.stdout
    start = {"env.sh": "source", "slurm.sbatch": "sbatch --nodes=1"}.get(name, "bash")
    example = result.stdout.partition("xample")[2]
    assert re.search(rf"{start} scripts/{name}", example), example  # as it is to be typed


@pytest.mark.parametrize("name", ["convert.py", "train_demo_clip.py"])
def test_help_of_what_has_no_script(name):
    result = run(name, "-h")
    example = " ".join(result.stdout.split()).partition("example: ")[2]
    assert result.returncode == 0 and re.match(rf"source scripts/env.sh (&& )?python code/{name} ", example), example


def test_every_script_and_entry_point_is_among_these():
    scripts = {path.name for path in (ROOT / "scripts").iterdir()}
    assert scripts == set(EVERY)
    entries = {path.name for path in (ROOT / "code").glob("*.py")}
    assert entries == {
        "train.py",
        "prepare.py",
        "sample.py",
        "test.py",
        "convert.py",
        "pretrain.py",
        "train_demo_clip.py",
    }


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone")
def test_a_clone_has_the_folders_for_data_and_runs_and_git_sees_nothing_else_in_them():
    for name in ("data", "logs", "saved_models"):
        ignored = subprocess.run(
            ["git", "check-ignore", f"{name}/README.md", f"{name}/demo/run/x"], cwd=ROOT, capture_output=True, text=True
        )
        assert ignored.stdout.split() == [f"{name}/demo/run/x"]
        tracked = subprocess.run(["git", "ls-files", name], cwd=ROOT, capture_output=True, text=True)
        assert tracked.stdout.split() == [f"{name}/README.md"]


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


@pytest.mark.parametrize("name", ["train.py", "prepare.py", "test.py"])
def test_without_words_the_configuration_is_asked_for(name):
    result = run(name)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].endswith("the following arguments are required: config")


@pytest.mark.parametrize(
    ("words", "restarts", "expected"),
    [
        (["cfg/x.yml", "train.seed=1"], 0, "cfg/x.yml run=slurm-7 train.seed=1"),
        (["cfg/x.yml", "train.seed=1"], 1, "cfg/x.yml train.resume=auto run=slurm-7 train.seed=1"),
        (["cfg/x.yml", "run=mine"], 1, "cfg/x.yml train.resume=auto run=mine"),
        (["cfg/x.yml", "state_epoch=3"], 0, "cfg/x.yml state_epoch=3"),
        (["tests"], 0, "tests train.resume=auto"),  # a folder: of a run
    ],
)
def test_a_slurm_job_names_its_run(words, restarts, expected, tmp_path):
    """With srun and scontrol that only say what they were asked."""
    (tmp_path / "srun").write_text('#!/bin/sh\nwhile [ "$1" != train ]; do shift; done; shift; echo "$@"\n')
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho here\n")
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "here", "SLURM_NNODES": "1"}
    job |= {"SLURM_GPUS_ON_NODE": "1", "SLURM_RESTART_COUNT": str(restarts), "HOME": str(tmp_path)}
    path = f"{tmp_path}:{INTERPRETER}:/usr/bin:/bin"
    command = ["bash", "scripts/slurm.sbatch", *words]
    result = subprocess.run(command, cwd=ROOT, env={**job, "PATH": path}, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and result.stdout.strip() == expected, result.stdout + result.stderr
