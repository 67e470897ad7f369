"""Words of a program as people type them: key=value, --key value, and the required ones by their place."""

from __future__ import annotations

import pytest

from jmt_dist.config import PackOptions, VerifyOptions
from jmt_dist.program import USAGE, as_pairs, required, run
from jmt_dist.recipe import build, word_layer


@pytest.mark.parametrize(
    ("words", "pairs"),
    [
        (["a=1", "b=x y"], ["a=1", "b=x y"]),
        (["S"], ["source=S"]),
        (["S", "T", "workers=3"], ["source=S", "out=T", "workers=3"]),
        (["out=T", "S"], ["out=T", "source=S"]),  # a key that is given is no longer waiting for a bare word
        (["--against", "F", "S"], ["against=F", "source=S"]),
        (["S", "--against", "/a=b"], ["source=S", "against=/a=b"]),
        (["--folds.seed=3"], ["folds.seed=3"]),
        (["--strict", "--workers", "2", "--dry"], ["strict=true", "workers=2", "dry=true"]),
        (["--threshold", "-5"], ["threshold=-5"]),
        (["S", "T", "U"], ["source=S", "out=T", "U"]),  # one too many stays, to be refused
        (["-x", "--", "S"], ["-x", "--", "source=S"]),
    ],
)
def test_every_way_to_write_a_word_is_key_value_in_the_end(words: list[str], pairs: list[str]) -> None:
    assert as_pairs(words, ["source", "out"]) == pairs


def test_bare_words_stand_for_what_a_program_requires() -> None:
    models = [("Options", "", VerifyOptions)]
    assert required(models) == ["shards"] and required([]) == []
    words = as_pairs(["shards-x", "--against", "tree", "--workers", "3"], required(models))
    options = build(VerifyOptions, [word_layer(word) for word in words])
    assert (options.shards, options.against, options.workers) == ("shards-x", "tree", 3)


def test_a_bare_word_too_many_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    def main(words: list[str]) -> None:
        build(PackOptions, [word_layer(word) for word in words])

    with pytest.raises(SystemExit) as stop:
        run(main, "Packs.", [("Options", "", PackOptions)], ["a", "b", "c"])
    assert stop.value.code == USAGE
    assert "`c` is not of the form key=value. `--help` lists the keys." in capsys.readouterr().err


def test_a_folder_may_be_named_by_a_number_and_a_tilde_is_the_home_whatever_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    made = build(PackOptions, [word_layer("source=~/Aff-Wild2"), word_layer("out=20260115")])
    assert (made.source, made.out, made.site) == ("/home/me/Aff-Wild2", "20260115", "")
