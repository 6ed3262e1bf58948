# %% [markdown]
# # Doge, from a text to answers
#
# Data, tokenizer, pre-training, supervised fine-tuning and evaluation of a small Doge, on a text that every machine
# with Python has. Read it top to bottom in an editor that knows `# %%` cells, or run it whole:
#
#     python examples/doge_walkthrough.py [--short]
#
# It takes a few minutes on two cores and writes runs/doge_walkthrough. Needs `thrifty[train,chat]`; nothing is
# downloaded. Sizes are set in the next cell.

# %%
import argparse
import inspect
import math
import random
import warnings
from importlib import import_module
from pathlib import Path

import torch
import transformers
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    set_seed,
)

from thrifty.models import DogeConfig, DogeForCausalLM
from thrifty.train.corpus import builtin_corpus
from thrifty.train.initial import initialize
from thrifty.train.optimizer import build_optimizer
from thrifty.train.recipe import find_recipe
from thrifty.train.tokenizer import save_tokenizer, train_tokenizer

parser = argparse.ArgumentParser(description="A small Doge from data to evaluation.")
parser.add_argument("--short", action="store_true", help="seconds: see that it runs, learn nothing")
parser.add_argument("--out", type=Path, default=Path("runs/doge_walkthrough"))
args, _ = parser.parse_known_args()

VOCAB, LENGTH, WINDOW = (512, 96, 16) if args.short else (2048, 256, 64)
HIDDEN, LAYERS, HEADS = (64, 2, 2) if args.short else (128, 4, 4)
PRETRAINING_STEPS, TUNING_STEPS, BATCH = (3, 3, 2) if args.short else (250, 150, 8)
QUESTIONS = 8 if args.short else 200  # held out, of those made from the standard library
set_seed(0)
transformers.utils.logging.disable_progress_bar()

# %% [markdown]
# ## Data
# To learn the language: the topics of Python's help and the words and sources of the standard library, 60 kB of the
# topics held out. To learn to answer: a question for each documented function of the standard library, answered by the
# first line of its documentation; some questions are held out.

# %%
corpus = builtin_corpus()
print(f"{corpus.name}: {len(corpus.text) / 1e6:.1f} MB to train on, {len(corpus.heldout) / 1e3:.0f} kB held out")


def questions() -> list[tuple[str, str]]:
    """What does a function do, and the first line of its documentation, in the order of their names."""
    pairs = {}
    for module in MODULES.split():
        for name, value in inspect.getmembers(import_module(module), inspect.isroutine):
            line = (inspect.getdoc(value) or "").strip().split("\n\n")[0].replace("\n", " ")
            if not name.startswith("_") and 20 < len(line) < 120:
                pairs.setdefault(line, f"What does {module}.{name} do?")
    return [(question, line) for line, question in pairs.items()]


#: Modules whose import does nothing else.
MODULES = """
ast base64 bisect calendar cmath codecs collections colorsys copy csv dis email fileinput fnmatch fractions
functools gc getpass glob gzip heapq html imaplib inspect io ipaddress itertools json keyword linecache locale
logging math mimetypes numbers operator os pickle pickletools platform posixpath pprint pstats queue quopri
random re secrets shlex shutil signal site socket ssl stat statistics string struct subprocess sys sysconfig
tarfile tempfile textwrap threading time timeit token tokenize trace traceback types unicodedata unittest uuid
warnings wave weakref zipfile zlib
"""
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pairs = questions()
random.Random(0).shuffle(pairs)
heldout_pairs, tuning_pairs = pairs[:QUESTIONS], pairs[QUESTIONS:]
print(f"{len(tuning_pairs)} questions to tune on, {len(heldout_pairs)} held out; the first: {tuning_pairs[0]}")

# %% [markdown]
# ## Tokenizer
# Byte-level BPE with a chat template, trained on the same text, saved where `AutoTokenizer` finds it.

# %%
args.out.mkdir(parents=True, exist_ok=True)
words = [text for part in corpus.parts[:2] for text in part.documents]
save_tokenizer(train_tokenizer(words, VOCAB), args.out, LENGTH)
tokenizer = AutoTokenizer.from_pretrained(args.out)
print(f"{len(tokenizer)} pieces; {tokenizer.tokenize('Return the square root of x.')}")

# %% [markdown]
# ## The model
# Doge: dynamic mask attention that keeps WINDOW keys a kv head, learned residual scales, a gated MLP. The names of its
# parameters are transformers' own.

# %%
config = DogeConfig(
    vocab_size=len(tokenizer),
    hidden_size=HIDDEN,
    intermediate_size=2 * HIDDEN,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=HEADS // 2,
    max_position_embeddings=LENGTH,
    keep_window_size=WINDOW,
    tie_word_embeddings=True,
    bos_token_id=tokenizer.bos_token_id,
    eos_token_id=tokenizer.eos_token_id,
    pad_token_id=tokenizer.pad_token_id,
)
model = DogeForCausalLM(config)
print(f"{model.num_parameters() / 1e6:.2f} M parameters")

# %% [markdown]
# ## Pre-training
# The Trainer of transformers, blocks of LENGTH tokens, and a schedule that warms up, holds and decays, as the published
# Doges were trained; first values and optimizer (Muon for matrices, Adam for the rest) are those of `thrifty train`,
# which take a fraction of AdamW's steps.


# %%
class Rows(Dataset):
    """Rows of token ids, and of labels where they differ."""

    def __init__(self, rows: list[dict[str, list[int]]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        return self.rows[i]


def blocks(text: str, most: int | None = None) -> list[dict[str, list[int]]]:
    ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    rows = [{"input_ids": ids[i : i + LENGTH]} for i in range(0, len(ids) - LENGTH + 1, LENGTH)]
    random.Random(0).shuffle(rows)
    return rows[:most]


def arguments(name: str, steps: int, learning_rate: float, schedule: str, **options) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(args.out / name),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=learning_rate,
        lr_scheduler_type=schedule,
        warmup_steps=steps // 10,
        adam_beta2=0.95,
        weight_decay=0.01,
        logging_steps=max(1, steps // 10),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        **options,
    )


training = find_recipe("demo").training
initialize(model, training)
topics, prose, _ = corpus.parts
read = blocks(topics.documents[0] * 2 + "".join(prose.documents), PRETRAINING_STEPS * BATCH)
trainer = Trainer(
    model=model,
    args=arguments(
        "pretraining",
        PRETRAINING_STEPS,
        training.learning_rate,
        "warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": max(1, PRETRAINING_STEPS // 2)},
    ),
    optimizers=(build_optimizer(model, training), None),
    train_dataset=Rows(read),
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
trainer.train()

# %% [markdown]
# ## Evaluation of what it read
# Bits per byte of the held-out topics; the text is new to the model.


# %%
@torch.no_grad()
def bits_per_byte(model: torch.nn.Module, text: str) -> float:
    model.eval()
    nats, counted = 0.0, 0
    rows = blocks(text, 8 if args.short else None)
    for ids in torch.tensor([row["input_ids"] for row in rows]).split(16):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        nats += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
        counted += sum(len(tokenizer.decode(row).encode()) for row in ids[:, 1:])
    return nats / math.log(2) / counted


pretrained_bits = bits_per_byte(model, corpus.heldout)
print(f"held-out topics: {pretrained_bits:.3f} bits per byte")

# %% [markdown]
# ## Supervised fine-tuning
# A question and its answer in the chat template; the loss counts the answer only (label -100 elsewhere). TRL's
# `SFTTrainer` does the same with `assistant_only_loss`; the Trainer alone is enough here.


# %%
def chat(question: str, answer: str) -> dict[str, list[int]]:
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    prompt = tokenizer(asked, add_special_tokens=False)["input_ids"]
    reply = tokenizer(answer + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    return {"input_ids": (prompt + reply)[:LENGTH], "labels": ([-100] * len(prompt) + reply)[:LENGTH]}


def choices(i: int) -> list[str]:
    """The answer to a held-out question, and three others' answers."""
    others = random.Random(i).sample([answer for j, (_, answer) in enumerate(heldout_pairs) if j != i], 3)
    return [heldout_pairs[i][1], *others]


@torch.no_grad()
def nats(model: torch.nn.Module, rows: list[dict[str, list[int]]]) -> list[float]:
    """Mean nats a token of each answer."""
    model.eval()
    batch = DataCollatorForSeq2Seq(tokenizer)(rows)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return (losses.sum(1) / (labels != -100).sum(1)).tolist()


def answering(model: torch.nn.Module) -> tuple[float, float]:
    """Nats a token of the right answers, and how often the right one of four is the likeliest."""
    scores = [nats(model, [chat(heldout_pairs[i][0], c) for c in choices(i)]) for i in range(len(heldout_pairs))]
    return sum(s[0] for s in scores) / len(scores), sum(s[0] == min(s) for s in scores) / len(scores)


before = answering(model)
trainer = Trainer(
    model=model,
    args=arguments("tuning", TUNING_STEPS, 1e-3, "cosine"),
    train_dataset=Rows([chat(*pair) for pair in tuning_pairs]),
    data_collator=DataCollatorForSeq2Seq(tokenizer),
)
trainer.train()
after = answering(model)

# %% [markdown]
# ## Evaluation of what it answers
# Held-out questions: how likely the right answer is, and how often it is likelier than three other functions' answers
# (a guess: 25 %), before and after tuning. Then the folder is saved; transformers' own Doge reads it, nothing of this
# package registered, and says the same.

# %%
print("| | nats a token of the answer | right of four | bits per byte of held-out topics |")
print("| --- | ---: | ---: | ---: |")
print(f"| pre-trained | {before[0]:.3f} | {before[1]:.1%} | {pretrained_bits:.3f} |")
print(f"| tuned | {after[0]:.3f} | {after[1]:.1%} | {bits_per_byte(model, corpus.heldout):.3f} |")

model.save_pretrained(args.out)
plain = AutoModelForCausalLM.from_pretrained(args.out).eval()
asked = tokenizer.apply_chat_template(
    [{"role": "user", "content": heldout_pairs[0][0]}],
    add_generation_prompt=True,
    return_tensors="pt",
    return_dict=True,
)
with torch.no_grad():
    difference = (plain(**asked).logits - model(**asked).logits).abs().max().item()
print(f"{type(plain).__module__}.{type(plain).__name__} differs by {difference:.1e} at most")

reply = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
    **asked, max_new_tokens=8 if args.short else 40, do_sample=False
)
print(f"{heldout_pairs[0][0]}\n{tokenizer.decode(reply[0, asked['input_ids'].shape[1] :], skip_special_tokens=True)}")
