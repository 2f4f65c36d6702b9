"""Templates against transformers' own rendering."""

from __future__ import annotations

import json

import pytest

from lorry.server.errors import InvalidField
from lorry.server.frontend.chat_template import ChatTemplate, from_folder
from lorry.server.frontend.request import ChatMessage

CHATML = """{%- for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
LLAMA2 = """{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('must begin with the user') }}{% endif %}
{% for message in messages %}
    {% if message['role'] == 'user' %}
{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}
    {% elif message['role'] == 'skipped' %}{% continue %}
    {% else %}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}
    {% endif %}
{% endfor %}{{ {'a': ['ü', 1]} | tojson }}"""
TALK = [("user", " hi\n"), ("assistant", "<hello> & ü"), ("skipped", "-"), ("user", "")]


@pytest.mark.parametrize("source", [CHATML, LLAMA2], ids=["chatml", "llama2"])
@pytest.mark.parametrize("opened", [False, True])
def test_rendering_equals_that_of_transformers(source, opened):
    from transformers.utils.chat_template_utils import render_jinja_template

    special = {"bos_token": "<s>", "eos_token": "</s>"}
    conversation = [{"role": role, "content": content} for role, content in TALK]
    (expected,), _ = render_jinja_template(
        [conversation], chat_template=source, add_generation_prompt=opened, **special
    )
    assert ChatTemplate(source, special).render([ChatMessage(*turn) for turn in TALK], opened) == expected


def test_a_refused_conversation_is_the_clients_fault():
    template = ChatTemplate(LLAMA2, {"bos_token": "<s>", "eos_token": "</s>"})
    with pytest.raises(InvalidField, match="must begin with the user") as refused:
        template.render([ChatMessage("assistant", "x")], True)
    assert refused.value.fields["field"] == "chat.messages"


def test_a_template_cannot_leave_the_sandbox():
    template = ChatTemplate("{{ messages.__class__.__mro__[1].__subclasses__() }}", {})
    with pytest.raises(InvalidField):
        template.render([ChatMessage("user", "x")], True)


@pytest.mark.parametrize("place", ["jinja", "config", "named", "json", "none"])
def test_where_templates_are_found(tmp_path, place):
    source = "{{ bos_token }}{{ messages[0].content }}"
    config = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": None, "model_max_length": 17}
    if place == "jinja":
        (tmp_path / "chat_template.jinja").write_text(source)
        config["chat_template"] = "an older one"
    elif place == "config":
        config["chat_template"] = source
    elif place == "named":
        config["chat_template"] = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": source}]
    elif place == "json":
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": source}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = from_folder(tmp_path)
    if place == "none":
        assert template is None
    else:
        assert template.render([ChatMessage("user", "hi")], True) == "<s>hi"
