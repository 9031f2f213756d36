"""Checks the README: links, line numbers, commands, options, messages, and the figures that can be computed.

    uv run --group dev tests/test_readme.py

updates the line numbers of links like [`update`](R1ZeroTrain.py#L1), the lengths of the files, and the computed
cells of the tables in TABLES.
"""

import inspect
import json
import re
import shlex
import sys
import tomllib
from collections.abc import Callable
from dataclasses import fields
from functools import lru_cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # as pytest does

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.run import get_args_parser as torchrun_parser
from transformers import AutoModelForCausalLM, Qwen2Config

import prompts
import R1ZeroTrain
import rewards
from R1ZeroTrain import RECIPES, Config, memory_plan, parse_config

ROOT = Path(R1ZeroTrain.__file__).parent
README = (ROOT / "README.md").read_text()
PROSE = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
CELLS = json.loads((ROOT / "notebooks" / "walkthrough.ipynb").read_text())["cells"]
NOTEBOOK = "\n\n".join("".join(c["source"]) for c in CELLS if c["cell_type"] == "markdown")
MODULES = {f"{module.__name__}.py": module for module in (R1ZeroTrain, prompts, rewards)}
LINK = re.compile(r"\[`(\w+)`\]\((\w+\.py)#L\d+\)")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def rows(header: str, text: str = README) -> list[list[str]]:
    """The cells of the table whose header line begins with `header`."""
    _, _, *lines = text[text.index(f"\n{header}") + 1 :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def named(text: str) -> set[str]:
    return set(re.findall(r"`([\w@]+)`", text))


# --- computed figures ------------------------------------------------------------------------------------------------

# As in the config.json of the models.
SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SHAPE += ("num_key_value_heads", "vocab_size", "tie_word_embeddings")
SHAPES = {
    "Qwen/Qwen2.5-0.5B-Instruct": (896, 4864, 24, 14, 2, 151_936, True),
    "Qwen/Qwen2.5-1.5B-Instruct": (1536, 8960, 28, 12, 2, 151_936, True),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": (1536, 8960, 28, 12, 2, 151_936, False),
    "Qwen/Qwen2.5-3B": (2048, 11008, 36, 16, 2, 151_936, True),
    "Qwen/Qwen2.5-7B-Instruct": (3584, 18944, 28, 28, 4, 152_064, False),
}
PROMPT = 200  # tokens


@lru_cache
def measured(model: str, n: int, length: int, dtype: str, attention: str) -> tuple[int, int]:
    """(parameters, bytes that autograd keeps for n rows), from tensors that have shapes but no data."""
    config = Qwen2Config(**dict(zip(SHAPE, SHAPES[model])), attn_implementation=attention)
    kept, alive = {}, []
    with FakeTensorMode():
        policy = AutoModelForCausalLM.from_config(config, dtype=torch.float32)

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)  # otherwise another storage could get its address
            return tensor

        ids = torch.zeros(n, length, dtype=torch.long)
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            policy.model(input_ids=ids, use_cache=False)
        for weight in policy.parameters():
            kept.pop(weight.untyped_storage()._cdata, None)
        return sum(weight.numel() for weight in policy.parameters()), sum(kept.values())


def memory(options: str) -> dict[str, float]:
    """The memory plan of a run with these options, in GB."""
    cfg = parse_config(options.split())
    return memory_plan(Qwen2Config(**dict(zip(SHAPE, SHAPES[cfg.model]))), cfg, PROMPT)


@pytest.mark.parametrize("recipe", ["mac", "gsm8k", "7b", "tinyzero", "deepscaler"])
@pytest.mark.parametrize("more", ["", " --dtype float32", " --lora_rank 0"])
def test_a_planned_micro_batch_is_about_what_autograd_keeps(recipe: str, more: str) -> None:
    options = f"--recipe {recipe} --gradient_checkpointing false{more}"
    cfg = parse_config(options.split())
    length = PROMPT + cfg.max_new_tokens
    rows = max(1, cfg.tokens_per_microbatch // length)
    parameters, kept = measured(cfg.model, rows, length, cfg.dtype, "sdpa")
    plan = memory(options)
    assert 0.75 < plan["micro-batch"] / (kept / 1e9) < 1.6
    if not cfg.lora_rank:
        assert plan["weights"] == pytest.approx(4e-9 * parameters)


def hardware_row(have: str, command: str, model: str, memory_cell: str) -> list[str]:
    """Nearly all memory of a GPU is free. That of a Mac is shared with the rest of the system."""
    cfg = parse_config(script(command.strip("`"))[1])
    assert ("LoRA" in model) == bool(cfg.lora_rank)
    if cfg.model not in SHAPES:
        return [have, command, model, memory_cell]
    assert model.split(",")[0] in cfg.model
    needed = sum(memory(" ".join(script(command.strip("`"))[1])).values())
    for kind, size in re.findall(r"(GPUs?|Mac) (\d+) GB", have):
        assert needed < float(size) * (0.75 if kind == "Mac" else 0.95), command
    return [have, command, model, f"{needed:.0f} GB"]


def benchmark_row(model: str, step: str, *figures: str) -> list[str]:
    s, s_trl, _, gb, gb_trl, _ = map(float, figures)
    ratios = f"{s_trl / s:.1f}", f"{gb_trl / gb:.1f}"
    return [model, step, *figures[:2], ratios[0], *figures[3:5], ratios[1]]


# The start of a table -> a function from the cells of a row to what they should be.
TABLES: dict[str, Callable[..., list[str]]] = {
    "| you have |": hardware_row,
    "| model |": benchmark_row,
}


def updated(text: str) -> str:
    def link(match: re.Match) -> str:
        name, file = match.groups()
        lines = inspect.getsource(MODULES[file]).splitlines()
        defined = rf"(def|class) {name}\b|{name} ="
        (line,) = [i for i, code in enumerate(lines, 1) if re.match(defined, code)]
        return f"[`{name}`]({file}#L{line})"

    def length(match: re.Match) -> str:
        return f"{match[1]}{len((ROOT / match[2]).read_text().splitlines())} lines"

    text = LINK.sub(link, text)
    text = re.sub(r"(\[`(\w+\.py)`\]\(\2\)[^`]*?)\b\d+ lines", length, text)
    for header, make in TABLES.items():
        for cells in rows(header):
            text = text.replace(f"| {' | '.join(cells)} |", f"| {' | '.join(make(*cells))} |")
    return text


def test_line_numbers_and_computed_figures_are_true() -> None:
    assert updated(README) == README, "try uv run --group dev tests/test_readme.py"
    recipes = [
        parse_config(script(cells[1].strip("`"))[1]).recipe for cells in rows("| you have |")
    ]
    assert set(recipes) == set(RECIPES)


def test_the_completions_shown_are_graded_as_stated() -> None:
    """Two columns of text: before training and after."""
    (shown,) = blocks("text")
    question, _, titles, *lines = shown.splitlines()
    width = titles.index("after")
    numbers, target = re.search(r"\[(.*?)\].* equals (\d+)\.", question).groups()
    answer = {"numbers": [int(n) for n in numbers.split(",")], "target": int(target)}
    for column, right in ((slice(width), 0), (slice(width, None), 1)):
        text = "\n".join(line[column].rstrip() for line in lines).strip()
        assert rewards.countdown_reward(text, **answer) == right
        for a, operation, b, result in re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", text):
            assert eval(f"{a} {operation} {b} == {result}")


def test_the_drawing_computes_the_advantages_of_its_rewards() -> None:
    (drawing,) = blocks("mermaid")
    shown = dict(re.findall(r"<b>(\w+)</b><br>([-\d.<br>]+)\"", drawing))
    given, wanted = ([float(x) for x in shown[k].split("<br>")] for k in ("rewards", "advantages"))
    advantages = R1ZeroTrain.group_advantages(torch.tensor([given]))
    assert advantages.tolist() == pytest.approx(wanted, abs=0.005)
    for name in re.findall(r"-->\|(\w+)\|", drawing):
        assert hasattr(R1ZeroTrain, name)


def test_the_defaults_beside_those_of_trl_are_ours() -> None:
    compared = 0
    for _, _, here, default in rows("| TRL |"):
        ours = [str(getattr(Config, name)) for name in re.findall(r"--(\w+)", here)]
        if default:
            assert default.split("; ") == list(dict.fromkeys(ours)), here
            compared += len(ours)
    assert compared > 10


# --- links and names -------------------------------------------------------------------------------------------------


def test_links_resolve() -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)", PROSE) if "://" not in link]
    assert links and all((ROOT / link.partition("#")[0]).exists() for link in links)


def test_the_parts_of_the_script_are_named_in_order() -> None:
    code = inspect.getsource(R1ZeroTrain)
    titles = re.findall(r"^# ==== Part \d\. (.*?) =+$", code, re.MULTILINE)
    assert re.findall(r"\*([A-Z][a-z ]+)\*", PROSE.replace("**", "")) == titles
    assert "Section 12 of the [notebook]" in PROSE and "\n## 12. Look at any run" in NOTEBOOK


SYMBOLS = r"$q$ $G$ o_i \pi_\theta, \pi_{\theta_{old}} \pi_{ref} r_i A_i \rho_{i,t}"
SYMBOLS += r" {clip} \min {KL} \beta \varepsilon"


def test_the_symbols_are_where_the_table_says() -> None:
    table = rows("| symbol |")
    assert all(any(symbol in cells[0] for cells in table) for symbol in SYMBOLS.split())
    for *_, where in table:
        linked = [getattr(MODULES[file], name) for name, file in LINK.findall(where)]
        assert named(where) <= set(re.findall(r"\w+", " ".join(map(inspect.getsource, linked))))


def test_options_in_the_text_exist() -> None:
    others = "--help --nnodes --node_rank --master_addr --master_port --extra"
    known = {f"--{field.name}" for field in fields(Config)} | set(others.split())
    codes = [code for code in re.findall(r"`([^`]+)`", PROSE) if not code.startswith("uv run ")]
    found = {option for code in codes for option in re.findall(r"(?<!\S)--\w+", code)}
    assert found <= known


def test_quoted_messages_are_those_of_the_code() -> None:
    """`"..."` quotes a message; … stands for what is left out."""
    code = "".join(inspect.getsource(module) for module in MODULES.values())
    code = re.sub(r'"\n\s*f?"', "", code)  # strings over several lines
    quotes = re.findall(r'`"([^`]+)"`', PROSE)
    assert quotes
    for piece in "…".join(quotes).split("…"):
        assert piece.strip() in code


# --- commands --------------------------------------------------------------------------------------------------------

SMALL = "--device cpu --steps 1 --questions_per_step 2 --group_size 2 --max_new_tokens 8"
SMALL += " --eval_questions 4"


def commands() -> list[list[str]]:
    """The words of each command, in the order of the page. There are no comments: zsh on a Mac refuses them."""
    shell = re.compile(r"^```sh\n(.*?)^```$|`(uv run [^`]+)`", re.MULTILINE | re.DOTALL)
    found = ["".join(groups) for groups in shell.findall(README)]
    words = [shlex.split(line) for text in found for line in text.splitlines()]
    return [list(command) for command in dict.fromkeys(map(tuple, words)) if command]


def script(command: str) -> tuple[str, list[str]]:
    """(program, its options) of a `uv run` command, also if torchrun starts the program."""
    _, _, *words = shlex.split(command)
    while words[0] in ("--group", "--extra", "--with"):
        words = words[2:]
    if words[0] == "torchrun":
        args = torchrun_parser().parse_args(words[1:])
        cfg = parse_config(args.training_script_args)
        assert cfg.questions_per_step % int(args.nproc_per_node) == 0
        return args.training_script, args.training_script_args
    return words[0], words[1:]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tries every command of the README in an empty folder, and returns the run of the first one.

    Commands that need neither the hub nor GPUs run with small sizes. Of the others, only the options are parsed.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("readme"))
        for words in commands():
            try_out(words)
        return Path("runs/first").absolute()


# What a command needs besides the libraries of a run.
NEEDS = {"jupyter": "notebook", "pytest": "dev", "ruff": "dev", "tests/test_readme.py": "dev"}


def try_out(words: list[str]) -> None:
    program, options = script(shlex.join(words))
    assert words[:2] == ["uv", "run"], words
    groups = {word for flag, word in zip(words, words[1:]) if flag in ("--group", "--extra")}
    project = (ROOT / "pyproject.toml").read_text()
    assert all(f"\n{group} = [" in project for group in groups)
    files = [word for word in (program, *options) if re.search(r"\.(py|ipynb)$", word)]
    assert all((ROOT / file).exists() for file in files if file != "dozens.py"), words
    if program == "tests/benchmark.py":
        code = (ROOT / program).read_text()
        for option in re.findall(r"--(\w+)", " ".join(options)):
            assert re.search(rf'"(--)?{option}"', code), option
    if program not in ("R1ZeroTrain.py", "dozens.py") or "--help" in options:
        assert groups == {NEEDS[program]} if program in NEEDS else not groups, words
        return

    if not re.search("recipe|task", " ".join(options)):
        assert R1ZeroTrain.run([*options, *SMALL.split()]) == 0, words
        return
    cfg = parse_config(options)
    assert ("lora" in groups) == bool(cfg.lora_rank) and ("math" in groups) == (cfg.task == "math")


def test_a_run_installs_only_what_it_needs() -> None:
    """Tests, notebook, LoRA and the math task need more, which `uv run` does not install unasked."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    names = {re.match(r"[\w-]+", each)[0] for each in project["project"]["dependencies"]}
    assert names == {"torch", "transformers", "accelerate", "datasets", "tqdm", "wandb"}
    assert project["tool"]["uv"]["default-groups"] == []


def test_commands_work_and_leave_the_documented_files(run_dir: Path) -> None:
    assert {f"`{path.name}`" for path in run_dir.iterdir()} <= set(re.findall(r"`\S+`", PROSE))
    lines = list(map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()))
    written = {name for name in set().union(*lines) if not name.endswith("_interval")}
    explained = set().union(*(named(cells[0]) for cells in rows("| metric |", NOTEBOOK)), {"step"})
    assert len(lines) == 2 and written == explained
    seen = set().union(*(named(cells[0]) for cells in rows("| what you see |")))
    assert seen <= explained | {field.name for field in fields(Config)}


if __name__ == "__main__":
    (ROOT / "README.md").write_text(updated(README))
