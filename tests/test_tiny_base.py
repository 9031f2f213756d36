"""notebooks/tiny-base: it is small, has no held-out problem in its corpus, and is able to learn."""

import random
import re
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from conftest import read_lines
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from prompts import countdown, countdown_key, is_held_out, load_questions, render_prompt
from R1ZeroTrain import Config, generate, load_policy, load_tokenizer, main, parse_config
from rewards import countdown_reward, format_reward

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
FOLDER = NOTEBOOKS / "tiny-base"
HEADER = re.compile(r"Numbers: ([0-9 ]+) Target: ([0-9]+)\n")
SUM = re.compile(r"([0-9]+) ([-+*/]) ([0-9]+) = ([0-9]+)")

sys.path.insert(0, str(NOTEBOOKS))
import grow_tiny_base as growing  # noqa: E402


@pytest.fixture(scope="module")
def corpus() -> list[tuple[list[int], int, str]]:
    """The numbers, the target and the completion of 5,000 documents."""
    rng, documents = random.Random(1), []
    for _ in range(5000):
        text = growing.document(rng)
        header = HEADER.match(text)
        numbers = [int(number) for number in header[1].split()]
        documents.append((numbers, int(header[2]), text[header.end() :]))
    return documents


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(str(FOLDER))


def sums(text: str) -> list[bool]:
    """Whether each calculation in a text is right, in their order."""
    right = []
    for a, operator, b, result in SUM.findall(text):
        a, b = Fraction(a), int(b)
        values = {"+": a + b, "-": a - b, "*": a * b, "/": b and a / b}
        right.append(values[operator] == int(result))
    return right


def test_it_is_small_and_opens_like_any_model(tokenizer: PreTrainedTokenizerBase) -> None:
    policy = load_policy(str(FOLDER))  # by AutoModelForCausalLM
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) < 4e6
    assert policy.config.vocab_size == len(tokenizer)
    assert tokenizer.eos_token_id == policy.generation_config.eos_token_id


@settings(deadline=None, max_examples=300)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    text = f"{text}007 + 100 <think> </think>\r\n<0x41> é漢🙂 ▁ x ,  .{text}"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_shipped_tokenizer_is_the_one_the_script_makes(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    made = growing.make_tokenizer()
    assert tokenizer.get_vocab() == made.get_vocab()
    assert tokenizer.chat_template == made.chat_template


def test_every_prompt_has_the_length_that_the_loss_leaves_out(
    tokenizer: PreTrainedTokenizerBase, corpus: list
) -> None:
    for numbers, target, completion in corpus[:1000]:
        prompt = render_prompt(tokenizer, countdown(numbers, target)["question"])
        assert prompt == f"Numbers: {' '.join(map(str, numbers))} Target: {target}\n<think>\n"
        assert len(tokenizer(prompt)["input_ids"]) == growing.QUESTION
        assert tokenizer.decode(tokenizer(completion)["input_ids"]) == completion


def test_micro_batches_hold_every_document_once_and_whole() -> None:
    rng = random.Random(0)
    documents = [[i] * rng.randint(20, 300) for i in range(200)]
    batches = growing.microbatches(documents)
    assert all(batch.numel() <= growing.TOKENS for batch in batches) and len(batches) > 10
    rows = [[i for i in row if i >= 0] for batch in batches for row in batch.tolist()]
    assert sorted(rows) == sorted(documents)


def test_no_held_out_problem_is_in_the_corpus(corpus: list) -> None:
    assert not any(is_held_out(countdown_key(numbers, target)) for numbers, target, _ in corpus)


def test_the_corpus_is_right_where_it_says_yes_and_well_formed_throughout(corpus: list) -> None:
    solved = 0
    for numbers, target, completion in corpus:
        right = countdown_reward(completion, numbers, target)
        assert format_reward(completion) == 1
        assert right == (" yes\n" in completion)
        assert all(sums(completion))
        solved += right
    assert 0.1 < solved / len(corpus) < 0.5


def test_the_script_grows_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "DOCUMENTS", 8)
    growing.grow(1, 0, tmp_path)
    load_policy(str(tmp_path))


def test_its_arithmetic_is_right_and_it_solves_a_quarter_before_training(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """256 held-out problems, once each at temperature 1."""
    questions = load_questions("countdown", "", 0, 256)[1]
    questions = [question | {"index": f"eval/{i}"} for i, question in enumerate(questions)]
    policy = load_policy(str(FOLDER))
    rollout = generate(policy, tokenizer, questions, 1, Config(max_new_tokens=200))
    right = sums("\n".join(rollout.text))
    assert sum(right) >= 0.99 * len(right) > 500
    solved = [countdown_reward(t, **q["answer"]) for t, q in zip(rollout.text, questions)]
    assert 0.15 <= sum(solved) / 256 <= 0.35


def test_it_learns_to_search_within_ten_steps(tmp_path: Path) -> None:
    """Accuracy and length on held-out problems rise. The README has the results of whole runs."""
    rollouts = "--steps 10 --questions_per_step 16 --group_size 8 --max_new_tokens 120"
    options = f"{rollouts} --eval_questions 128 --run_dir {tmp_path / 'run'}"
    main(parse_config(options.split()))
    before, *_, after = read_lines(tmp_path / "run")
    assert after["eval_pass@1"] > before["eval_pass@1"] + 0.15
    assert after["eval_length"] > before["eval_length"] + 10


@pytest.mark.study
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("options, reached", [("", 0.93), ("--lora_rank 8", 0.88)])
def test_the_default_run_learns_what_the_readme_says(
    seed: int, options: str, reached: float, tmp_path: Path
) -> None:
    """Takes minutes per seed, so it needs `uv run --group dev pytest -m study`. The test above is its
    short form."""
    main(parse_config([*options.split(), "--seed", str(seed), "--run_dir", str(tmp_path / "run")]))
    before, *_, after = read_lines(tmp_path / "run")
    assert before["eval_pass@1"] <= 0.35 and after["eval_pass@1"] >= reached
    assert after["eval_length"] >= 1.5 * before["eval_length"]
