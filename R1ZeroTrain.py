"""R1-Zero in one file: GRPO trains a base model to reason from rule-based rewards alone.

    The algorithm, each step                                              function
    1. draw Q questions                                                   question_at, in main
    2. sample G completions of each question from the policy              generate
    3. reward each completion for a correct answer and the right format   score
    4. advantage: the reward relative to its group          (equation 3)  group_advantages
    5. clipped ratio times advantage, minus the KL penalty  (1 and 2)     grpo_loss
    6. take mu optimizer steps on each rollout                            update
    7. from time to time, measure accuracy on held-out questions          evaluate

`uv run R1ZeroTrain.py` trains a tiny model on any computer, `uv run --extra lora R1ZeroTrain.py
--recipe gsm8k` a model of 1.5B on GSM8K. Add `--help` for all options with their defaults.

Equation numbers are those of DeepSeek-R1 (arXiv 2501.12948). The file has four parts: algorithm,
evaluation, speed and run. Part 1 is all of GRPO. Of Part 3, you need only the docstrings.

Departures from the paper: the ratio and its clip are per token, and the result is averaged over
tokens, as in the first paper on GRPO (DeepSeekMath, arXiv 2402.03300); the advantage is divided by
std + 1e-4, as in TRL; the reference remains the initial policy.

Shapes: Q questions per step, G completions per question, N = Q·G rows (rows of the same question
are adjacent), P prompt tokens (padded left), T completion tokens (padded right), V vocabulary size.
Lower case denotes a subset: n of the N rows, q of the Q questions.
"""

import copy
import hashlib
import inspect
import json
import os
import re
import signal
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal, get_type_hints
from zipfile import ZipFile

IS_MAIN = os.environ.get("RANK", "0") == "0"  # only the first process writes and prints
if __name__ == "__main__" and IS_MAIN:  # the imports below take seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C exits without a traceback
    print("loading torch and transformers", flush=True)

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from transformers.cache_utils import DynamicCache, StaticLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.logging import disable_progress_bar

from prompts import TASKS, UsageError, encode, load_questions, render_prompt, uses_chat_template
from rewards import eval_metrics, extract_answer, format_reward, step_means

Count = Annotated[int, 1]  # an integer of at least 1; parse_config checks it
CountOrZero = Annotated[int, 0]
Float = Annotated[float, 0.0]


@dataclass
class Config:
    """The command-line options. The comment next to each one is also its --help text."""

    # Model and data
    recipe: Literal["tiny", "mac", "gsm8k", "7b", "tinyzero", "deepscaler"] = "tiny"  # a preset
    model: str = "notebooks/tiny-base"  # initial policy: a model folder or a hub name
    task: str = "countdown"  # kind of question and its reward: countdown, gsm8k, math or your own
    template: Literal["auto", "base", "chat"] = "auto"  # auto: the chat template if there is one
    dataset: str = ""  # hub name, folder, or .jsonl .json .csv .parquet file; empty: the task's own
    eval_dataset: str = ""  # dataset to evaluate on; empty: the held-out part of --dataset
    # Rollouts
    steps: CountOrZero = 34  # number of rollouts to train on
    questions_per_step: Count = 16  # Q: questions per step, over all processes
    group_size: Annotated[int, 2] = 16  # G: completions sampled for each question
    max_new_tokens: Count = 256  # T: tokens after which a completion is truncated
    temperature: Annotated[float, 0.001] = 1.0  # softmax temperature, in sampling and in training
    rollout_rows: Count = 256  # completions sampled at a time; bounds the KV cache
    format_weight: Float = 0.1  # reward for the right format; a correct answer earns 1
    # Update
    lr: Float = 2.5e-4  # initial learning rate of AdamW; it decays linearly to 0
    kl_beta: Float = 0.001  # beta: weight of the KL penalty; 0 needs no reference model
    clip_low: Float = 0.2  # epsilon: the ratio is clipped at 1 - clip_low
    clip_high: Float = 0.2  # epsilon: the ratio is clipped at 1 + clip_high
    loss: Literal["grpo", "dapo", "dr_grpo"] = "grpo"  # token weights: see token_weights
    advantage_scale: Literal["group", "none"] = "group"  # divide by the group's std or not at all
    updates_per_rollout: Count = 1  # mu: optimizer steps on each rollout
    max_grad_norm: Annotated[float, 0.001] = 1.0  # gradients are clipped to this norm
    tokens_per_microbatch: Count = 4096  # tokens per forward pass in training; bounds memory
    gradient_checkpointing: bool = False  # recompute activations: less memory, slower
    lora_rank: CountOrZero = 0  # train LoRA adapters of this rank; 0: train all weights
    # Evaluation
    eval_every: CountOrZero = 0  # steps between evaluations; 0: only before and after training
    eval_questions: Count = 512  # held-out questions per evaluation
    eval_samples: Count = 1  # K: completions sampled for each held-out question
    eval_only: bool = False  # evaluate, do not train
    ask: str = ""  # complete this question, do not train; in Countdown: "44 19 35 = 98"
    # Run
    seed: CountOrZero = 0  # seed of all random numbers
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: CUDA, else MPS, else CPU
    dtype: Literal["float32", "bfloat16"] = "float32"  # to compute in; trained weights are float32
    run_dir: str = ""  # folder for the files of the run; empty: runs/<recipe>-<time>
    save_every: CountOrZero = 10  # steps between checkpoints; 0: only at the end
    resume: str = ""  # folder of a run to continue with its saved options
    wandb: bool = False  # also log to Weights & Biases, offline unless WANDB_MODE is set


# ==== Part 1. The algorithm =======================================================================
def train_step(
    policy, reference, sampler, optimizer, tokenizer, questions: list, cfg, accelerator
) -> tuple:
    """Samples a rollout and updates the policy on it. Returns (metrics, samples).

    policy is pi_theta and reference is pi_ref. sampler has the policy's weights in the precision of
    cfg.dtype: it is the policy itself, or a copy of it that samples faster."""
    start = time.perf_counter()
    rollout = generate(sampler, tokenizer, questions, cfg.group_size, cfg)
    sampling = time.perf_counter() - start

    samples = score(rollout, questions, cfg)
    rewards = torch.tensor([sample["reward"] for sample in samples], device=rollout.ids.device)
    advantages = group_advantages(rewards.view(-1, cfg.group_size), cfg.advantage_scale)  # [N]

    metrics = update(policy, reference, optimizer, rollout, advantages, cfg, accelerator)
    refresh(sampler, policy, cfg.dtype)  # the new policy samples the next rollout

    samples = gather_object([s | {"advantage": a} for s, a in zip(samples, advantages.tolist())])
    metrics |= step_means(samples)  # over all processes: reward, accuracy, format, ...
    metrics["completion_tokens_per_second"] = len(samples) * metrics["length"] / sampling
    metrics["seconds"] = time.perf_counter() - start
    return metrics, samples


@dataclass
class Rollout:
    """N = Q·G completions and their prompts. An id of -1 is padding."""

    prompt_ids: Tensor  # [N, P], padded left
    ids: Tensor  # [N, T], padded right; a completion that is not truncated ends in EOS
    lengths: Tensor  # [N], number of tokens of each completion, EOS included
    truncated: Tensor  # [N], True where a completion has T tokens and no EOS
    logp_sampled: Tensor  # [N, T], log-probability of each token when it was sampled
    text: list  # N completions as they are scored: with the <think> that ends each prompt


def generate(policy, tokenizer, questions: list, group_size: int, cfg) -> Rollout:
    """Samples `group_size` completions of each question from softmax(logits / cfg.temperature).

    A question is a dict: its text ("question"), the arguments of its reward ("answer"), and a
    key ("index"). A completion depends only on the weights, the key, the text and cfg."""
    prompts = [render_prompt(tokenizer, q["question"], cfg.template) for q in questions]
    tokens = [torch.tensor(ids) for ids in encode(tokenizer, prompts, cfg.template)["input_ids"]]
    prompt_ids = pad_sequence(tokens, batch_first=True, padding_value=-1, padding_side="left")
    prompt_ids = prompt_ids.repeat_interleave(group_size, 0).to(policy.device)  # [N, P]

    # One random number per token, drawn in advance: device and batch size do not change them.
    size = group_size, cfg.max_new_tokens
    uniforms = [torch.rand(size, generator=seeded(cfg.seed, q["index"])) for q in questions]
    uniforms = torch.cat(uniforms).to(policy.device)  # [N, T]
    ends = policy.generation_config.eos_token_id  # an id, a list of ids, or None
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    eos = torch.tensor(sorted(ends), device=policy.device)
    chunks = zip(prompt_ids.split(cfg.rollout_rows), uniforms.split(cfg.rollout_rows))
    parts = [sample(policy, *chunk, eos, cfg) for chunk in chunks]
    ids, logp_sampled = map(torch.cat, zip(*parts))  # [N, T] each

    is_eos = torch.isin(ids, eos)
    eos_before = is_eos.cumsum(1) - is_eos.long()  # number of EOS before each token
    ids = ids.masked_fill(eos_before > 0, -1)
    lengths, truncated = (ids >= 0).sum(1), ~is_eos.any(1)
    spoken = [row[(row >= 0) & ~end] for row, end in zip(ids, is_eos)]
    text = ["<think>" + tokenizer.decode(row) for row in spoken]
    return Rollout(prompt_ids, ids, lengths, truncated, logp_sampled, text)


@torch.no_grad()
def sample(policy, prompt_ids: Tensor, uniforms: Tensor, eos: Tensor, cfg) -> tuple:
    """Completes prompt_ids [n, P] with random numbers uniforms [n, T], up to EOS or T tokens.

    Returns ids and logp_sampled, both [n, T]. A row may continue for a few tokens after its EOS."""
    ids = torch.full_like(uniforms, -1, dtype=torch.long)
    logp_sampled = torch.zeros_like(uniforms)
    logits, cache, mask = read_prompts(policy, prompt_ids, uniforms.shape[1], cfg)

    rows = torch.arange(len(ids), device=ids.device)  # rows still in the batch
    for t in tqdm(range(uniforms.shape[1]), "token", leave=False, disable=not IS_MAIN or None):
        if t > 0:
            logits = forward(policy, ids[rows, t - 1, None], mask[rows], cfg, cache)
        ids[rows, t], logp_sampled[rows, t] = draw(logits[:, 0], uniforms[rows, t], cfg.temperature)
        if t % 8 == 7:  # not at every token: the CPU has to wait for a GPU here
            rows = drop_finished(rows, ids, eos, cache)
            if len(rows) == 0:
                break
    return ids, logp_sampled


def draw(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple:
    """Draws a token for each row of logits [n, V]. Returns tokens and log-probabilities, [n] each.
    By inverse CDF: the first token whose cumulative probability exceeds the random number."""
    probabilities = torch.softmax(logits / temperature, dim=-1)  # [n, V]
    cdf = probabilities.cumsum(-1)
    # Rounding can leave cdf[-1] below 1. right=True never selects a token of probability 0.
    token = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True)
    token = token.clamp(max=cdf.shape[1] - 1)
    return token[:, 0], probabilities.gather(1, token)[:, 0].log()


def seeded(*key):
    """A generator that depends only on `key`, so that no random state has to be saved."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).hexdigest()  # hash() varies by run
    return torch.Generator().manual_seed(int(digest[:15], 16))


def score(rollout: Rollout, questions: list, cfg) -> list:
    """Returns N samples: each completion with its question, reward (r_i) and the reward's parts."""
    group_size = len(rollout.text) // len(questions)
    samples = []
    for i, text in enumerate(rollout.text):
        question = questions[i // group_size]
        accuracy = TASKS[cfg.task].reward(text, **question["answer"])  # 1.0: the answer is right
        well_formed = format_reward(text)  # 1.0: <think>...</think> <answer>...</answer>
        sample = {
            "question": question["question"],
            "text": text,
            "reward": accuracy + cfg.format_weight * well_formed,
            "accuracy": accuracy,
            "format": well_formed,
            "length": int(rollout.lengths[i]),
            "truncated": bool(rollout.truncated[i]),
        }
        samples.append(sample)
    return samples


def group_advantages(rewards: Tensor, scale: str = "group") -> Tensor:
    """Equation 3: rewards [Q, G] -> advantages [Q·G], each relative to the rewards of its group.

    `scale` "group" divides by the group's standard deviation (ddof 1) + 1e-4; "none" does not
    (Dr. GRPO, arXiv 2503.20783). A group of equal rewards has advantages of exactly 0."""
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if scale == "group":
        advantages = advantages / (rewards.std(dim=1, keepdim=True) + 1e-4)
    # The mean of equal floats can have a rounding error, which the division would magnify.
    equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    return advantages.masked_fill(equal, 0.0).flatten()


def token_logprobs(policy, rollout: Rollout, rows: Tensor, cfg) -> tuple:
    """log pi(o_i,t | q, o_i,<t) of the completions `rows`: (logp, entropy, mask), [n, T] each.

    Here T is the length of the longest one. Logits are divided by the sampling temperature, so that
    the distribution scored is the one that was sampled from. The entropy is in nats."""
    ids = rollout.ids[rows, : int(rollout.lengths[rows].max())]  # [n, T]
    mask = ids >= 0  # EOS counts: the policy must learn when to stop
    logp, entropy = predict(policy, rollout.prompt_ids[rows], ids, cfg)
    return logp, entropy, mask


def token_weights(lengths: Tensor, loss: str, max_new_tokens: int) -> Tensor:
    """lengths [N] -> [N]: the loss weight of each token of completion i. N counts the completions
    of the step in all micro-batches and processes, so splitting them does not change the loss.

    grpo: 1 / (|o_i|·N), the mean over completions (1/G) of the mean over their tokens (1/|o_i|).
    dapo: 1 / the sum of all |o_i|, the mean over tokens (arXiv 2503.14476).
    dr_grpo: 1 / (N·max_new_tokens), a constant (arXiv 2503.20783)."""
    n, ones = len(lengths), torch.ones_like(lengths, dtype=torch.float32)
    if loss == "grpo":
        return ones / (lengths * n)
    if loss == "dapo":
        return ones / lengths.sum()
    return ones / (n * max_new_tokens)


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
) -> tuple:
    """Equation 1, negated: (loss, metrics).

    logp, logp_old, logp_ref, mask are [N, T]; advantages, weights are [N]; logp_ref is None when
    kl_beta is 0. The losses of micro-batches add up to the loss of the step, and so do the metrics:
    the number of clipped tokens, and the sum of k3 over tokens."""
    padding = mask == 0
    advantages, weights = advantages[:, None], weights[:, None] * mask  # [N, 1], [N, T]

    # Padding gets a ratio of 1: exp could overflow there, and inf times a weight of 0 is NaN.
    ratio = torch.exp((logp - logp_old).masked_fill(padding, 0.0))  # pi_theta / pi_old
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    metrics = {"clip_fraction": ((clipped * advantages < ratio * advantages) * mask).sum()}

    if kl_beta > 0:
        log_ratio_ref = (logp_ref - logp).masked_fill(padding, 0.0)  # log(pi_ref / pi_theta)
        k3 = torch.exp(log_ratio_ref) - log_ratio_ref - 1  # equation 2: unbiased, never negative
        objective = objective - kl_beta * k3
        metrics["kl"] = k3.detach().sum()

    return -(weights * objective).sum(), metrics


def update(
    policy, reference, optimizer, rollout: Rollout, advantages: Tensor, cfg, accelerator
) -> dict:
    """Takes mu optimizer steps on one rollout. Returns metrics: token means and gradient norm.

    At the first step pi_theta is still pi_old: every ratio is 1, but its gradient is not 0."""
    lengths = accelerator.gather(rollout.lengths)  # of all processes
    weights = token_weights(lengths, cfg.loss, cfg.max_new_tokens)
    weights = weights.split(len(rollout.lengths))[accelerator.process_index]  # [N]
    weights = weights * accelerator.num_processes  # because DDP averages gradients

    batches = microbatches(rollout, cfg.tokens_per_microbatch)
    logp_old, logp_ref = [], [None] * len(batches)  # one tensor per micro-batch
    if cfg.kl_beta > 0:
        with torch.no_grad():
            logp_ref = [token_logprobs(reference, rollout, rows, cfg)[0] for rows in batches]

    sums = []  # metrics, one dict per micro-batch
    for epoch in range(cfg.updates_per_rollout):
        for i, rows in enumerate(batches):
            policy.require_backward_grad_sync = i == len(batches) - 1  # DDP: synchronize once
            logp, entropy, mask = token_logprobs(policy, rollout, rows, cfg)
            if epoch == 0:
                logp_old.append(logp.detach())  # not logp_sampled: the sampler rounds differently

            batch = (logp, logp_old[i], logp_ref[i], advantages[rows], mask, weights[rows])
            loss, metrics = grpo_loss(*batch, cfg.clip_low, cfg.clip_high, cfg.kl_beta)
            accelerator.backward(loss)

            gap = (logp_old[i] - rollout.logp_sampled[rows, : logp.shape[1]]).abs()
            metrics["logp_gap"] = (gap * mask).sum()  # how differently the sampler rounds
            metrics["entropy"] = (entropy * mask).sum()
            metrics["tokens"] = mask.sum()
            sums.append(metrics)

        grad_norm = accelerator.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
        if grad_norm.isfinite():  # otherwise all weights would become NaN
            optimizer.step()
        optimizer.zero_grad()

    totals = {name: accelerator.reduce(sum(batch[name] for batch in sums)) for name in sums[0]}
    tokens = totals.pop("tokens")
    metrics = {"kl": None} | {name: float(total / tokens) for name, total in totals.items()}
    metrics["grad_norm"] = float(grad_norm) if grad_norm.isfinite() else None
    return metrics


# ==== Part 2. Evaluation ==========================================================================
def evaluate(policy, tokenizer, held_out: list, cfg, accelerator) -> tuple:
    """Samples K = cfg.eval_samples completions per question. Returns (metrics, first samples).
    All evaluations use the same random numbers, so that only the weights make a difference."""
    k, samples = cfg.eval_samples, []
    questions = [question | {"index": f"eval/{i}"} for i, question in enumerate(held_out)]
    with accelerator.split_between_processes(questions) as share:
        if share:  # there may be more processes than questions
            samples = score(generate(policy, tokenizer, share, k, cfg), share, cfg)
    samples = gather_object(samples)
    return eval_metrics(samples, k), samples[::k]


def ask(policy, tokenizer, question: dict, cfg) -> None:
    """Prints a completion of one question, its answer, and whether it is right if that is known."""
    rollout = generate(policy, tokenizer, [question], 1, cfg)
    text = rollout.text[0]
    print(printable(f"{text}\n\nanswer: {extract_answer(text)}"))
    if question["answer"]:
        print("right" if score(rollout, [question], cfg)[0]["accuracy"] else "wrong")


# ==== Part 3. Speed ===============================================================================
# This part computes the same numbers faster or in less memory. Timings are for the default run, or
# for the models narrow and wide of tests/benchmark.py, on 2 CPU cores.
LOGITS_AT_ONCE = 2**21  # 8 MB, which fits into the cache of a CPU


def forward(model, ids: Tensor, mask: Tensor, cfg, cache=None, states=False, keep=0) -> Tensor:
    """Returns logits [n, new, V] at ids [n, new], which continue the cache. mask [n, past + new] is
    False on padding; it may be wider. Returns only the last `keep` positions, or all if it is 0.
    With `states`, returns the last hidden states [n, new, width] instead of logits."""
    past = cache.get_seq_length() if cache else 0
    mask = mask[:, : past + ids.shape[1]]
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, past:]  # padding does not count
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
        out = model(
            input_ids=ids.clamp(min=0),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=1 if states else keep,  # with states, logits are not used
            output_hidden_states=states,
        )
    return out.hidden_states[-1][:, -keep:] if states else out.logits.float()


def read_prompts(policy, prompt_ids: Tensor, new: int, cfg, states=False) -> tuple:
    """Runs prompts [n, P]. Returns the logits [n, 1, V] at their last tokens (with `states`, the
    hidden states [n, 1, width]), the cache, and a mask [n, P + new] with room for completions.
    Equal prompts run once, and their cache is copied: a step of `narrow` takes 3.7 s, not 5.0."""
    # prompt_ids equals ids[row_of]. This runs on the CPU, because MPS has no unique(dim=0).
    ids, row_of = prompt_ids.cpu().unique(dim=0, return_inverse=True)  # [q, P], [n]
    ids, row_of = ids.to(prompt_ids.device), row_of.to(prompt_ids.device)
    cache = DynamicCache()
    if not torch.is_grad_enabled():  # autograd does not support its in-place writes
        cache.layer_class_to_replicate = partial(RoomyLayer, prompt_ids.shape[1] + new)
    out = forward(policy, ids, ids >= 0, cfg, cache, states, keep=1)
    cache.reorder_cache(row_of)  # from q rows to n rows
    # index_select, because the gradient of out[row_of] would depend on the order of threads.
    return out.index_select(0, row_of), cache, pad(prompt_ids >= 0, (0, new), value=True)


class RoomyLayer(StaticLayer):
    """KV cache of a layer: keys and values [n, heads, room, width], filled up to `length`. Without
    room, every new token copies the cache: sampling in the default run takes 1.14 times as long."""

    length = 0

    def update(self, key_states: Tensor, *args, **kwargs):
        self.length += key_states.shape[2]
        keys, values = super().update(key_states, *args, **kwargs)
        return keys[:, :, : self.length], values[:, :, : self.length]

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple:
        return self.length + query_length, 0


def drop_finished(rows: Tensor, ids: Tensor, eos: Tensor, cache: DynamicCache) -> Tensor:
    """Returns the rows that stay in the batch. Finished rows leave once they are a fifth of it. If
    they stayed, sampling in the default run would take 2.8 times as long."""
    alive = (~torch.isin(ids[rows], eos).any(1)).nonzero()[:, 0]
    if len(alive) > 0.8 * len(rows):
        return rows
    cache.reorder_cache(alive)  # a copy, too slow to make for every finished row
    return rows[alive]


def predict(policy, prompt_ids: Tensor, ids: Tensor, cfg) -> tuple:
    """Returns logp and entropy, [n, T] each, of completions ids [n, T] of prompts [n, P]."""
    model = getattr(policy, "module", policy)  # DDP wraps it
    prompt_ids = prompt_ids[:, (prompt_ids >= 0).any(0)]  # drop padding that all share
    new, states = ids.shape[1], model.plain_head  # see check_policy
    if cfg.gradient_checkpointing:  # no cache: layers run twice, and would fill it twice
        whole = torch.cat([prompt_ids, ids], dim=1)
        mask = pad(prompt_ids >= 0, (0, new), value=True)
        out = forward(policy, whole, mask, cfg, None, states, keep=new + 1)
    else:
        out, cache, mask = read_prompts(policy, prompt_ids, new, cfg, states)
        out = torch.cat([out, forward(policy, ids, mask, cfg, cache, states)], dim=1)
    out, ids = out[:, :-1], ids.clamp(min=0)  # out[:, t] predicts token t; drop the last
    if states:
        head = model.get_output_embeddings().weight
        flat = out.flatten(0, 1).to(getattr(torch, cfg.dtype))
        logp, entropy = HeadLogprobs.apply(flat, head, ids.flatten(), cfg)
        return logp.view_as(ids), entropy.view_as(ids)
    all_logp = torch.log_softmax(out / cfg.temperature, dim=-1)  # [n, T, V]
    with torch.no_grad():
        entropy = -(all_logp.exp() * all_logp).sum(-1)
    return all_logp.gather(-1, ids[..., None])[..., 0], entropy


def pieces(states: Tensor, head: Tensor, ids: Tensor, cfg):
    """Yields, for each piece of the vocabulary, its slice of V, its logits [n, size], the columns
    of `ids` in it, and whether they are in it, [n, 1] each."""
    size = 1 + LOGITS_AT_ONCE // len(ids)
    for start in range(0, len(head), size):
        piece = head[start : start + size].to(states.dtype)
        logits = (states @ piece.T).float() / cfg.temperature
        column = (ids - start)[:, None]
        clamped = column.clamp(0, len(piece) - 1)
        yield slice(start, start + size), logits, clamped, column == clamped


class HeadLogprobs(torch.autograd.Function):
    """states [n, width], head [V, width], ids [n] -> (logp, entropy), [n] each.
    Logits [n, V] would take most of an update's memory, so they are computed one piece of the
    vocabulary at a time, and again in the backward pass. A step of `wide`, whose vocabulary is
    151,936, takes 8.7 s and 2.5 GB instead of 23 s and 8.3 GB."""

    @staticmethod
    def forward(ctx, states: Tensor, head: Tensor, ids: Tensor, cfg):
        chosen = torch.zeros_like(ids, dtype=torch.float32)  # the logit of each id
        log_sum = chosen - torch.inf  # log of the sum of exp(logits), over the pieces so far
        mean = chosen  # mean of the logits so far, weighted by their softmax
        for _, logits, column, inside in pieces(states, head, ids, cfg):
            chosen = chosen + (logits.gather(1, column) * inside)[:, 0]
            total = torch.logaddexp(log_sum, logits.logsumexp(1))
            softmax = (logits - total[:, None]).exp_()
            # (log_sum - total).exp() is the share of all earlier pieces in the new sum.
            mean = mean * (log_sum - total).exp() + torch.linalg.vecdot(softmax, logits)
            log_sum = total
        entropy = log_sum - mean  # -sum of p·log p, where log p = logit - log_sum
        ctx.save_for_backward(states, head, ids, log_sum)
        ctx.cfg = cfg
        ctx.mark_non_differentiable(entropy)
        return chosen - log_sum, entropy

    @staticmethod
    def backward(ctx, grad_logp: Tensor, _):
        states, head, ids, log_sum = ctx.saved_tensors
        scale = grad_logp[:, None] / ctx.cfg.temperature
        grad_states = torch.zeros_like(states, dtype=torch.float32)  # float32: it sums many terms
        grad_head = torch.empty_like(head) if head.requires_grad else None  # LoRA freezes it
        for piece, logits, column, inside in pieces(states, head, ids, ctx.cfg):
            softmax = logits.sub_(log_sum[:, None]).exp_()  # in place, to save memory
            # d logp / d logits = one-hot - softmax
            grad = softmax.mul_(-scale).scatter_add_(1, column, scale * inside).to(states.dtype)
            grad_states += grad @ head[piece].to(states.dtype)
            if grad_head is not None:
                grad_head[piece] = grad.T @ states
        return grad_states, grad_head, None, None


def microbatches(rollout: Rollout, tokens: int) -> list:
    """Returns the rows, longest first, in micro-batches of at most `tokens` tokens or one row."""
    rows, batches = rollout.lengths.argsort(descending=True, stable=True), []
    while len(rows):
        width = rollout.prompt_ids.shape[1] + int(rollout.lengths[rows[0]])  # of the longest
        size = max(1, tokens // width)
        batches.append(rows[:size])
        rows = rows[size:]
    return batches


def refresh(other, policy, dtype: str) -> None:
    """Copies the policy's weights to another model, in `dtype`, except weights that both share."""
    for weight, trained in zip(other.parameters(), policy.parameters()):
        if weight is not trained:
            weight.data = trained.detach().to(getattr(torch, dtype), copy=True)


# ==== Part 4. The run =============================================================================
LOGS = "metrics.jsonl", "completions.jsonl"
# If an option is given twice, the last one counts. With LoRA, parse_config multiplies lr by five.
LARGE = "--lr 1e-6 --dtype bfloat16 --tokens_per_microbatch 2048 --eval_every 50 "
LARGE += "--group_size 8 --rollout_rows 64 --steps 500 --questions_per_step 8 "
GSM8K = LARGE + "--task gsm8k --lora_rank 16 --max_new_tokens 512 --eval_questions 256 "
RECIPES = {
    "tiny": "",
    "mac": GSM8K + "--model Qwen/Qwen2.5-0.5B-Instruct --dtype float32 --tokens_per_microbatch 512 "
    "--steps 300 --questions_per_step 4 --max_new_tokens 300 --rollout_rows 32",
    "gsm8k": GSM8K + "--model Qwen/Qwen2.5-1.5B-Instruct",
    "7b": GSM8K + "--model Qwen/Qwen2.5-7B-Instruct --gradient_checkpointing true",
    "tinyzero": LARGE + "--model Qwen/Qwen2.5-3B --dataset Jiayi-Pan/Countdown-Tasks-3to4 --steps "
    "1000 --template base --questions_per_step 64 --max_new_tokens 1024 --eval_questions 1024",
    "deepscaler": LARGE + "--model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --task math --steps "
    "1040 --temperature 0.6 --questions_per_step 128 --max_new_tokens 8192 --rollout_rows 16 "
    "--tokens_per_microbatch 8192 --eval_dataset HuggingFaceH4/aime_2024 --eval_samples 16",
}


def parse_config(words: list) -> Config:
    """Command line -> Config. `words` override the recipe or resumed run. Raises UsageError."""
    parser = HfArgumentParser(Config, allow_abbrev=False, usage="uv run R1ZeroTrain.py [options]")
    del parser._optionals._group_actions[1:]  # --help lists the groups of Config
    for group in inspect.getsource(Config).split("\n    # ")[1:]:
        shown = parser.add_argument_group(group.split("\n")[0])
        for name, comment in re.findall(r"(\w+): .*  # (.*)", group):
            option = parser._option_string_actions[f"--{name}"]
            option.help, option.metavar = comment, None if option.choices else "X"
            del option.option_strings[1:]  # --group-size works too, but is not listed
            shown._group_actions.append(option)
    parser.error = lambda message: refuse(f"{message}; try --help")
    given = parser.parse_args(words)  # --recipe and --resume stand for other options
    defaults = RECIPES[given.recipe].split()
    if parser.parse_args([*defaults, *words]).lora_rank:  # see add_adapters
        defaults += ["--lr", f"{5 * parser.parse_args(defaults).lr:g}"]
    if given.resume:
        with reading("--resume", given.resume, "a folder in runs/"):
            saved = json.loads(Path(given.resume, "config.json").read_text())
            saved = vars(Config(**saved)) | {"run_dir": ""}  # the folder may have been moved
        defaults = [f"--{name}={value}" for name, value in saved.items()]
    cfg = Config(**vars(parser.parse_args([*defaults, *words])))
    for name, hint in get_type_hints(Config, include_extras=True).items():
        value = getattr(cfg, name)
        for least in getattr(hint, "__metadata__", []):  # the second argument of Annotated
            if not least <= value <= 1e18:
                refuse(f"--{name} {value}: must be {least} to 1e18; try {getattr(Config, name)}")
    if cfg.lora_rank and not find_spec("peft"):
        refuse(f"--lora_rank {cfg.lora_rank}: needs peft; try uv run --extra lora R1ZeroTrain.py")
    if given.resume:
        fixed = "" if cfg.eval_only or cfg.ask else " task seed run_dir"
        for name in f"recipe model lora_rank{fixed}".split():
            if getattr(cfg, name) != saved[name]:
                refuse(f"--{name} {getattr(cfg, name)}: fixed by --resume; try without --{name}")
    cfg.run_dir = cfg.run_dir or f"runs/{cfg.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
    if given.resume and not cfg.eval_only:
        cfg.run_dir = cfg.resume
    elif Path(cfg.run_dir, "config.json").exists():
        refuse(f"--run_dir {cfg.run_dir}: holds a run; try --resume {cfg.run_dir} or another one")
    return cfg


def refuse(message: str) -> None:
    raise UsageError(message)


def make_accelerator(cfg: Config):
    """Sets up one process, or several with DDP, on CUDA, MPS or the CPU."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        refuse("--use_fsdp: each process holds the whole model; try --lora_rank 16 without FSDP")
    tracker = "wandb" if cfg.wandb else None  # "no" below, because `forward` uses autocast itself
    accelerator = Accelerator(cpu=cfg.device == "cpu", mixed_precision="no", log_with=tracker)
    device, n = accelerator.device.type, accelerator.num_processes
    if cfg.device not in ("auto", device):
        refuse(f"--device {cfg.device}: this machine has {device}; try {device}")
    if cfg.questions_per_step % n:
        refuse(f"--questions_per_step {cfg.questions_per_step}: not for {n} processes; try {4 * n}")
    return accelerator


def memory_plan(config, cfg, prompt_tokens: int) -> dict:
    """Estimates the GB that a run takes on its device from the shape of the model. For each token,
    autograd keeps what layers read and write; with gradient checkpointing, about a twelfth of that.
    To cover temporary tensors, prompts count in each row, and each trained weight as 14 bytes."""
    with torch.device("meta"):  # shapes without weights
        model = AutoModelForCausalLM.from_config(config)
    weights, size = model.num_parameters() / 1e9, 2 if cfg.dtype == "bfloat16" else 4
    layers = {name: w.shape for name, w in model.named_parameters() if re.search(r"\.\d+\.", name)}
    linear = sum(map(sum, layers.values())) / 1e9
    kv = sum(layers[name][0] for name in layers if re.search("[kv]_proj.weight", name)) / 1e9
    trained, copied = cfg.lora_rank * linear or weights, 0 if cfg.lora_rank else weights * size
    rows = min(cfg.rollout_rows, cfg.questions_per_step * cfg.group_size)
    kept = (linear + 2 * kv) / 12**cfg.gradient_checkpointing
    return {
        "weights": 4 * trained + weights * size - copied,
        "gradients and Adam": 14 * trained,
        "reference": copied * (cfg.kl_beta > 0),
        "sampler": copied * (size == 2),
        "KV cache": rows * (prompt_tokens + cfg.max_new_tokens) * kv * size,
        "micro-batch": cfg.tokens_per_microbatch * kept * (3 + size / 4),
    }


def announce(cfg, device, tokenizer, held_out) -> None:
    """Prints what the run will do and how much memory it will take."""
    with reading("--model", cfg.model) as files:
        tokens = tokenizer.tokenize(render_prompt(tokenizer, held_out[0]["question"], cfg.template))
        plan = memory_plan(AutoConfig.from_pretrained(**files), cfg, len(tokens))
    total, cpu = sum(plan.values()), psutil.virtual_memory().available
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else cpu
    template = "chat" if uses_chat_template(tokenizer, cfg.template) else "base"
    print(
        f"{cfg.task}: {cfg.steps * cfg.questions_per_step:,} questions to train on, "
        f"{len(held_out)} held out, {template} template, output in {cfg.run_dir}/"
    )
    parts = ", ".join(f"{name} {size:.2f}" for name, size in plan.items())
    hint = "; try --lora_rank 16 --gradient_checkpointing --tokens_per_microbatch 1024"
    memory = f"{total:.2f} GB of {free / 1e9:.2f} free ({parts}){hint * (1e9 * total > free)}"
    print(f"{cfg.model} in {cfg.dtype} on {device}, memory {memory}")


def set_up(cfg: Config, accelerator, saved: dict) -> tuple:
    """Returns (policy, reference, sampler, optimizer), initial or as `saved` in a checkpoint."""
    policy = load_policy(cfg.model, cfg.gradient_checkpointing)
    if cfg.lora_rank:
        freeze(policy, cfg.dtype)
    policy.to(accelerator.device)
    reference = None
    if cfg.kl_beta > 0:  # do not copy frozen weights: deepcopy finds them in its memo
        memo = {id(weight): weight for weight in policy.parameters() if not weight.requires_grad}
        reference = freeze(copy.deepcopy(policy, memo), cfg.dtype)
    if cfg.lora_rank:
        policy = add_adapters(policy, cfg)
    shared = cfg.lora_rank or cfg.dtype == "float32"
    sampler = policy if shared else copy.deepcopy(policy)
    policy = accelerator.prepare(policy)
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, cfg.lr, betas=[0.9, 0.95], weight_decay=0.0)
    if saved:
        with reading("--resume", cfg.resume, "the model that it started from"):
            for weight, value in zip(trained, saved["weights"]):
                weight.data.copy_(value)
            optimizer.load_state_dict(saved["optimizer"])
    refresh(sampler, policy, cfg.dtype)
    probe = torch.zeros(1, 1, dtype=torch.long, device=accelerator.device)
    with reading(f"--dtype {cfg.dtype} --model", cfg.model), torch.no_grad():
        for model in (policy, sampler):  # not all layers can mix precisions
            forward(model, probe, probe == 0, cfg)
    return policy, reference, sampler, optimizer


@contextmanager
def reading(option: str, name, instead: str = "notebooks/tiny-base"):
    """Yields from_pretrained arguments for a folder or hub name. Any error becomes a UsageError."""
    here = Path(__file__).parent / name
    try:
        path = here if here.is_dir() else name
        yield {"pretrained_model_name_or_path": path, "trust_remote_code": False}
    except Exception as error:  # damaged files raise other errors in each library
        refuse(f"{option} {name}: cannot be loaded ({str(error)[:300]}); try {instead}")


def load_tokenizer(model: str):
    """The tokenizer. Its model_max_length is the context length of the model."""
    with reading("--model", model) as files:
        tokenizer = AutoTokenizer.from_pretrained(**files)
        config = AutoConfig.from_pretrained(**files).get_text_config()
    # Beyond its original length, Phi-3 would have to rotate the whole cache again.
    longest = getattr(config, "original_max_position_embeddings", None)
    tokenizer.model_max_length = longest or getattr(config, "max_position_embeddings", 2**20)
    return tokenizer


def load_policy(model: str, gradient_checkpointing: bool = False):
    """Loads and checks the model in float32: bfloat16 loses updates at lr 1e-6. No dropout."""
    disable_progress_bar()
    # On MPS, fused attention is wrong with padding (pytorch issue 184180).
    attention = "eager" if torch.backends.mps.is_available() else None
    with reading("--model", model) as files:
        policy, loaded = AutoModelForCausalLM.from_pretrained(
            **files,
            dtype=torch.float32,
            attn_implementation=attention,
            use_safetensors=True,  # pickles can run code
            output_loading_info=True,
        )
        if loaded["missing_keys"]:  # transformers would initialize them at random
            raise ValueError(f"weights are missing: {sorted(loaded['missing_keys'])[:3]}")
        check_policy(policy.eval())
    for module in policy.modules():
        if gradient_checkpointing and isinstance(module, GradientCheckpointingLayer):
            # gradient_checkpointing_enable() works only in training mode, which enables dropout.
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)
    return policy


def freeze(model, dtype: str):
    """Returns the model with its weights frozen and in `dtype`."""
    for weight in model.requires_grad_(False).parameters():  # not buffers: RoPE needs float32
        weight.data = weight.data.to(getattr(torch, dtype))
    return model


def add_adapters(policy, cfg):
    """Adds LoRA (arXiv 2106.09685): alpha / rank · B @ A @ input is added to the output of each
    linear layer except the head. Only A and B are trained, in float32. Alpha is 32, dropout 0.
    "LoRA Without Regret" (Thinking Machines, 2025) has ten times the lr; five is steadier here."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(cfg.seed)  # A starts random, B at 0: the policy still equals the reference
    lora = LoraConfig(r=cfg.lora_rank, lora_alpha=32, target_modules="all-linear")
    return get_peft_model(policy, lora)


@torch.no_grad()
def check_policy(policy) -> None:
    """Raises ValueError unless `predict`, with padding and a copied cache, equals a plain forward
    pass. They differ if attention is not causal, or if the state is not a KV cache. Sets
    policy.plain_head: whether the logits are states @ head.weight.T and nothing else."""
    prompt_ids = torch.arange(4).repeat(3, 1)
    prompt_ids[1:, :2] = -1  # one prompt of four tokens, two prompts of two
    ids = torch.arange(9).view(3, 3)
    whole = torch.cat([prompt_ids[1:, 2:], ids[1:]], dim=1)  # the last two rows, without padding
    logits = policy(whole, use_cache=False).logits[:, 1:-1]  # those that predict ids
    expected = logits.log_softmax(-1).gather(2, ids[1:, :, None])[..., 0]
    no_bias = getattr(policy.get_output_embeddings(), "bias", None) is None
    for policy.plain_head in (no_bias, False):  # try the faster way first
        with suppress(IndexError, RuntimeError, AttributeError):  # raised by other kinds of cache
            logp, _ = predict(policy, prompt_ids, ids, Config())
            if torch.allclose(logp[1:], expected, rtol=0, atol=0.01):
                return
    raise ValueError("its probabilities change with padding and a cache")


def save_checkpoint(run_dir: Path, step: int, optimizer) -> None:
    """Writes checkpoint/<step>.pt, the state after `step` steps, and then deletes the previous one.
    A complete checkpoint therefore exists at any instant."""
    trained, new = optimizer.param_groups[0]["params"], run_dir / "checkpoint/new"
    with new.open("wb") as file:
        torch.save({"weights": trained, "optimizer": optimizer.state_dict()}, file)
        file.flush()
        os.fsync(file.fileno())
    saved = new.rename(new.with_name(f"{step:08}.pt"))
    for old in set(new.parent.glob("*.pt")) - {saved}:
        old.unlink()


def read_checkpoint(run_dir: str) -> tuple:
    """Returns (step, state) of the last checkpoint, or (0, {}). Refuses a damaged file."""
    path = max(Path(run_dir, "checkpoint").glob("*.pt"), default=None)
    if not run_dir or path is None:
        return 0, {}
    with reading("--resume", path, "another run"):
        if ZipFile(path).testzip():  # torch.save writes checksums, which torch.load ignores
            raise ValueError("it is damaged")
        return int(path.stem), torch.load(path, weights_only=True, map_location="cpu", mmap=True)


def open_run_dir(cfg: Config, start: int) -> None:
    """Writes the options, and removes the lines of step `start` and later from the logs."""
    run_dir = Path(cfg.run_dir)
    (run_dir / "checkpoint").mkdir(parents=True, exist_ok=True)
    new = run_dir / "config.json.new"  # renamed, so that config.json is complete at any instant
    new.write_text(json.dumps(vars(cfg), indent=1))
    new.rename(run_dir / "config.json")
    for name in LOGS:
        with reading("--resume", run_dir / name, "deleting its bad lines"):
            file = (run_dir / name).open("a+")
            file.seek(0)
            kept = [x for x in file if x.endswith("\n") and json.loads(x)["step"] < start]
            file.truncate(sum(map(len, kept)))  # drops a line that a kill cut off; all is ASCII


def write_log(path: Path, lines: list) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def print_table(*lines) -> None:
    """Prints the eval_* metrics of log lines side by side, with their 95% intervals."""
    for name in lines[-1]:
        if name.endswith("_interval"):
            mean = name.removesuffix("_interval")
            cells = ("{:8.3f} ({:.3f} to {:.3f})".format(x[mean], *x[name]) for x in lines)
            print(f"{mean:16}", *(f"{cell:>28}" for cell in cells))


def printable(text: str) -> str:
    """Escapes control characters in a model's text, because a terminal would act on them."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def report(run_dir: Path, cfg) -> None:
    """Prints evaluations before and after training, a question that was learned, and next steps."""
    lines, samples = ([json.loads(x) for x in (run_dir / f).read_text().splitlines()] for f in LOGS)
    print(f"{'held-out':16}{'before':>29}{'after':>29}")
    ends = lines[0], lines[-1]  # the evaluations before and after training
    print_table(*ends)  # below, "advantage" tells samples of training from those of evaluations
    both = ([s for s in samples if s["step"] == x["step"] and "advantage" not in s] for x in ends)
    old, new = max(zip(*both), key=lambda pair: pair[1]["accuracy"] - pair[0]["accuracy"])
    print(printable(f"\n{old['question']}\n\nbefore: {old['text']}\n\nafter: {new['text']}\n"))
    command = f"uv run R1ZeroTrain.py --resume {run_dir}"
    question = "8 7 4 = 36" if cfg.task == "countdown" else "your question"
    print(f"To ask it:   {command} --ask '{question}'")
    print(f"To continue: {command} --steps {2 * cfg.steps}")
    try:
        from notebooks.plot_runs import plot

        plot([run_dir], run_dir / "curves.png")
    except ImportError:
        print(f"To plot it:  uv run --with matplotlib notebooks/plot_runs.py {run_dir} curves.png")


def main(cfg: Config) -> None:
    """Runs train_step for each step, with evaluations, checkpoints and a log."""
    accelerator = make_accelerator(cfg)
    start, saved = read_checkpoint(cfg.resume)
    tokenizer = load_tokenizer(cfg.model)
    question_at, held_out = load_questions(tokenizer=tokenizer, say=accelerator.print, **vars(cfg))
    if IS_MAIN and not cfg.ask:  # with --ask, held_out is the question to ask
        announce(cfg, accelerator.device, tokenizer, held_out)
    models = set_up(cfg, accelerator, saved)
    policy, _, sampler, optimizer = models
    if cfg.ask:
        return ask(sampler, tokenizer, held_out[0] | {"index": "ask"}, cfg)
    run_dir = Path(cfg.run_dir)
    if IS_MAIN:
        open_run_dir(cfg, start)
    if cfg.eval_only:
        metrics, _ = evaluate(sampler, tokenizer, held_out, cfg, accelerator)
        if IS_MAIN:
            write_log(run_dir / "metrics.jsonl", [{"step": start} | metrics])
            print_table(metrics)
        return
    os.environ.setdefault("WANDB_MODE", "offline")
    accelerator.init_trackers("r1-zero", vars(cfg), {"wandb": {"dir": run_dir}})
    # Line s of the log describes the policy after s steps, so there is one more line than steps.
    for step in (bar := tqdm(range(start, cfg.steps + 1), "step", disable=not IS_MAIN)):
        last = step == cfg.steps
        if IS_MAIN and step > start and (last or step % (cfg.save_every or cfg.steps) == 0):
            save_checkpoint(run_dir, step, optimizer)
        line, shown = {"step": step}, []
        if last or step % (cfg.eval_every or cfg.steps) == 0:  # at step 0 too
            metrics, shown = evaluate(sampler, tokenizer, held_out, cfg, accelerator)
            line |= metrics
        indices = range(step * cfg.questions_per_step, (step + 1) * cfg.questions_per_step)
        questions = [question_at(i) | {"index": f"train/{i}"} for i in indices]
        # The last rollout only measures the trained policy, with lr 0.
        optimizer.param_groups[0]["lr"] = lr = cfg.lr * (cfg.steps - step) / max(1, cfg.steps)
        with accelerator.split_between_processes(questions) as share:
            metrics, samples = train_step(*models, tokenizer, share, cfg, accelerator)
        clear_device_cache()  # MPS keeps a buffer for each shape that it has seen
        line |= metrics | {"lr": lr}
        if IS_MAIN:
            some = [{"step": step} | sample for sample in shown[:16] + samples[:4]]
            write_log(run_dir / "metrics.jsonl", [line])
            write_log(run_dir / "completions.jsonl", some)
        accelerator.log(line, step)
        bar.set_postfix(reward=f"{line['reward']:.2f}", length=f"{line['length']:.0f}")
    refresh(sampler, policy, "float32")
    if IS_MAIN:
        if cfg.lora_rank:  # merge the adapters into the weights
            sampler = freeze(sampler.cpu(), "float32").merge_and_unload()
        sampler.generation_config.do_sample = True  # or transformers refuses to save a temperature
        sampler.save_pretrained(run_dir / "model")
        tokenizer.save_pretrained(run_dir / "model")
        report(run_dir, cfg)
    accelerator.end_training()


def run(words: list) -> int:
    """Runs a command line. Returns its exit code. Errors and signals print one line to stderr."""
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, signal.default_int_handler)  # raises KeyboardInterrupt
    cfg = Config()
    try:
        cfg = parse_config(words)
        main(cfg)
        return 0
    except (UsageError, KeyboardInterrupt, RuntimeError, OSError, SafetensorError) as error:
        # If the disk is full, torch.save raises RuntimeError. Another process that ends says why.
        known = re.search("(of|ate) memory|OSError|Connection", f"{error} {error.__context__!r}")
        if type(error) is RuntimeError and not known:
            raise  # a bug in this file
        out_of_memory = re.search("out of memory|allocate memory", str(error))
        reason = "out of memory" if out_of_memory else str(error) or "stopped"
        if not isinstance(error, UsageError) and Path(cfg.run_dir, "config.json").exists():
            reason += f"; to continue: uv run R1ZeroTrain.py --resume {cfg.run_dir}"
            if out_of_memory:  # results do not depend on these
                reason += f" --tokens_per_microbatch {cfg.tokens_per_microbatch // 2}"
                reason += f" --rollout_rows {cfg.rollout_rows // 2}"
        if IS_MAIN or out_of_memory:  # any process may run out of memory
            print("R1ZeroTrain.py:", printable(" ".join(reason.split())), file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 2


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
