"""GMTCallback in transformers' Trainer and in TRL's SFTTrainer against train.py: pytest tests/test_callback.py"""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerState, TrainingArguments

import gmt
import train
from common import sources
from common.templates import metamath
from gmt_callback import GMTCallback
from training import data

SETTINGS = {
    "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_steps": 1, "learning_rate": 1e-3,
    "max_grad_norm": 1.0, "report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
}  # fmt: skip


@pytest.fixture
def grads(monkeypatch):
    """Every call of mask_gradients: (step, gradients before, gradients after)."""
    calls, mask_gradients = [], gmt.Masker.mask_gradients

    def look(self, step, **kwargs):
        before = {n: p.grad.clone() for n, p in self.eligible.items()}
        result = mask_gradients(self, step, **kwargs)
        calls.append((step, before, {n: p.grad.clone() for n, p in self.eligible.items()}))
        return result

    monkeypatch.setattr(gmt.Masker, "mask_gradients", look)
    return calls


def assert_same_gradients_and_masks(ours, theirs):
    (step, before, after), (their_step, their_before, their_after) = ours, theirs
    assert step == their_step == 0 and before.keys() == their_before.keys()
    flips = total = 0
    for name, g in before.items():
        assert (g - their_before[name]).norm() / g.norm() < 1e-5, name
        # the two differ by rounding, which can turn an entry or two at the threshold
        flips += ((after[name] != 0) != (their_after[name] != 0)).sum().item()
        total += g.numel()
        assert after[name].count_nonzero() < g.numel()
    assert flips <= 1e-4 * total, f"{flips} of {total} entries of the masks differ"


@pytest.fixture
def ours(tmp_path, train_args, grads):
    train.main(train_args(tmp_path / "run", "--rule", "gmt", "--keep_ratio", "0.3", "--max_steps", "1", "--seed", "3"))
    (call,) = grads
    grads.clear()
    return call


@pytest.fixture
def first_rows(rows_file):
    rows = sources.load_rows(str(rows_file), ("query", "response"))
    return rows.select(data.step_examples(70, 16, 3, 0))


def test_in_trainer(tmp_path, model_dir, first_rows, ours, grads):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    rows = data.tokenise(first_rows, tokenizer, "metamath", 512).rows.to_list()

    def collate(batch):
        width = max(len(r["input_ids"]) for r in batch)
        pad = lambda r, k, value: r[k] + [value] * (width - len(r[k]))  # noqa: E731
        return {
            "input_ids": torch.tensor([pad(r, "input_ids", 0) for r in batch]),
            "labels": torch.tensor([pad(r, "labels", -100) for r in batch]),
        }

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    callback = GMTCallback("gmt", keep_ratio=0.3)
    args = TrainingArguments(tmp_path / "hf", **SETTINGS)
    Trainer(model, args, data_collator=collate, train_dataset=rows, callbacks=[callback]).train()
    assert_same_gradients_and_masks(ours, *grads)


def test_in_sft_trainer(tmp_path, model_dir, first_rows, ours, grads):
    trl = pytest.importorskip("trl")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    pairs = [metamath(row) for row in first_rows]
    dataset = Dataset.from_list([{"prompt": p, "completion": r} for p, r in pairs])
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    args = trl.SFTConfig(
        str(tmp_path / "trl"), **SETTINGS, max_length=512, completion_only_loss=True, bf16=False,
        gradient_checkpointing=False,
    )  # fmt: skip
    callback = GMTCallback("gmt", keep_ratio=0.3)
    trl.SFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer, callbacks=[callback]).train()
    assert_same_gradients_and_masks(ours, *grads)


def test_saving_and_loading_call_no_mask_and_a_resumed_trainer_goes_on(tmp_path, model_dir, first_rows, grads):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    rows = [r for r in data.tokenise(first_rows, tokenizer, "metamath", 512).rows.to_list()]
    settings = {**SETTINGS, "per_device_train_batch_size": 1, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}

    def run(resume):
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        args = TrainingArguments(tmp_path / "hf", **settings)
        trainer = Trainer(model, args, train_dataset=rows, callbacks=[GMTCallback("rmt", keep_ratio=0.3)])
        trainer.train(resume_from_checkpoint=resume)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    whole = run(None)
    assert [step for step, _, _ in grads] == [0, 1, 2, 3]
    resumed = run(str(tmp_path / "hf" / "checkpoint-2"))
    assert [step for step, _, _ in grads] == [0, 1, 2, 3, 2, 3]
    assert torch.equal(whole, resumed)


def test_an_overflow_is_left_to_the_scaler():
    """Under fp16 the scaler skips the step, and has to see that it overflowed."""
    model = torch.nn.Linear(4, 4)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.weight.grad[1, 2] = float("inf")
    GMTCallback("gmt", 0.25).on_pre_optimizer_step(None, TrainerState(), None, model=model)
    assert not model.weight.grad.isfinite().all()


def test_options_reach_the_masks_and_a_second_training_has_its_own():
    callback = GMTCallback("gmt", 0.25, exclude=["a.*"])
    for _ in range(2):
        model = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4) for name in "ab"})
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        callback.on_train_begin(None, None, None)
        callback.on_pre_optimizer_step(None, TrainerState(), None, model=model)
        assert [int(model[name].weight.grad.count_nonzero()) for name in "ab"] == [16, 4]


@pytest.mark.parametrize("name", ["DeepSpeed", "FSDP1"])
def test_where_no_matrix_has_a_gradient_nothing_is_masked_in_silence(name):
    model = torch.nn.Linear(4, 4)  # DeepSpeed has stepped already
    if name == "FSDP1":  # flat, and now and then of two dimensions
        model = type("FullyShardedDataParallel", (torch.nn.Linear,), {})(4, 4)
        model.weight.grad = torch.ones(4, 4)
    with pytest.raises(ValueError, match="no matrix has a gradient here, .* DeepSpeed and FSDP1 hide them"):
        GMTCallback("gmt", 0.25).on_pre_optimizer_step(None, TrainerState(), None, model=model)
    GMTCallback("none").on_pre_optimizer_step(None, TrainerState(), None, model=model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "gmt", "keep_ratio": 0.2, "masked_weights": "frozen"}, "cannot do masked_weights 'frozen'"),
        ({"rule": "mofo", "keep_ratio": 0.2}, "cannot do masked_weights 'update'"),
        ({"rule": "mofo", "keep_ratio": 0.2, "masked_weights": "momentum"}, "cannot do score 'moment'"),
        ({"rule": "sift", "keep_ratio": 0.2}, "masks at each step, refresh_every 0 would have to be in the checkpoint"),
        ({"rule": "hft"}, "hft masks no gradients: call gmt.freeze_half"),
        ({"rule": "gmt"}, "rule gmt needs a keep_ratio"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        GMTCallback(**settings)
