"""notebooks/walkthrough.ipynb runs from clean to end, says what it computes, and copies no code of the project.

A number in bold in its text is one that the code cell right above printed. Cells tagged `measured` print timings or
results of training, which the size of the run and the machine decide; all others print the same every time, so their
kept outputs, the shown source among them, must be those of a run today. Where they are not, either of these mends it:

    WALKTHROUGH=small uv run tests/test_walkthrough.py    # outputs of the cells that are not `measured`, in seconds
    uv run tests/test_walkthrough.py                      # all outputs, in minutes; then mend the figures in the text
"""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
PATH = ROOT / "notebooks" / "walkthrough.ipynb"
MODULES = [ROOT / f"{name}.py" for name in ("R1ZeroTrain", "rewards", "prompts")]
REFRESH = "WALKTHROUGH=small uv run tests/test_walkthrough.py"
NO_TEXT = r"\$\$.*?\$\$|\$[^$]*\$|`[^`]*`|\[[^]]*\]\([^)]*\)|^    .*$"  # equations, code and links


def executed() -> NotebookNode:
    """The notebook, run in a fresh kernel. Raises CellExecutionError at the first cell that fails."""
    notebook = nbformat.read(PATH, as_version=4)
    where = {"metadata": {"path": str(PATH.parent)}}
    return NotebookClient(notebook, timeout=1800, record_timing=False, resources=where).execute()


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def is_measured(cell: NotebookNode) -> bool:
    return "measured" in cell.metadata.get("tags", [])


def printed(cell: NotebookNode, source: bool = True) -> str:
    """What the cell printed, and the source that it showed; figures are not compared."""
    outputs = [
        out.get("text", "") for out in cell.outputs
    ]  # one print may arrive in two pieces, or two in one
    shown = [out.get("data", {}).get("text/markdown", "") for out in cell.outputs if source]
    return "".join(outputs) + "\n".join(filter(None, shown))


def has_figure(text: str, figure: str) -> bool:
    return re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d|[.,]\d)", text) is not None


@pytest.fixture(scope="module")
def kept() -> NotebookNode:
    """The notebook as it is in the repository."""
    return nbformat.read(PATH, as_version=4)


def test_it_renders_without_a_kernel(kept: NotebookNode) -> None:
    nbformat.validate(kept)
    assert (kept.nbformat, kept.nbformat_minor) == (4, 5)
    assert [cell.execution_count for cell in code_cells(kept)] == list(
        range(1, len(code_cells(kept)) + 1)
    )
    assert PATH.stat().st_size < 1_500_000


def test_its_outputs_are_clean(kept: NotebookNode) -> None:
    for cell in code_cells(kept):
        assert all(
            out.get("name") != "stderr" and out.output_type != "error" for out in cell.outputs
        ), cell.source
        assert not re.search(
            r"/(tmp|work|root|home|Users)/|Warning|\r|\x1b", printed(cell, source=False)
        ), cell.source


def test_its_cells_are_short_and_copy_nothing(kept: NotebookNode) -> None:
    def functions(source: str) -> set[str]:
        kinds = ast.FunctionDef | ast.ClassDef
        return {node.name for node in ast.parse(source).body if isinstance(node, kinds)}

    project = set().union(*(functions(path.read_text()) for path in MODULES))
    lines = {
        line.strip()
        for path in MODULES
        for line in path.read_text().splitlines()
        if len(line.strip()) > 60
    }
    for cell in code_cells(kept):
        assert len(cell.source.splitlines()) <= 15, cell.source
        assert not functions(cell.source) & project
        copied = [line for line in cell.source.splitlines() if line.strip() in lines]
        assert len(copied) <= 1, copied


def test_the_table_of_symbols_names_what_is_in_the_code(kept: NotebookNode) -> None:
    table = next(
        cell.source for cell in kept.cells if "| symbol | meaning | in the code |" in cell.source
    )
    names = {
        name
        for row in table.splitlines()
        if row.startswith("| $")
        for name in re.findall(r"`([^`]+)`", row)
    }
    code = "\n".join(path.read_text() for path in MODULES)
    assert len(names) > 25
    for name in names:
        assert re.search(rf"(?<!\w){re.escape(name.removeprefix('-'))}(?!\w)", code), name


def test_each_figure_in_the_text_was_printed_right_above(kept: NotebookNode) -> None:
    above, figures = "", 0
    for cell in kept.cells:
        if cell.cell_type == "code":
            above = printed(cell, source=False)
            continue
        text = re.sub(NO_TEXT, "", cell.source, flags=re.DOTALL | re.MULTILINE)
        for figure in re.findall(r"\*\*([-+]?\d[\d.,]*%?)\*\*", text):
            assert has_figure(above, figure), (
                f"{figure} is not in what the cell above printed: {cell.source}"
            )
            figures += 1
        bare = re.findall(r"\d+\.\d+|\d+%", re.sub(r"\*\*.*?\*\*", "", text))
        assert not bare, f"{bare}: a figure belongs in bold, below the cell that printed it"
    assert figures > 30


def test_it_runs_and_prints_what_is_kept(
    kept: NotebookNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In small: with fewer steps and samples. The kept outputs are those of the full run."""
    monkeypatch.setenv("WALKTHROUGH", "small")
    for old, new in zip(code_cells(kept), code_cells(executed()), strict=True):
        assert is_measured(old) or printed(old) == printed(new), (
            f"is kept with old outputs; try {REFRESH}"
        )


def test_finished_runs_are_plotted(tmp_path: Path) -> None:
    for seed in (0, 1):
        (tmp_path / f"run{seed}").mkdir()
        (tmp_path / f"run{seed}/config.json").write_text(json.dumps({"seed": seed}))
        lines = [{"step": step, "accuracy": step / 4, "length": 40 + step} for step in range(4)]
        lines[0]["eval_pass@1"], lines[-1]["eval_pass@1"] = 0.25, 0.75
        (tmp_path / f"run{seed}/metrics.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines)
        )
    script = [sys.executable, ROOT / "notebooks" / "plot_runs.py"]
    subprocess.run([*script, "run0", "run1", "curve.png"], cwd=tmp_path, check=True)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    wrong = subprocess.run([*script, "run0", "run1"], cwd=tmp_path, capture_output=True, text=True)
    assert wrong.returncode == 1 and "try runs/a runs/b" in wrong.stderr


if __name__ == "__main__":
    notebook, new = nbformat.read(PATH, as_version=4), executed()
    for old, cell in zip(notebook.cells, new.cells, strict=True):
        if os.environ.get("WALKTHROUGH") != "small" or not is_measured(old):
            old.update(cell)
    nbformat.write(notebook, PATH)
