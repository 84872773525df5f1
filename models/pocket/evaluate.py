"""Held-out exact-match accuracy of a pocket model, by task: of a folder, or through a server.

python -m models.pocket.evaluate models/pocket
python -m models.pocket.evaluate --server localhost:50051
"""

import argparse
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from tokenloom.client import Client

from . import tasks


def load(folder: Path, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model (in bfloat16) and tokenizer of a folder."""
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(folder, padding_side="left")


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    batch: int,
    max_new_tokens: int = 256,
) -> list[str]:
    """Return greedy replies to single-turn prompts, in the order given."""
    texts = [
        str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
            )
        )
        for prompt in prompts
    ]
    replies = [""] * len(texts)
    # Prompts of like length together, so that little is padding.
    order = sorted(range(len(texts)), key=lambda index: (len(texts[index]), index))
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        inputs = tokenizer(
            [texts[index] for index in chosen],
            return_tensors="pt",
            padding=True,
            add_special_tokens=False,
        ).to(model.device)
        with torch.inference_mode():
            output = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                do_sample=False,
                max_new_tokens=max_new_tokens,
            )
        new = output[:, inputs["input_ids"].shape[1] :]
        decoded = tokenizer.batch_decode(new, skip_special_tokens=True)
        for index, text in zip(chosen, decoded, strict=True):
            replies[index] = text
    return replies


def served_answers(
    client: Client, prompts: list[str], batch: int, max_new_tokens: int = 256
) -> list[str]:
    """Return a server's greedy replies to single-turn prompts, in the order given."""

    def answer(prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        return client.chat(messages, temperature=0, max_tokens=max_new_tokens).result().text

    with ThreadPoolExecutor(batch) as threads:
        return list(threads.map(answer, prompts))


def asking(folder: Path | None, server: str | None, batch: int) -> Callable[[list[str]], list[str]]:
    """Return what answers prompts: the model of a folder, or a server."""
    if folder is None:
        assert server is not None
        client = Client(server)
        return lambda prompts: served_answers(client, prompts, batch)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load(folder, device)
    return lambda prompts: answers(model, tokenizer, prompts, batch)


def main() -> None:
    """Evaluate and print a table, or JSON with --json."""
    parser = argparse.ArgumentParser(description="Evaluate the pocket model.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("folder", nargs="?", type=Path, help="with config.json and the weights")
    source.add_argument("--server", metavar="HOST:PORT", help="a tokenloom that serves the model")
    parser.add_argument("--count", type=int, default=400, help="prompts of each task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=125)
    parser.add_argument("--tasks", nargs="*", default=list(tasks.TASKS), choices=tasks.TASKS)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--misses", type=int, default=0, help="show so many misses of each task")
    options = parser.parse_args()
    ask = asking(options.folder, options.server, options.batch)
    report: dict[str, dict[str, float]] = {}
    for task in options.tasks:
        examples = tasks.held_out(task, options.count, options.seed)
        prompts = [example.prompt for example in examples]
        replies = ask(prompts)
        misses = [
            (example, reply)
            for example, reply in zip(examples, replies, strict=True)
            if reply != example.answer
        ]
        right = len(examples) - len(misses)
        report[task] = {
            "count": len(examples), "right": right, "accuracy": right / len(examples)
        }  # fmt: skip
        if not options.json:
            print(f"{task:14} {right:5} of {len(examples):5}  {right / len(examples):8.2%}")
            for example, reply in misses[: options.misses]:
                print(f"  {example.prompt!r}: {reply!r}, not {example.answer!r}")
    if options.json:
        print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
