"""Archetypes, system prompts and questions."""
