"""Where models come from."""

import pytest
from checkpoints import write_config

from jchain.hub.origins import License, find_license, find_origin

APACHE = "\n             Apache License\n         Version 2.0, January 2004\n"
MIT = "MIT License\n\nCopyright (c) 2024 Jo\n\nPermission is hereby granted, free of charge, to"


def test_snapshots_of_the_cache_of_the_hub_have_a_name_and_a_revision(tmp_path):
    snapshot = tmp_path / "models--Qwen--Qwen2.5-0.5B" / "snapshots" / ("a1" * 20)
    snapshot.mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(snapshot)
    for folder in (snapshot, link):
        origin = find_origin("given", folder)
        assert origin == ("given", "Qwen/Qwen2.5-0.5B", "a1" * 20, None)
    old = tmp_path / "models--gpt2" / "snapshots" / "main"
    old.mkdir(parents=True)
    assert find_origin("x", old)[1:3] == ("gpt2", None)


@pytest.mark.parametrize("place", ["owner/name", "models--a/b", "models--/snapshots/1"])
def test_other_folders_have_no_name_on_the_hub(tmp_path, place):
    folder = tmp_path / place
    folder.mkdir(parents=True)
    # Trainers write the name of the model that they started from.
    write_config(folder, {"_name_or_path": "owner/base"})
    assert find_origin("x", folder).hub_name is None


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({}, None),
        ({"README.md": "---\nlicense: apache-2.0\ntags: [a]\n---\n# A\n"}, License("apache-2.0")),
        ({"README.md": "\ufeff---\r\nlicense:\r\n- mit\r\n---\r\n"}, License("mit")),
        (
            {"README.md": "---\nlicense: other\nlicense_name: 'a: b'\nlicense_link: LICENSE\n---"},
            License("other", "a: b", "LICENSE"),
        ),
        ({"README.md": "---\na: [\nlicense: mit\n---\n"}, License("mit")),
        ({"README.md": "# A\n---\nlicense: mit\n---\n"}, None),
        ({"README.md": "---\nlicense: [mit, gpl]\n---\n"}, None),
        ({"README.md": "---\nlicense: {a: b}\n---\n"}, None),
        ({"README.md": "---\nlicense: !!python/object:os.system x\n---\n"}, None),
        ({"README.md": f"---\nlicense: {'[' * 60_000}\n---\n"}, None),
        ({"README.md": '---\nlicense: "mit\\nname: x"\n---\n'}, None),
        ({"README.md": "---\n- a\n---\n", "LICENSE": APACHE}, License("apache-2.0")),
        ({"LICENSE": MIT}, License("mit")),
        ({"LICENSE.md": MIT.partition("\n")[2]}, License("mit")),
        ({"LICENSE": "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT"}, None),
        ({"LICENSE": b"\xff\xfe"}, None),
    ],
)  # fmt: skip
def test_the_license_is_that_of_the_card_or_of_a_known_text(tmp_path, files, wanted):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert find_license(tmp_path) == wanted
