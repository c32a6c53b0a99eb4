"""LoReFT and LoRA by `reft.train`."""

from __future__ import annotations

import json
import sys

from clock import Clock

import reft_plugins as reft
from reft_plugins.training import trainer as training


def main(job: dict) -> None:
    clock = Clock(job["warm_up"])
    plain = training.AdapterTrainer.__init__

    def with_clock(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        self.data_collator = clock.counting(self.data_collator)
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
        group_by_length=job["group_by_length"],
        log_every=10_000,
        progress=False,
        **settings,
    )
    clock.report()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
