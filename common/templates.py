"""From a row to tokens and labels. A template says how a row becomes text, and which parts of the text are trained.

To add one, enter it in TEMPLATES: a `Pair` makes (prompt, response) of a row; a `Conversation` makes segments, trained
or not, of the messages of a conversation, which is also what DPO needs of a prompt's messages and one answer.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from common.config import UserError
from common.sources import MESSAGES

IGNORE = -100  # label of a token that is not trained
PREFERENCES = ("chosen", "rejected")

# ---------------------------------------------------------------------------------------------------------------------
# Texts
# ---------------------------------------------------------------------------------------------------------------------

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
MAGICODER = (
    "You are an exceptionally intelligent coding assistant that consistently delivers accurate and reliable responses "
    "to user instructions.\n\n@@ Instruction\n{instruction}\n\n@@ Response\n"
)


class Segment(NamedTuple):
    """A part of an example's text."""

    text: str
    trained: bool


def metamath(row: dict[str, str]) -> tuple[str, str]:
    """MetaMath's train_math.py: the first line of the query is the instruction, further lines are the input."""
    instruction, _, rest = row["query"].partition("\n")
    template = ALPACA_WITH_INPUT if rest else ALPACA
    return template.format_map({"instruction": instruction, "input": rest}), row["response"]


def magicoder(row: dict[str, str]) -> tuple[str, str]:
    """Magicoder's prompt template."""
    return MAGICODER.format_map(row), row["response"]


def prompt_response(row: dict[str, str]) -> tuple[str, str]:
    """The two columns as they are."""
    return row["prompt"], row["response"]


def tulu(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """open-instruct's chat format (June 2024): `<|role|>`, a line break, the stripped content; EOS after an answer.

    Trained are the answers, their EOS, and the line break before a next turn; the header `<|assistant|>` is not.
    """
    segments = []
    for message in messages:
        role, content = message["role"], message["content"].strip()
        if role not in ("system", "user", "assistant"):
            raise UserError(f"template tulu knows the roles system, user and assistant, got {role!r}")
        if role == "assistant":
            segments += [Segment("<|assistant|>\n", False), Segment(f"{content}{tokenizer.eos_token}\n", True)]
        else:
            segments.append(Segment(f"<|{role}|>\n{content}\n", False))
    segments[-1] = segments[-1]._replace(text=segments[-1].text.rstrip())  # the whole text is stripped
    return segments


def chat(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """The tokenizer's own chat template; trained is what it adds for an assistant's turn to the text before that turn.

    Raises:
        UserError: there is no template, it refuses the messages, or its text for the first messages of a conversation
            is not the beginning of its text for more of them.
    """
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer {tokenizer.name_or_path} has no chat template: use template tulu")

    def render(count: int, to_be_answered: bool) -> str:
        try:
            return tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=to_be_answered)
        except Exception as e:  # Jinja's own, and what the template raises
            raise UserError(f"the tokenizer's chat template refuses the conversation: {e}") from None

    segments, done = [], ""
    for i in [i for i, message in enumerate(messages) if message["role"] == "assistant"]:
        for text, trained in ((render(i, True), False), (render(i + 1, False), True)):
            if not text.startswith(done):
                raise UserError(
                    f"the tokenizer's chat template renders the messages before message {i + 1} otherwise when later "
                    "ones follow, so that the assistant's own text is not known: use template tulu, or one-turn data"
                )
            segments.append(Segment(text[len(done) :], trained))
            done = text
    return segments  # what follows the last answer is not trained: leave it out


# ---------------------------------------------------------------------------------------------------------------------
# Templates: the words of `template`.                                                                      <- edit here
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A row with these text columns is a prompt and a response, which is trained together with an EOS behind it."""

    columns: tuple[str, ...]  # the last one is the response
    render: Callable[[dict[str, str]], tuple[str, str]]
    apart: bool = False  # prompt and response are tokenised apart (Magicoder), not as one text (MetaMath)


@dataclass(frozen=True)
class Conversation:
    """A row's messages, a list of {role, content}, become segments of text."""

    render: Callable[[list[dict[str, str]], PreTrainedTokenizerBase], list[Segment]]
    special_tokens: bool = True  # the tokenizer adds its BOS; a chat template has written its own
    columns: tuple[str, ...] = (MESSAGES,)


TEMPLATES: dict[str, Pair | Conversation] = {
    "metamath": Pair(("query", "response"), metamath),
    "magicoder": Pair(("instruction", "response"), magicoder, apart=True),
    "prompt_response": Pair(("prompt", "response"), prompt_response),
    "tulu": Conversation(tulu),
    "chat": Conversation(chat, special_tokens=False),
}

# ---------------------------------------------------------------------------------------------------------------------
# Tokens and labels
# ---------------------------------------------------------------------------------------------------------------------


class LeftOut(Exception):
    """A row that is not trained on; its text says why, and is counted."""


def columns(template: Pair | Conversation, preferences: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(all columns that a row needs, those of them that are conversations); see render and render_preference."""
    if not preferences:
        return template.columns, (MESSAGES,)
    if isinstance(template, Conversation):
        return PREFERENCES, PREFERENCES
    return (*template.columns[:-1], *PREFERENCES), ()


def render(template: Pair | Conversation, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """The segments of a row.

    Raises:
        LeftOut: a message is empty.
        UserError: the row cannot be rendered; a response is empty.
    """
    if isinstance(template, Conversation):
        messages = row[MESSAGES]
        if not messages or any(not (m["content"] or "").strip() for m in messages):
            raise LeftOut("an empty message")
        return template.render(messages, tokenizer)
    prompt, response = template.render(row)
    if not response.strip():
        raise UserError("the response is empty")
    return [Segment(prompt, False), Segment(response, True)]


def render_preference(
    template: Pair | Conversation, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Segment], list[Segment]]:
    """The segments of the chosen and of the rejected answer to a prompt; trained is the last answer alone.

    The columns `chosen` and `rejected` are conversations with the same messages but for the last one (the schema of
    HuggingFaceH4/ultrafeedback_binarized), or texts beside the template's own columns of the prompt.

    Raises:
        LeftOut: an answer or a message is empty, the answers are equal, or the prompts are not.
        UserError: the row cannot be rendered.
    """
    both = [row[column] for column in PREFERENCES]
    if isinstance(template, Conversation):
        if any(not messages or messages[-1]["role"] != "assistant" for messages in both):
            raise LeftOut("no answer at the end")
        if both[0][:-1] != both[1][:-1]:
            raise LeftOut("different prompts")
        answers = [messages[-1]["content"] or "" for messages in both]
    else:
        answers = both
    if any(not answer.strip() for answer in answers):
        raise LeftOut("an empty answer")
    if answers[0].strip() == answers[1].strip():
        raise LeftOut("equal answers")
    chosen, rejected = (
        render(
            template,
            {MESSAGES: answer} if isinstance(template, Conversation) else {**row, template.columns[-1]: answer},
            tokenizer,
        )
        for answer in both
    )
    for segments in (chosen, rejected):
        segments[:-1] = [segment._replace(trained=False) for segment in segments[:-1]]
    return chosen, rejected


def encode(
    template: Pair | Conversation, rendered: list[list[Segment]], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels (IGNORE where not trained) of rendered rows; the EOS of a Pair is added here.

    As one text, a segment ends after as many tokens as the text up to there has when it is tokenised alone, as in
    MetaMath and open-instruct. `apart`, the segments' own tokens are strung together, as in Magicoder. One
    beginning-of-sequence token if the tokenizer adds one, else none.
    """
    pair, special_tokens = isinstance(template, Pair), getattr(template, "special_tokens", True)
    if pair and template.apart:
        firsts = encode_prompts(tokenizer, [segments[0].text for segments in rendered])
        others = iter(encode_prompts(tokenizer, [s.text for segments in rendered for s in segments[1:]], False))
        pieces = [
            [first, *(next(others) for _ in segments[1:])] for first, segments in zip(firsts, rendered, strict=True)
        ]
        up_to = [list(itertools.accumulate(parts)) for parts in pieces]  # [prompt, prompt + response] of each row
    else:
        texts = [list(itertools.accumulate(s.text for s in segments)) for segments in rendered]
        encoded = iter(encode_prompts(tokenizer, [text for parts in texts for text in parts], special_tokens))
        up_to = [[next(encoded) for _ in parts] for parts in texts]
    out = []
    for segments, prefixes in zip(rendered, up_to, strict=True):
        ids = prefixes[-1] if prefixes else []
        labels, start = [IGNORE] * len(ids), 1  # the first token is never predicted: it is not trained
        for segment, end in zip(segments, map(len, prefixes), strict=True):
            if segment.trained:
                labels[start:end] = ids[start:end]
            start = max(start, end)
        if pair and ids[-1] != tokenizer.eos_token_id:
            ids, labels = [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]
        out.append((ids, labels))
    return out


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], special_tokens: bool = True
) -> list[list[int]]:
    """Token ids of prompts that a response follows: without the EOS that some tokenizers add."""
    *encoded, probe = tokenizer([*prompts, "a"], add_special_tokens=special_tokens, verbose=False)["input_ids"]
    adds_eos = probe[-1] == tokenizer.eos_token_id
    return [ids[:-1] for ids in encoded] if adds_eos else encoded
