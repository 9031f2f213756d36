"""What goes into a run: the prompt templates, the Countdown generator, the datasets, `TASKS`, which ties each kind of
question to the reward that grades it, a model's files, the recipes and the command line.

A question is a plain dict, `{"question": text, "answer": keyword arguments of the task's reward}`: for Countdown
`{"numbers": [44, 19, 35], "target": 98}`, for GSM8K `{"gold": "18"}`. `load_questions` is the way in for training. To
train on a task of your own, put it into TASKS in a file of your own, and call R1ZeroTrain.run there:

    def double(rng):
        number = rng.randrange(10_000)
        return {"question": f"Twice {number}? Answer in <answer> </answer>.", "answer": {"gold": str(2 * number)}}

    prompts.TASKS["double"] = prompts.Task(rewards.gsm8k_reward, generate=double)
    sys.exit(R1ZeroTrain.run(sys.argv[1:]))  # then: python mine.py --task double
"""

import csv
import glob
import hashlib
import inspect
import json
import logging
import lzma
import os
import random
import re
import shlex
import signal
import sys
import tarfile
import zipfile
import zlib
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import get_type_hints

from jinja2 import TemplateError

from rewards import (
    MAX_MATH_CHARS,
    TAGS,
    UsageError,
    countdown_reward,
    gsm8k_reward,
    last_box,
    math_reward,
    math_verify_missing,
    printable,
    tidy,
)

# ---------------------------------------------------------------------------------------------------------------------
# Prompts: every one ends in an open <think>, so that the completion begins with the thinking

# Table 1 of the DeepSeek-R1 paper in TinyZero's words, for a model that has no chat template.
BASE_TEMPLATE = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer.\n"
    "User: {question}\n"
    "Assistant: Let me solve this step by step.\n"
    "<think>"
)
SYSTEM_PROMPT = (
    "You are a helpful assistant. First think about the reasoning process in <think> </think> tags, "
    "then give only the final answer in <answer> </answer> tags."
)
# TinyZero's closing sentences. The base template does not mention the tags, so the question has to.
SHOW_WORK = (
    "Show your work in <think> </think> tags. And return the final answer in <answer> </answer> tags, "
    "for example <answer> {example} </answer>."
)


def uses_chat_template(tokenizer, template: str = "auto") -> bool:
    """Whether prompts are written by the tokenizer's chat template (which then also writes the BOS token, if any).

    `template` "auto" takes it if there is one, "base" never, "chat" always: UsageError where there is none.
    """
    if template == "chat" and not tokenizer.chat_template:
        raise UsageError("--template chat: this model's tokenizer has no chat template; try --template base")
    return template != "base" and bool(tokenizer.chat_template)


def render_prompt(tokenizer, question: str, template: str = "auto") -> str:
    """The whole prompt for a question, by the tokenizer's chat template or BASE_TEMPLATE: see uses_chat_template.

    It ends in exactly one open `<think>`, perhaps with white space behind: some chat templates (DeepSeek's distilled
    models) open the thinking themselves, and then nothing is added.
    """
    if not uses_chat_template(tokenizer, template):
        return BASE_TEMPLATE.format(question=question)
    prompt = _chat_prompt(tokenizer, question)
    # What the template writes behind any question. The prompt's own end would not do: a question may mention <think>.
    tail = _chat_prompt(tokenizer, "7").rpartition("7")[2]
    if tail.rstrip().endswith("<think>"):
        return prompt
    empty = re.search(r"<think>\s*</think>\s*\Z", tail)  # some switch the thinking off by closing it at once
    return prompt.removesuffix(empty[0] if empty else "") + "<think>"


def _chat_prompt(tokenizer, question: str) -> str:
    system, user = {"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}
    merged = {"role": "user", "content": f"{SYSTEM_PROMPT}\n\n{question}"}
    for messages in ([system, user], [merged]):  # Gemma's and Mistral's first templates refuse a system message
        try:  # templates that can switch the thinking off (Qwen3's) are told not to; the others ignore it
            return tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=True
            )
        except TemplateError as error:
            reason = " ".join(str(error).split())[:200]
    raise UsageError(f"--template chat: the model's chat template refuses a question ({reason}); try --template base")


def encode(tokenizer, prompts: str | list[str], template: str = "auto", **options) -> dict:
    """The token ids of rendered prompts, with the tokenizer's own `options`; a chat template has written the BOS."""
    return tokenizer(prompts, add_special_tokens=not uses_chat_template(tokenizer, template), **options)


def countdown_question(numbers: list[int], target: int) -> str:
    """TinyZero's sentence (github.com/Jiayi-Pan/TinyZero, examples/data_preprocess/countdown.py)."""
    return (
        f"Using the numbers {list(numbers)}, create an equation that equals {target}. You can use basic arithmetic "
        "operations (+, -, *, /) and each number can only be used once. " + SHOW_WORK.format(example="(1 + 2) / 3")
    )


def _countdown(numbers: list[int], target: int) -> dict:
    return {"question": countdown_question(numbers, target), "answer": {"numbers": numbers, "target": target}}


# ---------------------------------------------------------------------------------------------------------------------
# The Countdown generator

TRIES = 1000  # draws without a find, after which there is taken to be nothing (more) to find
MAX_RANGE = 10_000  # the largest number or target
HELD_OUT_RNG = "held-out"  # seeds what is drawn for evaluation: the same questions whatever --seed, so runs compare
# Three numbers from 1 to 9 and targets from 1 to 99 make only 2,144 different problems. One in four is held out: one in
# five would be too few for an evaluation on 512.
HELD_OUT_ONE_IN = 4


def is_held_out(numbers: list[int], target: int) -> bool:
    """Whether a problem is for evaluation only, whatever the order of its numbers; the same on every machine."""
    return _hash_holds_out(countdown_key(numbers, target))


def countdown_key(numbers: list[int], target: int) -> str:
    return f"{sorted(numbers)} {target}"


def _hash_holds_out(key: str) -> bool:
    # Not hash(): that of a string differs from process to process, and would leak test problems into training.
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % HELD_OUT_ONE_IN == 0


def reachable_targets(numbers: list[int]) -> frozenset[int]:
    """Every integer, 0 or more, that `numbers` (0 or more) make when each is used exactly once, by exact fractions."""
    return _integers(tuple(sorted(numbers)))


@lru_cache(maxsize=512)  # 3 or 4 numbers from 1 to 9 are 165 or 495 different problems
def _integers(numbers: tuple[int, ...]) -> frozenset[int]:
    return frozenset(int(value) for value in _values(numbers) if value.denominator == 1)


@lru_cache(maxsize=32)  # five numbers have 31 subsets; more of them would only be memory
def _values(numbers: tuple[int, ...]) -> frozenset[Fraction]:
    """The absolute values of all that can be made of `numbers`.

    They suffice: a minus sign further in only swaps a sum for a difference, so what is positive is made without one.
    """
    if len(numbers) == 1:
        return frozenset([Fraction(numbers[0])])
    values = set()
    for mask in range(1, 2 ** (len(numbers) - 1)):  # every cut in two, the last number on the right
        left = tuple(number for place, number in enumerate(numbers) if mask >> place & 1)
        right = tuple(number for place, number in enumerate(numbers) if not mask >> place & 1)
        for a in _values(left):
            for b in _values(right):
                values.update((a + b, abs(a - b), a * b))
                if b:
                    values.add(a / b)
                if a:
                    values.add(b / a)
    return frozenset(values)


def countdown_problem(
    rng: random.Random,
    held_out: bool,
    operands: int = 3,
    operand_range: tuple[int, int] = (1, 9),
    target_range: tuple[int, int] = (1, 99),
) -> tuple[list[int], int]:
    """A solvable problem `(numbers, target)` from the training problems, or from those held out.

    The numbers are drawn uniformly and independently of each other, then the target uniformly from those which they
    reach and which belong to the wanted side; where there is none, all is drawn again. Raises UsageError for options
    that cannot work, and if nothing turns up.
    """
    _check_ranges(operands, operand_range, target_range)
    low, high = target_range
    for _ in range(TRIES):
        numbers = [rng.randint(*operand_range) for _ in range(operands)]
        targets = [
            target
            for target in sorted(reachable_targets(numbers))
            if low <= target <= high and is_held_out(numbers, target) == held_out
        ]
        if targets:
            return numbers, rng.choice(targets)
    raise UsageError(
        f"--target_range {_pair(target_range)}: no {'held-out' if held_out else 'training'} problem with {operands} "
        f"numbers from --operand_range {_pair(operand_range)}; try --operand_range 1 9 --target_range 1 99"
    )


def generate_countdown(rng: random.Random, **options: object) -> dict:
    """A `countdown_problem` with these options, as a question."""
    return _countdown(*countdown_problem(rng, **options))


def _check_ranges(operands: int, operand_range: tuple[int, int], target_range: tuple[int, int]) -> None:
    if not 2 <= operands <= 5:
        raise UsageError(f"--operands {operands}: a problem has 2 to 5 numbers; try 3")
    for option, bounds, works in (("operand_range", operand_range, "1 9"), ("target_range", target_range, "1 99")):
        if len(bounds) != 2 or not 1 <= bounds[0] <= bounds[1] <= MAX_RANGE:
            raise UsageError(f"--{option} {_pair(bounds)}: needs 1 <= lowest <= highest <= {MAX_RANGE}; try {works}")


def _pair(bounds: tuple[int, ...]) -> str:
    return " ".join(str(bound) for bound in bounds)  # as it is written on the command line


# ---------------------------------------------------------------------------------------------------------------------
# Rows of a dataset: a reader makes a question of one, or None if it has no answer which the reward could grade


def read_countdown(row: dict) -> dict | None:
    """A row of Jiayi-Pan/Countdown-Tasks-3to4; in a CSV file `nums` is text, "[44, 19, 35]"."""
    numbers = row["nums"]
    if isinstance(numbers, str) and len(numbers) < 200:  # the bound also keeps json from nesting too deep
        try:
            numbers = json.loads(numbers)
        except json.JSONDecodeError:
            return None
    if not isinstance(numbers, list) or not 1 <= len(numbers) <= 20:
        return None
    numbers, target = [_whole_number(number) for number in numbers], _whole_number(row["target"])
    if target is None or any(number is None or number < 0 for number in numbers):
        return None
    return _countdown(numbers, target)


def _whole_number(value: object) -> int | None:
    # One odd value in a column makes floats or text of all the others: 3.0 and "3" are still 3.
    try:
        number = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError, OverflowError):
        return None
    return int(number) if number.is_integer() and abs(number) <= 1e9 else None


GOLD = re.compile(r"-?\$?([0-9]{1,3}(,[0-9]{3})+|[0-9]+)(\.[0-9]*)?%?")  # 18, 1,234.50


def read_gsm8k(row: dict) -> dict | None:
    """A row of openai/gsm8k, whose answer text ends in `#### 18`; in a file of one's own it may be just the number."""
    question, gold = _text(row["question"]), _text(row["answer"]).rpartition("####")[2].strip()
    if not question or len(gold) > 40 or not GOLD.fullmatch(gold):
        return None
    return ask_for_work(question) | {"answer": {"gold": gold}}


def read_math(row: dict) -> dict | None:
    """A row with `problem` and `answer`, LaTeX or a number (agentica-org/DeepScaleR-Preview-Dataset, HuggingFaceH4's
    aime_2024 and MATH-500), or with `problem` and a `solution` whose last \\boxed{} holds the answer (MATH itself)."""
    question = _text(row["problem"])
    if "answer" in row:
        gold = last_box(_text(row["answer"]))
    else:
        solution = _text(row["solution"])
        gold = last_box(solution)
        gold = "" if gold == solution else gold  # it has no box
    # What math_reward pays for no answer: one that is too long, nothing but units and spaces, or cut short by a tag.
    if not question or len(gold) > MAX_MATH_CHARS or not tidy(gold) or any(tag in gold for tag in TAGS):
        return None
    return ask_for_work(question) | {"answer": {"gold": gold}}


def _text(value: object) -> str:
    """The text of a cell; "" for one that is missing or holds something else. CSV makes NaN of a missing number."""
    usable = isinstance(value, str | int | float) and not isinstance(value, bool) and value == value
    return str(value).strip() if usable and _is_unicode(str(value)) else ""


def _is_unicode(text: str) -> bool:
    """Whether text has no lone surrogates, which JSON's "\\ud800" makes, and Python of bytes that are no UTF-8.

    They can be neither hashed nor tokenized.
    """
    return not re.search("[\ud800-\udfff]", text)


# ---------------------------------------------------------------------------------------------------------------------
# The files of a model


@contextmanager
def model_files(model: str) -> Iterator[dict]:
    """from_pretrained's arguments for a folder or a hub name; whatever goes wrong with them becomes a UsageError."""
    from transformers.utils.logging import disable_progress_bar

    # os.path's, as Path's raises for a name that is too long.
    folder = next((f for f in (Path(model), Path(__file__).parent / model) if os.path.isdir(f)), None)
    if folder is None and (os.path.isdir(Path(model).parent) or not re.fullmatch(r"[\w.-]+/[\w.-]+", model)):
        raise UsageError(f"--model {model}: no such folder; try notebooks/tiny-base or a hub name like owner/model")
    parts = {"config": "config.json", "tokenizer": "tokenizer*", "weights": "model*.safetensors*"}
    for part, files in parts.items() if folder else ():
        if not any(folder.glob(files)):
            raise UsageError(f"--model {model}: the folder has no {part} ({files}); try notebooks/tiny-base")
    disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # what it fails at is said once, below
    try:
        files = {"pretrained_model_name_or_path": str(folder or model), "local_files_only": folder is not None}
        yield files | {"trust_remote_code": False}
    except Exception as error:  # of a damaged file each library raises its own kind; all are shown, and end the run
        reason = " ".join(str(error).split())[:300]
        works = "notebooks/tiny-base or another local folder, which need no hub"
        raise UsageError(f"--model {model}: cannot be loaded ({reason}); try {works}") from error


def load_tokenizer(model: str):
    """The tokenizer, known before any weights are read. Raises UsageError for a family that can't be sampled."""
    from transformers import AutoConfig, AutoTokenizer  # not at the top: this file is read without torch
    from transformers.cache_utils import DynamicCache
    from transformers.models.auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    with model_files(model) as files:
        config = AutoConfig.from_pretrained(**files)
        family = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        if family is None or config.is_encoder_decoder or type(config) in MODEL_FOR_MASKED_LM_MAPPING:
            raise ValueError(f"a {config.model_type} model does not write from left to right")
        layers = {type(layer).__name__ for layer in DynamicCache(config=config).layers}
        if family._is_stateful or layers - {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}:
            raise ValueError(f"a {config.model_type} model keeps a state that can't be copied to a group of rows")
        takes = inspect.signature(family.forward).parameters
        if lacks := {"past_key_values", "position_ids", "logits_to_keep"} - takes.keys():
            raise ValueError(f"a {config.model_type} model takes no {min(lacks)}")
        tokenizer = AutoTokenizer.from_pretrained(**files)
        # Any will do, as masks come from lengths: an EOS that ends a completion is trained all the same.
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        rope = getattr(config := config.get_text_config(), "rope_parameters", None) or {}
        # Past this, longrope turns all positions anew: the cache would be stale.
        limit = rope["original_max_position_embeddings"] if rope.get("rope_type") == "longrope" else None
        tokenizer.model_max_length = limit or getattr(config, "max_position_embeddings", 2**20)
        return tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# Questions typed by the user: they have no "answer" where nothing could grade it


def ask_for_work(text: str) -> dict:
    return {"question": f"{text} {SHOW_WORK.format(example='42')}", "answer": None}


def ask_countdown(text: str) -> dict:
    """ "44 19 35 = 98" is a Countdown problem, solvable or not; any other text is a question as it stands."""
    problem = re.fullmatch(r"[\[\s]*([0-9]{1,9}(?:[\s,]+[0-9]{1,9}){0,19})[\]\s]*=\s*([0-9]{1,9})\s*", text)
    if not problem:
        return {"question": text, "answer": None}
    return _countdown([int(number) for number in re.findall("[0-9]+", problem[1])], int(problem[2]))


def ask_question(task: str, text: str) -> dict:
    """A question that the user typed, worded as the task words its own; its "answer" is None where there is none."""
    return _task(task).ask(text)


# ---------------------------------------------------------------------------------------------------------------------
# Tasks


@dataclass
class Task:
    """What `--task` names: where its questions come from, a generator or a dataset or both, and how they are graded."""

    reward: Callable[..., float]  # reward(completion, **question["answer"])
    # generate(rng) makes a question with what it draws from rng, a random.Random. Which questions are held out is not
    # its concern: a hash of their key decides, and those that fall on the wrong side are made again.
    generate: Callable[..., dict] | None = None
    # What generate takes besides: any of R1ZeroTrain's options, and held_out, whether the question is to be held out.
    options: tuple[str, ...] = ()
    dataset: str = ""  # read where --dataset names none; "": questions are generated
    eval_dataset: str = ""  # asked in evaluations where neither --dataset nor --eval_dataset is given
    columns: tuple[tuple[str, ...], ...] = ()  # sets of columns of which a dataset must have one
    read: Callable[[dict], dict | None] | None = None  # read(row) makes a question of those columns, or None
    # Questions of one key are the same question, and never on both sides; white space does not make them different.
    key: Callable[[dict], str] = lambda question: " ".join(question["question"].split())
    ask: Callable[[str], dict] = lambda text: {"question": text, "answer": None}  # makes a question of --ask


TASKS: dict[str, Task] = {
    "countdown": Task(
        countdown_reward,
        generate=generate_countdown,
        options=("held_out", "operands", "operand_range", "target_range"),
        columns=(("target", "nums"),),
        read=read_countdown,
        key=lambda question: countdown_key(**question["answer"]),
        ask=ask_countdown,
    ),
    "gsm8k": Task(
        gsm8k_reward,
        dataset="openai/gsm8k",
        columns=(("question", "answer"),),
        read=read_gsm8k,
        ask=ask_for_work,
    ),
    "math": Task(
        math_reward,
        dataset="agentica-org/DeepScaleR-Preview-Dataset",
        eval_dataset="HuggingFaceH4/aime_2024",
        columns=(("problem", "answer"), ("problem", "solution")),
        read=read_math,
        ask=ask_for_work,
    ),
}


def _task(name: str) -> Task:
    if name not in TASKS:
        raise UsageError(f"--task {name}: there are {', '.join(TASKS)}; try countdown")
    if name == "math" and math_verify_missing():
        raise UsageError(
            "--task math: needs the library math-verify; try uv run --extra math R1ZeroTrain.py --task math"
        )
    return TASKS[name]


# ---------------------------------------------------------------------------------------------------------------------
# Recipes: which model is trained on which of these questions, and how

LARGE_MODEL = "--lr 1e-6 --lr_final 1 --dtype bfloat16 --tokens_per_microbatch 2048 --eval_every 50"
# What --help says of a recipe, and the options that it stands for. Computed memory: 20 bytes for each parameter (its
# weight, gradient, Adam's two, the reference's), 2 for a bfloat16 sampler, and what autograd keeps of a micro-batch.
RECIPES = {
    "tiny": ("R1-Zero in miniature, nothing downloaded; 1.5 GB, measured", ""),
    "tinyzero": (
        "Qwen2.5-3B on Countdown, as in TinyZero; about 81 GB, 69 with --gradient_checkpointing, computed",
        f"{LARGE_MODEL} --model Qwen/Qwen2.5-3B --template base --dataset Jiayi-Pan/Countdown-Tasks-3to4 --steps 1000 "
        "--questions_per_step 64 --group_size 8 --max_new_tokens 1024 --rollout_rows 64 --eval_questions 1024",
    ),
    "gsm8k": (
        "Qwen2.5-1.5B-Instruct on GSM8K; about 42 GB, computed",
        f"{LARGE_MODEL} --model Qwen/Qwen2.5-1.5B-Instruct --task gsm8k --steps 500 --questions_per_step 8 "
        "--group_size 8 --max_new_tokens 512 --rollout_rows 64 --eval_questions 256",
    ),
    "mac": (
        "Qwen2.5-0.5B-Instruct on GSM8K, on a Mac; about 11 GB, computed",
        f"{LARGE_MODEL} --model Qwen/Qwen2.5-0.5B-Instruct --task gsm8k --steps 300 --questions_per_step 4 "
        "--group_size 8 --max_new_tokens 300 --rollout_rows 32 --tokens_per_microbatch 512 --dtype float32 "
        "--eval_questions 128",
    ),
    "deepscaler": (
        "R1-Distill-Qwen-1.5B on competition maths; about 75 GB, computed",
        f"{LARGE_MODEL} --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --task math --steps 1040 --temperature 0.6 "
        "--questions_per_step 128 --group_size 8 --max_new_tokens 8192 --rollout_rows 16 "
        "--tokens_per_microbatch 8192 --eval_dataset HuggingFaceH4/aime_2024 --eval_samples 16",
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def parse(kind: type, arguments: list[str]) -> object:
    """A `kind` (R1ZeroTrain's Config): its defaults, overridden by the recipe or the resumed run, then by `arguments`.

    Raises UsageError naming the first option that can't work, its value, and a value that works.
    """
    from transformers import HfArgumentParser

    recipes = "\n".join(f"  {name:<11} {about}" for name, (about, _) in RECIPES.items())
    texts = {"description": "GRPO as in DeepSeek-R1-Zero, in one file: a base model learns to reason from rewards."}
    texts["epilog"] = f"recipes, and the memory that they need:\n{recipes}"
    style = type("HelpFormatter", (ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter), {})
    parser = HfArgumentParser(kind, prog="R1ZeroTrain.py", formatter_class=style, allow_abbrev=False, **texts)

    def refuse(message: str) -> None:  # in place of argparse's usage text
        name = re.match(r"argument --(\w+)", message)
        works = " ".join(typed({name[1]: parser.get_default(name[1])})[1:]) if name else ""
        raise UsageError(f"{message.removeprefix('argument ')}; try {works or '--help'}")

    parser.error = refuse
    arguments = [word.removesuffix("=--") for word in arguments]  # of which argparse would make an empty list
    first = parser.parse_args(arguments)
    base, saved = RECIPES[first.recipe][1].split(), {}
    if first.resume:
        saved = _read_config(kind, first.resume)
        base = typed({k: v for k, v in saved.items() if k not in ("run_dir", "eval_only", "ask", "wandb")})
        if not first.eval_only and first.ask is None and first.run_dir not in ("", first.resume):
            raise UsageError(f"--run_dir {first.run_dir}: a run goes on where it is; try a copy of {first.resume}")
        arguments = arguments if first.eval_only else [*arguments, "--run_dir", first.resume]  # the same run, go on
    cfg = kind(**vars(parser.parse_args(base + arguments)))  # as if typed in front, so checked like the rest
    for name, hint in get_type_hints(kind, include_extras=True).items():
        for low, high in getattr(hint, "__metadata__", []):
            if not low <= getattr(cfg, name) <= high:
                raise UsageError(f"--{name} {getattr(cfg, name)}: must be {low} to {high}; try {getattr(kind, name)}")
    for name in ("model", "recipe", "task", "seed")[: 1 if first.eval_only else 4] if first.resume else ():
        if getattr(cfg, name) != saved[name]:
            raise UsageError(
                f"--{name} {getattr(cfg, name)}: would be another run than {first.resume}; try {saved[name]}"
            )
    return cfg


def typed(options: dict) -> list[str]:
    """Options as the words of a command line."""
    values = {name: value if isinstance(value, list) else [value] for name, value in options.items()}
    return [word for name in values for word in (f"--{name}", *map(str, values[name]))]


def command_line(cfg: object) -> str:
    """The shortest command that stands for a Config."""
    recipe = vars(parse(type(cfg), ["--recipe", cfg.recipe])) | {"recipe": "", "resume": cfg.resume}
    return shlex.join(["uv", "run", "R1ZeroTrain.py", *typed({k: v for k, v in vars(cfg).items() if v != recipe[k]})])


@contextmanager
def ends_when_asked() -> Iterator[list]:
    """A list that gets an entry when Ctrl-C or SIGTERM asks the run to end; the second time it ends at once."""
    asked = []

    def ask_to_end(number: int, _: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        # Not print, which fails if the signal has interrupted another print.
        os.write(2, b"\nfinishing this step, then saving and ending; once more ends at once\n")

    before = {number: signal.signal(number, ask_to_end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_code(work: Callable[[], None]) -> int:
    """Does the work of a command; returns its exit code, 2 for an option that can't work. Errors are one line."""
    try:
        work()
        return 0
    except UsageError as error:
        code, message = 2, "R1ZeroTrain.py: " + printable(" ".join(str(error).split()))
    except KeyboardInterrupt:
        code, message = 130, "\nstopped; --resume and the run's directory go on from its checkpoint, if it has one"
    # Said when the frames of the work, and its bar with them, are gone; by one process, but for what it may not know.
    if os.environ.get("RANK", "0") == "0" or "out of memory" in message or "makes a prompt" in message:
        print(message, file=sys.stderr)
    return code


def _read_config(kind: type, run_dir: str) -> dict:
    try:
        saved = json.loads((Path(run_dir) / "config.json").read_text())
        return vars(kind(**saved))  # an option that it lacks has its default
    except (OSError, ValueError, TypeError, RecursionError) as error:  # the last of brackets within brackets
        raise UsageError(f"--resume {run_dir}: no run to go on with ({error}); try a folder in runs/") from error


# ---------------------------------------------------------------------------------------------------------------------
# The questions of a run


def load_questions(
    task: str,
    dataset: str,
    seed: int,
    eval_questions: int,
    eval_dataset: str = "",
    *,
    eval_only: bool = False,
    resume: str = "",
    tokenizer=None,
    template: str = "auto",
    max_new_tokens: int = 0,
    ask: str | None = None,
    **options,
) -> tuple[Callable[[int], dict] | None, list[dict]]:
    """The questions of a task: `(question_at, held_out)`.

    `question_at(i)` is a pure function of (seed, i) for every i >= 0: a question made on the spot, or the i-th row of
    endless passes over the training rows, each in an order of its own; None with `eval_only`. `held_out` are
    `eval_questions` questions (all there are, where a dataset has fewer) which are the same for every seed and are not
    used for training.

    Datasets are hub names, local folders, or .jsonl .json .parquet .csv files; "" is the task's own. Held out is the
    test split of `eval_dataset`, or all of it where it has none; without one, the test split of `dataset`, or a quarter
    of its questions where it has none: all of them with `eval_only`, unless it is a run to `resume`, which has trained
    on the others. Rows that are damaged or have no answer are left out, and so are, with a `tokenizer`, those whose
    prompts are longer than its `model_max_length` less `max_new_tokens`: how many, and which, stands on stderr.
    Among `options` are those of the task's generator. With `ask` that is the one question held out, and there are no
    others. Raises UsageError where an option cannot work.
    """
    spec = _task(task)
    if eval_questions < 0:
        raise UsageError(f"--eval_questions {eval_questions}: cannot be negative; try 64")
    if not dataset and not eval_dataset:
        eval_dataset = spec.eval_dataset
    dataset = dataset or spec.dataset
    if not dataset and not spec.generate:
        raise UsageError(f"--dataset: --task {task} makes no questions of its own; try --dataset with a file")
    too_long = _length_check(tokenizer, template, max_new_tokens)
    if ask is not None:
        return None, [_asked(task, ask, too_long)]
    train, test = _rows(task, dataset, eval_dataset, eval_only, bool(resume), too_long)
    if test:  # drawn rather than taken from the top: a file may be sorted
        chosen = random.Random(HELD_OUT_RNG).sample(list(test.keys), min(eval_questions, len(test.keys)))
        held_out = [spec.read(test.table[row]) for row in chosen]
    else:
        held_out = _generate_held_out(task, eval_questions, options, too_long)
    if eval_only:
        return None, held_out
    evaluated = frozenset(test.keys.values()) if test else frozenset()
    if train:
        return _passes(spec, _without(train, evaluated, dataset), seed), held_out
    return _generate_training(task, seed, options, evaluated, too_long), held_out


def _asked(task: str, text: str, too_long: Callable) -> dict:
    """The question of --ask, if it can be asked."""
    if not _is_unicode(text):
        raise UsageError(f"--ask {printable(text)}: holds bytes that are no UTF-8; try '44 19 35 = 98'")
    question = ask_question(task, text)
    if reason := too_long(question["question"]):
        raise UsageError(f"--ask: the question {reason}; try a shorter one or a smaller --max_new_tokens")
    return question


def _draw(task: str, rng: random.Random, held_out: bool, options: dict, evaluated: frozenset = frozenset()) -> dict:
    """A question made on the spot, for training or held out, and none of those `evaluated` (their keys)."""
    spec, offered = TASKS[task], options | {"held_out": held_out}
    wanted = {name: offered[name] for name in spec.options if name in offered}
    for _ in range(TRIES):
        question = spec.generate(rng, **wanted)
        key = spec.key(question)
        if _hash_holds_out(key) == held_out and key not in evaluated:
            return question
    raise UsageError(
        f"--task {task}: {TRIES} questions were made, and none is {'held out' if held_out else 'for training'}; "
        "try a generator of more different questions"
    )


def _generate_held_out(task: str, count: int, options: dict, too_long: Callable) -> list[dict]:
    rng = random.Random(HELD_OUT_RNG)
    found, repeats = {}, 0
    while len(found) < count and repeats < TRIES:
        question = _draw(task, rng, True, options)
        key = TASKS[task].key(question)
        repeats = repeats + 1 if key in found else 0
        found.setdefault(key, question)
    if len(found) < count:
        raise UsageError(
            f"--eval_questions {count}: there are only {len(found)} different held-out questions to be found "
            f"with these options; try {len(found)}"
        )
    for number, question in enumerate(found.values(), start=1):
        if reason := too_long(question["question"]):
            raise UsageError(f"--task {task}: held-out question {number} {reason}; try a smaller --max_new_tokens")
    return list(found.values())


def _generate_training(
    task: str, seed: int, options: dict, evaluated: frozenset, too_long: Callable
) -> Callable[[int], dict]:
    _draw(task, random.Random(seed), False, options, evaluated)  # raises here, not in the middle of training

    def question_at(i: int) -> dict:
        question = _draw(task, random.Random(f"{seed}/{i}"), False, options, evaluated)
        if reason := too_long(question["question"]):
            raise UsageError(f"--task {task}: a question {reason}; try a smaller --max_new_tokens")
        return question

    return question_at


def _length_check(tokenizer, template: str, max_new_tokens: int) -> Callable[[str], str]:
    """too_long(question) says by how much, if the question's prompt leaves no room for max_new_tokens; else ""."""
    if tokenizer is None:
        return lambda question: ""
    room = tokenizer.model_max_length - max_new_tokens
    if room < 1:
        longest = tokenizer.model_max_length
        raise UsageError(f"--max_new_tokens {max_new_tokens}: the model reads {longest} in all; try {longest // 2}")
    # A token is a byte or more, but for the few that mark where a text begins: most questions need no tokenizing.
    surely_fits = room - len(render_prompt(tokenizer, "", template).encode()) - 8

    def too_long(question: str) -> str:
        if len(question.encode()) <= surely_fits:
            return ""
        prompt = render_prompt(tokenizer, question, template)
        tokens = len(encode(tokenizer, prompt, template, verbose=False)["input_ids"])
        if tokens <= room:
            return ""
        return (
            f"makes a prompt of {tokens:,} tokens, and the model has room for {room:,} beside "
            f"--max_new_tokens {max_new_tokens}"
        )

    return too_long


# ---------------------------------------------------------------------------------------------------------------------
# Datasets

TEST_SPLITS = ("test", "validation")
HUB_CONFIGS = {"openai/gsm8k": "main"}
# A single split that its authors cut by position: so many rows to train on, and so many after them to test on.
HUB_CUTS = {"Jiayi-Pan/Countdown-Tasks-3to4": (327_680, 1_024)}
LIBRARY_ERRORS = (OSError, ValueError, TypeError, LookupError, RuntimeError, StopIteration, ImportError, EOFError) + (
    zlib.error,
    lzma.LZMAError,
    tarfile.TarError,
    zipfile.BadZipFile,
)


@dataclass
class Rows:
    """Rows of a dataset which make a question."""

    table: object  # datasets.Dataset with the columns that the task reads
    keys: dict[int, str]  # number of the row in the table, from 0: the key of its question


def _passes(spec: Task, rows: Rows, seed: int) -> Callable[[int], dict]:
    numbers = list(rows.keys)

    @lru_cache(maxsize=2)  # a step's questions may lie in two passes
    def order(epoch: int) -> list[int]:
        return random.Random(f"{seed}/{epoch}").sample(numbers, len(numbers))

    def question_at(i: int) -> dict:
        epoch, place = divmod(i, len(numbers))
        return spec.read(rows.table[order(epoch)[place]])

    return question_at


def _without(rows: Rows, evaluated: frozenset, dataset: str) -> Rows:
    """The rows whose questions are not `evaluated`: what a model has trained on is no test of it."""
    rest = {row: key for row, key in rows.keys.items() if key not in evaluated}
    if not rest:
        raise UsageError(f"--dataset {dataset}: the evaluation asks all its questions; try another --eval_dataset")
    if len(rest) < len(rows.keys):
        count = len(rows.keys) - len(rest)
        print(f"{dataset}: {count} of its rows are also in the evaluation, and not trained on", file=sys.stderr)
    return replace(rows, keys=rest)


def _rows(
    task: str, dataset: str, eval_dataset: str, eval_only: bool, resumed: bool, too_long: Callable
) -> tuple[Rows | None, Rows | None]:
    """The rows to train on and those to evaluate on; None where questions are made on the spot, or not asked for."""
    if not eval_dataset or eval_dataset == dataset:
        return _split_rows(task, dataset, eval_only, resumed, too_long) if dataset else (None, None)
    splits, train = _load_dataset("eval_dataset", eval_dataset), None
    test = _usable_rows(task, f"--eval_dataset {eval_dataset}", splits, _train_and_test(splits)[1], too_long)
    if dataset and not eval_only:
        splits = _load_dataset("dataset", dataset)
        train = _usable_rows(task, f"--dataset {dataset}", splits, _train_and_test(splits)[0], too_long)
    return train, test


def _split_rows(
    task: str, dataset: str, eval_only: bool, resumed: bool, too_long: Callable
) -> tuple[Rows | None, Rows]:
    """The rows to train on, None with eval_only, and those held out."""
    splits = _load_dataset("dataset", dataset)
    train, test = _train_and_test(splits)
    rows = _usable_rows(task, f"--dataset {dataset}", splits, test, too_long)
    if train != test:
        return None if eval_only else _usable_rows(task, f"--dataset {dataset}", splits, train, too_long), rows
    if eval_only and not resumed:
        if test not in TEST_SPLITS:
            print(
                f"evaluating all {len(rows.keys)} rows of {dataset}, which has no test split: "
                "a model trained on this file has seen most of them",
                file=sys.stderr,
            )
        return None, rows
    held_out = {row: key for row, key in rows.keys.items() if _hash_holds_out(key)}
    rest = {row: key for row, key in rows.keys.items() if row not in held_out}
    if not rest or not held_out:
        raise UsageError(
            f"--dataset {dataset}: {len(rest)} rows to train on and {len(held_out)} held out, both need some "
            f"(of a single split one question in {HELD_OUT_ONE_IN} is held out); try a file of 100 rows or more"
        )
    return replace(rows, keys=rest), replace(rows, keys=held_out)


def _train_and_test(splits: dict) -> tuple[str, str]:
    """The names of the splits to train on and to test on; one and the same where there is nothing to choose from."""
    test = next((name for name in TEST_SPLITS if name in splits), "")
    train = next((name for name in ("train", *splits) if name in splits and name != test), test)
    return train, test or train


def _usable_rows(task: str, named: str, splits: dict, split: str, too_long: Callable) -> Rows:
    """`named` is the option and its value, as errors begin with it. Rows that cannot be used are left out, and said."""
    spec, table = TASKS[task], _select(task, named, splits[split])
    keys, no_answer, long = {}, [], {}
    for row, cells in enumerate(_iterate(table, named)):
        question = spec.read(cells)
        if question is None:
            no_answer.append(row + 1)
        elif reason := too_long(question["question"]):
            long[row + 1] = reason
        else:
            keys[row] = spec.key(question)
    row, reason = next(iter(long.items()), (0, ""))
    of_split = f" of its {split} split" * (len(splits) > 1)
    if long and not keys:
        raise UsageError(
            f"{named}: row {row}{of_split} {reason}, and the others are no better; "
            "try a dataset with shorter questions or a smaller --max_new_tokens"
        )
    if not keys:
        raise UsageError(f"{named}: no row of {len(table)} has a usable answer; try a dataset that fits --task {task}")
    count = f"of {len(table)} rows{of_split}"
    if no_answer:
        print(
            f"{named}: {len(no_answer)} {count} are damaged or have no usable answer: {_first(no_answer)}",
            file=sys.stderr,
        )
    if long:
        print(
            f"{named}: {len(long)} {count} are left out as too long: {_first(long)}; row {row} {reason}",
            file=sys.stderr,
        )
    return Rows(table, keys)


def _first(rows: Iterable[int]) -> str:
    words = [str(row) for row in rows]
    return ", ".join(words[:5]) + (", …" if len(words) > 5 else "")


def _select(task: str, named: str, table: object) -> object:
    """The table with the columns that the task reads; None stands where a row of a file lacks one."""
    spec = TASKS[task]
    if isinstance(table, list):
        names = list(dict.fromkeys(name for row in table for name in row))
    else:
        names = table.column_names
    columns = next((columns for columns in spec.columns if set(columns) <= set(names)), None)
    if columns is None:
        others = [name for name, other in TASKS.items() for c in other.columns if set(c) <= set(names)]
        raise UsageError(
            f"{named}: has the columns {' '.join(printable(', '.join(names)).split())[:200]}; --task {task} reads "
            + (" or ".join(" and ".join(columns) for columns in spec.columns) or "no dataset")
            + f"; try {f'--task {others[0]}' if others else 'a dataset with these'}"
        )
    if isinstance(table, list):
        return [{name: row.get(name) for name in columns} for row in table]
    return table.select_columns(list(columns))


def _iterate(table: object, named: str) -> Iterator[dict]:
    if isinstance(table, list):
        yield from table
        return
    try:
        for batch in table.iter(1000):  # row by row would take several times as long
            for cells in zip(*batch.values(), strict=True):
                yield dict(zip(batch, cells, strict=True))
    except UnicodeDecodeError as error:  # a damaged file that was opened all the same
        raise UsageError(f"{named}: unreadable: {error}; try openai/gsm8k or a .jsonl file") from error


def _load_dataset(option: str, dataset: str) -> dict:
    """A hub dataset, local folder or file as `{split: table}`, each table a datasets.Dataset or a list of dicts.

    Raises UsageError for what cannot be read.
    """
    reader = FILE_READERS.get(Path(dataset).suffix.lower())
    # os.path's functions, unlike Path's, are False for names that no file can have, too.
    if os.path.isfile(dataset):
        if not reader:
            raise UsageError(f"--{option} {dataset}: cannot be read; try a {', '.join(FILE_READERS)} file")
        return {"train": _load_file(option, dataset, reader)}
    if os.path.isdir(dataset):
        return _load_by_library(option, dataset, on_hub=False)
    if reader or os.path.exists(dataset) or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", dataset):
        raise UsageError(f"--{option} {dataset}: there is no such file; try openai/gsm8k or a path that exists")
    return _load_by_library(option, dataset, on_hub=True)


def _load_by_library(option: str, dataset: str, on_hub: bool) -> dict:
    import datasets  # takes seconds, and the generated Countdown does without

    # What goes wrong is to be reported once, in a line below, and not by the libraries' logs too.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    try:
        if not on_hub:
            datasets.disable_progress_bars()
            configs = datasets.get_dataset_config_names(dataset)  # a copy of openai/gsm8k has two
            return datasets.load_dataset(dataset, "main" if "main" in configs else None)
        splits = datasets.load_dataset(dataset, HUB_CONFIGS.get(dataset))
        if dataset in HUB_CUTS:
            end, more = HUB_CUTS[dataset]
            rows = splits["train"]
            return {"train": rows.select(range(end)), "test": rows.select(range(end, end + more))}
        return splits
    # What datasets and huggingface_hub raise for a broken file, no network, no such dataset or configuration, a dataset
    # that is a script, an archive that is damaged or needs another library; StopIteration for a file without a row.
    except (datasets.exceptions.DatasetsError, *LIBRARY_ERRORS) as error:
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
        reason = " ".join(printable(str(cause)).split())[:200] or "no rows"
    if on_hub:
        raise UsageError(
            f"--{option} {dataset}: could not be fetched from the Hugging Face hub ({reason}); try --{option} with a "
            "folder or file that holds a copy of it, or the default recipe, which needs nothing from the hub"
        )
    raise UsageError(f"--{option} {dataset}: unreadable: {reason}; try openai/gsm8k or a .jsonl file")


# ---------------------------------------------------------------------------------------------------------------------
# Local files. What people edit, .jsonl .json .csv, is read here and not by datasets: a row that is damaged costs no
# other, numbers and text may stand in one column, and pyarrow crashes, beyond any except, on a file of nulls.


def _load_file(option: str, dataset: str, read: Callable[[str], object]) -> object:
    """The rows of a file: a list of dicts, {} for one that is damaged, or a datasets.Dataset."""
    if os.path.getsize(dataset) == 0:
        raise UsageError(f"--{option} {dataset}: the file is empty; try openai/gsm8k or a file with rows")
    try:
        table = read(dataset)
        if len(table):
            return table
        reason = "no data: it has no rows"
    except (csv.Error, *LIBRARY_ERRORS) as error:
        reason = " ".join(printable(str(error)).split())[:200]
    raise UsageError(f"--{option} {dataset}: unreadable: {reason}; try openai/gsm8k or a .jsonl file, an object a line")


def _read_json(path: str) -> list[dict]:
    """The rows of a list, of an object with a list under "data", or else of lines with an object each."""
    # Bytes that are no UTF-8 spoil the row that they are in: see _is_unicode.
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        text = file.read()
    reason = "no row is a JSON object"
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        rows = [_json_line(line) for line in text.split("\n") if line.strip()]
        reason = f"no row is a JSON object: {error}"
    if isinstance(rows, dict):
        rows = rows["data"] if isinstance(rows.get("data"), list) else [rows]
    rows = [row if isinstance(row, dict) else {} for row in rows] if isinstance(rows, list) else []
    if rows and not any(rows):
        raise ValueError(reason)
    return rows


def _json_line(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # half of it, a number of 5,000 digits, or brackets 5,000 deep
        return None


def _read_csv(path: str) -> list[dict]:
    csv.field_size_limit(2**30)  # instead of 131,072 characters
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            rows = list(reader)
        except csv.Error as error:  # a quote that nothing closes makes one cell of all that follows
            raise ValueError(f"line {reader.line_num}: {error}") from error
    if not all(name.isprintable() for name in reader.fieldnames or ()):
        raise ValueError("its first line is no text")
    # Under None stand the cells that a row has too many. What a row has too few, or pandas has written as NaN, is None.
    return [
        {} if None in row else {k: None if v in (None, "NaN", "nan") else v for k, v in row.items()} for row in rows
    ]


def _read_parquet(path: str) -> object:
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        return datasets.load_dataset("parquet", data_files=glob.escape(path), split="train")
    except datasets.exceptions.DatasetsError as error:
        raise ValueError(str(error.__cause__ or error)) from error


FILE_READERS = {".jsonl": _read_json, ".json": _read_json, ".parquet": _read_parquet, ".csv": _read_csv}
