"""The command line: --help documents every option, and an error is one line that names a value that works."""

import ast
import dataclasses
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from conftest import read_lines

import R1ZeroTrain
from R1ZeroTrain import RECIPES, Config, parse_config

SCRIPT = Path(R1ZeroTrain.__file__)
HINTS = get_type_hints(Config, include_extras=True)
LEAST = {
    name: hint.__metadata__[0] for name, hint in HINTS.items() if hasattr(hint, "__metadata__")
}
CHOICES = {name: get_args(hint) for name, hint in HINTS.items() if "Literal" in str(hint)}
SMALL = "--steps 1 --questions_per_step 2 --group_size 2 --max_new_tokens 8 --eval_questions 2 --device cpu"


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line in an empty directory: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*words: object) -> tuple[int, str, str]:
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
            try:
                code = R1ZeroTrain.run([str(word) for word in words])
            except SystemExit as stop:  # argparse after --help
                code = stop.code
        return code, out.getvalue(), err.getvalue()

    return run


@pytest.fixture
def refused(cli: Callable) -> Callable[..., str]:
    """Checks that a command line is refused: one line on stderr with all `mentions`, and no new files."""

    def check(words: list, *mentions: object) -> str:
        before = sorted(Path().rglob("*"))
        code, _, err = cli(*words)
        assert code == 2 and err.startswith("R1ZeroTrain.py: ") and err.endswith("\n")
        assert err[:-1].isprintable() and len(err) < 700 and sorted(Path().rglob("*")) == before
        for mention in (*mentions, "; try "):
            assert str(mention) in err
        return err

    return check


# --- what cannot work ------------------------------------------------------------------------------------------------


def test_every_number_has_a_least_value(refused: Callable) -> None:
    assert set(LEAST) == {n for n in HINTS if type(getattr(Config, n)) in (int, float)}
    for name, least in LEAST.items():
        below = least - (1 if isinstance(least, int) else 1e-4)
        default = getattr(Config, name)
        refused([f"--{name}", below], f"--{name} {below}: ", f"; try {default}")
        for word in ("many", "nan"):
            refused([f"--{name}", word], f"--{name}")


@pytest.mark.parametrize("name", CHOICES)
def test_an_unknown_choice_is_refused(name: str, refused: Callable) -> None:
    refused([f"--{name}", "none\nsuch"], f"--{name}", *CHOICES[name])


@pytest.mark.parametrize(
    "line", ["--learning_rate 1", "--step 0", "stray", "--steps", "--seed 1.5", "--wandb perhaps"]
)
def test_a_line_that_cannot_be_read_is_refused(line: str, refused: Callable) -> None:
    """Abbreviations are refused, because an option that is added later could make one ambiguous."""
    refused(line.split(), line.split()[0])


@pytest.mark.parametrize(
    ("words", "mentions"),
    [
        ("--task nonesuch", ["--task nonesuch", "countdown"]),
        ("--model nowhere", ["--model nowhere", "notebooks/tiny-base"]),
        ("--model a/b/c", ["--model a/b/c"]),
        ("--device mps", ["--device mps", "try cpu"]),
        ("--dataset nowhere.jsonl", ["--dataset nowhere.jsonl"]),
        ("--dataset rows.jsonl", ["--dataset rows.jsonl", "columns", "nums"]),
        ("--max_new_tokens 100000", ["--max_new_tokens 100000", "try 1024"]),
        ("--eval_questions 100000", ["--eval_questions"]),
        ("--run_dir used", ["--run_dir used", "--resume used"]),
        ("--resume nowhere", ["--resume nowhere"]),
        ("--resume used --model other", ["--model other"]),
        ("--resume used --recipe mac", ["--recipe mac"]),
        ("--resume used --task math", ["--task math"]),
        ("--resume used --seed 5", ["--seed 5"]),
        ("--resume used --run_dir other", ["--run_dir other"]),
        ("--ask Why? --model model --max_new_tokens 1020", ["--ask", "--max_new_tokens"]),
    ],
)
def test_a_value_that_cannot_work_is_refused(
    words: str, mentions: list, refused: Callable, tmp_path: Path, tiny_llama: Path
) -> None:
    shutil.copytree(tiny_llama, tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"question": "1 + 1?"}\n' * 20)
    (tmp_path / "used").mkdir()
    (tmp_path / "used/config.json").write_text("{}")
    refused(words.split(), *mentions)


class Evil:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["{ not this", "missing", "unsafe"])
def test_a_model_folder_that_is_damaged_or_has_code_is_refused(
    name: str, damage: str, refused: Callable, tmp_path: Path, tiny_llama: Path
) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    path, code = folder / name, {"AutoConfig": "its.Its", "AutoModelForCausalLM": "its.Its"}
    path.unlink()
    if damage == "unsafe":
        auto_map = {"model_type": "its_own", "auto_map": code | {"AutoTokenizer": ["its.Its"] * 2}}
        if name != "model.safetensors":
            (folder / "config.json").write_text(json.dumps(auto_map))
        (folder / "its.py").write_text("import os; os.mkdir('executed')")
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    elif damage != "missing":
        path.write_text(damage)
    refused([*SMALL.split(), "--model", folder, "--run_dir", "run"], f"--model {folder}")


@pytest.mark.parametrize("run_dir", ["file", "file/run", "/proc/run"])
def test_a_run_directory_that_cannot_be_written_is_one_line(
    run_dir: str, cli: Callable, tiny_llama: Path
) -> None:
    Path("file").write_text("mine")
    code, _, err = cli(*SMALL.split(), "--model", tiny_llama, "--run_dir", run_dir)
    assert code == 2 and run_dir in err and err.count("\n") == 1 and "Traceback" not in err
    assert Path("file").read_text() == "mine"


# --- what works ------------------------------------------------------------------------------------------------------


def test_words_override_the_recipe_which_overrides_the_defaults() -> None:
    for recipe, line in RECIPES.items():
        words = line.split()
        given = {name[2:]: value for name, value in zip(words[::2], words[1::2], strict=True)}
        given = {name: type(getattr(Config, name))(value) for name, value in given.items()}
        cfg = parse_config(["--recipe", recipe])
        expected = dataclasses.replace(Config(recipe=recipe, run_dir=cfg.run_dir), **given)
        if expected.lora_rank:
            expected.lr *= 5
            cfg.lr = pytest.approx(cfg.lr)
        assert cfg == expected and cfg.run_dir.startswith(f"runs/{recipe}-")
        cfg.lr = 4e-4
        mine = parse_config(["--lr=4e-4", "--run-dir", "x", "--eval-only", "--recipe", recipe])
        assert mine == dataclasses.replace(cfg, run_dir="x", eval_only=True)


def test_resume_has_the_options_of_the_run_and_words_override_them(tmp_path: Path) -> None:
    saved = Config(recipe="mac", lr=0.25, steps=9, wandb=True, ask="", run_dir="elsewhere")
    (tmp_path / "config.json").write_text(json.dumps(vars(saved)))
    resume = ["--resume", str(tmp_path)]
    here = {"run_dir": str(tmp_path), "resume": str(tmp_path)}
    assert parse_config(resume) == dataclasses.replace(saved, **here)
    assert parse_config([*resume, "--steps", "20"]) == dataclasses.replace(saved, **here, steps=20)
    words = ["--eval_only", "--seed", "5", "--task", "math", "--run_dir", "new"]
    own = {"eval_only": True, "seed": 5, "task": "math", "run_dir": "new", "resume": str(tmp_path)}
    assert parse_config([*resume, *words]) == dataclasses.replace(saved, **own)


def test_help_has_each_option_with_its_meaning_and_default_in_80_columns(cli: Callable) -> None:
    code, out, err = cli("--help")
    assert code == 0 and err == "" and max(map(len, out.splitlines())) <= 80
    groups = ["options", "Model and data", "Rollouts", "Update", "Evaluation", "Run"]
    assert re.findall(r"^(\w.*):$", out, re.MULTILINE) == groups
    assert (
        "--max-new-tokens" not in out and parse_config(["--max-new-tokens=5"]).max_new_tokens == 5
    )
    source = SCRIPT.read_text()
    shown = "".join(out.split())
    for name in HINTS:
        (line,) = (x for x in source.splitlines() if x.startswith(f"    {name}: ") and "  # " in x)
        meaning = f"{line.split('  # ')[1]} (default: {getattr(Config, name)})"
        assert f"--{name}" in out and "".join(meaning.split()) in shown


def test_ask_prints_an_answer_and_grades_a_countdown(cli: Callable, tiny_llama: Path) -> None:
    words = ["--model", tiny_llama, "--device", "cpu", "--max_new_tokens", 99]
    for question, grade in (("8 7 4 = 36", True), ("Why\x1b, {0} %s --model?", False)):
        code, out, _ = cli(*words, "--ask", question)
        assert code == 0 and out.startswith("<think>") and "\n\nanswer: None\n" in out
        assert out.endswith("\nwrong\n") == grade
        assert out.replace("\n", "").isprintable() and "\\x" in out, (
            "the model writes control characters"
        )
    assert not list(Path().iterdir())


def test_training_then_eval_only(cli: Callable, tiny_llama: Path) -> None:
    words = [*SMALL.split(), "--model", tiny_llama]
    code, out, err = cli(*words, "--run_dir", "run")
    assert code == 0 and "Traceback" not in err
    table = [line for line in out.splitlines() if line.startswith(("held-out", "eval_"))]
    assert len(table) == 5 and max(map(len, table)) <= 80
    code, out, _ = cli("--resume", "run", "--eval_only", "--run_dir", "evaluated")
    (line,) = read_lines(Path("evaluated"))
    assert code == 0 and line["step"] == 1
    assert line["eval_pass@1"] == read_lines(Path("run"))[-1]["eval_pass@1"]
    assert f"eval_pass@1 {line['eval_pass@1']:.3f}" in " ".join(out.split())


def test_wandb_logs_offline(
    cli: Callable, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*SMALL.split(), "--model", tiny_llama, "--wandb", "--run_dir"]
    logged, options, fake = [], {}, types.SimpleNamespace()
    fake.__spec__ = fake.config = fake  # Accelerate looks for it
    fake.init = lambda **given: options.update(given) or fake
    fake.log = lambda line, step, **_: logged.append(step)
    fake.update = fake.finish = lambda *_, **__: None
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assert cli(*words, "run")[0] == 0
    assert (
        os.environ["WANDB_MODE"] == "offline" and options["dir"] == Path("run") and logged == [0, 1]
    )


def test_real_processes(tmp_path: Path) -> None:
    """A usage error prints one line after the loading message, Ctrl-C while loading prints none, nor does an import."""
    check = "import R1ZeroTrain, sys, torch; assert not {'datasets', 'wandb'} & {*sys.modules}"
    check += "; assert not torch.cuda.is_initialized()"
    lines = [[SCRIPT, "--group_size", "1"], [SCRIPT], ["-c", check]]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parent)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    mistake, stopped, imported = (
        subprocess.Popen([sys.executable, *line], cwd=tmp_path, env=environment, **pipes)
        for line in lines
    )
    loading = "loading torch and transformers\n"
    assert stopped.stdout.readline() == loading
    stopped.send_signal(signal.SIGINT)
    assert (*stopped.communicate(), stopped.returncode) == ("", "", -signal.SIGINT)
    out, err = mistake.communicate()
    assert (out, err.count("\n"), mistake.returncode) == (loading, 1, 2)
    assert (*imported.communicate(), imported.returncode) == ("", "", 0)
    assert not list(tmp_path.iterdir())


def test_functions_fit_on_a_screen() -> None:
    source = SCRIPT.read_text()
    assert len(source.splitlines()) <= 950
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= (60 if node.name in ("generate", "update", "main") else 40), node.name
            inner = [n.col_offset for n in ast.walk(node) if isinstance(n, ast.stmt)]
            assert max(inner) - node.col_offset <= 4 * 4, f"{node.name} is nested deeper than 3"
