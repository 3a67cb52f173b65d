from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from conftest import make_batch

from autoscale_ray.errors import ArtifactError, ConfigError
from autoscale_ray.planning.checkpoint import load_state, load_weights, save_state, save_weights
from autoscale_ray.planning.features import (
    JoinedFeatures,
    concatenate,
    features_of_batch,
    load_features,
    save_features,
)
from autoscale_ray.planning.inference import load_planner, occupancy_miou, predict
from autoscale_ray.planning.objectives import Examples, make_examples, planning_loss
from autoscale_ray.planning.order import NUM_SHARDS, shard_places
from autoscale_ray.planning.planner import empty_planner, set_weights
from autoscale_ray.planning.training import (
    TrainState,
    apply_gradients,
    finished,
    learning_rate,
    new_state,
    shard_gradients,
    train,
    train_step,
)

ROWS = np.arange(64)


class StopHereError(Exception):
    pass


def assert_same_bits(first, second) -> None:
    for part in ("model", "average"):
        for name, tensor in getattr(first, part).items():
            assert torch.equal(tensor, getattr(second, part)[name]), (part, name)


@pytest.fixture(scope="module")
def trained(features, config):
    return train(features, ROWS, config, 5)


def test_training_twice_gives_the_same_bits_and_leaves_the_global_random_state_alone(
    features, config, trained
):
    before = torch.get_rng_state()
    assert_same_bits(train(features, ROWS, config, 5), trained)
    assert torch.equal(torch.get_rng_state(), before)
    other = train(features, ROWS, config, 6)
    assert any(not torch.equal(other.average[name], tensor) for name, tensor in trained.average.items())


@pytest.mark.parametrize("stop_at", [1, 30, 42, 43, 59])
def test_stop_and_resume_give_the_same_bits(features, config, trained, tmp_path, stop_at):
    def save_and_stop(state, _losses):
        if state.step == stop_at:
            save_state(state, tmp_path / "state.safetensors")
            raise StopHereError

    with pytest.raises(StopHereError):
        train(features, ROWS, config, 5, on_step=save_and_stop)
    resumed = train(features, ROWS, config, 5, start=load_state(tmp_path / "state.safetensors"))
    assert_same_bits(resumed, trained)


@pytest.fixture
def mapped(features, tmp_path) -> JoinedFeatures:
    """Return the scenes in two mapped parts, as a trainer gets them."""
    for name, rows in (("real", torch.arange(40)), ("synthetic", torch.arange(40, 64))):
        save_features(features.take(rows), tmp_path / name)
    parts = [load_features(tmp_path / name) for name in ("real", "synthetic")]
    joined = concatenate(parts)
    assert all(one is other for one, other in zip(joined.parts, parts, strict=True)), "nothing is copied"
    return joined


SELECTED = np.r_[np.arange(40), 41, 44, 45, 50, 63]


def trained_with_all_in_memory(features, rows, config, seed) -> TrainState:
    """Take the same steps with an example of every row of the run at hand."""
    examples, state = make_examples(features, torch.from_numpy(rows), config), new_state(config, seed)
    planner = empty_planner(config, NUM_SHARDS)
    set_weights(planner, state.weights_W)
    for step in range(config.num_steps):
        places_VB = torch.from_numpy(shard_places(seed, step, config.batch_size, len(rows)))
        train_step(planner, state, examples.shards(places_VB))
    return state


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_reading_only_what_is_drawn_from_mapped_files_gives_the_same_bits(
    features, mapped, config, num_steps
):
    config = replace(config, num_steps=num_steps)
    made = train(mapped, SELECTED, config, 5)
    state = trained_with_all_in_memory(features, SELECTED, config, 5)
    assert_same_bits(made, finished(config, state))
    states = []
    train(mapped, SELECTED, config, 5, on_step=lambda state, _: states.append(state.copy()))
    for state in states:
        assert_same_bits(train(mapped, SELECTED, config, 5, start=state), made)


def test_slots_that_are_kept_are_those_of_the_run_whatever_is_drawn(features, mapped, config):
    filled = features.agents_NKF[..., 0].sum(1)
    assert filled.min() < filled.max()
    everything, emptiest = torch.arange(64), filled.argmin()[None]
    for source in (features, mapped):
        one, whole = (make_examples(source, everything, config, drawn) for drawn in (emptiest, everything))
        assert one.agents_NKF.shape[1] == int(filled.max())
        for field in fields(Examples):
            assert torch.equal(getattr(one, field.name), getattr(whole, field.name)[emptiest]), field.name
    assert make_examples(features, emptiest, config).agents_NKF.shape[1] == int(filled.min())


@pytest.mark.parametrize(("num_steps", "start"), [(2, 0), (7, 0), (7, 6)])
def test_training_copies_only_the_rows_it_draws(mapped, config, monkeypatch, num_steps, start):
    """At most ``batch_size`` rows a step, of the selection alone, whatever the size of the pools."""
    config, asked, take = replace(config, num_steps=num_steps), [], JoinedFeatures.take

    def counted(features, rows):
        asked.append(rows)
        return take(features, rows)

    monkeypatch.setattr(JoinedFeatures, "take", counted)
    train(mapped, SELECTED, config, 5, start=replace(new_state(config, 5), step=start))
    (rows,) = asked
    assert 0 < len(rows) <= config.batch_size * (num_steps - start)
    assert len(rows.unique()) == len(rows)
    assert set(rows.tolist()) <= set(SELECTED.tolist())


@pytest.mark.parametrize("width", [16, 64])
def test_one_two_and_four_workers_give_the_same_bits(features, config, width):
    config = replace(config, hidden_size=width, batch_size=64)
    examples = make_examples(features, torch.arange(64), config)
    together, apart = new_state(config, 3), {workers: new_state(config, 3) for workers in (1, 2, 4)}
    planner = empty_planner(config, NUM_SHARDS)
    set_weights(planner, together.weights_W)
    for step in range(12):
        places_VB = torch.from_numpy(shard_places(3, step, 64, 64))
        train_step(planner, together, examples.shards(places_VB))
        for workers, state in apart.items():
            worker = empty_planner(config, NUM_SHARDS // workers)
            set_weights(worker, state.weights_W)
            parts = [
                shard_gradients(worker, examples.shards(part), step)[0] for part in places_VB.chunk(workers)
            ]
            apply_gradients(state, torch.cat(parts), config)
            assert torch.equal(state.weights_W, together.weights_W), (workers, step)


def test_optimiser_agrees_with_torch_adamw(features, config):
    """One flat vector against torch.optim.AdamW on the mean loss of the whole batch; float32 rounding apart."""
    examples = make_examples(features, torch.arange(64), config)
    state = new_state(config, 1)
    planner = empty_planner(config, NUM_SHARDS)
    set_weights(planner, state.weights_W)
    reference_W = torch.nn.Parameter(state.weights_W.clone())
    optimiser = torch.optim.AdamW([reference_W], lr=1.0, weight_decay=config.weight_decay)
    for step in range(10):
        shards = examples.shards(torch.from_numpy(shard_places(1, step, config.batch_size, 64)))
        gradients_VW, _ = shard_gradients(planner, shards, step)
        reference_W.grad = gradients_VW.mean(0)
        torch.nn.utils.clip_grad_norm_([reference_W], 5.0)
        optimiser.param_groups[0]["lr"] = learning_rate(step, config)
        optimiser.step()
        apply_gradients(state, gradients_VW, config)
        torch.testing.assert_close(state.weights_W, reference_W.detach(), rtol=1e-4, atol=2e-5)


def test_average_begins_over_the_last_30_percent(features, config):
    seen = {}
    train(features, ROWS, config, 5, on_step=lambda state, _losses: seen.update({state.step: state.copy()}))
    first = config.num_steps - int(0.3 * config.num_steps)
    expected = seen[first].weights_W.double()
    for step in range(first + 1, config.num_steps + 1):
        expected = config.ema_decay * expected + (1 - config.ema_decay) * seen[step].weights_W.double()
    torch.testing.assert_close(seen[config.num_steps].average_W.double(), expected, rtol=0, atol=1e-5)


def test_gradient_agrees_with_finite_differences(config):
    config = replace(config, hidden_size=8, num_agents=2, num_lanes=2)
    features = features_of_batch(make_batch(8), config)
    examples = make_examples(features, torch.arange(8), config).shards(torch.arange(8).view(2, 4))
    examples = Examples(*(getattr(examples, field.name).double() for field in fields(Examples)))
    weights_W = new_state(config, 0).weights_W.double()
    planner = empty_planner(config, 2)
    set_weights(planner, weights_W)
    gradients_VW, _ = shard_gradients(planner, examples, 0)
    direction_W = torch.randn(len(weights_W), generator=torch.Generator().manual_seed(2)).double()

    def losses(step: float) -> torch.Tensor:
        set_weights(planner, weights_W + step * direction_W)
        return shard_gradients(planner, examples, 0)[1][0]

    numeric_V = (losses(1e-6) - losses(-1e-6)) / 2e-6
    torch.testing.assert_close(gradients_VW @ direction_W, numeric_V, rtol=1e-5, atol=1e-5)


def test_loss_falls_and_plans_come_near_the_recorded_drive(features, config):
    """The ego brakes for a near leader and speeds up otherwise; both must be learned from the tokens."""
    config = replace(config, num_steps=250)
    batch = make_batch(200)
    features = features_of_batch(batch, config)
    losses = []
    weights = train(features, np.arange(160), config, 0, on_step=lambda _state, loss: losses.append(loss))
    assert losses[-1][0] < 0.2 * losses[0][0]
    held_out = np.arange(160, 200)
    poses = predict(weights, features, held_out)
    recorded = batch.ego_states_NT7[160:, 5:13, :3].numpy()
    error_m = np.linalg.norm(poses - recorded, axis=-1).mean()
    unmoved = np.linalg.norm(poses.mean(0) - recorded, axis=-1).mean()
    assert error_m < 0.35 * unmoved
    value, valid = occupancy_miou(weights, features, held_out)
    untrained, _ = occupancy_miou(train(features, ROWS, replace(config, num_steps=0), 0), features, held_out)
    assert valid.all()
    assert value.mean() > untrained.mean() + 0.1


def test_plans_do_not_depend_on_which_scenes_are_asked_together(features, trained):
    all_poses = predict(trained, features, ROWS)
    assert all_poses.shape == (64, 8, 3)
    assert all_poses.dtype == np.float32
    some = np.array([63, 0, 17, 17])
    np.testing.assert_array_equal(predict(trained, features, some), all_poses[some])
    assert predict(trained, features, np.arange(0)).shape == (0, 8, 3)


def test_empty_slots_change_nothing(features, config, trained):
    """More agent and lane slots than the scene has elements: the same plan up to rounding."""
    wide = replace(config, num_agents=9, num_lanes=5)
    padded = features_of_batch(make_batch(64), wide)
    exact = features_of_batch(make_batch(64), replace(config, num_agents=5, num_lanes=2))
    first = predict(replace(trained, config=wide), padded, ROWS)
    np.testing.assert_allclose(predict(trained, exact, ROWS), first, atol=1e-4)


def test_scene_order_of_tokens_does_not_matter(features, trained):
    planner = load_planner(trained)
    with torch.no_grad():
        first = planner(features.ego_NF[None], features.agents_NKF[None], features.lanes_NKF[None], 64)
        turned = planner(
            features.ego_NF[None], features.agents_NKF.flip(1)[None], features.lanes_NKF.flip(1)[None], 64
        )
    torch.testing.assert_close(first.residuals_VBMP3, turned.residuals_VBMP3, rtol=0, atol=1e-4)
    torch.testing.assert_close(first.occupancy_VBOGG, turned.occupancy_VBOGG, rtol=0, atol=1e-4)


def test_frames_that_were_not_recorded_do_not_count(features, config):
    valid = features.target_valid_NP.clone()
    valid[:, 5:] = False
    target = features.target_NP3.clone()
    target[:, 5:] = 1e3
    examples = make_examples(
        replace(features, target_NP3=target, target_valid_NP=valid), torch.arange(8), config
    )
    planner = empty_planner(config, 1)
    set_weights(planner, new_state(config, 0).weights_W)
    shards = examples.shards(torch.arange(8)[None])
    loss, _ = planning_loss(planner(shards.ego_NF, shards.agents_NKF, shards.lanes_NKF, 2), shards, 0.2)
    assert float(loss.detach()) < 50.0


def test_occupancy_can_be_switched_off(features, config):
    off = replace(config, occupancy_weight=0.0, num_steps=3)
    weights = train(features, ROWS, off, 0)
    value, valid = occupancy_miou(weights, features, ROWS)
    assert not valid.any()
    assert not value.any()


def test_weights_come_back_from_files_and_damage_is_refused(features, trained, tmp_path):
    save_weights(trained, tmp_path)
    loaded = load_weights(tmp_path)
    assert loaded.config == trained.config
    assert_same_bits(loaded, trained)
    np.testing.assert_array_equal(predict(loaded, features, ROWS), predict(trained, features, ROWS))
    (tmp_path / "planner.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(ArtifactError, match="safetensors"):
        load_weights(tmp_path)
    with pytest.raises(ArtifactError, match="safetensors"):
        load_state(tmp_path / "missing")


@pytest.mark.parametrize(
    ("changes", "rows", "rule"),
    [
        ({"batch_size": 6}, ROWS, "multiple of 4"),
        ({"hidden_size": 18}, ROWS, "multiple of 4"),
        ({}, ROWS[:0], "at least one scene"),
    ],
)
def test_untrainable_configurations_are_refused(features, config, changes, rows, rule):
    with pytest.raises(ConfigError, match=rule):
        train(features, rows, replace(config, **changes), 0)


@pytest.mark.parametrize("rate", [1e6, 1e30])
def test_a_training_that_diverged_has_no_plans_and_says_so(features, config, rate):
    weights = train(features, ROWS, replace(config, learning_rate=rate), 0)
    with pytest.raises(ConfigError, match=r"planner\.learning_rate: makes the training diverge"):
        predict(weights, features, ROWS)


def test_thread_count_does_not_matter(features, config, trained):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert_same_bits(train(features, ROWS, config, 5), trained)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
