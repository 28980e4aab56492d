"""What comes from a local folder or from the Hugging Face Hub."""

import os
from typing import Any

from common.config import UserError


def is_local(source: str) -> bool:
    """Whether a dataset or model is meant as a path: it exists, or could not be the id of a Hub repository."""
    return os.path.exists(source) or source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source


def from_pretrained(auto_class: Any, source: str, what: str, **kwargs) -> Any:
    """auto_class.from_pretrained(source, **kwargs).

    Raises:
        UserError: it cannot be loaded, for whatever reason.
    """
    try:
        return auto_class.from_pretrained(source, **kwargs)
    except Exception as e:  # transformers, the Hub, safetensors and the file system each raise their own
        hint = "" if is_local(source) else f" (to have it offline, run where there is a network: hf download {source})"
        raise UserError(f"{what} {source} cannot be loaded: {' '.join(str(e).split())[:300]}{hint}") from e
