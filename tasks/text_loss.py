"""What a model still knows of plain text: its mean loss per token on texts that it was not fine-tuned on.

This is how peft's MetaMathQA benchmark measures forgetting (method_comparison/MetaMathQA): texts cut to 768 tokens, the
mean over all tokens of all texts, in nats. What counts is the rise against the base model, on the same texts.
"""

from common.hub import is_local
from common.sources import ROW_FILES
from tasks.general import squad_rows
from tasks.source import Source
from tasks.task import Answer, Format, Options, Task

HUB = ("HuggingFaceFW/finewiki", None, "train")  # Wikipedia, as in peft's benchmark
HUB_TEXTS = 100  # the first ones, as there
COLUMNS = {"text": str}


def load_texts(source: Source) -> list[dict]:
    """Texts of a file or Hub dataset with a column `text` (--tasks text_loss=FILE, or =OWNER/NAME), else of Wikipedia.

    A file gives all of its texts, the Hub the first 100. With --data_dir Wikipedia is the different passages of
    TyDiQA's English development part.
    """
    if source.file and not is_local(source.file) and not source.file.endswith(ROW_FILES):
        name, source.file = source.file, ""
        rows = source.first_rows((name, None, "train"), HUB_TEXTS, COLUMNS)
    elif source.file:
        rows = source.rows("", HUB, COLUMNS)
    elif source.folder:
        passages = [row["context"] for row in squad_rows(source, "dev", "validation", ["english"])["english"]]
        rows = [{"text": text} for text in dict.fromkeys(passages)]
    else:
        rows = source.first_rows(HUB, HUB_TEXTS, COLUMNS)
    return [{"text": row["text"]} for row in rows]


def judge_texts(items: list[dict], answers: list[Answer], options: Options) -> list[dict]:
    """The loss of each text and the number of tokens that it is a mean over: all but the first."""
    verdicts = []
    for answer in answers:
        tokens = len(answer["prompt_ids"]) - 1
        loss = None if answer["logprobs"] is None else -answer["logprobs"][0] / tokens
        verdicts.append({"loss": loss, "scored_tokens": tokens})
    return verdicts


TEXT_LOSS = Task(
    name="text_loss",
    protocol="peft",
    load=load_texts,
    formats={"base": Format(lambda item, _: item["text"])},
    judge=judge_texts,
    metrics=("loss",),
    unit="nats",
    scoring="prompt",
    max_prompt_tokens=768,
    weight="scored_tokens",
)
