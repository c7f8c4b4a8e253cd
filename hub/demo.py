"""A page on this machine to try a checkpoint, or two side by side, made with Gradio."""

import html
import os
import time

import modeling_gpt2repro  # noqa: F401 (the Auto classes know it then)
from eval.checkpoint import check_name, load_model, load_tokenizer
from eval.command import find_device
from hub import HubError
from hub.continuation import Settings, continuation, encode_prompt, text_pieces, top_tokens

_REDRAW_SECONDS = 0.05  # a page that is drawn anew for every token is what takes the time
_CSS = """
.token-bars {font-family: monospace; font-size: 0.9em}
.token-bars .row {display: flex; align-items: center; gap: 0.6em; margin: 2px 0}
.token-bars .text {width: 9em; white-space: pre; overflow: hidden; text-overflow: ellipsis; text-align: right}
.token-bars .bar {height: 0.9em; background: #4f7cac; border-radius: 2px}
.token-bars .chosen .bar {background: #d9822b}
.continued {white-space: pre-wrap; overflow-wrap: anywhere; min-height: 12em; font-size: 1.05em; line-height: 1.5}
.continued .prompt {opacity: 0.6}
.failed {color: #b3261e}
"""


def serve(checkpoints, *, port, device=None, trust_remote_code=False):
    """
    Shows the page until Ctrl-C.

    Args:
        checkpoints: one or two: folders, or ids on the Hub.
        port: on this machine alone.
        device: as for `eval.command.find_device`.
        trust_remote_code: run the modeling code of a model from the Hub.

    Raises:
        HubError, EvalError: a checkpoint that cannot be opened, a port that is taken, no Gradio.
    """
    if len(checkpoints) > 2:
        raise HubError(f"{len(checkpoints)} checkpoints: the page has room for two")
    if not 1 <= port <= 65535:
        raise HubError(f"--port must be between 1 and 65535, got {port}")
    checkpoints = [check_name(name) for name in checkpoints]
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nothing of this is anybody else's business
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise HubError('the demo needs Gradio: pip install -e ".[demo]"') from None
    device, _ = find_device(device)
    models = []
    for name in checkpoints:
        tokenizer, _ = load_tokenizer(name, trust_remote_code=trust_remote_code)
        model = load_model(name, dtype="float32", device=device, trust_remote_code=trust_remote_code)
        models.append((name, model.eval(), tokenizer))
    page = build_page(models)
    try:
        page.launch(
            server_name="127.0.0.1", server_port=port, css=_CSS, theme=_theme(), quiet=True, prevent_thread_lock=True
        )
    except OSError as error:
        raise HubError(f"--port {port}: {error}; give another one") from None
    print(f"the demo is at http://127.0.0.1:{port} (Ctrl-C ends it)", flush=True)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        page.close(verbose=False)


def _theme():
    import gradio as gr

    # The default's fonts would be asked for on the network.
    return gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def build_page(models):
    """
    Args:
        models: list of (name, model, tokenizer).

    Returns:
        gradio.Blocks
    """
    import gradio as gr

    defaults = Settings()
    with gr.Blocks(title="gpt2-repro", analytics_enabled=False) as page:
        gr.Markdown("## What would it write?")
        prompt = gr.Textbox("Hello, I'm a language model,", label="Prompt", lines=3, elem_id="prompt")
        with gr.Row():
            go = gr.Button("Continue", variant="primary", elem_id="continue")
            stop = gr.Button("Stop", elem_id="stop")
        with gr.Accordion("Settings", open=False), gr.Row():
            temperature = gr.Slider(0, 2, defaults.temperature, step=0.05, label="temperature (0: greedy)")
            top_k = gr.Slider(0, 200, defaults.top_k, step=1, label="top_k (0: all)")
            top_p = gr.Slider(0.05, 1, defaults.top_p, step=0.05, label="top_p")
            max_new_tokens = gr.Slider(1, 500, defaults.max_new_tokens, step=1, label="new tokens")
            seed = gr.Number(defaults.seed, precision=0, minimum=0, label="seed")
        texts, bars = [], []
        with gr.Row():
            for i, (name, *_) in enumerate(models):
                with gr.Column():
                    gr.Markdown(f"**{name}**")
                    with gr.Row():
                        with gr.Column(scale=3, min_width=200):
                            texts.append(gr.HTML(elem_id=f"text-{i}"))
                        with gr.Column(scale=2, min_width=200):
                            bars.append(gr.HTML(elem_id=f"next-{i}"))

        def write(prompt, *values):
            temperature, top_k, top_p, max_new_tokens, seed = values
            settings = Settings(temperature, int(top_k), top_p, int(max_new_tokens), int(seed))
            yield from _side_by_side(models, prompt, settings)

        running = go.click(
            write,
            [prompt, temperature, top_k, top_p, max_new_tokens, seed],
            [*texts, *bars],
            show_progress="hidden",
        )
        stop.click(None, cancels=[running])
    return page


def _side_by_side(models, prompt, settings):
    """[texts, then bars] to draw: the models write in turns, a token each, until all have ended."""
    texts, bars = [""] * len(models), [""] * len(models)
    writing = {i: _drawings(*model, prompt, settings) for i, model in enumerate(models)}
    drawn = time.monotonic()
    while writing:
        for i, drawings in list(writing.items()):
            drawing = next(drawings, None)
            if drawing is None:
                del writing[i]
            else:
                texts[i], bars[i] = drawing
        if time.monotonic() - drawn > _REDRAW_SECONDS:
            yield [*texts, *bars]
            drawn = time.monotonic()
    yield [*texts, *bars]


def _drawings(name, model, tokenizer, prompt, settings):
    """(text so far, the last token's rivals) as HTML, after each token."""
    head = f'<span class="prompt">{html.escape(prompt)}</span>'
    try:
        settings.check()
        prompt_ids = encode_prompt(tokenizer, prompt, model.config)
    except HubError as error:
        yield f'<div class="continued failed">{html.escape(str(error))}</div>', ""
        return
    steps = []

    def tokens():
        for step in continuation(model, prompt_ids, settings):
            steps.append(step)
            yield step.token

    text = ""
    try:
        for piece in text_pieces(tokenizer, tokens()):
            text += piece
            yield f'<div class="continued">{head}{html.escape(text)}</div>', _bars(tokenizer, steps[-1])
    except HubError as error:
        yield f'<div class="continued failed">{html.escape(str(error))}</div>', ""
        return
    if not steps:
        yield f'<div class="continued">{head} (ends here)</div>', ""


def _bars(tokenizer, step):
    """The most probable tokens at the place of the last one, which is marked."""
    rows = ["<div>the last token, and its rivals</div>"]
    rivals = top_tokens(tokenizer, step.probabilities)
    if step.token not in {token for _, token, _ in rivals}:
        rivals.append((tokenizer.decode([step.token]), step.token, step.probabilities[step.token].item()))
    for text, token, p in rivals:
        shown = html.escape(text.replace("\n", "\u21b5").replace(" ", "\u00b7"))
        kind = "row chosen" if token == step.token else "row"
        rows.append(
            f'<div class="{kind}"><span class="text">{shown}</span>'
            f'<span class="bar" style="width: {100 * p:.1f}px"></span><span>{100 * p:.1f}%</span></div>'
        )
    return f'<div class="token-bars">{"".join(rows)}</div>'
