"""What `helm test` runs: waits until the release is ready, then asks for an answer.

`python ask.py URL SECONDS`, the standard library only. With a key in SHOAL_API_KEY, or where no key
is needed, a completion must come back; else the API must refuse an anonymous one.
"""

import json
import os
import sys
import time
import urllib.error
import urllib.request


def fetch(url: str, body: dict[str, object] | None = None, key: str = "") -> tuple[int, str]:
    """Status and text of an answer; status 0 where nothing answers."""
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, data, headers), timeout=60
        ) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as exc:
        return exc.code, exc.read().decode(errors="replace")
    except OSError as exc:
        return 0, str(exc)


def wait_ready(url: str, seconds: float) -> None:
    """Return once `/health/ready` says so; exit with the last answer if it never does."""
    deadline = time.monotonic() + seconds
    while True:
        status, text = fetch(f"{url}/health/ready")
        if status == 200:
            return
        if time.monotonic() > deadline:
            sys.exit(f"not ready after {seconds:.0f} s: {status} {text[:500]}")
        time.sleep(1)


def main() -> None:
    url, seconds = sys.argv[1], float(sys.argv[2])
    wait_ready(url, seconds)
    key = os.environ.get("SHOAL_API_KEY", "")
    body: dict[str, object] = {
        "messages": [{"role": "user", "content": "Say hello."}],
        "max_tokens": 8,
    }
    models = json.loads(fetch(f"{url}/v1/models", key=key)[1]).get("data", [])
    if models:
        body["model"] = models[0]["id"]
    status, text = fetch(f"{url}/v1/chat/completions", body, key)
    if status == 200:
        print("ready, and it answers:", json.loads(text)["choices"][0]["message"]["content"])
    elif status == 401 and not key:
        print("ready, and it asks for a key; give one in tests.apiKey.existingSecret for an answer")
    else:
        sys.exit(f"no answer: {status} {text[:500]}")


if __name__ == "__main__":
    main()
