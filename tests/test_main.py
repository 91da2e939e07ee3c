from jchain.__main__ import main
from jchain.cli.commands import COMMANDS


def test_an_interrupted_command_exits_with_130(monkeypatch, capsys):
    def interrupt(args):
        assert args.command == "jchain prepare 'two words'"
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "prepare", interrupt)
    assert main(["prepare", "two words"]) == 130
    assert "jchain: interrupted" in capsys.readouterr().err
