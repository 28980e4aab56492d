"""Make a small random Llama and a tokenizer for some training rows: a base to try things on without the Hub.

    python scripts/quickstart/make_model.py ROWS.jsonl OUT_DIR

The tokenizer is a BPE in Llama's manner (spaces as U+2581, bytes as a fall-back, so that any text survives), trained on
the rows' queries and responses; the context is 2,048 tokens.
"""

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[2]))
from common.errors import UserError, run_main
from common.sources import read_columns
from common.templates import ALPACA

SPACE = "\u2581"


def make_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Replace(" ", SPACE)
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Split(SPACE, "merged_with_next"),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    bpe.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special + [f"<0x{b:02X}>" for b in range(256)], show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def main() -> None:
    if len(sys.argv) != 3:
        raise UserError("two arguments are needed: a file of rows (query, response), and the folder to write")
    rows = list(read_columns(sys.argv[1], ("query", "response")))
    tokenizer = make_tokenizer([ALPACA] + [row["query"] + "\n" + row["response"] for row in rows], vocab_size=2048)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=2048,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.save_pretrained(sys.argv[2])
    tokenizer.save_pretrained(sys.argv[2])
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens, in {sys.argv[2]}")


if __name__ == "__main__":
    run_main(main, "make_model.py")
