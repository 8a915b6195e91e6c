"""The pool: what a user opens, registers models in, matches and stores through; and the engine behind it."""
