import math
import re

import pytest
from tiny_checkpoints import write_checkpoint

from thrifty.cli import main
from thrifty.runtime import load

TEXT = "The dog jumpéd over the fence, twice. " * 30


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", tie_word_embeddings=False).path


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    return tmp_path / "text"


def rows(printed: str) -> list[list[float]]:
    return [[float(x) for x in re.findall(r"[-+.\d]+", line)] for line in printed.splitlines()[2:]]


def test_every_combination_is_scored_as_the_runtime_scores_it(path, text, capsys):
    assert main(["eval", str(path), str(text), "--head-bits", "16,4", "--cache-bits", "32,8", "--window", "64"]) == 0
    printed = capsys.readouterr().out
    assert f"{len(TEXT.encode())} bytes" in printed
    got = rows(printed)
    assert [row[:2] for row in got] == [[16, 32], [16, 8], [4, 32], [4, 8]]
    for head, cache, perplexity, bits, more in got:
        runtime = load(path, head_bits=None if head == 16 else int(head), cache_bits=int(cache))
        assert perplexity == pytest.approx(runtime.perplexity(TEXT, 64), rel=1e-4)
        assert bits == pytest.approx(runtime.bits_per_byte(TEXT, 64), abs=1e-5)
        assert more == pytest.approx(100 * (perplexity / got[0][2] - 1), abs=2e-2)


def test_progress_counts_to_the_end(path):
    seen = []
    score = load(path).score(TEXT, 50, 25, lambda done, all: seen.append((done, all)))
    assert seen == sorted(seen)
    assert seen[-1] == (score.tokens, score.tokens)
    assert len(seen) > 10
    assert score.bits_per_byte == pytest.approx(score.nats / math.log(2) / len(TEXT.encode()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{text}", "--head-bits", "7"], "head_bits must be 8, 4 or None; got 7"),
        (["{text}", "--cache-bits", "x"], "--cache-bits are numbers"),
        (["{text}", "--window", "9999"], "window"),
        (["{text}-missing"], "does not exist"),
        (["{binary}"], "must be UTF-8"),
        (["{empty}"], "at least one token"),
    ],
)
def test_errors_are_one_sentence(path, text, tmp_path, capsys, arguments, message):
    places = {"text": text, "binary": tmp_path / "binary", "empty": tmp_path / "empty"}
    places["binary"].write_bytes(b"\xff\xfe")
    places["empty"].write_bytes(b"")
    assert main(["eval", str(path), *(a.format(**places) for a in arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("error:") == 1
