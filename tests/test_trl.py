"""From the same completions and rewards, `update` gives the same weights as TRL's GRPOTrainer.

    uv run --group dev --with trl pytest -m study -k trl -s

This holds in float64, for each loss and advantage scale, with one and with four updates per rollout. Then each of
DIFFERENCES, an edit of R1ZeroTrain.py, must change the weights by far more than rounding. The comparison would
therefore notice such a mistake.
"""

import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest
import torch
from benchmark import trl_options

import R1ZeroTrain
from R1ZeroTrain import Config, Rollout

Q, G, T = 6, 4, 8  # questions, completions of each, most tokens of a completion
EOS = 256  # of the tokenizer in conftest.py
ADAM_EPS = 0.01  # large, because otherwise Adam would hide a wrong scale of the gradient
ROUNDING, NOTICED = 1e-10, 1e-5  # distances between weights, divided by how far training moved them

CASES = list(product(["grpo", "dapo", "dr_grpo"], ["group", "none"], [1, 4]))
ONE, FOUR = ("grpo", "group", 1), ("grpo", "group", 4)
MEAN, CLAMP = "rewards - rewards.mean(dim=1, keepdim=True)", "clamp(1 - clip_low, 1 + clip_high)"
MINIMUM = "torch.minimum(ratio * advantages, clipped * advantages)"
WEIGHTS = "token_weights(lengths[rows], cfg.loss, cfg.max_new_tokens) / len(batches)"
PREDICT = "predict(policy, rollout.prompt_ids[rows], ids, "
DIFFERENCES = {  # name -> the case, code of R1ZeroTrain.py, the code that replaces it
    "std with ddof 0": (ONE, "rewards.std(dim=1,", "rewards.std(correction=0, dim=1,"),
    "std without 1e-4": (("dr_grpo", "group", 1), "keepdim=True) + 1e-4)", "keepdim=True))"),
    "mean of all groups": (ONE, MEAN, "rewards - rewards.mean()"),
    "weights of each micro-batch": (("dapo", "group", 1), ", weights[rows])", f", {WEIGHTS})"),
    "dr_grpo as dapo": (("dr_grpo", "none", 1), "(n * max_new_tokens)", "lengths.sum()"),
    "EOS not trained": (ONE, "mask = ids >= 0 ", f"mask = (ids >= 0) & (ids != {EOS}) "),
    "temperature ignored": (ONE, f"{PREDICT}cfg)", f"{PREDICT}Config())"),
    "k1 for k3": (ONE, "torch.exp(log_ratio_ref) - log_ratio_ref - 1", "-log_ratio_ref"),
    "k3 times the ratio, TRL's default": (ONE, "kl_beta * k3\n", "kl_beta * k3 * ratio\n"),
    "no lower clip": (FOUR, CLAMP, "clamp(max=1 + clip_high)"),
    "no upper clip": (FOUR, CLAMP, "clamp(min=1 - clip_low)"),
    "clip without the minimum": (FOUR, MINIMUM, "clipped * advantages"),
    "pi_old of every update": (FOUR, "(logp, logp_old[i],", "(logp, logp.detach(),"),
    "gradient norm not clipped": (FOUR, "cfg.max_grad_norm)", "1e9)"),
    "other betas of Adam": (FOUR, "betas=[0.9, 0.95]", "betas=[0.9, 0.999]"),
}


def options(case: tuple, model: Path) -> Config:
    return Config(
        model=str(model),
        loss=case[0],
        advantage_scale=case[1],
        updates_per_rollout=case[2],
        steps=1,
        questions_per_step=Q,
        group_size=G,
        max_new_tokens=T,
        temperature=0.9,
        lr=1e-3,
        kl_beta=0.1,
        clip_high=0.28,  # not clip_low, so that swapping them is noticed
        max_grad_norm=3.0,  # some gradients are larger, some smaller
        tokens_per_microbatch=70,  # micro-batches of 4 to 6 rows; TRL has three of 8
        device="cpu",
    )


def make_rollout() -> tuple[Rollout, torch.Tensor]:
    """Random completions, and their rewards [Q, G]: prompts of 3 to 9 tokens, completions of 1 to 8."""
    rng = torch.Generator().manual_seed(0)

    def random(end: int, *size: int) -> torch.Tensor:
        return torch.randint(end, size, generator=rng)

    places, lengths = torch.arange(T), 1 + random(T, Q * G)
    truncated = (lengths == T) & (random(4, Q * G) > 0)  # the last of T tokens may also be EOS
    # There are only 8 tokens, so that completions with opposite advantages share them.
    ids = random(8, Q * G, T)
    ids[(places == lengths[:, None] - 1) & ~truncated[:, None]] = EOS
    ids[places >= lengths[:, None]] = -1
    prompt_ids = random(EOS, Q, 9).masked_fill(torch.arange(9) < random(7, Q, 1), -1)
    rewards = torch.tensor([0.0, 0.1, 1.0, 1.1])[random(4, Q, G)]
    rewards[0], rewards[1] = 0.0, 1.1  # two groups of equal rewards
    padded = prompt_ids.repeat_interleave(G, 0)
    return Rollout(padded, ids, lengths, truncated, torch.zeros(Q * G, T), []), rewards


@torch.no_grad()
def move(policy: torch.nn.Module) -> torch.nn.Module:
    """Moves the policy away from the reference, so that the KL is not 0 at the first update."""
    rng = torch.Generator().manual_seed(1)
    for weight in policy.parameters():
        weight += 0.02 * torch.randn(weight.shape, generator=rng)
    return policy


def flat(policy: torch.nn.Module) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in policy.parameters()])


def ours(case: tuple, model: Path, module: ModuleType = R1ZeroTrain) -> tuple:
    """(weights, how far they moved, metrics)"""
    cfg, (rollout, rewards) = options(case, model), make_rollout()
    accelerator = module.make_accelerator(cfg)
    policy, reference, _, optimizer = module.set_up(cfg, accelerator, {})
    optimizer.param_groups[0]["eps"] = ADAM_EPS
    start = flat(move(policy))
    advantages = module.group_advantages(rewards, cfg.advantage_scale)
    metrics = module.update(policy, reference, optimizer, rollout, advantages, cfg, accelerator)
    return flat(policy), (flat(policy) - start).norm(), metrics


def theirs(case: tuple, model: Path) -> torch.Tensor:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    cfg, (rollout, rewards) = options(case, model), make_rollout()
    # `main` sets the learning rate, not `update`. The optimizer is TRL's default, but not fused.
    others = {"lr_scheduler_type": "constant", "optim": "adamw_torch", "adam_epsilon": ADAM_EPS}
    args = GRPOConfig(cfg.model, **trl_options(cfg, 8) | others)
    tokens = {
        name: [row[row >= 0].tolist() for row in ids]
        for name, ids in {"prompt_ids": rollout.prompt_ids, "completion_ids": rollout.ids}.items()
    }
    trainer = GRPOTrainer(
        model=move(R1ZeroTrain.load_policy(cfg.model)),  # TRL reads the reference from the folder
        reward_funcs=lambda completions, **_: rewards.flatten().tolist(),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["not used"] * Q}),
        processing_class=R1ZeroTrain.load_tokenizer(cfg.model),
        rollout_func=lambda prompts, trainer: tokens | {"logprobs": None},
    )
    with redirect_stdout(None):
        trainer.train()
    return flat(trainer.model)


def edited(old: str, new: str) -> ModuleType:
    """R1ZeroTrain with the code `old` replaced by `new`."""
    source = Path(R1ZeroTrain.__file__).read_text()
    assert source.count(old) == 1, f"R1ZeroTrain.py has changed; update the pattern {old}"
    module = ModuleType("R1ZeroTrain")
    module.__file__ = R1ZeroTrain.__file__
    exec(source.replace(old, new), module.__dict__)
    return module


@pytest.fixture
def model(tiny_qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A float64 model. From here on, code that asks for float32 gets float64, here and in TRL."""
    pytest.importorskip("trl", reason="needs uv run --with trl")
    import trl.trainer.grpo_trainer  # noqa: F401  # an import below would keep the wrong float32

    R1ZeroTrain.load_policy(str(tiny_qwen2)).double().save_pretrained(tmp_path)
    R1ZeroTrain.load_tokenizer(str(tiny_qwen2)).save_pretrained(tmp_path)
    float32 = torch.float32
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield tmp_path
    torch.set_default_dtype(float32)


@pytest.mark.study
@pytest.mark.filterwarnings("ignore")  # TRL calls rollout_func experimental
def test_updates_equal_those_of_trl(model: Path) -> None:
    rollout, _ = make_rollout()
    assert rollout.truncated.any() and (rollout.lengths[~rollout.truncated] == T).any()
    expected, gaps, grad_norms = {}, {}, []
    for case in CASES:
        expected[case] = theirs(case, model)
        weights, moved, metrics = ours(case, model)
        gaps[case] = float((weights - expected[case]).norm() / moved)
        assert metrics["kl"] > 0.01 and (metrics["clip_fraction"] > 0.01) == (case[2] == 4)
        grad_norms.append(metrics["grad_norm"])
    assert min(grad_norms) < options(ONE, model).max_grad_norm < max(grad_norms)
    same, *_ = ours(case, model, edited(MEAN, MEAN))
    assert torch.equal(same, weights), "an edited module computes as the imported one does"

    differences = {}
    for name, (case, old, new) in DIFFERENCES.items():
        weights, moved, _ = ours(case, model, edited(old, new))
        differences[name] = float((weights - expected[case]).norm() / moved)

    equal = sum(gap < ROUNDING for gap in gaps.values())
    noticed = sum(difference > NOTICED for difference in differences.values())
    result = (
        f"{equal} of {len(gaps)} cases equal to {max(gaps.values()):.0e}; {noticed} of "
        f"{len(differences)} differences noticed (smallest {min(differences.values()):.0e}): "
        + ", ".join(f"{name} {difference:.0e}" for name, difference in differences.items())
    )
    print(f"\n{result}", file=sys.stderr)
    assert (equal, noticed) == (len(gaps), len(differences)), result
