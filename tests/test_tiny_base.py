"""notebooks/tiny-base: small, honest (no held-out problem in its corpus), and able to learn."""

import importlib.util
import json
import random
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

import R1ZeroTrain
from prompts import countdown_question, is_held_out, load_questions, render_prompt
from R1ZeroTrain import Config, Rollout, generate, load_policy, load_tokenizer, main, parse_config
from rewards import countdown_reward, format_reward

NOTEBOOKS = Path(R1ZeroTrain.__file__).parent / "notebooks"
FOLDER = NOTEBOOKS / "tiny-base"
HEADER = re.compile(r"Numbers: ([0-9 ]+) Target: ([0-9]+)\n")
SUM = re.compile(r"([0-9]+) ([-+*/]) ([0-9]+) = ([0-9]+)")


@pytest.fixture(scope="module")
def growing() -> ModuleType:
    """The script that grew the model, as a module."""
    spec = importlib.util.spec_from_file_location("grow_tiny_base", NOTEBOOKS / "grow_tiny_base.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def corpus(growing: ModuleType) -> list[str]:
    rng = random.Random(1)
    return [growing.document(rng) for _ in range(5000)]


@pytest.fixture(scope="module")
def base() -> tuple:
    return load_policy(str(FOLDER)), load_tokenizer(str(FOLDER))


@pytest.fixture(scope="module")
def tokenizer(base: tuple) -> PreTrainedTokenizerBase:
    return base[1]


@pytest.fixture(scope="module")
def held_out() -> list[dict]:
    return [
        task | {"index": i} for i, task in enumerate(load_questions("countdown", "", 0, 256)[1])
    ]


@pytest.fixture(scope="module")
def sampled(base: tuple, held_out: list[dict]) -> Rollout:
    """What the untrained model makes of 256 held-out questions, once each at temperature 1."""
    return generate(*base, held_out, 1, Config(max_new_tokens=200), "test", lambda phase, ids: None)


def survives(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    return tokenizer.decode(tokenizer(text)["input_ids"]) == text


def is_right(first: str, operator: str, second: str, result: str) -> bool:
    a, b = Fraction(first), Fraction(second)
    if operator == "/":
        return b != 0 and a / b == int(result)
    return {"+": a + b, "-": a - b, "*": a * b}[operator] == int(result)


def test_it_is_small_and_opens_like_any_model(base: tuple) -> None:
    policy, tokenizer = base  # AutoModelForCausalLM, AutoTokenizer
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) < 4e6
    assert policy.config.vocab_size == len(tokenizer)
    assert tokenizer.eos_token_id == policy.generation_config.eos_token_id


def test_every_text_of_the_corpus_survives_the_tokenizer(
    tokenizer: PreTrainedTokenizerBase, corpus: list[str]
) -> None:
    assert all(survives(tokenizer, text) for text in corpus[:2000])


@settings(deadline=None, max_examples=300)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert survives(tokenizer, text)


@pytest.mark.parametrize(
    "text", ["", "  ", "007 + 100", "<think> </think>\r\n", "<0x41>", "é漢🙂", "▁ x", " ,  ."]
)
def test_odd_texts_survive_the_tokenizer(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert survives(tokenizer, text)


def test_the_shipped_tokenizer_is_the_one_the_script_makes(
    growing: ModuleType, tokenizer: PreTrainedTokenizerBase
) -> None:
    made = growing.make_tokenizer()
    assert (
        tokenizer.get_vocab() == made.get_vocab() and tokenizer.chat_template == made.chat_template
    )


def test_every_question_has_the_length_that_the_loss_leaves_out(
    growing: ModuleType, tokenizer: PreTrainedTokenizerBase, corpus: list[str]
) -> None:
    questions = [text[: HEADER.match(text).end()] + "<think>\n" for text in corpus]
    assert {len(ids) for ids in tokenizer(questions)["input_ids"]} == {growing.QUESTION}


def test_micro_batches_hold_every_document_once_and_whole(growing: ModuleType) -> None:
    rng = random.Random(0)
    documents = [[i] * rng.randint(20, 300) for i in range(200)]
    batches = growing.microbatches(documents)
    assert all(batch.numel() <= growing.TOKENS for batch in batches) and len(batches) > 10
    rows = [[i for i in row if i >= 0] for batch in batches for row in batch.tolist()]
    assert sorted(rows) == sorted(documents)


def test_no_held_out_problem_is_in_the_corpus(corpus: list[str]) -> None:
    for text in corpus:
        numbers, target = HEADER.match(text).groups()
        assert not is_held_out([int(number) for number in numbers.split()], int(target))


def test_the_corpus_is_right_where_it_says_yes_and_well_formed_throughout(
    corpus: list[str],
) -> None:
    solved = 0
    for text in corpus:
        numbers, target = HEADER.match(text).groups()
        completion = text[HEADER.match(text).end() :]
        right = countdown_reward(
            completion, [int(number) for number in numbers.split()], int(target)
        )
        assert format_reward(completion) == 1
        assert right == float(" yes\n" in completion)
        assert all(is_right(*parts) for parts in SUM.findall(completion))
        solved += int(right)
    assert 0.1 < solved / len(corpus) < 0.5


def test_its_prompt_is_short(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = render_prompt(tokenizer, countdown_question([8, 7, 4], 36))
    assert prompt == "Numbers: 8 7 4 Target: 36\n<think>\n"
    assert len(tokenizer(prompt)["input_ids"]) <= 12


def test_its_sums_are_right(sampled: Rollout) -> None:
    sums = [parts for text in sampled.text for parts in SUM.findall(text)]
    assert len(sums) > 500
    assert sum(is_right(*parts) for parts in sums) / len(sums) >= 0.99


def test_it_solves_a_quarter_of_the_problems_before_training(
    sampled: Rollout, held_out: list[dict]
) -> None:
    right = [
        countdown_reward(text, **task["answer"])
        for text, task in zip(sampled.text, held_out, strict=True)
    ]
    assert 0.15 <= sum(right) / len(right) <= 0.35


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict]]:
    run_dir = tmp_path_factory.mktemp("runs") / "short"
    options = {
        "steps": 12,
        "questions_per_step": 8,
        "eval_questions": 32,
        "max_new_tokens": 120,
        "run_dir": run_dir,
    }
    main(
        parse_config(
            [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        )
    )
    yield [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_to_search_within_a_dozen_steps(short_run: list[dict]) -> None:
    """Three steps' mean accuracy rises by 0.1 or more; a whole run is in the README."""
    accuracy = [line["accuracy"] for line in short_run]
    before, after = sum(accuracy[:3]) / 3, sum(accuracy[-3:]) / 3
    assert after > before + 0.1


@pytest.mark.study
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_default_run_learns_what_the_readme_says(seed: int, tmp_path: Path) -> None:
    """Minutes each, so by `uv run pytest -m study` only; the test above is its short form."""
    main(parse_config(["--seed", str(seed), "--run_dir", str(tmp_path / "run")]))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    before, after = lines[0], lines[-1]
    assert before["eval_pass@1"] <= 0.35 and after["eval_pass@1"] >= 0.75
    assert after["eval_length"] >= 1.5 * before["eval_length"]
    assert before["kl"] == 0 < after["kl"]
