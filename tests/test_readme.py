"""The README is true: its links, line numbers, commands, promises, and every figure that can be computed.

What follows from the code is written into the README by

    uv run tests/test_readme.py

which sets the line numbers anew, and the rows of the tables in TABLES. A link to a line of code names what stands
there: [`update`](R1ZeroTrain.py#L1) is the line of `def update`; in [`ratio`](R1ZeroTrain.py#L1 "ratio = torch.exp")
the title is found on exactly one line of the file.
"""

import ast
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import fields
from functools import lru_cache
from itertools import combinations_with_replacement
from math import ceil
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))  # as pytest does

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from benchmark import Work, limit
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.run import get_args_parser as torchrun_parser
from transformers import AutoModelForCausalLM, Qwen2Config

import R1ZeroTrain
from prompts import RECIPES, countdown_key, is_held_out, reachable_targets, typed
from R1ZeroTrain import Config, parse_config

ROOT = Path(R1ZeroTrain.__file__).parent
PATH = ROOT / "README.md"
README = PATH.read_text()
MODULES = {
    name: (ROOT / name).read_text() for name in ("R1ZeroTrain.py", "rewards.py", "prompts.py")
}
REWRITE = "uv run tests/test_readme.py"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def section(title: str) -> str:
    """The text below a heading of level 2, up to the next one."""
    return README.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def named(text: str) -> list[str]:
    """What stands between backticks."""
    return re.findall(r"`([^`]+)`", text)


def rows(text: str, header: str) -> list[list[str]]:
    """The cells of the table whose header line begins so."""
    lines = text[text.index(f"\n{header}") + 1 :].split("\n\n", 1)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


# --- links and line numbers ------------------------------------------------------------------------------------------

TO_CODE = re.compile(r'\[([^\]]+)\]\((\w+\.py)#L(\d+)(?: "([^"]+)")?\)')


@lru_cache
def definitions(code: str) -> list[tuple[str, int]]:
    kinds = ast.FunctionDef | ast.ClassDef
    return [(node.name, node.lineno) for node in ast.parse(code).body if isinstance(node, kinds)]


def line_of(text: str, name: str, title: str | None) -> int:
    """The number of the line that a link to code means."""
    if title:
        found = [i for i, line in enumerate(MODULES[name].splitlines(), 1) if title in line]
    else:
        found = [line for defined, line in definitions(MODULES[name]) if defined == text.strip("`")]
    assert len(found) == 1, (
        f"{name}: {title or text} stands on the lines {found}, and a link has to name one"
    )
    return found[0]


def with_true_lines(text: str) -> str:
    def link(match: re.Match) -> str:
        label, name, _, title = match.groups()
        return f"[{label}]({name}#L{line_of(label, name, title)}" + (
            f' "{title}")' if title else ")"
        )

    return TO_CODE.sub(link, text)


def test_line_numbers_are_true() -> None:
    links = TO_CODE.findall(README)
    assert len(links) > 40
    wrong = [
        f"{text} is at {name}#L{true}, not #L{number}"
        for text, name, number, title in links
        if int(number) != (true := line_of(text, name, title or None))
    ]
    assert not wrong, f"{wrong}; try {REWRITE}"


def test_the_layout_has_every_section_of_the_script() -> None:
    sections = re.findall(r"^# ---- (.*?) -+$", MODULES["R1ZeroTrain.py"], re.MULTILINE)
    titles = [title for *_, title in TO_CODE.findall(section("How the project is laid out"))]
    assert len(sections) > 5
    assert [f"# ---- {name}" for name in sections] == [
        title for title in titles if title.startswith("# ----")
    ]


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_links_inside_the_repository_resolve() -> None:
    text = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    anchors = {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
    links = [link for link in re.findall(r"\]\(([^)\s]+)", text) if not link.startswith("https://")]
    assert len(links) > 50
    for link in links:
        path, _, anchor = link.partition("#")
        assert (ROOT / path).exists(), link
        assert path or anchor in anchors, link
        assert not path or not anchor or TO_CODE.search(f"[x]({link})"), link
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    for path in {link.partition("#")[0] for link in links} - {""}:  # where it is a clone
        assert not tracked or any(
            name == path or name.startswith(f"{path.rstrip('/')}/") for name in tracked
        ), path


def test_contents_name_every_section() -> None:
    listed = re.findall(r"\[([^\]]+)\]\(#", README.split("\n## ", 1)[0])
    assert listed == re.findall(
        r"^## (.*)$", re.sub(r"```.*?```", "", README, flags=re.DOTALL), re.MULTILINE
    )


def test_lines_are_not_too_long() -> None:
    prose = [line for line in README.splitlines() if not line.startswith("|")]
    assert not [line for line in prose if len(line) > 120]


# --- what is computed ------------------------------------------------------------------------------------------------

# width, inner width, layers, heads, key-value heads, vocabulary, tied: as their config.json on the hub has them
SHAPES = {
    "Qwen/Qwen2.5-0.5B-Instruct": (896, 4864, 24, 14, 2, 151_936, True),
    "Qwen/Qwen2.5-1.5B-Instruct": (1536, 8960, 28, 12, 2, 151_936, True),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": (1536, 8960, 28, 12, 2, 151_936, False),
    "Qwen/Qwen2.5-3B": (2048, 11008, 36, 16, 2, 151_936, True),
    "Qwen2.5-7B": (3584, 18944, 28, 28, 4, 152_064, False),
}
PROMPT = 200  # tokens of a prompt, where a computation needs some
A100 = {
    "operations_per_second": 312e12,
    "bytes_per_second": 2.0e12,
    "kind": "cuda",
}  # bfloat16, its data sheet
M1_MAX = {
    "operations_per_second": 10.4e12,
    "bytes_per_second": 0.4e12,
    "kind": "mps",
}  # float32, its data sheet


def model_of(name: str, attention: str = "sdpa"):
    width, inner, layers, heads, kv_heads, vocabulary, tied = SHAPES[name]
    config = Qwen2Config(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        attn_implementation=attention,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@lru_cache
def parameters(name: str) -> int:
    with torch.device("meta"):
        return sum(weight.numel() for weight in model_of(name).parameters())


@lru_cache
def kept(name: str, size: int, length: int, dtype: str, attention: str) -> int:
    """Bytes that autograd keeps for the backward pass of `size` rows: of tensors that have a shape, but no numbers."""
    seen, held = {}, []
    with FakeTensorMode():
        model = model_of(name, attention)
        own = {weight.untyped_storage()._cdata for weight in model.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if (storage := tensor.untyped_storage())._cdata not in own:
                seen[storage._cdata] = storage.nbytes()
                held.append(tensor)  # so that no other gets its address
            return tensor

        ids = torch.zeros(size, length, dtype=torch.long)
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            model.model(input_ids=ids, use_cache=False)
    return sum(seen.values())


def plan(cfg: Config, attention: str = "sdpa") -> SimpleNamespace:
    """GB that an update needs at most: weights and the like, the sampler's copy, a micro-batch of full length."""
    numbers, length = parameters(cfg.model), PROMPT + cfg.max_new_tokens
    size = max(1, cfg.tokens_per_microbatch // length)
    batch = kept(cfg.model, size, length, cfg.dtype, attention)
    if cfg.gradient_checkpointing:  # the layers' inputs, and what one layer keeps
        width, _, layers, *_ = SHAPES[cfg.model]
        batch = batch / layers + 4 * width * layers * size * length
    parts = {
        "states": (20 if cfg.kl_beta else 16) * numbers,
        "sampler": 2 * numbers * (cfg.dtype == "bfloat16"),
    }
    parts |= {"batch": batch}
    return SimpleNamespace(
        **{name: value / 1e9 for name, value in parts.items()}, all=sum(parts.values()) / 1e9
    )


def least_seconds(cfg: Config, machine: dict) -> float:
    """Seconds that a step takes at least, all completions of full length: tests/benchmark.py's limit."""
    width, inner, layers, heads, kv_heads, vocabulary, _ = SHAPES[cfg.model]
    kv = kv_heads * width // heads
    body = layers * (2 * width * width + 2 * width * kv + 3 * width * inner)
    facts = {
        "body": body,
        "head": width * vocabulary,
        "attention": layers * width,
        "kv": 2 * layers * kv,
    }
    sizes = {
        "questions": cfg.questions_per_step,
        "group": cfg.group_size,
        "new_tokens": cfg.max_new_tokens,
    }
    fixed = {"prompt_tokens": PROMPT, "steps": 1, "device": "", "options": {}, "trl_rows": 0}
    work = Work("", "", **sizes, **fixed, dtype=cfg.dtype, trl_checkpointing=False)
    facts |= {"prompt": PROMPT} | machine
    questions = max(1, cfg.rollout_rows // cfg.group_size)  # that are sampled at once
    part = Work(**vars(work) | {"questions": questions})
    return (
        ceil(work.questions / questions) * limit(facts, part)["sampling"]
        + limit(facts, work)["update"]
    )


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def recipe_rows() -> list[str]:
    found = []
    for name in RECIPES:
        cfg = parse_config(["--recipe", name])
        size = f"{cfg.questions_per_step} x {cfg.group_size} x {cfg.max_new_tokens:,}"
        about = (f"`{name}`", f"`{cfg.model}`", size, f"{cfg.steps:,}")
        if cfg.model in SHAPES:
            needs = plan(cfg)
            parts = f"{needs.states:.0f} + {needs.sampler:.0f} + {needs.batch:.0f} = **{needs.all:.0f} GB**"
            found.append(row(*about, parts, f"{least_seconds(cfg, A100):,.0f} s"))
        else:
            found.append(row(*about, "**1.4 GB**, measured", "3.5 s, measured on 2 CPU cores"))
    return found


MACS = {
    "16 GB": "--recipe mac --kl_beta 0",
    "32 GB": "--recipe mac --group_size 16 --max_new_tokens 1024 --tokens_per_microbatch 1024",
    "64 GB": "--recipe gsm8k --dtype float32",
}


def mac_rows() -> list[str]:
    found = []
    for memory, options in MACS.items():
        cfg = parse_config(options.split())
        needs = plan(cfg, "eager")
        parts = f"{needs.states:.1f} + {needs.batch:.1f} = **{needs.all:.0f} GB**"
        found.append(row(memory, f"`{options}`", parts, f"{least_seconds(cfg, M1_MAX):.0f} s"))
    return found


COMPARED = {
    "0.5B": "Qwen/Qwen2.5-0.5B-Instruct",
    "1.5B": "Qwen/Qwen2.5-1.5B-Instruct",
    "7B": "Qwen2.5-7B",
}
NVLINK, ETHERNET = 300e9, 25e9 / 8  # bytes/s


def communication_rows() -> list[str]:
    """Bytes that each of 8 devices sends, and seconds: of 8 on NVLink, of 16 in two machines on Ethernet."""
    found = []
    for label, name in COMPARED.items():
        width, *_, vocabulary, _ = SHAPES[name]
        every, head = (
            parameters(name),
            width * vocabulary + width,
        )  # the head and its norm are gathered once, and kept
        sizes = {
            "DDP": 2 * 4 * every,  # float32 gradients are scattered and gathered
            "sampler": 2 * every,  # bfloat16
            "policy": 2 * every
            + 2 * (every - head)
            + 4 * every,  # forward, backward, float32 gradients
            "reference": 2 * (every - head),
        }

        def cell(size: int) -> str:
            eight, sixteen = size * 7 / 8, size * 15 / 16
            return f"{eight / 1e9:.1f} GB: {eight / NVLINK:.2f} s, {sixteen / ETHERNET:.1f} s"

        found.append(row(f"{label}, {every / 1e6:,.0f} M", *map(cell, sizes.values())))
    return found


def device_rows() -> list[str]:
    """GB on each of 8 devices before a micro-batch, with beta 0 and bfloat16."""
    found = []
    for label, name in COMPARED.items():
        numbers = parameters(name) / 1e9
        found.append(row(label, f"{18 * numbers:.0f} GB", f"{(16 / 8 + 2) * numbers:.0f} GB"))
    return found


TABLES: dict[str, Callable[[], list[str]]] = {  # the beginning of a table's first line -> its rows
    "| recipe | policy |": recipe_rows,
    "| Mac | options |": mac_rows,
    "| parameters | DDP, a step |": communication_rows,
    "| parameters | each device with DDP |": device_rows,
}


def with_true_tables(text: str) -> str:
    for header, make in TABLES.items():
        start = text.index(f"\n{header}") + 1
        head, rest = text[start:].split("\n\n", 1)
        first, rule, *_ = head.splitlines()
        text = text[:start] + "\n".join([first, rule, *make()]) + "\n\n" + rest
    return text


@pytest.mark.parametrize("header", TABLES)
def test_what_is_computed_is_true(header: str) -> None:
    true, written = TABLES[header](), [row(*cells) for cells in rows(README, header)]
    assert written == true, f"the rows are {true}; try {REWRITE}"


def test_help_and_readme_agree_on_memory() -> None:
    """--help has round figures."""
    for name, (about, _) in RECIPES.items():
        cfg, said = parse_config(["--recipe", name]), float(re.search(r"([\d.]+) GB", about)[1])
        needs = plan(cfg).all if cfg.model in SHAPES else 1.4
        assert 0.8 * said <= needs <= 1.2 * said, f"{name}: {needs:.1f} GB, and --help says {said}"


def test_what_the_text_says_of_memory_is_true() -> None:
    def needs(options: str) -> str:
        return f"needs {plan(parse_config(options.split())).all:.0f} GB"

    said = " ".join(README.split())
    assert f"8,192 tokens of a vocabulary of 151,936 are {4 * 8192 * 151_936 / 1e9:.0f} GB" in said
    assert f"fetches a model of {2 * parameters('Qwen/Qwen2.5-0.5B-Instruct') / 1e9:.0f} GB" in said
    assert f"`tinyzero` {needs('--recipe tinyzero --gradient_checkpointing')}" in said
    least = "--kl_beta 0 --gradient_checkpointing"
    assert f"`{least}` it still {needs(f'--recipe gsm8k {least}')}" in said


def test_what_the_text_says_of_the_problems_is_true() -> None:
    every = combinations_with_replacement(range(1, 10), 3)
    problems = [
        (list(x), target)
        for x in every
        for target in reachable_targets(list(x))
        if 1 <= target <= 99
    ]
    assert len(problems) == len({countdown_key(*problem) for problem in problems})
    training = sum(not is_held_out(*problem) for problem in problems)
    layout = section("How the project is laid out")
    assert (
        f"There are {len(problems):,} such problems" in layout
        and f"{round(training, -2):,} training" in layout
    )


def test_the_default_runs_table_is_possible_and_as_its_study_demands() -> None:
    """The figures themselves are made anew by `uv run pytest -m study`, which has these bounds."""
    runs = rows(README, "| seed | pass@1 before")
    assert [cells[0] for cells in runs] == ["0", "1", "2"]
    for _, before, after, first, last, *_ in runs:
        for cell in (before, after):
            mean, low, high = map(float, re.findall(r"[\d.]+", cell))
            assert low <= mean <= high
        assert float(before.split()[0]) <= 0.35 and float(after.split()[0]) >= 0.75
        assert float(last) >= 1.5 * float(first)


# --- commands --------------------------------------------------------------------------------------------------------

SIZES = {
    "steps": 1,
    "questions_per_step": 2,
    "group_size": 2,
    "max_new_tokens": 8,
    "eval_questions": 4,
}
SMALL = [*typed(SIZES), "--device", "cpu"]


def commands() -> list[str]:
    """Each command of the README once, without comments: the lines of its sh blocks, and what its text has in `...`."""
    lines = [line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
    text = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    lines += [
        code
        for code in named(text)
        if code.startswith("uv run ") and not code.endswith("--extra math")
    ]
    words = [shlex.split(line, comments=True) for line in lines]
    return list(
        dict.fromkeys(
            " ".join(shlex.quote(w) if " " in w else w for w in line) for line in words if line
        )
    )


def script_words(command: str) -> list[str] | None:
    """What stands behind `uv run [--extra math] R1ZeroTrain.py`; None if it is another command."""
    match = re.fullmatch(r"uv run (?:--extra math )?R1ZeroTrain\.py(.*)", command)
    return shlex.split(match[1]) if match else None


# What needs nothing from the hub is really run, here or by the test that is named; of the rest the options are parsed.
RUN_HERE = [
    "uv run R1ZeroTrain.py",
    "uv run R1ZeroTrain.py --resume runs/tiny-<time> --ask '8 7 4 = 36'",
    "uv run R1ZeroTrain.py --resume runs/tiny-<time>",
    "uv run R1ZeroTrain.py --eval_only --model runs/tiny-<time>/model --eval_samples 8",
]
RUN_ELSEWHERE = {
    "uv run pytest": ".ci/run",
    "uv run pytest -m study": "test_the_default_run_learns_what_the_readme_says",
    "uv run --group notebook jupyter lab notebooks/walkthrough.ipynb": "test_it_runs_and_prints_what_is_kept",
    "uv run --group notebook notebooks/plot_runs.py runs/a runs/b runs/c notebooks/default-run.png": (
        "test_finished_runs_are_plotted"
    ),
    "uv run notebooks/grow_tiny_base.py": "test_the_shipped_tokenizer_is_the_one_the_script_makes",
    "uv run R1ZeroTrain.py --help": "test_help_shows_every_option_with_its_meaning_and_default",
    "uv run dozens.py --task dozens --model Qwen/Qwen2.5-0.5B-Instruct": "test_the_readmes_own_task_runs_as_it_stands",
    "uv run torchrun --nproc_per_node 2 R1ZeroTrain.py --device cpu": "test_processes_train_as_one_does",
    REWRITE: "test_rewriting_changes_nothing_that_is_true",
}
PARSED = [  # they need the hub, GPUs, TRL or minutes
    *(
        command
        for command in commands()
        if script_words(command) and command not in [*RUN_HERE, *RUN_ELSEWHERE]
    ),
    *(command for command in commands() if command.startswith("uv run accelerate launch ")),
    "uv run --with trl tests/benchmark.py",
    "uv run tests/benchmark.py --flatness",
    "uv run tests/benchmark.py --device cuda --shape 0.5b --dtype bfloat16",
    "uv run tests/benchmark.py --device mps --shape 0.5b --questions 4 --new_tokens 300 --tokens_per_microbatch 512",
]


def names_of_tests() -> set[str]:
    texts = {path.name: path.read_text() for path in Path(__file__).parent.glob("*.py")}
    return {
        *texts,
        *(
            name
            for text in texts.values()
            for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)
        ),
    }


def test_every_command_is_checked_somehow() -> None:
    known = [*RUN_HERE, *RUN_ELSEWHERE, *PARSED]
    assert sorted(known) == sorted(set(known)), "each is checked in one way"
    assert set(commands()) == set(known)
    for command, test in RUN_ELSEWHERE.items():
        assert test == ".ci/run" or test in names_of_tests()
        assert test != ".ci/run" or command in (ROOT / test).read_text().splitlines()


def test_what_uv_is_asked_for_exists() -> None:
    for command in commands():
        assert command.startswith("uv run ")
        for name in re.findall(r"--group (\S+)", command):
            assert name in PROJECT["dependency-groups"]
        for name in re.findall(r"--extra (\S+)", command):
            assert name in PROJECT["project"]["optional-dependencies"]
        made = ("dozens.py", "runs/", *yamls())
        for word in shlex.split(command):
            if re.search(r"\.(py|ipynb|png|yaml)$", word) and not word.startswith(made):
                assert (ROOT / word).exists(), command


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """What each command of RUN_HERE printed, run in this order in an empty folder, and the folder of the run."""
    said = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("readme"))
        for command in RUN_HERE:
            run_dir = next(Path("runs").glob("tiny-*"), Path("none"))
            words = [word.replace("tiny-<time>", run_dir.name) for word in script_words(command)]
            if command == RUN_HERE[0]:
                words += SMALL
            elif "--eval_only" in words:
                patch.setattr(R1ZeroTrain.time, "strftime", lambda _: "20250101-000000")
                words += SMALL[2:]
            said[command] = R1ZeroTrain.run(words)
        return SimpleNamespace(codes=said, run_dir=run_dir.resolve())


def test_commands_that_need_no_hub_run(ran: SimpleNamespace) -> None:
    assert ran.codes == dict.fromkeys(RUN_HERE, 0)


def test_the_files_of_a_run_and_their_names_are_explained(ran: SimpleNamespace) -> None:
    files = {cells[0].strip("`/") for cells in rows(section("The files of a run"), "| file |")}
    assert files == {path.name for path in ran.run_dir.iterdir()}
    explained = {
        name
        for cells in rows(section("The files of a run"), "| name |")
        for name in named(cells[0])
    }
    lines = [json.loads(line) for line in (ran.run_dir / "metrics.jsonl").read_text().splitlines()]
    written = {name for line in lines for name in line if not name.endswith("_interval")} - {"step"}
    assert explained - {"<name>_interval"} == written


def test_options_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in PARSED:
        if (words := script_words(command)) is None:
            continue
        cfg = parse_config(words)
        assert (cfg.task == "math") == ("--extra math" in command), command
        run_dir = Path(cfg.run_dir or "runs/one")
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.json").write_text(json.dumps(vars(cfg)))  # for a --resume that follows


def yamls() -> dict[str, str]:
    """The files that the README asks to be written, by the name in their first line."""
    return {re.match(r"# (\S+\.yaml)\n", block)[1]: block for block in blocks("yaml")}


def test_launch_commands_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in yamls().items():
        Path(name).write_text(text)
        assert yaml.safe_load(text)["compute_environment"] == "LOCAL_MACHINE"
    launched, used = [command for command in PARSED if "accelerate launch" in command], set()
    assert len(launched) >= 5
    for command in launched:
        words = shlex.split(command)[4:]
        args, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
        assert args.training_script == "R1ZeroTrain.py"
        cfg = parse_config(args.training_script_args)
        assert cfg.questions_per_step % args.num_processes == 0, f"{command}: would be refused"
        assert args.mixed_precision == "no"
        if args.config_file:
            used.add(args.config_file)
            assert args.num_processes == 8 * args.num_machines
            assert args.machine_rank in range(args.num_machines)
            assert args.num_machines == 1 or (args.main_process_ip and args.main_process_port)
        assert not args.use_fsdp or int(args.fsdp_version) == 2
    assert used == set(yamls())
    for command in commands():
        if "torchrun" in command:
            args = torchrun_parser().parse_args(shlex.split(command)[3:])
            parse_config(args.training_script_args)
            assert (ROOT / args.training_script).exists()


def test_the_benchmarks_options_exist() -> None:
    shown = subprocess.run(
        [sys.executable, "tests/benchmark.py", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    offered = dict(re.findall(r"\[(--\w+) ?(.*?)\]", shown.stdout))
    for command in PARSED:
        if "tests/benchmark.py" in command:
            for option, value in re.findall(
                r"(--\w+) ?([^-\s]\S*)?", command.partition("tests/benchmark.py")[2]
            ):
                kind = offered[option]  # "" of a flag, {a,b} of choices, else a name
                assert value in kind.strip("{}").split(",") or (
                    kind.isupper() and value.isdigit()
                ), option


def test_options_named_in_the_text_exist() -> None:
    others = {
        "--help",
        "--use_fsdp",
        "--fsdp_version",
        "--num_processes",
        "--machine_rank",
        "--config_file",
    }
    known = {f"--{field.name}" for field in fields(Config)} | others
    text = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    codes = [code for code in named(text) if not code.startswith(("uv ", "accelerate "))]
    found = {word for code in codes for word in re.findall(r"(?<![\w-])--\w+", code)}
    assert len(found) > 25
    assert found <= known, found - known
    for code in codes:  # an option with its values is one that works
        if (
            re.match(r"--\w+ \S", code)
            and "…" not in code
            and not re.search(r"runs/|[A-Z]\b|others", code)
        ):
            words = shlex.split(code)
            if words[0] in known - others:
                parse_config(words)


# --- what is promised, and what is said ------------------------------------------------------------------------------


def test_promises_name_tests_that_exist() -> None:
    promises = rows(README, "| promise |")
    assert len(promises) >= 20
    for promise, tests in promises:
        assert named(tests), promise
        for name in named(tests):
            assert name in names_of_tests(), name


def test_what_is_quoted_from_the_log_is_what_the_code_says() -> None:
    """In the troubleshooting table, `"..."` quotes a message: piece by piece, where … leaves something out."""
    code = "".join(
        re.sub(r'"\n\s*f?"', "", text) for text in MODULES.values()
    )  # strings that go on in the next line
    quotes = re.findall(r'`"([^`]+)"`', section("Troubleshooting"))
    assert len(quotes) >= 6
    for quote in quotes:
        for piece in quote.split("…"):
            assert piece.strip() in code, quote


def test_names_in_the_troubleshooting_are_in_the_log() -> None:
    explained = {
        name
        for cells in rows(section("The files of a run"), "| name |")
        for name in named(cells[0])
    }
    fields_of = {field.name for field in fields(Config)}
    for cells in rows(section("Troubleshooting"), "| what you see |"):
        names = [name for name in named(cells[0]) if re.fullmatch(r"[a-z_@0-9]+", name)]
        assert set(names) <= explained | fields_of | {"step"}, cells[0]


def test_the_citation_invents_nothing() -> None:
    (entries,) = blocks("bibtex")
    assert {"2501.12948", "2402.03300"} <= set(re.findall(r"eprint\s*= \{([\d.]+)\}", entries))
    holder = re.search(r"Copyright \(c\) (\d+) (.*)", (ROOT / "LICENSE").read_text())
    own = entries.split("\n\n")[0]
    assert holder[1] in own and holder[2] in own and "http" not in own
    assert entries.count("{") == entries.count("}")


def test_symbols_of_the_equations_are_all_there() -> None:
    symbols = " ".join(cells[0] for cells in rows(README, "| symbol |"))
    wanted = [
        "pi_\\theta",
        "pi_{\\theta_{old}}",
        "pi_{ref}",
        "A_i",
        "r_i",
        "$G$",
        "$q$",
        "o_i",
        "varepsilon",
        "beta",
    ]
    for symbol in [*wanted, "D}_{KL}", "mathrm{mean}", "mathrm{std}", "min", "clip"]:
        assert symbol in symbols, symbol


def test_rewriting_changes_nothing_that_is_true() -> None:
    assert with_true_tables(with_true_lines(README)) == README, f"try {REWRITE}"


def test_a_moved_line_and_a_wrong_figure_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODULES, "R1ZeroTrain.py", "\n" + MODULES["R1ZeroTrain.py"])
    moved = with_true_lines(README)
    old, new = (
        [int(number) for *_, number, _ in TO_CODE.findall(text)] for text in (README, moved)
    )
    shifts = {b - a for a, b in zip(old, new, strict=True)}
    assert shifts <= {0, 1} and 1 in shifts
    assert with_true_tables(README.replace("**1.4 GB**", "**1.3 GB**")) == README


if __name__ == "__main__":
    PATH.write_text(with_true_tables(with_true_lines(README)))
    print(f"{PATH.name}: line numbers and {len(TABLES)} tables are those of the code")
