"""Sampling, scoring, updates and whole runs of R1ZeroTrain.py, each compared with a slow and obvious equivalent.

All tests use random models of 2 layers. test_grpo_math.py tests the formulas on their own, test_cli.py the command
line.
"""

import copy
import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from accelerate import Accelerator
from conftest import letter_reward, plain_forward, prompt_of, read_lines
from pytest import approx
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import R1ZeroTrain
from prompts import TASKS, render_prompt
from R1ZeroTrain import (
    Config,
    HeadLogprobs,
    Rollout,
    draw,
    generate,
    load_policy,
    load_tokenizer,
    main,
    parse_config,
    seeded,
    set_up,
    token_logprobs,
    token_weights,
    train_step,
    update,
)

QUESTIONS = [
    {"question": question, "answer": {"numbers": [1, 2], "target": 3}, "index": i}
    for i, question in enumerate(
        ["Why?", "And what is this, then?", "So?", "Which word here is the longest of all?"]
    )
]
SMALL = {"max_new_tokens": 24, "group_size": 3, "rollout_rows": 6, "max_grad_norm": 1000.0}


def config(**options: object) -> Config:
    return Config(**(SMALL | options))


def load(folder: Path, eos: int = 16, gradient_checkpointing: bool = False) -> tuple:
    """Policy and tokenizer. Like <|endoftext|>, `eos` of the 256 bytes end a completion, so that lengths vary."""
    policy = load_policy(str(folder), gradient_checkpointing)
    policy.generation_config.eos_token_id = list(range(0, 256, 256 // eos))
    return policy, load_tokenizer(str(folder))


def roll_out(models: tuple, questions: list[dict] = QUESTIONS, **options: object) -> Rollout:
    cfg = config(**options)
    return generate(*models, questions, cfg.group_size, cfg)


def shapes_read(module: torch.nn.Module) -> list[torch.Size]:
    """Collects the shape of the first argument of each call of the module from now on."""
    shapes = []
    module.register_forward_pre_hook(
        lambda _, args, named: shapes.append([*args, *named.values()][0].shape), with_kwargs=True
    )
    return shapes


# --- sampling, and scoring what was sampled --------------------------------------------------------------------------


# GPT-2 has absolute positions.
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_qwen2", "tiny_gpt2"])
@torch.no_grad()
def test_sampling_and_scoring_equal_a_plain_forward_pass(
    model: str, request: pytest.FixtureRequest
) -> None:
    policy, tokenizer = load(request.getfixturevalue(model), eos=4)
    # Long enough for a cache with too little room to run out of it.
    cfg = config(max_new_tokens=90, temperature=1.3)
    rollout = generate(policy, tokenizer, QUESTIONS, 3, cfg)
    eos = torch.tensor([tokenizer.eos_token_id, *policy.generation_config.eos_token_id])
    plain, lengths = [], rollout.lengths.tolist()
    for row, length in enumerate(lengths):
        prompt = render_prompt(tokenizer, QUESTIONS[row // 3]["question"])
        assert prompt_of(rollout, row).tolist() == tokenizer(prompt)["input_ids"]

        logp, entropy, all_logp = plain_forward(policy, rollout, row, cfg.temperature)
        plain.append(torch.stack([logp, entropy]))
        uniforms = torch.rand(3, 90, generator=seeded(cfg.seed, row // 3))[row % 3, :length]
        first_to_exceed = (all_logp.exp().cumsum(1) <= uniforms[:, None]).sum(1)
        ids = rollout.ids[row, :length]
        assert torch.equal(ids, first_to_exceed)
        assert_close(rollout.logp_sampled[row, :length].double(), logp, atol=1e-5, rtol=0)

        # Any EOS ends a completion, and is its last token.
        ended = not rollout.truncated[row]
        assert torch.isin(ids, eos).tolist() == [False] * (length - 1) + [ended]
        assert ended or length == 90
        assert rollout.text[row] == "<think>" + tokenizer.decode(ids[: length - ended])
    assert len({*lengths}) > 4 and rollout.truncated.any(), "or this test shows little"

    *found, mask = token_logprobs(policy, rollout, torch.arange(12), cfg)
    assert mask.tolist() == [[t < length for t in range(90)] for length in lengths]
    expected = torch.cat(plain, dim=1)
    assert_close(torch.stack(found)[:, mask].double(), expected, atol=1e-5, rtol=1e-5)


def test_a_prompt_is_read_once_and_finished_rows_leave_the_batch(tiny_llama: Path) -> None:
    models = load(tiny_llama, eos=32)
    shapes = shapes_read(models[0])
    rollout = roll_out(models, rollout_rows=100, group_size=16)
    (prompts, _), *steps = shapes
    assert prompts == 4, "four prompts are read, not 64"
    for t, (rows, new) in enumerate(steps, start=1):
        unfinished = int((rollout.lengths > t // 8 * 8).sum())  # at the last check
        assert new == 1 and unfinished <= rows < unfinished / 0.8
    assert steps[-1][0] < 16


def test_a_completion_does_not_depend_on_what_else_is_in_the_batch(tiny_llama: Path) -> None:
    policy, tokenizer = models = load(tiny_llama)
    whole = roll_out(models, rollout_rows=100)
    shapes = shapes_read(policy)
    parts = roll_out(models, rollout_rows=2)
    assert torch.equal(parts.ids, whole.ids) and parts.text == whole.text
    assert max(shapes)[0] == 2, "completions of one question are sampled in parts, too"
    for i, question in enumerate(QUESTIONS):
        alone = roll_out(models, [question])
        assert torch.equal(alone.ids, whole.ids[3 * i : 3 * i + 3])
    # Nor does it depend on the padding token.
    tokenizer.pad_token = tokenizer.eos_token
    policy.config.pad_token_id = policy.generation_config.pad_token_id = tokenizer.eos_token_id
    assert torch.equal(roll_out(models).ids, whole.ids)


def test_completions_of_a_model_without_eos_are_truncated(tiny_llama: Path) -> None:
    policy, tokenizer = models = load(tiny_llama)
    policy.generation_config.eos_token_id = tokenizer.eos_token = None
    rollout = roll_out(models)
    assert rollout.truncated.all() and (rollout.lengths == 24).all()


def test_samples_depend_on_seed_and_index_not_on_global_state(tiny_llama: Path) -> None:
    models = load(tiny_llama, eos=1)
    first = roll_out(models).text
    torch.manual_seed(1)  # the global generator has no effect
    assert roll_out(models).text == first
    other_seed = roll_out(models, seed=1).text
    other_index = roll_out(models, [q | {"index": f"eval/{q['index']}"} for q in QUESTIONS]).text
    assert len({*first, *other_seed, *other_index}) == 36
    twice = roll_out(models, [QUESTIONS[0], QUESTIONS[0] | {"index": 9}])
    assert len({*twice.text}) == 6


def test_token_frequencies_match_their_probabilities() -> None:
    p = torch.tensor([0.5, 0.25, 0.2, 0.05])
    uniforms = torch.rand(4000, generator=seeded(0, 0))
    tokens, logp = draw(2 * p.log().expand(4000, -1), uniforms, 2.0)
    assert_close(logp, p[tokens].log())
    chi_square = ((torch.bincount(tokens) - 4000 * p) ** 2 / (4000 * p)).sum()
    assert chi_square < 16.27, "a fair sampler exceeds it in 1 of 1000 seeds (3 degrees of freedom)"


def test_inverse_cdf_by_hand_and_never_a_token_of_probability_0() -> None:
    uniforms = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2**-24])
    logits = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0]).log().expand(6, -1)
    assert draw(logits, uniforms, 1.0)[0].tolist() == [1, 1, 3, 3, 4, 4]


def test_bfloat16_is_used_to_compute_but_not_to_store(tiny_llama: Path) -> None:
    models = load(tiny_llama)
    rollout = roll_out(models)
    exact, rough = (
        token_logprobs(models[0], rollout, torch.arange(12), config(dtype=dtype))[0]
        for dtype in ("float32", "bfloat16")
    )
    assert rough.dtype == models[0].dtype == torch.float32
    assert 1e-6 < (rough - exact).abs().mean() < 0.2


# --- the update ------------------------------------------------------------------------------------------------------


def updated(case: tuple, lr: float = 0.0, **options: object) -> tuple[dict, list[Tensor]]:
    """Updates a copy of the policy. Returns the metrics and the gradient of each update.

    Uses plain gradient descent: Adam's first step is the sign of the gradient, which would magnify rounding."""
    policy, reference, rollout, advantages = case
    policy, cfg, gradients = copy.deepcopy(policy), config(**options), []
    optimizer = torch.optim.SGD(policy.parameters(), lr)
    optimizer.register_step_pre_hook(
        lambda *_: gradients.append(flat(p.grad for p in policy.parameters()))
    )
    reference = reference if cfg.kl_beta else None
    accelerator = Accelerator(cpu=True)
    metrics = update(policy, reference, optimizer, rollout, advantages, cfg, accelerator)
    return metrics, gradients


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def case(tiny_llama: Path) -> tuple:
    """A policy, a reference and a rollout for which no term of the objective is 0."""
    models = load(tiny_llama)
    reference, noise = copy.deepcopy(models[0]), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in reference.parameters():
            p += 0.03 * torch.randn(p.shape, generator=noise)
    rollout = roll_out(models, temperature=0.8)
    return models[0], reference, rollout, torch.randn(12, generator=noise)


@pytest.mark.parametrize("kl_beta", [0.0, 0.5])
@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo"])
def test_update_equals_the_formula_written_out(case: tuple, loss: str, kl_beta: float) -> None:
    """Equations 1 and 2 as the paper writes them, row by row, and metrics as means over all tokens."""
    options = {"loss": loss, "kl_beta": kl_beta, "temperature": 0.8, "updates_per_rollout": 2}
    options |= {"clip_low": 0.01, "clip_high": 0.02, "tokens_per_microbatch": 200}
    metrics, gradients = updated(case, lr=0.02, **options)
    initial, reference, rollout, advantages = case

    # Checked by hand in test_grpo_math.py.
    weights = token_weights(rollout.lengths, loss, 24)
    policy, old, seen = copy.deepcopy(initial), [], []
    for gradient in gradients:
        policy.zero_grad()
        for i, advantage in enumerate(advantages.double()):
            logp, entropy, _ = plain_forward(policy, rollout, i, 0.8)
            logp_ref = plain_forward(reference, rollout, i, 0.8)[0].detach()
            old = old if len(old) == 12 else [*old, logp.detach()]
            ratio = torch.exp(logp - old[i])
            clipped = ratio.clamp(0.99, 1.02)
            k3 = torch.exp(logp_ref - logp) - (logp_ref - logp) - 1
            tokens = torch.minimum(ratio * advantage, clipped * advantage) - kl_beta * k3
            (-weights[i] * tokens.sum()).backward()
            held = clipped * advantage < ratio * advantage
            seen.append(torch.stack([held, entropy, k3]).detach())
        assert relative(gradient, flat(p.grad for p in policy.parameters())) < 1e-5
        with torch.no_grad():
            for p in policy.parameters():
                p -= 0.02 * p.grad
    clip_fraction, entropy, kl = torch.cat(seen, dim=1).mean(1).tolist()
    assert len(gradients) == 2 and clip_fraction > 0.05, "or the clip was not tested"
    assert metrics == {
        "clip_fraction": approx(clip_fraction, abs=0.01),
        "entropy": approx(entropy, rel=1e-4),
        "kl": approx(kl, rel=1e-4) if kl_beta else None,
        "logp_gap": approx(0, abs=1e-4),
        "grad_norm": approx(float(gradients[1].norm()), rel=1e-4),
    }


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo"])
def test_update_does_not_depend_on_the_size_of_micro_batches(
    case: tuple, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In float64, so that rounding is far below the tolerance of 1e-6.
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    exact = [copy.deepcopy(model).double() for model in case[:2]]
    (whole, (gradient,)), *parts = (
        updated((*exact, *case[2:]), loss=loss, kl_beta=0.1, tokens_per_microbatch=tokens)
        for tokens in (10**6, 1, 150)  # all rows; a row each; a few rows
    )
    for metrics, (sum_of_parts,) in parts:
        assert relative(sum_of_parts, gradient) < 1e-6
        assert metrics == approx(whole, rel=1e-5, abs=1e-6)


def test_first_update_has_ratio_exactly_1_and_the_second_has_not(
    case: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact, grpo_loss = [], R1ZeroTrain.grpo_loss

    def spy(logp: Tensor, logp_old: Tensor, *rest: object) -> tuple:
        assert not logp_old.requires_grad
        exact.append(torch.equal(logp, logp_old))
        return grpo_loss(logp, logp_old, *rest)

    monkeypatch.setattr(R1ZeroTrain, "grpo_loss", spy)
    updated(case, lr=0.02, tokens_per_microbatch=150, updates_per_rollout=2)
    parts = len(exact) // 2
    assert parts > 1 and exact == [True] * parts + [False] * parts


def test_the_gradient_from_the_head_is_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """With --dtype bfloat16, states are bfloat16, and a vocabulary has hundreds of pieces."""
    monkeypatch.setattr(R1ZeroTrain, "LOGITS_AT_ONCE", 0)  # pieces of one row
    states, head = (torch.randn(n, 16, generator=seeded(0, n)).bfloat16() for n in (32, 2000))
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        leaf = states.to(dtype).requires_grad_()
        HeadLogprobs.apply(leaf, head.to(dtype) / 4, torch.arange(32), config())[0].sum().backward()
        gradients.append(leaf.grad.float())
    assert relative(*gradients[::-1]) < 0.005, "half a step of bfloat16 is 0.002"


@pytest.mark.parametrize(
    "model", ["tiny_llama", "tiny_gpt2"]
)  # the second model has dropout, which stays off
def test_gradient_checkpointing_changes_only_memory(
    model: str, request: pytest.FixtureRequest
) -> None:
    found = []
    for checkpointing in (False, True):
        policy, _ = models = load(request.getfixturevalue(model), 16, checkpointing)
        shapes = shapes_read(policy)
        rollout = roll_out(models, rollout_rows=100)
        assert {new for _, new in shapes[1:]} == {1}, "the sampler still has its cache"
        (blocks,) = (m for m in policy.modules() if isinstance(m, torch.nn.ModuleList))
        calls = shapes_read(blocks[0].mlp)
        case = policy, policy, rollout, torch.linspace(-1, 1, 12)
        metrics, (gradient,) = updated(case, kl_beta=0.1, gradient_checkpointing=checkpointing)
        found.append((metrics, gradient, len(calls)))
    (metrics, gradient, calls), leaner = found
    assert leaner[0] == approx(metrics, rel=1e-4, abs=1e-5)
    assert relative(leaner[1], gradient) < 1e-5
    assert calls == 4, "prompts, then completions, of the reference and of the policy"
    assert leaner[2] == 3, "both at once, and once more for the policy in its backward pass"


def test_a_large_gradient_is_clipped_and_its_original_norm_is_logged(case: tuple) -> None:
    metrics, (gradient,) = updated(case, kl_beta=0.1, max_grad_norm=0.01)
    assert float(gradient.norm()) == approx(0.01, rel=1e-3)
    assert metrics == updated(case, kl_beta=0.1)[0] and metrics["grad_norm"] > 0.1


@pytest.mark.parametrize("kl_beta", [0.0, 0.1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_changes_policy_and_sampler_and_not_the_reference(
    tiny_llama: Path, dtype: str, kl_beta: float
) -> None:
    cfg = config(dtype=dtype, kl_beta=kl_beta, model=str(tiny_llama))
    policy, reference, sampler, _ = models = set_up(cfg, accelerator := Accelerator(cpu=True), {})
    first = flat(policy.parameters()).to(getattr(torch, dtype))
    rest = load_tokenizer(cfg.model), QUESTIONS, cfg, accelerator
    metrics = [train_step(*models, *rest) for _ in range(2)][1][0]
    trained, sampled = flat(policy.parameters()), flat(sampler.parameters())
    assert trained.dtype == torch.float32 and sampled.dtype == first.dtype
    assert torch.equal(sampled, trained.to(first.dtype)) and not torch.equal(sampled, first)
    assert sampler.model.rotary_emb.inv_freq.dtype == torch.float32, "positions would be rounded"
    assert metrics["grad_norm"] > 0 and metrics["logp_gap"] < 0.1
    if kl_beta == 0:
        assert reference is None and metrics["kl"] is None, "not 0: it was not measured"
    else:
        assert torch.equal(flat(reference.parameters()), first) and metrics["kl"] > 0
        assert not any(p.requires_grad for p in reference.parameters())


# --- whole runs ------------------------------------------------------------------------------------------------------

STEPS = 5
TIMINGS = {"completion_tokens_per_second", "seconds"}
METRICS = "step reward accuracy format length truncated kl entropy clip_fraction logp_gap grad_norm lr equal_groups"
EVALUATION = "eval_pass@1 eval_length eval_format eval_truncated"


def run(model: Path, run_dir: Path, **more: object) -> Path:
    options = {"model": model, "run_dir": run_dir, "steps": STEPS, "lr": 0.01, "device": "cpu"}
    options |= {"max_new_tokens": 12, "questions_per_step": 2, "group_size": 4, "save_every": 2}
    options |= {"eval_questions": 4} | more
    main(parse_config([f"--{name}={value}" for name, value in options.items()]))
    return run_dir


def numbers(run_dir: Path) -> list[dict]:
    """The log without times."""
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in read_lines(run_dir)]


def weights(run_dir: Path) -> bytes:
    return (run_dir / "model/model.safetensors").read_bytes()


def same_run(left: Path, right: Path) -> bool:
    logs = [(numbers(path), read_lines(path, "completions.jsonl")) for path in (left, right)]
    return logs[0] == logs[1] and weights(left) == weights(right)


@pytest.fixture(scope="module", autouse=True)
def _trivial_reward() -> Iterator[None]:
    """Rewards a lower-case letter, and makes importing wandb fail, because only --wandb may need it."""
    rewarded = dataclasses.replace(TASKS["countdown"], reward=letter_reward)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "countdown", rewarded)
        patch.setitem(sys.modules, "wandb", None)
        yield


@pytest.fixture(scope="module")
def finished(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tiny_llama, tmp_path_factory.mktemp("runs") / "finished")


def test_run_directory_has_the_documented_files(finished: Path, tiny_llama: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "completions.jsonl", "checkpoint", "model"}
    assert weights(finished) != (tiny_llama / "model.safetensors").read_bytes(), "nothing learned"
    assert AutoModelForCausalLM.from_pretrained(finished / "model").dtype == torch.float32


def test_metrics_have_every_documented_key_and_each_step_once(finished: Path) -> None:
    lines = read_lines(finished)
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    means, names = EVALUATION.split(), TIMINGS.union(METRICS.split())
    evaluation = {*means, *(f"{name}_interval" for name in means)}
    for step, line in enumerate(lines):
        assert set(line) == names | (evaluation if step in (0, STEPS) else set())
        assert {type(line[name]) for name in names} == {int, float}
        assert line["logp_gap"] < 1e-4
        assert 0 < line["length"] <= 12 and line["entropy"] > 0 == line["clip_fraction"]
        assert line["reward"] == approx(line["accuracy"] + 0.1 * line["format"])
        assert line["lr"] == approx(0.01 * (1 - step / STEPS))
        assert (line["kl"] > 0) == (step > 0), "at step 0 the policy is the reference"


def test_completions_are_recorded_with_question_rewards_and_advantage(finished: Path) -> None:
    records = read_lines(finished, "completions.jsonl")
    for record in records:
        assert record["text"].startswith("<think>")
        assert "create an equation that equals" in record["question"]
        assert record["accuracy"] == letter_reward(record["text"], [], 0)
    assert {r["step"] for r in records if "advantage" not in r} == {0, STEPS}, "the held-out ones"
    trained = [record for record in records if "advantage" in record]
    assert {record["step"] for record in trained} == set(range(STEPS + 1))
    assert {r["accuracy"] for r in trained if r["advantage"] > 0} == {1}


def test_same_seed_same_run_and_other_seed_other_run(
    finished: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    assert same_run(run(tiny_llama, tmp_path / "again"), finished)
    other = run(tiny_llama, tmp_path / "other", seed=1)
    assert weights(other) != weights(finished)


def test_a_resumed_run_equals_the_uninterrupted_one(
    finished: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates, stopped = [update] * 3, tmp_path / "stopped"
    monkeypatch.setattr(R1ZeroTrain, "update", lambda *args: updates.pop()(*args))
    with pytest.raises(IndexError):
        run(tiny_llama, stopped)
    assert len(read_lines(stopped)) == 3, "step 2 is in the log, but not in the checkpoint"
    updates += [update] * (STEPS + 1 - 2)
    main(parse_config(["--resume", str(stopped)]))
    assert not updates, "it continues from step 2"
    assert same_run(stopped, finished)

    # A complete run can be continued, too.
    updates += [update] * 3
    main(parse_config(["--resume", str(stopped), "--steps", str(STEPS + 2)]))
    lines = numbers(stopped)
    assert lines[:STEPS] == numbers(finished)[:STEPS]
    assert [line["step"] for line in lines] == list(range(STEPS + 3))
    assert [line["step"] for line in lines if "eval_pass@1" in line] == [0, STEPS + 2]


def test_training_increases_the_reward(tiny_llama: Path, tmp_path: Path) -> None:
    more = {"lr": 0.02, "steps": 8, "max_new_tokens": 3, "group_size": 32}
    first, *_, last = read_lines(run(tiny_llama, tmp_path / "run", **more))
    assert first["reward"] < 0.5 and last["reward"] > first["reward"] + 0.4
    assert last["eval_pass@1"] > first["eval_pass@1"]


def test_a_run_with_gradient_checkpointing_is_the_same_run(
    finished: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    first, *_, last = lines = read_lines(run(tiny_llama, tmp_path, gradient_checkpointing=True))
    for name in ("reward", "entropy", "grad_norm", "eval_pass@1"):
        assert first[name] == approx(read_lines(finished)[0][name], rel=1e-4), name
    assert max(line["logp_gap"] for line in lines) < 1e-4 and last["kl"] > 0


def test_evaluation_is_a_function_of_the_weights(
    finished: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    """A run that learns nothing has the same metrics before and after, and any other run has them before training."""
    before, _, after = numbers(run(tiny_llama, tmp_path / "run", lr=0, steps=2))
    for name in EVALUATION.split():
        assert before[name] == after[name] == read_lines(finished)[0][name]


def test_wandb_logs_each_line_offline(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = MagicMock()
    fake.__spec__ = fake  # Accelerate looks for it to see whether wandb is installed
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run_dir = run(tiny_llama, tmp_path / "run", wandb=True, steps=1)
    options, (values,) = fake.init.call_args.kwargs, fake.config.update.call_args.args
    assert (
        os.environ["WANDB_MODE"] == "offline" and options["dir"] == run_dir and values["lr"] == 0.01
    )
    logged = [call.args[0]["reward"] for call in fake.init().log.call_args_list]
    assert logged == [line["reward"] for line in read_lines(run_dir)]
    fake.init().finish.assert_called_once()


def test_importing_the_modules_has_no_side_effect(tmp_path: Path) -> None:
    program = """
import sys
import prompts, rewards
assert not {"torch", "transformers", "datasets"} & set(sys.modules), "prompts and rewards are plain Python"
import R1ZeroTrain, torch
assert not {"wandb", "datasets"} & set(sys.modules)
assert not torch.cuda.is_initialized()
assert torch.get_default_dtype() == torch.float32
"""
    root = str(Path(R1ZeroTrain.__file__).parent)
    environment = os.environ | {"PYTHONPATH": root, "HOME": str(tmp_path)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert not done.stdout + done.stderr
    assert not list(tmp_path.iterdir()), "nothing is written"
