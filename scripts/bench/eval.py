"""Items per second of eval.py's generation against lm-eval's Hugging Face backend: same model, prompts, stop rule.

    python scripts/bench/eval.py [--shape tiny|1b] [--items N] [--batch_size N] [--max_new_tokens N] [--out FILE]
    python scripts/bench/eval.py --model FOLDER [--prompts FILE.jsonl] ...            # real answers, of real lengths

Without --model it is a random Llama, greedy, with one of its own frequent tokens as end of sequence, so that answers
have many lengths, as those of trained models have. The share of answers that end before max_new_tokens is printed.
lm_eval is in requirements-dev.txt.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[2]))
from common.hub import load_weights
from evaluation import generation
from evaluation.generation import Decoding
from scripts.bench import measure as bench

SHAPES = {
    "tiny": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 8},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
}
STOP = ("Question:", "### Instruction")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, <bos> (0) and <pad> (1)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {c: i for i, c in enumerate(["<bos>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", pad_token="<pad>")


def make_model(folder: Path, shape: str, seed: int = 0) -> None:
    """A random Llama whose greedy answers wander, and its tokenizer."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        **SHAPES[shape], vocab_size=len(tokenizer), initializer_range=0.1, max_position_embeddings=2048, bos_token_id=0,
        eos_token_id=None, pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def choose_end(folder: Path, prompts: list[str], most: int, dtype: torch.dtype, batch_size: int) -> None:
    """Make that token the end of sequence which ends about two thirds of the answers, at many places."""
    network = load_weights(str(folder), dtype=dtype).to(bench.device()).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = generation.Model(network, tokenizer, frozenset(), 1, 2048)
    ids = sorted(tokenizer(prompts)["input_ids"], key=len, reverse=True)[: 4 * batch_size]
    rows = generation.continue_rows(model, ids, Decoding(most), [""] * len(ids), batch_size)
    seen = Counter(t for row in rows for t in set(row[most // 16 :]))
    end = min(seen, key=lambda t: abs(seen[t] / len(rows) - 2 / 3))
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    tokenizer.save_pretrained(folder)
    network.generation_config.eos_token_id = network.config.eos_token_id = end
    network.save_pretrained(folder)


def read_prompts(file: str, items: int) -> list[str]:
    """The `prompt` of the first lines of a file; without a file, words of the README, of many lengths."""
    if file:
        with open(file) as f:
            return [json.loads(line)["prompt"] for line in itertools.islice(f, items)]
    words = Path(__file__).parents[2].joinpath("README.md").read_text().split()
    words *= 1 + (7 * items + 70) // len(words)
    return [" ".join(words[7 * i : 7 * i + 10 + 13 * i % 60]) for i in range(items)]


def most(lengths: list[int], batch_size: int) -> float:
    """How many times as fast it can be at most, if a step of a batch takes as long in both.

    lm-eval's rows wait for the longest answer of their batch. At best no place of a batch is ever empty.

    Args:
        lengths: tokens of the answers, in lm-eval's order: the longest prompts first.
    """
    theirs = sum(max(lengths[i : i + batch_size]) for i in range(0, len(lengths), batch_size))
    return theirs / (sum(lengths) / batch_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--model", default="", help="folder of a model and its tokenizer, instead of a random one")
    parser.add_argument("--prompts", default="", help="JSON lines with a `prompt`; without it, words of the README")
    parser.add_argument("--items", type=int, default=96)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    prompts = read_prompts(args.prompts, args.items)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(args.model or name)
        if not args.model:
            make_model(folder, args.shape)
            choose_end(folder, prompts, args.max_new_tokens, dtype, args.batch_size)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        network = load_weights(str(folder), dtype=dtype).to(bench.device()).eval()
    context = min(network.config.get_text_config().max_position_embeddings, 2048)
    theirs = HFLM(network, tokenizer=tokenizer, batch_size=args.batch_size, max_length=context)
    end = network.generation_config.eos_token_id  # some models have several
    ends = frozenset({tokenizer.eos_token_id, *(end if isinstance(end, list) else [end])} - {None})
    pad = min(ends) if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    model = generation.Model(network, tokenizer, ends, pad, context)
    answers: dict[str, Any] = {}

    def plain(text: str) -> str:
        """Without special tokens, which eval.py shows where they end nothing, and lm-eval leaves out."""
        for token in tokenizer.all_special_tokens:
            text = text.replace(token, "")
        return text

    def ours() -> None:
        ids = tokenizer(prompts)["input_ids"]
        order = sorted(range(len(ids)), key=lambda i: (-len(ids[i]), i))
        decoding = Decoding(args.max_new_tokens, STOP)
        said = generation.generate(model, [ids[i] for i in order], decoding, [""] * len(order), args.batch_size)
        said = [s for _, s in sorted(zip(order, said, strict=True), key=lambda pair: pair[0])]
        answers["ours"], answers["lengths"] = [plain(s["completion"]) for s in said], [s["tokens"] for s in said]
        answers["most"] = most([answers["lengths"][i] for i in order], args.batch_size)

    def lm_eval() -> None:
        how = {"until": list(STOP), "max_gen_toks": args.max_new_tokens, "do_sample": False}
        requests = [Instance("generate_until", {}, (p, how), i) for i, p in enumerate(prompts)]
        answers["lm_eval"] = theirs.generate_until(requests, disable_tqdm=True)

    times = bench.interleaved({"eval.py": ours, "lm-eval": lm_eval}, args.repeats)
    same = sum(a == b for a, b in zip(answers["ours"], answers["lm_eval"], strict=True))
    rows = [
        {"backend": k, "items/s": len(prompts) / statistics.median(v), "seconds": statistics.median(v)}
        for k, v in times.items()
    ]
    bench.show(rows)
    early = sum(n < args.max_new_tokens for n in answers["lengths"]) / len(prompts)
    mean = sum(answers["lengths"]) / len(prompts)
    print(
        f"same answers: {same} of {len(prompts)}; {early:.0%} end early; {mean:.0f} tokens on average; at equal steps "
        f"{answers['most']:.2f} x is the most there is to gain"
    )
    found = {"same": same, "ended_early": early, "tokens": mean, "most": answers["most"]}
    bench.write(args.out, {"arguments": vars(args), "rows": rows, **found})


if __name__ == "__main__":
    main()
