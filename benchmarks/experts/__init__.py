"""What more and more experts cost: pass 1 and the few-shot search over up to 64 of them."""
