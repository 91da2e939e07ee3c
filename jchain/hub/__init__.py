"""Pretrained transformers as banks: `load` reads a Hugging Face checkpoint folder, `export` writes a chain as one."""

from jchain.hub.exporting import export as export
from jchain.hub.loading import load as load

__all__ = ["export", "load"]
