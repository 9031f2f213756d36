"""R1ZeroTrain.py in motion: sampling, scoring, updating and whole runs, each against a slow and obvious equivalent.

All on random models of 2 layers. What the formulas give is in test_grpo_math.py, what the command line does in
test_cli.py.
"""

import copy
import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import letter_reward, prompt_of, read_lines
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import R1ZeroTrain
from prompts import TASKS as REGISTRY
from R1ZeroTrain import (
    Config,
    Rollout,
    generate,
    load_policy,
    load_tokenizer,
    main,
    parse_config,
    sample,
    token_logprobs,
    update,
)

ROOT = Path(R1ZeroTrain.__file__).parent
QUESTIONS = [
    "Why?",
    "And what is this, then?",
    "So?",
    "Which word of this question is the longest of all?",
]
ANSWER = {"numbers": [1, 2], "target": 3}
TASKS = [
    {"question": question, "answer": ANSWER, "index": i} for i, question in enumerate(QUESTIONS)
]


def progress(message: str, ids: Tensor | None = None) -> None:
    pass


def config(**options: object) -> Config:
    return Config(
        **(
            {"max_new_tokens": 24, "group_size": 3, "rollout_rows": 6, "max_grad_norm": 1000.0}
            | options
        )
    )


def load(folder: Path, eos: int = 0) -> tuple:
    """Policy and tokenizer; `eos` of the 256 bytes end a completion, as <|endoftext|> does: now one, now another."""
    policy, tokenizer = load_policy(str(folder)), load_tokenizer(str(folder))
    policy.generation_config.eos_token_id = list(range(0, 256, 256 // eos)) if eos else None
    return policy, tokenizer


def roll_out(policy, tokenizer, cfg: Config, tasks: list[dict] = TASKS) -> Rollout:
    return generate(policy, tokenizer, tasks, cfg.group_size, cfg, "test", progress)


# --- sampling --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample_slowly(
    policy, prompt: list[int], uniforms: list[float], eos: set[int], temperature: float
) -> tuple:
    """One completion by the book: no batch, no padding, no cache, the whole text through the model for each token."""
    ids, logp = [], []
    for u in uniforms:
        logits = policy(torch.tensor([prompt + ids]), use_cache=False).logits[0, -1].double()
        probabilities = torch.softmax(logits / temperature, dim=-1)
        token = int(
            (probabilities.cumsum(0) <= u * probabilities.sum()).sum()
        )  # the first to exceed u
        ids.append(token)
        logp.append(float(probabilities[token].log()))
        if token in eos:
            break
    return ids, logp


@pytest.mark.parametrize(
    "model", ["tiny_llama", "tiny_qwen2", "tiny_gpt2"]
)  # the last has absolute positions
def test_sampling_equals_a_loop_without_cache_batch_and_padding(
    model: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, tokenizer = load(request.getfixturevalue(model), eos=4)
    cfg = config(
        max_new_tokens=90, temperature=1.3
    )  # long enough for a cache with room to run out of it
    drawn = []

    def spy(policy, prompt_ids: Tensor, prompt_mask: Tensor, uniforms: Tensor, *rest):
        drawn.append(uniforms)
        return sample(policy, prompt_ids, prompt_mask, uniforms, *rest)

    monkeypatch.setattr(R1ZeroTrain, "sample", spy)
    rollout = roll_out(policy, tokenizer, cfg)
    assert [len(part) for part in drawn] == [6, 6], (
        "rollout_rows 6: two questions of three completions at a time"
    )

    eos = {tokenizer.eos_token_id, *policy.generation_config.eos_token_id}
    for row, uniforms in enumerate(torch.cat(drawn).tolist()):
        prompt = tokenizer(rollout.prompts[row // 3])["input_ids"]
        assert prompt_of(rollout, row).tolist() == prompt
        ids, logp = sample_slowly(policy, prompt, uniforms, eos, cfg.temperature)
        length = int(rollout.lengths[row])
        assert rollout.ids[row, :length].tolist() == ids
        assert rollout.logp_sampled[row, :length].tolist() == pytest.approx(logp, abs=1e-5)
        assert bool(rollout.truncated[row]) == (ids[-1] not in eos)
        written = (
            ids[:-1] if ids[-1] in eos else ids
        )  # any other special token is what the policy wrote
        assert rollout.text[row] == "<think>" + tokenizer.decode(written)
    assert len(set(rollout.lengths.tolist())) > 4, (
        "else this has shown little"
    )  # cut off at the limit: see below


def test_each_prompt_is_read_once_and_finished_rows_leave_the_batch(tiny_llama: Path) -> None:
    policy, tokenizer = load(tiny_llama, eos=32)
    shapes = []
    policy.register_forward_pre_hook(
        lambda _, __, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    rollout = roll_out(policy, tokenizer, config(rollout_rows=100, group_size=16))
    (prompts, _), *steps = shapes
    assert prompts == 4 and steps, "four prompts are read, not 64"
    for t, (rows, new) in enumerate(steps, start=1):
        unfinished = int((rollout.lengths > t // 8 * 8).sum())  # when last looked at
        assert new == 1 and unfinished <= rows < max(65, unfinished / 0.8)
    assert steps[-1][0] < 16


def test_any_of_several_eos_ids_ends_a_completion_and_is_its_last_token(tiny_llama: Path) -> None:
    policy, tokenizer = load(tiny_llama, eos=32)
    cfg = config(group_size=16)
    rollout = roll_out(policy, tokenizer, cfg)
    eos = torch.tensor([tokenizer.eos_token_id, *policy.generation_config.eos_token_id])
    ends = torch.isin(rollout.ids, eos) & (
        torch.arange(cfg.max_new_tokens) < rollout.lengths[:, None]
    )
    assert torch.equal(ends.sum(1), (~rollout.truncated).long())
    last = rollout.ids.gather(1, rollout.lengths[:, None] - 1)[:, 0]
    assert torch.equal(torch.isin(last, eos), ~rollout.truncated)
    assert (rollout.lengths[rollout.truncated] == cfg.max_new_tokens).all()
    assert {0, tokenizer.eos_token_id} < set(last.tolist()), "else this has shown little"
    mask = token_logprobs(policy, rollout, torch.arange(64), cfg)[2]
    assert torch.equal(mask.sum(1), rollout.lengths), "EOS is trained"


def test_a_tokenizer_that_pads_with_eos_changes_nothing(tiny_llama: Path) -> None:
    policy, tokenizer = load(tiny_llama, eos=16)
    cfg = config()
    expected = roll_out(policy, tokenizer, cfg)
    tokenizer.pad_token = tokenizer.eos_token
    policy.config.pad_token_id = policy.generation_config.pad_token_id = tokenizer.eos_token_id
    rollout = roll_out(policy, tokenizer, cfg)
    assert torch.equal(rollout.ids, expected.ids) and torch.equal(rollout.lengths, expected.lengths)
    trained = [token_logprobs(policy, r, torch.arange(12), cfg)[0] for r in (rollout, expected)]
    assert torch.equal(*trained)


def test_a_model_that_has_no_eos_is_cut_off_at_the_limit(tiny_llama: Path) -> None:
    policy, tokenizer = load_policy(str(tiny_llama)), load_tokenizer(str(tiny_llama))
    policy.generation_config.eos_token_id = tokenizer.eos_token = None
    rollout = roll_out(policy, tokenizer, config())
    assert rollout.truncated.all() and (rollout.lengths == 24).all()


def test_a_completion_does_not_depend_on_what_else_is_in_the_batch(tiny_llama: Path) -> None:
    policy, tokenizer = load(tiny_llama, eos=16)
    cfg = config(rollout_rows=100)
    together = roll_out(policy, tokenizer, cfg)
    one_question_at_a_time = roll_out(policy, tokenizer, config(rollout_rows=1))
    assert together.text == one_question_at_a_time.text
    assert torch.equal(together.ids, one_question_at_a_time.ids)
    for question, task in enumerate(TASKS):
        alone = roll_out(policy, tokenizer, cfg, [task])
        rows = slice(3 * question, 3 * question + 3)
        assert alone.text == together.text[rows]
        assert torch.equal(alone.ids, together.ids[rows]) and torch.equal(
            alone.lengths, together.lengths[rows]
        )


def test_rollout_rows_bound_the_rows_even_of_one_question(tiny_llama: Path) -> None:
    policy, tokenizer = load(tiny_llama, eos=16)
    whole = roll_out(policy, tokenizer, config(rollout_rows=100))
    rows = []
    policy.register_forward_pre_hook(
        lambda _, __, call: rows.append(len(call["input_ids"])), with_kwargs=True
    )
    parts = roll_out(policy, tokenizer, config(rollout_rows=2))
    assert max(rows) == 2 and torch.equal(parts.ids, whole.ids) and parts.text == whole.text


def test_what_is_sampled_follows_from_seed_stream_and_index(tiny_llama: Path) -> None:
    policy, tokenizer = load(tiny_llama)
    first = roll_out(policy, tokenizer, config())
    torch.manual_seed(1)  # the global generator has no say
    assert roll_out(policy, tokenizer, config()).text == first.text
    other_seed = roll_out(policy, tokenizer, config(seed=1))
    other_stream = generate(policy, tokenizer, TASKS, 3, config(), "other", progress)
    same_question_twice = roll_out(policy, tokenizer, config(), [TASKS[0], TASKS[0] | {"index": 9}])
    assert not set(first.text) & {*other_seed.text, *other_stream.text}
    assert len(set(first.text)) == 12 and len(set(same_question_twice.text)) == 6


class Dice(torch.nn.Module):
    """A policy that says the same whatever it reads."""

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        self.logits = torch.tensor(probabilities).log()
        self.config = LlamaConfig(num_hidden_layers=1)

    def forward(self, input_ids: Tensor, **_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def throw(probabilities: list[float], uniforms: Tensor, temperature: float = 1.0) -> Tensor:
    cfg = config(max_new_tokens=uniforms.shape[1], temperature=temperature)
    prompt = torch.zeros(1, 1, dtype=torch.long)
    return sample(
        Dice(probabilities), prompt, prompt == 0, uniforms, torch.tensor([99]), cfg, progress
    )[0]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_tokens_come_as_often_as_their_probability_says(temperature: float) -> None:
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.25, 0.2, 0.05, 0.0])
    uniforms = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(
        throw(probabilities.tolist(), uniforms, temperature).flatten(), minlength=7
    )
    powers = probabilities ** (1 / temperature)
    expected = 4000 * powers / powers.sum()
    assert (counts[expected == 0] == 0).all()
    chi_square = ((counts - expected) ** 2 / expected)[expected > 0].sum()
    assert chi_square < 16.27, (
        "a fair sampler is above this once in 1000 seeds (3 degrees of freedom)"
    )


@pytest.mark.parametrize(
    ("u", "token"), [(0.0, 1), (0.2499, 1), (0.2501, 3), (0.7499, 3), (0.7501, 4), (1 - 2**-24, 4)]
)
def test_inverse_cdf_by_hand_and_never_a_token_of_probability_0(u: float, token: int) -> None:
    assert throw([0.0, 0.25, 0.0, 0.5, 0.25, 0.0], torch.tensor([[u]])).item() == token


# --- scoring what was sampled ----------------------------------------------------------------------------------------


def logp_slowly(policy, rollout: Rollout, row: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability of each token of one completion, and the entropy there: no padding, all logits, float64."""
    prompt = prompt_of(rollout, row)
    body = rollout.ids[row, : rollout.lengths[row]]
    logits = policy(torch.cat([prompt, body])[None], use_cache=False).logits[0].double()
    all_logp = torch.log_softmax(logits[len(prompt) - 1 : -1] / temperature, dim=-1)
    return all_logp[torch.arange(len(body)), body], -(all_logp.exp() * all_logp).sum(-1)


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_qwen2", "tiny_gpt2"])
def test_token_logprobs_equals_a_full_forward_of_each_row(
    model: str, request: pytest.FixtureRequest
) -> None:
    policy, tokenizer = load(request.getfixturevalue(model), eos=16)
    cfg = config(temperature=0.7)
    rollout = roll_out(policy, tokenizer, cfg)
    for rows in (torch.arange(12), torch.tensor([7, 0, 4]), torch.tensor([5])):
        with torch.no_grad():
            logp, entropy, mask = token_logprobs(policy, rollout, rows, cfg)
        assert (
            logp.shape
            == entropy.shape
            == mask.shape
            == (len(rows), int(rollout.lengths[rows].max()))
        )
        for i, row in enumerate(rows.tolist()):
            expected_logp, expected_entropy = logp_slowly(policy, rollout, row, cfg.temperature)
            assert mask[i].tolist() == [t < len(expected_logp) for t in range(mask.shape[1])]
            torch.testing.assert_close(logp[i][mask[i]].double(), expected_logp, atol=1e-5, rtol=0)
            torch.testing.assert_close(
                entropy[i][mask[i]].double(), expected_entropy, atol=1e-4, rtol=0
            )


def test_bfloat16_is_a_way_of_computing_and_not_of_storing(tiny_llama: Path) -> None:
    policy, tokenizer = load(tiny_llama, eos=16)
    rollout = roll_out(policy, tokenizer, config())
    exact, _, mask = token_logprobs(policy, rollout, torch.arange(12), config())
    rough = token_logprobs(policy, rollout, torch.arange(12), config(dtype="bfloat16"))[0]
    assert rough.dtype == torch.float32
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert 1e-6 < (rough - exact)[mask].abs().mean() < 0.2


# --- the update ------------------------------------------------------------------------------------------------------


class Recorder(torch.optim.SGD):
    """Plain gradient descent that remembers the gradients: Adam's first step is their sign, and blows rounding up."""

    def __init__(self, policy: torch.nn.Module) -> None:
        super().__init__(policy.parameters(), lr=0.0)
        self.gradients: list[Tensor] = []

    def step(self, closure: None = None) -> None:
        grads = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
        self.gradients.append(torch.cat(grads).double())
        super().step(closure)


@dataclasses.dataclass
class Case:
    """A rollout that has something for each term of the objective to do."""

    policy: torch.nn.Module
    reference: torch.nn.Module
    rollout: Rollout
    advantages: Tensor

    def update(
        self, cfg: Config, lr: float | None = 0.0
    ) -> tuple[dict[str, float], list[Tensor], torch.nn.Module]:
        """Metrics, each update's gradient, the policy after; lr None makes no update. This case stays as it is."""
        policy = copy.deepcopy(self.policy)
        optimizer = Recorder(policy)
        metrics = update(
            policy=policy,
            reference=self.reference if cfg.kl_beta > 0 else None,
            optimizer=optimizer,
            step=cfg.steps if lr is None else 0,
            rollout=self.rollout,
            advantages=self.advantages,
            cfg=dataclasses.replace(cfg, lr=lr or 0.0),
            accelerator=Accelerator(cpu=True),
            progress=progress,
        )
        return metrics, optimizer.gradients, policy


@pytest.fixture(scope="module")
def case(tiny_llama: Path) -> Case:
    policy, tokenizer = load(tiny_llama, eos=16)
    rollout = roll_out(policy, tokenizer, config())
    reference = copy.deepcopy(policy)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in reference.parameters():
            p += 0.03 * torch.randn(p.shape, generator=noise)
    return Case(policy, reference, rollout, torch.randn(12, generator=noise))


def objective_slowly(
    case: Case, policy, logp_old: list[Tensor] | None, cfg: Config
) -> tuple[Tensor, list[Tensor]]:
    """Equations 1 and 2 as the paper writes them, row by row: the loss and each row's log-probabilities."""
    loss, rows = torch.zeros((), dtype=torch.float64), []
    for i, advantage in enumerate(case.advantages.double()):
        logp, _ = logp_slowly(policy, case.rollout, i, cfg.temperature)
        with torch.no_grad():
            logp_ref, _ = logp_slowly(case.reference, case.rollout, i, cfg.temperature)
        ratio = torch.exp(logp - (logp.detach() if logp_old is None else logp_old[i]))
        clipped = ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
        k3 = torch.exp(logp_ref - logp) - (logp_ref - logp) - 1
        tokens = torch.minimum(ratio * advantage, clipped * advantage) - cfg.kl_beta * k3
        loss = loss - tokens.mean() / len(case.advantages)
        rows.append(logp.detach())
    return loss, rows


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("kl_beta", [0.0, 0.5])
def test_update_equals_the_formula_written_out(case: Case, kl_beta: float) -> None:
    cfg = config(
        kl_beta=kl_beta,
        updates_per_rollout=2,
        clip_low=0.01,
        clip_high=0.02,
        tokens_per_microbatch=200,
    )
    metrics, gradients, after = case.update(cfg, lr=0.02)

    policy, logp_old = copy.deepcopy(case.policy), None
    for gradient in gradients:
        policy.zero_grad()
        loss, logp = objective_slowly(case, policy, logp_old, cfg)
        loss.backward()
        assert (
            relative(gradient, torch.cat([p.grad.flatten() for p in policy.parameters()]).double())
            < 1e-5
        )
        logp_old = logp_old or logp
        with torch.no_grad():
            for p in policy.parameters():
                p -= 0.02 * p.grad
    for p, expected in zip(after.parameters(), policy.parameters(), strict=True):
        torch.testing.assert_close(p, expected, atol=1e-6, rtol=1e-5)
    assert len(gradients) == 2
    assert 0.1 < metrics["clip_fraction"] < 0.5, "else the clip was not put to the test"
    assert metrics["grad_norm"] == pytest.approx(float(gradients[-1].norm()), rel=1e-4)


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo"])
def test_update_does_not_depend_on_the_size_of_micro_batches(
    case: Case, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In float64, so that what is left of rounding is far below the 1e-6 that are allowed.
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    models = {
        "policy": copy.deepcopy(case.policy).double(),
        "reference": copy.deepcopy(case.reference).double(),
    }
    exact = dataclasses.replace(case, **models)
    options = {"loss": loss, "kl_beta": 0.1}
    whole_metrics, (whole,), _ = exact.update(config(tokens_per_microbatch=10**6, **options))
    for tokens in (1, 150):  # a row each; a few rows
        metrics, (parts,), _ = exact.update(config(tokens_per_microbatch=tokens, **options))
        assert relative(parts, whole) < 1e-6
        assert metrics == pytest.approx(whole_metrics, rel=1e-5, abs=1e-6)


def test_metrics_are_means_over_all_tokens(case: Case) -> None:
    cfg = config(kl_beta=0.1, tokens_per_microbatch=150)
    metrics, _, _ = case.update(cfg)
    with torch.no_grad():
        rows = [logp_slowly(case.policy, case.rollout, i, cfg.temperature) for i in range(12)]
        refs = [logp_slowly(case.reference, case.rollout, i, cfg.temperature)[0] for i in range(12)]
    logp, entropy = (torch.cat(part) for part in zip(*rows, strict=True))
    difference = torch.cat(refs) - logp
    assert metrics["entropy"] == pytest.approx(float(entropy.mean()), rel=1e-4)
    assert metrics["kl"] == pytest.approx(
        float((difference.exp() - difference - 1).mean()), rel=1e-4
    )
    assert 0 <= metrics["logp_gap"] < 1e-4
    twice, _, _ = case.update(dataclasses.replace(cfg, updates_per_rollout=2), lr=0.02)
    assert all(twice[name] == metrics[name] for name in ("kl", "entropy", "logp_gap")), (
        "of the policy that sampled"
    )


def test_first_update_has_ratio_exactly_1_and_the_second_has_not(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    ratios = []

    def spy(logp: Tensor, logp_old: Tensor, logp_ref, advantages, mask: Tensor, *rest, **options):
        assert not logp_old.requires_grad
        ratios.append((logp - logp_old).exp()[mask])
        return grpo_loss(logp, logp_old, logp_ref, advantages, mask, *rest, **options)

    grpo_loss = R1ZeroTrain.grpo_loss
    monkeypatch.setattr(R1ZeroTrain, "grpo_loss", spy)
    once, _, _ = case.update(config(tokens_per_microbatch=150), lr=0.02)
    assert once["clip_fraction"] == 0 and all((ratio == 1).all() for ratio in ratios)
    parts = len(ratios)
    assert parts > 1
    ratios.clear()
    case.update(config(tokens_per_microbatch=150, updates_per_rollout=2), lr=0.02)
    assert len(ratios) == 2 * parts
    assert all((ratio == 1).all() for ratio in ratios[:parts])
    assert all((ratio != 1).any() for ratio in ratios[parts:])


def rows_read(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The rows of each call of token_logprobs from now on."""
    seen = []

    def spy(policy, rollout: Rollout, rows: Tensor, cfg: Config):
        seen.append(rows.tolist())
        return token_logprobs(policy, rollout, rows, cfg)

    monkeypatch.setattr(R1ZeroTrain, "token_logprobs", spy)
    return seen


def test_groups_of_equal_rewards_leave_no_gradient_without_kl(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewards = torch.tensor([[1.1] * 3, [0.1] * 3, [0.0] * 3, [1.0] * 3])
    flat = dataclasses.replace(case, advantages=R1ZeroTrain.group_advantages(rewards))
    seen = rows_read(monkeypatch)
    _, (gradient,), _ = flat.update(config(kl_beta=0.0))
    assert not gradient.any()
    assert [len(rows) for rows in seen] == [1], (
        "one row gives a gradient of zeros; the others cost nothing"
    )


def test_groups_of_equal_rewards_cost_nothing_without_kl(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0], [0.1] * 3, [0.0, 1.1, 1.0], [1.0] * 3])
    mixed = dataclasses.replace(case, advantages=R1ZeroTrain.group_advantages(rewards))
    _, (everything,), _ = mixed.update(
        config(kl_beta=1e-30)
    )  # too small to show, but all rows count
    seen = rows_read(monkeypatch)
    metrics, (gradient,), _ = mixed.update(config(kl_beta=0.0))
    assert sorted(itertools.chain(*seen)) == [0, 1, 2, 6, 7, 8]
    assert relative(gradient, everything) < 1e-6 and everything.norm() > 0
    entropies = [logp_slowly(case.policy, case.rollout, i, 1.0)[1] for i in (0, 1, 2, 6, 7, 8)]
    assert metrics["entropy"] == pytest.approx(
        float(torch.cat(entropies).detach().mean()), rel=1e-4
    )
    seen.clear()
    mixed.update(config(kl_beta=0.1))
    assert len(set(itertools.chain(*seen))) == 12, "the KL of every row counts"


def test_the_heads_gradient_is_added_up_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under FSDP states are bfloat16, and a vocabulary has hundreds of pieces."""
    monkeypatch.setattr(R1ZeroTrain, "LOGITS_AT_ONCE", 0)  # pieces of one row
    generator = torch.Generator().manual_seed(0)
    states, head = (
        torch.randn(32, 16, generator=generator),
        torch.randn(2000, 16, generator=generator) / 4,
    )
    ids, gradients = torch.arange(32), []
    for dtype in ("float32", "bfloat16"):
        leaf = states.bfloat16().to(getattr(torch, dtype)).requires_grad_()
        rounded = head.bfloat16().to(leaf.dtype)
        R1ZeroTrain.HeadLogprobs.apply(leaf, rounded, ids, config(dtype=dtype))[0].sum().backward()
        gradients.append(leaf.grad.float())
    assert relative(gradients[1], gradients[0]) < 0.005, "half a step of bfloat16 is 0.002"


@pytest.mark.parametrize(
    "model", ["tiny_llama", "tiny_gpt2"]
)  # the second has dropout, which has to stay off
def test_gradient_checkpointing_changes_memory_alone(
    model: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(model)
    policy, tokenizer = load(folder, eos=16)
    rollout = roll_out(policy, tokenizer, config())
    leaner = load_policy(str(folder), gradient_checkpointing=True)
    calls, found = [], []
    for module, checkpointing in ((policy, False), (leaner, True)):
        blocks = next(m for m in module.modules() if isinstance(m, torch.nn.ModuleList))
        blocks[0].mlp.register_forward_pre_hook(lambda *_, which=checkpointing: calls.append(which))
        case = Case(module, module, rollout, torch.linspace(-1, 1, 12))
        metrics, (gradient,), _ = case.update(
            config(kl_beta=0.1, gradient_checkpointing=checkpointing)
        )
        found.append((metrics, gradient))
    assert relative(found[1][1], found[0][1]) < 1e-5
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4, abs=1e-5)
    assert calls.count(False) == 4, "prompts, then completions, of the reference and of the policy"
    assert calls.count(True) == 3, "both at once, and once more for the policy in its backward pass"


def test_a_measurement_changes_no_weight(case: Case) -> None:
    metrics, gradients, after = case.update(config(kl_beta=0.1), lr=None)
    assert not gradients and metrics["grad_norm"] == 0 and metrics["kl"] > 0
    for p, expected in zip(after.parameters(), case.policy.parameters(), strict=True):
        assert torch.equal(p, expected) and p.grad is None


def test_a_long_gradient_is_scaled_to_max_grad_norm_and_logged_as_it_was(case: Case) -> None:
    _, (free,), _ = case.update(config(kl_beta=0.1))
    metrics, (held,), _ = case.update(config(kl_beta=0.1, max_grad_norm=0.01))
    assert metrics["grad_norm"] == pytest.approx(float(free.norm()), rel=1e-4)
    assert float(held.norm()) == pytest.approx(0.01, rel=1e-3)


# --- whole runs ------------------------------------------------------------------------------------------------------

STEPS = 5
KEYS = ["step", "reward", "accuracy", "format", "length", "truncated"]
KEYS += [
    "kl",
    "entropy",
    "clip_fraction",
    "logp_gap",
    "grad_norm",
    "lr",
    "equal_groups",
    "skipped_updates",
]
TIMINGS = ["completion_tokens_per_second", "seconds"]
EVAL_OPTIONS = ["--eval_only", "--eval_questions", "4", "--max_new_tokens", "12", "--device", "cpu"]
EVAL_KEYS = [
    f"eval_{name}{more}"
    for name in ("pass@1", "length", "format", "truncated")
    for more in ("", "_interval")
]


def run(model: Path, run_dir: Path, *more: object) -> Path:
    options = {
        **{
            "model": model,
            "run_dir": run_dir,
            "steps": STEPS,
            "lr": 0.01,
            "max_new_tokens": 12,
            "device": "cpu",
        },
        **{"questions_per_step": 2, "group_size": 4, "eval_questions": 4, "save_every": 2},
    }
    main(
        parse_config(
            [str(part) for name, value in options.items() for part in (f"--{name}", value)]
            + [*map(str, more)]
        )
    )
    return run_dir


def without_timings(run_dir: Path) -> list[dict]:
    return [
        {key: value for key, value in line.items() if key not in TIMINGS}
        for line in read_lines(run_dir)
    ]


def weights(folder: Path) -> list[Tensor]:
    return list(AutoModelForCausalLM.from_pretrained(folder).state_dict().values())


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.fixture(scope="module", autouse=True)
def _trivial_reward() -> Iterator[None]:
    """Rewards a small letter, and makes an import of wandb fail: only --wandb may want it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            REGISTRY, "countdown", dataclasses.replace(REGISTRY["countdown"], reward=letter_reward)
        )
        patch.setitem(sys.modules, "wandb", None)
        yield


@pytest.fixture(scope="module")
def finished(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tiny_llama, tmp_path_factory.mktemp("runs") / "finished")


def test_run_directory_has_the_documented_files(finished: Path, tiny_llama: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "config.json",
        "metrics.jsonl",
        "completions.jsonl",
        "checkpoint",
        "best",
        "model",
    }
    saved = Config(**json.loads((finished / "config.json").read_text()))
    assert (saved.steps, saved.lr, saved.model) == (STEPS, 0.01, str(tiny_llama))
    assert "answers" not in AutoTokenizer.from_pretrained(finished / "model").special_tokens_map
    trained, base = weights(finished / "model"), weights(tiny_llama)
    assert not same(trained, base), "a run that has learned nothing proves nothing"
    assert {w.dtype for w in trained} == {torch.float32}


def test_metrics_have_every_documented_key_and_each_step_once(finished: Path) -> None:
    lines = read_lines(finished)
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    for line in lines:
        evaluated = line["step"] in (0, STEPS)
        assert set(line) == {*KEYS, *TIMINGS, *(EVAL_KEYS if evaluated else [])}
        assert all(
            isinstance(value, int | float)
            for key, value in line.items()
            if not key.endswith("_interval")
        )
        assert line["logp_gap"] < 1e-4
        assert 0 <= line["accuracy"] <= 1 and 0 < line["length"] <= 12 and line["entropy"] > 0
        assert line["reward"] == pytest.approx(line["accuracy"] + 0.1 * line["format"])
    assert lines[0]["lr"] == pytest.approx(0.01) and lines[1]["lr"] == pytest.approx(
        0.01 * (1 - 1 / STEPS)
    )


def test_at_step_0_the_policy_is_the_reference(finished: Path) -> None:
    first, *rest = read_lines(finished)
    assert first["kl"] == 0 and first["clip_fraction"] == 0
    assert all(line["kl"] > 0 for line in rest)


def test_completions_are_recorded_with_question_rewards_and_advantage(finished: Path) -> None:
    records = read_lines(finished, "completions.jsonl")
    assert {record["step"] for record in records} == set(range(STEPS + 1))
    for record in records:
        assert record["text"].startswith("<think>") and record["prompt"].endswith("<think>")
        assert "create an equation that equals" in record["question"]
        assert record["accuracy"] == letter_reward(record["text"], [], 0) and record["format"] == 0
    held_out = [record["step"] for record in records if record.get("advantage") is None]
    assert set(held_out) == {0, STEPS}
    trained = [record for record in records if record.get("advantage") is not None]
    assert {record["step"] for record in trained} == set(range(STEPS + 1))
    assert any(record["advantage"] for record in trained)
    assert all(record["accuracy"] == 1 for record in trained if record["advantage"] > 0)


def test_same_seed_same_run_and_other_seed_other_run(
    finished: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    again = run(tiny_llama, tmp_path / "again")
    other = run(tiny_llama, tmp_path / "other", "--seed", 1)
    assert without_timings(again) == without_timings(finished)
    assert read_lines(again, "completions.jsonl") == read_lines(finished, "completions.jsonl")
    assert same(weights(again / "model"), weights(finished / "model"))
    assert without_timings(other)[1:] != without_timings(finished)[1:]
    assert not same(weights(other / "model"), weights(finished / "model"))


class PowerCut(Exception):
    pass


def test_a_resumed_run_equals_the_uninterrupted_one(
    finished: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates = []

    def update_until_step_3(*args, **kwargs):
        updates.append(1)
        if len(updates) == 4:
            raise PowerCut
        return update(*args, **kwargs)

    stopped = tmp_path / "stopped"
    monkeypatch.setattr(R1ZeroTrain, "update", update_until_step_3)
    with pytest.raises(PowerCut):
        run(tiny_llama, stopped)
    assert len(read_lines(stopped)) == 3, (
        "step 2 is logged, but not in the checkpoint: it has to be done again"
    )

    main(parse_config(["--resume", str(stopped)]))
    assert len(updates) == 4 + STEPS + 1 - 2, "it goes on from step 2"
    assert without_timings(stopped) == without_timings(finished)
    assert read_lines(stopped, "completions.jsonl") == read_lines(finished, "completions.jsonl")
    assert same(weights(stopped / "model"), weights(finished / "model"))


def test_a_finished_run_can_go_on(finished: Path, tmp_path: Path) -> None:
    longer = Path(shutil.copytree(finished, tmp_path / "longer"))
    main(parse_config(["--resume", str(longer), "--steps", str(STEPS + 2)]))
    lines = read_lines(longer)
    assert [line["step"] for line in lines] == list(range(STEPS + 3))
    assert without_timings(longer)[:STEPS] == without_timings(finished)[:STEPS]
    assert [line["step"] for line in lines if "eval_pass@1" in line] == [0, STEPS + 2]


def test_eval_only_measures_a_run_and_leaves_it_as_it_was(finished: Path, tmp_path: Path) -> None:
    measured = Path(shutil.copytree(finished, tmp_path / "measured"))
    main(
        parse_config(
            [
                "--model",
                str(finished / "model"),
                "--run_dir",
                str(tmp_path / "fresh"),
                *EVAL_OPTIONS,
            ]
        )
    )
    (line,) = read_lines(tmp_path / "fresh")
    last = read_lines(finished)[-1]
    assert {key: line[key] for key in EVAL_KEYS} == {key: last[key] for key in EVAL_KEYS}
    assert not (tmp_path / "fresh" / "model").exists()

    main(parse_config(["--resume", str(measured), "--eval_only"]))
    assert parse_config(["--resume", str(measured)]).eval_only is False, (
        "else the run could never be trained again"
    )
    assert read_lines(measured)[: STEPS + 1] == read_lines(finished)


def test_the_reference_never_changes(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    references = []

    def spy(policy, reference, *args, **kwargs):
        references.append(reference)
        return update(policy, reference, *args, **kwargs)

    monkeypatch.setattr(R1ZeroTrain, "update", spy)
    run(tiny_llama, tmp_path / "run", "--steps", 2)
    assert all(reference is references[0] for reference in references)
    assert not any(p.requires_grad or p.grad is not None for p in references[0].parameters())
    assert same(list(references[0].state_dict().values()), weights(tiny_llama))


def test_the_sampler_has_the_latest_weights_in_the_precision_of_computing(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled, updated, generate, update = [], [], R1ZeroTrain.generate, R1ZeroTrain.update

    def spy_generate(policy, *rest):
        assert policy.model.rotary_emb.inv_freq.dtype == torch.float32, "positions would be rounded"
        sampled.append([p.clone() for p in policy.parameters()])
        return generate(policy, *rest)

    def spy_update(policy, *rest):
        updated.append([p.detach().to(torch.bfloat16) for p in policy.parameters()])
        assert {p.dtype for p in policy.parameters()} == {torch.float32}
        return update(policy, *rest)

    monkeypatch.setattr(R1ZeroTrain, "generate", spy_generate)
    monkeypatch.setattr(R1ZeroTrain, "update", spy_update)
    lines = read_lines(run(tiny_llama, tmp_path, "--dtype", "bfloat16"))
    first, *steps, last = sampled  # an evaluation comes first, another before the last rollout
    assert len(updated) == STEPS + 1 and all(map(same, [*steps[:-1], last], updated))
    assert same(first, updated[0]) and not same(first, last)
    assert all(line["logp_gap"] < 0.1 for line in lines)


def test_without_kl_no_reference_is_made_and_no_kl_is_logged(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spy(policy, reference, *args, **kwargs):
        assert reference is None
        return update(policy, reference, *args, **kwargs)

    monkeypatch.setattr(R1ZeroTrain, "update", spy)
    lines = read_lines(run(tiny_llama, tmp_path / "run", "--kl_beta", 0, "--steps", 1))
    assert [line["kl"] for line in lines] == [None, None], "not 0: it was not measured"
    assert lines[0]["grad_norm"] > 0


def test_training_finds_what_is_rewarded(tiny_llama: Path, tmp_path: Path) -> None:
    more = {
        "steps": 8,
        "max_new_tokens": 3,
        "questions_per_step": 4,
        "group_size": 16,
        "lr": 0.02,
        "lr_final": 1,
    }
    lines = read_lines(
        run(
            tiny_llama, tmp_path / "run", *(part for n, v in more.items() for part in (f"--{n}", v))
        )
    )
    assert lines[0]["reward"] < 0.5 and lines[-1]["reward"] > lines[0]["reward"] + 0.4
    assert lines[-1]["eval_pass@1"] > lines[0]["eval_pass@1"]
    assert lines[-1]["grad_norm"] == 0, "the last line only measures"


def test_a_run_with_gradient_checkpointing_samples_with_a_cache_all_the_same(
    finished: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths, forward = [], R1ZeroTrain.forward

    def spy(model, ids: Tensor, *rest, **more):
        if not model.training and not torch.is_grad_enabled():
            widths.append(ids.shape[1])
        return forward(model, ids, *rest, **more)

    monkeypatch.setattr(R1ZeroTrain, "forward", spy)
    lines = read_lines(run(tiny_llama, tmp_path, "--gradient_checkpointing"))
    assert widths.count(1) > 0.8 * len(widths), "a token at a time, not all that was written so far"
    first = read_lines(finished)[0]
    for name in first.keys() - set(TIMINGS):
        assert lines[0][name] == pytest.approx(first[name], rel=1e-4, abs=1e-6), name
    assert all(line["logp_gap"] < 1e-4 for line in lines) and lines[-1]["kl"] > 0


def test_evaluation_happens_when_asked(tiny_llama: Path, tmp_path: Path) -> None:
    lines = read_lines(run(tiny_llama, tmp_path / "run", "--eval_every", 2))
    assert [line["step"] for line in lines if "eval_pass@1" in line] == [0, 2, 4, 5]


def test_evaluation_is_a_function_of_the_weights(
    finished: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    """A run that learns nothing measures the same before and after, and as any other run does before it starts."""
    lines = read_lines(run(tiny_llama, tmp_path / "run", "--lr", 0, "--steps", 2))
    assert {key: lines[0][key] for key in EVAL_KEYS} == {key: lines[-1][key] for key in EVAL_KEYS}
    assert {key: lines[0][key] for key in EVAL_KEYS} == {
        key: read_lines(finished)[0][key] for key in EVAL_KEYS
    }


def test_a_model_without_a_chat_template_gets_the_base_template(
    tiny_llama: Path, tmp_path: Path
) -> None:
    policy, tokenizer = load_policy(str(tiny_llama)), load_tokenizer(str(tiny_llama))
    tokenizer.chat_template = None
    rollout = roll_out(policy, tokenizer, config(max_new_tokens=2), TASKS[:1])
    assert rollout.prompts[0].startswith("A conversation between User and Assistant.")
    assert rollout.text[0].startswith("<think>")


def test_wandb_logs_each_line_offline(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, dict]] = []
    logged: list[dict] = []
    fake = SimpleNamespace(
        __spec__=SimpleNamespace(),  # Accelerate looks for it to see whether wandb is installed
        init=lambda **options: calls.append(("init", options)) or fake,
        config=SimpleNamespace(update=lambda values, **_: calls.append(("config", values))),
        log=lambda line, **_: logged.append(line),
        finish=lambda **_: calls.append(("finish", {})),
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run_dir = run(tiny_llama, tmp_path / "run", "--wandb", "--steps", 1)
    (_, options), (_, values), *rest = calls
    assert options["mode"] == "offline" and Path(options["dir"]) == run_dir and values["lr"] == 0.01
    assert [line["reward"] for line in logged] == [line["reward"] for line in read_lines(run_dir)]
    assert rest == [("finish", {})]


def test_importing_the_modules_has_no_side_effect(tmp_path: Path) -> None:
    program = """
import os, sys
import prompts, rewards
assert not {"torch", "transformers", "datasets"} & set(sys.modules), "prompts and rewards are plain Python"
import R1ZeroTrain, torch
assert not {"wandb", "datasets"} & set(sys.modules)
assert not torch.cuda.is_initialized()
assert torch.get_default_dtype() == torch.float32
"""
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_"))
    }
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir()), "nothing is written"
