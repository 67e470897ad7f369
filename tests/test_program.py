"""What all programs share: help, exit codes, errors of one line."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest
from pydantic import BaseModel, Field

from jmt_dist.config import FixtureOptions, Options, PackOptions, Recipe, Site, VerifyOptions
from jmt_dist.errors import UsageError, UserError
from jmt_dist.program import FAILED, OK, OMISSIONS, USAGE, run, usage
from jmt_dist.recipe import (
    field_names,
    load_site,
    split_words,
)


class Own(Options):
    """A program's own words."""

    recipe: str = Field("", description="recipe file")
    folds: list[str] = Field([], description="folds to run")


def test_words_go_to_whom_they_belong() -> None:
    words = ["recipe=a.yaml", "site.time=90", "visual.batch=2", "folds=[official]", "folds.seed=3", "site.extra.mail-type=END"]
    own, site, recipe = split_words(words, Own)
    assert own == ["recipe=a.yaml", "folds=[official]"]
    assert site == ["time=90", "extra.mail-type=END"]
    assert recipe == ["visual.batch=2", "folds.seed=3"]
    assert load_site(None, site).extra == {"mail-type": "END"}
    with pytest.raises(UsageError, match=r"unknown key `sites.time` .*Did you mean `site.time`\?"):
        split_words(["sites.time=3"], Own)
    with pytest.raises(UsageError, match=r"unknown key `site.tme` .*Did you mean `site.time`\?"):
        load_site(None, split_words(["site.tme=3"], Own)[1])


def exit_code(body: str, *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a program with this `main`."""
    imports = "from jmt_dist.program import run\nfrom jmt_dist.errors import UserError, UsageError"
    program = f"{imports}\ndef main(words):\n    {body}\nrun(main, 'Does it.', [])"
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("print(words)", OK, ""),
        ("return 3", OMISSIONS, ""),
        ("raise UserError('no\\nshards here', 'Pack them.')", FAILED, "-c: no shards here. Pack them.\n"),
        ("raise UsageError('unknown key `x`')", USAGE, "-c: unknown key `x`\n"),
        ("open('/proc/self/cmdline/x')", FAILED, "-c: /proc/self/cmdline/x: Not a directory. Name another place.\n"),
        ("raise OSError(28, 'no room')", FAILED, "-c: [Errno 28] no room. Free some space, and give the same command.\n"),
        (
            "raise OSError(38, 'not implemented')",
            FAILED,
            "-c: [Errno 38] not implemented. File locks are needed: name a place whose file system has them.\n",
        ),
        ("raise KeyboardInterrupt", FAILED, "-c: interrupted; the same command goes on where it stopped\n"),
    ],
)
def test_exit_codes(body: str, code: int, said: str) -> None:
    assert (OK, FAILED, USAGE, OMISSIONS) == (0, 1, 2, 3)
    returned, out, err = exit_code(body, "a=1")
    assert (returned, err) == (code, said)
    if body.startswith("print"):
        assert out == "['a=1']\n"


def test_a_locale_that_lacks_a_letter_ends_no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    assert exit_code("print('units: \u2026')") == (OK, "units: \\u2026\n", "")


def test_our_own_mistakes_keep_their_traceback() -> None:
    for body, said in (("return 1 / 0", "ZeroDivisionError"), ("open('nowhere')", "FileNotFoundError")):
        code, _, err = exit_code(body)
        assert code == FAILED and "Traceback" in err and said in err


def test_a_reader_that_leaves_is_no_error_message() -> None:
    program = "from jmt_dist.program import run\nrun(lambda words: print('x' * 100000), 'Does it.', [])"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(30) == FAILED
    assert err == b""


@pytest.mark.parametrize("word", ["-h", "--help", "help"])
def test_help_comes_before_anything_else(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    def main(words: list[str]) -> int:
        raise AssertionError("main was called")

    with pytest.raises(SystemExit) as stop:
        run(main, "Packs the dataset.", [("Options", "", PackOptions)], ["source=x", word])
    assert stop.value.code == OK
    assert capsys.readouterr().out.startswith("Packs the dataset.\n")


@pytest.mark.parametrize(
    ("model", "prefix"), [(Recipe, ""), (Site, "site."), (PackOptions, ""), (FixtureOptions, ""), (VerifyOptions, "")], ids=lambda m: str(m)
)
def test_help_mentions_every_key_its_default_and_its_meaning(model: type[BaseModel], prefix: str) -> None:
    lines = [line.split() for line in usage("Does it.", [("Options", prefix, model)]).splitlines()]
    shown = [words[0] for words in lines if words]
    groups = {name.rsplit(".", 1)[0] for name in field_names(model, prefix) if "." in name.removeprefix(prefix)}
    leaves = [name for name in field_names(model, prefix) if name not in groups]
    assert [name for name in shown if name in leaves] == leaves
    assert all(len(words) >= 3 for words in lines if words and words[0] in leaves)
    whole = usage("Does it.", [("Options", prefix, model)])
    assert "exit code 0: done, 1: failed, 2: wrong usage, 3: done with omissions" in whole
    if model is PackOptions:
        assert "[required]" in whole and "samples per tar [256]" in whole


def test_every_key_is_described() -> None:
    def undescribed(model: type[BaseModel]) -> list[str]:
        names = [f"{model.__name__}.{name}" for name, field in model.model_fields.items() if not field.description]
        for field in model.model_fields.values():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                names += undescribed(field.annotation)
        return names

    assert [name for model in (Recipe, Site, PackOptions, FixtureOptions, VerifyOptions) for name in undescribed(model)] == []


def test_errors_read_as_sentence_and_remedy() -> None:
    assert str(UserError("It broke.", "Mend it.")) == "It broke. Mend it."
    assert str(UserError("It broke")) == "It broke"


WORKERS = """
import time
from jmt_dist.data.progress import in_processes
list(in_processes(time.sleep, [60, 60], 2))
"""


def test_the_workers_of_a_killed_program_end_too() -> None:
    """They would go on with what they had been given, in the files of the run that follows, and then wait for ever."""
    program = subprocess.Popen([sys.executable, "-c", WORKERS])
    deadline = time.monotonic() + 60
    children: list[psutil.Process] = []
    while len(children) < 4 and time.monotonic() < deadline:  # a server, its tracker, two workers
        children = psutil.Process(program.pid).children(recursive=True)
        time.sleep(0.02)
    assert len(children) == 4 and program.poll() is None
    program.kill()
    program.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    for process in alive:
        process.kill()
    assert not alive
