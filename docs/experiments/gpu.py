"""What only a CUDA GPU can show, in one call of about ten minutes.

    python docs/experiments/gpu.py --out runs/gpu
    python docs/experiments/gpu.py --out /tmp/gpu --dry     the same code at a tiny size, on a CPU

Results are rows of OUT/gpu.jsonl, one JSON object a line, each written as soon as it is known. A
part runs in a process of its own for so many seconds at most: one that fails, hangs or breaks its
CUDA context takes no other with it. The parts, the most important first:

    versions   of the software; the GPU, how fast it copies and multiplies
    cudnn      attention's backends: NaN and wrong gradients by length, a new shape's price, speed
    graph      a rollout by CUDA graph equals one by eager steps, for all methods and ends
    tests      test_motg.py with the GPU visible and hidden; it runs beside the parts above
    decode     a step at the shape of Qwen2.5-1.5B, transformers' `generate`, and the least time
    profile    where a step's time goes, kernel by kernel
    recipe     one step of the paper's recipe: seconds and the largest memory
    smoke      `motg.py train --smoke --steps 40`
    smollm     README's run of a real model, if --real names its folder
"""

import argparse
import contextlib
import copy
import gc
import io
import json
import multiprocessing
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from functools import partial
from pathlib import Path
from statistics import median
from unittest import mock

import torch
import torch.nn.functional as F
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import motg  # noqa: E402  (it lies at the repository's root)

transformers.utils.logging.set_verbosity_error()
SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")
SIZES += ("intermediate_size", "vocab_size")
QWEN = dict(zip(SIZES, (28, 1536, 12, 2, 8960, 151_936), strict=True))  # Qwen2.5-1.5B
GROUPED = dict(zip(SIZES, (4, 512, 4, 2, 1024, 4000), strict=True))
TINY = dict(zip(SIZES, (2, 64, 2, 1, 128, 2000), strict=True))
GIB = 2**30


# -------------------------------------------------------------------------------------- helpers
def tried(function, *args):
    """The dict that a function returns, or the error that it raises; frees memory either way."""
    try:
        return function(*args)
    except Exception:  # noqa: BLE001  (one row failed, and the next is tried)
        return {"error": traceback.format_exc()[-1500:]}
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def finish():
    """Waits for the GPU."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def timed(function, *args):
    """Seconds of a call, and its result."""
    finish()
    began = time.perf_counter()
    result = function(*args)
    finish()
    return time.perf_counter() - began, result


def milliseconds(function, times):
    """Of one call: the median of five loops of `times` calls."""
    function()
    return (
        1e3 / times * median(timed(lambda: [function() for _ in range(times)])[0] for _ in "12345")
    )


def memory(function, *args):
    """Seconds of a call, its result, and the largest memory meanwhile in GiB."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    return *timed(function, *args), torch.cuda.max_memory_allocated() / GIB


def bandwidth(a):
    """Bytes a second that a device-to-device copy reads and writes."""
    to, source = torch.empty(2, 2**20 if a.dry else GIB, dtype=torch.uint8, device=a.device)
    return 2 * len(to) / (milliseconds(lambda: to.copy_(source), 20) / 1e3)


def build(a, sizes, dtype=torch.float32, **more):
    """A Qwen2 with random weights, and the smoke model's tokenizer. The EOS is the vocabulary's
    last id, so that hardly any row ends by itself; a step is the same work wherever it is."""
    torch.manual_seed(0)
    folder = motg.smoke_model(motg.make_config(smoke=True))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config = transformers.Qwen2Config(**sizes, tie_word_embeddings=True, **more)
    with torch.device(a.device):
        model = transformers.Qwen2ForCausalLM(config).eval().to(dtype)
    model.generation_config.eos_token_id = sizes["vocab_size"] - 1
    model.generation_config.pad_token_id = 0
    return model, tokenizer


def sample(a, model, tokenizer, prompts, cfg, seed=0):
    """A rollout."""
    generator = torch.Generator(a.device).manual_seed(seed)
    return motg.rollout(model, tokenizer, prompts, cfg, generator)


def first_step(a, model, tokenizer, prompts, cfg):
    """A decoder that has read the prompts and made one step, and what makes the next ones."""
    batch = tokenizer(prompts, return_tensors="pt", add_special_tokens=False).to(a.device)
    ids, mask = batch.input_ids, batch.attention_mask.bool()
    generator = torch.Generator(a.device).manual_seed(0)
    with torch.no_grad():
        decoder = motg.Decoder(model, tokenizer, ids, mask, cfg, generator)
        decoder.step()
        return decoder, decoder.step if a.dry else motg.captured(decoder.step, generator)


# -------------------------------------------------------------------------------------- versions
def said(*command):
    """What a command prints."""
    return subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip()


def versions(a):
    row = {"python": platform.python_version(), "torch": torch.__version__}
    row |= {"transformers": transformers.__version__, "cuda": torch.version.cuda}
    row |= {"cores": os.cpu_count(), "commit": said("git", "-C", ROOT, "describe", "--always")}
    if not a.dry:
        row["driver"] = said(
            "nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"
        )
        row |= {"gpu": str(torch.cuda.get_device_properties(0))}
        row |= {"cudnn": torch.backends.cudnn.version()}
    yield row
    yield {"smoke_model_s": timed(motg.smoke_model, motg.make_config(smoke=True))[0]}
    n = 64 if a.dry else 8192
    x, y = torch.randn(2, n, n, device=a.device, dtype=torch.bfloat16)
    yield {"copy_gb_s": bandwidth(a) / 1e9, "tflop_s": 2e-9 * n**3 / milliseconds(lambda: x @ y, 5)}


# ----------------------------------------------------------------------------------------- cudnn
BACKENDS = {
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
    "efficient": [SDPBackend.EFFICIENT_ATTENTION],
    "math": [SDPBackend.MATH],
    "motg's": motg.ATTENTION,
    "any": [*motg.ATTENTION, SDPBackend.CUDNN_ATTENTION],  # as torch likes
}
LENGTHS = [*range(1, 10), 15, 16, 17, 31, 33, 48, 63, 64, 65, 96, 100, 127, 128, 129, 191, 193, 200]
LENGTHS += [255, 256, 257, 301, 383, 385, 448, 500, 511, 512, 513, 600, 641, 767, 769, 800, 897]
LENGTHS += [999, 1000, 1001, 1023, 1024, 1025, 1100]


def attention_case(a, P, T, B=2):
    """Queries (B, 12, T, 128) of T steps behind prompts of P tokens, keys and values (B, 2, P + T,
    128), a mask that is causal and hides the padding on the left, and the output's gradient."""
    torch.manual_seed(T)
    how = {"device": a.device, "dtype": torch.bfloat16}
    q, grad = torch.randn(2, B, 12, T, 128, **how)
    k, v = torch.randn(2, B, 2, P + T, 128, **how)
    place = torch.arange(P + T, device=a.device)
    first = torch.arange(B, device=a.device)[:, None, None, None] * ((P or T) // 3)
    mask = (place <= place[P:, None]) & (place >= first)  # (B, 1, T, P + T)
    return q, k, v, mask, grad * mask.any(-1, keepdim=True)  # nothing depends on padding


def repeated(x):
    """Keys or values (B, 2, S, 128), once for each head."""
    return x.repeat_interleave(6, dim=1)


def attend(name, grouped, q, k, v, mask, grad):
    """The backend that is taken; output and gradients. Keys and values are grouped or repeated."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    keys, values = (k, v) if grouped else (repeated(k), repeated(v))
    how = {"attn_mask": mask, "enable_gqa": grouped}
    with sdpa_kernel(BACKENDS[name]):
        taken = SDPBackend(torch._fused_sdp_choice(q, keys, values, **how)).name
        out = F.scaled_dot_product_attention(q, keys, values, **how)
    return taken, [out * mask.any(-1, keepdim=True), *torch.autograd.grad(out, (q, k, v), grad)]


def gradients(a, name, grouped, P):
    """At which lengths a backend gives NaN, or something else than the formula does in fp32."""
    row = {"backend": name, "grouped": grouped, "prompt": P, "taken": Counter(), "nan": []}
    row |= {"wrong": [], "worst_of_the_right": 0.0, "refused": {}}
    spent = {"first_ms": [], "again_ms": []}  # a shape's first call, and its second
    for T in LENGTHS[: 6 if a.dry else None]:
        q, k, v, mask, grad = case = attention_case(a, P, T)
        exact = attend("math", True, *(x.float() for x in (q, k, v)), mask, grad.float())[1]
        try:
            for call in spent.values():
                seconds, (taken, found) = timed(attend, name, grouped, *case)
                call.append(1e3 * seconds)
        except RuntimeError as e:
            row["refused"].setdefault(motg.first_line(e), []).append(T)
            continue
        row["taken"][taken] += 1
        error = max((x - y).norm().item() / max(y.norm().item(), 1) for x, y in zip(found, exact))
        if error <= 0.03:
            row["worst_of_the_right"] = max(row["worst_of_the_right"], error)
        else:
            row["wrong" if all(x.isfinite().all() for x in found) else "nan"].append(T)
    return row | {name: median(x) for name, x in spent.items() if x}


def attention_speed(a, name, keys):
    """One layer: a decoding step (10 rows, 2,048 slots, as a graph) and an update's four rows."""
    row = {"backend": name, "keys": keys}
    S, gqa = 32 if a.dry else 2048, keys == "grouped"
    q, k, v, mask, _ = attention_case(a, S - 1, 1, B=10)
    bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -1e9)
    if keys == "repeated":
        k, v = repeated(k), repeated(v)
    elif keys == "packed":  # six queries share keys: they are six positions of one head
        q = q.view(10, 2, 6, 128)

    def step():
        with sdpa_kernel(BACKENDS[name]):
            F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=gqa)

    step()
    replay = step if a.dry else motg.captured(step, None)
    row["step_ms"] = milliseconds(replay, 50)
    if keys != "packed":
        case = attention_case(a, S // 2, S // 2, B=4)
        row["update_ms"] = milliseconds(partial(attend, name, gqa, *case), 3)
    return row


def cudnn(a):
    for case in (("cudnn", False), ("motg's", False), ("any", False), ("cudnn", True)):
        for P in (0, 200, 203):
            yield tried(gradients, a, *case, P)
    for keys in ("packed", "repeated", "grouped"):
        for name in ("efficient", "cudnn", "math"):
            yield {"backend": name, "keys": keys} | tried(attention_speed, a, name, keys)


# ----------------------------------------------------------------------------------------- graph
def graph_and_eager(a, model, tokenizer, prompts, cfg):
    """Two rollouts with one seed: is everything the same, and by how much do numbers differ?"""
    with contextlib.redirect_stderr(io.StringIO()) as warned:
        one = sample(a, model, tokenizer, prompts, cfg)
    with mock.patch.object(motg, "captured", lambda step, generator: step):
        two = sample(a, model, tokenizer, prompts, cfg)
    row = {"tokens": int(one.mask.sum()), "mixed": int(one.mixed.sum())}
    names = ("tokens", "representative", "kind", "matched")
    row["equal"] = all(torch.equal(getattr(one, n), getattr(two, n)) for n in names)
    if row["equal"]:
        pairs = ((getattr(one, n), getattr(two, n)) for n in ("logprob", "log_weights"))
        row["gap"] = max((x.exp() - y.exp()).abs().max().item() for x, y in pairs)
    return row | {"said": warned.getvalue()[:200]}


def graph(a):
    smoke = motg.make_config(smoke=True, device=a.device)
    real = motg.load_model(smoke, motg.smoke_model(smoke))
    prompts = [motg.train_problem(smoke, real[1], n)[2] for n in range(2)]
    random = build(a, TINY if a.dry else GROUPED, torch.bfloat16)
    settings = {"chains": 3, "max_new_tokens": 8 if a.dry else 40}
    settings |= {"end_entropy": 9.0, "end_patience": 6, "end_steps": 12}
    for name, model in {"smoke, fp32": real, "random, bf16": random}.items():
        for method in motg.METHODS:
            row = {"model": name, "method": method}
            for end in motg.CHOICES["end"]:
                cfg = motg.make_config(method, **settings, end=end)
                row[end] = tried(graph_and_eager, a, *model, prompts, cfg)
            yield row
    cfg, reserved = motg.make_config("dirichlet", **settings), []
    for seed in range(30):
        sample(a, *random, prompts, cfg, seed)
        reserved.append(torch.cuda.memory_reserved() / 2**20)
    yield {"rollouts": 30, "reserved_mib": reserved, "grown_mib": reserved[-1] - reserved[1]}
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    model = build(a, TINY, rope_parameters=rope)
    yield {"model": "dynamic RoPE"} | tried(graph_and_eager, a, *model, prompts, cfg)
    yield {"model": "smoke, after a failed capture"} | tried(
        graph_and_eager, a, *real, prompts, cfg
    )


# ----------------------------------------------------------------------------------------- tests
def tests(a):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "test_motg.py"]
    command += ["--collect-only"] if a.dry else ["-n", str(max(1, os.cpu_count() // 2))]
    for gpu, more in {"visible": {}, "hidden": {"CUDA_VISIBLE_DEVICES": ""}}.items():
        log = Path(a.out, f"tests_{gpu}.txt")  # it is there even if time runs out
        how = {"cwd": ROOT, "env": os.environ | {"OMP_NUM_THREADS": "1"} | more}
        with log.open("w") as file:
            seconds, done = timed(partial(subprocess.run, command, check=False, stdout=file, **how))
        row = {"gpu": gpu, "status": done.returncode, "seconds": seconds}
        yield row | {"last": log.read_text().splitlines()[-15:]}


# ------------------------------------------------------------------------------- decode, profile
def decode(a):
    sizes, P = (TINY, 8) if a.dry else (QWEN, 200)
    model, tokenizer = build(a, sizes, torch.bfloat16)
    short, long, baseline = (2, 6, 4) if a.dry else (32, 512, 128)
    weights = sum(p.nbytes for p in model.parameters())  # the tied table once, as the head reads it
    width = model.config.hidden_size // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    slot = 2 * 2 * width * sizes["num_hidden_layers"]  # bytes of a token's keys and values
    copies = bandwidth(a)

    def rolled(method, rows, T):
        cfg = motg.make_config(method, chains=10, max_new_tokens=T)
        return timed(sample, a, model, tokenizer, [P * "a"] * (rows // 10), cfg)[0]

    def generated(_, rows, T):
        ids = torch.tensor([tokenizer.encode(P * "a")] * rows, device=a.device)
        how = {"do_sample": True, "temperature": 0.9, "top_k": 0, "top_p": 1.0}
        how |= {"min_new_tokens": T, "max_new_tokens": T, "attention_mask": torch.ones_like(ids)}
        return timed(partial(model.generate, ids, **how))[0]

    cases = {method: (rolled, long) for method in ("single", "dirichlet", "different-tokens")}
    cases["generate"] = (generated, baseline)
    for turn in range(3):  # the first warms up
        for rows in (10, 40):
            least = 1e3 * (weights + rows * (P + long / 2) * slot) / copies
            for name, (run, T) in cases.items():
                if turn == 0:
                    run(name, rows, short)
                    continue
                whole, start = run(name, rows, T), run(name, rows, short)
                ms = 1e3 * (whole - start) / (T - short)
                row = {"method": name, "rows": rows, "ms": ms, "tokens_s": 1e3 * rows / ms}
                row |= {"least_ms": least, "times_least": ms / least, "start_s": start}
                yield row | {"tokens_s_of_all": rows * T / whole, "new_tokens": T}


KINDS = {  # by a kernel's name; the first that fits
    "attention": "fmha|flash|sdpa|attention",
    "products": "gemm|gemv|cutlass|cublas|nvjet|xmma|splitk|dot_kernel|::mm|bmm",
    "sorts, scans, random": "sort|topk|radix|scan|search|cum|distribution|random",
    "softmax, sums": "softmax|reduce|norm|argmax",
    "copies, gathers": "copy|memcpy|memset|gather|scatter|index|embedding|cat",
    "elementwise": "elementwise|vectorized|unrolled",
    "others": "",
}


def profile(a):
    model, tokenizer = build(a, TINY if a.dry else QWEN, torch.bfloat16)
    prompt = [(8 if a.dry else 200) * "a"]
    what = torch.profiler.ProfilerActivity.CPU if a.dry else torch.profiler.ProfilerActivity.CUDA
    for method in ("dirichlet", "single", "different-tokens"):
        cfg = motg.make_config(method, max_new_tokens=512)
        decoder, replay = first_step(a, model, tokenizer, prompt, cfg)
        with torch.no_grad():
            wall = milliseconds(replay, 3 if a.dry else 20)
            with torch.profiler.profile(activities=[what]) as seen:
                for _ in range(3):
                    replay()
                finish()
        spent, calls, kinds = Counter(), Counter(), Counter()
        for event in seen.events():
            if a.dry or event.device_type == torch.autograd.DeviceType.CUDA:
                us = event.self_cpu_time_total if a.dry else event.self_device_time_total
                kind = next(k for k in KINDS if re.search(KINDS[k], event.name, re.IGNORECASE))
                spent[event.name] += us / 3e3
                kinds[kind] += us / 3e3
                calls[event.name] += 1 / 3
        row = {"method": method, "wall_ms": wall, "kernels_ms": sum(spent.values())}
        row |= {"kernels": sum(calls.values()), "kinds_ms": kinds}
        top = spent.most_common(25)
        yield row | {"top": [[ms, calls[kernel], kernel[:160]] for kernel, ms in top]}
        del decoder, replay  # the next one's memory


# ---------------------------------------------------------------------------------------- recipe
def recipe(a):
    P, T = (10, 16) if a.dry else (1024, 1024)
    policy, tokenizer = build(a, TINY if a.dry else QWEN)
    default = motg.make_config("dirichlet", max_new_tokens=T)
    reference = copy.deepcopy(policy).requires_grad_(False)
    sampler = copy.deepcopy(reference).to(motg.compute_dtype(policy, default))
    optimizer = torch.optim.AdamW(policy.parameters(), 5e-6, (0.9, 0.99), 1e-8, 0.1, fused=True)

    def updated(r, micro_tokens, chunk):
        cfg = copy.copy(default)
        cfg.micro_tokens = micro_tokens
        rewards = torch.randn(len(r.kind) // cfg.chains, cfg.chains, device=a.device)
        task = (policy, reference, optimizer, r, motg.group_advantages(rewards).flatten(), cfg, 0.0)
        with mock.patch.object(motg, "LOGITS_CHUNK", chunk):
            seconds, log, largest = memory(motg.update, *task)
        row = {"micro_tokens": micro_tokens, "chunk": chunk, "update_s": seconds}
        return row | {
            "update_gib": largest,
            "grad_norm": log["grad_norm"],
            "gap": log["sampler_gap"],
        }

    def evaluated(length):  # the first steps take all the memory that there is to take
        prompts = [length * "a"] * (2 if a.dry else 32)
        _, (_, replay), largest = memory(first_step, a, sampler, tokenizer, prompts, default)
        with torch.no_grad():
            return {"evaluation": length, "gib": largest, "step_ms": milliseconds(replay, 1)}

    few = motg.make_config("dirichlet", max_new_tokens=16)
    tried(updated, sample(a, sampler, tokenizer, [P * "a"], few), 4096, 2**24)  # warms up
    yield {"at_rest_gib": torch.cuda.memory_allocated() / GIB, "sampler": str(sampler.dtype)}
    for prompts, length in ((1, P), (1, P // 5), (4, P)):  # the defaults sample four at once
        task = (a, sampler, tokenizer, [length * "a"] * prompts, default)
        seconds, r, largest = memory(sample, *task)
        row = {"prompt": length, "rows": len(r.kind)}
        yield row | {"rollout_s": seconds, "rollout_gib": largest}
        for how in ((4096, 2**24), (4096, 2**26), (1024, 2**24), (1024, 2**26))[: 4 // prompts]:
            yield row | tried(updated, r, *how)
    for length in (P // 5, P):
        yield tried(evaluated, length)


# --------------------------------------------------------------------------------- whole programs
def trained(name, *flags):
    """`motg.py train` in a process of its own: seconds, accuracies, the last step's metrics."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        command = [sys.executable, ROOT / "motg.py", "train", "--out", out, *flags]
        run = partial(subprocess.run, command, check=False, capture_output=True, text=True)
        seconds, done = timed(run)
        row = {"run": name, "seconds": seconds, "status": done.returncode}
        if done.returncode:
            return row | {"error": done.stderr[-1500:]}
        result = json.loads((out / "result.json").read_text())
        row |= {key: result[key] for key in ("accuracy_before", "accuracy_after")}
        return row | {"last": json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])}


def smoke(a):
    few = ["--steps", "2", "--eval-problems", "4", "--prompts-per-step", "2"]
    flags = ["--smoke", "--device", a.device, *(few if a.dry else ["--steps", "40"])]
    for method in ("dirichlet", "different-tokens"):
        yield tried(trained, f"smoke {method}", *flags, "--method", method)


README_RUN = """--task chain_sum --temperature 0.7 --max-prompt-tokens 512 --max-new-tokens 48
--task-settings '{"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}' --chains 8
--prompts-per-step 8 --accumulate 1 --steps 16 --lr 1e-5 --kl-beta 0 --loss-average token
--micro-tokens 768"""


def smollm(a):
    if not Path(a.real or "none", "config.json").exists():
        yield {"skipped": f"no model in {a.real!r}"}
        return
    flags = [*shlex.split(README_RUN), "--model", a.real, "--device", a.device]
    flags += ["--shots", next(ROOT.glob("docs/**/shots/chain_sum.json"))]
    for method in ("single", "dirichlet", "different-tokens"):
        yield tried(trained, f"SmolLM2 {method}", *flags, "--method", method)


# ------------------------------------------------------------------------------------------ main
PARTS = {versions: 60, cudnn: 90, graph: 110, tests: 60, decode: 110, profile: 45}
PARTS |= {recipe: 140, smoke: 100, smollm: 300}  # seconds at most
NAMES = [part.__name__ for part in PARTS]


def record(a, part, row):
    """Adds a row to the file, and prints its beginning."""

    def short(x):
        if isinstance(x, dict):
            return {key: short(y) for key, y in x.items()}
        if isinstance(x, list):
            return [short(y) for y in x]
        return float(f"{x:.5g}") if isinstance(x, float) else x

    line = json.dumps({"part": part.__name__, "at": round(time.time() - a.began, 1)} | short(row))
    with Path(a.out, "gpu.jsonl").open("a") as file:
        file.write(line + "\n")
    print(line[:600], flush=True)


def run(part, a):
    """The process of a part, and of a group that can be ended as a whole."""
    os.setsid()
    try:
        for row in part(a):
            record(a, part, row)
    except Exception:  # noqa: BLE001  (the next part is tried)
        record(a, part, {"error": traceback.format_exc()[-1500:]})


def main():
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    parser.add_argument("--out", default=os.environ.get("OUT", "runs/gpu"), help="the folder")
    parser.add_argument("--parts", default=",".join(NAMES), help="some, with commas")
    parser.add_argument("--limit", type=float, default=540, help="seconds in all")
    parser.add_argument("--real", help="a folder with SmolLM2-135M-Instruct")
    parser.add_argument(
        "--start", default="fork", help="fork or spawn: how a part's process starts"
    )
    parser.add_argument("--dry", action="store_true", help="tiny sizes, on the CPU")
    a = parser.parse_args()
    a.began, a.device = time.time(), "cpu" if a.dry else "cuda"
    Path(a.out).mkdir(parents=True, exist_ok=True)
    chosen = [part for part in PARTS if part.__name__ in a.parts.split(",")]
    early = [part for part in chosen if part is tests]  # it runs beside those before it
    started = {}
    for part in chosen:
        for each in (*early, part):
            if each not in started:
                started[each] = multiprocessing.get_context(a.start).Process(
                    target=run, args=(each, a)
                )
                started[each].start()
        process = started[part]
        process.join(max(1, min(PARTS[part], a.began + a.limit - time.time())))
        if process.is_alive():
            record(a, part, {"error": "ended, for its time was over"})
            os.killpg(process.pid, signal.SIGKILL)
        elif process.exitcode:
            record(a, part, {"error": f"its process ended with {process.exitcode}"})
    print(f"{time.time() - a.began:.0f} s: {a.out}/gpu.jsonl")


if __name__ == "__main__":
    main()
