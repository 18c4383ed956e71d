"""`mechunlearn explore`: the explorer as a page of this machine."""

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from mechunlearn.cli.options import Device, Dtype, Facts, Forget, Model, Seed
from mechunlearn.cli.shared import console, load


def explore(
    model: Model,
    facts: Facts,
    host: Annotated[str, typer.Option(help="Address of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 for any that is free.", min=0, max=65535)] = 8765,
    remote: Annotated[bool, typer.Option("--remote", help="Allow an address that other machines can reach.")] = False,
    browser: Annotated[bool, typer.Option(help="Open the page in the browser.")] = True,
    mask: Annotated[Path | None, typer.Option(help="A mask file to begin with.")] = None,
    forget: Forget = 64,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
) -> None:
    """Open the explorer of circuits as a page of this machine: see where facts live, click, save a mask.

    Ctrl-C ends it.

    Masks are saved in the folder where the command was started.
    """
    from mechunlearn.explore.server import ExplorerServer

    begun = None
    if mask is not None:
        from mechunlearn.artifacts.mask import ComponentMask

        begun = ComponentMask.load(mask)
    with ExplorerServer(host, port, remote) as server:
        hooked, forgotten, _ = load(model, facts, forget, seed, device, dtype)
        from mechunlearn.explore.state import Workbench

        bench = Workbench(hooked, forgotten, mask=begun)
        with console.status(bench.method.replace("_", " ")):
            bench.view()
        console.print(f"explorer of {len(forgotten)} facts -> {server.url}", soft_wrap=True)
        console.print("Ctrl-C ends it")
        with suppress(KeyboardInterrupt), server.page_for_the_browser() as page:
            if browser:
                import webbrowser

                webbrowser.open(page)
            server.show(bench)
