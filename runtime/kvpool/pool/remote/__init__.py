"""The tiers that are shared with other processes, as the engine uses them: asked by key, waited for when asked."""
