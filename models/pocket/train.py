r"""Train the pocket model from nothing and write its folder.

    python -m models.pocket.train --out DIR --seconds 155 --tokens 250000000  # one GPU
    python -m models.pocket.train --out DIR --steps 20 --batch 2 --length 256 \
        --tokens 100000 --no-compile  # a smoke test on a CPU

The first form stops by the clock, the second by a count of steps; given both,
whichever ends first.  Data come from models.pocket.tasks alone, and held-out
prompts are never drawn.
"""

import argparse
import math
import multiprocessing
import os
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from . import data

PROMPT_WEIGHT = 0.02  # of the loss on prompt tokens; that on answer tokens has 1
RESIDUAL_WEIGHT = 1e-6  # of the mean square of the residual stream after the last layer
ROWS_A_JOB = 256
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What a training run depends on."""

    out: Path
    seconds: float
    steps: int
    tokens: int
    batch: int
    length: int
    lr: float
    weight_decay: float
    seed: int
    compile: bool


def model_config() -> LlamaConfig:
    """The architecture: under 5 million parameters, so under 10 MB in bfloat16."""
    return LlamaConfig(
        vocab_size=data.VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=data.MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        bos_token_id=data.BEGIN_ID,
        eos_token_id=data.END_ID,
        pad_token_id=data.PAD_ID,
        use_cache=True,
    )


def build_model(seed: int) -> LlamaForCausalLM:
    """A fresh float32 model; projections into the residual stream start small."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(model_config())
    scale = 1 / math.sqrt(2 * model.config.num_hidden_layers)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(scale)
            layer.mlp.down_proj.weight.mul_(scale)
    return model


class FourBitWeights(nn.Module):
    """Weights as a 4-bit NF4 store in blocks of 64 would give them back, while ``on`` is 1.

    Training with ``on`` at 1 in some steps and 0 in others makes the model hold
    under both.  The gradient passes straight through to the full weights.
    """

    def __init__(self, on: Tensor) -> None:
        super().__init__()
        self.on = on
        levels = torch.tensor(NF4_LEVELS, device=on.device)
        self.levels = levels
        self.bounds = (levels[1:] + levels[:-1]) / 2

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight, or what four bits keep of it."""
        blocks = weight.detach().view(-1, 64)
        scale = blocks.abs().amax(dim=1, keepdim=True).clamp_min(1e-12)
        rounded = self.levels[torch.bucketize(blocks / scale, self.bounds)] * scale
        return weight + self.on * (rounded - blocks).view_as(weight)


def linear_layers(model: LlamaForCausalLM) -> list[nn.Linear]:
    """The linear layers inside the decoder: all but the output head."""
    return [part for part in model.model.layers.modules() if isinstance(part, nn.Linear)]


def forward(model: LlamaForCausalLM, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What model(tokens).logits is, without building a mask, and the last residual stream.

    On a GPU the residual stream is kept in bfloat16, as it is when serving.
    """
    x = model.model.embed_tokens(tokens)
    if torch.is_autocast_enabled():
        x = x.to(torch.bfloat16)
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    rotary = model.model.rotary_emb(x, positions)
    for layer in model.model.layers:
        x = layer(x, attention_mask=None, position_ids=positions, position_embeddings=rotary)
    logits: Tensor = model.lm_head(model.model.norm(x))
    return logits, x


def target_weights(tokens: Tensor) -> Tensor:
    """The weight of each token as a target: 1 in answers, little in prompts, 0 for padding.

    An answer runs from after its assistant token up to and with its end token.
    """
    marks = (tokens == data.BEGIN_ID) | (tokens == data.SYSTEM_ID) | (tokens == data.USER_ID)
    marks |= tokens == data.ASSISTANT_ID
    places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    last_mark = torch.where(marks, places, 0).cummax(dim=1).values
    in_answer = (tokens.gather(1, last_mark) == data.ASSISTANT_ID) & ~marks
    weights = torch.where(in_answer, 1.0, PROMPT_WEIGHT)
    return torch.where(tokens == data.PAD_ID, 0.0, weights)


def loss_of(model: LlamaForCausalLM, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted loss, and the share of answer tokens that greedy choice gets right."""
    logits, residual = forward(model, tokens)
    logits = logits[:, :-1].float()
    targets, weights = tokens[:, 1:], target_weights(tokens)[:, 1:]
    each = functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="none"
    ).view_as(weights)
    loss = (each * weights).sum() / weights.sum()
    # Where a prompt cannot be foreseen, the stream would grow very large to say so.
    loss = loss + RESIDUAL_WEIGHT * residual.float().square().mean()
    answers = weights == 1.0
    right = (logits.argmax(dim=-1) == targets) & answers
    return loss, right.sum() / answers.sum()


def _fill_rows(job: tuple[str, str, tuple[int, int], int, int]) -> int:
    """Fill one job's rows of the shared token file; runs in a worker process."""
    tokenizer_file, token_file, shape, index, seed = job
    tokenizer = Tokenizer.from_file(tokenizer_file)
    rows = np.memmap(token_file, dtype=np.uint16, mode="r+", shape=shape)
    first = index * ROWS_A_JOB
    count = min(ROWS_A_JOB, shape[0] - first)
    rng = random.Random(f"{seed}/{index}")
    rows[first : first + count] = data.packed_rows(tokenizer, count, shape[1], rng)
    rows.flush()
    return count


class DataJob:
    """Makes the training rows in worker processes; the rows depend on the seed alone."""

    def __init__(self, settings: Settings, tokenizer_file: Path) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._file = str(Path(self._folder.name) / "tokens")
        count = max(settings.batch, settings.tokens // settings.length)
        self._shape = (count, settings.length)
        np.memmap(self._file, dtype=np.uint16, mode="w+", shape=self._shape).flush()
        jobs = [
            (str(tokenizer_file), self._file, self._shape, index, settings.seed)
            for index in range(math.ceil(count / ROWS_A_JOB))
        ]
        self._pool = multiprocessing.get_context("fork").Pool(os.cpu_count())
        self._result = self._pool.map_async(_fill_rows, jobs, chunksize=1)

    def rows(self) -> Tensor:
        """Wait for the workers and return all rows, as int16 on the CPU."""
        self._result.get()
        self._pool.close()
        self._pool.join()
        rows = np.fromfile(self._file, dtype=np.int16).reshape(self._shape)
        self._folder.cleanup()
        return torch.from_numpy(rows)


class Optimizers:
    """Muon for the matrices of the decoder, AdamW for embeddings and norms, one rate."""

    def __init__(self, model: LlamaForCausalLM, settings: Settings, *, fused: bool) -> None:
        inner = {id(p) for p in model.model.layers.parameters() if p.ndim == 2}
        matrices = [p for p in model.parameters() if id(p) in inner]
        others = [p for p in model.parameters() if id(p) not in inner]
        decay = settings.weight_decay
        # Muon's steps are scaled to AdamW's, so that one learning rate serves both.
        self._all: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(matrices, lr=0.0, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0, fused=fused),
        )

    def step(self, lr: float) -> None:
        """Apply and clear the gradients."""
        for optimizer in self._all:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def learning_rate(progress: float, step: int, peak: float) -> float:
    """Linear warm-up over 300 steps or a tenth of the run, whichever is longer, then a cosine."""
    warmup = min(1.0, (step + 1) / 300, max(progress, 1e-3) / 0.1)
    return peak * warmup * max(0.005, 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def train(model: LlamaForCausalLM, job: DataJob, settings: Settings, device: str) -> None:
    """Train in place, printing progress."""
    four_bit = torch.zeros((), device=device)
    for layer in linear_layers(model):
        parametrize.register_parametrization(layer, "weight", FourBitWeights(four_bit))
    optimizers = Optimizers(model, settings, fused=device == "cuda")
    compute = torch.compile(loss_of, dynamic=False) if settings.compile else loss_of

    def forward_backward(tokens: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss, accuracy = compute(model, tokens)
        torch.autograd.backward(loss)
        return loss, accuracy

    # Compile while the worker processes still make data.
    begun = time.monotonic()
    forward_backward(
        torch.randint(
            6, data.VOCAB_SIZE, (settings.batch, settings.length), device=device
        ).index_fill(1, torch.tensor([0], device=device), data.ASSISTANT_ID)
    )
    for parameter in model.parameters():
        parameter.grad = None
    print(f"compiled in {time.monotonic() - begun:.1f} s", flush=True)
    rows = job.rows().to(device)
    print(
        f"data: {rows.numel():,} tokens, ready after {time.monotonic() - begun:.1f} s", flush=True
    )

    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.empty(0, dtype=torch.long)
    begun, step, progress = time.monotonic(), 0, 0.0
    while progress < 1.0:
        if len(order) < settings.batch:
            order = torch.randperm(len(rows), generator=generator)
        chosen, order = order[: settings.batch], order[settings.batch :]
        tokens = rows[chosen.to(device)].long()
        # In the second half every other step runs on 4-bit weights.
        four_bit.fill_(float(progress > 0.5 and step % 2 == 1))
        loss, accuracy = forward_backward(tokens)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step(learning_rate(progress, step, settings.lr))
        step += 1
        if step % 10 == 0 and device == "cuda":
            torch.cuda.synchronize()  # or the clock below would run ahead of the work
        elapsed = time.monotonic() - begun
        progress = max(
            step / settings.steps if settings.steps else 0.0,
            elapsed / settings.seconds if settings.seconds else 0.0,
        )
        # Report in pairs: one plain step, and one on 4-bit weights.
        if step % 100 < 2 or progress >= 1.0:
            rate = step * tokens.numel() / elapsed
            print(
                f"step {step} progress {progress:.3f} loss {loss.item():.5f} "
                f"answer tokens right {accuracy.item():.5f} norm {norm.item():.3f} "
                f"4-bit {int(four_bit.item())} {rate / 1e6:.3f} Mtok/s",
                flush=True,
            )
    for layer in linear_layers(model):
        with torch.no_grad():
            four_bit.fill_(0.0)
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


def save_model(model: LlamaForCausalLM, folder: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors, all for bfloat16."""
    model = model.to("cpu", torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.generation_config = GenerationConfig(
        bos_token_id=data.BEGIN_ID,
        eos_token_id=data.END_ID,
        pad_token_id=data.PAD_ID,
        do_sample=False,
        max_new_tokens=256,
    )
    model.save_pretrained(folder)


def _arguments() -> Settings:
    parser = argparse.ArgumentParser(description="Train the pocket model.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seconds", type=float, default=0, help="stop by the clock")
    parser.add_argument("--steps", type=int, default=0, help="stop after so many steps")
    parser.add_argument("--tokens", type=int, default=200_000_000, help="training tokens to make")
    parser.add_argument("--batch", type=int, default=64, help="rows in a step")
    parser.add_argument("--length", type=int, default=2048, help="tokens in a row")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    settings = Settings(**vars(parser.parse_args()))
    if not settings.seconds and not settings.steps:
        parser.error("give --seconds or --steps")
    return settings


def main() -> None:
    """Make the tokenizer and the data, train, and write the model's folder."""
    settings = _arguments()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the worker processes fork
    settings.out.mkdir(parents=True, exist_ok=True)
    data.save_tokenizer(data.build_tokenizer(settings.seed), settings.out)
    job = DataJob(settings, settings.out / "tokenizer.json")
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(settings.seed).to(device)
    print(f"{model.num_parameters():,} parameters on {device}", flush=True)
    train(model, job, settings, device)
    save_model(model, settings.out)


if __name__ == "__main__":
    main()
