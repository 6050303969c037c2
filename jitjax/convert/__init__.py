"""Conversion of PyTorch checkpoints in both directions, and `python -m jitjax.convert`.

    tables/  <--  components.py  <--  sources/  <--  lora/  <--  targets/  <--  __main__.py
                  original.py

Each of these imports only those to its left. `tables/` maps source tensors to parameter leaves and
applies the mapping; `components.py` lists the models of a diffusers folder; `original.py` has the
names of the original release; `sources/` finds and reads tensors; `lora/` adds low-rank updates;
`targets/` writes.

To add a layout (the same models with other tensor names):

1. `original.py` maps diffusers names to the names of the original release. Write such a
   function for the new names (`tables/transformer.py` and its neighbours have the diffusers names).
2. In `sources/layouts.py`, add a `Layout` to `LAYOUTS`: the name of a tensor that no other layout
   has, and a function that infers the configuration from the shapes.
3. If the values are stored in another way, extend `sources/tensors.py` (as `gguf_files.py` does).
4. In `tests/convert/test_layouts.py`, write the new names by hand, as `original_transformer` does.

To add a format of LoRA files:

1. In `lora/names.py`, add the prefixes of its layer names to `PREFIXES` and the suffixes to
   `SUFFIXES`; `layers_by_name` has the names of the layers.
2. A new kind of update is a class in `lora/adapters.py`, made in `lora/layer_updates.py`. A new
   place for alpha is read in `lora/strengths.py`.
3. In `tests/convert/test_lora_layouts.py`, add its names and compare with a calculation by hand.
"""
