"""motg: *Learning to Reason with Mixture of Tokens* (MoT-G, arXiv 2509.21482) in one file.

A language model that reasons writes one sampled token a step and throws the rest of its
distribution away. MoT-G feeds back a weighted mixture of k token embeddings at each thinking step,
closes the thought with `</think>`, answers in ordinary tokens, and learns by GRPO what is right:

    z --softmax(z/T)--> p --k candidates v--> weights w --sum_i w_i E[v_i]--> next input  (thought)
                         `--one token y, a one-hot w-------------------------> next input  (answer)

Read top to bottom. In shapes: B rows (a row is one chain of one prompt), G chains a prompt, P
prompt length, T new tokens, k candidates, V vocabulary, d width, N steps picked out of B x T.
"""

import argparse
import copy
import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import resource
import signal
import sys
from collections import Counter, namedtuple
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

import reasoning_gym
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm

transformers.utils.logging.disable_progress_bar()
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages: a CPU makes bf16 updates faster
INF, TAG = math.inf, "</think>"

# ---------------------------------------------------------------------------------- 1. settings
ENDS = ("representative", "most-likely", "entropy", "steps")


def setting(default, help, *choices):
    """A field of Config: one line, and a flag."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Config:
    """Every setting is a flag. Defaults are the paper's; where not, "paper" is its own value."""

    model: str = setting("Qwen/Qwen2.5-1.5B-Instruct", "a hub name or a local folder")  # the run
    task: str = setting("graph_color", "any Reasoning-Gym task; the paper's are in the README")
    task_settings: str = setting("{}", 'the task\'s own settings as JSON: {"max_value": 20}')
    shots: str = setting("", "JSON file of [question, reply] pairs, replies from <think> on")
    method: str = setting("dirichlet", "a preset of METHODS; eval takes several with commas")
    seed: int = setting(0, "of the problems and the sampling")
    out: str = setting("", "the run's folder (if empty: runs/<command>-<method>-<seed>)")
    resume: bool = setting(False, "continue the run in --out")
    smoke: bool = setting(False, "a tiny model made on the spot, small settings; your flags win")
    device: str = setting("auto", "auto: CUDA if there is one", "auto", "cuda", "cpu")
    precision: str = setting("auto", "auto: bf16 where that is fast", "auto", "fp32", "bf16")
    sampling: str = setting("top-k", "which candidates")  # the mixture
    aggregation: str = setting("dirichlet", "their weights")
    k: int = setting(2, "candidates a step (paper: 2)")
    temperature: float = setting(0.9, "T in p = softmax(z / T) (paper: 0.9)")
    top_p: float = setting(0.95, "nucleus: the mass that the candidates reach")
    min_p: float = setting(0.05, "min-p: share of the largest p that is needed")
    concentration: float = setting(1.0, "dirichlet: c in w ~ Dir(c p^) (paper: 1)")
    moi_beta: float = setting(1.0, "posterior: beta of Mixture of Inputs")
    gumbel_tau: float = setting(1.0, "gumbel: tau of the softmax")
    mix_steps: int = setting(0, "mix in the first n steps of a thought only; 0: in all")
    mix_entropy: float = setting(0.0, "mix only where H(p) reaches this, in nats")
    end: str = setting("representative", "what ends a thought", *ENDS)
    end_entropy: float = setting(0.1, "end=entropy: H(p) below this, in nats, ...")
    end_patience: int = setting(256, "... for so many steps (Soft Thinking: 256)")
    end_steps: int = setting(128, "end=steps: steps before the tag is forced")
    logprob: str = setting("representative", "GRPO's score", "representative", "weighted", "exact")
    weight_passes: int = setting(0, "passes that carry the gradient through weights made of p")
    chains: int = setting(10, "G, chains a prompt (paper: 10, or 5)")  # GRPO
    prompts_per_step: int = setting(1, "prompts a step (paper: 1)")
    accumulate: int = setting(4, "steps an optimiser update, sampled together (paper: 4)")
    steps: int = setting(1000, "steps (paper: 1000)")
    max_prompt_tokens: int = setting(1024, "longer prompts are skipped (paper: 1024)")
    max_new_tokens: int = setting(1024, "thought and answer together (paper: 1024)")
    lr: float = setting(5e-6, "AdamW's rate (paper: 5e-6, but on bf16 weights; here fp32)")
    warmup: float = setting(0.18, "share of updates that warm up (paper: 0.18)")
    grad_clip: float = setting(0.1, "largest gradient norm (paper: 0.1)")
    kl_beta: float = setting(0.1, "weight of the KL to the reference (paper: 0.1)")
    clip: float = setting(0.2, "PPO's clip of the ratio (paper: 0.2)")
    loss_average: str = setting("chain", "over a chain's tokens first (paper)", "chain", "token")
    micro_tokens: int = setting(4096, "tokens a micro-batch; lower it to save memory")
    eval_problems: int = setting(100, "distinct test problems a task (paper: 100)")  # evaluation
    eval_every: int = setting(0, "steps between evaluations; 0: only before and after")
    save_every: int = setting(100, "steps between checkpoints; the last step has one")


TOP_K, DRAWN = {"sampling": "top-k"}, {"sampling": "without-replacement"}
PROBABILITY, GUMBEL = {"aggregation": "probability"}, {"aggregation": "gumbel"}
METHODS = {
    "single": DRAWN | PROBABILITY | {"k": 1},
    "dirichlet": TOP_K | {"aggregation": "dirichlet"},
    "different-tokens": DRAWN | PROBABILITY | {"logprob": "weighted"},
    "soft-thinking": TOP_K | PROBABILITY,
    "mixture-of-inputs": TOP_K | {"aggregation": "posterior"},
    "multiplex": PROBABILITY | {"sampling": "with-replacement", "k": 3, "logprob": "exact"},
    "soft-grpo": TOP_K | GUMBEL | {"k": 5, "gumbel_tau": 0.1, "logprob": "exact"},
    "lepo": TOP_K | GUMBEL | {"k": 30, "gumbel_tau": 0.5, "mix_steps": 32, "logprob": "weighted"},
}
SMOKE = {"model": "", "task": "chain_sum", "max_new_tokens": 40, "loss_average": "token"}
SMOKE |= {"task_settings": '{"min_terms": 3, "max_terms": 4, "max_digits": 1}', "kl_beta": 0.01}
SMOKE |= {"chains": 8, "prompts_per_step": 16, "accumulate": 1, "steps": 80, "save_every": 40}
SMOKE |= {"lr": 3e-5, "grad_clip": 1.0, "micro_tokens": 1024, "eval_problems": 256}
WORDS = ["State the final answer to the following arithmetic problem: ", "easy", TAG, " <answer>"]
WORDS += ["</answer>", " + ", " - ", " = ", ", ", " =", *map(str, range(100))]
OR_ZERO = {"moi_beta", "end_entropy", "steps", "lr", "warmup", "kl_beta", "clip"}
LARGEST = {"top_p": 1, "min_p": 1, "warmup": 1, "clip": 1, "seed": 10**6 - 1}


class UserError(ValueError):
    """What the user got wrong, in one line; the program exits with status 2."""


def require(ok, message):
    """Raises UserError unless `ok`."""
    if not ok:
        raise UserError(message)


@contextmanager
def refusing(message):
    """Turns an exception inside into a UserError: `message`, and the first line of its own."""
    try:
        yield
    except Exception as e:
        said = (str(e).strip() or repr(e)).splitlines()[0][:200]
        raise UserError(f"{message} ({said})") from e


def make_config(method="dirichlet", **overrides) -> Config:
    """Defaults, then --smoke's, then the method's, then `overrides`. Raises UserError."""
    require(method in METHODS, f"unknown method {method!r}; allowed: {', '.join(METHODS)}")
    smoke = SMOKE if overrides.get("smoke") else {}
    with refusing("unknown setting"):
        cfg = Config(**smoke | METHODS[method] | overrides | {"method": method})
    for f in fields(cfg):
        value, choices = getattr(cfg, f.name), f.metadata["choices"] or RULES.get(f.name)
        if choices:
            require(value in choices, f"{f.name} = {value!r}; allowed: {', '.join(choices)}")
        elif f.type in (int, float):
            least = 0 if f.default == 0 or f.name in OR_ZERO else f.type(1e-6) or 1
            most = LARGEST.get(f.name, 10**9)
            ok = type(value) in (int, float) and least <= value <= most
            require(ok, f"{f.name} = {value!r}; allowed: {least} to {most}")
    require(cfg.task in reasoning_gym.factory.DATASETS, f"Reasoning-Gym has no task {cfg.task!r}")
    require(method != "single" or cfg.k == 1, f"k = {cfg.k}; allowed: 1, for the method single")
    return cfg


# ---------------------------------------------------------------------------------- 2. mixtures
# A thinking step is k candidates and k log-weights; a slot with log-weight -inf is empty. An
# ordinary token is a step with one filled slot, so answers, the single-token baseline and the end
# tag need no second code path. The representative is the candidate that a reader sees.
Mixture = namedtuple("Mixture", "tokens log_weights representative")  # (B, k), (B, k), (B,)


def token_distribution(logits, temperature):
    """log p = log softmax(z / T), float32. Sampler, scorer, reference and probes all call this."""
    return F.log_softmax(logits.float() / temperature, dim=-1)


def entropy_of(log_p):
    """H(p) in nats: (..., V) -> (...)."""
    return -(log_p.exp() * log_p.clamp(min=-99)).sum(-1)


def gumbel_noise(like, generator=None):
    """The Gumbel-max trick: argmax(log p + noise) is a draw from p."""
    return -torch.empty_like(like).exponential_(generator=generator).log()


def draw(log_p, generator=None):
    """One token a row from p, (B, V) -> (B,): inverse CDF, in float64: no tail is cut off."""
    cdf = log_p.exp().cumsum(-1, dtype=torch.float64)  # (B, V)
    u = torch.rand(len(cdf), 1, dtype=cdf.dtype, device=cdf.device, generator=generator)  # (B, 1)
    return torch.searchsorted(cdf, u * cdf[:, -1:], right=True)[:, 0].clamp(max=cdf.shape[1] - 1)


def slot_of(tokens, token):
    """One-hot (..., k), bool: the first slot that holds `token` (...)."""
    slot = (tokens == token[..., None]).int().argmax(-1, keepdim=True)
    return torch.arange(tokens.shape[-1], device=tokens.device) == slot


# To try a rule, add a row: `make` makes candidates or weights, `logprob` is that of what was drawn
# (None: nothing). Of drawn candidates the first is read, else one from Cat(w), or the largest.
Rule = namedtuple("Rule", "make logprob reads_largest", defaults=(None, False))


def likely_candidates(log_p, cfg, generator=None):
    """The k most likely tokens (B, k) and their log p, -inf in slots that the rule leaves empty."""
    log_pv, tokens = log_p.topk(cfg.k)
    p = log_pv.exp()
    if cfg.sampling == "nucleus":  # a token stays while the mass *before* it is below top_p
        log_pv = log_pv.masked_fill(p.cumsum(-1) - p >= cfg.top_p, -INF)
    elif cfg.sampling == "min-p":
        log_pv = log_pv.masked_fill(p < cfg.min_p * p[:, :1], -INF)
    return tokens, log_pv


def drawn_candidates(log_p, cfg, generator=None):
    """k draws from p (B, V): independent ones, or each struck out before the next one."""
    drawn, rest = [draw(log_p, generator)], log_p
    while len(drawn) < cfg.k:
        if cfg.sampling == "without-replacement":  # the law of Gumbel top-k
            rest = rest.scatter(-1, drawn[-1][:, None], -INF).log_softmax(-1)
        drawn.append(draw(rest, generator))
    tokens = torch.stack(drawn, dim=-1)
    return tokens, log_p.gather(-1, tokens)


def draws_logprob(log_p, tokens, cfg):
    """sum_j log p(v_j); without replacement, - log(1 - sum_{i<j} p(v_i)) each (Plackett-Luce)."""
    score = 0.0
    for token in tokens.unbind(-1):
        score = score + log_p.gather(-1, token[..., None])[..., 0]
        if cfg.sampling == "without-replacement":  # strike it out: 1 - p cancels where p is sharp
            log_p = log_p.scatter(-1, token[..., None], -INF).log_softmax(-1)
    return score


def dirichlet(log_hat, cfg, generator=None):
    """log w + constant, w ~ Dir(c p^): c -> inf gives p^, c -> 0 one token drawn from p^. Made of
    log Gamma(a) draws, as log Gamma(a + 1) + log(U) / a, for which no a is too small."""
    a = cfg.concentration * log_hat.exp().clamp(min=1e-5)  # (B, k) so that log(U) / a is finite
    minus_log_u = torch.empty_like(a).exponential_(generator=generator)
    return torch._standard_gamma(a + 1, generator).log() - minus_log_u / a


def dirichlet_logdensity(log_hat, log_w, filled, cfg):
    """log Gamma(sum_i a_i) + sum_i (a_i - 1) log w_i - log Gamma(a_i), over the filled slots."""
    a = cfg.concentration * log_hat.exp().clamp(min=1e-5)  # (..., k)
    terms = (a - 1) * log_w - a.lgamma()
    return (terms * filled).sum(-1) + (a * filled).sum(-1).lgamma()


def gumbel(log_hat, cfg, generator=None):
    """log w + constant, w = softmax((log p^ + g) / tau) (SofT-GRPO, LEPO)."""
    return (log_hat + gumbel_noise(log_hat, generator)) / cfg.gumbel_tau


def concrete_logdensity(log_hat, log_w, filled, cfg):
    """The density of such w, called Concrete (Maddison et al. 2017, eq. 10)."""
    n, x = filled.sum(-1), log_hat - cfg.gumbel_tau * log_w  # (...), (..., k)
    constant = n.float().lgamma() + (n - 1) * math.log(cfg.gumbel_tau)
    log_total = x.masked_fill(~filled, -INF).logsumexp(-1)
    return constant + ((x - log_w) * filled).sum(-1) - n * log_total


SAMPLING = {
    "top-k": Rule(likely_candidates),
    "nucleus": Rule(likely_candidates),  # the smallest set whose mass reaches top_p, at most k
    "min-p": Rule(likely_candidates),  # p >= min_p max p, at most k
    "without-replacement": Rule(drawn_candidates, draws_logprob),
    "with-replacement": Rule(drawn_candidates, draws_logprob),
}
AGGREGATION = {
    "probability": Rule(lambda log_hat, cfg, generator=None: log_hat),  # w = p^
    "uniform": Rule(lambda log_hat, cfg, generator=None: torch.zeros_like(log_hat)),
    "max": Rule(lambda log_hat, cfg, generator=None: log_hat),  # to be read: see mixture_embedding
    "posterior": Rule(lambda log_hat, cfg, generator=None: log_hat),  # to be read: see `posterior`
    "dirichlet": Rule(dirichlet, dirichlet_logdensity),
    "gumbel": Rule(gumbel, concrete_logdensity, reads_largest=True),
}
RULES = {"sampling": SAMPLING, "aggregation": AGGREGATION}


def posterior(log_hat, log_p, read, cfg):
    """Mixture of Inputs: log of w = (H p^ + (beta + 1 - H) onehot(y)) / (beta + 1), H in [0, 1]."""
    H = entropy_of(log_p)[..., None] / math.log(max(2, log_p.shape[-1]))  # (..., 1)
    w = (H * log_hat.exp() + (cfg.moi_beta + 1 - H) * read) / (cfg.moi_beta + 1)
    return w.clamp(min=1e-30).log().masked_fill(log_hat == -INF, -INF)


def sample_mixture(logits, cfg, generator=None, log_p=None) -> Mixture:
    """One thinking step: logits (B, V), or their log p, to candidates, weights, the token read."""
    log_p = token_distribution(logits, cfg.temperature) if log_p is None else log_p  # (B, V)
    sampling, aggregation = SAMPLING[cfg.sampling], AGGREGATION[cfg.aggregation]
    tokens, log_pv = sampling.make(log_p, cfg, generator)
    log_hat = log_pv.log_softmax(-1)  # (B, k)
    log_w = aggregation.make(log_hat, cfg, generator)
    log_w = log_w.masked_fill(log_hat == -INF, -INF).log_softmax(-1)  # (B, k)
    noise = 0.0 if aggregation.reads_largest else gumbel_noise(log_w, generator)
    slot = (log_w + noise).argmax(-1, keepdim=True)  # (B, 1) a draw from Cat(w)
    y = tokens[:, 0] if sampling.logprob else tokens.gather(-1, slot)[:, 0]  # (B,)
    if cfg.aggregation == "posterior":
        log_w = posterior(log_hat, log_p, slot_of(tokens, y), cfg)
    return Mixture(tokens, log_w, y)


def mixture_embedding(table, tokens, log_weights, aggregation="probability"):
    """e = sum_i w_i E[v_i]: table (V, d), the rest (..., k) -> (..., d). "max": element-wise."""
    rows = F.embedding(tokens, table)  # (..., k, d)
    if aggregation == "max":
        return rows.masked_fill((log_weights == -INF)[..., None], -INF).amax(-2)
    return (log_weights.exp()[..., None] * rows).sum(-2).to(table.dtype)


# ----------------------------------------------------------------------- 3. the score of a step
# What is the log-probability of a mixture? The paper looks at tokens alone (`cfg.logprob`): the
# representative's, or the candidates' weighted by w. `exact` is that of what was drawn at this
# step, and of nothing else. Drawn candidates have a probability, drawn weights a density. Where
# both follow from p, only y ~ Cat(w) is left to chance, and matters only if it ends the thought. So
# a step's event is recorded: the candidates that, read instead of y, lead to the same next input.
def mixture_logprob(
    logits, tokens, log_weights, representative, cfg, candidate=None, event=None, log_p=None
):
    """Log-prob (...) of recorded steps (..., k) under the model that gave `logits` (..., V)."""
    log_p = token_distribution(logits, cfg.temperature) if log_p is None else log_p  # (..., V)
    log_y = log_p.gather(-1, representative[..., None])[..., 0]  # (...)
    log_pv, filled = log_p.gather(-1, tokens), log_weights > -INF  # (..., k)
    if cfg.logprob == "representative":
        return log_y
    if cfg.logprob == "weighted":  # w is data: a gradient through it could push a chosen token down
        return (log_weights.detach().exp() * log_pv.masked_fill(~filled, 0.0)).sum(-1)
    sampling, aggregation = SAMPLING[cfg.sampling], AGGREGATION[cfg.aggregation]
    if candidate is None:
        candidate = filled & (filled.sum(-1, keepdim=True) > 1)
        event = slot_of(tokens, representative) if cfg.aggregation == "posterior" else filled
    ordinary = (filled.sum(-1) == 1) & ~candidate.any(-1)  # (...) y was drawn from the vocabulary
    if sampling.logprob:
        score = sampling.logprob(log_p, tokens, cfg)
    else:  # y ~ Cat(w), or Cat(p^), the mean of w, if w was drawn
        outside = ~(candidate | ordinary[..., None])  # (..., k)
        log_q = log_pv.masked_fill(outside, -INF).log_softmax(-1)
        if not aggregation.logprob:
            log_q = aggregation.make(log_q, cfg).masked_fill(outside, -INF).log_softmax(-1)
        score = log_q.masked_fill(~event, -INF).logsumexp(-1)
    if aggregation.logprob:
        log_hat = log_pv.masked_fill(~filled, -INF).log_softmax(-1).masked_fill(~filled, 0.0)
        log_w = log_weights.masked_fill(~filled, 0.0)
        score = score + aggregation.logprob(log_hat, log_w, filled, cfg)
    return torch.where(ordinary, log_y, score)


# ----------------------------------------------------------------------- 4. the end of a thought
# `</think>` is looked for in the text and not among the ids: for Qwen2.5 it is three tokens, and
# the last one may swallow what follows (`>\n` is one token). So as not to decode every row at
# every step, a row keeps how many characters of the tag its text ends with, and a table says what
# each token makes of that. What ends a thought (`cfg.end`):
#   representative   the text completes the tag
#   most-likely      it would with the arg-max token, which then is the step
#   entropy, steps   or p was sharp for end_patience steps, or end_steps are over: the tag is forced
# Nobody chose a forced token, nor an arg-max one: they carry no loss (`sampled` is False).
@lru_cache(maxsize=8)
def tag_table(tokenizer, vocabulary):
    """(8, V): characters of the tag matched after token v, if s were matched before; 8: closed."""
    table = torch.zeros(len(TAG), vocabulary, dtype=torch.long)
    ids = [[i] for i in range(min(len(tokenizer), vocabulary))]
    texts = tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)
    for token, text in enumerate(texts):
        if "<" in text or ">" in text or text in TAG:  # no other text can begin or continue it
            for s in range(len(TAG)):
                seen = TAG[:s] + text
                longest = max(n for n in range(len(TAG)) if seen.endswith(TAG[:n]))
                table[s, token] = len(TAG) if TAG in seen else longest
    return table


# ---------------------------------------------------------------------------------- 5. rollouts
# Prompts are padded on the left, so that step t of every row sits in slot P + t. Each prompt is
# read once; its keys and values are then copied to its G chains. A decoding step works in place on
# preallocated tensors and never asks the GPU for a value, so that CUDA can replay it as one graph.
STEP = "tokens log_weights representative candidate event thinking mask sampled eos logprob entropy"
PER_ROW = ("rows", "logits", "closed", "start", "matched", "streak", "forced", "thinking", "live")
CACHE = "cache" if transformers.__version__ >= "5.24" else "past_key_values"  # it was renamed


class Rollout(namedtuple("Rollout", f"prompt_ids prompt_mask {STEP} texts")):
    """B trajectories, as ids and weights: a model looks embeddings up in its own table.

    prompt_ids, prompt_mask (B, P), left-padded; tokens, log_weights (B, T, k), one-hot for ordinary
    tokens; representative (B, T), what a reader sees; candidate (B, T, k), slots it was read from
    (none: it was drawn from the vocabulary), and event, those of them with the same next input;
    thinking (B, T), the thought and its tag; mask, steps before the row had ended; sampled, those
    that the policy chose; eos, the row's last; logprob, as sampled; entropy, H(p) in nats; texts.
    """

    def select(self, rows):  # a LongTensor; the padding is trimmed, texts are left behind
        P = max(1, int(self.prompt_mask[rows].sum(1).max()))
        T = max(1, int(self.mask[rows].sum(1).max()))
        ids, mask, *steps = (x[rows] for x in self[:-1])
        return Rollout(ids[:, -P:], mask[:, -P:], *(x[:, :T] for x in steps), texts=[])


def forward(model, embeds, mask, position, cache, **more):
    """The model below its head, on embeddings (B, Q, d) behind what the cache holds."""
    more |= {"attention_mask": mask, "position_ids": position, CACHE: cache, "use_cache": True}
    return model.base_model(inputs_embeds=embeds, **more)


def read_prompts(model, ids, mask, chains, **more):
    """Read n distinct prompts (n, P); returns the output and a cache repeated for their chains."""
    cache = transformers.DynamicCache(config=model.config)
    embeds = F.embedding(ids, model.get_input_embeddings().weight)  # (n, P, d)
    out = forward(model, embeds, mask.long(), (mask.cumsum(1) - 1).clamp(min=0), cache, **more)
    cache.batch_repeat_interleave(chains)
    return out, cache


class Decoder:
    """The state of a rollout, on tensors that stay where they are."""

    def __init__(self, model, tokenizer, ids, mask, cfg, generator):
        self.model, self.cfg, self.generator = model, cfg, generator
        P, T, rows = ids.shape[1], cfg.max_new_tokens, len(ids) * cfg.chains
        self.table, self.head = model.get_input_embeddings().weight, model.get_output_embeddings()
        self.tag_table = tag_table(tokenizer, len(self.table)).to(ids.device)  # (8, V)
        self.tag_ids = ids.new_tensor(tokenizer.encode(TAG, add_special_tokens=False))
        eos = model.generation_config.eos_token_id  # one id, a list, or none
        self.eos_ids = ids.new_tensor(tokenizer.eos_token_id if eos is None else eos).view(-1)
        out, prompts = read_prompts(model, ids, mask, cfg.chains)
        self.logits = self.head(out.last_hidden_state[:, -1]).repeat_interleave(cfg.chains, 0)
        self.cache = transformers.StaticCache(config=model.config, max_cache_len=P + T)
        for i, layer in enumerate(prompts.layers):
            self.cache.update(layer.keys, layer.values, i)
        mask = mask.repeat_interleave(cfg.chains, dim=0)  # (B, P); closed: is added to q k
        self.closed = F.pad(~mask, (0, T), value=True)[:, None, None].to(model.dtype) * -1e9
        self.start = mask.sum(1, keepdim=True)  # (B, 1) prompt lengths
        self.matched, self.streak, self.forced = ids.new_zeros(3, rows)
        self.thinking, self.live = ids.new_ones(2, rows).bool()
        self.t, self.record = ids.new_tensor([0]), {}
        self.rows = torch.arange(rows, device=ids.device)  # (B,) places in the record
        stops = {"entropy": (cfg.end_entropy, cfg.end_patience), "steps": (INF, cfg.end_steps)}
        self.sharp, self.enough = stops.get(cfg.end, (None, None))

    def keep(self, rows):  # a LongTensor of those that go on
        for name in PER_ROW:
            setattr(self, name, getattr(self, name)[rows])
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]

    def completes_tag(self, tokens):  # (B, n)
        return self.tag_table[self.matched[:, None], tokens] == len(TAG)

    def close_thought(self, y, log_p, entropy):
        """What cfg.end makes of y (B,); rows whose token a rule forced; rows whose thought ends."""
        if self.cfg.end == "most-likely":
            best = log_p.argmax(-1)  # (B,)
            forced = self.thinking & self.completes_tag(best[:, None])[:, 0]
            return torch.where(forced, best, y), forced, forced
        forced = self.forced > 0
        if self.enough:
            forced = self.thinking & (forced | (self.streak >= self.enough))
            self.streak.add_(1).mul_(entropy < self.sharp)
            y = torch.where(forced, self.tag_ids[self.forced], y)
            self.forced.copy_((self.forced + 1) * forced % len(self.tag_ids))
        return y, forced, self.thinking & self.completes_tag(y[:, None])[:, 0]

    def step(self):
        """Mix or sample, end thoughts, record, feed, and read the next logits."""
        cfg, live = self.cfg, self.live
        drawn, weighed = SAMPLING[cfg.sampling].logprob, AGGREGATION[cfg.aggregation].logprob
        log_p = token_distribution(self.logits, cfg.temperature)  # (B, V)
        entropy = entropy_of(log_p)  # (B,)
        m = sample_mixture(self.logits, cfg, self.generator, log_p)
        sample = m.tokens[:, 0] if drawn else draw(log_p, self.generator)  # (B,)
        gate = (entropy >= cfg.mix_entropy) & (self.t < (cfg.mix_steps or cfg.max_new_tokens))
        mixes = self.thinking & live & gate  # (B,) else: an ordinary token
        y = torch.where(mixes, m.representative, sample) * live  # (B,) what a reader sees
        y, forced, closes = self.close_thought(y, log_p, entropy)
        eos = torch.isin(y, self.eos_ids) & live & ~forced
        # all but a step inside a thought is one-hot; candidates y was read from stay, for `exact`
        goes_on = (mixes & ~(closes | eos | forced))[:, None]  # (B, 1)
        among = (mixes & ~forced)[:, None] & (drawn is None)  # (B, 1)
        tokens = torch.where(goes_on | among, m.tokens, y[:, None])  # (B, k)
        read = slot_of(tokens, y)  # (B, k)
        log_w = torch.where(goes_on, m.log_weights, torch.where(read, 0.0, -INF))
        candidate = among & (m.log_weights > -INF)  # (B, k)
        closing = self.completes_tag(tokens) & (cfg.end != "most-likely")  # (B, k)
        ends = (closing | torch.isin(tokens, self.eos_ids)) & (weighed is None)  # w has its density
        alone = ~(goes_on & among) | (cfg.aggregation == "posterior")  # y shaped the next input
        step = {"tokens": tokens, "log_weights": log_w, "representative": y, "candidate": candidate}
        step["event"] = torch.where(alone, read, candidate & ~ends)
        logprob = mixture_logprob(self.logits, cfg=cfg, log_p=log_p, **step)
        sampled = live & ~forced  # (B,)
        step |= {"logprob": logprob.masked_fill(~sampled, 0.0), "entropy": entropy * live}
        step |= {"mask": live, "eos": eos, "sampled": sampled, "thinking": self.thinking & live}
        for name, x in step.items():
            if name not in self.record:
                self.record[name] = x.new_zeros(len(x), cfg.max_new_tokens, *x.shape[1:])
            self.record[name][self.rows, self.t] = x
        self.matched.copy_(self.tag_table[self.matched, y] % len(TAG))
        self.thinking.logical_and_(~closes)
        self.live.logical_and_(~eos)
        self.closed.index_fill_(3, self.closed.shape[3] - cfg.max_new_tokens + self.t, 0.0)
        embeds = mixture_embedding(self.table, tokens, log_w, cfg.aggregation)[:, None]  # (B, 1, d)
        out = forward(self.model, embeds, self.closed, self.start + self.t, self.cache)
        self.logits.copy_(self.head(out.last_hidden_state[:, 0]))
        self.t.add_(1)


def rollout(model, tokenizer, prompts: list[str], cfg, generator=None) -> Rollout:
    """`cfg.chains` trajectories for each prompt, templated text that ends in the opened thought."""
    check_model(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    how = {"padding": True, "padding_side": "left", "add_special_tokens": False}
    batch = tokenizer(prompts, **how, return_tensors="pt").to(model.device)
    ids, mask = batch.input_ids, batch.attention_mask.bool()  # (n, P)
    with torch.no_grad() if ids.is_cuda else torch.inference_mode():  # which graphs cannot take
        decoder = Decoder(model, tokenizer, ids, mask, cfg, generator)
        step = decoder.step
        for t in range(cfg.max_new_tokens):
            step()
            if ids.is_cuda and t == 0:  # the first step has warmed up what a recording needs
                graph = torch.cuda.CUDAGraph()
                if generator is not None:
                    graph.register_generator_state(generator)
                with torch.cuda.graph(graph):
                    decoder.step()
                step = graph.replay
            if (t % 16 == 15 or not ids.is_cuda) and not decoder.live.any():  # to look is to wait
                break
            if t % 8 == 7 and not (ids.is_cuda or decoder.live.all()):  # a graph cannot shrink
                decoder.keep(decoder.live.nonzero()[:, 0])
    ids, mask = (x.repeat_interleave(cfg.chains, dim=0) for x in (ids, mask))  # (B, P)
    r = Rollout(ids, mask, **decoder.record, texts=[]).select(torch.arange(len(ids)).to(ids.device))
    r.log_weights[..., 1:].masked_fill_(~r.mask[..., None], -INF)  # behind the end, one-hot too
    shown = zip(r.representative.cpu(), (r.mask & ~r.eos).cpu())
    texts = [tokenizer.decode(y[i], clean_up_tokenization_spaces=False) for y, i in shown]
    return r._replace(texts=texts)


# -------------------------------------------------------------------------- 6. log-probabilities
# The same numbers as while sampling, for all steps at once and with gradient. All logits, (B, T, V)
# in float32, would fill the memory: a chunk exists at a time, and again in the backward pass.
def completion_hidden(model, r, cfg, log_weights, every_layer=False):
    """Hidden states (B, T, d) that predicted each step: the last layer's, or embeddings and all."""
    ids = r.prompt_ids.masked_fill(~r.prompt_mask, -1)
    chains = torch.unique_consecutive(ids, dim=0, return_counts=True)[1]  # (n,) of each prompt
    first, more = chains.cumsum(0) - chains, {"output_hidden_states": every_layer}  # (n,)
    prompt, cache = read_prompts(model, r.prompt_ids[first], r.prompt_mask[first], chains, **more)
    table, T = model.get_input_embeddings().weight, r.mask.shape[1]
    embeds = mixture_embedding(table, r.tokens, log_weights, cfg.aggregation)  # (B, T, d)
    visible = F.pad(r.prompt_mask, (0, T), value=True).long()  # (B, P + T)
    steps = forward(model, embeds, visible, visible.cumsum(1)[:, -T:] - 1, cache, **more)
    # what predicts step t is what precedes it: the prompt's end, then step t - 1
    pairs = [(prompt.last_hidden_state, steps.last_hidden_state)]
    if every_layer:
        pairs = zip(prompt.hidden_states, steps.hidden_states)
    ends = ((h[:, -1:].repeat_interleave(chains, dim=0), after) for h, after in pairs)
    return [torch.cat([end, after[:, :-1]], dim=1) for end, after in ends]


# Under `probability` and `posterior` the weights are functions of p, so the parameters also act
# through the next input, and scores of recorded weights miss that part of the gradient. It can be
# had in parallel: each pass gives every step's weights as functions of theta, equal in value to the
# record, and the next one, over inputs built from these, has one hop through w more.
#     pass 0: e_t = sum_i w_ti E[v_ti]        pass n: e_t = sum_i w_ti(theta of pass n - 1) E[v_ti]
# A thought of T steps has T - 1 hops at most: as many `weight_passes` make the gradient exact.
def weights_of_p(logits, tokens, log_weights, representative, cfg, **_):
    """Recorded log w (N, k), in value; where p made them, with their gradient."""
    if cfg.aggregation not in ("probability", "posterior"):
        return log_weights
    log_p, empty = token_distribution(logits, cfg.temperature), log_weights == -INF
    log_w = log_p.gather(-1, tokens).masked_fill(empty, -INF).log_softmax(-1)
    if cfg.aggregation == "posterior":
        log_w = posterior(log_w, log_p, slot_of(tokens, representative), cfg)
    log_w = log_w.masked_fill(empty, 0.0)
    return log_weights + log_w - log_w.detach()


def rollout_logprobs(model, rollout, cfg, micro_batch=None):
    """Log-probs (B, T) of every sampled step under `model`, with gradient; 0 elsewhere."""
    r, steps, head = rollout, rollout.sampled, model.get_output_embeddings()
    if micro_batch:
        rows = torch.arange(len(r.mask), device=r.mask.device).split(micro_batch)
        parts = [rollout_logprobs(model, r.select(i), cfg) for i in rows]
        return torch.cat([F.pad(p, (0, r.mask.shape[1] - p.shape[1])) for p in parts])
    check_model(model)
    recorded = {name: getattr(r, name)[steps] for name in STEP.split()[:5]}  # (N, ...) to `event`
    log_weights, size = r.log_weights, max(1, 2**24 // len(head.weight))  # 64 MiB of logits

    def in_chunks(function):
        hidden = completion_hidden(model, r, cfg, log_weights)[-1][steps]  # (N, d)

        def of_chunk(i):
            return function(head(hidden[i]), cfg=cfg, **{n: x[i] for n, x in recorded.items()})

        how = {"use_reentrant": False, "preserve_rng_state": False}
        chunks = torch.arange(len(hidden), device=hidden.device).split(size)
        return torch.cat([torch.utils.checkpoint.checkpoint(of_chunk, i, **how) for i in chunks])

    bf16 = compute_dtype(model, cfg) == torch.bfloat16
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        for _ in range(cfg.weight_passes if head.weight.requires_grad else 0):
            log_weights = r.log_weights.masked_scatter(steps[..., None], in_chunks(weights_of_p))
        scores = in_chunks(mixture_logprob)  # (N,)
    return torch.zeros_like(r.logprob).masked_scatter(steps, scores)


# --------------------------------------------------------------------------------------- 7. GRPO
def group_advantages(rewards):
    """A = (r - mean) / (std + 1e-4) within each group: (prompts, G) -> (prompts, G)."""
    return (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + 1e-4)


def grpo_loss(logprob, old_logprob, ref_logprob, advantages, mask, cfg, chains=None, tokens=None):
    """PPO's clipped objective with group advantages A (B,), plus a KL penalty; the rest (B, T).

        ratio = pi / pi_old        k3 = pi_ref / pi - log(pi_ref / pi) - 1 >= 0, unbiased
        loss  = -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A) + beta k3
    With one update a batch the ratio is 1, the clip idles, and the first term is REINFORCE's.
    """
    chains, tokens = chains or len(mask), tokens or max(1, int(mask.sum()))  # of the whole batch
    weight = mask / (mask.sum(1, keepdim=True).clamp(min=1) * chains)  # a chain's mean, then theirs
    weight = mask / tokens if cfg.loss_average == "token" else weight  # DAPO: the mean of all steps
    A = advantages[:, None]  # (B, 1)
    ratio = (logprob - old_logprob).masked_fill(mask == 0, 0.0).exp()  # (B, T)
    free, clipped = ratio * A, ratio.clamp(1 - cfg.clip, 1 + cfg.clip) * A
    ref_logprob = logprob if ref_logprob is None else ref_logprob
    log_r = (ref_logprob - logprob).masked_fill(mask == 0, 0.0)
    kl = log_r.exp() - log_r - 1
    loss = (weight * (cfg.kl_beta * kl - torch.min(free, clipped))).sum()
    parts = {"loss": loss, "kl": (weight * kl).sum(), "clipped": (weight * (free > clipped)).sum()}
    return loss, {name: x.item() for name, x in parts.items()}


# -------------------------------------------------------------------------- 8. tasks and rewards
# Reasoning-Gym seeds item i with seed + i: neighbouring seeds share 999 of 1,000 items, and a split
# by seed leaks. Here the question's hash decides: one in ten is a test question, whichever seed
# drew it. Streams of items lie 10^9 apart: 0 is the test's, 1 the smoke model's, 2 + seed a run's.
SYSTEM = "Think inside <think> and </think>, then give the answer inside <answer> and </answer>."
FORMAT = r"((?!</think>|<answer>).)*</think>\s*<answer>((?!</?answer>).)*</answer>\s*"
counts = Counter()  # of a step: prompts "too_long"; answers "refused", "raised" or "died" of


@lru_cache(maxsize=64)
def dataset(task, seed, task_settings="{}"):
    """500 items of a task; always as many, since acre's items change with the size."""
    with refusing(f"task {task!r} cannot be made with task_settings {task_settings!r}"):
        return reasoning_gym.create_dataset(task, size=500, seed=seed, **json.loads(task_settings))


def chat_prompt(tokenizer, question, cfg):
    """The templated prompt with its worked examples, ending in the opened thought."""
    chat = [{"role": "system", "content": SYSTEM}]
    with refusing(f"shots = {cfg.shots!r}; allowed: a JSON file of [question, reply] pairs"):
        for asked, reply in json.loads(Path(cfg.shots).read_text()) if cfg.shots else []:
            chat += [{"role": "user", "content": asked}, {"role": "assistant", "content": reply}]
    chat.append({"role": "user", "content": question})
    how = {"tokenize": False, "add_generation_prompt": True}
    try:
        prompt = tokenizer.apply_chat_template(chat, **how)
    except Exception:  # noqa: BLE001  (a template refuses a system turn: the user's says it)
        chat[1]["content"] = f"{SYSTEM}\n\n{chat[1]['content']}"
        prompt = tokenizer.apply_chat_template(chat[1:], **how)
    return prompt if prompt.rstrip().endswith("<think>") else prompt + "<think>\n"


def problems(cfg, tokenizer, stream, items, test):
    """The problems (task, entry, prompt) of one split among a stream's items, lazily, each once."""
    seen, found = set(), False
    for i in (stream * 10**9 + item for item in items):
        random.seed(i)  # list_functions draws from the global generator
        entry = dataset(cfg.task, i // 500 * 500, cfg.task_settings)[i % 500]
        digest = hashlib.sha256(entry["question"].encode()).hexdigest()
        if (int(digest, 16) % 10 == 0) == test and digest not in seen:
            seen.add(digest)
            entry["metadata"]["task_settings"] = cfg.task_settings  # four scorers look at them
            prompt = chat_prompt(tokenizer, entry["question"], cfg)
            if len(tokenizer.encode(prompt, add_special_tokens=False)) <= cfg.max_prompt_tokens:
                found = True
                yield cfg.task, entry, prompt
            else:
                counts["too_long"] += 1
    require(found, f"no prompt has at most max_prompt_tokens = {cfg.max_prompt_tokens} tokens")


def train_problem(cfg, tokenizer, n):
    """Problem n < 10^6 of a run, a function of (seed, n): the first of its items that will do."""
    return next(problems(cfg, tokenizer, 2 + cfg.seed, range(n, 10**9, 10**6), test=False))


def test_problems(cfg, tokenizer):
    """Up to `eval_problems` distinct test problems, the same for every seed."""
    stream = problems(cfg, tokenizer, 0, range(60 * cfg.eval_problems), test=True)
    return list(islice(stream, cfg.eval_problems))


def extract_answer(text):
    """'1 + 1</think> <answer> 2 </answer>' -> '2': the last answer after the thought, or None."""
    _, closed, reply = text.rpartition(TAG)
    answers = re.findall(r"<answer>((?:(?!</?answer>).)*)</answer>", reply, re.DOTALL)
    return answers[-1].strip() if closed and answers else None


def rewards(problems, texts):
    """For each problem and text, the paper's reward and its parts; `correct` is a score of 1."""
    parts = []
    for (task, entry, _), text in zip(problems, texts, strict=True):
        points = score(task, extract_answer(text), entry)
        part = {"score": points, "format": float(bool(re.fullmatch(FORMAT, text, re.DOTALL)))}
        reward = 2 * points + 0.5 * part["format"] + 0.5 * (200 <= len(text.split()) <= 400)
        parts.append(part | {"reward": reward, "correct": float(points == 1)})
    return parts


# -------------------------------------------------------------------------- 9. contained scoring
# A model's text reaches a task's scorer thousands of times an hour. Nine scorers execute it (eval,
# or sympy's parse_expr, which is eval too), two find [nan, nan] sorted, others hang or die. So they
# see plain arithmetic and lists only, and all run in a child that the kernel ends when it is late.
EVALS = "countdown puzzle24 polynomial_multiplication simple_integration string_insertion n_queens "
EVALS += "intermediate_integration binary_matrix spiral_matrix number_sorting complex_arithmetic"
NAME = r"[A-Za-z]_?\d?|pi|sqrt|exp|log|ln|[aA]bs|Rational|a?(sin|cos|tan)h?|cot|sec|csc"
PLAIN = rf"""((?<![A-Za-z_])({NAME})(?!\w)|['"](-?[\d.]+|\w)['"]|\.(?=\d)|[\s\d\[\],+*/()!-])*"""
SMALL = r"\s*(-?\d{1,2}(\.\d+)?|[a-zA-Z]|\(-?\d{1,2}(/\d{1,2})?\))(?!\s*(\*\*|!|[\w.(]))"
HUGE = rf"\*\*(?!{SMALL})|(\d{{3}}|[^\d\s])\s*!"  # 9**9**9, 999!, 9!!


def harmless(task, answer, entry):
    """May this scorer see this answer? '2*x**2 + C' yes, '().__class__' and 'exit()' no."""
    right = (str(entry["answer"]).strip(), *entry["metadata"].get("valid_answers", ()))
    plain = re.fullmatch(PLAIN, answer, re.ASCII) and not re.search(HUGE, answer)
    seen = plain or task not in EVALS.split()
    return answer.strip() in right or (seen and len(answer) <= max(4096, 4 * len(right[0])))


def score_forever(pipe):
    """The child: a score, "refused" or "raised" for each (task, answer, entry)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # that is the trainer's business
    sys.stdout = sys.stderr = None
    with suppress(ValueError, OSError):  # the system refuses it; time always holds
        resource.setrlimit(resource.RLIMIT_DATA, (2**32, 2**32))
    while True:
        task, answer, entry = pipe.recv()
        verdict = "raised"
        signal.setitimer(signal.ITIMER_REAL, 2)  # SIGALRM, left to its default, kills at once
        with suppress(BaseException):  # SystemExit too
            data = dataset(task, 0, entry["metadata"].get("task_settings", "{}"))
            ok = harmless(task, answer, entry)
            verdict = float(data.score_answer(answer, entry)) if ok else "refused"
        signal.setitimer(signal.ITIMER_REAL, 0)
        pipe.send(verdict)


@lru_cache(maxsize=1)
def scorer():
    """(process, pipe) of a child, forked from a server without CUDA, that scored a sum right."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["reasoning_gym", "transformers.models.auto.modeling_auto"])
    ours, theirs = context.Pipe()
    entry = dataset("chain_sum", 0)[0]
    with refusing("scoring does not work on this machine: no child process could start"):
        process = context.Process(target=score_forever, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        ours.send(("chain_sum", entry["answer"], entry))
        verdict = ours.recv()
    require(verdict == 1, f"scoring does not work on this machine: a right answer was {verdict}")
    return process, ours


def score(task, answer, entry) -> float:
    """The task's own score in [0, 1], in about 2 s; 0 where `counts` says why. Raises UserError."""
    if answer is None:
        return 0.0
    pipe, verdict = scorer()[1], "died"
    try:
        with suppress(EOFError, OSError):  # the kernel has ended it
            pipe.send((entry["metadata"].get("source_dataset", task), answer, entry))
            verdict = pipe.recv()
    finally:
        if verdict == "died":  # or interrupted: its late answer must not become the next one's
            scorer.cache_clear()
    if isinstance(verdict, str):
        counts[verdict] += 1
        return 0.0
    return verdict if 0 <= verdict <= 1 else 0.0  # spell_backward's sum can go a bit beyond 1


# ------------------------------------------------------------------------------------ 10. models
@torch.no_grad()
def check_model(model):
    """Raises UserError unless the model is head(layers(embeddings)) with full causal attention."""
    if hasattr(model, "motg_checked"):
        return
    ids = torch.arange(10, device=model.device)[None] % model.config.vocab_size  # (1, 10)
    out, _ = read_prompts(model, ids, ids >= 0, 1)
    want, got = model(ids).logits, model.get_output_embeddings()(out.last_hidden_state)
    window, kinds = (getattr(model.config, n, None) for n in ("sliding_window", "layer_types"))
    full = not window and {*(kinds or ())} <= {"full_attention"}
    same = full and torch.allclose(want, got, atol=1e-2, rtol=1e-2)
    require(same, f"{type(model).__name__}; allowed: full attention, unscaled embeddings and head")
    model.motg_checked = True


def load_model(cfg, name):
    """An fp32 model, on its device, and its tokenizer. Raises UserError for what cannot be used."""
    cuda, small = torch.cuda.is_available(), cfg.smoke and cfg.device == "auto"
    require(cuda or small or cfg.device == "cpu", "no CUDA GPU; allowed: --smoke, or --device cpu")
    with refusing(f"model {str(name)!r} cannot be loaded; allowed: a hub name or a folder"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    require(tokenizer.chat_template, f"{name}: no chat template; use an instruction-tuned model")
    need = cfg.max_prompt_tokens + cfg.max_new_tokens
    most = getattr(model.config, "max_position_embeddings", need)
    require(need <= most, f"max_prompt_tokens + max_new_tokens = {need}; {name} allows {most}")
    require(cfg.k <= (V := model.config.vocab_size), f"k = {cfg.k}; allowed: 1 to {V}")
    check_model(model)
    if model.num_parameters() < 10**7 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # waking a thread takes longer than its half of so small a product
    return model.to("cuda" if cuda and cfg.device != "cpu" else "cpu"), tokenizer


def compute_dtype(model, cfg):
    """What the sampler and the update compute in; the master weights stay fp32."""
    fast = torch.cpu._is_avx512_bf16_supported() and model.num_parameters() > 10**7
    auto = cfg.precision == "auto" and (fast or model.device.type == "cuda")
    return torch.bfloat16 if auto or cfg.precision == "bf16" else torch.float32


def demonstration(entry, rng):
    """Thought and answer for a chain_sum entry: a third works the sum out, a third forgets the last
    term, a third guesses. Imitation learns all three; which one is right, only the reward tells."""
    terms, habit = entry["metadata"]["expression"].split(), rng.choice(["work", "forget", "guess"])
    total, thought = int(terms[0]), []
    for op, term in zip(terms[1::2], terms[2::2]):
        thought.append(f"{total} {op} {term} = {total + int(op + term)}")
        total += int(op + term)
    if habit == "forget":
        total = int(thought.pop().split()[0])
    if habit == "guess":
        thought, total = ["easy"], rng.randrange(-9, 28)
    return f"{', '.join(thought)}{TAG} <answer>{total}</answer><|im_end|>"


def warm_start(steps=500, batch=64, lr=2e-3):
    """A small Qwen2 and its tokenizer, trained on demonstrations, in about a minute."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe = tokenizers.ByteLevelBPETokenizer({c: i for i, c in enumerate(alphabet)}, [])
    bpe.add_tokens(WORDS)
    how = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    how["chat_template"] = "{{ messages[-1].content }}\n<think>\n"  # without the system's turn
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **how)
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    shape |= {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr, (0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    cfg, rng = make_config(smoke=True), random.Random(0)
    stream = problems(cfg, tokenizer, 1, range(10**9), test=False)
    for _ in tqdm(range(steps), desc="warm start", leave=False, disable=None):
        part = list(islice(stream, batch))
        texts = [prompt + demonstration(entry, rng) for _, entry, prompt in part]
        x = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        n = torch.tensor([len(tokenizer.encode(prompt)) for _, _, prompt in part])[:, None]
        learn = x.attention_mask.bool() & (torch.arange(x.input_ids.shape[1]) >= n)
        model(**x, labels=x.input_ids.masked_fill(~learn, -100)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model, tokenizer


def smoke_model(cfg):
    """The folder of the warm-started model: made once, and kept in the user's cache."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "motg", "smoke-4")
    if not (folder / "done").exists():
        for part in warm_start():
            part.save_pretrained(folder)
        (folder / "done").touch()
    return folder


# ------------------------------------------------------------------------------------ 11. probes
def step_probes(r):
    """Means over thinking steps (nats, shares; a token drawn twice is one) and over chains."""
    w = r.log_weights.exp()  # (B, T, k) of slots
    W = ((r.tokens[..., None] == r.tokens[..., None, :]) * w[..., None, :]).sum(-1)  # of tokens
    H = (w * (1 / W.clamp(min=1e-30)).log()).sum(-1)  # (B, T)
    of_steps = {"entropy": r.entropy, "weight_entropy": H, "support": H.exp()}
    of_steps |= {"gini_simpson": 1 - (w * W).sum(-1), "one_hot": W.amax(-1) > 0.99}
    considered = (r.tokens + 1) * (r.thinking[..., None] & (w > 0))  # ids from 1; 0: nothing
    distinct = [len(set(row) - {0}) for row in considered.flatten(1).tolist()]
    found = {name: x[r.thinking] for name, x in of_steps.items()}
    found |= {"distinct_tokens": torch.tensor(distinct), "think_tokens": r.thinking.sum(1)}
    found |= {"answer_tokens": (r.mask & ~r.thinking).sum(1), "truncated": ~r.eos.any(1)}
    return {name: x.float().mean().item() for name, x in found.items()}


def hidden_state_entropy(hidden):
    """Matrix-based (von Neumann) entropy of states (..., T, d), in [0, 1]: of the eigenvalues of
    H H^T / T, H's rows normalised, over log min(T, d) (Giraldo et al. 2014; Skean et al. 2025)."""
    H, (T, d) = F.normalize(hidden.double(), dim=-1), hidden.shape[-2:]
    gram = H @ H.mT if T <= d else H.mT @ H  # the non-zero eigenvalues are the same
    entropy = torch.special.entr(torch.linalg.eigvalsh(gram / T).clamp(min=0)).sum(-1)
    entropy = entropy / math.log(max(min(T, d), 2))
    return entropy if entropy.dim() else entropy.item()


@torch.no_grad()
def hidden_probes(model, r, cfg, chains=32):
    """Hidden-state entropy of the first thoughts, by layer (embeddings first)."""
    found = []
    for one in map(r.select, (r.thinking.sum(1) > 1).nonzero()[:chains]):
        states = completion_hidden(model, one, cfg, one.log_weights, every_layer=True)
        found.append(hidden_state_entropy(torch.stack(states)[:, 0, one.thinking[0]]))
    means = torch.stack(found).mean(0).tolist() if found else []
    return {"hidden_chains": len(found), "hidden_entropy": means}


# ---------------------------------------------------------------------------------- 12. training
def readable(r, row, tokenizer):
    """A trajectory as text, mixtures as `the{0.62}|a{0.38}`, what was read first."""
    text, one = "", r.select(torch.tensor([row], device=r.mask.device))
    for y, tokens, w in zip(one.representative[0], one.tokens[0], one.log_weights[0].exp()):
        order = (w + slot_of(tokens, y)).argsort(descending=True)[: (w > 0).sum()]
        mixed = [f"{tokenizer.decode([tokens[i]])}{{{w[i]:.2f}}}" for i in order]
        text += "|".join(mixed) if len(mixed) > 1 else tokenizer.decode([y])
    return text


def collect(sampler, tokenizer, cfg, steps, generator):
    """The experience of some steps (a range): rollouts, advantages (B,), and what to log."""
    generator.manual_seed(cfg.seed * 1_000_003 + steps[0] + 1)  # the step is all the random state
    counts.clear()
    numbers = range(steps[0] * cfg.prompts_per_step, steps.stop * cfg.prompts_per_step)
    batch = [train_problem(cfg, tokenizer, n) for n in numbers]
    r = rollout(sampler, tokenizer, [prompt for _, _, prompt in batch], cfg, generator)
    parts = rewards([problem for problem in batch for _ in range(cfg.chains)], r.texts)
    reward = torch.tensor([p["reward"] for p in parts], device=r.mask.device).view(-1, cfg.chains)
    log = {"step": steps[0]} | {name: sum(p[name] for p in parts) / len(parts) for name in parts[0]}
    log |= step_probes(r) | {"too_long": 0, "refused": 0, "raised": 0, "died": 0} | counts
    equal = (reward == reward[:, :1]).all(1)  # (prompts,) nothing to compare: no gradient
    return r, group_advantages(reward).flatten(), log | {"no_gradient": equal.float().mean().item()}


def update(policy, reference, optimizer, r, advantages, cfg, lr):
    """One optimiser update on a Rollout and its advantages (B,), in micro-batches."""
    P, (chains, T) = r.prompt_mask.shape[1], r.mask.shape
    tokens, log = max(1, int(r.sampled.sum())), Counter()
    longest = r.mask.view(-1, cfg.chains, T).any(1).sum(1)  # (prompts,) like ones together pad less
    order = torch.arange(chains, device=r.mask.device).view(-1, cfg.chains)[longest.argsort()]
    for rows in order.flatten().split(max(1, int(cfg.micro_tokens / (T + P / cfg.chains)))):
        part = r.select(rows)
        ref = rollout_logprobs(reference, part, cfg) if reference else None
        new = rollout_logprobs(policy, part, cfg)
        old = new.detach()  # one update a batch: it is this policy that has sampled
        loss, stats = grpo_loss(new, old, ref, advantages[rows], part.sampled, cfg, chains, tokens)
        loss.backward()
        log.update(stats | {"sampler_gap": (old - part.logprob).abs().sum().item() / tokens})
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.grad_clip).item()
    optimizer.param_groups[0]["lr"] = lr
    if math.isfinite(norm):  # else the update is skipped, and that is logged
        optimizer.step()
    optimizer.zero_grad()
    return dict(log) | {"grad_norm": norm, "lr": lr, "skipped": int(not math.isfinite(norm))}


def load_run(path, model, optimizer):
    """The state in `path`, model and optimizer loaded, or a new one."""
    if not path.exists():
        return {"step": 0, "metrics": "", "samples": ""}
    with refusing(f"{path} is damaged"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state.pop("model"))
        optimizer.load_state_dict(state.pop("optimizer"))
    return state


def train(cfg):
    """The whole method: roll out, reward, compare within groups, update."""
    require(cfg.chains > 1, f"chains = {cfg.chains}; allowed: 2 or more, for GRPO compares them")
    out, config = Path(cfg.out), Path(cfg.out, "config.json")
    require(cfg.resume == config.exists(), f"out = {cfg.out!r}; allowed: --resume if it has a run")
    scorer()  # raises where scoring does not work
    policy, tokenizer = load_model(cfg, cfg.model or smoke_model(cfg))
    reference = copy.deepcopy(policy).requires_grad_(False) if cfg.kl_beta else None
    adamw = torch.optim.AdamW(policy.parameters(), cfg.lr, (0.9, 0.99), 1e-8, 0.1, fused=True)
    state = load_run(out / "trainer.pt", policy, adamw)
    sampler = copy.deepcopy(policy).requires_grad_(False).to(compute_dtype(policy, cfg))
    generator, tests = torch.Generator(policy.device), test_problems(cfg, tokenizer)
    out.mkdir(parents=True, exist_ok=True)
    config.with_suffix(".new").write_text(json.dumps(asdict(cfg) | {"resume": False}, indent=1))
    config.with_suffix(".new").rename(config)
    test = partial(evaluate, sampler, tokenizer, cfg, generator, tests)
    if "before" not in state:
        state["before"] = test()["pass@1"]
    bar = tqdm(range(state["step"], cfg.steps, cfg.accumulate), desc=cfg.method, disable=None)
    for step in bar:
        done = state["step"] = min(step + cfg.accumulate, cfg.steps)
        r, advantages, log = collect(sampler, tokenizer, cfg, range(step, done), generator)
        lr = cfg.lr * min(1, (step + cfg.accumulate) / max(1, cfg.warmup * cfg.steps))
        log |= update(policy, reference, adamw, r, advantages, cfg, lr)
        sampler.load_state_dict(policy.state_dict())
        if cfg.eval_every and step // cfg.eval_every < done // cfg.eval_every:
            log["test_accuracy"] = test()["pass@1"]
        saves = done == cfg.steps or step // cfg.save_every < done // cfg.save_every
        for row in range(cfg.chains if saves or step == 0 else 0):
            state["samples"] += f"step {step}: {readable(r, row, tokenizer)}\n"
        state["metrics"] += json.dumps(log) + "\n"
        (out / "metrics.jsonl").write_text(state["metrics"])
        (out / "samples.txt").write_text(state["samples"])
        bar.set_postfix({n: f"{log[n]:.2f}" for n in ("reward", "correct", "entropy", "kl")})
        if saves:
            parts = {"model": policy.state_dict(), "optimizer": adamw.state_dict()}
            with refusing(f"{out}/trainer.pt was not written; --resume goes on from the last one"):
                torch.save(state | parts, out / "trainer.new")
                (out / "trainer.new").rename(out / "trainer.pt")
    policy.save_pretrained(out / "checkpoint")
    tokenizer.save_pretrained(out / "checkpoint")
    result = asdict(cfg) | {"accuracy_before": state["before"], "accuracy_after": test()["pass@1"]}
    (out / "result.json").write_text(json.dumps(result, indent=1))
    print(f"{out}: accuracy {state['before']:.3f} -> {result['accuracy_after']:.3f}")


# -------------------------------------------------------------------------------- 13. evaluation
def pass_at_k(n, c, k) -> float:
    """Chance that one of k chains is right when c of n were, unbiased (Chen et al. 2021)."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def evaluate(model, tokenizer, cfg, generator, tests, probes=False):
    """Sampled accuracy on problems: pass@k, standard error over problems, the probes' means."""
    generator.manual_seed(cfg.seed)
    right, means, G, n = [], Counter(), cfg.chains, len(tests)
    for part in [tests[i : i + 32] for i in range(0, n, 32)]:  # so many prompts' caches fit
        r = rollout(model, tokenizer, [prompt for _, _, prompt in part], cfg, generator)
        parts = rewards([problem for problem in part for _ in range(G)], r.texts)
        right += torch.tensor([p["correct"] for p in parts]).view(-1, G).sum(1).int().tolist()
        means.update({name: value * len(part) / n for name, value in step_probes(r).items()})
    result = {f"pass@{k}": sum(pass_at_k(G, c, k) for c in right) / n for k in range(1, G + 1)}
    result["stderr"] = (torch.tensor(right) / G).std().item() / n**0.5 if n > 1 else math.nan
    return result | means | {"problems": n} | (hidden_probes(model, r, cfg) if probes else {})


def evaluation(*configs):
    """`eval`: one model, read out by several methods, side by side; adds to eval.jsonl."""
    cfg = configs[0]
    model, tokenizer = load_model(cfg, cfg.model or smoke_model(cfg))
    model.to(compute_dtype(model, cfg))
    tests, generator = test_problems(cfg, tokenizer), torch.Generator(model.device)
    found = [asdict(c) | evaluate(model, tokenizer, c, generator, tests, True) for c in configs]
    for name in found[0]:
        print(f"{name:20}" + "".join(f"{row[name]!s:>22.20}" for row in found))
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    with Path(cfg.out, "eval.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in found)


# ------------------------------------------------------------------------------ 14. command line
def configs_of(command, given):
    """A Config for each method. Flags win, but for the methods' own settings where several are."""
    out = f"runs/{command}-{given.get('method', 'dirichlet')}-{given.get('seed', 0)}"
    model, methods = Path(given.get("model", "")), given.pop("method", None)
    of_run = command == "eval" and model.name == "checkpoint"
    path = Path(model.parent if of_run else given.get("out", out), "config.json")
    with refusing(f"{path} is damaged"):
        run = dict(json.loads(path.read_text())) if path.exists() else {}
    methods = methods or run.get("method", "dirichlet")
    theirs, configs = METHODS.get(run.get("method"), {}), []
    for method in methods.split(",") if command == "eval" else [methods]:
        own = METHODS.get(method, {})
        gone = {} if method == run.get("method") else theirs | own
        kept = {name: x for name, x in run.items() if name not in gone}
        flags = {name: x for name, x in given.items() if "," not in methods or name not in own}
        configs.append(make_config(**{"out": out} | kept | flags | {"method": method}))
    return configs


def main(argv=None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser("motg.py", argument_default=argparse.SUPPRESS)
    parser.error = partial(require, False)  # one line, where argparse would print its usage too
    parser.add_argument("command", choices=("train", "eval"))
    for f in fields(Config):
        names = sorted({f"--{f.name}", f"--{f.name.replace('_', '-')}"})
        kind = {"action": "store_true"} if f.type is bool else {"type": f.type}
        allowed = "|".join(f.metadata["choices"] or RULES.get(f.name, ()))
        parser.add_argument(*names, help=f"{f.metadata['help']} {allowed} [{f.default}]", **kind)
    try:
        given = vars(parser.parse_args(argv))
        command = given.pop("command")
        return {"train": train, "eval": evaluation}[command](*configs_of(command, given)) or 0
    except (UserError, OSError, torch.OutOfMemoryError) as e:
        print(f"motg: {str(e).splitlines()[0]}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
