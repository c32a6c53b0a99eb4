"""The demo's own base model and its adapters: what is kept between runs, and when it is made again."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from tiny_models import make_tiny_llama

import reft_plugins as reft
from examples.demo import adapters, base

TINY = base.Recipe(
    vocabulary=700, hidden_size=32, layers=1, heads=1, key_value_heads=1, steps=40, batch_size=32, learning_rate=1e-2
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "base"
    losses = []
    base.make(folder, TINY, lambda done, total, loss: losses.append(loss))
    return folder, losses


def test_model_is_trained_and_loads(made) -> None:
    folder, losses = made
    assert len(losses) == TINY.steps
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    runtime = reft.runtime("transformers", folder)
    assert runtime.identity.num_hidden_layers == TINY.layers
    tokens = runtime.tokenizer("in: France out:").input_ids
    assert runtime.tokenizer.decode(tokens) == f"{base.BOS}in: France out:"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_model_is_kept_until_its_recipe_changes(made) -> None:
    folder, _ = made
    assert base.is_made(folder, TINY)
    assert not base.is_made(folder, replace(TINY, learning_rate=1e-3))
    assert not base.is_made(folder.parent / "elsewhere", TINY)


def test_every_field_of_the_recipe_is_in_its_key() -> None:
    keys = {TINY.key()}
    for field in fields(base.Recipe):
        keys.add(replace(TINY, **{field.name: getattr(TINY, field.name) + 1}).key())
    assert len(keys) == len(fields(base.Recipe)) + 1


def test_a_failed_training_leaves_the_old_model(made, tmp_path) -> None:
    folder, _ = made

    def fail(done: int, total: int, loss: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        base.make(folder, replace(TINY, seed=1), fail)
    assert base.is_made(folder, TINY)


def test_recipes_fit_any_depth() -> None:
    for layers in (1, 2, 4, 32):
        for recipe in adapters.recipes(layers):
            assert all(0 <= layer < layers for layer in recipe.settings.get("layers", []))
    made_by = {(recipe.method, recipe.settings.get("positions")) for recipe in adapters.recipes(4)}
    assert {("loreft", "f2+l2"), ("loreft", "all"), ("lora", None)} < made_by


def test_adapters_are_kept_and_published(tiny_llama, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(adapters, "SMALL_MODEL", {"epochs": 1, "batch_size": 50})
    recipe = adapters.recipes(4)[1]
    data = adapters.write_data(tmp_path, recipe.task)
    first, new = adapters.train(recipe, tiny_llama, data, tmp_path / "adapters", small=True)
    assert new
    assert adapters.train(recipe, tiny_llama, data, tmp_path / "adapters", small=True) == (first, False)
    records = adapters.publish(tmp_path / "store", [(recipe, first), (recipe, first)])
    assert [(record.reference, record.tags) for record in records] == [("currency@v1", ("latest",))]
    (first / "adapter.safetensors").write_bytes(b"damaged")
    assert adapters.train(recipe, tiny_llama, data, tmp_path / "adapters", small=True) == (first, True)


def test_adapters_of_another_base_are_made_again(tiny_llama, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(adapters, "SMALL_MODEL", {"epochs": 1, "batch_size": 50})
    other = make_tiny_llama(tmp_path / "other", steps=0, seed=5)
    recipe = adapters.recipes(4)[3]
    data = adapters.write_data(tmp_path, recipe.task)
    first, _ = adapters.train(recipe, tiny_llama, data, tmp_path / "adapters", small=True)
    assert adapters.train(recipe, other, data, tmp_path / "adapters", small=True) == (first, True)
    assert reft.load(first, base=other).manifest.training.examples == 100
