"""Each notebook runs from top to bottom on the demo data, and is committed small, whole and clean."""

import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))
MAX_BYTES = 500_000
CELL_SECONDS = 300  # a cell that takes longer has hung
SHORTER = {"STEPS = 150 ": "STEPS = 20 ", '"--debug", ': '"--debug", "-i", "20", "-vi", "10", '}  # trainings, of which no more is asked here than that they run
# what a person's own machine leaves in an output: a path from the root, a home folder
MACHINE = re.compile(r"(?<![\w.])/(?:home|root|tmp|var|usr|opt|Users|work)/|[A-Z]:\\|ipykernel_\d")


@pytest.fixture(scope="module")
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future]]:
    """The chosen notebooks being run in a copy of the project: the first alone, for it makes the demo set, the rest as many at a time as there are cores."""
    folder = tmp_path_factory.mktemp("project")
    for module in ROOT.glob("*.py"):
        shutil.copy(module, folder)
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    (folder / "data").mkdir()
    chosen = [item.callspec.params["name"] for item in request.session.items if getattr(item, "originalname", "") == "test_notebook_runs_from_top_to_bottom"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("IPYTHONDIR", str(folder / ".ipython"))          # the user's own history and profile stay out of it
        patch.setenv("JUPYTER_RUNTIME_DIR", str(folder / ".jupyter"))
        patch.delenv("MPLBACKEND", raising=False)                    # the kernel's own one puts pictures into the notebook
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            done = {}
            for name in chosen:
                done[name] = pool.submit(run_notebook, folder / "notebooks" / name)
                done[chosen[0]].exception()  # waits for it
            yield done


def run_notebook(path: Path) -> nbformat.NotebookNode:
    """Run it anew; raises CellExecutionError, with the cell and its traceback, where a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
        for whole, short in SHORTER.items():
            cell.source = cell.source.replace(whole, short)
    return NotebookClient(notebook, timeout=CELL_SECONDS, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(output: nbformat.NotebookNode) -> str:
    """What an output says in words; pictures and sounds left out."""
    return output.get("text", "") + output.get("data", {}).get("text/plain", "")


def test_there_are_notebooks():
    assert {"dataset.ipynb", "models.ipynb", "results.ipynb", "spectrogram_and_pitch.ipynb"} == set(NOTEBOOKS)
    sources = [cell.source for name in NOTEBOOKS for cell in code_cells(nbformat.read(ROOT / "notebooks" / name, as_version=4))]
    assert all(sum(training in source for source in sources) == 1 for training in SHORTER)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs_from_top_to_bottom(name: str, running: dict[str, Future]):
    pictures, committed_pictures = (sum("image/png" in output.get("data", {}) for cell in code_cells(notebook) for output in cell.outputs)
                                    for notebook in (running[name].result(), nbformat.read(ROOT / "notebooks" / name, as_version=4)))
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
