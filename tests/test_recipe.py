"""The grammar of recipes and words, its one-line mistakes, and what all programs share."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmt_dist.config import PackOptions, Recipe, Site
from jmt_dist.errors import UsageError
from jmt_dist.recipe import (
    Layer,
    build,
    dump,
    field_names,
    load_recipe,
    load_site,
    nearest,
    parse_word,
    read_layers,
    word_layer,
)


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def mistake(words: list[str], path: Path | None = None) -> str:
    """The line that a wrong recipe gives."""
    with pytest.raises(UsageError) as error:
        load_recipe(path, words)
    line = str(error.value)
    assert "\n" not in line
    return line


# ---- scalars


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1E3", 1000.0),
        ("1.5e+3", 1500.0),
        (".5", 0.5),
        ("-1.", -1.0),
        ("0", 0),
        ("-7", -7),
        ("12:30:00", "12:30:00"),  # YAML 1.1 reads 45000
        ("1-00:00:00", "1-00:00:00"),
        ("90", 90),
        ("007", "007"),  # YAML 1.1 reads 7
        ("0x1f", "0x1f"),
        ("1_000", "1_000"),
        ("2026-01-02", "2026-01-02"),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", ""),
        ("'3'", "3"),
        ("[0, 2]", [0, 2]),
        ("[official, fold-1]", ["official", "fold-1"]),
        ("a=b", "a=b"),
        ("sqlite:///x/y.db?timeout=3", "sqlite:///x/y.db?timeout=3"),
    ],
)
def test_what_scalars_mean(text: str, value: object, tmp_path: Path) -> None:
    assert parse_word(f"key={text}") == ("key", value)
    assert type(parse_word(f"key={text}")[1]) is type(value)
    assert read_layers(put(tmp_path / "a.yaml", f"key: {text}\n"))[0].values == {"key": value}  # a file reads the same


def test_numbers_reach_the_model() -> None:
    recipe = load_recipe(None, ["visual.optimizer.lr=3e-4", "audio.optimizer.lr=1", "engine.clip=0"])
    assert (recipe.visual.optimizer.lr, recipe.audio.optimizer.lr, recipe.engine.clip) == (3e-4, 1.0, 0.0)
    site = load_site(None, ["time=12:30:00", "account=007", "partition="])
    assert (site.time, site.account, site.partition) == ("12:30:00", "007", "")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("visual.batch=3.0", "`visual.batch` should be a valid integer, not 3.0"),
        ("visual.batch='3'", "`visual.batch` should be a valid integer, not '3'"),
        ("seed=true", "`seed` should be a valid integer, not True"),
        ("visual.flip=yes", "`visual.flip` should be a valid boolean, not 'yes'"),
        ("visual.flip=1", "`visual.flip` should be a valid boolean, not 1"),
        ("name=7", "`name` should be a valid string, not 7"),
        ("visual.batch=0", "`visual.batch` should be greater than 0, not 0"),
        ("engine.zero=4", "`engine.zero` should be less than or equal to 3, not 4"),
        ("engine.clip=.inf", "`engine.clip` should be a finite number, not inf"),
        ("audio.optimizer.lr=.nan", "`audio.optimizer.lr` should be"),
        ("visual.batch=", "`visual.batch` should be a valid integer, not ''"),
        ("fusion.seeds=[0, a]", "`fusion.seeds.1` should be a valid integer, not 'a'"),
        ("stages=[]", "`stages`: List should have at least 1 item"),
        ("fusion.model=jmtt", "`fusion.model` should be 'jmt', 'visual', "),
        ("fusion.jmt.head.x=3", "`fusion.jmt.head` should be 'concat' or 'self_attention', not {'x': 3}"),
        ("visual=3", "`visual` is a group of keys, not 3"),
        ("fusion.jmt=[1]", "`fusion.jmt` is a group of keys, not [1]"),
    ],
)
def test_wrong_values_name_key_value_and_word(word: str, said: str) -> None:
    line = mistake([word])
    assert line.startswith(said)
    assert f"(word `{word}`)" in line


# ---- keys


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("visual.batchs=1", "unknown key `visual.batchs` (word `visual.batchs=1`). Did you mean `visual.batch`?"),
        ("visul.batch=1", "unknown key `visul` (word `visul.batch=1`). Did you mean `visual`?"),
        ("fusion.modl=jmt", "unknown key `fusion.modl` (word `fusion.modl=jmt`). Did you mean `fusion.model`?"),
        (
            "fusion.optimizer.nme=a",
            "unknown key `fusion.optimizer.nme` (word `fusion.optimizer.nme=a`). Did you mean `fusion.optimizer.name`?",
        ),
        ("fusion.jmt.scales=a", "unknown key `fusion.jmt.scales` (word `fusion.jmt.scales=a`). Did you mean `fusion.jmt.scale`?"),
        ("sed=1", "unknown key `sed` (word `sed=1`). Did you mean `seed`?"),
        (
            "visual={batch: 3, size: 64, dept: 10}",
            "unknown key `visual.dept` (word `visual={batch: 3, size: 64, dept: 10}`). Did you mean `visual.depth`?",
        ),
        (
            "lr=1",
            "unknown key `lr` (word `lr=1`). Did you mean `visual.optimizer.lr` or `audio.optimizer.lr` or `fusion.optimizer.lr` "
            "or `finetuning.optimizer.lr`?",
        ),
    ],
)
def test_unknown_keys_get_the_nearest_right_one(word: str, line: str) -> None:
    assert mistake([word]) == line


def test_unknown_key_without_a_near_one_lists_the_keys() -> None:
    assert mistake(["qqqq=1"]).endswith(f"Keys are: {', '.join(Recipe.model_fields)}.")
    assert nearest("qqqq", ["alpha", "beta.gamma"]) == "Keys are: alpha."


def test_unknown_key_of_a_file_names_the_file(tmp_path: Path) -> None:
    path = put(tmp_path / "mine.yaml", "visual:\n  bach: 3\n")
    assert mistake([], path) == f"unknown key `visual.bach` ({path}). Did you mean `visual.batch`?"
    assert mistake(["seed=2"], put(tmp_path / "number.yaml", "3: a\n")).startswith("unknown key `3`")


def test_wrong_value_is_blamed_on_the_layer_that_gave_it(tmp_path: Path) -> None:
    base = put(tmp_path / "base.yaml", "visual:\n  batch: many\n")
    path = put(tmp_path / "mine.yaml", "base: base.yaml\nvisual:\n  size: 64\n")
    assert f"({base})" in mistake(["visual.crop=80"], path)
    assert "(word `visual.batch=few`)" in mistake(["visual.batch=few", "visual.crop=80"], path)


@pytest.mark.parametrize("word", ["seed", "=3", "visual..batch=3", ".seed=1", "visual.=1", "1seed=1", "--"])
def test_words_that_are_none(word: str) -> None:
    assert mistake([word]) == f"`{word}` is not of the form key=value. `--help` lists the keys."


def test_a_word_with_dashes_is_shown_without() -> None:
    assert mistake(["--visual.batch=3"]) == "`--visual.batch=3` is not of the form key=value. Write `visual.batch=3`."


# ---- layers


def test_later_wins_and_groups_merge(tmp_path: Path) -> None:
    put(tmp_path / "deep/first.yaml", "seed: 1\nname: first\nvisual: {batch: 2, size: 64}\nfusion: {seeds: [0, 1, 2]}\n")
    put(tmp_path / "second.yaml", "base: deep/first.yaml\nname: second\nvisual: {batch: 3}\n")
    path = put(tmp_path / "third.yaml", "base: second.yaml\nvisual:\n  depth: 10\nfusion: {seeds: [7]}\n")
    assert [Path(layer.origin).name for layer in read_layers(path)] == ["first.yaml", "second.yaml", "third.yaml"]
    recipe = load_recipe(path, ["visual.batch=5", "visual.batch=6"])
    assert (recipe.seed, recipe.name, recipe.fusion.seeds) == (1, "second", [7])  # lists are replaced, not joined
    assert (recipe.visual.batch, recipe.visual.size, recipe.visual.depth) == (6, 64, 10)


def test_a_part_of_a_group_keeps_the_rest_of_that_groups_defaults() -> None:
    """`audio.optimizer` is adam, `OptimizerOptions` alone would be sgd: the rate must not change the optimiser."""
    recipe = load_recipe(None, ["audio.optimizer.lr=3e-4", "fusion.optimizer.momentum=0.8", "fusion.jmt.heads=2"])
    assert recipe.audio.optimizer.model_dump() == {**Recipe().audio.optimizer.model_dump(), "lr": 3e-4}
    assert recipe.audio.optimizer.name == "adam"
    assert recipe.fusion.optimizer.lr == 5e-4
    assert recipe.audio.batch == 64


def test_defaults_alone() -> None:
    assert load_recipe(None) == Recipe()
    assert load_site(None) == Site()


def test_a_scalar_in_the_place_of_a_group_is_not_overruled_in_silence() -> None:
    assert mistake(["visual.optimizer=sgd", "visual.optimizer.lr=1e-2"]).startswith("`visual.optimizer` is a group of keys, not 'sgd'")


def test_empty_files_and_groups(tmp_path: Path) -> None:
    path = put(tmp_path / "a.yaml", "fusion:\n  # batch: 4\nvisual: {}\n")
    assert load_recipe(path) == load_recipe(put(tmp_path / "b.yaml", "# nothing\n")) == Recipe()


@pytest.mark.parametrize(
    ("text", "line"),
    [("seed: 1\nname: x\nseed: 2\n", 3), ("visual:\n  batch: 1\n  size: 64\n  batch: 2\n", 4), ("visual: {batch: 1, batch: 1}\n", 1)],
)
def test_a_key_written_twice(tmp_path: Path, text: str, line: int) -> None:
    path = put(tmp_path / "a.yaml", text)
    assert mistake([], path).endswith(f"is written twice in {path}, line {line}")


def test_bases_that_go_round_or_nowhere(tmp_path: Path) -> None:
    put(tmp_path / "a.yaml", "base: b.yaml\n")
    put(tmp_path / "b.yaml", "base: a.yaml\n")
    assert "is its own base" in mistake([], tmp_path / "a.yaml")
    path = put(tmp_path / "c.yaml", "base: papr.yaml\n")
    put(tmp_path / "paper.yaml", "")
    assert mistake([], path) == f"there is no file {tmp_path / 'papr.yaml'}. Did you mean `{tmp_path / 'paper.yaml'}`?"
    assert "There is no folder" in mistake([], tmp_path / "absent" / "a.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n- b\n", "is not a list of `key: value` lines"),
        ("just text", "is not a list of `key: value` lines"),
        ("seed: 1\nname: [a\n", "is not YAML"),
        ("seed: 1\n\tname: a\n", "line 2 of"),
        ("seed: \x07\n", "is not YAML"),
        ("? [a, b]\n: 1\n", "is not a word"),
        ("fusion: &x\n  seeds: [*x]\n", "recursive"),
        ("name: !!python/object/apply:os.getcwd []\n", "is not YAML"),
    ],
)
def test_files_that_are_no_recipes(tmp_path: Path, text: str, said: str) -> None:
    assert said in mistake([], put(tmp_path / "a.yaml", text))


def test_a_word_that_contains_itself() -> None:
    assert "it contains itself" in mistake(["stages=&x [*x]"])


def test_files_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xff\xd8\xff")
    assert "cannot be read as text" in mistake([], tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xef\xbb\xbfseed: 4\n")  # a byte-order mark is no part of the first key
    assert load_recipe(tmp_path / "b.yaml").seed == 4


def test_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    site = load_site(put(tmp_path / "site.yaml", "staging: ${oc.env:SCRATCH}/jmt\nenvironment: ['export X=\\${HOME}/x', 'echo $HOME']\n"))
    assert site.staging == "/scratch/me/jmt"
    assert site.environment == ["export X=${HOME}/x", "echo $HOME"]
    assert load_recipe(None, ["seed=5", "visual.seed=${seed}"]).visual.seed == 5
    line = mistake(["name=${absent}"])
    assert line.startswith("a value of `name` (word `name=${absent}`) cannot be resolved") and r"`\${`" in line
    assert "cannot be resolved" in mistake(["name=${HOME"])


def test_a_value_to_be_filled_in_is_not_skipped() -> None:
    assert mistake(["name=???"]) == "`name` has no value (word `name=???`). `???` stands for a value to be filled in."


def test_rules_over_several_keys_speak_for_themselves() -> None:
    assert mistake(["features.offsets=[0]"]).startswith("fusion.validation_offsets asks for offsets [1, 2, 3, 4, 5, 6, 7]")
    assert mistake(["fusion.baselines=[jmt]"]).startswith("fusion.baselines names fusion.model=jmt itself")


def test_missing_keys() -> None:
    with pytest.raises(UsageError, match=r"`source` is missing\. Write source="):
        build(PackOptions, [word_layer("out=x")])
    with pytest.raises(UsageError, match=r"`against\.source` is missing"):
        build(PackOptions, [], prefix="against.")


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [
        "3e-4",
        "12:30:00",
        "no",
        "null",
        "true",
        "007",
        "1e5",
        "~",
        "${HOME}",
        r"\${x}",
        r"\\${seed}",
        "$",
        "a\\",
        "- a",
        "a: b",
        "#x",
        " ",
        "'",
    ]
)


@settings(max_examples=40, deadline=None)
@given(
    lines=st.lists(text, max_size=4),
    name=text.filter(lambda name: name not in ("", "???")),
    lr=st.floats(1e-12, 1e6),
    extra=st.dictionaries(st.from_regex(r"[\w-]+", fullmatch=True), text, max_size=2),
)
def test_what_is_dumped_reads_back(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], name: str, lr: float, extra: dict[str, str]
) -> None:
    path = tmp_path_factory.mktemp("dump") / "a.yaml"
    site = Site(name=name, environment=lines, extra=extra)
    dump(site, path)
    assert load_site(path) == site
    default = Recipe()
    visual = default.visual.model_copy(update={"optimizer": default.visual.optimizer.model_copy(update={"lr": lr})})
    recipe = default.model_copy(update={"name": name, "visual": visual})
    dump(recipe, path)
    assert load_recipe(path) == recipe


def test_a_dump_says_every_key(tmp_path: Path) -> None:
    dump(Recipe(), tmp_path / "a.yaml")
    (layer,) = read_layers(tmp_path / "a.yaml")

    def keys(values: object, prefix: str = "") -> list[str]:
        return [k for name, v in values.items() for k in [prefix + name, *keys(v, f"{prefix}{name}.")]] if isinstance(values, dict) else []

    assert keys(layer.values) == field_names(Recipe)


def test_options_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe().seed = 3  # type: ignore[misc]


def test_layer_of_a_word() -> None:
    assert word_layer("visual.optimizer.lr=3e-4") == Layer("word `visual.optimizer.lr=3e-4`", {"visual": {"optimizer": {"lr": 3e-4}}})


def test_a_misspelt_required_key_is_named_as_unknown() -> None:
    with pytest.raises(UsageError, match=r"unknown key `sorce`.*`source`"):
        build(PackOptions, [word_layer("sorce=x"), word_layer("out=y")])
