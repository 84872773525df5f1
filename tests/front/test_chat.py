from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from tests.front.checkpoints import TEMPLATE, byte_level_tokenizer, write_checkpoint
from tokenloom.scheduler.front.chat import ChatTemplate, TemplateError
from tokenloom.scheduler.front.text import CheckpointError, load_text_model

LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start|>' + message['role'] + '<|end|>\n\n'+ message['content'] | trim %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] not in ["user", "assistant"] %}
        {{- raise_exception("Only user and assistant may speak, not " + message["role"]) }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {{- "[INST] " + message["content"] + "[/INST]" }}
    {%- else %}
        {%- generation %} {{ message["content"] }}{{ eos_token }}{% endgeneration %}
    {%- endif %}
{%- endfor %}
"""
QWEN = """{%- set ns = namespace(last=none) %}
{%- for message in messages %}
    {%- if message.role == "tool" %}{% continue %}{% endif %}
    {%- set ns.last = loop.index0 %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content | tojson + '<|im_end|>' + '\\n' }}
    {%- if loop.index0 > 4 %}{% break %}{% endif %}
{%- endfor %}
{%- if tools %}{{ tools | tojson(indent=2) }}{% endif %}
{{- ns.last }}{{ dict(a=1) | tojson }}{{ messages | map(attribute='role') | join(',') }}
{%- if documents is defined and documents %}documents{% endif %}
    {%- if add_generation_prompt %}
<|im_start|>assistant{{ strftime_now('%Y') }}{{ pad_token }}
    {%- endif %}
"""
CHAT = [
    ("system", "  You are <b>terse</b> & kind. "),
    ("user", 'Say "héllo"\n日本'),
    ("assistant", "héllo"),
    ("user", "{{ 7 * 7 }} {% raw %}"),
]


@pytest.mark.parametrize("template", [TEMPLATE, LLAMA3, MISTRAL, QWEN])
@pytest.mark.parametrize("chat", [CHAT, CHAT[1:], CHAT[:2], CHAT[1:2]])
async def test_rendering_equals_transformers(
    template: str, chat: list[tuple[str, str]], tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path / "model", byte_level_tokenizer(), template=template)
    theirs = transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": role, "content": content} for role, content in chat],
        add_generation_prompt=True,
        return_dict=False,
    )
    text = load_text_model(str(folder))
    assert (await text.encode_chat(chat)).tolist() == theirs


def named(*names: str) -> list[dict[str, str]]:
    return [{"name": name, "template": f"the {name} one"} for name in names]


@pytest.mark.parametrize(
    ("entry", "files", "rendered"),
    [
        ("of the config", {}, "of the config"),
        (named("tool_use", "default"), {}, "the default one"),
        (named("tool_use"), {}, None),
        (None, {}, None),
        ("of the config", {"chat_template.jinja": "of the file"}, "of the file"),
        (
            None,
            {"chat_template.json": json.dumps({"chat_template": "of the old file"})},
            "of the old file",
        ),
    ],
)
async def test_template_is_found_where_checkpoints_have_it(
    entry: object, files: dict[str, str], rendered: str | None, tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path / "model", byte_level_tokenizer(), template=entry)
    for name, content in files.items():
        (folder / name).write_text(content)
    text = load_text_model(str(folder))
    assert text.has_chat_template == (rendered is not None)
    if rendered is None:
        with pytest.raises(TemplateError):
            await text.encode_chat(CHAT)
    else:
        ids = (await text.encode_chat(CHAT)).tolist()
        assert await text.decode(ids, skip_special_tokens=False) == rendered


@pytest.mark.parametrize(
    ("template", "part"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content.nothing.more }}", "nothing"),
        ("{{ messages[0].__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ 1 // 0 }}", "zero"),
        ("{{ messages[0]['content'] + 1 }}", "str"),
    ],
)
def test_a_template_that_fails_is_a_template_error(template: str, part: str) -> None:
    with pytest.raises(TemplateError, match=part):
        ChatTemplate(template, {}).render(CHAT)


def test_a_template_that_does_not_compile_stops_the_start(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", byte_level_tokenizer(), template="{% if %}")
    with pytest.raises(CheckpointError, match="does not compile"):
        load_text_model(str(folder))
