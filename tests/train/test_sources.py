import gzip
import json

import numpy as np
import pyarrow as arrow
import pytest
from datasets import Dataset, DatasetDict
from pyarrow import parquet

from thrifty.errors import ThriftyError
from thrifty.train import sources as module
from thrifty.train.sources import DataSet, Files

TEXTS = [f"Row {n}, é and 漢字.\n{'x' * n}" for n in range(40)]


def lines(texts, column="text") -> str:
    return "".join(json.dumps({"id": n, column: text}) + "\n" for n, text in enumerate(texts))


@pytest.fixture
def places(tmp_path, monkeypatch):
    """The texts in every form that there is."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(module, "_ROWS", 4)
    (tmp_path / "a.jsonl").write_text(lines(TEXTS))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS).encode()))
    table = arrow.table({"id": list(range(40)), "text": TEXTS})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    (tmp_path / "texts").mkdir()
    for n, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{n:02}.txt").write_text(text)
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "1.jsonl").write_text(lines(TEXTS[:13]))
    parquet.write_table(table.slice(13), tmp_path / "rows" / "2.parquet")
    (tmp_path / "streamed").mkdir()
    (tmp_path / "streamed" / "1.jsonl").write_text(lines(TEXTS[:13]))
    (tmp_path / "streamed" / "2.jsonl").write_text(lines(TEXTS[13:]))
    (tmp_path / "rows" / ".hidden.jsonl").write_text("not JSON")
    DatasetDict({"train": Dataset.from_dict({"text": TEXTS})}).save_to_disk(tmp_path / "kept")
    return {
        **{name: lambda name=name: Files(tmp_path / name) for name in ("a.jsonl", "a.jsonl.gz", "a.parquet", "rows")},
        "texts": lambda: Files(tmp_path / "texts"),
        "kept": lambda: DataSet(str(tmp_path / "kept")),
        "stream": lambda: DataSet(str(tmp_path / "streamed"), stream=True),
    }


@pytest.mark.filterwarnings("ignore")
def test_documents_of_every_form_are_read_on_from_any_point(places):
    for name, opened in places.items():
        found = list(opened().read())
        assert [text for text, _ in found] == TEXTS, name
        assert opened().size() != 0
        for i in (0, 6, 12, 13, 38):
            # A point is written beside a checkpoint, and read by another process.
            point = json.loads(json.dumps(found[i][1]))
            assert [text for text, _ in opened().read(point)] == TEXTS[i + 1 :], (name, i)


def test_a_large_file_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 64)
    file = tmp_path / "text.txt"
    for text in ("é漢" * 200, "a line\n" * 100, "short", "漢" * 21 + "x" + "a\n" * 40):
        file.write_text(text)
        found = list(Files(file).read())
        assert "".join(piece for piece, _ in found) == text
        assert max(len(piece.encode()) for piece, _ in found) <= 64
        for i, (_, point) in enumerate(found):
            assert "".join(piece for piece, _ in Files(file).read(point)) == "".join(p for p, _ in found[i + 1 :])


def test_a_file_larger_than_memory_may_be_read(tmp_path):
    file = tmp_path / "text.txt"
    with open(file, "wb") as content:
        content.write(b"a first line\n" * 100_000)
        content.truncate(1 << 40)  # a terabyte, of zeros that take no place
    reader = Files(file).read()
    assert next(reader)[0].startswith("a first line\n")


def test_null_and_empty_rows_are_left_out_and_characters_are_whole(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"text": null}\n\n{"text": ""}\n{"text": "a\\ud83d\\ude00b"}\n{"text": "a\\ud83db"}\n{"text": " "}\n'
    )
    assert [text for text, _ in Files(file).read()] == ["a😀b", "a\ufffdb"]
    table = arrow.table({"text": arrow.array([None, "", "x", None], arrow.string())})
    parquet.write_table(table, tmp_path / "rows.parquet")
    assert [text for text, _ in Files(tmp_path / "rows.parquet").read()] == ["x"]


def test_the_only_column_of_strings_is_the_text(tmp_path):
    (tmp_path / "rows.jsonl").write_text(lines(TEXTS[:2], "story"))
    assert [text for text, _ in Files(tmp_path / "rows.jsonl").read()] == TEXTS[:2]
    (tmp_path / "two.jsonl").write_text('{"a": "1", "b": "2"}\n')
    assert [text for text, _ in Files(tmp_path / "two.jsonl", "b").read()] == ["2"]
    with pytest.raises(ThriftyError, match=r"two.jsonl has no text column 'text'; got a, b; choose by --column"):
        list(Files(tmp_path / "two.jsonl").read())


def cut(file, share=0.6):
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": "x\n', r"every line must be JSON; line 2 of .*a.jsonl is not \("),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', "line 2 of .*a.jsonl is a list"),
        ("a.jsonl", b'{"text": "\xff"}\n', "every line must be JSON; line 1 of .*utf-8"),
        ("a.jsonl", b'{"text": "x"}\n{"id": 1}\n', "line 2 of .*a.jsonl has id; choose another by --column"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', "must hold strings; line 2 of .*a.jsonl holds a int"),
        ("a.parquet", b"PAR1 no table", "a.parquet cannot be read, as if it were cut off: "),
        ("a.txt", b"some text \xff\xfe", r"must be UTF-8; .*a.txt is not \(after byte 0\); convert it"),
    ],
)
def test_bad_data_is_named(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ThriftyError, match=sentence):
        list(Files(tmp_path / name).read())


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet"])
def test_files_that_are_cut_are_named(places, tmp_path, name):
    cut(tmp_path / name)
    with pytest.raises(ThriftyError, match=rf"{name} cannot be read, as if it were cut off: .*; get it again"):
        list(places[name]().read())


def test_a_parquet_file_damaged_within_is_named(tmp_path):
    file = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"text": [str(n) * 50 for n in range(4000)]}), file, row_group_size=1000)
    data = np.frombuffer(file.read_bytes(), np.uint8).copy()
    data[len(data) // 3 : len(data) // 2] = 255
    file.write_bytes(data.tobytes())
    with pytest.raises(ThriftyError, match=r"a.parquet cannot be read"):
        list(Files(file).read())


def test_what_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ThriftyError, match="none does not exist; check the path"):
        Files(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ThriftyError, match="empty has no file"):
        Files(tmp_path / "empty")
    with pytest.raises(ThriftyError, match="does not load as a data set"):
        DataSet(str(tmp_path / "nothing"))
    DatasetDict({"train": Dataset.from_dict({"text": TEXTS})}).save_to_disk(tmp_path / "kept")
    with pytest.raises(ThriftyError, match=r"kept does not load as a data set \(test\)"):
        DataSet(str(tmp_path / "kept"), split="test")
    with pytest.raises(ThriftyError, match="kept has no text column 'body'; got text; choose by --column"):
        DataSet(str(tmp_path / "kept"), column="body")
