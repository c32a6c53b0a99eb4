"""The whole product in one run: train, store, serve four tasks in one vLLM batch, export. `python -m examples.demo`."""
