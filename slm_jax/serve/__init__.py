"""HTTP server for trained runs: continuous batching, OpenAI's completions API, and a web page."""
