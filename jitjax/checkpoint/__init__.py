"""Parameters of a pipeline, and the checkpoints that store them.

A checkpoint is a folder:

    jitjax.json            format version, configuration, parts, quantisation, sources, digests of
                           the configuration and of each array
    tokenizer/             CLIP's tokenizer, as in a diffusers folder
    tokenizer_2/           T5's tokenizer
    params/transformer/    arrays of each part, an orbax checkpoint (see `array_layout.py`)
    params/t5/ ...

A quantised kernel is two arrays, `kernel/values` and `kernel/scales`.
A checkpoint has the tokenizers if it has a text encoder. It is written under a temporary name and
renamed when complete.
"""

from jitjax.checkpoint.parameters import (
    PARTS,
    TEXT_ENCODERS,
    TOKENIZERS,
    FluxParams,
    abstract_params,
    quantise_params,
)
from jitjax.checkpoint.restoring import load_folder, verify
from jitjax.checkpoint.saving import (
    FORMAT,
    METADATA_FILE,
    check_new_checkpoint,
    checkpoint_writer,
    read_metadata,
    save,
)

__all__ = [
    "FORMAT",
    "METADATA_FILE",
    "PARTS",
    "TEXT_ENCODERS",
    "TOKENIZERS",
    "FluxParams",
    "abstract_params",
    "check_new_checkpoint",
    "checkpoint_writer",
    "load_folder",
    "quantise_params",
    "read_metadata",
    "save",
    "verify",
]
