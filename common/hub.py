"""What comes from a local folder or from the Hugging Face Hub."""

import contextlib
import importlib
import os
import re
import unittest.mock
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from tokenizers import AddedToken
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from common import integrity, run_folder
from common.errors import UserError, one_line

CARD = "README.md"  # of a model

# Else transformers asks a service to convert a model of .bin files in public, from every process that loads it.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")

# Modules that wrap a model or one of its layers, and so enter the names of its weights: torch.compile,
# DistributedDataParallel, FSDP1, activation checkpointing, Lightning and DeepSpeed, PEFT.
WRAPPERS = (
    "_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "base_model.model"
)  # fmt: skip
_WRAPPER = re.compile(rf"(?:^|(?<=\.))(?:{'|'.join(map(re.escape, WRAPPERS))})\.")

# Causal masks and frequencies, which older versions of transformers saved with the weights.
_OLD_BUFFERS = re.compile(r"(^|\.)(attn|attention)\.(bias|masked_bias|causal_mask)$|rotary_emb\.inv_freq$")


def is_local(source: str) -> bool:
    """Whether a dataset or model is meant as a path: it exists, or could not be the id of a Hub repository."""
    return os.path.exists(source) or source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source


def _missing_readers(source: str) -> str:
    """What to install to read a folder whose tokenizer is in SentencePiece's format alone; "" where that is not it."""
    if not _cached(source, "tokenizer.model") or _cached(source, "tokenizer.json"):
        return ""
    missing = []
    for package, module in {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}.items():
        try:
            importlib.import_module(module)
        except ImportError:
            missing.append(package)
    return f" (its tokenizer.model needs: pip install {' '.join(missing)})" if missing else ""


def from_pretrained(auto_class: Any, source: str, what: str, **kwargs) -> Any:
    """auto_class.from_pretrained(source, **kwargs), of a tokenizer or a configuration; for weights see load_weights.

    Raises:
        UserError: it cannot be loaded, for whatever reason.
    """
    try:
        if auto_class is AutoConfig:
            _refuse_adapter(source, what)
        loaded = auto_class.from_pretrained(source, **kwargs)
        if isinstance(loaded, PreTrainedTokenizerBase):
            _find_special_tokens_in_texts(loaded)
        return loaded
    except UserError:
        raise
    except Exception as e:  # transformers, the Hub, safetensors and the file system each raise their own
        _refuse_adapter(source, what)
        hint = _missing_readers(source)
        if not is_local(source):
            hint += f" (to have it offline, run where there is a network: hf download {source})"
        raise UserError(f"{what} {source} cannot be loaded: {one_line(e)}{hint}") from e


def _find_special_tokens_in_texts(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make a tokenizer find its special tokens in texts.

    Older conversions of Llama's list them with normalized true: they are looked for with a space in front, and `</s>`
    behind an answer becomes its letters.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    hidden = [token for token in tokenizer.added_tokens_decoder.values() if token.special and token.normalized]
    for token in hidden if backend is not None else []:
        if backend.token_to_id(token.content) not in backend.encode(f"a{token.content}a", add_special_tokens=False).ids:
            places = {name: getattr(token, name) for name in ("lstrip", "rstrip", "single_word")}
            backend.add_special_tokens([AddedToken(token.content, normalized=False, special=True, **places)])


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """tokenizer.save_pretrained, and what transformers 5 leaves out: Llama's `legacy`, by which a text behind a special
    token begins with a space or not."""
    tokenizer.save_pretrained(folder)
    if getattr(tokenizer, "legacy", False):
        file = folder / "tokenizer_config.json"
        run_folder.write_json(file, {**run_folder.read_json(file), "legacy": True})


def load_weights(
    source: str, what: str = "model", *, dtype: torch.dtype | None = None, attention: str | None = None,
    device: torch.device | str | None = None, verified: bool = False, values: bool = True,
) -> PreTrainedModel:  # fmt: skip
    """A causal language model with the weights of a folder or Hub id. All of the project's loads of weights come here.

    transformers fills tensors that it does not find with random numbers, leaves out those that it does not know, and
    goes on. Here the tensors of the file are those of the model, one for one, but for those that the model's class
    declares optional, and for tied ones, of which one is enough.

    Args:
        source: folder or Hub id.
        what: the word for it in messages.
        dtype: of the weights; None: as they are stored.
        attention: transformers' attn_implementation; None: its default.
        device: None: the CPU; "meta": compare names and shapes alone, without memory.
        verified: whether the caller has called integrity.verify, which reads all files.
        values: False: another process reads the weights, and will send them. The model is the same but for its
            parameters, which take no memory, see _without_memory; buffers have their values. Nothing is verified.
    Raises:
        UserError: it cannot be loaded; tensors are missing, of other shapes or unexpected; it is a PEFT adapter;
            generation_config.json is damaged; a file is not what it was when it was saved, see integrity.verify.
    """
    options = {"dtype": dtype or "auto", "attn_implementation": attention, "device_map": device}
    _refuse_adapter(source, what)
    _check_generation_config(source, what)
    shapes_alone = str(device) == "meta" or not values
    if is_local(source) and not shapes_alone and not verified:
        integrity.verify(Path(source), what)
    with _shapes_alone() if shapes_alone else contextlib.nullcontext():
        model, report = from_pretrained(
            AutoModelForCausalLM,
            source,
            what,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **{name: value for name, value in options.items() if value is not None},
        )
    missing = report["missing_keys"]
    unexpected = {name for name in report["unexpected_keys"] if not _OLD_BUFFERS.search(name)}
    problems = [
        f"{len(names)} {kind}: {_first_few(names)}"
        for kind, names in (
            ("missing in the file", missing),
            ("unknown to the model", unexpected),
            (
                "of another shape",
                [f"{n} is {list(file)}, expected {list(own)}" for n, file, own in report["mismatched_keys"]],
            ),
        )
        if names
    ]
    if not problems:
        return model if values else _without_memory(model)
    if any(".lora_" in name or ".base_layer." in name for name in unexpected):
        advice = "these are an adapter's: merge it into its base first (PEFT's merge_and_unload), then save"
    elif wrapper := _wrapper_alone(model, missing, unexpected):
        advice = (
            f"the names hold the prefix {wrapper!r} of a wrapper: save the model inside it (accelerate's "
            "unwrap_model, torch.compile's _orig_mod, DDP's module, PEFT's merge_and_unload) with save_pretrained"
        )
    else:
        advice = f"they do not fit its config.json ({model.config.model_type}): save model and config together"
    raise UserError(f"{what} {source}: the weights are not those of the model: {'; '.join(problems)}; {advice}")


def _shapes_alone() -> Any:
    """Inside, transformers does not read the tensors of a safetensors file."""

    def materialize(tensor: Any, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        shape = tensor.get_shape() if hasattr(tensor, "get_shape") else tensor.shape
        return torch.empty(shape, dtype=dtype, device="meta")

    return unittest.mock.patch("transformers.core_model_loading._materialize_copy", materialize)


def _without_memory(model: PreTrainedModel) -> PreTrainedModel:
    """The model with parameters on the CPU in the place of those on the meta device: one number each, seen everywhere.

    Unlike meta tensors they have an address, by which Accelerate's FSDP2 tells the optimizer's parameters apart.
    Tied parameters stay tied.
    """
    made: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if p not in made:
                one_number = torch.zeros((), dtype=p.dtype).expand(p.shape)
                made[p] = torch.nn.Parameter(one_number, requires_grad=p.requires_grad)
            setattr(module, name, made[p])
    return model


def has_weights(source: str) -> bool:
    """Whether the weights of a model are on this machine: in its folder, or in the cache of the Hub."""
    names = [f"{stem}{end}" for stem in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")]
    if is_local(source):
        return any(os.path.isfile(os.path.join(source, name)) for name in names)
    return any(isinstance(try_to_load_from_cache(source, name), str) for name in names)


def identity(source: str) -> list[tuple]:
    """What tells a model from another of the same name: (name, bytes, time) of a folder's files, or the Hub's revision.

    The model card, also one that is just being written, is left out: it is given the scores.
    """
    if is_local(source):
        there = Path(source).iterdir() if os.path.isdir(source) else ()
        files = sorted(p for p in there if p.is_file() and not p.name.startswith(CARD))
        return [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    path = try_to_load_from_cache(source, "config.json")
    return [("revision", Path(path).parent.name)] if isinstance(path, str) else []


def _first_few(names: Collection[str], most: int = 3) -> str:
    return ", ".join(sorted(names)[:most]) + (", ..." if len(names) > most else "")


def _wrapper_alone(model: PreTrainedModel, missing: Collection[str], unexpected: Collection[str]) -> str:
    """The wrapper's prefix without which the unexpected names would be the missing ones; "" if there is none."""
    inside = {_WRAPPER.sub("", name) for name in unexpected}
    inside |= {tied for tied, source in model.all_tied_weights_keys.items() if source in inside}
    found = {word for name in unexpected for word in _WRAPPER.findall(name)}
    return min(found) if found and set(missing) <= inside else ""


def _refuse_adapter(source: str, what: str) -> None:
    """Raise UserError where a folder or cached repository is a PEFT adapter, not a model."""
    if _cached(source, "adapter_config.json"):
        raise UserError(f"{what} {source}: this is an adapter; merge it into its base first (PEFT's merge_and_unload)")


def _check_generation_config(source: str, what: str) -> None:
    """Raise UserError where generation_config.json is damaged: transformers would go on without it."""
    if path := _cached(source, "generation_config.json"):
        try:
            GenerationConfig.from_pretrained(os.path.dirname(path))
        except Exception as e:
            raise UserError(f"{what} {source}: generation_config.json cannot be read: {one_line(e)}") from None


def _cached(source: str, name: str) -> str | None:
    """The path of a file of a local folder or of a Hub repository, None where it is not there."""
    if is_local(source):
        path = os.path.join(source, name)
        return path if os.path.isfile(path) else None
    try:
        return cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    except Exception:  # no network, no such repository: loading it says so
        return None
