"""Whatever the metadata of a GGUF file are, a caller gets a model or a ThriftyError."""

import random
from typing import Any

import numpy as np
import pytest
from tiny_checkpoints import write_checkpoint

from thrifty import ThriftyError
from thrifty.checkpoint import open_folder
from thrifty.checkpoint.gguf import TensorToWrite, open_gguf, save_gguf
from thrifty.checkpoint.gguf_model import open_gguf_model
from thrifty.convert import to_gguf

VALUES = [
    *(
        np.uint32(0),
        np.uint32(1),
        np.uint32(2**32 - 1),
        np.int32(-1),
        np.uint64(2**63),
        np.float32(0),
        np.float32("nan"),
    ),
    *(np.float64(1e300), True, "", "x", "[]", "{}", [], ["a"], np.zeros(3, np.uint8), (np.zeros(2, np.int8),)),
]
TEXTS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    fields: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    to_gguf(open_folder(write_checkpoint(folder / "source", **fields).path), folder / "model.gguf")
    return folder / "model.gguf"


def write(name: str, block) -> TensorToWrite:
    return TensorToWrite(name, block.kind, block.shape, lambda: block.data)


def read(path) -> None:
    model = open_gguf_model(path)
    model.codes("model.layers.0.mlp.down_proj", 256)
    for name in TEXTS:
        model.text(name)


@pytest.mark.parametrize("seed", range(4))
def test_other_metadata_give_a_model_or_an_error(file, tmp_path, seed):
    rng, opened, outcomes = random.Random(seed), open_gguf(file), set()
    tensors = [write(*item) for item in opened.tensors.items()]
    keys = [*opened.metadata, "tokenizer.chat_template", "tokenizer.chat_templates", "bitnet.rope.scaling.type"]
    for _ in range(60):
        metadata = dict(opened.metadata)
        for key in rng.sample(keys, rng.randint(1, 2)):
            metadata[key] = rng.choice(VALUES)
        save_gguf(tmp_path / "other.gguf", metadata, tensors)
        try:
            read(tmp_path / "other.gguf")
            outcomes.add("read")
        except ThriftyError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}
