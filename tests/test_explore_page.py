"""The explorer as a page: this machine only, text as text, and what a click changes, in a real browser."""

import http.client
import json
import re
import socket
import struct
import threading
import urllib.parse
import urllib.request
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from mechunlearn import ComponentMask, MechunlearnError
from mechunlearn.explore.server import ExplorerServer
from mechunlearn.explore.state import Workbench
from mechunlearn.localize import attribution_patching
from mechunlearn.world.toy import planted_facts
from tests.browser import chromium, needs_browser, screenshots

EVIL = "<script>document.title='hacked'</script>"


@contextmanager
def serving(bench: Workbench):
    with ExplorerServer(port=0) as server:
        thread = threading.Thread(target=server.show, args=(bench,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def toy() -> Workbench:
    made = planted_facts()
    return Workbench(made.model, made.prompts())


def asked(server, method: str = "POST", path: str = "/act", body: str = '{"do": "clear"}', **headers: str):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
    given = {"X-Explorer-Key": server.key} | {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, given)
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), dict(answer.getheaders())


class TestAddress:
    def test_only_this_machine_unless_told(self):
        for host in ("0.0.0.0", "::", "192.168.0.1", "example.org", ""):
            with pytest.raises(MechunlearnError, match="can be reached from other machines.*--remote"):
                ExplorerServer(host, 0)
        with ExplorerServer("0.0.0.0", 0, remote=True) as server:
            assert server.server_address[0] == "0.0.0.0"
        for host in ("127.0.0.1", "localhost", "127.0.0.2"):
            with ExplorerServer(host, 0) as server:
                assert server.server_address[0].startswith("127.")

    def test_a_taken_port_is_told_in_one_line(self):
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            port = other.getsockname()[1]
            with pytest.raises(
                MechunlearnError, match=f"Cannot open port {port} of 127.0.0.1: another program uses it.*--port"
            ):
                ExplorerServer(port=port)

    def test_the_command_refuses_before_a_model_is_loaded(self, call, monkeypatch):
        monkeypatch.setattr("mechunlearn.cli.explore.load", lambda *_: pytest.fail("loaded"))
        code, _, err = call("explore", "factworld", "factworld/sport", "--host", "0.0.0.0")
        assert code == 2 and "--remote" in err and len(err.strip().splitlines()) == 1
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            code, _, err = call("explore", "factworld", "factworld/sport", "--port", other.getsockname()[1])
        assert code == 2 and "another program uses it" in err

    def test_the_command_prints_the_address_and_ends_with_ctrl_c(self, call, monkeypatch):
        shown: list = []

        def show(server, bench):
            shown.append((server, bench))
            raise KeyboardInterrupt

        monkeypatch.setattr(ExplorerServer, "show", show)
        code, out, err = call("explore", "factworld", "factworld/sport", "--port", 0, "--no-browser", "--forget", 5)
        assert code == 0, err
        server, bench = shown[0]
        assert server.url in out and len(bench.prompts) == 5 and server.key in server.url
        ComponentMask.of(["L1.mlp.out"], bench.model.signature).save("begun.mask.json")
        code, _, err = call(
            "explore", "factworld", "factworld/sport", "--port", 0, "--no-browser", "--mask", "begun.mask.json"
        )
        assert code == 0 and len(shown[1][1].mask) == 384, err
        code, _, err = call("explore", "factworld", "factworld/sport", "--port", 0, "--mask", "none.json")
        assert code == 2 and "none.json" in err and len(err.strip().splitlines()) == 1

    def test_the_browser_is_started_without_the_key(self, call, monkeypatch):
        """All users of a machine can see the arguments of a program."""
        opened: list = []

        def show(server, bench):
            path = Path(urllib.request.url2pathname(urllib.parse.urlparse(opened[0]).path))
            opened.append((path.read_text(), path.parent.stat().st_mode & 0o777, server.url, path))
            raise KeyboardInterrupt

        monkeypatch.setattr(ExplorerServer, "show", show)
        monkeypatch.setattr("webbrowser.open", opened.append)
        code, _, err = call("explore", "factworld", "factworld/sport", "--port", 0, "--forget", 5)
        assert code == 0, err
        page, mode, url, path = opened[1]
        assert "key" not in opened[0] and opened[0].startswith("file://") and mode == 0o700
        assert f"url={url}" in page and not path.exists(), "and it is gone when the explorer ends"

    def test_a_closed_tab_is_no_traceback(self, toy, capfd):
        with serving(toy) as server:
            for _ in range(3):
                with socket.create_connection(("127.0.0.1", server.server_port)) as tab:
                    tab.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    tab.sendall(
                        f"GET /?key={server.key} HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\n\r\n".encode()
                    )
            assert asked(server)[0] == 200
        assert "Traceback" not in capfd.readouterr().err

    def test_without_the_key_nothing_is_answered(self, toy):
        with serving(toy) as server:
            assert asked(server)[0] == 200
            assert asked(server, X_Explorer_Key="wrong")[0] == 403
            assert asked(server, X_Explorer_Key="")[0] == 403
            for path in ("/", "/?key=wrong", "/act", "/etc/passwd", "//", f"/x?key={server.key}"):
                status, text, _ = asked(server, "GET", path)
                assert status == 403 and "facts" not in text
            status, page, headers = asked(server, "GET", f"/?key={server.key}")
            assert status == 200 and "<main" in page
            assert "default-src 'none'" in headers["Content-Security-Policy"]

    def test_a_page_of_another_name_is_not_answered(self, toy):
        with serving(toy) as server:
            assert asked(server, Host="evil.example")[0] == 403
            assert asked(server, "GET", f"/?key={server.key}", Host=f"evil.example:{server.server_port}")[0] == 403
            assert asked(server, Host=f"localhost:{server.server_port}")[0] == 200

    def test_nonsense_is_refused(self, toy):
        with serving(toy) as server:
            assert asked(server, body="{not json")[0] == 400
            assert asked(server, body="x" * 70_000)[0] == 400
            assert asked(server, body="[" * 60_000)[0] == 400, "deep JSON is no traceback"
            status, text, _ = asked(server, body="[1, 2]")
            assert status == 200 and "does not know" in json.loads(text)["error"]
            assert "does not know" in json.loads(asked(server, body='{"do": "__init__"}')[1])["error"]

    def test_facts_are_data_in_the_page(self, toy):
        evil = replace(toy.prompts, queries=())
        assert evil.queries == ()
        bench = Workbench(toy.model, toy.prompts)
        page_of = "</script><script>alert(1)</script>"
        bench.method = "attribution_patching"
        with serving(bench) as server:
            bench._told = lambda prompts, i: {"before": page_of, "subject": EVIL, "after": "", "answer": ""}  # type: ignore[method-assign]
            page = asked(server, "GET", f"/?key={server.key}")[1]
        assert page_of not in page and EVIL not in page and page.count("<script") == 1


def evil_facts(world, sport):
    forget = sport[0].select(range(8))
    told = list(forget.queries)
    for i in (0, 1):
        told[i] = replace(told[i], prompt=told[i].prompt.replace(told[i].subject, EVIL), subject=EVIL)
    return replace(forget, queries=tuple(told))


@needs_browser
class TestInABrowser:
    @pytest.mark.parametrize("scheme", ["light", "dark"])
    @pytest.mark.parametrize("width", [1280, 390])
    def test_it_works_and_looks_right(self, world, sport, tmp_path, monkeypatch, scheme, width):
        monkeypatch.chdir(tmp_path)
        facts = evil_facts(world, sport)
        bench = Workbench(world, facts)
        complaints: list[str] = []
        with serving(bench) as server, chromium() as browser:
            page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 900})
            page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on(
                "request",
                lambda request: (
                    complaints.append(request.url)
                    if server.url[:20] not in request.url and not request.url.startswith("data:")
                    else None
                ),
            )
            page.goto(server.url)
            ready = page.locator(".mu-explorer:not(.busy)")
            page.locator('[data-component="L1.mlp.out"]').first.click()
            page.locator(".detail h3", has_text="L1.mlp.out").wait_for()
            told = bench.detail("L1.mlp.out")
            assert f"{told['effect']:+.3g}"[:5] in page.locator(".detail dl").inner_text()
            shown = page.locator(".facts").inner_text()
            assert EVIL in shown and page.title() == "mechunlearn explorer", "a fact is text"
            page.locator(".toggle").click()
            page.locator(".mask .total", has_text="384").wait_for()
            page.locator('[data-do="take"]').click()
            page.locator(".mask .total", has_text="%").wait_for()
            ready.wait_for()
            expected = attribution_patching(world, facts).top(weights=0.05)
            assert bench.mask == expected
            page.locator('[data-do="save"]').click()
            page.locator(".said", has_text="explored.mask.json").wait_for()
            assert ComponentMask.load(tmp_path / "explored.mask.json") == expected
            page.locator('[data-do="faithfulness"]').click()
            page.locator(".faithful", has_text=re.compile(r"\[")).wait_for()
            page.get_by_label("map").select_option("head")
            page.locator("th", has_text="head 7").wait_for()
            page.locator('[data-component="L5.attn.o[1]"]').first.click()
            page.locator(".attention").wait_for()
            page.screenshot(path=screenshots(tmp_path) / f"explore-{scheme}-{width}.png", full_page=True)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing is cut off at the side"
            background, text = (
                page.evaluate(f"getComputedStyle(document.documentElement).{of}") for of in ("backgroundColor", "color")
            )
            assert background != text
        assert not complaints, complaints

    def test_what_is_clicked_while_it_works_is_done_after(self, monkeypatch):
        """All of it and in order; of components to look at, the last."""
        made, go, done = planted_facts(), threading.Event(), []
        bench = Workbench(made.model, made.prompts())

        def slow(message, act=bench.act):
            go.wait(60)
            done.append(message)
            return act(message)

        monkeypatch.setattr(bench, "act", slow)
        with serving(bench) as server, chromium() as browser:
            page = browser.new_page()
            page.goto(server.url)
            page.locator('[data-do="clear"]').click()
            page.locator(".mu-explorer.busy").wait_for()
            page.locator('[data-do="take"]').click()
            cells = page.locator(".cell")
            for i in range(3):
                cells.nth(i).click()
            go.set()
            page.locator(".detail h3").wait_for()
            page.locator(".mu-explorer:not(.busy)").wait_for()
            assert [message["do"] for message in done] == ["clear", "take", "show"]
            assert done[-1]["component"] == cells.nth(2).get_attribute("data-component")
            assert len(bench.mask)

    def test_when_the_program_has_ended_the_page_says_so(self, toy):
        with chromium() as browser:
            page = browser.new_page()
            with serving(toy) as server:
                page.goto(server.url)
                page.locator(".cell").first.wait_for()
            server.server_close()
            page.locator(".cell").first.click()
            page.locator(".error", has_text="has ended").wait_for()
