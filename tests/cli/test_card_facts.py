"""What the cards of exported results say. test_commands.py exports whole results."""

import pytest

from jchain.cli.card_facts import hide_folders

KEPT = (
    "jchain search --checkpoint model --text my.txt",
    "jchain search --checkpoint owner/name@1a2b --budget 10 --pinned 1,1",
    "jchain search --out /",
)


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        *((command, command) for command in KEPT),
        ("jchain search --checkpoint /home/jo/model/", "jchain search --checkpoint model"),
        ("jchain search --text=/data/a.txt ~/b.txt", "jchain search --text=a.txt b.txt"),
        ("jchain search --out ../jo/found --text ./x/a", "jchain search --out found --text a"),
        ("jchain search --text 'C:\\jo\\a b.txt'", "jchain search --text 'a b.txt'"),
        ("jchain search --text 'it", ""),  # not a command
    ],
)
def test_commands_are_shown_without_the_folders_of_their_files(command, shown):
    assert hide_folders(command) == shown
