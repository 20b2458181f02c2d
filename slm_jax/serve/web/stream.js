// Server-sent events of the API.

/** Yield the events of a streamed response as they arrive. Throws an Error with the server's message. */
export async function* streamEvents(path, body, key, signal) {
  const headers = { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const response = await fetch(path, { method: "POST", headers, body: JSON.stringify({ ...body, stream: true }), signal });
  if (!response.ok) {
    const content = await response.json().catch(() => ({}));
    throw new Error(content.error?.message ?? `the server responded with status ${response.status}`);
  }
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    buffer += value;
    const events = buffer.split("\n\n");
    buffer = events.pop(); // an incomplete event
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const content = JSON.parse(data);
      if (content.error) throw new Error(content.error.message);
      yield content;
    }
  }
}

export const randomSeed = () => Math.floor(Math.random() * 2 ** 32);

/** The surprisal of a token as the strength of its color: none for a certain one, full for a probability of 1/1000 or less. */
export const surprise = (logprob) => `${Math.min(100, Math.max(0, (-logprob / 6.9) * 55)).toFixed(0)}%`;
