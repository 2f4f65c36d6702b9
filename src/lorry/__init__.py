"""Lorry carries many LoRAs on one 4-bit base model."""

__version__ = "0.1.0"
