"""Tests of motg.py: `pytest test_motg.py`, and with MOTG_SLOW=1 also the slow ones.

Each compares with a reference that is none of motg's code: enumeration, torch.distributions, transformers' own `generate`,
plain loops. A statistical test has a fixed seed, and were it drawn anew it would fail by chance less than once in 10^8.
"""
import ast, atexit, collections, contextlib, copy, functools, inspect, itertools, json, math, multiprocessing, os, pathlib, random, re
import resource, shutil, signal, subprocess, sys, tempfile, time

if "MOTG_TEST_HOME" not in os.environ:  # no test reads or writes the user's caches, or the network
    os.environ["MOTG_TEST_HOME"], owner = tempfile.mkdtemp(prefix="motg-test-"), os.getpid()
    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(HOME, ignore_errors=True))
HOME = os.environ["MOTG_TEST_HOME"]
os.environ.update(XDG_CACHE_HOME=HOME, HF_HOME=HOME, HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
os.environ.setdefault("OMP_NUM_THREADS", "1")
import pytest
import reasoning_gym
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from reasoning_gym.factory import DATASETS
import motg

# What is used beyond the names that README.md documents, all of it here: a rename is a fix of one line.
draw, tag_table, step_probes = motg.draw, motg.tag_table, motg.step_probes
training_problem, held_out, rewards = motg.train_problem, motg.test_problems, motg.rewards
UserError, Config, METHODS, config = motg.UserError, motg.Config, motg.METHODS, motg.make_config

def stream(task, cfg, tokenizer, number, count, test):
    """The problems among the first `count` items of a stream."""
    return motg.problems(task, cfg, tokenizer, number, range(count), test, count)

def optimise(policy, reference, batch, cfg):
    """One optimiser update by plain gradient descent; returns its log."""
    return motg.update(policy, reference, torch.optim.SGD(policy.parameters(), lr=1.0), [(*part, {}) for part in batch], cfg, 0)

slow = pytest.mark.skipif(not os.environ.get("MOTG_SLOW"), reason="set MOTG_SLOW=1")
cases, product = pytest.mark.parametrize, lambda *a, **k: list(itertools.product(*a, **k))
dbl = functools.partial(torch.tensor, dtype=torch.double)
SAMPLING = ("top-k", "nucleus", "min-p", "without-replacement", "with-replacement")
WEIGHTS = ("probability", "dirichlet", "uniform", "max", "posterior", "gumbel")
ENDS, LOGPROBS = ("representative", "most-likely", "entropy", "steps"), ("representative", "weighted", "exact")

def seeded(n):
    return torch.Generator().manual_seed(n)

# ------------------------------------------------------------------------------------------ models and tokenizers

TEXTS = ["<think>\n1 + 2 = 3\n</think>\n<answer>3</answer>", "State the final answer to the following arithmetic problem",
         "Solve the user's problem. First think inside <think> and </think>, then give the final answer alone inside <answer>",
         "Spell this word backward (example: sun -> nus): system user assistant", "</think>\n", "think thing"]
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
QWEN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ByteLevel = tokenizers.pre_tokenizers.ByteLevel

def wrapped(bpe, eos):
    bpe.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=eos, pad_token=eos, chat_template=CHATML)

def trained_tokenizer():
    """Byte-level BPE with Qwen's pre-tokeniser and learned merges: the tag is three tokens, `>\\n` is one."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(QWEN), "isolated"), ByteLevel(False, use_regex=False)])
    bpe.train_from_iterator(TEXTS * 5, tokenizers.trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=ByteLevel.alphabet(), show_progress=False))
    return wrapped(bpe, "<|im_end|>")

def small_tokenizer():
    """Two dozen tokens: pieces of the tag cut in many ways, a few letters, two kinds of EOS."""
    vocab = "< / > t h i n k a b c Ċ </ th in thin think >Ċ </think a> << b</think>a k></th think>< ></think".split()
    merges = [("<", "/"), ("t", "h"), ("i", "n"), ("th", "in"), ("thin", "k"), (">", "Ċ")]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={v: i for i, v in enumerate(vocab)}, merges=merges))
    bpe.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.add_special_tokens(["<eos>", "<end>"])
    return wrapped(bpe, "<eos>")

def tiny(tokenizer, family="Qwen2", seed=0, **settings):
    """A random model of two layers."""
    torch.manual_seed(seed)
    kind, kind_config = (getattr(transformers, family + end) for end in ("ForCausalLM", "Config"))
    model = kind(kind_config(**dict(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.3, tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=None, bos_token_id=None) | settings))
    model.lm_head.weight.data.mul_(0.4)
    if "<end>" in tokenizer.get_vocab():
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(["<eos>", "<end>"])
    return model

def bigram(tokenizer, follow):
    """A model whose next token depends on the last alone: `follow` maps a token to {next: probability}."""
    model, ids = tiny(tokenizer, num_hidden_layers=1), tokenizer.convert_tokens_to_ids
    model.model.layers[0].self_attn.o_proj.weight.data.zero_(), model.model.layers[0].mlp.down_proj.weight.data.zero_()
    model.model.embed_tokens.weight.data.copy_(torch.eye(len(tokenizer), 32))  # after its norm, sqrt(32) times that
    model.lm_head.weight.data.fill_(-30 / 32**0.5)
    for last, nexts in follow.items():
        for token, p in nexts.items():
            model.lm_head.weight.data[ids(token), ids(last)] = math.log(p) / 32**0.5
    return model

def saved(model, tokenizer, folder):
    model.save_pretrained(folder), tokenizer.save_pretrained(folder)
    return str(folder)

def load(model, tokenizer):
    """The model as motg takes it from a folder."""
    with tempfile.TemporaryDirectory(dir=HOME) as folder:
        return motg.load_model(config(model=saved(model, tokenizer, folder), smoke=True))[0]

@pytest.fixture(scope="session")
def small():
    """(model, tokenizer) on the small vocabulary."""
    return load(tiny(small_tokenizer(), num_hidden_layers=1), small_tokenizer()), small_tokenizer()

@pytest.fixture(scope="session")
def folder():
    """A model folder as from the hub, on the trained vocabulary."""
    return saved(tiny(trained_tokenizer(), tie_word_embeddings=True), trained_tokenizer(), HOME + "/tiny")

@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test works in its own folder; the signal handlers that a run sets are put back."""
    monkeypatch.chdir(tmp_path)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for s, handler in handlers.items():
        signal.signal(s, handler)

# ------------------------------------------------------------------------------------------ 1 the law of the draws

Z = torch.tensor([1.2, 0.3, -0.4, 0.8, -1.5])  # logits of five tokens
TOP = [0, 3, 1]  # the three most likely

def softmax(z=Z, T=0.9):
    return (z.double() / T).softmax(-1).tolist()

HAT = dbl(softmax())[TOP] / dbl(softmax())[TOP].sum()  # p^ over them

def law_of(p, k, replace):
    """{ordered candidates: probability} of k draws; without replacement it is Plackett-Luce."""
    law = {}
    for order in product(range(len(p)), repeat=k) if replace else itertools.permutations(range(len(p)), k):
        q, left = 1.0, 1.0
        for v in order:
            q, left = q * p[v] / left, left - (0.0 if replace else p[v])
        law[order] = q
    return law

def assert_law(rows, law, x=20.0):
    """Observed `rows` (N, m) against {outcome: probability}. The chi-square statistic with d degrees of freedom exceeds
    d + 2 sqrt(d x) + 2 x with odds below e^-x = 2e-9 (Laurent and Massart 2000)."""
    seen, expected = collections.Counter(map(tuple, rows.tolist())), {o: p * len(rows) for o, p in law.items() if p > 0}
    assert abs(sum(law.values()) - 1) < 1e-6 and set(seen) <= set(expected), set(seen) - set(expected)
    rare = {o for o, e in expected.items() if e < 10}  # too few to count
    chi2, d = sum((seen[o] - e) ** 2 / e for o, e in expected.items() if o not in rare), len(law) - len(rare)
    assert chi2 <= d + 2 * math.sqrt(d * x) + 2 * x and sum(expected[o] for o in rare) < 0.01 * len(rows), (chi2, d)

@cases("vocabulary", [5, 131, 300])  # none is a multiple of a power of two
def test_draw_follows_p_into_its_tail(vocabulary):
    z = torch.cat([torch.tensor([4.0, 3.0]), torch.linspace(0, -1, vocabulary - 2)])[torch.randperm(vocabulary, generator=seeded(1))]
    z[2] = -math.inf  # a token of probability zero is never drawn
    assert_law(draw(z.log_softmax(-1).expand(100_000, -1), seeded(0))[:, None], {(v,): p for v, p in enumerate(softmax(z, 1))})

@cases("replace, k", product([False, True], [1, 2, 3]))
def test_law_of_drawn_candidates_and_the_first_is_the_representative(replace, k):
    cfg = config(sampling=SAMPLING[3 + replace], aggregation="probability", k=k, temperature=0.7)
    m = motg.sample_mixture(Z.expand(100_000, -1), cfg, seeded(k))
    assert_law(m.tokens, law_of(softmax(Z, 0.7), k, replace))
    assert (m.representative == m.tokens[:, 0]).all()
    w = dbl(softmax(Z, 0.7))[m.tokens]  # `probability`: p renormalised over the candidates
    assert torch.allclose(m.log_weights.exp().double(), w / w.sum(1, keepdim=True), atol=1e-5)

@cases("sampling, limit, k, kept", [  # p = 0.51 0.29 0.14 0.05 0.01 of tokens 0 3 1 2 4, at T = 0.7
    ("top-k", {}, 3, 3), ("top-k", {}, 5, 5), ("nucleus", dict(top_p=0.3), 5, 1), ("nucleus", dict(top_p=0.7), 5, 2),
    ("nucleus", dict(top_p=0.99), 2, 2), ("nucleus", dict(top_p=1.0), 5, 5), ("min-p", dict(min_p=0.3), 5, 2),
    ("min-p", dict(min_p=0.05), 2, 2), ("min-p", dict(min_p=1.0), 5, 1)])
def test_truncation_rules_keep_the_right_set_and_read_one_of_it(sampling, limit, k, kept):
    cfg = config(sampling=sampling, aggregation="probability", temperature=0.7, k=k, **limit)
    p, chosen = softmax(Z, 0.7), [0, 3, 1, 2, 4][:kept]
    m = motg.sample_mixture(Z.expand(50_000, -1), cfg, seeded(0))
    assert (m.tokens.masked_fill(m.log_weights == -math.inf, -1) == torch.tensor(chosen + [-1] * (k - kept))).all()
    assert_law(m.representative[:, None], {(v,): p[v] / sum(p[u] for u in chosen) for v in chosen})

# ------------------------------------------------------------------------------------------ 2 aggregations

def mixed(N, aggregation, **settings):
    """N mixtures of the three likeliest tokens, and their weights (N, 3)."""
    m = motg.sample_mixture(Z.expand(N, -1), config(aggregation=aggregation, k=3, **settings), seeded(3))
    return m, m.log_weights.exp().double()

def test_weights_against_their_formulas():
    N, p, third = 100_000, dbl(softmax()), torch.full((3,), 1 / 3, dtype=torch.double)
    for aggregation, want in dict(probability=HAT, max=HAT, uniform=third).items():
        assert (mixed(N, aggregation)[1] - want).abs().max() < 1e-6
    (m, w), H = mixed(N, "posterior", moi_beta=0.5), -(p * p.log()).sum() / math.log(5)
    assert (w - (H * HAT + (1.5 - H) * (m.tokens == m.representative[:, None])) / 1.5).abs().max() < 1e-6
    assert_law(m.representative[:, None], {(v,): q.item() for v, q in zip(TOP, HAT)})
    g = mixed(N, "gumbel", gumbel_tau=0.5)[0].log_weights.double()  # tau log(w_i / w_j) = log(p_i / p_j) + a logistic variate
    for at in (-2.0, 0.0, 1.0):  # Hoeffding: odds of a miss above 0.0107 are 2 exp(-2 N 0.0107^2) = 2e-10
        assert abs(((g[:, 0] - g[:, 1]) * 0.5 - (HAT[0] / HAT[1]).log() > at).double().mean() - 1 / (1 + math.exp(at))) < 0.0107

@cases("aggregation", ["dirichlet", "gumbel", "uniform"])
def test_the_representative_is_drawn_from_the_weights_of_its_step(aggregation):
    m, w = mixed(200_000, aggregation)
    miss = (m.tokens == m.representative[:, None]).double() - w  # Hoeffding, range 2: odds of a mean above 0.0150 are 4e-10
    assert (miss.mean(0).abs() < 0.0150).all() and (miss * w).sum(1).mean().abs() < 0.0150

@cases("c", [0.3, 1.0, 8.0])
def test_dirichlet_has_mean_p_hat_and_its_variance(c):
    w = mixed(200_000, "dirichlet", concentration=c)[1]  # Hoeffding: odds of a miss above 0.0075 are 3e-10 each
    assert (w.mean(0) - HAT).abs().max() < 0.0075
    assert (((w - HAT) ** 2).mean(0) - HAT * (1 - HAT) / (c + 1)).abs().max() < 0.0075

def test_dirichlet_runs_from_one_token_to_probability():
    assert (mixed(1000, "dirichlet", concentration=1e6)[1] - HAT).abs().max() < 0.01  # sd 0.0005: 0.01 is 20 of them
    m, w = mixed(50_000, "dirichlet", concentration=1e-5)
    assert w.amax(1).mean() > 0.999 and (m.tokens.gather(1, w.argmax(1)[:, None])[:, 0] == m.representative).double().mean() > 0.999
    assert_law(w.argmax(1)[:, None], {(i,): q.item() for i, q in enumerate(HAT)})

@cases("dtype", [torch.float32, torch.bfloat16])
def test_sharp_logits_and_tiny_concentrations_stay_finite(dtype):
    z = torch.tensor([[1e4, -1e4, 0, 0, 0], [1e4] * 5, [-1e4, 1e4, 1e4, -1e4, 3]]).to(dtype).repeat(100, 1)
    for sampling, aggregation, c in product(SAMPLING, WEIGHTS, (1e-6, 1.0, 1e4)):
        cfg = config(sampling=sampling, aggregation=aggregation, k=3, concentration=c)
        m = motg.sample_mixture(z, cfg, seeded(0))
        used = m.log_weights > -math.inf
        assert not m.log_weights.isnan().any() and torch.allclose(m.log_weights.exp().sum(1), torch.ones(300), atol=1e-4), cfg
        assert ((m.tokens == m.representative[:, None]) & used).any(1).all(), cfg  # one of those that were mixed
        for logprob in LOGPROBS[:2]:
            score = motg.mixture_logprob(z, *m, config(sampling=sampling, aggregation=aggregation, k=3, logprob=logprob))
            assert not score.isnan().any() and (score < 1e-6).all(), (cfg, logprob)

def test_mixture_embedding_against_loops_and_its_gradient_reaches_the_table():
    E = torch.randn(7, 4, generator=seeded(0), requires_grad=True)
    tokens, log_w = torch.tensor([[[0, 6, 2], [1, 1, 3]]]), torch.tensor([[[0.25, 0.0, 0.75], [0.2, 0.3, 0.5]]]).log()  # (1, 2, 3)
    got = motg.mixture_embedding(E, tokens, log_w)  # (1, 2, 4); slot 1 of the first step is empty
    assert torch.allclose(got, torch.stack([0.25 * E[0] + 0.75 * E[2], 0.5 * E[1] + 0.5 * E[3]])[None], atol=1e-6)
    assert torch.allclose(torch.autograd.grad(got.sum(), E)[0].sum(1) / 4, torch.tensor([0.25, 0.5, 0.75, 0.5, 0, 0, 0]))
    assert torch.equal(motg.mixture_embedding(E, tokens, log_w, "max")[0], torch.stack([E[[0, 2]].amax(0), E[[1, 3]].amax(0)]))
    assert motg.mixture_embedding(E.bfloat16(), tokens, log_w).dtype == torch.bfloat16

# ------------------------------------------------------------------------------------------ 3 log-probabilities

def scored(tokens, w, rep=None, z=Z, **settings):
    """Log-probs of steps given as lists, at temperature 0.9."""
    tokens, w = torch.tensor(tokens), torch.as_tensor(w, dtype=torch.float)
    return motg.mixture_logprob(z.expand(*tokens.shape[:-1], -1), tokens, w.log(), tokens[..., 0] if rep is None else torch.tensor(rep),
                                config(**dict(k=tokens.shape[-1], temperature=0.9) | settings))

def test_the_distribution_is_float32_at_the_sampling_temperature():
    z = torch.randn(4, 300, generator=seeded(0)).bfloat16() * 5
    got = motg.token_distribution(z, 0.7)
    assert got.dtype == torch.float32 and torch.allclose(got.double(), (z.double() / 0.7).log_softmax(-1), atol=1e-5)
    for method in METHODS:
        cfg = config(method, temperature=0.7)
        score = motg.mixture_logprob(z, *(m := motg.sample_mixture(z, cfg, seeded(1))), cfg)
        assert score.dtype == torch.float32 and torch.equal(score, motg.mixture_logprob(z.float(), *m, cfg))

def test_representative_and_weighted_by_hand():
    p, step = softmax(), ([[1, 4, 2]], [[0.2, 0.3, 0.5]], [2])
    assert scored(*step).item() == pytest.approx(math.log(p[2]), rel=1e-5)
    want = 0.2 * math.log(p[1]) + 0.3 * math.log(p[4]) + 0.5 * math.log(p[2])
    assert scored(*step, logprob="weighted").item() == pytest.approx(want, rel=1e-5)

def test_no_gradient_through_the_weights_of_the_weighted_logprob():
    log_w, z = torch.tensor([[0.3, 0.7]]).log().requires_grad_(), Z[None].clone().requires_grad_()
    motg.mixture_logprob(z, torch.tensor([[1, 2]]), log_w, torch.tensor([1]), config(logprob="weighted")).sum().backward()
    assert log_w.grad is None or (log_w.grad == 0).all()

@cases("replace, k", product([False, True], [1, 2, 3]))
def test_exact_logprob_of_drawn_candidates_by_enumeration(replace, k):
    law = law_of(softmax(), k, replace)
    got = scored(list(law), [[1 / k] * k] * len(law), logprob="exact", sampling=SAMPLING[3 + replace], aggregation="uniform").exp()
    assert torch.allclose(got, torch.tensor(list(law.values())), rtol=1e-4) and abs(got.sum() - 1) < 1e-5

def test_exact_density_of_drawn_weights_against_torch_distributions():
    w, drawn = dbl([[0.5, 0.2, 0.3], [0.05, 0.9, 0.05], [0.3, 0.3, 0.4]]), math.log(law_of(softmax(), 3, False)[tuple(TOP)])
    for x in (0.3, 1.0, 5.0):
        want = torch.distributions.Dirichlet(x * HAT).log_prob(w).float()
        concrete = torch.distributions.RelaxedOneHotCategorical(dbl(x), logits=HAT.log()).log_prob(w).float()
        get = functools.partial(scored, [TOP] * 3, w, logprob="exact", concentration=x, gumbel_tau=x)
        assert torch.allclose(get(aggregation="dirichlet"), want, atol=1e-4)
        assert torch.allclose(get(aggregation="gumbel"), concrete, atol=1e-4)
        # drawn candidates with drawn weights: both count
        assert torch.allclose(get(sampling="without-replacement", aggregation="dirichlet"), want + drawn, atol=1e-4)

@cases("settings", [dict(), dict(logprob="weighted"), dict(logprob="exact"), dict(aggregation="gumbel", logprob="exact"),
                    dict(sampling="without-replacement", logprob="exact"), dict(sampling="with-replacement", logprob="exact")])
def test_empty_slots_change_nothing_and_one_filled_slot_is_a_token(settings):
    padded = scored([[0, 3, 0, 2]], [[0.3, 0.7, 0.0, 0.0]], **settings)
    assert torch.allclose(scored([[0, 3]], [[0.3, 0.7]], **settings), padded, atol=1e-5)
    for slot, token in enumerate(tokens := [4, 1, 2, 3]):
        assert scored([tokens], torch.eye(4)[slot, None], [token], **settings).item() == pytest.approx(math.log(softmax()[token]), rel=1e-5)

# ------------------------------------------------------------------------------------------ 4 which log-prob is the policy's?

def distance(outcomes, reward, want, **settings):
    """Of sum_a P(a) R(a) grad log P(a), what an estimator gives on average, from grad E[R]: cosine, relative error.
    `outcomes` are (P, candidates, weights)."""
    z, (P, tokens, w) = Z.clone().requires_grad_(), map(list, zip(*outcomes))
    score = scored(tokens, torch.stack(w), z=z, temperature=1.0, **settings)
    got = torch.autograd.grad((torch.stack(P).detach() * reward * score).sum(), z)[0].double()
    return F.cosine_similarity(got, want, dim=0).item(), ((got - want).norm() / want.norm()).item()

@cases("replace, k", [(False, 2), (False, 3), (True, 2)])
def test_exact_is_the_gradient_of_the_expected_reward_and_the_others_are_not(replace, k):
    z, found = Z.double().requires_grad_(), collections.defaultdict(list)
    law = law_of(z.softmax(-1), k, replace)
    hat = [z.detach()[list(o)].softmax(-1) for o in law]
    for seed, logprob in product(range(20), LOGPROBS):  # R is any function of the ordered candidates
        R = torch.rand(len(law), generator=seeded(seed), dtype=torch.double)
        (want,) = torch.autograd.grad((torch.stack(list(law.values())) * R).sum(), z, retain_graph=True)
        found[logprob].append(distance(list(zip(law.values(), law, hat)), R, want, sampling=SAMPLING[3 + replace],
                                       aggregation="probability", logprob=logprob))
    assert max(error for _, error in found["exact"]) < 1e-4
    for name in LOGPROBS[:2]:
        cosine, error = (sum(x) / 20 for x in zip(*found[name]))
        print(f"{SAMPLING[3 + replace]}, k = {k}, {name}: mean cosine {cosine:.2f}, mean relative error {error:.2f}")
        assert cosine < 0.95 and error > 0.3 and min(error for _, error in found[name]) > 0.01

def test_exact_gradient_of_dirichlet_weights_by_quadrature():
    """Of top-k 2 the weights are the action. R = w_1^2, whose mean under Dir(c p^) is var + p^_1^2."""
    z, c, x = Z.double().requires_grad_(), 8.0, torch.linspace(-20, 20, 20_001, dtype=torch.double)
    hat = z[[0, 3]].softmax(-1)
    (want,) = torch.autograd.grad(hat[0] * hat[1] / (c + 1) + hat[0] ** 2, z)
    w = torch.stack([x.sigmoid(), (-x).sigmoid()], 1)  # a grid that reaches both ends
    P = torch.distributions.Dirichlet(c * hat.detach()).log_prob(w).exp() * w.prod(1) * (x[1] - x[0])
    get = lambda logprob: distance([(q, [0, 3], v) for q, v in zip(P, w)], w[:, 0] ** 2, want, concentration=c, logprob=logprob)
    print("top-k 2, dirichlet: exact, weighted: cosine and relative error", get("exact"), get("weighted"))
    assert abs(P.sum() - 1) < 1e-6 and get("exact")[1] < 1e-3
    assert get("weighted")[1] > 0.3  # and that is `representative`'s too: E[onehot(y)] = w

# ------------------------------------------------------------------------------------------ 5 rollouts

PROMPTS = ["a<think>\n", "bath<think>\n", "c", "thinkabab<think>\n"]

def plain(model):
    """The model with transformers' own attention."""
    (twin := copy.deepcopy(model)).set_attn_implementation("eager")
    return twin

def plain_logprobs(model, r, cfg):
    """What rollout_logprobs should give, with gradient: row by row, nothing padded, no cache, no chunks."""
    out, model = [], plain(model) if model.config._attn_implementation != "eager" else model
    table = model.get_input_embeddings().weight
    for b, n in enumerate(r.mask.sum(1).tolist()):
        w = r.log_weights[b].exp()
        mixed = sum(w[:, i : i + 1] * table[r.tokens[b, :, i]] for i in range(cfg.k))
        if cfg.aggregation == "max":
            mixed = table[r.tokens[b]].masked_fill((w == 0)[..., None], -math.inf).amax(1)
        x = torch.cat([table[r.prompt_ids[b][r.prompt_mask[b].bool()]], mixed[:n]])
        z = model(inputs_embeds=x[None]).logits[0, -n - 1 : -1]
        score = motg.mixture_logprob(z, r.tokens[b, :n], r.log_weights[b, :n], r.representative[b, :n], cfg) * r.sampled[b, :n]
        out.append(F.pad(score, (0, r.mask.shape[1] - n)))
    return torch.stack(out)

def check_rollout(r, tokenizer, cfg):
    """What holds of every rollout."""
    (B, T), n, used = r.mask.shape, r.mask.sum(1), r.log_weights > -math.inf
    assert r.tokens.shape == r.log_weights.shape == (B, T, cfg.k) and len(r.texts) == B
    assert (r.mask == (torch.arange(T) < n[:, None])).all() and not ((r.sampled | r.thinking) & ~r.mask).any()
    assert ((r.logprob == 0) | r.sampled).all() and r.logprob.isfinite().all()
    assert ((r.tokens == r.representative[..., None]) & used).any(-1)[r.mask].all()  # the representative was mixed
    assert (used.sum(-1) == 1)[~r.mask | ~r.thinking | ~r.sampled].all()  # answers, forced tags and padding are one-hot
    stops = set(tokenizer.convert_tokens_to_ids(["<eos>", "<end>"]))
    for b, ids in enumerate(row[:m].tolist() for row, m in zip(r.representative, n)):
        assert not stops & set(ids[:-1]) and (ids[-1] in stops or len(ids) == cfg.max_new_tokens)  # the first EOS ends the row
        assert r.texts[b] == tokenizer.decode(ids[:-1] if ids[-1] in stops else ids)
        if cfg.end == "representative":  # the thought ends where its text completes the tag
            closed = [t for t in range(1, len(ids) + 1) if "</think>" in tokenizer.decode(ids[:t])]
            assert int(r.thinking[b].sum()) == (closed or [len(ids)])[0], r.texts[b]

def test_greedy_rows_equal_transformers_generate_for_prompts_of_any_length(small):
    model, tokenizer = small
    cfg = config("single", temperature=1e-6, chains=2, max_new_tokens=12)
    r = motg.rollout(model, tokenizer, PROMPTS, cfg, seeded(0))
    check_rollout(r, tokenizer, cfg)
    for i, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        n, alone = ids.shape[1], motg.rollout(model, tokenizer, [prompt], cfg, seeded(5))
        want = plain(model).generate(ids, do_sample=False, max_new_tokens=12, attention_mask=torch.ones_like(ids), pad_token_id=0)[0, n:]
        for j in (2 * i, 2 * i + 1):  # the chains of a prompt are adjacent; what shares the batch does not matter
            assert torch.equal(r.representative[j][r.mask[j]], want) and torch.equal(alone.representative[0][alone.mask[0]], want)
            assert torch.equal(r.prompt_ids[j, -n:], ids[0]) and r.prompt_mask[j].sum() == r.prompt_mask[j, -n:].sum() == n

@cases("method", METHODS)
def test_the_decoder_equals_plain_decoding_without_a_cache(small, method):
    """The same draws from the same generator, every step recomputed from the first token on."""
    (model, tokenizer), closed = small, 0
    reference, table, stops = plain(model), model.get_input_embeddings().weight, tokenizer.convert_tokens_to_ids(["<eos>", "<end>"])
    cfg = config(method, chains=1, max_new_tokens=14, temperature=0.8)
    for seed in range(12):
        r, g = motg.rollout(model, tokenizer, [PROMPTS[seed % 4]], cfg, seeded(seed)), seeded(seed)
        x, ids, thinking = table[tokenizer(PROMPTS[seed % 4])["input_ids"]].detach(), [], True
        for t in range(r.mask.shape[1]):
            with torch.no_grad():
                z = reference(inputs_embeds=x[None]).logits[:, -1]
            m = motg.sample_mixture(z, cfg, g)
            word = m.tokens[:, 0] if cfg.sampling in SAMPLING[3:] else draw(motg.token_distribution(z, 0.8), g)
            token = m.representative if thinking else word
            ids.append(token.item())
            closes = "</think>" in tokenizer.decode(ids)
            if not thinking or closes or token.item() in stops:  # one-hot
                m = (F.pad(token[:, None], (0, cfg.k - 1)), torch.tensor([[0.0] + [-math.inf] * (cfg.k - 1)]), token)
            assert (r.thinking[0, t].item(), r.representative[0, t].item()) == (thinking, token.item()), (seed, t)
            assert torch.equal(r.tokens[0, t], m[0][0]) and torch.allclose(r.log_weights[0, t].exp(), m[1][0].exp(), atol=1e-4)
            assert torch.allclose(r.logprob[0, t], motg.mixture_logprob(z, *m, cfg)[0], atol=1e-3, rtol=1e-4)
            thinking, x = thinking and not closes, torch.cat([x, motg.mixture_embedding(table, *m[:2]).detach()])
            closed += closes
    assert closed > 2 or cfg.sampling == "top-k"

def test_ended_rows_are_dropped_and_the_others_go_on_as_they_would(small):
    """Greedy, so that the draws that dropped rows no longer make do not matter."""
    model, tokenizer = small
    cfg, longest = config("single", temperature=1e-6, chains=1, max_new_tokens=12), 0
    for prompts in itertools.combinations(PROMPTS, 3):
        r, left = motg.rollout(model, tokenizer, list(prompts), cfg, seeded(0)), len(model.decoder.row)
        n = r.mask.sum(1)
        assert left == len(model.decoder.logits) == len(model.decoder.layers[0][0]) and left >= int((n == n.max()).sum())
        longest += left < 3
        for row, prompt in enumerate(prompts):
            alone = motg.rollout(model, tokenizer, [prompt], cfg, seeded(1))
            assert torch.equal(r.tokens[row][r.mask[row]], alone.tokens[0]) and r.texts[row] == alone.texts[0]
            assert torch.allclose(r.logprob[row][r.mask[row]], alone.logprob[0], atol=1e-4)
    assert longest

@cases("method,end", product(METHODS, ENDS))
def test_a_decoding_step_reads_no_value_of_a_tensor(method, end, small):
    """On the device `meta` tensors have a shape and a type and no values: code that asks for one, which on a GPU would wait
    for it and could not be recorded as a graph, raises there. The model is bf16, as on a GPU: what is scored is float32."""
    model, tokenizer = small
    cfg = config(method, end=end, end_steps=4, chains=3, max_new_tokens=8)
    d = motg.Decoder(copy.deepcopy(model).bfloat16().to("meta"), tokenizer, cfg, 6, 20, None)
    with torch.no_grad():
        d.start([[1, 2, 3], [4, 5]])
        d.run(0)
        before = {n: v for n, v in vars(d).items() if isinstance(v, torch.Tensor)}
        d.run(1)
    assert all(v.device.type == "meta" for v in d.record.values()) and d.logits.dtype == torch.bfloat16
    assert {v.dtype for n, v in d.record.items() if n in ("log_weights", "logprob", "entropy")} == {torch.float32}
    assert all(getattr(d, name) is tensor for name, tensor in before.items())  # a recorded graph goes on using these
    with pytest.raises((RuntimeError, NotImplementedError)):
        d.drop_ended()  # which does ask

def test_bf16_touches_neither_softmax_nor_scores(small, monkeypatch):
    """What CUDA does, on the CPU: a bf16 copy samples, autocast scores and gives its gradient to the float32 weights."""
    (model, tokenizer), autocast = small, torch.autocast
    cfg = config("dirichlet", chains=4, max_new_tokens=12)
    r = motg.rollout(copy.deepcopy(model).bfloat16(), tokenizer, PROMPTS, cfg, seeded(0))
    assert {r.logprob.dtype, r.log_weights.dtype, r.entropy.dtype} == {torch.float32}
    want = motg.rollout_logprobs(model, r, cfg)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: autocast("cpu", dtype=torch.bfloat16))
    got = motg.rollout_logprobs(model, r, cfg)
    assert got.dtype == torch.float32 and not torch.equal(got, want)
    assert torch.allclose(got, want, atol=0.15) and torch.allclose(r.logprob, want, atol=0.15)
    for p, x, y in zip(model.parameters(), *(torch.autograd.grad(v.sum(), model.parameters()) for v in (got, want))):
        assert x.dtype == p.dtype == torch.float32 and (x - y).norm() < 0.1 * y.norm()

COMBINATIONS = [config(m, chains=3, max_new_tokens=12) for m in METHODS]
for end, sampling, aggregation, logprob in product(ENDS, SAMPLING, WEIGHTS, LOGPROBS):
    with contextlib.suppress(UserError):
        COMBINATIONS.append(config(sampling=sampling, aggregation=aggregation, logprob=logprob, end=end, end_steps=4, end_entropy=3.0,
                                   end_patience=2, chains=3, max_new_tokens=9, top_p=0.8, min_p=0.2, concentration=2.0))

def test_sampled_logprobs_equal_recomputed_ones_for_every_combination_of_settings(small):
    (model, tokenizer), forced, answers = small, collections.Counter(), collections.Counter()
    assert len(COMBINATIONS) == len(METHODS) + 4 * (5 * 6 * 2 + 2 * 5 + 2)  # those that are allowed
    for i, cfg in enumerate(COMBINATIONS):
        r = motg.rollout(model, tokenizer, PROMPTS[:3], cfg, seeded(i))
        check_rollout(r, tokenizer, cfg)
        with torch.no_grad():
            again = motg.rollout_logprobs(model, r, cfg)  # a density of drawn weights is as steep as its log-weights are long
            steep = 1 + r.log_weights.masked_fill(r.log_weights == -math.inf, 0).abs().amax(-1) * (cfg.logprob == "exact")
            assert ((again - r.logprob).abs() <= 1e-4 * steep).all(), cfg
            if i % 12 == 0:
                assert torch.allclose(again, plain_logprobs(model, r, cfg), atol=1e-3)
                for micro_batch in (1, 4):
                    assert torch.allclose(again, motg.rollout_logprobs(model, r, cfg, micro_batch=micro_batch), atol=1e-4)
        forced[cfg.end] += int((r.mask & ~r.sampled).sum())
        answers[cfg.end] += int((r.mask & ~r.thinking).sum())
    assert min(answers[end] for end in ENDS) > 50 and min(forced["entropy"], forced["steps"]) > 100, (forced, answers)
    assert forced["representative"] == forced["most-likely"] == 0

# ------------------------------------------------------------------------------------------ 6 the end of a thought

@cases("make", [trained_tokenizer, small_tokenizer])
def test_tag_table_agrees_with_searching_the_decoded_text(make):
    """`</`, `think`, `>\\n`: compared by ids the tag would be missed, and `>` alone would end any thought."""
    tokenizer, rng, hits = make(), random.Random(0), 0
    assert [tokenizer.decode([i]) for i in tokenizer("</think>\n")["input_ids"]] == ["</", "think", ">\n"]
    table = tag_table(tokenizer, len(tokenizer) + 7)  # (8, V): models have rows beyond the tokenizer's
    texts = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    pieces = [i for i, text in enumerate(texts) if set(text) & set("<>/") or text in "</think>"]
    for _ in range(20_000):
        state, ids = 0, [rng.choice(pieces) if rng.random() < 0.95 else rng.randrange(len(texts)) for _ in range(6)]
        for t, token in enumerate(ids):
            state = int(table[state, token])
            assert (state == 8) == ("</think>" in tokenizer.decode(ids[: t + 1])), [texts[i] for i in ids]
            if state == 8:
                hits += 1
                break
    assert hits > 20

@cases("script, thought", [
    ("</ think >Ċ b <eos>", 3), ("> b </ think >Ċ c <end>", 5), ("</think > c <eos>", 2), ("b</think>a c <eos>", 1),
    ("<< / think>< c <eos>", 3), ("< </ th in k></th c <eos>", 5), ("</ think a> c <eos>", 5), ("</ <eos>", 2), ("<end>", 1),
    ("b </think ></think > c <eos>", 3)])
def test_a_thought_ends_where_its_text_completes_the_tag(script, thought):
    tokenizer, script = small_tokenizer(), script.split()
    model = load(bigram(tokenizer, {a: {b: 1.0} for a, b in zip(["a", *script], script)}), tokenizer)
    r = motg.rollout(model, tokenizer, ["a", "bba"], cfg := config(chains=2, max_new_tokens=9, temperature=1.0), seeded(0))
    assert all(tokenizer.convert_ids_to_tokens(row) == script for row in r.representative) and r.mask.all() and r.sampled.all()
    used = (r.log_weights > -math.inf).sum(-1)  # the step that completes the tag is fed as one token, and so is an EOS
    assert (r.thinking.sum(1) == thought).all() and (used[:, thought - 1 :] == 1).all() and (used[:, : thought - 1] == 2).all()
    check_rollout(r, tokenizer, cfg)

def forced_tag(r, tokenizer, at):
    """Is the tag written at steps `at` on of every row, its tokens unsampled, without a log-prob and one-hot?"""
    tag = torch.tensor(tokenizer("</think>")["input_ids"])
    here = ((t := torch.arange(r.mask.shape[1])) >= at) & (t < at + len(tag)) & r.mask
    return ((r.representative[:, at : at + len(tag)] == tag).all() and torch.equal(r.mask & ~r.sampled, here)
            and torch.equal(r.thinking, (t < at + len(tag)) & r.mask) and (r.logprob[here] == 0).all())

@cases("method", ["dirichlet", "single", "different-tokens"])
def test_entropy_and_steps_force_the_tag_without_a_loss(method):
    tokenizer = small_tokenizer()
    model = load(bigram(tokenizer, {  # entropies from t on: 0, 0, log 2, 0, 0, 0
        "t": {"i": 1}, "i": {"n": 1}, "n": {"a": 0.5, "b": 0.5}, "a": {"k": 1}, "b": {"k": 1}, "k": {"h": 1}, "h": {"c": 1},
        ">": {"<end>": 0.5, "in": 0.5}, "in": {"<eos>": 1}}), tokenizer)
    for end, n, below, at in (("entropy", 3, 0.5, 6), ("entropy", 2, 0.5, 2), ("entropy", 1, 0.8, 1), ("steps", 1, 0.0, 1), ("steps", 5, 0.0, 5)):
        cfg = config(method, end=end, end_entropy=below, end_patience=n, end_steps=n, chains=20, max_new_tokens=12, temperature=1.0)
        r = motg.rollout(model, tokenizer, ["t"], cfg, seeded(0))
        check_rollout(r, tokenizer, cfg)
        assert forced_tag(r, tokenizer, at) and {t.partition("</think>")[2] for t in r.texts} == {"", "in"}, r.texts
        assert torch.allclose(motg.rollout_logprobs(model, r, cfg), r.logprob, atol=1e-4)

@cases("p, ends", [(0.6, True), (0.4, False)])
def test_most_likely_ends_by_the_argmax_and_only_by_it(p, ends):
    tokenizer = small_tokenizer()  # after `</think`, `>` has probability p and b the rest
    follow = {"a": {"</think": 1}, "</think": {">": p, "b": 1 - p}, ">": {"c": 1}, "b": {"c": 1}, "c": {"<eos>": 1}}
    model, settings = load(bigram(tokenizer, follow), tokenizer), dict(chains=100, temperature=1.0, max_new_tokens=5)
    run = lambda end: motg.rollout(model, tokenizer, ["a"], config("single", end=end, **settings), seeded(0))
    read = run("representative")
    closed = torch.tensor(["</think>" in t for t in read.texts])
    assert 0.1 < closed.float().mean() < 0.9 and torch.equal(read.thinking.sum(1) == 2, closed)
    assert ((run("most-likely").thinking.sum(1) == 2) == ends).all()

# ------------------------------------------------------------------------------------------ 7 GRPO

def test_advantages_by_hand():
    r = torch.tensor([[1.0, 0.0, 0.0, 3.0], [0.3, 0.3, 0.3, 0.3], [2.0, 2.0, 2.0, 2.1]])
    for row, got in zip(r.double().tolist(), motg.group_advantages(r).tolist()):
        mean, std = sum(row) / 4, math.sqrt(sum((x - sum(row) / 4) ** 2 for x in row) / 3)
        assert got == pytest.approx([(x - mean) / (std + 1e-4) for x in row], abs=2e-3)

@cases("average, with_reference", product(["chain", "token", "constant"], [True, False]))
def test_loss_by_hand(average, with_reference):
    new, old, ref = (-2 * torch.rand(4, 6, generator=seeded(s)) for s in range(3))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    A, cfg, want = [1.5, -0.7, -2.0, 1.0], config(loss_average=average, kl_beta=0.3, clip=0.2, max_new_tokens=50), 0.0
    for b, t in mask.nonzero().tolist():
        ratio, log_r = math.exp(new[b, t] - old[b, t]), (ref[b, t] - new[b, t]).item() * with_reference
        gain = min(ratio * A[b], min(max(ratio, 0.8), 1.2) * A[b])
        count = dict(chain=4 * int(mask[b].sum()), token=int(mask.sum()), constant=4 * 50)[average]
        want += (0.3 * (math.exp(log_r) - log_r - 1) - gain) / count
    loss, _ = motg.grpo_loss(new, old, ref if with_reference else None, torch.tensor(A), mask, cfg)
    assert loss.item() == pytest.approx(want, rel=1e-5)
    new[~mask] = math.inf  # what the mask hides does not matter
    hidden, _ = motg.grpo_loss(new, old, ref if with_reference else None, torch.tensor(A), mask, cfg)
    assert hidden.item() == pytest.approx(want, rel=1e-5)

def experience(model, tokenizer, cfg):
    """Two steps' rollouts and advantages; rows of many lengths, one prompt of a single token."""
    batch = [(motg.rollout(model, tokenizer, PROMPTS, cfg, seeded(s)), torch.randn(24, generator=seeded(s))) for s in (1, 2)]
    lengths = torch.cat([r.mask.sum(1) for r, _ in batch])
    assert lengths.min() <= 3 and lengths.max() == cfg.max_new_tokens == 10 and cfg.chains == 6
    return batch

flat = lambda tensors: torch.cat([t.detach().flatten() for t in tensors])

@cases("settings", [dict(method="dirichlet"), dict(method="different-tokens", loss_average="token"),
                    dict(method="multiplex", loss_average="constant"), dict(method="soft-grpo", end="steps", end_steps=4),
                    dict(method="single", kl_beta=0.0)])
def test_update_is_the_gradient_of_the_whole_batch_whatever_the_micro_batch(small, settings):
    (model, tokenizer), settings = small, dict(kl_beta=0.5, chains=6, max_new_tokens=10, grad_clip=1e9, lr=0.01, warmup=0.0) | settings
    cfg, runs = config(**settings), []
    batch, reference = experience(model, tokenizer, cfg), load(tiny(tokenizer, seed=9, num_hidden_layers=1), tokenizer)
    for micro_tokens in (1, 40, 10**9):
        policy = copy.deepcopy(model)
        log = optimise(policy, reference if cfg.kl_beta else None, batch, config(**settings, micro_tokens=micro_tokens))
        runs.append((log, (flat(model.parameters()) - flat(policy.parameters())) / cfg.lr))
    policy, loss, kl = plain(model), 0.0, 0.0  # by hand: every row on its own, by transformers, one sum over both rollouts
    rows, tokens = sum(len(r.mask) for r, _ in batch), sum(int(r.sampled.sum()) for r, _ in batch)
    for r, A in batch:
        new = plain_logprobs(policy, r, cfg)
        log_r = plain_logprobs(reference, r, cfg).detach() - new if cfg.kl_beta else torch.zeros_like(new)
        w = r.sampled / dict(chain=r.sampled.sum(1, keepdim=True) * rows, token=tokens, constant=rows * 10)[cfg.loss_average]
        loss = loss + (w * (cfg.kl_beta * (log_r.exp() - log_r - 1) - (new - new.detach()).exp() * A[:, None])).sum()
        kl = kl + (w * (log_r.exp() - log_r - 1)).sum().item()
    loss.backward()
    grad = flat(p.grad for p in policy.parameters())
    for log, step in runs:
        assert (step - grad).norm() < 2e-3 * grad.norm() and log["grad_norm"] == pytest.approx(grad.norm().item(), rel=1e-3)
        assert log["loss"] == pytest.approx(loss.item(), abs=1e-3) and log["kl"] == pytest.approx(kl, rel=1e-3, abs=1e-6)

def test_an_update_reads_each_prompt_once_for_the_chains_beside_it(small):
    """Tokens that the first layer sees, for micro-batches of all groups, of one group, of parts of a group."""
    (model, tokenizer), seen = small, []
    cfg = dict(chains=6, max_new_tokens=10, end="steps", end_steps=9)  # every row has all ten steps, or its EOS
    r = motg.rollout(model, tokenizer, PROMPTS, config(**cfg), seeded(3))
    (B, P), T = r.prompt_mask.shape, r.mask.shape[1]
    handle = model.base_model.layers[0].register_forward_hook(lambda layer, args, out: seen.append(args[0].shape[:2]))
    for budget, prompts, rows in ((10**6, 4, 24), (P + 6 * T, 1, 6), (P + 2 * T, 1, 2), (1, 1, 1)):
        seen.clear()
        parts = motg.micro_batches(r, config(**cfg, micro_tokens=budget))
        assert sorted(torch.cat(parts).tolist()) == list(range(B)) and max(map(len, parts)) == rows
        for part in parts:
            motg.rollout_logprobs(model, r.select(part), config(**cfg))
        assert [n for n, _ in seen[0::2]] == [prompts] * (24 // rows) and [n for n, _ in seen[1::2]] == [rows] * (24 // rows)
        assert all(a[0] * a[1] + b[0] * b[1] <= max(budget, P + T) for a, b in zip(seen[0::2], seen[1::2]))
    handle.remove()

def test_a_large_vocabulary_is_scored_in_chunks_with_the_same_values_and_gradients():
    tokenizer, found = small_tokenizer(), []  # with 2^20 tokens the float32 logits of 40 steps are 160 MiB
    model = load(tiny(tokenizer, vocab_size=2**20, hidden_size=16, intermediate_size=16, num_hidden_layers=1), tokenizer)
    cfg = config(chains=4, max_new_tokens=10, sampling="without-replacement", logprob="exact")
    r, weights = motg.rollout(model, tokenizer, ["a"], cfg, seeded(0)), torch.rand(4, 10, generator=seeded(1))
    for micro_batch in (None, 1):
        model.zero_grad()
        (scores := motg.rollout_logprobs(model, r, cfg, micro_batch=micro_batch)).mul(weights).sum().backward()
        found.append((scores.detach(), [p.grad.clone() for p in model.parameters()]))
    assert r.sampled.all() and torch.allclose(found[0][0], found[1][0], atol=1e-4)
    assert all((a - b).norm() <= 1e-5 * b.norm() + 1e-7 for a, b in zip(found[0][1], found[1][1]))

# ------------------------------------------------------------------------------------------ 8 probes

def test_pass_at_k_by_enumeration():
    for n, c, k in product(range(1, 7), range(7), range(1, 7)):
        if max(c, k) <= n:
            sets = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert motg.pass_at_k(n, c, k) == pytest.approx(sum(map(any, sets)) / len(sets))

def test_hidden_state_entropy_of_known_spectra():
    e, entropy, H = torch.eye(8), motg.hidden_state_entropy, F.normalize(torch.randn(20, 6, generator=seeded(0)).double(), dim=1)
    lam = torch.linalg.eigvalsh(H @ H.T / 20).clamp(min=1e-300)
    for hidden, want in ((3 * e[[0] * 5], 0), (e[:5] * torch.tensor([[1.0], [2], [3], [4], [5]]), 1), (torch.cat([e, e, e]), 1), (e[:1], 0),
                         (e[[0, 0, 0, 1]], -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)),
                         (H * 7, -(lam * lam.log()).sum().item() / math.log(6))):
        assert entropy(hidden) == pytest.approx(want, abs=1e-6)

def test_step_probes_by_hand(small):
    r = motg.rollout(*small, ["a", "b"], config(chains=1, max_new_tokens=3), seeded(0))
    for name, value in dict(
            tokens=[[[1, 2], [2, 3], [4, 0]], [[5, 6], [0, 0], [0, 0]]], thinking=[[1, 1, 0], [1, 0, 0]], mask=[[1, 1, 1], [1, 0, 0]],
            eos=[[0, 0, 1], [0, 0, 0]], entropy=[[1.0, 2.0, 9.0], [3.0, 0.0, 0.0]], texts=["x</think>y", "x"],
            log_weights=torch.tensor([[[0.5, 0.5], [0.9, 0.1], [1.0, 0]], [[1.0, 0], [1, 0], [1, 0]]]).log().tolist()).items():
        setattr(r, name, value if name == "texts" else torch.tensor(value, dtype=getattr(r, name).dtype))
    got, h = step_probes(r), lambda *w: -sum(x * math.log(x) for x in w)
    want = dict(entropy=2.0, weight_entropy=(h(0.5, 0.5) + h(0.9, 0.1)) / 3, gini_simpson=(0.5 + 0.18) / 3, think_tokens=1.5,
                answer_tokens=0.5, distinct_tokens=(3 + 1) / 2, truncated=0.5, tagged=0.5)
    assert {n: got[n] for n in want} == pytest.approx(want, abs=1e-5)

def test_hidden_probes_are_of_the_models_own_states(folder):
    """The states that predict the thinking steps, which for single tokens an ordinary forward pass of the text has too."""
    cfg = config("single", model=folder, smoke=True, chains=3, max_new_tokens=24)
    model, tokenizer = motg.load_model(cfg)
    r = motg.rollout(model, tokenizer, ["ab c"], cfg, seeded(0))
    found, layers, curve = motg.hidden_probes(model, r, cfg, window=4), [], collections.defaultdict(list)
    for ids, tokens, n in zip(r.prompt_ids, r.representative, r.thinking.sum(1).tolist()):
        with torch.no_grad():
            out = model(input_ids=torch.cat([ids, tokens])[None], output_hidden_states=True).hidden_states
        states = [h[0, len(ids) - 1 : len(ids) - 1 + n] for h in out]
        layers.append([motg.hidden_state_entropy(h) for h in states])
        for t in range(4, n + 1):
            curve[t].append(motg.hidden_state_entropy(states[-1][t - 4 : t]))
    assert found["hidden_entropy"] == pytest.approx(torch.tensor(layers).mean(0).tolist(), abs=1e-4)
    assert found["hidden_entropy_curve"] == pytest.approx({t: sum(v) / len(v) for t, v in curve.items()}, abs=1e-4)
    assert found["hidden_last"] == found["hidden_entropy"][-1] and len(curve) > 4

# ------------------------------------------------------------------------------------------ 9 tasks and rewards

@cases("task", ["chain_sum", "graph_color", "list_functions"])
def test_no_question_is_in_training_and_test(task):
    tokenizer, text = trained_tokenizer(), lambda found: [entry["question"] for _, entry, _ in found]
    make = lambda seed: config(task=task, max_prompt_tokens=4000, eval_problems=30, seed=seed)
    test = held_out(make(0), tokenizer)
    assert len(set(text(test))) == 30 and all(p.rstrip().endswith("<think>") and e["question"] in p for _, e, p in test)
    for seed in (0, 1, 42):
        drawn, again = ([training_problem(make(seed), tokenizer, n) for n in range(20)] for _ in range(2))
        assert text(drawn) == text(again) and len(set(text(drawn))) > 15  # a function of (seed, n)
        assert text(held_out(make(seed), tokenizer)) == text(test)  # one test set for all
        others = stream(task, make(seed), tokenizer, 1 + seed, 600, False) + stream(task, make(seed), tokenizer, 0, 600, False)
        assert not set(text(test)) & set(text(drawn + others))

def test_too_long_prompts_are_skipped_and_an_error_when_all_are():
    tokenizer, size = trained_tokenizer(), lambda problem: len(tokenizer(problem[2])["input_ids"])
    sizes = sorted(map(size, stream("graph_color", config(max_prompt_tokens=10**6), tokenizer, 1, 40, False)))
    cfg = config(max_prompt_tokens=sizes[15])
    found = [training_problem(cfg, tokenizer, n) for n in range(8)] + held_out(cfg, tokenizer)
    assert sizes[0] < max(map(size, found)) <= cfg.max_prompt_tokens
    for call in (lambda c: training_problem(c, tokenizer, 0), lambda c: held_out(c, tokenizer)):
        with pytest.raises(UserError, match="max_prompt_tokens = 5"):
            call(config(max_prompt_tokens=5))

@cases("text, answer", [
    ("1</think> <answer>2</answer>", "2"), ("t</think>\n<answer>\n1 2\n3 4\n</answer>", "1 2\n3 4"), ("t</think><answer>2", None),
    ("t</think><answer>1</answer> no <answer> 2 </answer> bye", "2"), ("<answer>1</answer></think> so 2", None), ("", None), ("42", None),
    ("t</think><answer>1<answer>2</answer>", "2"), ("t</think></answer><answer>", None), ("t</think>2</answer>", None),
    ("t<answer>0</answer></think><answer></answer>", ""), ("<answer>7</answer>", "7"), ("<answer>" * 20_000, None)])
def test_extract_answer(text, answer):
    assert motg.extract_answer(text) == answer

def test_rewards_and_their_parts():
    problem = stream("chain_sum", config(), trained_tokenizer(), 1, 30, False)[0]
    good = f"</think>\n<answer>\n{problem[1]['answer']}\n</answer>\n"
    for text, right, form, words in (
            ("a" + good, 1, 1, 0), ("a\nb\n" + good, 1, 1, 0), ("w " * 250 + good, 1, 1, 1), ("w " * 450 + good, 1, 1, 0),
            ("a" + good[8:], 1, 0, 0), ("a</think> so" + good[8:], 1, 0, 0), ("a" + good + " ok", 1, 0, 0), ("a", 0, 0, 0),
            ("a</think><answer>x</answer>", 0, 1, 0)):
        got = rewards(problem, text)
        assert (got["correct"], got["format"]) == (right, form) and (got["score"] == 1 if right else got["score"] < 0.1), text
        assert got["reward"] == pytest.approx(2 * got["score"] + 0.5 * form + 0.5 * words), text

# ------------------------------------------------------------------------------------------ 10 refused inputs

def said(capsys):
    """The lines on stderr since the last call, without progress bars."""
    return [line for line in re.split(r"[\r\n]+", capsys.readouterr().err) if line and "it/s]" not in line and "?it/s" not in line]

def refused(args, allowed, capsys):
    """Run motg: it must say in one line what is `allowed` (a pattern), and change nothing on the disk."""
    tree = lambda: {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in pathlib.Path().rglob("*") if p.name != "lock"}
    before, _ = tree(), said(capsys)
    assert motg.main(args) == 2
    assert len(lines := said(capsys)) == 1 and re.search(allowed, lines[0]), lines
    assert tree() == before, set(tree()) ^ set(before)

RUN = ("train --smoke --out out --task chain_sum --steps 4 --chains 2 --prompts-per-step 2 --max-new-tokens 6 --max-prompt-tokens 300 "
       "--eval-problems 3 --save-every 2 --seed 1 --lr 1e-3 --warmup 0").split()

@cases("flags, allowed", [
    ("--task chain_sun", "did you mean 'chain_sum'"), ("--task qqqq", "allowed"), ("--method dirichle", "did you mean 'dirichlet'"),
    ("--method zzz", "allowed: .*different-tokens"), ("--kk 3", "did you mean|allowed"), ("--steps many", "steps.*many"), ("extra", "extra"),
    ("--loss-average mean", "allowed: .*chain.*token.*constant"), ("--k 0", "k = 0.*allowed"), ("--k 100000", "allowed is 1"),
    ("--temperature 0", "temperature = 0.*allowed"), ("--temperature nan", "temperature = nan"), ("--top-p 1.5", "top_p = 1.5.*allowed"),
    ("--lr inf", "lr = inf"), ("--seed -1", "seed = -1.*allowed"), ("--chains 1", "allowed is 2"),
    ("--end steps --end-steps 6", "less than max_new_tokens"), ("--seed 10000000000000000000", "seed = 1.*allowed"),
    ("--sampling top-k --aggregation probability --logprob exact", "allowed: top-k"), ("--no-smoke", "--smoke"),
    ("--sampling without-replacement --aggregation max --logprob exact", "allowed: top-k"), ("--max-prompt-tokens 5", "max_prompt_tokens"),
    ("--max-new-tokens 5000", "allowed.*positions"), ("--resume --out nothing", "allowed is .*--out"), ("--model /no/such", "allowed"),
    ("--model no-template", "chat template"), ("--model no-eos", "EOS"), ("--model damaged", "allowed"), ("--model no-weights", "allowed"),
    ("--model window", "allowed are"), ("--model scaled", "allowed are")])
def test_refused_train_commands(flags, allowed, folder, capsys):
    tokenizer, name = transformers.AutoTokenizer.from_pretrained(folder), flags.removeprefix("--model ")
    if name in ("no-template", "no-eos", "damaged", "no-weights", "window", "scaled"):
        model = tiny(tokenizer, *dict(window=["Mistral"], scaled=["Granite"]).get(name, []),
                     **dict(window=dict(sliding_window=4), scaled=dict(logits_scaling=8.0)).get(name, {}))
        if name == "no-template":
            tokenizer.chat_template = None
        if name == "no-eos":
            tokenizer.eos_token = model.config.eos_token_id = model.generation_config.eos_token_id = None
        saved(model, tokenizer, name)
        if name == "damaged":
            pathlib.Path(name, "config.json").write_text('{"model_type": "qwen2", "hidden')
        if name == "no-weights":
            pathlib.Path(name, "model.safetensors").unlink()
    refused([*RUN, "--model", folder, *flags.split()], allowed, capsys)

@cases("command, allowed", [("", "command|train"), ("trian", "train"), ("eval --method single,zzz", "allowed"),
                            ("eval --task qqq", "allowed|mean"), ("train --smoke --task graph_color", "chain_sum")])
def test_other_refused_commands(command, allowed, capsys):
    refused(command.split(), allowed, capsys)

# ------------------------------------------------------------------------------------------ 11 a run's folder

FORKS = multiprocessing.get_context("forkserver")  # children start from a process that has imported motg: in 20 ms, not 8 s
FORKS.set_forkserver_preload([__name__])

def child(args, log, patch):
    with open(log, "w") as f:
        os.dup2(f.fileno(), 1), os.dup2(f.fileno(), 2)
    patch()
    sys.exit(motg.main(args))

def start(args, patch=int):
    (process := FORKS.Process(target=child, args=(args, os.path.abspath("log"), patch), daemon=True)).start()  # not left behind
    return process

def slow_down():
    """0.2 s more a step, so that a signal arrives between two."""
    rollout = motg.rollout
    motg.rollout = lambda *a: (time.sleep(0.2), rollout(*a))[1]

def small_files():
    """As on a full disk: no file may exceed 30 kB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

def metrics(out="out"):
    path = pathlib.Path(out, "metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []

def wait_for_steps(count):
    end = time.time() + 60
    while len(metrics()) < count:
        assert time.time() < end, pathlib.Path("log").read_text()
        time.sleep(0.01)

def outcome(out="out"):
    """What must not depend on interruptions: metrics and result but for times, and the weights."""
    timeless = lambda d: {n: v for n, v in d.items() if "second" not in n and "time" not in n}
    weights = transformers.AutoModelForCausalLM.from_pretrained(f"{out}/checkpoint").state_dict()
    return ([*map(timeless, metrics(out))], timeless(json.loads(pathlib.Path(out, "result.json").read_text())),
            {n: v.numpy().tobytes() for n, v in weights.items()})

@pytest.fixture(scope="session")
def straight(folder):
    """Outcomes of uninterrupted runs, by their flags."""
    @functools.cache
    def get(*flags):
        out = tempfile.mkdtemp(dir=HOME)
        assert motg.main([*RUN, "--model", folder, *flags, "--out", out]) == 0
        return outcome(out)
    return get

@pytest.fixture()
def half(folder):
    """The command that continues a run with a checkpoint at its step 2 of 4."""
    assert motg.main([*RUN, "--model", folder, "--steps", "2"]) == 0
    return [*RUN, "--model", folder, "--resume"]

def test_activation_checkpointing_changes_no_number(straight):
    assert straight("--checkpoint-activations") == straight()

def test_what_a_run_writes(folder, capsys):
    command, out = [*RUN, "--model", folder, "--method", "different-tokens", "--eval-every", "2"], pathlib.Path("out")
    assert motg.main(command) == 0
    log, result, kept = metrics(), *(json.loads((out / name).read_text()) for name in ("result.json", "config.json"))
    assert [d["step"] for d in log] == [0, 1, 2, 3] and ["test_accuracy" in d for d in log] == [False, True] * 2
    assert {*"reward score correct format entropy kl loss grad_norm no_gradient too_long skipped".split()} <= set(log[0])
    assert dict(task="chain_sum", method="different-tokens", seed=1, steps=4).items() <= result.items() and kept["lr"] == 1e-3
    assert {"accuracy_before", "accuracy_after", "seconds"} <= set(result) and (out / "samples.txt").read_text().count("{") > 3
    assert not [*out.glob("*.new"), *out.glob("*.old")]
    ids, models = torch.tensor([[5, 6, 7]]), [transformers.AutoModelForCausalLM.from_pretrained(m) for m in (folder, "out/checkpoint")]
    assert not torch.equal(models[0](ids).logits, models[1](ids).logits) and models[1](ids).logits.isfinite().all()
    assert transformers.AutoTokenizer.from_pretrained("out/checkpoint").chat_template == CHATML
    refused(command, "--resume", capsys)
    refused([*command, "--resume", "--lr", "1e-4"], "lr = 0.001", capsys)

@cases("flags", [(), ("--accumulate", "2", "--method", "soft-grpo")])
def test_a_killed_run_resumes_to_the_same_bits(flags, folder, straight):
    process = start([*RUN, "--model", folder, *flags], slow_down)
    wait_for_steps(3)  # past the checkpoint of step 2
    process.kill(), process.join()
    assert process.exitcode == -signal.SIGKILL and not os.path.exists("out/result.json")
    assert motg.main([*RUN, "--model", folder, *flags, "--resume"]) == 0
    assert outcome() == straight(*flags) != straight(*flags, "--seed", "2")

@slow
@cases("kills", [20])
def test_a_run_killed_at_random_moments_can_go_on(kills, folder, straight):
    command = lambda: [*RUN, "--model", folder] + ["--resume"] * os.path.exists("out/config.json")
    for _ in range(kills):
        process = start(command())
        process.join(random.Random(time.time()).uniform(0.2, 2.5))
        process.kill(), process.join()
        assert process.exitcode in (-signal.SIGKILL, 0), pathlib.Path("log").read_text()
        if process.exitcode == 0:
            assert outcome() == straight()
            shutil.rmtree("out")
    assert motg.main(command()) == 0 and outcome() == straight()

def test_a_full_file_system_stops_in_one_line_and_the_run_goes_on_when_there_is_room(folder, straight, tmp_path, capsys):
    assert motg.main([*RUN, "--model", folder, "--steps", "2", "--out", "probe"]) == 0
    size = sum(file.stat().st_size for file in pathlib.Path("probe").rglob("*") if file.is_file()) // 1024
    (disk := tmp_path / "disk").mkdir()
    mount = lambda options: subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], capture_output=True).returncode
    if mount(f"size={size * 3 // 2}k"):  # room for one checkpoint, not for the next one beside it
        pytest.skip("needs the right to mount a small file system")
    try:
        said(capsys)
        command = [*RUN, "--model", folder, "--out", str(disk / "run")]
        assert motg.main(command) == 1
        assert len(lines := said(capsys)) == 1 and "disk full" in lines[0] and "--resume" in lines[0], lines
        assert len([*(disk / "run").glob("checkpoint-*")]) == 1  # what was written of the next one is gone
        assert mount("remount,size=64m") == 0 and motg.main([*command, "--resume"]) == 0
        assert outcome(disk / "run") == straight()
    finally:
        subprocess.run(["umount", disk])

@cases("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_with_its_status(number, folder):
    args = [*RUN, "--model", folder, "--save-every", "4000", "--steps", "4000"]
    with open("log", "w") as log:  # the program as a user starts it
        process = subprocess.Popen([sys.executable, motg.__file__, *args], stdout=log, stderr=log)
    wait_for_steps(2)
    process.send_signal(number)
    assert process.wait() == 128 + number and re.search(r"stopped by .*--resume", pathlib.Path("log").read_text())
    done = len(metrics())
    assert os.path.exists("out/checkpoint/trainer.pt")
    assert motg.main([*args, "--resume", "--steps", str(done + 1)]) == 0 and len(metrics()) == done + 1

def test_a_crash_inside_a_save_leaves_the_checkpoint_before(folder, straight, monkeypatch, capsys):
    save, calls = torch.save, itertools.count()
    monkeypatch.setattr(torch, "save", lambda *a, **k: 1 / 0 if next(calls) == 1 else save(*a, **k))
    assert motg.main([*RUN, "--model", folder]) == 1 and "--resume" in said(capsys)[-1] and len(os.listdir("out/checkpoint")) > 4
    assert motg.main([*RUN, "--model", folder, "--resume"]) == 0 and outcome() == straight()

def die_before_rename(n):
    rename, calls = pathlib.Path.rename, itertools.count()
    pathlib.Path.rename = lambda *a: os.kill(os.getpid(), signal.SIGKILL) if next(calls) == n else rename(*a)

@cases("n", [pytest.param(0, marks=slow), pytest.param(1, marks=slow), 2])  # files and checkpoints are swapped in by renames
def test_a_run_killed_before_any_of_its_renames_keeps_a_checkpoint(n, half, straight):
    (process := start(half, functools.partial(die_before_rename, n))).join()
    assert process.exitcode == -signal.SIGKILL and os.path.exists("out/checkpoint/trainer.pt")
    assert motg.main(half) == 0 and outcome() == straight()
    assert not [*pathlib.Path("out").glob("*.new"), *pathlib.Path("out").glob("*.old")] and len(os.listdir("out")) < 9

def test_a_resumed_run_remembers_an_accuracy_of_zero_before_training(half, monkeypatch):
    monkeypatch.setattr(motg, "evaluate", lambda *a, **k: {"pass@1": 0.7})
    assert json.loads(pathlib.Path("out/result.json").read_text())["accuracy_before"] == 0.0 and motg.main(half) == 0
    result = json.loads(pathlib.Path("out/result.json").read_text())
    assert (result["accuracy_before"], result["accuracy_after"]) == (0.0, 0.7)

class Evil:
    def __reduce__(self):
        return os.system, ("touch broken-into",)

@cases("harm", ["weights", "bit", "state", "pickle", "gone", "foreign"])
def test_a_damaged_checkpoint_is_refused_by_name(harm, half, capsys):
    at = pathlib.Path("out/checkpoint")
    cut = lambda path: path.write_bytes(path.read_bytes()[:-1000])
    flip = lambda path: path.write_bytes((data := path.read_bytes())[:-1] + bytes([data[-1] ^ 1]))
    def foreign():
        other = saved(tiny(trained_tokenizer(), "Llama", hidden_size=16), trained_tokenizer(), "llama")
        assert motg.main([*RUN, "--model", other, "--out", "other"]) == 0
        shutil.rmtree(at.resolve()), at.unlink(missing_ok=True), shutil.copytree("other/checkpoint", at)
    dict(weights=lambda: cut(at / "model.safetensors"), state=lambda: cut(at / "trainer.pt"), gone=lambda: (at / "trainer.pt").unlink(),
         bit=lambda: flip(at / "model.safetensors"),
         pickle=lambda: torch.save(dict(step=2, optimizer=Evil()), at / "trainer.pt"),
         foreign=foreign)[harm]()
    refused(half, "out/checkpoint is damaged or another model's", capsys)
    assert not os.path.exists("broken-into")

def test_a_second_process_in_the_same_folder_is_refused(half, capsys):
    process = start([*half, "--steps", "4000"], slow_down)
    wait_for_steps(3)
    assert motg.main(half) == 2 and re.search("out .*other process|another process", said(capsys)[-1])
    process.kill(), process.join()

def test_a_full_disk_is_one_line_and_costs_no_checkpoint(half):
    files = lambda: {p.name: p.read_bytes() for p in pathlib.Path("out/checkpoint").iterdir()}
    before = files()
    (process := start(half, small_files)).join()
    log = pathlib.Path("log").read_text()
    assert process.exitcode == 1 and "Traceback" not in log and re.search(r"\nmotg: .*--resume.*\n$", log) and files() == before
    assert motg.main(half) == 0 and len(metrics()) == 4

@cases("bad", [{1}, {1, 2, 3}])
def test_one_loss_that_is_not_finite_is_skipped_and_three_stop_the_run(bad, folder, monkeypatch, capsys):
    loss, calls = motg.grpo_loss, itertools.count()
    def broken(*args):
        value, stats = loss(*args)
        return (value * math.nan, stats | dict(loss=math.nan)) if next(calls) in bad else (value, stats)
    monkeypatch.setattr(motg, "grpo_loss", broken)
    assert motg.main([*RUN, "--model", folder, "--steps", "6", "--save-every", "100"]) == (len(bad) > 1)
    assert [d["skipped"] for d in metrics()] == ([0, 1, 1, 1] if len(bad) > 1 else [0, 1, 0, 0, 0, 0])
    assert len(bad) == 1 or "three times in a row" in said(capsys)[-1]
    assert flat(transformers.AutoModelForCausalLM.from_pretrained("out/checkpoint").parameters()).isfinite().all()

# ------------------------------------------------------------------------------------------ 12 models as from the hub

@cases("setting,threads", [(None, 1), ("2", 2)])
def test_a_small_model_runs_on_one_thread_unless_the_user_says_otherwise(setting, threads, folder, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", setting) if setting else monkeypatch.delenv("OMP_NUM_THREADS")
    try:
        torch.set_num_threads(2)
        motg.load_model(config(model=folder, smoke=True))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(1)

def test_the_smoke_prompt_is_chatml_in_few_tokens():
    tokenizer = motg.smoke_tokenizer()  # Jinja drops a newline that ends a template; the prompt was twice as long without it
    (_, entry, prompt), = stream("chain_sum", config(smoke=True), tokenizer, 1, 3, False)[:1]
    assert prompt == (f"<|im_start|>system\n{motg.SYSTEM}<|im_end|><|im_start|>user\n{entry['question']}<|im_end|>"
                      "<|im_start|>assistant\n<think>\n")
    ids = tokenizer(prompt)["input_ids"]
    assert tokenizer.decode(ids) == prompt and len(ids) < 20

@cases("family", ["Qwen2", "Llama", "Qwen3"])
def test_training_and_evaluating_a_model_folder(family):
    model, tasks, methods = saved(tiny(trained_tokenizer(), family), trained_tokenizer(), "m"), "chain_sum,spell_backward", "single,soft-thinking"
    assert motg.main([*RUN, "--model", model, "--tasks", tasks, "--steps", "2"]) == 0
    flags = "--chains 4 --eval-problems 3 --max-prompt-tokens 300 --max-new-tokens 6"
    assert motg.main(["eval", "--smoke", "--model", "out/checkpoint", "--tasks", tasks, "--method", methods, *flags.split()]) == 0
    rows = json.loads(pathlib.Path("out/eval.json").read_text())
    assert [(d["task"], d["method"]) for d in rows] == list(product(tasks.split(","), methods.split(",")))
    for d in rows:
        assert d["problems"] == 3 and d["chains"] == 4 and {"stderr", "entropy", "distinct_tokens"} <= set(d)
        assert 0 <= d["pass@1"] <= d["pass@2"] <= d["pass@4"] <= 1 and len(d["hidden_entropy"]) == 3

# ------------------------------------------------------------------------------------------ 13 what the README claims

SOURCE = pathlib.Path(motg.__file__)
README = SOURCE.with_name("README.md")

def test_the_source_is_one_short_file_with_few_imports():
    text = SOURCE.read_text()
    assert len(text.splitlines()) < 900 and max(map(len, text.splitlines())) <= 128
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names = {name.split(".")[0] for name in names | {node.module for node in nodes if isinstance(node, ast.ImportFrom)}}
    assert names - sys.stdlib_module_names <= {"torch", "transformers", "reasoning_gym", "tqdm", "tokenizers"}

@pytest.mark.skipif(not README.exists(), reason="no README.md beside motg.py")
def test_the_readme_names_commands_flags_and_files_that_exist():
    text = README.read_text().replace("\\\n", " ")
    commands = re.findall(r"python3? motg\.py ((?:train|eval)[^\n`#|&>;]*)", text)
    assert commands
    for command in commands:
        if not re.search(r"[<$\[]|\.\.\.|--help", command):
            _, given = motg.parse(command.split())
            for method in given.pop("method", "dirichlet").split(","):
                config(method, **given)
    for flag in re.findall(r"`--([a-z][a-z_-]+)", text):
        assert flag.removeprefix("no-").replace("-", "_") in {*Config.__dataclass_fields__, "help", "tasks"}, flag
    for link in re.findall(r"\]\((?!http|#)([^)#\s]+)", text):
        assert (README.parent / link).exists(), link

# ------------------------------------------------------------------------------------------ 14 does it learn?

@cases("method", ["single", "dirichlet", "different-tokens", *(pytest.param(m, marks=slow) for m in ("multiplex", "soft-grpo"))])
def test_training_raises_the_reward(method, folder, monkeypatch):
    """The whole loop on a random model; the reward is the share of vowels in what is read."""
    def wanted(problem, text, *_):
        share = sum(map(text.count, "aeiou")) / max(len(text), 1)
        return dict(reward=share, score=share, format=0.0, correct=float(share > 0.5))
    monkeypatch.setattr(motg, "rewards", wanted)
    flags = "--steps 40 --chains 8 --prompts-per-step 4 --lr 1e-2 --grad-clip 1 --kl-beta 0 --save-every 100 --method"
    assert motg.main([*RUN, "--model", folder, *flags.split(), method]) == 0
    reward = [d["reward"] for d in metrics()]  # a step's varies by 0.02, so a mean of five by 0.01
    assert sum(reward[-5:]) / 5 > sum(reward[:5]) / 5 + 0.12, reward

@slow
def test_the_smoke_run_learns_which_habit_is_right():
    assert motg.main(["train", "--smoke", "--out", "out"]) == 0
    result = json.loads(pathlib.Path("out/result.json").read_text())  # 256 problems: standard errors of about 0.02
    assert result["accuracy_after"] > result["accuracy_before"] + 0.15, result

# ------------------------------------------------------------------------------------------ 15 contained scoring

PAPER = ("acre graph_color family_relationships color_cube_rotation zebra_puzzles number_sequence countdown "
         "prime_factorization circuit_logic syllogism self_reference simple_integration").split()
EVALUATING = motg.ARITHMETIC + motg.LITERALS
LIMIT = 2.5  # seconds a score may take: the server's timer of 2, and what the kernel needs to free its memory
# Made of OPEN, each of these makes a file if the scorer runs it. (No quotes: they are refused anyway.)
OPEN = "open(chr(67),chr(119))"
CODE = [a.replace("OPEN", OPEN) for line in """
OPEN|[OPEN]|[[OPEN]]|(OPEN,)|*OPEN,|{OPEN}|{1: OPEN}|[OPEN for _ in (1,)]|-OPEN|1+OPEN|(lambda: OPEN)()|lambda: OPEN
(f:=open)('CANARY','w')|f"{OPEN}"|[f'{OPEN}']|1 if OPEN else 2|OPEN or 1|not OPEN|sqrt(OPEN)|eval("OPEN")|exec("OPEN")
sqrt("OPEN")|sympify("OPEN")|S("OPEN")|N("OPEN")|Symbol("OPEN")|parse_expr("OPEN")|Rational("OPEN")|Lambda(x, OPEN)(1)
print(OPEN)|x.func(OPEN)|0.2[OPEN]|E.func(OPEN)|sin(OPEN)!|log(x, OPEN)|sqrt(*OPEN)|sqrt(x=OPEN)|x(OPEN)
getattr(__builtins__,'open')('CANARY','w')|globals()['__builtins__']['open']('CANARY','w')|vars()['OPEN']|1;OPEN
x=OPEN|@OPEN|Symbol('x').__class__.__init__.__globals__['__builtins__']['open']('CANARY','w')|await OPEN|yield OPEN
(_ for _ in [OPEN])|().__class__.__base__.__subclasses__()[0](OPEN)|__import__('os').system('touch CANARY')
__import__('pathlib').Path('CANARY').touch()|(1).__class__.__base__.__subclasses__()|x.__class__|1..__class__
().__doc__|5 .Γ|sqrt.__globals__|breakpoint()|input()|help()|exit()|quit(0)|exit|os._exit(0)|__import__('os')._exit(0)
__import__('os').abort()|__import__('os').fork()|[exit()]|sqrt(exit())
__import__('os').kill(__import__('os').getppid(),9)|__import__('signal').setitimer(0,0)
(_ for _ in ()).throw(SystemExit)|oracle_answer|answer|self|entry['answer']|valid_solutions|entry.update(answer='1')
Integral(0,x)|C.__class__|Function('f')(x)|𝐨𝐩𝐞𝐧('CANARY','w')|ｅｖａｌ("OPEN")|'a' % OPEN
""".strip().split("\n") for a in line.split("|")] + [
    f"1 #\n{OPEN}", f"1\n{OPEN}", f"1\r{OPEN}", f"1 \\\nif {OPEN} else 2", f"\f{OPEN}", f"\ufeff{OPEN}", f"1\0{OPEN}"]
SIZE = [a for line in """
9**9**9**9|9**9**9|2**2**2**2**2**9|99999999!|99999!!!|(9**9)!|9!!!!|factorial(99999999)|gamma(10**9)|10**10**8
1<<10**10|0**-1|1e999999999|-1e999999999|1e99999999999999999999|0x1p9|1_0e9_9|[0]*10**10|'a'*10**10|[[0]*10**6]*10**6
bytes(10**10)|range(10**12)|exp(exp(exp(10**5)))|exp(exp(exp(exp(9))))|sin(10**999)|x**99999|(x+1)**9999|(x+y+1)**99
x**x**x**x**x|sqrt(10**4000+1)|log(9**4000)|NaN|nan|[NaN, 1]|[Infinity]|inf|-inf|Infinity|1e999|[1e999]|sNaN|nan123
nani|n an|∞|zoo|oo|1/0|0/0|٣|²|½|Ⅷ|-0|0e0|1j""".split("\n")[1:] for a in line.split("|")] + [
    "(" * 10**5 + "1" + ")" * 10**5, "(" * 2000 + "1" + ")" * 2000, "[" * 2000, "[" * 2000 + "]" * 2000, "[" * 10**5,
    '{"a":' * 800, "-" * 4000 + "1", "1" + "+1" * 2000, "9" * 4096, "9*" * 2000 + "9", "9**" * 1000 + "1", "5" + "!" * 4000,
    "," * 10**6, "1," * 2000, "\0", "\0" * 4096, "\ud800", "a\udfff" * 9, "", " ", "\n" * 4096, "\x1b[2J", "×" * 4000,
    "not " * 1000 + "1", "1×" * 999, "sqrt(" * 800 + "2" + ")" * 800, "exp(" * 30 + "x" + ")" * 30, "x**" * 900 + "x",
    "1/" * 2000 + "3", "(1+x)*" * 700 + "1", " ∧ ".join(f"v{i}" for i in range(40)), "[" + "1e9," * 900 + "1]", '"' * 4095,
    "\\" * 4001, "{" * 3000]

def entry_of(task, **settings):
    """(dataset, entry, a right answer)"""
    data = reasoning_gym.create_dataset(task, size=1, seed=0, **settings)
    entry = data[0]
    right = dict(graph_color=lambda m: json.dumps(m["possible_answer"]), propositional_logic=lambda m: m["example_answer"])
    return data, entry, right[task](entry["metadata"]) if task in right else entry["answer"]

def attack(tasks, answers, tmp_path, monkeypatch):
    """Every answer scores a number in time, the worker lives on, and nothing was run, in any of the tasks."""
    monkeypatch.chdir(tmp_path)
    motg.scorer = None  # a worker in this folder, where a file would be made
    for task in tasks:
        _, entry, right = entry_of(task)
        motg.score(task, right, entry)  # imports are not on the clock
        for answer in answers:
            began = time.perf_counter()
            value = motg.score(task, answer, entry)
            assert isinstance(value, float) and 0 <= value <= 1, (task, answer[:80], value)
            assert value < 1 or answer.strip() == right or task == "game_of_life_halting", (task, answer[:80])
            assert time.perf_counter() - began < LIMIT, (task, answer[:80])
        assert motg.score(task, right, entry) == (1.0 if right else 0.0)
        assert not list(tmp_path.iterdir()), task
    motg.scorer = None

def test_no_answer_runs_code_or_hangs(tmp_path, monkeypatch):
    assert len(set(CODE + SIZE)) >= 150
    more = {"propositional_logic", "complex_arithmetic", "number_sorting"}
    motg.counts.clear()
    attack(sorted({*PAPER, *EVALUATING} | more), CODE + SIZE, tmp_path, monkeypatch)
    assert motg.counts["timeout"] <= 6  # nearly all are refused before they cost two seconds each

def test_the_attacks_are_real(tmp_path, monkeypatch):  # without the allow-list they run: the test above is not empty
    monkeypatch.chdir(tmp_path)
    for task, answer in (("string_insertion", OPEN), ("countdown", f"cos({OPEN})"), ("puzzle24", f"x.func({OPEN})")):
        data, entry, _ = entry_of(task)
        data.score_answer(answer, entry)
        (tmp_path / "C").unlink()

def test_the_list_of_evaluating_tasks_is_whole():  # a new release of reasoning_gym may evaluate elsewhere
    evaluating = re.compile(r"\b(eval|exec|parse_expr|sympify|literal_eval|compile)\(")
    found = {t for t, (c, _) in DATASETS.items() if evaluating.search(inspect.getsource(c.score_answer))}
    assert found == {*EVALUATING, "number_sorting"}  # number_sorting evaluates the oracle's answer, not the model's

@pytest.mark.parametrize("task", sorted(set(DATASETS) - {"composite"}))
def test_scores_are_the_plain_scorers(task):
    data, entry, right = entry_of(task)
    assert right is None or motg.score(task, right, entry) == data.score_answer(right, entry) == 1.0
    for answer in ["", "0", "a", None] + ([right + " ", right + "0", right[1:]] if right else []):
        try:
            plain = data.score_answer(answer, entry) if answer is not None else 0.0
        except Exception:
            plain = 0.0
        got = motg.score(task, answer, entry)  # spell_backward gives 1.0000000000000002 for "right " + anything
        assert got == (plain if plain <= 1 else 0.9999999999999999) or (task in EVALUATING and got == 0 and plain < 0.1)

def test_composite_entries_go_to_the_task_they_come_from():
    _, entry, right = entry_of("chain_sum")
    assert motg.score("composite", right, entry) == 1.0

def integral(integrand):
    return dict(question="", answer="?", metadata=dict(variable="x", integrand=integrand))

COUNTDOWN = dict(question="", answer="6*(98 - 54) - 34 - 66", metadata=dict(numbers=[6, 98, 54, 34, 66], target=164))
REWRITINGS = [("simple_integration", integral("x"), a) for a in (
    "x**2/2 + C", "C + x**2/2", "x**2/2", " x**2 / 2+C\n", "0.5*x**2", "1/2*x**2 + 7", "(x**2)/(2)", "x*x/2 - C", "x**2/2 + c",
    "+x**2/2", "Rational(1, 2)*x**2", "log(exp(x**2/2))", "(x**2\n/2)", "x**(2)/2 + K", "x**2/2 + C_1", "2*x**2/4", "x**2/2 + 3!")] + [
    ("intermediate_integration", integral(f), a) for f, a in (
    ("1/x", "log(x) + C"), ("1/x", "ln(x)"), ("1/x", "C + ln(3*x)"), ("exp(x)", "exp(x) + C"), ("exp(x)", "E**x"),
    ("1/sqrt(x)", "2*sqrt(x)"), ("1/sqrt(x)", "2*x**0.5 + C"), ("1/sqrt(x)", "2*x**(1/2)"), ("cos(x)", "sin(x)+C"),
    ("sin(x)", "-cos(x) + pi"), ("1/(x**2 + 1)", "atan(x)"), ("x**2*exp(x)", "(x**2 - 2*x + 2)*exp(x) + C"),
    ("2*x*cos(x**2)", "sin(x**2)"))] + [
    ("polynomial_multiplication", dict(question="", answer="2*x**2 + 3*x - 5", metadata={}), a) for a in (
    "-5 + 3*x + 2*x**2", "2*x**2+3*x-5", "2*x*x + x*3 - 5", " 3*x - 5 + x**2*2")] + [
    ("countdown", COUNTDOWN, a) for a in (
    "(98 - 54)*6 - 66 - 34", "-34-66+6*(98-54)", "((98-54))*6-(34+66)", "6 * (98-54) -\t34 - 66", "(6*\n(98-54)-34-66)")] + [
    ("puzzle24", dict(question="", answer="?", metadata={}), a) for a in (
    "1*3*5 + 9", "9+5*3*1", "(9 - 1)*(6/2)", "4! + 1 - 3 + 2", "8/(3 - 8/3)")]

@pytest.mark.parametrize("task,entry,answer", REWRITINGS, ids=lambda v: v if isinstance(v, str) else "")
def test_rewritings_of_right_answers_score_one(task, entry, answer):  # where the plain scorer says so
    plain = reasoning_gym.create_dataset(task, size=1, seed=0).score_answer(answer, entry)
    assert motg.score(task, answer, entry) == plain == 1.0

def test_lists_and_other_solutions_score_as_they_do_plainly():
    for task in motg.LITERALS:
        data, entry, right = entry_of(task, **(dict(min_remove=8, max_remove=8) if task == "n_queens" else {}))
        rows = [[int(x) if x.isdigit() else x for x in row.split()] for row in right.split("\n")]
        others = entry["metadata"].get("valid_answers", [])
        for answer in [str(list(right)), str(rows), str(rows[0]), json.dumps(rows), f" {right} ", *others]:
            assert motg.score(task, answer, entry) == data.score_answer(answer, entry), (task, answer)

def test_nan_is_never_right_but_nancy_is():
    for task, answers in dict(number_sorting=["[" + "NaN, " * 9 + "NaN]"],
                              complex_arithmetic=["nan", "n an", "nani", "-NaN+nani"]).items():
        assert {motg.score(task, answer, entry_of(task)[1]) for answer in answers} == {0.0}
    for word in ("Nancy", "finance", "information", "infinite", "nano", "nan", "inf", "NaN", "infinity"):
        entry = dict(question="Which?", answer=word, metadata={})
        assert motg.score("caesar_cipher", word, entry) == motg.score("spell_backward", word, entry) == 1.0
        entry = dict(question=f"Sort: b, {word}, a", answer=f"a, b, {word}", metadata=dict(sorted_words=["a", "b", word]))
        assert motg.score("word_sorting", f"a,{word},b", entry) == pytest.approx(1 / 3)  # right in part
    entry = dict(question="", answer="0x1e4000", metadata=dict(problem="0x1e4000"))
    assert motg.score("bitwise_arithmetic", "0X1E4000", entry) == 1.0  # hexadecimal, not 1e4000

class Misdeed:
    """Unpickled in the server with the entry, it calls `do(*args)`: what a scorer that goes wrong would do."""
    def __init__(self, do, *args):
        self.call = do, args
    def __reduce__(self):
        return self.call

MISDEEDS = dict(hang=(time.sleep, 60), loop=(eval, "9**9**9"), exit=(sys.exit, 0), die=(os._exit, 0), abort=(os.abort,),
                memory=(eval, "[bytearray(1 << 28) for _ in range(40)]"), more=(bytearray, 1 << 40), raised=(eval, "1/0"),
                file=(eval, "open('CANARY', 'wb', 0).write(b'x')"),
                descriptors=(eval, "[__import__('os').open('/', 0) for _ in range(99)]"),
                prints=(eval, "[__import__('os').write(fd, b'x' * 99) for fd in range(3)] + [1/0]"))

@pytest.mark.parametrize("name", MISDEEDS)
def test_a_scorer_that_goes_wrong_is_replaced(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    motg.scorer = None
    _, entry, right = entry_of("chain_sum")
    assert motg.score("chain_sum", right, entry | dict(misdeed=Misdeed(*MISDEEDS[name]))) == 0.0
    began = time.perf_counter()
    assert motg.score("chain_sum", right, entry) == 1.0 and time.perf_counter() - began < 0.5
    assert all(file.stat().st_size == 0 for file in tmp_path.iterdir())

def test_what_is_counted():
    _, entry, right = entry_of("chain_sum")
    motg.counts.clear()
    assert motg.score("chain_sum", right, entry) == 1.0 and motg.score("chain_sum", None, entry) == 0.0
    for task, answer in (("chain_sum", "1" * 5000), ("chain_sum", "nan"), ("countdown", "exit()"),
                         ("prime_factorization", "two")):
        assert motg.score(task, answer, entry_of(task)[1]) == 0.0
    for call in ((os._exit, 1), (time.sleep, 9)):
        assert motg.score("countdown", "1", entry_of("countdown")[1] | dict(x=Misdeed(*call))) == 0.0
    assert motg.counts == dict(rejected=3, raised=2, timeout=1, scored=1)
    with pytest.raises(ValueError, match="no task 'nope'"):
        motg.score("nope", "1", entry)

def test_a_zygote_killed_while_idle_and_an_interrupt():
    _, entry, right = entry_of("chain_sum")
    motg.score("chain_sum", right, entry)
    os.killpg(motg.scorer.process.pid, signal.SIGKILL)
    time.sleep(0.1)
    assert motg.score("chain_sum", right, entry) == 1.0
    old = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    with pytest.raises(KeyboardInterrupt):
        motg.score("chain_sum", right, entry | dict(misdeed=Misdeed(time.sleep, 1)))
    signal.signal(signal.SIGALRM, old)
    assert motg.score("chain_sum", "0", entry) == 0.0  # not the 1.0 of the call that was cut short

@pytest.mark.parametrize("hang", [pytest.param(False, marks=slow), True])
def test_no_process_outlives_the_trainer(hang):
    code = ("import os, test_motg as t; d, e, a = t.entry_of('chain_sum'); t.motg.score('chain_sum', a, e); "
            "print(t.motg.scorer.process.pid, flush=True); "
            + hang * "t.motg.score('chain_sum', a, e | dict(x=t.Misdeed(t.time.sleep, 60)))")
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
                               cwd=os.path.dirname(__file__))
    session = int(trainer.stdout.readline())
    if hang:
        time.sleep(0.3)
        trainer.kill()
    trainer.wait()
    deadline = time.time() + 4
    while any(p.isdigit() and is_in(session, p) for p in os.listdir("/proc")):
        assert time.time() < deadline
        time.sleep(0.05)

def is_in(session, pid):
    try:
        return os.getsid(int(pid)) == session
    except ProcessLookupError:
        return False

@pytest.mark.parametrize("task", ["chain_sum", "countdown", "graph_color"])
def test_containment_costs_less_than_a_millisecond(task):
    data, entry, right = entry_of(task)
    def median(call):
        times = [time.perf_counter()]
        for _ in range(1000):
            call()
            times.append(time.perf_counter())
        return sorted(b - a for a, b in zip(times, times[1:]))[500]
    cost = median(lambda: motg.score(task, right, entry)) - median(lambda: data.score_answer(right, entry))
    assert cost < 1e-3  # about 0.1 ms
