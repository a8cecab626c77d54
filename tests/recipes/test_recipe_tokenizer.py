"""The XSum recipe's tokenizers: trained, loaded, bare vocabularies, and those that cannot read the documents."""

import json

import pytest
from datasets import Dataset
from recipe_inputs import (
    BART,
    edit_vocabulary,
    generated_records,  # noqa: F401 - a fixture
    make_config,
    trained_tokenizer,  # noqa: F401 - a fixture
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, BartConfig, ByT5Tokenizer, PreTrainedTokenizerFast

from recipes.xsum.data import tokenize_records
from recipes.xsum.records import DataError
from recipes.xsum.tokenizer import (
    _known_characters,
    check_tokenizer,
    load_tokenizer,
    train_tokenizer,
    vocabulary_size,
)


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

    def test_broken_files(self, records, tmp_path):
        (tmp_path / "tokenizer.json").write_text("{}")
        with pytest.raises(DataError, match="cannot load tokenizer .*; give a name on the Hub or a folder that holds"):
            load_tokenizer(file_less(tmp_path), records)

    def test_model_folder_without_a_tokenizer(self, records, tmp_path):
        """Transformers makes a tokenizer of five special tokens out of the model's config."""
        BartConfig(**{key: value for key, value in BART.items() if key != "model_type"}).save_pretrained(tmp_path)
        with pytest.raises(DataError, match="has an empty vocabulary: its files are missing there; set tokenizer to"):
            load_tokenizer(file_less(tmp_path), records)

    def test_gaps_in_the_vocabulary_count(self, tokenizer):
        assert vocabulary_size(tokenizer) == 600
        gaps = Tokenizer(models.WordLevel({"a": 0, "b": 7}, unk_token="a"))
        assert vocabulary_size(PreTrainedTokenizerFast(tokenizer_object=gaps)) == 8


class TestTokenizersThatCannotRead:
    def check(self, model, texts, **options):
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = options.pop("pre_tokenizer", pre_tokenizers.Whitespace())
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>", **options)
        rows = Dataset.from_dict({"id": ["0"] * len(texts), "document": texts, "summary": texts})
        tokenize_records(rows, fast, make_config(), "seq2seq")

    def test_words_that_are_unknown(self):
        words = models.WordLevel({"<unk>": 0, "</s>": 1, "the": 2, "a": 3}, unk_token="<unk>")
        self.check(words, ["the a the", "the"], unk_token="<unk>")
        self.check(words, ["the the a"] * 9 + ["storm"], unk_token="<unk>")
        with pytest.raises(
            DataError, match=r"cannot read the documents: its vocabulary of 4 covers 12 of 52 characters"
        ):
            self.check(words, ["the storm broke the river banks"], unk_token="<unk>")

    def test_letters_that_are_dropped(self):
        letters = {letter: i for i, letter in enumerate(["</s>", *"abcdefg"])}
        self.check(models.BPE(letters, []), ["bad cab", "face"])
        with pytest.raises(DataError, match="its vocabulary of 8 covers 0 of 12 characters; set tokenizer to the Hub"):
            self.check(models.BPE(letters, []), ["шторм."])

    def test_documents_of_special_tokens(self):
        with pytest.raises(DataError, match="covers 0 of 24 characters"):
            self.check(models.BPE({"</s>": 0, "a": 1}, []), ["</s></s> </s>"])

    def test_letters_of_several_bytes_count_once(self, tokenizer):
        rows = Dataset.from_dict({"id": ["0"], "document": ["шторм и 嵐"], "summary": ["É"]})
        check_tokenizer(tokenizer, rows)
        assert _known_characters(tokenizer, ["шторм и 嵐", "É"]) == 8

    def test_python_tokenizers_have_no_offsets(self):
        rows = Dataset.from_dict({"id": ["0"], "document": ["шторм"], "summary": ["嵐"]})
        check_tokenizer(ByT5Tokenizer(), rows)


def file_less(folder):
    return make_config(tokenizer=str(folder))
