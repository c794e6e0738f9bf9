"""Many prompts, every one made exactly once: `python -m distriray.jobs.generate prompts.jsonl --out DIR`."""
