"""LoRA by plain PEFT and the Trainer of transformers, as PEFT's documentation does it."""

from __future__ import annotations

import json
import sys
import tempfile

import torch
from clock import Clock, rows_of
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)


def main(job: dict) -> None:
    tokenizer = AutoTokenizer.from_pretrained(job["base"])
    model = AutoModelForCausalLM.from_pretrained(job["base"], dtype=torch.float32)
    model = get_peft_model(
        model, LoraConfig(r=job["rank"], lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    examples = []
    for row in rows_of(job["data"]):
        prompt = tokenizer(row["prompt"]).input_ids
        completion = [*tokenizer(row["completion"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        ids = prompt + completion
        examples.append(
            {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(prompt) + completion}
        )
    clock = Clock(job["warm_up"])
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=job["batch_size"],
            learning_rate=3e-4,
            report_to="none",
            save_strategy="no",
            logging_steps=10_000,
            disable_tqdm=True,
        )
        Trainer(
            model=model,
            args=arguments,
            train_dataset=examples,
            data_collator=clock.counting(DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)),
            callbacks=[clock],
        ).train()
    clock.report()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
