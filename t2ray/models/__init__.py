"""A model as Hugging Face stores it: its files, its tokenizer, its matrices, and the loaded module."""
