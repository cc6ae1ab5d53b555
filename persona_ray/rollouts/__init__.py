"""Conversations: which rows are wanted, how they become token ids, which tokens are the answer."""
