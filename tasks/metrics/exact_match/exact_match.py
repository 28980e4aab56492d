"""Exact match with the options of evaluate's own metric of that name that open-instruct uses."""

import statistics
import string

import datasets
import evaluate

WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


class ExactMatch(evaluate.Metric):
    """Whether prediction and reference are the same text."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="The share of predictions that equal their reference, character by character.",
            citation="",
            inputs_description=(
                "predictions, references: a list of texts each. ignore_case, ignore_punctuation (ASCII): what does "
                "not count. average: False for the list of each item's value instead of the mean."
            ),
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
            reference_urls=["https://huggingface.co/spaces/evaluate-metric/exact_match"],
        )

    def _compute(
        self,
        predictions: list[str],
        references: list[str],
        ignore_case: bool = False,
        ignore_punctuation: bool = False,
        average: bool = True,
    ) -> dict[str, float | list[bool]]:
        def normalise(text: str) -> str:
            text = text.lower() if ignore_case else text
            return text.translate(WITHOUT_PUNCTUATION) if ignore_punctuation else text

        matches = [normalise(p) == normalise(r) for p, r in zip(predictions, references, strict=True)]
        return {"exact_match": statistics.fmean(matches) if average else matches}
