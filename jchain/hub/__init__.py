"""Pretrained transformers as banks of their blocks.

`load` reads a Hugging Face checkpoint folder, `load_many` reads several, and `export` writes a
chain as a checkpoint. `jchain.hub.architecture` explains how to add a model family.
"""

from jchain.hub import recipes as recipes
from jchain.hub.exporting import export as export
from jchain.hub.image_data import load_images as load_images
from jchain.hub.loading import load as load
from jchain.hub.loading import load_many as load_many
from jchain.hub.loading import random_bank as random_bank
from jchain.hub.losses import TokenLabels as TokenLabels
from jchain.hub.losses import choice_accuracy as choice_accuracy
from jchain.hub.losses import choice_loss as choice_loss
from jchain.hub.losses import mixed_loss as mixed_loss
from jchain.hub.losses import next_token_accuracy as next_token_accuracy
from jchain.hub.losses import next_token_loss as next_token_loss
from jchain.hub.parents import add_parent as add_parent
from jchain.hub.parents import kl_to_parent as kl_to_parent
from jchain.hub.questions import load_choices as load_choices
from jchain.hub.text import load_text as load_text

__all__ = [
    "TokenLabels",
    "add_parent",
    "choice_accuracy",
    "choice_loss",
    "export",
    "kl_to_parent",
    "load",
    "load_choices",
    "load_images",
    "load_many",
    "load_text",
    "mixed_loss",
    "next_token_accuracy",
    "next_token_loss",
    "random_bank",
    "recipes",
]
