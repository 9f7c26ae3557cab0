"""A transformers model where the sampling server expects its engine: the real HTTP server, without
vLLM.

Each row draws from a generator of its own seed, as vLLM's per-request seeds do.
"""

import threading
from contextlib import contextmanager

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignkit.files import vocabulary_hash
from alignkit.rollout.server import Server, Worker
from alignkit.rollout.wire import shape_of


class TransformersEngine:
    def __init__(self, folder):
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.folder, self.tokenizer = str(folder), AutoTokenizer.from_pretrained(folder)
        self.batches = []  # rows of each call

    def describe(self):
        config = self.model.config
        return {
            "engine": "transformers",
            "model": self.folder,
            "vocabulary": vocabulary_hash(self.tokenizer.get_vocab()),
            "shape": shape_of(config),
            "dtype": "float32",
            "max_length": config.max_position_embeddings,
        }

    def load(self, folder):
        wrong = self.model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
        missing = set(wrong.missing_keys) - set(self.model._tied_weights_keys or ())
        if wrong.unexpected_keys or missing:
            raise KeyError(f"unexpected {wrong.unexpected_keys}, missing {missing}")

    @torch.no_grad()
    def sample(self, rows):
        self.batches.append(len(rows))
        groups = {}  # rows of one prompt share their forward passes
        for i, row in enumerate(rows):
            groups.setdefault(tuple(row.prompt), []).append(i)
        done = {
            i: found
            for group in groups.values()
            for i, found in zip(group, self.continuations([rows[i] for i in group]))
        }
        return [done[i] for i in range(len(rows))]

    def continuations(self, rows):
        """Completions of one prompt; a row goes on after its end, and is cut there."""
        generators = [torch.Generator().manual_seed(row.seed) for row in rows]
        text, logps = torch.tensor([row.prompt for row in rows]), []
        for _ in range(rows[0].max_new_tokens):
            logprobs = (self.model(text).logits[:, -1] / rows[0].temperature).log_softmax(-1)
            chosen = torch.cat(
                [p.exp().multinomial(1, generator=g) for p, g in zip(logprobs, generators)]
            )
            logps.append(logprobs.gather(-1, chosen[:, None]))
            text = torch.cat([text, chosen[:, None]], 1)
        new = text[:, len(rows[0].prompt) :].tolist()
        return [
            self._cut(ids, scores, row.stop)
            for ids, scores, row in zip(new, torch.cat(logps, 1).tolist(), rows)
        ]

    def _cut(self, ids, logps, stop):
        length = next((t + 1 for t, token in enumerate(ids) if token in stop), len(ids))
        return {"ids": ids[:length], "logps": logps[:length], "ended": ids[length - 1] in stop}


@contextmanager
def serving(engine, port=0, token=""):
    """The real server around `engine`; gives its address and stops it at the end."""
    worker = Worker(engine)
    server = Server(worker, port, token)
    threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    ).start()
    threading.Thread(target=worker.run, daemon=True).start()

    def stop():
        server.shutdown()
        server.server_close()

    engine.stop = stop
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        stop()
