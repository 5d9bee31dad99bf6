"""Talk with a running server through the `openai` client, streamed: python examples/chat_client.py [QUESTION]

Start the server first: quire serve
"""

import sys

from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
model = client.models.list().data[0].id
question = " ".join(sys.argv[1:]) or "Hello! Who are you?"
stream = client.chat.completions.create(
    model=model, messages=[{"role": "user", "content": question}], stream=True, max_tokens=64
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
