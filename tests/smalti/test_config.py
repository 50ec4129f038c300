"""Recipes: YAML, overrides, errors that name the key.

Covers: smalti/keys.py, smalti/recipe_yaml.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smalti import recipe_yaml
from smalti.config import dump, find_recipe, load_recipe, merge, recipes_folder, with_overrides
from smalti.errors import ConfigError
from smalti.schema import Recipe


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def complaint(overrides: list[str] | None = None, path: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides or [])
    return str(caught.value)


def test_defaults_are_a_recipe_and_survive_a_round_trip() -> None:
    recipe = load_recipe(None)
    assert recipe == Recipe()
    assert load_recipe(None, base=dump(recipe)) == recipe


def test_later_settings_win(tmp_path: Path) -> None:
    write(
        tmp_path,
        "base.yaml",
        "seed: 1\nname: base\ncorpus: {image_size: 64, shard_images: 10}\nshare: [a, b]\n",
    )
    path = write(
        tmp_path, "x.yaml", "extends: base.yaml\nname: x\ncorpus: {image_size: 128}\nshare: [c]\n"
    )
    recipe = load_recipe(
        path, ["corpus.min_size=4", "seed=3"], base={"seed": 9, "corpus": {"limit": 7}}
    )
    assert (recipe.name, recipe.seed, recipe.share) == ("x", 3, ["c"])
    corpus = recipe.corpus
    assert (corpus.image_size, corpus.shard_images, corpus.min_size, corpus.limit) == (
        128,
        10,
        4,
        7,
    )


def test_extends_is_relative_to_its_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path, "top.yaml", "seed: 5\n")
    write(tmp_path, "middle.yaml", "extends: top.yaml\nname: middle\n")
    assert load_recipe(write(tmp_path / "sub", "x.yaml", "extends: ../middle.yaml\n")).seed == 5


def test_a_recipe_from_a_url(memory_url: str) -> None:
    from smalti import storage

    storage.write_atomic(f"{memory_url}/base.yaml", b"seed: 5\n")
    storage.write_atomic(f"{memory_url}/x.yaml", b"extends: base.yaml\nname: x\n")
    assert load_recipe(f"{memory_url}/x.yaml").seed == 5


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("encoder.train.train.lr=1e-4", lambda r: r.encoder.train.train.lr == 1e-4),
        ("encoder.train.layers=2", lambda r: r.encoder.train.layers == 2),
        ("encoder.train={layers: 2}", lambda r: r.encoder.train.layers == 2),
        ("corpus.max_pixels=1_000_000", lambda r: r.corpus.max_pixels == 1_000_000),
        ("corpus.limit=null", lambda r: r.corpus.limit is None),
        ("corpus.source=[a, b]", lambda r: r.corpus.source == ["a", "b"]),
        (
            "corpus.source=s3://bucket/{a,b}/*.tar",
            lambda r: r.corpus.source == "s3://bucket/{a,b}/*.tar",
        ),
        ("features.patches=12", lambda r: r.features.patches == 12),
        ("features.patches=all", lambda r: r.features.patches == "all"),
        ("name=007", lambda r: r.name == "007"),
        ("name=1.10", lambda r: r.name == "1.10"),
        ("name=a=b", lambda r: r.name == "a=b"),
        ("name='quoted: text'", lambda r: r.name == "quoted: text"),
        ("out=~/x [1]", lambda r: r.out == "~/x [1]"),
        ("tracking.uri=off", lambda r: r.tracking.uri == "off"),
        ("tracking.uri=null", lambda r: r.tracking.uri is None),
        (
            "tokenizer.pixel.loss.perceptual.kind=off",
            lambda r: r.tokenizer.pixel.loss.perceptual.kind == "off",
        ),
        ("tokenizer.guidance=false", lambda r: r.tokenizer.guidance is False),
        ("mllm.train.betas=[0.5, 0.9]", lambda r: r.mllm.train.betas == (0.5, 0.9)),
        ("mllm.train.lr=1", lambda r: r.mllm.train.lr == 1.0),
        (
            "baselines.flat={tokenizer.guidance: false}",
            lambda r: r.baselines["flat"] == {"tokenizer.guidance": False},
        ),
    ],
)
def test_overrides_are_typed(text: str, read: Any) -> None:
    assert read(load_recipe(None, [text]))


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("tokenizer.pixle.codes", "tokenizer.pixel.codes"),
        ("tokenizer.pixel.code", "tokenizer.pixel.codes"),
        ("pixel.codes", "tokenizer.pixel.codes"),
        ("corpus.sorce", "corpus.source"),
        ("corpsu.source", "corpus.source"),
        ("sede", "seed"),
    ],
)
def test_an_unknown_key_names_the_nearest(tmp_path: Path, key: str, nearest: str) -> None:
    assert (
        complaint([f"{key}=1"])
        == f"override '{key}=1': unknown key '{key}'; did you mean '{nearest}'?"
    )
    text = "\n".join(f"{'  ' * depth}{part}:" for depth, part in enumerate(key.split("."))) + " 1\n"
    path = write(tmp_path, "x.yaml", text)
    told = complaint(path=path)
    assert told.startswith(f"{path}: unknown key '")
    assert nearest.split(".")[0] in told


def test_an_unknown_key_without_a_likely_one_lists_those_there_are() -> None:
    assert "'corpus' has: source, val_source" in complaint(["corpus.zzzz=1"])
    assert "a recipe has: name, system" in complaint(["zzzz=1"])
    assert "'name' is a plain value and has no keys under it" in complaint(["name.x=1"])


BROKEN = {  # ten kinds of broken recipe: text, what the complaint must name
    "unknown": ("tokenizer: {pixle: {codes: 3}}", "'tokenizer.pixle'"),
    "ill-typed": ("seed: soon", "seed: expected an integer, found 'soon' (text)"),
    "out of range": (
        "mllm: {train: {zero_stage: 7}}",
        "mllm.train.zero_stage: expected an integer ≥ 0 and ≤ 3, found 7",
    ),
    "no such choice": (
        "mllm: {train: {schedule: linear}}",
        "mllm.train.schedule: expected one of 'cosine', 'constant'",
    ),
    "switch": (
        "tokenizer: {guidance: yes}",
        "tokenizer.guidance: expected true or false, found 'yes'",
    ),
    "section": ("corpus: 5", "corpus: expected a section with keys such as source"),
    "null": ("corpus:", "corpus: expected a section"),
    "list": ("share: a", "share: expected a list of text, found 'a'"),
    "list item": ("share: [1]", "share: expected a list of text, found 1 (an integer) at [0]"),
    "union": (
        "features: {patches: some}",
        "features.patches: expected 'all' or an integer > 0, found 'some'",
    ),
    "text as number": ("name: 1.10", "name: expected text, found 1.1 (a number)"),
    "optional section": ("encoder: {train: {layres: 3}}", "did you mean 'encoder.train.layers'?"),
    "both encoders": (
        "encoder: {pretrained: x, train: {}}",
        "encoder.pretrained and encoder.train are both set",
    ),
    "negative seed": ("seed: -1", "seed=-1, expected 0 or above"),
    "heads of a ViT": (
        "tokenizer: {pixel: {decoder: {dim: 100}}}",
        "tokenizer.pixel.decoder.dim=100 does not split over tokenizer.pixel.decoder.heads=12",
    ),
    "heads of the semantic decoder": (
        "tokenizer: {semantic: {decoder_heads: 7}}",
        "tokenizer.semantic.decoder_dim=768 does not split over tokenizer.semantic.decoder_heads=7",
    ),
    "heads of a larger decoder": (
        "tokenizer: {decoder: {decoder: {dim: 1000, heads: 16}}}",
        "tokenizer.decoder.decoder.dim=1000 does not split",
    ),
    "heads of a SigLIP": (
        "encoder: {train: {heads: 3}}",
        "encoder.train.hidden_size=128 does not split",
    ),
    "heads of a Qwen2": (
        "mllm: {config: {heads: 3}}",
        "mllm.config.hidden_size=256 does not split",
    ),
    "baseline key": (
        "baselines: {flat: {tokenizer.guidanc: false}}",
        "baselines.flat: unknown key 'tokenizer.guidanc'",
    ),
    "baseline value": (
        "baselines: {flat: {tokenizer: {guidance: 3}}}",
        "baselines.flat: tokenizer.guidance: expected true",
    ),
    "yaml": ("seed: [1\n", "line 2"),
    "tabs": ("corpus:\n\tsource: a\n", "line 2"),
    "twice": (
        "seed: 1\nname: a\nseed: 2\n",
        "line 3, column 1: this is not valid YAML: key 'seed' is set twice",
    ),
    "no mapping": ("- a\n", "expected keys with values, found list"),
    "python tag": ("name: !!python/object/apply:os.system [ls]\n", "line 1"),
    "extends nothing": ("extends: gone.yaml\n", "no recipe exists at"),
    "extends a list": ("extends: [a.yaml]\n", "extends: expected the path of one recipe"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_recipes_name_the_key_and_the_file(tmp_path: Path, kind: str) -> None:
    text, named = BROKEN[kind]
    path = write(tmp_path, "x.yaml", text)
    told = complaint(path=path)
    assert named in told
    if kind != "extends nothing":
        assert all(line.startswith((path, "tried")) for line in told.splitlines())


def test_not_text_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"name: \xff\xfe\n")
    assert "UTF-8" in complaint(path=str(path))


def test_all_errors_are_told_at_once_with_where_each_was_set(tmp_path: Path) -> None:
    path = write(tmp_path, "x.yaml", "seed: a\nmllm: {train: {lr: -1}}\n")
    told = complaint(["corpus.image_size=0"], path)
    assert told.splitlines() == [
        f"{path}: seed: expected an integer, found 'a' (text)",
        "override 'corpus.image_size=0': corpus.image_size: expected an integer > 0, found 0 (an integer)",
        f"{path}: mllm.train.lr: expected a number > 0, found -1 (an integer)",
    ]


def test_an_error_in_a_recipe_that_is_extended_names_that_one(tmp_path: Path) -> None:
    base = write(tmp_path, "base.yaml", "seed: a\n")
    assert complaint(path=write(tmp_path, "x.yaml", "extends: base.yaml\n")).startswith(
        f"{base}: seed:"
    )


def test_extends_in_a_circle(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "extends: b.yaml\n")
    path = write(tmp_path, "b.yaml", "extends: a.yaml\n")
    assert "circle: b.yaml → a.yaml → b.yaml" in complaint(path=path)


@pytest.mark.parametrize(
    ("raw", "read"),
    [
        ("/data/my set #2", "/data/my set #2"),
        ("*.tar", "*.tar"),
        ("{a,b}.tar", "{a,b}.tar"),
        ("[ab].tar", "[ab].tar"),
        ("2024", "2024"),
        ("a: b", "a: b"),
        ("[a, 'b c']", ["a", "b c"]),
        ("'[a]'", "[a]"),
        ("null", None),
        ("", None),
    ],
)
def test_paths_are_taken_as_typed(raw: str, read: Any) -> None:
    assert load_recipe(None, [f"corpus.source={raw}"]).corpus.source == read


@pytest.mark.parametrize("raw", [".inf", "-.inf", ".nan"])
def test_numbers_that_no_record_can_hold_are_refused(raw: str) -> None:
    assert "mllm.train.lr: expected a number > 0, found" in complaint([f"mllm.train.lr={raw}"])
    assert "evaluate.goals" in complaint([f"evaluate.goals.x={raw}"])


@pytest.mark.parametrize("raw", ["", " "])
def test_an_empty_out_is_no_folder(raw: str) -> None:
    assert "out: expected the path of a folder, found empty text" in complaint([f"out={raw}"])


@pytest.mark.parametrize("text", ["seed", "=1", "a..b=1", ".a=1", "a.=1"])
def test_what_is_no_override(text: str) -> None:
    assert "expected key=value" in complaint([text])


def test_missing_files_name_the_recipes_there_are(tmp_path: Path) -> None:
    told = complaint(path="recipes/semhitok-257.yaml")
    assert "no recipe exists at recipes/semhitok-257.yaml" in told
    assert "semhitok-256" in told
    assert "is a folder" in complaint(path=str(tmp_path))


def test_shipped_recipes_are_found_by_name_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("semhitok-256", "semhitok-256.yaml", "recipes/semhitok-256.yaml"):
        assert Path(find_recipe(name)).name == "semhitok-256.yaml"


@pytest.mark.parametrize(
    "path", sorted(recipes_folder().glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_shipped_recipe_loads(path: Path) -> None:
    recipe = load_recipe(str(path))
    assert load_recipe(None, base=dump(recipe)) == recipe


def test_with_overrides_merges_sections_and_checks() -> None:
    recipe = load_recipe(None, ["encoder.train.layers=2"])
    other = with_overrides(
        recipe, {"encoder.train.heads": 2, "corpus": {"limit": 5}, "tokenizer.guidance": False}
    )
    assert other.encoder.train is not None
    assert (other.encoder.train.layers, other.encoder.train.heads, other.corpus.limit) == (2, 2, 5)
    assert other.corpus.image_size == recipe.corpus.image_size
    assert recipe.tokenizer.guidance
    assert with_overrides(recipe, {"encoder.train": None}).encoder.train is None
    flat = with_overrides(recipe, {"baselines.flat": {"tokenizer.guidance": False}})
    assert with_overrides(flat, {"baselines": {}}).baselines == {}
    with pytest.raises(ConfigError, match=r"did you mean 'corpus\.limit'"):
        with_overrides(recipe, {"corpus.limt": 5})


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=1e-300, max_value=1e300))
def test_numbers_as_python_writes_them_are_numbers(value: float) -> None:
    read = recipe_yaml.parse(repr(value), "x")
    assert isinstance(read, float)
    assert read == value


@given(st.integers(min_value=-(10**30), max_value=10**30))
def test_integers_stay_integers(value: int) -> None:
    assert recipe_yaml.parse(f"{value}", "x") == value
    assert recipe_yaml.parse(f"{value:_}", "x") == value


@pytest.mark.parametrize(
    "text",
    ["off", "no", "yes", "on", "12:30", "2024-01-01", "010", "1__0", "_1", "0x", "1e", "e5", "."],
)
def test_what_yaml_1_1_would_turn_into_something_else_is_text(text: str) -> None:
    assert recipe_yaml.parse(text, "x") == text


def test_aliases_and_merge_keys_work() -> None:
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n"
    assert recipe_yaml.parse(text, "x") == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}


trees = st.recursive(
    st.integers() | st.none(),
    lambda below: st.dictionaries(st.sampled_from("abc"), below, max_size=3),
    max_leaves=8,
)
mappings = st.dictionaries(st.sampled_from("abc"), trees, max_size=3)


@given(mappings, mappings)
def test_merge_keeps_every_key_and_lets_the_later_win(
    under: dict[str, Any], over: dict[str, Any]
) -> None:
    merged = merge(under, over)
    assert merged.keys() == under.keys() | over.keys()
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(under.get(key), dict):
            assert merged[key] == merge(under[key], value)
        else:
            assert merged[key] == value
    assert merge(merged, over) == merged


def test_keys_of_another_system_are_in_no_dump_until_they_are_set() -> None:
    """They came after results were fingerprinted: those of a recipe without them must stay."""
    plain = load_recipe(None, []).model_dump(mode="json")
    assert "dual" not in plain["tokenizer"] and "depth_heads" not in plain["mllm"]
    assert "adaptive_range" not in plain["tokenizer"]["pixel"]["loss"]["gan"]
    own = [
        "tokenizer.dual.dim=8",
        "tokenizer.dual.loss.gan.adaptive_range=[0.3, 10]",
        "mllm.depth_heads.layers=2",
    ]
    recipe = load_recipe(None, own)
    dumped = recipe.model_dump(mode="json")
    assert dumped["tokenizer"]["dual"]["dim"] == 8 and dumped["mllm"]["depth_heads"]["layers"] == 2
    assert dumped["tokenizer"]["dual"]["loss"]["gan"]["adaptive_range"] == [0.3, 10]
    assert Recipe.model_validate(dumped) == recipe
    assert with_overrides(recipe, {"tokenizer.dual.depth": 2}).tokenizer.dual.dim == 8
    with pytest.raises(ConfigError, match="low above high"):
        load_recipe(None, ["tokenizer.dual.loss.gan.adaptive_range=[10, 0.3]"])
    with pytest.raises(ConfigError, match="one weight per layer"):
        load_recipe(None, ["tokenizer.dual.pixel_layers=[3]"])
