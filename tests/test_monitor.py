"""What a run shows and keeps, by a run: TensorBoard's tags, pictures, and lines where there is no terminal."""

import re

import numpy as np
import pytest
from helpers import ROOT, TINY_RUN, run
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

EPOCHS = 4  # of three steps each: one look at the losses, which is every tenth step


@pytest.fixture(scope="module")
def words(demo_folder, clip_file, tmp_path_factory):
    """The command line of a small run, and the folder of its files."""
    folder = tmp_path_factory.mktemp("run")
    places = (f"log.dir={folder}/logs", f"log.save_dir={folder}/saved", f"data.dir={demo_folder}")
    small = ("data.layout=folder", "model.imsize=16", "eval.metrics=[fd_clip,clip_score]", f"clip.weights={clip_file}")
    length = (f"train.max_epoch={EPOCHS}", f"log.test_interval={EPOCHS}")
    return ["cfg/demo.yml", *TINY_RUN, *places, *small, *length], folder


@pytest.fixture(scope="module")
def finished(words):
    """The run's folder of logs, and what it printed."""
    result = run("train.py", *words[0])
    assert result.returncode == 0, result.stderr
    (logs,) = (words[1] / "logs/demo").iterdir()
    return logs, result


@pytest.fixture(scope="module")
def events(finished) -> EventAccumulator:
    events = EventAccumulator(str(finished[0]), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    return events


def test_readme_has_every_tag_and_no_other(events):
    table = (ROOT / "README.md").read_text().partition("TensorBoard's tags:")[2].partition("\n## ")[0]
    told = set(re.findall(r"`([\w/*]+)`", "\n".join(line.split("|")[1] for line in table.splitlines() if "|" in line)))
    tags = events.Tags()
    written = {re.sub("^scores/.*", "scores/*", tag) for tag in tags["scalars"]} | set(tags["images"])
    written |= {tag.removesuffix("/text_summary") for tag in tags["tensors"]}
    assert told - {"memory/gpu_gib"} == written - {"memory/gpu_gib"}  # only where there is a GPU


def test_scalars_have_steps_and_sensible_values(events):
    assert [event.step for event in events.Scalars("loss_d/real")] == [10]
    assert [event.step for event in events.Scalars("scores/fd_clip")] == [0, 3 * EPOCHS]
    assert [event.step for event in events.Images("samples")] == [0, 3, 6, 9, 12]
    assert 0.1 < events.Scalars("memory/process_gib")[0].value < 64
    assert 0 < events.Scalars("speed/images_per_second")[0].value < 1e5


def test_hparams_name_the_settings_and_the_final_scores(finished):
    data = EventAccumulator(str(finished[0]))
    data.Reload()
    plugin = data.summary_metadata if hasattr(data, "summary_metadata") else {}
    content = b"".join(meta.plugin_data.content for tag, meta in plugin.items() if tag.startswith("_hparams_"))
    for word in (b"train.lr_g", b"model.name", b"scores/fd_clip", b"scores/clip_score"):
        assert word in content, word
    assert b"scores/seconds" not in content


def test_lines_where_there_is_no_terminal(finished):
    _, result = finished
    lines = [line for line in result.stdout.splitlines() if line.startswith("epoch ")]
    assert len(lines) == EPOCHS and not result.stderr
    for number, line in enumerate(lines, 1):
        assert line.startswith(f"epoch {number}/{EPOCHS}  real ")
        assert "ma_gp" in line and "clip_similarity" in line and "images/s" in line and line.endswith(" left")


def test_grids_have_real_averaged_and_present_rows(finished):
    logs, _ = finished
    first, last = (Image.open(logs / f"grids/epoch_{epoch:04}.png") for epoch in (0, EPOCHS))
    assert first.size == last.size
    assert first.width == 76 + 6 * 136 and first.height > 5 * 138  # six test images; five rows and captions
    rows = [np.array(grid.crop((76, 0, grid.width, 690))).reshape(5, 138, -1) for grid in (first, last)]
    assert np.array_equal(rows[0][0], rows[1][0]), "the real pictures stay"
    assert np.array_equal(rows[0][1], rows[0][3]), "before the first step the averaged weights are the present ones"
    assert not np.array_equal(rows[1][1], rows[1][3]) and not np.array_equal(rows[0][3], rows[1][3])
    assert not np.array_equal(rows[0][1], rows[0][2]), "two noises"


def test_filmstrip_and_curves(finished):
    logs, _ = finished
    strip = Image.open(logs / "filmstrip.png")
    grid = Image.open(logs / f"grids/epoch_{EPOCHS:04}.png")
    assert strip.width == grid.width and strip.height == grid.height  # as many epochs as the grid has rows
    newest = np.array(grid)[138 : 138 + 134, 76:]
    assert np.array_equal(np.array(strip)[EPOCHS * 138 :][:134, 76:], newest)
    assert np.array(Image.open(logs / "curves.png").convert("L")).std() > 5


def test_a_run_that_goes_on_drops_the_pictures_of_later_epochs(finished, words, tmp_path):
    logs, _ = finished
    (logs / "grids/epoch_0009.png").write_bytes((logs / "grids/epoch_0004.png").read_bytes())
    (logs / "grids/epoch_0001.png").write_bytes(b"")  # cannot be read: the filmstrip goes without it
    result = run("train.py", *words[0], "train.resume=auto", f"train.max_epoch={EPOCHS + 1}")
    assert result.returncode == 0, result.stderr
    names = sorted(path.name for path in (logs / "grids").iterdir())
    assert names == [f"epoch_000{epoch}.png" for epoch in range(EPOCHS + 2)]
    assert Image.open(logs / "filmstrip.png").height == Image.open(logs / "grids/epoch_0005.png").height
