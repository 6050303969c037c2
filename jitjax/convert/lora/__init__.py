"""Applies low-rank updates to the weights: LoRA, DoRA, LoHa, LoKr and whole differences.

    names.py          the layer and the kind of a tensor, by its name in a file
    strengths.py      alpha / rank, from tensors, PEFT's settings and the header
    adapters.py       how an update changes a weight
    layer_updates.py  makes the update of a layer from its tensors
    widening.py       control LoRAs, which add input channels to the model
    reading.py        makes all updates of a file
    updates.py        applies them to leaves of the parameter tree, in pieces
    merging.py        applies them to loaded parameters

Unknown names, and whatever would be applied wrongly, are errors.
"""

from .merging import merge_loras
from .paths import find_files
from .reading import read_loras
from .widening import widened_source

__all__ = ["find_files", "merge_loras", "read_loras", "widened_source"]
