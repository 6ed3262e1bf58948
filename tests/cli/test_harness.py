import json
import sys
from typing import Any

import pytest
import torch
from lm_eval.tasks import TaskManager
from tiny_checkpoints import byte_tokenizer

from thrifty.cli import main
from thrifty.models import BitNetConfig, BitNetForCausalLM, round_dense_parameters, save_packed
from thrifty.runtime import load

ANIMALS = ("dog", "cat", "horse", "crow", "whale", "bee", "ant", "trout")
TASKS = {
    "legs": """
output_type: multiple_choice
doc_to_text: "A {{animal}} has how many legs? It has "
doc_to_choice: ["none", "two", "four", "six of them"]
doc_to_target: "{{legs}}"
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    "tale": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{tale}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
""",
    "answer": """
output_type: generate_until
doc_to_text: "{{tale}}"
doc_to_target: "{{animal}}"
generation_kwargs:
  until: ["e", "\\n\\n"]
  max_gen_toks: 9
metric_list:
  - metric: exact_match
""",
    "endless": """
output_type: generate_until
doc_to_text: "{{tale}}"
doc_to_target: "{{animal}}"
""",
    "lost": """
output_type: generate_until
dataset_path: /nowhere/to/be/found
doc_to_text: "{{tale}}"
doc_to_target: "{{animal}}"
""",
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A latent model, its packed copy, and tasks; contexts are longer than the 64 positions, and shorter."""
    folder = tmp_path_factory.mktemp("harness")
    torch.manual_seed(3)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    tokens: dict[str, Any] = {"vocab_size": 257, "bos_token_id": 256, "eos_token_id": 256}
    config = BitNetConfig(**sizes, **tokens, num_key_value_heads=1, max_position_embeddings=64)
    model = BitNetForCausalLM(config)
    round_dense_parameters(model)
    model.save_pretrained(folder / "latent")
    save_packed(model, folder / "packed")
    for name in ("latent", "packed"):
        byte_tokenizer().save(str(folder / name / "tokenizer.json"))
    docs = [{"animal": a, "legs": n % 4, "tale": f"Once a {a} met a bird. " * (n + 1)} for n, a in enumerate(ANIMALS)]
    (folder / "tasks").mkdir()
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    data = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / 'docs.jsonl'}\n"
    for name, task in TASKS.items():
        (folder / "tasks" / f"{name}.yaml").write_text(
            f"task: {name}\n{data if 'path' not in task else ''}test_split: test\n{task}"
        )
    return folder


def evaluated(folder, capsys, *options: str) -> list[dict]:
    arguments = [str(folder / "latent"), str(folder / "packed"), f"--include-path={folder / 'tasks'}", *options]
    assert main(["eval", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)["tasks"]["models"]


def test_torch_and_the_runtime_give_the_same_numbers(folder, capsys):
    latent, packed = evaluated(folder, capsys, "--tasks=legs,tale,answer")
    assert [latent["engine"], packed["engine"]] == ["torch", "runtime"]
    assert latent["examples"] == packed["examples"] == dict.fromkeys(("legs", "tale", "answer"), len(ANIMALS))
    assert set(packed["results"]["legs"]) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    assert packed["results"].keys() == latent["results"].keys()
    for task, metrics in latent["results"].items():
        assert packed["results"][task] == pytest.approx(metrics, rel=1e-5)


def test_solved_examples_come_first_and_the_table_has_a_column_a_model(folder, capsys):
    packed = str(folder / "packed")
    options = ["--tasks=legs", f"--include-path={folder / 'tasks'}", "--num-fewshot=2"]
    assert main(["eval", str(folder / "latent"), packed, *options]) == 0
    heading, *rows = capsys.readouterr().out.splitlines()
    assert heading.split() == ["task", "metric", str(folder / "latent"), packed]
    assert [row.split()[:2] for row in rows] == [["legs", "acc"], ["legs", "acc_norm"]]
    for row in rows:
        cells = row.split()
        assert cells[2:5] == cells[5:8]
        assert cells[3] == "±"


def test_a_text_is_as_likely_to_the_harness_as_to_the_runtime(folder, capsys):
    _, packed = evaluated(folder, capsys, "--tasks=tale", "--limit=2")
    docs = [json.loads(line)["tale"] for line in (folder / "docs.jsonl").read_text().splitlines()[:2]]
    scores = [load(folder / "packed").score(text) for text in docs]
    bits = sum(score.bits_per_byte * score.nbytes for score in scores) / sum(score.nbytes for score in scores)
    assert packed["results"]["tale"]["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    assert packed["examples"] == {"tale": 2}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--tasks=leg"], "got 'leg'; did you mean legs?"),
        (["--tasks=endless"], "must be fewer than the 64 of the context; got 256"),
        (["--tasks=endless", "--engine=torch"], "must fit the context"),
        (["--tasks=lost"], "the data of lost must be at hand or in reach"),
        (["--tasks=legs", "--include-path=nowhere"], "--include-path must be a folder; nowhere is none"),
        (["--tasks=legs", "--head-bits=8,4"], "one number of head and of cache bits; got 2 combinations"),
    ],
)
def test_errors_are_one_sentence(folder, capsys, monkeypatch, options, sentence):
    own: Any = TaskManager.__init__
    # The harness's own tasks are thousands of files.
    monkeypatch.setattr(
        TaskManager, "__init__", lambda self, **given: own(self, **{**given, "include_defaults": False})
    )
    assert main(["eval", str(folder / "packed"), f"--include-path={folder / 'tasks'}", *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert sentence in printed.err
    assert printed.err.count("error:") == 1


def test_a_missing_harness_is_one_sentence(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", str(folder / "packed"), "--tasks=legs"]) == 2
    assert capsys.readouterr().err == (
        "error: this command needs lm_eval, which is not installed; pip install 'thrifty[harness]'\n"
    )
