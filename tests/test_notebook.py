"""sample.ipynb: it runs from top to bottom on the CPU without internet, and is committed with what it shows."""

import resource

import nbformat
import pytest
from helpers import ROOT
from nbclient import NotebookClient

NOTEBOOK = ROOT / "sample.ipynb"


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> tuple[nbformat.NotebookNode, float]:
    """The notebook, run in a folder with what it reads of this one, and the seconds of computing that it took."""
    folder = tmp_path_factory.mktemp("notebook")
    for name in ("code", "cfg", "assets"):
        (folder / name).symlink_to(ROOT / name)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("http_proxy", "https_proxy"):
            patch.setenv(name, "http://127.0.0.1:9")  # answers nothing
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    assert len(list((folder / "samples/notebook").glob("*.png"))) == 8
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return notebook, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def shown(notebook: nbformat.NotebookNode) -> list[set[str]]:
    """For each code cell the kinds of its outputs."""
    cells = (cell for cell in notebook.cells if cell.cell_type == "code")
    return [{kind for output in cell.outputs for kind in output.get("data", {output.output_type: 0})} for cell in cells]


def test_it_runs_in_a_minute_and_shows_pictures(executed):
    notebook, seconds = executed
    assert seconds < 60
    assert sum("image/png" in kinds for kinds in shown(notebook)) >= 6
    assert "assets/demo/generator.pth" in str(notebook.cells)


def test_it_is_committed_with_these_outputs(executed):
    committed = nbformat.read(NOTEBOOK, as_version=4)
    assert shown(committed) == shown(executed[0])
    text = NOTEBOOK.read_text()
    assert "stderr" not in text and str(ROOT) not in text and "/home/" not in text and "/tmp/" not in text


def test_no_model_code_in_cells():
    source = "\n".join(cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code")
    for word in ("class ", "def ", "nn.", "torch.load", "no_grad"):
        assert word not in source, word
