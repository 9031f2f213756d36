"""notebooks/walkthrough.ipynb runs from top to bottom, its text states what it computes, and it copies no code.

A number in bold in its text was printed by the code cell right above. Cells tagged `measured` print timings or results
of training, which depend on the size of the run and on the machine. All others print the same every time, so their
outputs in the file, including the sources that they show, must equal those of a new run. To refresh them:

    WALKTHROUGH=small uv run --group dev tests/test_walkthrough.py  # all but the `measured` cells, in two minutes
    uv run --group dev tests/test_walkthrough.py                    # all, in minutes; then correct figures in the text
"""

import ast
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
SOURCES = [(ROOT / f"{name}.py").read_text() for name in ("R1ZeroTrain", "rewards", "prompts")]
NOISE = r"/(tmp|work|root|home|Users)/|Warning|\r|\x1b"
NO_TEXT = r"\$\$.*?\$\$|\$[^$]*\$|`[^`]*`|\[[^]]*\]\([^)]*\)|^    .*$"  # equations, code and links


def read() -> NotebookNode:
    return nbformat.read(PATH, 4)


def executed() -> NotebookNode:
    """The notebook, run in a fresh kernel. Raises CellExecutionError at the first cell that fails."""
    where = {"metadata": {"path": str(PATH.parent)}}
    return NotebookClient(read(), timeout=1800, record_timing=False, resources=where).execute()


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def is_measured(cell: NotebookNode) -> bool:
    return "measured" in cell.metadata.get("tags", [])


def printed(cell: NotebookNode) -> tuple[str, str]:
    """What the cell printed, joined from several pieces, and the sources that it showed."""
    sources = [out.get("data", {}).get("text/markdown", "") for out in cell.outputs]
    return "".join(out.get("text", "") for out in cell.outputs), "".join(sources)


def definitions(source: str) -> set[str]:
    nodes = ast.parse(source).body
    return {x.name for x in nodes if isinstance(x, ast.FunctionDef | ast.ClassDef)}


def test_it_renders_without_a_kernel() -> None:
    nbformat.validate(read())
    cells = code_cells(read())
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    assert PATH.stat().st_size < 1_500_000
    for cell in cells:
        assert not {"stderr", "error"} & {out.get("name", out.output_type) for out in cell.outputs}
        assert not re.search(NOISE, printed(cell)[0]), cell.source


def test_its_cells_are_short_and_copy_nothing() -> None:
    project = set().union(*map(definitions, SOURCES))
    lines = {line.strip() for source in SOURCES for line in source.splitlines()}
    for cell in code_cells(read()):
        copied = lines & {line.strip() for line in cell.source.splitlines() if len(line) > 60}
        assert not copied | (definitions(cell.source) & project)
        assert len(cell.source.splitlines()) <= 18, cell.source  # of at most 100 columns


def test_the_table_of_symbols_names_what_is_in_the_code() -> None:
    (table,) = [cell.source for cell in read().cells if "| in the code |" in cell.source]
    rows = "".join(re.findall(r"^\| \$.*", table, re.MULTILINE))
    names = re.findall(r"`([^`]+)`", rows)
    assert len(names) > 25
    for name in names:
        assert re.search(rf"(?<!\w){re.escape(name)}(?!\w)", "".join(SOURCES)), name


def test_each_figure_in_the_text_was_printed_right_above() -> None:
    above, figures = "", []
    for cell in read().cells:
        if cell.cell_type == "code":
            above = printed(cell)[0]
            continue
        text = re.sub(NO_TEXT, "", cell.source, flags=re.DOTALL | re.MULTILINE)
        for figure in re.findall(r"\*\*([-+]?\d[\d.,]*%?)\*\*", text):
            assert re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d|[.,]\d)", above), cell.source
            figures.append(figure)
        bare = re.findall(r"\d+\.\d+|\d+%", re.sub(r"\*\*.*?\*\*", "", text))
        assert not bare, f"{bare}: a figure belongs in bold, below the cell that printed it"
    assert len(figures) > 30


def test_it_runs_and_prints_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs fewer steps and samples than the stored outputs of the `measured` cells."""
    monkeypatch.setenv("WALKTHROUGH", "small")
    for old, new in zip(code_cells(read()), code_cells(executed()), strict=True):
        assert is_measured(old) or printed(old) == printed(new), "stale outputs: see the docstring"


def test_runs_are_plotted_at_their_end_and_later(tmp_path: Path) -> None:
    size = "--steps 1 --questions_per_step 1 --max_new_tokens 8 --eval_questions 2 --device cpu"
    train = [sys.executable, ROOT / "R1ZeroTrain.py", *size.split(), "--run_dir", "a"]
    subprocess.run(train, cwd=tmp_path, check=True)
    assert (tmp_path / "a" / "curves.png").read_bytes().startswith(b"\x89PNG")
    script = [sys.executable, ROOT / "notebooks" / "plot_runs.py"]
    subprocess.run([*script, "a", "a", "curve.png"], cwd=tmp_path)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    wrong = subprocess.run([*script, "a", "a"], cwd=tmp_path, capture_output=True)
    assert b"try runs/a runs/b" in wrong.stderr


if __name__ == "__main__":
    notebook, new = read(), executed()
    for old, cell in zip(notebook.cells, new.cells, strict=True):
        if os.environ.get("WALKTHROUGH") != "small" or not is_measured(old):
            old.update(cell)
    nbformat.write(notebook, PATH)
