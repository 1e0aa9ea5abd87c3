"""Pretrains the tiny model from nothing: tokenizer, training loop, measured quality, a Hugging Face folder.

Not here: the corpus (`corpus.py`).
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from t2ray.core import Message
from t2ray.tiny.corpus import SHARES, Corpus, answers, load, messages

PAD, BOS, END = "<|pad|>", "<|bos|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

STEPS = 2_400
BATCH = 192
CHUNK = 64  # rows per forward pass; a batch is sorted by length, so that a chunk has little padding
LEARNING_RATE = 1e-2  # of the layers' matrices, by Muon
EMBEDDING_RATE = 5e-3  # of the embedding and the norms, by AdamW
WARMUP = 100

TokenPair = tuple[list[int], list[int]]  # prompt ids, answer ids with the end token

# --------------------------------------------------------------------------------------------- the tokenizer, the model


def build_tokenizer(corpus: Corpus, vocabulary: int = 512) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer: it encodes any text without loss, and every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BOS, END, *ROLES],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [text for chat, answer in corpus.draw(20_000) for text in (chat[-1].content, answer)]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Returns a freshly initialised Llama of 0.86 M parameters."""
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
           "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.05,
        **ids,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**ids, do_sample=False, max_new_tokens=64)
    return model


# --------------------------------------------------------------------------------------------------------- the training


def encode(tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[tuple[Message, ...], str]]) -> list[TokenPair]:
    """Returns the token ids of each conversation, up to where the answer starts, and those of its answer."""
    heads = [f"{BOS}{''.join(f'<|{m.role}|>{m.content}{END}' for m in chat)}<|assistant|>" for chat, _ in pairs]
    prompts = tokenizer(heads, add_special_tokens=False)["input_ids"]
    replies = tokenizer([answer + END for _, answer in pairs], add_special_tokens=False)["input_ids"]
    return list(zip(prompts, replies, strict=True))


def chunks(examples: list[TokenPair], size: int, pad: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (tokens_BT, labels_BT) of at most `size` rows of similar length, padded on the right; -100 is no label."""
    examples = sorted(examples, key=lambda e: len(e[0]) + len(e[1]))
    for start in range(0, len(examples), size):
        part = examples[start : start + size]
        longest = max(len(p) + len(a) for p, a in part)
        gaps = [longest - len(p) - len(a) for p, a in part]
        tokens_BT = torch.tensor([p + a + [pad] * gap for (p, a), gap in zip(part, gaps, strict=True)])
        labels = [[-100] * len(p) + a + [-100] * gap for (p, a), gap in zip(part, gaps, strict=True)]
        yield tokens_BT, torch.tensor(labels)


def answer_logits(model: LlamaForCausalLM, tokens_BT: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (logits_NV, targets_N) of the answers alone. Padding on the right needs no mask: attention is causal."""
    hidden_BTD = model.model(input_ids=tokens_BT[:, :-1], use_cache=False).last_hidden_state
    learned_BT = labels_BT[:, 1:] != -100
    return model.lm_head(hidden_BTD[learned_BT]), labels_BT[:, 1:][learned_BT]


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Returns Muon for the matrices of the layers, and AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=LEARNING_RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=EMBEDDING_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate(step: int, steps: int) -> float:
    """Returns the factor of the learning rate: linear warm-up, times a cosine that falls to zero."""
    return min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, corpus: Corpus, steps: int, log: Callable[[str], None]
) -> None:
    """Trains the model to predict the tokens of the answers; logs the loss and the time left."""
    assert isinstance(tokenizer.pad_token_id, int)
    opts = optimizers(model)
    schedules = [LambdaLR(opt, lambda step: rate(step, steps)) for opt in opts]
    model.train()
    started, recent = time.monotonic(), 0.0
    for step in range(steps):
        examples = encode(tokenizer, corpus.draw(BATCH))
        count = sum(len(answer) for _, answer in examples)
        for tokens_BT, labels_BT in chunks(examples, CHUNK, tokenizer.pad_token_id):
            logits_NV, targets_N = answer_logits(model, tokens_BT, labels_BT)
            loss = torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="sum") / count
            torch.autograd.backward(loss)
            recent += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt, schedule in zip(opts, schedules, strict=True):
            opt.step()
            opt.zero_grad()
            schedule.step()
        if (step + 1) % 50 == 0:
            spent = time.monotonic() - started
            left = spent / (step + 1) * (steps - step - 1)
            log(f"step {step + 1}/{steps}  loss {recent / 50:.4f}  {spent:.0f} s, {left:.0f} s left")
            recent = 0.0


# ---------------------------------------------------------------------------------------------------------- the quality


@torch.no_grad()
def measure(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, split: str = "validation", count: int = 200
) -> dict[str, dict[str, float]]:
    """Returns three measures per task, as means over rows.

    `some` is the probability of an answer that is right in some format, `wanted` that of one in the wanted format; both
    are exact, from the model's probability of each right text with its end token. `greedy` is how often the greedy
    answer is right in the wanted format.
    """
    model.eval()
    quality = {}
    for task in SHARES:
        rows = load(task, split)
        rows = rows[:: max(1, len(rows) // count)]
        some, wanted, greedy = 0.0, 0.0, 0.0
        for start in range(0, len(rows), 100):
            part = rows[start : start + 100]
            forms = [answers(task, row) for row in part]
            for index in range(len(forms[0])):
                pairs = [(messages(task, row), form[index]) for row, form in zip(part, forms, strict=True)]
                p, best = likelihood(model, encode(tokenizer, pairs))
                some += float(p.sum())
                if index == len(forms[0]) - 1:
                    wanted, greedy = wanted + float(p.sum()), greedy + float(best.sum())
        quality[task] = {"some": some / len(rows), "wanted": wanted / len(rows), "greedy": greedy / len(rows)}
    return quality


def likelihood(model: LlamaForCausalLM, examples: list[TokenPair]) -> tuple[Tensor, Tensor]:
    """Returns the probability of each answer, (B,), and whether each of its tokens is the likeliest one, (B,)."""
    pad = model.config.pad_token_id
    longest = max(len(p) + len(a) for p, a in examples)
    tokens_BT = torch.tensor([p + a + [pad] * (longest - len(p) - len(a)) for p, a in examples])
    logp_BTV = model(input_ids=tokens_BT[:, :-1], use_cache=False).logits.log_softmax(-1)
    targets_BT = tokens_BT[:, 1:]
    first_B = torch.tensor([len(p) - 1 for p, _ in examples])[:, None]
    last_B = torch.tensor([len(p) + len(a) - 1 for p, a in examples])[:, None]
    place_T = torch.arange(longest - 1)[None]
    inside_BT = (place_T >= first_B) & (place_T < last_B)
    logp_BT = logp_BTV.gather(-1, targets_BT[..., None])[..., 0]
    best_BT = logp_BTV.argmax(-1) == targets_BT
    return (logp_BT * inside_BT).sum(-1).exp(), (best_BT | ~inside_BT).all(-1)


# -------------------------------------------------------------------------------------------------------------- the job


def pretrain(
    out: Path, *, seed: int = 0, steps: int = STEPS, log: Callable[[str], None] = print
) -> dict[str, dict[str, float]]:
    """Trains the model and writes it to the folder `out`, in place of one there; returns its quality (`measure`)."""
    torch.manual_seed(seed)
    corpus = Corpus(seed)
    tokenizer = build_tokenizer(corpus)
    model = build_model(tokenizer)
    log(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens, {steps} steps of {BATCH} sequences")
    train(model, tokenizer, corpus, steps, log)
    quality = measure(model, tokenizer)
    for task, row in quality.items():
        log(f"{task:10s} right in some format {row['some']:.3f}, in the wanted one {row['wanted']:.3f}, "
            f"greedy {row['greedy']:.3f}")  # fmt: skip
    save(model, tokenizer, out)
    return quality


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes the Hugging Face folder beside `out` and renames it into place."""
    fresh = out.with_name(f".{out.name}.{os.getpid()}")
    model.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    for path in fresh.iterdir():
        path.chmod(0o644)  # safetensors gives its files to their owner alone
    if out.exists():
        shutil.rmtree(out)
    fresh.rename(out)
