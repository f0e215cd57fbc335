"""What motg.py should give, computed without its code: for the tests, and for bias.py.

`trajectories` walks the tree of all that can happen in a rollout on a vocabulary of five tokens,
with transformers' plainest attention: each outcome has its probability as a function of the
parameters. So expected rewards and their gradients are sums, and motg's samples, scores and
gradients can be held against them. `logprobs` scores any rollout row by row and step by step,
from the papers' formulas.
"""

import copy
import json
import math
import re
import sys
from collections import Counter
from itertools import permutations, product
from pathlib import Path

import tokenizers
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from field import motg  # with the rules of other papers, which pass the same tests

DRAWN = ("without-replacement", "with-replacement", "drawn-and-top-k")
THINK = "</think>"
STOPS = ("<eos>", "<end>")  # what ends a row
INF = math.inf


# ----------------------------------------------------------------------- models and tokenizers
def tokenizer_of(pieces, merges=(), special=STOPS):
    """Byte-level BPE with these tokens and no others."""
    vocab = {piece: i for i, piece in enumerate(pieces.split())}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=list(merges)))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens(list(special))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")


# Pieces of the tag cut in many ways, tokens that swallow what follows it, two kinds of EOS.
PIECES = "< / > t h i n k a b c Ċ </ th in thin think >Ċ </think a> << b</think>a k></th think><"
MERGES = [("<", "/"), ("t", "h"), ("i", "n"), ("th", "in"), ("thin", "k"), (">", "Ċ")]
SMALL = tokenizer_of(f"{PIECES} ></think", MERGES)
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
    stops = [i for token, i in tokenizer.get_vocab().items() if token in STOPS]
    model.generation_config.eos_token_id = stops
    return model


def bigram(tokenizer, follow):
    """A model whose next token depends on the last alone: `follow` is {token: {next: p}}."""
    model, ids = random_model(tokenizer), tokenizer.convert_tokens_to_ids
    model.model.layers[0].self_attn.o_proj.weight.data.zero_()
    model.model.layers[0].mlp.down_proj.weight.data.zero_()
    model.model.embed_tokens.weight.data.copy_(torch.eye(len(tokenizer), 32))
    model.lm_head.weight.data.fill_(-30 / 32**0.5)  # a one-hot state is normed to sqrt(32)
    for last, nexts in follow.items():
        for token, p in nexts.items():
            model.lm_head.weight.data[ids(token), ids(last)] = math.log(p) / 32**0.5
    return model


def deaf(tokenizer, p):
    """A model that says the same behind any input: `p` is {token: probability}."""
    token = next(iter(p))
    model = bigram(tokenizer, {token: p})
    table = model.model.embed_tokens.weight.data
    table[:] = table[tokenizer.convert_tokens_to_ids(token)].clone()
    return model


def eager(model):
    """A copy with transformers' plainest attention."""
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    return twin


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
CHATML += "{% endfor %}{{ '<|im_start|>assistant\n' }}"
NO_SYSTEM = "{{ raise_exception('no such role') if messages[0].role == 'system' }}" + CHATML
THINKING = "{{ messages[-1].content }}\n<think>\n"


def byte_tokenizer(template=CHATML):
    """A token for each byte, and two special ones."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe = tokenizers.ByteLevelBPETokenizer({byte: i for i, byte in enumerate(alphabet)}, [])
    bpe.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    how = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "chat_template": template}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **how)


def save_model(folder, template=CHATML):
    """A folder as from the hub: a random model of two layers and its tokenizer."""
    tokenizer = byte_tokenizer(template)
    tokenizer.save_pretrained(folder)
    how = {"num_hidden_layers": 2, "max_position_embeddings": 1024}
    model = random_model(tokenizer, seed=0, **how)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    return str(folder)


def as_smoke_model(monkeypatch, folder, **changes):
    """Puts a model's folder in the place of the smoke mode's; `changes` are to its settings."""
    settings = json.loads((motg.SMOKE / "settings.json").read_text()) | changes
    Path(folder, "settings.json").write_text(json.dumps(settings))
    monkeypatch.setattr(motg, "SMOKE", Path(folder))


# --------------------------------------------------------------------------- what a step can do
def seeded(n):
    return torch.Generator().manual_seed(n)


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def relative_error(got, want):
    return ((got - want).norm() / want.norm()).item()


def assert_law(outcomes, law):
    """Observed outcomes against {outcome: probability}; those that are expected less than ten times
    count as one.

    A chi-square statistic with d degrees of freedom exceeds d + 2 sqrt(20 d) + 40 with odds below
    e^-20 = 2e-9 (Laurent and Massart 2000).
    """
    seen, cells = Counter(outcomes), {}  # {outcome: (times seen, times expected)}
    assert set(seen) <= set(law) and abs(sum(law.values()) - 1) < 1e-4
    for outcome, p in law.items():
        expected = float(p) * seen.total()
        cell = outcome if expected >= 10 else "rare"
        before = cells.get(cell, (0, 0.0))
        cells[cell] = (before[0] + seen[outcome], before[1] + expected)
    if cells.get("rare", (0, 10.0))[1] < 10:
        cells.pop("rare")
    chi2 = sum((count - expected) ** 2 / expected for count, expected in cells.values())
    assert chi2 <= len(cells) + 2 * math.sqrt(20 * len(cells)) + 40


def law_of(p, k, sampling):
    """{ordered candidates: probability} of k draws from p; without replacement, Plackett-Luce. Of
    `drawn-and-top-k`: of one draw, which the likeliest others follow."""
    can, replace = [v for v in range(len(p)) if p[v] > 0], sampling == "with-replacement"
    if sampling == "drawn-and-top-k":
        falling = sorted(can, key=lambda v: -p[v])
        return {(v, *[u for u in falling if u != v][: k - 1]): p[v] for v in can}
    orders = list(product(can, repeat=k) if replace else permutations(can, k))
    q = p[torch.tensor(orders)]  # (N, k)
    struck = 0.0 if replace else q.cumsum(1) - q
    return dict(zip(orders, (q / (1 - struck)).prod(1)))


def entropy(p):
    """H(p) in nats; tokens without probability have no part in it, nor in its gradient."""
    p = p[p > 0]
    return -(p * p.log()).sum()


def weights_by_formula(p, tokens, cfg):
    """Weights (N, k) of tokens (N, k)."""
    hat = p[tokens] / p[tokens].sum(1, keepdim=True)
    if cfg.aggregation == "uniform":
        return torch.full_like(hat, 1 / hat.shape[1])
    if cfg.aggregation == "posterior":
        H = entropy(p) / math.log(len(p))
        first = torch.arange(hat.shape[1]) == 0
        return (H * hat + (cfg.moi_beta + 1 - H) * first) / (cfg.moi_beta + 1)
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


def ends_thought(text, word):
    return word in STOPS or THINK in text + word


def overlap(text):
    """How much of the tag a text ends with; all of it where the text holds it."""
    if THINK in text:
        return len(THINK)
    return max(n for n in range(len(THINK)) if text.endswith(THINK[:n]))


def outcomes(p, cfg, t, text, words):
    """[(probability, tokens, weights, token read, kind)] of all that can happen at step t of a
    thought of this text, given p over the tokens `words`; those with the same future are one."""
    one = torch.ones(1)
    ends = [v for v, word in enumerate(words) if ends_thought(text, word)]
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
        for v, chance in law_of(q, cfg.k, cfg.sampling).items():
            mixed[v, v[0]] = chance
    else:
        tokens = likeliest(q, cfg)
        first = {}  # where nothing depends on which one is read, they are one outcome
        for v, w in zip(tokens, weights_by_formula(q, torch.tensor([tokens]), cfg)[0]):
            read = first.setdefault(overlap(text + words[v]), v)
            mixed[tokens, read] = mixed.get((tokens, read), 0) + w
    rows = torch.tensor([tokens for tokens, _ in mixed])  # (N, k)
    weights = weights_by_formula(q, rows, cfg)
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
                mixed = w @ rows
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
    filled = (r.log_weights > -INF) & r.mask[..., None]
    keys = r.tokens.masked_fill(~filled, -1)  # (B, T, k)
    after = r.tag.after[r.matched, r.representative]  # (B, T)
    keys = torch.cat([keys, after.masked_fill(~r.mask, -1)[..., None]], -1)
    return [tuple(key) for key in keys.flatten(1).tolist()]


# ------------------------------------------------------------- any rollout, row by row
def words_of(model, tokenizer):
    """The texts of a model's tokens; it may have more than its tokenizer."""
    words = [tokenizer.decode([v]) for v in range(len(tokenizer))]
    return words + [""] * (model.config.vocab_size - len(words))


def score_by_hand(log_p, tokens, log_w, read, text, words, cfg):
    """The log-prob of a mixture, from the papers' formulas: log_p (V,) in double precision, its
    filled slots, the token read, and the text of the thought before it."""
    if cfg.logprob == "representative":
        return log_p[read]
    if cfg.logprob == "weighted":
        return (log_w.exp() * log_p[tokens]).sum()
    on = [v for v, word in enumerate(words) if not ends_thought(text, word)]
    score = log_p[on].logsumexp(0)  # log(1 - p_end)
    log_q = log_p[tokens] - score  # log p' of the candidates
    log_hat = log_q.log_softmax(0)
    if cfg.sampling == "drawn-and-top-k":
        score = score + log_q[0]
    elif cfg.sampling in DRAWN:
        struck = 0.0 if cfg.sampling == "with-replacement" else log_q.exp().cumsum(0) - log_q.exp()
        score = score + log_q.sum() - torch.log1p(-torch.as_tensor(struck)).sum()
    elif cfg.aggregation != "gumbel":  # what depends on which candidate is read?
        q = torch.zeros_like(log_p).index_put((torch.tensor(on),), (log_p[on] - score).exp())
        w = weights_by_formula(q, tokens[None], cfg)[0]
        w = log_w.exp() if cfg.aggregation == "dirichlet" else w
        alike = [overlap(text + words[v]) == overlap(text + words[read]) for v in tokens]
        score = score + w[alike].sum().log()
    n, tau = len(tokens), cfg.gumbel_tau
    if cfg.aggregation == "dirichlet":
        a = cfg.concentration * log_hat.exp().clamp(min=1e-5)
        score = score + ((a - 1) * log_w - a.lgamma()).sum() + a.sum().lgamma()
    if cfg.aggregation == "gumbel":
        score = score + math.lgamma(n) + (n - 1) * math.log(tau) - log_w.sum()
        score = score + (log_hat - tau * log_w).log_softmax(0).sum()
    return score


def distributions(model, tokenizer, r, cfg):
    """(row, step, text before it, log p) of all steps of a Rollout: row by row, without padding,
    cache or chunks."""
    words = words_of(model, tokenizer)
    table = model.get_input_embeddings().weight
    for b, n in enumerate(r.mask.sum(1).tolist()):
        w, vectors, text = r.log_weights[b, :n].exp()[..., None], table[r.tokens[b, :n]], ""
        mixed = (w * vectors).sum(1)  # (n, d)
        x = torch.cat([table[r.prompt_ids[b][r.prompt_mask[b]]], mixed])
        z = model(inputs_embeds=x[None]).logits[0, -n - 1 : -1].double()  # (n, V)
        for t, read in enumerate(r.representative[b, :n].tolist()):
            thinks = THINK not in text
            T = cfg.temperature if thinks else cfg.answer_temperature or cfg.temperature
            log_p = (z[t] / T).log_softmax(-1)
            if thinks and cfg.end == "most-likely":
                ends = torch.tensor([ends_thought(text, word) for word in words])
                log_p = log_p.masked_fill(ends, -INF).log_softmax(-1)
            yield b, t, text, log_p
            text += words[read]


def logprobs(model, tokenizer, r, cfg):
    """What rollout_logprobs should give, (B, T)."""
    words = words_of(model, tokenizer)
    scores = torch.zeros(r.mask.shape).double()
    for b, t, text, log_p in distributions(model, tokenizer, r, cfg):
        read = int(r.representative[b, t])
        if r.kind[b, t] == motg.TOKEN:
            scores[b, t] = log_p[read]
        if r.kind[b, t] == motg.MIXED:
            i = r.log_weights[b, t] > -INF
            step = r.tokens[b, t][i], r.log_weights[b, t][i].double(), read
            scores[b, t] = score_by_hand(log_p, *step, text, words, cfg)
    return scores.float()


def check_rollout(r, tokenizer, cfg):
    """What holds of every rollout: lengths, kinds, the end of a thought, what mixtures hold."""
    (B, T), n, filled = r.mask.shape, r.mask.sum(1), r.log_weights > -INF
    assert r.tokens.shape == r.log_weights.shape == (B, T, cfg.k) and len(r.texts) == B
    assert torch.equal(r.mask, torch.arange(T) < n[:, None])
    assert torch.equal(r.mask, r.kind != motg.PAD) and not (r.thinking & ~r.mask).any()
    assert torch.equal(r.sampled, (r.kind == motg.TOKEN) | (r.kind == motg.MIXED))
    assert torch.equal(r.mixed, r.kind == motg.MIXED)
    assert r.logprob.isfinite().all() and (r.logprob[~r.sampled] == 0).all()
    assert torch.equal(r.prompt, torch.arange(B) // cfg.chains)
    assert ((r.tokens == r.representative[..., None]) & filled).any(-1)[r.mask].all()
    assert (filled.sum(-1) == 1)[~r.mixed].all()  # all else is one-hot
    words = [tokenizer.decode([v]) for v in range(len(tokenizer))]
    gate = (r.entropy >= cfg.mix_entropy) & (torch.arange(T) < (cfg.mix_steps or T))
    gate &= cfg.k > 1 or cfg.sampling not in DRAWN
    for b in range(B):
        text, kinds = "", r.kind[b].tolist()
        for t, y in enumerate(r.representative[b, : n[b]].tolist()):
            thinks, ends = THINK not in text, ends_thought(text, words[y])
            assert r.thinking[b, t] == thinks and r.matched[b, t] == overlap(text)
            if kinds[t] == motg.MIXED:  # a mixture never holds an ending token
                held = [words[v] for v in r.tokens[b, t][filled[b, t]].tolist()]
                assert thinks and gate[b, t] and not any(ends_thought(text, x) for x in held)
            elif kinds[t] == motg.FORCED:
                assert thinks and cfg.end != "drawn" and (ends or cfg.end != "most-likely")
            else:  # an ordinary token: an answer's, an end, or where the gate is closed
                assert not thinks or not gate[b, t] or ends and cfg.end != "most-likely"
            text += words[y]
        ended = text.endswith(STOPS)
        assert r.eos[b].sum() == ended and (ended or n[b] == cfg.max_new_tokens)
        assert r.texts[b] == re.sub("<eos>$|<end>$", "", text)
