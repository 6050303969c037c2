"""Parameters, and how they are loaded and saved.

A checkpoint is a folder:

    jitjax.json            format version, configuration, parts, sources, digests of all arrays
    tokenizer/             CLIP's, as in a diffusers folder
    tokenizer_2/           T5's
    params/transformer/    the arrays of each part, written by orbax
    params/t5/ ...

The tokenizers are there if the text encoders are. It is written under a temporary name and renamed
when complete.
"""

from jitjax.checkpoint.parameters import (
    HINT,
    PARTS,
    TEXT_ENCODERS,
    TOKENIZERS,
    FluxParams,
    abstract_params,
)
from jitjax.checkpoint.restoring import load_folder, verify
from jitjax.checkpoint.saving import FORMAT, METADATA_FILE, checkpoint_writer, read_metadata, save

__all__ = [
    "FORMAT",
    "HINT",
    "METADATA_FILE",
    "PARTS",
    "TEXT_ENCODERS",
    "TOKENIZERS",
    "FluxParams",
    "abstract_params",
    "checkpoint_writer",
    "load_folder",
    "read_metadata",
    "save",
    "verify",
]
