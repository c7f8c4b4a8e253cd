"""A Gradio page on this machine to try a checkpoint, or to compare two side by side."""

import html
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import modeling_gpt2repro  # noqa: F401 (registers the Auto classes)
from common.models import check_name, find_device, load_model, load_tokenizer
from hub import HubError
from hub.card import describe_progress
from hub.sampling import SamplingParams, encode_prompt, stream_tokens

if TYPE_CHECKING:
    import gradio

_REDRAW_SECONDS = 0.05  # most of the time would go into drawing if every token did
_CANDIDATES = 10


class Writer(NamedTuple):
    """A checkpoint on the page."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def serve(checkpoints: Sequence[str], *, port: int, device: str | None = None, trust_remote_code: bool = False) -> None:
    """Serve the page for one or two checkpoints (folders, or ids on the Hub) at http://127.0.0.1:PORT until Ctrl-C.

    Raises:
        UserError: a checkpoint cannot be opened, the port is not free, or Gradio is not installed.
    """
    if len(checkpoints) > 2:
        raise HubError(f"{len(checkpoints)} checkpoints: the page has room for two")
    if not 1 <= port <= 65535:
        raise HubError(f"--port must be between 1 and 65535, got {port}")
    checkpoints = [check_name(name) for name in checkpoints]
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    for name in ("no_proxy", "NO_PROXY"):  # Gradio asks its own page, and a proxy does not know it
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1", "localhost"]))
    try:
        import gradio as gr
    except ImportError:
        raise HubError('the demo needs Gradio: pip install -e ".[demo]"') from None
    device = find_device(device)
    writers = []
    for name in checkpoints:
        tokenizer, _ = load_tokenizer(name, trust_remote_code=trust_remote_code)
        model = load_model(name, dtype="float32", device=device, trust_remote_code=trust_remote_code)
        writers.append(Writer(name, model.eval(), tokenizer))
    page = build_page(writers)
    # Gradio's default fonts would be loaded from the network.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    try:
        page.launch(server_name="127.0.0.1", server_port=port, theme=theme, quiet=True, prevent_thread_lock=True)
    except OSError as error:
        raise HubError(f"--port {port}: {error}; give another one") from None
    print(f"the demo is at http://127.0.0.1:{port} (Ctrl-C ends it)", flush=True)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        page.close(verbose=False)


def build_page(writers: Sequence[Writer]) -> "gradio.Blocks":
    """Lay out the page: prompt, settings, and for each checkpoint its text and the candidates for the last token."""
    import gradio as gr

    defaults = SamplingParams()
    with gr.Blocks(title="gpt2-repro", analytics_enabled=False) as page:
        gr.Markdown("## What would it write?")
        prompt = gr.Textbox("Hello, I'm a language model,", label="Prompt", lines=3, elem_id="prompt")
        with gr.Row():
            start = gr.Button("Continue", variant="primary", min_width=100, elem_id="continue")
            stop = gr.Button("Stop", min_width=100, elem_id="stop")
        with gr.Accordion("Settings", open=False), gr.Row():
            settings = [
                gr.Slider(0, 2, defaults.temperature, step=0.05, label="temperature (0: greedy)"),
                gr.Slider(0, 200, defaults.top_k, step=1, label="top_k (0: all)"),
                gr.Slider(0.05, 1, defaults.top_p, step=0.05, label="top_p"),
                gr.Slider(1, 500, defaults.max_new_tokens, step=1, label="new tokens"),
                gr.Number(defaults.seed, precision=0, minimum=0, label="seed"),
            ]
        outputs: list[gr.Component] = []
        with gr.Row():
            for i, writer in enumerate(writers):
                with gr.Column():
                    gr.HTML(_describe(writer), padding=False, elem_id=f"model-{i}")
                    # Texts of the same height, so that the candidates below them start at the same one.
                    text = gr.Textbox(label="Text", show_label=False, lines=16, max_lines=16, elem_id=f"text-{i}")
                    outputs.append(text)
                    title = "the last token (in brackets), and its alternatives"
                    outputs.append(gr.Label(label=title, show_heading=False, elem_id=f"next-{i}"))

        def write(prompt: str, *values: float) -> Iterator[list[object]]:
            """Yield the values of all outputs. One checkpoint writes after the other: they share a random state."""
            shown: list[object] = [None] * len(outputs)
            for i, writer in enumerate(writers):
                drawn = 0.0
                for text_and_candidates in _continue(writer, prompt, *values):
                    shown[2 * i : 2 * i + 2] = text_and_candidates
                    if time.monotonic() - drawn > _REDRAW_SECONDS:
                        yield [*shown]
                        drawn = time.monotonic()
                yield [*shown]

        running = start.click(write, [prompt, *settings], outputs, show_progress="hidden", concurrency_limit=1)
        stop.click(None, cancels=[running])
    return page


def _describe(writer: Writer) -> str:
    """Return HTML that says what a model is: its name, its shape, and what its run recorded about the checkpoint."""
    formats = {  # of transformers' common names, which some models on the Hub do not have
        "num_hidden_layers": ", {:,} layers",
        "hidden_size": " x {:,} wide",
        "max_position_embeddings": ", context of {:,} tokens",
    }
    values = {name: getattr(writer.model.config, name, None) for name in formats}
    shape = "".join(formats[name].format(value) for name, value in values.items() if value is not None)
    lines = [f"{writer.model.num_parameters() / 1e6:,.1f}M parameters{shape}"]
    folder = Path(writer.name)
    lines += describe_progress(folder) if folder.is_dir() else []
    name, *lines = map(html.escape, [writer.name, *lines])
    return f'<div style="overflow-wrap: anywhere"><b>{name}</b><br>{"<br>".join(lines)}</div>'


def _continue(
    writer: Writer, prompt: str, temperature: float, top_k: float, top_p: float, max_new_tokens: float, seed: float
) -> Iterator[tuple[str, dict[str, float] | None]]:
    """Yield (prompt and text so far, candidates for the last token), after each token and at the end."""
    _, model, tokenizer = writer
    tokens: list[int] = []
    candidates = None
    try:
        if None in (temperature, top_k, top_p, max_new_tokens, seed):
            raise HubError("a field is empty: give it a number")
        params = SamplingParams(
            temperature=temperature, top_k=int(top_k), top_p=top_p, max_new_tokens=int(max_new_tokens), seed=int(seed)
        )
        for token, probabilities in stream_tokens(model, encode_prompt(tokenizer, prompt, model.config), params):
            tokens.append(token)
            candidates = _candidates(tokenizer, probabilities, token)
            # A character whose bytes are spread over several tokens is shown once it is complete.
            yield prompt + str(tokenizer.decode(tokens)).rstrip("\N{REPLACEMENT CHARACTER}"), candidates
        yield prompt + (str(tokenizer.decode(tokens)) if tokens else " (ends here)"), candidates
    except HubError as error:
        yield f"error: {error}", None


def _candidates(tokenizer: PreTrainedTokenizerBase, probabilities: torch.Tensor, chosen: int) -> dict[str, float]:
    """Return {text: probability} of the most probable tokens and of the chosen one, in brackets. probabilities: [V]."""
    candidates = {}
    top = probabilities.topk(min(_CANDIDATES, len(probabilities))).indices.tolist()
    for token in top if chosen in top else [*top, chosen]:
        text = str(tokenizer.decode([token]))
        if "\N{REPLACEMENT CHARACTER}" in text:  # part of a character: show the token's name in the vocabulary
            text = str(tokenizer.convert_ids_to_tokens(token))
        text = text.replace("\n", "\u21b5").replace(" ", "\u00b7")
        candidates[f"[{text}]" if token == chosen else text] = probabilities[token].item()
    return candidates
