"""R1-Zero in one file: a base model learns to reason from rule-based rewards alone, by GRPO (arXiv 2501.12948).

    The algorithm, each step                                       where (2 to 6 in train_step)
    1. draw Q questions                                            question_at, in main
    2. sample G completions of each from the policy                generate
    3. reward each completion: is the answer right, the form kept  score
    4. advantage = reward relative to its group         (eq. 3)    group_advantages
    5. clipped ratio times advantage, less a k3 penalty (eq. 1, 2) grpo_loss
    6. step the optimizer, mu times                                update
    7. now and then, measure on held-out questions                 evaluate

    uv run R1ZeroTrain.py                     # a tiny policy learns Countdown in minutes, on any computer
    uv run R1ZeroTrain.py --recipe gsm8k      # a real model on real questions
    uv run R1ZeroTrain.py --help              # every option, its meaning and default

Shapes: Q questions a step, G completions a question, N = Q·G rows (question by question), P prompt tokens (padded
left), T completion tokens (padded right), V vocabulary; small letters, [q, P] or [n, T], stand for some of them.

Where it departs from the paper: ratio and clip are taken of each token and averaged over a completion, as in GRPO's
first paper (DeepSeekMath, arXiv 2402.03300), not of the completion as a whole; the advantage divides by std + 1e-4 (as
TRL does); the reference stays the first policy. `--loss` offers the weightings of DAPO and Dr. GRPO besides.
"""

import copy
import hashlib
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from math import isfinite
from pathlib import Path
from pickle import UnpicklingError
from typing import Annotated, Literal

if __name__ == "__main__" and os.environ.get("RANK", "0") == "0":  # once, however many processes there are
    print("loading torch and transformers", flush=True)  # takes seconds, which should not pass in silence

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, FullyShardedDataParallelPlugin
from accelerate.utils import fsdp2_prepare_model, gather_object
from accelerate.utils.memory import clear_device_cache
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.generation.streamers import TextStreamer
from transformers.modeling_layers import GradientCheckpointingLayer

# What goes into a run: questions, models' files, options.
from prompts import TASKS, UsageError, command_line, encode, ends_when_asked, exit_code, load_questions
from prompts import load_tokenizer, model_files, parse, render_prompt, typed

# What comes out of it: rewards and other figures, logs, checkpoints.
from rewards import Log, evaluation, extract_answer, format_reward, newest_whole, open_run_dir, printable
from rewards import progress_bar, save_model, step_means, summary, table, trouble, write_card, write_checkpoint

# ---- Config: every option, its default and its meaning, once --------------------------------------------------------
# Types that say which values can work, from the first to the second; 2**20 stands for "as many as you like".
Count = Annotated[int, (1, 2**20)]
CountOrNone = Annotated[int, (0, 2**20)]
Share = Annotated[float, (0, 1)]
Weight = Annotated[float, (0, 100)]
Positive = Annotated[float, (0.001, 1000)]


def option(default: object, meaning: str) -> object:
    """A Config field: its default, and what --help says of it."""
    factory = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(**factory, metadata={"help": meaning})


@dataclass
class Config:
    recipe: Literal["tiny", "tinyzero", "gsm8k", "mac", "deepscaler"] = option("tiny", "options by name, see below")
    # The policy and what it is asked
    model: str = option("notebooks/tiny-base", "policy to start from: a save_pretrained folder or a hub name")
    task: str = option("countdown", f"what is asked, and which reward grades it: {', '.join(TASKS)}")
    template: Literal["auto", "base", "chat"] = option("auto", "auto: the model's chat template if it has one")
    dataset: str = option("", "hub dataset or local .jsonl .json .parquet .csv file; empty: the task's own")
    eval_dataset: str = option("", "dataset that evaluations ask; empty: what --dataset holds out")
    operands: Annotated[int, (2, 5)] = option(3, "numbers in a generated Countdown problem")
    operand_range: list[int] = option([1, 9], "smallest and largest number of a generated Countdown problem")
    target_range: list[int] = option([1, 99], "smallest and largest target of a generated Countdown problem")
    # Rollouts
    steps: CountOrNone = option(36, "rollouts to train on")
    questions_per_step: Count = option(16, "Q: questions in a step, over all processes")
    group_size: Annotated[int, (2, 2**20)] = option(16, "G: completions sampled for each question")
    max_new_tokens: Count = option(256, "T: tokens of the longest completion; longer ones are cut off there")
    temperature: Positive = option(1.0, "softmax temperature that completions are sampled and scored at")
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
    updates_per_rollout: Count = option(1, "mu of DeepSeekMath's Algorithm 1: optimizer steps on one rollout")
    max_grad_norm: Positive = option(1.0, "a longer gradient is scaled down to this norm")
    tokens_per_microbatch: Count = option(8192, "tokens in one forward pass: bounds memory, not the result")
    gradient_checkpointing: bool = option(False, "keep layers' inputs alone for the backward pass: leaner, slower")
    # Evaluation, files and machine
    eval_every: CountOrNone = option(0, "steps between evaluations; 0: only before and after")
    eval_questions: Count = option(512, "held-out questions in an evaluation")
    eval_samples: Count = option(1, "K: completions sampled for each held-out question")
    eval_only: bool = option(False, "evaluate the model, and stop")
    ask: str | None = option(None, "ask the model this one question, and stop; a Countdown as '44 19 35 = 98'")
    seed: Annotated[int, (0, 2**53)] = option(0, "all that is random follows from it")
    device: Literal["auto", "cuda", "mps", "cpu"] = option("auto", "auto: CUDA, else MPS, else CPU")
    dtype: Literal["float32", "bfloat16"] = option("float32", "precision of the computing; weights stay float32")
    run_dir: str = option("", "where the run's files go; empty: runs/<recipe>-<time>")
    save_every: CountOrNone = option(10, "steps between checkpoints; 0: only at the end")
    resume: str = option("", "run directory to go on with, its options the defaults")
    wandb: bool = option(False, "log to Weights & Biases too: offline, unless WANDB_MODE says otherwise")


parse_config = partial(parse, Config)  # the words of a command line -> Config


# ---- Device, randomness, policy -------------------------------------------------------------------------------------
def make_accelerator(cfg: Config) -> Accelerator:
    """One process or many, on CUDA, else MPS, else CPU; lower precision is autocast's job, in `forward`."""
    mps = torch.backends.mps.is_available() and os.environ.get("WORLD_SIZE", "1") == "1"  # gloo can't send from it
    best = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if cfg.device not in ("auto", "cpu", best):
        raise UsageError(f"--device {cfg.device}: this machine has {best}; try {best}")
    # Processes may differ in how often they call the model: then an exchange of buffers at each call would never end.
    options = {"mixed_precision": "no", "kwargs_handlers": [DistributedDataParallelKwargs(broadcast_buffers=False)]}
    if os.environ.get("FSDP_VERSION") == "2":  # set by accelerate launch --use_fsdp --fsdp_version 2
        # Each process reads all weights, as set_up copies them; layers are gathered in the precision of the computing.
        plugin = {"auto_wrap_policy": "transformer_based_wrap", "cpu_ram_efficient_loading": False}
        plugin["mixed_precision_policy"] = MixedPrecisionPolicy(getattr(torch, cfg.dtype), torch.float32)
        options["fsdp_plugin"] = FullyShardedDataParallelPlugin(**plugin)
    accelerator = Accelerator(cpu="cpu" in (cfg.device, best), log_with="wandb" if cfg.wandb else None, **options)
    if cfg.questions_per_step % (n := accelerator.num_processes):
        raise UsageError(f"--questions_per_step {cfg.questions_per_step}: not a multiple of {n} processes; try {4 * n}")
    if accelerator.distributed_type.value in ("FSDP", "DEEPSPEED", "MEGATRON_LM") and not accelerator.is_fsdp2:
        raise UsageError("only DDP and FSDP2 are supported; try accelerate launch --use_fsdp --fsdp_version 2")
    return accelerator


def seeded(*key: object) -> torch.Generator:
    """A generator that depends on the key alone, so that no random state needs saving and none is shared."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def load_policy(model: str, gradient_checkpointing: bool = False) -> PreTrainedModel:
    """The model in float32: at lr 1e-6 an update is smaller than half a bfloat16 step, and would be lost."""
    with model_files(model) as files:
        capped = getattr(AutoConfig.from_pretrained(**files).get_text_config(), "attn_logit_softcapping", None)
        # Written out where sdpa is wrong: Gemma 2's cap before transformers 5.22; MPS with padding (pytorch 184180).
        if capped or torch.backends.mps.is_available():
            files["attn_implementation"] = "eager"
        policy, loaded = AutoModelForCausalLM.from_pretrained(
            **files, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
        if loaded["missing_keys"]:  # transformers would go on with random weights in their place
            raise ValueError(f"it lacks the weights {sorted(loaded['missing_keys'])[:3]}")
        if gradient_checkpointing and not policy.supports_gradient_checkpointing:
            raise ValueError("it does not support --gradient_checkpointing")
    policy.eval()  # dropout would make the ratio differ from 1 on the first update
    for module in policy.modules():
        if gradient_checkpointing and isinstance(module, GradientCheckpointingLayer):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
    policy.plain_head = has_plain_head(policy)
    return policy


def refresh(sampler, model, dtype: str) -> None:
    """Gives the sampler the model's weights in the precision of the computing: once here, not once for each token."""
    for weight, master in zip(sampler.parameters(), model.parameters(), strict=True):
        if weight is not master:  # float32 weights are shared
            cast = master.detach().to(getattr(torch, dtype))
            weight.data = cast.full_tensor() if hasattr(cast, "full_tensor") else cast  # FSDP: from all processes


@torch.no_grad()
def has_plain_head(model) -> bool:
    """Whether logits are states · head.weight^T and no more: no bias, no scaling, no soft-capping (Gemma 2, Cohere)."""
    head = model.get_output_embeddings()
    # Values of all sizes in place of the head's, as a cap of 30 would hardly show in the logits of a random model: the
    # hook's value replaces them (extend returns None).
    probe, seen = torch.linspace(-1000, 1000, head.weight.shape[0], device=head.weight.device), []
    hook = head.register_forward_hook(lambda _, args, out: seen.extend([args[0], out]) or probe.expand_as(out))
    out = model(torch.zeros(1, 1, dtype=torch.long, device=probe.device), use_cache=False, output_hidden_states=True)
    hook.remove()
    states, logits = seen
    same = torch.equal(states, out.hidden_states[-1]) and torch.equal(out.logits, probe.expand_as(logits))
    return same and torch.allclose(logits, states @ head.weight.T, 1e-4, 1e-4 * logits.abs().max().item())


# ---- Rollouts: sample G completions of each question ----------------------------------------------------------------
@dataclass
class Rollout:
    """N = Q·G sampled completions, the rows of one question side by side."""

    prompt_ids: Tensor  # [Q, P], padded left
    prompt_mask: Tensor  # [Q, P], False on padding
    ids: Tensor  # [N, T], padded right; EOS, where there is one, is the last token
    lengths: Tensor  # [N], tokens of each completion, EOS included
    logp_sampled: Tensor  # [N, T], log-probability each token was sampled with; logp_gap compares it with logp_old
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


def forward(model, ids: Tensor, mask: Tensor | None, keep: int, dtype: str, cache=None, states=False) -> Tensor:
    """Logits [rows, keep, V] of the last `keep` positions of ids [rows, new]; mask [rows, past + new] or None.

    With `states` what the head would make them of, the last layer's output [rows, keep, width].
    """
    positions = None  # padding on the left takes no position: mask 0 0 1 1, positions 0 0 0 1
    if mask is not None:
        positions = (mask.sum(-1, keepdim=True) - torch.arange(ids.shape[1], 0, -1, device=ids.device)).clamp(min=0)
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        # logits_to_keep: those of the prompt would be large, and nobody reads them.
        options = {"past_key_values": cache, "use_cache": cache is not None, "logits_to_keep": 1 if states else keep}
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, output_hidden_states=states, **options)
    return out.hidden_states[-1][:, -keep:] if states else out.logits.float()


def draw(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """A token of each row and its log-probability, each [rows, 1], by inverse CDF from logits [rows, V]."""
    probabilities = torch.softmax(logits / temperature, dim=-1)  # [rows, V]: pi_old of eq. 1
    cdf = probabilities.cumsum(-1)
    # The first token whose cumulated probability exceeds u, scaled to what float32 sums up to. It exceeds, right=True,
    # rather than reaches it, so that u = 0 picks no token of probability 0.
    token = torch.searchsorted(cdf, uniforms * cdf[:, -1:], right=True).clamp(max=cdf.shape[1] - 1)
    return token, probabilities.gather(1, token).log()


@torch.no_grad()
def sample(
    policy, prompt_ids: Tensor, prompt_mask: Tensor, uniforms: Tensor, eos: Tensor, cfg: Config, progress: Callable
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
    logits = forward(policy, prompt_ids, prompt_mask if padded else None, 1, cfg.dtype, cache)
    logits, mask = (x.repeat_interleave(group_size, 0) for x in (logits, prompt_mask))
    cache.batch_repeat_interleave(group_size)
    rows = torch.arange(len(ids), device=ids.device)  # which completion each row of the shrinking batch is
    alive = torch.ones_like(rows, dtype=torch.bool)
    for t in range(cfg.max_new_tokens):
        token, logp = draw(logits[:, -1], uniforms[rows, t, None], cfg.temperature)  # [rows, 1] each
        ids[rows, t] = token[:, 0] * alive  # a row that has finished goes on until it leaves the batch
        logp_sampled[rows, t] = logp[:, 0]
        lengths[rows] += alive
        alive &= ~torch.isin(token[:, 0], eos)
        truncated[rows] = alive
        progress(f"token {t + 1}", ids[:, : t + 1])
        if t + 1 == cfg.max_new_tokens:
            break
        if t % 8 == 7 or len(rows) == 1:  # not at each token: the CPU, to see who is alive, waits for the device
            keep = alive.nonzero()[:, 0]
            if len(keep) == 0:
                break
            if len(keep) <= 0.8 * len(rows):  # finished rows leave; not at each end, as it copies the cache
                cache.batch_select_indices(keep)
                rows, token, mask, alive = rows[keep], token[keep], mask[keep], alive[keep]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        logits = forward(policy, token, mask if padded else None, 1, cfg.dtype, cache)
    return ids, logp_sampled, lengths, truncated


def generate(
    policy, tokenizer, tasks: list[dict], group_size: int, cfg: Config, stream: str, progress: Callable
) -> Rollout:
    """Samples `group_size` completions of each task: softmax at cfg.temperature, no top-p or top-k.

    What is random in a task's completions depends on (cfg.seed, stream, the task's index) alone.
    """
    device = next(policy.parameters()).device
    prompts = [render_prompt(tokenizer, task["question"], cfg.template) for task in tasks]
    padded = encode(tokenizer, prompts, cfg.template, padding=True, padding_side="left", return_tensors="pt")
    prompt_ids, prompt_mask = padded["input_ids"].to(device), padded["attention_mask"].to(device).bool()  # [Q, P]
    ends = policy.generation_config.eos_token_id  # chat models have several
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    eos = torch.tensor(sorted(ends), device=device)
    parts = []
    for chunk in torch.arange(len(tasks)).split(max(1, cfg.rollout_rows // group_size)):
        sources = [seeded(cfg.seed, stream, tasks[q]["index"]) for q in chunk.tolist()]
        uniforms = torch.cat([torch.rand(group_size, cfg.max_new_tokens, generator=source) for source in sources])
        for piece in uniforms.to(device).split(cfg.rollout_rows):  # several, where a group is larger
            parts.append(sample(policy, prompt_ids[chunk], prompt_mask[chunk], piece, eos, cfg, progress))
    ids, logp_sampled, lengths, truncated = (torch.cat(part) for part in zip(*parts, strict=True))
    # Only the EOS that ended a completion is left out of its text: special tokens elsewhere are what it wrote.
    kept = (lengths - (~truncated).long()).tolist()
    bodies = tokenizer.batch_decode([row[:n] for row, n in zip(ids.tolist(), kept, strict=True)])
    openings = ["<think>" + prompt.rpartition("<think>")[2] for prompt in prompts]
    text = [openings[i // group_size] + body for i, body in enumerate(bodies)]
    return Rollout(prompt_ids, prompt_mask, ids, lengths, logp_sampled, truncated, prompts, text)


def score(rollout: Rollout, tasks: list[dict], cfg: Config) -> list[dict]:
    """N samples: each completion with its question, its reward (r of eq. 3), and what else is worth knowing of it."""
    group_size = len(rollout.text) // len(tasks)
    samples = []
    for i, text in enumerate(rollout.text):
        task, prompt = tasks[i // group_size], rollout.prompts[i // group_size]
        accuracy, well_formed = TASKS[cfg.task].reward(text, **task["answer"]), format_reward(text)
        sample = {"question": task["question"], "prompt": prompt, "text": text, "accuracy": accuracy}
        sample |= {"format": well_formed, "reward": accuracy + cfg.format_weight * well_formed}
        samples.append(sample | {"length": int(rollout.lengths[i]), "truncated": bool(rollout.truncated[i])})
    return samples


# ---- The objective: equations 1 to 3 --------------------------------------------------------------------------------
def token_logprobs(policy, rollout: Rollout, rows: Tensor, cfg: Config) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, entropy, mask), each [n, T]: log pi(o_it | q, o_i<t) of the rows' completions at the temperature they were
    sampled with: the distribution that is scored is the one that was sampled. T and P are the rows' own widest."""
    width = int(rollout.lengths[rows].max())
    mask = torch.arange(width, device=rows.device) < rollout.lengths[rows, None]  # [n, T]: from lengths, so EOS counts
    ids = rollout.ids[rows, :width]  # [n, T]
    questions, question = (rows // (len(rollout.ids) // len(rollout.prompt_ids))).unique(return_inverse=True)
    prompt_mask = rollout.prompt_mask[questions]
    prompt_width = int(prompt_mask.sum(-1).max())
    prompt_ids, prompt_mask = rollout.prompt_ids[questions, -prompt_width:], prompt_mask[:, -prompt_width:]  # [q, P]
    # Padding on the right is out of sight of a causal model; only padding on the left must be masked.
    padded = not prompt_mask.all()
    attention = torch.cat([prompt_mask[question], torch.ones_like(mask)[:, 1:]], dim=1) if padded else None
    model = getattr(policy, "module", policy)  # in several processes the policy is wrapped
    # No cache where a layer that is run again would find its own tokens in it, or where each call exchanges weights.
    if cfg.gradient_checkpointing or isinstance(model, FSDPModule):
        whole = torch.cat([prompt_ids[question], ids[:, :-1]], dim=1)
        out = forward(policy, whole, attention, width, cfg.dtype, states=model.plain_head)
    else:  # as in sampling, each prompt goes through the model once, and its rows share the cache
        cache = DynamicCache()
        out = forward(policy, prompt_ids, prompt_mask if padded else None, 1, cfg.dtype, cache, model.plain_head)
        out = out.index_select(0, question)  # indexing would add up gradients in the order in which threads come
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.index_select(0, question), layer.values.index_select(0, question)
        if width > 1:
            rest = forward(policy, ids[:, :-1], attention, width - 1, cfg.dtype, cache, model.plain_head)
            out = torch.cat([out, rest], dim=1)  # [n, T, ...]: the prompt's end predicts token 0, token 0 the next
    if model.plain_head:
        head = model.get_output_embeddings().weight
        packed = HeadLogprobs.apply(out[mask], head, ids[mask], cfg)
        return *(torch.zeros_like(mask, dtype=x.dtype).masked_scatter(mask, x) for x in packed), mask
    all_logp = torch.log_softmax(out / cfg.temperature, dim=-1)  # [n, T, V]
    with torch.no_grad():
        entropy = -(all_logp.exp() * all_logp).sum(-1)
    return all_logp.gather(-1, ids[..., None])[..., 0], entropy, mask


LOGITS_AT_ONCE = 2**21  # 8 MB: a CPU has them in its cache


class HeadLogprobs(torch.autograd.Function):
    """states [n, width], head [V, width], ids [n] -> (logp, entropy), each [n], without logits [n, V] as a whole.

    They would be most of the memory. So they are made for a piece of the vocabulary at a time, and made again in the
    backward pass.
    """

    @staticmethod
    def pieces(states: Tensor, head: Tensor, ids: Tensor, cfg: Config) -> Iterator[tuple]:
        """Of each piece: its rows of the head, logits [n, size], where ids are in it, and whether, both [n, 1]."""
        dtype, size = getattr(torch, cfg.dtype), 1 + LOGITS_AT_ONCE // len(ids)
        for start, piece in zip(range(0, len(head), size), head.split(size), strict=True):
            logits = (states.to(dtype) @ piece.to(dtype).T).float() / cfg.temperature
            place = (ids - start).clamp(0, len(piece) - 1)[:, None]
            yield slice(start, start + size), logits, place, place == (ids - start)[:, None]

    @staticmethod
    def forward(ctx, states: Tensor, head: Tensor, ids: Tensor, cfg: Config) -> tuple[Tensor, Tensor]:
        chosen = torch.zeros_like(ids, dtype=torch.float32)
        mean, log_sum = torch.zeros_like(chosen), torch.full_like(chosen, -torch.inf)  # of the pieces so far
        for _, logits, place, here in HeadLogprobs.pieces(states, head, ids, cfg):
            chosen += (logits.gather(1, place) * here)[:, 0]
            piece = logits.logsumexp(1)
            total = torch.logaddexp(log_sum, piece)
            mean_of_piece = torch.linalg.vecdot((logits - piece[:, None]).exp_(), logits)  # mean logit under softmax
            mean = mean * (log_sum - total).exp() + mean_of_piece * (piece - total).exp()
            log_sum = total
        entropy = log_sum - mean
        ctx.save_for_backward(states, head, ids, log_sum)
        ctx.cfg = cfg
        ctx.mark_non_differentiable(entropy)
        return chosen - log_sum, entropy

    @staticmethod
    def backward(ctx, grad_logp: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        states, head, ids, log_sum = ctx.saved_tensors
        scale, dtype = grad_logp[:, None] / ctx.cfg.temperature, getattr(torch, ctx.cfg.dtype)
        # In float32 whatever states are, as the many pieces' are added up in it.
        grad_states, grad_head = torch.zeros_like(states, dtype=torch.float32), torch.empty_like(head)
        for rows, logits, place, here in HeadLogprobs.pieces(states, head, ids, ctx.cfg):
            # d logp / d logits = one-hot - softmax; in place, as each pass over the logits takes its time
            softmax = logits.sub_(log_sum[:, None]).exp_()
            grad = softmax.mul_(-scale).scatter_add_(1, place, scale * here).to(dtype)
            grad_states += grad @ head[rows].to(dtype)
            grad_head[rows] = grad.T @ states.to(dtype)
        return grad_states, grad_head, None, None


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

    Weights are given before rows are split into micro-batches, or over processes: how they are split changes nothing.
    `grpo` 1/(len_i·N): the mean over rows of the mean over a row's tokens, eq. 1. `dapo` 1/Σlen: all tokens count
    alike (arXiv 2503.14476). `dr_grpo` 1/(N·max_new_tokens): the same, but a constant (arXiv 2503.20783).
    """
    n, ones = len(lengths), torch.ones_like(lengths, dtype=torch.float32)
    return {
        "grpo": ones / (lengths * n),
        "dapo": ones / lengths.sum(),
        "dr_grpo": ones / (n * max_new_tokens),
    }[loss]


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
    ratio = torch.exp((logp - logp_old).masked_fill(~mask, 0.0))  # [N, T]: pi / pi_old
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    metrics = {"clip_fraction": ((clipped * advantages < ratio * advantages) & mask).sum()}
    if kl_beta > 0:
        log_ratio_ref = (logp_ref - logp).masked_fill(~mask, 0.0)  # log(pi_ref / pi)
        k3 = torch.exp(log_ratio_ref) - log_ratio_ref - 1  # equation 2: unbiased, and never negative
        objective = objective - kl_beta * k3
        metrics["kl"] = k3.detach().sum()
    return -(weights * objective).sum(), metrics


# ---- Update and evaluation ------------------------------------------------------------------------------------------
def microbatches(rollout: Rollout, wanted: Tensor, tokens: int) -> list[Tensor]:
    """Numbers of the `wanted` rows, or of one if none is, in micro-batches of at most `tokens` tokens or of one row;
    rows of like length are together."""
    batches, width = [], 0
    rows = rollout.lengths.argsort(descending=True, stable=True)
    # One at least: the optimizer and the other processes expect a gradient, if of zeros.
    for row in rows[wanted[rows]].tolist() or rows[-1:].tolist():
        if not batches or (len(batches[-1]) + 1) * width > tokens:
            batches.append([])
            width = rollout.prompt_ids.shape[1] + int(rollout.lengths[row])  # its longest row comes first
        batches[-1].append(row)
    return [torch.tensor(batch, device=rollout.lengths.device) for batch in batches]


def update(
    policy, reference, optimizer, step: int, rollout: Rollout, advantages: Tensor, cfg: Config, accelerator, progress
) -> dict[str, float]:
    """mu optimizer steps on one rollout, none at step cfg.steps. Returns means over the tokens that went through it.

    In the first, logp_old is logp and the ratio 1, whatever is learned: of the loss the gradient is what matters.
    """
    lengths = accelerator.gather(rollout.lengths)  # the normalisers are global: rows of all processes
    weights = token_weights(lengths, cfg.loss, cfg.max_new_tokens)  # [N of all processes]
    weights = weights[accelerator.process_index * len(rollout.lengths) :]  # this process's come first now
    # Without the KL term a group whose rewards are all equal has no gradient, so that its passes can be saved.
    batches = microbatches(rollout, advantages.abs() + cfg.kl_beta > 0, cfg.tokens_per_microbatch)
    # FSDP's processes meet in each pass, so that all make as many: the further ones go over a row again, for nothing.
    own, most = len(batches), max(gather_object([len(batches)]))
    batches += [batches[-1][-1:]] * (most - own)
    logp_old, logp_ref = [], []  # of each micro-batch
    names = ("tokens", "kl", "entropy", "logp_gap", "clip_fraction")
    sums = {name: torch.zeros((), device=lengths.device) for name in names}
    skipped, grad_norm, lr = 0, 0.0, cfg.lr * (1 - (1 - cfg.lr_final) * step / max(1, cfg.steps))
    updates = cfg.updates_per_rollout if step < cfg.steps else 0  # the last step only measures
    for epoch, (i, rows) in itertools.product(range(max(1, updates)), enumerate(batches)):
        last = i + 1 == most
        # DDP adds up gradients over processes at the last backward only; FSDP at each, as no process holds them whole.
        sync = nullcontext() if last or isinstance(policy, FSDPModule) else accelerator.no_sync(policy)
        with sync, torch.set_grad_enabled(updates > 0):
            if epoch == 0:  # first, as the graph of the policy's pass takes up memory
                logp_ref.append(token_logprobs(reference, rollout, rows, cfg)[0].detach() if cfg.kl_beta > 0 else None)
            logp, entropy, mask = token_logprobs(policy, rollout, rows, cfg)
            mask = mask if i < own else torch.zeros_like(mask)
            if epoch == 0:
                logp_old.append(logp.detach())  # the policy has not moved yet: it is pi_old
            limits = (cfg.clip_low, cfg.clip_high, cfg.kl_beta)
            loss, metrics = grpo_loss(logp, logp_old[i], logp_ref[i], advantages[rows], mask, weights[rows], *limits)
            if updates:
                accelerator.backward(loss * accelerator.num_processes)  # both divide by the number of processes
        sums["clip_fraction"] += metrics["clip_fraction"] / max(1, updates)
        if epoch == 0:  # of the policy that sampled: later updates have moved it
            sums["tokens"] += mask.sum()
            sums["kl"] += metrics.get("kl", torch.nan)  # not 0, where it is not measured
            sums["entropy"] += (entropy * mask).sum()
            sums["logp_gap"] += ((logp_old[i] - rollout.logp_sampled[rows, : logp.shape[1]]).abs() * mask).sum()
        if updates and last:
            grad_norm = float(accelerator.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm))
            optimizer.param_groups[0]["lr"] = lr
            if isfinite(grad_norm):  # else the update would make all weights NaN
                optimizer.step()
            skipped += not isfinite(grad_norm)
            optimizer.zero_grad()
        progress(f"update {i + 1} of {most}", None)
    tokens, *totals = accelerator.reduce(torch.stack(list(sums.values())), "sum").tolist()
    metrics = {name: total / tokens for name, total in zip(names[1:], totals, strict=True)}
    metrics |= {"grad_norm": grad_norm, "skipped_updates": skipped, "lr": lr if updates else 0.0}
    return {name: value if isfinite(value) else None for name, value in metrics.items()}  # JSON has no NaN


def evaluate(policy, tokenizer, held_out: list[dict], cfg: Config, accelerator, progress) -> tuple[dict, list]:
    """K = `eval_samples` completions of each held-out question: the eval_* metrics, and a few samples to look at.

    Every evaluation has the same questions and the same uniforms, so that two of them differ by the weights alone.
    """
    k, i, n = cfg.eval_samples, accelerator.process_index, accelerator.num_processes
    tasks = [task | {"index": number} for number, task in enumerate(held_out)]
    share = tasks[len(tasks) * i // n : len(tasks) * (i + 1) // n]  # perhaps none
    samples = []
    if share:
        rollout = generate(policy, tokenizer, share, k, cfg, "eval", lambda phase, ids: progress(f"eval {phase}", ids))
        samples = score(rollout, share, cfg)
    samples = gather_object(samples)
    metrics = evaluation([samples[i : i + k] for i in range(0, len(samples), k)])
    return {f"eval_{name}": value for name, value in metrics.items()}, samples[: 16 * k : k]


def ask(policy, tokenizer, task: dict, cfg: Config) -> None:
    """Prints a completion of the user's own question while it is sampled, then its answer, and whether it is right."""
    prompt = render_prompt(tokenizer, task["question"], cfg.template)
    print("<think>" + prompt.rpartition("<think>")[2], end="", flush=True)  # the prompt has opened the thinking
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    streamer.on_finalized_text = lambda text, stream_end=False: print(printable(text), end="", flush=True)
    asked = [task | {"index": 0}]
    rollout = generate(policy, tokenizer, asked, 1, cfg, "ask", lambda _, ids: streamer.put(ids[0, -1:]))
    streamer.end()
    print("\n\nanswer:", printable(extract_answer(rollout.text[0]) or "none"))
    if task["answer"] is not None:
        print("right" if score(rollout, asked, cfg)[0]["accuracy"] else "wrong")


# ---- Files: checkpoint, log, report ---------------------------------------------------------------------------------
def save_checkpoint(run_dir: Path, step: int, model, optimizer, writes: bool) -> None:
    """The state after `step` steps, gathered from all processes, written by one. A step needs no random state."""
    policy, adam = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    state = {"policy": policy, "optimizer": adam, "step": step}
    size = 3 * sum(p.nbytes for p in model.parameters())  # the weights, and Adam's two
    if writes:
        write_checkpoint(run_dir, step, size, lambda file: torch.save(state, file))


def read_checkpoint(run_dir: str) -> dict:
    """What save_checkpoint wrote, or step 0 of a run that never came to it. Raises UsageError if it is damaged."""
    path = newest_whole(Path(run_dir) / "checkpoint")
    try:
        return torch.load(path, weights_only=True, map_location="cpu", mmap=True) if path else {"step": 0}
    except (RuntimeError, UnpicklingError) as error:  # it holds code, which is never run
        raise UsageError(f"--resume {run_dir}: {path} is no checkpoint ({error}); try another run") from error


# ---- Main: Algorithm 1 of DeepSeekMath ------------------------------------------------------------------------------
def set_up(cfg: Config, accelerator, saved: dict, trains: bool) -> tuple:
    """(pi, pi_ref, pi_old, optimizer), that is policy, reference and sampler, as saved or as before the first step."""
    policy = load_policy(cfg.model, cfg.gradient_checkpointing)
    reference = copy.deepcopy(policy).requires_grad_(False) if trains and cfg.kl_beta > 0 else None
    shared = {id(weight): weight for weight in policy.parameters()} if cfg.dtype == "float32" else {}
    sampler = copy.deepcopy(policy, shared)  # deepcopy's memo: a weight that is named in it is shared, not copied
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0)
    policy, _ = accelerator.prepare(policy, optimizer)  # its wrapper of the optimizer would do nothing here
    model = accelerator.unwrap_model(policy)
    if "policy" in saved:
        state = {"model_state_dict": saved["policy"], "optim_state_dict": saved["optimizer"]}
        try:
            set_state_dict(model, optimizer, **state, options=StateDictOptions(full_state_dict=True))
        except (KeyError, RuntimeError) as error:
            raise UsageError(f"--resume {cfg.resume}: is not a run of {cfg.model} ({error}); try another") from error
    refresh(sampler.to(accelerator.device), model, cfg.dtype)
    if reference is not None:  # shared out as the policy is, or whole
        reference = fsdp2_prepare_model(accelerator, reference) if accelerator.is_fsdp2 else reference.to(model.device)
    return policy, reference, sampler, optimizer


def train_step(step: int, policy, reference, sampler, optimizer, tokenizer, tasks, cfg, accelerator, progress) -> tuple:
    """(line of metrics.jsonl, samples of this process) of one rollout and the update on it."""
    began = time.perf_counter()
    rollout = generate(sampler, tokenizer, tasks, cfg.group_size, cfg, "train", progress)
    speed = int(rollout.lengths.sum()) / (time.perf_counter() - began)
    samples = score(rollout, tasks, cfg)
    rewards = torch.tensor([sample["reward"] for sample in samples], device=accelerator.device)
    advantages = group_advantages(rewards.view(-1, cfg.group_size), cfg.advantage_scale)  # [N]
    metrics = update(policy, reference, optimizer, step, rollout, advantages, cfg, accelerator, progress)
    samples = [sample | {"advantage": a} for sample, a in zip(samples, advantages.tolist(), strict=True)]
    means = step_means(gather_object(samples), cfg.group_size)
    speeds = {"completion_tokens_per_second": speed, "seconds": time.perf_counter() - began}
    return {"step": step} | means | metrics | speeds, samples


def with_less_memory(optimizer, work: Callable, *args, cfg: Config, **more) -> tuple:
    """work(...); if the GPU's memory is too small, the same once more with half the rows and tokens at a time."""
    halves = {name: max(1, getattr(cfg, name) // 2) for name in ("rollout_rows", "tokens_per_microbatch")}
    stepped = []
    hook = optimizer.register_step_pre_hook(lambda *_: stepped.append(True))
    for attempt in (cfg, replace(cfg, **halves)):
        try:
            return work(*args, cfg=attempt, **more)
        except RuntimeError as error:  # torch.OutOfMemoryError is one; MPS raises it as it is
            if "out of memory" not in str(error):
                raise
        finally:
            hook.remove()
        if stepped or more["accelerator"].num_processes > 1:  # weights have moved, or others wait in an exchange
            break
        optimizer.zero_grad()
        clear_device_cache()
    raise UsageError(f"out of memory: try {' '.join(typed(halves))}, --gradient_checkpointing or --dtype bfloat16")


def main(cfg: Config) -> None:
    accelerator = make_accelerator(cfg)
    is_main, share = accelerator.is_main_process, cfg.questions_per_step // accelerator.num_processes
    saved = read_checkpoint(cfg.resume) if cfg.resume else {"step": 0}
    if (start := saved["step"]) > cfg.steps:
        raise UsageError(f"--steps {cfg.steps}: {cfg.resume} has done {start} already; try {2 * start}")
    if cfg.resume and start == 0 and (cfg.eval_only or cfg.ask is not None):
        raise UsageError(f"--resume {cfg.resume}: has no checkpoint yet; try --model {cfg.model} instead")
    tokenizer = load_tokenizer(cfg.model)
    question_at, held_out = load_questions(tokenizer=tokenizer, **vars(cfg))
    if cfg.ask is None:
        run_dir = open_run_dir(cfg) if is_main else Path(cfg.run_dir)  # only the main process writes
        about = f"{cfg.task} with {cfg.model} on {accelerator.device}; files go to {run_dir}/"
        accelerator.print(about + (f" from step {start} on" if cfg.resume else ""), flush=True)
    policy, reference, sampler, optimizer = set_up(cfg, accelerator, saved, question_at is not None)
    model = accelerator.unwrap_model(policy)
    if cfg.ask is not None:
        return ask(sampler, tokenizer, held_out[0], cfg)
    offline = {"dir": run_dir, "mode": os.environ.get("WANDB_MODE", "offline")}  # no upload unless the user says so
    accelerator.init_trackers("r1-zero", vars(cfg), {"wandb": offline})  # nothing, without --wandb
    cut = start if cfg.resume and not cfg.eval_only else None
    metrics, completions = (Log(run_dir / f"{name}.jsonl", is_main, cut) for name in ("metrics", "completions"))
    bar, show = progress_bar(cfg.steps, start, is_main)
    shared = {"cfg": cfg, "accelerator": accelerator, "progress": show}
    if cfg.eval_only:
        evaluated, _ = evaluate(sampler, tokenizer, held_out, **shared)
        bar.close()
        accelerator.end_training()
        metrics.append([{"step": start} | evaluated])
        return accelerator.print(f"\n{table({'now': evaluated})}")
    lines = []
    with ends_when_asked() as asked:
        for step in range(start, cfg.steps + 1):  # a line of the log describes the policy after `step` steps
            ends = any(gather_object([bool(asked)]))
            if step > start and (ends or step == cfg.steps or (cfg.save_every and step % cfg.save_every == 0)):
                save_checkpoint(run_dir, step, model, optimizer, is_main and not metrics.waiting + completions.waiting)
            if ends:
                break
            evaluated, shown = {}, []
            if step in (0, cfg.steps) or (cfg.eval_every and step % cfg.eval_every == 0):
                evaluated, shown = with_less_memory(optimizer, evaluate, sampler, tokenizer, held_out, **shared)
            if evaluated and step > 0:
                refresh(sampler, model, "float32")  # what is saved, though not what is computed with
                save_model(run_dir / "best", sampler, tokenizer, is_main, score=evaluated["eval_pass@1"])
                refresh(sampler, model, cfg.dtype)
            first = step * cfg.questions_per_step + share * accelerator.process_index
            tasks = [question_at(i) | {"index": i} for i in range(first, first + share)]
            trained = (step, policy, reference, sampler, optimizer, tokenizer, tasks)
            line, samples = with_less_memory(optimizer, train_step, *trained, **shared)
            refresh(sampler, model, cfg.dtype)
            if accelerator.device.type == "mps":
                torch.mps.empty_cache()  # its allocator keeps a buffer for each shape that it has met
            lines.append(line | evaluated)
            metrics.append(lines[-1:])
            completions.append([{"step": step} | sample for sample in shown + samples[:4]])
            if (note := trouble(lines, run_dir, cfg.lr, cfg.updates_per_rollout)) and is_main:
                bar.write(note)
            accelerator.log(lines[-1], step)
            show(line=line)
    bar.close()
    refresh(sampler, model, "float32")  # while the other processes, whose shares it may need, are there
    accelerator.end_training()
    if ends:
        return accelerator.print(f"\nTo go on: uv run R1ZeroTrain.py --resume {run_dir}")
    if is_main:
        for log in (metrics, completions):
            log.close()
        save_model(run_dir / "model", sampler, tokenizer, True, needed=True)
        write_card(command_line(cfg), **vars(cfg) | {"run_dir": run_dir})
        print("\n" + summary(run_dir, cfg.task, cfg.steps))


def run(arguments: list[str]) -> int:
    """The way in from the command line; returns the exit code, 2 for an option that can't work."""
    return exit_code(lambda: main(parse_config(arguments)))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack the sparkline's characters
    sys.exit(run(sys.argv[1:]))
