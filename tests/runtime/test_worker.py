import sys

import pytest

from thrifty.errors import ThriftyError
from thrifty.runtime import load
from thrifty.runtime.measure import Size, write_random
from thrifty.runtime.worker import Worker


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_random(tmp_path_factory.mktemp("models") / "tiny", Size(64, 32, 64, 1, 2, 1))


def test_a_worker_is_a_runtime_in_a_process_of_its_own(folder):
    runtime = load(folder, n_threads=1)
    with Worker("thrifty") as worker:
        worker("load", path=str(folder), n_threads=1)
        assert worker("generate", tokens=[1, 2], count=5) == runtime.generate_tokens(
            [1, 2], max_new_tokens=5, temperature=0, ignore_eos=True
        )
        assert worker("logits", tokens=[1, 2]) == runtime.logits([1, 2])[-1].tolist()


def test_what_the_runtime_refuses_reaches_the_caller(tmp_path):
    with Worker("thrifty") as worker, pytest.raises(ThriftyError, match="a checkpoint folder must"):
        worker("load", path=str(tmp_path))


def test_a_worker_that_dies_says_what_it_said_last():
    command = (sys.executable, "-c", "import os, sys; print('no room', file=sys.stderr, flush=True); os.abort()")
    with Worker("some peer", command) as worker, pytest.raises(ThriftyError, match=r"some peer .* in load; .*no room"):
        worker("load", path="x")
