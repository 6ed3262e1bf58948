import pytest
from transformers.utils import logging


@pytest.fixture(scope="session")
def quiet():
    """No progress bars in the tests' output."""
    logging.disable_progress_bar()
