"""What goes wrong in a newcomer's first hour: each was tried, and is answered in one line that says what to do.

More of the same is in the tests of each part: settings (test_config.py), data (test_preparation.py), checkpoints
(test_checkpoint.py, test_resume.py), scores (test_evaluation.py).
"""

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from helpers import ROOT, TINY_RUN, assert_refused

from ratlip import errors

CAPTION = "a small red star"
NO_INTERNET = {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
TOO_LARGE = "model.d_channels=40000000000"  # more than any machine addresses

# What was done, the words of the command, and what the answer has to hold.
TRIED = {
    "wrong path of the configuration": ("train.py cfg/demo.yaml", f"no configuration file {ROOT}/cfg/demo.yaml; cfg/"),
    "its name without the folder": ("train.py demo", f"and no run's folder {ROOT}/demo; cfg/ has bird.yml"),
    "its place seen from another folder": ("train.py ../cfg/demo.yml", f"file {ROOT.parent}/cfg/demo.yml"),
    "a file that is no configuration": ("train.py LICENSE", "LICENSE, line", "not valid YAML"),
    "a typo in a key": ("train.py cfg/demo.yml train.batchsize=8", "did you mean 'train.batch_size'"),
    "a key without its group": ("train.py cfg/demo.yml batch_size=8", "did you mean 'train.batch_size'"),
    "a blank in place of =": ("train.py cfg/demo.yml train.batch_size 8", "'train.batch_size'", "expected key=value"),
    "a word where a number belongs": ("train.py cfg/demo.yml train.lr_g=small", "train.lr_g must be of type float"),
    "a size that cannot be": ("train.py cfg/demo.yml model.imsize=100", "4 * 2^k", "100"),
    "a layout that is not there": ("train.py cfg/demo.yml data.layout=cub", "one of demo, bird", "'cub'"),
    "no data yet": ("train.py cfg/bird.yml data.dir=nowhere/birds", f"no folder {ROOT}/nowhere/birds", "README.md"),
    "no data yet, checking it": ("prepare.py cfg/bird.yml data.dir=nowhere/birds", f"no folder {ROOT}/nowhere/birds"),
    "a folder without pictures": ("train.py cfg/demo.yml data.layout=folder data.dir=cfg", "cfg/images: no pictures"),
    "no GPU": ("train.py cfg/demo.yml {small} train.device=cuda", "sees no GPU", "use cpu or auto"),
    "no GPU to sample on": (f"sample.py cfg/demo.yml|{CAPTION}|--device cuda", "sees no GPU"),
    "no CLIP at that path": ("train.py cfg/demo.yml {small} clip.weights=ViT-B-32.pt", "no file 'ViT-B-32.pt'"),
    "no internet for CLIP": (
        "train.py cfg/demo.yml {small} clip.weights=ViT-B/32",
        "ViT-B/32 could not be downloaded", "set clip.weights to its path",
    ),
    "a memory that is too small": ("train.py cfg/demo.yml {small} " + TOO_LARGE, "memory is full", "train.batch_size"),
    "more in a batch than there is": ("train.py cfg/demo.yml {small} train.batch_size=13", "12 training images"),
    "a folder that cannot be written": ("train.py cfg/demo.yml {small} log.save_dir=LICENSE/saved", "LICENSE/saved"),
    "sampling before training": (f"sample.py cfg/coco.yml|{CAPTION}", "bash scripts/train.sh cfg/coco.yml"),
    "sampling from nothing": (f"sample.py cfg/demo.yml|{CAPTION}|--checkpoint best.pth", f"{ROOT}/best.pth"),
    "sampling without a caption": ("sample.py cfg/demo.yml train.seed=1", "no caption given", "in quotes"),
    "pictures to a place that is a file": (f"sample.py cfg/demo.yml|{CAPTION}|--out README.md", "README.md", "exists"),
    "evaluating before training": ("test.py cfg/coco.yml", "bash scripts/train.sh cfg/coco.yml"),
    "evaluating something else": ("test.py cfg/demo.yml README.md", "README.md is no checkpoint"),
    "resuming what was never saved": ("train.py cfg/demo.yml {small} state_epoch=120", "no checkpoint of epoch 120"),
}  # fmt: skip


@pytest.mark.parametrize("what", TRIED)
def test_mistakes_are_answered_in_one_line(what, call, monkeypatch, tmp_path, demo_folder, clip_file):
    for name, value in {**NO_INTERNET, "HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}.items():
        monkeypatch.setenv(name, value)
    command, *parts = TRIED[what]
    few = ("data.layout=folder", f"data.dir={demo_folder}", "model.imsize=16", "eval.metrics=[clip_score]")
    small = " ".join([*TINY_RUN, *few, f"clip.weights={clip_file}", f"log.dir={tmp_path}/logs"])
    entry, *words = [word for part in command.format(small=small).split("|") for word in _split(part)]
    result = call(entry, *words[:1], f"log.save_dir={tmp_path}/saved", *words[1:])
    assert_refused(result, *parts)
    assert not (tmp_path / "saved").exists()


def _split(part: str) -> list[str]:
    return [part] if part == CAPTION else part.split()


def test_a_caption_without_quotes_is_pointed_out(call, tmp_path):
    result = call("sample.py", "cfg/demo.yml", *CAPTION.split(), "--n", 1, "--out", tmp_path)
    assert result.returncode == 0 and "4 captions of one word each" in result.stdout and "quotes" in result.stdout


@pytest.mark.parametrize("script", ["train.sh", "prepare.sh", "sample.sh", "test.sh", "resume.sh"])
def test_a_script_without_words_shows_its_usage(script):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "GPUS": "1"}
    result = subprocess.run(
        ["bash", f"scripts/{script}"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.returncode in (1, 2) and "Traceback" not in result.stderr
    assert f"usage: bash scripts/{script}" in result.stderr


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."), "the GPU's memory is full"),
        (RuntimeError("unable to write to file </torch_1>: No space left on device; shared memory"), "--shm-size"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "data.num_workers"),
        (MemoryError(), "train.batch_size"),
        (PermissionError(13, "Permission denied", "logs"), "logs: Permission denied"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_what_the_machine_cannot_do_is_one_line_too(error, part, capsys):
    """Those that need a GPU, or a machine that is really full, as PyTorch and Python word them."""

    def main():
        raise error

    with pytest.raises(SystemExit) as left:
        errors.run(main)
    (line,) = capsys.readouterr().err.splitlines()
    assert part in line and left.value.code == (130 if part == "interrupted" else 2)


def test_other_errors_keep_their_traceback():
    def main():
        raise RuntimeError("a mistake of ours")

    with pytest.raises(RuntimeError, match="of ours"):
        errors.run(main)


@pytest.fixture
def bare(tmp_path):
    """bare(path) -> what `source scripts/env.sh` says in a clone that needs a package no index has, with this PATH."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/env.sh", tmp_path / "scripts")
    (tmp_path / "requirements.txt").write_text("ratlip-needs-this-and-nobody-has-it>=1\n")

    def bare(path: Path | str, **more: str) -> subprocess.CompletedProcess:
        environment = {"PATH": str(path), "HOME": str(tmp_path), "PIP_INDEX_URL": "http://127.0.0.1:9", **NO_INTERNET}
        environment |= {"PIP_RETRIES": "0", "PIP_CONFIG_FILE": os.devnull, **more}
        return subprocess.run(
            [shutil.which("bash"), "-c", "source scripts/env.sh && echo ready"],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    return bare


def tools(folder: Path, *more: tuple[str, str]) -> Path:
    """A PATH with the shell's own tools and these, and no Python."""
    folder.mkdir()
    for name in ("cat", "cksum", "dirname", "basename", "flock", "sed", "rm", "mkdir", "env"):
        if found := shutil.which(name):
            (folder / name).symlink_to(found)
    for name, target in more:
        (folder / name).symlink_to(target)
    return folder


def test_no_python(bare, tmp_path):
    result = bare(tools(tmp_path / "bin"))
    assert result.returncode == 2 and "no Python 3.10 or later found; install one" in result.stderr
    assert "ready" not in result.stdout


def test_no_file_locks(bare, tmp_path):
    """As flock says on a file system that has none: it goes on, and says what to keep in mind."""
    path = tools(tmp_path / "bin")
    (path / "flock").unlink()
    (path / "flock").write_text("#!/bin/sh\necho 'flock: 9: Function not implemented' >&2\nexit 1\n")
    (path / "flock").chmod(0o755)
    (path / "sh").symlink_to("/bin/sh")
    first, last = bare(path).stderr.splitlines()
    assert first.startswith("No file locks here") and last.startswith("error: no Python 3.10 or later found")


def test_no_internet_for_the_packages_and_an_interrupted_install(bare, tmp_path):
    base = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"
    path = tools(tmp_path / "bin", ("python3", str(base)))
    for _ in range(2):  # the second time what was begun is taken up, not taken for done
        result = bare(path)
        assert result.returncode == 2 and "ready" not in result.stdout
        last = result.stderr.splitlines()[-1]
        assert last.startswith("error: pip could not install requirements.txt") and "reachable" in last
        assert not (tmp_path / ".venv/requirements.sha256").exists()
    (tmp_path / "requirements.txt").write_text("pip\n")  # the index answers again
    result = bare(path)
    assert result.returncode == 0 and result.stdout == "ready\n", result.stderr


@pytest.mark.parametrize(
    ("wanted", "lacks"),
    [
        ("pillow>=999", f"pillow>=999 (it has {metadata.version('pillow')})"),
        ("nobody-has-it>=1", "nobody-has-it>=1 (not installed)"),
        ("own[more]", "nobody-has-that>=2 (not installed)"),
        ("pillow>=999\nnobody-has-it; python_version > '3'", "(not installed)"),
        ("own\npillow>=10\nnobody-has-it; sys_platform == 'none'\n--no-binary :none:\n# a comment", None),
    ],
)
def test_what_an_active_environment_lacks_is_said_before_another_is_installed(bare, tmp_path, wanted, lacks):
    """Its requirements' markers and extras count; a .venv whose pip only says its version stands for 6 GB."""
    (tmp_path / "requirements.txt").write_text(wanted)
    (tmp_path / "own-1.0.dist-info").mkdir()
    (tmp_path / "own-1.0.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: own\nVersion: 1.0\nProvides-Extra: more\nRequires-Dist: pillow>=10\n"
        "Requires-Dist: nobody-has-that>=2; extra == 'more'\n"
    )
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").write_text('#!/bin/sh\ncase "$*" in *--version) exit 0 ;; esac\nexit 1\n')
    (tmp_path / ".venv/bin/python").chmod(0o755)
    own = Path(sys.executable)
    path = f"{tools(tmp_path / 'bin', ('python3', sys.executable))}:{own.parent}"
    result = bare(path, VIRTUAL_ENV=str(own.parents[1]), PYTHONPATH=str(tmp_path))
    if lacks is None:
        assert result.returncode == 0 and result.stderr == "", result.stderr
        return
    said, installing, *_ = result.stderr.splitlines()
    assert said.startswith(f"The active environment ({own.parent}/python) lacks ") and lacks in said
    assert said.endswith(f"{own.parent}/python -m pip install -r {tmp_path}/requirements.txt")
    assert installing.startswith(f"Installing requirements.txt into {tmp_path}/.venv")
    # Where none is active, a Python that has PyTorch was meant, and another was not.
    assert bare(path, PYTHONPATH=str(tmp_path)).stderr.splitlines()[0] == said
    (tmp_path / "requirements.txt").write_text("torch>=99\n")
    assert bare(path).stderr.splitlines()[0] == installing
