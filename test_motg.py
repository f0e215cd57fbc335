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
training_problem, rewards = motg.train_problem, motg.rewards
held_out = lambda cfg, tokenizer: motg.test_problems(cfg, tokenizer, cfg.task)
motg.ARITHMETIC = "countdown puzzle24 polynomial_multiplication simple_integration intermediate_integration".split()
motg.LITERALS = "binary_matrix n_queens spiral_matrix string_insertion".split()
UserError, Config, METHODS, config = motg.UserError, motg.Config, motg.METHODS, motg.make_config

def stream(task, cfg, tokenizer, number, count, test):
    """The problems among the first `count` items of a stream."""
    return list(motg.problems(task, cfg, tokenizer, number, range(count), test))


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
        return motg.load_model(config(smoke=True), saved(model, tokenizer, folder))[0]

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
    if settings.get("sampling") not in ("without-replacement", "with-replacement"):  # those leave no slot empty
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






COMBINATIONS = [config(m, chains=3, max_new_tokens=12) for m in METHODS]
for end, sampling, aggregation, logprob in product(ENDS, SAMPLING, WEIGHTS, LOGPROBS):
    with contextlib.suppress(UserError):
        COMBINATIONS.append(config(sampling=sampling, aggregation=aggregation, logprob=logprob, end=end, end_steps=4, end_entropy=3.0,
                                   end_patience=2, chains=3, max_new_tokens=9, top_p=0.8, min_p=0.2, concentration=2.0))


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




# ------------------------------------------------------------------------------------------ 7 GRPO

def test_advantages_by_hand():
    r = torch.tensor([[1.0, 0.0, 0.0, 3.0], [0.3, 0.3, 0.3, 0.3], [2.0, 2.0, 2.0, 2.1]])
    for row, got in zip(r.double().tolist(), motg.group_advantages(r).tolist()):
        mean, std = sum(row) / 4, math.sqrt(sum((x - sum(row) / 4) ** 2 for x in row) / 3)
        assert got == pytest.approx([(x - mean) / (std + 1e-4) for x in row], abs=2e-3)

@cases("average, with_reference", product(["chain", "token"], [True, False]))
def test_loss_by_hand(average, with_reference):
    new, old, ref = (-2 * torch.rand(4, 6, generator=seeded(s)) for s in range(3))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    A, cfg, want = [1.5, -0.7, -2.0, 1.0], config(loss_average=average, kl_beta=0.3, clip=0.2, max_new_tokens=50), 0.0
    for b, t in mask.nonzero().tolist():
        ratio, log_r = math.exp(new[b, t] - old[b, t]), (ref[b, t] - new[b, t]).item() * with_reference
        gain = min(ratio * A[b], min(max(ratio, 0.8), 1.2) * A[b])
        count = dict(chain=4 * int(mask[b].sum()), token=int(mask.sum()))[average]
        want += (0.3 * (math.exp(log_r) - log_r - 1) - gain) / count
    loss, _ = motg.grpo_loss(new, old, ref if with_reference else None, torch.tensor(A), mask, cfg)
    assert loss.item() == pytest.approx(want, rel=1e-5)
    new[~mask] = math.inf  # what the mask hides does not matter
    hidden, _ = motg.grpo_loss(new, old, ref if with_reference else None, torch.tensor(A), mask, cfg)
    assert hidden.item() == pytest.approx(want, rel=1e-5)


flat = lambda tensors: torch.cat([t.detach().flatten() for t in tensors])



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
        r = r._replace(**{name: value if name == "texts" else torch.tensor(value, dtype=getattr(r, name).dtype)})
    got, h = step_probes(r), lambda *w: -sum(x * math.log(x) for x in w)
    want = dict(entropy=2.0, weight_entropy=(h(0.5, 0.5) + h(0.9, 0.1)) / 3, gini_simpson=(0.5 + 0.18) / 3, think_tokens=1.5,
                answer_tokens=0.5, distinct_tokens=(3 + 1) / 2, truncated=0.5)
    assert {n: got[n] for n in want} == pytest.approx(want, abs=1e-5)


# ------------------------------------------------------------------------------------------ 9 tasks and rewards



@cases("text, answer", [
    ("1</think> <answer>2</answer>", "2"), ("t</think>\n<answer>\n1 2\n3 4\n</answer>", "1 2\n3 4"), ("t</think><answer>2", None),
    ("t</think><answer>1</answer> no <answer> 2 </answer> bye", "2"), ("<answer>1</answer></think> so 2", None), ("", None), ("42", None),
    ("t</think><answer>1<answer>2</answer>", "2"), ("t</think></answer><answer>", None), ("t</think>2</answer>", None),
    ("t<answer>0</answer></think><answer></answer>", ""), ("<answer>7</answer>", None), ("<answer>" * 20_000, None)])
def test_extract_answer(text, answer):
    assert motg.extract_answer(text) == answer


# ------------------------------------------------------------------------------------------ 10 refused inputs






# ------------------------------------------------------------------------------------------ 11 a run's folder

FORKS = multiprocessing.get_context("forkserver")  # children start from a process that has imported motg: in 20 ms, not 8 s
FORKS.set_forkserver_preload([__name__])

























# ------------------------------------------------------------------------------------------ 12 models as from the hub




# ------------------------------------------------------------------------------------------ 13 what the README claims

SOURCE = pathlib.Path(motg.__file__)
README = SOURCE.with_name("README.md")



# ------------------------------------------------------------------------------------------ 14 does it learn?



# ------------------------------------------------------------------------------------------ 15 contained scoring

PAPER = ("acre graph_color family_relationships color_cube_rotation zebra_puzzles number_sequence countdown "
         "prime_factorization circuit_logic syllogism self_reference simple_integration").split()
EVALUATING = motg.ARITHMETIC + motg.LITERALS
LIMIT = 2.5  # seconds a score may take: the server's timer of 2, and what the kernel needs to free its memory
# Made of OPEN, each of these makes a file if the scorer runs it. (No quotes: they are refused anyway.)

def entry_of(task, **settings):
    """(dataset, entry, a right answer)"""
    data = reasoning_gym.create_dataset(task, size=1, seed=0, **settings)
    entry = data[0]
    right = dict(graph_color=lambda m: json.dumps(m["possible_answer"]), propositional_logic=lambda m: m["example_answer"])
    return data, entry, right[task](entry["metadata"]) if task in right else entry["answer"]







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












# ------------------------------------------------------------------------------------------ new


def test_sampled_logprobs_equal_recomputed_ones_for_every_combination_of_settings(small):
    model, tokenizer = small
    settings = dict(k=3, chains=3, max_new_tokens=8, end_steps=4, end_patience=2, end_entropy=2.0)
    for sampling, aggregation, end in itertools.product(motg.SAMPLING, motg.AGGREGATION, ENDS):
        for logprob in LOGPROBS:
            cfg = config(
                sampling=sampling, aggregation=aggregation, end=end, logprob=logprob, **settings
            )
            r = motg.rollout(model, tokenizer, PROMPTS, cfg, seeded(0))
            with torch.no_grad():
                again = motg.rollout_logprobs(model, r, cfg)
            assert (again - r.logprob).abs().max() < 1e-3, cfg


def test_greedy_rows_equal_transformers_generate(small):
    model, tokenizer = small
    cfg = config("single", chains=1, max_new_tokens=10, temperature=1e-4)
    r = motg.rollout(model, tokenizer, PROMPTS, cfg, seeded(0))
    for prompt, tokens, mask in zip(PROMPTS, r.representative, r.mask):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        how = dict(do_sample=False, max_new_tokens=10, pad_token_id=tokenizer.pad_token_id)
        want = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
        assert tokens[mask].tolist() == want[0, ids.shape[1] :].tolist()


def test_the_closing_step_is_scored_as_it_was_drawn():
    """Candidates .4 and .3 of p, k = 2: the first ends a thought with probability 4/7, not .4."""
    z, cfg = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log(), config(logprob="exact", temperature=1.0)
    steps = torch.tensor([[0, 1]]), torch.tensor([[0.0, -math.inf]]), torch.tensor([0])
    both, first = torch.tensor([[True, True]]), torch.tensor([[True, False]])
    score = motg.mixture_logprob(z, *steps, cfg, candidate=both, event=first)
    assert score.exp().item() == pytest.approx(4 / 7, abs=1e-5)


def test_weight_passes_change_gradients_but_no_value(small):
    model, tokenizer = small
    found = []
    for passes in (0, 1, 2):
        cfg = config(
            "different-tokens", k=3, chains=3, max_new_tokens=8, logprob="exact", weight_passes=passes
        )
        r = motg.rollout(model, tokenizer, PROMPTS, cfg, seeded(0))
        model.zero_grad()
        scores = motg.rollout_logprobs(model, r, cfg)
        scores.sum().backward()
        found.append((scores.detach(), flat(p.grad for p in model.parameters())))
    assert torch.allclose(found[0][0], found[2][0], atol=1e-5)
    assert not torch.allclose(found[0][1], found[1][1], rtol=1e-3)


SMALL_RUN = "--smoke --steps 4 --save-every 2 --chains 2 --prompts-per-step 2 --eval-problems 4"
SMALL_RUN += " --max-prompt-tokens 300 --max-new-tokens 8 --out"


def run(folder, out, *more):
    command = [sys.executable, motg.__file__, "train", "--model", folder, *SMALL_RUN.split(), out]
    return subprocess.Popen([*command, *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def weights_and_metrics(out):
    path = pathlib.Path(out)
    return (path / "checkpoint/model.safetensors").read_bytes(), (path / "metrics.jsonl").read_text()


def test_a_killed_run_resumes_to_the_same_bits(folder):
    assert run(folder, "straight").wait() == 0
    process = run(folder, "killed")
    while not os.path.exists("killed/trainer.pt"):
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert run(folder, "killed").wait() == 2  # an existing run is not overwritten
    assert run(folder, "killed", "--resume").wait() == 0
    assert weights_and_metrics("killed") == weights_and_metrics("straight")
    assert "{" in pathlib.Path("straight/samples.txt").read_text()


@cases(
    "flags",
    "--method nope|--nope 3|--k 0|--k x|--temperature 0|--temperature nan|--top-p 2|--chains 1"
    "|--task nope|--seed 1000000|--method single --k 4|--resume|--model nowhere|--end never".split("|"),
)
def test_wrong_commands_are_one_line_and_status_2(flags, capsys):
    assert motg.main(["train", "--smoke", *flags.split()]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("motg: ") and "\n" not in said
    assert not os.listdir()


def test_eval_takes_the_runs_settings_and_a_preset_keeps_its_own_k(folder, capsys):
    assert run(folder, "out", "--k", "4", "--temperature", "1.0").wait() == 0
    command = ["eval", "--model", "out/checkpoint", "--method", "single,dirichlet"]
    assert motg.main(command) == 0
    rows = [json.loads(row) for row in open("out/eval.jsonl")]
    assert [(row["k"], row["temperature"]) for row in rows] == [(1, 1.0), (4, 1.0)]
    assert "temperature" in capsys.readouterr().out


@cases("answer", ["open('C', 'w')", "().__class__", "exit()", "9**9**9**9", "99999999!", "[0]*10**10"])
@cases("task", ["countdown", "string_insertion", "simple_integration"])
def test_no_answer_runs_code_or_hangs(task, answer):
    _, entry, right = entry_of(task)
    assert motg.score(task, right, entry) == 1.0
    began = time.perf_counter()
    assert motg.score(task, answer, entry) < 1
    assert time.perf_counter() - began < 3 and not os.path.exists("C")
    assert motg.score(task, right, entry) == 1.0


def test_the_source_is_formatted_and_no_longer_than_it_says():
    lines = pathlib.Path(motg.__file__).read_text().splitlines()
    assert len(lines) <= 1100 and max(map(len, lines)) <= 100


def test_the_readmes_python_runs():
    text = pathlib.Path(motg.__file__).with_name("README.md").read_text()
    names = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        if "smoke_model" in block:  # a random model in place of the one that takes a minute
            tokenizer = trained_tokenizer()
            motg_model = saved(tiny(tokenizer), tokenizer, "m")
            block = block.replace("motg.smoke_model(cfg)", repr(motg_model))
            block = block.replace("chains=2", "chains=2, max_prompt_tokens=300")
        exec(block, names)
