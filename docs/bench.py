"""How fast and how small: times and memory of motg's sampling and training on this machine.

    OMP_NUM_THREADS=1 python docs/bench.py              (a 6-layer model on a CPU, Qwen2.5-1.5B's shape on a GPU)
    python docs/bench.py --shape qwen2.5-0.5b --only decode,mixing --json bench.json

It measures a model of that shape with random weights (nothing is downloaded), or a real one with --model:
    decode    every method beside transformers' `generate`: same batch, prompt, length, dtype and whole vocabulary
    mixing    what k candidates cost over one           growth    more chains, longer rollouts
    training  one step, split into its parts            memory    log-probs with gradient, chunked against plain
    threads   OpenMP alone and beside a busy process    floor     the share of the memory bandwidth reached (CUDA)
What is compared takes turns, round after round, so that a disturbance meets all of it: a time is the median over the
rounds, a ratio the median of the rounds' ratios, `+-` half the range of their middle half. Every section runs in a fresh
process. No row ends early: for both sides the only EOS id is -1. A step of motg is the same work in a thought and in an
answer, so it does not matter where a random model's thought happens to end.
"""
import argparse, copy, datetime, functools, json, os, subprocess, sys, time
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import motg
import torch, transformers

transformers.logging.set_verbosity_error()
CUDA = torch.cuda.is_available()
SHAPES = {name: dict(zip(("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                          "intermediate_size", "vocab_size"), numbers)) for name, numbers in {
    "smoke": (128, 3, 4, 2, 256, 0), "smoke-0.75m": (128, 3, 4, 2, 512, 0),  # 0: the smoke tokenizer's own
    "small": (256, 6, 4, 2, 1024, 32000),
    "qwen2.5-0.5b": (896, 24, 14, 2, 4864, 151936), "qwen2.5-1.5b": (1536, 28, 12, 2, 8960, 151936),
    "wide": (64, 1, 4, 2, 128, 151936)}.items()}  # the last one is section `memory`'s

# ------------------------------------------------------------------------------------------------ what is measured

def build(shape, model=None, master=False):
    """What samples (bf16 on a GPU, as in training), or the fp32 master weights, and a tokenizer; rows have no end."""
    if model:
        net, tokenizer = motg.load_model(motg.make_config(model=model))
    else:
        torch.manual_seed(0)
        tokenizer = motg.smoke_tokenizer()  # byte-level; a larger vocabulary's other ids read as nothing
        config = SHAPES[shape] | dict(vocab_size=SHAPES[shape]["vocab_size"] or len(tokenizer))
        with torch.device("cuda" if CUDA else "cpu"):
            net = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
                **config, max_position_embeddings=32768, rope_parameters=dict(rope_type="default", rope_theta=1e6),
                tie_word_embeddings=True, attn_implementation="motg")).eval()
    tokenizer.eos_token, net.generation_config.eos_token_id, net.generation_config.pad_token_id = None, -1, 0
    return (net if master else motg.working_copy(net)), tokenizer

def prompt_of(tokenizer, length):
    """A text of `length` tokens."""
    for word in (" the", "a", "7", "\n"):
        if len(tokenizer(word * length, add_special_tokens=False)["input_ids"]) == length:
            return word * length
    raise motg.UserError(f"--prompt {length}: no text of that many tokens was found for this tokenizer")

def sampler(case, method, chains, prompt, new, **settings):
    """A function that does one rollout. Each has a decoder of its own, whose graphs survive the other functions' turns."""
    (net, tokenizer), kept = case, [None]
    cfg = motg.make_config(method, chains=chains, max_prompt_tokens=prompt, max_new_tokens=new, **settings)
    text, generator = prompt_of(tokenizer, prompt), torch.Generator(net.device).manual_seed(0)
    def run():
        net.decoder = kept[0]
        net.set_attn_implementation("motg")
        r = motg.rollout(net, tokenizer, [text], cfg, generator)
        assert r.mask.sum() == chains * new, "a row ended early"
        kept[0] = net.decoder
    return run

def generate(case, chains, prompt, new):
    """The same by transformers' own loop and cache."""
    net, tokenizer = case
    ids = tokenizer([prompt_of(tokenizer, prompt)] * chains, add_special_tokens=False, return_tensors="pt").to(net.device)
    def run():
        net.set_attn_implementation("sdpa")
        out = net.generate(input_ids=ids.input_ids, attention_mask=ids.attention_mask, do_sample=True, top_k=0, top_p=1.0,
                           temperature=0.9, max_new_tokens=new)
        assert out.shape[1] == prompt + new, "a row ended early"
    return run

# ------------------------------------------------------------------------------------------------ how

def timed(f):
    """Seconds of a call, the GPU's work included, and its result."""
    sync = torch.cuda.synchronize if CUDA else lambda: None
    sync()
    began, result = time.perf_counter(), f()
    sync()
    return time.perf_counter() - began, result

def take_turns(functions, repeats):
    """name -> seconds in each round, after one round to warm up."""
    for f in functions.values():
        f()
    times = {name: [] for name in functions}
    for i in range(repeats):
        for name in list(functions)[:: 1 if i % 2 else -1]:
            times[name].append(timed(functions[name])[0])
    return times

def ratio(a, b):
    """The median of the rounds' a / b, and half the range of their middle half."""
    each = sorted(x / y for x, y in zip(a, b))
    cut = len(each) // 4
    return median(each), (each[-1 - cut] - each[cut]) / 2

def fresh(function, env={}, **arguments):
    """`function(**arguments)` in a process of its own; where that one fails, so does this. torch is imported before motg
    there, so that OpenMP sees `env` (None: unset) and not what motg sets."""
    code = f"import sys, torch; sys.path.insert(0, {str(HERE)!r}); import bench; bench.answer(*sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, function.__name__, json.dumps(arguments)], text=True,
                          stdout=subprocess.PIPE, env={n: v for n, v in (os.environ | env).items() if v is not None})
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else sys.exit(max(done.returncode, 1))

def answer(name, arguments):
    """The other end of `fresh`: one line of JSON."""
    try:
        print(json.dumps(globals()[name](**json.loads(arguments))))
    except motg.UserError as e:
        fail(e)
    except torch.OutOfMemoryError:
        fail("out of GPU memory; take a smaller --shape, --chains or --new", 1)

def fail(message, status=2):
    print(f"bench: {message}", file=sys.stderr)
    sys.exit(status)

def peak(reset=False):
    """The most MiB in use since the last reset: CUDA's, or this process's (Linux)."""
    if reset:
        torch.cuda.reset_peak_memory_stats() if CUDA else Path("/proc/self/clear_refs").write_text("5")
    return torch.cuda.max_memory_allocated() / 2**20 if CUDA else int(
        Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024

# ------------------------------------------------------------------------------------------------ the sections

def decode(shape, model, chains, prompt, new, repeats):
    """Whole calls, and the steps alone: (seconds of a call - seconds of one with 1 new token) / (new - 1)."""
    case = build(shape, model)
    runs = {"generate": functools.partial(generate, case)}
    runs |= {m + " (ordinary tokens)" * (m == "single"): functools.partial(sampler, case, m) for m in motg.METHODS}
    t = take_turns({(name, n): f(chains, prompt, n) for name, f in runs.items() for n in (new, 1)}, repeats)
    step = {name: [(a - b) / (new - 1) for a, b in zip(t[name, new], t[name, 1])] for name in runs}
    whole = {name: ratio(t["generate", new], t[name, new]) for name in runs}
    return [{"method": name, "tokens/s": chains * new / median(t[name, new]), "times generate": whole[name][0],
             "+-": whole[name][1], "ms a step": 1e3 * median(step[name]),
             "steps, times generate": ratio(step["generate"], step[name])[0]} for name in runs]

def mixing(shape, model, chains, prompt, new, repeats):
    """Extra time of a decoding step over `single`. They take turns step by step: a round's ratio is that of the medians."""
    net, tokenizer = build(shape, model)
    ids, generator = tokenizer([prompt_of(tokenizer, prompt)], add_special_tokens=False).input_ids, torch.Generator(net.device)
    cases, net.decoder = [("single", 1), *((m, k) for m in ("dirichlet", "different-tokens") for k in (1, 2, 4, 8))], None
    net.set_attn_implementation("motg")
    with torch.no_grad() if CUDA else torch.inference_mode():
        decoders = {(m, k): motg.Decoder(net, tokenizer, motg.make_config(m, k=k, max_new_tokens=new), chains, prompt + new,
                                         generator) for m, k in cases}
        t = {case: [] for case in cases}
        for i in range(repeats + 1):  # the first round warms up
            steps = {case: [] for case in cases}
            for d in decoders.values():
                d.start(ids)
            for n in range(new):
                for case in cases[:: 1 if n % 2 else -1]:
                    steps[case].append(timed(lambda: decoders[case].run(n))[0])
            for case in cases[: len(cases) * (i > 0)]:
                t[case].append(median(steps[case]))
    more = {case: ratio(t[case], t["single", 1]) for case in cases}
    return [{"method": m, "k": k, "ms a step": 1e3 * median(t[m, k]), "extra %": 100 * more[m, k][0] - 100,
             "+-": 100 * more[m, k][1]} for m, k in cases]

def growth(shape, model, chains, prompt, new, repeats):
    """`dirichlet` with more chains, and longer; whole rollouts."""
    sizes = [*((c, new) for c in (1, 10, 40)), *((chains, n) for n in (48, 192, 512))]
    case = build(shape, model)
    t = take_turns({(c, n): sampler(case, "dirichlet", c, prompt, n) for c, n in sizes}, max(1, repeats // 2))
    return [{"chains": c, "new tokens": n, "ms a step": 1e3 * median(t[c, n]) / n, "tokens/s": c * n / median(t[c, n])}
            for c, n in t]

def training(shape, model, chains, prompt, new, repeats):
    """A step and its update as train() does them, with random rewards; the median seconds of each part."""
    policy, tokenizer = build(shape, model, master=True)
    cfg = motg.make_config("dirichlet", **(dict(smoke=True) if shape == "smoke" and not model else dict(
        chains=chains, prompts_per_step=1, max_prompt_tokens=prompt, max_new_tokens=new)))
    reference = motg.working_copy(copy.deepcopy(policy).requires_grad_(False))
    net, generator = motg.working_copy(policy), torch.Generator(policy.device).manual_seed(0)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    prompts, n = [prompt_of(tokenizer, cfg.max_prompt_tokens)] * cfg.prompts_per_step, cfg.prompts_per_step
    def finish():
        torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.grad_clip)
        optimizer.step(), optimizer.zero_grad()
    def step():
        took, r = timed(lambda: motg.rollout(net, tokenizer, prompts, cfg, generator))
        s = dict(rollout=took, reference=0.0, forward=0.0, backward=0.0)
        advantages = motg.group_advantages(torch.randn(n, cfg.chains, device=policy.device)).flatten()
        for rows in motg.micro_batches(r, cfg):
            part = r.select(rows)
            with torch.no_grad():
                took, ref = timed(lambda: motg.rollout_logprobs(reference, part, cfg))
            s["reference"] += took
            took, logprob = timed(lambda: motg.rollout_logprobs(policy, part, cfg))
            s["forward"] += took
            counts = len(r.mask), int(r.sampled.sum())
            loss, _ = motg.grpo_loss(logprob, part.logprob, ref, advantages[rows], part.sampled, cfg, *counts)
            s["backward"] += timed(loss.backward)[0]
        return s | dict(optimiser=timed(finish)[0])
    step(), peak(reset=True)
    steps = [step() for _ in range(repeats)]
    parts = {f"{name} s": median(s[name] for s in steps) for name in steps[0]}
    return [{"prompts x chains": f"{n} x {cfg.chains}", "prompt + new": f"{cfg.max_prompt_tokens} + {cfg.max_new_tokens}",
             **parts, "step s": sum(parts.values()), "tokens/s": n * cfg.chains * cfg.max_new_tokens / sum(parts.values()),
             "peak MiB": peak()}]

def plain_logprobs(net, r, cfg):
    """`rollout_logprobs` for prompts of one length, without its chunks: the logits of all steps at once."""
    table, P = net.get_input_embeddings().weight, r.prompt_ids.shape[1]
    embeds = torch.cat([table[r.prompt_ids], motg.mixture_embedding(table, r.tokens, r.log_weights)], dim=1)  # (B, P+T, d)
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=CUDA):
        logits = net.lm_head(net.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, P - 1 : -1])
        return motg.mixture_logprob(logits, r.tokens, r.log_weights, r.representative, cfg)  # (B, T)

def logprob_memory(chunked):
    """MiB that log-probs and their gradient add at the peak; for the plain ones also how far motg's gradients are off."""
    net, tokenizer = build("wide", master=True)
    cfg = motg.make_config("dirichlet", chains=8, max_prompt_tokens=8, max_new_tokens=256)
    r = motg.rollout(net, tokenizer, [prompt_of(tokenizer, 8)], cfg, torch.Generator(net.device).manual_seed(0))
    net.decoder = None
    def gradients(f):
        f(net, r, cfg).sum().backward()
        got = [p.grad for p in net.parameters()]
        net.zero_grad(set_to_none=True)
        return got
    before = peak(reset=True)
    grads = gradients(motg.rollout_logprobs if chunked else plain_logprobs)
    used, others = peak() - before, [] if chunked else gradients(motg.rollout_logprobs)
    off = [((a - b).abs().max() / a.abs().max()).item() for a, b in zip(grads, others)]
    return dict(used=used, off=max(off, default=0))

def memory(**_):
    """Log-probs with gradient of 8 rows x 256 steps, 151,936 ids, width 64: what they add at the peak."""
    plain, chunked = (fresh(logprob_memory, chunked=c) for c in (False, True))
    return [{"plain MiB": plain["used"], "chunked MiB": chunked["used"], "times less": plain["used"] / chunked["used"],
             "largest relative gradient difference": plain["off"]}]

def small_work(repeats):
    """Median seconds of 100 small products, and of a smoke rollout of 16 steps, in this process."""
    a, b, rollout = torch.randn(10, 256), torch.randn(256, 1024), sampler(build("smoke"), "dirichlet", 10, 16, 16)
    return [median(t) for t in take_turns({0: lambda: [a @ b for _ in range(100)], 1: rollout}, repeats).values()]

def threads(repeats, **_):
    """A (10 x 256) @ (256 x 1024) product and a smoke decoding step, ms on the CPU, alone and beside one busy process."""
    rows = []
    for beside in (0, 1):
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(beside)]
        try:
            for n, policy in ((2, None), (2, "active"), (2, "passive"), (1, None)):
                env = dict(OMP_NUM_THREADS=str(n), OMP_WAIT_POLICY=policy, CUDA_VISIBLE_DEVICES="")
                product, rollout = fresh(small_work, env, repeats=repeats)
                rows.append({"busy processes": beside, "threads": n, "OMP_WAIT_POLICY": policy or "unset",
                             "product ms": 10 * product, "step ms": 1e3 / 16 * rollout})
        finally:
            for process in busy:
                process.kill()
    return rows

def floor(shape, model, chains, prompt, new, repeats):
    """What a step cannot do without, reading weights, keys and values once, at the bandwidth of a copy."""
    if not CUDA:
        return [{"floor": "needs a CUDA GPU"}]
    net, tokenizer = case = build(shape, model)
    c, big = net.config, torch.empty(2, 2**29, dtype=torch.bfloat16, device="cuda")  # twice 1 GiB
    D = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    weights = sum(p.numel() for p in net.parameters()) - (not c.tie_word_embeddings) * c.vocab_size * c.hidden_size
    cache = chains * (prompt + new / 2) * 2 * c.num_hidden_layers * c.num_key_value_heads * D  # on average
    t = take_turns({"copy": lambda: big[0].copy_(big[1]),
                    **{n: sampler(case, "dirichlet", chains, prompt, n) for n in (new, 1)}}, repeats)
    bandwidth, step = 2 * big[0].nbytes / median(t["copy"]), (median(t[new]) - median(t[1])) / (new - 1)
    least = 2 * (weights + cache) / bandwidth  # seconds, two bytes a number
    return [{"weights GB": 2e-9 * weights, "cache GB": 2e-9 * cache, "bandwidth GB/s": bandwidth / 1e9,
             "floor ms": 1e3 * least, "step ms": 1e3 * step, "share %": 100 * least / step}]

# ------------------------------------------------------------------------------------------------ the command line

SECTIONS = {f.__name__: f for f in (decode, mixing, growth, training, memory, threads, floor)}

def table(rows):
    """Rows (dicts of the same keys) in columns."""
    show = lambda v: (f"{v:,.3g}" if abs(v) < 1e3 else f"{v:,.0f}") if isinstance(v, float) else str(v)
    text = [list(rows[0])] + [[show(v) for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*text)]
    return "\n".join("  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths))) for line in text)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--shape", choices=list(SHAPES)[:-1], default="qwen2.5-1.5b" if CUDA else "small")
    parser.add_argument("--model", help="a Hugging Face name or folder instead of random weights")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, with commas")
    for name, default in dict(chains=10, prompt=64, new=48, repeats=5).items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"[{default}]")
    parser.add_argument("--json", type=Path, help="keep all numbers in this file")
    args = parser.parse_args()
    only, sizes = args.only.split(","), {n: getattr(args, n) for n in ("chains", "prompt", "new", "repeats")}
    if unknown := set(only) - set(SECTIONS):
        fail(f"--only {unknown.pop()!r}: allowed are {', '.join(SECTIONS)}")
    for name, value in sizes.items():
        if value < 1 + (name == "new"):
            fail(f"--{name} {value}: allowed is {1 + (name == 'new')} or more")
    if args.json and not args.json.resolve().parent.is_dir():
        fail(f"--json {args.json}: no such folder")
    git = subprocess.run(["git", "-C", HERE, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    about = dict(date=f"{datetime.datetime.now():%Y-%m-%d %H:%M}", commit=git.stdout.strip() or "unknown",
                 device=torch.cuda.get_device_name() if CUDA else f"CPU, {os.cpu_count()} cores",
                 dtype="bfloat16" if CUDA else "float32", threads=torch.get_num_threads(), torch=torch.__version__,
                 transformers=transformers.__version__, model=args.model or args.shape, **sizes)
    command = " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    print(command, "  ".join(f"{n}={v}" for n, v in about.items()), sep="\n", flush=True)
    kept = about | dict(command=command)
    for name in filter(only.__contains__, SECTIONS):
        paper = dict(prompt=1024, new=1024) if name == "training" and CUDA else {}
        kept[name] = fresh(SECTIONS[name], shape=args.shape, model=args.model, **sizes | paper)
        print(f"\n{name}: {SECTIONS[name].__doc__}\n{table(kept[name])}", flush=True)
        if args.json:
            args.json.write_text(json.dumps(kept, indent=1))

if __name__ == "__main__":
    main()
