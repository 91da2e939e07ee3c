"""Model cards of exported chains."""

import inspect

import jax
import pytest
import yaml
from checkpoints import VIT, make_tensors, write, write_config

import jchain as jc


def read_card(out):
    """Read the metadata and the text of a card."""
    card = (out / "README.md").read_text()
    _, metadata, text = card.split("---\n", 2)
    return yaml.safe_load(metadata), text


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
    metadata, text = read_card(out)
    assert metadata == {"library_name": "transformers", "tags": ["jchain"]}
    assert "`tiny/0 -> tiny/1 -> tiny/1 -> tiny/0`." in text
    assert "Embeddings of `tiny`, output layer of `tiny`." in text
    assert "| loss on test | 1.25 |" in text
    assert (out / "tokenizer.json").read_text() == "{}"
    assert [path.name for path in out.iterdir() if path.is_dir()] == ["additional_chat_templates"]
    assert (out / "additional_chat_templates" / "tools.jinja").read_text() == "{{ messages }}"
    assert jc.hub.load(out).num_layers == 4


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([0, 1, 2, 3, 4, 5], "`m`: all 6 blocks stay."),
        ([0, 1, 2, 5], "`m`: 4 of 6 blocks stay (0-2, 5), 2 dropped (3-4)."),
        ([0, 1, 2, 3, 3, 4, 5, 3], "`m`: all 6 blocks stay; repeated: 3 (3 times); not"),
        ([5, 1], "`m`: 2 of 6 blocks stay (1, 5), 4 dropped (0, 2-4); not in the order of"),
    ],
)  # fmt: skip
def test_the_card_says_in_words_which_blocks_stay(tmp_path, layers, words):
    folder = write(tmp_path / "m", config={"n_layer": 6}, tensors=make_tensors(depth=6))
    out = jc.hub.export(jc.hub.load(folder), [*layers, 6], folder, tmp_path / "out")
    assert f"- {words}" in read_card(out)[1]


def test_weights_that_were_trained_are_named(tmp_path):
    folder = write(tmp_path / "m0")
    bank = jc.hub.load(folder)
    bank = bank.replace([1], [jax.tree.map(lambda leaf: 2 * leaf, bank.get_params(1))])
    out = jc.hub.export(bank, [0, 1, 2], folder, tmp_path / "out")
    assert "- Trained after loading: `m0/1`." in read_card(out)[1]


def test_several_models_are_named_with_their_places_on_the_hub_and_licenses(tmp_path):
    folders = {}
    for i, name in enumerate(("a", "b")):
        snapshots = tmp_path / f"models--owner--{name}" / "snapshots"
        snapshots.mkdir(parents=True)
        folders[name] = write(snapshots / (f"{i}f" * 20), tensors=make_tensors(seed=i))
        (folders[name] / "LICENSE").write_text(f"MIT License\n{name}")
    bank = jc.hub.load_many(list(folders.values()), names=list(folders))
    metadata, text = read_card(jc.hub.export(bank, [0, 3, 6], folders, tmp_path / "one"))
    assert metadata["base_model"] == ["owner/a", "owner/b"]
    assert metadata["tags"] == ["jchain", "merge"]
    assert metadata["license"] == "mit"
    assert "`b` ([owner/b](https://huggingface.co/owner/b))" in text
    assert (tmp_path / "one" / "LICENSE").read_text().endswith("a")
    assert (tmp_path / "one" / "LICENSE_b").read_text().endswith("b")
    (folders["b"] / "README.md").write_text("---\nlicense: other\nlicense_name: own\n---\n")
    metadata, text = read_card(jc.hub.export(bank, [0, 3, 6], folders, tmp_path / "two"))
    assert "license" not in metadata
    assert "Licenses: `a`: mit; `b`: other, own." in text
    # Only the models that the chain uses count.
    metadata, text = read_card(jc.hub.export(bank, [4, 2, 6], folders, tmp_path / "three"))
    assert metadata["base_model"] == ["owner/b"]
    assert (metadata["license"], metadata["license_name"]) == ("other", "own")


def test_scores_and_facts_are_tables(tmp_path):
    folder = write(tmp_path / "m")
    out = jc.hub.export(
        jc.hub.load(folder),
        [0, 2],
        folder,
        tmp_path / "out",
        facts={"a|b": "c\nd"},
        scores={"this chain": {"loss": 1.5, "tokens": 8}, "original": {"loss": 1.25, "more": "x"}},
    )
    text = read_card(out)[1]
    assert "|  | loss | tokens | more |\n| --- | --- | --- | --- |\n" in text
    assert "| this chain | 1.5000 | 8 |  |\n| original | 1.2500 |  | x |\n" in text
    assert "| a\\|b | c d |" in text


@pytest.mark.parametrize(
    ("options", "file", "classes"),
    [
        (None, "tokenizer.json", ["AutoModelForCausalLM", "AutoTokenizer"]),
        (None, "LICENSE", ["AutoModelForCausalLM"]),
        (
            VIT | {"id2label": {"0": "a", "1": "b"}},
            "preprocessor_config.json",
            ["AutoModelForImageClassification", "AutoImageProcessor"],
        ),
    ],
)
def test_the_card_says_how_to_load_the_folder(tmp_path, options, file, classes):
    folder = write(tmp_path / "m")
    bank = None
    if options is not None:
        write_config(folder, options)
        bank = jc.hub.random_bank(jax.random.key(0), folder)
    (folder / file).write_text("{}")
    bank = bank or jc.hub.load(folder)
    out = jc.hub.export(bank, bank.parents[0], folder, tmp_path / "out")
    text = read_card(out)[1]
    assert f"from transformers import {', '.join(classes)}\n" in text
    assert all(f'{name}.from_pretrained("out")' in text for name in classes)


def test_models_without_a_folder_are_named(tmp_path):
    folders = [write(tmp_path / f"m{i}", tensors=make_tensors(seed=i)) for i in range(2)]
    many = jc.hub.load_many(folders)
    with pytest.raises(
        ValueError, match="expected a folder, or the folder of each model by name, got"
    ):
        inspect.unwrap(jc.hub.export)(many, [0, 2, 5], folders, tmp_path / "other")
    with pytest.raises(
        ValueError, match="expected the folder of each model by name, m0, m1, got none of m1"
    ):
        jc.hub.export(many, [0, 2, 5], folders[0], tmp_path / "other")
