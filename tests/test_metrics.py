"""Our metrics for the evaluate library, against slow obvious code: pytest tests/test_metrics.py"""

import itertools
import random
import re
import string
from fractions import Fraction

import evaluate
import pytest
from conftest import ROOT, python

from tasks import metrics
from tasks.metrics import per_item

FOLDER = ROOT / "tasks" / "metrics"
OPTIONS = [(False, False), (True, False), (False, True), (True, True)]


def texts(n, pieces):
    rng = random.Random(0)
    return ["".join(rng.choice(pieces) for _ in range(rng.randint(0, 3))) for _ in range(n)]


@pytest.mark.parametrize(("ignore_case", "ignore_punctuation"), OPTIONS)
def test_exact_match(ignore_case, ignore_punctuation):
    pieces = ["a", "A", "é", "É", " ", ".", "-", "!", "。"]  # only ASCII's punctuation counts as such
    predictions, references = texts(400, pieces), texts(400, pieces)[::-1]

    def slow(text):
        text = text.lower() if ignore_case else text
        return [c for c in text if not (ignore_punctuation and c in string.punctuation)]

    expected = [slow(p) == slow(r) for p, r in zip(predictions, references, strict=True)]
    options = {"ignore_case": ignore_case, "ignore_punctuation": ignore_punctuation}
    got = per_item("exact_match", predictions=predictions, references=references, **options)
    assert got == {"exact_match": expected} and 10 < sum(expected) < 390
    metric = evaluate.load(str(FOLDER / "exact_match"))
    got = metric.compute(predictions=predictions, references=references, **options)
    assert got == {"exact_match": pytest.approx(sum(expected) / 400)}


def slow_f1(prediction, reference):
    """Precision and recall, word by word."""
    said, wanted = slow_words(prediction), slow_words(reference)
    left = list(wanted)
    for word in said:
        if word in left:
            left.remove(word)
    common = len(wanted) - len(left)
    if not common:
        return 0.0
    precision, recall = common / len(said), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def slow_words(text):
    text = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split()).split()


def test_squad_f1_is_the_best_over_the_references():
    pieces = ["the ", "a ", "Paris ", "paris, ", "in ", "Rome", "তিনি ", "ঢাকা ", " "]
    predictions = texts(300, pieces)
    references = [[a, b] for a, b in zip(texts(300, pieces)[::-1], texts(300, pieces[2:]), strict=True)]
    pairs = list(zip(predictions, references, strict=True))
    f1 = [max(slow_f1(p, r) for r in rs) for p, rs in pairs]
    exact = [any(slow_words(p) == slow_words(r) for r in rs) for p, rs in pairs]
    got = per_item("squad_f1", predictions=predictions, references=references)
    assert got["f1"] == pytest.approx(f1) and got["exact_match"] == exact
    assert 10 < sum(exact) < 290 and any(0 < value < 1 for value in f1)
    mean = evaluate.load(str(FOLDER / "squad_f1")).compute(predictions=predictions, references=references)
    assert mean == {"f1": pytest.approx(sum(f1) / 300), "exact_match": pytest.approx(sum(exact) / 300)}


def test_squad_f1_by_hand():
    got = per_item("squad_f1", predictions=["তিনি ঢাকা", "the cat sat", ""], references=[["ঢাকা"], ["cat"], ["the"]])
    assert got["f1"] == pytest.approx([2 / 3, 2 / 3, 0.0]) and got["exact_match"] == [False, False, True]


def test_pass_at_k_is_the_share_of_draws_with_a_program_that_passes():
    for n, passed, k in [(1, 0, 1), (1, 1, 1), (5, 2, 1), (5, 2, 3), (6, 1, 4), (6, 5, 2), (4, 4, 2)]:
        draws = list(itertools.combinations([i < passed for i in range(n)], k))
        share = Fraction(sum(map(any, draws)), len(draws))
        got = per_item("pass_at_k", predictions=[[i < passed for i in range(n)]], k=k)
        assert got[f"pass@{k}"] == pytest.approx([float(share)], abs=1e-15)
    of_two = [[i == 7 for i in range(20)], [i < 10 for i in range(20)]]
    assert per_item("pass_at_k", predictions=of_two, k=10)["pass@10"] == pytest.approx([0.5, 1 - 1 / 184756])
    mean = evaluate.load(str(FOLDER / "pass_at_k")).compute(predictions=of_two, k=10)
    assert mean == {"pass@10": pytest.approx((0.5 + 1 - 1 / 184756) / 2)}
    with pytest.raises(ValueError, match="pass@2 needs at least 2 programs of each problem, got 1"):
        per_item("pass_at_k", predictions=[[True, True], [True]], k=2)


def test_anyone_can_load_them_offline_from_a_copy(tmp_path):
    """Each is one file that needs nothing else of the project; nothing is written beside it."""
    code = (
        "import evaluate, sys; names = 'exact_match', 'squad_f1', 'pass_at_k'\n"
        "loaded = [evaluate.load(f'{sys.argv[1]}/{name}') for name in names]\n"
        "print([sorted(metric.features) for metric in loaded])"
    )
    for name in ("exact_match", "squad_f1", "pass_at_k"):
        (tmp_path / "copy" / name).mkdir(parents=True)
        (tmp_path / "copy" / name / f"{name}.py").write_bytes((FOLDER / name / f"{name}.py").read_bytes())
    before = sorted(tmp_path.rglob("copy/**"))
    done = python("-P", "-c", code, str(tmp_path / "copy"), HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
    expected = [["predictions", "references"], ["predictions", "references"], ["predictions"]]
    assert done.stdout.strip() == str(expected), done.stderr[-2000:]
    assert sorted(tmp_path.rglob("copy/**")) == before


def test_a_cache_that_cannot_be_written_is_named(monkeypatch):
    def load(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "/some/cache")

    monkeypatch.setattr(evaluate, "load", load)
    with pytest.raises(metrics.UserError, match="cannot write to its cache, /some/cache: set HF_HOME"):
        per_item("exact_match", predictions=["a"], references=["a"])
