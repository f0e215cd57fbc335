"""The rest of the field's rules and methods, as rows of motg's tables.

    python docs/tools/field.py train --smoke --method lepo
    python docs/tools/field.py eval --model runs/train-lepo-0 --method mixture-of-inputs

Importing this file adds them: rules to motg.SAMPLING, motg.AGGREGATION and motg.END, methods to
motg.METHODS, and their settings to motg.Config. Nothing in motg.py knows of them, so this is also
the example for a rule of your own.

    method             paper                                      candidates, weights
    multiplex          Multiplex Thinking                         draws with replacement, p^
    mixture-of-inputs  Mixture of Inputs                          a draw and top-k, posterior
    soft-grpo          SofT-GRPO                                  top-k, gumbel
    lepo               LEPO (mixes in the first 32 steps)         top-k, gumbel
    cot2               Continuous Chain of Thought (2505.23648)   draws with replacement, their mean
    cot2-dirichlet     the same                                   p >= 1e-3, dirichlet

What two others would take. *Soft Tokens, Hard Truths* (arXiv 2509.19170) feeds the whole
vocabulary's mean at tau = 0.5 plus Gaussian noise, and scores the noise's density: the noise, d
numbers a step, would have to be recorded beside ids and weights. TARPO (arXiv 2606.05859) draws at
each step whether it mixes, and scores that: a gate with a log-probability beside `mix_entropy`, and
parameters of its own.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import inf

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import motg
from motg import ANSWER, FORCED, Candidates, Weights, top_k


@dataclass
class Config(motg.Config):
    """motg's settings, and those of the rules in this file."""

    top_p: float = 0.95  # nucleus: the probability that the candidates reach together
    min_p: float = 0.05  # min-p: a candidate needs at least this share of the largest p
    moi_beta: float = 1.0  # posterior: beta of Mixture of Inputs
    gumbel_tau: float = 1.0  # gumbel: tau of the softmax
    end_entropy: float = 0.1  # end=entropy: a step counts if its H(p) is below this, in nats
    end_patience: int = 256  # end=entropy: end after so many of these in a row (Soft Thinking: 256)
    end_steps: int = 128  # end=steps: the thinking steps before the tag is put in


# ------------------------------------------------------------------------------------- candidates
def nucleus(log_p, first, cfg, generator=None):
    """The likeliest tokens, as few as together reach top_p, at most k of them."""
    tokens, log_pv = top_k(log_p, first, cfg)
    p = log_pv.exp()
    before = p.cumsum(-1) - p  # a token stays while the mass before it is below top_p
    return tokens, log_pv.masked_fill(before >= cfg.top_p, -inf)


def min_p(log_p, first, cfg, generator=None):
    """The tokens with p of at least min_p times the largest p, at most k of them."""
    tokens, log_pv = top_k(log_p, first, cfg)
    return tokens, log_pv.masked_fill(log_pv < log_pv[:, :1] + math.log(cfg.min_p), -inf)


def threshold(log_p, first, cfg, generator=None):
    """The tokens with p >= 1e-3, at most k."""
    tokens, log_pv = top_k(log_p, first, cfg)
    kept = log_pv >= math.log(1e-3)
    kept[:, 0] = True  # the likeliest token, however flat p is
    return tokens, log_pv.masked_fill(~kept, -inf)


def with_replacement(log_p, first, cfg, generator=None):
    """k independent draws."""
    tokens = torch.stack([first, *(motg.draw(log_p, generator) for _ in range(cfg.k - 1))], -1)
    return tokens, log_p.gather(-1, tokens)


def independent(log_p, tokens, cfg):
    """log P of such draws: sum_j log p(v_j)."""
    return log_p.gather(-1, tokens).sum(-1)


def drawn_and_top_k(log_p, first, cfg, generator=None):
    """A draw from p, and the k - 1 likeliest of the other tokens."""
    others = log_p.scatter(-1, first[:, None], -inf).topk(cfg.k - 1)
    tokens = torch.cat([first[:, None], others.indices], dim=-1)  # (B, k)
    return tokens, log_p.gather(-1, tokens)


def of_the_first(log_p, tokens, cfg):
    """log P of the one token that was drawn."""
    return log_p.gather(-1, tokens[..., :1])[..., 0]


# ---------------------------------------------------------------------------------------- weights
def posterior(log_hat, log_p, cfg, generator=None):
    """Mixture of Inputs: w = (H p^ + (beta + 1 - H) onehot) / (beta + 1), one-hot at the candidate
    that was drawn, the first. H is the entropy of p divided by log V, in [0, 1]."""
    H = -(log_p.exp() * log_p.clamp(min=-99)).sum(-1, keepdim=True)  # (..., 1)
    H = H / math.log(max(2, log_p.shape[-1]))
    is_first = torch.arange(log_hat.shape[-1], device=log_hat.device) == 0  # (k,)
    w = (H * log_hat.exp() + (cfg.moi_beta + 1 - H) * is_first) / (cfg.moi_beta + 1)
    return w.clamp(min=1e-30).log()


def gumbel(log_hat, log_p, cfg, generator=None):
    """w = softmax((log p^ + g) / tau), where g is Gumbel noise (SofT-GRPO, LEPO)."""
    noise = -torch.empty_like(log_hat).exponential_(generator=generator).log()
    return (log_hat + noise) / cfg.gumbel_tau


def concrete_logdensity(log_hat, log_w, filled, cfg):
    """The log-density of such w, called Concrete (Maddison et al. 2017, eq. 10)."""
    n = filled.sum(-1)  # (...)
    x = log_hat - cfg.gumbel_tau * log_w  # (..., k)
    constant = n.float().lgamma() + (n - 1) * math.log(cfg.gumbel_tau)
    log_total = x.masked_fill(~filled, -inf).logsumexp(-1)
    return constant + ((x - log_w) * filled).sum(-1) - n * log_total


# --------------------------------------------------------------------------- the end of a thought
def after(decoder, patience, threshold=inf):
    """Ends a thought as `drawn` does, or behind `patience` steps in a row with H(p) below a
    threshold in nats: then the tag is put in, token by token."""
    record, t = decoder.record, decoder.t
    step = torch.arange(record.kind.shape[1], device=t.device)  # (T,)
    blunt = record.entropy[decoder.rows] >= threshold  # (B, T)
    blunt &= record.kind[decoder.rows] != FORCED  # a tag that has begun is put in to its end
    last = torch.where(blunt & (step < t), step, -1).amax(1)  # (B,) the last step that was not calm
    place = t - 1 - last - patience  # (B,) which token of the tag
    token = decoder.tag_ids[place.clamp(0, len(decoder.tag_ids) - 1)]
    return (decoder.matched < ANSWER) & (place >= 0), token


# ----------------------------------------------------------------------------------- motg's tables
motg.Config = Config
motg.MAY_BE_0 |= {"moi_beta", "end_entropy"}
motg.MOST |= {"top_p": 1, "min_p": 1}
motg.SAMPLING |= {
    "with-replacement": Candidates(with_replacement, independent),
    "drawn-and-top-k": Candidates(drawn_and_top_k, of_the_first),
    "nucleus": Candidates(nucleus),
    "min-p": Candidates(min_p),
    "threshold": Candidates(threshold),
}
motg.AGGREGATION |= {
    "uniform": Weights(lambda log_hat, *_: torch.zeros_like(log_hat)),
    "posterior": Weights(posterior),
    "gumbel": Weights(gumbel, concrete_logdensity, reads_largest=True),
}
motg.END |= {
    "entropy": lambda d: after(d, d.cfg.end_patience, d.cfg.end_entropy),
    "steps": lambda d: after(d, d.cfg.end_steps),
}


def preset(sampling, aggregation, **more):
    """The settings of a method."""
    return {"sampling": sampling, "aggregation": aggregation, **more}


motg.METHODS |= {
    "multiplex": preset("with-replacement", "probability", k=3, logprob="exact"),
    "mixture-of-inputs": preset("drawn-and-top-k", "posterior"),
    "soft-grpo": preset("top-k", "gumbel", k=5, gumbel_tau=0.1, logprob="exact"),
    "lepo": preset("top-k", "gumbel", k=30, gumbel_tau=0.5, mix_steps=32, logprob="weighted"),
    "cot2": preset("with-replacement", "uniform", k=3, logprob="weighted"),
    "cot2-dirichlet": preset("threshold", "dirichlet", k=32, logprob="exact"),
}

if __name__ == "__main__":
    sys.exit(motg.main())
