"""The HTTP tier: OpenAI's API in text on one side, token streams of replicas on the other."""
