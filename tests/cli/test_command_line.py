"""The command line as a user meets it: help, flags, configuration, and one-line errors."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from coordinator.keys import ApiKeys, Scope
from pdserve.cli.app import main
from pdserve.cli.options import build_config, parse_settings
from pdserve.cli.summary import milliseconds, size
from pdserve.core.errors import ConfigError
from tests.support.paths import REPO


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: str
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `pdserve ARGS` in this process."""
    monkeypatch.setattr(sys, "argv", ["pdserve", *args])
    with pytest.raises(SystemExit) as exit:
        main()
    captured = capsys.readouterr()
    assert isinstance(exit.value.code, int)
    return exit.value.code, captured.out, captured.err


Run = tuple[pytest.CaptureFixture[str], pytest.MonkeyPatch]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    return capsys, monkeypatch


@pytest.mark.parametrize(
    "command",
    ["serve", "generate", "demo", "doctor", "drain", "undrain", "scale", "models", "config", "simulate"],
)
def test_the_help_lists_every_command_and_each_explains_itself(cli: Run, command: str) -> None:
    code, out, _ = run(*cli, "--help")
    assert code == 0
    assert command in out
    code, out, _ = run(*cli, command, "--help")
    assert code == 0
    assert "Usage" in out


def test_no_command_shows_the_help() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pdserve.cli"], capture_output=True, text=True, cwd=REPO, timeout=60
    )
    assert "Usage" in done.stdout + done.stderr


def test_help_does_not_import_ray_or_torch() -> None:
    code = "import sys, pdserve.cli.app; print([m for m in ('ray', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["serve", "--policy", "best"], "policy"),
        (["serve", "--no-such-flag"], "--no-such-flag"),
        (["nonsense"], "nonsense"),
        (["serve", "--config", "/no/such/file.yaml"], "/no/such/file.yaml"),
        (["serve", "--set", "cache.block_size"], "SECTION.KEY=VALUE"),
        (["serve", "--set", "cache.block_size=-1"], "cache.block_size"),
        (["serve", "--set", "cache.no_such_key=1"], "cache.no_such_key"),
        (["serve", "--model", "no-such-model", "--port", "0"], "no-such-model"),
        (["serve", "--decode", "0"], "decode.workers"),
        (["models", "pull", "no-such-model"], "no-such-model"),
        (["generate", "hello", "--system", "x", "--raw"], "--system"),
        (["generate", "hello", "--address", "127.0.0.1:1", "--deadline-s", "5"], "127.0.0.1:1"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(cli: Run, args: list[str], said: str) -> None:
    code, out, err = run(*cli, *args)
    assert code == 2
    assert out == ""
    assert said in err
    assert len(err.strip().splitlines()) == 1, err
    assert "Traceback" not in err


def test_a_port_that_is_taken_is_said_before_anything_starts(cli: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = run(*cli, "serve", "--port", str(port))
    assert code == 2
    assert f"127.0.0.1:{port}" in err


def test_the_shown_configuration_can_be_read_back(cli: Run, tmp_path: Path) -> None:
    code, out, _ = run(*cli, "config", "show", "--prefill", "2", "--set", "cache.block_size=32")
    assert code == 0
    (tmp_path / "shown.yaml").write_text(out)
    config = build_config(tmp_path / "shown.yaml", None, {})
    assert (config.prefill.workers, config.cache.block_size) == (2, 32)


def test_flags_win_over_set_which_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"prefill": {"workers": 2, "max_num_seqs": 5}, "seed": 7}))
    config = build_config(file, ["prefill.workers=3", "decode.workers=3"], {"decode": {"workers": 4}})
    assert (config.prefill.workers, config.prefill.max_num_seqs, config.decode.workers) == (3, 5, 4)
    assert config.seed == 7


def test_flags_that_are_not_given_change_nothing() -> None:
    assert build_config(None, None, {"prefill": {"workers": None}}) == build_config(None, None, {})


def test_values_of_set_are_yaml() -> None:
    assert parse_settings(["a.b=1", "a.c=null", "a.d=text", "e.f=false"]) == {
        "a": {"b": 1, "c": None, "d": "text"},
        "e": {"f": False},
    }
    with pytest.raises(ConfigError, match="SECTION"):
        parse_settings(["a=1"])


def test_doctor_speaks_json(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from pdserve.cli import doctor
    from pdserve.cli.checks import bad, ok

    monkeypatch.setattr(doctor, "_examine", lambda config: iter([ok("a", "fine"), bad("b", "not", "do it")]))
    code, out, _ = run(*cli, "doctor", "--json")
    assert code == 1
    assert json.loads(out) == [
        {"check": "a", "status": "ok", "found": "fine", "advice": ""},
        {"check": "b", "status": "fail", "found": "not", "advice": "do it"},
    ]


def test_figures_are_short() -> None:
    assert [milliseconds(s) for s in (0.000512, 0.0834, 0.999, 1.267)] == [
        "0.512 ms",
        "83.4 ms",
        "999 ms",
        "1.27 s",
    ]
    assert [size(n) for n in (0, 999, 1500, 2_340_000, 5_000_000_000)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "2.34 MB",
        "5 GB",
    ]


def test_a_new_key_is_an_entry_that_the_service_reads_and_the_key_is_not_in_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, entry, said = run(
        capsys, monkeypatch, "keys", "new", "search", "--tenant", "a", "--scope", "observe"
    )
    assert code == 0
    key = said.rpartition(" ")[2].strip()
    assert key.startswith("pds_")
    assert key not in entry
    caller = ApiKeys.from_text(entry, "test").caller(key)
    assert (caller.name, caller.tenant, caller.scopes) == ("search", "a", {Scope.OBSERVE})
