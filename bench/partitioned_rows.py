"""Peak memory of a worker that starts a language model with 196,608 new rows under ZeRO-3: born in
parts, against built whole.

Two workers of gloo, a published Qwen2 of one layer, width 256 and 8,192 text tokens. Peak: how far
resident memory of the worse worker rises (VmHWM over VmRSS at the start) while the model is built;
the engine that DeepSpeed makes of it afterwards needs as much either way. `python
bench/partitioned_rows.py` prints both, and the ratio to the bytes of the whole head.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from bench.language import RandomCodes
from bench.machine import machine
from bench.turns import rise_bytes

CODES, WIDTH, WORKERS = 196_608, 256, 2


def start(rank: int, folder: str, parts: bool, peaks: multiprocessing.Queue) -> None:
    """One worker."""
    import torch.distributed as dist

    from smalti.mllm.bpe import train_bpe
    from smalti.mllm.build import build_unified
    from smalti.schema import MllmSection, Train
    from smalti.workflows.train import engines
    from smalti.workflows.train.collectives import Collectives
    from smalti.workflows.train.zero3_init import partitioned_loading

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORKERS), "LOCAL_RANK": str(rank)}
    engines.prepare_process(False, 1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store{parts}", rank=rank, world_size=WORKERS
    )
    train = Train(batch_size=WORKERS, zero_stage=3)
    section = MllmSection(pretrained=f"{folder}/lm", train=train)

    def work(num_codes: int = CODES) -> object:
        tokenizer, codes = train_bpe(["a"], 260), RandomCodes(num_codes)
        if not parts:
            return build_unified(section, tokenizer, codes)
        with partitioned_loading(
            engines.deepspeed_config(train, WORKERS), Collectives()
        ) as matrices:
            return build_unified(section, tokenizer, codes, matrices=matrices)

    work(64)  # what is imported once is not counted
    peaks.put(rise_bytes(work))
    dist.barrier()


def main() -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    context = multiprocessing.get_context("spawn")
    peaks: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        size = {
            "vocab_size": 8192,
            "hidden_size": WIDTH,
            "intermediate_size": 512,
            "num_hidden_layers": 1,
        }
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
        Qwen2ForCausalLM(Qwen2Config(**size, **heads)).save_pretrained(f"{folder}/lm")
        for name, parts in (("in parts", True), ("whole", False)):
            risen = context.Queue()
            workers = [
                context.Process(target=start, args=(rank, folder, parts, risen))
                for rank in range(WORKERS)
            ]
            for worker in workers:
                worker.start()
            peaks[name] = max(risen.get() for _ in workers)
            for worker in workers:
                worker.join()
    whole = CODES * WIDTH * 4
    for name, peak in peaks.items():
        print(f"{name}: {peak >> 20} MiB, {peak / whole:.2f} of the whole head ({whole >> 20} MiB)")
    result = {
        "peak_bytes": peaks,
        "ratio": round(peaks["in parts"] / peaks["whole"], 3),
        "machine": machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
