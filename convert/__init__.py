"""Conversion of PyTorch checkpoints, there and back, and `python -m jitjax.convert`.

    tables/  <--  components.py  <--  sources/  <--  lora.py  <--  targets/  <--  __main__.py

Each of these imports only what is left of it: `tables/` says which tensor becomes which array and
applies that; `components.py` knows the models of a diffusers folder; `sources/` finds and reads
tensors; `lora.py` adds low-rank updates; `targets/` writes.

To add a layout, which is the same models under other names, open

1. `tables/original.py`, the names of the original release in terms of diffusers' names, and write
   such a function for the new ones (`tables/transformer.py` and its neighbours have diffusers');
2. `sources/layouts.py`, and add a `Layout` to `LAYOUTS`: a tensor's name that only it has, and a
   function that infers the configuration from the shapes;
3. `sources/tensors.py`, if the numbers are stored in another way (`gguf_files.py` is one);
4. `tests/convert/test_layouts.py`, and write the new names by hand, beside `original_transformer`.

To add a format of LoRA files, open

1. `lora.py`, and add to `PREFIXES` what stands before a layer's name and to `ENDINGS` what stands
   after it; `_layers` has the names of the layers themselves, `_factor` the file's alpha;
2. `tests/convert/test_lora.py`, and add its names to those of `test_every_way_to_name_a_layer`.
"""
