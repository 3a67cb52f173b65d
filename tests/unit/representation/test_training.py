"""Training learns, repeats itself, and its results survive the disk."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from autoscale_ray.config import EmbeddingLossConfig, RepresentationConfig
from autoscale_ray.errors import ArtifactError, PoolError
from autoscale_ray.representation import ENCODER_VERSION, training
from autoscale_ray.representation import model as models
from autoscale_ray.representation.distance import fit_scenario_distance
from autoscale_ray.representation.quality import distance_correlation
from autoscale_ray.representation.scene_graph import RELATIONS, global_edges
from autoscale_ray.scenes.ragged import row_of
from tests.unit.representation.random_scenes import random_batch

SMALL = RepresentationConfig(hidden_size=16, embedding_size=16, num_layers=1, num_steps=4, batch_size=32)
TERMS = tuple(field.name for field in dataclasses.fields(EmbeddingLossConfig))
EVERY_TERM = EmbeddingLossConfig(**dict.fromkeys(TERMS, 0.3))


@pytest.fixture(scope="module")
def scenes():
    source_N = np.full(120, -1)
    source_N[100:] = np.arange(20)
    responses = np.random.default_rng(0).random((120, 3))
    responses[::7, 1] = np.nan
    batches = [random_batch(60, 0), random_batch(60, 1)]
    return training.training_set(batches, source_N, None, responses, with_later=True)


def test_every_term_falls(scenes):
    config = dataclasses.replace(SMALL, num_steps=30, loss=EVERY_TERM, learning_rate=5e-3)
    history = []
    training.fit(scenes, config, 0, lambda step, terms: history.append(terms))
    assert set(history[0]) == set(TERMS)
    first, last = (
        {name: np.mean([terms[name] for terms in part]) for name in TERMS}
        for part in (history[:5], history[-10:])
    )
    # The rest pull z together or against the norm: together with the others they need not fall in 30 steps.
    falling = [name for name in TERMS if name not in ("norm", "pairs", "laplacian", "variance")]
    assert [name for name in falling if not last[name] < first[name]] == []


@pytest.mark.parametrize("name", [name for name in TERMS if name not in ("norm", "response")])
def test_each_term_alone_is_computed_and_falls(scenes, name):
    loss = EmbeddingLossConfig(**{**dict.fromkeys(TERMS, 0.0), name: 1.0})
    config = dataclasses.replace(SMALL, num_steps=25, loss=loss, learning_rate=5e-3)
    values = []
    training.fit(scenes, config, 1, lambda step, terms: values.append(terms))
    assert {key for terms in values for key in terms} == {name}
    assert np.mean([terms[name] for terms in values[-8:]]) < np.mean([terms[name] for terms in values[:4]])


@pytest.mark.parametrize("relation", RELATIONS)
def test_pairs_that_are_taught_as_no_edges_are_none(scenes, relation):
    edges = {tuple(pair) for pair in global_edges(scenes.graph, relation).tolist()}
    source, target = RELATIONS[relation]
    owners = [row_of(scenes.graph.offsets[name]) for name in (source, target)]
    found = training.drawn_non_edges(scenes.graph, relation, torch.Generator().manual_seed(0))
    assert 0 < len(found) <= len(edges)
    assert not edges & {tuple(pair) for pair in found.tolist()}
    assert torch.equal(owners[0][found[:, 0]], owners[1][found[:, 1]]), "of the same scene"


def test_metric_learning_brings_embedding_and_scenario_distances_together(scenes):
    loss = EmbeddingLossConfig(**{**dict.fromkeys(TERMS, 0.0), "metric": 1.0})
    config = dataclasses.replace(SMALL, num_steps=60, loss=loss, learning_rate=5e-3)
    distance = fit_scenario_distance(scenes.signature, dataclasses.asdict(config.distance), 0)
    delta = distance(scenes.signature, scenes.signature).numpy()
    found = {}
    for steps in (0, 60):
        model = training.fit(scenes, dataclasses.replace(config, num_steps=steps), 0)
        with torch.no_grad():
            found[steps] = distance_correlation(model.encoder(scenes.graph).z_ND.numpy(), delta)
    assert found[60] > found[0] + 0.1


def test_same_seed_same_weights_other_seed_other_weights(scenes):
    config = dataclasses.replace(SMALL, loss=EVERY_TERM)
    first, again, other = (training.fit(scenes, config, seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_training_leaves_the_global_generator_alone(scenes):
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    training.fit(scenes, dataclasses.replace(SMALL, loss=EVERY_TERM), 0)
    assert torch.equal(torch.rand(3), expected)


def test_batches_hold_copies_then_their_sources_and_cover_an_epoch():
    source_N = torch.full((90,), -1)
    source_N[80:] = torch.arange(10)
    config = dataclasses.replace(SMALL, batch_size=16, loss=EmbeddingLossConfig(pairs=1.0))
    draws = training.draw_batches(source_N, config, torch.Generator().manual_seed(0))
    rest = []
    for _ in range(20):
        rows, copies = next(draws)
        assert len(rows) == 16
        assert copies == 2
        assert torch.equal(rows[copies : 2 * copies], source_N[rows[:copies]])
        rest.append(rows[2 * copies :])
    assert len(torch.cat(rest)[:90].unique()) == 90


def test_perturbed_scenes_are_drawn_like_all_others_where_pairs_are_not_compared():
    source_N = torch.full((96,), -1)
    source_N[90:] = torch.arange(6)
    config = dataclasses.replace(SMALL, batch_size=16)
    assert config.loss.pairs == 0
    draws = training.draw_batches(source_N, config, torch.Generator().manual_seed(0))
    batches = [next(draws) for _ in range(12)]
    assert {copies for _, copies in batches} == {0}
    assert torch.equal(torch.cat([rows for rows, _ in batches]).bincount(), torch.full((96,), 2))


def test_saved_model_embeds_the_same(scenes, tmp_path):
    batch = random_batch(10, 5)
    model = training.fit(scenes, dataclasses.replace(SMALL, loss=EVERY_TERM), 0)
    models.save(model, tmp_path)
    loaded = models.load(tmp_path)
    assert torch.equal(models.embed_batch(loaded, batch), models.embed_batch(model, batch))
    assert loaded.config == model.config


def test_damaged_model_files_give_one_clear_line(scenes, tmp_path):
    model = training.fit(scenes, dataclasses.replace(SMALL, num_steps=0), 0)
    models.save(model, tmp_path)
    config_file = tmp_path / models.CONFIG_FILE
    text = config_file.read_text()
    config_file.write_text(json.dumps(json.loads(text) | {"version": 99}))
    with pytest.raises(ArtifactError, match=rf"must be of encoder version {ENCODER_VERSION} .found 99"):
        models.load(tmp_path)
    config_file.write_text(text.replace('"hidden_size": 16', '"hidden_size": 32'))
    with pytest.raises(ArtifactError, match="do not fit"):
        models.load(tmp_path)
    version = f'"version": {ENCODER_VERSION}'
    for damaged in (
        "{",
        "[]",
        "{}",
        f"{{{version}}}",
        text.replace('"hidden_size": 16', '"hidden_size": -1'),
    ):
        config_file.write_text(damaged)
        with pytest.raises(ArtifactError, match="must be the description of an encoder"):
            models.load(tmp_path)
    config_file.write_text(text)
    weights = tmp_path / models.WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ArtifactError, match="do not fit"):
        models.load(tmp_path)
    config_file.unlink()
    with pytest.raises(ArtifactError, match="missing"):
        models.load(tmp_path)


def test_training_without_scenes_is_refused():
    with pytest.raises(PoolError, match="at least one scene"):
        training.train([], SMALL, 0)
