"""From what a client calls structured output to a compiled grammar over the model's vocabulary.

    StructuredOutput ─▶ definition (checked) ─▶ llguidance ─▶ Compiled ─▶ a matcher for each sequence

The frontend has each grammar compiled once in a process of its own (`check.py`), which may be killed; what passed is
compiled again in a thread of the engine (`library.py`), whose matchers the decoding reads.
"""
