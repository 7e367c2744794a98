"""The page that `wm-export web` writes, in headless Chromium, with no address but the folder's own."""

import json
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from export.errors import ExportError
from export.targets.base import write_artifact
from export.targets.web import WEB, WebOptions
from test_clients import conftest
from test_clients.conftest import NODE_MODULES, PROMPTS, needs_npm

COUNT = 16


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        pass


@pytest.fixture
def browser():
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.skip("needs chromium and chromedriver: apt install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    # WebGPU is computed by SwiftShader, on the processor.
    software = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan")
    offline = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    for argument in ("--headless=new", "--no-sandbox", "--ignore-gpu-blocklist", offline, *software):
        options.add_argument(argument)
    options.binary_location = shutil.which("chromium") or ""
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_script_timeout(120)
    yield driver
    driver.quit()


def run_page(driver, folder, prompt: str, device: str = "wasm") -> list[int]:
    """The ids that the page in `folder` writes after `prompt` on `device`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        driver.get(f"http://127.0.0.1:{server.server_port}/index.html?device={device}")
        found = driver.execute_async_script(
            """
            const [prompt, count, answer] = arguments, wait = (what) => new Promise((done) => {
              const look = () => document.body.dataset.failed || what() ? done() : setTimeout(look, 50);
              look();
            });
            const at = (id) => document.getElementById(id);
            wait(() => document.body.dataset.device).then(() => {
              at("prompt").value = prompt;
              at("tokens").value = count;
              at("run").click();
              return wait(() => at("output").dataset.ids);
            }).then(() => answer([document.body.dataset.failed, at("output").dataset.ids, at("status").textContent]));
            """,
            prompt,
            COUNT,
        )
    finally:
        server.shutdown()
    failed, ids, status = found
    assert failed is None, failed
    assert f"tokens/s on {device}" in status
    return json.loads(ids)


@needs_npm("@huggingface/transformers")
def test_the_page_writes_the_engines_ids(browser, hf_layout, shipped, tmp_path, expected):
    """With the graph that is not quantised, whose ids are the engine's."""
    options = WebOptions(quantize="none", max_length=128, runtime=NODE_MODULES)
    written = write_artifact(WEB, "doge-3m", tmp_path / "page", options)
    assert all(found.passed for found in written.comparisons)
    for device in ("wasm", "webgpu"):
        assert run_page(browser, tmp_path / "page", PROMPTS[0], device) == expected[0][:COUNT]


@pytest.mark.slow
@needs_npm("@huggingface/transformers")
def test_the_shipped_page_is_small_and_four_bits_write_text(browser, tmp_path):
    write_artifact(WEB, "doge-3m", tmp_path / "page", WebOptions(max_length=128, runtime=NODE_MODULES))
    model = tmp_path / "page" / "model"
    assert sum(path.stat().st_size for path in model.rglob("*") if path.is_file()) < 4e6
    script = "transformers_js.mjs"
    ids = conftest.run_node(script, model, COUNT, json.dumps([PROMPTS[0]]))[0]
    assert run_page(browser, tmp_path / "page", PROMPTS[0]) == ids


def test_a_missing_library_is_named(tmp_path):
    with pytest.raises(ExportError, match=r"transformers\.min\.js: no such file; npm install"):
        write_artifact(WEB, "doge-3m", tmp_path / "page", WebOptions(runtime=tmp_path))
    assert not (tmp_path / "page").exists()
