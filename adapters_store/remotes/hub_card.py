"""The model card of a repository on the Hub, written once."""

from __future__ import annotations

from reft_plugins.manifest import Manifest


def model_card(repository: str, manifest: Manifest) -> str:
    """The text of `README.md`: metadata by which the Hub lists the adapter, and how to get and run it.

    `base_model` is only stated where the base's name can be one of the Hub, which refuses others.
    """
    from huggingface_hub import ModelCardData

    base = manifest.base.name if manifest.base is not None else None
    data = ModelCardData(
        library_name="reft-plugins",
        base_model=base if base is not None and _on_the_hub(base) else None,
        tags=["reft-plugins", "adapter", _plain(manifest.method)],
    )
    lines = [
        "---",
        data.to_yaml(),
        "---",
        f"# {repository.partition('/')[2]}",
        "",
        f"An adapter for {'the base model `' + _plain(base) + '`' if base is not None else 'an unknown base model'}, "
        f"of method `{_plain(manifest.method)}`, in the format of reft-plugins: `adapter.json` says what it is, "
        "`adapter.safetensors` has its parameters. Version N is the git tag `vN`; `main` is the newest.",
        "",
        "```bash",
        f"reft store pull hf://{repository}@v1",
        "```",
        "",
    ]
    return "\n".join(lines)


def _on_the_hub(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def _plain(text: str) -> str:
    """Without anything that ends a line or a quotation."""
    return "".join(character if character.isprintable() and character != "`" else "?" for character in text)
