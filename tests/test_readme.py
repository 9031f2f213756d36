"""The README is true: links, line numbers, commands, options, messages, and the figures that can be computed.

    uv run tests/test_readme.py

updates the line numbers of links like [`update`](R1ZeroTrain.py#L1), and the computed cells of the tables in TABLES.
"""

import inspect
import json
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import lru_cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # as pytest does

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
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
MODULES = {f"{module.__name__}.py": module for module in (R1ZeroTrain, prompts, rewards)}
LINK = re.compile(r"\[`(\w+)`\]\((\w+\.py)#L\d+\)")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def rows(header: str) -> list[list[str]]:
    """The cells of the table whose header line begins so."""
    _, _, *lines = README[README.index(f"\n{header}") + 1 :].split("\n\n")[0].splitlines()
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
    """(parameters, bytes that autograd keeps of n rows), from tensors that have shapes but no data."""
    config = Qwen2Config(**dict(zip(SHAPE, SHAPES[model])), attn_implementation=attention)
    kept, alive = {}, []
    with FakeTensorMode():
        policy = AutoModelForCausalLM.from_config(config, dtype=torch.float32)

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)  # or another storage would get its address
            return tensor

        ids = torch.zeros(n, length, dtype=torch.long)
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            policy.model(input_ids=ids, use_cache=False)
        for weight in policy.parameters():
            kept.pop(weight.untyped_storage()._cdata, None)
        return sum(weight.numel() for weight in policy.parameters()), sum(kept.values())


def memory(options: str) -> dict[str, float]:
    """GB, as a run with these options plans them."""
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


def recipe_row(name: str, *cells: str) -> list[str]:
    cfg = parse_config(["--recipe", name.strip("`")])
    size = f"{cfg.questions_per_step} x {cfg.group_size} x {cfg.max_new_tokens:,}"
    trained = f"LoRA, rank {cfg.lora_rank}" if cfg.lora_rank else "all weights"
    about = [name, f"`{cfg.model}`", size, f"{cfg.steps:,}", trained]
    if cfg.model not in SHAPES:
        return [*about, *cells[4:]]
    needed = sum(memory(f"--recipe {cfg.recipe}").values())
    assert needed < min(map(float, re.findall(r"(\d+) GB", cells[5])[:1])), name
    return [*about, f"{needed:.0f} GB", cells[5]]


def mac_row(mac: str, options: str, *_: str) -> list[str]:
    plan = memory(options.strip("`"))
    assert sum(plan.values()) < 0.75 * float(mac.split()[0])
    return [mac, options, f"{sum(plan.values()):.0f} GB"]


# The beginning of a table -> what its rows should be, from what they are.
TABLES: dict[str, Callable[..., list[str]]] = {
    "| recipe | policy |": recipe_row,
    "| Mac | options |": mac_row,
}


def updated(text: str) -> str:
    def link(match: re.Match) -> str:
        name, file = match.groups()
        lines = inspect.getsource(MODULES[file]).splitlines()
        (line,) = [i for i, code in enumerate(lines, 1) if re.match(rf"(def|class) {name}\b", code)]
        return f"[`{name}`]({file}#L{line})"

    def needs(match: re.Match) -> str:
        return f"`{match[1]}` needs{match[2]}{sum(memory(match[1]).values()):.0f} GB"

    text = re.sub(r"`(--recipe [^`]+)` needs(\s)\d+ GB", needs, LINK.sub(link, text))
    for header, make in TABLES.items():
        for cells in rows(header):
            text = text.replace(f"| {' | '.join(cells)} |", f"| {' | '.join(make(*cells))} |")
    return text


def test_line_numbers_and_computed_figures_are_true() -> None:
    assert updated(README) == README, "try uv run tests/test_readme.py"
    assert [cells[0].strip("`") for cells in rows("| recipe |")] == list(RECIPES)


# --- links and names -------------------------------------------------------------------------------------------------


def test_links_resolve() -> None:
    headings = re.findall(r"^#+ (.*)$", PROSE, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = [link for link in re.findall(r"\]\(([^)\s]+)", PROSE) if "://" not in link]
    for link in links:
        path, _, anchor = link.partition("#")
        assert (ROOT / path).exists() and (path or anchor in anchors), link


def test_contents_name_every_section() -> None:
    listed = re.findall(r"\[([^\]]+)\]\(#", PROSE.split("\n## ")[0])
    assert listed == re.findall(r"^## (.*)$", PROSE, re.MULTILINE)


def test_the_layout_names_what_each_part_of_the_script_has() -> None:
    code = inspect.getsource(R1ZeroTrain)
    config, *parts = re.split(r"^# ==== Part \d\. (.*?) =+$", code, flags=re.MULTILINE)
    table = rows("| part |")
    assert [title for title, _ in table] == ["Config", *parts[::2]]
    for (_, names), code in zip(table, [config, *parts[1::2]], strict=True):
        for name in named(names):
            assert re.search(rf"^((def|class) {name}\b|{name} =)", code, re.MULTILINE), name


SYMBOLS = r"$q$ $G$ o_i \pi_\theta$ \pi_{\theta_{old}} \pi_{ref} r_i A_i {mean} {std} {clip}"
SYMBOLS += r" \varepsilon \min {KL} \beta {J} \mu"


def test_the_symbols_are_where_the_table_says() -> None:
    table = rows("| symbol |")
    assert all(any(symbol in cells[0] for cells in table) for symbol in SYMBOLS.split())
    for *_, where in table:
        linked = [getattr(MODULES[file], name) for name, file in LINK.findall(where)]
        assert named(where) <= set(re.findall(r"\w+", " ".join(map(inspect.getsource, linked))))


def test_options_in_the_text_exist() -> None:
    others = "--help --cpu --num_processes --machine_rank"
    known = {f"--{field.name}" for field in fields(Config)} | set(others.split())
    codes = [code for code in re.findall(r"`([^`]+)`", PROSE) if not code.startswith("uv run ")]
    found = {option for code in codes for option in re.findall(r"(?<!\S)--\w+", code)}
    assert found <= known


def test_promises_name_tests_that_exist() -> None:
    for promise, tests in rows("| promise |"):
        files = re.findall(r"`(.*?)`", tests)
        assert files and all((ROOT / "tests" / file).exists() for file in files), promise


def test_quoted_messages_are_those_of_the_code() -> None:
    """`"..."` quotes a message, in pieces where … leaves something out."""
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
    """The words of each command, in order."""
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`(uv run [^`]+)`", PROSE)
    words = [shlex.split(line, comments=True) for line in lines]
    return [list(command) for command in dict.fromkeys(map(tuple, words)) if command]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `uv run R1ZeroTrain.py`, after every command of the README has been tried in an empty folder.

    Those that need neither the hub nor GPUs have run with small sizes, the options of the others have been parsed.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("readme"))
        times = iter(["<time>", *"abcdefghijklmnopqrstuvwxyz"])
        patch.setattr(R1ZeroTrain.time, "strftime", lambda _: next(times))
        for block in blocks("yaml"):
            Path(re.match(r"# (\S+)\n", block)[1]).write_text(block)
        project = (ROOT / "pyproject.toml").read_text()
        for command in commands():
            _, _, *words = command  # uv run
            while words[0] in ("--group", "--extra", "--with"):
                assert words[0] == "--with" or f"\n{words[1]} = [" in project
                words = words[2:]
            try_out(words, "math" in command)
        return Path("runs/tiny-<time>").absolute()


def try_out(words: list[str], has_math: bool) -> None:
    program, *options = words
    if program in ("accelerate", "torchrun"):
        program, options = launched(words)
    files = [word for word in (program, *options) if re.search(r"\.(py|ipynb|png)$", word)]
    assert all((ROOT / file).exists() for file in files if file != "dozens.py"), words
    if program == "tests/benchmark.py":
        code = (ROOT / program).read_text()
        for option in re.findall(r"--(\w+)", " ".join(options)):
            assert re.search(rf'"(--)?{option}"', code), option
    if program not in ("R1ZeroTrain.py", "dozens.py") or "--help" in options:
        return

    if program == words[0] and not re.search("recipe|deepscaler|task", " ".join(options)):
        assert R1ZeroTrain.run([*options, *SMALL.split()]) == 0, words
        return
    cfg = parse_config(options)
    assert (cfg.task == "math") == has_math, words
    Path(cfg.run_dir).mkdir(parents=True, exist_ok=True)  # a command that resumes it may follow
    Path(cfg.run_dir, "config.json").write_text(json.dumps(vars(cfg)))


def launched(words: list[str]) -> tuple[str, list[str]]:
    """(script, its options) of a command of torchrun or accelerate launch."""
    if words[0] == "torchrun":
        args = torchrun_parser().parse_args(words[1:])
        return args.training_script, args.training_script_args
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(words[2:]))
    cfg = parse_config(args.training_script_args)
    assert cfg.questions_per_step % args.num_processes == 0 and args.mixed_precision == "no"
    assert args.num_processes == 8 * (args.num_machines or 1)
    return args.training_script, args.training_script_args


def test_commands_work_and_leave_the_documented_files(run_dir: Path) -> None:
    files = {cells[0].strip("`/") for cells in rows("| file of a run |")}
    assert files == {path.name for path in run_dir.iterdir()}
    first, last = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    written = {name for name in first | last if not name.endswith("_interval")}
    explained = set().union(*(named(cells[0]) for cells in rows("| name |")), {"step"})
    assert written == explained
    seen = set().union(*(named(cells[0]) for cells in rows("| what you see |")))
    assert seen <= explained | {field.name for field in fields(Config)}


if __name__ == "__main__":
    (ROOT / "README.md").write_text(updated(README))
