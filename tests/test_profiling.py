"""The trace of a run, through the real entry point."""

import json

from helpers import TINY_RUN, run


def test_a_run_leaves_a_trace_and_says_what_took_longest(demo_folder, clip_file, tmp_path):
    few = ("data.layout=folder", f"data.dir={demo_folder}", "model.imsize=16", "eval.metrics=[clip_score]")
    places = (f"log.dir={tmp_path}/logs", f"log.save_dir={tmp_path}/saved", f"clip.weights={clip_file}")
    result = run("train.py", "cfg/demo.yml", *TINY_RUN, *few, *places, "train.profile=true", "train.device=cpu")
    assert result.returncode == 0, result.stderr
    (path,) = (tmp_path / "logs" / "demo").glob("*/steps.pt.trace.json")
    names = {event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]}
    assert any("convolution" in name for name in names)
    table = result.stdout[: result.stdout.index(str(path))]
    assert "Self CPU" in table and table.count("aten::") <= 10
