"""What eval.py needs of a model. train.py asks for it first: what could not be scored is not trained."""

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedTokenizerBase

from common.errors import UserError

# Layers whose state is not keys and values alone: transformers' names, old and new.
RECURRENT_LAYERS = {"conv", "hybrid", "hybrid_sliding", "linear_attention", "mamba", "recurrent"}


def largest_text_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest id of a token that may stand in a text.

    A placeholder of images or sounds may not, and may lie beyond the embedding: Gemma-3-1b's tokenizer is that of its
    multimodal siblings. Nor may padding, which some models were trained without.
    """
    placeholders = {getattr(tokenizer, f"{kind}_token", None) for kind in ("image", "audio", "video", "pad")}
    placeholders -= {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token}
    return max(i for token, i in tokenizer.get_vocab().items() if token not in placeholders)


def refuse_unscorable(model: str, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError where eval.py cannot generate with a model. Needs no weights.

    Args:
        model: its folder or Hub id, for the message.
    """
    text_config = config.get_text_config()
    largest = largest_text_id(tokenizer)
    if largest >= text_config.vocab_size:
        raise UserError(
            f"the tokenizer has ids up to {largest}, the model's embedding {text_config.vocab_size} rows: they do not "
            "belong together"
        )
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)  # none for a model with code of its own
    layers = set(getattr(text_config, "layer_types", None) or ())
    if getattr(model_class, "_is_stateful", False) or layers & RECURRENT_LAYERS:
        raise UserError(
            f"model {model}: {config.model_type} keeps a recurrent state, which is not supported: only models that "
            "keep keys and values alone"
        )
