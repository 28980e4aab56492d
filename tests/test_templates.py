"""From rows to tokens and labels, template by template: pytest tests/test_templates.py"""

import gzip
import json
import shutil

import datasets
import pandas
import pytest
import torch
from conftest import make_model, write_rows
from transformers import AutoTokenizer, GenerationConfig, LlamaTokenizer

import train
from common import sources, templates
from common.config import TrainConfig, parse
from common.errors import UserError
from common.hub import from_pretrained, save_tokenizer
from training import data, loading

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
    with pytest.raises(UserError, match="has no chat template, as most base models have none: use tulu"):
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


def test_an_empty_system_message_stays(tmp_path, tokenizer):
    """As in open-instruct: Open-Orca's part of Tulu V2 has them."""
    messages = [{"role": "system", "content": ""}, *turns("Hi", "Hello")]
    path = write_rows(tmp_path / "r.jsonl", [{"messages": messages}, {"messages": messages[:1]}])
    examples = load(path, "tulu", tokenizer)
    assert examples.left_out == {"no token to train on within max_length": 1}
    assert tokenizer.decode(examples.rows[0]["input_ids"]) == "<|system|>\n\n<|user|>\nHi\n<|assistant|>\nHello<eos>"
    tokenizer.chat_template = CHATML  # a chat template may refuse one
    path = write_rows(tmp_path / "c.jsonl", [{"messages": messages}, {"messages": turns("Hi", "Hello")}])
    assert load(path, "chat", tokenizer).left_out == {"an empty message": 1}
    pair = {name: [messages[0], {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    whole = {name: [messages[0], *turns("Hi", name)] for name in ("chosen", "rejected")}
    path = write_rows(tmp_path / "p.jsonl", [pair, whole])
    assert load(path, "tulu", tokenizer, preferences=True).left_out == {"no prompt": 1}


def test_empty_responses_are_left_out_and_counted(tmp_path, tokenizer):
    rows = [{"query": "q", "response": answer} for answer in ("r", " ", "")]
    assert load(write_rows(tmp_path / "r.jsonl", rows), "metamath", tokenizer).left_out == {"an empty response": 2}
    with pytest.raises(UserError, match="none of the 2 examples can be trained on: 2 with an empty response"):
        load(write_rows(tmp_path / "none.jsonl", rows[1:]), "metamath", tokenizer)


def test_messages_from_all_kinds_of_files(tmp_path, tokenizer):
    rows = [{"messages": [{**m, "weight": 1.0} for m in turns("Hi", "Hello")], "id": "a"}] * 2
    write_rows(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    pandas.DataFrame(rows).to_parquet(tmp_path / "c.parquet")
    pandas.DataFrame([{"messages": [{"content": "x", "role": USER}]}]).to_parquet(tmp_path / "d.parquet")
    loaded = sources.load_rows(str(tmp_path), ("messages",)).to_list()
    assert [row["messages"] for row in loaded] == [turns("Hi", "Hello")] * 6 + [turns("x")]
    whole = [sources.with_extras(row) for row in loaded]
    assert whole == [{"messages": rows[0]["messages"]}] * 6 + [{"messages": turns("x")}]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("Hi", r"line 1: column 'messages' must be a list of \{role, content\}, got str"),
        (["Hi"], "line 1: message 1 must be an object with role and content, got 'Hi'"),
        ([{"from": "human", "value": "Hi"}], "message 1 must be an object with role and content, .*; rename from and"),
        ([{"role": 1, "content": "Hi"}], "line 1: message 1: role must be text, got int"),
        ([{"role": USER, "content": ["Hi"]}], "line 1: message 1: content must be text, got list"),
        ([{"role": USER, "content": "\ud800"}], "line 1: message 1: content holds half of a surrogate pair"),
    ],
)
def test_bad_messages(tmp_path, messages, message):
    path = write_rows(tmp_path / "r.jsonl", [{"messages": messages}])
    with pytest.raises(UserError, match=message):
        sources.load_rows(str(path), ("messages",))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": [], "completion": []},
            "put prompt and completion into one list of messages, or use template promp",
        ),
        ({"conversations": []}, "rename it, its from and value to role and content, human and gpt to user and assista"),
    ],
)
def test_other_columns_of_conversations_are_explained(tmp_path, row, message):
    pandas.DataFrame([row]).to_parquet(tmp_path / "a.parquet")
    for path in (write_rows(tmp_path / "a.jsonl", [row]), tmp_path / "a.parquet"):
        with pytest.raises(UserError, match=f"no column 'messages'; .*{message}"):
            sources.load_rows(str(path), ("messages",))


def test_bad_messages_in_parquet(tmp_path):
    pandas.DataFrame([{"messages": [{"from": "human", "value": "Hi"}]}]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"column 'messages' must be a list of \{role, content\}, got List"):
        sources.load_rows(str(tmp_path / "a.parquet"), ("messages",))


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_texts_and_messages_in_each_others_place_are_explained(tmp_path, name):
    row = {"chosen": turns("Hi", "Hello"), "prompt": "Hi"}
    pandas.DataFrame([row]).to_parquet(tmp_path / "a.parquet")
    write_rows(tmp_path / "a.jsonl", [row])
    with pytest.raises(UserError, match="'chosen' must be text, got .*: messages need template tulu or chat$"):
        sources.load_rows(str(tmp_path / name), ("chosen",), conversations=())
    with pytest.raises(UserError, match="'prompt' must be a list .*: texts need template prompt_response$"):
        sources.load_rows(str(tmp_path / name), ("prompt",), conversations=("prompt",))


def test_content_in_parts_is_refused_alike_in_parquet(tmp_path):
    rows = [{"messages": [{"role": USER, "content": [{"type": "text", "text": "Hi"}]}]}]
    pandas.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    for path in (write_rows(tmp_path / "a.jsonl", rows), tmp_path / "a.parquet"):
        with pytest.raises(UserError, match="content must be text, got "):
            sources.load_rows(str(path), ("messages",))


# --- tools, and all else that a template renders ---------------------------------------------------------------------

TOOLS = (
    "{% if tools %}[{% for t in tools %}{{ t.function.name }}{% endfor %}]{{ '\n' }}{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if mood is defined %} ({{ mood }}){% endif %}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}{{ c.function.arguments | tojson }}</call>{% endfor %}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 0, "b": 1}}}


def calling(content="Let me see."):
    messages = [
        *turns("0+1?", content),
        {"role": "tool", "name": "add", "content": "1"},
        *turns("It is 1.", roles=(ASSISTANT,)),
    ]
    messages[1] = {**messages[1], "tool_calls": [CALL]}
    return {"tools": [ADD], "messages": messages}


def load(path, word, tokenizer, preferences=False):
    """What train.py does with a file."""
    template = templates.TEMPLATES[word]
    columns, conversations = templates.columns(template, preferences)
    optional = templates.optional_columns(template, preferences, tokenizer)
    rows = sources.load_rows(str(path), columns, conversations=conversations, optional=optional)
    return data.tokenise(rows, tokenizer, word, 512, preferences=preferences)


def text_of(tokenizer, examples, index=0):
    return trained_text(tokenizer, examples.rows[index]["input_ids"], examples.rows[index]["labels"])


@pytest.fixture
def calls_tools(model_dir):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.chat_template = TOOLS
    return tokenizer


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_tools_and_calls_are_rendered(tmp_path, calls_tools, kind):
    rows = [calling(), calling(None), {"messages": turns("Hi", "Hello"), "mood": "happy", "tools": None}]
    path = write_rows(tmp_path / "a.jsonl", rows)
    if kind == "parquet":
        path = tmp_path / "a.parquet"
        pandas.DataFrame(rows).to_parquet(path)
    examples = load(path, "chat", calls_tools)
    call = '<call>add{"a": 0, "b": 1}</call><eos>\n】tool: 1\nassistant: 【It is 1.<eos>\n】'
    assert text_of(calls_tools, examples) == "[add]\nuser: 0+1?\nassistant: 【Let me see." + call
    assert text_of(calls_tools, examples, 1) == "[add]\nuser: 0+1?\nassistant: 【" + call
    assert text_of(calls_tools, examples, 2) == "user: Hi (happy)\nassistant: 【Hello (happy)<eos>\n】"


def test_tools_and_calls_that_no_text_shows_are_refused(tmp_path, calls_tools):
    path = write_rows(tmp_path / "a.jsonl", [calling(None)])
    with pytest.raises(UserError, match="row 1 of the dataset: template tulu knows no 'tools'"):
        load(path, "tulu", calls_tools)
    del (only_calls := calling())["tools"]
    no_tools = write_rows(tmp_path / "b.jsonl", [only_calls])
    with pytest.raises(UserError, match="template tulu knows no 'tool_calls'"):
        load(no_tools, "tulu", calls_tools)
    calls_tools.chat_template = CHATML
    for file, name in ((path, "tools"), (no_tools, "tool_calls")):
        with pytest.raises(
            UserError, match=f"row 1 of the dataset: the tokenizer's chat template does not render '{name}'"
        ):
            load(file, "chat", calls_tools)
    calls_tools.chat_template = "{{ tool_calls if"
    with pytest.raises(UserError, match="the tokenizer's chat template does not parse, line 1"):
        load(path, "chat", calls_tools)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (turns("Hi", "Hello", roles=("human", "gpt")), "message 1: .* do not know the role 'human': use 'user'"),
        (
            [{"role": "system", "content": "Be brief."}, *turns("Hi", "Hello")],
            r"leaves out .* message 1 \(role system\)",
        ),
        (turns("Hi", "Hello", "\n", "Bye"), None),
    ],
)
def test_a_message_that_the_template_leaves_out_is_refused(tmp_path, model_dir, messages, message):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    turn = "{% if m.role in ('user', 'assistant') %}<{{ m.role }}>{{ m.content | trim }}{% endif %}"
    tokenizer.chat_template = (
        "{% for m in messages %}" + turn + "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    path = write_rows(tmp_path / "a.jsonl", [{"messages": messages}, {"messages": turns("Hi", "Hello")}])
    if message is None:  # an empty one is left out with its row
        assert load(path, "chat", tokenizer).left_out == {"an empty message": 1}
    else:
        with pytest.raises(UserError, match=message):
            load(path, "chat", tokenizer)


def test_today_is_the_same_tomorrow(tmp_path, tokenizer, model_dir):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}\n" + CHATML
    examples = load(write_rows(tmp_path / "a.jsonl", [{"messages": turns("Hi", "Hello")}]), "chat", tokenizer)
    assert text_of(tokenizer, examples).startswith("26 Jul 2024\n<|im_start|>user\nHi")


# --- ends ------------------------------------------------------------------------------------------------------------


def with_tokens(model_dir, *tokens):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    return tokenizer


def test_the_token_that_ends_a_turn(model_dir):
    tokenizer = with_tokens(model_dir, "<|im_start|>", "<|im_end|>")
    assert templates.turn_end_ids(tokenizer) == []  # no chat template
    tokenizer.chat_template = CHATML
    assert templates.turn_end_ids(tokenizer) == [tokenizer.convert_tokens_to_ids("<|im_end|>")] != [1]
    assert templates.turn_ends(templates.TEMPLATES["chat"], tokenizer) == templates.turn_end_ids(tokenizer)
    assert templates.turn_ends(templates.TEMPLATES["tulu"], tokenizer) == [1]
    assert templates.turn_ends(templates.TEMPLATES["metamath"], tokenizer) == [1]
    tokenizer.chat_template = TOOLS
    assert templates.turn_end_ids(tokenizer) == [1]
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n###\n{% endfor %}"
    assert templates.turn_end_ids(tokenizer) == []


@pytest.mark.parametrize("legacy", [True, False])
def test_llamas_legacy_is_saved(tmp_path, legacy):
    """transformers 5 loses it, and a text behind a special token then begins without a space."""
    letters = {c: i for i, c in enumerate(["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "▁b"])}
    tokenizer = LlamaTokenizer(vocab=letters, merges=[("▁", "a"), ("▁", "b")], legacy=legacy)
    save_tokenizer(tokenizer, tmp_path)
    again = from_pretrained(AutoTokenizer, str(tmp_path), "tokenizer")
    text = "a</s>b</s>b"
    assert again.tokenize(text) == tokenizer.tokenize(text) and ("▁b" in again.tokenize(text)) == legacy


def test_llamas_legacy_is_in_the_final_model(tmp_path, train_args, model_dir):
    model = shutil.copytree(model_dir, tmp_path / "model")
    for file in model.glob("tokenizer*"):
        file.unlink()
    letters = {c: i for i, c in enumerate(["<unk>", "<s>", "</s>", "▁", *"abcdef"])}
    save_tokenizer(LlamaTokenizer(vocab=letters, merges=[], legacy=True), model)
    rows = write_rows(tmp_path / "r.jsonl", [{"prompt": "ab", "response": "cd"}] * 16)
    words = ["--model", str(model), "--dataset", str(rows), "--template", "prompt_response", "--max_steps", "1"]
    train.main(train_args(tmp_path / "run", *words))
    assert json.loads((tmp_path / "run" / "final" / "tokenizer_config.json").read_text())["legacy"]


@pytest.fixture
def older_llama(tmp_path):
    """A tokenizer whose EOS is looked for with a space in front, as in older conversions of Llama's."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    vocab = {c: i for i, c in enumerate(["<unk>", "<s>", "</s>", "▁", *"abcdefghijklmnopqrtuvwxyz<>/s|\n.:?HB"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = {name: AddedToken(text, normalized=True, special=True) for name, text in
               (("bos_token", "<s>"), ("eos_token", "</s>"))}  # fmt: skip
    backend.add_special_tokens(list(special.values()))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **special).save_pretrained(tmp_path / "t")
    return tmp_path / "t"


def test_an_eos_in_a_text_is_one_token(older_llama):
    row = {"messages": turns("Hi", "a", "b", "Bye")}
    with pytest.raises(UserError, match="does not make one token of '</s>' in a text"):
        encode_row(templates.TEMPLATES["tulu"], row, AutoTokenizer.from_pretrained(older_llama))
    tokenizer = from_pretrained(AutoTokenizer, str(older_llama), "tokenizer")
    ids, labels = encode_row(templates.TEMPLATES["tulu"], row, tokenizer)
    assert ids.count(2) == 2 and ids[-1] == labels[-1] == 2
    tokenizer.save_pretrained(older_llama)  # as in final/
    assert AutoTokenizer.from_pretrained(older_llama)("b</s>")["input_ids"][-1] == 2


def test_rows_together_are_encoded_as_one_by_one(tokenizer):
    rows = [
        {"messages": m, "prompt": p, "response": r, "query": p, "instruction": p, "input": "", "output": r}
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
    rows = [{"messages": turns(f"What is {i}?", f"It is {i}."), "id": i} for i in range(22)] + [
        {"messages": [], "id": 22}
    ]
    path = write_rows(tmp_path / "r.jsonl", rows)
    words = ["--dataset", str(path), "--template", "tulu", "--max_steps", "1", "--eval_rows", "2"]
    last = train.main(train_args(tmp_path / "run", *words))
    said = capsys.readouterr().out
    assert "20 examples (0 cut to max_length 512, 1 left out (1 with an empty message), 2 held out)" in said
    assert "\ncolumns that template tulu does not read: id\n" in said and "maskable; nothing is masked\n" in said
    assert " --tasks TASK --prompt_format tulu " in said
    assert f"\nthe end: loss {last['loss']:.4f}, held-out loss {last['eval_loss']:.4f}\nsaved " in said
    # 9 of the header <|user|>, 11, 14 of <|assistant|>; "It is 0." is 8 and EOS
    assert "\nexample 0 of 20: 43 tokens, 9 of them trained\n  not trained    34 tokens [" in said
    assert r" '<|user|>\nWhat is 0?\n<|assistant|>\n'" in said
    assert "\n  trained         9 tokens [" in said and "] 'It is 0.<eos>'\n" in said


def test_generation_ends_where_a_trained_answer_ends(tmp_path, model_dir, train_args, capsys):
    """The base model's EOS is another token than the one that ends turns: final/ stops at both."""
    tokenizer = with_tokens(model_dir, "<|im_start|>", "<|im_end|>")
    tokenizer.chat_template = "{{ strftime_now('%Y') }}" + CHATML
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = make_model(tmp_path / "model", vocab_size=261)
    tokenizer.save_pretrained(model)
    path = write_rows(tmp_path / "r.jsonl", [{"messages": turns(f"What is {i}?", f"It is {i}.")} for i in range(20)])
    words = ["--model", str(model), "--dataset", str(path), "--max_steps", "1"]
    for template, ends, said in (("chat", [1, end], f"'<|im_end|>' (id {end})"), ("tulu", 1, "'<eos>' (id 1)")):
        train.main([*train_args(tmp_path / template, *words), "--template", template])
        out = capsys.readouterr().out
        assert f"a trained answer ends with {said}, which ends generation too" in out
        assert ("for the chat template it is always 26 July 2024" in out) == (template == "chat")
        assert GenerationConfig.from_pretrained(tmp_path / template / "final").eos_token_id == ends
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '\n' }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer.save_pretrained(model)
    train.main([*train_args(tmp_path / "text", *words), "--template", "chat"])
    assert "warning: the chat template ends an answer with text alone" in capsys.readouterr().out


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


def test_alpaca_reads_the_input(tmp_path):
    row = {"instruction": "Add {them}.", "input": "2 and {2}", "output": "4"}
    assert templates.alpaca(row) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd {them}.\n\n### Input:\n2 and {2}"
        "\n\n### Response:",
        "4",
    )
    assert templates.alpaca({**row, "input": ""}) == templates.metamath({"query": "Add {them}.", "response": "4"})


@pytest.mark.parametrize(
    ("row", "column", "message"),
    [
        ({"instruction": "a", "input": "", "output": "b"}, "response", "template alpaca reads instruction, input and"),
        ({"instruction": "a", "response": "b"}, "query", "template magicoder reads"),
        ({"query": "a", "response": "b"}, "messages", "template metamath reads"),
        ({"prompt": "a", "response": "b"}, "query", "template prompt_response reads"),
        ({"messages": []}, "query", "template chat or tulu reads messages"),
        ({"prompt": "a", "completion": "b"}, "response", "rename completion to response"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "response",
            "chosen and rejected are read with --objective dpo",
        ),
        ({"chosen": "b", "rejected": "c"}, "messages", "chosen and rejected are read with --objective dpo"),
    ],
)
def test_rows_for_another_template_are_recognised(tmp_path, row, column, message):
    pandas.DataFrame([row]).to_parquet(tmp_path / "a.parquet")
    for path in (write_rows(tmp_path / "a.jsonl", [row]), tmp_path / "a.parquet"):
        with pytest.raises(UserError, match=f"no column '{column}'; .*: {message}"):
            sources.load_rows(str(path), (column,))


def test_who_asks_for_pairs_of_answers_is_not_told_to(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"chosen": "b", "rejected": "c"}])
    with pytest.raises(UserError, match="no column 'prompt'; the row has 'chosen', 'rejected'$"):
        sources.load_rows(str(path), ("prompt", "chosen", "rejected"))


def test_rows_of_one_answer_are_not_for_dpo(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "a", "response": "b"}])
    with pytest.raises(UserError, match="no column 'chosen'; .*: --objective dpo trains on pairs of answers, --obj"):
        sources.load_rows(str(path), ("prompt", "chosen", "rejected"))


def test_the_shapes_of_rows_are_those_of_the_templates():
    for shape, hint in sources.SHAPES.items():
        for name, template in templates.TEMPLATES.items():
            if hint.startswith(f"template {name} reads"):
                assert template.columns == shape
    assert {t.columns for t in templates.TEMPLATES.values()} <= sources.SHAPES.keys()


def test_columns_that_no_one_reads(tmp_path):
    row = {"query": "q", "response": "r", "type": "t", "id": 1}
    pandas.DataFrame([row]).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(f" [{json.dumps(row)}, {{}}]")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as f:
        f.write(json.dumps({**row, "more": "ü" * (1 << 21)}))
    datasets.Dataset.from_list([row]).save_to_disk(tmp_path / "saved")
    write_rows(tmp_path / "a.jsonl", [row, {"other": 1}])
    for name in ("a.parquet", "a.json", "a.jsonl", "saved"):
        assert sources.unread_columns([f"{tmp_path / name}:1"], "train", ("query", "response")) == ["type", "id"], name
    assert sources.unread_columns([str(tmp_path / "a.jsonl.gz")], "train", ()) == []  # its first row is too long
    both = [str(tmp_path / "a.jsonl"), str(write_rows(tmp_path / "b.jsonl", [{"query": "q", "response": "r", "x": 1}]))]
    assert sources.unread_columns(both, "train", ("query", "response", "id")) == ["type", "x"]


def test_optional_columns_are_read(tmp_path, model_dir):
    """tools goes to the chat template, where it is rendered or refused; of a pair the prompt stands in front."""
    row = {"messages": [], "chosen": [], "rejected": [], "prompt": "q", "tools": [], "id": 1}
    words = ["--model", str(model_dir), "--dataset", str(write_rows(tmp_path / "r.jsonl", [row])), "--output_dir", "o"]
    for objective, unread in (("sft", "chosen, rejected, prompt, id"), ("dpo", "messages, id")):
        config = parse(TrainConfig, [*words, "--rule", "none", "--template", "tulu", "--objective", objective])
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        assert ", ".join(loading.unread_columns(config, tokenizer)) == unread
