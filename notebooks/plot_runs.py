"""Plots training accuracy and completion length of finished runs, such as three seeds of a recipe:

uv run --with matplotlib notebooks/plot_runs.py runs/a runs/b runs/c curves.png
"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure  # pyplot would choose a backend for a screen

NAMES = {"accuracy": "training accuracy", "length": "completion length (tokens)"}


def label(run_dir: Path, lines: list[dict]) -> str:
    """The run's seed, and its held-out pass@1 before and after."""
    seed = json.loads((run_dir / "config.json").read_text())["seed"]
    evaluations = [line["eval_pass@1"] for line in lines if "eval_pass@1" in line]
    return f"seed {seed}: held-out pass@1 {evaluations[0]:.2f} to {evaluations[-1]:.2f}"


def plot(run_dirs: list[Path], png: Path) -> None:
    figure = Figure(figsize=(9, 3.2), dpi=110)
    axes = figure.subplots(1, len(NAMES))
    for run_dir in run_dirs:
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        for axis, name in zip(axes, NAMES, strict=True):
            axis.plot(
                [line["step"] for line in lines],
                [line[name] for line in lines],
                label=label(run_dir, lines),
            )
    for axis, (name, title) in zip(axes, NAMES.items(), strict=True):
        axis.set(title=title, xlabel="step", ylim=(0, 1) if name == "accuracy" else (0, None))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(png, metadata={"Software": None})  # so that the same runs give the same file


if __name__ == "__main__":
    *run_dirs, png = map(Path, sys.argv[1:])
    if not run_dirs or png.suffix != ".png":
        sys.exit(
            "plot_runs.py: needs run directories and a .png file; try runs/a runs/b runs/c curves.png"
        )
    plot(run_dirs, png)
