"""What scripts/peft_benchmark.sh would run, and what that needs: plan.py NAME WORDS_OF_TRAIN_PY -- NAME WORDS -- ...

It is counted on the published shape of the model and the published number of tokens: neither model nor data is read.
"""

import shlex
import sys
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from common.config import TrainConfig, parse
from common.errors import run_main
from scripts.peft_benchmark.rows import TOKENS
from scripts.report.tables import table
from scripts.reproduce.reduced import SHAPES
from training import plan
from training.masking import build_masker, freeze

LAUNCH = "accelerate launch --config_file configs/accelerate/single_gpu.yaml --num_processes 1"
HEAD = ["run", "weights trained", "memory, at least", "H100 hours at 40 %", "final model", "a checkpoint"]
NOTES = """\
Memory is that of weights, gradients, AdamW, masks and the activations of 4 x 768 tokens; what kernels need in passing
comes on top. Hours are forward and backward of {tokens:,} tokens; masking, generation (1,319 answers of at most 300
tokens a run) and downloads come on top. {disk:.0f} GiB of disk hold all final models and the checkpoints of one run.
Neither model nor data was read: before the first training all are planned again, on the real ones."""


def of_run(name: str, words: list[str], counted: dict[tuple, int]) -> tuple[list[str], int, int]:
    """(the row of the table, bytes of the final model, bytes of the checkpoints) of a training.

    Args:
        counted: bytes of activations by how they are computed: trainings that agree in that share them.
    """
    config = parse(TrainConfig, words)
    cls, shape = SHAPES[config.model]
    architecture = cls(**shape)
    model = plan.on_meta(config, architecture)
    freeze(config, model)
    parameters = list(model.parameters())
    held = plan.held_bytes(config, model, build_masker(config, model), 1)
    final, checkpoint = held["weights"], held["weights"] + held["optimizer"]
    rows, length = config.global_batch_size, config.max_length
    if (how := (config.master_dtype, config.mixed_precision, config.adapter)) not in counted:
        counted[how] = plan.activation_bytes(config, architecture, rows, length, rows * (length - 1))
    held["activations"] = counted[how]
    flops = TOKENS * plan.flops_per_token(model, TOKENS / (config.max_steps * rows))
    hours = f"{flops / (0.4 * plan.PEAK_FLOPS['H100']) / 3600:.2f}"
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    memory, *disk = [f"{n / 2**30:.1f} GiB" for n in (plan.most_at_once(held), final, checkpoint)]
    return [name, f"{trained:,}", memory, hours, *disk], final, (config.keep_checkpoints + 1) * checkpoint


def main() -> None:
    rows, finals, most, counted = [], 0, 0, {}
    for is_separator, group in groupby(sys.argv[1:], lambda word: word == "--"):
        if not is_separator:
            name, *words = group
            print(f"{LAUNCH} train.py {shlex.join(words)}")
            row, final, checkpoints = of_run(name, words, counted)
            rows.append(row)
            finals, most = finals + final, max(most, checkpoints)
    print(f"\n{table(HEAD, rows)}\n{NOTES.format(tokens=TOKENS, disk=(finals + most) / 2**30)}")


if __name__ == "__main__":
    run_main(main, "plan.py")
