"""F1 and exact match of extracted answers, as SQuAD v1.1 defines them (Rajpurkar et al., arXiv 1606.05250)."""

import re
import statistics
import string
from collections import Counter

import datasets
import evaluate


def words(text: str) -> list[str]:
    """SQuAD's normal form: lower case, no punctuation (of ASCII), no English articles."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def f1(prediction: list[str], reference: list[str]) -> float:
    """Harmonic mean of precision and recall of two bags of words; 0 where they share none, even if both are empty."""
    common = sum((Counter(prediction) & Counter(reference)).values())
    return 2 * common / (len(prediction) + len(reference)) if common else 0.0


class SquadF1(evaluate.Metric):
    """The best F1 and exact match of each prediction over its references."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="F1 of the words, and exact match, of short answers, the best over several references.",
            citation="",
            inputs_description=(
                "predictions: a list of texts. references: for each a list of texts, of which one is enough. average: "
                "False for the list of each item's value instead of the mean. Both are fractions, not percentages."
            ),
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
            ),
            reference_urls=["https://arxiv.org/abs/1606.05250"],
        )

    def _compute(
        self, predictions: list[str], references: list[list[str]], average: bool = True
    ) -> dict[str, float | list]:
        pairs = [(words(p), [words(r) for r in rs]) for p, rs in zip(predictions, references, strict=True)]
        values = {
            "f1": [max(f1(prediction, r) for r in references) for prediction, references in pairs],
            "exact_match": [prediction in references for prediction, references in pairs],
        }
        return {name: statistics.fmean(value) for name, value in values.items()} if average else values
