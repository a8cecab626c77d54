"""ROUGE with confidence intervals: the scorer is rouge-score's, which needs no download."""

import re
from collections.abc import Sequence

import numpy as np
from rouge_score.rouge_scorer import RougeScorer

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
# rouge-score would split sentences for rougeLsum with NLTK's model, which is a download. Summaries of XSum are one
# sentence, so the end of a sentence is taken from its punctuation.
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def rouge_scores(
    predictions: Sequence[str], references: Sequence[str], *, bootstrap_samples: int = 1000, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Mean F-measure in points (x 100), with stemming, and its 95 % interval, for each of `KINDS`.

    The score is the mean over examples, as `evaluate`'s metric gives with `use_aggregator=False`. Low and high are
    percentiles of the mean over `bootstrap_samples` resamplings of the examples, drawn with `seed`.

    Returns:
        `{"rouge1": {"score": ..., "low": ..., "high": ...}, ...}`

    Raises:
        ValueError: no predictions, or not one for each reference.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references; each needs one")
    if not predictions:
        raise ValueError("no predictions to score")
    scorer = RougeScorer(KINDS, use_stemmer=True)
    rows = [
        scorer.score(_one_sentence_a_line(reference), _one_sentence_a_line(prediction))
        for prediction, reference in zip(predictions, references, strict=True)
    ]
    points = np.array([[100 * row[kind].fmeasure for kind in KINDS] for row in rows])
    generator = np.random.default_rng(seed)
    means = np.array(
        [points[generator.integers(len(points), size=len(points))].mean(axis=0) for _ in range(bootstrap_samples)]
    )
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return {
        kind: {"score": float(score), "low": float(low[i]), "high": float(high[i])}
        for i, (kind, score) in enumerate(zip(KINDS, points.mean(axis=0), strict=True))
    }


def _one_sentence_a_line(text: str) -> str:
    return _SENTENCE_END.sub("\n", text.strip())
