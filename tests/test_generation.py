"""Completions and log-probabilities: pytest tests/test_generation.py"""

import copy
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch
from conftest import ROOT, make_model, torchrun, write_rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

import eval as evaluation
from common.config import EvalConfig
from common.errors import UserError
from evaluation import generation
from evaluation.cache import RoomyCache, places
from evaluation.generation import Decoding, Scored
from evaluation.requests import encode, make_requests, render_prompts
from evaluation.task_run import TaskRun
from tasks import TASKS
from tasks.source import Source
from tasks.task import Chat, Format, each, render

WORDS = (ROOT / "README.md").read_text()[:20_000]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama with a BPE tokenizer that adds a BOS."""
    path = make_model(tmp_path_factory.mktemp("model"), vocab_size=600, initializer_range=0.3)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<bos>", "<eos>", "<pad>"]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator([WORDS, " A B C D" * 500], trainer)  # so that " A" is one token
    bpe.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def short(folder, tmp_path_factory):
    """The same with a context of 200 tokens, which ends its answers early."""
    path = tmp_path_factory.mktemp("short") / "model"
    shutil.copytree(folder, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 200}))
    return path


def test_padding_beyond_the_embedding_is_not_used(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = EvalConfig(tasks=["gsm8k"], output_dir="o", model=str(folder), dtype="float32")
    assert generation.load_for_generation(config, tokenizer, torch.device("cpu")).pad == tokenizer.pad_token_id
    tokenizer.add_special_tokens({"pad_token": "<another>"})
    assert tokenizer.pad_token_id == 600
    loaded = generation.load_for_generation(config, tokenizer, torch.device("cpu"))
    assert loaded.pad == tokenizer.eos_token_id


@pytest.fixture(scope="module")
def model(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()  # rounding decides nothing
    return generation.Model(network, tokenizer, frozenset({1}), 2, 512)


def prompts(model, n=9):
    texts = [WORDS[37 * i : 37 * i + 10 + 23 * i] for i in range(n)]
    return sorted(model.tokenizer(texts)["input_ids"], key=len, reverse=True)


# --- completions -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def one_at_a_time(model, prompt, most):
    """Greedy decoding without padding, cache or batch."""
    ids = list(prompt)
    while len(ids) < len(prompt) + most and (len(ids) == len(prompt) or ids[-1] not in model.ends):
        ids.append(int(model.model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_batches_whose_rows_leave_are_greedy_decoding_of_each_prompt(model):
    """Any token may be made an end, so that rows leave at many different steps."""
    given = prompts(model)
    alone = [one_at_a_time(model, p, 40) for p in given]
    ends = frozenset(t for t, _ in Counter(t for row in alone for t in set(row)).most_common(8)[2:])
    model = dataclasses.replace(model, ends=ends)
    alone = [one_at_a_time(model, p, 40) for p in given]
    assert len({len(row) for row in alone}) >= 4, "the rows should have many lengths"
    assert all(
        generation.continue_rows(model, given, Decoding(40), [""] * len(given), batch_size) == alone
        for batch_size in (1, 2, 4, 5, 100)
    )


def test_a_row_that_has_ended_costs_nothing(model, monkeypatch):
    """The rows and columns of each step: ended rows and columns of mere padding are gone."""
    given = prompts(model)
    alone = [one_at_a_time(model, p, 30) for p in given]
    model = dataclasses.replace(model, ends=frozenset({alone[0][4]}))  # the longest prompt ends at its fifth token
    lengths = [len(one_at_a_time(model, p, 30)) for p in given]
    shapes = []
    forward = model.model.forward

    def spy(**kwargs):
        shapes.append(tuple(kwargs["attention_mask"].shape))
        return forward(**kwargs)

    monkeypatch.setattr(model.model, "forward", spy)
    generation.continue_rows(model, given, Decoding(30), [""] * len(given), 100)
    for step, (rows, columns) in enumerate(shapes):
        still = [len(p) for p, n in zip(given, lengths, strict=True) if n > step]
        assert (rows, columns) == (len(still), max(still) + step)


def test_sampling_is_from_the_nucleus():
    """20,000 draws against the exact distribution of temperature 0.5 and top_p 0.8, by hand."""
    logits = torch.tensor([1.0, 0.5, 0.0, -0.5, -3.0]).log_softmax(-1)
    p = (logits / 0.5).softmax(-1).double()
    nucleus = [0, 1, 2]  # 0.615 and 0.226 are above 0.8, but only together with the second
    assert float(p[:1].sum()) < 0.8 <= float(p[:2].sum())
    nucleus = [0, 1]
    decoding = Decoding(1, temperature=0.5, top_p=0.8)
    n = 20_000
    generators = [torch.Generator().manual_seed(i) for i in range(n)]
    counts = Counter(generation.next_tokens(logits.expand(n, -1), decoding, generators).tolist())
    assert set(counts) == set(nucleus)
    expected = p[nucleus] / p[nucleus].sum()
    for token in nucleus:
        error = (float(expected[token]) * (1 - float(expected[token])) / n) ** 0.5
        assert abs(counts[token] / n - float(expected[token])) < 4 * error
    everything = Decoding(1, temperature=0.5)
    counts = Counter(generation.next_tokens(logits.expand(n, -1), everything, generators).tolist())
    assert abs(counts[2] / n - float(p[2])) < 4 * (float(p[2]) / n) ** 0.5 and 3 in counts


def test_a_sample_depends_on_its_seed_not_on_its_batch(model):
    given = prompts(model, 4)
    decoding = Decoding(12, temperature=0.8, top_p=0.95)
    together = generation.generate(model, given + given, decoding, [str(i) for i in range(8)], 3)
    alone = [generation.generate(model, [p], decoding, [str(i)], 1)[0] for i, p in enumerate(given + given)]
    assert together == alone and together[:4] != together[4:]


def test_keys_and_values_keep_to_their_budget(model, monkeypatch):
    """Fewer rows at a time where batch_size prompts could need more, and the same answers."""
    given = prompts(model)
    free = generation.continue_rows(model, given, Decoding(20), [""] * len(given), 100)
    shapes = []
    forward = model.model.forward

    def spy(**kwargs):
        shapes.append(tuple(kwargs["attention_mask"].shape))
        return forward(**kwargs)

    monkeypatch.setattr(model.model, "forward", spy)
    longest = len(given[0]) + 20
    for budget, rows in ((3 * longest, 3), (3 * longest - 1, 2), (5, 1), (1e9, 4)):
        shapes.clear()
        limited = dataclasses.replace(model, cached_tokens=budget)
        assert generation.continue_rows(limited, given, Decoding(20), [""] * len(given), 4) == free
        assert max(n for n, _ in shapes) == rows
        assert all(n * width <= budget for n, width in shapes) or rows == 1


def test_the_budget_counts_the_bytes_of_all_layers(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        config = EvalConfig(["gsm8k"], "o", str(folder), dtype=dtype, kv_cache_gib=0.25)
        ready = generation.load_for_generation(config, tokenizer, torch.device("cpu"))
        per_token = 2 * 2 * 2 * (32 // 4) * size  # layers, keys and values, heads of them, their size
        assert generation.bytes_per_token(ready.model) == per_token
        assert ready.cached_tokens == 2**28 // per_token


@pytest.mark.parametrize("name", ["self_attn.q_proj", "lm_head"])
def test_logits_that_are_no_numbers_are_an_error(model, name):
    """The first argmax of NaN would be taken for an answer."""
    broken = dataclasses.replace(model, model=copy.deepcopy(model.model))
    for parameter, values in broken.model.named_parameters():
        if name in parameter:
            values.data[3, 3] = math.nan
    given = prompts(broken, 3)
    with pytest.raises(UserError, match="the model's logits are no numbers"):
        generation.continue_rows(broken, given, Decoding(5), [""] * 3, 2)
    with pytest.raises(UserError, match="the model's logits are no numbers"):
        generation.continue_rows(broken, given, Decoding(5, temperature=1.0), [""] * 3, 2)
    for choices in ((), (5, 6)):
        with pytest.raises(UserError, match="the model's logits are no numbers"):
            generation.logprobs(broken, [Scored(p, len(p) - 1, choices) for p in given])


def test_a_special_token_ends_an_answer_or_is_seen(model):
    tokenizer = model.tokenizer
    prompt, code, junk = (
        [0, *tokenizer(t, add_special_tokens=False)["input_ids"]] for t in ("p", "return 1", "junk =")
    )
    new = [*code[1:], 2, *junk[1:], 1]  # <pad>, and <eos> at the end

    def decoded(new, *args):
        got = generation.decode_completion(model, prompt, new, Decoding(99, *args))
        return got["completion"], got["finish"]

    assert decoded(new) == ("return 1<pad>junk =", "eos")
    assert decoded(new, ("<pad>",)) == ("return 1", "stop")
    assert decoded(new, (), 0.0, 1.0, (2,)) == ("return 1", "eos")
    assert decoded(new[:-1]) == ("return 1<pad>junk =", "length")


def test_the_token_that_ends_a_turn_ends_the_answer(model):
    """Beside the model's own end, which a model that was trained on turns never says."""
    given = prompts(model, 4)
    alone = [one_at_a_time(model, p, 30) for p in given]
    ends = (alone[0][4], alone[1][9])
    cut = [one_at_a_time(dataclasses.replace(model, ends=model.ends.union(ends)), p, 30) for p in given]
    assert cut != alone
    got = generation.continue_rows(model, given, Decoding(30, turn_ends=ends), [""] * 4, 3)
    assert got == cut


TURNS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<pad>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_eval_asks_for_the_end_of_a_turn_where_the_prompt_is_one(folder, tmp_path, monkeypatch):
    path = tmp_path / "model"
    shutil.copytree(folder, path)
    (path / "chat_template.jinja").write_text(TURNS)
    seen = []
    generate = generation.generate
    monkeypatch.setattr(generation, "generate", lambda *a: seen.append(a[2].turn_ends) or generate(*a))
    formats = {"alpaca": SAMPLED.formats["alpaca"], "chat": Format(lambda item, _: Chat(item["question"]))}
    monkeypatch.setitem(TASKS, "gsm8k", dataclasses.replace(SAMPLED, formats=formats))
    items_file(tmp_path, 1)
    for name, ends, word in (("chat", (2,), "<pad>"), ("alpaca", (), "")):
        out = tmp_path / name
        entry = evaluation.main([*words(tmp_path, path, name), "--prompt_format", name])
        assert seen.pop() == ends and [e["turn_end"] for e in entry.values()] == [word], out


@torch.no_grad()
def test_learned_positions_count_from_each_rows_first_token():
    """GPT-2's positions are learned: padding must not shift them, in completions and in log-probabilities."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.4)
    model = generation.Model(GPT2LMHeadModel(config).double().eval(), None, frozenset({1, 7}), 2, 64)
    given = [[3 + (5 * i + j) % 40 for j in range(12 - 2 * i)] for i in range(5)]
    alone = [one_at_a_time(model, p, 20) for p in given]
    assert generation.continue_rows(model, given, Decoding(20), [""] * 5, 2) == alone
    got = generation.logprobs(model, [Scored(p, len(p), (4, 5)) for p in given])
    for p, values in zip(given, got, strict=True):
        assert values == pytest.approx(
            model.model(torch.tensor([p])).logits[0, -1].log_softmax(-1)[4:6].tolist(), abs=1e-4
        )


def test_exactly_one_bos(folder):
    """The tokenizer adds one; a text that brings one, too, does not double it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for given in ("hello", "<bos>hello"):
        (ids,) = encode(tokenizer, [given], True)
        assert ids[0] == 0 and ids.count(0) == 1 and tokenizer.decode(ids, skip_special_tokens=True) == "hello"


@pytest.mark.parametrize("tokenizer_adds", [True, False])
@pytest.mark.parametrize("template_writes", [True, False])
def test_a_chat_prompt_has_the_bos_that_its_template_writes(folder, model_dir, template_writes, tokenizer_adds):
    """As template chat trains it: SmolLM2's template begins with its BOS, which its tokenizer does not add."""
    tokenizer = AutoTokenizer.from_pretrained(folder if tokenizer_adds else model_dir)
    tokenizer.bos_token = "<bos>"
    tokenizer.chat_template = "{{ bos_token }}" * template_writes + "{% for m in messages %}{{ m.content }}{% endfor %}"
    task = dataclasses.replace(TASKS["gsm8k_8shot"], formats={"chat": Format(lambda item, _: Chat("hello"))})
    run = TaskRun(task, "chat", Source(), [{}])
    (ids,) = encode(tokenizer, render_prompts(run, tokenizer), run.special_tokens)
    messages = [{"role": "user", "content": "hello"}]
    assert ids == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids.count(tokenizer.bos_token_id) == template_writes


# --- log-probabilities -----------------------------------------------------------------------------------------------


def test_logprobs_are_those_of_lm_eval(folder, tmp_path):
    """TruthfulQA's candidates and MMLU's letters, stored by eval.py in batches of unequal lengths, against HFLM."""
    hflm = pytest.importorskip("lm_eval.models.huggingface").HFLM
    from lm_eval.api.instance import Instance

    data = tmp_path / "data"
    (data / "truthfulqa").mkdir(parents=True)
    rows = ["Question,Best Answer,Correct Answers,Incorrect Answers"]
    rows += [
        f"Why {'is ' * i}it so?,Because,Because; It was {i},No; {'Never ' * (i + 1)};At the {i}th." for i in range(7)
    ]
    (data / "truthfulqa/TruthfulQA_v1.csv").write_text("\n".join(rows))
    question = {"subject": "a_b", "choices": ["one", "two", "three", "four"], "answer": 2}
    items = [{**question, "question": f"What {'of it ' * i}?"} for i in range(7)]
    mmlu = write_rows(tmp_path / "mmlu.jsonl", items)
    words = ["--model", str(folder), "--dtype", "float32", "--batch_size", "5"]
    evaluation.main([*words, "--tasks", "truthfulqa", "--data_dir", str(data), "--output_dir", str(tmp_path / "t")])
    evaluation.main([*words, "--tasks", f"mmlu={mmlu}", "--output_dir", str(tmp_path / "m")])

    lm = hflm(str(folder), device="cpu", dtype="float32", batch_size=3)

    def theirs(pairs):
        requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        return [value for value, _ in lm.loglikelihood(requests, disable_tqdm=True)]

    compared = 0
    for line in read(tmp_path / "t/truthfulqa.open_instruct.jsonl"):
        candidates = TASKS["truthfulqa"].candidates(line["item"])
        pairs = [(line["prompt"], f" {c}") for c in candidates]
        assert line["logprobs"] == pytest.approx(theirs(pairs), abs=1e-4)
        compared += len(pairs)
    for line in read(tmp_path / "m/mmlu.open_instruct.jsonl"):
        assert line["logprobs"] == pytest.approx(theirs([(line["prompt"], f" {c}") for c in "ABCD"]), abs=1e-4)
        compared += 4
    assert compared == 7 * 5 + 7 * 4


@torch.no_grad()
def test_logprobs_of_a_batch_are_those_of_each_row(model):
    rows = [Scored(p, max(1, len(p) - 1 - i)) for i, p in enumerate(prompts(model))]
    rows += [Scored(p, len(p), (5, 7, 11)) for p in prompts(model)]
    rows.insert(3, Scored([4] * 600, 500))  # longer than the context
    got = generation.logprobs(model, rows)
    assert got[3] is None
    for row, values in zip(rows, got, strict=True):
        if values is not None:
            scores = model.model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
            slow = [float(scores[-1, c]) for c in row.choices] or [
                sum(float(scores[i - 1, row.ids[i]]) for i in range(row.start, len(row.ids)))
            ]
            assert values == pytest.approx(slow, abs=1e-4)


def test_a_candidate_that_the_tokenizer_merges_with_the_prompt_keeps_a_token(folder):
    """The candidate begins where the prompt's own tokens end, as in open-instruct; at least one token is scored."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    task = dataclasses.replace(TASKS["truthfulqa"], candidates=lambda item: ["It is.", ""])
    run = TaskRun(task, "base", None, [{}])
    text = "Is it?\nA: "  # ends in a space: none is put between, and an empty candidate adds nothing
    (prompt,) = encode(tokenizer, [text], True)
    requests = make_requests(run, [text], [prompt], tokenizer)
    candidate, empty = sorted(requests, key=lambda request: request.part)
    assert candidate.start == min(len(prompt), len(candidate.ids) - 1)
    assert empty.start < len(empty.ids)


# --- processes -------------------------------------------------------------------------------------------------------

SAMPLED = dataclasses.replace(
    TASKS["gsm8k"], formats={"alpaca": Format(lambda item, _: item["question"])},
    judge=each(lambda item, completion: {"correct": completion.startswith("a")}),
    metrics=("correct",), max_new_tokens=20, samples=3, temperature=1.0,
)  # fmt: skip


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def items_file(path, n=23):
    rows = [{"question": WORDS[i : 2 * i + 5], "answer": "#### 1"} for i in range(n)]
    return write_rows(path / "items.jsonl", rows)


def words(path, folder, out):
    return [
        "--model", str(folder), "--tasks", f"gsm8k={path / 'items.jsonl'}", "--dtype", "float32", "--batch_size", "2",
        "--output_dir", str(path / out),
    ]  # fmt: skip


def test_a_chat_prompt_of_today_is_the_same_tomorrow(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} {% for m in messages %}{{ m.content }}{% endfor %}"
    assert render(Chat("hello"), "chat", tokenizer) == "26 Jul 2024 hello"


def test_several_samples_of_an_item_are_in_one_line(folder, tmp_path, monkeypatch, exact):
    items_file(tmp_path)
    monkeypatch.setitem(TASKS, "gsm8k", SAMPLED)
    entry = evaluation.main(words(tmp_path, folder, "a"))["gsm8k.metamath"]
    lines = read(tmp_path / "a/gsm8k.metamath.jsonl")
    assert len(lines) == 23 and all(len(line["completions"]) == 3 for line in lines)
    assert any(len(set(line["completions"])) == 3 for line in lines)
    assert (entry["samples"], entry["temperature"], entry["engine"]) == (3, 1.0, "transformers, sampled")
    evaluation.main([*words(tmp_path, folder, "b"), "--batch_size", "7"])
    other = read(tmp_path / "b/gsm8k.metamath.jsonl")
    assert [line["completions"] for line in other] == [line["completions"] for line in lines]
    evaluation.main([*words(tmp_path, folder, "c"), "--seed", "1"])
    other = read(tmp_path / "c/gsm8k.metamath.jsonl")
    assert [line["completions"] for line in other] != [line["completions"] for line in lines]


def answers(path):
    return [(line["id"], line["prompt_ids"], line["completions"]) for line in read(path / "gsm8k.metamath.jsonl")]


def same_on(processes, short, tmp_path, monkeypatch, **env):
    items_file(tmp_path)
    evaluation.main(words(tmp_path, short, "one"))
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    done = torchrun(processes, "eval.py", *words(tmp_path, short, "many"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert answers(tmp_path / "one") == answers(tmp_path / "many")
    assert not (tmp_path / "many/gsm8k.metamath.parts").exists()
    one, many = (json.loads((tmp_path / out / "scores.json").read_text())["gsm8k.metamath"] for out in ("one", "many"))
    different = {"command", "hardware"}
    assert {k: v for k, v in one.items() if k not in different} == {k: v for k, v in many.items() if k not in different}


def test_two_processes_give_the_same_answers_also_under_a_launchers_fsdp(short, tmp_path, monkeypatch):
    """fsdp2.yaml sets these, which transformers looks at; every process needs the whole model all the same."""
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    same_on(2, short, tmp_path, monkeypatch, **fsdp)


@pytest.mark.slow
def test_three_processes_give_the_same_answers(short, tmp_path, monkeypatch):
    same_on(3, short, tmp_path, monkeypatch)


@pytest.mark.slow
def test_killed_on_two_processes_and_gone_on_with_three(short, tmp_path):
    items_file(tmp_path, 60)
    evaluation.main(words(tmp_path, short, "whole"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "eval.py"]
    process = subprocess.Popen(
        [*command, *words(tmp_path, short, "cut")], cwd=ROOT, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    parts, deadline = tmp_path / "cut/gsm8k.metamath.parts", time.time() + 200
    while len(list(parts.glob("*.jsonl"))) < 3 and time.time() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {p.name: p.stat().st_mtime_ns for p in parts.glob("*.jsonl")}
    assert 3 <= len(before) < 8 and not (tmp_path / "cut/gsm8k.metamath.jsonl").exists()
    done = torchrun(3, "eval.py", *words(tmp_path, short, "cut"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert answers(tmp_path / "cut") == answers(tmp_path / "whole")


def test_a_cache_with_room_holds_what_concatenation_would():
    """Random steps, ends of rows and new rows, against a list of rows that are never padded."""
    rng, heads, size = torch.Generator().manual_seed(0), 2, 3
    rows: list[torch.Tensor] = []  # the keys of each row, (heads, columns, size), padding included
    cache, copies, steps, memory = None, 0, 0, None
    for _ in range(400):
        what = int(torch.randint(0, 10, (), generator=rng))
        if what == 0 or not rows:  # new rows
            new = torch.randn(int(torch.randint(1, 4, (), generator=rng)), heads, 5, size, generator=rng)
            other = RoomyCache()
            other.update(new, -new, 0)
            columns = max(5, rows[0].shape[1]) if rows else 5
            padded = [torch.nn.functional.pad(x, (0, 0, columns - x.shape[1], 0)) for x in (*rows, *new)]
            if rows:
                cache.append_rows(other, columns)
            rows, cache = padded, cache if rows else other
        elif what == 1:  # some rows end, and a column of padding goes
            keep = [i for i in range(len(rows)) if torch.rand((), generator=rng) < 0.7]
            holes, movers = places(keep)
            for hole, mover in zip(holes, movers, strict=True):
                rows[hole] = rows[mover]
            rows = [x[:, 1:] for x in rows[: len(keep)]]
            cache.keep_rows(keep, 1)
        else:  # a step
            new = torch.randn(len(rows), heads, 1, size, generator=rng)
            rows = [torch.cat([x, n], 1) for x, n in zip(rows, new, strict=True)]
            keys, _ = cache.update(new, -new, 0)
            copies, steps = copies + (keys.untyped_storage().data_ptr() != memory), steps + 1
            memory = keys.untyped_storage().data_ptr()
        if rows:
            assert torch.equal(cache.layers[0].keys, torch.stack(rows))
            assert torch.equal(cache.layers[0].values, -torch.stack(rows))
    assert steps > 250 and copies < steps / 3  # new rows copy all, a step only now and then
