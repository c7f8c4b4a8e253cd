"""The demo's page, in a real browser."""

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time

import pytest
from tiny_run import ROOT, clean_environment

from hub import demo
from hub.__main__ import main
from hub.card import describe_progress
from hub.sampling import SamplingParams, stream_tokens

PROMPT = "The <b>meaning</b> of life is"
SWITCHES = (
    *("headless", "no-sandbox", "no-first-run", "window-size=1400,900"),
    # Chromium's own requests: without a network, each of them waits for a timeout.
    *("disable-background-networking", "disable-component-update", "disable-sync", "disable-quic"),
    *("disable-default-apps", "disable-extensions", "disable-gpu"),
)


@pytest.fixture(scope="module")
def page(checkpoint, tmp_path_factory):
    """Address of a running demo that shows one checkpoint twice."""
    pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "hub", "demo", checkpoint, checkpoint, "--port", str(port), "--device", "cpu"],
        cwd=ROOT,
        env=clean_environment(tmp_path_factory.mktemp("home")) | {"OMP_NUM_THREADS": "1"},  # as in this process
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == f"the demo is at http://127.0.0.1:{port} (Ctrl-C ends it)\n"
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(20)


class Browser:
    """A page in Chromium."""

    def __init__(self, driver, page):
        self.driver = driver
        driver.get(page)
        self.prompt = until(lambda: self.find("#prompt textarea")[0])

    def find(self, selector):
        return self.driver.find_elements("css selector", selector)

    def text(self, i):
        [element] = self.find(f"#text-{i} textarea")
        return element.get_attribute("value")

    def start(self, prompt):
        self.prompt.clear()
        self.prompt.send_keys(prompt)
        self.click("continue")

    def click(self, button):
        self.driver.find_element("id", button).click()


@pytest.fixture(scope="module")
def browser(page, tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no chromium with chromedriver: the page was not opened in a browser")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for switch in (*SWITCHES, f"user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield Browser(chrome, page)
    chrome.quit()


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(Exception):  # the element is being redrawn
            if result := condition():
                return result
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} seconds")


def test_two_checkpoints_continue_a_prompt(browser, model, tokenizer):
    tokens = [token for token, _ in stream_tokens(model, tokenizer(PROMPT).input_ids, SamplingParams())]
    expected = PROMPT + tokenizer.decode(tokens)
    browser.start(PROMPT)
    early = until(lambda: len(browser.text(0)) > len(PROMPT) and browser.text(0))
    until(lambda: browser.text(0).split() == expected.split())
    until(lambda: browser.text(1).split() == expected.split())  # the same checkpoint, the same seed
    assert early.split() != expected.split()  # the page shows the text while it grows
    lines = until(lambda: browser.find("#next-0")[0].text).splitlines()
    percentages = [line for line in lines if line.endswith("%")]
    assert 10 <= len(percentages) <= 11
    problems = [entry for entry in browser.driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert not [entry for entry in problems if "favicon" not in entry["message"]], problems


def test_page_says_what_each_model_is_and_fits_a_phone(browser, checkpoint, model):
    [description] = browser.find("#model-1")
    assert description.text.splitlines() == [
        str(checkpoint),
        f"{model.num_parameters() / 1e6:.1f}M parameters, 2 layers x 64 wide, context of 128 tokens",
        "step 20, 5,120 tokens, validation loss 3.2924",
        "trained on HuggingFaceFW/fineweb-edu, sample-10BT",
    ]
    columns = [browser.find(f"#text-{i}")[0] for i in range(2)]
    assert columns[0].rect["y"] == columns[1].rect["y"]  # side by side
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        until(lambda: columns[1].rect["y"] >= columns[0].rect["y"] + columns[0].rect["height"])  # one below the other
        assert browser.driver.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
        for button in ("continue", "stop"):
            rect = browser.driver.find_element("id", button).rect
            assert rect["x"] >= 0 and rect["x"] + rect["width"] <= 390 and rect["y"] + rect["height"] <= 844
    finally:
        browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_stop_button_and_the_error_for_a_long_prompt(browser):
    browser.start("Once upon a time")
    until(lambda: browser.text(0).startswith("Once upon a time"))
    browser.click("stop")
    browser.start("a b c d e f g h " * 20)
    until(lambda: "the model's context 128" in browser.text(1))


def test_page_shows_text_and_candidates(model, tokenizer):
    """The page's function, called as Gradio calls it: (text, candidates) of two checkpoints, one after the other."""
    pytest.importorskip("gradio")
    page = demo.build_page([demo.Writer("a", model, tokenizer), demo.Writer("b", model, tokenizer)])
    write = next(iter(page.fns.values())).fn
    params = SamplingParams(seed=1, max_new_tokens=20)
    values = (params.temperature, params.top_k, params.top_p, params.max_new_tokens, params.seed)
    *_, (text, candidates, *others) = write(PROMPT, *values)
    tokens = [token for token, _ in stream_tokens(model, tokenizer(PROMPT).input_ids, params)]
    assert text == PROMPT + tokenizer.decode(tokens) and others == [text, candidates]
    probabilities = list(candidates.values())
    assert 10 <= len(probabilities) <= 11 and probabilities[:10] == sorted(probabilities[:10], reverse=True)
    assert len([name for name in candidates if name.startswith("[") and name.endswith("]")]) == 1
    *_, (text, *_) = write(PROMPT, -1, *values[1:])
    assert text == "error: temperature must be 0 or at least 1e-6, got -1"


def test_progress_is_left_out_where_it_is_not_known(checkpoint, standalone):
    """Outside its run, a checkpoint has its step, but not its data; a damaged one has neither."""
    state = {"step": 20, "tokens": 5120, "val_loss": None}
    (standalone / "training_state").mkdir()
    (standalone / "training_state" / "state.json").write_text(json.dumps(state))
    assert describe_progress(standalone) == ["step 20, 5,120 tokens"]
    assert describe_progress(checkpoint)[1:] == ["trained on HuggingFaceFW/fineweb-edu, sample-10BT"]
    (standalone / "training_state" / "state.json").write_text("{")
    assert describe_progress(standalone) == []


def test_demo_binds_localhost_only(page):
    port = int(page.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=10):
        pass
    with pytest.raises(OSError):  # another of this machine's addresses
        socket.create_connection(("127.0.0.2", port), timeout=10)


def test_taken_port_ends_with_one_line(checkpoint, page, capsys):
    assert main(["demo", str(checkpoint), "--port", page.rpartition(":")[2], "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "give another one" in error and error.count("\n") == 1


@pytest.mark.parametrize("flags", [[], ["--trust_remote_code"]])
def test_code_from_the_hub_runs_only_with_the_flag(trust_requests, flags):
    pytest.importorskip("gradio")
    requests = trust_requests(demo)
    assert main(["demo", "me/x", "--device", "cpu", *flags]) == 2
    assert requests == [bool(flags)] * 2
