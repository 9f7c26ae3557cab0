"""vLLM's side of bench_rollouts.py: an engine in a process of its own, which draws when it is told to.

    PYTHON_OF_VLLM vllm_side.py MODEL_FOLDER

The first line of stdin is a JSON object: "prompts" (token ids), "completions" of each, "new" tokens
of each. Every further line asks for one draw. Each answer on stdout is a line: how many tokens were
drawn. It needs vLLM alone, nothing of alignkit.
"""

import json
import os
import sys

# vLLM writes its log to stdout, where only answers belong.
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def main() -> None:
    from vllm import LLM, SamplingParams

    asked = json.loads(sys.stdin.readline())
    longest = max(map(len, asked["prompts"])) + asked["new"]
    rows = len(asked["prompts"]) * asked["completions"]
    engine = LLM(
        sys.argv[1],
        dtype="float32",
        max_model_len=longest,
        max_num_seqs=rows,
        skip_tokenizer_init=True,
    )
    # The trainer reads the tokens with their log-probs. No text is made of them.
    settings = SamplingParams(
        n=asked["completions"],
        temperature=1.0,
        max_tokens=asked["new"],
        ignore_eos=True,
        logprobs=0,
        detokenize=False,
    )
    prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
    for _ in sys.stdin:
        engine.reset_prefix_cache()
        drawn = engine.generate(prompts, settings, use_tqdm=False)
        tokens = sum(len(each.token_ids) for one in drawn for each in one.outputs)
        print(tokens, file=answers, flush=True)


if __name__ == "__main__":
    main()
