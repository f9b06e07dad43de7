"""The web page of `eigenlorax app` as a Hugging Face Space: README.md beside this file says how to make one."""

import os
from contextlib import suppress

from eigenlorax.app.server import running, wait
from eigenlorax.app.settings import PORT

# a Space is reached from outside its container, at this port
port = int(os.environ.get("GRADIO_SERVER_PORT", PORT))
with suppress(KeyboardInterrupt), running("0.0.0.0", port) as url:
    print(f"The page is at {url}", flush=True)
    wait()
