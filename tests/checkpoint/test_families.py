"""The table of names against the tensors that torch writes."""

import pytest
import torch
from models.suite import MIXTURES, QUANTISED, small_model

from thrifty.checkpoint import open_folder
from thrifty.models import save_packed


@pytest.mark.parametrize("mixture", MIXTURES)
def test_every_mixture_has_the_tensors_that_its_config_calls_for(mixture, tmp_path):
    model = small_model(mixture)
    model.save_pretrained(tmp_path)
    folder = open_folder(tmp_path)
    assert [folder.config.mixer(i) for i in range(len(model.model.layers))] == [
        model.config.mixer(i) for i in range(len(model.model.layers))
    ]


@pytest.mark.parametrize("mixture", QUANTISED)
def test_every_mixture_is_read_packed(mixture, tmp_path):
    save_packed(small_model(mixture), tmp_path, torch.bfloat16)
    folder = open_folder(tmp_path)
    assert folder.config.storage == "multiplies"
    for name, tensor in folder.tensors.items():
        assert (tensor.dtype == "U8") == (f"{name}_scale" in folder.tensors)
