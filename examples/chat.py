"""A chat on the terminal whose earlier turns are never computed twice, not even after a restart.

    python examples/chat.py                                  # SmolLM2 from PyPI: see `make demo`
    python examples/chat.py --model Qwen/Qwen2.5-0.5B-Instruct

Each answer says how much of the prompt came from the pool, and how soon its first word was there. End with Ctrl-D,
start again, and ask the same: then even the first prompt comes from the pool, as far as it fills whole blocks.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from kvpool import Pool
from kvpool.adapters.transformers import TransformersCache
from kvpool.demo.smollm2 import NAME, load_smollm2

POOL = Path(__file__).with_name("laptop.yaml")


class Printer(TextStreamer):
    """Prints an answer while it is generated, and notes when it began."""

    began_s: float | None = None

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print what has become certain."""
        self.began_s = self.began_s or time.perf_counter()
        super().on_finalized_text(text, stream_end=stream_end)


def main() -> None:
    """Chat until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a hub's name or a directory (SmolLM2-135M-Instruct)")
    parser.add_argument("--pool", type=Path, default=POOL, help="the KVCachePool (%(default)s)")
    parser.add_argument("--tenant", default="me")
    options = parser.parse_args()
    model, tokenizer = _loaded(options.model)
    with Pool.open(options.pool) as pool:
        cache = TransformersCache(pool, model, name=options.model or NAME)
        messages: list[dict[str, str]] = []
        print("you: ", end="", flush=True)
        for line in sys.stdin:
            messages.append({"role": "user", "content": line.strip()})
            messages.append({"role": "assistant", "content": _answer(cache, tokenizer, messages, options.tenant)})
            print("you: ", end="", flush=True)
        print()


def _answer(cache: TransformersCache, tokenizer: Any, messages: list[dict[str, str]], tenant: str) -> str:
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    inputs = inputs.to(cache.model.device)
    printer = Printer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    asked_s = time.perf_counter()
    with cache.session(inputs["input_ids"], inputs["attention_mask"], tenant=tenant) as session:
        output = session.generate(streamer=printer, max_new_tokens=120, do_sample=False)
        tiers = ", ".join(f"{blocks} blocks from {tier}" for tier, blocks in session.served.items()) or "nothing held"
        print(
            f"  [{session.loaded_columns} of {inputs['input_ids'].shape[1]} tokens loaded: {tiers}; "
            f"first word after {(printer.began_s or asked_s) - asked_s:.2f} s]"
        )
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def _loaded(name: str | None) -> tuple[Any, Any]:
    if name is None:
        return load_smollm2()
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), AutoTokenizer.from_pretrained(name)


if __name__ == "__main__":
    main()
