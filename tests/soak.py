"""A random life of an engine: adapters come, change, go and are broken while requests run, and every answer is held
against the reference."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

from reference_answers import TOLERANCE, Reference
from strong_programs import Strong

from reft_plugins.adapter import Adapter
from reft_plugins.manifest import MANIFEST_FILE, TENSORS_FILE
from reft_plugins.program import WeightDelta

ATTENTION, DOWN = ("q_proj", "k_proj", "v_proj", "o_proj"), "down_proj"
POSITIONS = ("f2+l2", "all", "prompt", "generated", "l1", "f1", "f3+l3;cap=half", "f1+l2;trim=1", "[0,5,-1,-30]", "l7")


@dataclass(slots=True)
class Sent:
    """A request in flight; without `valid` its adapter is broken, if `overwritten` its files have other content now."""

    prompt: list[int]
    adapter: Adapter | None
    folder: Path | None
    valid: bool = True
    overwritten: bool = False


class Soak:
    """Does random things to an engine.

    A request whose adapter's files are overwritten before a worker read them may fail; `counts["lost"]` says how many.

    Args:
        runtime: of vLLM; folder: for adapters; seed: of everything that happens.
    """

    def __init__(self, runtime: Any, reference: Reference, base: Path, folder: Path, seed: int) -> None:
        self.engine, self.reference, self.base, self.folder = runtime.llm.llm_engine, reference, base, folder
        self.seed, self.random = seed, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.served: dict[str, Adapter] = {}
        self.folders: dict[str, Path] = {}
        self.flying: dict[str, Sent] = {}
        self.wrong: list[str] = []
        self.story: list[str] = []
        self.stems = [[1, *(self.random.randrange(5, 500) for _ in range(160))] for _ in range(3)]

    def live(self, requests: int) -> None:
        """Go on until so many requests were sent and answered.

        Raises:
            AssertionError: naming the seed and every wrong answer.
        """
        actions: list[tuple[int, Callable[[], None]]] = [
            (50, self.send),
            (30, self.step),
            (6, self.add),
            (4, self.upgrade),
            (3, self.remove),
            (4, self.abort),
            (3, self.break_one),
        ]
        weights, functions = zip(*actions, strict=True)
        try:
            while self.counts["send"] < requests:
                act = self.random.choices(functions, weights)[0]
                self.counts[act.__name__] += 1
                act()
                while len(self.flying) > 40:
                    self.step()
            while self.flying:
                self.step()
        except Exception:
            print(f"seed {self.seed}, the last of {len(self.story)} events:", *self.story[-60:], sep="\n")
            raise
        assert not self.wrong, f"seed {self.seed}: {len(self.wrong)} of {requests} are wrong: {self.wrong[:8]}"

    def clear(self) -> None:
        """Remove every adapter."""
        self.served.clear()
        for number in self.engine.list_loras():
            assert self.engine.remove_lora(number), f"seed {self.seed}: {number} stays"
        assert not self.engine.list_loras()

    def send(self) -> None:
        """A request for the base or any adapter; most prompts begin alike."""
        length = self.random.choice([32, 64, 96, 128]) if self.random.random() < 0.3 else self.random.randrange(4, 160)
        prompt = self.random.choice(self.stems)[:length]
        if self.random.random() < 0.2:
            prompt = [*prompt[:-1], self.random.randrange(5, 500)]
        name = self.random.choice([None, *self.served])
        self._request(prompt, name, self.served[name] if name else None)

    def step(self) -> None:
        """Some steps of the engine, and a look at what they finished."""
        for _ in range(self.random.randrange(1, 6)):
            for output in self.engine.step() if self.engine.has_unfinished_requests() else ():
                if output.finished:
                    self._check(output)

    def add(self) -> None:
        """A new name, known to the engine at once or when it is asked for."""
        name = f"adapter-{self.counts['add']}"
        self._save(name, self.folder / name)
        if self.random.random() < 0.5:
            self.story.append(f"register {name}")
            self.engine.add_lora(self._lora(name))

    def upgrade(self) -> None:
        """Other content under the name of an adapter that may be in use, in a folder of its own or in the old one."""
        if not self.served:
            return
        name = self.random.choice(list(self.served))
        self.engine.list_loras()  # answered after the requests sent before it, which are bound to the old content then
        overwrite = self.random.random() < 0.5
        self._save(name, self.folders[name] if overwrite else self.folder / f"{name}.{self.counts['upgrade']}")
        for sent in self.flying.values():
            sent.overwritten |= sent.folder == self.folders[name] and overwrite
        self.engine.add_lora(self._lora(name, load_inplace=True))

    def remove(self) -> None:
        """A name is no longer served; requests that run under it end as they began."""
        if len(self.served) < 4:
            return
        from reft_vllm.versions import natural_number

        name = self.random.choice(list(self.served))
        self.story.append(f"remove {name}")
        self.engine.remove_lora(natural_number(self.served.pop(name).digest))

    def abort(self) -> None:
        """Some requests in flight are given up."""
        lost = [name for name in self.flying if self.random.random() < 0.15]
        self.story.append(f"abort {lost}")
        self.engine.abort_request(lost)
        for name in lost:
            del self.flying[name]

    def break_one(self) -> None:
        """An adapter that cannot run, registered or asked for; it is refused, and nothing else happens."""
        broken = f"broken-{self.counts['break_one']}"
        kind = self.random.choice(list(BREAKS))
        self.folders[broken] = self._fresh().save(self.folder / broken)
        BREAKS[kind](self.folders[broken], self)
        self.counts[f"broken: {kind}"] += 1
        self.story.append(f"{broken}: {kind}")
        if self.random.random() < 0.5:
            try:
                self.engine.add_lora(self._lora(broken))
            except Exception:
                return
            self.wrong.append(f"registered although {kind}")
            return
        try:
            self._request(self.stems[0][:50], broken, None, valid=False)
        except Exception:
            self.flying.pop(f"request-{self.counts['requests']}", None)

    def _request(self, prompt: list[int], name: str | None, adapter: Adapter | None, valid: bool = True) -> None:
        from vllm import SamplingParams, TokensPrompt

        tokens = self.random.choice([1, 4, 12, 30])
        params = SamplingParams(max_tokens=tokens, temperature=0.0, logprobs=2, ignore_eos=True)
        self.counts["requests"] += 1
        key = f"request-{self.counts['requests']}"
        self.flying[key] = Sent(prompt, adapter, self.folders[name] if name else None, valid)
        self.story.append(f"{key} of {name} with {adapter.digest[7:13] if adapter else adapter}")
        lora = self._lora(name) if name else None
        self.engine.add_request(key, TokensPrompt(prompt_token_ids=prompt), params, lora_request=lora)

    def _check(self, output: Any) -> None:
        sent = self.flying.pop(output.request_id, None)
        if sent is None:
            return
        (completion,) = output.outputs
        self.story.append(f"{output.request_id} ended: {completion.finish_reason}")
        self.counts[f"finished: {completion.finish_reason}"] += 1
        if sent.overwritten and completion.finish_reason == "error":
            self.counts["lost"] += 1
        elif (completion.finish_reason == "error") == sent.valid:
            self.wrong.append(f"{output.request_id}: {completion.finish_reason}, its adapter being valid: {sent.valid}")
        if not sent.valid or completion.finish_reason == "error":
            return
        error = self.reference.error(sent.prompt, sent.adapter, completion)
        if not error <= TOLERANCE:
            method = sent.adapter.manifest.method if sent.adapter else "base"
            self.wrong.append(f"{output.request_id} ({method}, prompt of {len(sent.prompt)}): off by {error:.3g}")
        if sent.adapter is not None:
            self.counts["changed"] += self.reference.effect(sent.prompt, sent.adapter, completion) > 10 * TOLERANCE
            self.counts["adapted"] += 1

    def _save(self, name: str, folder: Path) -> None:
        self.served[name] = self._fresh()
        self.folders[name] = self.served[name].save(folder)
        self.story.append(f"{name} becomes {self.served[name].digest[7:13]} in {folder.name}")

    def _lora(self, name: str, load_inplace: bool = False) -> Any:
        from vllm.lora.request import LoRARequest

        number = 1 + crc32(name.encode()) % 1_000_000
        return LoRARequest(name, number, str(self.folders[name]), load_inplace=load_inplace)

    def _fresh(self) -> Adapter:
        strong = Strong(self.base, self.random.randrange(1 << 30))
        where = self.random.choice(POSITIONS)
        every = strong.modules(*ATTENTION, DOWN)
        kinds: list[Callable[[], Adapter]] = [
            lambda: strong.of_method(self.random.choice(["loreft", "direft", "noreft", "consreft"]), where, (0, 2, 3)),
            lambda: strong.of_method("red", where, (1, 3), self.random.choice(["mlp_output", "block_output"])),
            lambda: strong.bottleneck((0, 3), {"mlp_output": "mlp_residual"}, where, "relu"),
            lambda: strong.weights("lora", every, use_dora=self.random.random() < 0.4),
            lambda: strong.adapter([strong.lora(module, positions=where) for module in every]),
            lambda: strong.weights(
                "ia3",
                strong.modules("k_proj", "v_proj", DOWN),
                target_modules=("k_proj", "v_proj", DOWN),
                feedforward_modules=(DOWN,),
            ),
            lambda: strong.adapter(strong.virtual_tokens(self.random.randrange(1, 9))),
            lambda: strong.adapter(strong.prefixes(3, gated=self.random.random() < 0.5)),
            lambda: strong.adapter(
                strong.low_rank(0, where),
                strong.low_rank(3, "l2", "attention_output"),
                [strong.lora(module) for module in strong.modules("o_proj")],
            ),
        ]
        return self.random.choice(kinds)()


def _truncate(folder: Path, soak: Soak) -> None:
    file = folder / TENSORS_FILE
    blob = file.read_bytes()
    file.write_bytes(blob[: soak.random.randrange(len(blob))])


def _flip(folder: Path, soak: Soak) -> None:
    file = folder / TENSORS_FILE
    blob = bytearray(file.read_bytes())
    blob[soak.random.randrange(len(blob))] ^= 1 << soak.random.randrange(8)
    file.write_bytes(blob)


def _scribble(folder: Path, soak: Soak) -> None:
    (folder / MANIFEST_FILE).write_bytes(soak.random.randbytes(200))


def _other_base(folder: Path, soak: Soak) -> None:
    adapter = Adapter.load(folder)
    assert adapter.manifest.base is not None
    adapter.with_base(adapter.manifest.base.model_copy(update={"fingerprint": "sha256:" + "0" * 64})).save(folder)


def _huge_rank(folder: Path, soak: Soak) -> None:
    strong = Strong(soak.base, 1)
    strong.adapter([strong.lora(module, rank=64) for module in strong.modules(*ATTENTION)]).save(folder)


def _not_a_number(folder: Path, soak: Soak) -> None:
    strong = Strong(soak.base, soak.random.randrange(1 << 30))
    edit = strong.low_rank(1, "f1+l1")
    assert edit.up is not None
    edit.up[1, 3] = soak.random.choice([float("nan"), float("inf")])
    strong.adapter(edit).save(folder)


def _missing_module(folder: Path, soak: Soak) -> None:
    strong = Strong(soak.base, 1)
    delta = strong.lora("model.layers.0.self_attn.q_proj")
    strong.adapter(WeightDelta("model.layers.0.self_attn.no_proj", a=delta.a, b=delta.b)).save(folder)


BREAKS: dict[str, Callable[[Path, Soak], None]] = {
    "truncated": _truncate,
    "a bit is flipped": _flip,
    "the manifest is noise": _scribble,
    "it belongs to another base": _other_base,
    "its rank is too large": _huge_rank,
    "it is not a number": _not_a_number,
    "a module is missing": _missing_module,
}
