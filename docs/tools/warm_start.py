"""The small models of the smoke mode and of the tests, and the warm start of the smoke mode's.

    python docs/tools/warm_start.py docs/smoke_model    how that folder was made, in 80 s

A warm start is supervised training on the thoughts and answers that a function gives for problems
of a task. The model learns the form of a reply and, half, what it is about; the rest is for RL.
"""

import random
import sys
from itertools import islice
from pathlib import Path

import tokenizers
import torch
import transformers
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from motg import TAG, make_config, usable_problems


def demonstrate_sum(entry, rng):
    """Thought and answer for a chain_sum entry: a third works the sum out, a third forgets the last
    term, a third guesses. Imitation learns all three; only the reward tells which one is right."""
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


ASKED = "State the final answer to the following arithmetic problem: "
WORDS = [ASKED, "easy", TAG, " <answer>", "</answer>", " + ", " - ", " = ", ", ", " ="]
WORDS += map(str, range(100))


def small_model(words, seed):
    """A random Qwen2 of half a million parameters, and a byte-level tokenizer with these words."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe = tokenizers.ByteLevelBPETokenizer({c: i for i, c in enumerate(alphabet)}, [])
    bpe.add_tokens(words)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template="{{ messages[-1].content }}\n<think>\n",  # the system turn is left out
    )
    torch.manual_seed(seed)
    shape = transformers.Qwen2Config(
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return transformers.Qwen2ForCausalLM(shape), tokenizer


def warm_start(cfg, words=WORDS, demonstrate=demonstrate_sum, steps=500, batch=64, lr=2e-3):
    """A small model and its tokenizer, trained in about a minute on the thoughts and answers that
    demonstrate(entry, rng) gives for problems of cfg.task. Each of `words` is one token."""
    model, tokenizer = small_model(words, cfg.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr, (0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    stream = usable_problems(cfg, tokenizer, 1, range(10**9), test=False)
    rng = random.Random(cfg.seed)
    for _ in tqdm(range(steps), desc="warm start", leave=False, disable=None):
        part = list(islice(stream, batch))
        texts = [prompt + demonstrate(entry, rng) for _, entry, prompt in part]
        x = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        n = torch.tensor([len(tokenizer.encode(prompt)) for _, _, prompt in part])[:, None]
        learn = x.attention_mask.bool() & (torch.arange(x.input_ids.shape[1]) >= n)
        model(**x, labels=x.input_ids.masked_fill(~learn, -100)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model, tokenizer


if __name__ == "__main__":
    torch.set_num_threads(1)
    for part in warm_start(make_config(smoke=True)):
        part.save_pretrained(sys.argv[1])
