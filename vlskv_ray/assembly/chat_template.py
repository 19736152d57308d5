"""A text model's chat template, made to render pictures too."""

from typing import Any

from vlskv_ray.data.sample import Rejected
from vlskv_ray.data.templates import write

PLAIN = "plain"
"""Names the template of the package's own small models: USER: and ASSISTANT: on lines of their own."""

FLATTEN = """\
{#- Messages whose content is a list of parts become the texts that the template below was written for. -#}
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message['content'] is string or message['content'] is none or message['content'] is not defined -%}
{%- set flat.messages = flat.messages + [message] -%}
{%- else -%}
{%- set parts = namespace(text='') -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{%- set parts.text = parts.text ~ 'IMAGE\\n' -%}
{%- else -%}{%- set parts.text = parts.text ~ part['text'] -%}{%- endif -%}
{%- endfor -%}
{%- set flat.messages = flat.messages + [dict(message, content=parts.text)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
{{ '' }}"""
"""What comes before a template that knows texts alone; IMAGE is the image token."""

TURNS = ("What is this?", "A circle.", "Which colour?")


def with_pictures(template: str, image_token: str) -> str:
    """A chat template that renders parts of text and pictures, and writes texts as `template` does.

    Args:
        template: of a text model.
        image_token: written for a picture, and a newline after it.
    """
    return FLATTEN.replace("IMAGE", image_token) + template


def takes_parts(tokenizer: Any, image_token: str) -> bool:
    """Whether a tokenizer's own template renders messages made of parts, a picture as one image token."""
    texts = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(TURNS)]
    parts: list[dict[str, Any]] = [
        {**message, "content": [{"type": "text", "text": message["content"]}]} for message in texts
    ]
    try:
        same = write(tokenizer, parts) == write(tokenizer, texts)
        parts[0]["content"].insert(0, {"type": "image"})
        return same and write(tokenizer, parts).count(image_token) == 1
    except Rejected:
        return False
