"""A server with Ollama's interface that runs models in llama.cpp, as Ollama does."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from recording_server import Recorded, recording

from reft_ollama.llama_cpp import LlamaCppModel
from reft_ollama.templates import go_template


class _Runner:
    """Models by name, loaded from the blobs they were made of."""

    def __init__(self, recorded: Recorded, folder: Path) -> None:
        self._recorded, self._folder, self._loaded = recorded, folder, dict[str, LlamaCppModel]()

    def generate(self, request: dict[str, Any]) -> dict[str, Any]:
        prompt = request["prompt"]
        if not request.get("raw"):
            prompt = go_template.render(self._model(request)["template"], {"Prompt": prompt})
        return {"model": request["model"], "response": self._answer(request, prompt), "done": True}

    def chat(self, request: dict[str, Any]) -> dict[str, Any]:
        model, messages = self._model(request), request["messages"]
        if "system" in model and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": model["system"]}, *messages]
        prompt = go_template.chat(model["template"], messages)
        message = {"role": "assistant", "content": self._answer(request, prompt)}
        return {"model": request["model"], "message": message, "done": True}

    def delete(self, request: dict[str, Any]) -> dict[str, Any]:
        del self._recorded.models[request["model"]]
        return {}

    def close(self) -> None:
        for model in self._loaded.values():
            model.close()

    def _model(self, request: dict[str, Any]) -> dict[str, Any]:
        return self._recorded.models[request["model"]]

    def _answer(self, request: dict[str, Any], prompt: str) -> str:
        model = self._model(request)
        (digest,) = model["files"].values()
        if digest not in self._loaded:
            path = self._folder / f"{digest[7:]}.gguf"
            path.write_bytes(self._recorded.blobs[digest])
            self._loaded[digest] = LlamaCppModel(path, exact_cache=False)
        options = {**model["parameters"], **request["options"]}
        assert options["temperature"] == 0, "this server only knows the most likely token"
        _, text = self._loaded[digest].generate(prompt, options["num_predict"])
        for stop in options.get("stop", []):
            text = text.partition(stop)[0]
        return text


@contextmanager
def standing_in() -> Iterator[Recorded]:
    """A running server."""
    with ExitStack() as stack:
        recorded = stack.enter_context(recording())
        runner = _Runner(recorded, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        stack.callback(runner.close)
        recorded.further = {
            "POST /api/generate": runner.generate,
            "POST /api/chat": runner.chat,
            "DELETE /api/delete": runner.delete,
        }
        yield recorded
