"""The program that `check` runs for a chat template: render a talk as `transformers` does.

Limits its own time and memory. Reads JSON from standard input: the text of `chat_template.jinja`, or null, and the
settings of the tokenizer. Ends with 0 where it has rendered; otherwise, the last line of its errors says why not.

    python -I render_program.py < template.json
"""

import json
import resource
import sys
from datetime import datetime
from typing import Any

from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS, BYTES = 2, 2**29
TALK = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello."}]


class Generation(Extension):
    """The tag of `transformers` around what an assistant says."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _say(kind: type[BaseException], error: BaseException, _: Any) -> None:
    sys.stderr.write(f"{kind.__name__}: {' '.join(str(error)[:200].split())}\n")  # a line instead of a traceback


def main() -> None:
    sys.excepthook = _say
    text, settings = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, **({"ensure_ascii": False} | options))
    environment.globals |= {"raise_exception": _raise, "strftime_now": datetime.now().strftime}
    own = settings.pop("chat_template", None)
    named = {"default": own} if isinstance(own, str) else {one["name"]: one["template"] for one in own or ()}
    template = environment.from_string(named["default"] if text is None else text)
    tokens = {key: value.get("content") if isinstance(value, dict) else value
              for key, value in settings.items() if key.endswith("_token")}  # fmt: skip
    for messages, begin in ((TALK[:1], True), (TALK, False), (TALK * 2, False)):
        template.render(messages=messages, add_generation_prompt=begin, tools=None, documents=None, **tokens)


if __name__ == "__main__":
    main()
