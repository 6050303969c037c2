"""Leaves of rank 0, which have one chunk and no first axis to split along."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest

from jitjax.checkpoint.array_layout import Digest
from jitjax.checkpoint.array_reader import compare_digest, read_arrays, read_leaf_metadata
from jitjax.checkpoint.array_writer import Writer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scalar_leaf_round_trip(tmp_path, dtype: str):
    scale = np.asarray(jnp.asarray(1.5, dtype))
    kernel = np.arange(12, dtype=np.float32).reshape(4, 3)
    path = tmp_path / "part"
    writer = Writer(path)
    writer.write("norm/scale", scale, 0, scale.shape)
    writer.write("kernel", kernel, 0, kernel.shape)
    digests = writer.finish()

    by_orbax: Any = ocp.load(path)
    assert by_orbax["norm"]["scale"].shape == ()
    np.testing.assert_array_equal(by_orbax["norm"]["scale"], scale)
    np.testing.assert_array_equal(by_orbax["kernel"], kernel)

    metadata = read_leaf_metadata(path)
    assert metadata["norm/scale"].shape == ()
    assert metadata["norm/scale"].dtype == jnp.dtype(dtype)
    assert metadata["norm/scale"].storage_metadata.write_shape == ()

    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    targets = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        for name, leaf in metadata.items()
    }
    for name, array, damage in read_arrays(path, targets, digests):
        assert damage == ""
        np.testing.assert_array_equal(array, {"norm/scale": scale, "kernel": kernel}[name])
        assert array is not None
        assert array.shape == metadata[name].shape


def test_scalar_leaf_on_an_accelerator_is_compared(unchecked):
    """Device arrays are copied to the host in slices, and a scalar has none."""

    class OnDevice(np.ndarray):
        is_fully_addressable = True

        def devices(self):
            return [SimpleNamespace(platform="gpu")]

    scale = np.asarray(1.5, np.float32)
    digest = Digest(scale.shape, scale.dtype)
    digest.update(scale)
    array: Any = scale.view(OnDevice)
    assert compare_digest(array, "scale", {"scale": digest.hexdigest()}) == ""
    assert compare_digest(array, "scale", {"scale": "0"}) == "differs from what was written"
