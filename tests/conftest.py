import pytest


@pytest.fixture(scope="module")
def eager_bitnet():
    """transformers' BitNet with its `torch.compile` decorators doing nothing: they take seconds each."""
    from transformers_folders import eager_bitnet

    with eager_bitnet():
        yield
