"""From a row to tokens and labels. A template says how a row becomes text, and which parts of the text are trained.

To add one, enter it in TEMPLATES: a `Pair` makes (prompt, response) of a row; a `Conversation` makes segments, trained
or not, of the messages of a conversation, which is also what DPO needs of a prompt's messages and one answer.
"""

import itertools
import json
import re
import unittest.mock
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import jinja2
import jinja2.meta
from transformers import PreTrainedTokenizerBase

from common.errors import UserError, one_line
from common.sources import EXTRAS, MESSAGES, check_messages, with_extras

IGNORE = -100  # label of a token that is not trained
PREFERENCES = ("chosen", "rejected")
PROMPT = "prompt"  # optional column beside preferences: what stands in front of both

# What a chat template that asks for today's date is told, in training and in scoring: the text of an example must not
# change overnight. It is the date that Llama 3.1's template names where it cannot ask.
TODAY = datetime(2024, 7, 26)
# Keys of a row or message without which the text would say something else: rendered, or refused.
CALLS = ("tools", "documents", "tool_calls", "function_call")

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
PEFT = "Question: {question} Think step by step.\nAnswer:"


class Segment(NamedTuple):
    """A part of an example's text."""

    text: str
    trained: bool


def alpaca(row: dict[str, str]) -> tuple[str, str]:
    """Stanford Alpaca's two prompts: one for rows with an input, one for those whose input is empty."""
    return (ALPACA_WITH_INPUT if row["input"] else ALPACA).format_map(row), row["output"]


def metamath(row: dict[str, str]) -> tuple[str, str]:
    """MetaMath's train_math.py: the first line of the query is the instruction, further lines are the input."""
    instruction, _, rest = row["query"].partition("\n")
    return alpaca({"instruction": instruction, "input": rest, "output": row["response"]})


def peft_metamath(row: dict[str, str]) -> tuple[str, str]:
    """The prompt of peft's MetaMathQA benchmark. The response follows its colon without a space."""
    return PEFT.format_map({"question": row["query"]}), row["response"]


def magicoder(row: dict[str, str]) -> tuple[str, str]:
    """Magicoder's prompt template."""
    return MAGICODER.format_map(row), row["response"]


def prompt_response(row: dict[str, str]) -> tuple[str, str]:
    """The two columns as they are."""
    return row["prompt"], row["response"]


def tulu(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, variables: dict[str, Any] | None = None
) -> list[Segment]:
    """open-instruct's chat format (June 2024): `<|role|>`, a line break, the stripped content; EOS after an answer.

    Trained are the answers, their EOS, and the line break before a next turn; the header `<|assistant|>` is not.
    """
    for name in CALLS:
        if name in (variables or {}) or any(name in message for message in messages):
            raise UserError(f"template tulu knows no {name!r}: use template chat, or delete them from the data")
    segments = []
    for message in messages:
        role, content = message["role"], message["content"].strip()
        if role not in ("system", "user", "assistant"):
            raise UserError(f"template tulu knows the roles system, user and assistant, got {role!r}")
        if role == "assistant":
            segments += [Segment("<|assistant|>\n", False), Segment(f"{content}{tokenizer.eos_token}\n", True)]
        else:
            segments.append(Segment(f"<|{role}|>\n{content}\n", False))
    segments[-1] = segments[-1]._replace(text=segments[-1].text.rstrip())  # the text as a whole is stripped
    return segments


def chat(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, variables: dict[str, Any] | None = None
) -> list[Segment]:
    """The tokenizer's own chat template; trained is what it adds for an assistant's turn to the text before that turn.

    Args:
        messages: with all keys that they have in the data: the template takes what it knows.
        variables: what the template is given beside them, such as tools.
    Raises:
        UserError: there is no template; it refuses the messages, leaves one of them or its calls out, or its text for
            the first messages of a conversation is not the beginning of its text for more of them.
    """
    variables = variables or {}
    source = chat_template(tokenizer)
    for name in CALLS:
        if (name in variables or any(name in m for m in messages)) and not re.search(rf"\b{name}\b", source):
            raise UserError(f"the tokenizer's chat template does not render {name!r}: delete them from the data")
    for i, message in enumerate(messages):
        role = message["role"]
        if role in OTHER_NAMES and not re.search(rf"\b{role}\b", source):
            raise UserError(f"message {i + 1}: chat templates do not know the role {role!r}: use {OTHER_NAMES[role]!r}")

    segments, done, end = [], "", 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        end = i + 1
        for upto, trained in ((i, False), (end, True)):
            text = apply_chat_template(tokenizer, messages[:upto], not trained, **variables)
            if not text.startswith(done):
                raise UserError(
                    f"the tokenizer's chat template renders the messages before message {i + 1} otherwise when later "
                    "ones follow, so that the assistant's own text is not known: use template tulu, or one-turn data"
                )
            segments.append(Segment(text[len(done) :], trained))
            done = text
    for i, message in enumerate(messages[:end], 1):
        content = (message["content"] or "").rpartition("</think>")[2].strip()  # earlier thoughts may be left out
        if content not in done and json.dumps(content, ensure_ascii=False)[1:-1] not in done:
            raise UserError(
                f"the tokenizer's chat template leaves out the content of message {i} (role {message['role']})"
            )
    return segments  # what follows the last answer is not trained: leave it out


OTHER_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant", "ai": "assistant"}


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The source of a tokenizer's chat template, or of all it has, one after the other."""
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path} has no chat template, as most base models have none: use tulu"
        )
    source = tokenizer.chat_template
    return source if isinstance(source, str) else "\n".join(source.values())


def apply_chat_template(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], to_be_answered: bool, **variables
) -> str:
    """The text of messages by the tokenizer's own chat template, for which it is always TODAY.

    Args:
        to_be_answered: add what begins an assistant's turn.
        variables: of the template, such as tools.
    Raises:
        UserError: the template does not parse, or refuses the messages.
    """
    if not messages and not to_be_answered:
        return ""
    clock = unittest.mock.Mock(now=lambda: TODAY)
    try:
        with unittest.mock.patch("transformers.utils.chat_template_utils.datetime", clock):
            return tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=to_be_answered, **variables
            )
    except jinja2.TemplateSyntaxError as e:
        raise UserError(f"the tokenizer's chat template does not parse, line {e.lineno}: {e.message}") from None
    except Exception as e:  # Jinja's own, and what the template raises
        reason = one_line(e)
        raise UserError(f"the tokenizer's chat template refuses the conversation: {reason}") from None


def chat_variables(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The names that the tokenizer's chat template expects beside the messages and what transformers gives it."""
    source = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", chat_template(tokenizer))  # transformers' own tag
    try:
        parsed = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source)
    except jinja2.TemplateSyntaxError as e:
        raise UserError(f"the tokenizer's chat template does not parse, line {e.lineno}: {e.message}") from None
    given = {"add_generation_prompt", "raise_exception", "strftime_now", *tokenizer.special_tokens_map}
    return jinja2.meta.find_undeclared_variables(parsed) - given - {MESSAGES, "continue_final_message"}


def turn_end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that ends an assistant's turn in the tokenizer's chat template: the first special one behind the text.

    Returns:
        its id; an empty list where there is no chat template, or where text alone ends a turn.
    """
    answer = "the answer"
    messages = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": answer}]
    try:
        chat_template(tokenizer)
        behind = apply_chat_template(tokenizer, messages, False).rpartition(answer)[2]
    except UserError:
        return []
    special = tokenizer.added_tokens_decoder
    return [i for i in tokenizer(behind, add_special_tokens=False)["input_ids"] if i in special][:1]


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
    """A row's messages, a list of {role, content, ...}, become segments of text.

    render takes messages, tokenizer, and the row's `variables`, columns of these names that are not empty.
    """

    render: Callable[[list[dict[str, Any]], PreTrainedTokenizerBase, dict[str, Any]], list[Segment]]
    special_tokens: bool = True  # the tokenizer adds its BOS; a chat template has written its own
    columns: tuple[str, ...] = (MESSAGES,)
    system_may_be_empty: bool = False  # as in Tulu V2's rows from Open-Orca, which open-instruct trains
    variables: Callable[[PreTrainedTokenizerBase], set[str]] = lambda tokenizer: set()
    turn_ends: Callable[[PreTrainedTokenizerBase], list[int]] = lambda tokenizer: [tokenizer.eos_token_id]


TEMPLATES: dict[str, Pair | Conversation] = {
    "metamath": Pair(("query", "response"), metamath),
    "alpaca": Pair(("instruction", "input", "output"), alpaca),
    "peft_metamath": Pair(("query", "response"), peft_metamath),
    "magicoder": Pair(("instruction", "response"), magicoder, apart=True),
    "prompt_response": Pair(("prompt", "response"), prompt_response),
    "tulu": Conversation(tulu, system_may_be_empty=True),
    "chat": Conversation(chat, special_tokens=False, variables=chat_variables, turn_ends=turn_end_ids),
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


def optional_columns(
    template: Pair | Conversation, preferences: bool, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, ...]:
    """Columns that are read where a row has them: a prompt for both answers, what the template renders or refuses."""
    if isinstance(template, Pair):
        return ()
    names = {*template.variables(tokenizer), *CALLS, "chat_template_kwargs"}
    return tuple(sorted(names | {PROMPT} if preferences else names))


def turn_ends(template: Pair | Conversation, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a trained answer; none where only text does."""
    return [tokenizer.eos_token_id] if isinstance(template, Pair) else template.turn_ends(tokenizer)


def render(template: Pair | Conversation, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """The segments of a row of load_rows.

    Raises:
        LeftOut: a message (but the system's) or a response is empty.
        UserError: the row cannot be rendered.
    """
    if isinstance(template, Conversation):
        row = with_extras(row)
        return _render_messages(template, row[MESSAGES], _variables(row, template.columns), tokenizer)
    prompt, response = template.render(row)
    if not response.strip():
        raise LeftOut("an empty response")
    return [Segment(prompt, False), Segment(response, True)]


def _variables(row: dict[str, Any], columns: tuple[str, ...]) -> dict[str, Any]:
    """What a row gives to the chat template beside its conversations."""
    given = {name: value for name, value in row.items() if name not in (*columns, PROMPT, EXTRAS)}
    more = given.pop("chat_template_kwargs", {})
    if not isinstance(more, dict):
        raise UserError(f"chat_template_kwargs must be an object, got {type(more).__name__}")
    return {**given, **more}


def _render_messages(
    template: Conversation,
    messages: list[dict[str, Any]],
    variables: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
) -> list[Segment]:
    may_be_empty = {"system"} if template.system_may_be_empty else set()
    if not messages or any(_is_empty(m) for m in messages if m["role"] not in may_be_empty):
        raise LeftOut("an empty message")
    return template.render([{**m, "content": m["content"] or ""} for m in messages], tokenizer, variables)


def _is_empty(message: dict[str, Any]) -> bool:
    return not (message["content"] or "").strip() and not message.get("tool_calls")


def render_preference(
    template: Pair | Conversation, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Segment], list[Segment]]:
    """The segments of the chosen and of the rejected answer to a prompt; trained is the last answer alone.

    The columns `chosen` and `rejected` are texts beside the template's own columns of the prompt, or conversations with
    the same messages but for the last one (the schema of HuggingFaceH4/ultrafeedback_binarized). A column `prompt`,
    messages or the user's text, stands in front of conversations that do not begin with it (TRL's explicit format).

    Raises:
        LeftOut: an answer or a message is empty, the answers are equal, the prompts are not or are not there, or both
            answers repeat the prompt.
        UserError: the row cannot be rendered.
    """
    if isinstance(template, Conversation):
        row = with_extras(row)
        variables = _variables(row, PREFERENCES)
        both = [_with_prompt(row.get(PROMPT, []), row[column]) for column in PREFERENCES]
        if any(not messages or messages[-1]["role"] != "assistant" for messages in both):
            raise LeftOut("no answer at the end")
        if both[0][:-1] != both[1][:-1]:
            raise LeftOut("different prompts")
        if all(message["role"] == "system" and _is_empty(message) for message in both[0][:-1]):
            raise LeftOut("no prompt")
        answers = [messages[-1]["content"] or "" for messages in both]
        if any(not text.strip() and not m[-1].get("tool_calls") for text, m in zip(answers, both, strict=True)):
            raise LeftOut("an empty answer")
        if answers[0].strip() == answers[1].strip() and both[0][-1].get("tool_calls") == both[1][-1].get("tool_calls"):
            raise LeftOut("equal answers")
        chosen, rejected = (_render_messages(template, messages, variables, tokenizer) for messages in both)
    else:
        answers = [row[column] for column in PREFERENCES]
        if any(not answer.strip() for answer in answers):
            raise LeftOut("an empty answer")
        if answers[0].strip() == answers[1].strip():
            raise LeftOut("equal answers")
        prompt = row[template.columns[0]].strip()
        if prompt and all(answer.strip().startswith(prompt) for answer in answers):
            raise LeftOut("answers that repeat the prompt")
        chosen, rejected = (render(template, {**row, template.columns[-1]: a}, tokenizer) for a in answers)
    for segments in (chosen, rejected):
        segments[:-1] = [segment._replace(trained=False) for segment in segments[:-1]]
    return chosen, rejected


def _with_prompt(prompt: str | list[dict[str, Any]], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages behind a prompt, unless they begin with it; LeftOut where they begin with another one."""
    if isinstance(prompt, str):  # beside whole conversations it is their first question once more
        if any(message["role"] == "user" for message in messages):
            return messages
        system = list(itertools.takewhile(lambda message: message["role"] == "system", messages))
        return [*system, {"role": "user", "content": prompt}, *messages[len(system) :]]
    check_messages(prompt, "", f"column {PROMPT!r}")
    prompt = [{"content": None, **{k: v for k, v in message.items() if v is not None}} for message in prompt]
    asked, texts = ([(m["role"], (m["content"] or "").strip()) for m in part] for part in (prompt, messages))
    mine, theirs = (len(list(itertools.takewhile(lambda m: m[0] == "system", part))) for part in (asked, texts))
    if asked == texts[: len(asked)]:
        return messages
    if not theirs and asked[mine:] == texts[: len(asked) - mine]:  # the system's message stands in the prompt alone
        return [*prompt[:mine], *messages]
    if not mine and asked == texts[theirs : theirs + len(asked)]:  # or in the answers
        return messages
    if texts and texts[0][0] in ("system", "user"):
        raise LeftOut("a prompt that its answers do not begin with")
    return [*prompt, *messages]


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
        if not pair:
            _check_eos("".join(segment.text for segment in segments), ids, special_tokens, tokenizer)
        elif ids[-1] != tokenizer.eos_token_id:
            ids, labels = [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]
        out.append((ids, labels))
    return out


def _check_eos(text: str, ids: list[int], special_tokens: bool, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError where an EOS that stands in a text has not become its token."""
    eos = tokenizer.eos_token_id
    added = special_tokens and tokenizer.bos_token_id == eos and ids[:1] == [eos]  # one token begins and ends texts
    if text.count(tokenizer.eos_token) != ids.count(eos) - added:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path} does not make one token of {tokenizer.eos_token!r} in a text: its "
            "tokenizer.json should list it as an added token with special true and normalized false"
        )


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], special_tokens: bool = True
) -> list[list[int]]:
    """Token ids of prompts that a response follows: without the EOS that some tokenizers add."""
    *encoded, probe = tokenizer([*prompts, "a"], add_special_tokens=special_tokens, verbose=False)["input_ids"]
    adds_eos = probe[-1] == tokenizer.eos_token_id
    return [ids[:-1] for ids in encoded] if adds_eos else encoded
