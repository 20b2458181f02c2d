"""Conversations: messages, the chat template that turns them into token ids, and programs that use both."""
