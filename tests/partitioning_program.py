"""Pictures, programs and gradients over meshes of eight devices.

Run by `test_partitioning.py` in a process of its own. The transformer's stacks have 3 and 5 blocks,
so that a stack is recognised by its length.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from golden import build

import jitjax
from jitjax.checkpoint import FluxParams, abstract_params
from jitjax.models.partitioning import product_of_joined
from jitjax.nested import flatten, unflatten
from jitjax.sampler.meshes import with_auto_axes
from jitjax.velocity import FluxVelocity

CONFIG = dataclasses.replace(
    build.SMALL,
    transformer=dataclasses.replace(
        build.SMALL.transformer,
        num_attention_heads=8,
        num_layers=3,
        num_single_layers=5,
        joint_attention_dim=16,
    ),
    t5=dataclasses.replace(build.SMALL.t5, d_model=16, num_heads=8),
)
HIDDEN, BATCH = CONFIG.transformer.hidden, 8
PLAN = jitjax.Plan(3, (0.5, 1.0), (0.67, 1.0), microflow_noise="initial")
DENSE = jitjax.Plan(1)
PROMPTS = ["a large red circle", "a small blue square", "left", "right", "a", "red", "blue", "grey"]
OPTIONS = {"plan": PLAN, "height": 64, "width": 64}
KERNELS = ("double_blocks/image_attention/qkv/kernel", "single_blocks/out/kernel")
TOLERANCE = 1e-4  # of the range of the pictures: sums are taken in another order


KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True)
class Collective:
    """An operation of a compiled program in which devices exchange arrays."""

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    in_loop: bool

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)


KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


def collectives(program: str) -> list[Collective]:
    """Read the exchanges, and whether each is in the body of a loop, from a program's text."""
    bodies = set(re.findall(r"body=%?([\w.\-]+)", program))
    found, computation = [], ""
    for line in program.splitlines():
        if start := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            computation = start.group(1)
        if operation := re.search(rf"= (.*?) ({KINDS})(?:-start)?\(", line):
            shapes = re.findall(r"[a-z]\w*\[([\d,]*)\]", operation.group(1))
            sizes = tuple(tuple(int(n) for n in shape.split(",") if n) for shape in shapes)
            found.append(Collective(operation.group(2), sizes, computation in bodies))
    return found


def total(found: list[Collective], kind: str) -> int:
    return sum(c.elements for c in found if c.kind == kind)


def make_mesh(data: int, fsdp: int, model: int) -> jax.sharding.Mesh:
    sizes = {"data": data, "fsdp": fsdp, "model": model}
    sizes = {name: size for name, size in sizes.items() if size > 1}
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes))  # explicit axes, JAX's default


def save_pipeline(folder: Path) -> tuple[Path, FluxParams]:
    build.write_tokenizers(folder / "tokenizers")
    random = build.random_tree(abstract_params(CONFIG), 0)
    params = dataclasses.replace(random, tokenizer=str(folder / "tokenizers"))
    jitjax.save(params, folder / "pipeline")
    return folder / "pipeline", params


def device_bytes(tree: object) -> int:
    """Bytes of the arrays on the first device."""
    first = jax.devices()[0]
    leaves = jax.tree.leaves(tree)
    return sum(s.data.nbytes for x in leaves for s in x.addressable_shards if s.device == first)


def expected_transformer_bytes(fsdp: int, model: int) -> int:
    """Counted by hand: what the axes divide, and all else whole."""
    c, h = CONFIG.transformer, HIDDEN
    width, both = c.attention_head_dim, fsdp * model
    stream = (6 + 3 + 1 + 8) * h**2 // both + (6 + 1 + 1) * h + (3 + 4) * h // model + 2 * width
    single = (3 + 3 + 4 + 5) * h**2 // both + (3 + 1) * h + (3 + 4) * h // model + 2 * width
    blocks = 2 * c.num_layers * stream + c.num_single_layers * single
    inputs = (c.in_channels + c.joint_attention_dim + 2) * h
    embedded = sum(n * h + h + h * h + h for n in (256, 256, c.pooled_projection_dim))
    outputs = 2 * h**2 // both + 2 * h + (h + 1) * c.out_channels
    return 4 * (blocks + inputs + embedded + outputs)


def expected_t5_bytes(fsdp: int, model: int) -> int:
    c, both = CONFIG.t5, fsdp * model
    heads = c.num_heads * c.d_kv
    kernels = (4 * c.d_model * heads + 3 * c.d_model * c.d_ff) // both
    blocks = c.num_layers * (kernels + 2 * c.d_model)
    bias = c.relative_attention_num_buckets * c.num_heads // model
    return 4 * (c.vocab_size * c.d_model // both + blocks + bias + c.d_model)


def check_pictures(folder: Path, params: FluxParams) -> None:
    """Each axis with all eight devices, and bytes of each part; a mesh of one device.

    With one step on all tokens: `check_all_axes` has stages, where the batch is divided and where
    it is not.
    """
    options = OPTIONS | {"plan": DENSE}
    expected = np.asarray(jitjax.sample(params, PROMPTS, key=KEY, **options))
    for data, fsdp, model in ((8, 1, 1), (1, 8, 1), (1, 1, 8)):
        name = str((data, fsdp, model))
        divided = jitjax.load(folder, mesh=make_mesh(data, fsdp, model))
        images = jitjax.sample(divided, PROMPTS, key=KEY, **options)
        np.testing.assert_allclose(images, expected, atol=TOLERANCE, err_msg=name)
        assert len({str(s.index) for s in images.addressable_shards}) == data * fsdp, name
        assert device_bytes(divided.transformer) == expected_transformer_bytes(fsdp, model), name
        assert device_bytes(divided.t5) == expected_t5_bytes(fsdp, model), name
        for part in ("clip", "autoencoder"):
            whole = device_bytes(getattr(params, part))
            assert device_bytes(getattr(divided, part)) == whole, (name, part)
    one = jax.make_mesh((1, 1, 1), ("data", "fsdp", "model"), devices=jax.devices()[:1])
    images = jitjax.sample(jitjax.load(folder, mesh=one), PROMPTS, key=KEY, **options)
    np.testing.assert_array_equal(images, expected, err_msg="a mesh of one device")


def check_all_axes(folder: Path, params: FluxParams) -> None:
    """2 x 2 x 2: one program of everything, and the parts of `sample`, with and without a context.

    Three pictures are not divided by the batch axes, so every device makes all of them.
    """
    mesh = make_mesh(2, 2, 2)
    divided = jitjax.load(folder, mesh=mesh)
    assert device_bytes(divided.transformer) == expected_transformer_bytes(2, 2)
    expected = np.asarray(jitjax.sample(params, PROMPTS, key=KEY, **OPTIONS))
    sampler = jitjax.compile(divided, batch=BATCH, **OPTIONS)
    np.testing.assert_allclose(sampler(PROMPTS, key=KEY), expected, atol=TOLERANCE)
    # The largest: the weights of one output projection, or one device's residual stream.
    largest = max(5 * HIDDEN**2 // 2, BATCH * (16 + CONFIG.text_length) * HIDDEN // 4)
    for collective in collectives(sampler.executable.as_text()):
        assert collective.elements <= largest, collective

    # Of all eight prompts, whose programs are compiled already.
    text = jitjax.encode_prompt(params, PROMPTS)
    noise = jax.random.normal(KEY, (BATCH, 16, 64))
    tokens = jitjax.denoise(params, text, noise, key=KEY, plan=PLAN)
    images = np.asarray(jitjax.decode(params, tokens, grid=(4, 4)))[:3]
    text, noise, tokens = (np.asarray(x)[:3] for x in (text.text, noise, tokens))
    for context in (contextlib.nullcontext(), jax.set_mesh(mesh)):
        with context:
            conditioning = jitjax.encode_prompt(divided, PROMPTS[:3])
            np.testing.assert_allclose(conditioning.text, text, atol=1e-4)
            got = jitjax.denoise(divided, conditioning, noise, key=KEY, plan=PLAN)
            np.testing.assert_allclose(got, tokens, atol=TOLERANCE)
            got = jitjax.decode(divided, got, grid=(4, 4))
            np.testing.assert_allclose(got, images, atol=TOLERANCE)
            assert got.sharding.is_fully_replicated


def velocity_program(folder: Path, *sizes: int, batch: int = BATCH) -> list[Collective]:
    """Compile one evaluation of the transformer; its inputs are not divided yet."""
    params = jitjax.load(folder, mesh=make_mesh(*sizes), parts=("transformer",))
    velocity = FluxVelocity(CONFIG.transformer)
    text = jnp.zeros((batch, CONFIG.text_length, CONFIG.t5.d_model))
    conditioning = jitjax.Conditioning(text, jnp.zeros((batch, CONFIG.clip.hidden_size)))

    @with_auto_axes()
    def run(params, tokens, conditioning):
        positions = jnp.zeros((batch, 16, 3), jnp.int32)
        args = (params.transformer, conditioning, jnp.ones(batch))
        return velocity(tokens, positions, jnp.float32(0.5), None, args)

    tokens = jnp.zeros((batch, 16, 64))
    compiled = jax.jit(run).lower(params, tokens, conditioning).compile()
    return collectives(compiled.as_text() or "")


# Elements of the arrays that devices exchange:
TOKENS = 16 + CONFIG.text_length
KERNELS_OF_BLOCKS = (2 * (3 + 1 + 4 + 4) + (3 + 4 + 5)) * HIDDEN**2  # of a block of each kind
MODULATION = (2 * 6 + 3) * HIDDEN  # per sample
LARGEST_KERNEL = 5 * HIDDEN**2  # of one block


def check_fsdp_program(folder: Path, batch: int = BATCH) -> None:
    """Each block's kernels are gathered in the loop over the blocks, and nothing else is."""
    found = velocity_program(folder, 1, 8, 1, batch=batch)
    in_loop = [c for c in found if c.in_loop]
    assert {c.kind for c in in_loop} == {"all-gather"}, in_loop
    assert total(in_loop, "all-gather") == KERNELS_OF_BLOCKS + batch * MODULATION, in_loop
    assert max(c.elements for c in in_loop) == LARGEST_KERNEL, in_loop
    assert all(c.elements <= BATCH * 2 * HIDDEN for c in found if not c.in_loop), found


def check_model_program(folder: Path) -> None:
    """Sums after the output projections: attention and MLP of either stream, and the single one."""
    found = velocity_program(folder, 1, 1, 8)
    in_loop = [c for c in found if c.in_loop]
    assert total(in_loop, "all-reduce") == (2 + 1) * BATCH * TOKENS * HIDDEN, in_loop
    assert total(in_loop, "all-gather") == BATCH * MODULATION, in_loop
    # Columns for rows: a device's share.
    assert total(in_loop, "all-to-all") == LARGEST_KERNEL // 8, in_loop
    assert {c.kind for c in in_loop} == {"all-reduce", "all-gather", "all-to-all"}, in_loop
    assert all(c.elements <= BATCH * 2 * HIDDEN for c in found if not c.in_loop), found


def check_other_programs(folder: Path) -> None:
    """One sample over eight devices, all axes at once, and data alone."""
    check_fsdp_program(folder, batch=1)

    found = velocity_program(folder, 2, 2, 2)
    in_loop = [c for c in found if c.in_loop]
    assert total(in_loop, "all-reduce") == (2 + 1) * (BATCH // 4) * TOKENS * HIDDEN, in_loop
    assert total(in_loop, "all-gather") == KERNELS_OF_BLOCKS // 2 + BATCH * MODULATION, in_loop
    assert total(in_loop, "all-to-all") == LARGEST_KERNEL // 2, in_loop

    assert not [c for c in velocity_program(folder, 8, 1, 1) if c.in_loop]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Scaled:
    """A kernel in the form of a quantised one."""

    values: jax.Array
    scales: jax.Array


def scaled_product(x: jax.Array, kernel: Scaled, *args, **kwargs) -> jax.Array:
    scales = jnp.repeat(kernel.scales, kernel.values.shape[0] // kernel.scales.shape[0], axis=0)
    return jax.lax.dot_general(x, kernel.values * scales, *args, **kwargs)


def check_quantised() -> None:
    """The product of joined inputs with a kernel that has scales, per output or per group.

    No device gathers the values. 4 groups cannot be cut after 16 of 80 inputs: XLA chooses there.
    """
    mesh = make_mesh(1, 1, 8)
    mesh = jax.sharding.Mesh(mesh.devices, mesh.axis_names)  # auto axes
    over = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "model"))
    x, values = jax.random.normal(KEY, (2, 3, 80)), jax.random.normal(KEY, (80, 16))
    dimensions = (((2,), (0,)), ((), ()))
    for groups in (1, 40, 4):
        plain = Scaled(values, jax.random.normal(KEY, (groups, 16)))
        expected = scaled_product(x, plain, dimensions)
        kernel = Scaled(*(jax.device_put(leaf, over) for leaf in jax.tree.leaves(plain)))
        with jax.set_mesh(mesh):
            multiply = jax.jit(
                lambda x, kernel: product_of_joined(scaled_product, 16)(x, kernel, dimensions)
            )
            compiled = multiply.lower(x, kernel).compile()
            np.testing.assert_allclose(compiled(x, kernel), expected, atol=1e-4)
        found = collectives(compiled.as_text() or "")
        gathered = max((c.elements for c in found if c.kind == "all-gather"), default=0)
        assert groups == 4 or gathered <= max(groups * 16, x.size), (groups, found)
        assert groups == 4 or total(found, "all-reduce") == 2 * 3 * 16, (groups, found)


def check_quantised_pictures(folder: Path) -> None:
    """Quantised weights over 2 x 2 x 2: the tokens of one device, and shares of its bytes."""
    noise = np.asarray(jax.random.normal(KEY, (BATCH, 16, 64)))
    for kind in ("int8", "int4"):
        one = jitjax.load(folder, quantise=kind)
        divided = jitjax.load(folder, quantise=kind, mesh=make_mesh(2, 2, 2))
        expected, tokens = (
            jitjax.denoise(given, jitjax.encode_prompt(given, PROMPTS), noise, plan=DENSE)
            for given in (one, divided)
        )
        np.testing.assert_allclose(tokens, expected, atol=TOLERANCE, err_msg=kind)
        stacks = [
            given.transformer["single_blocks"]["mlp_up"]["kernel"] for given in (one, divided)
        ]
        assert device_bytes(stacks[0].values) == 4 * device_bytes(stacks[1].values), kind


def check_gradients(folder: Path, params: FluxParams) -> None:
    """Slopes of parameters and conditioning, under `jit`; of some of them outside it."""
    noise = np.asarray(jax.random.normal(KEY, (BATCH, 16, 64)))[:4]
    text = jitjax.encode_prompt(params, PROMPTS)
    conditioning = jax.tree.map(lambda x: jax.device_put(np.asarray(x)[:4]), text)

    def loss(params: FluxParams, conditioning: jitjax.Conditioning) -> jax.Array:
        return (jitjax.denoise(params, conditioning, noise, plan=DENSE) ** 2).mean()

    transformer = dataclasses.replace(params, t5={}, clip={}, autoencoder={})
    expected = jax.jit(jax.grad(loss, (0, 1)))(transformer, conditioning)
    divided = jitjax.load(folder, mesh=make_mesh(2, 2, 2), parts=("transformer",))
    divided = dataclasses.replace(divided, tokenizer=transformer.tokenizer)
    got = jax.jit(jax.grad(loss, (0, 1)))(divided, conditioning)
    check_slopes(got, expected)

    flat = flatten(divided.transformer)

    def loss_of_some(kernels: dict, conditioning: jitjax.Conditioning) -> jax.Array:
        transformer = unflatten(flat | kernels)
        return loss(dataclasses.replace(divided, transformer=transformer), conditioning)

    kernels = {path: flat[path] for path in KERNELS}
    got = jax.grad(loss_of_some, (0, 1))(kernels, conditioning)
    slopes = flatten(expected[0].transformer)
    check_slopes(got, ({path: slopes[path] for path in KERNELS}, expected[1]))


def check_slopes(got: Any, expected: Any) -> None:
    for (path, slope), other in zip(
        jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True
    ):
        scale = float(abs(np.asarray(other)).max())
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(slope, other, atol=1e-4 * scale + 1e-9, err_msg=name)


def main() -> None:
    gc.set_threshold(100_000, 50, 100)  # tracing makes millions of objects, few of them in cycles
    with tempfile.TemporaryDirectory() as name:
        folder, params = save_pipeline(Path(name))

        checks = {
            "pictures": lambda: check_pictures(folder, params),
            "all axes": lambda: check_all_axes(folder, params),
            "fsdp program": lambda: check_fsdp_program(folder),
            "model program": lambda: check_model_program(folder),
            "other programs": lambda: check_other_programs(folder),
            "quantised": check_quantised,
            "quantised pictures": lambda: check_quantised_pictures(folder),
            "gradients": lambda: check_gradients(folder, params),
        }
        for name in sys.argv[1:] or checks:
            start = time.monotonic()
            checks[name]()
            print(f"{name} {time.monotonic() - start:.1f} s", file=sys.stderr)
    print("all equal")


if __name__ == "__main__":
    main()
