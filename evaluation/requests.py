"""From items to what the model is asked, and from its responses to the stored answers.

An item becomes one request per sample, or one per candidate whose probability is asked for.
"""

from collections import defaultdict
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from common.templates import encode_prompts
from evaluation.task_run import TaskRun
from tasks.task import render


@dataclass
class Request:
    """One sample of an item, or one of its candidates."""

    item: int
    part: int  # which sample or candidate
    ids: list[int]
    start: int = 0  # where the candidate begins in ids
    choices: tuple[int, ...] = ()  # tokens whose probabilities are asked for at the end


def render_prompts(run: TaskRun, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each item's prompt."""
    return [render(run.format.prompt(item, tokenizer), run.format_name, tokenizer) for item in run.items]


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], special_tokens: bool) -> list[list[int]]:
    """Token ids: one BOS if the tokenizer adds one, even where the text brings another, and no EOS.

    Args:
        special_tokens: whether the tokenizer adds its own; see TaskRun.
    """
    bos = tokenizer.bos_token_id
    encoded = encode_prompts(tokenizer, texts, special_tokens)
    return [ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids for ids in encoded]


def make_requests(
    run: TaskRun, texts: list[str], prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase
) -> list[Request]:
    """The requests of all items, the longest first: so memory fails early.

    Args:
        texts, prompts: the prompt of each item, and its token ids.
    """
    task, requests = run.task, []
    for i, (item, text, prompt) in enumerate(zip(run.items, texts, prompts, strict=True)):
        if task.generates:
            requests += [Request(i, part, prompt) for part in range(task.samples)]
        elif task.scoring == "prompt":
            if len(prompt) < 2:
                raise UserError(f"task {task.name}: item {i + 1} has {len(prompt)} token, and the first is not scored")
            requests.append(Request(i, 0, prompt, 1))
        elif task.scoring == "next_token":
            tokens = [tokenizer.encode(f" {c}", add_special_tokens=False)[-1] for c in task.candidates(item)]
            requests.append(Request(i, 0, prompt, len(prompt), tuple(tokens)))
        else:
            space = "" if text[-1:] in (" ", "\n") else " "
            texts_of_parts = [text + space + c for c in task.candidates(item)]
            for part, ids in enumerate(encode(tokenizer, texts_of_parts, run.special_tokens)):
                requests.append(Request(i, part, ids, min(len(prompt), len(ids) - 1)))
    return sorted(requests, key=lambda request: (-len(request.ids), request.item, request.part))


def merge_responses(run: TaskRun, responses: list[dict], texts: list[str], prompts: list[list[int]]) -> list[dict]:
    """One line per item, of the responses to the requests that it became."""
    of_item: dict[int, list[dict]] = defaultdict(list)
    for response in sorted(responses, key=lambda response: (response["id"], response["part"])):
        of_item[response["id"]].append(response)
    lines = []
    for i, item in enumerate(run.items):
        parts = of_item[i]
        if not run.task.generates:
            known = all(part["logprobs"] is not None for part in parts)
            answer = {"logprobs": [value for part in parts for value in part["logprobs"]] if known else None}
        else:
            names = {"completion": "completions", "tokens": "tokens", "finish": "finish"}
            answer = {plural: [part[name] for part in parts] for name, plural in names.items()}
        stored = {key: value for key, value in item.items() if not key.startswith("_")}
        lines.append({"id": i, "item": stored, "prompt": texts[i], "prompt_ids": prompts[i], **answer})
    return lines
