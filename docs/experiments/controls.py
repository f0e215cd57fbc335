"""Controls of docs/evidence.md: rules that have one half of what a mixture has, as rows of motg's
tables."""

import sys
from pathlib import Path

import torch
from torch import inf

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import motg


def shuffled(log_hat, log_p, cfg, generator=None):
    """Dirichlet weights from p^ in a random order: noise of the same size that p does not steer."""
    order = torch.rand(log_hat.shape, generator=generator).argsort(-1)
    return motg.dirichlet(log_hat.gather(-1, order), log_p, cfg, generator)


def stranger(log_p, first, cfg, generator=None):
    """A token drawn from p and one drawn blindly from all that do not end the thought; their
    weights have the law of those of the two likeliest: as much noise as a mixture makes, and no
    knowledge."""
    level = torch.zeros_like(log_p).masked_fill(log_p == -inf, -inf)
    other = motg.draw(level.log_softmax(-1), generator)  # (B,)
    return torch.stack([first, other], dim=-1), log_p.topk(2).values


def first_logprob(log_p, tokens, cfg):
    """Of the token that was drawn from p."""
    return log_p.gather(-1, tokens[..., :1])[..., 0]


def add_controls():
    """Makes them rules of motg."""
    motg.AGGREGATION["shuffled"] = motg.Weights(shuffled, motg.dirichlet_logdensity)
    motg.SAMPLING["stranger"] = motg.Candidates(stranger, first_logprob)
