"""Tests of the sampler on recordings of the authors' program (see tests/golden/README.md)."""

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


def slow(name: str):
    return pytest.param(name, marks=pytest.mark.slow)


def run_replay(recording, capsys, *more: str) -> tuple[int, str]:
    status = replay.main(
        [str(recording), "--transformer", str(build.TRANSFORMER), "--config", str(CONFIG), *more]
    )
    return status, capsys.readouterr().out


@pytest.mark.parametrize("name", ["jit_7x_16x16", slow("jit_4x_16x24")])
def test_matches_the_authors_program(name, capsys):
    """Intermediate arrays and the result agree, up to rounding in float32."""
    status, out = run_replay(build.HERE / f"{name}.npz", capsys, "--tolerance", "1e-4")
    print(out)
    assert status == 0
    lines = out.strip().splitlines()
    assert lines[-1].startswith("latents_final max_abs=")
    printed = {line.split()[0] for line in lines}
    recorded = set(np.load(build.HERE / f"{name}.npz").files)
    assert printed == recorded - set(replay.REQUIRED) - {"guidance"} | {"latents_final"}
    relative = [float(value) for value in re.findall(r"rel=(\S+)", out)]
    assert max(relative) < 1e-4
    assert set(re.findall(r"not_in_common=(\d+)/", out)) == {"0"}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pad_to"), list(zip(build.RECORDINGS, (64, 128), strict=True)))
def test_padding_does_not_change_the_result(params, name, pad_to):
    arrays = replay.read_recording(build.HERE / f"{name}.npz")
    plan = replay.recorded_plan(arrays).replace(pad_to=pad_to)
    tokens, trace = replay.replay(params, arrays, plan)
    assert (trace.slots[0] + arrays["prompt_embeds"].shape[1]) % pad_to == 0
    assert replay.difference(np.asarray(tokens), arrays["latents_final"])[1] < 1e-4


def test_recording_with_required_arrays_only(tmp_path, capsys):
    arrays = replay.read_recording(build.HERE / "jit_7x_16x16.npz")
    required = {name: arrays[name] for name in (*replay.REQUIRED, "guidance")}
    np.savez(tmp_path / "bare.npz", **required)
    status, out = run_replay(tmp_path / "bare.npz", capsys)
    assert status == 0
    assert len(out.strip().splitlines()) == 1
    # A deviation and NaN both give exit status 1.
    for wrong in (required["latents_final"] * 1.01, required["latents_final"] * np.nan):
        np.savez(tmp_path / "wrong.npz", **(required | {"latents_final": wrong}))
        assert run_replay(tmp_path / "wrong.npz", capsys)[0] == 1
    del required["sigmas"]
    np.savez(tmp_path / "incomplete.npz", **required)
    assert run_replay(tmp_path / "incomplete.npz", capsys)[0] == 2
    (tmp_path / "truncated.npz").write_bytes((tmp_path / "bare.npz").read_bytes()[:5000])
    assert run_replay(tmp_path / "truncated.npz", capsys)[0] == 2


@pytest.mark.slow
def test_relax_steps_0_sets_new_tokens_to_their_target(params):
    arrays = replay.read_recording(build.HERE / "jit_7x_16x16.npz")
    arrays["microflow_relax_steps"] = np.array(0)
    plan = replay.recorded_plan(arrays)
    assert plan.microflow == "hit"
    _, trace = replay.replay(params, arrays, plan)
    transition = trace.transitions[0]
    after = np.asarray(transition.after)[0, np.asarray(transition.new)[0]]
    np.testing.assert_allclose(after, transition.target[0], rtol=1e-5, atol=1e-5)
    # The run equals the recording up to the first micro-flow, so its targets agree.
    recorded = arrays["microflow_target_0"]
    order = np.argsort(transition.new[0]), np.argsort(arrays["microflow_new_0"])
    ours = np.asarray(transition.target)[0, order[0]]
    assert replay.difference(ours, recorded[0, order[1]])[1] < 1e-4


@pytest.mark.parametrize("name", build.RECORDINGS)
def test_beta_schedule_matches_the_authors_program(name):
    arrays = replay.read_recording(build.HERE / f"{name}.npz")
    steps = len(arrays["sigmas"])
    np.testing.assert_allclose(beta_sigmas(steps), arrays["sigmas"], rtol=1e-6)
