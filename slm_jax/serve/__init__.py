"""A server of runs: requests written together in one compiled loop, the OpenAI form of completions, and a page."""
