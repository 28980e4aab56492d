"""Published scores in per cent, each with its source, for report.py. None is ours, and none is of the GMT paper."""

METAMATH = "README of meta-math/MetaMath"
MASKED_THOUGHT = "model card of MaskedThought, measured with MetaMath's scripts"
EVALPLUS = "EvalPlus leaderboard, results.json at 8741845 (MBPP+ v0.2.0)"
HFT = "HFT (arXiv 2404.18466), quoted from a reading note, not checked against the paper; subsets, see the README"
TULU2 = "Tulu 2 paper (arXiv 2311.10702), tables 1 to 3"


def _rows(keys: list[tuple[str, str]], source: str, table: dict[str, tuple]) -> list[tuple[str, str, str, float, str]]:
    return [
        (task, metric, model, value, source)
        for model, values in table.items()
        for (task, metric), value in zip(keys, values, strict=True)
        if value is not None
    ]


# (task, metric, model, score, source)
PUBLISHED = [
    *_rows(
        [("gsm8k", "correct"), ("hendrycks_math", "correct")],
        METAMATH,
        {
            "Llama-2-7B": (14.6, 2.5),
            "Llama-2-13B": (28.7, 3.9),
            "MetaMath-7B (Llama-2)": (66.5, 19.8),
            "MetaMath-13B (Llama-2)": (72.3, 22.4),
            "MetaMath-70B (Llama-2)": (82.3, 26.6),
            "MetaMath-Mistral-7B": (77.7, 28.2),
            "MetaMath-Llemma-7B": (69.2, 30.0),
        },
    ),
    *_rows(
        [("gsm8k", "correct"), ("hendrycks_math", "correct")],
        MASKED_THOUGHT,
        {"MetaMath-Mistral-7B, masked thought": (79.9, 29.0)},
    ),
    *_rows(
        [("humaneval_plus", "base"), ("humaneval_plus", "plus"), ("mbpp_plus", "base"), ("mbpp_plus", "plus")],
        EVALPLUS,
        {
            "Mistral-7B": (28.7, 23.8, 51.9, 42.1),
            "Llama-3-8B": (33.5, 29.3, 61.4, 51.6),
            "DeepSeek-Coder-6.7B": (47.6, 39.6, 72.0, 58.7),
            "DeepSeek-Coder-6.7B-instruct": (74.4, 71.3, 74.9, 65.6),
            "Magicoder-S-DS-6.7B": (76.8, 71.3, 79.4, 69.0),
            "Magicoder-S-CL-7B": (70.7, 67.7, 70.6, 60.1),
            "Mistral-7B-Instruct-v0.2": (42.1, 36.0, 44.7, 37.0),
        },
    ),
    *_rows(
        [
            ("mmlu", "correct"),
            ("gsm8k_8shot", "correct"),
            ("bbh", "correct"),
            ("tydiqa", "f1"),
            ("truthfulqa", "mc2"),
            ("humaneval_pass10", "pass@10"),
        ],
        HFT,
        {
            "Llama-2-7B": (41.6, 12.0, 39.9, 48.4, 38.5, 26.2),
            "Llama-2-7B, SFT on Tulu V2": (48.5, 25.0, 42.2, 51.2, 41.7, 36.9),
            "Llama-2-7B, HFT on Tulu V2": (50.8, 30.5, 43.6, 52.3, 45.4, 34.6),
            "Llama-2-13B, SFT on Tulu V2": (50.6, 45.0, 47.8, 55.0, 42.6, 42.4),
            "Llama-2-13B, HFT on Tulu V2": (54.5, 46.5, 53.7, 56.7, 45.7, 43.5),
        },
    ),
    *_rows(
        [
            ("mmlu", "correct"),
            ("gsm8k_8shot", "correct"),
            ("bbh", "correct"),
            ("tydiqa", "f1"),
            ("humaneval_pass10", "pass@10"),
        ],
        TULU2,
        {
            "Llama-2-7B": (41.8, 12.0, 39.3, 51.2, 26.8),
            "Tulu-2-7B": (50.4, 34.0, 48.5, 46.4, 36.9),
            "Tulu-2-DPO-7B": (50.7, 34.5, 45.5, 44.5, 40.0),
            "Llama-2-13B": (52.0, 25.0, 48.9, 56.5, 32.5),
            "Tulu-2-13B": (55.4, 46.0, 49.5, 53.2, 49.0),
            "Tulu-2-DPO-13B": (55.3, 49.5, 49.4, 39.7, 48.9),
        },
    ),
]
