import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoscale_ray.errors import InvalidInputError
from autoscale_ray.scenes.readers import scene_filter
from autoscale_ray.scenes.readers.navsim import log_units
from autoscale_ray.scenes.readers.scene_filter import SceneFilter, read_scene_filter
from scenes import navsim_files as files


def test_a_filter_is_read_with_its_names_and_defaults(tmp_path):
    path = files.write_filter(
        tmp_path / "f.yaml", log_names=["a", "b"], tokens=["t", "u", "t"], frame_interval=None
    )
    chosen = read_scene_filter(path)
    assert chosen == SceneFilter(
        num_history_frames=4, num_future_frames=10, frame_interval=None, has_route=True,
        log_names=frozenset("ab"), tokens=frozenset("tu"),
    )  # fmt: skip
    assert chosen.step == chosen.num_frames == 14
    path.write_text(
        "num_future_frames: 8\nreactive_all_mapping: [[a, b, [[c, d]]]]\nsynthetic_scene_tokens: [x]\n"
    )
    short = read_scene_filter(path)
    assert (short.num_frames, short.step, short.synthetic_scene_tokens) == (12, 12, frozenset("x"))


def test_without_a_filter_every_frame_begins_a_window_and_with_one_that_does_not_say_none_overlap(tmp_path):
    """The second as in NAVSIM, whose filter has no interval of its own."""
    (tmp_path / "f.yaml").write_text("has_route: true\n")
    assert (SceneFilter().step, read_scene_filter(tmp_path / "f.yaml").step) == (1, 14)
    (tmp_path / "g.yaml").write_text("frame_interval: 3\n")
    assert read_scene_filter(tmp_path / "g.yaml").step == 3


BAD = {
    "unknown key": ("num_histoy_frames: 4", "num_histoy_frames: is no setting"),
    "text for number": ("num_history_frames: four", "num_history_frames: must be an integer"),
    "too much history": ("num_history_frames: 9", "num_history_frames: must be 4 to 5"),
    "too little future": ("num_future_frames: 4", "num_future_frames: must be 8 to 10"),
    "interval": ("frame_interval: 0", "step: must be 1"),
    "route": ("has_route: 1", "has_route: must be true or false"),
    "tokens": ("tokens: [1, 2]", "tokens: must be a list of texts"),
    "a text for a list": ("log_names: log", "log_names: must be a list of texts"),
    "max scenes": ("max_scenes: 10", "max_scenes: must be null"),
    "list": ("- 1", "must be a mapping"),
    "no YAML": ("a: [", "must be YAML"),
    "object": ("tokens: !!python/object/apply:os.system ['true']", "must be YAML"),
    "a key twice": ("tokens: [a]\nlog_names: [b]\ntokens: [c]", "tokens is given twice, again in line 3"),
    "deep": ("[" * 100_000, "nested at most"),
    "deep list": ("- " * 100_000, "nested at most"),
    "split": ("defaults:\n- scene_filter: navtest\ndata_split: test", "is a split"),
    "laughs": ("a: &a [x, x]\nb: &b [*a, *a]\nlog_names: [*b, *b]", "must not have aliases"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_filter_gives_one_clear_line(name, tmp_path):
    text, message = BAD[name]
    path = tmp_path / "f.yaml"
    path.write_text(text)
    with pytest.raises(InvalidInputError, match=message) as caught:
        read_scene_filter(path)
    assert "\n" not in str(caught.value)


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(flips=st.lists(st.tuples(st.integers(0, 500), st.integers(0, 7)), max_size=5), cut=st.integers(0, 500))
def test_damaged_filters_give_a_filter_or_one_refusal(flips, cut, tmp_path):
    content = bytearray(files.write_filter(tmp_path / "f.yaml", log_names=["a"], tokens=["t"]).read_bytes())[
        : 50 + cut
    ]
    for place, bit in flips:
        content[place % len(content)] ^= 1 << bit
    path = tmp_path / "g.yaml"
    path.write_bytes(content)
    scene_filter._read.cache_clear()
    try:
        chosen = read_scene_filter(path)
    except InvalidInputError:
        return
    assert chosen.num_frames <= 15


def test_logs_of_the_filter_are_listed_in_order(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.pkl").touch()
    chosen = files.write_filter(tmp_path / "f.yaml", log_names=["b", "a", "missing"])
    assert log_units(tmp_path, {"filter": chosen}) == ["a.pkl", "b.pkl"]
    assert log_units(tmp_path) == ["a.pkl", "b.pkl", "c.pkl"]
    none = files.write_filter(tmp_path / "g.yaml", log_names=["missing"])
    with pytest.raises(InvalidInputError, match="logs that the scene filter names"):
        log_units(tmp_path, {"filter": none})
