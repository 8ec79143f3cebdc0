"""Each notebook runs from top to bottom on the demo data, and is committed small, whole and clean."""

import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))
MAX_BYTES = 500_000
CELL_SECONDS = 300  # a cell that takes longer has hung
# what a person's own machine leaves in an output: a path from the root, a home folder
MACHINE = re.compile(r"(?<![\w.])/(?:home|root|tmp|var|usr|opt|Users|work)/|[A-Z]:\\|ipykernel_\d")


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the modules and notebooks, in which the first notebook makes the demo set for all of them."""
    folder = tmp_path_factory.mktemp("project")
    for module in ROOT.glob("*.py"):
        shutil.copy(module, folder)
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    (folder / "data").mkdir()
    return folder


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(output: nbformat.NotebookNode) -> str:
    """What an output says in words; pictures and sounds left out."""
    return output.get("text", "") + output.get("data", {}).get("text/plain", "")


def test_there_are_notebooks():
    assert {"dataset.ipynb", "models.ipynb", "results.ipynb", "spectrogram_and_pitch.ipynb"} == set(NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs_from_top_to_bottom(name: str, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))         # the user's own history and profile stay out of it
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("MPLBACKEND", raising=False)         # the kernel's own one puts pictures into the notebook
    committed = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    notebook = nbformat.read(project / "notebooks" / name, as_version=4)
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    # raises CellExecutionError, with the cell and its traceback, where a cell fails
    NotebookClient(notebook, timeout=CELL_SECONDS, kernel_name="python3",
                   resources={"metadata": {"path": str(project / "notebooks")}}).execute()
    pictures, committed_pictures = (sum("image/png" in output.get("data", {}) for cell in code_cells(each) for output in cell.outputs)
                                    for each in (notebook, committed))
    assert pictures == committed_pictures > 0


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_committed_small_whole_and_clean(name: str):
    path = ROOT / "notebooks" / name
    assert path.stat().st_size < MAX_BYTES
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert not [text_of(output) for output in outputs if MACHINE.search(text_of(output))]
