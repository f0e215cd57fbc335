"""How fast, how small: what motg's sampling and training take on this machine.

    python docs/experiments/bench.py decode --shape small,0.5b --rounds 3

Random weights of a shape are measured (nothing is downloaded), or those in a folder that --shape
names. Whatever is compared takes turns, round after round, so that a disturbance meets all of it.
A number is the median over the rounds, behind it the smallest and the largest; a ratio is taken
within each round. Rows are kept in docs/experiments/results/bench.json, where a repeated
measurement replaces the old.

    decode   rollouts beside transformers' `generate`: same batch, prompt, length, dtype, vocabulary
    mixing   what a method adds to a step: choosing a mixture, embedding it, its log-probability
    memory   log-probabilities with gradient, in chunks, beside those from whole float32 logits
    passes   the gradient of the log-probabilities with 0, 1 and 2 weight_passes
    step     a whole training step, split in its parts; --precision fp32,bf16 compares the two
    recipe   the paper's recipe on a GPU: one rollout, one update, and their memory
"""

import argparse
import copy
import datetime
import json
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from unittest import mock

import torch
import transformers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tools"))
from field import motg  # noqa: E402

SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")
SIZES += ("intermediate_size", "vocab_size")
SHAPES = {
    "smoke": (3, 128, 4, 2, 256, 0),  # 0: as many as the smoke tokenizer has
    "smoke-0.75m": (3, 128, 4, 2, 512, 0),
    "small": (6, 256, 4, 2, 1024, 32_000),
    "wide": (2, 128, 4, 2, 256, 151_936),
    "smollm2-135m": (30, 576, 9, 3, 1536, 49_152),
    "0.5b": (24, 896, 14, 2, 4864, 151_936),
    "qwen2.5-1.5b": (28, 1536, 12, 2, 8960, 151_936),
}


def build(name, a, precision="fp32"):
    """A model and a tokenizer in which no row ends by itself: there is no EOS.

    A step of motg is the same work in a thought and in an answer, so it does not matter where the
    thoughts of random weights happen to end.
    """
    if name in SHAPES:
        torch.manual_seed(0)
        folder = motg.smoke_model(motg.make_config(smoke=True))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        config = dict(zip(SIZES, SHAPES[name], strict=True)) | {"tie_word_embeddings": True}
        config["vocab_size"] = config["vocab_size"] or len(tokenizer)
        with torch.device(a.device):  # ids that the tokenizer does not know read as nothing
            model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**config)).eval()
    else:
        model, tokenizer = motg.load_model(motg.make_config(device=a.device), name)
    tokenizer.eos_token = None
    model.generation_config.eos_token_id = []
    model.generation_config.pad_token_id = 0
    return model.to(torch.bfloat16 if precision == "bf16" else torch.float32), tokenizer


def sample(model, tokenizer, method, a, n):
    """One rollout of n new tokens."""
    cfg = motg.make_config(method, chains=a.chains, max_new_tokens=n)
    generator = torch.Generator(model.device).manual_seed(0)
    r = motg.rollout(model, tokenizer, [a.prompt * "a"], cfg, generator)
    assert r.mask.sum() == a.chains * n, "a row ended early"
    return r


def generate(model, tokenizer, a, n):
    """The same by transformers' own loop."""
    ids = tokenizer.encode(a.prompt * "a", add_special_tokens=False)
    ids = torch.tensor([ids] * a.chains, device=model.device)
    how = {"do_sample": True, "temperature": motg.Config.temperature, "top_k": 0, "top_p": 1.0}
    how["eos_token_id"] = -1  # no token's
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, **how)
    assert out.shape[1] == a.prompt + n, "a row ended early, or the prompt is not --prompt tokens"


# ------------------------------------------------------------------------------ how it is measured


def timed(function, *args):
    """Seconds of a call, the GPU's work included, and its result."""
    on_gpu = torch.cuda.is_initialized()
    if on_gpu:
        torch.cuda.synchronize()
    began = time.perf_counter()
    result = function(*args)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


def call_and_step(run, a):
    """Seconds of a call, and of one of its steps, without the prompt's part."""
    whole, first = timed(run, a.new)[0], timed(run, 1)[0]
    return whole, (whole - first) / (a.new - 1)


def added_memory(device, function):
    """MiB that a call adds at its peak."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts anew
    peaks = []
    for call in (int, function):
        call()
        status = Path("/proc/self/status").read_text()
        peaks.append(int(re.search(r"VmHWM:\s*(\d+)", status)[1]) / 2**10)
    return peaks[1] - peaks[0]


def fresh(function, *args):
    """The result of a call in a new process, whose memory nothing else has touched."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def compare(cases, a, *ratios):
    """A row for each case: a function that returns numbers {name: number} when it is called.

    They take turns, every other round in the other order. `ratios` names the numbers that are
    also shown in relation to the first case's.
    """
    found = {case: [] for case in cases}
    for i in range(a.rounds):
        for case in list(cases)[:: -1 if i % 2 else 1]:
            found[case].append(cases[case]())
    base, rows = next(iter(cases)), []
    for case, results in found.items():
        values = {name: [x[name] for x in results] for name in results[0]}
        for name in ratios:
            pairs = zip(results, found[base], strict=True)
            values[f"{name}, times {base}"] = [x[name] / first[name] for x, first in pairs]
        rows.append({"case": case} | {n: [median(x), min(x), max(x)] for n, x in values.items()})
    return rows


# ------------------------------------------------------------------------------------ the sections


def decode(a, name):
    """Whole calls, and steps alone: motg reads a prompt once, and `generate` once a chain."""
    case = build(name, a, a.precision[0])
    runs = {"generate": partial(generate, *case, a)}
    runs |= {method: partial(sample, *case, method, a) for method in a.methods}
    least = floor(case[0], a) if a.device == "cuda" else {}

    def once(run):
        whole, step = call_and_step(run, a)
        row = {"tokens/s": a.chains * a.new / whole, "steps/s": 1 / step, "ms a step": 1e3 * step}
        if least:
            row |= least | {"step / floor": 1e3 * step / least["floor ms"]}
        return row

    for run in runs.values():
        run(2)  # warms up
    return compare({n: partial(once, run) for n, run in runs.items()}, a, "tokens/s", "steps/s")


def floor(model, a):
    """What no step can do without: weights, keys and values read once, as fast as a copy reads."""
    big, c = torch.empty(2, 2**30, dtype=torch.uint8, device="cuda"), model.config

    def copies():
        for _ in range(20):
            big[0].copy_(big[1])

    copies()
    bandwidth = 20 * 2 * 2**30 / median(timed(copies)[0] for _ in range(5))
    width = c.hidden_size // c.num_attention_heads * c.num_key_value_heads
    slots = a.chains * (a.prompt + a.new / 2)  # on average
    cache = slots * 2 * c.num_hidden_layers * width * model.dtype.itemsize
    weights = sum(p.nbytes for p in model.parameters())  # a tied table once, as the head reads it
    return {"GB/s": bandwidth / 1e9, "floor ms": 1e3 * (weights + cache) / bandwidth}


@torch.no_grad()
def mixing(a, name):
    """The method's own functions on (chains, V) logits, beside a whole step of a rollout."""
    model, tokenizer = build(name, a, a.precision[0])
    table, times = model.get_input_embeddings().weight, 20
    generator = torch.Generator(model.device).manual_seed(0)
    logits = 3 * torch.randn(a.chains, len(table), device=model.device)

    def mix(cfg):
        m = motg.sample_mixture(logits, cfg, generator)
        motg.mixture_logprob(logits, *m, cfg)
        motg.mixture_embedding(table, m.tokens, m.log_weights)

    def once(run):
        return {
            "V": len(table),
            "ms": 1e3 / times * timed(lambda: [run() for _ in range(times)])[0],
        }

    def step():
        _, seconds = call_and_step(partial(sample, model, tokenizer, "dirichlet", a), a)
        return {"V": len(table), "ms": 1e3 * seconds}

    cases = {"a step of dirichlet": step}
    step()  # warms up
    for method in motg.METHODS:
        run = partial(mix, motg.make_config(method))
        run()
        if a.device == "cuda":  # as one graph, as a rollout replays it
            graph = torch.cuda.CUDAGraph()
            graph.register_generator_state(generator)
            with torch.cuda.graph(graph):
                run()
            run = graph.replay
        cases[method] = partial(once, run)
    return compare(cases, a, "ms")


def whole_logprobs(model, r, cfg):
    """`rollout_logprobs` without its chunks, for prompts of one length: all logits at once."""
    table, T = model.get_input_embeddings().weight, r.mask.shape[1]
    steps = motg.mixture_embedding(table, r.tokens, r.log_weights)  # (B, T, d)
    embeds = torch.cat([table[r.prompt_ids], steps], dim=1)  # (B, P + T, d)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=cfg.precision == "bf16"):
        logits = model(inputs_embeds=embeds, logits_to_keep=T + 1).logits[:, :-1]  # (B, T, V)
        return motg.step_logprob(logits, r.steps, r.tag, cfg)


def gradient(a, name, method, passes=0, logprobs=motg.rollout_logprobs):
    """What the gradient of a rollout's log-probabilities takes; `MiB` has the gradient itself."""
    model, tokenizer = build(name, a)
    r = sample(model, tokenizer, method, a, a.new)
    cfg = motg.make_config(method, precision=a.precision[0], weight_passes=passes)

    def run():
        model.zero_grad()
        logprobs(model, r, cfg).sum().backward()

    MiB = added_memory(a.device, run)
    seconds, _ = timed(run)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
    return {"seconds": seconds, "MiB": MiB, "gradient's norm": norm}


def memory(a, name):
    """Of a model so small that logits (B, T, V) are most of it; the norms have to agree."""
    chunks = partial(fresh, gradient, a, name, "dirichlet", 0)
    cases = {"chunks": chunks, "whole logits": partial(chunks, whole_logprobs)}
    return compare(cases, a, "MiB", "seconds")


def passes(a, name):
    """Of the paper's method whose weights are functions of p."""
    run = partial(fresh, gradient, a, name, "different-tokens")
    return compare({f"weight_passes {n}": partial(run, n) for n in (0, 1, 2)}, a, "seconds", "MiB")


class Learner:
    """What train() holds. It learns at a rate of 0, so that each round has the same work."""

    def __init__(self, policy, cfg):
        self.policy, self.cfg, self.steps = policy, cfg, 0
        self.reference = copy.deepcopy(policy).requires_grad_(False)
        self.sampler = policy
        if cfg.precision == "bf16":
            self.sampler = copy.deepcopy(self.reference).to(torch.bfloat16)
        how = {"betas": (0.9, 0.99), "weight_decay": 0.1, "fused": True}
        self.optimizer = torch.optim.AdamW(policy.parameters(), cfg.lr, **how)

    def update(self, experience):
        r, advantages, *_ = experience
        motg.update(self.policy, self.reference, self.optimizer, r, advantages, self.cfg, 0.0)
        if self.sampler is not self.policy:  # what samples is loaded anew
            self.sampler.load_state_dict(self.policy.state_dict())

    def step(self, tokenizer):
        """Seconds of a step and of its parts; "other" makes problems, prompts and probes."""
        spent, generator = {}, torch.Generator(self.policy.device)

        def watched(name, function, *args):
            spent[name], result = timed(function, *args)
            return result

        parts = {n: partial(watched, n, getattr(motg, n)) for n in ("rollout", "rewards")}
        with mock.patch.multiple(motg, **parts):
            steps = range(self.steps, self.steps + 1)
            task = (self.sampler, tokenizer, self.cfg, steps, generator)
            collected, experience = timed(motg.collect, *task)
        self.steps += 1
        updated, _ = timed(self.update, experience)
        whole, other = collected + updated, collected - sum(spent.values())
        row = {"step s": whole, "rollout s": spent["rollout"], "update s": updated}
        row |= {"scoring s": spent["rewards"], "other s": other}
        return row | {"tokens/s": experience[0].mask.sum().item() / whole}


def step(a, name):
    """`smoke` is the smoke mode's own step; any other shape has --prompts x --chains rows."""
    if name == "smoke":
        settings = {"smoke": True, "device": a.device}
        cfg = motg.make_config(**settings)
        policy, tokenizer = motg.load_model(cfg, motg.smoke_model(cfg))
        a.chains, a.prompts, a.new = cfg.chains, cfg.prompts_per_step, cfg.max_new_tokens
    else:
        smoke = motg.make_config(smoke=True)
        settings = {"task": smoke.task, "task_settings": smoke.task_settings}
        settings |= {"chains": a.chains, "prompts_per_step": a.prompts, "max_new_tokens": a.new}
        policy, tokenizer = build(name, a)
    motg.scorer()  # started before anything is timed
    a.prompt, cases = 0, {}  # 0: the task's own
    for precision in a.precision:
        learner = Learner(copy.deepcopy(policy), motg.make_config(**settings, precision=precision))
        cases[precision] = partial(learner.step, tokenizer)
        cases[precision]()  # warms up
    return compare(cases, a, "tokens/s")


def recipe(a, name):
    """One rollout and one update of it; the paper makes four rollouts an update."""
    if a.device != "cuda":
        print("recipe: not measured: no CUDA")
        return []
    policy, tokenizer = build(name, a)
    cfg = motg.make_config(chains=a.chains, max_new_tokens=a.new, precision=a.precision[0])
    learner = Learner(policy, cfg)

    def once():
        torch.cuda.reset_peak_memory_stats()
        rolled, r = timed(sample, learner.sampler, tokenizer, cfg.method, a, a.new)
        advantages = motg.group_advantages(torch.randn(1, a.chains, device=a.device)).flatten()
        updated, _ = timed(learner.update, (r, advantages, {}))
        row = {"rollout s": rolled, "update s": updated, "both s": rolled + updated}
        return row | {"peak GiB": torch.cuda.max_memory_allocated() / 2**30}

    once()  # warms up
    return compare({cfg.method: once}, a)


# -------------------------------------------------------------------------------- the command line
SMALL = {"chains": 10, "prompt": 64, "new": 48, "prompts": 1}
LONG = SMALL | {"prompt": 1024, "new": 1024}
MEMORY = SMALL | {"chains": 8, "prompt": 8, "new": 256}
WHAT = {  # the function, its shapes, its sizes on a CPU and on a GPU
    "decode": (decode, "small", SMALL, LONG),
    "mixing": (mixing, "smoke,small,0.5b", SMALL, LONG),
    "memory": (memory, "wide", MEMORY, MEMORY),
    "passes": (passes, "smoke,small", SMALL, SMALL),
    "step": (step, "smoke", SMALL, SMALL),
    "recipe": (recipe, "qwen2.5-1.5b", LONG, LONG),
}


def show(rows):
    """Rows in columns."""

    def text(x):
        if isinstance(x, list):
            return text(x[0]) if x[1] == x[2] else f"{text(x[0])} ({text(x[1])}..{text(x[2])})"
        return f"{x:,.4g}" if isinstance(x, float) else str(x)

    lines = [list(rows[0])] + [[text(x) for x in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def main():
    transformers.utils.logging.set_verbosity_error()
    cuda = torch.cuda.is_available()
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    parser.add_argument("what", choices=WHAT)
    parser.add_argument("--shape", help=f"{', '.join(SHAPES)}, or a model's folder; with commas")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--precision", help="fp32 or bf16; step takes both, with a comma")
    parser.add_argument("--methods", default="single,dirichlet", help="of decode, with commas")
    parser.add_argument("--note", default="", help="kept with the numbers, such as 'busy machine'")
    parser.add_argument(
        "--json", type=Path, default=HERE / "results/bench.json", help="where to keep them"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    for name in SMALL:
        parser.add_argument(f"--{name}", type=int, help="another size than the section's own")
    a = parser.parse_args()

    function, shapes, on_cpu, on_gpu = WHAT[a.what]
    for name, size in (on_gpu if a.device == "cuda" else on_cpu).items():
        setattr(a, name, getattr(a, name) or size)
    a.precision = (a.precision or ("bf16" if a.device == "cuda" else "fp32")).split(",")
    a.methods, shapes = a.methods.split(","), (a.shape or shapes).split(",")
    unknown = [name for name in shapes if name not in SHAPES and not Path(name).is_dir()]
    if (
        unknown
        or not set(a.precision) <= {"fp32", "bf16"}
        or not set(a.methods) <= set(motg.METHODS)
    ):
        parser.error("unknown shape, precision or method")
    os.environ["OMP_NUM_THREADS"] = str(a.threads)  # for fresh processes
    torch.set_num_threads(a.threads)
    machine = torch.cuda.get_device_name() if a.device == "cuda" else platform.machine()
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, check=False, capture_output=True, text=True).stdout.strip()
    about = {"date": f"{datetime.datetime.now():%Y-%m-%d %H:%M}", "rounds": a.rounds}
    about |= {"commit": commit, "torch": torch.__version__}
    about |= {"transformers": transformers.__version__}
    kept = json.loads(a.json.read_text()) if a.json.exists() else []
    if isinstance(kept, dict):
        sys.exit(f"bench: {a.json} is of another version; move it away")
    for name in shapes:
        sizes = argparse.Namespace(**vars(a))  # a section may know better
        rows = function(sizes, name)
        settings = {n: getattr(sizes, n) for n in ("what", "precision", "threads", "note", *SMALL)}
        settings |= {"shape": name, "machine": f"{machine}, {os.cpu_count()} cores"}
        if rows:
            print("\n" + "  ".join(f"{n}={x}" for n, x in (settings | about).items()))
            show(rows)
            cases = [row["case"] for row in rows]
            kept = [x for x in kept if x["settings"] != settings or x["case"] not in cases]
            kept += [{"settings": settings, "about": about} | row for row in rows]
            a.json.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
