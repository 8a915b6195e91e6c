"""The prefix index: which token prefixes this process holds, where, and who is reading them."""
