"""How commands are found, and how they end when something is wrong."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

import fastdms
from fastdms.cli import main
from fastdms.cli.main import COMMANDS, TOOLS
from tests.cli.fake_model import one_error_line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nonsense"], "there is no command 'nonsense'"),
        (["--nonsense"], "there is no command '--nonsense'"),
        (["generate"], "PROMPT"),
        (["generate", "a", "b", "c"], "quote the prompt"),
        (["generate", "hi", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["generate", "hi", "--temperature", "hot"], "argument --temperature: invalid float value: 'hot'"),
        (["generate", "hi", "--temperature", "nan"], "temperature must be"),
        (["generate", "hi", "--top-p", "-1"], "top_p must be"),
        (["generate", "hi", "--max-tokens", "0"], "max_tokens must be"),
        (["generate", "hi", "--max-tokens", "1000000000000"], "max_tokens must be"),
        (["generate", "hi", "--stop", ""], "stop must be"),
        (["generate", "hi", "--logprobs", "21"], "logprobs must be"),
        (["generate", "hi", "--logprobs", "2", "--stream"], "--logprobs can't be used with --stream"),
        (["generate", "hi", "--seed", "-1"], "seed must be"),
        (["generate", "hi", "--dms", "on"], "argument --dms: invalid choice: 'on'"),
        (["generate", "hi", "--kv-memory", "lots"], "argument --kv-memory: 'lots' is no size"),
        (["chat", "a", "b"], "unrecognized arguments: b"),
        (["inspect", "/no/such/model"], "/no/such/model"),
        (["inspect", "a", "b"], "unrecognized arguments: b"),
    ],
)
def test_bad_input_is_one_line(model, capsys, arguments, says):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert says in one_error_line(err)
    assert out == ""
    assert not model.opened


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("two\n  lines"), 2),
        (OSError("disk"), 2),
        (ImportError("pip install"), 2),
        (KeyboardInterrupt(), 130),
        (BrokenPipeError(), 141),
        (SystemExit(3), 3),
        (SystemExit("why"), 1),
        (SystemExit(), 0),
    ],
)
def test_what_an_error_becomes(model, capsys, error, code):
    model.pieces = ["o", error]
    assert main(["generate", "hi", "--stream"]) == code
    out, err = capsys.readouterr()
    assert out == "o"
    assert model.closed
    assert ("fastdms: error: " in err) == (code == 2)
    if code == 2:
        assert " ".join(str(error).split()) in one_error_line(err)


def test_a_fault_of_ours_is_not_hidden(model):
    model.pieces = [RuntimeError("a bug")]
    with pytest.raises(RuntimeError, match="a bug"):
        main(["generate", "hi", "--stream"])


def test_no_command(capsys):
    for arguments, code in (([], 2), (["--help"], 0), (["-h"], 0)):
        assert main(arguments) == code
        out = capsys.readouterr().out
        assert all(f"\n  {name} " in out for name in [*COMMANDS, *TOOLS])


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastdms {fastdms.__version__}\n"


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (4, 4)])
def test_a_tool_is_imported_when_it_is_run(monkeypatch, result, code):
    seen = []

    def tool(argv):
        seen.append(argv)
        return result

    monkeypatch.setitem(TOOLS, "some-tool", ("fastdms.tools.some_tool", "does something"))
    monkeypatch.setitem(sys.modules, "fastdms.tools.some_tool", SimpleNamespace(main=tool))
    assert main(["some-tool", "a", "--help"]) == code
    assert seen == [["a", "--help"]]
