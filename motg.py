"""motg: *Learning to Reason with Mixture of Tokens* (MoT-G, arXiv 2509.21482), the whole method in one file.

A language model that reasons writes one sampled token a step and forgets the rest of its distribution. MoT-G feeds
back a weighted *mixture* of k token embeddings at each thinking step, closes the thought with `</think>`, answers in
ordinary tokens, and is trained by GRPO on those mixture trajectories with rewards that a program can verify.
    logits z --softmax(z/T)--> p --k candidates v--> weights w --sum_i w_i E[v_i]--> next input       (thinking)
                               `--one token y: the same with a one-hot w-----------> next input       (answering)

Thirteen sections follow the data; where they depart from the paper and its code, and why, is in README.md.
Shapes: B rows, one a (prompt, chain); G chains; P prompt length; T new tokens; k candidates; V vocabulary; d width; L slots
"""
import argparse, ast, collections, contextlib, copy, difflib, fcntl, functools, hashlib, inspect, json
import math, multiprocessing, os, pickle, random, re, shutil, signal, struct, subprocess, sys, time, types
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

# Waiting OpenMP threads spin by default; beside another busy process that makes small matrix products 50 times slower.
# The runtime reads this once, so it is set before torch is imported. A user's own setting stands.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
import reasoning_gym
import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm
transformers.utils.logging.disable_progress_bar()
INF, TAG, recompute = math.inf, "</think>", functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)

class UserError(ValueError):
    """A mistake of the caller's in one line: what was wrong, what is allowed. The program exits with `status`."""
    status = 2
RunError = type("RunError", (UserError,), dict(status=1))  # what a run cannot go on from; all that it saved is intact
def require(ok, message):
    """Raises UserError unless `ok`."""
    if not ok: raise UserError(message)

@contextlib.contextmanager
def refusing(message, error=UserError):
    """Turns any exception inside into one line: `message` and what the exception said."""
    try: yield
    except Exception as e: raise error(f"{message} ({(str(e).strip() or repr(e)).splitlines()[0][:150]})") from None
# ------------------------------------------------------------------------------------------------ 1. settings
# One setting: its --help group, default and text, and what is allowed: (least, most), inclusive, or words.
opt = lambda group, default, help, allowed=None: field(default=default, metadata=dict(group=group, help=help, allowed=allowed))

@dataclass
class Config:
    """Every setting, flat; each is a flag. The defaults are the paper's recipe where the text says nothing else."""
    model: str = opt("run", "Qwen/Qwen2.5-1.5B-Instruct", "Hugging Face name or local folder (--smoke makes its own)")
    task: str = opt("run", "graph_color", "Reasoning-Gym task, several with commas, or 'all' for the paper's twelve")
    method: str = opt("run", "dirichlet", "preset of the mixture settings; eval takes several with commas")
    seed: int = opt("run", 0, "of the problems drawn and of the sampling", (0, 10**9))
    out: str = opt("run", "", "the run's folder (default runs/<task>-<method>-<seed>)")
    resume: bool = opt("run", False, "continue the run in --out")
    smoke: bool = opt("run", False, "a small model made on the spot and small settings, on a CPU; your flags still win")
    sampling: str = opt("mixture", "top-k", "candidates", "top-k nucleus min-p without-replacement with-replacement")
    aggregation: str = opt("mixture", "dirichlet", "their weights", "probability dirichlet uniform max posterior gumbel")
    k: int = opt("mixture", 2, "candidates a step (paper: 2)", (1, INF))
    temperature: float = opt("mixture", 0.9, "T in p = softmax(z/T), everywhere (paper: 0.9)", (1e-6, INF))
    top_p: float = opt("mixture", 0.95, "nucleus: the mass that the candidates reach", (1e-6, 1))
    min_p: float = opt("mixture", 0.05, "min-p: the share of the largest p that a candidate needs", (1e-6, 1))
    concentration: float = opt("mixture", 1.0, "dirichlet: c in w ~ Dir(c p^) (paper's code: 1)", (1e-6, INF))
    moi_beta: float = opt("mixture", 1.0, "posterior: beta of Mixture of Inputs", (0, INF))
    gumbel_tau: float = opt("mixture", 1.0, "gumbel: tau of the softmax", (1e-6, INF))
    end: str = opt("mixture", "representative", "what ends a thought", "representative most-likely entropy steps")
    end_entropy: float = opt("mixture", 0.1, "end=entropy: H(p) below this, in nats, ...", (0, INF))
    end_patience: int = opt("mixture", 256, "... for this many steps in a row (Soft Thinking: 256)", (1, INF))
    end_steps: int = opt("mixture", 128, "end=steps: thinking steps before the tag is forced", (1, INF))
    logprob: str = opt("mixture", "representative", "what of a step GRPO scores", "representative weighted exact")
    chains: int = opt("GRPO", 10, "G, chains a prompt (paper: 10, and 5 for half the trajectories)", (1, INF))
    prompts_per_step: int = opt("GRPO", 1, "prompts a step (paper: 1)", (1, INF))
    accumulate: int = opt("GRPO", 4, "steps an optimiser update (paper: 4)", (1, INF))
    steps: int = opt("GRPO", 1000, "steps, each a rollout (paper: 1,000)", (0, INF))
    max_prompt_tokens: int = opt("GRPO", 1024, "longer prompts are skipped and counted (paper: 1,024)", (1, INF))
    max_new_tokens: int = opt("GRPO", 1024, "thought and answer together (paper: 1,024)", (1, INF))
    lr: float = opt("GRPO", 5e-6, "AdamW's rate (paper: 5e-6, on bf16 weights; here they are fp32)", (0, INF))
    warmup: float = opt("GRPO", 0.18, "share of the updates that warm the rate up (paper: 0.18)", (0, 1))
    grad_clip: float = opt("GRPO", 0.1, "largest gradient norm (paper: 0.1)", (1e-6, INF))
    kl_beta: float = opt("GRPO", 0.1, "weight of the KL to the reference, 0 keeps none (paper: 0.1)", (0, INF))
    clip: float = opt("GRPO", 0.2, "PPO's clip of the ratio (paper: 0.2)", (0, 1))
    loss_average: str = opt("GRPO", "chain", "chain: paper's code; token: DAPO; constant: Dr. GRPO", "chain token constant")
    micro_tokens: int = opt("GRPO", 4096, "padded tokens a micro-batch; lower it when memory runs out", (1, INF))
    checkpoint_activations: bool = opt("GRPO", False, "recompute layers in the backward pass: less memory, slower")
    eval_problems: int = opt("evaluation", 100, "distinct test problems a task (paper: 100)", (1, INF))
    eval_every: int = opt("evaluation", 0, "steps between evaluations; 0: only before and after", (0, INF))
    save_every: int = opt("evaluation", 100, "steps between checkpoints; the last step always has one", (1, INF))

# A named method is only settings, where not Config's defaults; soft-thinking and mixture-of-inputs do not train in theirs.
METHODS = {
    "single": dict(sampling="without-replacement", aggregation="probability", k=1), "dirichlet": {},
    "different-tokens": dict(sampling="without-replacement", aggregation="probability", logprob="weighted"),
    "soft-thinking": dict(aggregation="probability"), "mixture-of-inputs": dict(aggregation="posterior"),
    "multiplex": dict(sampling="with-replacement", aggregation="probability", logprob="exact"),
    "soft-grpo": dict(aggregation="gumbel", logprob="exact")}
SMOKE = dict(model="", task="chain_sum", chains=8, prompts_per_step=16, accumulate=1, steps=80, max_prompt_tokens=64,
             max_new_tokens=40, lr=3e-5, micro_tokens=1024, grad_clip=1.0, kl_beta=0.01, eval_problems=256, save_every=40)
DRAWN = ("without-replacement", "with-replacement")  # rules whose candidates are drawn; the first is a sample from p

def check_name(what, name, known):
    """Raises UserError, with the likely spelling or all that is allowed, when `name` is not among `known`."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(known)}"
    require(name in known, f"unknown {what} {name!r}; {hint}")

def make_config(method="dirichlet", **overrides) -> Config:
    """Defaults, then --smoke's, then the method's, then `overrides`; all settings are checked here. Raises UserError."""
    check_name("method", method, METHODS)
    for name in overrides: check_name("setting", name, Config.__annotations__)
    cfg = Config(**(SMOKE if overrides.get("smoke") else {}) | METHODS[method] | {"method": method} | overrides)
    for f in fields(cfg):
        value, allowed, kind = getattr(cfg, f.name), f.metadata["allowed"], type(f.default)
        if kind is float and type(value) is int: setattr(cfg, f.name, value := float(value))
        require(type(value) is kind, f"{f.name} = {value!r}: expected {kind.__name__}")
        if kind is str and allowed: check_name(f.name, value, allowed.split())
        elif allowed: require(allowed[0] <= value <= allowed[1] and value < INF,
                              f"{f.name} = {value}: allowed is a finite number, {allowed[0]} to {allowed[1]}")
    for name in task_names(cfg): check_name("task", name, sorted(reasoning_gym.factory.DATASETS))
    density = cfg.sampling in DRAWN or cfg.sampling == "top-k" and cfg.aggregation in ("dirichlet", "gumbel")
    require(cfg.logprob != "exact" or density and cfg.aggregation != "max", f"logprob 'exact' is undefined for {cfg.sampling}"
            f" + {cfg.aggregation}; allowed: top-k + dirichlet or gumbel, or {' or '.join(DRAWN)} with anything but max")
    require(cfg.end != "steps" or cfg.end_steps < cfg.max_new_tokens, "end_steps: allowed is less than max_new_tokens")
    return cfg
# ------------------------------------------------------------------------------------------------ 2. mixtures
# A step is k candidates `tokens` and k `log_weights`; a slot with log-weight -inf is empty. An ordinary token is a
# step with one filled slot, so that answers, the single-token baseline and the end tag need no second code path. The
# representative is the one of the candidates that a reader sees.
Mixture = collections.namedtuple("Mixture", "tokens log_weights representative")  # (B, k), (B, k) float32, (B,)

def token_distribution(logits, temperature):
    """log p = log softmax(z / T) in float32, shape of `logits`. Sampler, scorer, reference and probes all call this."""
    return F.log_softmax(logits.float() / temperature, dim=-1)

entropy_of = lambda log_p: -(log_p.exp() * log_p.clamp(min=-99)).sum(-1)  # H(p) in nats, (..., V) -> (...)
def draw(log_p, generator=None, block=128):
    """One token a row from p, (B, V) -> (B,): inverse CDF in float64, so no tail is cut off, in two stages (a block of
    the vocabulary, then a token of it), so sums stay short. Noise for every token (Gumbel-max) costs ten times it."""
    p = F.pad(log_p.exp(), (0, -log_p.shape[1] % block)).unflatten(1, (-1, block))  # (B, V/128, 128)
    u = torch.rand(len(p), 2, dtype=torch.float64, device=p.device, generator=generator)  # (B, 2)
    cdf = p.sum(-1).double().cumsum(-1)  # (B, V/128)
    b = torch.searchsorted(cdf, u[:, :1] * cdf[:, -1:], right=True).clamp(max=cdf.shape[1] - 1)  # (B, 1)
    cdf = p.gather(1, b[..., None].expand(-1, -1, block)).squeeze(1).double().cumsum(-1)  # (B, 128)
    i = torch.searchsorted(cdf, u[:, 1:] * cdf[:, -1:], right=True)  # (B, 1)
    return (b * block + i).squeeze(1).clamp(max=log_p.shape[1] - 1)

# p without a token (...), renormalised in log space, since 1 - p(token) cancels where p is sharp.
strike = lambda log_p, token: log_p.scatter(-1, token[..., None], -INF).log_softmax(-1)  # (..., V)
gumbel_noise = lambda like, g=None: -torch.empty_like(like).exponential_(generator=g).log()  # argmax(log w + it) ~ Cat(w)
# Dirichlet's parameters c p^, p^ kept above 1e-5: a drawn log-weight is of size 1/p^, too large a one loses its density.
dirichlet_alpha = lambda log_hat, cfg: cfg.concentration * log_hat.exp().clamp(min=1e-5)  # (..., k)

def candidates(log_p, cfg, generator=None):
    """The sampling rule: tokens (B, k) and their log p (B, k), -inf where the rule leaves a slot empty."""
    if cfg.sampling in DRAWN:
        drawn, rest = [draw(log_p, generator)], log_p
        while len(drawn) < cfg.k:  # without replacement: draw, strike out, draw again (Gumbel top-k's law, Plackett-Luce)
            rest = strike(rest, drawn[-1]) if cfg.sampling == "without-replacement" else rest
            drawn.append(draw(rest, generator))
        return (tokens := torch.stack(drawn, dim=-1)), log_p.gather(-1, tokens)
    top, tokens = log_p.topk(cfg.k)  # (B, k), descending
    if cfg.sampling == "nucleus":  # a token stays while the mass *before* it is below top_p
        top = top.masked_fill(top.exp().cumsum(-1) - top.exp() >= cfg.top_p, -INF)
    if cfg.sampling == "min-p": top = top.masked_fill(top < top[:, :1] + math.log(cfg.min_p), -INF)
    return tokens, top

def sample_mixture(logits, cfg, generator=None, log_p=None) -> Mixture:
    """One thinking step from logits (B, V), or from log p where it is at hand. Raises UserError for a k above V."""
    log_p = token_distribution(logits, cfg.temperature) if log_p is None else log_p
    require(cfg.k <= log_p.shape[1], f"k = {cfg.k}: allowed is 1 to the vocabulary's {log_p.shape[1]}")
    tokens, log_hat = candidates(log_p, cfg, generator)  # (B, k) both
    log_w = log_hat = log_hat.log_softmax(-1)  # log p^: `probability`; also `max`, for a reader: it has no weights
    if cfg.aggregation == "uniform": log_w = torch.where(log_hat == -INF, -INF, 0.0).log_softmax(-1)
    elif cfg.aggregation == "gumbel":  # SofT-GRPO
        log_w = ((log_hat + gumbel_noise(log_hat, generator)) / cfg.gumbel_tau).log_softmax(-1)
    elif cfg.aggregation == "dirichlet":
        # Mean p^. As c grows, w -> p^ (`probability`); as c -> 0, w becomes one candidate drawn from p^. In log space, log
        # Gamma(a) = log Gamma(a + 1) + log(U) / a for the variates, no a > 0 is too small; -log U is exponential.
        a = dirichlet_alpha(log_hat, cfg)  # (B, k)
        log_gamma = torch._standard_gamma(a + 1, generator).log() - torch.empty_like(a).exponential_(generator=generator) / a
        log_w = log_gamma.masked_fill(log_hat == -INF, -INF).log_softmax(-1)  # (B, k)
    slot = (log_w + gumbel_noise(log_w, generator)).argmax(-1)  # (B,) the representative's: a draw from Cat(w)
    if cfg.sampling in DRAWN: slot = torch.zeros_like(slot)  # there, the first draw
    if cfg.aggregation == "posterior":  # Mixture of Inputs: the token drawn is evidence, weighed against p^ by H in [0, 1]
        H, y = entropy_of(log_p)[:, None] / math.log(max(log_p.shape[1], 2)), F.one_hot(slot, cfg.k)
        log_w = ((H * log_hat.exp() + (cfg.moi_beta + 1 - H) * y) / (cfg.moi_beta + 1)).log()
    return Mixture(tokens, log_w, tokens.gather(-1, slot[:, None]).squeeze(-1))

def mixture_embedding(table, tokens, log_weights, aggregation="probability"):
    """e = sum_i w_i E[v_i], summed in float32: table (V, d), the rest (..., k) -> (..., d). `max`: element-wise."""
    rows = F.embedding(tokens, table)  # (..., k, d)
    if aggregation == "max": return rows.masked_fill((log_weights == -INF)[..., None], -INF).amax(-2)
    return (log_weights.exp()[..., None] * rows).sum(-2).to(table.dtype)

def mixture_logprob(logits, tokens, log_weights, representative, cfg, log_p=None):
    """Log-prob (...) of recorded steps (..., k) under the model that gave `logits` (..., V), as `cfg.logprob` says.
    A step with one filled slot is an ordinary token: log p(token), always."""
    log_p = token_distribution(logits, cfg.temperature) if log_p is None else log_p
    empty = log_weights == -INF  # (..., k)
    n, log_w, log_pv = (~empty).sum(-1), log_weights.masked_fill(empty, 0.0), log_p.gather(-1, tokens)  # (...); (..., k)
    score = token = log_pv.masked_fill(empty, 0.0).sum(-1)  # (...) an ordinary token's; also exact with replacement
    if cfg.logprob == "representative": score = log_p.gather(-1, representative[..., None]).squeeze(-1)
    elif cfg.logprob == "weighted":  # weights are data: a gradient through them could push a chosen token *down*
        score = (log_weights.detach().exp() * log_pv.masked_fill(empty, 0.0)).sum(-1)
    elif cfg.sampling == "without-replacement":  # Plackett-Luce: sum_j log p(v_j) - log(1 - sum_{i<j} p(v_i))
        score, rest = torch.zeros_like(token), log_p
        for j in range(tokens.shape[-1]):
            score = score + rest.gather(-1, tokens[..., j : j + 1]).masked_fill(empty[..., j : j + 1], 0.0).squeeze(-1)
            rest = strike(rest, tokens[..., j])
    elif cfg.sampling != "with-replacement": score = torch.zeros_like(token)  # the k largest: nothing was drawn
    if cfg.logprob == "exact":  # and the density over the simplex of weights that were drawn
        log_hat = log_pv.masked_fill(empty, -INF).log_softmax(-1).masked_fill(empty, 0.0)  # (..., k)
        if cfg.aggregation == "dirichlet":
            a = dirichlet_alpha(log_hat, cfg) * ~empty  # (..., k)
            score = score + ((a - 1) * log_w - torch.lgamma(a + empty)).sum(-1) + torch.lgamma(a.sum(-1))
        elif cfg.aggregation == "gumbel":  # the Concrete density, Maddison et al. 2017, eq. 10
            tau, x = cfg.gumbel_tau, log_hat - cfg.gumbel_tau * log_w  # (..., k)
            score = score + torch.lgamma(n.float()) + (n - 1) * math.log(tau) + ((x - log_w) * ~empty).sum(-1)
            score = score - n * x.masked_fill(empty, -INF).logsumexp(-1)
    return torch.where(n == 1, token, score)
# ------------------------------------------------------------------------------------------------ 3. the end of a thought
# `</think>` is looked for in the text, not among the ids: for Qwen2.5 it is three tokens, and the last may swallow what
# follows (`>\n` is one token). So as not to decode every row at every step, a row keeps a number, how many of the tag's
# eight characters its text ends with, and a table says what each token makes of it. Rules that end a thought:
# `representative`, the text completes the tag; `most-likely`, it would with the arg-max token; `entropy` (low for
# end_patience steps) and `steps` write the tag themselves: forced tokens, which nobody chose and which carry no loss.
@functools.lru_cache(maxsize=8)
def tag_table(tokenizer, vocabulary):
    """(8, V): how many characters of the tag are matched after token v, from s matched before; 8 completes it."""
    table = torch.zeros(len(TAG), vocabulary, dtype=torch.long)
    ids = [[i] for i in range(min(len(tokenizer), vocabulary))]
    for token, text in enumerate(tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)):
        if "<" in text or ">" in text or text in TAG:  # no other text can begin or lengthen a match
            for s in range(len(TAG)):
                seen, lengths = TAG[:s] + text, range(len(TAG) - 1, -1, -1)
                table[s, token] = len(TAG) if TAG in seen else next(n for n in lengths if seen.endswith(TAG[:n]))
    return table
# ------------------------------------------------------------------------------------------------ 4. rollouts
# Token j of a row sits in cache slot j: prompts are padded on the right, and each row's own tokens then overwrite its
# padding, so "slot <= position" is the only mask, for prompts of any lengths. A decoding step works on preallocated
# tensors and never asks the GPU for a value: CUDA records it once and replays it as one graph.
@dataclass
class Rollout:
    """B trajectories, those of a prompt adjacent. Ids, never embeddings: each model looks them up in its own table."""
    prompt_ids: torch.Tensor; prompt_mask: torch.Tensor  # (B, P) left-padded
    tokens: torch.Tensor; log_weights: torch.Tensor  # (B, T, k)
    representative: torch.Tensor; thinking: torch.Tensor  # (B, T) what a reader sees; steps of the thought and its tag
    mask: torch.Tensor; sampled: torch.Tensor  # (B, T) real steps; those the policy chose, so without forced tags
    eos: torch.Tensor; logprob: torch.Tensor; entropy: torch.Tensor  # (B, T) the row's end; as sampled; of p, in nats
    texts: list[str]  # thought, tag and answer as read, without the EOS token
    def select(self, rows):
        """The given rows (a LongTensor), padding trimmed to the longest of them; texts are left behind."""
        P, T = (max(1, int(m[rows].sum(1).max())) for m in (self.prompt_mask, self.mask))
        cut = {n: v[rows][:, -P:] if "prompt" in n else v[rows][:, :T] for n, v in vars(self).items() if n != "texts"}
        return Rollout(texts=[], **cut)

def grouped_attention(module, q, k, v, mask, scaling=None, **_):
    """softmax(q k^T) v, (B, heads, Q, D) -> (B, Q, heads, D). In a step, query heads that share keys are rows of one head."""
    B, H, Q, D = q.shape
    if Q == 1: q = q.reshape(B, k.shape[1], -1, D)
    else: k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))  # which every fused kernel takes
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=scaling, is_causal=mask is None)
    return out.reshape(B, H, Q, D).transpose(1, 2), None
transformers.AttentionInterface.register("motg", grouped_attention)

def read(model, embeds, position, mask, update, **more):
    """The model below its head on embeds (B, Q, d). Each layer attends to what `update(its keys, its values, layer)` gives."""
    cache = types.SimpleNamespace(update=lambda k, v, layer, *_, **__: update(k, v, layer))
    return model.base_model(None, mask, position, cache, embeds, use_cache=True, **more)  # by place: its name has changed

def read_prompts(model, ids):
    """Prompts (n, P), padding last -> hidden states (n, P, d), and layer -> keys and values, for their chains to share."""
    embeds, slots, kept = model.get_input_embeddings()(ids), torch.arange(ids.shape[1], device=ids.device), {}
    out = read(model, embeds, slots[None], None, lambda k, v, layer: kept.setdefault(layer, (k, v)))
    return out.last_hidden_state, kept

class Decoder:
    """What decoding B rows keeps from step to step, the KV cache included, for the next rollout of its shape to reuse."""
    def __init__(self, model, tokenizer, cfg, rows, length, generator):
        self.model, self.cfg, self.rows, self.length, self.generator = model, replace(cfg), rows, length, generator
        self.table, self.head = model.get_input_embeddings().weight, model.get_output_embeddings()  # (V, d)
        self.layers, self.record, self.graphs, self.logits, self.cuda = {}, {}, {}, None, model.device.type == "cuda"
        zeros = functools.partial(torch.zeros, dtype=torch.long, device=model.device)
        self.tag_table = tag_table(tokenizer, len(self.table)).to(model.device)  # (8, V)
        eos = getattr(model.generation_config, "eos_token_id", None)  # every id that ends an answer: one, a list, or none
        eos = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None}
        require(eos, "neither the tokenizer nor the generation config names an EOS token; one is needed")
        self.tag_ids, self.eos_ids = (torch.tensor(i, device=model.device) for i in (
            tokenizer(TAG, add_special_tokens=False)["input_ids"], sorted(eos)))
        self.row, slots = (torch.arange(n, device=model.device) for n in (rows, cfg.k))  # (B,) where a row is recorded
        self.index, self.only0 = self.row, torch.where(slots == 0, 0.0, -INF)  # (B,) rows of the cache; (k,) a token's log w
        self.slot0, self.t, (self.position, self.matched, self.streak, self.forced) = slots == 0, zeros(1), zeros(4, rows)
        self.thinking, self.live = zeros(2, rows, dtype=torch.bool)
    def update(self, k, v, layer):
        """Writes a step's keys and values (B, heads, 1, D) to each row's position; returns all that are visible."""
        for cache, new in zip(self.layers[layer], (k, v)):
            cache[self.index, :, self.position] = new[:, :, 0]
        return [cache[:, :, : self.visible] for cache in self.layers[layer]]
    def start(self, ids):
        """Read each prompt once, share its keys out to its chains; logits (B, V) for its last token alone."""
        n, G, self.longest = len(ids), self.rows // len(ids), max(map(len, ids))
        padded, last = (torch.tensor(x, device=self.table.device) for x in (
            [i + [0] * (self.longest - len(i)) for i in ids], [len(i) - 1 for i in ids]))  # (n, P), (n,)
        hidden, kept = read_prompts(self.model, padded)
        for layer, pair in kept.items():
            if layer not in self.layers:  # zeros: what a mask hides must still be finite
                self.layers[layer] = [x.new_zeros(self.rows, x.shape[1], self.length, x.shape[3]) for x in pair]
            for cache, x in zip(self.layers[layer], pair): cache[:, :, : self.longest] = x.repeat_interleave(G, dim=0)
        logits = self.head(hidden[torch.arange(n, device=last.device), last]).repeat_interleave(G, dim=0)  # (B, V)
        self.logits = logits if self.logits is None else self.logits.copy_(logits)
        self.position.copy_((last + 1).repeat_interleave(G))
        for state in (self.t, self.matched, self.streak, self.forced, *self.record.values()): state.zero_()
        self.thinking.fill_(True), self.live.fill_(True)
    def choose(self):
        """Sections 2 and 3 in one step: from the logits to the next input (B, 1, d), recorded."""
        cfg, thinking, live = self.cfg, self.thinking, self.live
        log_p = token_distribution(self.logits, cfg.temperature)  # (B, V)
        m, entropy = sample_mixture(self.logits, cfg, self.generator, log_p), entropy_of(log_p)  # (B,)
        token = m.tokens[:, 0] if cfg.sampling in DRAWN else draw(log_p, self.generator)  # (B,) an ordinary sample
        y, force = torch.where(thinking, m.representative, token), torch.zeros_like(thinking)  # force: a rule writes the tag
        if cfg.end == "most-likely":
            best = log_p.argmax(-1)  # (B,)
            y = torch.where(thinking & (self.tag_table[self.matched, best] == len(TAG)), best, y)
        elif cfg.end != "representative":  # `streak` steps in a row were of the kind that ends a thought
            enough = cfg.end_patience if cfg.end == "entropy" else cfg.end_steps
            force = (self.forced > 0) | (thinking & (self.streak >= enough))
            self.streak.add_(1).mul_(entropy < cfg.end_entropy if cfg.end == "entropy" else 1)
            y = torch.where(force, self.tag_ids[self.forced], y)
            self.forced.copy_((self.forced + 1) * force % len(self.tag_ids))
        y = y * live
        matched = self.tag_table[self.matched, y]  # (B,)
        closes = thinking & (matched == len(TAG)) & ((y == best) if cfg.end == "most-likely" else True)
        ends = (y[:, None] == self.eos_ids).any(-1) & live & ~force
        one_hot = (~thinking | closes | ends | force | ~live)[:, None]  # (B, 1)
        tokens = torch.where(one_hot, y[:, None] * self.slot0, m.tokens)  # (B, k)
        log_w = torch.where(one_hot, self.only0, m.log_weights)  # (B, k)
        score = mixture_logprob(self.logits, tokens, log_w, y, cfg, log_p)  # (B,)
        for name, value in dict(
                tokens=tokens, log_weights=log_w, representative=y, mask=live, sampled=live & ~force, eos=ends,
                thinking=thinking & live, entropy=entropy * live, logprob=score.masked_fill(force | ~live, 0.0)).items():
            if name not in self.record:
                self.record[name] = value.new_zeros(self.rows, cfg.max_new_tokens, *value.shape[1:])
            if self.row is self.index: self.record[name].index_copy_(1, self.t, value[:, None])  # no row was dropped: faster
            else: self.record[name][self.row, self.t] = value
        thinking.logical_and_(~closes), live.logical_and_(~ends)
        self.matched.copy_(matched % len(TAG)), self.t.add_(1)
        return mixture_embedding(self.table, tokens, log_w, cfg.aggregation)[:, None]
    def step(self):
        """Choose, feed, read the next logits, on tensors that stay where they are."""
        mask = (torch.arange(self.visible, device=self.t.device) <= self.position[:, None])[:, None, None]  # (B, 1, 1, L)
        hidden = read(self.model, self.choose(), self.position[:, None], mask, self.update).last_hidden_state  # (B, 1, d)
        self.logits.copy_(self.head(hidden[:, 0])), self.position.add_(1)
    def drop_ended(self):
        """Go on with the live rows alone. Tensors change shape, so never where graphs are replayed."""
        self.layers = {i: [cache[self.live] for cache in pair] for i, pair in self.layers.items()}
        for name in ("row", "position", "matched", "streak", "forced", "thinking", "logits", "live"):  # `live` last
            setattr(self, name, getattr(self, name)[self.live])
        self.index = torch.arange(len(self.row), device=self.row.device)
    def run(self, t):
        """Step t. On CUDA steps see multiples of 256 slots; the second of a kind is recorded, and replayed from then on."""
        self.visible = min(self.length, -(-(self.longest + t + 1) // 256) * 256) if self.cuda else self.longest + t + 1
        if (graph := self.graphs.get(self.visible)) is None or not self.cuda:
            self.graphs[self.visible] = "warm"
            return self.step()
        if graph == "warm":
            self.graphs[self.visible] = graph = torch.cuda.CUDAGraph()
            if self.generator is not None: graph.register_generator_state(self.generator)
            with torch.cuda.graph(graph, pool=self.graphs.setdefault("pool", torch.cuda.graph_pool_handle())): self.step()
        graph.replay()

def rollout(model, tokenizer, prompts: list[str], cfg, generator=None) -> Rollout:
    """`cfg.chains` trajectories a prompt. Prompts are templated text ending in the opened think tag: every row starts
    thinking. Raises UserError for an empty prompt or a k above the vocabulary."""
    ids = [tokenizer(p, add_special_tokens=False)["input_ids"] for p in prompts]
    require(ids and all(ids), "rollout needs prompts of at least one token each")
    cuda, P, rows = model.device.type == "cuda", max(map(len, ids)), len(ids) * cfg.chains
    length, d = (max(P, cfg.max_prompt_tokens) if cuda else P) + cfg.max_new_tokens, getattr(model, "decoder", None)
    if d is None or not cuda or (d.cfg, d.rows, d.generator) != (cfg, rows, generator) or d.length < length:
        d = model.decoder = Decoder(model, tokenizer, cfg, rows, length, generator)
    with torch.no_grad() if cuda else torch.inference_mode():  # where no graph is replayed, the latter is a tenth faster
        d.start(ids)
        for t in range(cfg.max_new_tokens):
            d.run(t)
            if cuda and (t + 1) % 16: continue  # to look is to wait for the GPU
            if not (live := int(d.live.sum())): break
            if not cuda and live <= 0.75 * len(d.live): d.drop_ended()
    r = {n: v[:, : int(d.record["mask"].sum(1).max())].clone() for n, v in d.record.items()}
    r["log_weights"].masked_fill_(~r["mask"][..., None] & ~d.slot0, -INF)  # padding is one-hot, dropped rows' too
    texts = [tokenizer.decode(y[keep], clean_up_tokenization_spaces=False)
             for y, keep in zip(r["representative"].cpu(), (r["mask"] & ~r["eos"]).cpu())]
    left = torch.tensor([[-1] * (P - len(i)) + i for i in ids], device=model.device).repeat_interleave(cfg.chains, dim=0)
    return Rollout(prompt_ids=left.clamp(min=0), prompt_mask=left >= 0, texts=texts, **r)
# ------------------------------------------------------------------------------------------------ 5. log-probabilities
# The same numbers as while sampling, all steps of a row in parallel and with gradient. What would cost memory is the
# logits, (B, T, V) in float32: they exist a few positions at a time, and again in the backward pass.
def completion_hidden(model, r, cfg, every_layer=False):
    """Hidden states (layers, B, T, d) that predicted each completion step, of the last layer alone or of all, embeddings
    first. Two passes: each distinct prompt, then, behind them, all chains; a prompt's gradient arrives through its keys."""
    table, P, T = model.get_input_embeddings().weight, r.prompt_ids.shape[1], r.mask.shape[1]
    prompts, rows = r.prompt_ids.masked_fill(~r.prompt_mask.bool(), -1).unique(dim=0, return_inverse=True)  # (n, P), (B,)
    length, slots = (prompts >= 0).sum(1, keepdim=True), torch.arange(P + T, device=table.device)  # (n, 1), (P + T,)
    _, kept = read_prompts(model, prompts.gather(1, (slots[:P] + P - length).clamp(max=P - 1)))  # moved left, padding last
    steps = mixture_embedding(table, r.tokens, r.log_weights, cfg.aggregation)  # (B, T, d)
    embeds = torch.cat([F.embedding(r.prompt_ids[:, -1:], table), steps[:, :-1]], dim=1)  # (B, T, d) what precedes each step
    before, own = length[rows] - 1, (slots >= P) & (slots <= P + slots[:T, None])  # (B, 1) earlier tokens; (T, P + T)
    mask = (slots < before)[:, None, None] | own  # (B, 1, T, P + T)
    behind = lambda k, v, layer: [torch.cat([prompt[rows], new], 2) for prompt, new in zip(kept[layer], (k, v))]
    out = read(model, embeds, before + slots[:T], mask, behind, output_hidden_states=every_layer)
    return torch.stack(out.hidden_states if every_layer else [out.last_hidden_state])

def rollout_logprobs(model, rollout, cfg, micro_batch=None):
    """Log-probs (B, T) of every sampled step under `model`, recomputed in parallel with gradient; 0 elsewhere."""
    if micro_batch:
        rows = torch.arange(len(rollout.mask), device=rollout.mask.device).split(micro_batch)
        parts = [rollout_logprobs(model, rollout.select(i), cfg) for i in rows]
        return torch.cat([F.pad(p, (0, rollout.mask.shape[1] - p.shape[1])) for p in parts])
    steps, head = rollout.sampled, model.get_output_embeddings()
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=model.device.type == "cuda"):
        hidden = completion_hidden(model, rollout, cfg)[0][steps]  # (N, d)
        size = max(1, 2 ** (26 if hidden.is_cuda else 24) // len(head.weight))  # steps with 256 or 64 MiB of float32 logits
        score_chunk = lambda h, *step: mixture_logprob(head(h), *step, cfg)
        score = functools.partial(recompute, score_chunk) if len(hidden) > size else score_chunk
        scores = torch.cat([score(*chunk) for chunk in zip(*(x.split(size) for x in (
            hidden, rollout.tokens[steps], rollout.log_weights[steps], rollout.representative[steps])))])  # (N,)
    return torch.zeros_like(rollout.logprob).masked_scatter(steps, scores)
# ------------------------------------------------------------------------------------------------ 6. GRPO
def group_advantages(rewards):
    """(prompts, G) -> (r - mean) / (std + 1e-4) within each group; a group of equal rewards gets zeros."""
    return (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + 1e-4)

def grpo_loss(logprob, old_logprob, ref_logprob, advantages, mask, cfg, chains=None, tokens=None):
    """PPO's clipped objective with group advantages A (B,), plus kl_beta times the k3 estimate of KL(policy || reference)
    (Schulman 2020); the rest (B, T). Returns the loss and its parts. `chains` and `tokens` count the *whole* batch that
    this is a micro-batch of: the gradient is the same however that one is cut.
        ratio = pi / pi_old       k3 = pi_ref / pi - log(pi_ref / pi) - 1  >= 0, unbiased
        loss  = -min(ratio A, clip(ratio, 1 - clip, 1 + clip) A) + kl_beta k3
    With one update a batch the ratio is 1 and the clip idles: the first term's gradient is REINFORCE's."""
    chains, tokens = chains or len(mask), tokens or max(1, int(mask.sum()))
    weights = mask / {"chain": mask.sum(1, keepdim=True).clamp(min=1) * chains, "token": tokens,
                      "constant": chains * cfg.max_new_tokens}[cfg.loss_average]  # (B, T)
    ratio, A = (logprob - old_logprob).exp(), advantages[:, None]  # (B, T), (B, 1)
    free, clipped = ratio * A, ratio.clamp(1 - cfg.clip, 1 + cfg.clip) * A
    log_r = torch.zeros_like(logprob) if ref_logprob is None else ref_logprob - logprob
    k3 = log_r.exp() - log_r - 1
    total = lambda x: (x.masked_fill(~mask.bool(), 0.0) * weights).sum()
    loss = total(cfg.kl_beta * k3 - torch.min(free, clipped))
    return loss, dict(loss=loss.item(), kl=total(k3).item(), clipped=total((free > clipped).float()).item())
# ------------------------------------------------------------------------------------------------ 7. tasks and rewards
# Reasoning-Gym seeds item i with seed + i: neighbouring seeds share 999 of 1,000 items, and a split by seed leaks. Here
# the question itself decides: by its hash, one in ten is a test question, whichever seed drew it.
PAPER_TASKS = ("acre", "graph_color", "family_relationships", "color_cube_rotation", "zebra_puzzles", "number_sequence",
               "countdown", "prime_factorization", "circuit_logic", "syllogism", "self_reference", "simple_integration")
task_names = lambda cfg: PAPER_TASKS if cfg.task == "all" else tuple(name.strip() for name in cfg.task.split(","))
SIZES = {"family_relationships": dict(min_family_size=8, max_family_size=12),  # the paper's; the rest have their defaults
         "chain_sum": dict(min_terms=3, max_terms=4, max_digits=1)}  # the smoke mode's
SYSTEM = "First think inside <think> and </think>, then give the final answer alone inside <answer> and </answer>."
FORMAT = re.compile(r"(?:(?!</think>|<answer>).)*</think>\s*<answer>(?:(?!</?answer>).)*</answer>\s*", re.DOTALL)
counts = collections.Counter()  # since it was cleared: prompts "too_long"; answers "scored", "timeout", "rejected", "raised"

@functools.lru_cache(maxsize=64)
def dataset(task, seed):
    """500 items of a task; always as many, since acre's items change with the size."""
    return reasoning_gym.create_dataset(task, size=500, seed=seed, **SIZES.get(task, {}))

def problems(task, cfg, tokenizer, stream, numbers, test, count):
    """Of a stream's items with these numbers, up to `count` distinct ones of the split asked for that are short enough,
    as (task, entry, prompt). Stream 0 holds the test problems; training's, 1 + seed, is at least 10^9 item seeds away."""
    base, found = 10**9 + stream * 10_000_019 % (3 * 10**9) if stream else 0, {}
    for i in numbers:
        random.seed(base + i)  # list_functions draws from the global generator
        entry = dataset(task, base + i // 500 * 500)[i % 500]
        if (int(hashlib.sha256(entry["question"].encode()).hexdigest(), 16) % 10 == 0) != test: continue
        messages = [dict(role="system", content=SYSTEM), dict(role="user", content=entry["question"])]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt += "" if prompt.rstrip().endswith("<think>") else "<think>\n"
        if len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) > cfg.max_prompt_tokens: counts["too_long"] += 1
        else: found.setdefault(entry["question"], (task, entry, prompt))
        if len(found) == count: break
    require(found, f"{task}: no prompt has at most max_prompt_tokens = {cfg.max_prompt_tokens} tokens")
    return list(found.values())

def train_problem(cfg, tokenizer, n):
    """Problem n of a run, from 50 item numbers of its own: a function of (seed, n), so nothing is to be remembered."""
    task = task_names(cfg)[n % len(task_names(cfg))]
    return problems(task, cfg, tokenizer, 1 + cfg.seed, range(50 * n, 50 * n + 50), False, 1)[0]
def test_problems(cfg, tokenizer):
    """Up to `eval_problems` distinct test problems a task; tasks with few problems have fewer."""
    n = cfg.eval_problems
    return [p for task in task_names(cfg) for p in problems(task, cfg, tokenizer, 0, range(60 * n), True, n)]

def extract_answer(text):
    """The last answer after the thought, inner newlines kept, or None: '1 + 1</think> <answer> 2 </answer>' -> '2'."""
    before, closed, _ = text.rpartition(TAG)[2].rpartition("</answer>")
    _, opened, answer = before.rpartition("<answer>")
    return answer.strip() if opened and closed else None
def rewards(problem, text):
    """The paper's reward and its parts. Partial scores count in it; `correct` is a score of exactly 1."""
    points, words = score(problem[0], extract_answer(text), problem[1]), len(text.split())
    well_formed = float(FORMAT.fullmatch(text) is not None)
    reward = 2 * points + 0.5 * well_formed + 0.5 * (200 <= words <= 400)
    return dict(reward=reward, score=points, format=well_formed, correct=float(points == 1.0))
# ------------------------------------------------------------------------------------------------ 8. contained scoring
# A model's text reaches a task's scorer thousands of times an hour. Nine scorers execute it (eval, or sympy's parse_expr,
# which is eval too) and others hang or die of it. So there are two walls: an allow-list for what those nine get to see, and
# for every scorer a process with limits, which the kernel ends when it is late, in the middle of C code too. A zygote
# imports reasoning_gym once, forks that server, and forks the next when one dies; with the trainer both end, by their pipe.
ARITHMETIC = "countdown puzzle24 polynomial_multiplication simple_integration intermediate_integration".split()
LITERALS = "binary_matrix n_queens spiral_matrix string_insertion".split()
FUNCTIONS = "sqrt exp log ln abs Abs sin cos tan cot sec csc asin acos atan sinh cosh tanh asinh acosh atanh Rational"
scorer = None  # the pipe to the server

def bits(node):
    """The allow-list: about how many bits a parsed answer comes to, if it is elementary arithmetic; else ValueError.
    `2*x**2 + C` -> 9, `9**9**9` -> 3.6 million; `().__class__` and `exit()` raise."""
    match node:
        case ast.Constant(int() | float() as number): return math.log2(abs(number) + 2)
        case ast.Name(name) if re.fullmatch(r"[A-Za-z]_?\d?|pi", name): return 1  # x, C, C_1, E
        case ast.UnaryOp(ast.UAdd() | ast.USub(), a): return bits(a)
        case ast.Call(ast.Name(name), values, []) if name in FUNCTIONS.split(): return sum(map(bits, values), 1)
        case ast.BinOp(a, ast.Add() | ast.Sub() | ast.Mult() | ast.Div(), b): return bits(a) + bits(b) + 1
        case ast.BinOp(a, ast.Pow(), b): return bits(a) * 2 ** min(bits(b), 20)
        case ast.Attribute(a, "Γ"): return 4 ** min(bits(a), 20)  # a factorial: a! <= a^a < 2^(a^2)
    raise ValueError("not arithmetic")

def admit(task, answer, entry):
    """May the scorer of `task` see `answer`? An exception is a no. What the dataset itself wrote, it always may."""
    if answer.strip() in (str(entry["answer"]).strip(), *entry["metadata"].get("valid_answers", ())): return True
    # nan, inf, 1e999: number_sorting finds a list of nans sorted. A word of the question's may be one of the answer's.
    pattern = r"\b(?:s?nan\d*|inf(?:inity)?)[ij]?\b|\b[\d_.]+e\+?0*(?:309|3[1-9]\d|[4-9]\d\d|\d{4,})\b"
    nonfinite = lambda *texts: set(re.findall(pattern, " ".join(texts).lower()))
    if nonfinite(answer, "".join(answer.split())) - nonfinite(entry["question"], str(entry["answer"])): return False
    if task in ARITHMETIC:  # ASCII, since Python folds look-alikes; no quotes, since sympy's functions evaluate strings
        text = re.fullmatch(r"[\w\s.,+*/()!-]*", answer, re.ASCII)[0].strip().replace("!", " .Γ")  # binds as `!` does
        return bits(ast.parse(text, mode="eval").body) < 10_000
    return task not in LITERALS or ast.literal_eval(answer) is not None

def worker(fd):
    """Zygote and server: a request in, sixteen bytes out. Runs in an interpreter of its own, without torch."""
    import contextlib, multiprocessing.connection, os, pickle, reasoning_gym, resource, signal, struct, sys
    sys.excepthook = lambda *_: os._exit(1)  # at once; tearing this interpreter down takes a second
    pipe, data = multiprocessing.connection.Connection(fd), {}
    while pid := os.fork():
        verdict = b"timeout" if os.waitpid(pid, 0)[1] == signal.SIGALRM else b"raised"
        pipe.send_bytes(struct.pack("8sd", verdict, 0))  # fails, and so ends the zygote, when there is no trainer
    for name, limit in dict(AS=2**31, FSIZE=0, NOFILE=16, NPROC=0, CORE=0).items():
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
    while True:
        (task, request), verdict, value = pickle.loads(pipe.recv_bytes()), b"rejected", 0.0
        with contextlib.suppress(BaseException):  # SystemExit too
            if task not in data: data[task] = reasoning_gym.create_dataset(task, size=1, seed=0, **SIZES.get(task, {}))
            signal.setitimer(signal.ITIMER_REAL, 2)  # left alone, SIGALRM kills at once
            answer, entry = pickle.loads(request)
            if admit(task, answer, entry):
                verdict = b"raised"
                verdict, value = b"scored", float(data[task].score_answer(answer, entry))
        signal.setitimer(signal.ITIMER_REAL, 0)
        pipe.send_bytes(struct.pack("8sd", verdict, value))

SOURCE = f"import ast, math, re\nARITHMETIC, LITERALS, FUNCTIONS, SIZES = {ARITHMETIC, LITERALS, FUNCTIONS, SIZES}\n" + "".join(
    map(inspect.getsource, (bits, admit, worker)))  # read now: the file may change during a long run

def score(task, answer, entry) -> float:
    """The task's own score of `answer`, in [0, 1], within about two seconds; 0 for None and where `counts` says why."""
    global scorer
    require(task in reasoning_gym.factory.DATASETS, f"no task {task!r}")
    if answer is None: return 0.0
    if scorer is None or scorer.poll():  # an idle one that has something to say has died
        scorer, theirs = multiprocessing.Pipe()
        command = [sys.executable, "-c", f"{SOURCE}worker({theirs.fileno()})"]
        scorer.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=os.environ | dict(OMP_NUM_THREADS="1"),
            start_new_session=True, **dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL))
        theirs.close()
    task, verdict, value = entry["metadata"]["source_dataset"] if task == "composite" else task, b"rejected", 0.0
    if len(answer) <= max(4096, 4 * len(str(entry["answer"]))):
        pipe, scorer, verdict = scorer, None, b"raised"  # put back when the exchange is complete
        with contextlib.suppress(EOFError, OSError):
            pipe.send_bytes(pickle.dumps((task, pickle.dumps((answer, entry)))))
            (verdict, value), scorer = struct.unpack("8sd", pipe.recv_bytes(16)), pipe
    counts[verdict.rstrip(b"\0").decode()] += 1
    return value if 0 <= value <= 1 else 0.9999999999999999 * (1 < value < 1.01)  # spell_backward sums a bit beyond 1
# ------------------------------------------------------------------------------------------------ 9. models
def load_model(cfg):
    """Policy, fp32, on the one GPU or the CPU, and tokenizer. Raises UserError for what cannot be loaded or trained."""
    name, need = cfg.model or str(smoke_model(cfg)), cfg.max_prompt_tokens + cfg.max_new_tokens
    with refusing(f"model {name!r} cannot be loaded; allowed: a hub name, or a folder with config, safetensors, tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, use_safetensors=True).eval()
    require(tokenizer.chat_template, f"the tokenizer of {name!r} has no chat template; an instruction-tuned model is needed")
    most, kinds = getattr(model.config, "max_position_embeddings", need), getattr(model.config, "layer_types", None) or []
    require(need <= most, f"max_prompt_tokens + max_new_tokens = {need}: allowed is up to the {most} positions of {name!r}")
    ids = torch.arange(7, 17)[None] % len(model.get_input_embeddings().weight)  # (1, 10)
    with torch.no_grad():  # is it what section 4 takes it for, head(base(embedding)) under plain causal attention?
        want = model(input_ids=ids).logits[:, -1]  # (1, V)
        sample_mixture(want, cfg)  # raises for a k above the vocabulary
        model.set_attn_implementation("motg")
        (decoder := Decoder(model, tokenizer, cfg, 1, 10, None)).start(ids.tolist())
    require({*kinds} <= {"full_attention"} and torch.allclose(want, decoder.logits, atol=1e-3, rtol=1e-3),
            f"{name!r}: allowed are models with full causal attention and an unscaled head, such as Qwen2 and Llama")
    if model.num_parameters() < 10**7 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # waking a thread takes longer than its half of so small a product
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer

@torch.no_grad()
def working_copy(model, twin=None):
    """What samples: on CUDA a bf16 copy of the fp32 master weights, or `twin`, refreshed where recorded graphs read it."""
    if model.device.type == "cpu": return model
    twin, fresh = twin or copy.deepcopy(model).requires_grad_(False), twin is None
    for new, old in zip(model.parameters(), twin.parameters()): old.data = new.bfloat16() if fresh else old.copy_(new)
    return twin
# The smoke world: sums of one-digit terms, and demonstrations in three habits: a third works the sum out, a third forgets
# the last term, a third guesses. Imitation learns all three; which one is right, only the reward tells.
WARM = dict(steps=500, batch=64, lr=2e-3)
SMALL = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)

def demonstration(entry, rng):
    """Thought and answer for a chain_sum entry, in a habit that `rng` draws."""
    terms, habit = entry["metadata"]["expression"].split(), rng.choice(["work", "forget", "guess"])
    total, thought, pairs = int(terms[0]), [], list(zip(terms[1::2], terms[2::2]))
    for op, term in pairs[:-1] if habit == "forget" else pairs:
        thought.append(f"{total} {op} {term} = {total + int(op + term)}")
        total += int(op + term)
    if habit == "guess": thought, total = ["easy"], rng.randrange(-9, 28)
    return f"{', '.join(thought)}{TAG} <answer>{total}</answer><|im_end|>"

def smoke_tokenizer():
    """Byte-level, with the numbers and phrases of this world as tokens of their own, and a ChatML template."""
    from tokenizers import ByteLevelBPETokenizer, pre_tokenizers
    bpe = ByteLevelBPETokenizer({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    bpe.add_tokens([SYSTEM, "system\n", "user\n", "assistant\n<think>\n", "State the final answer to the following arithmetic "
                    "problem: ", "easy", TAG, " <answer>", "</answer>", " + ", " - ", " = ", ", ", " =", *map(str, range(100))])
    chat = "{%for m in messages%}<|im_start|>{{m.role}}\n{{m.content}}<|im_end|>{%endfor%}<|im_start|>assistant{{'\n'}}"
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|im_end|>", chat_template=chat,
                                                pad_token="<|endoftext|>", additional_special_tokens=["<|im_start|>"])

def warm_start(cfg):
    """A small Qwen2 and its tokenizer, trained on demonstrations; the loss counts their completions alone."""
    tokenizer, rng, pad = smoke_tokenizer(), random.Random(0), torch.nn.utils.rnn.pad_sequence
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        **SMALL, vocab_size=len(tokenizer), tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id))
    optimizer = torch.optim.AdamW(model.parameters(), lr=WARM["lr"], betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    for step in tqdm(range(WARM["steps"]), desc="warm start", leave=False, disable=None):
        optimizer.param_groups[0]["lr"] = WARM["lr"] * min((step + 1) / 40, max(0.05, 1 - step / WARM["steps"]))
        numbers = range(2 * step * WARM["batch"], 2 * (step + 1) * WARM["batch"])  # stream 10^6: no training seed's
        part = problems("chain_sum", cfg, tokenizer, 10**6, numbers, False, WARM["batch"])
        pairs = [[tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, demonstration(entry, rng))]
                 for _, entry, prompt in part]
        ids = pad([torch.tensor(p + c) for p, c in pairs], True)  # (B, S), padded last, where causal attention never looks
        labels = pad([torch.tensor([-100] * len(p) + c) for p, c in pairs], True, -100)
        F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), optimizer.zero_grad()
    return model, tokenizer

def smoke_model(cfg):
    """The folder with the warm-started model: made once, in about a minute, and cached."""
    require(cfg.task == "chain_sum", f"--smoke: task {cfg.task!r} needs a --model; allowed without one is 'chain_sum'")
    recipe = repr((WARM, SMALL, SYSTEM, SIZES, *map(inspect.getsource, (demonstration, smoke_tokenizer, warm_start))))
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "motg" / f"smoke-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.{os.getpid()}")
        for part in warm_start(cfg): part.save_pretrained(partial)
        with contextlib.suppress(OSError): partial.rename(folder)  # or another process was faster
    return folder
# ------------------------------------------------------------------------------------------------ 10. probes
def step_probes(r):
    """Means over thinking steps (entropies in nats, Gini-Simpson 1 - sum w^2) and chains (distinct tokens, lengths, shares)."""
    w, mean = r.log_weights.exp(), lambda x: (x * r.thinking).sum().item() / max(1, int(r.thinking.sum()))  # (B, T, k)
    seen = (r.tokens + 1) * (r.thinking[..., None] & (w > 0))  # (B, T, k) ids from 1; 0: nothing considered
    ordered = F.pad(seen.flatten(1).sort(dim=1).values, (1, 0))  # (B, 1 + T k)
    rows = dict(distinct_tokens=ordered.diff(dim=1).ne(0).sum(1), think_tokens=r.thinking.sum(1),
                answer_tokens=(r.mask & ~r.thinking).sum(1), truncated=~r.eos.any(1))  # (B,) each
    return dict(entropy=mean(r.entropy), weight_entropy=mean(torch.special.entr(w).sum(-1)),
                gini_simpson=mean(1 - w.square().sum(-1)), tagged=sum(TAG in text for text in r.texts) / len(r.texts),
                **{name: value.float().mean().item() for name, value in rows.items()})

def hidden_state_entropy(hidden):
    """Matrix-based (von Neumann) entropy of hidden states (..., T, d), in [0, 1] (Giraldo et al. 2014; Skean et al. 2025):
    lambda the eigenvalues of H H^T / T, H's rows normalised: -sum lambda log lambda / log min(T, d). Of one state, 0."""
    H, (T, d) = F.normalize(hidden.double(), dim=-1), hidden.shape[-2:]
    gram = H @ H.mT if T <= d else H.mT @ H  # of both, the non-zero eigenvalues are the same
    entropy = torch.special.entr(torch.linalg.eigvalsh(gram / T).clamp(min=0)).sum(-1) / math.log(max(min(T, d), 2))
    return entropy if entropy.dim() else entropy.item()

@torch.no_grad()
def hidden_probes(model, r, cfg, window=8):
    """Hidden-state entropy of the thoughts, by layer (embeddings first), and the last layer's over each `window` of steps."""
    layers, curve = [], collections.defaultdict(list)
    for row in (r.thinking.sum(1) > 1).nonzero():
        one = r.select(row)
        states = completion_hidden(model, one, cfg, every_layer=True)[:, 0, one.thinking[0]]  # (layers + 1, n, d)
        layers.append(hidden_state_entropy(states))
        if states.shape[1] >= window:
            for t, value in enumerate(hidden_state_entropy(states[-1].unfold(0, window, 1).mT).tolist(), window):
                curve[t].append(value)
    h = torch.stack(layers).mean(0).tolist() if layers else [math.nan]
    return dict(hidden_last=h[-1], hidden_entropy=h, hidden_entropy_curve={t: sum(v) / len(v) for t, v in curve.items()})
# ------------------------------------------------------------------------------------------------ 11. a run's folder
def write_whole(path, text):
    """Beside, to the disk, swapped in: a crash leaves the old text or the new one."""
    with open(partial := path.with_name(path.name + ".new"), "w") as f: f.write(text), f.flush(), os.fsync(f.fileno())
    partial.rename(path)

digest_of = lambda folder: hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
def save_checkpoint(out, model, tokenizer, state):
    """A Hugging Face folder with trainer.pt in it, written beside the old one; then the link `checkpoint` is swapped."""
    folder, link, now = out / f"checkpoint-{state['step']}-{time.time_ns()}", out / "checkpoint.new", out / "checkpoint"
    try:
        with refusing(f"no checkpoint was written in {out}: is the disk full? --resume continues from the last", RunError):
            model.save_pretrained(folder), tokenizer.save_pretrained(folder)
            torch.save(state | dict(digest=digest_of(folder)), folder / "trainer.pt")
            for file in [*folder.iterdir(), folder]: os.fsync(fd := os.open(file, os.O_RDONLY)), os.close(fd)
            link.unlink(missing_ok=True), link.symlink_to(folder.name), link.rename(now)
    finally:
        for old in [f for f in out.glob("checkpoint-*") if f.name != now.resolve().name]: shutil.rmtree(old, ignore_errors=True)
def load_checkpoint(out, model, optimizer):
    """Restore model and optimiser; returns the rest of what was saved, {} if nothing was. Raises UserError if damaged."""
    if not (folder := out / "checkpoint").exists(): return {}
    with refusing(f"{folder} is damaged or another model's"):
        state = torch.load(folder / "trainer.pt", weights_only=True, map_location="cpu")
        require(digest_of(folder) == state["digest"], "model.safetensors is not the file that was saved")
        saved = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
        model.load_state_dict(saved.state_dict())
        optimizer.load_state_dict(state["optimizer"])
    return state
# ------------------------------------------------------------------------------------------------ 12. training
def readable(r, row, tokenizer):
    """A trajectory as text, mixtures as `the{0.62}|a{0.38}`."""
    pieces = []
    for ids, weights in zip(r.tokens[row][r.mask[row]].tolist(), r.log_weights[row][r.mask[row]].exp().tolist()):
        mixed = sorted(((w, tokenizer.decode([i])) for i, w in zip(ids, weights) if w >= 0.005), reverse=True)
        pieces.append(mixed[0][1] if len(mixed) == 1 else "|".join(f"{text}{{{w:.2f}}}" for w, text in mixed))
    return "".join(pieces)

def collect(sampler, tokenizer, cfg, step, generator):
    """A step's experience: the Rollout, its advantages (B,), and what to log."""
    counts.clear(), generator.manual_seed(cfg.seed * 1_000_003 + step + 1)  # the step number is all the random state there is
    part = [train_problem(cfg, tokenizer, step * cfg.prompts_per_step + j) for j in range(cfg.prompts_per_step)]
    r = rollout(sampler, tokenizer, [prompt for _, _, prompt in part], cfg, generator)
    parts = [rewards(part[row // cfg.chains], text) for row, text in enumerate(r.texts)]
    reward = torch.tensor([p["reward"] for p in parts], device=r.mask.device).view(-1, cfg.chains)  # (prompts, G)
    log = {name: sum(p[name] for p in parts) / len(parts) for name in parts[0]} | step_probes(r)
    log |= {name: counts[name] for name in ("too_long", "timeout", "rejected", "raised")}
    log["no_gradient"] = (reward == reward[:, :1]).all(1).float().mean().item()  # groups of equal rewards teach nothing
    return r, group_advantages(reward).flatten(), log

def micro_batches(r, cfg):
    """Rows in parts of about `cfg.micro_tokens`: whole groups, which share a prompt; where none fits, parts, by length."""
    n, P, T, G = r.mask.sum(1), r.prompt_mask.shape[1], r.mask.shape[1], cfg.chains  # n: (B,)
    order = (torch.arange(len(n), device=n.device) // G * (T + 1) + n).argsort()  # by group, then by length
    return order.split(cfg.micro_tokens // (P + G * T) * G or max(1, (cfg.micro_tokens - P) // T))

def update(policy, reference, optimizer, batch, cfg, number):
    """Optimiser update `number` on a batch of (Rollout, advantages, _); a non-finite loss or gradient skips it."""
    chains, tokens = sum(len(r.mask) for r, _, _ in batch), sum(int(r.sampled.sum()) for r, _, _ in batch)
    log = collections.Counter(loss=0, kl=0, clipped=0)
    for r, advantages, _ in batch:
        for rows in micro_batches(r, cfg):
            part = r.select(rows)
            with torch.no_grad(): ref = rollout_logprobs(reference, part, cfg) if reference is not None else None
            logprob = rollout_logprobs(policy, part, cfg)
            loss, stats = grpo_loss(logprob, part.logprob, ref, advantages[rows], part.sampled, cfg, chains, tokens)
            loss.backward(), log.update(stats)
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.grad_clip).item()
    lr = optimizer.param_groups[0]["lr"] = cfg.lr * min(1, (number + 1) / max(1, cfg.warmup * cfg.steps / cfg.accumulate))
    if finite := math.isfinite(norm) and math.isfinite(log["loss"]): optimizer.step()
    optimizer.zero_grad()
    return dict(log, grad_norm=norm, lr=lr, skipped=int(not finite))

def train(cfg) -> int:
    """The whole method: roll out, reward, compare within groups, update. Returns the exit status."""
    require(torch.cuda.is_available() or cfg.smoke, "no CUDA GPU; allowed on a CPU is --smoke: small model, small settings")
    require(cfg.chains > 1, f"chains = {cfg.chains}: GRPO compares a prompt's chains; allowed is 2 or more")
    out, began, stop, bad, logs = Path(cfg.out), time.time(), [], 0, ("metrics.jsonl", "samples.txt")
    policy, tokenizer = load_model(cfg)
    test, generator, _ = test_problems(cfg, tokenizer), torch.Generator(policy.device), train_problem(cfg, tokenizer, 0)
    with refusing(f"{out} cannot be used; allowed is a folder, and one that no other process works in"):
        out.mkdir(parents=True, exist_ok=True)
        fcntl.flock(lock := open(out / "lock", "w"), fcntl.LOCK_EX | fcntl.LOCK_NB)  # it dies with the process
    reference = working_copy(copy.deepcopy(policy).requires_grad_(False)) if cfg.kl_beta else None
    optimizer = torch.optim.AdamW(policy.parameters(), cfg.lr, (0.9, 0.99), weight_decay=0.1, fused=True)
    state = load_checkpoint(out, policy, optimizer) if cfg.resume else {}
    sampler, done, spent = working_copy(policy), state.get("step", 0), state.get("seconds", 0.0)
    require(done <= cfg.steps, f"steps = {cfg.steps}: the run in {out} has done {done}; allowed is that or more")
    for layer in policy.base_model.layers if cfg.checkpoint_activations else ():
        layer.forward = functools.partial(recompute, layer.forward, preserve_rng_state=False)
    write_whole(out / "config.json", json.dumps(vars(cfg) | dict(resume=False), indent=1))
    for name in logs:  # each step once: what was written after the checkpoint is done again
        with open(out / name, "a") as f: f.truncate(state.get(name, 0))
    accuracy = lambda: evaluate(sampler, tokenizer, cfg, generator, test)["pass@1"]
    before = state["before"] if state else accuracy()
    for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, lambda number, _: stop.append(number))
    bar = tqdm(total=cfg.steps, initial=done, desc=cfg.method, disable=None)
    while done < cfg.steps:
        steps = range(done, min(done + cfg.accumulate, cfg.steps))
        batch = [collect(sampler, tokenizer, cfg, step, generator) for step in steps]  # (Rollout, advantages, log) each
        (first, _, _), (_, _, log) = batch[0], batch[-1]
        log.update(update(policy, reference, optimizer, batch, cfg, done // cfg.accumulate))
        working_copy(policy, sampler)
        done, bad = steps[-1] + 1, (bad + 1) * log["skipped"]
        due = lambda every: every and steps[0] // every < done // every
        if due(cfg.eval_every): log["test_accuracy"] = accuracy()
        with open(out / logs[0], "a") as metrics, open(out / logs[1], "a") as samples:
            metrics.writelines(json.dumps(dict(step=step) | log) + "\n" for step, (_, _, log) in zip(steps, batch))
            if not steps[0] or due(cfg.save_every):
                texts = [f"step {steps[0]}: {readable(first, row, tokenizer)}\n" for row in range(cfg.chains)]
                samples.writelines(texts), bar.write(texts[0], end="")
        shown = "reward", "correct", "entropy", "think_tokens", "kl", "no_gradient"
        bar.set_postfix({name: f"{log[name]:.2f}" for name in shown}, refresh=False), bar.update(len(steps))
        if stop or bad == 3 or done == cfg.steps or due(cfg.save_every):
            state = dict(step=done, before=before, seconds=spent + time.time() - began, optimizer=optimizer.state_dict())
            save_checkpoint(out, policy, tokenizer, state | {name: (out / name).stat().st_size for name in logs})
        if bad == 3:
            raise RunError(f"loss or gradient not finite, three times in a row; saved in {out}. Is lr = {cfg.lr} too high?")
        if stop:
            print(f"stopped by signal {stop[0]} after {done} steps; --resume --out {out} continues", file=sys.stderr)
            return 128 + stop[0]
    result = dict(task=cfg.task, method=cfg.method, seed=cfg.seed, steps=cfg.steps, accuracy_before=before,
                  accuracy_after=accuracy(), seconds=spent + time.time() - began)
    write_whole(out / "result.json", json.dumps(result, indent=1))
    print(f"{out}: accuracy {before:.3f} -> {result['accuracy_after']:.3f} in {result['seconds']:.0f} s")
    return 0
# ------------------------------------------------------------------------------------------------ 13. evaluation
def pass_at_k(n, c, k):
    """Chance that at least one of k chains is right when c of n were, without bias (Chen et al. 2021)."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)
def evaluate(model, tokenizer, cfg, generator, test):
    """Sampled accuracy on test problems: pass@k, standard error of pass@1 over problems, section 10's probes."""
    generator.manual_seed(cfg.seed)
    right, seen, hidden, slots = [], collections.Counter(), {}, cfg.max_prompt_tokens + cfg.max_new_tokens
    n = max(1, min(512, 2**17 // slots) // cfg.chains)  # problems at once: up to 512 rows, fewer where their cache is large
    for i in range(0, len(test), n):
        r = rollout(model, tokenizer, [prompt for _, _, prompt in test[i : i + n]], cfg, generator)
        parts = [rewards(test[i + row // cfg.chains], text) for row, text in enumerate(r.texts)]
        right += torch.tensor([p["correct"] for p in parts]).view(-1, cfg.chains).sum(1).int().tolist()
        seen.update({name: v * len(parts) / cfg.chains / len(test) for name, v in step_probes(r).items()})
        hidden = hidden or hidden_probes(model, r.select(torch.arange(min(32, len(parts)), device=model.device)), cfg)
    error = (torch.tensor(right) / cfg.chains).std().item() / len(right) ** 0.5 if len(right) > 1 else math.nan
    passed = {f"pass@{k}": sum(pass_at_k(cfg.chains, c, k) for c in right) / len(right) for k in range(1, cfg.chains + 1)}
    return passed | dict(stderr=error, problems=len(test)) | seen | hidden

def evaluation(configs) -> int:
    """`eval`: every task, every method, one model; a table, methods side by side, and eval.json. Returns the status."""
    model, tokenizer = load_model(configs[0])
    sampler, generator, path = working_copy(model), torch.Generator(model.device), Path(configs[0].out) / "eval.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for task in task_names(configs[0]):
        rows = [vars(cfg) | evaluate(sampler, tokenizer, cfg, generator, test_problems(cfg, tokenizer))
                for cfg in (replace(cfg, task=task) for cfg in configs)]
        print(f"{task:18}" + "".join(f"{cfg.method:>20}" for cfg in configs))
        for name in [n for n in rows[0] if n not in vars(configs[0]) and isinstance(rows[0][n], (int, float))]:
            print(f"  {name:16}" + "".join(f"{row[name]:20.3f}" for row in rows), flush=True)
        write_whole(path, json.dumps((json.loads(path.read_text()) if path.exists() else []) + rows, indent=1))  # old ones stay
    print(f"written to {path}")
    return 0

def parse(argv):
    """The command and the settings given, as typed."""
    parser, groups = argparse.ArgumentParser(prog="motg.py", description=__doc__.split("\n")[0], allow_abbrev=False), {}
    parser.error = functools.partial(require, False)  # one line, where argparse would print its usage too
    parser.add_argument("command", choices=("train", "eval"), help="train a model by GRPO, or evaluate one")
    for f in fields(Config):
        m, kind = f.metadata, type(f.default)
        group = groups[m["group"]] = groups.get(m["group"]) or parser.add_argument_group(m["group"])
        flags = dict.fromkeys(["--" + f.name.replace("_", "-"), "--" + f.name] + ["--tasks"] * (f.name == "task"))
        text = m["help"] + f": {m['allowed']}" * (kind is str and bool(m["allowed"])) + f" [{f.default}]"
        how = dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(type=kind, metavar=kind.__name__.upper())
        group.add_argument(*flags, dest=f.name, default=argparse.SUPPRESS, help=text, **how)
    given, unknown = parser.parse_known_args(argv)
    for name in unknown: check_name("argument", name, ["--" + f.name for f in fields(Config)])
    return vars(given).pop("command"), vars(given)

FREE = {"steps", "eval_every", "eval_problems", "save_every", "micro_tokens", "checkpoint_activations", "out", "resume"}
def main(argv=None) -> int:
    """The command line; returns the exit status."""
    try:
        command, given = parse(sys.argv[1:] if argv is None else argv)
        if command == "eval":
            model = Path(given.get("model", "smoke"))
            given.setdefault("out", str(model.parent if model.name == "checkpoint" else Path("runs") / f"eval-{model.name}"))
            return evaluation([make_config(m.strip(), **given) for m in given.pop("method", "dirichlet").split(",")])
        cfg = make_config(**given)
        cfg.out = cfg.out or f"runs/{cfg.task.replace(',', '+')}-{cfg.method}-{cfg.seed}"
        config, exists = Path(cfg.out) / "config.json", (Path(cfg.out) / "config.json").exists()
        require(exists or not cfg.resume, f"no run in {cfg.out} to --resume; allowed is an --out with a config.json")
        require(cfg.resume or not exists, f"{cfg.out} holds a run; allowed: --resume to continue it, or another --out")
        if cfg.resume:
            with refusing(f"{config} is damaged; allowed is a run's"):
                saved = vars(make_config(**json.loads(config.read_text())))
            for name in sorted({*given} - FREE):  # these alone may change on the way
                require(given[name] == saved[name], f"--resume: {cfg.out} has {name} = {saved[name]!r}, not {given[name]!r}")
            cfg = make_config(**saved | given | dict(out=cfg.out))
        return train(cfg)
    except (UserError, OSError, torch.cuda.OutOfMemoryError) as e:
        more = "" if isinstance(e, UserError) else "; what was saved before is intact, --resume continues from it"
        more += "; lower --micro-tokens, --chains or --max-new-tokens" * isinstance(e, torch.cuda.OutOfMemoryError)
        print(f"motg: {str(e).splitlines()[0]}{more}", file=sys.stderr)
        return getattr(e, "status", 1)

if __name__ == "__main__":
    sys.exit(main())
