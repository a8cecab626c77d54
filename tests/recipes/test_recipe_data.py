"""The XSum recipe's data: generated corpus, token ids, collators, order of an epoch."""

import hashlib
import json
import statistics

import pytest
import torch
from recipe_inputs import (
    BART,
    edit_vocabulary,
    generated_records,  # noqa: F401 - a fixture
    make_config,
    trained_tokenizer,  # noqa: F401 - a fixture
)
from transformers import BartConfig, BartForConditionalGeneration, GPT2Config, GPT2LMHeadModel

from recipes.xsum import corpus
from recipes.xsum.corpus import generate_corpus
from recipes.xsum.data import (
    CausalCollator,
    Seq2SeqCollator,
    epoch_batches,
    tokenize_records,
)
from recipes.xsum.model import summed_loss
from recipes.xsum.records import DataError, load_records
from recipes.xsum.tokenizer import load_tokenizer

DIGEST = "90906c5a12d55d561881a38ac5d2c5e083d3c19ae5604b3884173281334bbbf5"


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

    def test_prompt_that_leaves_no_room(self, records, tokenizer):
        config = make_config(prompt_template="{document}" + " summary" * 40, max_source_length=30)
        with pytest.raises(DataError, match="leaves no room"):
            tokenize_records(records, tokenizer, config, "causal")

    @pytest.mark.parametrize("name", ["max_source_length", "max_target_length"])
    def test_lengths_that_leave_no_room(self, records, tokenizer, name):
        with pytest.raises(DataError, match=f"{name} 2 leaves no room for text.*adds 2 special tokens.*raise {name}"):
            tokenize_records(records, tokenizer, make_config(**{name: 2}), "seq2seq")


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
