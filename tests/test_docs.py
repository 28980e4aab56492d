"""The documents' code and commands run, and their tables are the programs' own: pytest tests/test_docs.py"""

import gzip
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, make_model, write_rows
from torch import nn

import eval as evaluation
import gmt
import train
from common.config import EvalConfig, TrainConfig, parse, reference
from scripts import merge
from scripts.merging.average import AverageConfig
from scripts.merging.drop import DropConfig
from scripts.merging.fisher import FisherConfig
from scripts.merging.greedy import GreedyConfig
from tasks import TASKS
from tasks.task import Options

PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for pattern in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md")
    for path in sorted(ROOT.glob(pattern))
}
ALL = "\n\n".join(PAGES.values())


def python_with(word: str) -> str:
    """The one Python example of the documents that has this word in it."""
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", ALL, re.DOTALL) if word in b]
    return block


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 200


@pytest.mark.parametrize("cls", [TrainConfig, EvalConfig, DropConfig, AverageConfig, GreedyConfig, FisherConfig])
def test_configuration_tables_are_generated(cls):
    """On a failure: python train.py --help, python eval.py --help, python scripts/merge.py METHOD --help."""
    assert f"\n\n{reference(cls)}\n" in PAGES["docs/configuration.md"]


class Output(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 5)

    def forward(self, x, y):
        return type("Result", (), {"loss": nn.functional.cross_entropy(self.linear(x), y)})


def test_three_lines_in_a_loop_of_ones_own():
    torch.manual_seed(0)
    model = Output()
    batches = [{"x": torch.randn(8, 6), "y": torch.randint(0, 5, (8,))} for _ in range(3)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before, changed = model.linear.weight.detach().clone(), []

    def count(*_):
        changed.append(int((model.linear.weight.detach() != before).sum()))
        before.copy_(model.linear.weight.detach())

    optimizer.register_step_post_hook(count)
    names = {"torch": torch, "model": model, "batches": batches, "optimizer": optimizer}
    exec(python_with("# 3: once per optimizer step"), names)
    assert changed == [6, 6, 6]  # 20 % of 30 entries, at every step


def test_a_rule_of_ones_own(monkeypatch):
    monkeypatch.setattr(gmt, "SCORES", dict(gmt.SCORES))
    block = python_with("relative_gradient")
    assert len(block.strip().splitlines()) < 15
    exec(block, {"torch": torch, "gmt": gmt})
    p = nn.Parameter(torch.randn(30, 40))
    p.grad = torch.randn(30, 40)
    score = (p.grad / p.abs().clamp(min=1e-12)).abs().detach()
    expected = p.grad * (score >= score.flatten().sort(descending=True).values[359])
    gmt.Masker([("p", p)], "relative_gradient", 0.3).mask_gradients(0)
    assert torch.equal(p.grad, expected)


def test_the_table_of_rules_is_gmts():
    """Every rule, with its axes and its source; and what each costs."""
    rows = [
        line.strip("| ").split(" | ") for line in PAGES["docs/method.md"].replace("\\|", "").splitlines() if "|" in line
    ]
    rows = {cells[0].strip("`"): cells for cells in rows if len(cells) == 6}
    for name, rule in gmt.RULES.items():
        assert name in rows, f"{name} has no row in docs/method.md"
        _, _, score, refresh_every, masked_weights, source = rows[name]
        assert source and rule.source.startswith(source), name
        if rule.score:
            assert (score, refresh_every.split(":")[0], masked_weights) == (
                rule.score, str(rule.refresh_every), rule.masked_weights,
            ), name  # fmt: skip
    costs = PAGES["docs/method.md"].partition("| rule | memory | time |")[2]
    assert all(f"`{name}`" in costs for name in gmt.RULES if name != "none")


def test_a_benchmark_of_ones_own(monkeypatch, tmp_path, model_dir):
    monkeypatch.setattr("tasks.TASKS", dict(TASKS))
    exec(python_with("load_capitals"), {})
    items = [{"country": "France", "capital": "Paris"}, {"country": "Peru", "capital": "Lima"}]
    file = write_rows(tmp_path / "capitals.jsonl", items)
    words = ["--model", str(model_dir), "--dtype", "float32", "--output_dir", str(tmp_path / "e")]
    evaluation.main([*words, "--tasks", f"capitals={file}"])
    path = tmp_path / "e" / "capitals.exact.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [
        "Q: What is the capital of France?\nA:", "Q: What is the capital of Peru?\nA:",
    ]  # fmt: skip
    lines[0]["completions"] = [" Paris"]
    write_rows(path, lines)
    words = ["--tasks", "capitals", "--score_only", "--output_dir", str(tmp_path / "e")]
    assert evaluation.main(words)["capitals.exact"]["score"] == 0.5


def test_the_table_of_tasks_is_complete():
    words = re.findall(r"^\| ([\w, ]+?)(?: \(group.*?)? \| [\d, ]+ \| \w+: ", PAGES["docs/evaluation.md"], re.MULTILINE)
    assert {word for row in words for word in row.split(", ")} == set(TASKS)


def test_quirks_that_are_kept():
    """The table's examples, by the tasks' own judges: right where the gold answer is what the table says."""
    tasks_of = {"MetaMath's number": "gsm8k", "open_instruct's exact match": "gsm8k_8shot"}
    rows = re.findall(r"^\| ([\w' ]+) \| `(\S+)` \| `(\S+)` \|", PAGES["docs/evaluation.md"], re.MULTILINE)
    assert len(rows) >= 6 and {rule for rule, *_ in rows} == set(tasks_of)
    for rule, name in tasks_of.items():
        pairs = [(answer, number) for r, answer, number in rows if r == rule]
        items = [{"answer": f"#### {number}"} for _, number in pairs]
        answers = [{"completions": [f"The answer is: {answer}"]} for answer, _ in pairs]
        verdicts = TASKS[name].judge(items, answers, Options())
        assert all(verdict["correct"] for verdict in verdicts), verdicts


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_configuration_is_valid(path):
    cls = EvalConfig if "tasks" in yaml.safe_load(path.read_text()) else TrainConfig
    more = [] if "rule" in yaml.safe_load(path.read_text()) or cls is EvalConfig else ["--rule", "none"]
    parse(cls, ["--config", str(path), *more])


def anchors(text: str) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_files_that_the_documents_name_exist():
    names = re.findall(r"(?<![\w/])(?:configs|scripts|docs|common|tasks|tests)/[\w/.]+\w", ALL)
    assert len(names) > 20
    for name in names:
        assert (ROOT / name).exists(), name


def test_linters_have_one_version():
    ruff = re.search(r"^ruff==(.*)$", (ROOT / "requirements-dev.txt").read_text(), re.MULTILINE)[1]
    (hooks,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert hooks["rev"] == f"v{ruff}"


def test_the_workflow_runs_what_ci_runs():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    commands = [step.get("run") for job in jobs.values() for step in job["steps"]]
    assert "bash .ci/run" in commands


# --- commands ---------------------------------------------------------------------------------------------------------


VARIABLES = r"""^([A-Z_]+=("[^"]*"|\S*) )*"""  # in front of a command


def commands_of(text: str) -> list[str]:
    """Shell commands in the code blocks, indented lines and inline code of a Markdown text."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    found = [block for language, block in blocks if language != "python"]
    found.append("\n".join(line[4:] for line in rest.splitlines() if line.startswith("    ")))
    lines = [line for block in found for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`([^`]+)`", rest)
    lines = [" ".join(line.partition(" # ")[0].split()) for line in lines]
    programs = r"(bash|sbatch|python|pip install|torchrun|accelerate launch)\b.*\.(sh|py|txt)\b"
    return list(dict.fromkeys(line for line in lines if re.match(VARIABLES + programs, line)))


def test_commands_are_found():
    text = '`bash a.sh` and `python\nb.py --x` but `c.py`\n\n    X=1 Y="2 3" bash d.sh  # why\n    k = 1\n\n'
    text += "```\npython e.py \\\n  --y\n```\n```python\npython = 1\n```\n"
    assert commands_of(text) == ["python e.py --y", 'X=1 Y="2 3" bash d.sh', "bash a.sh", "python b.py --x"]


COMMANDS = commands_of(ALL)
# The beginning of a command: the test that runs it, or the script that tests run. Only what a document names counts.
RUN_BY = {
    "bash scripts/quickstart.sh": "tests/test_scripts.py::test_quickstart_is_cut_goes_on_and_is_reused",
    "python scripts/get_smollm2.py": "tests/test_get_smollm2.py::test_the_model_is_an_ordinary_folder_and_answers",
    "bash scripts/quickstart_dpo.sh": "tests/test_scripts.py::test_quickstart_is_cut_goes_on_and_is_reused",
    "bash scripts/gsm8k_from_scratch.sh": "tests/test_scripts.py::test_the_real_gsm8k_goes_through_whole",
    "python scripts/quickstart/gsm8k_to_metamath.py": "scripts/gsm8k_from_scratch.sh",
    "python scripts/quickstart/tune.py": "tests/test_scripts.py::test_quickstart_tune_takes_the_best_rate_of_each_rule",
    "bash scripts/reproduce_math.sh": "tests/test_reproduce.py::test_math_whole_and_cut",
    "bash scripts/reproduce_code.sh": "tests/test_reproduce.py::test_code_whole",
    "bash scripts/reproduce_general.sh": "tests/test_reproduce.py::test_general_whole",
    "bash scripts/sweep_keep_ratio.sh": "tests/test_reproduce.py::test_sweep_whole",
    "bash scripts/peft_benchmark.sh": "tests/test_peft_benchmark.py::test_whole",
    "bash scripts/test.sh": ".ci/run",
    "bash scripts/install_sandbox.sh": "scripts/test.sh",
    "bash scripts/gpu_check.sh": "tests/test_gpu_check.py::test_some_parts",
    "pip install -r requirements.txt": "scripts/setup.sh",
    "sbatch scripts/slurm.sh": "tests/test_slurm.py::test_a_signal_reaches_the_training_processes",
    "python scripts/download.py": "tests/test_download.py::test_a_run_goes_without_the_hub",
    "python scripts/bench/": "tests/test_bench.py::test_it_measures",
    "python scripts/merge.py greedy": "tests/test_merge.py::test_greedy_by_eval_itself",
    "bash scripts/study.sh": "tests/test_study.py::test_a_tiny_study_runs_whole",
    "python scripts/report.py results": "tests/test_study.py::test_the_report_finds_what_is_there",
    "torchrun --nproc_per_node": "tests/test_distributed.py::test_whole_runs_agree_on_1_2_and_3_processes_in_fp64",
    "accelerate launch --config_file configs/accelerate/cpu.yaml train.py ...": "scripts/reproduce/stages.sh",
    "accelerate launch --config_file configs/accelerate/single_gpu.yaml": "tests/test_slurm.py::test_accelerate_config",
    "python train.py --dry_run": "tests/test_plan.py::test_a_plan_for_64_gpus",
    "python train.py ...": "tests/test_bad_input.py::test_programs_end_with_one_line_and_exit_code_2",
}
LAUNCHED = r"(accelerate launch |python )((?:--config_file \S+ |--num_processes \d+ )*)"
HERE = LAUNCHED + r"(train|eval|scripts/report|scripts/merge)\.py (?!\.\.\.)"


def run_by(command: str) -> str:
    """The place in RUN_BY of a command, without the variables in front of it; empty: none."""
    command = re.sub(VARIABLES, "", command)
    return next((place for start, place in RUN_BY.items() if command.startswith(start)), "")


@pytest.mark.parametrize("command", [c for c in COMMANDS if run_by(c) or not re.match(HERE, c)])
def test_a_command_is_run_somewhere(command):
    assert run_by(command), f"a document names {command!r}: say in RUN_BY which test runs it"
    file, _, test = run_by(command).partition("::")
    text = (ROOT / file).read_text()
    script = re.search(r"[\w./]+\.(sh|py|txt)", command)[0]
    assert f"def {test}" in text if test else script.removesuffix("requirements.txt") in text, run_by(command)


FAST = ["--tasks", "gsm8k", "--dtype", "float32", "--workers", "1"]


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory) -> Path:
    """A folder with small things in the place of those that the documents' commands name."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("math_sft", "math_gmt"):
        make_model(folder / "outputs" / name / "final", seed=len(name))
    make_model(folder / "BASE", seed=7)
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    (folder / "BASE" / "chat_template.jinja").write_text(template)
    texts = {"query": "q", "response": " r", "instruction": "i", "prompt": "p"}
    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    write_rows(folder / "rows.jsonl", [{**texts, "messages": turns}] * 600)
    other = [turns[0], {"role": "assistant", "content": "b"}]
    write_rows(folder / "pairs.jsonl", [{**texts, "chosen": turns, "rejected": other}] * 600)
    (folder / "gsm8k").mkdir()
    write_rows(folder / "gsm8k" / "test.jsonl", [{"question": "1+1?", "answer": "#### 2"}])
    (folder / "math").mkdir()
    item = {"problem": "1+1?", "solution": "$\\boxed{2}$", "level": "Level 1", "type": "Algebra"}
    (folder / "math" / "test.jsonl.gz").write_bytes(gzip.compress(json.dumps(item).encode()))
    for name in ("math_sft", "math_gmt"):
        model, out = folder / "outputs" / name / "final", folder / "outputs" / name / "eval"
        evaluation.main(["--model", str(model), "--output_dir", str(out), "--data_dir", str(folder), *FAST])
    return folder


@pytest.mark.parametrize("command", [c for c in COMMANDS if re.match(HERE, c) and not run_by(c)])
def test_a_command_runs_here(command, stand_in, monkeypatch, capsys):
    """With a small model and data in the place of what it names, and training only planned."""
    program, words = re.match(HERE, command)[3], shlex.split(command[re.match(HERE, command).end() :])
    config = re.search(r"--config_file (\S+)", command)
    assert config is None or (ROOT / config[1]).exists()
    if "--help" in words:
        with pytest.raises(SystemExit) as end:
            {"train": train, "eval": evaluation, "scripts/merge": merge}[program].main(words)
        assert end.value.code == 0 and "| key |" in capsys.readouterr().out
        return
    words = [str(ROOT / word) if word.startswith("configs/") else word for word in words]
    monkeypatch.chdir(stand_in)
    model = ["--model", str(stand_in / "BASE")]
    if program == "train":
        rows = stand_in / ("pairs.jsonl" if "dpo" in command else "rows.jsonl")
        words += [*model, "--dataset", str(rows), "--max_length", "256", "--output_dir", "new", "--dry_run"]
        if "--rule" not in words and "rule:" not in (ROOT / words[words.index("--config") + 1]).read_text():
            words += ["--rule", "none"]
        train.main(words)
        assert "disk: " in capsys.readouterr().out  # the end of the plan
    elif program == "eval":
        evaluation.main([*words, *model, "--data_dir", str(stand_in), *FAST[2:], "--overwrite"])
        assert (stand_in / words[words.index("--output_dir") + 1] / "scores.json").exists()
    else:
        from scripts.report import tables as report

        words = [str(path) for word in words for path in (sorted(stand_in.glob(word)) if "*" in word else [word])]
        if words[0] == "fisher":
            words += ["--dataset", f"{stand_in / 'rows.jsonl'}:2"]
        {"scripts/report": report, "scripts/merge": merge}[program].main(words)


def test_messages_that_are_explained_are_the_programs_own():
    """What is quoted in the first column of the table of troubleshooting.md."""
    first_column = "\n".join(re.findall(r"^\| (.*?) \|", PAGES["docs/troubleshooting.md"], re.MULTILINE))
    quoted = re.findall(r"`([^`]+)`", first_column)
    folders = (".", "common", "training", "evaluation", "tasks", "sandbox")
    code = "".join(path.read_text() for folder in folders for path in (ROOT / folder).glob("*.py"))
    assert len(quoted) > 12
    for text in quoted:
        assert text in code or text.startswith("accelerate launch"), text
