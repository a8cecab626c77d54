"""The XSum recipe's data: generated corpus, files, tokenizers, token ids, collators, order of an epoch."""

import gzip
import hashlib
import json
import statistics

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, BartConfig, BartForConditionalGeneration, GPT2Config, GPT2LMHeadModel

from recipes.xsum import corpus, data
from recipes.xsum.config import Config
from recipes.xsum.corpus import generate_corpus
from recipes.xsum.data import (
    CausalCollator,
    DataError,
    Seq2SeqCollator,
    epoch_batches,
    load_records,
    load_tokenizer,
    tokenize_records,
    train_tokenizer,
)
from recipes.xsum.model import summed_loss

BART = {"model_type": "bart", "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}  # fmt: skip


DIGEST = "90906c5a12d55d561881a38ac5d2c5e083d3c19ae5604b3884173281334bbbf5"


def make_config(**options):
    return Config(**{"model_config": BART, "attn_implementation": "eager", "vocab_size": 600, **options})


@pytest.fixture(scope="module")
def records():
    return load_records(make_config(generated_examples=40), "train")


@pytest.fixture(scope="module")
def tokenizer(records):
    return load_tokenizer(make_config(), records)


class TestCorpus:
    def test_bytes_do_not_change(self):
        # Runs on the corpus can be compared only while this holds: change the digest only with the corpus.
        texts = json.dumps([generate_corpus(30, 7, split) for split in corpus.SPLITS])
        assert hashlib.sha256(texts.encode()).hexdigest() == DIGEST

    def test_more_examples_only_add(self):
        assert generate_corpus(12, 0, "train")[:5] == generate_corpus(5, 0, "train")

    def test_seeds_and_examples_differ(self):
        documents = {row["document"] for seed in (0, 1) for row in generate_corpus(50, seed, "train")}
        assert len(documents) == 100

    def test_splits_share_no_protagonist(self):
        people = {}
        for split in corpus.SPLITS:
            rows = generate_corpus(300, 0, split)
            people[split] = {name for row in rows for name in all_names() if name in row["summary"]}
            assert people[split]
        assert not people["train"] & people["validation"]
        assert not people["train"] & people["test"]
        assert not people["validation"] & people["test"]

    def test_unknown_split(self):
        with pytest.raises(ValueError, match="no split 'dev'.*train, validation, test"):
            generate_corpus(1, 0, "dev")

    def test_no_sentence_gives_the_summary_away(self):
        stories = corpus._load_stories().values()
        phrases = {summary for story in stories for key in ("events", "outcomes") for _, summary in story[key]}
        for row in generate_corpus(400, 1, "train"):
            used = [phrase for phrase in phrases if phrase.lower() in row["summary"].lower()]
            assert len(used) >= 2
            for phrase in used:
                assert phrase.lower() not in row["document"].lower()

    def test_other_facts_stand_in_different_sentences(self):
        for row in generate_corpus(100, 2, "train"):
            sentences = row["document"].split("\n")
            (name,) = [name for name in all_names() if name in row["summary"]]
            day = next(day for day in corpus._load_stories()["court"]["days"] if day in row["summary"])
            tells = [i for i, sentence in enumerate(sentences) if name in sentence]
            assert len(tells) == 1
            assert any(day in sentence for i, sentence in enumerate(sentences) if i not in tells)

    @pytest.mark.parametrize("kind", sorted(corpus._load_stories()))
    def test_every_template_can_be_filled(self, kind):
        story = corpus._load_stories()[kind]
        slots = corpus._Slots(corpus._Draw("x"), story, "test")
        slots.update(event="an event", outcome="an outcome")
        assert set(story["tell"]) == {"who", "town", "day", "number", "event", "outcome"}
        told = [(fact, template) for fact, templates in story["tell"].items() for template in templates]
        for fact, template in told:
            assert f"{{{fact}}}" in template
        outcomes = [clause for clause, _ in story["outcomes"]]
        templates = [template for _, template in told] + outcomes + story["asides"] + story["filler"]
        for template in templates + story["summaries"]:
            text = slots.fill(template)
            assert text and "{" not in text
        for template in story["asides"] + story["filler"]:
            # Asides may not tell facts: only fresh draws.
            assert not any(f"{{{fact}}}" in template for fact in story["tell"])
        for template in story["summaries"]:
            assert all(f"{{{fact}}}" in template for fact in story["tell"])

    def test_lengths_are_like_xsums(self):
        words = sorted(len(row["document"].split()) for row in generate_corpus(3000, 0, "train"))
        tokens = [count * corpus.TOKENS_PER_WORD for count in words]
        assert statistics.median(tokens) == pytest.approx(372, rel=0.06)
        assert statistics.mean(tokens) == pytest.approx(437, rel=0.05)
        assert max(tokens) < 1024
        assert tokens[-150] > 900  # the long tail


def all_names():
    story = corpus._load_stories()["court"]
    return [f"{first} {last}" for first in story["first_names"] for last in story["surnames"]]


class TestGeneratedRecords:
    def test_sizes(self):
        config = make_config(generated_examples=25)
        assert len(load_records(config, "train")) == 25
        assert len(load_records(config, "validation")) == 3
        config = make_config(generated_examples=25, max_train_examples=9, max_eval_examples=40)
        assert len(load_records(config, "train")) == 9
        assert len(load_records(config, "test")) == 40

    def test_columns(self, records):
        assert records.column_names == ["id", "document", "summary"]
        assert records["id"][0] == "train-000000"


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


class TestFiles:
    @pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz"])
    def test_reads_lines(self, tmp_path, name):
        path = write(tmp_path / name, "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n")
        rows = load_records(file_config(path), "validation")
        assert rows["id"][0] == "3" and rows["id"][1].endswith("-2")
        assert rows["document"][:] == ["Ein Wörterbuch.", ""]
        assert rows["summary"][:] == ["Buch.", "Two."]

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
            ("a.csv", "x", r"a\.csv: the name must end in one of \.jsonl"),
            ("a.jsonl", "", "holds no record"),
            ("a.jsonl", '{"document": "a", "summary": "b"}\n{"document": ', r"a\.jsonl, line 2: not valid JSON"),
            ("a.json", '["a"]', "line 1: a JSON list, not an object"),
            (
                "a.jsonl",
                '\n{"id": "q7", "document": "a", "title": "b"}',
                r"line 2 \(id q7\): no 'summary', only id, document, title; set text_column",
            ),
            ("a.jsonl", '{"document": null, "summary": "b"}', "'document' must be text, not NoneType"),
        ],
    )
    def test_errors_name_place_and_remedy(self, tmp_path, name, text, message):
        config = file_config(write(tmp_path / name, text))
        with pytest.raises(DataError, match=message):
            load_records(config, "train")

    def test_missing_file(self, tmp_path):
        with pytest.raises(DataError, match="no such file.*dataset: generated"):
            load_records(file_config(tmp_path / "none.jsonl"), "train")

    @pytest.mark.parametrize("name, content", [("a.jsonl.gz", b"no gzip"), ("a.jsonl", b'{"document": "\xff"}')])
    def test_wrong_bytes(self, tmp_path, name, content):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="cannot be read.*must be UTF-8"):
            load_records(file_config(tmp_path / name), "train")

    def test_truncated_gzip(self, tmp_path):
        path = write(tmp_path / "a.jsonl.gz", "\n".join(json.dumps(ROWS[0]) for _ in range(200)))
        path.write_bytes(path.read_bytes()[:-30])
        with pytest.raises(DataError, match="cannot be read"):
            load_records(file_config(path), "train")

    def test_split_without_file(self, tmp_path):
        path = write(tmp_path / "a.jsonl", json.dumps(ROWS[0]))
        config = make_config(
            dataset="files", train_file=str(path), validation_file=str(path), final_split="validation"
        )
        with pytest.raises(DataError, match="set test_file"):
            load_records(config, "test")


class TestHub:
    def test_reads_the_parquet_branch(self, monkeypatch):
        seen = {}

        def fake(name, **options):
            seen.update(name=name, **options)
            return Dataset.from_dict({"summary": ["a", "b"], "document": ["c", "d"], "id": [1, 2], "x": [0, 0]})

        monkeypatch.setattr(data, "load_dataset", fake)
        rows = load_records(make_config(dataset="hub", max_eval_examples=1), "test")
        assert rows.to_list() == [{"id": "1", "document": "c", "summary": "a"}]
        assert seen == {"name": "EdinburghNLP/xsum", "revision": "refs/convert/parquet", "split": "test"}

    def test_unreachable(self, monkeypatch):
        def fake(name, **options):
            raise ConnectionError(f"Couldn't reach {name!r} on the Hub")

        monkeypatch.setattr(data, "load_dataset", fake)
        with pytest.raises(DataError, match="Couldn't reach.*dataset: files.*dataset: generated"):
            load_records(make_config(dataset="hub"), "train")

    def test_missing_column(self, monkeypatch):
        monkeypatch.setattr(data, "load_dataset", lambda *_, **__: Dataset.from_dict({"article": ["a"]}))
        with pytest.raises(DataError, match="no 'document', only article"):
            load_records(make_config(dataset="hub", dataset_name="a/b"), "train")


class TestTokenizer:
    def test_trained_like_barts(self, tokenizer, records):
        assert [tokenizer.convert_tokens_to_ids(t) for t in ("<s>", "<pad>", "</s>", "<unk>")] == [0, 1, 2, 3]
        assert (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1, 2)
        assert len(tokenizer) == 600
        for text in (records["document"][0], "Grüße, £5 – ok"):
            ids = tokenizer(text)["input_ids"]
            assert ids[0] == 0 and ids[-1] == 2
            assert tokenizer.decode(ids, skip_special_tokens=True) == text

    def test_training_repeats(self, tokenizer, records):
        assert train_tokenizer(records, 600).get_vocab() == tokenizer.get_vocab()

    def test_survives_saving(self, tokenizer, records, tmp_path):
        tokenizer.save_pretrained(tmp_path)
        text = records["document"][1]
        for loaded in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(file_less(tmp_path), records)):
            assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
            assert loaded.pad_token_id == 1

    @pytest.mark.parametrize("model_end, pad_id", [("bart", 1), ("gpt2", 0)])
    def test_bare_vocabulary(self, tokenizer, records, tmp_path, model_end, pad_id):
        tokenizer.backend_tokenizer.model.save(str(tmp_path))
        if model_end == "gpt2":
            edit_vocabulary(tmp_path, {"<s>": "<|endoftext|>", "<pad>": "<a>", "</s>": "<b>", "<unk>": "<c>"})
        loaded = load_tokenizer(file_less(tmp_path), records)
        assert loaded.pad_token_id == pad_id
        assert loaded.eos_token_id == (2 if model_end == "bart" else 0)
        assert loaded.padding_side == "right"
        text = records["summary"][0]
        inner = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert loaded(text, add_special_tokens=False)["input_ids"] == inner
        assert loaded(text)["input_ids"] == ([0, *inner, 2] if model_end == "bart" else inner)

    def test_bare_vocabulary_of_another_kind(self, tokenizer, records, tmp_path):
        tokenizer.backend_tokenizer.model.save(str(tmp_path))
        edit_vocabulary(tmp_path, {"<s>": "[CLS]"})
        with pytest.raises(DataError, match="neither BART's special tokens"):
            load_tokenizer(file_less(tmp_path), records)

    def test_stored_truncation_is_not_applied(self, tokenizer, records, tmp_path):
        # Pegasus' tokenizer.json holds a truncation at 192 tokens, left over from its training.
        tokenizer.save_pretrained(tmp_path)
        stored = json.loads((tmp_path / "tokenizer.json").read_text())
        stored["truncation"] = {"max_length": 8, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
        (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
        config = make_config(tokenizer=str(tmp_path), max_source_length=50)
        tokens = tokenize_records(records.select([0]), load_tokenizer(config, records), config, "seq2seq")
        assert len(tokens["input_ids"][0]) == 50

    def test_no_end_token(self, tokenizer, records, tmp_path):
        tokenizer.save_pretrained(tmp_path)
        path = tmp_path / "tokenizer_config.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "eos_token"}))
        with pytest.raises(DataError, match="no end token"):
            load_tokenizer(file_less(tmp_path), records)

    def test_nothing_there(self, records, tmp_path):
        with pytest.raises(DataError, match="cannot load tokenizer.*vocab.json and merges.txt"):
            load_tokenizer(file_less(tmp_path), records)


def file_less(folder):
    return make_config(tokenizer=str(folder))


def edit_vocabulary(folder, renamed):
    vocabulary = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps({renamed.get(token, token): i for token, i in vocabulary.items()}))


class TestTokenIds:
    def test_seq2seq(self, records, tokenizer):
        config = make_config(max_source_length=100, max_target_length=12)
        tokens = tokenize_records(records, tokenizer, config, "seq2seq")
        assert set(tokens.column_names) == {"id", "input_ids", "labels", "length"}
        assert tokens["id"][:] == records["id"][:]
        for row, record in zip(tokens, records, strict=True):
            whole = tokenizer(record["document"])["input_ids"]
            assert row["input_ids"] == (whole if len(whole) <= 100 else whole[:99] + [2])
            assert row["labels"][0] == 0 and row["labels"][-1] == 2 and len(row["labels"]) == 12
            assert row["length"] == len(row["input_ids"]) <= 100

    def test_causal(self, records, tokenizer):
        config = make_config(max_source_length=80, max_target_length=15, prompt_template="News: {document}\nTL;DR:")
        before = tokenizer("News: ")["input_ids"][:-1]
        after = tokenizer("\nTL;DR:", add_special_tokens=False)["input_ids"]
        for row, record in zip(tokenize_records(records, tokenizer, config, "causal"), records, strict=True):
            prompt, target = row["prompt_ids"], row["labels"][len(row["prompt_ids"]) :]
            assert len(prompt) <= 80 and prompt[: len(before)] == before and prompt[-len(after) :] == after
            text = tokenizer.decode(prompt[len(before) : -len(after)])
            assert record["document"].startswith(text.rstrip("\ufffd"))
            assert row["input_ids"] == prompt + target
            assert row["labels"][: len(prompt)] == [-100] * len(prompt)
            assert target[-1] == 2 and len(target) <= 15
            assert (" " + record["summary"]).startswith(tokenizer.decode(target[:-1]))
            assert row["length"] == len(row["input_ids"])

    @pytest.mark.parametrize(
        "template, message",
        [("TL;DR:", r"has no \{document\}"), ("{document}" + " summary" * 40, "leaves no room")],
    )
    def test_prompt_errors(self, records, tokenizer, template, message):
        config = make_config(prompt_template=template, max_source_length=30)
        with pytest.raises(DataError, match=message):
            tokenize_records(records, tokenizer, config, "causal")


def alone(rows, collator, model):
    return sum(summed_loss(model, collator([row]), 0.0) for row in rows)


class TestCollators:
    def test_seq2seq_padding_changes_no_loss(self, records, tokenizer):
        config = make_config(max_source_length=64)
        torch.manual_seed(0)
        fields = {k: v for k, v in BART.items() if k != "model_type"}
        model = BartForConditionalGeneration(BartConfig(**fields, vocab_size=600)).eval().double()
        collator = Seq2SeqCollator(tokenizer, model=model)
        tokens = tokenize_records(records.map(cut_some, with_indices=True), tokenizer, config, "seq2seq")
        rows = [tokens[i] for i in range(4)]
        batch = collator(rows)
        assert set(batch) == {"input_ids", "attention_mask", "labels", "decoder_input_ids"}
        assert batch["input_ids"].shape == (4, max(row["length"] for row in rows))
        assert batch["attention_mask"].sum(1).tolist() == [row["length"] for row in rows]
        assert (batch["labels"] != -100).sum(1).tolist() == [len(row["labels"]) for row in rows]
        assert batch["decoder_input_ids"][:, 0].tolist() == [2] * 4
        assert len({row["length"] for row in rows}) > 1 and len({len(row["labels"]) for row in rows}) > 1
        torch.testing.assert_close(summed_loss(model, batch, 0.0), alone(rows, collator, model))

    def test_causal_end_token_counts_where_it_pads(self, records, tokenizer, tmp_path):
        tokenizer.backend_tokenizer.model.save(str(tmp_path))
        edit_vocabulary(tmp_path, {"<s>": "<|endoftext|>", "<pad>": "<a>", "</s>": "<b>", "<unk>": "<c>"})
        config = make_config(tokenizer=str(tmp_path), max_source_length=64)
        gpt2 = load_tokenizer(config, records)
        assert gpt2.pad_token_id == gpt2.eos_token_id
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=600)).eval().double()
        tokens = tokenize_records(records.map(cut_some, with_indices=True), gpt2, config, "causal")
        rows = [tokens[i] for i in range(4)]
        collator = CausalCollator(gpt2)
        batch = collator(rows)
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        assert (batch["labels"] == gpt2.eos_token_id).sum(1).tolist() == [1] * 4
        assert batch["attention_mask"].sum(1).tolist() == [row["length"] for row in rows]
        assert bool((batch["attention_mask"][:, 0] == 1).all())  # padded on the right
        torch.testing.assert_close(summed_loss(model, batch, 0.0), alone(rows, collator, model))


def cut_some(row, index):
    """Documents and summaries of different, small lengths."""
    return {"document": row["document"][: 30 * (index + 1)], "summary": row["summary"][: 20 * (index + 1)]}


class TestEpochBatches:
    @pytest.mark.parametrize("group_by_length", [True, False])
    @pytest.mark.parametrize("count, batch_size", [(1000, 7), (64, 64), (3, 8), (1, 1), (0, 4)])
    def test_every_example_once(self, group_by_length, count, batch_size):
        lengths = [(i * 37) % 101 for i in range(count)]
        batches = epoch_batches(lengths, batch_size, seed=1, epoch=0, group_by_length=group_by_length, window=5)
        assert sorted(index for batch in batches for index in batch) == list(range(count))
        assert sorted(map(len, batches), reverse=True)[:-1] == [batch_size] * (len(batches) - 1)

    @pytest.mark.parametrize("group_by_length", [True, False])
    def test_pure_and_new_in_each_epoch(self, group_by_length):
        lengths = [(i * 37) % 101 for i in range(200)]

        def batches(**options):
            return epoch_batches(lengths, 8, **{"seed": 0, "epoch": 0, "group_by_length": group_by_length, **options})

        assert batches() == batches()
        assert batches() != batches(epoch=1) != batches(seed=1)
        assert {frozenset(batch) for batch in batches()} != {frozenset(batch) for batch in batches(epoch=1)}

    def test_grouping_saves_padding_but_stays_mixed(self):
        lengths = [len(row["document"].split()) for row in generate_corpus(800, 0, "train")]

        def padded(group):
            batches = epoch_batches(lengths, 16, seed=0, epoch=0, group_by_length=group)
            return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches), batches

        grouped, batches = padded(True)
        plain, _ = padded(False)
        assert sum(lengths) / grouped > 0.93
        assert sum(lengths) / plain < 0.6
        means = [statistics.mean(lengths[i] for i in batch) for batch in batches]
        assert means != sorted(means)
