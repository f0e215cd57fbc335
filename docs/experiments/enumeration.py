"""All that can happen on a vocabulary of five tokens, enumerated without motg's code.

`trajectories` walks the tree of a rollout's outcomes with transformers' plainest attention: each has
its probability as a function of the parameters. So expected rewards and their gradients are sums,
and motg's samples, scores and gradients can be held against them. The tests and bias.py use it.
"""

import copy
import math
import sys
from itertools import permutations, product
from pathlib import Path

import tokenizers
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import motg  # noqa: E402

DRAWN = ("without-replacement", "with-replacement")
THINK = "</think>"


# ----------------------------------------------------------------------- models and tokenizers
def tokenizer_of(pieces, merges=(), special=("<eos>", "<end>")):
    """Byte-level BPE with these tokens and no others."""
    vocab = {piece: i for i, piece in enumerate(pieces.split())}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=list(merges)))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens(list(special))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")


FIVE = tokenizer_of("a b c", special=("<eos>", "</think>"))
PARTS = tokenizer_of("a b", special=("<eos>", "</", "think>"))  # the tag is two tokens


def random_model(tokenizer, family="Qwen2", seed=3, head=1.0, **settings):
    """A random model as transformers makes it; a small `head` makes p flat."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
        "bos_token_id": None,
    }
    kind = getattr(transformers, f"{family}Config")(**shape | settings)
    model = getattr(transformers, f"{family}ForCausalLM")(kind).eval()
    model.lm_head.weight.data.mul_(head)
    stops = [i for token, i in tokenizer.get_vocab().items() if token in ("<eos>", "<end>")]
    model.generation_config.eos_token_id = stops
    return model


def eager(model):
    """A copy with transformers' plainest attention."""
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    return twin


# --------------------------------------------------------------------------- what a step can do
def law_of(p, k, replace):
    """{ordered candidates: probability} of k draws from p; without replacement, Plackett-Luce."""
    can = [v for v in range(len(p)) if p[v] > 0]
    orders = list(product(can, repeat=k) if replace else permutations(can, k))
    q = p[torch.tensor(orders)]  # (N, k)
    struck = 0.0 if replace else q.cumsum(1) - q
    return dict(zip(orders, (q / (1 - struck)).prod(1)))


def entropy(p):
    """H(p) in nats; tokens without probability have no part in it, nor in its gradient."""
    p = p[p > 0]
    return -(p * p.log()).sum()


def weights_by_formula(p, tokens, y, cfg):
    """Weights (N, k) of tokens (N, k), when those read are y (N, 1)."""
    hat = p[tokens] / p[tokens].sum(1, keepdim=True)
    if cfg.aggregation == "uniform":
        return torch.full_like(hat, 1 / hat.shape[1])
    if cfg.aggregation == "posterior":
        H = entropy(p) / math.log(len(p))
        read = tokens == y
        read = read & (read.cumsum(1) == 1)  # the first slot that holds it
        return (H * hat + (cfg.moi_beta + 1 - H) * read) / (cfg.moi_beta + 1)
    return hat


def likeliest(p, cfg):
    """The candidates that a truncating rule keeps, by a loop."""
    p, kept = p.detach(), []
    for v in p.argsort(descending=True).tolist()[: cfg.k]:
        if cfg.sampling == "nucleus" and sum(p[u] for u in kept) >= cfg.top_p:
            break
        if cfg.sampling == "min-p" and p[v] < cfg.min_p * p.max():
            break
        if p[v] > 0:
            kept.append(v)
    return tuple(kept)


def overlap(text):
    """How much of the tag a text ends with; all of it where the text holds it."""
    if THINK in text:
        return len(THINK)
    return max(n for n in range(len(THINK)) if text.endswith(THINK[:n]))


def outcomes(p, cfg, t, text, words):
    """[(probability, tokens, weights, token read, kind)] of all that can happen at step t of a
    thought of this text, given p over the tokens `words`; those with the same future are one."""
    one = torch.ones(1)
    ends = [v for v, word in enumerate(words) if word == "<eos>" or THINK in text + word]
    if cfg.end == "most-likely" and p.argmax() in ends:
        return [(one[0], (int(p.argmax()),), one, int(p.argmax()), motg.FORCED)]
    q = p.clone()
    q[ends] = 0
    on, q = q.sum(), q / q.sum()
    found = [(p[v], (v,), one, v, motg.TOKEN) for v in ends]
    if cfg.end == "most-likely":
        on, found, p = one[0], [], q
    sharp = entropy(p) < cfg.mix_entropy
    one_draw = cfg.k == 1 and cfg.sampling in DRAWN
    if sharp or one_draw or (cfg.mix_steps and t >= cfg.mix_steps):
        goes_on = [v for v in range(len(p)) if v not in ends]
        return found + [(p[v], (v,), one, v, motg.TOKEN) for v in goes_on]
    mixed = {}  # (tokens, token read): probability
    if cfg.sampling in DRAWN:
        for v, chance in law_of(q, cfg.k, cfg.sampling == "with-replacement").items():
            mixed[v, v[0]] = chance
    else:
        tokens = likeliest(q, cfg)
        hat = q / q[[*tokens]].sum()
        hat = torch.full_like(q, 1 / len(tokens)) if cfg.aggregation == "uniform" else hat
        first = {}  # where nothing depends on which one is read, they are one outcome
        for v in tokens:
            future = v if cfg.aggregation == "posterior" else overlap(text + words[v])
            read = first.setdefault(future, v)
            mixed[tokens, read] = mixed.get((tokens, read), 0) + hat[v]
    rows = torch.tensor([tokens for tokens, _ in mixed])  # (N, k)
    read = torch.tensor([[y] for _, y in mixed])  # (N, 1)
    weights = weights_by_formula(q, rows, read, cfg)
    for ((tokens, y), chance), w in zip(mixed.items(), weights):
        found.append((on * chance, tokens, w, y, motg.MIXED))
    return found


def step_outcomes(p, cfg, t, text, words):
    """The same for any step: answers are ordinary tokens, and `end=steps` puts the tag in."""
    one = torch.ones(1)
    if THINK in text:
        return [(p[v], (v,), one, v, motg.TOKEN) for v in range(len(p))]
    if cfg.end == "steps" and t == cfg.end_steps:
        v = words.index(THINK)
        return [(one[0], (v,), one, v, motg.FORCED)]
    return outcomes(p, cfg, t, text, words)


def trajectories(model, tokenizer, cfg, prompt):
    """[(probability, steps)] of all that can happen behind embeddings (n, d); with gradient. A step
    is (tokens, weights, token read, kind, text before it)."""
    words = [tokenizer.decode([v]) for v in range(len(tokenizer))]
    table, found, live = model.get_input_embeddings().weight, [], [(1.0, [], prompt, "")]
    for t in range(cfg.max_new_tokens):
        logits = model(inputs_embeds=torch.stack([inputs for _, _, inputs, _ in live])).logits
        law, branches, live = (logits[:, -1] / cfg.temperature).softmax(-1), live, []
        for p, (before, steps, inputs, text) in zip(law, branches):
            for q, tokens, w, y, kind in step_outcomes(p, cfg, t, text, words):
                so_far = [*steps, (list(tokens), w.tolist(), y, kind, text)]
                if words[y] == "<eos>" or t + 1 == cfg.max_new_tokens:
                    found.append((before * q, so_far))
                    continue
                rows = table[list(tokens)]  # (k, d)
                mixed = rows.amax(0) if cfg.aggregation == "max" else w @ rows
                live.append((before * q, so_far, torch.cat([inputs, mixed[None]]), text + words[y]))
        if not live:
            break
    return found


# ------------------------------------------------------------------------- motg's own Rollouts
def by_hand(sample, found, k):
    """A Rollout of enumerated trajectories, on the prompt of the Rollout `sample`."""
    T = max(len(steps) for _, steps in found)
    ended = ([0], [1.0], 0, motg.PAD, None)
    rows = [[*steps, *[ended] * (T - len(steps))] for _, steps in found]

    def tensor(of_step):
        return torch.tensor([[of_step(*step) for step in row] for row in rows])

    log_weights = tensor(lambda v, w, *_: w + [0.0] * (k - len(w))).log()
    steps = motg.Steps(
        tokens=tensor(lambda v, *_: v + [v[0]] * (k - len(v))),
        log_weights=log_weights,
        representative=tensor(lambda v, w, y, *_: y),
        kind=tensor(lambda v, w, y, kind, text: kind),
        matched=tensor(lambda v, w, y, k, text: motg.ENDED if text is None else overlap(text)),
        log_pv=log_weights,
        logprob=log_weights[..., 0],
        entropy=log_weights[..., 0],
    )
    first = torch.zeros(len(found), dtype=torch.long)
    prompts = sample.prompt_ids[first], sample.prompt_mask[first], first
    return motg.Rollout(steps, *prompts, sample.tag, [])


def what_happened(r, cfg):
    """For each row a key, which two rows share if and only if they are the same trajectory."""
    filled = (r.log_weights > -motg.INF) & r.mask[..., None]
    keys = r.tokens.masked_fill(~filled, -1).sort(-1).values  # (B, T, k)
    after = r.tag.after[r.matched, r.representative]  # (B, T)
    if cfg.aggregation == "posterior":  # the token read has made the weights
        after = r.representative
    keys = torch.cat([keys, after.masked_fill(~r.mask, -1)[..., None]], -1)
    return [tuple(key) for key in keys.flatten(1).tolist()]
