"""R1-Zero in one file: a base model learns to reason from rule-based rewards alone, by GRPO (arXiv 2501.12948).

    The algorithm, each step                                      where
    1. draw Q questions                                           question_at, in main
    2. sample G completions of each from the policy               generate
    3. reward each completion: is the answer right, the form kept score
    4. advantage = reward relative to its group        (eq. 3)    group_advantages
    5. clipped policy ratio times advantage, less
       a k3 penalty for leaving the reference          (eq. 1, 2) grpo_loss
    6. step the optimizer, mu times                               update
    7. now and then, measure on held-out questions                evaluate

    uv run R1ZeroTrain.py                     # a tiny policy learns Countdown in minutes, on any computer
    uv run R1ZeroTrain.py --recipe gsm8k      # a real model on real questions; not run here yet
    uv run R1ZeroTrain.py --help              # every option, its meaning and default

Shapes: Q questions a step, G completions a question, N = Q·G rows (question by question), P prompt tokens (padded
left), T completion tokens (padded right), V vocabulary. Prompt and completion of a row meet at column P.

Where it departs from the paper: the advantage divides by std + 1e-4 (as TRL does), so that a group of equal rewards
has advantage 0; the reference stays the first policy (the paper renews it every 400 steps); by default one update
per rollout. `--loss` offers the token weightings of DAPO and Dr. GRPO beside the paper's.
"""

import copy
import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_type_hints

if __name__ == "__main__":
    print("loading torch and transformers", flush=True)  # takes seconds, which should not pass in silence

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.utils.logging import disable_progress_bar

from prompts import UsageError, load_questions, render_prompt
from rewards import countdown_reward, format_reward, gsm8k_reward

Progress = Callable[[str], None]  # told what is being done, so that the progress bar moves within a step
REWARDS = {"countdown": countdown_reward, "gsm8k": gsm8k_reward}


# ---- Config: every option, its default and its meaning, once --------------------------------------------------------


# Types that say which values can work, from the first to the second; 2**20 stands for "as many as you like".
Count = Annotated[int, (1, 2**20)]
CountOrNone = Annotated[int, (0, 2**20)]
Share = Annotated[float, (0, 1)]
Weight = Annotated[float, (0, 100)]


def option(default: object, meaning: str) -> object:
    """A Config field: its default, and what --help says of it."""
    factory = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(**factory, metadata={"help": meaning})


@dataclass
class Config:
    recipe: str = option("tiny", "a named set of defaults: tiny, tinyzero, gsm8k or mac; other options override it")
    # The policy and what it is asked
    model: str = option("notebooks/tiny-base", "policy to start from: a save_pretrained folder or a hub name")
    task: Literal["countdown", "gsm8k"] = option("countdown", "what is asked, and which reward grades it")
    template: Literal["auto", "base"] = option("auto", "auto: the model's chat template if it has one; base: never")
    dataset: str = option("", "hub dataset or local .jsonl .json .parquet .csv file; empty: the task's own")
    operands: Annotated[int, (2, 5)] = option(3, "numbers in a generated Countdown problem")
    operand_range: list[int] = option([1, 9], "smallest and largest number of a generated Countdown problem")
    target_range: list[int] = option([1, 99], "smallest and largest target of a generated Countdown problem")
    # Rollouts
    steps: CountOrNone = option(45, "rollouts to train on")
    questions_per_step: Count = option(16, "Q: questions in a step, over all processes")
    group_size: Annotated[int, (2, 2**20)] = option(16, "G: completions sampled for each question")
    max_new_tokens: Count = option(256, "T: tokens of the longest completion; longer ones are cut off, and fail")
    temperature: Annotated[float, (0.001, 100)] = option(
        1.0, "softmax temperature that completions are sampled and scored at"
    )
    rollout_rows: Count = option(256, "completions sampled at once: bounds the KV cache")
    format_weight: Weight = option(0.1, "reward for a well-formed completion; a right answer earns 1")
    # The update
    lr: Share = option(4e-4, "AdamW's learning rate at the first step")
    lr_final: Share = option(0.0, "share of lr left after the last step; in between it falls linearly")
    kl_beta: Weight = option(0.001, "beta of eq. 1: weight of the KL penalty; 0 needs no reference model")
    clip_low: Share = option(0.2, "epsilon of eq. 1: the ratio is clipped at 1 - clip_low")
    clip_high: Weight = option(0.2, "epsilon of eq. 1: the ratio is clipped at 1 + clip_high")
    loss: Literal["grpo", "dapo", "dr_grpo"] = option("grpo", "how much a token weighs: see token_weights")
    advantage_scale: Literal["group", "none"] = option("group", "divide by the group's std (eq. 3), or by nothing")
    updates_per_rollout: Count = option(1, "mu of the paper: optimizer steps on one rollout")
    max_grad_norm: Annotated[float, (0.001, 1000)] = option(1.0, "a longer gradient is scaled down to this norm")
    tokens_per_microbatch: Count = option(8192, "tokens in one forward pass: bounds memory, not the result")
    # Evaluation, files and machine
    eval_every: CountOrNone = option(0, "steps between evaluations; 0: only before and after")
    eval_questions: Count = option(512, "held-out questions in an evaluation")
    eval_samples: Count = option(1, "K: completions sampled for each held-out question")
    eval_only: bool = option(False, "evaluate the model, and stop")
    seed: Annotated[int, (0, 2**53)] = option(0, "all that is random follows from it")
    device: Literal["auto", "cuda", "mps", "cpu"] = option("auto", "auto: CUDA, else MPS, else CPU")
    dtype: Literal["float32", "bfloat16"] = option("float32", "precision of the computing; weights stay float32")
    run_dir: str = option("", "where the run's files go; empty: runs/<recipe>-<time>")
    save_every: CountOrNone = option(10, "steps between checkpoints; 0: only at the end")
    resume: str = option("", "run directory to go on with, its options the defaults")
    wandb: bool = option(False, "log to Weights & Biases too: offline, unless WANDB_MODE says otherwise")


LARGE_MODEL = {"lr": 1e-6, "lr_final": 1.0, "dtype": "bfloat16", "tokens_per_microbatch": 4096, "eval_every": 50}
RECIPES: dict[str, dict] = {
    "tiny": {},  # R1-Zero in miniature: the defaults above
    "tinyzero": LARGE_MODEL  # github.com/Jiayi-Pan/TinyZero
    | {"model": "Qwen/Qwen2.5-3B", "template": "base", "dataset": "Jiayi-Pan/Countdown-Tasks-3to4", "steps": 1000}
    | {"questions_per_step": 64, "group_size": 8, "max_new_tokens": 1024, "eval_questions": 1024},
    "gsm8k": LARGE_MODEL
    | {"model": "Qwen/Qwen2.5-1.5B-Instruct", "task": "gsm8k", "steps": 500, "max_new_tokens": 512}
    | {"questions_per_step": 8, "group_size": 8, "rollout_rows": 64, "eval_questions": 256},
    "mac": LARGE_MODEL
    | {"model": "Qwen/Qwen2.5-0.5B-Instruct", "task": "gsm8k", "steps": 300, "max_new_tokens": 300, "dtype": "float32"}
    | {"questions_per_step": 4, "group_size": 8, "rollout_rows": 32, "tokens_per_microbatch": 1024}
    | {"eval_questions": 128},
}


def parse_config(arguments: list[str]) -> Config:
    """Config's defaults, overridden by the recipe (or the resumed run's options), overridden by the command line.

    Raises UsageError naming the first option that can't work, its value, and a value that works.
    """
    parser = HfArgumentParser(Config, description=__doc__.split("\n")[0], prog="R1ZeroTrain.py", allow_abbrev=False)

    def one_line(message: str) -> None:  # in place of argparse's usage text
        name = re.match(r"argument --(\w+)", message)
        raise UsageError(f"{message.removeprefix('argument ')}; try {default(name[1]) if name else '--help'}")

    def default(name: str) -> str:
        value = parser.get_default(name)
        return " ".join(map(str, value)) if isinstance(value, list) else str(value) or "--help"

    parser.error = one_line
    first = parser.parse_args(arguments)
    if first.recipe not in RECIPES:
        raise UsageError(f"--recipe {first.recipe}: there is no such recipe; try {', '.join(RECIPES)}")
    base, done = saved_run(first.resume) if first.resume else (RECIPES[first.recipe], 0)
    for name, value in reversed(base.items()):  # as if typed in front, so that they are checked like the rest
        arguments = [f"--{name}", *map(str, value if isinstance(value, list) else [value]), *arguments]
    cfg = Config(**vars(parser.parse_args(arguments)))
    for name, kind in get_type_hints(Config, include_extras=True).items():
        for low, high in getattr(kind, "__metadata__", []):
            if not low <= getattr(cfg, name) <= high:
                raise UsageError(f"--{name} {getattr(cfg, name)}: must be from {low} to {high}; try {default(name)}")
    if done > cfg.steps:
        raise UsageError(f"--steps {cfg.steps}: {cfg.resume} has done {done} already; try {2 * done}")
    return cfg


def saved_run(run_dir: str) -> tuple[dict, int]:
    """The options that a run was started with, but for those of a single call, and the step of its checkpoint."""
    try:
        saved = json.loads((Path(run_dir) / "config.json").read_text())
        options = {name: value for name, value in saved.items() if name not in ("eval_only", "wandb")}
        return options | {"run_dir": run_dir}, json.loads((Path(run_dir) / "checkpoint/state.json").read_text())["step"]
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:  # missing, or damaged
        raise UsageError(f"--resume {run_dir}: no run to go on with ({error}); try a folder in runs/") from error


# ---- Device, randomness, policy -------------------------------------------------------------------------------------


def make_accelerator(cfg: Config) -> Accelerator:
    """One process or many, on CUDA, else MPS, else CPU; lower precision is autocast's job, in `next_token_logits`."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if cfg.device not in ("auto", "cpu", best):
        raise UsageError(f"--device {cfg.device}: this machine has {best}; try {best}")
    accelerator = Accelerator(cpu=cfg.device == "cpu", mixed_precision="no")
    if cfg.questions_per_step % (n := accelerator.num_processes):
        raise UsageError(f"--questions_per_step {cfg.questions_per_step}: not a multiple of {n} processes; try {4 * n}")
    return accelerator


def seeded(*key: object) -> torch.Generator:
    """A generator that depends on the key alone, so that no random state needs saving and none is shared."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def check_model(model: str) -> str:
    """Path or hub name of the model. Raises UsageError before anything is loaded if a local folder lacks a part."""
    folder = next((f for f in (Path(model), Path(__file__).parent / model) if f.is_dir()), None)
    if folder is None:
        if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not Path(model).parent.is_dir():
            return model  # a hub name: owner/model
        raise UsageError(f"--model {model}: no such folder; try notebooks/tiny-base or a hub name like owner/model")
    parts = {"config": ["config.json"], "weights": ["model.safetensors", "model.safetensors.index.json"]}
    parts["tokenizer"] = ["tokenizer.json", "tokenizer.model", "vocab.json"]
    for part, files in parts.items():
        if not any((folder / file).exists() for file in files):
            raise UsageError(f"--model {model}: the folder has no {part} ({files[0]}); try notebooks/tiny-base")
    return str(folder)


def load_policy(model: str, template: str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in float32: at lr 1e-6 an update is smaller than half a bfloat16 step, and would be lost."""
    name = check_model(model)
    options = {"trust_remote_code": False, "local_files_only": Path(name).is_dir()}
    disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        policy, loaded = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options
        )
    except Exception as error:  # of a damaged file each library raises its own kind; all are shown, and end the run
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"--model {model}: cannot be loaded ({reason}); try notebooks/tiny-base") from error
    if loaded["missing_keys"]:  # transformers would go on with random weights in their place
        raise UsageError(f"--model {model}: lacks the weights {sorted(loaded['missing_keys'])[:3]}; try another model")
    if template == "base":
        tokenizer.chat_template = None
    return policy.eval(), tokenizer  # eval: dropout would make the ratio differ from 1 on the first update


# ---- Rollouts: sample G completions of each question ----------------------------------------------------------------


@dataclass
class Rollout:
    """N = Q·G sampled completions, the rows of one question side by side."""

    prompt_ids: Tensor  # [N, P], padded left
    prompt_mask: Tensor  # [N, P], False on padding
    ids: Tensor  # [N, T], padded right; EOS, where there is one, is the last token
    lengths: Tensor  # [N], tokens of each completion, EOS included
    logp_sampled: Tensor  # [N, T], log-probability each token was sampled with
    truncated: Tensor  # [N], True where the token limit cut the completion off
    prompts: list[str]  # Q prompts as the model reads them
    text: list[str]  # N completions as the rewards read them, from the prefilled <think> on


class RoomyLayer(DynamicLayer):
    """KV cache of one layer with room to grow: DynamicLayer would copy all it holds for each new token."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        held = (self.keys, self.values) if start else (key_states[..., :0, :], value_states[..., :0, :])
        # Rows that were copied to their group, or left, are new tensors and need a new room, like one outgrown.
        if start == 0 or end > self.room[0].shape[-2] or held[0].data_ptr() != self.room[0].data_ptr():
            self.is_initialized, self.dtype, self.device = True, key_states.dtype, key_states.device
            self.room = [kept.new_empty(*kept.shape[:2], end + max(64, end // 2), kept.shape[3]) for kept in held]
            for room, kept in zip(self.room, held, strict=True):
                room[..., :start, :] = kept
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[..., start:end, :] = new
        self.keys, self.values = (room[..., :end, :] for room in self.room)
        return self.keys, self.values


def tokenize(tokenizer, tasks: list[dict], device: torch.device) -> tuple[list[str], Tensor, Tensor]:
    """Prompts as text, and as ids and mask [Q, P], padded left so that every completion starts in one column."""
    prompts = [render_prompt(tokenizer, task["question"]) for task in tasks]
    # A chat template writes its own BOS; without one the tokenizer must add it.
    rows = tokenizer(prompts, add_special_tokens=not tokenizer.chat_template)["input_ids"]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)  # [Q, P]
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows], device=device)  # [Q, P]
    return prompts, ids, mask


def eos_ids(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Every id that ends a completion: chat models have several."""
    ids = policy.generation_config.eos_token_id
    return torch.tensor(sorted({tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])} - {None}))


def next_token_logits(model, ids: Tensor, mask: Tensor | None, keep: int, dtype: str, cache=None) -> Tensor:
    """Logits [rows, keep, V] of the last `keep` positions of ids [rows, new]; mask [rows, past + new] or None."""
    positions = None  # padding on the left takes no position
    if mask is not None:
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        return model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=keep,  # the prompt's logits would be large, and nobody reads them
        ).logits.float()


@torch.no_grad()
def sample(
    policy, prompt_ids: Tensor, prompt_mask: Tensor, uniforms: Tensor, eos: Tensor, cfg: Config, progress: Progress
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One completion of the [q, P] prompts for each row of uniforms [n, T], n/q of each prompt.

    Returns ids, logp_sampled [n, T] and lengths, truncated [n]. Each prompt goes through the model once and its cache
    is copied to its group. Row i, token t uses up uniforms[i, t], whatever other rows are still in the batch.
    """
    group_size = len(uniforms) // len(prompt_ids)
    ids = torch.zeros(uniforms.shape, dtype=torch.long, device=uniforms.device)  # [n, T]
    logp_sampled = torch.zeros_like(uniforms)  # [n, T]
    lengths = torch.zeros(len(ids), dtype=torch.long, device=ids.device)  # [n]
    truncated = torch.ones_like(lengths, dtype=torch.bool)  # [n]

    cache = DynamicCache(config=policy.config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    padded = not prompt_mask.all()  # without a mask the attention kernels run faster
    logits = next_token_logits(policy, prompt_ids, prompt_mask if padded else None, 1, cfg.dtype, cache)
    logits, mask = (x.repeat_interleave(group_size, 0) for x in (logits, prompt_mask))
    cache.batch_repeat_interleave(group_size)
    rows = torch.arange(len(ids), device=ids.device)  # which completion each row of the shrinking batch is
    alive = torch.ones_like(rows, dtype=torch.bool)
    for t in range(cfg.max_new_tokens):
        logp = torch.log_softmax(logits[:, -1] / cfg.temperature, dim=-1)  # [rows, V]
        cdf = logp.exp().cumsum(-1)
        # Inverse CDF: the first token whose cumulated probability exceeds u, scaled to what float32 sums up to.
        token = torch.searchsorted(cdf, uniforms[rows, t, None] * cdf[:, -1:], right=True)
        token = token.clamp(max=cdf.shape[1] - 1)  # [rows, 1]
        ids[rows, t] = token[:, 0]
        logp_sampled[rows, t] = logp.gather(1, token)[:, 0]
        lengths[rows] += alive
        alive &= ~torch.isin(token[:, 0], eos)
        truncated[rows] = alive
        if t + 1 == cfg.max_new_tokens or not alive.any():
            break
        if alive.sum() <= 0.8 * len(alive):  # finished rows leave; not at each end, as it copies the cache
            keep = alive.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            rows, token, mask, alive = rows[keep], token[keep], mask[keep], alive[keep]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        logits = next_token_logits(policy, token, mask if padded else None, 1, cfg.dtype, cache)
        if t % 16 == 0:
            progress(f"token {t}")
    return ids, logp_sampled, lengths, truncated


def generate(
    policy, tokenizer, tasks: list[dict], group_size: int, cfg: Config, stream: str, progress: Progress
) -> Rollout:
    """Samples `group_size` completions of each task: softmax at cfg.temperature, no top-p or top-k.

    What is random in a task's completions depends on (cfg.seed, stream, the task's index) alone.
    """
    device = next(policy.parameters()).device
    prompts, prompt_ids, prompt_mask = tokenize(tokenizer, tasks, device)
    room = getattr(policy.config, "max_position_embeddings", math.inf) - prompt_ids.shape[1]
    if cfg.max_new_tokens > room:
        raise UsageError(f"--max_new_tokens {cfg.max_new_tokens}: the prompts leave room for {room}; try {room}")
    eos = eos_ids(policy, tokenizer).to(device)
    parts = []
    for chunk in torch.arange(len(tasks)).split(max(1, cfg.rollout_rows // group_size)):
        draws = [seeded(cfg.seed, stream, tasks[q]["index"]) for q in chunk.tolist()]
        uniforms = torch.cat([torch.rand(group_size, cfg.max_new_tokens, generator=draw) for draw in draws])
        parts.append(sample(policy, prompt_ids[chunk], prompt_mask[chunk], uniforms.to(device), eos, cfg, progress))
    ids, logp_sampled, lengths, truncated = (torch.cat(part) for part in zip(*parts, strict=True))

    past_end = torch.arange(cfg.max_new_tokens, device=device) >= lengths[:, None]
    ids = ids.masked_fill(past_end, 0)  # a row that had finished went on sampling until it left the batch
    # Only the EOS that ended a completion is left out of its text: special tokens elsewhere are what it wrote.
    bodies = [row[:length] for row, length in zip(ids.tolist(), (lengths - (~truncated).long()).tolist(), strict=True)]
    bodies = tokenizer.batch_decode(bodies, skip_special_tokens=False)
    openings = ["<think>" + prompt.rpartition("<think>")[2] for prompt in prompts for _ in range(group_size)]
    text = [opening + body for opening, body in zip(openings, bodies, strict=True)]
    prompt_ids, prompt_mask = (x.repeat_interleave(group_size, 0) for x in (prompt_ids, prompt_mask))
    return Rollout(prompt_ids, prompt_mask, ids, lengths, logp_sampled, truncated, prompts, text)


def score(rollout: Rollout, tasks: list[dict], cfg: Config) -> dict[str, Tensor]:
    """What each completion is worth, and what else is worth knowing of it: tensors [Q, G] named as in the log."""
    group_size = len(rollout.text) // len(tasks)
    answers = [task["answer"] for task in tasks for _ in range(group_size)]
    scores = {
        "accuracy": [REWARDS[cfg.task](text, **answer) for text, answer in zip(rollout.text, answers, strict=True)],
        "format": [format_reward(text) for text in rollout.text],
        "length": rollout.lengths.tolist(),
        "truncated": rollout.truncated.tolist(),
    }
    return {name: torch.tensor(values, dtype=torch.float32).view(-1, group_size) for name, values in scores.items()}


# ---- The objective: equations 1 to 3 --------------------------------------------------------------------------------


def token_logprobs(policy, rollout: Rollout, rows: Tensor, cfg: Config) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, entropy, mask), each [n, T], of the rows' completions under the policy, at the temperature they were
    sampled with: the distribution that is scored is the one that was sampled. T and P are the rows' own widest."""
    width = int(rollout.lengths[rows].max())
    prompt_width = int(rollout.prompt_mask[rows].sum(-1).max())
    mask = torch.arange(width, device=rows.device) < rollout.lengths[rows, None]  # [n, T]: from lengths, so EOS counts
    prompt_mask = rollout.prompt_mask[rows, -prompt_width:]
    ids = torch.cat([rollout.prompt_ids[rows, -prompt_width:], rollout.ids[rows, :width]], dim=1)  # [n, P + T]
    # Padding on the right is out of sight of a causal model; only padding on the left must be masked.
    attention = None if prompt_mask.all() else torch.cat([prompt_mask, torch.ones_like(mask)], dim=1)
    logits = next_token_logits(policy, ids, attention, width + 1, cfg.dtype)[:, :-1]  # position t - 1 predicts token t
    all_logp = torch.log_softmax(logits / cfg.temperature, dim=-1)  # [n, T, V]
    logp = all_logp.gather(-1, ids[:, -width:, None])[..., 0]
    with torch.no_grad():
        entropy = -(all_logp.exp() * all_logp).sum(-1)
    return logp, entropy, mask


def group_advantages(rewards: Tensor, scale: str = "group") -> Tensor:
    """Equation 3: rewards [Q, G] -> advantages [Q·G], each reward relative to the other completions of its question.

    `scale` "group" divides by the group's standard deviation (ddof 1) + 1e-4; "none" does not (Dr. GRPO, arXiv
    2503.20783). A group whose rewards are all equal teaches nothing: its advantages are exactly 0.
    """
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if scale == "group":
        advantages = advantages / (rewards.std(dim=1, keepdim=True) + 1e-4)
    all_equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)  # the mean of equal floats may be off by a bit
    return advantages.masked_fill(all_equal, 0.0).flatten()


def token_weights(lengths: Tensor, loss: str, max_new_tokens: int) -> Tensor:
    """lengths [N] -> weights [N], one for every token of row i; N and the lengths are those of the whole step.

    `grpo` 1/(len_i·N): the mean over rows of the mean over a row's tokens, eq. 1. `dapo` 1/Σlen: all tokens count
    alike (arXiv 2503.14476). `dr_grpo` 1/(N·max_new_tokens): the same, but a constant (arXiv 2503.20783).
    """
    n = len(lengths)
    if loss == "grpo":
        return 1.0 / (lengths * n)
    if loss == "dapo":
        return torch.ones_like(lengths, dtype=torch.float32) / lengths.sum()
    if loss == "dr_grpo":
        return torch.full_like(lengths, 1.0 / (n * max_new_tokens), dtype=torch.float32)
    raise ValueError(f"loss {loss!r} is none of grpo, dapo, dr_grpo")


def grpo_loss(
    logp: Tensor,
    logp_old: Tensor,
    logp_ref: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor,
    clip_low: float,
    clip_high: float,
    kl_beta: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Equation 1, negated: (loss, metrics). logp, logp_old, logp_ref, mask [N, T]; advantages, weights [N].

    logp_ref is None when kl_beta is 0. The losses of a step's micro-batches add up to the step's loss, and so do the
    metrics: `kl` is the sum of k3 over tokens, `clip_fraction` the number of tokens whose ratio the clip holds.
    """
    mask = mask.bool()
    advantages, weights = advantages[:, None], weights[:, None] * mask  # [N, 1], [N, T]
    # Padding is set to ratio 1 before exp: an overflow there times a weight of 0 would still be NaN.
    ratio = torch.exp((logp - logp_old).masked_fill(~mask, 0.0))  # [N, T]
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    metrics = {"clip_fraction": ((clipped * advantages < ratio * advantages) & mask).sum()}
    if kl_beta > 0:
        log_ratio_ref = (logp_ref - logp).masked_fill(~mask, 0.0)
        k3 = torch.exp(log_ratio_ref) - log_ratio_ref - 1  # equation 2
        objective = objective - kl_beta * k3
        metrics["kl"] = k3.detach().sum()
    return -(weights * objective).sum(), metrics


# ---- Update and evaluation ------------------------------------------------------------------------------------------


def microbatches(rollout: Rollout, tokens: int) -> list[Tensor]:
    """Row numbers of each micro-batch: rows of like length together, at most `tokens` tokens (or one row) in each."""
    batches, width = [], 0
    for row in rollout.lengths.argsort(descending=True, stable=True).tolist():
        if not batches or (len(batches[-1]) + 1) * width > tokens:
            batches.append([])
            width = rollout.prompt_ids.shape[1] + int(rollout.lengths[row])  # its longest row comes first
        batches[-1].append(row)
    return [torch.tensor(batch, device=rollout.lengths.device) for batch in batches]


def update(
    policy, reference, optimizer, step: int, rollout: Rollout, advantages: Tensor, cfg: Config, accelerator, progress
) -> dict[str, float]:
    """mu optimizer steps on one rollout, none at step cfg.steps. Returns means over the tokens of all processes.

    On the first update logp_old is logp itself, so the ratio is exactly 1 and the loss has the value 0 but for the
    KL term: its gradient is what matters.
    """
    lengths = accelerator.gather(rollout.lengths)  # the normalisers are global: rows of all processes
    weights = token_weights(lengths, cfg.loss, cfg.max_new_tokens)  # [N of all processes]
    weights = weights[accelerator.process_index * len(rollout.lengths) :]  # this process's come first now
    batches = microbatches(rollout, cfg.tokens_per_microbatch)
    logp_ref: list[Tensor | None] = [None] * len(batches)
    if reference is not None:  # before the policy's passes, whose graphs would take up memory meanwhile
        with torch.no_grad():
            logp_ref = [token_logprobs(reference, rollout, rows, cfg)[0] for rows in batches]
    logp_old: list[Tensor] = []
    sums = {name: torch.zeros((), device=lengths.device) for name in ("kl", "entropy", "logp_gap", "clip_fraction")}
    grad_norm, lr = torch.zeros(()), cfg.lr * (1 - (1 - cfg.lr_final) * step / max(1, cfg.steps))
    updates = cfg.updates_per_rollout if step < cfg.steps else 0
    for epoch, (i, rows) in itertools.product(range(max(1, updates)), enumerate(batches)):
        last = i + 1 == len(batches)
        # DDP adds up gradients over processes at the last backward only: their micro-batches may differ in number.
        with nullcontext() if last else accelerator.no_sync(policy), torch.set_grad_enabled(updates > 0):
            logp, entropy, mask = token_logprobs(policy, rollout, rows, cfg)
            if epoch == 0:
                logp_old.append(logp.detach())
            loss, metrics = grpo_loss(
                *(logp, logp_old[i], logp_ref[i], advantages[rows], mask, weights[rows]),
                *(cfg.clip_low, cfg.clip_high, cfg.kl_beta),
            )
            if updates:
                accelerator.backward(loss * accelerator.num_processes)  # DDP divides by the number of processes
        sums["clip_fraction"] += metrics["clip_fraction"] / max(1, updates)
        if epoch == 0:  # of the policy that sampled: later updates have moved it
            sums["kl"] += metrics.get("kl", 0.0)
            sums["entropy"] += (entropy * mask).sum()
            sums["logp_gap"] += ((logp_old[i] - rollout.logp_sampled[rows, : logp.shape[1]]).abs() * mask).sum()
        if updates and last:
            grad_norm = accelerator.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
        progress(f"update {i + 1} of {len(batches)}")
    totals = accelerator.reduce(torch.stack(list(sums.values())), "sum") / lengths.sum()
    metrics = dict(zip(sums, totals.tolist(), strict=True)) | {"grad_norm": float(grad_norm), "lr": lr}
    return metrics if reference is not None else metrics | {"kl": None}  # not 0: it was not measured


def means(scores: dict[str, Tensor], accelerator) -> dict[str, float]:
    """Mean of each score over the completions of all processes: sums over a count, never means of means."""
    ones = torch.ones_like(scores["accuracy"])
    sums = torch.stack([score.sum() for score in (*scores.values(), ones)]).to(accelerator.device)
    *sums, count = accelerator.reduce(sums, "sum").tolist()
    return {name: total / count for name, total in zip(scores, sums, strict=True)}


def evaluate(policy, tokenizer, held_out: list[dict], cfg: Config, accelerator, progress) -> tuple[dict, list[dict]]:
    """`eval_samples` completions of each held-out question: the eval_* metrics, and one completion to look at.

    Every evaluation has the same questions and the same uniforms, so that two of them differ by the weights alone.
    """
    tasks = [task | {"index": i} for i, task in enumerate(held_out)]
    share = tasks[accelerator.process_index :: accelerator.num_processes]
    rollout = generate(policy, tokenizer, share, cfg.eval_samples, cfg, "eval", lambda phase: progress(f"eval {phase}"))
    scores = score(rollout, share, cfg)
    metrics = {f"eval_{name}": mean for name, mean in means(scores, accelerator).items()}
    return {"eval_pass@1": metrics.pop("eval_accuracy")} | metrics, records(rollout, share, scores, 1)


# ---- Files: checkpoint, log, report ---------------------------------------------------------------------------------


def open_run_dir(cfg: Config) -> Path:
    """Makes the run's directory. Raises UsageError if it can't be written to, or holds a run that is not resumed."""
    run_dir = Path(cfg.run_dir or f"runs/{cfg.recipe}-{time.strftime('%Y%m%d-%H%M%S')}")
    if (run_dir / "metrics.jsonl").exists() and not cfg.resume:
        raise UsageError(f"--run_dir {run_dir}: it holds a run already; try another one, or --resume {run_dir}")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=1) + "\n")
    except OSError as error:
        raise UsageError(f"--run_dir {run_dir}: cannot be written ({error.strerror}); try runs/mine") from error
    return run_dir


def append(path: Path, lines: list[dict]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def records(rollout: Rollout, tasks: list[dict], scores: dict[str, Tensor], count: int) -> list[dict]:
    """The first `count` completions as lines for completions.jsonl."""
    group_size = len(rollout.text) // len(tasks)
    return [
        {"question": tasks[i // group_size]["question"], "prompt": rollout.prompts[i // group_size], "text": text}
        | {name: values.flatten()[i].item() for name, values in scores.items()}
        for i, text in enumerate(rollout.text[:count])
    ]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def save_checkpoint(run_dir: Path, step: int, policy, tokenizer, optimizer) -> None:
    """The state after `step` updates, written beside the last one, which it then replaces."""
    new, old = run_dir / "checkpoint.new", run_dir / "checkpoint"
    shutil.rmtree(new, ignore_errors=True)
    policy.save_pretrained(new)
    tokenizer.save_pretrained(new)
    torch.save(optimizer.state_dict(), new / "optimizer.pt")
    (new / "state.json").write_text(json.dumps({"step": step}))
    if old.exists():
        old.rename(run_dir / "checkpoint.old")
    new.rename(old)
    shutil.rmtree(run_dir / "checkpoint.old", ignore_errors=True)


def load_checkpoint(run_dir: Path, policy, optimizer) -> int:
    """Puts the last checkpoint into policy and optimizer, and returns its step.

    No random state is needed: what is drawn in a step follows from the seed and the step.
    """
    policy.load_state_dict(load_policy(str(run_dir / "checkpoint"))[0].state_dict())
    optimizer.load_state_dict(torch.load(run_dir / "checkpoint/optimizer.pt", weights_only=True, map_location="cpu"))
    return json.loads((run_dir / "checkpoint/state.json").read_text())["step"]


def cut_logs(run_dir: Path, step: int) -> None:
    """Leaves only what came before `step` in the logs, so that a resumed run writes each step once."""
    for log in (run_dir / "metrics.jsonl", run_dir / "completions.jsonl"):
        shorter = log.with_suffix(".new")
        shorter.write_text("".join(json.dumps(line) + "\n" for line in read(log) if line["step"] < step))
        shorter.replace(log)


def printable(text: str) -> str:
    """What a model wrote, control characters escaped: a terminal would obey them."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def sparkline(values: list[float], width: int = 60) -> str:
    """Bars from the smallest value to the largest, neighbours averaged where there are more than `width`."""
    width = min(width, len(values))
    cuts = [i * len(values) // width for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(cuts)]
    low, high = min(means), max(means)
    return "".join("▁▂▃▄▅▆▇█"[int(7.99 * (mean - low) / ((high - low) or 1))] for mean in means)


def print_table(columns: dict[str, dict]) -> None:
    """The eval_* metrics of each column's evaluation, side by side."""
    print(f"\n{'held-out questions':<26}" + "".join(f"{name:>10}" for name in columns))
    for key in [key for key in next(iter(columns.values())) if key.startswith("eval_")]:
        print(f"{key.removeprefix('eval_'):<26}" + "".join(f"{column[key]:>10.3f}" for column in columns.values()))


def report(run_dir: Path) -> None:
    """Prints what a run has achieved: before and after, the way there, a completion of each."""
    lines = read(run_dir / "metrics.jsonl")
    print_table({"before": lines[0], "after": lines[-1]})
    for name in ("accuracy", "length"):
        values = [line[name] for line in lines]
        print(f"\n{name} in training, from {values[0]:.2f} to {values[-1]:.2f}\n{sparkline(values)}")
    shown = [record for record in read(run_dir / "completions.jsonl") if "advantage" not in record]  # held out
    for when, record in {"before": shown[0], "after": shown[-1]}.items():
        verdict = "right" if record["accuracy"] else "wrong"
        opening = record["prompt"].rpartition("<think>")[0]  # the text begins with it again
        print(f"\n{when} training, {verdict}:\n{printable(opening + record['text'])}")
    print(f"\nTo go on: uv run R1ZeroTrain.py --resume {run_dir} --steps {2 * lines[-1]['step']}")


def start_wandb(cfg: Config, run_dir: Path) -> object:
    import wandb  # here, as most runs do without it

    mode = os.environ.get("WANDB_MODE", "offline")  # nothing is uploaded unless the user says so
    return wandb.init(project="r1-zero", dir=run_dir, config=dataclasses.asdict(cfg), mode=mode)


# ---- Main: Algorithm 1 ----------------------------------------------------------------------------------------------


def main(cfg: Config) -> None:
    accelerator = make_accelerator(cfg)
    is_main, q = accelerator.is_main_process, cfg.questions_per_step
    check_model(cfg.model)  # before the questions, which may take a download
    question_at, held_out = load_questions(
        cfg.task, cfg.dataset, cfg.seed, cfg.eval_questions, cfg.operands, cfg.operand_range, cfg.target_range
    )
    run_dir = open_run_dir(cfg)
    accelerator.print(f"{cfg.task} with {cfg.model} on {accelerator.device}; all files go to {run_dir}/", flush=True)
    policy, tokenizer = load_policy(cfg.model, cfg.template)
    reference = copy.deepcopy(policy).requires_grad_(False).to(accelerator.device) if cfg.kl_beta > 0 else None
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0)
    start = load_checkpoint(run_dir, policy, optimizer) if cfg.resume else 0
    policy, optimizer = accelerator.prepare(policy, optimizer)
    sampler = accelerator.unwrap_model(policy)
    tracker = start_wandb(cfg, run_dir) if cfg.wandb and is_main else None
    bar = tqdm(total=cfg.steps, initial=start, unit="step", dynamic_ncols=True, disable=not is_main)

    if cfg.eval_only:
        evaluation, _ = evaluate(sampler, tokenizer, held_out, cfg, accelerator, bar.set_description)
        bar.close()
        if is_main and not cfg.resume:  # a resumed run has this line, or will have it
            append(run_dir / "metrics.jsonl", [{"step": start} | evaluation])
        return print_table({"now": evaluation})
    if cfg.resume and is_main:
        cut_logs(run_dir, start)

    for step in range(start, cfg.steps + 1):  # a line of the log describes the policy after `step` updates
        evaluation, samples = {}, []
        if step in (0, cfg.steps) or (cfg.eval_every and step % cfg.eval_every == 0):
            evaluation, samples = evaluate(sampler, tokenizer, held_out, cfg, accelerator, bar.set_description)
        began = time.perf_counter()
        mine = range(step * q + accelerator.process_index, (step + 1) * q, accelerator.num_processes)
        tasks = [question_at(i) | {"index": i} for i in mine]  # Q questions, shared out among the processes
        rollout = generate(sampler, tokenizer, tasks, cfg.group_size, cfg, "train", bar.set_description)
        speed = int(rollout.lengths.sum()) / (time.perf_counter() - began)
        scores = score(rollout, tasks, cfg)
        scores["reward"] = scores["accuracy"] + cfg.format_weight * scores["format"]  # [Q, G]
        advantages = group_advantages(scores["reward"], cfg.advantage_scale).to(accelerator.device)  # [N]
        metrics = update(policy, reference, optimizer, step, rollout, advantages, cfg, accelerator, bar.set_description)

        line = {"step": step} | means(scores, accelerator) | metrics | {"completion_tokens_per_second": speed}
        line |= {"seconds": time.perf_counter() - began} | evaluation
        samples += records(rollout, tasks, scores | {"advantage": advantages}, 4)
        if is_main:
            append(run_dir / "metrics.jsonl", [line])
            append(run_dir / "completions.jsonl", [{"step": step} | sample for sample in samples])
        if tracker:
            tracker.log(line, step=step)
        bar.set_postfix({name: f"{line[name]:.3g}" for name in ("reward", "length", "kl") if line[name] is not None})
        bar.update(step < cfg.steps)
        save = step + 1 == cfg.steps or (step < cfg.steps and cfg.save_every and (step + 1) % cfg.save_every == 0)
        if save and is_main:
            save_checkpoint(run_dir, step + 1, sampler, tokenizer, optimizer)
    bar.close()
    if tracker:
        tracker.finish()
    if is_main:
        sampler.save_pretrained(run_dir / "model")
        tokenizer.save_pretrained(run_dir / "model")
        report(run_dir)


def run(arguments: list[str]) -> int:
    """The way in from the command line; returns the exit code, 2 for an option that can't work."""
    try:
        main(parse_config(arguments))
    except UsageError as error:
        print("R1ZeroTrain.py:", *str(error).split(), file=sys.stderr)  # on one line, whatever was typed
        return 2
    except KeyboardInterrupt:
        print("\nstopped; `--resume` and the run's directory go on from its last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
