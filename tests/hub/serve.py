"""Run `transformers serve` with the given arguments, ask three endpoints and print their answers as JSON."""

import json
import os
import socket
import sys
import threading
import time
import urllib.error
import urllib.request

from transformers.cli.transformers import main

with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
address = f"http://localhost:{port}"
sys.argv = ["transformers", *sys.argv[1:], "--port", str(port), "--device", "cpu"]
server = threading.Thread(target=main, daemon=True)
server.start()


def ask(endpoint, **body):
    body = json.dumps({"model": "plain", "temperature": 0, "stream": False} | body).encode()
    request = urllib.request.Request(address + endpoint, body, {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request, timeout=60))


while server.is_alive():
    try:
        urllib.request.urlopen(address + "/health", timeout=60)
        break
    except urllib.error.URLError:
        time.sleep(0.1)
answers = {
    "completions": ask("/v1/completions", prompt="Hello, I'm a language model,", max_tokens=8),
    "chat": ask("/v1/chat/completions", messages=[{"role": "user", "content": "Hello"}], max_tokens=8),
    "responses": ask("/v1/responses", input="Hello", max_output_tokens=8),
}
print("answers:", json.dumps(answers))
sys.stdout.flush()
os._exit(0)
