"""The XSum recipe's evaluation: ROUGE, loss, generation, and the script that scores a run."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.scoring import BootstrapAggregator

from recipes.xsum import evaluate
from recipes.xsum.config import Config
from recipes.xsum.corpus import generate_corpus
from recipes.xsum.data import CausalCollator, Seq2SeqCollator, tokenize_records
from recipes.xsum.evaluate import evaluate_loss, generate_summaries, loss_batches
from recipes.xsum.model import build_model, summed_loss
from recipes.xsum.records import load_records
from recipes.xsum.rouge import KINDS, rouge_scores
from recipes.xsum.tokenizer import load_tokenizer, pretrained_tokenizer

ROOT = Path(__file__).parents[2]
MODELS = {
    "seq2seq": {"model_type": "bart", "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
                "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
                "decoder_ffn_dim": 32, "init_std": 0.3},
    "causal": {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "initializer_range": 0.3},
}  # fmt: skip


class TestRouge:
    def test_by_hand(self):
        # Stems: run, run; "the cat" is missing. 4 words predicted, 6 wanted, 4 in common, 3 pairs in common.
        scores = rouge_scores(["dogs run through gardens"], ["the cat dog running through garden"])
        precision, recall = 4 / 4, 4 / 6
        assert scores["rouge1"]["score"] == pytest.approx(100 * 2 * precision * recall / (precision + recall))
        precision, recall = 3 / 3, 3 / 5
        assert scores["rouge2"]["score"] == pytest.approx(100 * 2 * precision * recall / (precision + recall))
        assert scores["rougeL"] == scores["rougeLsum"] == scores["rouge1"]

    def test_order_of_sentences_matters_only_to_rouge_l(self):
        scores = rouge_scores(["Rain fell. Trains stopped!"], ["Trains stopped! Rain fell."])
        assert scores["rougeL"]["score"] == pytest.approx(50)
        assert scores["rougeLsum"]["score"] == pytest.approx(100)

    def test_agrees_with_rouge_scores_own_aggregator(self):
        rows = generate_corpus(60, 0, "train")
        references = [row["summary"] for row in rows]
        predictions = [row["document"].split("\n")[0] for row in rows]
        aggregator, scorer = BootstrapAggregator(n_samples=2000), RougeScorer(KINDS, use_stemmer=True)
        for prediction, reference in zip(predictions, references, strict=True):
            aggregator.add_scores(scorer.score(reference, prediction))
        np.random.seed(0)
        theirs = aggregator.aggregate()
        for kind, ours in rouge_scores(predictions, references, bootstrap_samples=2000).items():
            # Two bootstraps of 2,000 resamplings: their quantiles differ by a fraction of the interval's width.
            noise = 0.1 * (ours["high"] - ours["low"]) + 1e-9
            assert ours["low"] < ours["score"] < ours["high"]
            assert ours["score"] == pytest.approx(100 * theirs[kind].mid.fmeasure, abs=noise)
            assert ours["low"] == pytest.approx(100 * theirs[kind].low.fmeasure, abs=noise)
            assert ours["high"] == pytest.approx(100 * theirs[kind].high.fmeasure, abs=noise)

    def test_seed_moves_the_interval_only(self):
        predictions, references = ["a b", "c d e", "x"], ["a c", "c d", "y x"]
        first, again, other = (
            rouge_scores(predictions, references, bootstrap_samples=50, seed=seed) for seed in (3, 3, 4)
        )
        assert first == again != other
        assert [first[kind]["score"] for kind in KINDS] == [other[kind]["score"] for kind in KINDS]

    def test_empty_prediction_scores_nothing(self):
        assert rouge_scores([""], ["some words"])["rouge1"] == {"score": 0, "low": 0, "high": 0}

    @pytest.mark.parametrize(
        "predictions, references, message", [(["a"], [], "1 predictions for 0"), ([], [], "no predictions")]
    )
    def test_errors(self, predictions, references, message):
        with pytest.raises(ValueError, match=message):
            rouge_scores(predictions, references)


class Setup:
    """A tiny model with large random weights, which writes something else for each document."""

    def __init__(self, architecture, examples=7, **options):
        self.config = Config(
            **{
                "model_config": MODELS[architecture],
                "attn_implementation": "sdpa",
                "vocab_size": 400,
                "max_source_length": 150,
                "generated_examples": 30,
                "max_eval_examples": examples,
                "per_device_eval_batch_size": 3,
                "num_beams": 2,
                "max_new_tokens": 8,
                "min_new_tokens": 2,
                "no_repeat_ngram_size": 3,
                "bootstrap_samples": 20,
                **options,
            }
        )
        self.tokenizer = load_tokenizer(self.config, load_records(self.config, "train"))
        self.records = load_records(self.config, "test")
        self.dataset = tokenize_records(self.records, self.tokenizer, self.config, architecture)
        torch.manual_seed(0)
        self.model = build_model(self.config, self.tokenizer)
        collator = Seq2SeqCollator if architecture == "seq2seq" else CausalCollator
        self.collator = collator(self.tokenizer, model=self.model)

    def loss(self, accelerator, batch_size=3):
        batches = loss_batches(self.dataset, self.collator, batch_size, accelerator)
        return evaluate_loss(self.model, batches, accelerator)

    def summaries(self, accelerator):
        return generate_summaries(self.model, self.tokenizer, self.dataset, self.config, accelerator)


@pytest.fixture(scope="module", params=["seq2seq", "causal"])
def setup(request):
    return Setup(request.param)


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


class TestLoss:
    def test_every_token_counts_alike(self, setup, accelerator):
        setup.model.eval()
        loss = tokens = 0
        with torch.no_grad():
            for row in setup.dataset:
                loss += summed_loss(setup.model, setup.collator([row]), 0.0).item()
                tokens += sum(label != -100 for label in row["labels"])
        for batch_size in (1, 3, 100):
            assert setup.loss(accelerator, batch_size) == pytest.approx(loss / tokens, rel=1e-5)

    def test_no_dropout_and_mode_restored(self, setup, accelerator):
        setup.model.train()
        first = setup.loss(accelerator)
        assert setup.model.training
        assert setup.loss(accelerator) == first

    def test_no_tokens(self, setup, accelerator):
        with pytest.raises(ValueError, match="no target token"):
            evaluate_loss(setup.model, [], accelerator)


class TestGeneration:
    def test_batches_change_nothing(self, setup, accelerator):
        written = setup.summaries(accelerator)
        assert len(set(written)) > 3 and all(written)
        setup.model.eval()
        for i, row in enumerate(setup.dataset):
            prompt = torch.tensor([row.get("prompt_ids") or row["input_ids"]])
            options = {"num_beams": 2, "max_new_tokens": 8, "min_new_tokens": 2, "no_repeat_ngram_size": 3}
            output = setup.model.generate(
                prompt, attention_mask=torch.ones_like(prompt), pad_token_id=1, eos_token_id=2, **options
            )[0]
            if "prompt_ids" in row:
                output = output[prompt.shape[1] :]
            text = setup.tokenizer.decode(output, skip_special_tokens=True)
            assert written[i] == " ".join(text.split())

    def test_mode_restored(self, setup, accelerator):
        setup.model.train()
        setup.summaries(accelerator)
        assert setup.model.training

    def test_options_reach_the_search(self, accelerator):
        setup = Setup("seq2seq", examples=2)
        seen = {}
        generate = setup.model.generate
        setup.model.generate = lambda **options: seen.update(options) or generate(**options)
        setup.summaries(accelerator)
        assert {name: seen[name] for name in ("num_beams", "max_new_tokens", "min_new_tokens", "do_sample")} == {
            "num_beams": 2,
            "max_new_tokens": 8,
            "min_new_tokens": 2,
            "do_sample": False,
        }
        assert seen["length_penalty"] == 1.0 and seen["no_repeat_ngram_size"] == 3


class Rank:
    """What evaluate_loss needs of an Accelerator, for one process of several; `reduce` sees one share only."""

    def __init__(self, process_index, num_processes):
        self.process_index, self.num_processes = process_index, num_processes
        self.device, self.totals = torch.device("cpu"), []

    def autocast(self):
        return contextlib.nullcontext()

    def reduce(self, totals, reduction):
        assert reduction == "sum"
        self.totals = totals
        return torch.ones(2)


@pytest.mark.parametrize("num_processes", [2, 5])
def test_shares_add_up(setup, accelerator, num_processes):
    # 7 documents make three batches of 3: for five processes, two have nothing of their own to count.
    ranks = [Rank(index, num_processes) for index in range(num_processes)]
    counts = []
    for rank in ranks:
        batches = list(loss_batches(setup.dataset, setup.collator, 3, rank))
        evaluate_loss(setup.model, batches, rank)
        counts.append(len(batches))
    assert len(set(counts)) == 1
    loss, tokens = sum(rank.totals for rank in ranks).tolist()
    assert tokens == sum(label != -100 for row in setup.dataset for label in row["labels"])
    assert loss / tokens == pytest.approx(setup.loss(accelerator), rel=1e-5)


@pytest.fixture
def run_dir(setup, tmp_path):
    """What train.py leaves of a finished run."""
    config = dataclasses.replace(setup.config, output_dir=str(tmp_path / "run"), corpus_seed=0)
    run_dir = tmp_path / "run"
    setup.tokenizer.save_pretrained(run_dir / "tokenizer")
    setup.model.save_pretrained(run_dir / "model")
    (run_dir / "config.yaml").write_text(config.to_yaml())
    return run_dir


def read(run_dir):
    rows = [json.loads(line) for line in (run_dir / "predictions.jsonl").read_text().splitlines()]
    return rows, json.loads((run_dir / "rouge.json").read_text())


def empty(folder, besides=""):
    for path in folder.iterdir():
        if path.name != besides:
            path.unlink()


def larger_tokenizer(folder):
    tokenizer = pretrained_tokenizer(folder)
    tokenizer.add_tokens(["<another>"])
    tokenizer.save_pretrained(folder)


class TestScript:
    def test_writes_scores_and_predictions(self, setup, accelerator, run_dir, capsys):
        assert evaluate.main([str(run_dir)]) == 0
        rows, scores = read(run_dir)
        assert [row["id"] for row in rows] == setup.records["id"][:]
        assert [row["reference"] for row in rows] == setup.records["summary"][:]
        assert [row["prediction"] for row in rows] == setup.summaries(accelerator)
        assert (scores["split"], scores["examples"]) == ("test", 7)
        expected = rouge_scores(
            [row["prediction"] for row in rows], [row["reference"] for row in rows], bootstrap_samples=20
        )
        assert {kind: scores[kind] for kind in KINDS} == expected
        assert f"{expected['rouge1']['score']:.2f}" in capsys.readouterr().out
        assert not list(run_dir.glob("*.partial"))

    def test_untrained_joins_the_trained(self, run_dir):
        assert evaluate.main([str(run_dir), "--checkpoint", "untrained"]) == 0
        assert not (run_dir / "predictions.jsonl").exists()
        assert evaluate.main([str(run_dir)]) == 0
        rows, both = read(run_dir)
        assert {"untrained", *KINDS} <= both.keys()
        # The fixture's model is the one that the seed makes, so training changed nothing.
        assert both["untrained"] == {kind: both[kind] for kind in KINDS}
        assert evaluate.main([str(run_dir), "--checkpoint", "untrained"]) == 0
        assert read(run_dir) == (rows, both)

    def test_scores_of_other_documents_do_not_mix(self, run_dir):
        evaluate.main([str(run_dir), "--checkpoint", "untrained"])
        evaluate.main([str(run_dir), "--split", "validation", "--max_eval_examples", "2"])
        rows, scores = read(run_dir)
        assert len(rows) == 2 and rows[0]["id"] == "validation-000000"
        assert (scores["split"], scores["examples"]) == ("validation", 2)
        assert "untrained" not in scores

    @pytest.mark.parametrize("setup", ["seq2seq"], indirect=True)
    def test_two_processes_write_what_one_writes(self, run_dir):
        # As a user starts it, from elsewhere, without the repository on the path.
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONPATH", None)
        script = [str(ROOT / "recipes/xsum/evaluate.py"), str(run_dir)]
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        done = subprocess.run(
            [sys.executable, *launch, *script], cwd=run_dir, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("rouge1") == 1
        parallel = read(run_dir)
        assert evaluate.main([str(run_dir)]) == 0
        assert read(run_dir) == parallel

    @pytest.mark.parametrize(
        "spoil, arguments, message",
        [
            (lambda run: (run / "config.yaml").unlink(), [], "cannot read config"),
            (lambda run: (run / "model").rename(run / "gone"), [], "has no model/: finish the run with train.py"),
            (lambda run: empty(run / "tokenizer"), [], "cannot load tokenizer"),
            (lambda run: empty(run / "tokenizer", besides="tokenizer_config.json"), [], "cannot load tokenizer"),
            (lambda run: empty(run / "tokenizer"), ["--checkpoint", "untrained"], "cannot load tokenizer"),
            (
                lambda run: (run / "model/model.safetensors").write_bytes(b"0" * 9),
                [],
                "/model with attn_implementation",
            ),
            (lambda run: larger_tokenizer(run / "tokenizer"), [], "entries, but the model's vocab_size is"),
            (lambda run: None, ["--max_eval_examples", "0"], "max_eval_examples must be at least 1"),
        ],
    )
    def test_errors(self, run_dir, capsys, spoil, arguments, message):
        spoil(run_dir)
        assert evaluate.main([str(run_dir), *arguments]) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ") and message in error and "\n" not in error
        assert not (run_dir / "rouge.json").exists()
