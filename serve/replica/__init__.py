"""The replica tier: one whole copy of a model, its admission, its shards' life and death."""
