"""peft's MetaMathQA benchmark, scripts/peft_benchmark.sh: its prompt, answer rule, labels, rows and report."""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, write_rows
from safetensors.torch import load_file
from transformers import AutoTokenizer

import train
from common import sources, templates
from common.config import TrainConfig, parse
from common.errors import UserError
from scripts.peft_benchmark import report, rows
from scripts.report import runs as report_runs
from scripts.reproduce.reduced import SHAPES
from tasks import TASKS
from tasks.math_rules import peft_answer, peft_gsm8k, peft_value
from tasks.task import Options
from training import data, plan

PROMPT = "Question: What is\n{x}? Think step by step.\nAnswer:"

# --- prompt and answer rule -------------------------------------------------------------------------------------------


def test_prompt_to_the_letter():
    """In training the response follows the colon without a space; in the test the prompt ends with it."""
    row = {"query": "What is\n{x}?", "response": "It is 2."}
    assert templates.peft_metamath(row) == (PROMPT, "It is 2.")
    task = TASKS["gsm8k_peft"]
    assert task.formats["base"].prompt({"question": "What is\n{x}?"}, None) == PROMPT
    assert (task.max_new_tokens, task.temperature, task.samples, task.formats["base"].stop) == (300, 0.0, 1, ())


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So. The answer is: 18", "18"),
        ("The answer is: $18.\nQuestion: And", "18"),
        ("The answer is: 18!?.", "18"),
        ("The answer is: 1. The answer is: 2", "2"),  # the last one
        ("The answer is: 5\n#### 7", "5"),  # the first phrase that there is, wherever the others are
        ("#### 7\nThe answer is: 5", "5"),
        ("The answer is 4. The final answer is: 5", "4. The final answer is: 5"),  # of which it is no part: its case
        ("The final answer is: 5", "5"),
        ("The final answer is 5 %", "5"),
        ("x\n#### 1,000", "1,000"),
        ("####18", None),  # the space belongs to the mark
        ("The answer is:", None),
        ("the answer is: 5", None),
        ("It is 5", None),
        ("The answer is: \\boxed{5}", "\\boxed{5}"),
        ("The answer is: 5 apples. ", "5 apples"),
        ("", None),
    ],
)
def test_what_its_rule_finds(text, answer):
    assert peft_answer(text) == answer


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("18", 18.0), ("18.00", 18.0), ("-3", -3.0), ("1/2", 0.5), ("20 / 40", 0.5), ("1e3", 1000.0), ("1_000", 1000.0),
        ("1,000", "1,000"), ("1/2/3", "1/2/3"), ("1/0", "1/0"), ("0/0", "0/0"), ("5 apples", "5 apples"), ("", ""),
        ("1e999999/1e-999999", "1e999999/1e-999999"),
    ],
)  # fmt: skip
def test_what_counts_as_a_number(answer, value):
    assert peft_value(answer) == value


def test_verdicts():
    """The prompt is read, too; thousands with a comma are right only as the same text; no phrase is wrong."""
    gold = [{"answer": f"x\n#### {number}"} for number in ("18", "18", "1,000", "1,000", "0.5", "18")]
    said = ["The answer is: 18.0", "18", "The answer is: 1000", "The answer is: 1,000", "The answer is: 1/2", ""]
    prompts = ["Q:"] * 5 + ["Is this right? The answer is: 18. Answer:"]
    assert [peft_gsm8k(p + s, g["answer"])["correct"] for p, s, g in zip(prompts, said, gold, strict=True)] == [
        True, False, False, True, True, False,
    ]  # the last prompt's number is followed by more  # fmt: skip
    assert (
        peft_gsm8k("The answer is: 18", "x\n#### 18")["correct"] and not peft_gsm8k("The answer is: ", "x")["correct"]
    )


def test_the_judge_reads_prompt_and_completion():
    items = [{"question": "?", "answer": "#### 1,200"}] * 2
    answers = [
        {"prompt": "Q: The answer is: 5\n", "completions": ["x. The answer is: 1,200"]},
        {"prompt": "The answer is: 1,200\n", "completions": ["It is $1200$."]},
    ]
    verdicts = TASKS["gsm8k_peft"].judge(items, answers, Options())
    assert [(v["extracted"], v["correct"], v["math_verify"]) for v in verdicts] == [
        ("1,200", True, True), ("1,200", True, True),
    ]  # fmt: skip
    answers[1]["completions"] = ["No. The answer is: 7"]
    (_, verdict) = TASKS["gsm8k_peft"].judge(items, answers, Options())
    assert (verdict["correct"], verdict["math_verify"]) == (False, False)


# --- the keys that it needs -------------------------------------------------------------------------------------------


def test_prompt_and_answer_are_trained(tmp_path, model_dir):
    """All tokens but the first, EOS included: the tokens stay the same, and the cached examples are others."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    file = write_rows(
        tmp_path / "a.jsonl", [{"query": "Hi?", "response": "Yes."}, {"query": "x" * 99, "response": "a"}]
    )
    found = sources.load_rows(str(file), ("query", "response"))
    usual, whole = (data.tokenise(found, tokenizer, "peft_metamath", 90, train_on_prompt=on) for on in (False, True))
    ids = whole.rows[0]["input_ids"]
    assert tokenizer.decode(ids) == "Question: Hi? Think step by step.\nAnswer:Yes.<eos>"
    assert whole.rows[0]["labels"] == [-100, *ids[1:]] and whole.trained[0] == len(ids) - 1
    assert usual.rows[0]["input_ids"] == ids and usual.trained.tolist() == [5]  # the second has nothing to train on
    assert (len(whole), whole.truncated, whole.trained[1]) == (2, 1, 89)


def test_all_of_a_conversation_is_trained(tmp_path, model_dir):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    found = sources.load_rows(str(write_rows(tmp_path / "a.jsonl", [{"messages": turns}])), ("messages",))
    examples = data.tokenise(found, tokenizer, "tulu", 90, train_on_prompt=True)
    assert examples.rows[0]["labels"] == [-100, *examples.rows[0]["input_ids"][1:]]


def test_without_shuffling_the_examples_come_in_their_order():
    steps = [data.step_examples(10, 4, 7, step, shuffle=False).tolist() for step in range(4)]
    assert steps == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [0, 1, 2, 3]]


def test_only_the_named_weights_are_trained(tmp_path, train_args, model_dir):
    """As SHiRA in the benchmark: a fixed random part of two kinds of matrices."""
    words = ["--rule", "shira", "--keep_ratio", "0.3", "--train_only", "*q_proj.weight", "*v_proj.weight"]
    train.main(train_args(tmp_path / "run", *words, "--max_steps", "2"))
    before, after = load_file(model_dir / "model.safetensors"), load_file(tmp_path / "run/final/model.safetensors")
    for name, weights in before.items():
        changed = int((weights != after[name]).sum())
        trained = name.endswith(("q_proj.weight", "v_proj.weight"))
        assert changed == (round(0.3 * weights.numel()) if trained else 0), name
    with pytest.raises(
        UserError, match="train_only: 'q_projj' matches no parameter; the first one here is model.embed"
    ):
        train.main(train_args(tmp_path / "no", "--train_only", "q_projj"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train_only", "x", "--rule", "hft"], "train_only has no meaning with rule hft"),
        (["--train_only", "x", "--rule", "mask_tuning"], "train_only has no meaning with rule mask_tuning"),
        (["--train_only", "x", "--rule", "none", "--adapter", "lora"], "train_only has no meaning with adapter lora"),
        (["--train_on_prompt", "--rule", "none", "--objective", "dpo"], "train_on_prompt is of objective sft"),
    ],
)
def test_keys_without_a_meaning_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        parse(TrainConfig, ["--model", "m", "--dataset", "d", "--output_dir", "o", *words])


# --- rows ------------------------------------------------------------------------------------------------------------


def test_rows_are_filtered_and_ordered(tmp_path, model_dir, capsys):
    """At most 1,300 characters with the space between; 80 at a time by falling length in tokens, cut at 768."""
    rng = np.random.default_rng(0)
    made = [{"query": f"{i}", "response": "y" * int(rng.integers(1, 60))} for i in range(100)]
    made[7] = {"query": "x" * 700, "response": "y" * 599}  # 1,300 with the space: kept; longer than 768 tokens
    made[8] = {"query": "x" * 700, "response": "y" * 600}
    file = write_rows(tmp_path / "all.jsonl", made)
    words = ["--dataset", str(file), "--tokenizer", str(model_dir), "--output", str(tmp_path / "rows.jsonl")]
    rows.main([*words, "--rows", "90"])
    kept = [row for row in made if row is not made[8]][:90]
    frame = len("Question:  Think step by step.\nAnswer:")  # a token per byte here
    lengths = [min(768, frame + len(row["query"]) + len(row["response"])) for row in kept]
    slow = []
    for start in (0, 80):
        part = list(zip(lengths, kept, strict=True))[start : start + 80]
        slow += [row for _, row in sorted(part, key=lambda pair: pair[0], reverse=True)]
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == slow
    assert slow[0] == made[7]
    said = capsys.readouterr().out
    assert (
        f"90 rows, {sum(lengths) + 90:,} tokens with an EOS" in said
        and "have 4,198,051 tokens: these are other" in said
    )
    with pytest.raises(
        UserError, match="99 of its 100 rows have at most 1300 characters, and the benchmark takes 20000"
    ):
        rows.main(words)


# --- the plan and the configuration -----------------------------------------------------------------------------------

RUNS = ["none", "none_bf16", "rmt", "gmt", "gmt_frozen", "mofo", "shira", "lora"]


def script(*words: str, timeout: float = 600, **variables: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k not in ("RUNS", "OUT", "REDUCED", "DRY_RUN")} | variables
    env |= {
        "VIRTUAL_ENV": sys.prefix,
        "PATH": f"{os.path.dirname(sys.executable)}:{env['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    command = ["bash", str(ROOT / "scripts/peft_benchmark.sh"), *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, check=False)


def test_the_model_is_the_published_one():
    """Its weights, tied as they are, are as many as each published result records; it fits on a GPU of 80 GB."""
    config = parse(TrainConfig, ["--config", str(ROOT / "configs/peft_llama3.2_3b.yaml")])
    cls, shape = SHAPES[config.model]
    assert sum(p.numel() for p in plan.on_meta(config, cls(**shape)).parameters()) == 3_212_749_824
    assert (config.train_on_prompt, config.shuffle, config.max_length, config.template) == (
        True, False, 768, "peft_metamath",
    )  # fmt: skip
    assert (config.max_steps, config.global_batch_size, config.warmup_ratio, config.max_grad_norm) == (
        5000,
        4,
        0.1,
        1.0,
    )
    assert (config.learning_rate, config.weight_decay, config.lr_schedule) == (1e-5, 0.01, "cosine")
    assert config.micro_batch_tokens == config.global_batch_size * config.max_length  # no accumulation


@pytest.mark.slow
def test_dry_run_plans_all_runs_without_model_and_data(tmp_path):
    """And its trainings fit; LoRA trains as many weights as peft's; the words are those of the published rows."""
    done = script("--dry_run", "--max_grad_norm", "2.0", OUT=str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    launch = "accelerate launch --config_file configs/accelerate/single_gpu.yaml --num_processes 1 train.py "
    commands = [line for line in done.stdout.splitlines() if line.startswith(launch)]
    cells = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][2:]
    assert [row[0] for row in cells] == RUNS and len(commands) == 8 and not (tmp_path / "out").exists()
    of = dict(zip(RUNS, commands, strict=True))
    assert all("--max_grad_norm 2.0 --output_dir outputs/peft_benchmark/" in command for command in commands)
    assert "--rule none --master_dtype bfloat16 --mixed_precision fp32 --max" in of["none_bf16"]
    assert "--rule gmt --masked_weights frozen --keep_ratio 0.2 " in of["gmt_frozen"]
    assert "--lora_rank 32 --lora_alpha 64 --lora_targets q_proj v_proj" in of["lora"]
    assert "--learning_rate 1e-4 --weight_decay 0.1" in of["lora"]
    assert "--keep_ratio 0.02604 --clip after --learning_rate 3e-4 --weight_decay 0" in of["shira"]
    held = {row[0]: float(row[2].removesuffix(" GiB")) for row in cells}
    assert max(held.values()) < 79 - 1.5 and held["none_bf16"] < 40 and held["lora"] < 20
    weights = {row[0]: row[1] for row in cells}
    assert weights["lora"] == "9,175,040" and weights["gmt"] == "3,212,749,824"
    assert abs(int(weights["shira"].replace(",", "")) * 0.02604 / 9_175_040 - 1) < 1e-3


def test_unknown_runs_are_refused(tmp_path):
    done = script(RUNS="gmt lorra", DRY_RUN="1", NPROC="1", OUT=str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr == (
        "peft_benchmark.sh: error: RUNS: unknown word 'lorra'; known: none none_bf16 rmt gmt gmt_frozen mofo shira "
        "lora\n"
    )


# --- the report ------------------------------------------------------------------------------------------------------


def test_the_published_rows():
    """63 results; those of full fine-tuning and LoRA as their files have them."""
    found = {row["experiment"]: row for row in report.published_rows()}
    assert len(found) == 63
    full = {"learning_rate": "1e-05", "weight_decay": "0.01", "train_loss": "0.5988", "correct": "622"}
    full |= {"greedy_correct": "653", "forgetting": "0.0300", "memory_gib": "34.78", "date": "2026-07-14"}
    assert found["full-finetuning/lr_0.00001"].items() >= full.items()
    assert found["lora/rank32"]["correct"] == "631" and found["lora/rank32"]["forgetting"] == "0.0500"
    assert all(0 <= int(row["correct"]) <= 1319 and float(row["forgetting"]) < 2 for row in found.values())


@pytest.fixture
def folders(tmp_path):
    """What eval.py and train.py leave of the base model and of two runs: 700 and 400 of 1,319 right."""
    made = []
    for name, rule, right, loss in (
        ("base", "", None, 1.586),
        ("gmt_seed0", "gmt", 700, 1.62),
        ("x", "none", 400, 1.6),
    ):
        folder = tmp_path / name
        (folder / "eval").mkdir(parents=True)
        model = str(folder / "final") if rule else "m"
        entry = {"task": "text_loss", "model": model, "unit": "nats", "n": 2}
        value = {"score": loss, "standard_error": 0.1}
        scores = {"text_loss.peft": {**entry, **value, "metrics": {"loss": value}}}
        texts = [{"item": {"text": t}, "loss": loss + d, "scored_tokens": 5} for t, d in (("a", -0.5), ("b", 0.5))]
        write_rows(folder / "eval/text_loss.peft.jsonl", texts)
        if rule:
            value = {"score": right / 1319, "standard_error": 0.01}
            scores["gsm8k_peft.peft"] = {"task": "gsm8k_peft", "model": model, "n": 1319, "metrics": {"correct": value}}
            config = {"model": "m", "rule": rule, "keep_ratio": None, "seed": 0, "objective": "sft"}
            config |= {"learning_rate": 1e-5, "weight_decay": 0.01}
            protocol = yaml.safe_load(report.CONFIG.read_text())
            config |= {key: protocol[key] for key in report.PROTOCOL}
            (folder / "run.json").write_text(json.dumps({"config": config}))
            lines = [
                {"loss": 9.0 if s < 100 else 0.6, "step": s, "tokens": s * 11995, "peak_memory_gib": 40 + s}
                for s in range(351)
            ]
            write_rows(folder / "metrics.jsonl", lines)
        (folder / "eval/scores.json").write_text(json.dumps(scores))
        made.append(folder / "eval")
    return made


def test_our_rows_stand_among_the_published_ones(folders, tmp_path, capsys):
    report.main([*map(str, folders), "--out", str(tmp_path)])
    text = (tmp_path / "benchmark.md").read_text()
    assert text in capsys.readouterr().out
    lines = [
        [cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if line[:2] == "| "
    ][2:]
    assert len(lines) == 65 and [int(line[4]) for line in lines] == sorted(
        (int(line[4]) for line in lines), reverse=True
    )
    (at,) = [i for i, line in enumerate(lines) if line[0] == "**ours/gmt_seed0**"]
    assert at == 0 and lines[0][1:9] == ["1e-05", "0.01", "0.6000", "700", "", "53.1", "0.0340", "390.0"]
    assert lines[1][0].startswith("lily/") and lines[1][4:8] == ["694", "52.6", "", "0.2161"]
    for words in ("sampled run", "bf16 weights and moments", "Each row is one run", "1.4 points", "1.58611"):
        assert words in text
    assert "not the benchmark's" not in text
    with open(tmp_path / "benchmark.csv", newline="") as f:
        table = list(csv.DictReader(f))
    assert table[0]["experiment"] == "ours/gmt_seed0" and float(table[0]["forgetting"]) == pytest.approx(0.034)


def test_what_is_not_the_benchmark_is_said(folders):
    scores = json.loads((folders[1] / "scores.json").read_text())
    scores["gsm8k_peft.peft"]["n"] = 100
    (folders[1] / "scores.json").write_text(json.dumps(scores))
    about = json.loads((folders[2].parent / "run.json").read_text())
    about["config"] |= {"shuffle": True, "max_steps": 400, "keep_ratio": 0.01}
    (folders[2].parent / "run.json").write_text(json.dumps(about))
    write_rows(folders[2].parent / "metrics.jsonl", [{"step": 1, "loss": 1.0, "tokens": 999, "peak_memory_gib": 1.0}])
    texts = report_runs.read_runs(folders)
    texts[0].scores["text_loss.peft"]["score"] = 2.5
    text, _ = report.report(texts)
    for words in (
        "not the benchmark's: the base model's loss on texts is 2.5000, not 1.58611",
        "gmt_seed0: 100 items were answered, not 1,319",
        "x: it was trained on 999 tokens, not 4,198,051",
        "x: shuffle True, not False",
        "x: max_steps 400, not 5000",
        "| **ours/x, keep_ratio 0.01** |",
    ):
        assert words in text
    assert text.count("not the benchmark's") == 5
    with pytest.raises(UserError, match="none of these folders has the score gsm8k_peft"):
        report.report(texts[:1])


# --- whole -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_whole(tmp_path):
    """In the reduced world: the rows, a plan, three trainings (LoRA beside a bf16 model), scores, both tables."""
    runs = ("gmt_frozen", "shira", "lora")
    done = script(REDUCED="1", RUNS=" ".join(runs), OUT=str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    out = tmp_path / "out"
    assert len((out / "rows.jsonl").read_text().splitlines()) == 12
    text = (out / "benchmark.md").read_text()
    for run in runs:
        config = json.loads((out / f"{run}_seed0/run.json").read_text())["config"]
        assert (config["train_on_prompt"], config["shuffle"], config["template"]) == (True, False, "peft_metamath")
        scores = json.loads((out / f"{run}_seed0/eval/scores.json").read_text())
        assert scores.keys() == {"gsm8k_peft.peft", "text_loss.peft"} and f"| **ours/{run}_seed0" in text
    assert json.loads((out / "base/eval/scores.json").read_text()).keys() == {"text_loss.peft"}
    base = load_file(next((out / "reduced/models/meta-llama/Llama-3.2-3B").glob("*.safetensors")))
    for run, kinds, most in (("gmt_frozen", 8, 0.5), ("shira", 2, 0.027)):  # the share of a matrix that has moved
        tuned = load_file(out / f"{run}_seed0/final/model.safetensors")
        moved = {n: float((base[n] != w).float().mean()) for n, w in tuned.items() if w.dim() == 2}
        assert len({n.split(".")[-2] for n in moved if moved[n]}) == kinds, moved
        assert max(moved.values()) < most, moved
    tuned = load_file(out / "lora_seed0/final/model.safetensors")
    rounded = {n: w.to(tuned[n].dtype) for n, w in base.items() if n in tuned}
    assert {n.split(".")[-2] for n, w in rounded.items() if not torch.equal(w, tuned[n])} <= {"q_proj", "v_proj"}
    assert tuned["model.norm.weight"].dtype == torch.bfloat16
    assert text in done.stdout and "| **ours/lora_seed0** | 0.0001 | 0.1 |" in text and "not the benchmark's" in text
    assert (out / "forgetting.png").exists() and "+" in (out / "report.md").read_text()
