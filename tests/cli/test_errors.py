"""Bad input: one clear line, a hint, exit code 2, no traceback, nothing written, no rank started."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.training.models import TINY

from shardstage.cli import main
from shardstage.cli.app import run
from shardstage.errors import DataError, ParityError, RankFailedError
from shardstage.training import RunConfig, run_config_to_toml


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "binary.bin").write_bytes(b"\0\1\2")
    (tmp_path / "run.toml").write_text("stepz = 3\n")
    (tmp_path / "wrong.toml").write_text('steps = "many"\n')
    held = tmp_path / "held"
    held.mkdir()
    (held / "run.toml").write_text(run_config_to_toml(RunConfig(model=TINY, plan="dp=2")))
    (tmp_path / "runs" / "today").mkdir(parents=True)
    (tmp_path / "runs" / "today" / "run.toml").write_text("")
    return tmp_path


TINY_RUN = f"--model {TINY} --batch 4 --seq 16 --out new"

REFUSED = [
    ("train --model lama-tiny --plan dp=1", "model 'lama-tiny' is not known", "--model llama-tiny"),
    ("train --run run.toml", "run.toml: unknown key 'stepz'", "steps = ..."),
    ("train --run wrong.toml", "wrong.toml: steps must be a whole number, not 'many'", "steps = 20"),
    ("train --run none.toml", "the run file none.toml cannot be read: No such file", "--run run.toml"),
    (
        f"train {TINY_RUN} --plan dp=2,tp=2 --ranks 3",
        "dp=2 × tp=2 × pp=1",
        "--ranks 4",
    ),
    (f"train {TINY_RUN} --plan dp=8 --ranks 8", "a batch of 4 samples leaves", "--batch 8"),
    (f"train {TINY_RUN} --plan dp=2,zero=7 --ranks 2", "zero=7 is not a level of ZeRO", 'zero=3"'),
    (f"train {TINY_RUN} --plan none.toml", "none.toml", "--plan auto"),
    (f"train {TINY_RUN} --plan dp=1 --data short.txt", "the text has 10 tokens", "--seq 9"),
    (f"train {TINY_RUN} --plan dp=1 --data none.txt", "no file or folder 'none.txt'", "ls ."),
    (f"train {TINY_RUN} --plan dp=1 --data binary.bin", "binary.bin is a binary file", ".txt"),
    (f"train {TINY_RUN} --plan dp=1 --steps -1", "steps = -1 is too small", "steps = 20"),
    (f"train {TINY_RUN} --plan dp=1 --export-hf hf", "is no Hugging Face model", "leave out --export-hf"),
    ("train --out held --plan dp=1", "held holds another run already (run.toml)", "--out held-2"),
    ("train --out held", "held holds another run already (run.toml)", "--out held-2"),
    ("train --out held --resume", "ended before its first checkpoint", "--out held-2"),
    ("train --out none --resume", "there is no run in none to resume", "leave out --resume"),
    ("train --resume", "nothing says which", "--resume --out runs/today"),
    ("plan --cluster h100:0", "cluster 'h100' has no devices", "h100:8"),
    ("plan --cluster h100:8 --plan dp=2,tp=2,pp=2,cp=2", "needs 16 ranks", '"dp=1,tp=2,pp=2,cp=2"'),
    ("plan --model models.py --cluster cpu:2", "model 'models.py' is not known", "--model models.py:factory"),
    ("plan --model :model --cluster cpu:2", "model ':model' is not known", "--model llama-tiny"),
    ("plan --model lama-tiny --cluster cpu:2", "model 'lama-tiny' is not known", "--model llama-tiny"),
    ("plan --cluster h1000:8", "h1000", "h100"),
    ("plan --cluster cpu:2 --max-memory 0", "a rank that may hold nothing", "--max-memory 70GiB"),
    ("plan --cluster cpu:2 --max-memory 0%", "a rank that may hold nothing", "--max-memory 70GiB"),
    ("plan --cluster cpu:2 --max-memory 120%", "holds no more than its device can", "--max-memory 100%"),
    ("prove --inject-fault nonsense", "nonsense", ""),
]


def files_of_runs(folder: Path) -> list[Path]:
    """All but the user's cache: what is known of a model stays, whatever is asked of it."""
    cache = folder / "cache"
    return sorted(path for path in folder.rglob("*") if cache not in (path, *path.parents))


@pytest.mark.parametrize(("command", "message", "hint"), REFUSED, ids=[entry[0] for entry in REFUSED])
def test_bad_input_is_refused_in_one_line_with_a_hint(
    command: str, message: str, hint: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_of_runs(folder)
    assert run(command.split()) == 2
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert any(line.startswith("hint: ") for line in lines[1:])
    assert hint in "\n".join(lines[1:])
    assert "Traceback" not in shown.err
    assert files_of_runs(folder) == before, "nothing is left of a run that never began"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train --stepz 3", "No such option: --stepz"),
        ("train --steps many", "Invalid value for '--steps'"),
        ("trian", "No such command 'trian'"),
        ("train --model", "requires an argument"),
        ("plan --ranks 0", "Invalid value for '--ranks'"),
        ("plan --batch -3", "Invalid value for '--batch'"),
        ("plan --seq 0", "Invalid value for '--seq'"),
    ],
)
def test_what_is_mistyped_is_named(command: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command.split()) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("no data", hint="add some"), 2),
        (ParityError("not equal", hint="look"), 1),
        (RankFailedError("rank 1 died\nlast lines", hint="less log"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes_tell_bad_input_from_a_failure(
    error: BaseException,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        assert os.environ["GOMP_SPINCOUNT"] == "7"
        raise error

    monkeypatch.setenv("GOMP_SPINCOUNT", "7")  # the user's own stays, and the test leaves none behind
    monkeypatch.setattr("shardstage.training.prepare.prepare", fail)
    with pytest.raises(SystemExit) as ended:
        main(["train", "--plan", "dp=1", "--out", "new"])
    assert ended.value.code == code
    shown = capsys.readouterr().err
    assert ("stopped" if code == 130 else str(error).splitlines()[0]) in shown


def test_an_interrupt_before_the_verbs_are_there_leaves_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shardstage.cli.app.run", interrupt)
    with pytest.raises(SystemExit) as ended:
        main(["plan"])
    assert (ended.value.code, capsys.readouterr().err) == (130, "stopped\n")


def test_debugging_lets_the_traceback_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDSTAGE_DEBUG", "1")
    with pytest.raises(DataError):
        run(f"train {TINY_RUN} --plan dp=1 --data none.txt".split())
