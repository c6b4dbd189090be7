"""What a hub answers becomes one sentence: gated, private, without that revision, without a configuration."""

import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

ANSWERS = {
    "gated": (403, "GatedRepo"),
    "private": (401, "RepoNotFound"),
    "old": (404, "RevisionNotFound"),
    "bare": (404, "EntryNotFound"),
}
"""Owner of a repository -> the status and the code that Hugging Face's servers answer with."""

ASK = """
import json, fasttrace
said = {}
for owner in %r:
    try:
        fasttrace.Tracer.from_pretrained(f"{owner}/model", revision="v2" if owner == "old" else None)
    except fasttrace.ModelError as error:
        said[owner] = str(error)
print(json.dumps(said))
"""


class Hub(BaseHTTPRequestHandler):
    """Refuses every request, by the repository's owner."""

    def do_GET(self):
        status, code = next(answer for owner, answer in ANSWERS.items() if f"/{owner}/" in self.path)
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_):
        pass


@pytest.mark.slow
def test_what_a_hub_refuses_is_one_sentence_that_says_what_to_do(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    address = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
    environment = os.environ | address | {"HF_HOME": str(tmp_path), "no_proxy": "*"}
    command = [sys.executable, "-c", ASK % (tuple(ANSWERS),)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    server.shutdown()
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["gated"].startswith("gated/model is gated: accept its conditions at https://huggingface.co/gated/model")
    assert "a private model needs `hf auth login`" in said["private"]
    assert said["old"].startswith("old/model has no revision 'v2'")
    assert said["bare"].startswith("bare/model has no config.json")
