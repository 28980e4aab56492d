"""What a benchmark is: where its items are, the prompt of an item, and the verdict on an answer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from common.templates import apply_chat_template
from tasks.source import Source


@dataclass(frozen=True)
class Chat:
    """A prompt for a chat model: one user turn, and the words that the answer is made to begin with."""

    user: str
    prefix: str = ""


@dataclass(frozen=True)
class Format:
    """A task's prompt in one format, and the strings that end an answer there.

    `prompt` makes the text of an item, or a Chat, which `render` wraps. It is given the tokenizer for protocols that
    count tokens.
    """

    prompt: Callable[[dict, PreTrainedTokenizerBase], "str | Chat"]
    stop: tuple[str, ...] = ()  # a completion ends before the first of these


@dataclass(frozen=True)
class Options:
    """What judges may need to know of the machine and of the user's wishes."""

    workers: int = 1  # processes that judge at the same time
    allow_unsafe_code: bool = False  # run programs without a sandbox


# An answer of the model: {"completions": [...], "finish": [...], "tokens": [...]} with one entry per sample, or
# {"logprobs": [...] or None} with one entry per candidate (None: the prompt is longer than the context). A judge gets
# the word of the prompt's format with it, as "format".
Answer = dict[str, Any]
Judge = Callable[[list[dict], list[Answer], Options], list[dict]]


@dataclass(frozen=True)
class Task:
    """A benchmark under a named protocol. Prompts and verdicts are pure functions and can be made again at any time."""

    name: str
    protocol: str
    # The items, dicts that JSON can hold. Keys that begin with "_" serve the prompt or the judge and are not stored.
    load: Callable[[Source], list[dict]]
    formats: dict[str, Format]  # by the word of --prompt_format; the first is the protocol's default
    # (items, answers, options) -> a verdict per item: a number in [0, 1] (or a bool) for each metric, and whatever is
    # worth storing: "extracted" (None is counted), "timeouts" (a number, summed).
    judge: Judge
    metrics: tuple[str, ...] = ("correct",)  # the first is the score

    max_new_tokens: int = 0
    samples: int = 1  # completions per item; each has its own seed
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0

    # Instead of generating: log-probabilities of candidates. "continuation": of the whole " " + candidate after the
    # prompt, summed. "next_token": of the last token of " " + candidate at the prompt's end. "prompt": of the prompt
    # itself, all tokens but the first, summed; it needs no candidates.
    candidates: Callable[[dict], list[str]] | None = None
    scoring: Literal["continuation", "next_token", "prompt"] = "continuation"
    max_prompt_tokens: int | None = None  # longer prompts are cut at their end

    versions: dict[int, str] = field(default_factory=dict)  # number of items -> which release of the data set it is
    group: Callable[[dict], str] | None = None  # scores are reported per group, too (a subject, a language)
    weight: str = ""  # key of the verdicts: the score is the mean weighted with it
    unit: Literal["share", "nats"] = "share"  # share: in [0, 1], shown as per cent; nats: a loss, less is better
    macro: bool = False  # the score is the unweighted mean over groups, not over items
    judge_needs_data: bool = False  # the judge uses "_" keys: --score_only reads the data again
    preflight: Callable[[Options], None] | None = None  # raises UserError where this machine cannot judge

    @property
    def generates(self) -> bool:
        """Whether the model writes answers, whose alternative is that log-probabilities are asked for."""
        return not self.candidates and self.scoring != "prompt"


def tulu(chat: Chat) -> str:
    """The chat format of open-instruct (eval/templates.py), ready for the assistant's answer; no BOS."""
    return f"<|user|>\n{chat.user}\n<|assistant|>\n{chat.prefix}"


def render(prompt: "str | Chat", format: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that the model goes on with, without the BOS that the tokenizer adds.

    A Chat is wrapped as the format says: `tulu`, or `chat`, the tokenizer's own template, which writes its own BOS.

    Raises:
        UserError: the tokenizer has no chat template, or one that does not parse or refuses the conversation.
    """
    if isinstance(prompt, str):
        return prompt
    if format == "tulu":
        return tulu(prompt)
    if not tokenizer.chat_template:
        raise UserError(f"prompt_format {format}: the tokenizer {tokenizer.name_or_path} has no chat template")
    messages = [{"role": "user", "content": prompt.user}]
    if not prompt.prefix:
        text = apply_chat_template(tokenizer, messages, to_be_answered=True)
    else:  # the answer's beginning, cut where it goes on: templates strip and close what they are given
        marker = "<<goes on>>"
        messages.append({"role": "assistant", "content": prompt.prefix + marker})
        text, found, _ = apply_chat_template(tokenizer, messages, to_be_answered=False).partition(marker)
        if not found:
            raise UserError(f"prompt_format {format}: the tokenizer's chat template leaves out what an answer says")
    return text


def each(score: Callable[[dict, str], dict]) -> Judge:
    """A judge from a function (item, completion) -> verdict, for tasks of one sample and cheap, safe scoring."""

    def judge(items: list[dict], answers: list[Answer], options: Options) -> list[dict]:
        return [score(item, answer["completions"][0]) for item, answer in zip(items, answers, strict=True)]

    return judge
