"""The command line: the same nouns, one clear line and exit code 2 for a mistake."""
