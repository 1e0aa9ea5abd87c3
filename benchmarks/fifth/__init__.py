"""A fifth domain after four: what the four keep, what pass 1 and the few-shot search gain."""
