import io
import warnings

import pytest
from tiny_checkpoints import write_checkpoint

from thrifty import native
from thrifty.cli import main
from thrifty.runtime import load


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", tie_word_embeddings=False).path


def test_prints_what_the_runtime_makes(path, capsys):
    assert main(["generate", str(path), "hello", "-n", "12"]) == 0
    printed = capsys.readouterr()
    assert printed.out == load(path, head_bits=8, cache_bits=8).generate("hello", max_new_tokens=12) + "\n"
    assert "tokens/s" in printed.err


def test_options_reach_the_runtime(path, capsys):
    options = ["--temperature", "1.5", "--top-k", "30", "--top-p", "0.9", "--repetition-penalty", "1.2", "--seed", "4"]
    command = ["generate", str(path), "ab", "--max-new-tokens", "20", "--echo", "--threads", "1", "--context", "64"]
    assert main([*command, *options, "--weight-format", "base3"]) == 0
    sampled = {"temperature": 1.5, "top_k": 30, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 4}
    text = load(path, head_bits=8, cache_bits=8).generate("ab", max_new_tokens=20, **sampled)
    assert capsys.readouterr().out == f"ab{text}\n"
    assert main([*command, *options, "--stop", text[3:5]]) == 0
    assert capsys.readouterr().out == f"ab{text[: text.index(text[3:5])]}\n"


def test_prompt_from_standard_input(path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    assert main(["generate", str(path), "-", "-n", "5"]) == 0
    assert capsys.readouterr().out == load(path, head_bits=8, cache_bits=8).generate("hello", max_new_tokens=5) + "\n"


def test_drafts_change_the_report_alone(path, capsys):
    command = ["generate", str(path), "ab ab ab ab ab", "-n", "60"]
    assert main(command) == 0
    expected = capsys.readouterr()
    assert main([*command, "--draft", "5"]) == 0
    printed = capsys.readouterr()
    assert printed.out == expected.out
    assert "drafted tokens accepted" not in expected.err
    assert "drafted tokens accepted" in printed.err


def test_a_text_that_the_context_cuts_says_so(path, capsys):
    prompt = "hello"
    assert main(["generate", str(path), prompt, "--context", "20"]) == 0
    assert "the context of 20 is full, and the text ends there\n" in capsys.readouterr().err
    assert main(["generate", str(path), prompt, "--context", "20", "-n", "15"]) == 0
    assert "full" not in capsys.readouterr().err


def test_more_threads_than_processors_warn_once_and_change_nothing(path, capsys):
    assert main(["generate", str(path), "hello", "-n", "9"]) == 0
    expected = capsys.readouterr().out
    many = native.cpu_threads() + 1
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main(["generate", str(path), "hello", "-n", "9", "--threads", str(many)]) == 0
    printed = capsys.readouterr()
    assert printed.out == expected
    lines = [line for line in printed.err.splitlines() if line.startswith("warning: ")]
    assert len(lines) == 1
    assert f"got {many}; results are the same, and slower" in lines[0]


def test_a_prompt_cache_is_made_and_used(path, capsys, tmp_path):
    file = tmp_path / "prompt"
    command = ["generate", str(path), "hello hello", "-n", "9"]
    assert main(command) == 0
    expected = capsys.readouterr().out
    for _ in range(2):
        assert main([*command, "--prompt-cache", str(file)]) == 0
        assert capsys.readouterr().out == expected
    assert main([*command, "--prompt-cache", str(file), "--cache-bits", "16"]) == 2
    assert "it has 8 bits and the runtime 16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{path}", "x", "--top-p", "2"], "top_p must be above 0"),
        (["{path}", "x", "--weight-format", "fp4"], "weight_format must be one of auto, i2, base3"),
        (["{path}", "x", "--context", "9999"], "max_context"),
        (["{path}/nowhere", "x"], "does not exist"),
        (["{path}", "a long prompt", "--context", "5"], "shorten it"),
    ],
)
def test_errors_are_one_sentence(path, capsys, arguments, message):
    assert main(["generate", *(a.format(path=path) for a in arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1


def test_a_truncated_file_is_named(path, tmp_path, capsys):
    broken = write_checkpoint(tmp_path / "model").path / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-10])
    assert main(["generate", str(broken.parent), "x"]) == 2
    assert "model.safetensors" in capsys.readouterr().err
