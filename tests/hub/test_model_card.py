"""Model cards and mergekit recipes of exported chains."""

import inspect

import jax
import pytest
from checkpoints import make_tensors, write

import jchain as jc


def test_the_folder_has_a_recipe_a_card_and_the_tokenizer(tmp_path):
    folder = write(tmp_path / "model")
    (folder / "tokenizer.json").write_text("{}")
    for name in ("additional_chat_templates", "runs"):
        (folder / name).mkdir()
        (folder / name / "tools.jinja").write_text("{{ messages }}")
    bank = jc.hub.load(folder, name="tiny")
    out = jc.hub.export(
        bank, [0, 1, 1, 0, 2], folder, tmp_path / "out", facts={"loss on test": 1.25}
    )
    recipe = (out / "mergekit.yaml").read_text()
    assert recipe.count("layer_range") == 3
    assert "layer_range: [0, 2]" in recipe
    assert "merge_method: passthrough\ndtype: float32" in recipe
    card = (out / "README.md").read_text()
    assert (
        "`tiny/0 -> tiny/1 -> tiny/1 -> tiny/0`. Embeddings of tiny, output layer of tiny." in card
    )
    assert "| loss on test | 1.25 |" in card
    assert (out / "tokenizer.json").read_text() == "{}"
    assert [path.name for path in out.iterdir() if path.is_dir()] == ["additional_chat_templates"]
    assert (out / "additional_chat_templates" / "tools.jinja").read_text() == "{{ messages }}"
    assert jc.hub.load(out).num_layers == 4


def test_recipes_list_what_mergekit_cannot_reproduce(tmp_path):
    folders = [write(tmp_path / f"m{i}", tensors=make_tensors(seed=i)) for i in range(2)]
    bank = jc.hub.load(folders[0])
    bank = bank.replace([1], [jax.tree.map(lambda leaf: 2 * leaf, bank.get_params(1))])
    out = jc.hub.export(bank, [0, 1, 2], folders[0], tmp_path / "out")
    assert (
        "checkpoint in this folder: m0/1 were trained after loading"
        in (out / "mergekit.yaml").read_text()
    )
    assert "Trained after loading: m0/1." in (out / "README.md").read_text()
    many = jc.hub.load_many(folders)
    with pytest.raises(
        ValueError, match="expected a folder, or the folder of each model by name, got"
    ):
        inspect.unwrap(jc.hub.export)(many, [0, 2, 5], folders, tmp_path / "other")
    with pytest.raises(
        ValueError, match="expected the folder of each model by name, m0, m1, got none of m1"
    ):
        jc.hub.export(many, [0, 2, 5], folders[0], tmp_path / "other")
