"""The sampler against recordings of the authors' program (see golden/README.md)."""

from __future__ import annotations

import re

import numpy as np
import pytest
from golden import build

from benchmarks import replay
from jitjax.sampler.schedule import beta_sigmas

CONFIG = build.HERE / "flux_random_transformer.json"


@pytest.fixture(scope="module")
def params():
    return replay.read_transformer(build.TRANSFORMER, CONFIG)


def run(recording, capsys, *more: str) -> tuple[int, str]:
    status = replay.main(
        [str(recording), "--transformer", str(build.TRANSFORMER), "--config", str(CONFIG), *more]
    )
    return status, capsys.readouterr().out


@pytest.mark.parametrize("name", build.RECORDINGS)
def test_replay_of_the_authors_program(name, capsys):
    """Every array on the way, and the result. Float32 on both sides, summed in other orders."""
    status, out = run(build.HERE / f"{name}.npz", capsys, "--tolerance", "1e-4")
    print(out)
    assert status == 0
    lines = out.strip().splitlines()
    assert lines[-1].startswith("latents_final max_abs=")
    told = {line.split()[0] for line in lines}
    recorded = set(np.load(build.HERE / f"{name}.npz").files)
    assert told == recorded - set(replay.NEEDED) - {"guidance"} | {"latents_final"}
    relative = [float(value) for value in re.findall(r"rel=(\S+)", out)]
    assert max(relative) < 1e-4
    assert set(re.findall(r"not_in_common=(\d+)/", out)) == {"0"}


@pytest.mark.parametrize("pad_to", [64, 128])
@pytest.mark.parametrize("name", build.RECORDINGS)
def test_padding_changes_nothing(params, name, pad_to):
    arrays = replay.read_recording(build.HERE / f"{name}.npz")
    plan = replay.recorded_plan(arrays).replace(pad_to=pad_to)
    tokens, trace = replay.replay(params, arrays, plan)
    assert (trace.slots[0] + arrays["prompt_embeds"].shape[1]) % pad_to == 0
    assert replay.difference(np.asarray(tokens), arrays["latents_final"])[1] < 1e-4


def test_a_recording_with_only_what_is_needed(tmp_path, capsys):
    arrays = replay.read_recording(build.HERE / "jit_7x_16x16.npz")
    kept = {name: arrays[name] for name in (*replay.NEEDED, "guidance")}
    np.savez(tmp_path / "bare.npz", **kept)
    status, out = run(tmp_path / "bare.npz", capsys)
    assert status == 0
    assert len(out.strip().splitlines()) == 1
    # Another result is told, by the exit status too; so is one that is not a number.
    for wrong in (kept["latents_final"] * 1.01, kept["latents_final"] * np.nan):
        np.savez(tmp_path / "wrong.npz", **(kept | {"latents_final": wrong}))
        assert run(tmp_path / "wrong.npz", capsys)[0] == 1
    del kept["sigmas"]
    np.savez(tmp_path / "less.npz", **kept)
    assert run(tmp_path / "less.npz", capsys)[0] == 2
    (tmp_path / "half.npz").write_bytes((tmp_path / "bare.npz").read_bytes()[:5000])
    assert run(tmp_path / "half.npz", capsys)[0] == 2


def test_r_zero_sets_new_tokens_to_their_target(params):
    arrays = replay.read_recording(build.HERE / "jit_7x_16x16.npz")
    arrays["microflow_relax_steps"] = np.array(0)
    plan = replay.recorded_plan(arrays)
    assert plan.microflow == "hit"
    _, trace = replay.replay(params, arrays, plan)
    happened = trace.transitions[0]
    after = np.asarray(happened.after)[0, np.asarray(happened.new)[0]]
    np.testing.assert_allclose(after, happened.target[0], rtol=1e-5, atol=1e-5)
    # Up to here the run is the recorded one.
    theirs = arrays["microflow_target_0"]
    order = np.argsort(happened.new[0]), np.argsort(arrays["microflow_new_0"])
    ours = np.asarray(happened.target)[0, order[0]]
    assert replay.difference(ours, theirs[0, order[1]])[1] < 1e-4


@pytest.mark.parametrize("name", build.RECORDINGS)
def test_the_beta_schedule_is_that_of_the_authors_program(name):
    arrays = replay.read_recording(build.HERE / f"{name}.npz")
    steps = len(arrays["sigmas"])
    np.testing.assert_allclose(beta_sigmas(steps), arrays["sigmas"], rtol=1e-6)
