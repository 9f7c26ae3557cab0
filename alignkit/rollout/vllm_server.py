"""vLLM behind the sampling server. In vLLM's own environment: `python -m
alignkit.rollout.vllm_server MODEL --port 8001`.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignkit.files import vocabulary_hash
from alignkit.rollout.server import Row, serve
from alignkit.rollout.wire import shape_of


class VLLMEngine:
    """A `vllm.LLM` as the server's engine. `options` go to it."""

    def __init__(self, model: str, **options: Any):
        from vllm import LLM

        # the log-probs of what is sampled from, after temperature and nucleus; no sampling defaults
        # from the model's folder
        self.llm = LLM(
            model, logprobs_mode="processed_logprobs", generation_config="vllm", **options
        )
        self.model = model
        self.sample([Row([0], 0, 2, 1.0, 1.0, [])])  # what is compiled on first use is compiled now

    def describe(self) -> dict[str, Any]:
        """See `Engine.describe`."""
        import vllm

        config = self.llm.llm_engine.model_config
        return {
            "engine": f"vllm {vllm.__version__}",
            "model": self.model,
            "vocabulary": vocabulary_hash(self.llm.get_tokenizer().get_vocab()),
            "shape": shape_of(config.hf_text_config),
            "dtype": str(config.dtype).removeprefix("torch."),
            "max_length": config.max_model_len,
        }

    def load(self, folder: Path) -> None:
        """See `Engine.load`. A path crosses to vLLM's workers, never a pickled function."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache, which belongs to the old weights")

    def sample(self, rows: Sequence[Row]) -> list[Mapping[str, Any]]:
        """See `Engine.sample`."""
        from vllm import SamplingParams

        settings = [
            SamplingParams(
                temperature=row.temperature,
                top_p=row.top_p,
                seed=row.seed,
                max_tokens=row.max_new_tokens,
                stop_token_ids=list(row.stop),
                ignore_eos=True,  # the trainer says what ends a completion
                logprobs=0,  # of the sampled token alone
                detokenize=False,
            )
            for row in rows
        ]
        prompts = [{"prompt_token_ids": list(row.prompt)} for row in rows]
        outputs = self.llm.generate(prompts, settings, use_tqdm=False)
        completions = [output.outputs[0] for output in outputs]
        return [
            {
                "ids": list(one.token_ids),
                "logps": [
                    place[token].logprob
                    for token, place in zip(one.token_ids, one.logprobs, strict=True)
                ],
                "ended": one.finish_reason == "stop",
            }
            for one in completions
        ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Load a model into vLLM and serve it until stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m alignkit.rollout.vllm_server", description=main.__doc__
    )
    parser.add_argument(
        "model",
        help="folder or hub name of the model that is trained: its architecture and tokenizer",
    )
    parser.add_argument("--port", type=int, default=8001, help="on 127.0.0.1 (default: 8001)")
    parser.add_argument(
        "--dtype", default="auto", help="float32, bfloat16, ... (default: vLLM's choice)"
    )
    parser.add_argument(
        "--max-model-len",
        type=int,
        help="tokens of prompt and completion (default: the model's context)",
    )
    parser.add_argument(
        "--tensor-parallel-size", type=int, default=1, help="GPUs that share the model (default: 1)"
    )
    parser.add_argument(
        "--gpu-memory-utilization", type=float, help="share of a GPU's memory (default: vLLM's)"
    )
    parser.add_argument(
        "--enforce-eager",
        action="store_true",
        help="no graphs and no compilation: starts sooner, runs slower",
    )
    parser.add_argument("--revision", help="hub revision of the model")
    options = {
        name: value
        for name, value in vars(parser.parse_args(arguments)).items()
        if value is not None
    }
    model = options.pop("model")
    port = options.pop("port")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if options["tensor_parallel_size"] == 1:
        # one process: it is scheduled alike, and dies whole
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    serve(VLLMEngine(model, **options), port)


if __name__ == "__main__":
    main()
