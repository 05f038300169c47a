"""Files that a verb is to write: refused at once where they cannot be there or nobody knows what they hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardstage.cli.app import run
from shardstage.cli.outputs import require_endings, require_folder, write_text
from shardstage.errors import ConfigError

ENDINGS = {".toml": "the plan", ".html": "a page"}


def test_a_file_whose_ending_says_nothing_is_refused_with_those_that_do(tmp_path: Path) -> None:
    require_endings([tmp_path / "plan.toml", tmp_path / "page.html"], ENDINGS)
    with pytest.raises(ConfigError, match=r"a file ends in \.toml \(the plan\), \.html \(a page\)") as caught:
        require_endings([Path("plan.txt")], ENDINGS)
    assert caught.value.hint == "--out plan.toml"


def test_a_file_without_a_folder_is_refused_with_the_command_that_makes_it() -> None:
    with pytest.raises(ConfigError, match="there is no folder none/such") as caught:
        require_folder(Path("none/such/page.html"))
    assert caught.value.hint == "mkdir -p none/such"


def test_a_file_that_cannot_be_written_is_an_error_of_the_option_s(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "ä")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "ä"
    with pytest.raises(ConfigError, match="cannot be written: Is a directory") as caught:
        write_text(tmp_path, "text", option="--trace")
    assert (caught.value.hint or "").startswith("--trace ")


@pytest.mark.parametrize(
    "command",
    [
        "plan --cluster none-such --out none/page.html",
        "rehearse --cluster none-such --out none/page.html",
        "probe --out none/cluster.toml",
    ],
)
def test_nothing_is_begun_for_a_file_that_has_no_folder(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command.split()) == 2
    shown = capsys.readouterr().err
    assert "there is no folder none" in shown and "none-such" not in shown
