"""The stages of the demo, in order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import reft_plugins as reft
from examples.demo import adapters, base, corpus, tables
from examples.demo.compare import accuracy, agreement
from examples.demo.environment import Workspace
from examples.demo.facts import HELD_OUT, TASKS, countries, split
from examples.demo.ollama import export
from examples.demo.questions import NEW_TOKENS, Question, Scores, ask, change, questions, score
from examples.demo.report import Report, by_task

NEAR_CHANCE, GOOD = 0.35, 0.9
CONTEXT = 256

SMALL = 512
"""Models up to this hidden size want the learning rates of a small model."""

OTHER_BASE = "only asked of the demo's own base model"


class Demo:
    """One run; every stage leaves here what later ones need."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace, self.report = workspace, Report()
        self.base = workspace.base
        self.skipped = None if workspace.own else OTHER_BASE
        self.reference: Any = None
        self.recipes: tuple[adapters.Recipe, ...] = ()
        self.data: dict[str, Path] = {}
        self.asked: list[Question] = []
        self.answers: list[reft.Generation] = []
        self.scores: list[Scores] = []

    def run(self) -> None:
        """All stages.

        Raises:
            ReftError: a stage cannot do its work.
        """
        torch.set_num_threads(min(2, torch.get_num_threads()))
        transformers.utils.logging.disable_progress_bar()
        self.make_base()
        self.train_and_publish()
        self.ask_transformers()
        self.ask_vllm()
        self.export()

    def make_base(self) -> None:
        """Train the base model, unless it is there, and load it into the reference runtime."""
        own = (
            f"A small Llama learns to read: the facts on {len(countries())} countries in many words, and questions "
            'such as "in: France out:". With a cue in front these have one answer; without, any of six.'
        )
        other = f"MODEL names it: {self.base}. Nothing is trained here, and accuracy is shown but not judged."
        with self.report.stage("Base model", own if self.workspace.own else other):
            recipe, folder = base.Recipe(), Path(self.base)
            if self.workspace.own and base.is_made(folder, recipe):
                self.report.say(f"{folder} is there from an earlier run.")
            elif self.workspace.own:
                self._train_base(folder, recipe)
            self.reference = reft.runtime("transformers", self.base, dtype="float32")
            known = self.reference.identity
            self.recipes = adapters.recipes(known.num_hidden_layers)
            millions = self.reference.model.num_parameters() / 1e6
            sizes = f"{known.num_hidden_layers} layers of {known.hidden_size}, {millions:.1f} million parameters"
            self.report.say(f"{self.base}: {known.architecture}, {sizes}")

    def train_and_publish(self) -> None:
        """Train one adapter per task, unless it is there, and put all into the store."""
        why = (
            f"Four tasks, one question: each adapter sees {len(countries()) - HELD_OUT} countries with the answers of "
            f"its task and learns which task is meant. The base stays as it is; {HELD_OUT} countries are kept for the "
            "test."
        )
        folder, made = self.workspace.folder, []
        with self.report.stage("Four adapters", why):
            for recipe in self.recipes:
                self.report.say(f"{recipe.task}: {recipe.title}")
                self.data[recipe.task] = adapters.write_data(folder / "data", recipe.task)
                small = self.reference.identity.hidden_size <= SMALL
                path, new = adapters.train(recipe, self.base, self.data[recipe.task], folder / "adapters", small)
                made.append((recipe, path))
                if not new:
                    self.report.say(f"{path} is there from an earlier run.")
            tables.show_training(self.report, made)
        why = "From here on adapters go by reference, name:tag; the store checks every byte it hands out."
        with self.report.stage("Store", why):
            records = adapters.publish(self.workspace.store, made)
            self.report.say(f"REFT_STORE={self.workspace.store} reft store ls")
            tables.show_records(self.report, records)

    def ask_transformers(self) -> None:
        """The reference: answers of the transformers runtime."""
        self.asked = questions(split()[1], {recipe.task: recipe.reference for recipe in self.recipes})
        why = (
            f"The reference answers all {len(self.asked)} questions in one batch, each row under its own adapter or "
            "under none. What the base says alone shows what the adapters add."
        )
        with self.report.stage("transformers", why):
            self.answers = ask(self.reference, self.asked)
            self.scores.append(score(self.asked, self.answers))
            tables.show_answers(self.report, self.asked, self.answers)
            alone = by_task(self.scores[0].base)
            if self.workspace.own:
                self.report.say(f"The base knows the facts; told the task in words, it says {self._cued_accuracy()}.")
                alone += f" (chance {corpus.chance():.2f})"
            near = max(self.scores[0].base.values()) <= NEAR_CHANCE
            self.report.check(f"base alone at most {NEAR_CHANCE}", near, alone, self.skipped)
            self._check_accuracy("transformers", self.scores[0])
            changed = change(self.asked, self.answers)
            self.report.check("adapters change most answers", min(changed.values()) > 0.5, by_task(changed))

    def ask_vllm(self) -> None:
        """The same batch, from vLLM."""
        why = (
            "One compiled engine, every adapter by its store reference, the same batch at once. Its tokens must be the "
            "reference's. Most of the time goes into starting vLLM, more so the first time, when it compiles."
        )
        with self.report.stage("vLLM", why):
            context = self.reference.model.config.get_text_config().max_position_embeddings
            settings = {"max_loras": len(self.recipes), "max_lora_rank": 8, "max_model_len": min(CONTEXT, context)}
            with self.report.console.status("starting vLLM"):
                runtime: Any = reft.runtime("vllm", self.base, dtype="float32", use_tqdm_on_load=False, **settings)
            try:
                answers = ask(runtime, self.asked)
                together = runtime.statistics()["most_adapters"]
            finally:
                runtime.close()
            self.scores.append(score(self.asked, answers))
            tables.show_accuracy(self.report, self.recipes, *self.scores)
            equal = agreement([a.token_ids for a in self.answers], [a.token_ids for a in answers], self._logits)
            tokens = f"{equal.equal} of {equal.tokens} equal, {equal.ties} float ties, {len(equal.different)} different"
            steps = f"up to {together} of {len(self.recipes)} adapters in one engine step"
            self.report.say(f"{len(self.asked)} prompts in one batch, {steps}; tokens: {tokens}")
            for row in equal.different[:3]:
                self.report.say(f"{self.asked[row]}: {self.answers[row].text!r}, from vLLM {answers[row].text!r}")
            self._check_accuracy("vLLM", self.scores[1])
            self.report.check("vLLM's tokens equal transformers'", equal.holds, tokens)
            self.report.check("adapters share a step", together == len(self.recipes), steps)

    def export(self) -> None:
        """Two adapters as Ollama models, answered by llama.cpp."""
        why = (
            "Ollama runs whole models, so the adapter goes into the weights of a GGUF file: LoRA exactly, LoReFT at "
            "all positions nearly so, which is measured. llama.cpp, the engine inside Ollama, answers from these files."
        )
        with self.report.stage("Ollama export", why):
            for recipe in self.recipes:
                if recipe.exported_as is None:
                    continue
                try:
                    self._export(recipe, recipe.exported_as if self.workspace.own else "f16")
                except reft.ReftError as error:
                    self.report.check(f"export of {recipe.task} on target", False, str(error))

    def _export(self, recipe: adapters.Recipe, dtype: str) -> None:
        asked = [question for question in self.asked if question.task == recipe.task]
        out, data = self.workspace.folder / "ollama" / recipe.task, self.data[recipe.task]
        with self.report.console.status(f"exporting {recipe.reference}"):
            done = export(recipe.reference, self.base, out, dtype, data, asked, self.reference)
        tables.show_export(self.report, recipe, done)
        fidelity = done.result.fidelity
        figures = f"{done.result.kind}: top-1 {fidelity.top1_agreement:.4f}, mean KL {fidelity.mean_kl:.1e}, "
        figures += f"largest logit difference {fidelity.max_logit_difference:.1e}"
        self.report.check(f"export of {recipe.task} on target", done.on_target, figures)
        right, said = done.accuracy >= GOOD, f"accuracy {done.accuracy:.2f}, same answers {done.same:.2f}"
        self.report.check(f"{recipe.task} in llama.cpp at least {GOOD}", right, said, self.skipped)

    def _train_base(self, folder: Path, recipe: base.Recipe) -> None:
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}"), console=self.report.console) as bar:
            task = bar.add_task("train", total=recipe.steps, loss=float("nan"))
            base.make(folder, recipe, lambda done, _, loss: bar.update(task, completed=done, loss=loss))

    def _cued_accuracy(self) -> str:
        rows, found = split()[1], {}
        for task in TASKS:
            prompts = [corpus.cued_prompt(country, task) for country in rows]
            answers = self.reference.generate(prompts, max_new_tokens=NEW_TOKENS)
            found[task] = accuracy([answer.text for answer in answers], [country.answer(task) for country in rows])
        return by_task(found)

    def _logits(self, row: int, step: int) -> Any:
        """Next-token logits of the reference after `step` tokens of its answer to a question."""
        question, answer = self.asked[row], self.answers[row]
        prompt = self.reference.tokenizer(question.prompt).input_ids
        tokens = [*prompt, *answer.token_ids[:step]]
        return self.reference.logits(tokens, question.reference, prompt_length=len(prompt))[-1]

    def _check_accuracy(self, runtime: str, scores: Scores) -> None:
        good = min(scores.adapter.values()) >= GOOD
        self.report.check(f"adapters in {runtime} at least {GOOD}", good, by_task(scores.adapter), self.skipped)
