from pydoc_data.topics import topics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thrifty.errors import ThriftyError
from thrifty.train.corpus import builtin_corpus, dataset_corpus, split_tail, text_corpus, without_lines


@pytest.fixture(scope="module")
def builtin():
    return builtin_corpus()


def test_the_heldout_text_is_the_end_of_the_topics(builtin):
    assert builtin.heldout.encode() == "".join(topics.values()).encode()[-60_000:]


def test_no_heldout_line_is_trained_on(builtin):
    banned = {line.strip() for line in builtin.heldout.splitlines()} - {""}
    for part in builtin.parts:
        for document in part.documents:
            assert banned.isdisjoint(line.strip() for line in document.splitlines())


def test_the_builtin_corpus_has_documentation_prose_and_code(builtin):
    sizes = {part.name: part.size for part in builtin.parts}
    assert sizes["topics"] > 300_000
    assert sizes["prose"] > 1_000_000
    assert sizes["code"] > 4_000_000


def test_the_builtin_corpus_is_the_same_every_time(builtin):
    assert builtin_corpus().record() == builtin.record()


@given(st.text(), st.integers(0, 40))
def test_a_split_loses_nothing_and_cuts_no_character(text, size):
    head, tail = split_tail(text, size)
    assert head + tail == text
    assert size - 3 <= len(tail.encode()) <= size or head == ""


@given(st.lists(st.text(" ab", max_size=3)), st.sets(st.text("ab", min_size=1, max_size=2)))
def test_banned_lines_go_and_the_others_stay(lines, banned):
    text = "".join(f"{line}\n" for line in lines)
    assert without_lines(text, banned) == "".join(f"{line}\n" for line in lines if line.strip() not in banned)


def test_a_file_is_split_at_its_end(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 95 + "y" * 5)
    corpus = text_corpus(tmp_path / "a.txt", 0.05)
    assert (corpus.text, corpus.heldout) == ("x" * 95, "y" * 5)


def test_a_folder_is_read_in_order_without_hidden_and_binary_files(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.md").write_text("two")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / "c.bin").write_bytes(b"\0\1")
    (tmp_path / "d.bin").write_bytes(b"\xff\xfe")
    assert text_corpus(tmp_path, 0.0).text == "onetwo"


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b" \n", "is empty"), (b"ab\xff", r"must be UTF-8; .*a\.txt is not \(byte 2\)")],
)
def test_a_bad_file_is_named(tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ThriftyError, match=message):
        text_corpus(tmp_path / "a.txt", 0.05)


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(ThriftyError, match=r"nowhere does not exist.* --dataset"):
        text_corpus(tmp_path / "nowhere", 0.05)


@pytest.fixture
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.mark.usefixtures("_own_cache")
def test_a_data_set_is_read_by_its_column(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"id": 1, "body": "one"}\n{"id": 2, "body": "two"}\n')
    assert dataset_corpus(str(tmp_path), None, None, 0.0).text == "one\ntwo\n"
    assert dataset_corpus(str(tmp_path), None, "body", 0.0).text == "one\ntwo\n"


@pytest.mark.usefixtures("_own_cache")
def test_a_data_set_without_the_column_names_those_it_has(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"title": "a", "body": "one"}\n')
    with pytest.raises(ThriftyError, match=r"no text column 'text'; got title, body; choose by --column"):
        dataset_corpus(str(tmp_path), None, None, 0.0)
    with pytest.raises(ThriftyError, match=r"no text column 'bodi'"):
        dataset_corpus(str(tmp_path), None, "bodi", 0.0)


def test_a_data_set_that_does_not_load_is_named(tmp_path):
    with pytest.raises(ThriftyError, match="does not load as a data set"):
        dataset_corpus(str(tmp_path / "nothing"), None, None, 0.0)
