import json
from pydoc_data.topics import topics

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st

from thrifty.errors import ThriftyError
from thrifty.train.corpus import builtin_corpus, open_corpus, split_tail, text_corpus, without_lines


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
    assert open_corpus(datasets=[str(tmp_path)], heldout=0.0).text == "onetwo"
    assert open_corpus(datasets=[str(tmp_path)], column="body", heldout=0.0).text == "onetwo"


@pytest.mark.usefixtures("_own_cache")
def test_a_data_set_without_the_column_names_those_it_has(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"title": "a", "body": "one"}\n')
    with pytest.raises(ThriftyError, match=r"no text column 'text'; got title, body; choose by --column"):
        open_corpus(datasets=[str(tmp_path)], heldout=0.0)
    with pytest.raises(ThriftyError, match=r"no text column 'bodi'"):
        open_corpus(datasets=[str(tmp_path)], column="bodi", heldout=0.0)


def test_a_data_set_that_does_not_load_is_named(tmp_path):
    with pytest.raises(ThriftyError, match="does not load as a data set"):
        open_corpus(datasets=[str(tmp_path / "nothing")])


@pytest.fixture
def rows(tmp_path):
    """Two files of rows, 4 and 40 documents."""
    for name, count in (("few", 4), ("many", 40)):
        lines = [json.dumps({"text": f"{name} {n}"}) for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return [tmp_path / "few.jsonl", tmp_path / "many.jsonl"]


def test_rows_are_documents_and_the_last_are_held_out(rows):
    corpus = open_corpus(rows[1:], heldout=0.1)
    assert [len(part.documents) for part in corpus.parts] == [37]
    assert corpus.heldout == "many 37\nmany 38\nmany 39\n"
    (rows[0]).write_text(json.dumps({"text": "x" * 90 + "y" * 10}))
    assert open_corpus(rows[:1], heldout=0.1).heldout == "y" * 10 + "\n"


def test_sources_are_mixed_by_size_or_by_weight(rows):
    corpus = open_corpus(rows, heldout=0.0)
    assert {part.name: len(part.documents) for part in corpus.parts} == {"few": 4, "many": 40}
    assert corpus.mixture == ()
    mixed = open_corpus(rows, shares={"few": 3, "many": 1}, heldout=0.0)
    assert mixed.mixture == ((0.0, {"few": 3, "many": 1}),)
    assert mixed.name == "few, many"


def test_sources_of_one_name_are_told_apart_by_their_paths(rows, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "few.jsonl").write_text('{"text": "another"}')
    corpus = open_corpus([rows[0], tmp_path / "b" / "few.jsonl"], heldout=0.0)
    assert [part.name for part in corpus.parts] == [str(rows[0]), str(tmp_path / "b" / "few.jsonl")]


def test_a_stream_holds_out_its_first_documents_and_gives_a_sample(rows):
    corpus = open_corpus(rows[1:], heldout=0.1, stream=True)
    assert corpus.stream is not None
    held = corpus.stream.heldout[0]
    assert 1 < held < 20
    assert corpus.heldout == "".join(f"many {n}\n" for n in range(held))
    assert corpus.parts[0].documents == tuple(f"many {n}" for n in range(held, 40))
    assert corpus.record()["stream"] == {
        "many": {"bytes": rows[1].stat().st_size, "weight": 1.0, "heldout_documents": held}
    }


def test_what_is_held_out_can_be_given(rows, tmp_path):
    for stream in (False, True):
        corpus = open_corpus(rows[:1], heldout=str(rows[1]), stream=stream)
        assert corpus.heldout.startswith("many 0\nmany 1\n")
        assert corpus.parts[0].documents == tuple(f"few {n}" for n in range(4))
    DatasetDict({"train": Dataset.from_dict({"text": ["a"]}), "test": Dataset.from_dict({"text": ["b"]})}).save_to_disk(
        tmp_path / "kept"
    )
    assert open_corpus(datasets=[str(tmp_path / "kept")], heldout="test").heldout == "b\n"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"shares": {"fev": 1}}, "a mixture must name the sources; got fev; they are few, many"),
        ({"shares": {"few": 0}}, "weights of a mixture must be more than 0; got few=0"),
        ({"shares": {"few": -1}}, "weights of a mixture must be more than 0; got few=-1"),
        ({"shares": {"few": float("nan")}}, "weights of a mixture must be more than 0; got few=nan"),
        ({"shares": {"few": 1}}, "a mixture must give every source a weight; many has none; add many=WEIGHT"),
        ({"heldout": "nowhere.txt"}, "nowhere.txt does not exist"),
        ({"heldout": "1.5"}, "at least 0 and below 1; got 1.5"),
    ],
)
def test_bad_mixtures_are_one_sentence(rows, options, sentence):
    for stream in (False, True):
        with pytest.raises(ThriftyError, match=sentence):
            open_corpus(rows, stream=stream, **options)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("content", ["", '{"text": null}\n{"text": "  "}\n', "\n\n"])
def test_an_empty_source_is_named(rows, tmp_path, stream, content):
    (tmp_path / "none.jsonl").write_text(content)
    with pytest.raises(ThriftyError, match="none is empty"):
        open_corpus([*rows, tmp_path / "none.jsonl"], stream=stream)


def test_only_a_text_that_is_given_can_be_streamed():
    with pytest.raises(ThriftyError, match="a text must be given to be streamed or mixed"):
        open_corpus(stream=True)


def test_a_character_cut_by_the_end_of_a_file_is_left_out(tmp_path):
    (tmp_path / "cut.txt").write_bytes("naïve café".encode()[:-1])
    assert text_corpus(tmp_path / "cut.txt", 0).text == "naïve caf"
