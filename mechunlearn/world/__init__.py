"""The shipped fact world: facts, corpus, tokenizer, trainer, gates."""
