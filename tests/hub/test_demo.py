"""The demo's page, in a real browser."""

import contextlib
import html
import re
import shutil
import socket
import subprocess
import sys
import time

import pytest
from tiny_run import ROOT, clean_environment

from hub import demo
from hub.__main__ import main
from hub.sampling import SamplingParams, generate

# Chromium's own requests: without a network, each of them waits for a timeout.
_QUIET = ("background-networking", "component-update", "sync", "quic", "default-apps", "extensions", "gpu")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no chromium with chromedriver: the page was not opened in a browser")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    switches = ("headless", "no-sandbox", "no-first-run", "window-size=1400,900")
    for switch in (
        *switches,
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
        *(f"disable-{q}" for q in _QUIET),
    ):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


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


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(Exception):  # the element is being redrawn
            if result := condition():
                return result
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} seconds")


def test_two_checkpoints_continue_a_prompt(browser, page, model, tokenizer):
    from selenium.webdriver.common.by import By

    def text(element):
        return browser.find_element(By.ID, element).text

    browser.get(page)
    box = until(lambda: browser.find_element(By.CSS_SELECTOR, "#prompt textarea"))
    box.clear()
    box.send_keys("The meaning of life is")
    browser.find_element(By.ID, "continue").click()
    early = until(lambda: len(text("text-0")) > len("The meaning of life is") and text("text-0"))
    ids = tokenizer("The meaning of life is").input_ids
    expected = ("The meaning of life is" + tokenizer.decode(generate(model, ids, SamplingParams()))).split()
    until(lambda: text("text-0").split() == expected)
    until(lambda: text("text-1").split() == expected)  # the same checkpoint, the same seed
    assert early.split() != expected  # the page shows the text while it grows
    rows = browser.find_elements(By.CSS_SELECTOR, "#next-0 .row")
    assert 10 <= len(rows) <= 11
    percentages = [float(row.text.split()[-1].rstrip("%")) for row in rows]
    assert percentages[:10] == sorted(percentages[:10], reverse=True)
    assert len(browser.find_elements(By.CSS_SELECTOR, "#next-0 .chosen")) == 1
    problems = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not [entry for entry in problems if "favicon" not in entry["message"]], problems


def test_prompt_is_escaped_and_a_long_one_is_an_error(browser, page):
    from selenium.webdriver.common.by import By

    browser.get(page)
    box = until(lambda: browser.find_element(By.CSS_SELECTOR, "#prompt textarea"))
    box.clear()
    box.send_keys("<img src=x onerror=alert(1)> & <b>bold</b>")
    browser.find_element(By.ID, "continue").click()
    until(lambda: "<b>bold</b>" in browser.find_element(By.ID, "text-0").text)
    assert not browser.find_elements(By.CSS_SELECTOR, "#text-0 img, #text-0 b")
    browser.find_element(By.ID, "stop").click()
    box.clear()
    box.send_keys("a b c d e f g h " * 20)
    browser.find_element(By.ID, "continue").click()
    until(lambda: "the model's context 128" in browser.find_element(By.ID, "text-1").text)


def test_page_shows_text_and_candidates(model, tokenizer):
    """The page's function, called as Gradio calls it: (text, candidates) of two checkpoints, one after the other."""
    pytest.importorskip("gradio")
    page = demo.build_page([("a", model, tokenizer), ("b", model, tokenizer)])
    write = next(iter(page.fns.values())).fn
    prompt, params = "I <b>", SamplingParams(seed=1, max_new_tokens=20)
    values = (params.temperature, params.top_k, params.top_p, params.max_new_tokens, params.seed)
    *_, shown = write(prompt, *values)
    tokens = generate(model, tokenizer(prompt).input_ids, params)
    expected = f'<span class="prompt">I &lt;b&gt;</span>{html.escape(tokenizer.decode(tokens))}</div>'
    assert shown[0] == shown[2] and shown[0].endswith(expected)
    assert shown[1] == shown[3] and shown[1].count('class="row chosen"') == 1
    percentages = [float(number) for number in re.findall(r"<span>([\d.]+)%</span>", shown[1])]
    assert 10 <= len(percentages) <= 11 and percentages[:10] == sorted(percentages[:10], reverse=True)
    *_, shown = write(prompt, -1, *values[1:])
    assert "failed" in shown[0] and "temperature must be at least 0, got -1" in shown[0]


def test_demo_binds_localhost_only(page):
    port = int(page.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=10):
        pass
    with pytest.raises(OSError):  # another of this machine's addresses
        socket.create_connection(("127.0.0.2", port), timeout=10)


def test_mistakes_end_with_one_line(checkpoint, page, capsys):
    assert main(["demo", str(checkpoint), "nowhere at all"]) == 2
    assert "no such folder, nor a Hub id" in capsys.readouterr().err
    assert main(["demo", *[str(checkpoint)] * 3]) == 2
    assert "the page has room for two" in capsys.readouterr().err
    for port in ("0", "65536", "-1"):
        assert main(["demo", str(checkpoint), "--port", port]) == 2
        assert f"--port must be between 1 and 65535, got {port}" in capsys.readouterr().err
    port = page.rpartition(":")[2]
    assert main(["demo", str(checkpoint), "--port", port, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert f"--port {port}" in error and error.count("\n") == 1


@pytest.mark.parametrize("flags", [[], ["--trust_remote_code"]])
def test_code_from_the_hub_runs_only_with_the_flag(trust_requests, flags):
    pytest.importorskip("gradio")
    requests = trust_requests(demo)
    assert main(["demo", "me/x", "--device", "cpu", *flags]) == 2
    assert requests == [bool(flags)] * 2
