import io
import sys

import pytest
from tiny_checkpoints import write_checkpoint

from thrifty.cli import main
from thrifty.runtime import Conversation, load


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", tie_word_embeddings=False).path


def chat(monkeypatch, capsys, arguments: list[str], lines: str) -> tuple[str, str]:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert main(["chat", *arguments]) == 0
    return capsys.readouterr()


def test_answers_are_the_conversations(path, monkeypatch, capsys):
    conversation = Conversation(load(path, head_bits=8, cache_bits=8), "S", max_new_tokens=9)
    expected = ["".join(conversation.ask(text)) for text in ("hi", "again")]
    out, err = chat(monkeypatch, capsys, [str(path), "--system", "S", "-n", "9"], "hi\nagain\n")
    assert all(answer in out for answer in expected)
    assert "/reset" in err


def test_bits_are_the_runtimes(path, monkeypatch, capsys):
    conversation = Conversation(load(path, head_bits=4, cache_bits=8), max_new_tokens=20)
    answer = "".join(conversation.ask("hi"))
    out, _ = chat(monkeypatch, capsys, [str(path), "-n", "20", "--head-bits=4", "--cache-bits=8"], "hi\n")
    assert answer in out
    assert main(["chat", str(path), "--cache-bits=3"]) == 2
    assert "cache_bits must be one of 32, 16, 8; got 3" in capsys.readouterr().err


def test_a_prompt_cache_is_made_and_used(path, monkeypatch, capsys, tmp_path):
    file = tmp_path / "prompt"
    command = [str(path), "--system", "S" * 50, "-n", "9"]
    expected, _ = chat(monkeypatch, capsys, command, "hi\nagain\n")
    for _ in range(2):
        out, _ = chat(monkeypatch, capsys, [*command, "--prompt-cache", str(file)], "hi\nagain\n")
        assert out == expected
        assert file.is_file()


def test_commands(path, monkeypatch, capsys):
    conversation = Conversation(load(path, head_bits=8, cache_bits=8), max_new_tokens=9)
    answer = "".join(conversation.ask("hi"))
    out, err = chat(monkeypatch, capsys, [str(path), "-n", "9"], "hi\n/reset\nhi\n\n/what\n/quit\nnever read\n")
    assert out.count(answer) == 2
    assert "forgotten" in err
    assert err.count("/reset forgets") == 2


def test_a_conversation_that_fills_the_context_goes_on(path, monkeypatch, capsys):
    lines = "x" * 200 + "\nhi\n"
    out, err = chat(monkeypatch, capsys, [str(path), "--context", "100", "-n", "4"], lines)
    assert "shorten it" in err
    assert out.strip() != ""


def test_an_answer_that_the_context_cuts_says_so(path, monkeypatch, capsys):
    out, err = chat(monkeypatch, capsys, [str(path), "--context", "40"], "hi\n/reset\nhi\n")
    assert out.strip() != ""
    assert err.count("the context of 40 is full: the answer ends there") == 2
    _, err = chat(monkeypatch, capsys, [str(path), "--context", "40", "-n", "3"], "hi\n")
    assert "full" not in err


def test_a_template_without_jinja_ends_at_once(tmp_path, monkeypatch, capsys):
    path = write_checkpoint(tmp_path / "model").path
    (path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert main(["chat", str(path)]) == 2
    assert "pip install 'thrifty[chat]'" in capsys.readouterr().err


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(path, monkeypatch, capsys):
    ask = Conversation.ask
    asked = []

    def interrupted(self, text):
        asked.append(text)
        for i, piece in enumerate(ask(self, text)):
            if len(asked) == 1 and i == 2:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(Conversation, "ask", interrupted)
    chat(monkeypatch, capsys, [str(path), "-n", "30"], "hi\nagain\n")
    assert asked == ["hi", "again"]
