"""Measures steps of R1ZeroTrain.py, and compares them with TRL's GRPOTrainer and with the limit of the machine.

    uv run --with trl tests/benchmark.py                     # both trainers; without TRL, only ours
    uv run --with trl tests/benchmark.py --shape narrow --steps 3
    python3 tests/benchmark.py --device cuda --dtype bfloat16 --shape 0.5b
    python3 tests/benchmark.py --flatness                    # what grows with the number of tokens or rows?

`tiny` is the first 12 steps of the default run of R1ZeroTrain.py: its model, questions, rewards and learning rates.
`narrow` (0.9 M parameters, where the overhead of calls dominates) and `wide` (43 M parameters, nearly all in a
vocabulary of 151,936) are random models with the architecture of Qwen2. Their completions never end early, so that both
trainers do the same work. Nothing is downloaded. Both trainers get the same weights, prompts, rewards, precision and
options, and micro-batches of about the same size. Each trainer runs in its own process. They take turns step by step,
and one is idle while the other works, so that a disturbance of the machine affects both. Figures are medians. The first
step is a warm-up and does not count.

- sampling: from questions to completions. scoring: rewards. update: the rest of the step (advantages, the reference's
  log-probabilities, forward, backward, optimizer step).
- tokens/s: completion tokens divided by the seconds of sampling.
- GB: the peak resident set of the process; on CUDA the peak of torch's allocations; on MPS what the driver holds.
- steps to 0.8, s to 0.8: up to and including the first step whose training accuracy is 0.8 or more, warm-up included.
- of limit: the least time for the step's operations, at the rate of large matrix products measured between the steps,
  divided by the time that the step took. The operations are: each prompt read once, N·T tokens decoded, a reference
  forward and a policy forward and backward (three forwards) over N·(P + T) tokens, the head at the T positions that are
  scored, and attention over visible tokens; T is the mean length. On a GPU, a decode step takes at least the time to
  read its bytes (weights and KV cache) at the measured bandwidth.
- ratio: TRL divided by ours.

Why these figures: wide gains most, because logits [N, T, V] never exist as a whole. They are computed one piece of the
vocabulary at a time, and again in the backward pass. Half of narrow's step is the update, at half the rate of large
matrix products (they would take 0.93 of its 1.77 s). The other half is sampling, where each row reads its own copy of
its prompt's keys and values. Reading them once per question took about fifty more lines and 1.19 s instead of 1.67 s,
but gained nothing in the default run (18,000 tokens/s, 20,300 without), so it was left out. With --flatness on narrow,
sampling a token takes 17 ms if 64 are sampled and 30 ms if 1,024 are. The difference is attention over more tokens.
Everything else stays between 0.88 and 1.00 of the first figure, and the update's peak memory goes from 1.17 GB with 64
rows to 1.19 GB with 512.

The last line of the output is JSON with all figures.
"""

import argparse
import importlib.util
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import timeit
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from math import gcd
from pathlib import Path
from statistics import mean, median

if "--worker" in sys.argv:  # the parent process stays small and idle
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    import R1ZeroTrain
    from prompts import TASKS, Task, encode, load_questions, render_prompt

SIZES = "--questions_per_step {} --group_size {} --max_new_tokens {}"
# width, inner width, layers, heads, key-value heads, vocabulary; options of R1ZeroTrain.py
MODELS = {
    "narrow": (128, 384, 4, 4, 4, 384, SIZES.format(8, 16, 128)),
    "wide": (256, 1024, 4, 4, 4, 151_936, SIZES.format(4, 8, 64)),
    "0.5b": (896, 4864, 24, 14, 2, 151_936, SIZES.format(64, 8, 512)),  # Qwen2.5's
}
OPTIONS = {  # option of this file -> option of R1ZeroTrain.py
    "questions": "questions_per_step",
    "group": "group_size",
    "new_tokens": "max_new_tokens",
    "rollout_rows": "rollout_rows",
    "tokens_per_microbatch": "tokens_per_microbatch",
}


@dataclass
class Work:
    """The task of a worker."""

    name: str  # tiny, or a model in MODELS
    words: list  # options of R1ZeroTrain.py
    prompt_tokens: int  # mean length; not used for tiny
    steps: int  # after the warm-up
    device: str
    dtype: str
    trl_rows: int  # at most, in one of TRL's forward passes


# ---- In a worker: the model, questions and reward of both trainers --------------------------------------------------
def reward(text: str, **_: object) -> float:
    """The share of ones: cheap to compute, and different for each completion."""
    return text.count("1") / (1 + len(text))


def make_model(name: str) -> str:
    """A folder with a random model and its tokenizer, whose EOS is never sampled. The parent removes it."""
    width, inner, layers, heads, kv_heads, vocabulary, *_ = MODELS[name]
    config = transformers.Qwen2Config(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    policy = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    policy.generation_config = transformers.GenerationConfig()

    # The 256 bytes, then padding, then tokens that occur in completions only.
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|pad|>"]
    tokens += map(str, range(1000, vocabulary + 743))
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        # Only the question. prompts.chat_prompt lets only templates with "equals '" drop the rest.
        chat_template="{{ messages[-1].content.split('equals ')[-1] }}",
    )
    # The EOS token comes after all tokens that the model was made for.
    tokenizer.add_special_tokens({"eos_token": "<|never|>"})
    folder = tempfile.mkdtemp()
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def add_digits(prompt_tokens: int, spread: float = 0.05) -> None:
    """Adds the task `digits`. The length of prompts varies by `spread`, so that there is some padding."""

    def generate(rng) -> dict:
        length = round(prompt_tokens * rng.uniform(1 - spread, 1 + spread)) - len("<think>")
        return {"question": "".join(rng.choices("0123456789", k=length)), "answer": {}}

    TASKS["digits"] = Task(reward, generate=generate)


def make_recipe(work: Work) -> tuple:
    """Returns what both trainers get: our Config, the tokenizer, and the questions of all steps."""
    words = [*work.words, "--device", work.device, "--dtype", work.dtype]
    if work.name != "tiny":
        add_digits(work.prompt_tokens)
        words += ["--model", make_model(work.name), "--steps", str(work.steps + 1)]
        words += ["--task", "digits", "--format_weight", "0", "--kl_beta", "0.04", "--lr", "1e-6"]
    cfg = R1ZeroTrain.parse_config(words)
    tokenizer = R1ZeroTrain.load_tokenizer(cfg.model)
    question_at, _ = load_questions(tokenizer=tokenizer, **vars(cfg))
    count = cfg.steps * cfg.questions_per_step
    return cfg, tokenizer, [question_at(i) | {"index": f"train/{i}"} for i in range(count)]


def describe(policy, cfg, tokenizer, questions: list, work: Work) -> dict:
    """What is measured, and the sizes that `limit` needs."""
    prompts = [render_prompt(tokenizer, q["question"], cfg.template) for q in questions]
    config, head = policy.config.get_text_config(), policy.get_output_embeddings().weight
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    matrices = {p for p in policy.parameters() if p.dim() > 1}
    body = matrices - {policy.get_input_embeddings().weight, head}  # a look-up; counted separately
    return {
        "questions": cfg.questions_per_step,
        "group": cfg.group_size,
        "new_tokens": cfg.max_new_tokens,
        "prompt": mean(map(len, encode(tokenizer, prompts, cfg.template)["input_ids"])),
        "before": peak(work),
        "layers": layers,
        "width": config.hidden_size,
        "vocabulary": len(head),
        "parameters": policy.num_parameters(),
        "head": head.numel(),
        "body": sum(p.numel() for p in body),
        "attention": layers * heads * head_dim,
        "kv": 2 * layers * kv_heads * head_dim,
        "kind": work.device,
        "chip": torch.cuda.get_device_name() if work.device == "cuda" else work.device,
        "torch": torch.__version__,
    }


def clock(work: Work) -> float:
    """The time in seconds, after the device has finished all its work."""
    if work.device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def peak(work: Work) -> float:
    """Peak memory in GB, as defined at the top."""
    if work.device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    if work.device == "mps":
        return torch.mps.driver_allocated_memory() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


TIMES = Counter()  # seconds of the parts of a step; its completion tokens and accuracy


def timed(work: Work, part: str, owner: object, name: str) -> None:
    """From now on, every call of owner.name adds its seconds to TIMES[part]."""
    function = getattr(owner, name)

    def wrapper(*args, **kwargs):
        start = clock(work)
        result = function(*args, **kwargs)
        TIMES[part] += clock(work) - start
        return result

    setattr(owner, name, wrapper)


def count(samples: list) -> None:
    TIMES["tokens"] = sum(sample["length"] for sample in samples)
    TIMES["accuracy"] = mean(sample["accuracy"] for sample in samples)


def step_figures(work: Work) -> dict:
    """Returns the figures of the step that has just ended, and resets TIMES."""
    update = TIMES["step"] - TIMES["sampling"] - TIMES["scoring"]
    figures = dict(TIMES) | {"update": update, "memory": peak(work)}
    TIMES.clear()
    return figures


# ---- The workers. turn(figures) reports figures, and returns when it is the worker's turn again ---------------------
def ours(work: Work, turn: Callable) -> None:
    cfg, tokenizer, questions = make_recipe(work)
    accelerator = R1ZeroTrain.make_accelerator(cfg)
    *models, optimizer = R1ZeroTrain.set_up(cfg, accelerator, {})
    for part, name in {"sampling": "generate", "scoring": "score", "step": "train_step"}.items():
        timed(work, part, R1ZeroTrain, name)

    turn(describe(models[0], cfg, tokenizer, questions, work))
    for step in range(cfg.steps):
        optimizer.param_groups[0]["lr"] = cfg.lr * (1 - step / cfg.steps)  # as in main
        batch = questions[step * cfg.questions_per_step :][: cfg.questions_per_step]
        _, samples = R1ZeroTrain.train_step(*models, optimizer, tokenizer, batch, cfg, accelerator)
        count(samples)
        turn(step_figures(work))


def sampling_only(work: Work, turn: Callable) -> None:
    """Does no updates. Also measures attention, the only part that may grow with the length."""
    R1ZeroTrain.update = lambda *_: {}
    timed(work, "attention", torch.nn.functional, "scaled_dot_product_attention")
    ours(work, turn)


def update_only(work: Work, turn: Callable) -> None:
    """Uses made-up completions, because the memory for sampling would hide the update's peak."""

    def generate(policy, tokenizer, questions: list, group: int, cfg) -> R1ZeroTrain.Rollout:
        rows = len(questions) * group
        with torch.device(work.device):
            prompt_ids = torch.randint(256, (len(questions), work.prompt_tokens))
            ids = torch.randint(256, (rows, cfg.max_new_tokens))
            return R1ZeroTrain.Rollout(
                prompt_ids=prompt_ids.repeat_interleave(group, 0),
                ids=ids,
                lengths=torch.full((rows,), cfg.max_new_tokens),
                truncated=torch.ones(rows),
                logp_sampled=torch.zeros(ids.shape),
                text=[str(i) for i in range(rows)],
            )

    R1ZeroTrain.generate = generate
    ours(work, turn)


def trl_options(cfg, rows: int) -> dict:
    """The options of TRL's GRPOConfig that correspond to ours, as test_trl.py shows."""
    rollout = cfg.questions_per_step * cfg.group_size
    return {
        "num_generations": cfg.group_size,
        "per_device_train_batch_size": gcd(rows, rollout),  # of a micro-batch
        "gradient_accumulation_steps": rollout // gcd(rows, rollout),  # a step is a whole rollout
        "num_iterations": cfg.updates_per_rollout,
        "max_steps": cfg.updates_per_rollout * cfg.steps,  # TRL counts updates, not rollouts
        "max_completion_length": cfg.max_new_tokens,  # dr_grpo divides by it
        "mask_truncated_completions": False,  # the default. True would not train on them
        "temperature": cfg.temperature,  # of the loss too
        "loss_type": cfg.loss,
        "scale_rewards": cfg.advantage_scale,
        "beta": cfg.kl_beta,
        "use_bias_correction_kl": False,  # the default, True, multiplies k3 by the ratio
        "epsilon": cfg.clip_low,
        "epsilon_high": cfg.clip_high,
        "max_grad_norm": cfg.max_grad_norm,
        "learning_rate": cfg.lr,
        "lr_scheduler_type": "linear",  # to 0, like ours
        "adam_beta2": 0.95,  # the default is 0.999
        "weight_decay": 0.0,
        "bf16": cfg.dtype == "bfloat16",
        "model_init_kwargs": {"dtype": "float32"},
        "gradient_checkpointing": cfg.gradient_checkpointing,  # the default is True
        "use_cpu": cfg.device == "cpu",
        "shuffle_dataset": False,
        "dataloader_pin_memory": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }


def trl(work: Work, turn: Callable) -> None:
    import trl
    from datasets import Dataset

    cfg, tokenizer, questions = make_recipe(work)

    def rewards(completions: list, completion_ids: list, place: list, **_: object) -> list[float]:
        lengths, whole = [len(ids) for ids in completion_ids], ["<think>" + c for c in completions]
        scored = R1ZeroTrain.Rollout(None, None, lengths, [False] * len(whole), None, whole)
        batch = [questions[i] for i in place[:: cfg.group_size]]
        samples = R1ZeroTrain.score(scored, batch, cfg)
        count(samples)
        return [sample["reward"] for sample in samples]

    class Turns(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__) -> None:
            turn({"trl_version": trl.__version__})

        def on_step_begin(self, *_, **__) -> None:
            TIMES["step"] -= clock(work)

        def on_step_end(self, *_, **__) -> None:
            TIMES["step"] += clock(work)
            turn(step_figures(work))

    prompts = [render_prompt(tokenizer, q["question"], cfg.template) for q in questions]
    trainer = trl.GRPOTrainer(
        model=cfg.model,
        reward_funcs=rewards,
        args=trl.GRPOConfig(tempfile.mkdtemp(), **trl_options(cfg, work.trl_rows)),
        train_dataset=Dataset.from_dict({"prompt": prompts, "place": list(range(len(prompts)))}),
        processing_class=tokenizer,
        callbacks=[Turns()],
    )
    timed(work, "sampling", trainer, "_generate")
    timed(work, "scoring", trainer, "_calculate_rewards")
    trainer.train()


def rate(work: Work, turn: Callable) -> None:
    """Operations/s of large matrix products in the precision of the step, and bytes/s of a large copy; best of 5."""
    size, repeats, numel = (2048, 1, 2**27) if work.device == "cpu" else (8192, 10, 2**30)
    shared = {"device": work.device, "dtype": getattr(torch, work.dtype)}
    a, b, product = (torch.randn(size, size, **shared) for _ in range(3))
    source, target = (torch.ones(numel, dtype=torch.uint8, device=work.device) for _ in range(2))

    def per_second(amount: float, function: Callable) -> float:
        seconds = timeit.repeat(function, number=repeats, timer=lambda: clock(work))
        return amount * repeats / min(seconds)

    figures = {}
    while True:
        turn(figures)
        products = per_second(2 * size**3, lambda: torch.matmul(a, b, out=product))
        copies = per_second(2 * numel, lambda: target.copy_(source))
        figures = {"operations_per_second": products, "bytes_per_second": copies}


WORKERS = {worker.__name__: worker for worker in (ours, sampling_only, update_only, trl, rate)}


def be_worker(kind: str, work: Work) -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log
    if work.device == "auto":
        best = torch.accelerator.current_accelerator(check_available=True)
        work = replace(work, device=best.type if best else "cpu")

    def turn(figures: dict) -> None:
        print(json.dumps(figures), file=replies, flush=True)
        if not sys.stdin.readline():
            os._exit(0)  # no more turns

    WORKERS[kind](work, turn)


# ---- The parent -----------------------------------------------------------------------------------------------------
class Worker:
    """A worker process, which is ready when the constructor returns. Each call is a turn and returns its figures."""

    def __init__(self, stack: ExitStack, kind: str, work: Work) -> None:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.log = Path(folder, "log")
        with self.log.open("w") as log:
            process = subprocess.Popen(
                [sys.executable, __file__, "--worker", kind, json.dumps(asdict(work))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=offline | os.environ | {"TMPDIR": folder},
            )
        self.process = stack.enter_context(process)
        stack.callback(process.kill)
        self.facts = self.answer()

    def answer(self) -> dict:
        if line := self.process.stdout.readline():
            return json.loads(line)
        raise RuntimeError(f"a worker failed:\n{self.log.read_text()[-3000:]}")

    def __call__(self) -> dict:
        print("go", file=self.process.stdin, flush=True)
        figures = self.answer()
        # OpenMP threads spin for up to another 0.2 s. OMP_WAIT_POLICY=passive would prevent that, but it slows down a
        # small model, whose step consists of thousands of short parallel loops.
        time.sleep(0.3)
        return figures


def limit(facts: dict, work: Work) -> dict[str, float]:
    """The least time for each part of a step, in seconds, as defined at the top."""
    n, p = facts["questions"] * facts["group"], facts["prompt"]
    speed = facts["operations_per_second"]
    t = facts["ours"]["tokens"] / n
    body, head = 2 * facts["body"], 2 * facts["head"]

    def seen(first: float, last: float) -> float:
        """Operations of attention for the queries first to last, each over all keys up to its own."""
        return 2 * facts["attention"] * (last * (last + 1) - first * (first + 1))

    prefill = facts["questions"] * (p * body + seen(0, p) + head)
    decode = n * ((t - 1) * (body + head) + seen(p, p + t - 1))
    update = 4 * n * ((p + t) * body + seen(0, p + t) + t * head)

    # The numbers that a decode step reads. A small model stays in a CPU's caches, which are faster than its memory.
    numbers = facts["body"] + facts["head"] + n * (p + t / 2) * facts["kv"]
    moved = (t - 1) * numbers * (2 if work.dtype == "bfloat16" else 4) / facts["bytes_per_second"]
    decode_seconds = decode / speed if facts["kind"] == "cpu" else max(decode / speed, moved)
    sampling = prefill / speed + decode_seconds
    return {
        "sampling": sampling,
        "update": update / speed,
        "step": sampling + update / speed,
        "operations": prefill + decode + update,
    }


def compare(work: Work, names: list[str]) -> dict:
    """Returns the figures of the trainers, which take turns, and prints them as a table."""
    with ExitStack() as stack:
        workers = {name: Worker(stack, name, work) for name in (*names, "rate")}
        facts, rounds = workers["ours"].facts, []
        for i in range(work.steps + 1):
            rounds.append({name: worker() for name, worker in workers.items()})
            for name in names:
                figures = rounds[i][name]
                tokens = facts["questions"] * facts["group"] * facts["new_tokens"]
                if work.name != "tiny" and figures["tokens"] != tokens:
                    raise RuntimeError(f"{name}: completions ended early, so the work differs")
                line = f"{figures['step']:.2f} s, accuracy {figures['accuracy']:.2f}"
                print(f"{work.name}, step {i}, {name}: {line}", file=sys.stderr)

    result = asdict(work) | {"accuracy": {}}
    for name, worker in workers.items():
        medians = {key: median(r[name][key] for r in rounds[1:]) for key in rounds[1][name]}
        result |= worker.facts | {name: medians}
    result |= result.pop("rate")
    result["limit"] = limit(result, work)
    for name in names:
        figures, steps = result[name], [r[name]["step"] for r in rounds]
        figures |= {"fastest": min(steps[1:]), "slowest": max(steps[1:])}
        figures["tokens/s"] = figures["tokens"] / figures["sampling"]
        figures["memory"] = max(r[name]["memory"] for r in rounds)
        figures["of_limit"] = result["limit"]["step"] / figures["step"]
        result["accuracy"][name] = accuracy = [r[name]["accuracy"] for r in rounds]
        learned = [i for i, share in enumerate(accuracy, 1) if share >= 0.8]
        if learned:
            figures |= {"steps to 0.8": learned[0], "s to 0.8": sum(steps[: learned[0]])}
        del figures["accuracy"]  # its median is not meaningful
        ours = result["ours"]
        result["ratio"] = {key: figures[key] / ours[key] for key in figures if key in ours}
    about = (
        "\n{name}: {layers} layers, width {width}, vocabulary {vocabulary:,}, {parameters:,} "
        "parameters; {dtype} on {chip}\na step: {questions} questions x {group} completions of "
        "up to {new_tokens} tokens, prompts of about {prompt:.0f}; seconds, medians of {steps}; GB\n"
        "limit: {operations:,.0f} operations at {operations_per_second:,.0f} a second"
    )
    print(about.format_map(result | result["limit"]))
    lines = [*names, "ratio", "limit"] if "trl" in names else ["ours", "limit"]
    print_table({name: result[name] for name in lines})
    return result


def print_table(lines: dict[object, dict]) -> None:
    """Prints figures as a table. The first line must have all columns."""
    columns = next(iter(lines.values()))
    print(f"{'':5}" + "".join(f"{column:>13}" for column in columns))
    for name, figures in lines.items():
        cells = [f"{figures[key]:,.3f}" if key in figures else "" for key in columns]
        print(f"{name:5}" + "".join(f"{cell:>13}" for cell in cells))


def more(work: Work, *words: object) -> Work:
    return replace(work, words=[*work.words, *map(str, words)])


def flatness(work: Work) -> dict:
    """Sampling time per token over the length of completions, and the update's memory over their number."""
    sampling, updates = {}, {}
    with ExitStack() as stack:
        workers = {
            tokens: Worker(stack, "sampling_only", more(work, "--max_new_tokens", tokens))
            for tokens in (64, 128, 256, 512, 1024)
        }
        rounds = [{t: worker() for t, worker in workers.items()} for _ in range(work.steps + 1)]
    for t in workers:
        parts = ("sampling", "attention")
        f = {part: 1000 / t * median(r[t][part] for r in rounds[1:]) for part in parts}
        sampling[t] = f | {"rest": f["sampling"] - f["attention"]}
        sampling[t]["of_first"] = sampling[t]["rest"] / sampling[64]["rest"]
    print(f"{work.name}: ms per token over new tokens, medians of {work.steps}")
    print_table(sampling)

    for rows in (64, 128, 256, 512):
        with ExitStack() as stack:
            options = "--group_size", 16, "--questions_per_step", rows // 16
            worker = Worker(stack, "update_only", more(work, *options))
            updates[rows] = {"before": worker.facts["before"]} | worker()
        updates[rows]["of_first"] = updates[rows]["memory"] / updates[64]["memory"]
    print("\nupdate: seconds and GB over rows, each in a process of its own")
    print_table(updates)
    return {"ms_per_token": sampling, "update": updates}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", choices=["tiny", *MODELS], help="one of them; default: tiny, narrow and wide")
    for name, option in OPTIONS.items():
        add(f"--{name}", type=int, help=f"--{option} of R1ZeroTrain.py")
    add("--prompt_tokens", type=int, default=170, help="mean length; not for tiny")
    add("--steps", type=int, help="steps after the warm-up step; default: 5, for tiny 11")
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto")
    add("--dtype", choices=["float32", "bfloat16"], default="float32")
    add("--trl_rows", type=int, default=16, help="most rows in one forward pass of TRL")
    add("--flatness", action="store_true", help="only ours, over several sizes")
    add("--worker", nargs=2, help=argparse.SUPPRESS)
    args = vars(parser.parse_args())
    if args["worker"]:
        kind, work = args["worker"]
        return be_worker(kind, Work(**json.loads(work)))

    works = []
    default = ["narrow"] if args["flatness"] else ["tiny", "narrow", "wide"]
    for name in [args["shape"]] if args["shape"] else default:
        words = MODELS[name][-1].split() if name in MODELS else []
        for option, full in OPTIONS.items():
            words += [f"--{full}", str(args[option])] if args[option] else []
        steps = args["steps"] or (11 if name == "tiny" else 5)
        values = args | {"name": name, "words": words, "steps": steps}
        works.append(Work(**{field.name: values[field.name] for field in fields(Work)}))

    if args["flatness"]:
        figures = {"flatness": flatness(works[0])}
    else:
        names = ["ours", "trl"]
        if importlib.util.find_spec("trl") is None:
            names = ["ours"]
            print("TRL is not installed; for both: uv run --with trl tests/benchmark.py")
        figures = {"models": [compare(work, names) for work in works]}
    system = {"system": platform.platform(), "cores": os.cpu_count()}
    print(f"\n{json.dumps(system | {'python': platform.python_version()} | figures)}")


if __name__ == "__main__":
    main()
