"""Adapters: what they target, how they train, and the files of `peft`."""
