"""Tuning models that are there: each method on each family, what is learned, resumption, and what is refused."""

import importlib
import json
import shutil
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import TrainerCallback

from thrifty import models, nn
from thrifty.errors import ThriftyError
from thrifty.runtime import load
from thrifty.train.initial import FAMILIES as FAMILY_CLASSES
from thrifty.train.initial import new_model
from thrifty.train.recipe import find_recipe
from thrifty.train.tokenizer import save_tokenizer, train_tokenizer

pytest.importorskip("trl")
pytest.importorskip("peft")
from thrifty.train import conversations, merging, tuning

FAMILIES = ("bitnet", "doge", "cheems", "matmulfree")
WORDS = ("one", "two", "three", "four", "five", "six")
TALKS = [
    {
        "messages": [
            {"role": "user", "content": f"what follows {a}?"},
            {"role": "assistant", "content": f"after {a} comes {b}"},
        ]
    }
    for a, b in pairwise(WORDS)
] * 4
PAIRS = [
    {
        "prompt": row["messages"][:1],
        "chosen": row["messages"][1:],
        "rejected": [{"role": "assistant", "content": "no idea"}],
    }
    for row in TALKS
]
MICRO = {"batch_size": 4, "sequence_length": 48, "steps": 3, "learning_rate": 1e-3, "eval_every": 2, "save_every": 2}


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return {"sft": write(folder / "talks.jsonl", TALKS), "dpo": write(folder / "pairs.jsonl", PAIRS)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An untrained model of each family, with linears that are low-bit."""
    root, made = tmp_path_factory.mktemp("models"), {}
    tokenizer = train_tokenizer([json.dumps(row) for row in TALKS], 300)
    shape = {
        "vocab_size": 300,
        "hidden_size": 16,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
        "linear": "ternary",
        "sequence_length": 64,
    }
    for family in FAMILIES:
        torch.manual_seed(0)
        model: Any = new_model(find_recipe("tiny").override(model=family, **shape).shape, tokenizer)  # pyright: ignore
        made[family] = root / family
        models.round_dense_parameters(model)
        model.save_pretrained(made[family])
        save_tokenizer(tokenizer, made[family], 64)
        made[f"{family}-packed"] = root / f"{family}-packed"
        models.save_packed(model, made[f"{family}-packed"])
        save_tokenizer(tokenizer, made[f"{family}-packed"], 64)
    return made


def tune(start, source, output, method="sft", **options):
    chosen = find_recipe(method).override(**MICRO | options.pop("fields", {}))
    return tuning.tune(start, [source], chosen, output, console=Console(quiet=True), **{"heldout": 0.2, **options})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_tunes_every_family(method, family, folders, data, tmp_path):
    result = tune(folders[family], data[method], tmp_path, method, fields={"eval_every": 100})
    names = {file.name for file in tmp_path.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "training.json",
        "loss.png",
        "logs",
        "report.html",
    } <= names
    assert result.record["steps"] == 3
    before, after = load_file(folders[family] / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], after["model.layers.0.mlp.up_proj.weight"])
    tokens = torch.arange(5, 20)[None]
    with torch.no_grad():
        again = type(result.model).from_pretrained(tmp_path).eval()
        assert torch.equal(again(tokens).logits, result.model.eval()(tokens).logits)
    assert load(tmp_path).chat_prompt([{"role": "user", "content": "what?"}])[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_are_trained_beside_packed_layers_of_every_family_and_merged(family, folders, data, tmp_path):
    base = folders[f"{family}-packed"]
    before = load_file(base / "model.safetensors")
    result = tune(base, data["sft"], tmp_path / "run", "lora", fields={"lora_rank": 2})
    names = {file.name for file in (tmp_path / "run").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "training.json"} <= names
    assert "config.json" not in names
    layers = [module for module in result.model.modules() if isinstance(module, nn.PackedBitLinear)]
    assert layers
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in result.model.named_parameters())
    tokens = torch.arange(5, 20)[None]
    adapted = merging.load_adapted(tmp_path / "run")
    with torch.no_grad():
        assert torch.equal(adapted(tokens).logits, result.model.eval()(tokens).logits)
    text = "what follows one? two"
    report = merging.merge_folder(tmp_path / "run", tmp_path / "merged", text=text)
    assert report.bits_per_byte.keys() == {"base", "adapter", "merged"}
    after = load_file(tmp_path / "merged" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if name.endswith("proj.weight") and not torch.equal(before[name], after[name])}
    assert {f"model.{layer.name.removeprefix('model.')}.weight" for layer in report.layers if layer.flipped} == changed
    # The runtime runs it, and scores the text as torch did.
    assert load(tmp_path / "merged").score(text).bits_per_byte == pytest.approx(
        report.bits_per_byte["merged"], rel=1e-3
    )


def test_an_adapter_that_changes_codes_loses_nothing_in_merging(folders, data, tmp_path):
    fields = {"lora_rank": 4, "lora_requantized": True, "learning_rate": 3e-2, "steps": 6, "warmup": 0}
    result = tune(folders["bitnet-packed"], data["sft"], tmp_path / "run", "lora", fields=fields)
    losses = [entry["eval_loss"] for entry in result.history if "eval_loss" in entry]
    assert losses[-1] < losses[0]
    with pytest.raises(ThriftyError, match=r"is an adapter; thrifty pack .* merges it"):
        load(tmp_path / "run")
    report = merging.merge_folder(tmp_path / "run", tmp_path / "merged", text="what follows one? two")
    assert any(layer.flipped for layer in report.layers)
    assert report.bits_per_byte["merged"] == report.bits_per_byte["adapter"] != report.bits_per_byte["base"]


def test_dpo_by_adapters_needs_no_second_model_and_starts_from_no_margin(folders, data, tmp_path):
    fields = {"lora_rank": 2, "learning_rate": 1e-2, "steps": 8, "warmup": 0}
    result = tune(folders["bitnet"], data["dpo"], tmp_path, "dpo", fields=fields)
    margins = [entry["eval_rewards/margins"] for entry in result.history if "eval_rewards/margins" in entry]
    assert margins[0] == pytest.approx(0, abs=1e-6)
    assert margins[-1] > 0.01
    assert result.record["heldout"]["rewards/accuracies"] == 1


def test_answers_are_learned_and_preferred(folders, data, tmp_path):
    fields = {"learning_rate": 1e-2, "steps": 12, "warmup": 0}
    told = tune(folders["bitnet"], data["sft"], tmp_path / "sft", fields=fields)
    losses = [entry["eval_loss"] for entry in told.history if "eval_loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    preferred = tune(tmp_path / "sft", data["dpo"], tmp_path / "dpo", "dpo", fields=fields)
    assert preferred.record["heldout"]["rewards/margins"] > 0.1


class Stop(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["sft", "dpo", "lora"])
def test_a_resumed_run_ends_with_the_same_bits(method, folders, data, tmp_path, monkeypatch):
    source = data["dpo" if method == "dpo" else "sft"]
    fields = {"steps": 4, "lora_dropout": 0.1}
    tune(folders["bitnet"], source, tmp_path / "whole", method, fields=fields)
    with monkeypatch.context() as patched:
        patched.setattr(tuning.TuningBar, "on_save", Stop.on_save)
        with pytest.raises(KeyboardInterrupt):
            tune(folders["bitnet"], source, tmp_path / "cut", method, fields=fields)
    result = tune(folders["bitnet"], source, tmp_path / "cut", method, resume=True, fields=fields)
    assert result.record["finished"]
    name = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    whole, cut = load_file(tmp_path / "whole" / name), load_file(tmp_path / "cut" / name)
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    with pytest.raises(ThriftyError, match=r"other settings: recipe\.training\.learning_rate was 0\.001"):
        tune(folders["bitnet"], source, tmp_path / "cut", method, fields=fields | {"learning_rate": 0.5})


def tokenizer_of(folder):
    return tuning._tokenizer(folder, find_recipe("sft").override(**MICRO).training)


def test_only_answers_are_learned_each_with_its_end(folders):
    tokenizer = tokenizer_of(folders["bitnet"])
    talk = [*TALKS[0]["messages"], {"role": "user", "content": "more"}, {"role": "assistant", "content": "no"}]
    rows = conversations.Dataset.from_list([{"messages": talk}])
    made: Any
    made, cut = conversations.supervised(rows, tokenizer, 100)
    ids, labels = made[0]["input_ids"], made[0]["labels"]
    learned = [token for token, label in zip(ids, labels, strict=True) if label != -100]
    assert cut == 0
    assert tokenizer.decode(learned) == "after one comes two<|endoftext|>no<|endoftext|>"
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    rendered: Any = tokenizer.apply_chat_template(talk, tokenize=False)
    assert tokenizer.decode(ids) == rendered.removesuffix("\n")
    # The same as a prompt with its completion, but that only the last answer is learned.
    rows = conversations.Dataset.from_list([{"prompt": talk[:3], "completion": talk[3:]}])
    made, _ = conversations.supervised(rows, tokenizer, 100)
    assert made[0]["input_ids"] == ids
    assert tokenizer.decode([label for label in made[0]["labels"] if label != -100]) == "no<|endoftext|>"
    rows = conversations.Dataset.from_list([{"prompt": "a b", "completion": " c"}])
    made, _ = conversations.supervised(rows, tokenizer, 100)
    assert tokenizer.decode([label for label in made[0]["labels"] if label != -100]) == " c<|endoftext|>"


def test_rows_are_cut_to_the_length_and_dropped_where_no_answer_is_left(folders):
    rows = conversations.Dataset.from_list(TALKS[:5])
    tokenizer = tokenizer_of(folders["bitnet"])
    whole, _ = conversations.supervised(rows, tokenizer, 100)
    length = len(whole[0]["input_ids"]) - 1
    made: Any
    made, cut = conversations.supervised(rows, tokenizer, length)
    assert cut >= 1
    assert all(len(row["input_ids"]) <= length for row in made)
    with pytest.raises(ThriftyError, match="within 3 tokens; none of 5 has; raise sequence_length"):
        conversations.supervised(rows, tokenizer, 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_do_not_see_each_other(family, folders, data, tmp_path):
    rows: Any
    rows, _ = conversations.supervised(conversations.Dataset.from_list(TALKS[:3]), tokenizer_of(folders[family]), 40)
    singles = [{**row, "seq_lengths": [len(row["input_ids"])]} for row in rows]
    joined = {key: list(chain.from_iterable(row[key] for row in singles)) for key in singles[0]}
    kind = FAMILY_CLASSES[family][1]
    model: Any = kind.from_pretrained(folders[family]).eval()
    collate = conversations.PackedRows(0)
    with torch.no_grad():
        apart = collate(singles)
        together = collate([joined])
        alone = [model(**collate([row]), use_cache=False).logits[0] for row in singles]
        packed = model(**together, use_cache=False).logits[0]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert (apart["labels"] != -100).sum() == (together["labels"] != -100).sum()
    assert together["labels"][0, len(singles[0]["input_ids"])] == -100
    result = tune(folders[family], data["sft"], tmp_path, fields={"packing": True, "eval_every": 100})
    assert result.record["finished"]


@pytest.mark.parametrize(
    ("rows", "method", "message"),
    [
        (
            [{"instruction": "a", "output": "b"}],
            "sft",
            "must have messages, or prompt and completion, or text; got inst",
        ),
        (TALKS[:2], "dpo", "data for dpo must have prompt and chosen and rejected, .* got messages in"),
        ([{"messages": [{"role": "user", "content": "a"}]}], "sft", "must have an answer within 48 tokens; none of 1"),
    ],
)
def test_rows_that_do_not_serve_are_refused(rows, method, message, folders, tmp_path):
    source = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ThriftyError, match=message):
        tune(folders["bitnet"], source, tmp_path / "run", method)
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_tuned_is_refused_before_the_folder_is_touched(folders, data, tmp_path):
    def refused(message, start=folders["bitnet"], source=data["sft"], method="sft", **fields):
        with pytest.raises(ThriftyError, match=message):
            tune(start, source, tmp_path / "run", method, fields=fields)
        assert not (tmp_path / "run").exists()

    refused("at most the 64 positions of the model; got 100; choose a shorter", sequence_length=100)
    refused("missing.jsonl does not exist", source="missing.jsonl")
    refused("must be JSONL, Parquet or a set", source=write(tmp_path / "bad.jsonl", []))
    refused("targets must be linear layers .* got qq_proj; choose from", lora_rank=2, lora_targets="qq_proj")
    refused("packing is for sft", source=data["dpo"], method="dpo", packing=True)
    start = tmp_path / "start"
    shutil.copytree(folders["bitnet"], start)
    save_tokenizer(train_tokenizer([json.dumps(TALKS), "x" * 99], 320), start, 64)
    refused("the tokenizer must have at most the 300 pieces of the model; got 3", start=start)
    config = json.loads((folders["bitnet"] / "tokenizer_config.json").read_text())
    (start / "tokenizer.json").write_text(
        (folders["bitnet"] / "tokenizer.json").read_text().replace("<|user|>", "<|human|>")
    )
    config["additional_special_tokens"] = []
    (start / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": None}))
    refused("conversations need a chat template; the tokenizer has none", start=start)


def test_an_adapter_without_its_base_is_refused(folders, data, tmp_path):
    start = tmp_path / "base"
    shutil.copytree(folders["bitnet-packed"], start)
    tune(start, data["sft"], tmp_path / "run", "lora", fields={"lora_rank": 2})
    shutil.rmtree(start)
    with pytest.raises(ThriftyError, match=r"the model of the adapter must be there; .* which is no model"):
        merging.load_adapted(tmp_path / "run")


def test_the_example_makes_rows_and_says_what_came_out(folders, tmp_path, monkeypatch, capsys):
    examples = Path(__file__).parents[2] / "examples"
    monkeypatch.syspath_prepend(examples)
    fields = ["--set", "steps=1", "--set", "batch_size=2", "--set", "lora_alpha=8"]
    monkeypatch.setattr("sys.argv", ["answers", str(folders["bitnet"]), "--out", str(tmp_path), "--rows", "8", *fields])
    importlib.import_module("answers").main()
    said = capsys.readouterr().out
    assert [line.split()[:2] for line in said.splitlines() if "->" in line] == [
        ["sft", "loss"],
        ["dpo", "loss"],
        ["dpo", "rewards/margins"],
        ["lora", "loss"],
    ]
    assert "MB of packed layers" in said
