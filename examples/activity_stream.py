"""Recognise human activities in a live stream of motion sensors, one sample at a time.

The recordings are BasicMotions: a smart watch's accelerometer and gyroscope, 6 channels at 10 Hz,
while its wearer stands, walks, runs or plays badminton; the package ``aeon`` carries them. A
one-block continual Transformer is trained on clips with ``forward``. Then the test recordings,
joined into one stream, pass through ``forward_step``, and every output of its attention is compared
with ``torch.nn.MultiheadAttention`` over the same window.

    pip install 'continual-mha[demo]'
    python examples/activity_stream.py
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import continual as co
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from continual_mha import SingleOutputMultiheadAttention

SAMPLES_PER_SECOND = 10
COLOURS = ("#e69f00", "#c1272d", "#0072b2", "#009e73")


class Recordings(NamedTuple):
    """Clips (N, S, 6) in float32, the index of each one's activity (N,), the activities' names."""

    clips: Tensor
    labels: Tensor
    names: list[str]


class Stream(NamedTuple):
    """What ``forward_step`` gave at each of the stream's samples once the window was full.

    tokens: all that went into the attention, (S, E); attended: what came out of it, (S-L+1, E);
    probabilities: of the activities, (S-L+1, 4).
    """

    tokens: Tensor
    attended: Tensor
    probabilities: Tensor


class ContinualTransformer(nn.Module):
    """One Transformer block that classifies the last ``sequence_len`` samples of a stream.

    Positions are encoded as in arXiv 2201.06268, section 3.4: a stream has no last position, so the
    encodings recur, here with a period of twice the window; no two tokens in a window share one.
    """

    positions: Tensor  # [2L, E]

    def __init__(
        self, channels: int, classes: int, sequence_len: int, embed_dim: int, num_heads: int
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(channels, embed_dim)
        self.attention = SingleOutputMultiheadAttention(
            embed_dim, num_heads, sequence_len=sequence_len, forward_returns_attn_mask=False
        )
        self.attention_norm = nn.LayerNorm(embed_dim)
        self.feed_forward = nn.Sequential(
            nn.Linear(embed_dim, 2 * embed_dim), nn.GELU(), nn.Linear(2 * embed_dim, embed_dim)
        )
        self.feed_forward_norm = nn.LayerNorm(embed_dim)
        self.classifier = nn.Linear(embed_dim, classes)
        self.register_buffer("positions", recurring_positions(2 * sequence_len, embed_dim))

    def tokens(self, samples: Tensor, position: Tensor) -> Tensor:
        """Embed samples (..., 6) that arrived at the integer ``position`` (...) of their stream."""
        return self.embed(samples) + self.positions[position % len(self.positions)]

    def classify(self, token: Tensor, attended: Tensor) -> Tensor:
        """Logits (N, 4) from the newest token (N, E) and what the attention gave for it (N, E)."""
        hidden = self.attention_norm(token + attended)
        hidden = self.feed_forward_norm(hidden + self.feed_forward(hidden))
        return self.classifier(hidden)

    def forward(self, clips: Tensor, first_position: Tensor) -> Tensor:
        """Logits (N, 4) for clips (N, L, 6) that begin at ``first_position`` (N,) of a stream."""
        tokens = self.tokens(clips, first_position[:, None] + torch.arange(clips.shape[1]))
        return self.classify(tokens[:, -1], self.attention(tokens)[:, 0])


def recurring_positions(period: int, embed_dim: int) -> Tensor:
    """Sines and cosines (period, embed_dim) whose frequencies all divide ``period``."""
    waves = 1 + torch.arange(embed_dim // 2) % (period // 2)
    angles = 2 * math.pi / period * torch.arange(period)[:, None] * waves
    return 0.3 * torch.cat([angles.sin(), angles.cos()], dim=1)


def load_recordings(split: str) -> Recordings:
    """The 40 training or test recordings.

    Raises:
        SystemExit: they cannot be loaded; says why and what to install.
    """
    try:
        from aeon.datasets import load_basic_motions

        clips, labels = load_basic_motions(split=split)  # (N, 6, S) in float64, names
    except (ImportError, OSError, ValueError) as error:
        raise SystemExit(
            f"cannot load the BasicMotions recordings: {error}\n"
            "The package aeon carries them: pip install 'continual-mha[demo]'"
        ) from error
    names = sorted(set(labels))
    indices = torch.tensor([names.index(label) for label in labels])
    return Recordings(torch.from_numpy(clips).float().mT.contiguous(), indices, names)


def train(model: ContinualTransformer, recordings: Recordings, steps: int) -> None:
    """Fit ``model`` to windows cut out of the recordings at random places."""
    clips, labels, _ = recordings
    window, batch, rate = model.attention.sequence_len, 64, 2e-3
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    windows = clips.unfold(1, window, 1).mT  # [N, S-L+1, L, 6]
    for _ in (progress := tqdm(range(steps), desc="training", unit="step")):
        recording = torch.randint(len(clips), (batch,))
        place = torch.randint(windows.shape[1], (batch,))
        first_position = torch.randint(len(model.positions), (batch,))
        logits = model(windows[recording, place], first_position)
        loss = F.cross_entropy(logits, labels[recording], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")


def run_stream(model: ContinualTransformer, samples: Tensor) -> Stream:
    """Show ``samples`` (S, 6) to the model one by one."""
    tokens, attended, logits = [], [], []
    model.attention.clean_state()
    for position, sample in enumerate(tqdm(samples, desc="streaming", unit="sample")):
        token = model.tokens(sample[None], torch.tensor([position]))
        tokens.append(token)
        output = model.attention.forward_step(token)
        if output is not None:
            attended.append(output)
            logits.append(model.classify(token, output))
    return Stream(torch.cat(tokens), torch.cat(attended), torch.cat(logits).softmax(dim=1))


def windowed_attention(model: ContinualTransformer) -> nn.MultiheadAttention:
    """``torch.nn.MultiheadAttention`` with the model's weights."""
    ours = model.attention
    module = nn.MultiheadAttention(ours.embed_dim, ours.num_heads, batch_first=True)
    module.load_state_dict(ours.state_dict())
    return module.eval()


def largest_difference(model: ContinualTransformer, stream: Stream) -> float:
    """Between what was streamed and attention computed anew over the window, over all steps."""
    attention = windowed_attention(model)
    windows = stream.tokens.unfold(0, model.attention.sequence_len, 1).mT  # [S-L+1, L, E]
    expected = [
        attention(part[:, -1:], part, part, need_weights=False)[0][:, 0]
        for part in windows.split(500)
    ]
    return (stream.attended - torch.cat(expected)).abs().max().item()


def steps_per_second(model: ContinualTransformer, tokens: Tensor, rounds: int) -> dict[str, float]:
    """Of one stream's attention in three implementations: the median of rounds taken in turn."""
    ours, windowed = model.attention, windowed_attention(model)
    window = ours.sequence_len
    reference = co.SingleOutputMultiheadAttention(
        ours.embed_dim, ours.num_heads, sequence_len=window, batch_first=True
    ).eval()
    reference.load_state_dict(ours.state_dict())

    def step_windowed(i: int) -> Tensor:
        seen = tokens[None, i - window + 1 : i + 1]
        return windowed(seen[:, -1:], seen, seen, need_weights=False)[0]

    step: dict[str, Callable[[int], Tensor]] = {
        "continual_mha, forward_step": lambda i: ours.forward_step(tokens[i : i + 1]),
        "continual-inference, forward_step": lambda i: reference.forward_step(tokens[i : i + 1]),
        "torch.nn.MultiheadAttention over the window": step_windowed,
    }
    seconds: dict[str, list[float]] = {name: [] for name in step}
    for _ in range(rounds):
        for name, call in step.items():
            began = time.perf_counter()
            for i in range(window, window + 100):
                call(i)
            seconds[name].append((time.perf_counter() - began) / 100)
    return {name: 1 / statistics.median(times) for name, times in seconds.items()}


def draw(samples: Tensor, truth: Tensor, stream: Stream, names: list[str], path: Path) -> None:
    """Save the signal, the true and the predicted activity, and its probability over time."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    heights = {"height_ratios": [3, 3, 1.2, 2]}
    accelerometer, gyroscope, activity, probability = figure.subplots(
        4, sharex=True, gridspec_kw=heights
    )
    seconds = torch.arange(len(samples)) / SAMPLES_PER_SECOND
    for axes, first, title in ((accelerometer, 0, "accelerometer"), (gyroscope, 3, "gyroscope")):
        axes.plot(seconds, samples[:, first : first + 3], linewidth=0.5, label=["x", "y", "z"])
        axes.set_ylabel(title)
        axes.legend(loc="upper right", ncols=3, fontsize="small")

    predicted = torch.full(truth.shape, torch.nan)
    predicted[-len(stream.probabilities) :] = stream.probabilities.argmax(dim=1).float()
    activity.imshow(
        torch.stack([truth.float(), predicted]),
        cmap=ListedColormap(COLOURS),
        extent=(0, len(samples) / SAMPLES_PER_SECOND, 2, 0),
        aspect="auto",
        interpolation="nearest",
    )
    activity.axhline(1, color="white", linewidth=3)
    activity.set_yticks([0.5, 1.5], ["true", "predicted"])
    patches = [Patch(color=colour, label=name) for name, colour in zip(names, COLOURS, strict=True)]
    figure.legend(handles=patches, loc="outside upper center", ncols=4, frameon=False)

    warm = seconds[-len(stream.probabilities) :]
    probability.stackplot(warm, stream.probabilities.T, colors=COLOURS, linewidth=0)
    probability.set(ylabel="probability", ylim=(0, 1), xlabel="seconds")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def report_accuracy(clip_hits: Tensor, stream_hits: Tensor, truth: Tensor) -> None:
    """Print how often the clip model and the stream were right, with and without transitions."""
    window = len(truth) - len(stream_hits) + 1
    settled = (truth.unfold(0, window, 1) == truth[window - 1 :, None]).all(dim=1)
    print("accuracy (the right answer for a window is the activity of its newest sample)")
    for hits, meaning in (
        (clip_hits, f"forward, the last window of each of the {len(clip_hits)} test recordings"),
        (stream_hits, f"forward_step, all {len(stream_hits)} windows, transitions included"),
        (
            stream_hits[settled],
            f"forward_step, the {settled.sum()} windows that hold one activity only",
        ),
    ):
        print(f"  {hits.float().mean():7.1%}  {meaning}")


def parse_arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200, help="training steps (%(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="rounds of timing (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (%(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("build/activity_stream.png"),
        help="where the picture goes (%(default)s)",
    )
    return parser.parse_args()


def main() -> None:
    """Train, stream, compare, time, draw."""
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    training, test = load_recordings("train"), load_recordings("test")
    mean, deviation = training.clips.mean(dim=(0, 1)), training.clips.std(dim=(0, 1))
    training = training._replace(clips=(training.clips - mean) / deviation)
    normalised = (test.clips - mean) / deviation

    window = 40
    model = ContinualTransformer(
        training.clips.shape[2], len(training.names), window, embed_dim=128, num_heads=8
    )
    train(model, training, arguments.steps)

    model.eval()
    torch.set_num_threads(1)  # there is nothing to share in one token's work
    order = torch.randperm(len(test.clips))
    truth = test.labels[order].repeat_interleave(test.clips.shape[1])
    with torch.inference_mode():
        clip_logits = model(
            normalised[:, -window:], torch.zeros(len(normalised), dtype=torch.int64)
        )
        stream = run_stream(model, normalised[order].flatten(0, 1))
        difference = largest_difference(model, stream)
        rates = steps_per_second(model, stream.tokens, arguments.rounds)

    clip_hits = clip_logits.argmax(dim=1) == test.labels
    stream_hits = stream.probabilities.argmax(dim=1) == truth[window - 1 :]
    report_accuracy(clip_hits, stream_hits, truth)
    print(f"largest difference from nn.MultiheadAttention over {len(stream_hits)} windows")
    print(f"  {difference:7.1e}  where outputs reach {stream.attended.abs().max():.1f}")
    print("steps per second of the attention, one stream on one thread")
    for name, rate in rates.items():
        print(f"  {rate:7.0f}  {name}")
    draw(test.clips[order].flatten(0, 1), truth, stream, test.names, arguments.out)
    print(f"picture: {arguments.out}")


if __name__ == "__main__":
    main()
