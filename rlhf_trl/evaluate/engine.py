"""Answers by vLLM in place of the models (`evaluation.backend: vllm`): one engine, and an adapter for each request.

Reads the adapters that `train` has saved; writes nothing. Tested with a stand-in for vLLM, never run on a GPU.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from peft import LoraConfig

from rlhf_trl.models.base import Policies, start_path
from rlhf_trl.models.sampling import Completion, encode_seeded, read_answer, spread
from rlhf_trl.models.tokenizer import Messages
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.library import vllm_rank
from rlhf_trl.recipe.schema import Decoding
from rlhf_trl.text.display import first_line

REMEDY = "set evaluation.backend: transformers"
# Nats a token by which two implementations of one model may differ in bfloat16; a guess, as it was not measured.
TOLERANCE = 0.2
# From this slope on (see `require_same`), and this many standard errors above 0, the reference has answered.
SLOPE, ERRORS = 0.75, 5


class Engine:
    """One vLLM engine on the base of the policies, in each process of a launch; a request names its adapter."""

    def __init__(self, policies: Policies, positions: int):
        """Start the engine, for prompts and answers of up to `positions` tokens together.

        UserError where vLLM refuses the model, or there is not enough memory."""
        from trl.trainer.utils import ensure_master_addr_port
        from vllm import LLM

        recipe, run, state = policies.recipe, policies.run, PartialState()
        self.tokenizer, self.folders = policies.tokenizer, list[Path]()
        # As TRL starts vLLM beside a trainer: inside this process, which is one of a launch or the only one.
        os.environ["RANK"], os.environ["WORLD_SIZE"] = str(state.process_index), str(state.num_processes)
        os.environ["LOCAL_RANK"] = str(state.local_process_index)
        ensure_master_addr_port()
        try:
            self.llm = LLM(
                model=start_path(recipe, run, recipe.policies[0]),
                revision=policies.block.get("model_revision"),
                dtype=str(policies.model.dtype).removeprefix("torch."),
                max_model_len=positions,
                gpu_memory_utilization=recipe.evaluation.vllm_gpu_memory_utilization,
                enable_lora=True,
                max_lora_rank=vllm_rank(max(LoraConfig.from_pretrained(run.adapter(s)).r for s in recipe.policies)),
                logprobs_mode="raw_logprobs",  # at temperature 1, whatever the decoding
                distributed_executor_backend="external_launcher",
                seed=recipe.seed,
            )
        except ValueError as error:
            problem, own = f"vLLM does not start: {first_line(error)}", "evaluation.vllm_gpu_memory_utilization"
            raise UserError("evaluation.backend", problem, f"change {own}, or {REMEDY}") from error

    def generate(
        self,
        adapter: Path | None,
        prompts: Sequence[Messages],
        max_new_tokens: int,
        seed: int,
        progress: str,
        decoding: Decoding | None = None,
        draws: Sequence[int] | None = None,
        max_prompt_tokens: int | None = None,
    ) -> list[Completion]:
        """Sample an answer to each prompt with the adapter of a folder, or the base; as `sampling.sample`."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        ids, seeds = encode_seeded(self.tokenizer, prompts, seed, draws, max_prompt_tokens)
        request = None
        if adapter is not None:
            self.folders += [adapter] * (adapter not in self.folders)
            request = LoRARequest(str(adapter), self.folders.index(adapter) + 1, str(adapter))
        # The template's end token alone ends an answer, as with the models; `ignore_eos` is of the model's own ones.
        common: dict[str, Any] = {
            **(decoding or Decoding()).model_dump(), "max_tokens": max_new_tokens, "logprobs": 0, "detokenize": False,
            "ignore_eos": True, "stop_token_ids": [self.tokenizer.eos_token_id],
        }  # fmt: skip

        def answer(rows: Sequence[int]) -> list[Completion]:
            texts = [{"prompt_token_ids": ids[row]} for row in rows]
            params = [SamplingParams(seed=seeds[row], **common) for row in rows]
            found = self.llm.generate(texts, params, use_tqdm=False, lora_request=request)
            outputs = [of.outputs[0] for of in found]
            return [read_answer(self.tokenizer, [*out.token_ids], out.cumulative_logprob) for out in outputs]

        parts = min(PartialState().num_processes, len(ids))  # one for each process: the engine batches by itself
        return spread([range(part, len(ids), parts) for part in range(parts)], answer, progress)


def require_same(name: str, answers: Sequence[Completion], log_probs: Sequence[float], k1: Sequence[float]) -> None:
    """Refuse answers whose log-probabilities by the engine are not those of the measured model.

    An adapter that vLLM passes over without an error (vllm-project/vllm#55193) answers as the reference does. The
    engine is then off the policy by what the reference is, -k1: a line through the two has the slope 1. It has the
    slope 0 where the adapter answers, or up to 1/2 where rounding of the policy's own values is most of both.

    Args:
        log_probs, k1: of each answer, by the measured model; k1 is the log-ratio to the reference.
    """
    off = np.array([answer.log_prob for answer in answers]) - np.array(log_probs)
    way = -np.array(k1)
    slope = off @ way / (way @ way) if way.any() else 0.0
    rest = off - slope * way
    if slope > SLOPE and slope**2 * (way @ way) * (len(off) - 1) > ERRORS**2 * (rest @ rest):
        raise UserError(name, "vLLM has answered without the adapter: as the reference does", REMEDY)
    if (apart := np.abs(off).sum() / sum(len(answer.ids) for answer in answers)) > TOLERANCE:
        problem = f"vLLM is {apart:.2f} nats a token off the measured model on its own answers"
        raise UserError(name, problem, REMEDY)
