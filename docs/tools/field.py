"""More of the field's methods, as rows of motg's tables: motg.py needs no change for them.

    python docs/tools/field.py train --smoke --method cot2
    python docs/tools/field.py eval --model runs/train-cot2-0 --method single,cot2,cot2-dirichlet

Both are of *Continuous Chain of Thought* (CoT2, Gozeten et al., arXiv 2505.23648):

    cot2             K draws with replacement, averaged; their score is the mean of their log p
    cot2-dirichlet   Dirichlet weights over all tokens with p of at least 1e-3, at most k of them

What two others would take. *Soft Tokens, Hard Truths* (arXiv 2509.19170) feeds the whole
vocabulary's mean at tau = 0.5 plus Gaussian noise, and scores the noise's density: the noise, d
numbers a step, would have to be recorded beside ids and weights, and `Weights.feed` would have to
see it. TARPO (arXiv 2606.05859) draws at each step whether it mixes, and scores that: a gate with
a log-probability beside `mix_entropy`, and parameters of its own.
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import motg


def threshold(log_p, first, cfg, generator=None):
    """The tokens with p >= 1e-3, at most k."""
    tokens, log_pv = motg.top_k(log_p, first, cfg)
    kept = log_pv >= math.log(1e-3)
    kept[:, 0] = True  # the likeliest token, however flat p is
    return tokens, log_pv.masked_fill(~kept, -motg.INF)


motg.SAMPLING["threshold"] = motg.Candidates(threshold)
motg.METHODS["cot2"] = {
    "sampling": "with-replacement",
    "aggregation": "uniform",
    "k": 3,
    "logprob": "weighted",
}
motg.METHODS["cot2-dirichlet"] = {
    "sampling": "threshold",
    "aggregation": "dirichlet",
    "k": 32,
    "logprob": "exact",
}

if __name__ == "__main__":
    sys.exit(motg.main())
