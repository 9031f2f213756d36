"""The command line: what cannot work is said in one line, before a model is loaded; what can is documented by --help.

`cli` runs the script in this process, the way `python R1ZeroTrain.py` does; two tests start real processes.
"""

import ast
import dataclasses
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import get_type_hints

import pytest
import torch
from transformers import AutoModelForCausalLM

import R1ZeroTrain
from prompts import RECIPES
from R1ZeroTrain import Config, parse_config

BOUNDS = {  # smallest and largest value of each option that has any
    name: kind.__metadata__[0]
    for name, kind in get_type_hints(Config, include_extras=True).items()
    if hasattr(kind, "__metadata__")
}

SCRIPT = Path(R1ZeroTrain.__file__)
TYPES = get_type_hints(Config)
NUMBERS = [name for name, kind in TYPES.items() if kind in (int, float)]
TEXTS = [name for name, kind in TYPES.items() if kind is str]
FLAGS = [name for name, kind in TYPES.items() if kind is bool]


@dataclasses.dataclass
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def cli(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Outcome]:
    """Runs the script from an empty directory; loading a model fails the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded")
    )

    def run_script(*arguments: object) -> Outcome:
        capsys.readouterr()
        try:
            code = R1ZeroTrain.run([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse after --help
            code = stop.code
        return Outcome(code, *capsys.readouterr())

    return run_script


def assert_one_line(outcome: Outcome, *mentions: object) -> None:
    """Exit code 2, nothing on stdout, and one line on stderr with all `mentions` and a value that works."""
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("R1ZeroTrain.py: ") and outcome.err.endswith("\n")
    assert len(outcome.err.splitlines()) == 1 and "Traceback" not in outcome.err
    for mention in (*mentions, "try "):
        assert str(mention) in outcome.err


# --- options that cannot work ----------------------------------------------------------------------------------------


def outside(name: str) -> list[float]:
    low, high = BOUNDS[name]
    step = 1 if isinstance(getattr(Config, name), int) else 0.0001
    return [low - step, *([high + step] if math.isfinite(high) else [])]


def test_every_number_has_bounds() -> None:
    assert set(BOUNDS) == set(NUMBERS)


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in NUMBERS for value in outside(name)]
)
def test_a_number_out_of_range_is_refused(
    cli: Callable[..., Outcome], name: str, value: float
) -> None:
    assert_one_line(cli(f"--{name}", value), f"--{name} {value}: ", f"try {getattr(Config, name)}")


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["many", "nan", "inf"])
def test_what_is_no_finite_number_is_refused(
    cli: Callable[..., Outcome], name: str, value: str
) -> None:
    assert_one_line(cli(f"--{name}", value), f"--{name}", value)


@pytest.mark.parametrize("name", ["operand_range", "target_range"])
@pytest.mark.parametrize(
    "values", [("9", "1"), ("0", "9"), ("1", "10001"), ("5",), ("1", "2", "3"), ("1", "x")]
)
def test_a_range_that_is_none_is_refused(
    cli: Callable[..., Outcome], name: str, values: tuple[str, ...]
) -> None:
    assert_one_line(cli(f"--{name}", *values), f"--{name}", values[-1])


def test_ranges_without_a_problem_are_refused(cli: Callable[..., Outcome]) -> None:
    assert_one_line(
        cli("--operand_range", 1, 2, "--target_range", 9000, 9999), "--target_range 9000 9999"
    )
    assert_one_line(cli("--eval_questions", 100_000), "--eval_questions 100000")


@pytest.mark.parametrize("name", ["recipe", "task", "device", "loss", "dtype", "advantage_scale"])
def test_an_unknown_name_is_refused(cli: Callable[..., Outcome], name: str) -> None:
    assert_one_line(cli(f"--{name}", "nonesuch"), f"--{name}", "nonesuch")


def test_a_device_that_this_machine_has_not_is_refused(
    cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    assert_one_line(cli("--device", "cuda"), "--device cuda")
    assert_one_line(cli("--device", "mps"), "--device mps")


def accelerator_of(kind: str) -> SimpleNamespace:
    return SimpleNamespace(
        num_processes=1, is_fsdp2=False, distributed_type=SimpleNamespace(value=kind)
    )


def test_several_processes_have_the_cpu_where_one_has_mps(
    cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    on_cpu: list[bool] = []
    monkeypatch.setattr(
        R1ZeroTrain,
        "Accelerator",
        lambda cpu, **_: on_cpu.append(cpu) or accelerator_of("MULTI_CPU"),
    )
    for processes in ("1", "2"):
        monkeypatch.setenv("WORLD_SIZE", processes)
        R1ZeroTrain.make_accelerator(Config())
    assert on_cpu == [False, True]
    assert_one_line(cli("--device", "mps"), "--device mps", "try cpu")


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_what_would_train_otherwise_than_ddp_and_fsdp2_is_refused(
    cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(R1ZeroTrain, "Accelerator", lambda **_: accelerator_of(kind))
    assert_one_line(cli(), "only DDP and FSDP2", "--fsdp_version 2")


@pytest.mark.parametrize(
    ("arguments", "mention"),
    [
        (["--learning_rate", "1"], "--learning_rate"),
        (
            ["--temp", "1"],
            "--temp",
        ),  # no abbreviations: an option added later could make one ambiguous
        (["stray"], "stray"),
        (["--steps"], "--steps"),
        (["--seed", "1.5"], "1.5"),
    ],
)
def test_a_command_line_that_cannot_be_read_is_refused(
    cli: Callable[..., Outcome], arguments: list[str], mention: str
) -> None:
    assert_one_line(cli(*arguments), mention)


@pytest.mark.parametrize("name", ["recipe", "model", "dataset", "resume"])
def test_a_value_of_several_lines_is_still_reported_in_one(
    cli: Callable[..., Outcome], name: str
) -> None:
    assert_one_line(cli(f"--{name}", "no\nsuch\tthing"), f"--{name}")


# --- models, run directories and datasets that cannot work -----------------------------------------------------------


@pytest.mark.parametrize("model", ["nowhere", "/nowhere/at/all", "./owner/model", "a/b/c", ""])
def test_a_missing_model_folder_is_refused(cli: Callable[..., Outcome], model: str) -> None:
    assert_one_line(cli("--model", model), f"--model {model}", "notebooks/tiny-base")


@pytest.mark.parametrize("part", ["config", "tokenizer", "weights"])
def test_a_model_folder_that_lacks_a_part_is_refused(
    cli: Callable[..., Outcome], tmp_path: Path, tiny_llama: Path, part: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    prefix = "model" if part == "weights" else part
    for path in tiny_llama.iterdir():
        if not path.name.startswith(prefix):
            (folder / path.name).write_bytes(path.read_bytes())
    assert_one_line(cli("--model", folder), f"--model {folder}", f"no {part}")
    assert not (tmp_path / "runs").exists(), "nothing is left behind"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_damaged_model_is_refused(
    cli: Callable[..., Outcome],
    tmp_path: Path,
    tiny_llama: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()  # only loading it shows
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny_llama.iterdir():
        (folder / path.name).write_bytes(path.read_bytes() if path.name != name else b"{ not this")
    outcome = cli("--model", folder, "--run_dir", tmp_path / "run", "--eval_questions", 4)
    assert_one_line(dataclasses.replace(outcome, out=""), f"--model {folder}")


class Evil:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("executed",)


def test_a_model_that_needs_its_own_code_or_a_pickle_is_refused_and_nothing_of_it_run(
    cli: Callable[..., Outcome], tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    with_code, pickled = (
        Path(shutil.copytree(tiny_llama, tmp_path / name)) for name in ("code", "pickle")
    )
    config = json.loads((with_code / "config.json").read_text())
    classes = {
        "AutoConfig": "its_own.Its",
        "AutoModelForCausalLM": "its_own.Its",
        "AutoTokenizer": ["its_own.Its"] * 2,
    }
    (with_code / "config.json").write_text(
        json.dumps(config | {"model_type": "its_own", "auto_map": classes})
    )
    (with_code / "its_own.py").write_text(
        "import os\n\nos.mkdir('executed')\n\n\nclass Its:\n    pass\n"
    )
    (pickled / "model.safetensors").unlink()
    with (pickled / "pytorch_model.bin").open("wb") as file:
        pickle.dump(Evil(), file)
    for folder, mention in (
        (with_code, "custom code"),
        (pickled, "no weights (model*.safetensors*)"),
    ):
        outcome = cli("--model", folder, "--run_dir", tmp_path / "run", "--eval_questions", 4)
        assert_one_line(dataclasses.replace(outcome, out=""), f"--model {folder}", mention)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("below", ["file/run", "/proc/x", "/dev/null/run"])
def test_a_run_directory_that_cannot_be_written_is_refused(
    cli: Callable[..., Outcome], tmp_path: Path, tiny_llama: Path, below: str
) -> None:
    (tmp_path / "file").touch()
    assert_one_line(cli("--model", tiny_llama, "--run_dir", below), f"--run_dir {below}")


def test_a_run_directory_that_is_a_file_is_refused(
    cli: Callable[..., Outcome], tmp_path: Path, tiny_llama: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    assert_one_line(cli("--model", tiny_llama, "--run_dir", "file"), "--run_dir file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_directory_that_holds_a_run_is_refused_and_kept(
    cli: Callable[..., Outcome], tmp_path: Path, tiny_llama: Path
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    files = {"metrics.jsonl": '{"step": 0}\n', "config.json": "{}\n"}
    for name, text in files.items():
        (run_dir / name).write_text(text)
    assert_one_line(
        cli("--model", tiny_llama, "--run_dir", run_dir), f"--run_dir {run_dir}", "--resume"
    )
    assert {path.name: path.read_text() for path in run_dir.iterdir()} == files


def test_resuming_nothing_is_refused(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    assert_one_line(cli("--resume", "nowhere"), "--resume nowhere")
    assert_one_line(cli("--resume", tmp_path), f"--resume {tmp_path}")


@pytest.mark.parametrize(
    "saved", ["", "[1]", "{", '{"steps": "many"}', '{"no_option": 1}', '{"steps": -1}', "\0"]
)
def test_resuming_a_damaged_config_is_refused(
    cli: Callable[..., Outcome], tmp_path: Path, saved: str
) -> None:
    (tmp_path / "config.json").write_text(saved)
    assert_one_line(cli("--resume", tmp_path))


@pytest.mark.parametrize("what", [["--eval_only"], ["--ask", "7 8 = 15"]])
def test_a_run_without_a_checkpoint_has_nothing_to_evaluate_or_to_ask(
    cli: Callable[..., Outcome], tmp_path: Path, tiny_llama: Path, what: list[str]
) -> None:
    saved = json.dumps({"model": str(tiny_llama), "eval_questions": 4})
    (tmp_path / "config.json").write_text(saved)
    assert_one_line(
        cli("--resume", tmp_path, *what), f"--resume {tmp_path}", "no checkpoint", str(tiny_llama)
    )
    assert (tmp_path / "config.json").read_text() == saved


@pytest.mark.parametrize(
    ("task", "row", "column"),
    [
        ("countdown", {"target": 3}, "nums"),
        ("countdown", {"nums": [1, 2]}, "target"),
        ("gsm8k", {"question": "1 + 1?"}, "answer"),
        ("gsm8k", {"text": "1 + 1 = 2"}, "question"),
    ],
)
def test_a_dataset_without_its_columns_is_refused(
    cli: Callable[..., Outcome], tmp_path: Path, tiny_llama: Path, task: str, row: dict, column: str
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(f"{json.dumps(row)}\n" * 20)
    outcome = cli("--model", tiny_llama, "--task", task, "--dataset", rows)
    assert_one_line(outcome, f"--dataset {rows}", column, next(iter(row)))


def test_a_missing_dataset_file_is_refused(cli: Callable[..., Outcome], tiny_llama: Path) -> None:
    assert_one_line(
        cli("--model", tiny_llama, "--dataset", "nowhere.jsonl"), "--dataset nowhere.jsonl"
    )


def test_a_mistake_leaves_no_run_directory_behind(
    cli: Callable[..., Outcome], tmp_path: Path, tiny_llama: Path
) -> None:
    cli("--model", tiny_llama, "--dataset", "nowhere.jsonl")
    cli("--model", tiny_llama, "--eval_questions", 100_000)
    cli("--model", "nowhere")
    assert not list(tmp_path.iterdir())


def test_real_processes_say_the_same(tmp_path: Path) -> None:
    """Two at a time: most of it is importing torch."""
    command = [sys.executable, str(SCRIPT)]
    attempts = {"--group_size 1": ["--group_size", "1"], "--model nowhere": ["--model", "nowhere"]}
    started = [
        subprocess.Popen(
            [*command, *more],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for more in attempts.values()
    ]
    for mention, process in zip(attempts, started, strict=True):
        out, err = process.communicate()
        assert (
            out == "loading torch and transformers\n"
        )  # there before the import, which takes seconds
        assert_one_line(Outcome(process.returncode, "", err), mention)


# --- options that work -----------------------------------------------------------------------------------------------


def test_dashes_work_as_well_as_underscores() -> None:
    for name in NUMBERS:
        value = str(getattr(Config, name))
        assert parse_config([f"--{name.replace('_', '-')}", value]) == parse_config(
            [f"--{name}", value]
        )
    assert parse_config(["--group-size", "4", "--run-dir=x", "--eval-only"]).group_size == 4


def test_flags_need_no_value() -> None:
    for name in FLAGS:
        assert getattr(parse_config([]), name) is False
        assert getattr(parse_config([f"--{name}"]), name) is True


def test_without_options_it_is_the_tiny_recipe() -> None:
    assert parse_config([]) == Config()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_overrides_the_defaults_and_the_command_line_overrides_the_recipe(
    recipe: str,
) -> None:
    cfg = parse_config(["--recipe", recipe])
    words = RECIPES[recipe][1].split()
    options = {
        name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)
    }
    given = {name: type(getattr(Config, name))(value) for name, value in options.items()}
    assert dataclasses.asdict(cfg) == dataclasses.asdict(Config()) | given | {"recipe": recipe}
    mine = {"group_size": 5, "lr": 0.125, "model": "mine", "steps": 7, "run_dir": "here"}
    chosen = parse_config(
        ["--recipe", recipe, *(str(part) for n, v in mine.items() for part in (f"--{n}", v))]
    )
    assert chosen == dataclasses.replace(cfg, **mine)
    default = ["--lr", str(Config.lr), "--steps", str(Config.steps)]
    back = parse_config([*default, "--recipe", recipe])
    assert (back.lr, back.steps) == (Config.lr, Config.steps), (
        "also where it is the default, and comes first"
    )


def test_resume_takes_the_options_of_the_run_and_the_command_line_overrides_them(
    tmp_path: Path,
) -> None:
    saved = dataclasses.replace(
        Config(), recipe="mac", lr=0.25, steps=9, operand_range=[2, 8], run_dir="elsewhere"
    )
    policy = torch.nn.Linear(1, 1)
    R1ZeroTrain.save_checkpoint(tmp_path, 9, policy, torch.optim.AdamW(policy.parameters()), True)
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(saved)))
    here = {"run_dir": str(tmp_path), "resume": str(tmp_path)}
    assert parse_config(["--resume", str(tmp_path)]) == dataclasses.replace(saved, **here)
    assert parse_config(["--resume", str(tmp_path), "--steps", "20"]) == dataclasses.replace(
        saved, **here, steps=20
    )


def test_a_run_goes_on_where_it_is_and_with_its_model(
    cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(Config())))
    assert_one_line(
        cli("--resume", tmp_path, "--run_dir", "elsewhere"),
        "--run_dir elsewhere",
        f"copy of {tmp_path}",
    )
    assert_one_line(
        cli("--resume", tmp_path, "--eval_only", "--model", "another"),
        "--model another",
        Config().model,
    )


def test_help_shows_every_option_with_its_meaning_and_default(
    cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    outcome = cli("--help")
    assert outcome.code == 0 and outcome.err == ""
    entries = {
        entry.split(maxsplit=1)[0].rstrip(","): entry for entry in outcome.out.split("\n  --")
    }
    for field in dataclasses.fields(Config):
        entry = " ".join(entries[field.name].split())
        assert field.metadata["help"] in entry
        assert f"(default: {getattr(Config(), field.name)})" in entry
    for name, (about, _) in RECIPES.items():
        assert f"\n  {name:<11} {about}\n" in outcome.out, (
            "each recipe has a line, with the memory it needs"
        )
        assert " GB, " in about


# --- the file, by the house's rules ----------------------------------------------------------------------------------


def depth(node: ast.AST) -> int:
    """How deep blocks are nested in a statement; an elif lies as deep as its if."""
    blocks = (ast.For, ast.While, ast.If, ast.With, ast.Try)
    deepest = 0
    for name, value in ast.iter_fields(node):
        elif_ = (
            name == "orelse"
            and isinstance(value, list)
            and len(value) == 1
            and isinstance(value[0], ast.If)
        )
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                deepest = max(deepest, depth(child) - elif_)
    return deepest + isinstance(node, blocks)


def functions() -> list[ast.FunctionDef]:
    return [
        node
        for node in ast.walk(ast.parse(SCRIPT.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]


def test_the_script_is_short_enough_to_be_read_to_the_end() -> None:
    assert len(SCRIPT.read_text().splitlines()) <= 750


def test_functions_fit_on_a_screen() -> None:
    long = {
        f.name: f.end_lineno - f.lineno + 1 for f in functions() if f.end_lineno - f.lineno >= 40
    }
    assert (
        set(long) <= {"generate", "sample", "update", "main"}
        and max(long.values(), default=0) <= 75
    ), long


def test_nesting_is_3_deep_at_most() -> None:
    deep = {f.name: depth(f) for f in functions() if depth(f) > 3}
    assert not deep


def test_signatures_are_typed() -> None:
    assert not [f.name for f in functions() if f.returns is None], "no return type"
