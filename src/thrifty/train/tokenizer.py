"""Byte-level tokenizers: plain bytes, or byte pairs merged by what the training text repeats."""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from thrifty.checkpoint import atomic_file
from thrifty.checkpoint.chat_format import ASSISTANT, CHAT_TEMPLATE, END, SYSTEM, USER
from thrifty.errors import ThriftyError

SPECIALS = (END, SYSTEM, USER, ASSISTANT)
#: Pieces that a byte-level vocabulary cannot do without.
SMALLEST = 256 + len(SPECIALS)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer whose ids decode to exactly the text they came from.

    `vocab_size` counts the 256 bytes and the special tokens; what remains is for merges, so that the smallest size is
    plain bytes. A small text may give fewer merges than asked for.
    """
    if vocab_size < SMALLEST:
        rule = f"[tokenizer] a vocabulary has at least {SMALLEST} pieces (256 bytes, {len(SPECIALS)} special tokens)"
        raise ThriftyError(f"{rule}; got {vocab_size}; give {SMALLEST} for plain bytes")
    tokenizer = Tokenizer(models.BPE())
    # GPT-2's cut into words, which every reader of GGUF files knows.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write `tokenizer.json` and the `tokenizer_config.json` that transformers and chat read."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "pad_token": END,
        "additional_special_tokens": [SYSTEM, USER, ASSISTANT],
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "chat_template": CHAT_TEMPLATE,
    }
    with atomic_file(folder / "tokenizer.json", "w") as file:
        file.write(tokenizer.to_str(pretty=True))
    with atomic_file(folder / "tokenizer_config.json", "w") as file:
        file.write(json.dumps(config, indent=2) + "\n")
