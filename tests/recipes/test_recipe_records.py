"""The XSum recipe's records: files of JSON and the Hub, and each way in which they can be wrong."""

import gzip
import json
import re

import pytest
from datasets import Dataset
from recipe_inputs import make_config

from recipes.xsum import records as module
from recipes.xsum.records import DataError, load_records


def write(path, text):
    if path.suffix == ".gz":
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.write(text)
    else:
        path.write_text(text, encoding="utf-8")
    return path


ROWS = [{"id": 3, "document": "Ein Wörterbuch.", "summary": "Buch."}, {"document": "", "summary": "Two."}]


def file_config(path, **options):
    return make_config(
        dataset="files", train_file=str(path), validation_file=str(path), test_file=str(path), **options
    )


def lines_of(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


GOOD = '{"document": "a", "summary": "b"}\n'
FORM = "the file must hold one JSON object a line, or one JSON array of objects"


class TestFiles:
    @pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
    @pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz"])
    def test_reads_lines(self, tmp_path, name, mark):
        path = write(tmp_path / name, mark + lines_of(ROWS).replace("\n", "\n\n"))
        rows = load_records(file_config(path), "validation")
        assert rows["id"][0] == "3" and rows["id"][1].endswith("-3")
        assert rows["document"][:] == ["Ein Wörterbuch.", ""]
        assert rows["summary"][:] == ["Buch.", "Two."]

    @pytest.mark.parametrize("indent", [None, 2])
    def test_reads_an_array(self, tmp_path, indent):
        path = write(tmp_path / "a.json", "\n" + json.dumps(ROWS, indent=indent))
        rows = load_records(file_config(path), "validation")
        assert rows["id"][:] == ["3", "a-2"] and rows["summary"][:] == ["Buch.", "Two."]
        assert len(load_records(file_config(path, max_eval_examples=1), "validation")) == 1

    def test_columns_and_limits(self, tmp_path):
        text = "".join(json.dumps({"body": str(i), "lead": "x"}) + "\n" for i in range(5))
        config = file_config(
            write(tmp_path / "a.jsonl", text), text_column="body", summary_column="lead", max_train_examples=2
        )
        assert load_records(config, "train")["document"][:] == ["0", "1"]
        assert len(load_records(config, "test")) == 5

    @pytest.mark.parametrize(
        "name, text, message",
        [
            ("a.csv", "x", ": the name must end in one of .jsonl, .jsonl.gz, .json, .json.gz; write a table as JSON"),
            ("a.jsonl", "", f": the file holds no record; {FORM}"),
            ("a.jsonl", " \n\n", ": the file holds no record"),
            ("a.json", "[]", ": the file holds no record"),
            ("a.jsonl", GOOD + '{"document": ', ", line 2: not valid JSON: Expecting value (character 14); the file"),
            ("a.jsonl", "document,summary\na,b\n", ", line 1: not valid JSON: Expecting value (character 1)"),
            ("a.json", '{\n "document": "a"\n}', ", line 1: not valid JSON: Expecting property name"),
            ("a.json", '\n[\n{"document": "a"},\n{"document" 2}]', ", line 4: not valid JSON: Expecting ':' delim"),
            ("a.json", "[" + GOOD + "]\n[" + GOOD + "]", ", line 3: not valid JSON: Extra data"),
            ("a.json", "[" * 100_000, ", line 1: JSON that cannot be read: "),
            ("a.jsonl", GOOD + "1" * 5000, ", line 2: JSON that cannot be read: Exceeds the limit"),
            ("a.json", '["a"]', ", record 1: a string, not an object"),
            ("a.json", f"[{GOOD}, null]", ", record 2: null, not an object"),
            ("a.jsonl", GOOD + "7", ", line 2: a number, not an object"),
            ("a.jsonl", GOOD + "[7]", ", line 2: an array, not an object"),
            (
                "a.jsonl",
                '\n{"id": "q7", "document": "a", "title": "b"}',
                ", line 2 (id 'q7'): no 'summary', only id, document, title; set text_column",
            ),
            ("a.jsonl", GOOD + "{}", ", line 2 (id 'a-2'): no 'document', only nothing"),
            (
                "a.jsonl",
                '{"document": null, "summary": "b"}',
                ", line 1 (id 'a-1'): 'document' must be text, not null",
            ),
            ("a.jsonl", '{"document": "a", "summary": ["b"]}', "'summary' must be text, not an array; fix or remove"),
            ("a.jsonl", '{"document": "a", "summary": 1.5}', "'summary' must be text, not a number"),
            (
                "a.jsonl",
                GOOD + r'{"id": 4, "document": "ab\ud83d", "summary": "b"}',
                r", line 2 (id '4'): character 3 of 'document' is half a surrogate pair, \ud83d, and no text",
            ),
            ("a.jsonl", r'{"document": "a", "summary": "\udc00b"}', "character 1 of 'summary' is half a surrogate"),
            ("a.jsonl", r'{"id": "\ud800", "document": "a", "summary": "b"}', "character 1 of 'id' is half a surrog"),
        ],
    )
    def test_errors_name_place_and_remedy(self, tmp_path, name, text, message):
        path = write(tmp_path / name, text)
        error = error_of(path)
        assert error.startswith(str(path)) and message in error

    def test_what_is_no_file(self, tmp_path):
        with pytest.raises(DataError, match=r"none\.jsonl: no such file.*dataset: generated"):
            load_records(file_config(tmp_path / "none.jsonl"), "train")
        (tmp_path / "folder.jsonl").mkdir()
        for name in ("", "folder.jsonl"):
            assert error_of(tmp_path / name).endswith(": a folder; give one file")

    @pytest.mark.parametrize(
        "name, content, message",
        [
            ("a.jsonl.gz", b"no gzip", "cannot be read after line 0: Not a gzipped file (b'no'); replace it"),
            (
                "a.jsonl",
                GOOD.encode() + b'{"document": "\xff"}',
                "line 2: byte 0xff at character 15 is not UTF-8; save",
            ),
            ("a.jsonl", GOOD.encode("latin-1").replace(b"a", b"\xe4"), "line 1: byte 0xe4 at character 15"),
            ("a.jsonl", GOOD.encode("utf-16"), "line 1: byte 0xff at character 1 is not UTF-8"),
            (
                "a.jsonl",
                gzip.compress(GOOD.encode(), mtime=0),
                "is not UTF-8; save the file as UTF-8, compressed if and only if",
            ),
            ("a.jsonl", b'{"document": "\xed\xa0\x80"}', "line 1: byte 0xed at character 15 is not UTF-8"),
        ],
    )
    def test_wrong_bytes(self, tmp_path, name, content, message):
        (tmp_path / name).write_bytes(content)
        assert message in error_of(tmp_path / name)

    @pytest.mark.parametrize("damage", ["cut off", "overwritten"])
    def test_damaged_gzip(self, tmp_path, damage):
        path = write(tmp_path / "a.jsonl.gz", lines_of({**ROWS[0], "summary": str(i)} for i in range(2000)))
        content = path.read_bytes()
        path.write_bytes(content[:-30] if damage == "cut off" else content[:40] + b"\xff" * 40 + content[80:])
        assert re.search(
            r"a\.jsonl\.gz: cannot be read after line \d+: .*; replace it by a whole copy", error_of(path)
        )

    def test_split_without_file(self, tmp_path):
        path = write(tmp_path / "a.jsonl", json.dumps(ROWS[0]))
        config = make_config(
            dataset="files", train_file=str(path), validation_file=str(path), final_split="validation"
        )
        with pytest.raises(DataError, match="set test_file"):
            load_records(config, "test")


def error_of(path):
    with pytest.raises(DataError) as caught:
        load_records(file_config(path), "train")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def texts(*pairs):
    return [{"document": document, "summary": summary} for document, summary in pairs]


class TestRecordsWithoutText:
    def test_training_leaves_them_out_and_says_so(self, tmp_path, caplog):
        path = write(tmp_path / "a.jsonl", lines_of(texts(("a", "b"), (" \n", "c"), ("d", ""), ("e", "f"))))
        assert load_records(file_config(path), "train")["document"][:] == ["a", "e"]
        (message,) = caplog.messages
        assert message == (
            f"{path}, line 2: no text in the document or summary of 2 of 4 records, which are left out of training"
        )

    def test_held_out_splits_stay_whole(self, tmp_path, caplog):
        path = write(tmp_path / "a.json", json.dumps(texts(("a", "b"), ("c", "d"), ("e", ""))))
        assert load_records(file_config(path), "test")["summary"][:] == ["b", "d", ""]
        (message,) = caplog.messages
        assert "record 3: no text" in message and message.endswith("1 of 3 records, which are scored all the same")

    def test_nothing_is_said_of_whole_files(self, tmp_path, caplog):
        load_records(file_config(write(tmp_path / "a.jsonl", GOOD)), "train")
        assert not caplog.messages

    @pytest.mark.parametrize("split", ["train", "validation"])
    @pytest.mark.parametrize(
        "rows, message",
        [
            (
                texts(("", "a"), (" ", "b")),
                ": 'document' is empty in all of its 2 records; fill it, or set text_column",
            ),
            (texts(("a", ""), ("b", "\t")), ": 'summary' is empty in all of its 2 records"),
            (texts(("", "a"), ("b", "")), ": each of its 2 records lacks its document or its summary"),
        ],
    )
    def test_no_text_at_all(self, tmp_path, rows, message, split):
        path = write(tmp_path / "a.jsonl", lines_of(rows))
        with pytest.raises(DataError, match=re.escape(f"{path}{message}")):
            load_records(file_config(path), split)


class TestHub:
    def test_reads_the_parquet_branch(self, monkeypatch):
        seen = {}

        def fake(name, **options):
            seen.update(name=name, **options)
            return Dataset.from_dict({"summary": ["a", "b"], "document": ["c", "d"], "id": [1, 2], "x": [0, 0]})

        monkeypatch.setattr(module, "load_dataset", fake)
        rows = load_records(make_config(dataset="hub", max_eval_examples=1), "test")
        assert rows.to_list() == [{"id": "1", "document": "c", "summary": "a"}]
        assert seen == {"name": "EdinburghNLP/xsum", "revision": "refs/convert/parquet", "split": "test"}

    def test_unreachable(self, monkeypatch):
        def fake(name, **options):
            raise ConnectionError(f"Couldn't reach {name!r} on the Hub")

        monkeypatch.setattr(module, "load_dataset", fake)
        with pytest.raises(DataError, match="Couldn't reach.*dataset: files.*dataset: generated"):
            load_records(make_config(dataset="hub"), "train")

    def test_missing_column(self, monkeypatch):
        monkeypatch.setattr(module, "load_dataset", lambda *_, **__: Dataset.from_dict({"article": ["a"]}))
        with pytest.raises(DataError, match="no 'document', only article"):
            load_records(make_config(dataset="hub", dataset_name="a/b"), "train")

    @pytest.mark.parametrize(
        "columns, message",
        [
            (
                {"document": ["a"], "summary": [["b"]]},
                r"a/b \(train\): 'summary' holds List.*, not text; choose another",
            ),
            ({"document": [1], "summary": ["b"]}, r"'document' holds Value\('int64'\), not text"),
            ({"document": ["a", None], "summary": ["b", "c"]}, r"a/b \(train\), record 2: 'document' is null; write"),
            ({"document": ["a"], "summary": [""]}, r"a/b \(train\): 'summary' is empty in all of its 1 records"),
        ],
    )
    def test_columns_that_hold_no_text(self, monkeypatch, columns, message):
        monkeypatch.setattr(module, "load_dataset", lambda *_, **__: Dataset.from_dict(columns))
        with pytest.raises(DataError, match=message):
            load_records(make_config(dataset="hub", dataset_name="a/b"), "train")
