"""LoReFT by pyreft's own trainer and data module, in pyreft's environment."""

from __future__ import annotations

import json
import sys
import tempfile

import pyreft
import torch
from clock import Clock, rows_of
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainingArguments


def main(job: dict) -> None:
    model = AutoModelForCausalLM.from_pretrained(job["base"], torch_dtype=torch.float32)
    if torch.cuda.is_available():
        model.to("cuda")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=f"{job['base']}/tokenizer.json",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=512,
    )
    rows = rows_of(job["data"])
    layers = range(model.config.num_hidden_layers)
    config = pyreft.ReftConfig(
        representations=[
            {
                "layer": layer,
                "component": "block_output",
                "low_rank_dimension": job["rank"],
                "intervention": pyreft.LoreftIntervention(
                    embed_dim=model.config.hidden_size, low_rank_dimension=job["rank"], dtype=torch.float32
                ),
            }
            for layer in layers
        ]
    )
    reft_model = pyreft.get_reft_model(model, config)
    module = pyreft.make_multiple_position_supervised_data_module(
        tokenizer,
        model,
        [row["prompt"] for row in rows],
        [row["completion"] for row in rows],
        positions=f"f{job['prefix']}+l{job['suffix']}",
        num_interventions=len(layers),
        share_weights=True,
        nonstop=False,
    )
    clock = Clock(job["warm_up"])
    module["data_collator"] = clock.counting(module["data_collator"])
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=job["batch_size"],
            learning_rate=1e-3,
            report_to="none",
            save_strategy="no",
            logging_steps=10_000,
            disable_tqdm=True,
        )
        trainer = pyreft.ReftTrainerForCausalLM(
            model=reft_model, tokenizer=tokenizer, args=arguments, callbacks=[clock], **module
        )
        trainer.train()
    clock.report()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
