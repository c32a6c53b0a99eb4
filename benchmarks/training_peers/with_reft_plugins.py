"""LoReFT and LoRA by `reft.train`."""

from __future__ import annotations

import json
import sys

from clock import Clock, rows_of
from transformers import AutoTokenizer

import reft_plugins as reft
from reft_plugins.training import trainer as training


def main(job: dict) -> None:
    tokenizer = AutoTokenizer.from_pretrained(job["base"])
    rows = rows_of(job["data"])
    count = sum(
        len(tokenizer(row["prompt"]).input_ids)
        + len(tokenizer(row["completion"], add_special_tokens=False).input_ids)
        + 1
        for row in rows
    )
    clock = Clock(job["warm_up"], count / len(rows) * job["batch_size"])
    plain = training.AdapterTrainer.__init__

    def with_clock(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        self.add_callback(clock)

    training.AdapterTrainer.__init__ = with_clock
    settings = {"method": job["method"], "rank": job["rank"], "learning_rate": 1e-3}
    if job["method"] == "loreft":
        settings["positions"] = f"f{job['prefix']}+l{job['suffix']};cap=half"
    reft.train(
        job["base"],
        data=job["data"],
        epochs=1,
        batch_size=job["batch_size"],
        log_every=10_000,
        progress=False,
        **settings,
    )
    clock.report()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
