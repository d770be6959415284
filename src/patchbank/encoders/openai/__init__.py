"""OpenAI's four CLIP models."""
