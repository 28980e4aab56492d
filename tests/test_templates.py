"""From rows to tokens and labels, template by template: pytest tests/test_templates.py"""

import json

import pytest
import torch
from conftest import write_rows
from transformers import AutoTokenizer

import train
from common import sources, templates
from common.config import UserError
from training import data

USER, ASSISTANT = "user", "assistant"


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    return AutoTokenizer.from_pretrained(model_dir)


def with_bos(model_dir, eos=False):
    """A tokenizer that adds a BOS, as Llama's does, and may add an EOS."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>" if eos else "<bos> $A", special_tokens=[("<bos>", 0), ("<eos>", 1)]
    )
    return tokenizer


def turns(*contents, roles=(USER, ASSISTANT)):
    return [{"role": roles[i % len(roles)], "content": c} for i, c in enumerate(contents)]


def trained_text(tokenizer, ids, labels):
    """The text, with what is trained in 【 】."""
    out, inside = "", False
    for token, label in zip(ids, labels, strict=True):
        assert label in (-100, token)
        if (label != -100) != inside:
            out, inside = out + ("】" if inside else "【"), not inside
        out += tokenizer.decode([token])
    return out + "】" * inside


def encode_row(template, row, tokenizer):
    (encoded,) = templates.encode(template, [templates.render(template, row, tokenizer)], tokenizer)
    return encoded


def encode(word, row, tokenizer):
    return trained_text(tokenizer, *encode_row(templates.TEMPLATES[word], row, tokenizer))


# --- pairs -----------------------------------------------------------------------------------------------------------


def test_magicoder_to_the_letter(tokenizer, model_dir):
    row = {"instruction": "Add {x}.", "response": "```python\nx\n```"}
    expected = (
        "You are an exceptionally intelligent coding assistant that consistently delivers accurate and reliable "
        "responses to user instructions.\n\n@@ Instruction\nAdd {x}.\n\n@@ Response\n【```python\nx\n```<eos>】"
    )
    assert encode("magicoder", row, tokenizer) == expected
    for eos in (False, True):  # prompt: BOS once; the response, tokenised apart, has none; one EOS
        assert encode("magicoder", row, with_bos(model_dir, eos)) == "<bos>" + expected


def test_apart_or_as_one_text(tokenizer):
    """Where a token would span prompt and response, Magicoder's rule and MetaMath's differ."""
    from tokenizers import Tokenizer

    assert templates.TEMPLATES["magicoder"].apart and not templates.TEMPLATES["metamath"].apart
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"]["BA"], state["model"]["merges"] = 259, [["B", "A"]]
    tokenizer = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    a, b = (tokenizer(x)["input_ids"][0] for x in "AB")
    for apart, expected in ((True, ([b, a, 1], [-100, a, 1])), (False, ([259, 1], [-100, 1]))):
        pair = templates.Pair(("p", "r"), lambda row: (row["p"], row["r"]), apart)
        assert encode_row(pair, {"p": "B", "r": "A"}, tokenizer) == expected


def test_prompt_and_response_as_they_are(tokenizer, model_dir):
    row = {"prompt": "Q: {a}\n", "response": " A "}
    assert encode("prompt_response", row, tokenizer) == "Q: {a}\n【 A <eos>】"
    assert encode("prompt_response", {**row, "prompt": ""}, with_bos(model_dir)) == "<bos>【 A <eos>】"
    # without BOS nothing predicts the first token
    assert encode("prompt_response", {"prompt": "", "response": "AB"}, tokenizer) == "A【B<eos>】"


# --- conversations ---------------------------------------------------------------------------------------------------


def test_tulu_to_the_letter(tokenizer, model_dir):
    row = {"messages": [{"role": "system", "content": "Be brief. "}, *turns(" Hi\n", "Hello. ", "Bye", "\nBye!")]}
    expected = "<|system|>\nBe brief.\n<|user|>\nHi\n<|assistant|>\n【Hello.<eos>\n】"
    expected += "<|user|>\nBye\n<|assistant|>\n【Bye!<eos>】"
    assert encode("tulu", row, tokenizer) == expected
    for eos in (False, True):
        assert encode("tulu", row, with_bos(model_dir, eos)) == "<bos>" + expected
    # a last turn of the user's is text that is not trained
    unanswered = {"messages": turns("Hi", "Hello.", "Bye")}
    assert encode("tulu", unanswered, tokenizer).endswith("【Hello.<eos>\n】<|user|>\nBye")
    with pytest.raises(UserError, match="roles system, user and assistant, got 'tool'"):
        encode("tulu", {"messages": [{"role": "tool", "content": "x"}]}, tokenizer)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_the_tokenizers_own_chat_template(model_dir):
    tokenizer = with_bos(model_dir)
    row = {"messages": turns("Hi", "Hello", "Bye", "Bye!")}
    with pytest.raises(UserError, match="has no chat template: use template tulu"):
        encode("chat", row, tokenizer)
    tokenizer.chat_template = CHATML
    expected = (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n【Hello<|im_end|>\n】"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n【Bye!<|im_end|>\n】"
    )
    assert encode("chat", row, tokenizer) == expected  # no BOS: the template writes what it wants
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    assert encode("chat", row, tokenizer) == "<bos>" + expected
    # what follows the last answer is cut; a conversation without an answer has nothing to train
    assert encode("chat", {"messages": turns("Hi", "Hello", "Bye")}, tokenizer) == "<bos>" + expected[: len(
        expected.partition("】")[0]
    )] + "】"  # fmt: skip
    assert encode_row(templates.TEMPLATES["chat"], {"messages": turns("Hi")}, tokenizer) == ([], [])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        # as templates do that drop the thoughts of earlier turns
        ("{% for m in messages %}{{ m.content if loop.last else m.content[:2] }}\n{% endfor %}", "before message 2"),
        ("{{ raise_exception('roles must alternate') }}", "refuses the conversation: roles must alternate"),
    ],
)
def test_chat_templates_whose_answers_cannot_be_told(tmp_path, tokenizer, model_dir, template, message):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.chat_template = template
    rows = write_rows(tmp_path / "r.jsonl", [{"messages": turns("Hi there", "Hello", "Bye", "Bye!")}])
    with pytest.raises(UserError, match=f"row 1 of the dataset: the tokenizer's chat template .*{message}"):
        data.tokenise(sources.load_rows(str(rows), ("messages",)), tokenizer, "chat", 512)


def test_empty_messages_are_left_out_and_counted(tmp_path, tokenizer):
    rows = [
        {"messages": turns("Hi", "Hello"), "id": 1},
        {"messages": []},
        {"messages": turns("Hi", "")},
        {"messages": turns("Hi", None)},
        {"messages": turns(" \n", "Hello")},
        {"messages": turns("only a question")},
    ]
    rows = sources.load_rows(str(write_rows(tmp_path / "r.jsonl", rows)), ("messages",))
    examples = data.tokenise(rows, tokenizer, "tulu", 512)
    assert (len(examples), examples.truncated) == (1, 0)
    assert examples.left_out == {"an empty message": 4, "no token to train on within max_length": 1}


def test_messages_from_all_kinds_of_files(tmp_path, tokenizer):
    rows = [{"messages": [{**m, "weight": 1.0} for m in turns("Hi", "Hello")], "id": "a"}] * 2
    write_rows(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    import pandas

    pandas.DataFrame(rows).to_parquet(tmp_path / "c.parquet")
    pandas.DataFrame([{"messages": [{"content": "x", "role": USER}]}]).to_parquet(tmp_path / "d.parquet")
    loaded = sources.load_rows(str(tmp_path), ("messages",)).to_list()
    assert loaded == [{"messages": turns("Hi", "Hello")}] * 6 + [{"messages": turns("x")}]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("Hi", r"line 1: column 'messages' must be a list of \{role, content\}, got str"),
        (["Hi"], "line 1: message 1 must be an object with role and content, got 'Hi'"),
        ([{"from": "human", "value": "Hi"}], "line 1: message 1 must be an object with role and content"),
        ([{"role": 1, "content": "Hi"}], "line 1: message 1: role must be text, got int"),
        ([{"role": USER, "content": ["Hi"]}], "line 1: message 1: content must be text, got list"),
        ([{"role": USER, "content": "\ud800"}], "line 1: message 1: content holds half of a surrogate pair"),
    ],
)
def test_bad_messages(tmp_path, messages, message):
    path = write_rows(tmp_path / "r.jsonl", [{"messages": messages}])
    with pytest.raises(UserError, match=message):
        sources.load_rows(str(path), ("messages",))


def test_bad_messages_in_parquet(tmp_path):
    import pandas

    pandas.DataFrame([{"messages": [{"from": "human", "value": "Hi"}]}]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"column 'messages' must be a list of \{role, content\}, got List"):
        sources.load_rows(str(tmp_path / "a.parquet"), ("messages",))


def test_rows_together_are_encoded_as_one_by_one(tokenizer):
    rows = [
        {"messages": m, "prompt": p, "response": r, "query": p, "instruction": p}
        for m, p, r in (
            (turns("Hi", "Hello", "Bye", "Bye!"), "a\nb", "c"), (turns("a", "b"), "", "de<eos>"),
            (turns("only this"), "x", "y" * 9),
        )
    ]  # fmt: skip
    for word, template in templates.TEMPLATES.items():
        if word != "chat":
            rendered = [templates.render(template, row, tokenizer) for row in rows]
            together = templates.encode(template, rendered, tokenizer)
            assert together == [encode_row(template, row, tokenizer) for row in rows], word


# --- a template in a run ---------------------------------------------------------------------------------------------


def test_the_first_example_is_shown_at_the_start(tmp_path, train_args, capsys):
    rows = [{"messages": turns(f"What is {i}?", f"It is {i}.")} for i in range(20)] + [{"messages": []}]
    path = write_rows(tmp_path / "r.jsonl", rows)
    train.main(train_args(tmp_path / "run", "--dataset", str(path), "--template", "tulu", "--max_steps", "1"))
    said = capsys.readouterr().out
    assert "20 examples (0 cut to max_length 512, 1 left out (1 with an empty message), 0 held out)" in said
    # 9 of the header <|user|>, 11, 14 of <|assistant|>; "It is 0." is 8 and EOS
    assert "\nexample 0 of 20: 43 tokens, 9 of them trained\n  not trained    34 tokens [" in said
    assert r" '<|user|>\nWhat is 0?\n<|assistant|>\n'" in said
    assert "\n  trained         9 tokens [" in said and "] 'It is 0.<eos>'\n" in said


def test_a_template_of_ones_own(tokenizer, monkeypatch):
    """One entry."""
    monkeypatch.setitem(
        templates.TEMPLATES, "mine", templates.Pair(("q", "a"), lambda row: (f"Q: {row['q']}\nA:", " " + row["a"]))
    )
    assert encode("mine", {"q": "1+1?", "a": "2"}, tokenizer) == "Q: 1+1?\nA:【 2<eos>】"


def test_segments_serve_a_prompt_and_one_answer(tokenizer):
    """What DPO needs: the same prompt with two answers, each encoded as the conversation that it would be."""
    prompt = turns("Hi")
    for answer in ("Hello", "Go away"):
        segments = templates.tulu([*prompt, {"role": ASSISTANT, "content": answer}], tokenizer)
        ((ids, labels),) = templates.encode(templates.TEMPLATES["tulu"], [segments], tokenizer)
        assert trained_text(tokenizer, ids, labels) == f"<|user|>\nHi\n<|assistant|>\n【{answer}<eos>】"
    assert torch.tensor(ids).dtype == torch.int64
