"""pass@k: whether one of k programs passes, estimated without bias from more of them (Chen et al., arXiv 2107.03374).

Running the programs is not its part: it is given which of them passed.
"""

import math
import statistics

import datasets
import evaluate


def pass_at_k(n: int, passed: int, k: int) -> float:
    """Probability that one of k programs, drawn from n of which some passed, is among these (equation 1)."""
    return 1.0 - math.comb(n - passed, k) / math.comb(n, k)


class PassAtK(evaluate.Metric):
    """pass@k of each problem."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="The probability that at least one of k sampled programs passes its tests.",
            citation="",
            inputs_description=(
                "predictions: for each problem a list of bools, whether each of its programs passed. k: programs "
                "drawn. average: False for the list of each problem's value instead of the mean."
            ),
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("bool"))}),
            reference_urls=["https://arxiv.org/abs/2107.03374"],
        )

    def _compute(
        self, predictions: list[list[bool]], k: int = 1, average: bool = True
    ) -> dict[str, float | list[float]]:
        if (fewest := min(map(len, predictions))) < k:
            raise ValueError(f"pass@{k} needs at least {k} programs of each problem, got {fewest}")
        values = [pass_at_k(len(passed), sum(passed), k) for passed in predictions]
        return {f"pass@{k}": statistics.fmean(values) if average else values}
